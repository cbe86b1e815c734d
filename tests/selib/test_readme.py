"""The README is short, its code runs, its names exist, its numbers are those of the committed results."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import selib
from studies import report

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BULLETS = re.findall(r"^- \*\*.+$", README, re.MULTILINE)

# For each bullet, in the order of its text: notebook, where the number is in its metrics (a pair: the ratio),
# and how it is written.
SE, GATES, SPARSE = "trained with SE", "gates/cifar10/0/λ = 1/", "gates/tiny-imagenet/0/λ = 1/"
NUMBERS = [
    [
        ("01_se_block", f"curves/{SE}/only the top/2", "{:.3f}"),
        ("01_se_block", f"curves/{SE}/random: only/2", "{:.3f}"),
        ("01_se_block", f"accuracy/{SE}", "{:.3f}"),
    ],
    [
        ("04_objects", GATES + "open_gates", "{:.0%}"),
        ("04_objects", GATES + "agrees", "{:.1%}"),
        ("04_objects", (GATES + "original_only_top", GATES + "original"), "{:.1%}"),
        ("04_objects", (GATES + "random_only", GATES + "original"), "{:.1%}"),
        ("04_objects", SPARSE + "agrees", "{:.1%}"),
    ],
    [("04_objects", f"points/cifar10/{i}", "{:+.2f}") for i in range(3)],
    [("04_objects", f"tables/differences/rows/13/4/{i}", "{:+.3f}") for i in range(3)],
    [("03_active_speaker", f"spearman/{i}", "{:.2f}") for i in range(3)],
]


def found(notebook: str, path: str | tuple[str, str]) -> Any:
    if isinstance(path, tuple):
        return found(notebook, path[0]) / found(notebook, path[1])
    value: Any = json.loads((ROOT / "results" / "standard" / f"{notebook}.json").read_text())["metrics"]
    for part in path.split("/"):
        value = value[int(part) if isinstance(value, list) else part]
    return value


def test_it_is_short() -> None:
    assert len(README.split()) <= 900
    rows = [line for line in README.splitlines() if line.startswith("| [0")]
    assert rows and all(len(re.sub(r"\(.*?\)", "", row.split("|")[2]).split()) <= 12 for row in rows)


@pytest.mark.parametrize(("bullet", "numbers"), list(zip(BULLETS, NUMBERS, strict=True)))
def test_its_numbers_are_those_of_the_committed_results(bullet: str, numbers: list[Any]) -> None:
    assert re.search(r"\((real|synthetic)\b", bullet)
    said = re.findall(r"[+−-]?\d+(?:\.\d+)?(?: %)?", re.sub(r"CIFAR-10|\b\d+ images", "", bullet))
    shown = [form.format(found(*where)).replace("%", " %").replace("-", "−") for *where, form in numbers]
    assert said == shown


def test_the_paired_row_is_the_one_the_readme_speaks_of() -> None:
    row = found("04_objects", "tables/differences/rows/13")
    assert row[:4] == [SE, "energy inside ↑", "SE top-gate (paper)", "mean of channels"]
    assert "68" in found("04_objects", "tables/maps_se/notes/0") and "68 images" in README


@pytest.mark.slow
def test_its_code_saves_a_heatmap_and_its_names_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = BLOCKS
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    Path("photos").mkdir()
    for i in range(12):
        pixels = torch.randint(256, (300, 400, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"photos/{i}.jpg")
    code = first.replace('weights="DEFAULT"', "weights=None")  # nothing is downloaded here
    assert code != first and len(code.strip().splitlines()) <= 12
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102 (our own page)
    with Image.open("heatmap.png") as picture:
        assert picture.size == (224, 224) and len(picture.getcolors(100_000) or []) > 1000

    explanation = scope["ex"]
    runs, _ = second.split("\n\n")
    exec(compile(runs, "README.md", "exec"), scope)  # noqa: S102
    assert Path("m.safetensors").is_file()
    names = set(re.findall(r"\bex\.(\w+)", second))
    assert names == {"heatmap", "gates", "influence", "with_gates", "streams", "modalities"}
    assert all(hasattr(explanation, name) for name in names)
    for name in re.findall(r"\bselib((?:\.\w+)+)\(", first + second):
        thing: Any = selib
        for part in name[1:].split("."):
            thing = getattr(thing, part)
        assert callable(thing)


@pytest.mark.parametrize("page", ["README.md", "docs/findings.md"])
def test_the_tables_between_markers_are_up_to_date(page: str, tmp_path: Path) -> None:
    copy = tmp_path / Path(page).name
    copy.write_text((ROOT / page).read_text())
    assert not report.fill(copy, ROOT / "results", ROOT / "notebooks"), "run `make docs`"


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|…)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:selib|studies|tests|docs)/[\w/.]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def text_of(node: ast.AST) -> str:
    """A string of the code, with … where it is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_troubleshooting_is_headed_by_messages_that_exist() -> None:
    files = [path for room in ("selib", "studies") for path in (ROOT / room).rglob("*.py")]
    files += (ROOT / "tests" / "notebooks").glob("*.py")
    texts = {text_of(node) for path in files for node in ast.walk(ast.parse(path.read_text()))}
    for heading in re.findall(r"^## (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE):
        pattern = ".*".join(re.escape(part.strip()) for part in heading.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), heading
