"""CelebA's files as the twin writes them: read as torchvision does, refused when damaged, decoded once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gdown
import numpy as np
import pytest
import torch
from gdown.exceptions import FileURLRetrievalError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CelebA

from studies.cli import main
from studies.data import (
    FaceSet,
    available,
    cache,
    catalog,
    hqmasks,
    landmark_region,
    load_faces,
    regions,
    rendered,
    with_masks,
)
from studies.data import faces as celeba
from studies.twins import faces as synth

COUNT = 12  # training images; 3 for validation, 3 for testing, 12 spurious
NATIVE = synth.SIZE


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds the twin on disk: to be read, not changed."""
    root = tmp_path_factory.mktemp("made")
    catalog.make("synth-faces", root, COUNT, seed=3)
    return root


@pytest.fixture
def twin(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(made / "synth-faces", tmp_path / "synth-faces")
    return tmp_path


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds `celeba`: the twin's files under that name, without the spurious split."""
    root = tmp_path_factory.mktemp("pristine")
    celeba.write_faces(root / "faces", {"train": 10, "val": 3, "test": 3}, seed=0)
    (root / "faces" / "celeba").rename(root / "celeba")
    return root


@pytest.fixture
def real(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine / "celeba", tmp_path / "celeba")
    return tmp_path


@pytest.mark.slow
def test_processes_draw_what_this_one_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of cores."""
    faces: list[tuple[synth.Params, tuple[str, ...]]] = [(p, ("hair",)) for p in synth.scenes(70, "val", 5)]
    found = []
    for cores in (1, 2, 5):  # one process; two; none, since each would draw too few
        monkeypatch.setattr(celeba, "cores", lambda cores=cores: cores)
        found.append(rendered(faces, (44, 36)).tobytes())
    assert len(set(found)) == 1
    monkeypatch.setattr(celeba, "cores", lambda: 2)
    with pytest.raises(OSError, match=r"the process that draws faces ended with status 1: KeyError"):
        rendered([({}, ())] * 70, (44, 36))


def test_training_mirrors_aligned_faces_and_leaves_them_in_place(tmp_path: Path) -> None:
    faces = load_faces("synth-faces", "train", root=tmp_path, limit=8)
    drawn = faces.augmented(torch.arange(8), torch.Generator().manual_seed(0))
    kept = (drawn == faces.images).flatten(1).all(1)
    mirrored = (drawn == faces.images.flip(3)).flatten(1).all(1)
    assert bool((kept | mirrored).all()) and bool(kept.any()) and bool(mirrored.any())


# --- the files are CelebA's -----------------------------------------------------------------------


def test_torchvision_reads_what_we_write_and_sees_what_we_see(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CelebA

    monkeypatch.setattr(CelebA, "_check_integrity", lambda _: True)
    kinds = ["attr", "landmarks", "identity", "bbox"]
    total = 0
    for theirs_name, ours_name in (("train", "train"), ("valid", "val"), ("test", "test")):
        theirs = CelebA(str(made / "synth-faces"), split=theirs_name, target_type=kinds)
        ours = load_faces("synth-faces", ours_name, root=made, size=NATIVE)
        assert ours.landmarks is not None and ours.identities is not None
        assert len(theirs) == len(ours) > 0 and theirs.filename == ours.files
        assert theirs.attr_names == [*ours.classes, ""]  # the official header ends in a blank too
        for row, (image, (attributes, landmarks, identity, _)) in enumerate(theirs):
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1), ours.images[row].numpy())
            assert attributes.tolist() == ours.targets[row].tolist()
            assert landmarks.tolist() == ours.landmarks[row].flatten().tolist()
            assert int(identity) == int(ours.identities[row])
        total += len(ours)
    everything = CelebA(str(made / "synth-faces"), split="all", target_type=kinds)
    assert len(everything) == total + COUNT
    spurious = load_faces("synth-faces", "spurious", root=made, size=NATIVE)
    assert everything.filename[-COUNT:] == spurious.files
    assert everything.attr[-COUNT:].tolist() == spurious.targets.tolist()


def test_files_look_like_the_official_ones(made: Path) -> None:
    folder = made / "synth-faces" / "celeba"
    attributes = (folder / "list_attr_celeba.txt").read_text().splitlines()
    assert attributes[0] == "30" and attributes[1].endswith(" Young ")
    assert attributes[2].startswith("000001.jpg ") and len(attributes[2]) == len("000001.jpg") + 3 * 40
    assert (folder / "list_eval_partition.txt").read_text().splitlines()[-1] == "000030.jpg 3"
    assert (folder / "list_bbox_celeba.txt").read_text().splitlines()[1] == "image_id x_1 y_1 width height"
    assert len(list((made / "synth-faces" / "masks").iterdir())) == 30
    with Image.open(folder / "img_align_celeba" / "000001.jpg") as image:
        assert image.size == (178, 218) and image.format == "JPEG"


def test_label_maps_and_parameters_are_those_of_the_images(made: Path) -> None:
    faces = load_faces("synth-faces", "val", root=made, size=NATIVE)
    assert faces.parts is not None and faces.params is not None and faces.part_names == synth.PARTS
    for row, params in enumerate(faces.params):
        image, parts = synth.draw(params)
        assert np.array_equal(parts, faces.parts[row].numpy())
        assert (
            np.abs(image.transpose(2, 0, 1).astype(int) - faces.images[row].numpy()).mean() < 6
        )  # but for the JPEG
        assert synth.attributes(params).tolist() == faces.targets[row].tolist()
    first = json.loads((made / "synth-faces" / "params.jsonl").read_text().splitlines()[0])
    assert first["file"] == "000001.jpg" and first["split"] == "train" and first["params"]["seed"] >= 0


@pytest.mark.parametrize("size", [(88, 72), (64, 64)])
def test_what_is_on_disk_is_what_would_have_been_rendered(
    made: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    disk = load_faces("synth-faces", root=made, size=size)
    memory = load_faces("synth-faces", root=tmp_path, size=size, limit=COUNT, seed=3)
    assert disk.synthetic and memory.synthetic and disk.fingerprint == memory.fingerprint
    for name in ("images", "targets", "parts", "landmarks", "identities"):
        assert torch.equal(getattr(disk, name), getattr(memory, name)), name
    assert disk.files == memory.files and disk.params == memory.params and disk.classes == memory.classes
    assert disk.parts is not None and disk.params is not None
    one = torch.cat([disk.images[4], disk.parts[[4]]]).numpy()
    assert np.array_equal(rendered([(disk.params[4], ())], size)[0], one)
    assert not np.array_equal(rendered([(disk.params[4], ("mouth", "nose"))], size)[0], one)
    fewer = load_faces("synth-faces", root=made, size=size, limit=5)
    assert fewer.files == disk.files[:5] and torch.equal(fewer.images, disk.images[:5])


def test_the_seed_decides(made: Path, tmp_path: Path) -> None:
    again = catalog.make("synth-faces", tmp_path, COUNT, seed=3)
    for file in (made / "synth-faces").rglob("*"):
        assert (
            file.is_dir()
            or file.read_bytes() == (again / file.relative_to(made / "synth-faces")).read_bytes()
        )
    one, two = (load_faces("synth-faces", root=tmp_path / "none", limit=3, seed=seed) for seed in (0, 1))
    assert one.fingerprint != two.fingerprint


# --- the set --------------------------------------------------------------------------------------


def test_size_scales_pixels_and_landmarks_alike(made: Path) -> None:
    whole, small = (load_faces("synth-faces", "val", root=made, size=size) for size in (NATIVE, (88, 72)))
    expected = Image.fromarray(whole.images[0].permute(1, 2, 0).numpy()).resize(
        (72, 88), Image.Resampling.BICUBIC
    )
    assert np.array_equal(np.asarray(expected).transpose(2, 0, 1), small.images[0].numpy())
    assert whole.landmarks is not None and small.landmarks is not None
    scale = torch.tensor([72 / 178, 88 / 218])
    torch.testing.assert_close(small.landmarks, (whole.landmarks + 0.5) * scale - 0.5)
    assert repr(small) == "FaceSet(synth-faces val: 3 of 72x88, 40 attributes, label maps)"
    # other proportions: the central part is kept, and the landmarks stay on the face
    square = load_faces("synth-faces", "val", root=made, size=(178, 178))
    assert square.landmarks is not None and torch.equal(square.images, whole.images[:, :, 20:198])
    torch.testing.assert_close(square.landmarks, whole.landmarks - torch.tensor([0.0, 20.0]))


def test_subset_keeps_everything_aligned(made: Path) -> None:
    faces = load_faces("synth-faces", root=made)
    for chosen in (
        faces.subset([7, 2]),
        faces.subset(torch.arange(COUNT) % 5 == 2),
        faces.subset(slice(3, None, 4)),
    ):
        assert isinstance(chosen, FaceSet) and len(chosen) in (2, 3)
        for row, file in enumerate(chosen.files):
            place = faces.files.index(file)
            for name in ("images", "targets", "parts", "landmarks", "identities", "params"):
                mine, its = getattr(chosen, name)[row], getattr(faces, name)[place]
                assert torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its, name
    with pytest.raises(ValueError, match="12 images, but 11 files"):
        replace(faces, files=faces.files[:-1])
    with pytest.raises(ValueError, match=r"landmarks must be torch.float32 \(12, 5, 2\)"):
        replace(faces, landmarks=torch.zeros(12, 10))
    with pytest.raises(ValueError, match="targets must be 0 or 1"):
        replace(faces, targets=faces.targets * 2 - 1)


def test_loaders_give_forty_answers(made: Path) -> None:
    faces = load_faces("synth-faces", root=made)
    assert faces.multilabel and torch.equal(faces[3][1], faces.targets[3])  # type: ignore[arg-type]
    batches = list(faces.loader(4, train=True, seed=1))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 88, 72)] * 3
    rows = torch.cat([targets for _, targets in batches]).tolist()
    assert sorted(rows) == sorted(faces.targets.tolist()) and rows != faces.targets.tolist()
    assert torch.equal(torch.cat([targets for _, targets in faces.loader(5)]), faces.targets)


def test_identities_are_optional(twin: Path) -> None:
    (twin / "synth-faces" / "celeba" / "identity_CelebA.txt").unlink()
    assert load_faces("synth-faces", root=twin).identities is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "celebb"}, "unknown set of faces 'celebb'; known are celeba, synth-faces"),
        ({"split": "valid"}, "split must be one of train, val, test, spurious for synth-faces, not 'valid'"),
        ({"name": "celeba", "split": "spurious"}, "split must be one of train, val, test for celeba"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"size": (0, 72)}, r"size \(height, width\) .* must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_faces(**{"name": "synth-faces", "root": tmp_path, **arguments})


def test_missing_data_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"celeba: not found in .*studies data get celeba.*SELIB_DATA"
    ):
        load_faces("celeba", root=tmp_path)
    assert available("synth-faces", tmp_path) and not available("celeba", tmp_path)


# --- the cache ------------------------------------------------------------------------------------


def test_second_load_decodes_and_draws_nothing(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = load_faces("synth-faces", root=twin)
    memory = load_faces("synth-faces", root=twin / "none", limit=3)
    file = twin / "synth-faces" / "celeba" / "img_align_celeba" / disk.files[2]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", lambda *_: pytest.fail("decoded again"))
        patch.setattr(synth, "draw", lambda *_: pytest.fail("drawn again"))
        assert load_faces("synth-faces", root=twin).fingerprint == disk.fingerprint
        assert load_faces("synth-faces", root=twin / "none", limit=3).fingerprint == memory.fingerprint
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(pytest.fail.Exception, match="decoded again"):
            load_faces("synth-faces", root=twin)


def test_a_changed_renderer_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_faces("synth-faces", root=tmp_path, limit=2)
    drawn = []
    draw = synth.draw
    monkeypatch.setattr(synth, "draw", lambda params, removed: drawn.append(params) or draw(params, removed))
    monkeypatch.setattr(celeba, "version", lambda: "another")
    load_faces("synth-faces", root=tmp_path, limit=2)
    assert len(drawn) == 2 and len(list((tmp_path / ".cache").iterdir())) == 1


def test_limit_decodes_only_what_it_keeps(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda file, *rest: decoded.append(file.name) or decode(file, *rest))
    four = load_faces("celeba", root=real, limit=4, seed=1)
    assert sorted(decoded) == four.files and len(four.files) == 4
    assert (
        load_faces("celeba", root=real, limit=2, seed=1).files != four.files[:2] or len(set(four.files)) == 4
    )
    assert len({tuple(load_faces("celeba", root=real, limit=4, seed=seed).files) for seed in range(4)}) > 1
    whole = load_faces("celeba", root=real, limit=1000)
    assert len(whole) == 10 and not whole.synthetic and whole.parts is None
    place = whole.files.index(four.files[3])
    assert torch.equal(whole.images[place], four.images[3]) and torch.equal(
        whole.targets[place], four.targets[3]
    )


def test_celeba_is_read_without_what_people_leave_out(real: Path) -> None:
    """Without landmarks the alignment's own stand in; without a partition people are dealt out."""
    whole = {split: load_faces("celeba", split, root=real) for split in ("train", "val", "test")}
    (real / "celeba" / MARKS).unlink()
    bare = load_faces("celeba", root=real, size=(218, 178))
    assert bare.template and bare.annotation == "the alignment"
    assert bare.landmarks is not None and torch.equal(
        bare.landmarks[0], torch.tensor([[69, 111], [108, 111], [88, 135], [71, 152], [106, 152.0]])
    )
    assert bare.region("Smiling", [0, 1]).flatten(1).any(1).all()
    assert torch.equal(load_faces("celeba", root=real).images, whole["train"].images)
    (real / "celeba" / PART).unlink()
    dealt = [load_faces("celeba", split, root=real) for split in ("train", "val", "test")]
    assert sum(map(len, dealt)) == 16 and len({file for one in dealt for file in one.files}) == 16
    people = [set(one.identities.tolist()) for one in dealt if one.identities is not None]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    (real / "celeba" / PERSON).unlink()
    assert load_faces("celeba", root=real).identities is None


def test_celeba_is_read_at_half_its_size(real: Path) -> None:
    for file in (real / "celeba" / FOLDER).iterdir():
        with Image.open(file) as image:
            image.convert("RGB").resize((89, 109), Image.Resampling.BOX).save(file, quality=95)
    half = load_faces("celeba", root=real, size=(88, 72))
    assert half.images.shape[2:] == (88, 72) and half.landmarks is not None
    assert 20 < float(half.landmarks[:, 0, 0].mean()) < 35  # in pixels of what is loaded


# --- damage ---------------------------------------------------------------------------------------

Damage = Callable[[Path], object]
BAD, GONE = ValueError, FileNotFoundError
ATTR, PART = "list_attr_celeba.txt", "list_eval_partition.txt"
MARKS, PERSON = "list_landmarks_align_celeba.txt", "identity_CelebA.txt"
FOLDER, THIRD = "img_align_celeba", "img_align_celeba/000003.jpg"


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def edit(file: Path, line: int, change: Callable[[str], str]) -> None:
    lines = file.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    file.write_text("\n".join(line for line in lines if line) + "\n")


def cut(folder: Path, every: int) -> None:
    for file in sorted(folder.iterdir())[::every]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 6 // 10])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: rewrite(p / ATTR, "Bald", "Hairless"), BAD, f"{ATTR}:2: found Hairless, expected Bald;"),
        (lambda p: rewrite(p / ATTR, " Young", ""), BAD, f"{ATTR}:2: found nothing, expected Young;"),
        (lambda p: edit(p / ATTR, 1, lambda _: "17"), BAD, f"{ATTR}:1: says '17' rows, and 16 follow;"),
        (lambda p: edit(p / ATTR, 6, zero_for_bags), BAD, f"{ATTR}:6: holds 0, not -1 or 1;"),
        (lambda p: edit(p / ATTR, 7, lambda x: x[:-3]), BAD, f"{ATTR}:7: expected an image, 40 whole"),
        (lambda p: edit(p / ATTR, 7, lambda x: x[:-2] + " x"), BAD, f"{ATTR}:7: expected an image, 40"),
        (
            lambda p: rewrite(p / ATTR, "05.jpg", "99.jpg"),
            GONE,
            f"1 of the 16 .* {ATTR} names are missing: 000099.jpg;",
        ),
        (lambda p: (p / ATTR).write_text(""), BAD, f"{ATTR}:1: says '' rows, and 0 follow"),
        (lambda p: (p / ATTR).write_bytes(b"\xff\xfe\0"), BAD, f"{ATTR}:1: says .* rows, and 0 follow"),
        (lambda p: (p / ATTR).unlink(), GONE, f"{ATTR}: no such file; put the official one"),
        (lambda p: edit(p / PART, 2, lambda x: x[:-1] + "3"), BAD, f"{PART}:2: holds 3, not 0 or 1 or 2"),
        (lambda p: edit(p / PART, 2, lambda x: x[:-2]), BAD, f"{PART}:2: expected an image, 1 whole"),
        (lambda p: rewrite(p / PART, "04.jpg", "03.jpg"), BAD, f"{PART}:4: names 000003.jpg for the second"),
        (lambda p: (p / PART).write_text("\n"), BAD, f"{PART}:1: holds no images"),
        (lambda p: replace_all(p / PART, " 0", " 1"), BAD, rf"{PART}: no image is in train \(0\);"),
        (lambda p: edit(p / MARKS, 9, lambda _: ""), BAD, f"{MARKS}:1: says '16' rows, and 15 follow;"),
        (lambda p: without_row(p / MARKS), BAD, f"{MARKS}:9: found 000008.jpg, expected 000007.jpg"),
        (lambda p: rewrite(p / MARKS, "nose_x", "nose_z"), BAD, f"{MARKS}:2: found nose_z, expected nose_x;"),
        (lambda p: rewrite(p / PERSON, "16.jpg 16\n", "16.jpg\n"), BAD, f"{PERSON}:16: expected an image, 1"),
        (lambda p: (p / THIRD).unlink(), GONE, f"1 of the 16 .* {ATTR} names are missing: 000003.jpg;"),
        (lambda p: shutil.copy(p / THIRD, p / FOLDER / "3.jpg"), BAD, f"{ATTR} does not name 1 .*: 3.jpg;"),
        (lambda p: [f.unlink() for f in (p / FOLDER).iterdir()], GONE, r"16 of .* 000003.jpg, \.\.\.;"),
        (lambda p: shutil.rmtree(p / FOLDER), GONE, f"{FOLDER}: no such folder; put"),
        (
            lambda p: Image.new("RGB", (178, 178)).save(p / THIRD),
            BAD,
            r"1 of 10 .*3.jpg \(178x178, not 178x218\)",
        ),
        (
            lambda p: cut(p / FOLDER, 3),
            BAD,
            r"4 of 10 .* celeba/.*/000001.jpg \(truncated.*04.*07.*, \.\.\.;",
        ),
    ],
)
def test_damaged_celeba_is_refused(real: Path, damage: Damage, error: type[Exception], message: str) -> None:
    damage(real / "celeba")
    with pytest.raises(error, match=message) as caught:
        load_faces("celeba", root=real)
    assert "\n" not in str(caught.value)
    assert not list(real.glob(".cache/*")) and not list(real.glob(".cache/.*"))


def zero_for_bags(line: str) -> str:
    return line[:19] + "  0" + line[22:]


def replace_all(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def without_row(file: Path) -> None:
    edit(file, 9, lambda _: "")
    edit(file, 1, lambda _: "15")


PARAMS, MASK = "params.jsonl", "masks/000029.png"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / PARAMS).unlink(), GONE, f"{PARAMS}: no such file; delete .* `studies data make"),
        (
            lambda p: edit(p / PARAMS, 30, lambda _: ""),
            BAD,
            f"{PARAMS}:30: found nothing, expected 000030.jpg",
        ),
        (
            lambda p: edit(p / PARAMS, 4, lambda x: x[:99]),
            BAD,
            f"{PARAMS}:4: is not a scene with file, params",
        ),
        (lambda p: shutil.rmtree(p / "masks"), GONE, "masks: no such folder; delete"),
        (lambda p: (p / MASK).unlink(), GONE, "masks: 1 of the 30 images .* 000029.png"),
        (lambda p: cut(p / "masks", 12), BAD, r"1 of 12 images .*masks/000001.png \(truncated"),
        (lambda p: edit(p / "celeba" / PART, 1, lambda _: "000001.jpg 4"), BAD, "holds 4, not 0 or"),
    ],
)
def test_damaged_twin_is_refused(twin: Path, damage: Damage, error: type[Exception], message: str) -> None:
    damage(twin / "synth-faces")
    with pytest.raises(error, match=message):
        load_faces("synth-faces", root=twin)


# --- regions --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> FaceSet:
    return load_faces("synth-faces", "test", root=tmp_path_factory.mktemp("crowd"), limit=100)


@pytest.mark.parametrize("attribute", synth.REGIONS)
def test_regions_are_the_parts_and_landmarks_find_them(crowd: FaceSet, attribute: str) -> None:
    assert crowd.parts is not None and crowd.landmarks is not None
    region = crowd.region(attribute, slice(None))
    labels = [1 + synth.PARTS.index(part) for part in synth.REGIONS[attribute]]
    assert np.array_equal(region.numpy(), np.isin(crowd.parts.numpy(), labels))
    assert torch.equal(crowd.region(attribute, [5, 2]), region[[5, 2]])
    guess = landmark_region(attribute, crowd.landmarks, (88, 72))
    assert guess.shape == region.shape and guess.float().mean() < 0.31
    there = region.flatten(1).sum(1) > 4
    held = (guess & region).flatten(1).sum(1)[there] / region.flatten(1).sum(1)[there]
    assert there.sum() >= 4 and held.mean() > 0.75  # measured: .82 for hair, .88 and more elsewhere
    # many times what a region of this size anywhere in the image would hold
    assert held.mean() > 2.5 * guess[there].float().mean()
    # without label maps it is the landmarks that say
    assert torch.equal(replace(crowd, parts=None, part_names=()).region(attribute, [1]), guess[[1]])


def test_attributes_of_the_whole_face_have_no_region(crowd: FaceSet) -> None:
    assert list(regions.WHERE) == list(synth.REGIONS) and set(regions.WHERE.values()) == set(regions.PLACES)
    for attribute in ("Attractive", "Blurry", "Male", "Young"):
        with pytest.raises(ValueError, match=f"{attribute} belongs to the whole face"):
            crowd.region(attribute, [0])
    with pytest.raises(ValueError, match="CelebA has no attribute 'Hat'"):
        crowd.region("Hat", [0])
    with pytest.raises(ValueError, match="neither label maps nor landmarks"):
        replace(crowd, parts=None, landmarks=None).region("Smiling", [0])


def test_landmark_region_by_hand() -> None:
    """Eyes 20 apart, mouth 20 below: its box is |x - 40| <= 11.6, 16.4 <= y - 30 <= 31; then turned 90°."""
    upright = torch.tensor([[[30.0, 30], [50, 30], [40, 40], [33, 50], [47, 50]]])
    region = landmark_region("Smiling", upright, (80, 80))[0]
    rows, columns = torch.nonzero(region).unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (
        47,
        61,
        29,
        51,
    ) and region.sum() == 15 * 23
    turned = torch.stack([79 - upright[..., 1], upright[..., 0]], -1)  # clockwise
    assert torch.equal(landmark_region("Smiling", turned, (80, 80))[0], region.rot90(-1))
    flat = upright[:, [0, 1, 2, 0, 1]]  # eyes and mouth in one place: nothing to measure by
    assert not landmark_region("Smiling", flat, (80, 80)).any()


# --- CelebAMask-HQ --------------------------------------------------------------------------------


@given(
    st.floats(0.2, 5),
    st.floats(-3.1, 3.1),
    st.floats(-99, 99),
    st.floats(-99, 99),
    st.integers(2, 6),
    st.integers(0, 99),
)
def test_similarity_is_found_again(
    scale: float, turn: float, right: float, down: float, count: int, seed: int
) -> None:
    points = np.random.default_rng(seed).uniform(-50, 50, (count, 2))
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    onto = np.array([[cos, -sin, right], [sin, cos, down]])
    assert np.allclose(hqmasks.similarity(points, points @ onto[:, :2].T + onto[:, 2]), onto, atol=1e-6)


def test_similarity_is_the_best_and_never_a_reflection() -> None:
    rng = np.random.default_rng(0)
    source = rng.normal(size=(5, 2))
    target = source * (-1, 1)  # only a reflection would be exact
    best = hqmasks.similarity(source, target)
    assert np.linalg.det(best[:, :2]) > 0

    def loss(matrix: np.ndarray) -> float:
        return float(((source @ matrix[:, :2].T + matrix[:, 2] - target) ** 2).sum())

    for _ in range(200):
        (a, b, x, y), now = 0.01 * rng.normal(size=4), best
        assert loss(best) <= loss(now + np.array([[a, -b, x], [b, a, y]]))


INTO_HQ = np.array(
    [[2.1 * np.cos(0.14), -2.1 * np.sin(0.14), 100.0], [2.1 * np.sin(0.14), 2.1 * np.cos(0.14), 0.0]]
)
TWIN_TO_HQ = {"bangs": "hair", "necktie": "cloth"} | {
    name: name for name in hqmasks.NAMES
}  # other parts: skin


def as_hq(faces: FaceSet, mouth: bool) -> FaceSet:
    """The twin with CelebAMask-HQ's parts, and eyes (and mouth) that lie exactly on the landmarks.

    The twin's own eyes include the lids.
    """
    assert faces.parts is not None and faces.landmarks is not None
    names = list(hqmasks.NAMES)
    table = torch.tensor([0] + [1 + names.index(TWIN_TO_HQ.get(part, "skin")) for part in synth.PARTS])
    parts = table[faces.parts.long()].to(torch.uint8)
    skin, eye, lips = (1 + names.index(name) for name in ("skin", "eyes", "mouth"))
    parts[parts == eye] = skin
    grid = np.mgrid[: NATIVE[0], : NATIVE[1]][::-1].transpose(1, 2, 0)  # x, y
    for labels, points in zip(parts.numpy(), faces.landmarks.numpy(), strict=True):
        for point in points[:2]:
            labels[((grid - point) ** 2).sum(-1) <= 49] = eye
        if mouth:
            half, middle = (points[4] - points[3]) / 2, points[3:].mean(0)
            length = np.hypot(*half)
            along, over = (grid - middle) @ half / length, (grid - middle) @ (-half[1], half[0]) / length
            labels[labels == lips] = skin
            labels[(along / length) ** 2 + (over / 6) ** 2 <= 1] = lips
    return replace(faces, parts=parts, part_names=hqmasks.NAMES)


def write_hq(root: Path, faces: FaceSet) -> None:
    """Label maps as CelebAMask-HQ holds them: turned by 8 degrees, twice as large, a file for each part."""
    assert faces.parts is not None
    place = root / "CelebAMask-HQ"
    back = np.linalg.inv(np.vstack([INTO_HQ, [0, 0, 1]]))[:2].ravel().tolist()
    lines = ["idx         orig_idx    orig_file   proc_md5   final_md5"]
    for row, file in enumerate(faces.files):
        number = 100 - row
        lines.append(f"{number}  {int(Path(file).stem) - 1}  {file}  0be7  d76e")
        folder = place / "CelebAMask-HQ-mask-anno" / str(row % 2)
        folder.mkdir(parents=True, exist_ok=True)
        large = np.asarray(
            Image.fromarray(faces.parts[row].numpy()).transform((512, 512), Image.Transform.AFFINE, back)
        )  # nearest
        ys, xs = np.mgrid[:512, :512]
        for label, part in enumerate(hqmasks.NAMES, 1):
            mask = large == label
            if not mask.any():
                continue
            files = hqmasks.PARTS[part][-2:]  # mouth: the lips
            second = (
                ys > ys[mask].mean()
                if part == "mouth"
                else xs > xs[mask].mean()
                if len(files) == 2
                else ~mask
            )
            for name, half in zip(
                files, (mask & ~second, mask & second) if len(files) == 2 else (mask,), strict=True
            ):
                if half.any():
                    Image.fromarray(half.astype(np.uint8) * 255).convert("RGB").save(
                        folder / f"{number:05d}_{name}.png"
                    )
    (place / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")


def overlaps(found: FaceSet, truth: FaceSet) -> list[float]:
    """IoU of every part that has more than 100 pixels."""
    assert found.parts is not None and truth.parts is not None
    pairs = [(found.parts == label, truth.parts == label) for label in range(1, 1 + len(truth.part_names))]
    return [
        float((mine[row] & its[row]).sum() / (mine[row] | its[row]).sum())
        for mine, its in pairs
        for row in range(len(truth))
        if its[row].sum() > 100
    ]


@pytest.fixture(scope="session")
def hq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FaceSet]:
    """A root with celeba and CelebAMask-HQ for some training images; and these with the true label maps."""
    root = tmp_path_factory.mktemp("hq")
    celeba.write_faces(root / "synth-faces", {"train": 10, "val": 1, "test": 1}, seed=0)
    shutil.copytree(root / "synth-faces" / "celeba", root / "celeba")
    truth = load_faces("synth-faces", root=root, size=NATIVE)
    assert truth.parts is not None
    eyes = (truth.parts == 1 + synth.PARTS.index("eyes")).flatten(1).sum(1) > 400
    truth = as_hq(truth.subset(eyes).subset(slice(0, 7)), mouth=True)
    write_hq(root, truth)
    return root, truth


def test_hq_masks_are_brought_back_onto_the_aligned_images(hq: tuple[Path, FaceSet]) -> None:
    root, truth = hq
    faces = load_faces("celeba", root=root, size=NATIVE)
    found = with_masks(faces, root)
    assert len(found) == len(truth) < len(faces) and found.files == truth.files
    assert torch.equal(found.images, truth.images) and torch.equal(found.targets, truth.targets)
    assert found.parts is not None and truth.parts is not None and found.part_names == truth.part_names
    ious = overlaps(found, truth)
    assert len(ious) > 8 * len(truth) and min(ious) > 0.9
    hair = 1 + hqmasks.NAMES.index("hair")
    assert torch.equal(found.region("Wavy_Hair", slice(None)), found.parts == hair)
    assert found.landmarks is not None  # fringes have no mask there: the landmarks say where they are
    assert torch.equal(found.region("Bangs", [0]), landmark_region("Bangs", found.landmarks[[0]], NATIVE))
    small = with_masks(load_faces("celeba", root=root, size=(88, 72)), root)
    assert small.parts is not None and small.parts.shape == (len(truth), 88, 72)


def test_hq_masks_of_mouths_as_they_are_drawn(hq: tuple[Path, FaceSet], tmp_path: Path) -> None:
    """The ends of a drawn mouth lie within a pixel of the landmarks, so that the masks do as well."""
    root, truth = hq
    own = load_faces("synth-faces", root=root, size=NATIVE)
    own = as_hq(own.subset([own.files.index(file) for file in truth.files]), mouth=False)
    shutil.copytree(root / "celeba", tmp_path / "celeba")
    write_hq(tmp_path, own)
    ious = overlaps(with_masks(load_faces("celeba", root=tmp_path, size=NATIVE), tmp_path), own)
    assert np.mean(ious) > 0.9


def test_hq_masks_are_read_once_and_strictly(
    hq: tuple[Path, FaceSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, truth = hq
    faces = load_faces("celeba", root=root, size=NATIVE)
    for folder in ("celeba", "CelebAMask-HQ"):
        shutil.copytree(root / folder, tmp_path / folder)
    first = with_masks(faces, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hqmasks, "decode", lambda *_: pytest.fail("decoded again"))
        assert first.parts is not None and torch.equal(first.parts, with_masks(faces, tmp_path).parts)
    place = tmp_path / "CelebAMask-HQ"
    with pytest.raises(ValueError, match="masks for celeba with its landmarks, not for synth-faces"):
        with_masks(truth, tmp_path)
    (place / "CelebAMask-HQ-mask-anno" / "0" / "00100_l_eye.png").unlink()
    assert with_masks(faces, tmp_path).files == truth.files[1:]  # nothing to align it by
    nose = place / "CelebAMask-HQ-mask-anno" / "1" / "00099_nose.png"
    nose.write_bytes(nose.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"1 of 6 .*mask-anno/1/00099_nose.png \(truncated.*unpack CelebAMask-HQ again"
    ):
        with_masks(faces, tmp_path)
    mapping = place / "CelebA-HQ-to-CelebA-mapping.txt"
    rewrite(mapping, "100  ", "x  ")
    with pytest.raises(ValueError, match="mapping.txt: expected columns idx, orig_idx, orig_file"):
        with_masks(faces, tmp_path)
    rewrite(mapping, "orig_idx", "original")
    with pytest.raises(ValueError, match="mapping.txt: expected columns"):
        with_masks(faces, tmp_path)
    mapping.write_text("idx orig_idx orig_file\n")
    with pytest.raises(ValueError, match="for none of the 10 images of train"):
        with_masks(faces, tmp_path)
    mapping.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"mapping.txt: no such file; put the folder CelebAMask-HQ there"
    ):
        with_masks(faces, tmp_path)


# --- catalog and command line ---------------------------------------------------------------------


def test_command_line_makes_checks_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--data", str(tmp_path)]
    assert main(["data", "make", "synth-faces", "-n", "4", "--seed", "2", *root]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["synth-faces"]
    assert main(["data", "list", *root]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert " here " in lines["synth-faces"] and " absent " in lines["celeba"] and "162,770" in lines["celeba"]
    assert main(["data", "check", "synth-faces", *root]) == 0
    summary = capsys.readouterr().out
    for split, count in (("train", 4), ("val", 1), ("test", 1), ("spurious", 4)):
        assert f"{split}: {count} images of 72x88, 40 attributes, label maps, fingerprint" in summary
    assert main(["data", "make", "synth-faces", *root]) == 2
    assert "already there; delete it to render it anew" in capsys.readouterr().err
    (tmp_path / "synth-faces" / "celeba" / "img_align_celeba" / "000002.jpg").write_bytes(b"")
    assert main(["data", "check", "synth-faces", *root]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "000002.jpg (empty file)" in error


def test_check_wants_the_whole_of_celeba(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="celeba: train has 10 images, not 162,770: it is not the whole set"):
        catalog.check("celeba", real)
    monkeypatch.setitem(catalog.WHOLE, "celeba", {"train": 10, "val": 3, "test": 3})
    assert "test: 3 images of 72x88, 40 attributes, landmarks, fingerprint" in catalog.check("celeba", real)
    with pytest.raises(FileNotFoundError, match="studies data make synth-faces"):
        catalog.check("synth-faces", real)


@pytest.fixture
def drive(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays Google Drive: `gdown.download` fetches from it, torchvision knows its MD5s."""
    source = tmp_path / "drive"
    source.mkdir()
    with zipfile.ZipFile(source / "img_align_celeba.zip", "w") as archive:
        for file in sorted((pristine / "celeba" / "img_align_celeba").iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
    for file in (pristine / "celeba").glob("*.txt"):
        shutil.copy(file, source)
    files = [(f.name, hashlib.md5(f.read_bytes()).hexdigest(), f.name) for f in sorted(source.iterdir())]
    monkeypatch.setattr(CelebA, "file_list", files)
    monkeypatch.setattr(gdown, "download", lambda url, output, **_: shutil.copy(source / named(url), output))
    return source


def named(url: str) -> str:
    return url.removeprefix("https://drive.google.com/uc?id=")


def test_get_celeba_verifies_and_unpacks(drive: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert catalog.get("celeba", root) == root / "celeba"
    assert len(load_faces("celeba", root=root)) == 10
    lists = [file.name for file in drive.glob("*.txt")]
    assert {file.name for file in (root / "celeba").iterdir()} == {"img_align_celeba", *lists}
    shutil.rmtree(drive)
    assert catalog.get("celeba", root) == root / "celeba"  # it is there: nothing is fetched


def refuse(_: Path) -> None:
    raise FileURLRetrievalError("Failed to retrieve file url:\n\n\tToo many users have viewed this file.")


def break_off(_: Path) -> None:
    raise OSError("no route to host")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (refuse, "Too many users have viewed this file"),
        (lambda file: file.write_text("<html>Quota exceeded</html>"), "what came has another MD5"),
        (break_off, "no route to host"),
    ],
)
def test_get_celeba_keeps_what_is_whole_and_what_is_the_users(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path], object], why: str
) -> None:
    whole = gdown.download

    def download(url: str, output: str, *, resume: bool) -> None:
        if named(url).endswith(".zip"):
            Path(f"{output}abcd1234.part").write_bytes(b"PK")
            answer(Path(output))
        else:
            whole(url, output, resume=resume)

    monkeypatch.setattr(gdown, "download", download)
    place = tmp_path / "root" / "celeba"
    place.mkdir(parents=True)
    mine = [f"{ATTR}.old", "img_align_celeba.zip.part", "img_align_celeba.zip12345678.part"]
    for name in mine:
        (place / name).write_text("mine")
    with pytest.raises(ConnectionError, match=why) as caught:
        catalog.get("celeba", place.parent)
    message = str(caught.value)
    for word in (
        "img_align_celeba.zip",
        ATTR,
        PART,
        MARKS,
        PERSON,
        str(place),
        celeba.ADDRESS,
        "data get celeba",
    ):
        assert word in message
    assert "\n" not in message
    lists = [file.name for file in drive.glob("*.txt")]
    assert {file.name for file in place.iterdir()} == {*mine, *lists}
    assert {(place / name).read_text() for name in mine} == {"mine"}
    # put there by hand, it is used, and stays, though a list is fetched
    shutil.copy(drive / "img_align_celeba.zip", place)
    (place / ATTR).unlink()
    catalog.get("celeba", place.parent)
    assert len(load_faces("celeba", root=place.parent)) == 10 and (place / "img_align_celeba.zip").is_file()


def test_get_celeba_leaves_no_trace_of_a_first_file_that_failed(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setattr(gdown, "download", lambda url, output, **_: break_off(Path(output)))
    with pytest.raises(ConnectionError):
        catalog.get("celeba", root)
    assert list(root.iterdir()) == []
    (root / "celeba").mkdir()
    (root / "celeba" / ATTR).write_text("mine")
    with pytest.raises(ValueError, match=rf"{ATTR}: its MD5 is not .*; delete it and run this again"):
        catalog.get("celeba", root)
    assert (root / "celeba" / ATTR).read_text() == "mine"
