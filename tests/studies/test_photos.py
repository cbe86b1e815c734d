"""Photographs: exact crops, trimaps and class names from tiny folders; enlarged sets keep what is where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selib.pixels import normalize
from studies.data import ImageSet, catalog, enlarged, imagenet_sample, load, pets, tiny_at, tiny_wnids
from studies.data.photos import central


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_set(count: int = 3, side: int = 8, **more: Any) -> ImageSet:
    images = torch.from_numpy(np.stack([noise(side, side, k).transpose(2, 0, 1) for k in range(count)]))
    return ImageSet("mine", "val", images, torch.arange(count) % 2, ["a", "b"], **more)


# --- crops ----------------------------------------------------------------------------------------


def test_central_cuts_the_middle_out_and_resizes_no_more_than_it_must() -> None:
    pixels = noise(16, 21)
    assert np.array_equal(central(Image.fromarray(pixels), (16, 16)), pixels[:, 2:18].transpose(2, 0, 1))
    inner = central(Image.fromarray(pixels), (14, 14), margin=16 / 14)
    assert np.array_equal(inner, pixels[1:15, 3:17].transpose(2, 0, 1))
    half = central(Image.fromarray(noise(20, 8)), (4, 4))
    whole = np.asarray(Image.fromarray(noise(20, 8)).resize((4, 10), Image.Resampling.BICUBIC))
    assert np.array_equal(half, whole[3:7].transpose(2, 0, 1))


def test_central_takes_label_maps_by_nearest_pixel() -> None:
    labels = Image.fromarray(np.kron(np.array([[1, 2], [3, 1]], np.uint8), np.ones((3, 3), np.uint8)))
    assert central(labels.convert("P"), (2, 2)).tolist() == [[[1, 2], [3, 1]]]


# --- the sample of ImageNet -----------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    folder = tmp_path / "imagenet-sample"
    folder.mkdir()
    for seed, name in enumerate(("0281_n02123045_tabby.png", "0000_n01440764_tench.png")):
        Image.fromarray(noise(256, 300, seed)).save(folder / name)
    return tmp_path


def test_imagenet_sample_is_the_usual_crop_with_the_classes_of_its_names(sample: Path) -> None:
    data = imagenet_sample(224, sample)
    assert data.targets.tolist() == [0, 281] and data.classes[281] == "tabby" and len(data.classes) == 1000
    expected = noise(256, 300, 1)[16:240, 38:262].transpose(2, 0, 1)
    assert np.array_equal(data.images[0].numpy(), expected)
    assert imagenet_sample(56, sample).images.shape == (2, 3, 56, 56)


def test_imagenet_sample_refuses_in_one_line(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"imagenet-sample: not found in .*SELIB_DATA.*image-net.org"):
        imagenet_sample(root=tmp_path / "nowhere")
    (sample / "imagenet-sample" / "0001_n01443537_goldfish.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(
        ValueError, match=r"1 of 3 images cannot be used: .*goldfish.jpg \(truncated"
    ) as error:
        imagenet_sample(root=sample)
    assert "\n" not in str(error.value)
    (sample / "imagenet-sample" / "0001_n01443537_goldfish.jpg").rename(
        sample / "imagenet-sample" / "0002_n01443537_goldfish.jpg"
    )
    with pytest.raises(ValueError, match="0002_n01443537_goldfish.jpg: is not named as a class of ImageNet"):
        imagenet_sample(root=sample)


# --- pets -----------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    folder = tmp_path / "oxford-pets"
    for part in ("images", "trimaps"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate(("Bengal_2", "Abyssinian_10", "great_pyrenees_1")):
        Image.fromarray(noise(8, 12, seed)).save(folder / "images" / f"{name}.png")
        trimap = np.full((8, 12), 2, np.uint8)
        trimap[2:5, 3 + seed : 6] = 1
        trimap[5, 3:6] = 3
        Image.fromarray(trimap).save(folder / "trimaps" / f"{name}.png")
    return tmp_path


def test_pets_have_breeds_and_masks_of_animal_and_border(animals: Path) -> None:
    data = pets(8, animals)
    assert data.classes == ["Abyssinian", "Bengal", "great_pyrenees"] and data.targets.tolist() == [0, 1, 2]
    assert np.array_equal(data.images[1].numpy(), noise(8, 12, 0)[:, 2:10].transpose(2, 0, 1))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 1:4] = True  # two columns are cut off on the left
    assert torch.equal(data.truth([1])[0], expected)
    assert int(data.truth([0]).sum()) == 3 * 2 + 3


def test_pets_refuse_what_does_not_fit(animals: Path) -> None:
    trimap = animals / "oxford-pets" / "trimaps" / "Bengal_2.png"
    Image.fromarray(np.full((8, 12), 7, np.uint8)).save(trimap)
    with pytest.raises(ValueError, match=r"Bengal_2.png: holds other than 1, 2, 3"):
        pets(8, animals)
    trimap.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of the 3 images that images/ names are missing: Bengal_2"
    ):
        pets(8, animals)


def test_the_command_checks_photographs_and_weights(animals: Path, sample: Path) -> None:
    assert "test: 3 images of 224x224, 3 classes, masks" in catalog.check("oxford-pets", animals)
    assert "test: 2 images of 224x224, 1000 classes, no boxes" in catalog.check("imagenet-sample", sample)
    with pytest.raises(FileNotFoundError, match="weights: not found"):
        catalog.check("weights", sample)
    (sample / "weights").mkdir()
    (sample / "weights" / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a.safetensors: .*unpack the archive again"):
        catalog.check("weights", sample)
    with pytest.raises(ValueError, match=r"not fetched from one address: oxford-pets: .*robots.ox.ac.uk"):
        catalog.get("oxford-pets", sample / "nowhere")
    with pytest.raises(ValueError, match="studies.data.photos reads it"):
        load("oxford-pets", root=animals)


# --- enlarged -------------------------------------------------------------------------------------


def test_enlarged_images_are_those_of_pillow_and_made_when_asked_for() -> None:
    data = make_set()
    large = enlarged(data, 20)
    assert large.size == (20, 20) and len(large) == 3 and large.images.shape == (3, 3, 20, 20)
    for row in range(3):
        small = Image.fromarray(data.images[row].permute(1, 2, 0).numpy())
        expected = np.asarray(small.resize((20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(large.images[row].numpy().astype(int) - expected).max() <= 1  # rounding
    assert torch.equal(large.batch([2, 0]), normalize(large.images[[2, 0]]))
    assert torch.equal(large[1][0], large.batch([1])[0])


def test_enlarged_sets_are_sets() -> None:
    data = make_set(boxes=torch.tensor([[0, 0, 4, 8], [2, 2, 3, 3], [1, 0, 8, 5]]))
    large = enlarged(data, 16)
    images, targets = next(iter(large.loader(3)))
    assert torch.equal(images, large.batch(slice(None))) and targets.tolist() == [0, 1, 0]
    assert next(iter(large.loader(2, train=True)))[0].shape == (2, 3, 16, 16)
    assert large.boxes is not None and torch.equal(large.boxes, 2 * data.boxes)  # type: ignore[operator]
    few = large.subset([2, 0])
    assert not isinstance(few.images, torch.Tensor), "nothing is resized yet"
    assert torch.equal(few.batch([0, 1]), large.batch([2, 0]))
    assert torch.equal(few.truth([0]), large.truth([2])) and few.targets.tolist() == [0, 0]
    other = replace(data, images=data.images.index_fill(0, torch.tensor([1]), 7))
    prints = [data.fingerprint, *(x.fingerprint for x in (large, enlarged(data, 24), enlarged(other, 16)))]
    assert len(set(prints)) == 4 and enlarged(data, 16).fingerprint == large.fingerprint


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(0, 30))
def test_boxes_and_masks_scale_alike_and_keep_their_share(pick: Any, side: int, more: int) -> None:
    edges = [sorted(pick.draw(st.tuples(*[st.integers(0, side)] * 2))) for _ in range(2)]
    (x1, x2), (y1, y2) = edges
    data = make_set(1, side, boxes=torch.tensor([[x1, y1, x2, y2]]))
    size = side + more
    large = enlarged(data, size)
    truth = large.truth([0])[0].numpy()
    for y, x in np.ndindex(size, size):  # a pixel is inside when its centre is
        inside = x1 <= (x + 0.5) * side / size < x2 and y1 <= (y + 0.5) * side / size < y2
        assert truth[y, x] == inside
    masked = enlarged(replace(data, masks=data.truth([0])), size)
    assert torch.equal(masked.truth([0])[0], large.truth([0])[0])
    assert torch.equal(masked.subset([0]).truth([0]), large.truth([0]))
    # each edge moves by half a pixel at most
    share, before = truth.mean(), (x2 - x1) * (y2 - y1) / side**2
    assert abs(share - before) <= 2 / size + 1 / size**2
    if size % side == 0:
        assert share == pytest.approx(before)


def test_enlarged_refuses_to_shrink_or_to_stretch() -> None:
    with pytest.raises(ValueError, match="mine: images of 8x8 cannot be enlarged to 7x7"):
        enlarged(make_set(), 7)
    oblong = ImageSet("mine", "val", torch.zeros(1, 3, 4, 6, dtype=torch.uint8), torch.tensor([0]), ["a"])
    with pytest.raises(ValueError, match="images of 6x4 cannot be enlarged"):
        enlarged(oblong, 12)


def test_the_twin_is_enlarged_with_its_masks(tmp_path: Path) -> None:
    data = load("synth-objects", "val", root=tmp_path, limit=10)
    large = enlarged(data, 128)
    assert large.truth([3]).shape == (1, 128, 128)
    assert torch.equal(large.truth([3])[0, ::2, 1::2], data.truth([3])[0])


def test_tiny_imagenet_enlarged(tiny: Path) -> None:
    small, large = load("tiny-imagenet", "val", root=tiny), tiny_at(128, "val", tiny)
    assert large.boxes is not None and small.boxes is not None
    assert torch.equal(large.boxes, 2 * small.boxes) and large.classes == small.classes
    assert tiny_wnids(tiny) == ["n01", "n02"]
    assert len(tiny_at(128, "train", tiny, classes=1, limit=2)) == 2


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    place = tmp_path / "tiny-imagenet-200"
    for seed, wnid in enumerate(("n02", "n01")):
        (place / "train" / wnid / "images").mkdir(parents=True)
        for number in range(2):
            name = f"{wnid}_{number}.JPEG"
            Image.fromarray(noise(64, 64, seed)).save(place / "train" / wnid / "images" / name)
        lines = [f"{wnid}_{number}.JPEG\t1\t2\t{30 + number}\t63\n" for number in range(2)]
        (place / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(lines))
    (place / "val" / "images").mkdir(parents=True)
    for seed in range(2):
        Image.fromarray(noise(64, 64, seed)).save(place / "val" / "images" / f"val_{seed}.JPEG")
    (place / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn01\t5\t6\t7\t8\nval_1.JPEG\tn02\t0\t0\t9\t9\n"
    )
    (place / "wnids.txt").write_text("n02\nn01\n")
    return tmp_path
