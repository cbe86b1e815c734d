"""Drawing in a process of its own, since much of it holds the interpreter's lock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence


def drawn_by(module: str, what: str, jobs: Iterable[tuple[dict, Sequence[str]]]) -> bytes:
    """What ``python -m module`` writes when it reads the jobs, (parameters, what to leave out), as lines of JSON.

    Raises:
        OSError: it failed; the message names ``what`` it draws and the last line of what it said.
    """
    lines = "".join(json.dumps([params, list(without)]) + "\n" for params, without in jobs)
    done = subprocess.run(
        [sys.executable, "-m", module], input=lines.encode(), capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"the process that draws {what} ended with status {done.returncode}: {' '.join(last)}")
    return done.stdout
