"""Figures, by what they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selib import plot


def test_an_overlay_mixes_image_and_colour_map_by_opacity() -> None:
    image = torch.full((3, 1, 2), 200, dtype=torch.uint8)
    heatmap = torch.tensor([[0.0, 1.0]])
    only_image = plot.overlay(image, heatmap, opacity=0)
    assert only_image.tolist() == [[[200] * 3, [200] * 3]]
    only_colour = plot.overlay(image, heatmap, opacity=1, colormap="gray")
    assert only_colour.tolist() == [[[0] * 3, [255] * 3]]
    half = plot.overlay(image, heatmap, opacity=0.5, colormap="gray")
    assert half.tolist() == [[[100] * 3, [228] * 3]]  # (200 + 255) / 2 = 227.5, rounded to even


def test_an_overlay_refuses_another_size_and_opacity() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pass size="):
        plot.overlay(image, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="opacity"):
        plot.overlay(image, torch.zeros(4, 4), opacity=1.5)


def test_a_grid_has_a_row_per_sample_or_a_column_when_there_are_many() -> None:
    def shape(samples: int) -> tuple[int, int]:
        images = torch.zeros(samples, 3, 8, 8, dtype=torch.uint8)
        boxes = torch.tensor([[1, 1, 5, 5]]).expand(samples, 4)
        fig = plot.heatmap_grid(
            images, {"a": torch.zeros(samples, 8, 8)}, boxes=boxes, titles=["t"] * samples
        )
        assert all(len(ax.patches) == 1 for ax in fig.axes)  # the box on every picture
        return fig.axes[0].get_subplotspec().get_gridspec().get_geometry()

    assert shape(2) == (2, 2)
    assert shape(5) == (2, 5)


def test_a_rank_plot_puts_the_best_on_top() -> None:
    scores = {
        "deletion": {"a": (0.5, 0.4, 0.6), "b": (0.2, 0.1, 0.3)},
        "insertion": {"a": (0.5, 0.4, 0.6), "b": (0.2, 0.1, 0.3)},
    }
    fig = plot.rank_plot(scores, ours=["a"], controls=["b"], lower_is_better=("deletion",))
    labels = [[tick.get_text() for tick in ax.get_yticklabels()] for ax in fig.axes]
    assert labels == [["b", "a"], ["a", "b"]]
    assert all(ax.yaxis_inverted() for ax in fig.axes)  # the first label is the top one


def test_a_map_is_drawn_only_where_the_network_says_yes() -> None:
    images = torch.full((2, 3, 8, 6), 90, dtype=torch.uint8)
    maps = {"Smiling": torch.ones(2, 8, 6)}
    fig = plot.attribute_grid(images, maps, {"Smiling": torch.tensor([0.9, 0.2])}, titles=["a", "b"])
    yes, no = fig.axes[2].images[0], fig.axes[3].images[0]
    assert yes.get_array().shape == (8, 6, 3) and no.get_array().shape == (8, 6)
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "90%", "20%"]


def test_a_contact_sheet_shows_every_image_once() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4).clone()
    fig = plot.contact_sheet(images, columns=3, titles=list("abcde"))
    shown = [int(ax.images[0].get_array().max()) for ax in fig.axes if ax.images]
    assert shown == [0, 1, 2, 3, 4] and len(fig.axes) == 6


def test_dots_are_sorted_by_the_first_series() -> None:
    fig = plot.side_by_side({"without": [0.9, 0.5], "with": [0.8, 0.7]}, ["high", "low"], xlabel="accuracy")
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["low", "high"]
    assert fig.axes[0].lines[1].get_xdata().tolist() == [0.7, 0.8]


def test_the_audit_shows_energy_and_truth_and_leaves_gaps() -> None:
    fig = plot.part_grid({"Male": {"hair": (2.0, 1.5), "nose": (0.5, None)}, "Young": {"hair": (1.0, -0.5)}})
    left, right = (ax.collections[0].get_array() for ax in fig.axes[:2])
    assert np.asarray(left.filled(np.nan)).ravel().tolist()[:2] == [2.0, 1.0]
    assert right.mask.ravel().tolist() == [False, False, True, True]
