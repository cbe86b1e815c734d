"""Notebook files: which there are, what their first cell says, and what of an executed one is committed."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from selib.atomic import write_text
from studies import results
from studies.profiles import base

PATTERN = "[0-9][0-9]_*.ipynb"
UNITS = {"s": 1, "min": 60, "h": 3600}
WIDGET = "application/vnd.jupyter.widget-view+json"
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of cells that papermill adds


def find(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The numbered notebooks, or those named by stem, file name or number; ValueError lists what there is."""
    folder = folder or base() / "notebooks"
    known = {path.stem: path for path in sorted(folder.glob(PATTERN))}
    if not known:
        raise FileNotFoundError(f"no notebooks in {folder}: run the command in the root of the repository")
    by_number = {stem[:2]: path for stem, path in known.items()}
    chosen = []
    for name in names:
        path = known.get(Path(name).stem) or by_number.get(name)
        if path is None:
            raise ValueError(f"unknown notebook {name!r}: choose from {', '.join(known)}")
        chosen.append(path)
    return list(dict.fromkeys(chosen)) or list(known.values())


def read(path: Path) -> NotebookNode:
    """The notebook in that file."""
    return nbformat.read(path, as_version=4)


def first_cell(path: Path) -> tuple[str, dict[str, float]]:
    """A notebook's title and the seconds it takes in each profile; ValueError when its first cell lacks them.

    The cell is Markdown, with a line `# Title` and a line such as
    `**Run time**: smoke 40 s, standard 4 min, full 25 min (two cores of …)`.
    """
    source = read(path).cells[0].source
    title = re.search(r"^# +(.+)$", source, re.MULTILINE)
    times = re.search(r"^\*\*Run time\*\*(.+)$", source, re.MULTILINE)
    if not (title and times):
        needed = "`# Title`, and a line `**Run time**: smoke 40 s, …`"
        raise ValueError(f"{path}: the first cell must hold {needed}")
    found = re.findall(r"(\w+) ([\d.]+) (s|min|h)\b", times[1])
    return title[1].strip(), {profile: float(number) * UNITS[unit] for profile, number, unit in found}


def own_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells without those that papermill added: as many, in the same order, as in the source."""
    return [cell for cell in notebook.cells if not ADDED & set(cell.metadata.get("tags", []))]


def sources(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Kind and source of every cell: equal for a notebook and its executed copies."""
    return [(cell.cell_type, cell.source) for cell in own_cells(notebook)]


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook without timestamps, warnings, progress bars and widgets.

    A widget's still picture stays.
    """
    notebook = copy.deepcopy(notebook)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [output for output in cell.outputs if not _is_volatile(output)]
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:  # of an explorer: one still picture is enough
                    data.pop("text/html", None)
                if output.output_type == "execute_result":
                    output.execution_count = count
    nbformat.validate(notebook)
    return notebook


def _is_volatile(output: NotebookNode) -> bool:
    """Progress bars and warnings on stderr, and widgets, which are nothing without their state."""
    data = output.get("data", {})
    return output.get("name") == "stderr" or WIDGET in data


def publish(run_dir: str | Path, folder: Path | None = None, committed: str | Path | None = None) -> None:
    """Make a finished run the committed one: its results and figures go to `results/<profile>/`.

    In the standard profile the executed notebooks go back to `notebooks/`, cleaned. Raises ValueError when
    one has been edited since it ran.
    """
    run_dir = Path(run_dir)
    found = {file: results.load(file) for file in sorted((run_dir / "results").glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"no results in {run_dir / 'results'}: run the study first")
    cleaned = {}
    for file, result in found.items():
        if result["profile"] == "standard":
            source = (folder or base() / "notebooks") / f"{file.stem}.ipynb"
            executed = read(run_dir / source.name)
            if sources(executed) != sources(read(source)):
                raise ValueError(f"{source} has been edited since it ran: run it again")
            executed.cells = own_cells(executed)
            cleaned[source] = clean(executed)
    for source, executed in cleaned.items():
        write_text(source, nbformat.writes(executed) + "\n")
    for file, result in found.items():
        target = Path(committed or base() / "results") / result["profile"]
        write_text(target / file.name, file.read_text(encoding="utf-8"))
        (target / "figures").mkdir(exist_ok=True)
        for name in result["metrics"].get("figures", {}):
            for kind in ("png", "pdf"):
                shutil.copyfile(run_dir / "figures" / f"{name}.{kind}", target / "figures" / f"{name}.{kind}")
