"""Pictures, by their pixels."""

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


def test_rows_and_columns_show_every_picture_once_below_its_title() -> None:
    pictures = [np.full((4, 10, 3), k, np.uint8) for k in range(5)]
    plain = plot.column_of([plot.row_of(pictures[:3]), plot.row_of(pictures[3:])])
    assert plain.shape == (2 * (4 + 8), 3 * 10 + 2 * 8, 3)
    assert [int(plain[12 * (k // 3), 18 * (k % 3), 0]) for k in range(6)] == [0, 1, 2, 3, 4, 255]
    titled = plot.row_of(pictures[:3], ["a", "b\nc", "d"])
    assert titled.shape[0] == 34 + 4  # the tallest title has two lines
    assert (titled[34:] == plain[:4]).all() and titled[:34].min() < 128


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


@pytest.mark.slow
def test_pictures_need_neither_seaborn_nor_opencv() -> None:
    code = "import sys; sys.modules.update(seaborn=None, cv2=None); import selib.widgets"
    subprocess.run([sys.executable, "-c", code], check=True)
