"""The studies' figures, by what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from selib import plot
from studies import figures
from studies.metrics import Interval


def test_a_grid_has_a_row_per_sample_or_a_column_when_there_are_many() -> None:
    def shape(samples: int) -> tuple[int, int]:
        images = torch.zeros(samples, 3, 8, 8, dtype=torch.uint8)
        boxes = torch.tensor([[1, 1, 5, 5]]).expand(samples, 4)
        fig = figures.heatmap_grid(
            images, {"a": torch.zeros(samples, 8, 8)}, boxes=boxes, titles=["t"] * samples
        )
        *pictures, bar = fig.axes
        assert all(len(ax.patches) == 1 for ax in pictures)  # the box on every picture
        assert bar.get_ylabel() == "heat of each map"
        return fig.axes[0].get_subplotspec().get_gridspec().get_geometry()

    assert shape(2) == (2, 2)
    assert shape(5) == (2, 5)


def test_a_map_is_as_opaque_as_it_is_hot_over_a_grey_picture() -> None:
    image = torch.tensor([30, 60, 90], dtype=torch.uint8)[:, None, None].expand(3, 1, 2)
    cold, hot = figures.heated(image, torch.tensor([[0.0, 1.0]]))[0].astype(float)
    assert cold.tolist() == [60] * 3
    assert hot == pytest.approx(0.25 * 60 + 0.75 * plot.coloured(np.ones(1))[0], abs=1)


def test_notes_stand_in_their_tiles_and_long_titles_are_wrapped() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    name = "CAM = Grad-CAM = HiResCAM = XGrad-CAM, and more, and more than fits above one tile"
    fig = figures.heatmap_grid(
        images, {name: torch.zeros(2, 8, 8)}, titles=["a", "b"], notes={name: ["AP .71", "AP .20"]}
    )
    assert [[t.get_text() for t in ax.texts] for ax in fig.axes[:4]] == [[], ["AP .71"], [], ["AP .20"]]
    title = fig.axes[1].get_title().split("\n")
    assert len(title) == 3 and title[-1].endswith("…") and max(map(len, title)) <= 18
    assert figures.fitted("two\nlines", 1.2) == "two\nlines"


def test_a_contact_sheet_shows_every_image_once() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4).clone()
    fig = figures.contact_sheet(images, columns=3, titles=list("abcde"))
    shown = [int(ax.images[0].get_array().max()) for ax in fig.axes if ax.images]
    assert shown == [0, 1, 2, 3, 4] and len(fig.axes) == 6


def test_differences_are_sorted_coloured_and_counted() -> None:
    gains = {
        "AP": {"a": ((0.1, 0.0, 0.2), 400), "b": ((0.3, 0.2, 0.4), 40), "c": ((-0.1, -0.2, 0.0), 400)},
        "ROAD": {"a": ((0.5, 0.4, 0.6), 400), "b": ((0.2, 0.1, 0.3), 20), "c": ((0.0, 0.0, 0.0), 400)},
    }
    fig = figures.difference_plot(gains, ours=["a"], controls=["c"])
    left, right = fig.axes
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert labels == ["b (n = 40, 20)", "a (n = 400)", "c (n = 400)"] and left.yaxis_inverted()
    zero, *drawn = left.lines
    assert zero.get_xdata() == [0, 0]
    assert [line.get_color() for line in drawn[0:6:2]] == [plot.OTHERS, plot.OURS, plot.CONTROLS]
    assert list(drawn[0].get_xdata()) == [0.2, 0.4] and list(right.lines[1].get_xdata()) == [0.1, 0.3]


def test_the_papers_cut_is_drawn_even_beyond_one() -> None:
    saturated = torch.full((5, 10), 0.99)
    saturated[:, 0] = 0.0
    fig = figures.gate_histogram({"open": saturated, "even": torch.linspace(0, 1, 11).expand(3, 11)})
    for ax, row in zip(fig.axes, (saturated[0], torch.linspace(0, 1, 11)), strict=True):
        cut = float(row.mean() + 1.2816 * row.std())
        assert ax.lines[0].get_xdata() == pytest.approx([cut, cut]) and ax.get_xlim()[1] >= cut
        assert ax.get_yscale() == "log"
    assert fig.axes[0].get_xlim()[1] > 1 and "(n = 5)" in fig.axes[0].get_title()
    assert "90 % of gates" in fig.axes[0].get_title()


def test_a_strip_of_channels_outlines_the_object_on_every_tile() -> None:
    image, maps = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.rand(3, 2, 2)
    fig = figures.channel_strip(image, maps, list("abc"), box=torch.tensor([1, 1, 5, 5]))
    assert [len(ax.patches) for ax in fig.axes] == [1] * 4
    assert fig.axes[1].images[0].get_extent() == [-0.5, 7.5, 7.5, -0.5]  # over the image
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = True
    outlined = figures.channel_strip(image, maps, list("abc"), mask=mask)
    assert [len(ax.collections) for ax in outlined.axes] == [1] * 4
    assert not any(ax.patches for ax in figures.channel_strip(image, maps, list("abc")).axes)


def test_the_frontier_has_a_point_for_each_sparsity() -> None:
    gains = Interval(0.0, -0.1, 0.1), Interval(-3.0, -14.0, 8.0)
    points = {"0": (gains[0], 3, 0.4, 0.9), "1": (gains[1], 2, 0.99, 0.1)}
    above, below = figures.frontier_plot({"net": points}, 0.5).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert drawn == {"top decile only": [0.4, 0.99], "without it": [0.9, 0.1]}
    dots = next(line for line in below.lines if line.get_marker() == "o")
    assert list(dots.get_ydata()) == [0.0, -3.0]
    assert next(line for line in below.lines if line.get_label() == "margin").get_ydata()[0] == -0.5
    (bar,) = below.collections  # two seeds give no interval worth drawing
    assert bar.get_segments()[0][:, 1].tolist() == [-0.1, 0.1]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["0", "1"]


def test_a_map_is_drawn_only_where_the_network_says_yes() -> None:
    images = torch.full((2, 3, 8, 6), 90, dtype=torch.uint8)
    maps = {"Smiling": torch.ones(2, 8, 6)}
    fig = figures.attribute_grid(images, maps, {"Smiling": torch.tensor([0.9, 0.2])})
    yes, no = fig.axes[2].images[0], fig.axes[3].images[0]
    assert yes.get_array().shape == (8, 6, 3) and no.get_array().shape == (8, 6)
    assert [ax.get_title() for ax in fig.axes] == ["", "", "90%", "20%"]


def test_a_dot_plot_sorts_and_tells_what_leaves_out_zero() -> None:
    gains = [Interval(0.5, 0.2, 0.8), Interval(-0.3, -0.5, -0.1), Interval(0.1, -0.2, 0.4)]
    ax = figures.dot_plot(gains, ["up", "down", "none"], xlabel="points").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["down", "none", "up"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [-0.3, 0.1, 0.5]
    assert [dot.get_color() for dot in dots] == [plot.OTHERS, plot.CONTROLS, plot.OURS]


def test_a_strip_shows_the_chosen_frames_over_their_time() -> None:
    frames = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((112, 112), np.uint8)
    fig = figures.film_strip(
        {"face": frames, "body": frames},
        {"face": torch.zeros(40, 112, 112)},
        scores=torch.linspace(0, 1, 40),
        labels=torch.cat([torch.ones(10), torch.zeros(30)]),
        wave=np.zeros(40 * 640, np.int16),
        shares={"audio": np.full(40, 3.0), "face": np.full(40, 1.0)},
        shown=4,
    )
    face, body, sound, scores, shares = fig.axes
    # 40 frames in four stretches of ten: the middle one of each, 5, 15, 25 and 35.
    for ax in (face, body):
        picture = np.asarray(ax.images[0].get_array())
        assert [int(picture[50, 58 + 116 * i].max()) for i in range(4)] == [5, 15, 25, 35]
    assert [text.get_text() for text in face.texts] == ["0.20 s", "0.60 s", "1.00 s", "1.40 s"]
    across, tall = fig.get_size_inches() * face.get_position().size
    assert across == pytest.approx(4 * tall)  # the crops are square
    for ax in (sound, scores, shares):
        assert ax.get_xlim() == (0, 1.6) and ax.get_position().x0 == pytest.approx(face.get_position().x0)
    assert [(patch.get_x(), patch.get_width()) for patch in scores.patches] == [(0, pytest.approx(0.4))]
    assert np.allclose(scores.lines[0].get_ydata(), np.linspace(0, 1, 40))
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in shares.collections]
    assert tops == pytest.approx([0.75, 1.0])  # scaled to sum to one


def test_a_strips_colours_reach_up_to_the_largest_value_shown() -> None:
    maps = np.zeros((6, 112, 112))
    maps[1, :, :56], maps[3, :, :56], maps[2] = 51 / 255, 102 / 255, 1.0  # frames 1, 3 and 5 are shown
    fig = figures.film_strip({"face": np.full((6, 112, 112), 90, np.uint8)}, {"face": maps}, shown=3)
    picture = np.asarray(fig.axes[0].images[0].get_array())
    expected = plot.tint(np.full((1, 3), 90, np.uint8), np.array([[0.5, 1.0, 0.0]]))[0]
    assert np.array_equal(picture[50, [30, 146, 262]], expected)
    assert np.array_equal(picture[50, 100], [90, 90, 90])


def test_a_strip_of_plain_frames_has_nothing_beneath() -> None:
    assert len(figures.film_strip({"face": torch.rand(3, 112, 112)}).axes) == 1  # fewer frames than columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": {"face": torch.zeros(8, 7, 7)}}, r"maps for 'face' of \(8, 7, 7\) do not fit the frames"),
        ({"maps": {"body": torch.zeros(8, 112, 112)}}, "maps for 'body'"),
        ({"scores": torch.zeros(7)}, r"'scores' has the shape \(7,\), but there are 8 frames"),
        ({"labels": torch.zeros(1, 8)}, r"'labels' has the shape \(1, 8\)"),
        ({"shares": {"face": -np.ones(8)}}, "must not be negative"),
    ],
)
def test_a_strip_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.film_strip({"face": torch.zeros(8, 112, 112)}, **change)


def test_modality_bars_stand_at_their_means_with_their_intervals() -> None:
    values = {
        "optimal": {"audio": (0.3, 0.2, 0.5), "face": (0.7, 0.6, 0.8)},
        "noise": {"audio": (0.1, 0.0, 0.2), "face": (0.9, 0.8, 1.0)},
    }
    ax = figures.modality_bars(values).axes[0]
    assert [[bar.get_height() for bar in group] for group in ax.containers] == [[0.3, 0.1], [0.7, 0.9]]
    ends = [segment[:, 1].tolist() for lines in ax.collections for segment in lines.get_segments()]
    assert ends == [[0.2, 0.5], [0.0, 0.2], [0.6, 0.8], [0.8, 1.0]]
    hatches = {bars[0].get_hatch() for bars in ax.containers}
    assert len(hatches) == 2  # readable without colours
