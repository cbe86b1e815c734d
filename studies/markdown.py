"""Tables and text of the results convention as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SYNTHETIC = "Made on synthetic images (a rendered twin), not on photographs."


def table(spec: Mapping[str, Any]) -> str:
    """A table in Markdown: the caption above it, the notes below.

    spec: `{"caption": str, "columns": [str], "rows": [[cell]], "notes": [str], "synthetic": bool}`, the last
    two optional. A cell is a number, a string, None, or `[mean, low, high]`, shown as `0.411 [0.402, 0.421]`.
    Raises ValueError when a row does not have one cell per column.
    """
    caption, columns, rows = spec["caption"], spec["columns"], spec["rows"]
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"table {caption!r}: row {number} has {len(row)} cells, not {len(columns)}")
    has_words = [any(isinstance(row[index], str) for row in rows) for index in range(len(columns))]
    lines = [line(*(text(column) for column in columns)), line(*("---" if w else "---:" for w in has_words))]
    lines += [line(*(cell(value) for value in row)) for row in rows]
    notes = list(spec.get("notes", []))
    if spec.get("synthetic"):
        notes.append(SYNTHETIC)
    return "\n\n".join([f"**{text(caption)}**", "\n".join(lines), *(f"*{text(note)}*" for note in notes)])


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def cell(value: Any) -> str:
    """A value of a table as text."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list | tuple):
        mean, low, high = map(number, value)
        return f"{mean} [{low}, {high}]"
    return number(value)


def number(value: float) -> str:
    """Three decimals for shares and scores, fewer for larger numbers, two digits for very small ones."""
    if isinstance(value, int):
        return str(value)
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    if size < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def text(words: str) -> str:
    """A string as one line of Markdown that cannot break a table or start a tag."""
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def clock(seconds: float) -> str:
    """Seconds as a person says them: `48 s`, `3 min 20 s`, `1 h 05 min`, `2 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min" + (f" {whole % 60:02d} s" if whole % 60 else "")
    return f"{minutes // 60} h" + (f" {minutes % 60:02d} min" if minutes % 60 else "")
