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
PREMISE, GAINS, GATES, MAPS, GRID = (
    "premise/lite0/",
    "gains/",
    "gates/0/",
    "tables/differences/rows/",
    "tables/grid/rows/",
)
FACES = "premise/standing, a block each, λ = 0.3/"
NUMBERS = [
    [
        ("04_objects", PREMISE + "as published/only_gates", "{:.2f}"),
        ("04_objects", PREMISE + "as published/only_random", "{:.2f}"),
        ("04_objects", PREMISE + "λ = 1/only_gates", "{:.2f}"),
        ("04_objects", GAINS + "lite0/λ = 1/0", "{:+.2f}"),
    ],
    [
        *[("04_objects", f"{GAINS}lite0/as published/{i}", "{:+.2f}") for i in range(3)],
        *[("04_objects", f"{GAINS}resnet20/as published/{i}", "{:+.2f}") for i in range(3)],
        ("04_objects", GAINS + "lite0/identity start/0", "{:+.2f}"),
    ],
    [
        ("04_objects", GATES + "agreement", "{:.1%}"),
        ("04_objects", GATES + "only", "{:.3f}"),
        ("04_objects", GATES + "without", "{:.3f}"),
        ("04_objects", GATES + "only_another", "{:.3f}"),
    ],
    [
        *[("04_objects", f"{MAPS}0/4/{i}", "{:+.3f}") for i in range(3)],
        *[("04_objects", f"{MAPS}2/4/{i}", "{:+.3f}") for i in range(3)],
        *[("04_objects", f"{GRID}{row}/2/0", "{:.3f}") for row in (4, 1, 0)],
    ],
    [
        ("02_celeba", FACES + "only_gates", "{:.2f}"),
        ("02_celeba", FACES + "without_gates", "{:.2f}"),
        ("02_celeba", FACES + "only_another", "{:.2f}"),
        ("02_celeba", "premise/as published/only_gates", "{:.2f}"),
        ("02_celeba", "four_faces/influence/0", "{:.2f}"),
        ("02_celeba", "four_faces/LayerCAM/0", "{:.2f}"),
        ("02_celeba", "four_faces/top-gate, sparse blocks/0", "{:.2f}"),
    ],
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
    said = re.findall(
        r"[+−-]?\d+(?:\.\d+)?(?: %)?", re.sub(r"Lite0|ResNet-20|λ = 1|\b\d+ images", "", bullet)
    )
    shown = [form.format(found(*where)).replace("%", " %").replace("-", "−") for *where, form in numbers]
    assert said == shown


def test_the_rows_are_those_the_readme_speaks_of() -> None:
    assert found("04_objects", f"{MAPS}0")[:4] == ["lite0", "AP ↑", "SE top-gate (paper)", "mean of channels"]
    assert (
        "the best CAM here" in found("04_objects", f"{MAPS}2")[3]
        and found("04_objects", f"{MAPS}0")[5] == 422
    )
    maps = [found("04_objects", f"{GRID}{number}")[:2] for number in (0, 1, 4)]
    assert [name for name, _ in maps] == ["lite0"] * 3
    assert [name.split(" = ")[0] for _, name in maps] == [
        "influence on the log-odds",
        "influence",
        "SE top-gate (paper)",
    ]
    assert (
        found("04_objects", GATES + "task") == "lite0, 50 classes"
        and found("04_objects", GATES + "count") == 100
    )


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
    with Image.open("heatmaps.png") as picture:
        assert picture.width == 2 * 224 + 8 and len(picture.getcolors(2_000_000) or []) > 1000

    explanation = scope["ex"]
    runs, _ = second.split("\n\n")
    exec(compile(runs, "README.md", "exec"), scope)  # noqa: S102
    assert Path("m.safetensors").is_file() and Path("explained.onnx").is_file()
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
