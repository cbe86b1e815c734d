"""Strict reading of what lies beside images: lists and folders that must agree with each other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from studies.data.cache import Listing, shown


def refuse(file: Path, line: int, why: str, remedy: str) -> NoReturn:
    raise ValueError(f"{file}:{line}: {why}; {remedy}")


def read_lines(file: Path, remedy: str) -> list[str]:
    """The lines of a text file, without empty ones at its end."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {remedy}")
    return file.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()


class Table(NamedTuple):
    """One row for each of N images."""

    names: list[str]
    words: list[list[str]]  # what stands between the name and the numbers
    values: np.ndarray  # int64 (N, K)


def read_table(
    file: Path,
    columns: Sequence[str],
    remedy: str,
    *,
    words: int = 0,
    titled: bool = False,
    legal: Collection[int] = (),
    names: Sequence[str] = (),
) -> Table:
    """Read lines of an image's name, some words and one whole number for each column.

    titled: first come two lines more, as CelebA has them: the number of rows, and the columns. legal: the
    numbers that may occur; names: the images that must be named, in this order. Without these two anything
    goes. Raises FileNotFoundError without the file, ValueError with the first line that is wrong.
    """
    lines = read_lines(file, remedy)
    first = 3 if titled else 1
    if titled:
        count, titles, *body = lines + [""] * (2 - len(lines))
        if count.strip() != str(len(body)):
            refuse(file, 1, f"says {count.strip()[:80]!r} rows, and {len(body)} follow", remedy)
        follow(file, 2, titles.split(), columns, remedy)
    whole_row = re.compile(rf"\S+(\s+\S+){{{words}}}(\s+-?\d{{1,18}}){{{len(columns)}}}\s*")
    found: dict[str, str] = {}
    for number, line in enumerate(lines[first - 1 :], first):
        if not whole_row.fullmatch(line):
            wanted = ", ".join(["an image", *["a word"] * words, f"{len(columns)} whole numbers"])
            refuse(file, number, f"expected {wanted}, found {line[:80]!r}", remedy)
        name, rest = line.split(None, 1)
        if name in found:
            refuse(file, number, f"names {name} for the second time", remedy)
        found[name] = rest
    if not found:
        refuse(file, first, "holds no images", remedy)
    parts = [rest.split(None, words) for rest in found.values()]
    # quick: CelebA has 8 million numbers
    values = np.loadtxt([part[-1] for part in parts], np.int64, comments=None, ndmin=2)
    odd = np.argwhere(~np.isin(values, list(legal)) & bool(legal))
    if len(odd):
        row, column = odd[0].tolist()
        what = f"holds {values[row, column]}, not {' or '.join(map(str, legal))}"
        refuse(file, first + row, what, remedy)
    if names:
        follow(file, first, list(found), names, remedy, rows=True)
    return Table(list(found), [part[:-1] for part in parts], values)


def follow(
    file: Path, line: int, found: Sequence[str], wanted: Sequence[str], remedy: str, rows: bool = False
) -> None:
    """Raise ValueError unless the words of a line (rows=True: the names from that line on) are as wanted."""
    for place, (mine, its) in enumerate(zip_longest(found, wanted, fillvalue="nothing")):
        if mine != its:
            refuse(file, line + place * rows, f"found {mine}, expected {its}", remedy)


def read_scenes(file: Path, keys: Sequence[str], remedy: str) -> list[dict[str, Any]]:
    """What a twin's .jsonl file says of its images: one JSON object with these keys a line."""
    scenes = []
    for number, line in enumerate(read_lines(file, remedy), 1):
        try:
            scene = json.loads(line)
            complete = all(key in scene for key in keys)
        except (ValueError, TypeError):
            complete = False
        if not complete:
            refuse(file, number, f"is not a scene with {', '.join(keys)}", remedy)
        scenes.append(scene)
    return scenes


def images_in(folder: Path, remedy: str) -> list[str]:
    """Names of the JPEG and PNG files of a folder, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {remedy}")
    names = [name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    return sorted(name for name in names if not name.startswith("."))


def compare(folder: Path, names: Sequence[str], source: str, remedy: str) -> None:
    """Raise unless a folder holds exactly these images; source: the file that names them."""
    there = set(images_in(folder, remedy))
    if missing := [name for name in names if name not in there]:
        what = f"{len(missing)} of the {len(names)} images that {source} names are missing"
        raise FileNotFoundError(f"{folder}: {what}: {shown(missing)}; {remedy}")
    if unnamed := sorted(there.difference(names)):
        what = f"{source} does not name {len(unnamed)} of the images"
        raise ValueError(f"{folder}: {what}: {shown(unnamed)}; {remedy}")


def listing(root: Path, folder: Path, names: Sequence[str]) -> Listing:
    """Path below the root, size and modification time of these files of a folder."""
    above, below = f"{folder}{os.sep}", folder.relative_to(root).as_posix()
    states = [(name, os.stat(above + name)) for name in names]
    return [(f"{below}/{name}", state.st_size, state.st_mtime_ns) for name, state in states]
