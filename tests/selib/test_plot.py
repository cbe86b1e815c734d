"""Figures, by what they hold."""

from __future__ import annotations

import subprocess
import sys

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


def test_a_contact_sheet_shows_every_image_once() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4).clone()
    fig = plot.contact_sheet(images, columns=3, titles=list("abcde"))
    shown = [int(ax.images[0].get_array().max()) for ax in fig.axes if ax.images]
    assert shown == [0, 1, 2, 3, 4] and len(fig.axes) == 6


def test_a_tint_leaves_zero_alone_and_mixes_by_value() -> None:
    grey, values = np.full((1, 3), 200, np.uint8), np.array([[0.0, 1.0, 0.6]])
    found = plot.tint(grey, values, opacity=0.5, colormap="gray")
    # At 1: half image, half white; at 0.6 (153/255): 0.7 of the image and 0.3 of the grey 153.
    assert found.tolist() == [[[200] * 3, [228] * 3, [186] * 3]]
    levels = np.array([[0, 255, 153]], np.uint8)
    assert np.array_equal(plot.tint(grey, levels, opacity=0.5, colormap="gray"), found)
    colour = np.array([[[10, 20, 30]] * 3], np.uint8)
    assert plot.tint(colour, values)[0, 0].tolist() == [10, 20, 30]
    with pytest.raises(ValueError, match="does not fit the image"):
        plot.tint(grey, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="opacity"):
        plot.tint(grey, values, opacity=2)


def test_a_line_of_text_is_cut_at_the_edges() -> None:
    page = np.full((20, 30, 3), 255, np.uint8)
    plot.write_line(page, "longer than the page", 4, 2)
    assert (page[:, :4] == 255).all() and page[:, 20:].min() < 128


def test_selib_alone_imports_no_package_for_pictures() -> None:
    names = "{'matplotlib', 'PIL', 'ipywidgets', 'IPython', 'seaborn', 'cv2'}"
    code = f"import sys, selib; found = {names} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_need_neither_seaborn_nor_opencv() -> None:
    code = "import sys; sys.modules.update(seaborn=None, cv2=None); import selib.widgets"
    subprocess.run([sys.executable, "-c", code], check=True)
