"""What a notebook found, as a JSON file with its provenance, and its figures: written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selib import __version__
from selib.atomic import replacing, write_text
from studies.profiles import base
from studies.profiles import profile as find_profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.data import ImageSet, SpeakerSet

SCHEMA = 1
KEYS = ("schema", "notebook", "profile", "seed", "params", "data", "metrics", "versions", "timings")
PLACES = (
    "data_root",
    "results_dir",
    "device",
)  # parameters that say where, not what: they do not change a number


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
    """Write `<out>/<notebook>.json` in one step and return its path.

    metrics may hold anything JSON can, plus NumPy and torch values; `findings`, `tables` and `figures` in it go to the
    report (see `studies.report`). timings: seconds, and `device`; the processor is added here, and `comparable` leaves
    the block out. out: else SELIB_RESULTS, else `runs/<profile>/results`. Raises ValueError for NaN or infinity and
    TypeError for a value JSON cannot hold, naming the key, and ValueError for a figure that was not saved before.
    """
    folder = directory(profile, out)
    content = {
        "schema": SCHEMA,
        "notebook": notebook,
        "profile": profile,
        "seed": seed,
        "params": {key: value for key, value in params.items() if key not in PLACES},
        "data": data,
        "metrics": metrics,
        "versions": versions(),
        "timings": {**timings, **machine(str(timings.get("device", "cpu")))},
    }
    plain = {key: _plain(value, key) for key, value in content.items()}
    for name in plain["metrics"].get("figures", {}):
        if not (figures_directory(folder) / f"{name}.png").is_file():
            raise ValueError(
                f"metrics.figures.{name} is not saved: call studies.results.save_figure(figure, {name!r}) first"
            )
    path = folder / f"{notebook}.json"
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a results file; ValueError with the file's name when it is not one, or of another schema."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a results file ({error}): run its notebook again") from None
    missing = [key for key in KEYS if key not in result] if isinstance(result, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} is not a results file (no {', '.join(missing)}): run its notebook again")
    if result["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {result['schema']}, not {SCHEMA}: run its notebook again")
    return result


def comparable(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part that two runs of one notebook on one machine must agree on: all but the timings and the commit."""
    kept = {key: value for key, value in result.items() if key != "timings"}
    kept["versions"] = {key: value for key, value in result["versions"].items() if key != "commit"}
    return kept


def describe(*sets: ImageSet | SpeakerSet) -> dict[str, Any]:
    """The `data` block of a results file for these image or clip sets, one entry per set and split."""
    return {
        f"{item.name}/{item.split}": {
            **_contents(item),
            "synthetic": item.synthetic,
            "fingerprint": item.fingerprint,
        }
        for item in sets
    }


def _contents(item: Any) -> dict[str, Any]:
    if hasattr(item, "images"):
        return {"images": len(item), "size": list(item.images.shape[-2:]), "classes": len(item.classes)}
    return {
        "clips": len(item),
        "frames": sum(clip.frames for clip in item.clips),
        "streams": list(item.streams),
    }


def save_figure(
    figure: Figure, name: str, out: str | Path | None = None, *, profile: str | None = None
) -> Path:
    """Write a figure as PNG (150 dpi) and PDF (vectors) and return the PNG's path.

    The files carry no date and no program name, so equal figures are equal bytes. They go to the folder `figures`
    beside a folder called `results`, else inside `out`; out and profile are those of `save`. Give the name the
    notebook's number in front ("04_objects_maps"): all notebooks share the folder.
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
    if out is not None:
        return Path(out)
    return Path(os.environ.get("SELIB_RESULTS") or base() / "runs" / profile / "results")


def figures_directory(results: Path) -> Path:
    """Where the figures of that results folder lie."""
    return results.parent / "figures" if results.name == "results" else results / "figures"


def versions() -> dict[str, str | None]:
    """Python, the packages that decide the numbers, and the commit of the checkout selib runs from, if any."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "selib": __version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with `-dirty` when tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(device: str) -> dict[str, Any]:
    """The processor's model and the cores this process may use, and the accelerator's model on one."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0].partition(":")[2].strip() if models else cpu
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
    raise TypeError(
        f"{key} is a {type(value).__name__}: results hold numbers, strings, lists and dictionaries"
    )
