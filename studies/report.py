"""Turn the results of a run into a Markdown and a self-contained HTML page, and fill the tables of the docs.

A notebook decides what its section holds, through these entries of `metrics` in its results file: `findings`
(sentences), `tables` (see `studies.markdown.table`) and `figures` (a caption for each). A benchmark, which
has no notebook, adds a `title`.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from selib.atomic import write_text
from studies import notebooks, results
from studies.markdown import SYNTHETIC, clock, line, table, text
from studies.profiles import PROFILES, base

FIRST = 5  # findings that are shown at once
WIDTH, QUALITY = 1200, 75  # of figures inside the HTML page; a click opens the file beside it
TABLE = re.compile(r"<!-- table:(\w+)/(\w+):(\w+) -->\n.*?<!-- /table -->", re.DOTALL)
NOTEBOOKS = re.compile(r"<!-- notebooks -->\n.*?<!-- /notebooks -->", re.DOTALL)
STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font: 14px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--soft); text-align: left; overflow-wrap: break-word; }
td[style*="right"] { white-space: nowrap; }
summary { cursor: pointer; }
img { max-width: 100%; background: #fff; }
"""


def report(run_dir: str | Path) -> tuple[Path, Path]:
    """Write `index.md` and `index.html` into a run's folder from its results and figures; returns both paths.

    run_dir: what `studies run` wrote, or a folder of committed results. The HTML needs no other file and no
    network. Raises FileNotFoundError when there are no results.
    """
    folder = Path(run_dir)
    inside = folder / "results" if (folder / "results").is_dir() else folder
    found = [results.load(path) for path in sorted(inside.glob("*.json"))]
    if not found:
        raise FileNotFoundError(f"no results in {inside}: give the folder that `studies run` wrote")
    profiles = ", ".join(sorted({result["profile"] for result in found}))
    title = f"What did the network look at? Results of the {profiles} profile"
    parts = [
        f"# {title}",
        "Squeeze-and-excitation explanations (Roxo, Costa, Inácio and Proença, arXiv:2412.05134), tested\n"
        + "against ground truth and controls. Brackets are 95 % bootstrap intervals.",
        "| notebook | data | machine | time |\n| --- | --- | --- | ---: |\n"
        + "\n".join(_summary(folder, result) for result in found),
    ]
    for result in found:
        parts += _section(folder, results.figures_directory(inside), result)
    page = "\n\n".join(parts) + "\n"
    write_text(folder / "index.md", page)
    write_text(folder / "index.html", _html(page, title, folder))
    return folder / "index.md", folder / "index.html"


def fill(page: Path, committed: Path | None = None, folder: Path | None = None) -> bool:
    """Fill the blocks between markers in a Markdown file; returns whether that changed it.

    `<!-- table:04_objects/main:full -->` … `<!-- /table -->` holds table `main` of `full/04_objects.json`;
    `<!-- notebooks -->` … `<!-- /notebooks -->` holds a table of the notebooks. Raises ValueError for a table
    that is not there. committed, folder: where results and notebooks are, else `results` and `notebooks`.
    """

    def block(match: re.Match[str]) -> str:
        notebook, name, profile = match.groups()
        result = results.load((committed or base() / "results") / profile / f"{notebook}.json")
        tables = result["metrics"].get("tables", {})
        if name not in tables:
            there = ", ".join(tables) or "none"
            raise ValueError(f"{page}: {notebook} ({profile}) has no table {name!r}; it has {there}")
        shown = table(tables[name] | ({"synthetic": True} if _is_synthetic(result) else {}))
        return f"<!-- table:{notebook}/{name}:{profile} -->\n{shown}\n<!-- /table -->"

    old = page.read_text(encoding="utf-8")
    new = TABLE.sub(block, old)
    if NOTEBOOKS.search(new):
        new = NOTEBOOKS.sub(lambda _: f"<!-- notebooks -->\n{_list(folder)}\n<!-- /notebooks -->", new)
    if new != old:
        write_text(page, new)
    return new != old


def _list(folder: Path | None) -> str:
    """The notebooks as a Markdown table: title and run times, read from their first cells."""
    lines = [line("notebook", "about", *PROFILES), line("---", "---", *["---:" for _ in PROFILES])]
    for path in notebooks.find((), folder):
        title, seconds = notebooks.first_cell(path)
        times = [clock(seconds[name]) if name in seconds else "–" for name in PROFILES]
        lines.append(line(f"[{path.stem}](notebooks/{path.name})", text(title), *times))
    return "\n".join(lines)


def _summary(folder: Path, result: Mapping[str, Any]) -> str:
    """A line of the table of contents."""
    title = text(_title(folder, result))
    sets = []
    for name, entry in result["data"].items():
        size = next(f"{entry[unit]} {unit}" for unit in ("images", "clips") if unit in entry)
        sets.append(f"{name} ({size}{', synthetic' if entry.get('synthetic') else ''})")
    timings = result["timings"]
    return line(
        f"[{title}](#{result['notebook']})",
        text("; ".join(sets)),
        text(f"{timings.get('accelerator') or timings['cpu']}, {timings['cores']} cores"),
        clock(timings["total"]) if "total" in timings else "–",
    )


def _section(folder: Path, figures: Path, result: Mapping[str, Any]) -> list[str]:
    metrics = result["metrics"]
    name = result["notebook"]
    parts = [f'<a id="{name}"></a>', f"## {text(_title(folder, result))}"]
    if (folder / f"{name}.html").is_file():
        parts.append(f"[The executed notebook]({name}.html)")
    if _is_synthetic(result):
        parts.append(f"*{SYNTHETIC}*")
    findings = [f"- {text(finding)}" for finding in metrics.get("findings", [])]
    if findings:
        parts.append("\n".join(findings[:FIRST]))
    if more := findings[FIRST:]:
        parts += [f"<details><summary>{len(more)} more findings</summary>", "\n".join(more), "</details>"]
    parts += [table(spec) for spec in metrics.get("tables", {}).values()]
    for name, caption in metrics.get("figures", {}).items():
        path = figures / f"{name}.png"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run its notebook again")
        parts.append(f"![{text(caption)}]({Path(os.path.relpath(path, folder)).as_posix()})")
        parts.append(f"*{text(caption)}*")
    return parts


def _title(folder: Path, result: Mapping[str, Any]) -> str:
    """The title of the notebook, from the executed copy or the source; of a benchmark, its own."""
    name = result["notebook"]
    for path in (folder / f"{name}.ipynb", base() / "notebooks" / f"{name}.ipynb"):
        if path.is_file():
            return notebooks.first_cell(path)[0]
    return str(result["metrics"].get("title", name))


def _is_synthetic(result: Mapping[str, Any]) -> bool:
    """Whether all numbers come from rendered twins."""
    entries = result["data"].values()
    return bool(entries) and all(entry.get("synthetic") for entry in entries)


def _html(page: str, title: str, folder: Path) -> str:
    import mistune

    def inline(match: re.Match[str]) -> str:
        with Image.open(folder / match[2]) as figure:
            small = figure.convert("RGB")
        small.thumbnail((WIDTH, 10 * WIDTH))
        file = BytesIO()
        small.save(file, "WEBP", quality=QUALITY)
        content = base64.b64encode(file.getvalue()).decode()
        return f'<a href="{match[2]}">{match[1]}src="data:image/webp;base64,{content}"{match[3]}</a>'

    body = str(mistune.create_markdown(escape=False, plugins=["table"])(page))
    body = re.sub(r'(<img [^>]*)src="([^":]+\.png)"([^>]*>)', inline, body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


if __name__ == "__main__":
    for page in sys.argv[1:]:
        fill(Path(page))
