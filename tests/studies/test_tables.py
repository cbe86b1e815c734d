"""The study's tables, from scores small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from studies import tables
from studies.benchmark import Scores
from studies.report import table


def scores(**values: dict[str, list[float]]) -> Scores:
    arrays = {name: {m: np.array(v, dtype=float) for m, v in row.items()} for name, row in values.items()}
    return Scores(np.arange(4), values=arrays)


ONE = scores(
    a={"energy": [0.5, 0.7, 0.6, 0.6], "deletion": [0.1, 0.2, np.nan, np.nan]},
    b={"energy": [0.3, 0.5, 0.4, 0.4], "deletion": [0.3, 0.4, np.nan, np.nan]},
)
TWO = scores(
    a={"energy": [0.7, 0.9, 0.8, 0.8], "deletion": [0.1, 0.2, np.nan, np.nan]},
    b={"energy": [0.5, 0.7, 0.6, 0.6], "deletion": [0.3, 0.4, np.nan, np.nan]},
)


def test_cells_average_runs_image_by_image_and_leave_out_what_was_not_measured() -> None:
    assert tables.over_runs([ONE, TWO], "a", "energy") == pytest.approx([0.6, 0.8, 0.7, 0.7])
    assert tables.over_runs([ONE, TWO], "a", "deletion") == pytest.approx([0.1, 0.2])


def test_a_gain_is_positive_where_the_first_is_better_whichever_way_the_measure_points() -> None:
    assert tables.compare([ONE], "a", "b", "energy") == pytest.approx((0.2, 0.2, 0.2))
    assert tables.compare([ONE], "a", "b", "deletion") == pytest.approx((0.2, 0.2, 0.2))
    assert tables.compare([ONE, TWO], "b", "a", "energy") == pytest.approx((-0.2, -0.2, -0.2))
    assert tables.best([ONE], ["a", "b"], "energy") == tables.best([ONE], ["a", "b"], "deletion") == "a"


def test_verdicts_follow_the_interval() -> None:
    assert tables.verdict((0.1, 0.01, 0.2)) == "better than"
    assert tables.verdict((-0.1, -0.2, -0.01)) == "worse than"
    assert tables.verdict((0.1, -0.01, 0.2)) == "not distinguishable from"
    assert tables.signed((0.1, -0.01, 0.2), 2) == "+0.10 [-0.01, +0.20]"


def test_the_score_table_says_how_many_images_and_which_way_is_better() -> None:
    spec = tables.score_table([ONE], "Caption", resamples=50)
    assert spec["columns"] == ["map", "energy inside ↑", "deletion ↓"]
    assert spec["rows"][0][0] == "a" and spec["rows"][0][1][0] == pytest.approx(0.6)
    assert spec["notes"][0] == "Images: energy inside 4, deletion 2."
    assert "| a | 0.600" in table(spec)


def test_the_gain_table_names_the_best_rival() -> None:
    spec = tables.gain_table({"net": [ONE]}, [("b", "best", ("energy",))], ["a", "b"], resamples=50)
    assert spec["rows"] == [
        ["net", "energy inside ↑", "b", "a (the best CAM here)", pytest.approx([-0.2] * 3)]
    ]
    assert (
        tables.in_words(spec["rows"][0])
        == "net, energy inside: b is worse than a (the best CAM here), -0.200 [-0.200, -0.200]."
    )


def test_accuracy_in_points_by_seed() -> None:
    right, wrong = np.ones(10), np.zeros(10)
    half = np.arange(10) % 2 * 1.0
    spec, points = tables.accuracy_table({"x": [(right, half), (half, wrong)]}, resamples=200)
    assert spec["rows"][0][1:3] == [0.75, 0.25] and spec["rows"][0][4] == "+50.00, +50.00"
    assert points["x"].mean == pytest.approx(50) and points["x"].low < 50 < points["x"].high


def test_the_gate_table_gives_shares_of_the_original_accuracy() -> None:
    kinds = dict.fromkeys(["original", *tables.GATE_COLUMNS], np.array([1.0, 0.0]))
    kinds |= {"agrees": np.array([1.0, 1.0]), "without_top": np.zeros(2)}
    spec = tables.gate_table({"x": [{"λ = 1": {"right": kinds, "open_gates": 0.25}}]})
    row = dict(zip(spec["columns"], spec["rows"][0], strict=True))
    assert (
        row["data, setting"] == "x, λ = 1" and row["original accuracy"] == 0.5 and row["gates open"] == 0.25
    )
    assert (row["agrees"], row["gated"], row["gated: without"]) == ("100.0 %", "100.0 %", "0.0 %")
