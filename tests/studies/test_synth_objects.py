"""The twin's scenes: deterministic, within their promises, and honest about what a part is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from studies.data import load
from studies.twins import objects as synth

SQUARE = np.ones((3, 3), bool)


def scene(class_index: int, seed: int = 0) -> synth.Params:
    return synth.sample(class_index, np.random.default_rng(seed))


def test_a_scene_is_decided_by_its_seed_and_survives_json() -> None:
    first = scene(3, 1)
    assert first == scene(3, 1) != scene(3, 2)
    image, masks = synth.render(first)
    again, masks_again = synth.render(json.loads(json.dumps(first)))
    assert np.array_equal(image, again) and masks.keys() == masks_again.keys()
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert all(mask.shape == (64, 64) and mask.dtype == bool for mask in masks.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**31), st.data())
def test_removing_a_part_changes_that_part_and_nothing_else(
    class_index: int, seed: int, data: st.DataObject
) -> None:
    params = scene(class_index, seed)
    image, masks = synth.render(params)
    part = data.draw(st.sampled_from(sorted(masks)))
    without, left = synth.render(params, removed=[part])
    # every pixel that shows the part at all: a mask tells by the pixel's centre, which a thin part may miss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "SCALE", 1)  # the larger drawing itself, before it is averaged down
        shown = synth.render(params, size=3 * 64)[1][part].reshape(64, 3, 64, 3).any((1, 3))
    changed = (image != without).any(2)
    assert not (changed & ~shown).any() and not (masks[part] & ~shown).any()
    assert part not in left and left.keys() == masks.keys() - {part}
    for name, mask in left.items():
        assert not (masks[name] & ~mask).any()  # what was seen of the others still is
        assert not (mask & ~masks[name] & ~masks[part]).any()  # what is seen more was behind the part


def test_parts_do_not_overlap_and_removing_a_large_one_is_seen() -> None:
    for index, name in enumerate(synth.CLASSES):
        params = scene(index, 5)
        image, masks = synth.render(params)
        assert np.sum(list(masks.values()), axis=0).max() == 1
        part = max(masks, key=lambda part: int(masks[part].sum()))
        changed = (image != synth.render(params, removed=[part])[0]).any(2)
        assert changed[masks[part]].mean() > 0.8, name


def test_without_any_part_only_the_ground_is_left() -> None:
    params = scene(4, 9)
    bare, masks = synth.render(params, removed=synth.PARTS["cup"])
    assert masks == {}
    image, parts = synth.render(params)
    union = binary_dilation(np.any(list(parts.values()), axis=0), SQUARE)
    assert np.array_equal(image[~union], bare[~union])
    assert (image != bare).any(2).sum() > 0.05 * 64 * 64


def test_an_absent_part_is_drawn_like_a_removed_one() -> None:
    params = {**scene(3, 0), "absent": []}
    gone = {**params, "absent": ["wheels"]}
    assert np.array_equal(synth.render(gone)[0], synth.render(params, removed=["wheels"])[0])
    assert "wheels" not in synth.render(gone)[1]


def test_objects_cover_what_they_promise_and_stay_inside() -> None:
    _, _, masks = synth.render_set(300, "train", 7)
    area = masks.mean((1, 2))
    assert area.min() >= 0.08 and area.max() <= 0.35
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert not masks[:, border].any()
    assert masks[:, 31:33, 31:33].any((1, 2)).mean() < 0.6  # the centre is not a good guess


def test_colours_say_nothing_of_the_class() -> None:
    """Mean colour of every class's parts: within five standard errors of the mean over all."""
    colours = [np.mean(list(params["colours"].values()), axis=0) for params in synth.scenes(1500, "train", 0)]
    by_class = np.array(colours).reshape(-1, 10, 3)
    grand, spread = by_class.mean((0, 1)), by_class.std((0, 1))
    assert (np.abs(by_class.mean(0) - grand) < 5 * spread / np.sqrt(len(by_class))).all()


def test_every_part_but_the_largest_is_sometimes_absent_and_parts_are_shared() -> None:
    absent: dict[str, set[str]] = {name: set() for name in synth.CLASSES}
    for params in synth.scenes(1500, "train", 1):
        absent[params["class"]].update(params["absent"])
    for name, missing in absent.items():
        assert missing and missing < set(synth.PARTS[name])
    shared = {"eye": ["bird", "fish"], "windows": ["car", "house"], "handle": ["cup", "teapot"]}
    for part, owners in shared.items():
        assert [name for name in synth.CLASSES if part in synth.PARTS[name]] == owners


def test_sets_are_balanced_prefixes_and_differ_by_split_and_seed() -> None:
    images, targets, masks = synth.render_set(20, "train", 0)
    assert images.shape == (20, 3, 64, 64) and masks.shape == (20, 64, 64)
    assert targets.tolist() == [*range(10)] * 2
    few, _, _ = synth.render_set(7, "train", 0)
    assert np.array_equal(few, images[:7])
    assert not np.array_equal(few, synth.render_set(7, "val", 0)[0])
    assert not np.array_equal(few, synth.render_set(7, "train", 1)[0])
    image, parts = synth.render(synth.scenes(3, "train", 0)[2])
    assert np.array_equal(images[2], image.transpose(2, 0, 1))
    assert np.array_equal(masks[2], np.any(list(parts.values()), axis=0))


def test_other_sizes_show_the_same_scene() -> None:
    params = scene(6, 3)
    small, masks = synth.render(params, size=32)
    _, large_masks = synth.render(params, size=64)
    assert small.shape == (32, 32, 3)
    assert masks["roof"].mean() == pytest.approx(large_masks["roof"].mean(), abs=0.02)


def test_load_renders_what_is_asked_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = load("synth-objects", "val", root=tmp_path, limit=15, seed=2)
    assert len(data) == 15 and data.synthetic and data.masks is not None
    assert np.array_equal(data.images.numpy(), synth.render_set(15, "val", 2)[0])
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="class_index must be 0..9, not 10"):
        scene(10)
    with pytest.raises(ValueError, match="a car has no part 'wing'; it has cabin, windows"):
        synth.render(scene(3), removed=["wing"])
    with pytest.raises(ValueError, match="split must be 'train' or 'val'"):
        synth.render_set(1, "test", 0)
