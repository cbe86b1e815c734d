"""Turn the results of a run into a Markdown page and a self-contained HTML page, and fill the tables of the README.

A notebook decides what its section holds, through these entries of `metrics` in its results file:

- `findings`: sentences;
- `tables`: `{name: {"caption": str, "columns": [str], "rows": [[cell]], "notes": [str]}}`, notes optional; a cell is a
  number, a string, None, or `[mean, low, high]`, shown as `0.411 [0.402, 0.421]`; `"synthetic": True` marks a table made on
  a twin in a notebook that also used photographs;
- `figures`: `{name: caption}`, each saved with `studies.results.save_figure`.

A benchmark, which is no notebook, gives its section a `title` as well.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import results
from studies.profiles import base
from studies.run import clock, find, first_cell

TABLE = re.compile(r"<!-- table:(\w+)/(\w+):(\w+) -->\n.*?<!-- /table -->", re.DOTALL)
NOTEBOOKS = re.compile(r"<!-- notebooks -->\n.*?<!-- /notebooks -->", re.DOTALL)
SYNTHETIC = "Made on synthetic images (a rendered twin), not on photographs."
STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--soft); text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px; }
"""


def report(run_dir: str | Path) -> tuple[Path, Path]:
    """Write `index.md` and `index.html` into a run's folder from its results and figures; returns both paths.

    run_dir: what `selib run` wrote, or a folder of committed results. The HTML needs no other file and no network.
    Raises FileNotFoundError when there are no results.
    """
    folder = Path(run_dir)
    found = _results(folder)
    page = _page(folder, found)
    title = page.partition("\n")[0].removeprefix("# ")
    results.write_text(folder / "index.md", page)
    results.write_text(folder / "index.html", _html(page, title, folder))
    return folder / "index.md", folder / "index.html"


def table(spec: Mapping[str, Any]) -> str:
    """A table of the results convention in Markdown, its caption above and its notes below.

    Raises ValueError when a row has not one cell per column.
    """
    columns, rows = spec["columns"], spec["rows"]
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(
                f"table {spec['caption']!r}: row {number} has {len(row)} cells for {len(columns)} columns"
            )
    words = [any(isinstance(row[index], str) for row in rows) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(_text(column) for column in columns) + " |",
        "| " + " | ".join("---" if word else "---:" for word in words) + " |",
        *("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows),
    ]
    notes = [*spec.get("notes", []), *([SYNTHETIC] if spec.get("synthetic") else [])]
    return "\n\n".join(
        [f"**{_text(spec['caption'])}**", "\n".join(lines), *(f"*{_text(note)}*" for note in notes)]
    )


def notebook_map(notebooks: Path | None = None) -> str:
    """The notebooks as a Markdown table: title, question, and run times, read from their first cells."""
    lines = ["| notebook | what it shows | smoke | standard | full |", "| --- | --- | ---: | ---: | ---: |"]
    for path in find((), notebooks):
        cell = first_cell(path)
        times = [
            clock(cell.seconds[name]) if name in cell.seconds else "–"
            for name in ("smoke", "standard", "full")
        ]
        link = f"[{path.stem}](notebooks/{path.name})"
        lines.append(f"| {link} | {_text(cell.title)}: {_text(cell.question)} | {' | '.join(times)} |")
    return "\n".join(lines)


def update_readme(
    readme: str | Path, committed: str | Path | None = None, notebooks: Path | None = None
) -> bool:
    """Fill the blocks between markers in a Markdown file; returns whether that changed it.

    `<!-- table:04_objects/main:full -->` … `<!-- /table -->` holds table `main` of `<committed>/full/04_objects.json`;
    `<!-- notebooks -->` … `<!-- /notebooks -->` holds the map of the notebooks. Raises ValueError for a table that is not there.
    """
    old, new = _filled(Path(readme), committed, notebooks)
    if new != old:
        results.write_text(Path(readme), new)
    return new != old


def check_readme(
    readme: str | Path, committed: str | Path | None = None, notebooks: Path | None = None
) -> None:
    """Raise ValueError, with the first stale line, when `update_readme` would change the file."""
    old, new = _filled(Path(readme), committed, notebooks)
    for number, (is_, should) in enumerate(zip(old.splitlines(), new.splitlines(), strict=False), 1):
        if is_ != should:
            raise ValueError(
                f"{readme}, line {number} is stale, run `make readme`: {is_!r} should be {should!r}"
            )
    if old != new:
        raise ValueError(f"{readme} is stale: run `make readme`")


def _filled(readme: Path, committed: str | Path | None, notebooks: Path | None) -> tuple[str, str]:
    root = Path(committed or base() / "results")

    def one(match: re.Match[str]) -> str:
        notebook, name, profile = match.groups()
        result = results.load(root / profile / f"{notebook}.json")
        tables = result["metrics"].get("tables", {})
        if name not in tables:
            raise ValueError(
                f"{readme}: {notebook} ({profile}) has no table {name!r}; it has {', '.join(tables) or 'none'}"
            )
        shown = table(tables[name])
        content = "\n\n".join([shown, *(line for line in _origin(result) if line not in shown)])
        return f"<!-- table:{notebook}/{name}:{profile} -->\n{content}\n<!-- /table -->"

    old = readme.read_text(encoding="utf-8")
    new = TABLE.sub(one, old)
    if NOTEBOOKS.search(new):
        listing = f"<!-- notebooks -->\n{notebook_map(notebooks)}\n<!-- /notebooks -->"
        new = NOTEBOOKS.sub(lambda _: listing, new)
    return old, new


def _results(folder: Path) -> list[dict[str, Any]]:
    inside = folder / "results" if (folder / "results").is_dir() else folder
    found = [results.load(path) for path in sorted(inside.glob("*.json"))]
    if not found:
        raise FileNotFoundError(f"no results in {inside}: give the folder that `selib run` wrote")
    return found


def _page(folder: Path, found: list[dict[str, Any]]) -> str:
    profiles = ", ".join(sorted({result["profile"] for result in found}))
    titles = {r["notebook"]: r["metrics"].get("title") or _title(folder, r["notebook"]) for r in found}
    parts = [
        f"# What did the network look at? Results of the {profiles} profile",
        "Squeeze-and-excitation explanations (Roxo, Costa, Inácio and Proença, arXiv:2412.05134), reproduced and tested\n"
        + "against ground truth and controls. Brackets are 95 % bootstrap intervals.",
        "\n".join(
            [
                "| notebook | data | machine | time |",
                "| --- | --- | --- | ---: |",
                *(_summary(folder, result, titles[result["notebook"]]) for result in found),
            ]
        ),
    ]
    for result in found:
        metrics = result["metrics"]
        parts.append(f"## {_text(titles[result['notebook']])}")
        parts += _origin(result)
        if metrics.get("findings"):
            parts.append("\n".join(f"- {_text(finding)}" for finding in metrics["findings"]))
        parts += [table(spec) for spec in metrics.get("tables", {}).values()]
        for name, caption in metrics.get("figures", {}).items():
            image = _figure(folder, name)
            parts += [f"![{_text(caption)}]({image})", f"*{_text(caption)}*"]
    return "\n\n".join(parts) + "\n"


def _title(folder: Path, notebook: str) -> str:
    """The notebook's title, from the executed copy or else the source; its name when neither is there."""
    for path in (folder / f"{notebook}.ipynb", base() / "notebooks" / f"{notebook}.ipynb"):
        if path.is_file():
            return first_cell(path).title
    return notebook


def _size(entry: Mapping[str, Any]) -> str:
    """How much a data set holds, as its results file says it."""
    return next(f"{entry[unit]} {unit}" for unit in ("images", "clips") if unit in entry)


def _summary(folder: Path, result: Mapping[str, Any], title: str) -> str:
    timings = result["timings"]
    page = folder / f"{result['notebook']}.html"
    name = f"[{_text(title)}]({page.name})" if page.is_file() else _text(title)
    sets = [
        f"{key} ({_size(entry)}{', synthetic' if entry.get('synthetic') else ''})"
        for key, entry in result["data"].items()
    ]
    total = timings.get("total")
    place = f"{timings.get('accelerator') or timings['cpu']}, {timings['cores']} cores"
    return f"| {name} | {_text('; '.join(sets))} | {_text(place)} | {clock(total) if total is not None else '–'} |"


def _origin(result: Mapping[str, Any]) -> list[str]:
    """A paragraph that says so where the numbers come from the twin alone."""
    entries = result["data"].values()
    return [f"*{SYNTHETIC}*"] if entries and all(entry.get("synthetic") for entry in entries) else []


def _figure(folder: Path, name: str) -> str:
    """Where a figure lies, as a link relative to the run's folder."""
    path = (
        results.figures_directory(folder / "results" if (folder / "results").is_dir() else folder)
        / f"{name}.png"
    )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run its notebook again")
    return Path(os.path.relpath(path, folder)).as_posix()


def _html(page: str, title: str, folder: Path) -> str:
    import mistune

    def inline(match: re.Match[str]) -> str:
        content = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = str(mistune.create_markdown(escape=False, plugins=["table"])(page))
    body = re.sub(r'src="([^":]+\.png)"', inline, body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        mean, low, high = value
        return f"{_number(mean)} [{_number(low)}, {_number(high)}]"
    return "–" if value is None else _text(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """Three decimals for shares and scores, fewer for larger numbers, two digits for very small ones."""
    if isinstance(value, int):
        return str(value)
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:.{3 if size < 10 else 1 if size < 1000 else 0}f}"


def _text(text: str) -> str:
    """A string from a notebook as one line of Markdown that cannot break a table or start a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
