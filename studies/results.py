"""What a notebook found: a JSON file with its provenance, and figures; each written whole or not at all.

run = results.Run("04_objects", profile, seed, results_dir=results_dir)    # at the start of the notebook
run.show(fig, "heatmaps", "Six images; white: the box.")                   # shown here, and in the report
run.table("accuracy", spec)                                                # and so is a table
run.keep(accuracy=0.93)                                                    # a number for the results file
run.save(findings, data=[train, val])                                      # the last cell
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from selib import __version__
from selib.atomic import replacing, write_text
from studies import markdown
from studies.profiles import base
from studies.profiles import profile as find_profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
PLACES = ("data_root", "results_dir", "device")  # parameters that say where: they do not change a number


class DataSet(Protocol):
    """What the provenance says of a data set; counts: how much it holds, such as `{"images": 5}`."""

    name: str
    split: str
    synthetic: bool

    @property
    def counts(self) -> Mapping[str, Any]: ...

    @property
    def fingerprint(self) -> str: ...


class Run:
    """One execution of a notebook: collects figures, tables and numbers where they are shown, to save them.

    profile: a name, or None for the default; `sizes` is the profile. parameters: what changes a number.
    """

    def __init__(
        self,
        notebook: str,
        profile: str | None,
        seed: int,
        *,
        results_dir: str | Path | None = None,
        precision: str = "float32",
        **parameters: Any,
    ) -> None:
        self.sizes = find_profile(profile)
        self.notebook = notebook
        self.seed = seed
        self.parameters = {**parameters, "precision": precision}
        self.directory = directory(self.sizes.name, results_dir)
        self.timings: dict[str, Any] = {}  # seconds
        self.synthetic = False  # set it where the data are rendered: every table then says so
        self._metrics: dict[str, Any] = {"tables": {}, "figures": {}}
        self._start = time.perf_counter()

    def show(self, figure: Figure, name: str, caption: str) -> None:
        """Show a figure below the cell; keep it as `<notebook>_<name>`, PNG and PDF, with its caption."""
        from IPython.display import Image, display

        from studies.style import screen

        save_figure(figure, f"{self.notebook}_{name}", self.directory)
        self._metrics["figures"][f"{self.notebook}_{name}"] = caption
        display(Image(data=screen(figure)))  # type: ignore[no-untyped-call]

    def table(self, name: str, spec: Mapping[str, Any]) -> None:
        """Show a table below the cell and keep it; spec is that of `studies.markdown.table`."""
        from IPython.display import Markdown, display

        kept = {**spec, "synthetic": True} if self.synthetic else dict(spec)
        display(Markdown(markdown.table(kept)))  # type: ignore[no-untyped-call]
        self._metrics["tables"][name] = kept

    def keep(self, **values: Any) -> None:
        """Keep values for the results file, under these names."""
        self._metrics.update(values)

    def save(self, findings: Sequence[str], data: Sequence[DataSet] = ()) -> None:
        """Show the findings and write the results file. data: the sets that the numbers were made on."""
        from IPython.display import Markdown, display

        save(
            self.notebook,
            profile=self.sizes.name,
            seed=self.seed,
            params=self.parameters,
            data=describe(*data),
            metrics={"findings": list(findings), **self._metrics},
            timings={"total": time.perf_counter() - self._start, **self.timings},
            out=self.directory,
        )
        display(Markdown("\n".join(f"- {finding}" for finding in findings)))  # type: ignore[no-untyped-call]


def save(
    notebook: str,
    *,
    profile: str,
    seed: int,
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    timings: Mapping[str, Any],
    out: str | Path | None = None,
) -> Path:
    """Write `<out>/<notebook>.json` in one step and return its path; `Run.save` does this for a notebook.

    metrics: JSON types, NumPy and torch values; the report shows its `findings`, `tables` and `figures`.
    timings: seconds, and `device`; the machine is added here. Raises ValueError or TypeError, naming the key,
    for NaN, infinity, what JSON cannot hold, and a figure that was not saved.
    """
    folder = directory(profile, out)
    content = {
        "schema": SCHEMA,
        "notebook": notebook,
        "profile": profile,
        "seed": seed,
        "params": {"precision": "float32"} | {key: params[key] for key in params if key not in PLACES},
        "data": data,
        "metrics": metrics,
        "versions": versions(),
        "timings": {**timings, **machine(str(timings.get("device", "cpu")))},
    }
    plain = {key: _plain(value, key) for key, value in content.items()}
    for name in plain["metrics"].get("figures", {}):
        if not (figures_directory(folder) / f"{name}.png").is_file():
            raise ValueError(f"metrics.figures.{name} is not saved: call save_figure(figure, {name!r}) first")
    path = folder / f"{notebook}.json"
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a results file; ValueError when it is none, or one of another schema."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a results file ({error}): run its notebook again") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}: run its notebook again")
    return result


def comparable(result: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one notebook on one machine must agree on: everything but timings and commit."""
    kept = {key: value for key, value in result.items() if key != "timings"}
    kept["versions"] = {key: value for key, value in result["versions"].items() if key != "commit"}
    return kept


def describe(*sets: DataSet) -> dict[str, Any]:
    """The `data` block of a results file: one entry per set and split."""
    return {
        f"{item.name}/{item.split}": {
            **item.counts,
            "synthetic": item.synthetic,
            "fingerprint": item.fingerprint,
        }
        for item in sets
    }


def save_figure(
    figure: Figure, name: str, out: str | Path | None = None, *, profile: str | None = None
) -> Path:
    """Write a figure as PNG (150 dpi) and PDF (vectors) and return the PNG's path.

    The files carry no date and no program name: equal figures are equal bytes. out and profile as for `save`.
    """
    import matplotlib

    folder = figures_directory(directory(find_profile(profile).name, out))
    nothing = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text in the PDF, as publishers ask
        for kind, metadata in nothing.items():
            with replacing(folder / f"{name}.{kind}") as part:
                figure.savefig(part, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return folder / f"{name}.png"


def directory(profile: str, out: str | Path | None = None) -> Path:
    """Where results go: the argument, else SELIB_RESULTS, else `runs/<profile>/results`."""
    return Path(out or os.environ.get("SELIB_RESULTS") or base() / "runs" / profile / "results")


def figures_directory(results: Path) -> Path:
    """Where figures go: the folder `figures` beside a folder called `results`, else inside it."""
    return results.parent / "figures" if results.name == "results" else results / "figures"


def versions() -> dict[str, str | None]:
    """Python, the packages that decide the numbers, and the commit of this checkout, if it is one."""
    packages = {name: version(name) for name in ("torch", "torchvision")}
    return {"python": platform.python_version(), **packages, "selib": __version__, "commit": commit()}


def commit() -> str | None:
    """The checkout's commit, with `-dirty` when tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
            or None
        )
    except OSError:  # no git
        return None


def machine(device: str) -> dict[str, Any]:
    """The processor's model and the cores this process may use, and the accelerator's model on one."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    cpu = model[1] if model else platform.processor() or platform.machine()
    found: dict[str, Any] = {"device": device, "cpu": cpu, "cores": cores()}
    if device.startswith("cuda"):
        import torch

        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _plain(value: Any, key: str) -> Any:
    """value as JSON types, or an error that names the key."""
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, torch tensors
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: results hold finite numbers only; use None for a missing one")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{key} is a {type(value).__name__}: results hold numbers, strings, lists and mappings")
