"""Object data sets on tiny trees written by hand: what is read, what is cached, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from selib.pixels import normalize
from studies.data import ImageSet, available, cache, catalog, load, objects
from studies.data.imageset import augment
from studies.twins import objects as synth


def picture(seed: int, size: int = 32) -> Image.Image:
    """A smooth picture that survives JPEG, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)


def pixels(file: Path) -> np.ndarray:
    """(3, H, W), by Pillow alone."""
    return np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)


def write_tree(place: Path) -> None:
    """Three classes with three images each, for training and for testing."""
    seeds = itertools.count()
    for split in ("train", "test"):
        for name in ("cat", "ant", "bee"):
            (place / split / name).mkdir(parents=True)
            for number in range(3):
                picture(next(seeds)).save(place / split / name / f"{number:04}.jpg", quality=95)


def write_tiny(root: Path) -> Path:
    """Two classes with three training and two validation images each; boxes that tell the images apart."""
    place = root / "tiny-imagenet-200"
    seeds = itertools.count(100)
    annotations = []
    for wnid in ("n02", "n01"):
        (place / "train" / wnid / "images").mkdir(parents=True)
        (place / "val" / "images").mkdir(parents=True, exist_ok=True)
        lines = []
        for number in (0, 2, 10):
            picture(next(seeds), 64).save(place / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
            lines.append(f"{wnid}_{number}.JPEG\t{number}\t0\t{number + 20}\t63")
        (place / "train" / wnid / f"{wnid}_boxes.txt").write_text("\n".join(lines) + "\n")
        for number in range(2):
            name = f"val_{wnid}_{number}.JPEG"
            picture(next(seeds), 64).save(place / "val" / "images" / name)
            annotations.append(f"{name}\t{wnid}\t5\t6\t7\t{8 + number}")
    (place / "val" / "val_annotations.txt").write_text("\n".join(annotations) + "\n")
    (place / "wnids.txt").write_text("n02\nn01\n")
    (place / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttarantula\nn03\tother\n")
    return place


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_tree(tmp_path / "cifar10")
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


def make_set(count: int = 12, size: int = 16, **more: Any) -> ImageSet:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)
    return ImageSet("mine", "train", images, torch.arange(count) % 3, ["a", "b", "c"], **more)


# --- boxes and augmentation -----------------------------------------------------------------------


def test_normalize() -> None:
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert normalize(white).flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-4)


@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_truth_is_exactly_the_box(corners: list[tuple[int, ...]], height: int, width: int) -> None:
    images = torch.zeros(len(corners), 3, height, width, dtype=torch.uint8)
    targets = torch.zeros(len(corners), dtype=torch.int64)
    data = ImageSet("mine", "train", images, targets, ["a"], boxes=torch.tensor(corners))
    expected = np.zeros((len(corners), height, width), bool)
    for row, (x1, y1, x2, y2) in enumerate(corners):
        for y, x in itertools.product(range(height), range(width)):
            expected[row, y, x] = x1 <= x < x2 and y1 <= y < y2
    assert np.array_equal(data.truth(slice(None)).numpy(), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 8), (16, 8), (7, 9)]))
def test_augment_is_a_crop_of_the_reflected_image_maybe_flipped(seed: int, size: tuple[int, int]) -> None:
    height, width = size
    py, px = height // 8, width // 8
    images = torch.randint(
        0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    result = augment(images, torch.Generator().manual_seed(seed)).numpy()
    assert result.shape == tuple(images.shape) and result.dtype == np.uint8
    for before, after in zip(images.numpy(), result, strict=False):
        padded = np.pad(before, ((0, 0), (py, py), (px, px)), mode="reflect")
        crops = [
            padded[:, y : y + height, x : x + width] for y in range(2 * py + 1) for x in range(2 * px + 1)
        ]
        assert any(np.array_equal(after, crop) or np.array_equal(after, crop[:, :, ::-1]) for crop in crops)


def test_augment_draws_every_shift_and_both_flips() -> None:
    image = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8)
    many = augment(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len({row.numpy().tobytes() for row in many}) == 3 * 3 * 2


# --- ImageSet -------------------------------------------------------------------------------------


def test_imageset_checks_its_parts() -> None:
    good = make_set()
    with pytest.raises(ValueError, match="targets must be torch.int64"):
        replace(good, targets=good.targets.int())
    with pytest.raises(ValueError, match=r"boxes must be torch.int64 \(12, 4\)"):
        replace(good, boxes=torch.zeros(11, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks must be torch.bool"):
        replace(good, masks=torch.zeros(12, 16, 16))
    with pytest.raises(ValueError, match="targets must lie in 0..1"):
        replace(good, classes=["a", "b"])
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\)"):
        replace(good, images=good.images[0])


def test_fingerprint_is_the_hash_of_the_content() -> None:
    data = make_set()
    expected = hashlib.sha256(data.images.numpy().tobytes() + data.targets.numpy().tobytes()).hexdigest()[:16]
    assert data.fingerprint == expected
    assert make_set().fingerprint == expected
    other = data.images.clone()
    other[3, 1, 2, 2] ^= 1
    assert replace(data, images=other).fingerprint != expected
    assert replace(data, targets=data.targets.flip(0)).fingerprint != expected


def test_items_batches_and_subsets_agree() -> None:
    boxes = torch.tensor([[0, 0, k + 1, 2] for k in range(12)])
    data = make_set(boxes=boxes)
    image, target = data[5]
    assert torch.equal(image, normalize(data.images[5])) and target == 2
    batch, targets = data.__getitems__([5, 0])
    assert torch.equal(batch[0], image) and targets.tolist() == [2, 0]
    chosen = data.subset([7, 1])
    assert torch.equal(chosen.images, data.images[[7, 1]]) and chosen.targets.tolist() == [1, 1]
    assert chosen.boxes is not None and chosen.boxes[:, 2].tolist() == [8, 2]
    assert torch.equal(data.batch(slice(2, 4)), data.batch([2, 3]))
    assert "12 of 16x16, 3 classes, boxes" in repr(data)


def test_truth_takes_masks_then_boxes_and_else_says_so() -> None:
    boxes = torch.tensor([[0, 0, 2, 3]] * 12)
    masks = torch.zeros(12, 16, 16, dtype=torch.bool)
    masks[:, 5, 5] = True
    assert make_set(boxes=boxes).truth([0]).sum() == 6
    assert torch.equal(make_set(boxes=boxes, masks=masks).truth([0, 1]), masks[:2])
    with pytest.raises(ValueError, match="neither masks nor boxes"):
        make_set().truth([0])


def test_loader_for_evaluation_keeps_order_and_the_short_batch() -> None:
    data = make_set(10)
    batches = list(data.loader(4))
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.batch(slice(None)))


def constant_set(count: int) -> ImageSet:
    """Image k is k everywhere: no crop or flip can hide which it is."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageSet("mine", "train", images, torch.arange(count), [str(k) for k in range(count)])


def test_training_loader_visits_each_image_at_most_once_in_a_new_order() -> None:
    loader = constant_set(10).loader(4, train=True, seed=1)
    first, second = ([int(target) for _, targets in loader for target in targets] for _ in range(2))
    assert len(first) == 8 and len(set(first)) == 8  # the short batch is dropped
    assert first != second and first != sorted(first)
    for images, targets in loader:
        assert torch.equal(images, normalize(constant_set(10).images[targets]))


def test_training_loader_is_decided_by_seed_and_epoch() -> None:
    data = make_set(40)

    def epochs(loader: object, count: int) -> list[torch.Tensor]:
        return [torch.cat([images for images, _ in loader]) for _ in range(count)]  # type: ignore[attr-defined]

    three = epochs(data.loader(8, train=True, seed=5), 3)
    assert all(
        torch.equal(a, b) for a, b in zip(three, epochs(data.loader(8, train=True, seed=5), 3), strict=False)
    )
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three[0], epochs(data.loader(8, train=True, seed=6), 1)[0])
    resumed = data.loader(8, train=True, seed=5)
    resumed.dataset.set_epoch(2)  # type: ignore[attr-defined]
    assert torch.equal(epochs(resumed, 1)[0], three[2])


def test_loader_refuses_batches_it_cannot_fill() -> None:
    with pytest.raises(ValueError, match="12 training images are fewer than one batch of 13"):
        make_set().loader(13, train=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_set().loader(0)


# --- the tree of JPEGs, and the cache -------------------------------------------------------------


def test_tree_is_read_in_the_order_of_its_names(tree: Path) -> None:
    data = load("cifar10", "val", root=tree)
    files = sorted((tree / "cifar10" / "test").glob("*/*.jpg"))
    assert data.classes == ["ant", "bee", "cat"] and data.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(data.images.numpy(), np.stack([pixels(file) for file in files]))
    assert not data.synthetic and data.name == "cifar10" and data.split == "val"


def test_second_load_decodes_nothing_and_a_changed_file_is_seen(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load("cifar10", root=tree)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", lambda *_: pytest.fail("decoded again"))
        assert load("cifar10", root=tree).fingerprint == before.fingerprint
    file = tree / "cifar10" / "train" / "ant" / "0001.jpg"
    state = file.stat()
    picture(998).save(file, quality=30)
    file.write_bytes(file.read_bytes().ljust(state.st_size, b"\0"))
    os.utime(file, ns=(0, state.st_mtime_ns + 1))  # the same size, another time
    after = load("cifar10", root=tree)
    assert np.array_equal(after.images[1].numpy(), pixels(file)) and after.fingerprint != before.fingerprint
    assert len(list((tree / ".cache").iterdir())) == 1  # the old array is gone, no half-written one is left


def test_the_number_of_cores_changes_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [picture(seed, 80) for seed in range(21)]
    for number, image in enumerate(large):
        image.save(tree / f"{number}.png")
    files = [(f"{number}.png", 0, 0) for number in range(21)]
    found = []
    for cores in (1, 3, 8):
        monkeypatch.setattr(cache, "cores", lambda cores=cores: cores)
        cache.forget(tree, "large")
        found.append(cache.decoded(tree, "large", files, "", (80, 80), (50, 40)).tobytes())
    assert len(set(found)) == 1


def test_cached_array_that_was_cut_is_made_again(tree: Path) -> None:
    before = load("cifar10", root=tree).fingerprint
    (file,) = (tree / ".cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:-100])
    assert load("cifar10", root=tree).fingerprint == before


def test_writing_to_images_does_not_reach_the_cache(tree: Path) -> None:
    data = load("cifar10", root=tree)
    before = data.fingerprint
    data.images.zero_()
    assert load("cifar10", root=tree).fingerprint == before


def test_cache_moves_to_the_user_where_the_root_cannot_be_written_to(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    (tree / ".cache").write_text("in the way")  # holds for root, whom permissions do not stop
    first = load("cifar10", root=tree)
    assert len(list(user.glob("selib/*/cifar10-train-32x32-*.npy"))) == 1
    assert load("cifar10", root=tree).fingerprint == first.fingerprint


def test_a_full_disk_is_noticed_before_writing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(OSError, match=r"the image cache needs .* GiB are free"):
        load("cifar10", root=tree)
    assert not list((tree / ".cache").iterdir())


def test_only_arrays_that_the_cache_wrote_are_deleted(tree: Path) -> None:
    load("cifar10", root=tree)
    ours = next((tree / ".cache").glob("*.npy")).name
    stale = ours[:-16] + "0123456789ab.npy"
    users = ["cifar10-train-32x32-mine.npy", "cifar10-mine.npy", "train-0123456789ab.npy", f"{ours}.old"]
    for name in [stale, *users]:
        (tree / ".cache" / name).write_text("")
    os.utime(tree / "cifar10" / "train" / "ant" / "0001.jpg", ns=(0, 0))
    load("cifar10", root=tree)
    left = {file.name for file in (tree / ".cache").iterdir()}
    assert set(users) < left and len(left) == len(users) + 1 and not left & {ours, stale}
    cache.forget(tree, "cifar10")
    assert {file.name for file in (tree / ".cache").iterdir()} == set(users)


def test_size_keeps_the_central_part(tree: Path) -> None:
    file = tree / "cifar10" / "train" / "ant" / "0000.jpg"
    expected = ImageOps.fit(Image.open(file), (10, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(cache.decode(file, (32, 32), (20, 10)).transpose(1, 2, 0), np.asarray(expected))


def test_root_from_the_environment(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELIB_DATA", str(tree))
    assert len(load("cifar10")) == 9 and available("cifar10") and not available("tiny-imagenet")
    assert available("synth-objects", tree / "nowhere")


def test_classes_and_limit_choose_a_balanced_subset(tree: Path) -> None:
    two = load("cifar10", root=tree, classes=2)
    assert two.classes == ["ant", "bee"] and two.targets.tolist() == [0, 0, 0, 1, 1, 1]
    four = load("cifar10", root=tree, limit=4)
    assert four.targets.bincount().tolist() == [2, 1, 1]
    assert four.fingerprint == load("cifar10", root=tree, limit=4).fingerprint
    assert len({load("cifar10", root=tree, limit=4, seed=seed).fingerprint for seed in range(5)}) > 1
    assert load("cifar10", root=tree, classes=2, limit=2).targets.tolist() == [0, 1]
    assert len(load("cifar10", root=tree, limit=1000)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar11"}, "unknown data set 'cifar11'; known are cifar10, tiny-imagenet"),
        ({"name": "celeba"}, "studies.data.load_faces reads it"),
        ({"split": "test"}, "split must be 'train' or 'val', not 'test'"),
        ({"classes": 4}, r"classes must be 1..3 for cifar10, not 4"),
        ({"classes": 0}, r"classes must be 1..3"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_load_refuses_wrong_arguments(tree: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**{"name": "cifar10", "root": tree, **arguments})


def test_missing_data_names_the_remedy(tmp_path: Path) -> None:
    remedy = r"studies data get tiny-imagenet.*tiny-imagenet-200.*SELIB_DATA"
    with pytest.raises(FileNotFoundError, match=remedy):
        load("tiny-imagenet", root=tmp_path / "nowhere")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"pickled data is not read.*studies data get cifar10"):
        load("cifar10", root=tmp_path)


Damage = Callable[[Path], object]
BAD, GONE = ValueError, FileNotFoundError


def cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


BEE, CAT = "train/bee/0001.jpg", "train/cat/0002.jpg"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: cut(p / BEE, 0.9), BAD, r"1 of 9 images.*bee/0001.jpg \(truncated"),
        (lambda p: cut(p / BEE, 0), BAD, r"bee/0001.jpg \(empty file\)"),
        (lambda p: (p / BEE).write_text("<html>"), BAD, r"0001.jpg \(truncated or not an image"),
        (lambda p: [cut(f, 0.5) for f in p.glob("*/*/*.jpg")], BAD, r"9 of 9 .*0000.*0001.*0002.*, \.\.\.;"),
        (lambda p: picture(0, 31).save(p / CAT), BAD, r"cat/0002.jpg \(31x31, not 32x32\)"),
        (lambda p: [f.unlink() for f in p.glob("train/cat/*")], BAD, "train/cat: 0 JPEG .* have 3"),
        (lambda p: (p / CAT).unlink(), BAD, "train/cat: 2 JPEG .* have 3"),
        (lambda p: shutil.rmtree(p / "train/ant"), GONE, "train/ant: no such folder; unpack"),
        (lambda p: [shutil.rmtree(d) for d in p.glob("*/*")], BAD, "holds no class folders"),
    ],
)
def test_damaged_tree_is_refused(tree: Path, damage: Damage, error: type[Exception], message: str) -> None:
    damage(tree / "cifar10")
    with pytest.raises(error, match=message) as caught:
        load("cifar10", root=tree)
    assert "\n" not in str(caught.value)
    assert not list(tree.glob(".cache/*")) and not list(tree.glob(".cache/.*"))


# --- CIFAR's binary version -----------------------------------------------------------------------


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """The binary set with two records a file; returns the root and the pixels of one file."""
    monkeypatch.setattr(objects, "RECORDS", 2)
    image = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    place = tmp_path / "cifar-10-batches-bin"
    place.mkdir()
    for index, file in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        (place / file).write_bytes(b"".join(bytes([(index + k) % 3]) + image[k].tobytes() for k in range(2)))
    (place / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    return tmp_path, image


def test_binary_records_go_before_the_tree(binary: tuple[Path, np.ndarray]) -> None:
    root, image = binary
    write_tree(root / "cifar10")
    data = load("cifar10", "train", root=root)
    assert len(data) == 10 and data.targets.tolist() == [0, 1, 1, 2, 2, 0, 0, 1, 1, 2]
    assert data.classes == ["airplane", "automobile", "bird"]
    # red plane first, row by row: pixel (channel 1, row 2, column 3) is byte 1024 + 2 * 32 + 3
    assert int(data.images[1, 1, 2, 3]) == int(image[1, 1024 + 2 * 32 + 3])
    val = load("cifar10", "val", root=root)
    assert val.targets.tolist() == [2, 0] and np.array_equal(val.images.numpy().reshape(2, -1), image)


THIRD = "data_batch_3.bin"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: cut(p / THIRD, 0.99), BAD, f"{THIRD}: 6084 bytes are not 2 records of 3073"),
        (lambda p: (p / THIRD).unlink(), GONE, f"{THIRD}: no such file"),
        (
            lambda p: (p / "batches.meta.txt").write_text("one\n"),
            BAD,
            "label 2, but batches.meta.txt names 1",
        ),
    ],
)
def test_damaged_binary_is_refused(
    binary: tuple[Path, np.ndarray], damage: Damage, error: type[Exception], message: str
) -> None:
    damage(binary[0] / "cifar-10-batches-bin")
    with pytest.raises(error, match=message):
        load("cifar10", root=binary[0])


# --- Tiny-ImageNet --------------------------------------------------------------------------------


def test_tiny_imagenet_with_boxes(tiny: Path) -> None:
    data = load("tiny-imagenet", root=tiny)
    assert data.classes == ["goldfish", "tarantula"] and data.targets.tolist() == [0, 0, 0, 1, 1, 1]
    # ends become exclusive, and the order is that of the boxes file, not 0, 10, 2
    assert data.boxes is not None
    assert data.boxes[:3].tolist() == [[0, 0, 21, 64], [2, 0, 23, 64], [10, 0, 31, 64]]
    folder = tiny / "tiny-imagenet-200" / "train" / "n01" / "images"
    assert np.array_equal(data.images[1].numpy(), pixels(folder / "n01_2.JPEG"))
    assert data.truth([2])[0].sum() == 21 * 64
    val = load("tiny-imagenet", "val", root=tiny)
    assert val.targets.tolist() == [1, 1, 0, 0]  # the order of val_annotations.txt
    assert val.boxes is not None and val.boxes[1].tolist() == [5, 6, 8, 10]


def test_tiny_imagenet_reads_the_classes_that_wnids_names(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200" / "wnids.txt").write_text("n02\n")
    assert load("tiny-imagenet", root=tiny).classes == ["tarantula"]
    assert len(load("tiny-imagenet", "val", root=tiny)) == 2


def test_tiny_imagenet_class_names_are_unique(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200" / "words.txt").write_text("n01\tcrane, machine\nn02\tcrane, bird\n")
    assert load("tiny-imagenet", root=tiny).classes == ["crane (n01)", "crane (n02)"]
    (tiny / "tiny-imagenet-200" / "words.txt").unlink()
    assert load("tiny-imagenet", root=tiny).classes == ["n01", "n02"]


BOXES, NOTES, IMAGE = "train/n02/n02_boxes.txt", "val/val_annotations.txt", "train/n02/images/n02_2.JPEG"
BOX = "2\t0\t22\t63"


@pytest.mark.parametrize(
    ("split", "damage", "error", "message"),
    [
        ("train", lambda p: (p / "wnids.txt").unlink(), GONE, "wnids.txt: no such file"),
        ("train", lambda p: (p / "wnids.txt").write_text("\n"), BAD, "wnids.txt: names no class"),
        ("train", lambda p: (p / BOXES).unlink(), GONE, "n02_boxes.txt: no such file"),
        ("train", lambda p: (p / BOXES).write_text(""), BAD, "n02_boxes.txt:1: holds no images"),
        ("train", lambda p: shutil.rmtree((p / IMAGE).parent), GONE, "n02/images: no such folder"),
        ("train", lambda p: rewrite(p / BOXES, BOX, "2\t0\t22"), BAD, r"n02_boxes.txt:2: expected"),
        ("train", lambda p: rewrite(p / BOXES, BOX, "2\tx\t22\t63"), BAD, r"n02_boxes.txt:2: expected"),
        ("train", lambda p: rewrite(p / BOXES, BOX, "2\t0\t64\t63"), BAD, r"boxes.txt:2: box 2 0 64 63"),
        ("train", lambda p: rewrite(p / BOXES, BOX, "23\t0\t22\t63"), BAD, r"boxes.txt:2: box 23 0 22"),
        (
            "train",
            lambda p: rewrite(p / BOXES, "n02_2.J", "n02_0.J"),
            BAD,
            ":2: names n02_0.JPEG for the second",
        ),
        ("train", lambda p: (p / IMAGE).unlink(), GONE, "1 of the 3 .* missing: n02_2.JPEG"),
        ("train", lambda p: rewrite(p / BOXES, f"n02_2.JPEG\t{BOX}\n", ""), BAD, "not name 1 .*: n02_2.JPEG"),
        ("train", lambda p: cut(p / IMAGE, 0.7), BAD, r"n02_2.JPEG \(truncated"),
        ("train", lambda p: picture(0).save(p / IMAGE), BAD, r"\(32x32, not 64x64\)"),
        ("val", lambda p: (p / NOTES).unlink(), GONE, "val_annotations.txt: no such file"),
        ("val", lambda p: rewrite(p / NOTES, "val_n02_1", "val_zzz"), GONE, "1 of .* val_zzz.JPEG"),
        ("val", lambda p: rewrite(p / NOTES, "\tn02", ""), BAD, r"txt:1: expected an image, a word, 4"),
        ("val", lambda p: (p / "wnids.txt").write_text("n01\nn02\nn03\n"), BAD, "has no image of class n03"),
        ("val", lambda p: picture(1, 64).save(p / "val/images/more.JPEG"), BAD, "not name 1 .*: more.JPEG"),
    ],
)
def test_damaged_tiny_imagenet_is_refused(
    tiny: Path, split: str, damage: Damage, error: type[Exception], message: str
) -> None:
    damage(tiny / "tiny-imagenet-200")
    with pytest.raises(error, match=message) as caught:
        load("tiny-imagenet", split, root=tiny)
    assert "\n" not in str(caught.value)


# --- catalog: list and get ------------------------------------------------------------------------


def test_list_tells_what_is_here(tree: Path) -> None:
    lines = {line.split()[0]: line for line in catalog.list_sets(tree)}
    assert [name for name, line in lines.items() if " here " in line] == ["cifar10"]
    absent = [name for name, line in lines.items() if " absent " in line]
    assert absent == [
        "tiny-imagenet",
        "celeba",
        "ava-asd",
        "wasd",
        "imagenet-sample",
        "oxford-pets",
        "weights",
    ]
    twins = [name for name, line in lines.items() if " on demand " in line]
    assert twins == ["synth-objects", "synth-faces", "synth-speakers"]
    assert "4,000 + 1,000, masks" in lines["synth-objects"] and "research" in lines["celeba"]


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves one byte string; honours ranges; can break off."""

    content: bytes = b""
    break_at: int | None = None
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        body = self.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body if self.break_at is None else body[: self.break_at])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(binary: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Ranges]]:
    """An address that serves the tiny binary CIFAR-10 as an archive, entered in the catalog."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        padding = binary[0] / "cifar-10-batches-bin" / "padding"  # downloads are written by half a megabyte
        padding.write_bytes(np.random.default_rng(0).bytes(2**20))
        archive.add(padding.parent, "cifar-10-batches-bin")
    handler = type("Handler", (Ranges,), {"content": buffer.getvalue(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_address[1]}/cifar.tar.gz"
        md5 = hashlib.md5(buffer.getvalue()).hexdigest()
        monkeypatch.setitem(catalog.ARCHIVES, "cifar10", (address, md5))
        yield handler
        running.shutdown()


@pytest.mark.slow
def test_get_downloads_verifies_and_unpacks(server: type[Ranges], tmp_path: Path) -> None:
    root = tmp_path / "new"
    assert catalog.get("cifar10", root) == root / "cifar-10-batches-bin"
    assert len(load("cifar10", root=root)) == 10
    assert [file.name for file in root.iterdir()] == ["cifar-10-batches-bin"]
    asked = len(server.asked)
    assert catalog.get("cifar10", root) == root / "cifar-10-batches-bin" and len(server.asked) == asked


def test_get_goes_on_where_it_stopped(server: type[Ranges], tmp_path: Path) -> None:
    root = tmp_path / "new"
    server.break_at = 700_000
    with pytest.raises(ConnectionError, match="go on where it stopped"):
        catalog.get("cifar10", root)
    (held,) = (root / catalog.PARTIAL).iterdir()
    assert held.stat().st_size == 2**19 and [file.name for file in root.iterdir()] == [catalog.PARTIAL]
    server.break_at = None
    catalog.get("cifar10", root)
    assert server.asked[-1] == f"bytes={2**19}-" and len(load("cifar10", root=root)) == 10
    assert not (root / catalog.PARTIAL).exists()


def test_get_refuses_a_wrong_checksum_and_keeps_the_users_files(server: type[Ranges], tmp_path: Path) -> None:
    server.content = server.content[:-1] + b"x"
    root = tmp_path / "new"
    root.mkdir()
    mine = [root / name for name in ("cifar.tar.gz.part", ".cifar.tar.gz.part", "cifar.tar.gz.old")]
    for file in mine:
        file.write_text("mine")
    with pytest.raises(ConnectionError, match="what came has another MD5 .* run this again"):
        catalog.get("cifar10", root)
    assert sorted(root.iterdir()) == sorted(mine) and {file.read_text() for file in mine} == {"mine"}
    (root / "cifar.tar.gz").write_bytes(server.content)  # put there by hand: the user's file stays
    with pytest.raises(ValueError, match="cifar.tar.gz: its MD5 is not .*delete it"):
        catalog.get("cifar10", root)
    assert (root / "cifar.tar.gz").read_bytes() == server.content


def test_get_uses_an_archive_put_there_by_hand(server: type[Ranges], tmp_path: Path) -> None:
    root = tmp_path / "new"
    root.mkdir()
    (root / "cifar.tar.gz").write_bytes(server.content)
    catalog.get("cifar10", root)
    assert len(load("cifar10", root=root)) == 10 and server.asked == [] and (root / "cifar.tar.gz").exists()


def test_get_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://127.0.0.1:9/tiny-imagenet-200.zip"
    monkeypatch.setitem(catalog.ARCHIVES, "tiny-imagenet", (address, ""))
    with pytest.raises(ConnectionError) as caught:
        catalog.get("tiny-imagenet", tmp_path)
    message = str(caught.value)
    for part in (address, "tiny-imagenet-200.zip", str(tmp_path), "studies data get tiny-imagenet"):
        assert part in message
    assert "\n" not in message and list(tmp_path.iterdir()) == []


def test_get_unpacks_a_zip(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("root")
    with zipfile.ZipFile(root / "tiny.zip", "w") as archive:
        for file in (tiny / "tiny-imagenet-200").rglob("*"):
            archive.write(file, file.relative_to(tiny))
    md5 = hashlib.md5((root / "tiny.zip").read_bytes()).hexdigest()
    monkeypatch.setitem(catalog.ARCHIVES, "tiny-imagenet", ("http://127.0.0.1:9/tiny.zip", md5))
    catalog.get("tiny-imagenet", root)
    assert load("tiny-imagenet", root=root).fingerprint == load("tiny-imagenet", root=tiny).fingerprint


def test_get_refuses_names_without_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="studies data make synth-objects"):
        catalog.get("synth-objects", tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        catalog.get("mnist", tmp_path)


# --- catalog: check and make ----------------------------------------------------------------------


def test_check_compares_with_a_whole_set(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="studies data get cifar10"):
        catalog.check("cifar10", tiny)
    with pytest.raises(ValueError, match="train has 6 images, not 1,000"):
        catalog.check("tiny-imagenet", tiny)
    monkeypatch.setitem(catalog.WHOLE, "tiny-imagenet", {"train": 3, "val": 2})
    summary = catalog.check("tiny-imagenet", tiny)
    assert "train: 6 images of 64x64, 2 classes, boxes" in summary and "val: 4 images" in summary
    assert load("tiny-imagenet", root=tiny).fingerprint in summary


def test_check_reads_files_anew(tree: Path) -> None:
    """Rot that leaves size and time as they were is not seen by a load, but by a check."""
    before = load("cifar10", root=tree).fingerprint
    file = tree / "cifar10" / "train" / "ant" / "0000.jpg"
    state, content = file.stat(), file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load("cifar10", root=tree).fingerprint == before
    with pytest.raises(ValueError, match="ant/0000.jpg"):
        catalog.check("cifar10", tree)


def test_make_then_load_is_what_would_have_been_rendered(tmp_path: Path) -> None:
    place = catalog.make("synth-objects", tmp_path, 20, seed=3)
    assert place == tmp_path / "synth-objects" and list(tmp_path.iterdir()) == [place]
    for split, count in (("train", 20), ("val", 10)):
        disk = load("synth-objects", split, root=tmp_path)
        memory = load("synth-objects", split, root=tmp_path / "nowhere", limit=count, seed=3)
        assert disk.fingerprint == memory.fingerprint and disk.synthetic and memory.synthetic
        assert disk.masks is not None and memory.masks is not None and torch.equal(disk.masks, memory.masks)
        assert disk.classes == memory.classes and disk.boxes is None
    assert "20 images of 64x64, 10 classes, masks" in catalog.check("synth-objects", tmp_path)
    again = catalog.make("synth-objects", tmp_path / "again", 20, seed=3)
    for file in place.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (again / file.relative_to(place)).read_bytes()


def test_made_masks_say_which_part(tmp_path: Path) -> None:
    place = catalog.make("synth-objects", tmp_path, 10)
    scene = json.loads((place / "train.jsonl").read_text().splitlines()[3])
    _, parts = synth.render(scene)
    with Image.open(place / "masks" / scene["file"]) as opened:
        owners = np.asarray(opened)
    for number, part in enumerate(synth.PARTS[scene["class"]], 1):
        assert np.array_equal(owners == number, parts.get(part, np.zeros((64, 64), bool)))


BIRD, COPY, LIST = "train/bird/00000.png", "train/bird/x.png", "train.jsonl"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / LIST).unlink(), GONE, "train.jsonl: no such file; delete"),
        (lambda p: shutil.rmtree(p / "masks"), GONE, "masks/train/bird: no such folder"),
        (lambda p: (p / BIRD).rename(p / COPY), GONE, "bird: 1 of the 1 .*: 00000.png"),
        (lambda p: shutil.copy(p / BIRD, p / COPY), BAD, "bird: train.jsonl does not name 1 .*: x.png"),
        (lambda p: rewrite(p / LIST, '{"file"', '{"name"'), BAD, "train.jsonl:1: is not a scene"),
        (
            lambda p: rewrite(p / LIST, "/bird", "/boat"),
            BAD,
            "bird: train.jsonl does not name 1 .*: 00000.png",
        ),
        (lambda p: cut(p / "masks" / BIRD, 0.6), BAD, r"bird/00000.png \(truncated"),
    ],
)
def test_damaged_twin_is_refused(
    tmp_path: Path, damage: Damage, error: type[Exception], message: str
) -> None:
    damage(catalog.make("synth-objects", tmp_path, 10))
    with pytest.raises(error, match=message):
        load("synth-objects", root=tmp_path)


def test_make_refuses_what_it_cannot_make_and_keeps_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar10' cannot be made"):
        catalog.make("cifar10", tmp_path)
    with pytest.raises(ValueError, match="count must be at least 10"):
        catalog.make("synth-objects", tmp_path, 9)
    (tmp_path / "synth-objects" / "train").mkdir(parents=True)
    for make in (
        catalog.make,
        lambda name, root, count: objects.write_synth(root / name, {"train": count}, 0),
    ):
        with pytest.raises(FileExistsError):
            make("synth-objects", tmp_path, 10)
    assert [file.name for file in tmp_path.rglob("*")] == ["synth-objects", "train"]


def test_make_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(objects.json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        catalog.make("synth-objects", tmp_path, 10)
    assert list(tmp_path.iterdir()) == []
