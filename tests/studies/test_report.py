"""The report of a run, and the tables of the docs that are filled from committed results."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_notebooks
from matplotlib.figure import Figure
from PIL import Image

from studies import markdown, report, results

TABLE = {
    "caption": "Localisation | energy < 1",
    "columns": ["map", "energy", "n"],
    "rows": [["influence", [0.4114, 0.4021, 0.4209], 318], ["a|b <i>", None, 20], ["noise", 0.00001, 7]],
    "notes": ["Boxes under half the image."],
}


def finished(folder: Path, synthetic: bool = True) -> Path:
    """A run with one notebook's results: a table, a figure, findings."""
    out = folder / "results"
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    results.save_figure(figure, "00_good_map", out)
    results.save(
        "00_good",
        profile="smoke",
        seed=0,
        params={},
        data={"synth-objects/val": {"images": 32, "synthetic": synthetic, "fingerprint": "ab"}},
        metrics={
            "findings": ["It works: **0.4**."],
            "tables": {"main": TABLE},
            "figures": {"00_good_map": "A *map*."},
        },
        timings={"total": 75.0},
        out=out,
    )
    return folder


def test_a_table_in_markdown_by_hand() -> None:
    assert markdown.table(TABLE).splitlines() == [
        "**Localisation \\| energy &lt; 1**",
        "",
        "| map | energy | n |",
        "| --- | ---: | ---: |",
        "| influence | 0.411 [0.402, 0.421] | 318 |",
        "| a\\|b &lt;i> | – | 20 |",
        "| noise | 1.0e-05 | 7 |",
        "",
        "*Boxes under half the image.*",
    ]
    assert markdown.table({**TABLE, "synthetic": True}).endswith(f"*{markdown.SYNTHETIC}*")
    with pytest.raises(ValueError, match="'Localisation .*row 1 has 2 cells, not 3"):
        markdown.table({**TABLE, "rows": [["influence", 1]]})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (-0.0123, "-0.012"), (12.345, "12.3"), (1234.5, "1234"), (3, "3"), (0.0004, "4.0e-04")],
)
def test_numbers(value: float, text: str) -> None:
    assert markdown.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3900, "1 h 05 min"), (7200, "2 h")],
)
def test_clock(seconds: float, text: str) -> None:
    assert markdown.clock(seconds) == text


def test_report_writes_two_pages_that_say_the_data_are_synthetic(tmp_path: Path) -> None:
    run = finished(tmp_path)
    tiny_notebooks.good(run, "00_good")
    (run / "00_good.html").write_text("")
    pages = report.report(run)
    assert pages == (run / "index.md", run / "index.html")
    text, html = (page.read_text() for page in pages)
    assert "## The 00_good" in text and "| 1 min 15 s |" in text and "32 images, synthetic" in text
    assert markdown.SYNTHETIC in text and "![A *map*.](figures/00_good_map.png)" in text
    assert '<a href="#00_good">' in html and '<a id="00_good"></a>' in html  # contents
    assert '<a href="00_good.html">The executed notebook</a>' in html and ">0.411 [0.402, 0.421]</td>" in html
    assert re.search(r'<a href="figures/00_good_map\.png"><img src="data:image/webp;base64,[^>]*></a>', html)
    assert "<i>" not in html and not re.search(r"<script|<link|https?://", html)
    finished(run, synthetic=False)
    report.report(run)
    assert markdown.SYNTHETIC not in (run / "index.md").read_text()


def test_five_findings_stand_first_and_figures_are_made_small(tmp_path: Path) -> None:
    run = finished(tmp_path)
    stored = json.loads((run / "results" / "00_good.json").read_text())
    stored["metrics"]["findings"] = [f"Finding {k}." for k in range(8)]
    (run / "results" / "00_good.json").write_text(json.dumps(stored))
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), np.uint8)
    Image.fromarray(noise).save(run / "figures" / "00_good_map.png")
    text, html = (page.read_text() for page in report.report(run))
    more = text.index("<details><summary>3 more findings</summary>")
    assert text.index("- Finding 4.") < more < text.index("- Finding 5.") < text.index("</details>")
    assert "<li>Finding 7.</li>" in html and "</details>" in html
    (content,) = re.findall(r"data:image/webp;base64,([^\"]+)", html)
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
        assert shown.size == (1200, 600)


def test_report_of_committed_results_needs_no_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    committed = tmp_path / "committed"
    finished(tmp_path / "run")
    (tmp_path / "run" / "results").rename(committed)
    (tmp_path / "run" / "figures").rename(committed / "figures")
    metrics = {"title": "Benchmark: speed", "findings": ["Fast."]}
    common = {"seed": 0, "params": {}, "data": {}, "timings": {}}
    results.save("speed", profile="full", metrics=metrics, out=committed, **common)
    text = report.report(committed)[0].read_text()
    assert "## 00_good" in text and "## Benchmark: speed\n\n- Fast." in text


def test_report_without_results_or_with_a_missing_figure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results in"):
        report.report(tmp_path)
    run = finished(tmp_path / "run")
    (run / "figures" / "00_good_map.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"00_good_map\.png is missing: run its notebook again"):
        report.report(run)
    assert not (run / "index.md").exists()


def test_blocks_are_filled_from_committed_results(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (finished(tmp_path / "run") / "results" / "00_good.json").rename(tmp_path / "full" / "00_good.json")
    tiny_notebooks.good(tmp_path / "notebooks", "00_good")
    page = tmp_path / "README.md"
    page.write_text(
        "# Title\n\n<!-- table:00_good/main:full -->\nold\n<!-- /table -->\n\n"
        "text\n\n<!-- notebooks -->\n<!-- /notebooks -->\nend\n"
    )
    places = (tmp_path, tmp_path / "notebooks")
    assert report.fill(page, *places)
    assert not report.fill(page, *places)
    text = page.read_text()
    shown = markdown.table(TABLE | {"synthetic": True})
    assert text.startswith(f"# Title\n\n<!-- table:00_good/main:full -->\n{shown}\n<!-- /table -->\n\ntext")
    row = "| [00_good](notebooks/00_good.ipynb) | The 00_good | 2 s | 1 min 30 s | 2 h |"
    assert row in text.splitlines() and text.endswith("<!-- /notebooks -->\nend\n")
    page.write_text("<!-- table:00_good/other:full -->\n<!-- /table -->\n")
    with pytest.raises(ValueError, match="00_good .full. has no table 'other'; it has main"):
        report.fill(page, *places)
