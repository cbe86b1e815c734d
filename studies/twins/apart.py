"""Drawing in processes of its own, since much of it holds the interpreter's lock; and which code has
drawn.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

Job = TypeVar("Job")
Drawn = TypeVar("Drawn")


def drawn_by(module: str, what: str, jobs: Iterable[tuple[dict, Sequence[str]]]) -> bytes:
    """What `python -m module` writes when it reads the jobs, (parameters, what to leave out), as JSON lines.

    Raises OSError, with `what` it draws and the last line of what it said, when the process fails.
    """
    lines = "".join(json.dumps([params, list(without)]) + "\n" for params, without in jobs)
    done = subprocess.run(
        [sys.executable, "-m", module], input=lines.encode(), capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"the process that draws {what} ended with status {done.returncode}: {' '.join(last)}")
    return done.stdout


def in_parts(
    draw: Callable[[Sequence[Job]], Drawn], jobs: Sequence[Job], size: int, threads: int
) -> Iterator[Drawn]:
    """draw(part) for the jobs in parts of `size`, in order; several parts at a time, one in each thread."""
    parts = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(draw, parts)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for what has not begun


@cache
def version() -> str:
    """12 hex digits that change with this package's sources and the libraries that draw: a key for caches."""
    found = hashlib.sha256(f"{cv2.__version__} {np.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]
