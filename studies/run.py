"""Run the notebooks with papermill, each in a process of its own, and keep only what ran to its end."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from selib.atomic import write_text
from studies import notebooks, results
from studies.markdown import clock
from studies.profiles import base
from studies.profiles import profile as find_profile

GIVEN = ("profile", "data_root", "results_dir")  # parameters that the runner sets
BEAT = 15.0  # seconds between progress lines when the output is not a terminal


@dataclass(frozen=True)
class Outcome:
    """What became of a notebook: `status` is done, skipped or failed; `error`, one line, names the cell."""

    name: str
    status: str
    seconds: float
    error: str = ""


def run(
    names: Sequence[str] = (),
    *,
    profile: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    resume: bool = False,
    parameters: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    timeout: int | None = None,
) -> list[Outcome]:
    """Execute notebooks into `out` (default `runs/<profile>`): executed copies, HTML, results and figures.

    jobs: how many at once; they share the cores. resume: skip those executed with this source, profile and
    parameters before. timeout: seconds a cell may take, else the profile's. A notebook that fails leaves only
    `<name>.failed.ipynb`; the others still run. Raises ValueError, before anything starts, for an unknown
    notebook, profile or parameter.
    """
    sizes = find_profile(profile)
    paths = notebooks.find(names, folder)
    root = Path(data or os.environ.get("SELIB_DATA") or base() / "data").resolve()
    target = Path(out or base() / "runs" / sizes.name).resolve()
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    _check_parameters(paths, parameters or {})
    given = {"profile": sizes.name, "data_root": str(root), **(parameters or {})}
    waiting = [path for path in paths if not (resume and _is_done(path, target, given))]
    seconds = {path: notebooks.first_cell(path)[1].get(sizes.name, 0.0) for path in waiting}
    if jobs > 1:
        waiting.sort(key=seconds.__getitem__, reverse=True)

    outcomes = {path: Outcome(path.stem, "skipped", 0.0) for path in paths if path not in waiting}
    progress = _Progress(len(waiting), max([sum(seconds.values()) / jobs, *seconds.values()]))
    progress.say(f"{len(waiting)} of {len(paths)} notebooks, profile {sizes.name}{progress.total}")
    if waiting and any((target / "checkpoints").glob("*")):
        progress.say(f"networks trained before are reused: delete {target / 'checkpoints'} to train anew")
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Worker(waiting.pop(0), target, given, timeout or sizes.cell_timeout, jobs))
            time.sleep(0.2)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                outcomes[worker.path] = worker.finish()
                running.remove(worker)
                progress.finish(outcomes[worker.path])
            if running:
                progress.show(running)
    finally:
        for worker in running:  # none but after an interrupt
            worker.stop()
    return [outcomes[path] for path in paths]


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


def _check_parameters(paths: Sequence[Path], extra: Mapping[str, Any]) -> None:
    for name in GIVEN:
        if name in extra:
            raise ValueError(f"parameter {name!r} is set by the runner: use --profile, --data or --out")
    if extra:
        from papermill import inspect_notebook

        for path in paths:
            known = inspect_notebook(_unformatted(path))
            for name in extra:
                if name not in known:
                    raise ValueError(f"{path.stem} has no parameter {name!r}: it has {', '.join(known)}")


def _unformatted(path: Path) -> str:
    """papermill fills in {names} in a path: double the braces of a real one."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _is_done(path: Path, target: Path, given: Mapping[str, Any]) -> bool:
    """Whether an executed copy has this source and these parameters, which papermill writes into it."""
    executed = target / path.name
    if not (executed.is_file() and (target / "results" / f"{path.stem}.json").is_file()):
        return False
    copy, source = notebooks.read(executed), notebooks.read(path)
    used = dict(copy.metadata.get("papermill", {}).get("parameters", {}))
    used.pop("results_dir", None)
    return used == json.loads(json.dumps(given)) and notebooks.sources(copy) == notebooks.sources(source)


class _Worker:
    """One notebook in a process of its own, which writes into a scratch folder until it has succeeded."""

    def __init__(self, path: Path, target: Path, given: Mapping[str, Any], timeout: int, jobs: int) -> None:
        self.path = path
        self._target = target
        self._timeout = timeout
        self._start = time.monotonic()
        target.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=target))
        self.executed = self._scratch / path.name
        job = {
            "input_path": _unformatted(path.resolve()),
            "output_path": _unformatted(self.executed),
            "parameters": {**given, "results_dir": str(self._scratch / "results")},
            "cwd": str(path.resolve().parent),
            "execution_timeout": timeout,
        }
        environment = {
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one the user has elsewhere
            "OMP_NUM_THREADS": str(max(1, results.cores() // jobs)),
            "PYTHONHASHSEED": "0",  # the order of sets must not change a number
            **os.environ,
            "SELIB_CHECKPOINTS": str(target / "checkpoints"),  # what one notebook trains, the next one finds
        }
        with (self._scratch / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "studies.run", json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the runner only, which then ends its workers
            )

    def finish(self) -> Outcome:
        """Move results, figures, HTML and executed copy to `target`; of a failed notebook the copy alone."""
        name, target = self.path.stem, self._target
        failed_copy = target / f"{name}.failed.ipynb"
        failed_copy.unlink(missing_ok=True)
        error = self._error()
        if not error:
            write_text(target / f"{name}.html", _html(self.executed))
            for folder in ("results", "figures"):
                (target / folder).mkdir(exist_ok=True)
                for file in (self._scratch / folder).glob("*"):
                    os.replace(file, target / folder / file.name)
            os.replace(self.executed, target / self.path.name)  # last: it is what --resume looks for
        elif self.executed.is_file():
            os.replace(self.executed, failed_copy)
        shutil.rmtree(self._scratch)
        return Outcome(name, "failed" if error else "done", time.monotonic() - self._start, error)

    def _error(self) -> str:
        error = failure(notebooks.read(self.executed), self._timeout) if self.executed.is_file() else ""
        if not error and self.process.returncode:
            said = (self._scratch / "log").read_text(errors="replace").split("\n")
            last = [line.strip() for line in said if line.strip()][-1:]
            error = ": ".join([f"its process ended with code {self.process.returncode}", *last])
        if not error and not (self._scratch / "results" / f"{self.path.stem}.json").is_file():
            error = f"wrote no results/{self.path.stem}.json: a notebook ends with run.save(…)"
        return error

    def stop(self) -> None:
        """End the process, which shuts its kernel down, and leave nothing of it."""
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self._scratch)


def _html(executed: Path) -> str:
    from nbconvert.exporters import HTMLExporter

    notebook = notebooks.clean(notebooks.read(executed))
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": executed.stem}})
    # The next notebook's page lies beside it.
    return re.sub(r'(href="\d\d_\w+)\.ipynb', r"\1.html", str(page))


def failure(executed: NotebookNode, timeout: int) -> str:
    """The cell at which an executed notebook stopped, and why, in one line; empty when it passed.

    A cell whose duration reaches its limit has failed even where the kernel reported success: an interrupted
    widget does that. Cells are counted from 1 in the source notebook, Markdown included.
    """
    for number, cell in enumerate(notebooks.own_cells(executed), 1):
        record = cell.metadata.get("papermill", {})
        where = f"cell {number} ({_first_line(cell)})"
        if record.get("exception"):
            error = next(output for output in cell.outputs if output.output_type == "error")
            reason = [line.strip() for line in error.evalue.splitlines() if line.strip()]
            return ": ".join([where, error.ename, *reason[-1:]])
        if (record.get("duration") or 0) >= timeout:
            return f"{where}: ran into its limit of {timeout} s"
    return ""


def _first_line(cell: NotebookNode) -> str:
    """The first line of code of a cell, to find it by."""
    for line in map(str.strip, cell.source.splitlines()):
        if line and not line.startswith(("#", "%")):
            return line[:60]
    return "empty"


class _Progress:
    """Progress on stderr: one line kept up to date on a terminal, else a line every now and then."""

    def __init__(self, count: int, seconds: float) -> None:
        self.total = f", about {clock(seconds)}" if seconds else ""
        self._count = count
        self._finished = 0
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print a line of its own."""
        print(("\r\033[K" if self._terminal else "") + line, file=sys.stderr, flush=True)

    def finish(self, outcome: Outcome) -> None:
        """Say how a notebook ended."""
        self._finished += 1
        reason = f": {outcome.error}" if outcome.error else ""
        self.say(f"{outcome.name} {outcome.status} in {clock(outcome.seconds)}{reason}")

    def show(self, running: Sequence[_Worker]) -> None:
        """Say where the running notebooks are, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (1.0 if self._terminal else BEAT):
            return
        self._shown = now
        line = f"[{self._finished}/{self._count}] {clock(now - self._start)}{self.total}"
        line = " | ".join([line, *(f"{worker.path.stem} {_position(worker.executed)}" for worker in running)])
        if self._terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _position(executed: Path) -> str:
    """The cell that papermill is at, from the copy that it keeps up to date."""
    try:
        cells = notebooks.own_cells(notebooks.read(executed))
        begun = [n for n, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time]
    except (OSError, ValueError, AttributeError):  # not there yet, or being written
        begun = []
    return f"cell {begun[-1]}/{len(cells)} {_first_line(cells[begun[-1] - 1])}" if begun else "starting"


def _work() -> None:
    """A worker: executes one notebook, as described by the command line."""
    import papermill

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, and so shuts the kernel down
    job = json.loads(sys.argv[1])
    papermill.execute_notebook(**job, kernel_name="python3", language="python", progress_bar=False)


if __name__ == "__main__":
    _work()
