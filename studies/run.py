"""Run the notebooks headless, each in a process of its own, and keep only what ran to its end."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import nbformat
from nbformat import NotebookNode

from studies import results
from studies.profiles import Profile, base
from studies.profiles import profile as find_profile

PATTERN = "[0-9][0-9]_*.ipynb"
GIVEN = ("profile", "data_root", "results_dir")  # parameters that the runner sets
BEAT = 15.0  # seconds between progress lines when the output is not a terminal
UNITS = {"s": 1, "min": 60, "h": 3600}
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: `status` is done, skipped or failed; `error` is one line that names the cell."""

    name: str
    status: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class FirstCell:
    """What a notebook's first cell says: its title, its question, the seconds it takes in each profile."""

    title: str
    question: str
    seconds: dict[str, float]


def find(names: Sequence[str] = (), notebooks: Path | None = None) -> list[Path]:
    """The numbered notebooks, or those named by stem, file name or number; ValueError lists what there is."""
    folder = notebooks or base() / "notebooks"
    known = {path.stem: path for path in sorted(folder.glob(PATTERN))}
    if not known:
        raise FileNotFoundError(f"no notebooks in {folder}: run selib in the root of the repository")
    chosen = []
    for name in names:
        stem = Path(name).stem
        path = known.get(stem) or next((path for key, path in known.items() if key[:2] == stem), None)
        if path is None:
            raise ValueError(f"unknown notebook {name!r}: choose from {', '.join(known)}")
        chosen.append(path)
    return list(dict.fromkeys(chosen)) or list(known.values())


def first_cell(path: Path) -> FirstCell:
    """Read title, question and run times from a notebook's first cell; ValueError when one is missing.

    The cell is Markdown: a `# Title`, then the question as its first paragraph, and somewhere a line such as
    `**Run time**: smoke 40 s, standard 4 min, full 25 min (two cores of …)`.
    """
    source = nbformat.read(path, as_version=4).cells[0].source
    title = re.search(r"^# +(.+)$", source, re.MULTILINE)
    paragraphs = [text for text in re.split(r"\n\s*\n", source) if not text.lstrip().startswith("#")]
    times = re.search(r"^\*\*Run time\*\*(.+)$", source, re.MULTILINE)
    if not (title and paragraphs and times):
        raise ValueError(
            f"{path}: the first cell must hold `# Title`, the question, and a line `**Run time**: smoke 40 s, …`"
        )
    seconds = {
        name: float(number) * UNITS[unit]
        for name, number, unit in re.findall(r"(\w+) ([\d.]+) (s|min|h)\b", times[1])
    }
    return FirstCell(title[1].strip(), " ".join(paragraphs[0].split()), seconds)


def literal(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE`; the value is read as JSON, else as a Python literal, else it is a string."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ValueError(f"-p {text}: give a parameter as KEY=VALUE")
    for read in (json.loads, ast.literal_eval):
        try:
            return key, read(value)
        except (ValueError, SyntaxError):
            continue
    return key, value


def run(
    names: Sequence[str] = (),
    *,
    profile: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    resume: bool = False,
    parameters: Mapping[str, Any] | None = None,
    notebooks: Path | None = None,
    timeout: int | None = None,
) -> list[Outcome]:
    """Execute notebooks into `out` (default `runs/<profile>`): the executed copies, their HTML, results and figures.

    jobs: how many at once; they share the cores. resume: skip those whose executed copy was made from this source,
    these parameters and this profile. timeout: seconds a cell may take, else the profile's. A notebook that fails
    leaves `<name>.failed.ipynb` and no results; the others still run. Raises ValueError for an unknown notebook, profile or
    parameter before anything starts.
    """
    sizes = find_profile(profile)
    paths = find(names, notebooks)
    root = Path(data or os.environ.get("SELIB_DATA") or base() / "data").resolve()
    target = Path(out or base() / "runs" / sizes.name).resolve()
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    extra = dict(parameters or {})
    _check_parameters(paths, extra)
    given = {"profile": sizes.name, "data_root": str(root), **extra}
    digests = {path: _digest(path, given, sizes) for path in paths}
    waiting = [path for path in paths if not (resume and _is_done(path, target, digests[path]))]
    outcomes = {path: Outcome(path.stem, "skipped", 0.0) for path in paths if path not in waiting}

    target.mkdir(parents=True, exist_ok=True)
    board = _Board(waiting, len(paths) - len(waiting), sizes.name, jobs)
    if waiting and any((target / "checkpoints").glob("*")):
        board.say(
            f"networks already trained are taken from {target / 'checkpoints'}: delete it to train anew"
        )
    study = _Study(target, given, timeout or sizes.cell_timeout, jobs, board)
    pool = ThreadPoolExecutor(jobs)
    try:
        with board:
            longest_first = sorted(waiting, key=board.expected, reverse=True) if jobs > 1 else waiting
            futures = {path: pool.submit(study.notebook, path, digests[path]) for path in longest_first}
            outcomes |= {path: future.result() for path, future in futures.items()}
    finally:
        study.stop()  # does something only after an interrupt
        pool.shutdown(cancel_futures=True)
    return [outcomes[path] for path in paths]


def publish(run_dir: str | Path, notebooks: Path | None = None, committed: str | Path | None = None) -> None:
    """Make a finished run the committed one: its results and figures into `results/<profile>/`, and, for the standard
    profile, the executed notebooks back into `notebooks/`, without what changes from run to run.

    Raises ValueError when a notebook has been edited since it ran, or shows a path of this machine.
    """
    run_dir = Path(run_dir).resolve()
    found = {file: results.load(file) for file in sorted((run_dir / "results").glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"no results in {run_dir / 'results'}: run the study first")
    cleaned = {}
    for file, result in found.items():
        if result["profile"] == "standard":
            source = (notebooks or base() / "notebooks") / f"{file.stem}.ipynb"
            executed = clean(nbformat.read(run_dir / source.name, as_version=4))
            if _cells(executed) != _cells(nbformat.read(source, as_version=4)):
                raise ValueError(f"{source} has been edited since it ran: run it again")
            for number, cell in enumerate(executed.cells, 1):
                if any(str(place) in _shown(cell) for place in (run_dir, base(), Path.home())):
                    raise ValueError(
                        f"{source}: cell {number} shows a path of this machine: print a file's name instead"
                    )
            cleaned[source] = executed
    for source, executed in cleaned.items():
        results.write_text(source, nbformat.writes(executed) + "\n")
    for file, result in found.items():
        folder = Path(committed or base() / "results") / result["profile"]
        results.write_text(folder / file.name, file.read_text(encoding="utf-8"))
        (folder / "figures").mkdir(exist_ok=True)
        for name in result["metrics"].get("figures", {}):
            for kind in ("png", "pdf"):
                shutil.copyfile(run_dir / "figures" / f"{name}.{kind}", folder / "figures" / f"{name}.{kind}")


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook fit to be committed: no injected cell, timestamps, widget state or progress bars."""
    notebook = copy.deepcopy(notebook)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.cells = [
        cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        )
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    _still(notebook)
    nbformat.validate(notebook)
    return notebook


def _still(notebook: NotebookNode) -> None:
    """Leave out, in place, what is nothing on a page: progress bars, warnings, and widgets, but for the still picture they bring."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_volatile(output)]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)


def _is_volatile(output: NotebookNode) -> bool:
    """Progress bars and warnings on stderr, and widgets, which are nothing without their state."""
    if output.output_type == "stream":
        return bool(output.name == "stderr")
    data = output.get("data", {})
    return WIDGET in data and "image/png" not in data


def _shown(cell: NotebookNode) -> str:
    """The text among a cell's outputs (not the images, whose base64 can spell anything)."""
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text", ""))
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def _cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def _check_parameters(paths: Sequence[Path], extra: Mapping[str, Any]) -> None:
    for name in extra:
        if name in GIVEN:
            raise ValueError(f"parameter {name!r} is set by the runner: use --profile, --data or --out")
    if not extra:
        return
    from papermill import inspect_notebook

    for path in paths:
        known = inspect_notebook(_unformatted(path))
        for name in extra:
            if name not in known:
                raise ValueError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known)}")


def _unformatted(path: Path) -> str:
    """papermill fills in {names} in a path: double the braces of a real one."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _digest(path: Path, given: Mapping[str, Any], sizes: Profile) -> str:
    source = _cells(nbformat.read(path, as_version=4))
    text = json.dumps([source, dict(given), asdict(sizes)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_done(path: Path, target: Path, digest: str) -> bool:
    executed = target / path.name
    if not (executed.is_file() and _is_result(target / "results" / f"{path.stem}.json")):
        return False
    return bool(nbformat.read(executed, as_version=4).metadata.get("selib", {}).get("digest") == digest)


def _is_result(path: Path) -> bool:
    try:
        return bool(results.load(path))
    except (OSError, ValueError):
        return False


class _Study:
    """The notebooks of one call of `run`: each in a worker process and a scratch folder, moved to `target` at its end."""

    def __init__(
        self, target: Path, given: Mapping[str, Any], timeout: int, jobs: int, board: _Board
    ) -> None:
        self._target = target
        self._given = given
        self._timeout = timeout
        self._board = board
        self._workers: list[subprocess.Popen[str]] = []
        self._stopped = threading.Event()
        self._environment = {
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one the user has installed elsewhere
            "OMP_NUM_THREADS": str(max(1, results.cores() // jobs)),
            "PYTHONHASHSEED": "0",  # the order of sets must not change a number
            **os.environ,
            "SELIB_CHECKPOINTS": str(target / "checkpoints"),  # what one notebook trains, the next one finds
        }

    def notebook(self, path: Path, digest: str) -> Outcome:
        """Execute one notebook; its results, figures, HTML and executed copy appear only if it succeeded."""
        start = time.monotonic()
        target = self._target
        failed = target / f"{path.stem}.failed.ipynb"
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=target))
        try:
            self._board.show(path, 0, "")
            error = self._work(path, scratch, digest)
            if not error and not _is_result(scratch / "results" / f"{path.stem}.json"):
                error = f"wrote no results/{path.stem}.json: a notebook ends with studies.results.save(…)"
            if error:
                if not self._stopped.is_set():
                    failed.unlink(missing_ok=True)
                    if (scratch / path.name).is_file():
                        os.replace(scratch / path.name, failed)
                    self._board.finish(path, f"failed in {clock(time.monotonic() - start)}: {error}")
                return Outcome(path.stem, "failed", time.monotonic() - start, error)
            for folder in ("results", "figures"):
                (target / folder).mkdir(exist_ok=True)
                for file in sorted((scratch / folder).glob("*")):
                    os.replace(file, target / folder / file.name)
            os.replace(scratch / f"{path.stem}.html", target / f"{path.stem}.html")
            os.replace(scratch / path.name, target / path.name)  # last: it is what --resume looks for
            failed.unlink(missing_ok=True)
            self._board.finish(path, f"done in {clock(time.monotonic() - start)}")
            return Outcome(path.stem, "done", time.monotonic() - start)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def stop(self) -> None:
        """End the workers that still run; each shuts its kernel down."""
        self._stopped.set()
        for worker in list(self._workers):
            worker.terminate()

    def _work(self, path: Path, scratch: Path, digest: str) -> str:
        """Follow a worker process to its end; returns its error line, empty when all went well."""
        job = {
            "source": str(path.resolve()),
            "target": str(scratch / path.name),
            "parameters": {**self._given, "results_dir": str(scratch / "results")},
            "timeout": self._timeout,
            "digest": digest,
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "studies.run"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the runner only, which then ends its workers in order
            )
            self._workers.append(worker)
            if self._stopped.is_set():
                worker.terminate()
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(job))
            worker.stdin.close()
            error = None
            for line in worker.stdout:
                message = json.loads(line)
                if "error" in message:
                    error = str(message["error"])
                else:
                    self._board.show(path, message["cell"], message["label"])
            code = worker.wait()
            self._workers.remove(worker)
            if error is None:
                log.seek(0)
                said = [line.strip() for line in log if line.strip()]
                error = ": ".join([f"its process ended with code {code}", *said[-1:]])
            return error


def _worker() -> None:
    """Execute the one notebook described on stdin; on stdout, JSON lines: cells as they start, then the outcome."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, and so shuts the kernel down
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints joins the log

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    job = json.load(sys.stdin)
    target = Path(job["target"])
    source = Path(job["source"])
    error = execute(
        source, target, job["parameters"], job["timeout"], lambda cell, label: tell(cell=cell, label=label)
    )
    if not error:
        notebook = nbformat.read(target, as_version=4)
        notebook.metadata["selib"] = {"digest": job["digest"]}
        results.write_text(target, nbformat.writes(notebook) + "\n")
        from nbconvert.exporters import HTMLExporter

        _still(notebook)
        page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": target.stem}})
        results.write_text(target.with_suffix(".html"), page)
    tell(error=error)


def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    timeout: int,
    on_cell: Callable[[int, str], None],
) -> str:
    """Execute a notebook with this interpreter's kernel into `target`; returns an error line, empty when it passed.

    timeout: seconds per cell. A cell whose duration reaches it fails the run even where the kernel reported success:
    an interrupted widget does that. Cells are counted from 1 in the source notebook, Markdown included.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(source, as_version=4).cells]
    injected = next((index + 1 for index, names in enumerate(tags) if "parameters" in names), 0)

    def number(index: int) -> int:
        return index + 1 if index < injected else index  # the injected cell stands at position `injected`

    def start(cell: NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            on_cell(number(cell_index), _label(cell))

    try:
        notebook = papermill.execute_notebook(
            _unformatted(source),
            _unformatted(target),
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(source.parent),
            execution_timeout=timeout,
            on_cell_start=start,
        )
    except PapermillExecutionError as failure:
        return f"cell {number(failure.cell_index)} ({_label(failure)}): {failure.ename}: {_one_line(failure.evalue)}"
    except (
        TimeoutError,
        RuntimeError,
    ) as failure:  # a stall, or a kernel that died: papermill has saved what ran
        notebook = nbformat.read(target, as_version=4) if target.is_file() else nbformat.v4.new_notebook()
        ran = [index for index, cell in enumerate(notebook.cells) if cell.metadata["papermill"]["start_time"]]
        where = f"cell {number(ran[-1])} ({_label(notebook.cells[ran[-1]])}): " if ran else ""
        return (
            stalled(notebook, timeout, number)
            or f"{where}{type(failure).__name__}: {_one_line(str(failure))}"
        )
    return stalled(notebook, timeout, number)


def stalled(
    notebook: NotebookNode, timeout: int, number: Callable[[int], int] = lambda index: index + 1
) -> str:
    """An error line that names the first cell whose recorded duration reaches the timeout; empty when there is none."""
    for index, cell in enumerate(notebook.cells):
        if (cell.metadata.get("papermill", {}).get("duration") or 0) >= timeout:
            return f"cell {number(index)} ({_label(cell)}): ran into its limit of {timeout} s"
    return ""


def _label(cell: Any) -> str:
    """The first line of code of a cell, to find it by."""
    lines = [
        line.strip()
        for line in cell.source.splitlines()
        if line.strip() and not line.lstrip().startswith(("#", "%"))
    ]
    return lines[0][:60] if lines else "empty"


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class _Board:
    """Progress on stderr: one line kept up to date on a terminal, else a line every now and then."""

    def __init__(self, paths: Sequence[Path], skipped: int, profile: str, jobs: int) -> None:
        self._seconds = {path: _expected(path, profile) for path in paths}
        self._cells = {path: len(nbformat.read(path, as_version=4).cells) for path in paths}
        self._running: dict[str, str] = {}
        self._finished = 0
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        total = max(sum(self._seconds.values()) / jobs, max(self._seconds.values(), default=0.0))
        self._total = f" of about {clock(total)}" if total else ""
        again = f", {skipped} already done" if skipped else ""
        plural = "" if len(paths) == 1 else "s"
        self.say(
            f"{len(paths)} notebook{plural}, profile {profile}{again}"
            + (f": about {clock(total)}" if total else "")
        )

    def expected(self, path: Path) -> float:
        """The seconds a notebook says it takes; 0 when it does not say."""
        return self._seconds[path]

    def show(self, path: Path, cell: int, label: str) -> None:
        """Say where a notebook is; cell 0: its kernel is starting."""
        where = f"cell {cell}/{self._cells[path]} {label}" if cell else "starting"
        with self._lock:
            self._running[path.stem] = f"{path.stem} {where}"

    def finish(self, path: Path, end: str) -> None:
        """Take a notebook off the board and say how it ended."""
        with self._lock:
            self._running.pop(path.stem)
            self._finished += 1
            self.say(f"{path.stem} {end}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(1.0 if self._terminal else BEAT):
            with self._lock:
                now = f"[{self._finished}/{len(self._seconds)}] {clock(time.monotonic() - self._start)}{self._total}"
                line = " | ".join([now, *self._running.values()])
                if self._terminal:
                    width = shutil.get_terminal_size().columns
                    print(f"\r\033[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
                else:
                    print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        print(("\r\033[K" if self._terminal else "") + line, file=sys.stderr, flush=True)


def _expected(path: Path, profile: str) -> float:
    try:
        return first_cell(path).seconds.get(profile, 0.0)
    except ValueError:
        return 0.0


def clock(seconds: float) -> str:
    """Seconds as a person says them: `48 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


if __name__ == "__main__":
    _worker()
