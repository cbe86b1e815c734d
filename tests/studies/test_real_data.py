"""The real archives: counts, boxes, and the same pixels and targets as torchvision reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from studies import face_networks, face_records, real_faces
from studies.data import also_masked, available, cache, load, load_faces, masked_faces

pytestmark = pytest.mark.real


def test_cifar10_is_whole(cifar10_root: Path) -> None:
    assert available("cifar10", cifar10_root)
    train, val = (load("cifar10", split, root=cifar10_root) for split in ("train", "val"))
    assert train.images.shape == (50_000, 3, 32, 32) and val.images.shape == (10_000, 3, 32, 32)
    assert train.targets.bincount().tolist() == [5000] * 10 and val.targets.bincount().tolist() == [1000] * 10
    assert train.classes[:3] == ["airplane", "automobile", "bird"] and train.classes == val.classes
    # the published channel means of CIFAR-10's training images; JPEG moves them little
    means = train.images[::10].float().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)


def test_cifar10_agrees_with_torchvision(cifar10_root: Path) -> None:
    ours, theirs = load("cifar10", root=cifar10_root), ImageFolder(cifar10_root / "cifar10" / "train")
    assert ours.classes == theirs.classes and ours.targets.tolist() == theirs.targets
    for index in range(0, 50_000, 997):
        image, target = theirs[index]
        assert np.array_equal(ours.images[index].permute(1, 2, 0).numpy(), np.asarray(image))
        assert ours[index][1] == target


def test_cifar10_is_decoded_once(cifar10_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("cifar10", root=cifar10_root)
    monkeypatch.setattr(cache, "decode", lambda *_: pytest.fail("decoded again"))
    data = load("cifar10", root=cifar10_root)
    few = load("cifar10", root=cifar10_root, classes=4, limit=80)
    assert few.targets.bincount().tolist() == [20] * 4
    assert torch.equal(
        few.images[0], data.images[(data.images == few.images[0]).flatten(1).all(1).nonzero()[0, 0]]
    )


def test_tiny_imagenet_is_whole(tiny_imagenet_root: Path) -> None:
    for split, count, each in (("train", 25_000, 500), ("val", 2_500, 50)):
        data = load("tiny-imagenet", split, root=tiny_imagenet_root)
        assert data.images.shape == (count, 3, 64, 64) and data.targets.bincount().tolist() == [each] * 50
        assert (
            len(data.classes) == len(set(data.classes)) == 50
            and data.classes[0] == "European fire salamander"
        )
        assert data.boxes is not None and data.boxes.shape == (count, 4)
        x1, y1, x2, y2 = data.boxes.unbind(1)
        assert bool(((x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= 64) & (y2 <= 64)).all())
        first = data.truth(range(100))
        assert torch.equal(first.sum((1, 2)), ((x2 - x1) * (y2 - y1))[:100])


def test_tiny_imagenet_agrees_with_torchvision(tiny_imagenet_root: Path) -> None:
    folder = tiny_imagenet_root / "tiny-imagenet-200"
    ours, theirs = load("tiny-imagenet", root=tiny_imagenet_root), ImageFolder(folder / "train")
    where = {Path(path).name: index for index, (path, _) in enumerate(theirs.samples)}
    for label in range(0, 50, 7):
        wnid = theirs.classes[label]
        lines = (folder / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines()
        for row in (0, 123, 499):
            name, *corners = lines[row].split()
            image, target = theirs[where[name]]
            index = label * 500 + row
            assert np.array_equal(ours.images[index].permute(1, 2, 0).numpy(), np.asarray(image))
            assert int(ours.targets[index]) == target
            assert ours.boxes is not None
            assert ours.boxes[index].tolist() == [int(c) + (k > 1) for k, c in enumerate(corners)]


def test_tiny_imagenet_validation_labels_follow_the_annotations(tiny_imagenet_root: Path) -> None:
    folder = tiny_imagenet_root / "tiny-imagenet-200"
    wnids = sorted((folder / "wnids.txt").read_text().split())
    data = load("tiny-imagenet", "val", root=tiny_imagenet_root)
    lines = [line.split() for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    assert data.targets.tolist() == [wnids.index(line[1]) for line in lines]
    ours = load("tiny-imagenet", "val", root=tiny_imagenet_root, classes=3, limit=30)
    assert ours.targets.bincount().tolist() == [10] * 3 and len(ours.classes) == 3


def test_real_faces_are_read_and_the_shipped_network_is_as_good_as_its_record(faces_root: Path) -> None:
    sizes = {split: len(load_faces("celeba", split, root=faces_root)) for split in ("train", "val", "test")}
    assert sizes == {"train": 6965, "val": 1049, "test": 1986}
    test = load_faces("celeba", "test", root=faces_root)
    assert test.template and test.identities is not None and len(test.identities.unique()) > 1000
    model = face_networks.network("fine", "without")
    right = (real_faces.logits_of(model, test.images) > 0) == (test.targets > 0)
    runs = face_records.records("fine")["runs"]
    assert float(right.double().mean()) == pytest.approx(runs[0]["test"]["accuracy"], abs=1e-3)


def test_masks_lie_on_the_faces(faces_root: Path) -> None:
    faces = masked_faces(faces_root)
    assert len(faces) == 629 and len(also_masked(faces_root)) == 26
    assert faces.targets.sum(0).tolist() == [39, 32, 147, 17] and faces.parts is not None
    for part, row, column in (("eyes", 44.5, 35.5), ("nose", 52, 35.5), ("mouth", 61, 35.5)):
        places = (faces.parts == 1 + faces.part_names.index(part)).float().mean(0)
        heat = places / places.sum()
        middle = [float((heat.sum(axis) * torch.arange(heat.shape[1 - axis])).sum()) for axis in (1, 0)]
        assert middle == pytest.approx([row, column], abs=2), part  # where the alignment has them
