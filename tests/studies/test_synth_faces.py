"""The rendered faces: attributes, labels and counterfactuals hold together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.twins import faces
from studies.twins.face_params import SPURIOUS


def attribute_rows(people: list[faces.Params]) -> np.ndarray:
    return np.stack([faces.attributes(p) for p in people])


FACES = faces.scenes(300, "train", 0)
ROWS = attribute_rows(FACES)


def column(name: str, rows: np.ndarray = ROWS) -> np.ndarray:
    return rows[:, faces.ATTRIBUTES.index(name)]


def rho(a: str, b: str, rows: np.ndarray) -> float:
    return float(np.corrcoef(column(a, rows), column(b, rows))[0, 1])


def first(name: str) -> faces.Params:
    """A sharp face that has the attribute to be seen."""
    wanted = (column(name) == 1) & (column("Blurry") == (name == "Blurry"))
    return FACES[int(np.nonzero(wanted)[0][0])]


def label(part: str) -> int:
    return 1 + faces.PARTS.index(part)


def test_there_are_celebas_forty_attributes_and_at_least_24_have_a_place() -> None:
    assert len(faces.ATTRIBUTES) == 40 == len(set(faces.ATTRIBUTES))
    assert list(faces.ATTRIBUTES[:3]) == ["5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive"]
    assert len(faces.REGIONS) >= 24
    assert set(faces.REGIONS) <= set(faces.ATTRIBUTES)
    assert {part for parts in faces.REGIONS.values() for part in parts} <= set(faces.PARTS)


def test_attributes_are_neither_rare_nor_ubiquitous_and_correlate_as_in_celeba() -> None:
    rows = attribute_rows(faces.scenes(1500, "val", 0))
    shares = dict(zip(faces.ATTRIBUTES, rows.mean(0).round(3), strict=True))
    assert {name: share for name, share in shares.items() if not 0.03 < share < 0.85} == {}
    assert rho("Wearing_Lipstick", "Heavy_Makeup", rows) > 0.5
    assert rho("Male", "Wearing_Lipstick", rows) < -0.5
    assert rho("Smiling", "High_Cheekbones", rows) > 0.4
    assert rho("Young", "Gray_Hair", rows) < -0.3
    assert rho("Chubby", "Double_Chin", rows) > 0.3
    assert abs(rho("Eyeglasses", "Wearing_Hat", rows)) < 0.1


def test_in_the_spurious_split_glasses_go_with_hats_and_nothing_else_changes() -> None:
    rows = attribute_rows(faces.scenes(1500, "spurious", 0))
    assert rho("Eyeglasses", "Wearing_Hat", rows) == pytest.approx(SPURIOUS, abs=0.04)
    assert abs(rho("Eyeglasses", "Smiling", rows)) < 0.1


def test_the_same_parameters_give_the_same_pixels_and_survive_json() -> None:
    image, parts = faces.draw(FACES[3])
    again, labels = faces.draw(json.loads(json.dumps(FACES[3])))
    assert (image == again).all() and (parts == labels).all()
    assert image.shape == (218, 178, 3) and image.dtype == np.uint8
    assert parts.shape == (218, 178) and parts.max() <= len(faces.PARTS)


def test_a_larger_set_only_adds_faces_and_splits_and_seeds_differ() -> None:
    assert faces.scenes(3, "train", 0) == faces.scenes(5, "train", 0)[:3]
    assert faces.scenes(3, "train", 0) != faces.scenes(3, "val", 0)
    assert faces.scenes(3, "train", 0) != faces.scenes(3, "train", 1)
    with pytest.raises(ValueError, match="split must be one of train, val, test, spurious"):
        faces.scenes(1, "holdout", 0)


@pytest.mark.parametrize("name", sorted(faces.REGIONS))
def test_an_attributes_region_is_there_when_the_attribute_is(name: str) -> None:
    _, parts = faces.draw(first(name))
    wanted = [label(part) for part in faces.REGIONS[name]]
    assert np.isin(parts, wanted).sum() >= 60, "too small to be seen"


@pytest.mark.parametrize("part", sorted(faces.NEUTRAL))
def test_removing_a_part_takes_its_attributes_and_changes_the_picture_there(part: str) -> None:
    names = [name for name, parts in faces.REGIONS.items() if parts[0] == part]
    for name in names or {"skin": ["Pale_Skin"]}[part]:
        p = first(name)
        before, after = faces.draw(p), faces.draw(p, [part])
        assert column(name, faces.attributes(faces.without(p, [part]))[None])[0] == 0
        changed = np.abs(before[0].astype(int) - after[0]).max(2) > 25
        assert changed.sum() >= 30
        where = before[1] == label(part)
        assert changed[where].mean() > 3 * changed[~where].mean(), "most of the change lies in the part"


def test_removing_a_part_leaves_pose_light_and_background_alone() -> None:
    p = first("Wearing_Hat")
    assert (faces.draw(p)[0][150:] == faces.draw(p, ["hat"])[0][150:]).all()
    assert (faces.landmarks(p) == faces.landmarks(faces.without(p, ["hat"]))).all()


def test_render_names_what_can_be_seen_without_overlap() -> None:
    _image, masks = faces.render(first("Eyeglasses"))
    assert "glasses" in masks and "skin" in masks
    assert np.stack(list(masks.values())).sum(0).max() == 1
    with pytest.raises(ValueError, match="no part 'cloth' to remove"):
        faces.render(FACES[0], ["cloth"])


def test_landmarks_lie_on_eyes_nose_and_mouth() -> None:
    hits = []
    for p in FACES[:60]:
        if p["Eyeglasses"]:  # dark ones hide the eyes
            continue
        _, parts = faces.draw(p)
        points = faces.landmarks(p)
        seen = [parts[y, x] for x, y in points[:3]]
        hits.append(np.equal(seen, [label("eyes"), label("eyes"), label("nose")]))
        mouth = np.argwhere(parts == label("mouth"))[:, ::-1]
        if len(mouth) > 100:  # no beard over it
            assert all(np.abs(mouth - corner).sum(1).min() <= 5 for corner in points[3:])
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0]
    assert np.mean(hits) > 0.95


def test_attractive_is_the_planted_rule_and_nothing_else() -> None:
    points = sum(weight * column(name) for name, weight in faces.ATTRACTIVE.items())
    assert ((points > 1) == (column("Attractive") == 1)).all()


def test_what_a_hat_hides_is_not_said_to_be_there() -> None:
    hats = column("Wearing_Hat") == 1
    for name in ("Bald", "Bangs", "Receding_Hairline"):
        assert column(name)[hats].sum() == 0
    colours = [column(f"{colour}_Hair") for colour in ("Black", "Blond", "Brown", "Gray")]
    assert np.sum(colours, axis=0).max() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_any_face_can_be_drawn_and_any_part_removed(seed: int, spurious: bool) -> None:
    p = faces.sample(np.random.default_rng(seed), spurious=spurious)
    image, _parts = faces.draw(p, list(faces.NEUTRAL))
    assert image.std() > 5
    gone = faces.attributes(faces.without(p, list(faces.NEUTRAL)))
    lasting = {"Chubby", "Male", "Oval_Face", "Young", "No_Beard", "Blurry", "Attractive", "Bald"}
    assert {n for n, v in zip(faces.ATTRIBUTES, gone, strict=True) if v} <= lasting
