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
    assert tables.verdict((0.1, -0.01, 0.2)) == "no difference detected"
    assert tables.signed((0.1, -0.01, 0.2), 2) == "+0.10 [-0.01, +0.20]"


def test_the_score_table_says_how_many_images_and_which_way_is_better() -> None:
    spec = tables.score_table([ONE], "Caption", resamples=50)
    assert spec["columns"] == ["map", "energy inside ↑", "deletion ↓"]
    assert spec["rows"][0][0] == "a (n = 4)" and spec["rows"][0][1][0] == pytest.approx(0.6)
    assert spec["notes"][0] == "Images: energy inside 4, deletion 2."
    assert "| a (n = 4) | 0.600" in table(spec)


def test_only_images_that_both_have_in_every_run_are_compared() -> None:
    gap = scores(a={"ap": [0.9, 0.5, np.nan, 0.7]}, b={"ap": [np.nan, 0.4, 0.9, 0.3]})
    full = scores(a={"ap": [0.9, 0.5, 0.1, 0.7]}, b={"ap": [0.9, 0.4, 0.9, 0.3]})
    assert tables.common([gap, full], ["a", "b"], "ap").tolist() == [1, 3]
    assert tables.compare([gap], "a", "b", "ap").mean == pytest.approx(0.25)
    assert tables.compare([gap, full], "a", "b", "ap").mean == pytest.approx(0.25)
    # Over its own images b has the better mean: .6 for .533.
    own = scores(a={"ap": [0.1, 0.5, 0.5, 0.5]}, b={"ap": [np.nan, np.nan, 0.4, 0.4]})
    assert tables.best([own], ["a", "b"], "ap") == "a"
    found = tables.differences([gap], ["ap"], reference="b")
    assert found["AP"]["a"][0].mean == pytest.approx(0.25) and found["AP"]["a"][1] == 2
    assert list(found["AP"]) == ["a"]


def test_halves_share_no_image_and_are_always_the_same() -> None:
    rows = np.arange(0, 22, 2)
    first, second = tables.halves(rows)
    assert (len(first), len(second)) == (5, 6) and sorted([*first, *second]) == rows.tolist()
    assert sorted(first) != rows[:5].tolist() and np.array_equal(tables.halves(rows)[0], first)


def test_the_best_rival_is_picked_on_one_half_and_beaten_on_the_other() -> None:
    first, second = tables.halves(np.arange(4))
    lucky = np.zeros(4)
    lucky[first], lucky[second] = 1.0, 0.1  # the best on the half to choose on
    one = scores(a={"ap": [0.6] * 4}, b={"ap": lucky.tolist()}, c={"ap": [0.5] * 4})
    spec = tables.gain_table({"net": [one]}, [("a", "best", ("ap",))], ["b", "c", "absent"], resamples=50)
    row = spec["rows"][0]
    assert row[3] == "b (the best CAM here)" and row[4] == pytest.approx([0.5] * 3) and row[5] == 2
    assert "one half" in spec["notes"][0] and "other half" in spec["notes"][0]


def test_the_gain_table_marks_primaries_and_adjusts_the_others() -> None:
    pairs = [("a", "b", ("energy", "deletion")), ("b", "a", ("energy",))]
    named = [("net", "a", "b", "deletion")]
    spec = tables.gain_table({"net": [ONE]}, pairs, [], primary=named, resamples=50)
    # Equal differences: of 2ⁿ sign flips two are as large; two comparisons are left for Holm.
    assert [row[-2:] for row in spec["rows"]] == [[4, 2 * 2 / 16], [2, "primary"], [4, 2 * 2 / 16]]
    said = [tables.in_words(row) for row in spec["rows"]]
    assert said[1] == "net, deletion: a is better than b (n = 2), +0.200 [+0.200, +0.200]."
    assert said[0] == (
        "net, energy inside: no difference detected between a and b (n = 4), +0.200 [+0.200, +0.200], "
        "p = 0.250 after Holm."
    )
    assert "| n | p (Holm) |" in table(spec) and "for 2 comparisons" in spec["notes"][1]
    with pytest.raises(ValueError, match="primary=.*'ap'.*are not among"):
        tables.gain_table({"net": [ONE]}, pairs, [], primary=[("net", "a", "b", "ap")])
