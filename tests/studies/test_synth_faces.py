"""The rendered faces: attributes, labels and counterfactuals hold together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.twins import faces

FACES = faces.scenes(300, "train", 0)
ROWS = np.stack([faces.attributes(p) for p in FACES])


def column(name: str, rows: np.ndarray = ROWS) -> np.ndarray:
    return rows[:, faces.ATTRIBUTES.index(name)]


def first(name: str) -> faces.Params:
    """A sharp face that has the attribute to be seen."""
    wanted = (column(name) == 1) & (column("Blurry") == (name == "Blurry"))
    return FACES[int(np.nonzero(wanted)[0][0])]


def test_there_are_celebas_forty_attributes_and_at_least_24_have_a_place() -> None:
    assert len(faces.ATTRIBUTES) == 40 == len(set(faces.ATTRIBUTES))
    assert list(faces.ATTRIBUTES[:3]) == ["5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive"]
    assert len(faces.REGIONS) >= 24
    assert set(faces.REGIONS) <= set(faces.ATTRIBUTES)
    assert {part for parts in faces.REGIONS.values() for part in parts} <= set(faces.PARTS)


def test_every_attribute_occurs_and_none_is_nearly_always_there() -> None:
    share = np.stack([faces.attributes(p) for p in faces.scenes(1500, "val", 0)]).mean(0)
    assert {n: round(s, 3) for n, s in zip(faces.ATTRIBUTES, share, strict=True) if not 0.03 < s < 0.85} == {}


def test_the_correlations_point_the_way_they_do_in_celeba() -> None:
    rows = np.stack([faces.attributes(p) for p in faces.scenes(1500, "val", 0)])

    def rho(a: str, b: str) -> float:
        return float(np.corrcoef(column(a, rows), column(b, rows))[0, 1])

    assert rho("Wearing_Lipstick", "Heavy_Makeup") > 0.5
    assert rho("Male", "Wearing_Lipstick") < -0.5
    assert rho("Smiling", "High_Cheekbones") > 0.4
    assert rho("Young", "Gray_Hair") < -0.3
    assert rho("Chubby", "Double_Chin") > 0.3
    assert abs(rho("Eyeglasses", "Wearing_Hat")) < 0.1


def test_in_the_spurious_split_glasses_go_with_hats_and_nothing_else_changes() -> None:
    rows = np.stack([faces.attributes(p) for p in faces.scenes(1500, "spurious", 0)])
    both = np.corrcoef(column("Eyeglasses", rows), column("Wearing_Hat", rows))[0, 1]
    assert both == pytest.approx(faces.SPURIOUS, abs=0.04)
    assert abs(np.corrcoef(column("Eyeglasses", rows), column("Smiling", rows))[0, 1]) < 0.1


def test_the_same_parameters_give_the_same_pixels_and_survive_json() -> None:
    p = FACES[3]
    image, parts = faces.draw(p)
    again, labels = faces.draw(json.loads(json.dumps(p)))
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
    wanted = [1 + faces.PARTS.index(part) for part in faces.REGIONS[name]]
    assert np.isin(parts, wanted).sum() >= 60, "too small to be seen"


@pytest.mark.parametrize("part", sorted(faces.NEUTRAL))
def test_removing_a_part_takes_its_attributes_and_changes_the_picture_there(part: str) -> None:
    names = [name for name, parts in faces.REGIONS.items() if parts[0] == part and name in faces.ATTRIBUTES]
    for name in names or {"skin": ["Pale_Skin"]}[part]:
        p = first(name)
        before, after = faces.draw(p), faces.draw(p, [part])
        assert column(name, faces.attributes(faces.without(p, [part]))[None])[0] == 0
        changed = np.abs(before[0].astype(int) - after[0]).max(2) > 25
        assert changed.sum() >= 30
        where = before[1] == 1 + faces.PARTS.index(part)
        assert changed[where].mean() > 3 * changed[~where].mean(), "most of the change lies in the part"


def test_removing_a_part_leaves_pose_light_and_background_alone() -> None:
    p = first("Wearing_Hat")
    (before, parts), (after, _labels) = faces.draw(p), faces.draw(p, ["hat"])
    far = np.zeros_like(parts, bool)
    far[150:, :] = True
    assert (before[far] == after[far]).all()
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
        seen = [faces.PARTS[parts[y, x] - 1] for x, y in points[:3]]
        hits.append([a in b for a, b in zip(seen, (("eyes",), ("eyes",), ("nose",)), strict=True)])
        mouth = np.argwhere(parts == 1 + faces.PARTS.index("mouth"))[:, ::-1]
        if len(mouth) > 100:  # no beard over it
            assert all(np.abs(mouth - corner).sum(1).min() <= 5 for corner in points[3:])
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0]
    assert np.mean(hits) > 0.95


def test_attractive_is_the_planted_rule_and_nothing_else() -> None:
    points = sum(weight * column(name) for name, weight in faces.ATTRACTIVE.items())
    assert ((points > 1) == (column("Attractive") == 1)).all()


def test_what_a_hat_hides_is_not_said_to_be_there() -> None:
    hats = column("Wearing_Hat") == 1
    assert (
        column("Bald")[hats].sum()
        == column("Bangs")[hats].sum()
        == column("Receding_Hairline")[hats].sum()
        == 0
    )
    hair = ROWS[:, [faces.ATTRIBUTES.index(f"{c}_Hair") for c in ("Black", "Blond", "Brown", "Gray")]]
    assert hair.sum(1).max() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_any_face_can_be_drawn_and_any_part_removed(seed: int, spurious: bool) -> None:
    p = faces.sample(np.random.default_rng(seed), spurious=spurious)
    image, _parts = faces.draw(p, list(faces.NEUTRAL))
    assert image.std() > 5
    gone = faces.attributes(faces.without(p, list(faces.NEUTRAL)))
    lasting = {"Chubby", "Male", "Oval_Face", "Young", "No_Beard", "Blurry", "Attractive", "Bald"}
    assert {n for n, v in zip(faces.ATTRIBUTES, gone, strict=True) if v} <= lasting
