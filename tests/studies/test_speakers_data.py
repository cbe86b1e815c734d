"""TalkNet's layout read strictly, batched and changed; the twin in the same files; AVA cut from raw videos; average precision."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile
from sklearn.metrics import precision_recall_curve

from selib.cli import main
from selib.metrics import frame_average_precision
from selib.video import write as write_video
from studies.audio import mfcc
from studies.data import SpeakerSet, available, catalog, draw_clips, load, load_speakers, speakers
from studies.data.ava import prepare
from studies.data.speakers import changed, inputs_of, overlaid, write_speakers
from studies.twins import speakers as synth

RATE, SIDE = 16000, 112
TITLES = "video_id,frame_timestamp,entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2,label,entity_id,label_id,instance_id"

# --- a small set, written by the test in TalkNet's layout -------------------------------------------------------------

CLIPS = {  # entity: video, frames, first timestamp, fps; the second sorts its crops by number, not by name
    "abcdefghijk_0000_0060:0": ("abcdefghijk", 12, 3.0, 25.0),
    "abcdefghijk_0900_0960:1": ("abcdefghijk", 8, 9.9, 25.0),
    "0dY0t1NRXeo_72-92_0_1:2": ("0dY0t1NRXeo_72-92", 10, 0.0, 30.0),
    "lmnopqrstuv_0000_0060:0": ("lmnopqrstuv", 12, 1.0, 25.0),
}


def labels_of(entity: str) -> list[int]:
    return [int((frame + len(entity)) % 3 > 0) for frame in range(CLIPS[entity][1])]


def grey_of(entity: str, frame: int, body: bool = False) -> int:
    return 10 + 60 * list(CLIPS).index(entity) + 4 * frame + (2 if body else 0)


def wave_of(entity: str) -> np.ndarray:
    """Noise as long as TalkNet cuts it: from the first timestamp to the last, which is one frame too short."""
    _, frames, _, fps = CLIPS[entity]
    rng = np.random.default_rng(list(CLIPS).index(entity))
    return rng.normal(0, 2000, round((frames - 1) / fps * RATE)).astype(np.int16)


def write_set(place: Path, split: str = "train") -> None:
    (place / "csv").mkdir(parents=True)
    listed, rows = [], [TITLES]
    for index, (entity, (video, frames, first, fps)) in enumerate(CLIPS.items()):
        listed.append(f"{entity}\t{frames}\t{fps}\t{labels_of(entity)}\t{index}")
        folder = place / "clips_audios" / split / video
        folder.mkdir(parents=True, exist_ok=True)
        wavfile.write(folder / f"{entity}.wav", RATE, wave_of(entity))
        for frame, label in enumerate(labels_of(entity)):
            time = first + frame / fps
            name = ("NOT_SPEAKING", "SPEAKING_AUDIBLE")[label]
            rows.append(f"{video},{time:.2f},0.1,0.1,0.5,0.5,{name},{entity},{label},{entity}:0")
            for kind, size, body in (
                ("clips_videos", (90, 140), False),
                ("clips_videos_body", (60, 50), True),
            ):
                crops = place / kind / split / video / entity
                crops.mkdir(parents=True, exist_ok=True)
                grey = grey_of(entity, frame, body)
                Image.new("RGB", size, (grey, grey, grey)).save(crops / f"{time:.2f}.jpg")
    (place / "csv" / f"{split}_loader.csv").write_text("\n".join(listed) + "\n")
    (place / "csv" / f"{split}_orig.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds a small `ava-asd`: to be read, not changed."""
    root = tmp_path_factory.mktemp("pristine")
    write_set(root / "ava-asd")
    return root


@pytest.fixture
def small(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(pristine / "ava-asd", tmp_path / "ava-asd")
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds the twin on disk, one clip for each condition: to be read, not changed."""
    root = tmp_path_factory.mktemp("made")
    write_speakers(root / "synth-speakers", {"train": 5}, seed=3)
    return root


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root without it, in which it is rendered once."""
    root = tmp_path_factory.mktemp("drawn")
    load_speakers("synth-speakers", "train", root=root, limit=5, seed=3)
    return root


# --- reading ----------------------------------------------------------------------------------------------------------


def test_clips_are_read_as_they_lie_there(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    assert (
        len(data) == 4
        and data.streams == ("audio", "face", "body")
        and not data.synthetic
        and data.task == "all"
    )
    assert repr(data) == "SpeakerSet(ava-asd train: 4 clips of 42 frames, audio, face, body)"
    for i, (entity, (video, frames, _, fps)) in enumerate(CLIPS.items()):
        info = data.clips[i]
        assert (info.entity, info.video, info.frames, info.fps, info.index) == (entity, video, frames, fps, i)
        assert info.labels.tolist() == labels_of(entity) and info.condition is None and info.kinds is None
        assert np.array_equal(data.wave(i), wave_of(entity))
        streams, labels = data.clip(i)
        assert list(streams) == ["audio", "face", "body"] and labels.dtype == torch.float32
        assert labels.tolist() == [labels_of(entity)]
        assert streams["audio"].shape == (1, 4 * frames, 13)
        for stream in ("face", "body"):
            assert streams[stream].shape == (1, frames, SIDE, SIDE) and streams[stream].dtype == torch.float32
            wanted = torch.tensor([grey_of(entity, frame, stream == "body") for frame in range(frames)]) / 255
            assert (streams[stream][0] - wanted[:, None, None]).abs().max() <= 1.5 / 255


def test_sound_has_four_rows_a_frame_although_it_ends_early(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine, streams=["audio"])
    for i in range(4):
        rows = mfcc(torch.from_numpy(data.wave(i)), fps=data.clips[i].fps)
        (found,) = data.clip(i)[0]["audio"]
        held = min(len(rows), len(found))
        assert held < len(found) and torch.equal(found[:held], rows[:held])
        assert torch.equal(found[held:], rows[-1:].expand(len(found) - held, -1))


def test_sound_that_lasts_longer_is_cut_and_one_frame_may_have_none(small: Path) -> None:
    entity, (video, frames, _, _) = next(iter(CLIPS.items()))
    file = small / "ava-asd" / "clips_audios" / "train" / video / f"{entity}.wav"
    wave = np.random.default_rng(0).normal(0, 2000, 3 * RATE).astype(np.int16)
    wavfile.write(file, RATE, wave)
    data = load_speakers("ava-asd", "train", root=small, streams=["audio"])
    assert torch.equal(data.clip(0)[0]["audio"][0], mfcc(torch.from_numpy(wave))[: 4 * frames])
    listed = small / "ava-asd" / "csv" / "train_loader.csv"
    listed.write_text(f"{entity}\t1\t25\t[1]\t0\n")  # TalkNet cuts the sound of a single frame to nothing
    wavfile.write(file, RATE, wave[:0])
    data = load_speakers("ava-asd", "train", root=small, streams=["audio"])
    (rows,) = data.clip(0)[0]["audio"]
    assert rows.shape == (4, 13) and rows.isfinite().all()


def test_a_window_is_cut_from_all_streams_in_time(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    whole, labels = data.clip(0)
    part, some = data.clip(0, 3, 9)
    assert torch.equal(some, labels[:, 3:9])
    assert torch.equal(part["face"], whole["face"][:, 3:9]) and torch.equal(
        part["body"], whole["body"][:, 3:9]
    )
    assert part["audio"].shape == (1, 24, 13)
    assert torch.equal(
        part["audio"][:, 1:], whole["audio"][:, 13:36]
    )  # the first row has no sample before it
    for start, stop in ((-1, 3), (3, 3), (0, 13), (5, 4)):
        with pytest.raises(ValueError, match=f"has frames 0 to 12: start={start}, stop={stop}"):
            data.clip(0, start, stop)


def test_only_the_streams_asked_for_are_needed(small: Path) -> None:
    shutil.rmtree(small / "ava-asd" / "clips_videos_body")
    data = load_speakers("ava-asd", "train", root=small, streams=("face", "audio"))
    assert data.streams == ("audio", "face") and list(data.clip(0)[0]) == ["audio", "face"]
    with pytest.raises(ValueError, match="loaded with the streams audio, face, not with 'body'"):
        data.pictures(0, "body")
    with pytest.raises(
        FileNotFoundError, match=r'clips_videos_body/train: no such folder; .* leave "body" out of'
    ):
        load_speakers("ava-asd", "train", root=small)
    for call in (data.masks, data.params):
        with pytest.raises(ValueError, match="ava-asd was filmed, not drawn"):
            call(0)


def test_limit_and_subset_choose_clips(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    some = load_speakers("ava-asd", "train", root=pristine, limit=2, seed=1)
    entities = [clip.entity for clip in data.clips]
    chosen = [entities.index(clip.entity) for clip in some.clips]
    assert len(chosen) == 2 and chosen == sorted(chosen)
    picked = {
        tuple(
            clip.entity for clip in load_speakers("ava-asd", "train", root=pristine, limit=2, seed=seed).clips
        )
        for seed in range(8)
    }
    assert len(picked) > 1
    part = data.subset(chosen)
    assert torch.equal(part.clip(1)[0]["face"], some.clip(1)[0]["face"])
    assert part.fingerprint == some.fingerprint != data.fingerprint
    assert data.subset([2, 0]).clips[0].entity == entities[2] and len(data.subset(slice(1, None))) == 3


def test_the_fingerprint_follows_the_lists(small: Path, pristine: Path) -> None:
    before = load_speakers("ava-asd", "train", root=pristine).fingerprint
    assert len(before) == 16 and load_speakers("ava-asd", "train", root=small).fingerprint == before
    listed = small / "ava-asd" / "csv" / "train_loader.csv"
    listed.write_text(listed.read_text().replace("[1, ", "[0, ", 1).replace("[0, 1, 1", "[1, 1, 1", 1))
    assert load_speakers("ava-asd", "train", root=small).fingerprint != before


def test_what_has_been_decoded_is_kept_up_to_a_limit(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_speakers("ava-asd", "train", root=small)
    first = kept.clip(0)[0]
    monkeypatch.setattr(speakers, "KEPT", 0)
    anew = load_speakers("ava-asd", "train", root=small)
    assert torch.equal(anew.clip(0)[0]["face"], first["face"])
    shutil.rmtree(small / "ava-asd" / "clips_videos")
    assert torch.equal(kept.clip(0)[0]["face"], first["face"])
    with pytest.raises(FileNotFoundError):
        anew.clip(0)


def test_arguments_are_checked(pristine: Path) -> None:
    for options, message in (
        ({"name": "ava"}, "unknown set of speakers 'ava'; known are ava-asd, wasd, synth-speakers"),
        ({"split": "dev"}, "split must be one of train, val, test, not 'dev'"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"streams": ()}, "streams must be some of audio, face, body"),
        ({"streams": "audio"}, "streams must be some of"),
        ({"streams": ("face", "face")}, "each once"),
        ({"streams": ("face", "hands")}, "streams must be some of"),
        ({"task": "face"}, "task must be one of all for ava-asd, not 'face'"),
        (
            {"name": "synth-speakers", "task": "hands"},
            "task must be one of all, audio, face, body for synth-speakers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_speakers(**{"name": "ava-asd", "split": "train", "root": pristine, **options})  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="val_loader.csv: no such file"):
        load_speakers("ava-asd", "val", root=pristine)
    with pytest.raises(FileNotFoundError, match=r"wasd: not found in .*/WASD\).*wasd_metadata.csv"):
        load_speakers("wasd", "train", root=pristine)
    with pytest.raises(
        ValueError, match="ava-asd is a set of clips with sound: studies.data.load_speakers reads it"
    ):
        load("ava-asd", root=pristine)
    assert (
        available("ava-asd", pristine)
        and not available("wasd", pristine)
        and available("synth-speakers", pristine)
    )


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        text = (place / file).read_text()
        assert old in text
        (place / file).write_text(text.replace(old, new, 1))

    return change


LOADER, ORIG = "csv/train_loader.csv", "csv/train_orig.csv"
FIRST = next(iter(CLIPS))
SECOND = "abcdefghijk_0900_0960:1"
AUDIO = f"clips_audios/train/abcdefghijk/{SECOND}.wav"
FACES = f"clips_videos/train/abcdefghijk/{SECOND}"
BODIES = f"clips_videos_body/train/abcdefghijk/{SECOND}"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda p: (p / LOADER).unlink(),
            FileNotFoundError,
            "train_loader.csv: no such file; prepare ava-asd again",
        ),
        (lambda p: (p / ORIG).unlink(), FileNotFoundError, "train_orig.csv: no such file"),
        (lambda p: (p / LOADER).write_text("\n"), ValueError, "train_loader.csv: is empty"),
        (
            edit(LOADER, "\t25.0\t", "\t0\t"),
            ValueError,
            "train_loader.csv:1: the frames a second of .* are '0', not a number above 0",
        ),
        (
            edit(LOADER, "\t30.0\t", "\tfast\t"),
            ValueError,
            "train_loader.csv:3: the frames a second of .* are 'fast'",
        ),
        (
            edit(LOADER, "\t30.0\t", "\tnan\t"),
            ValueError,
            "train_loader.csv:3: .* are 'nan', not a number above 0",
        ),
        (
            edit(LOADER, "\t8\t", "\t9\t"),
            ValueError,
            f"train_loader.csv:2: {SECOND} has 8 labels for 9 frames",
        ),
        (
            edit(LOADER, "\t8\t", "\t0\t"),
            ValueError,
            f"train_loader.csv:2: {SECOND} is an empty clip, of 0 frames",
        ),
        (
            edit(LOADER, "\t8\t", "\t-8\t"),
            ValueError,
            "train_loader.csv:2: the number of frames of .* is '-8'",
        ),
        (edit(LOADER, "[", "[2, "), ValueError, "train_loader.csv:1: .* has the label '2', not 0 or 1"),
        (
            edit(LOADER, "\t25.0\t[", "\t25.0\t"),
            ValueError,
            "train_loader.csv:1: expected labels in brackets",
        ),
        (edit(LOADER, "\t0\n", "\tfirst\n"), ValueError, "train_loader.csv:1: the index of .* is 'first'"),
        (
            edit(LOADER, "\t0\n", "\n"),
            ValueError,
            "train_loader.csv:1: expected entity, frames, fps, .* between tabs",
        ),
        (
            edit(LOADER, "\n", "\n\n"),
            ValueError,
            "train_loader.csv:2: expected entity, frames, fps, .* found ''",
        ),
        (edit(LOADER, SECOND, FIRST), ValueError, f"train_loader.csv:2: names {FIRST} again, after line 1"),
        (
            edit(LOADER, SECOND, "../elsewhere"),
            ValueError,
            "train_loader.csv:2: '../elsewhere' is no name of a clip",
        ),
        (
            edit(LOADER, SECOND, "nobody"),
            ValueError,
            r"train_loader.csv:2: train_orig.csv has no nobody \(1 such clips\)",
        ),
        (
            edit(ORIG, "entity_id", "entity"),
            ValueError,
            "train_orig.csv:1: has no column entity_id, but 'video_id,",
        ),
        (edit(ORIG, ",0.1,0.1", ",0.1"), ValueError, "train_orig.csv:2: has 9 values for 10 columns"),
        (
            edit(ORIG, "abcdefghijk,3.04", "other,3.04"),
            ValueError,
            "train_orig.csv:3: .* is in video other here and in abcdefghijk before",
        ),
        (
            edit(ORIG, "abcdefghijk,3.00", "..,3.00"),
            ValueError,
            r"train_orig.csv:2: '\.\.' is no name of a video",
        ),
        (
            lambda p: (p / AUDIO).unlink(),
            FileNotFoundError,
            rf"{SECOND}.wav: no such file, though .*train_loader.csv:2 names it",
        ),
        (
            lambda p: shutil.rmtree(p / FACES),
            FileNotFoundError,
            rf"{SECOND}: no such folder, though .*train_loader.csv:2 names it",
        ),
        (
            lambda p: (p / FACES / "9.98.jpg").unlink(),
            ValueError,
            f"clips_videos/.*{SECOND}: 7 crops, fewer than the 8 frames of .*train_loader.csv:2",
        ),
        (
            lambda p: (p / BODIES / "9.98.jpg").unlink(),
            ValueError,
            f"clips_videos_body/.*{SECOND}: 7 crops, fewer than the 8",
        ),
        (
            lambda p: shutil.rmtree(p / "clips_audios"),
            FileNotFoundError,
            "clips_audios/train: no such folder",
        ),
    ],
)
def test_loading_refuses_by_file_and_line(
    small: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(small / "ava-asd")
    with pytest.raises(error, match=message) as caught:
        load_speakers("ava-asd", "train", root=small)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def cut(file: Path, share: float = 0.6) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def rename(folder: Path) -> None:
    (folder / "9.98.jpg").rename(folder / "face9.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / AUDIO), rf"{SECOND}.wav: cut short: \d+ of 4480 samples"),
        (lambda p: cut(p / AUDIO, 0), f"{SECOND}.wav: not a WAV file that can be read"),
        (lambda p: (p / AUDIO).write_bytes(b"RIFF, as if"), f"{SECOND}.wav: not a WAV file that can be read"),
        (
            lambda p: wavfile.write(p / AUDIO, 8000, wave_of(SECOND)),
            "1 channels, 16 bits, 8000 Hz, not 1, 16 and 16000; convert",
        ),
        (
            lambda p: wavfile.write(p / AUDIO, RATE, np.stack([wave_of(SECOND)] * 2, 1)),
            "2 channels, 16 bits, 16000 Hz",
        ),
        (
            lambda p: wavfile.write(p / AUDIO, RATE, wave_of(SECOND) / 2**15),
            "not a WAV file that can be read",
        ),
        (
            lambda p: wavfile.write(p / AUDIO, RATE, wave_of(SECOND)[:2000]),
            r"0.12 s of sound for the 0.32 s of .*train_loader.csv:2",
        ),
        (lambda p: cut(p / FACES / "9.98.jpg"), f"{SECOND}/9.98.jpg: truncated or not an image"),
        (lambda p: cut(p / BODIES / "9.98.jpg", 0), f"{SECOND}/9.98.jpg: empty file"),
        (lambda p: rename(p / FACES), f"{SECOND}/face9.jpg: crops are named by their time in seconds"),
    ],
)
def test_a_damaged_file_shows_when_it_is_read(
    small: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(small / "ava-asd")
    data = load_speakers("ava-asd", "train", root=small)
    data.clip(0)
    with pytest.raises(ValueError, match=message) as caught:
        data.clip(1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        list(data.loader(100))


# --- conditions -------------------------------------------------------------------------------------------------------


def test_conditions_come_from_wasds_metadata(small: Path) -> None:
    place = small / "ava-asd"
    place.rename(small / "wasd")
    place = small / "wasd"
    rows = "Video,Category,FPS\nabcdefghijk,2,25\n0dY0t1NRXeo_72-92,4,30\nlmnopqrstuv,0,25\nnot_here,1,30\n"
    for file in (place / "csv" / "wasd_metadata.csv", place / "wasd_metadata.csv"):
        file.write_text(rows)
        found = [clip.condition for clip in load_speakers("wasd", "train", root=small).clips]
        assert found == ["face occlusion", "face occlusion", "surveillance", "optimal"]
        file.unlink()
    file.write_text(rows.replace("lmnopqrstuv,0", "lmnopqrstuv,5"))
    with pytest.raises(ValueError, match="wasd_metadata.csv:4: category '5' of lmnopqrstuv is not 0 to 4"):
        load_speakers("wasd", "train", root=small)
    file.write_text(rows.replace("lmnopqrstuv,0,25\n", ""))
    with pytest.raises(
        ValueError, match=r"wasd_metadata.csv: says nothing of video lmnopqrstuv \(1 such clips\)"
    ):
        load_speakers("wasd", "train", root=small)
    own = place / "csv" / "train_condition.csv"
    own.write_text("entity_id,condition\n" + "".join(f"{entity},c{n}\n" for n, entity in enumerate(CLIPS)))
    assert [clip.condition for clip in load_speakers("wasd", "train", root=small).clips] == [
        "c0",
        "c1",
        "c2",
        "c3",
    ]
    own.write_text("entity_id,condition\n")
    with pytest.raises(ValueError, match=f"train_condition.csv: says nothing of {FIRST}"):
        load_speakers("wasd", "train", root=small)
    own.write_text("entity_id,where\n")
    with pytest.raises(ValueError, match="train_condition.csv:1: has no column condition"):
        load_speakers("wasd", "train", root=small)


# --- batches ----------------------------------------------------------------------------------------------------------


class Levels:
    """A source without files: a picture's grey says frame and clip, the sound is noise."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = frames

    def wave(self, row: int) -> np.ndarray:
        return np.random.default_rng(row).normal(0, 1000, self.frames[row] * 640).astype(np.int16)

    def pictures(self, row: int, stream: str) -> np.ndarray:
        ramp = (
            np.arange(SIDE, dtype=np.uint8)[None, None]
            + np.arange(self.frames[row], dtype=np.uint8)[:, None, None]
        )
        return np.ascontiguousarray(np.broadcast_to(ramp, (self.frames[row], SIDE, SIDE)))

    def masks(self, row: int) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def params(self, row: int) -> dict[str, Any]:
        raise NotImplementedError

    def mark(self, row: int) -> str:
        return ""


def levels(frames: list[int], **options: Any) -> SpeakerSet:
    infos = [
        speakers.ClipInfo(f"clip{n}", "v", count, 25.0, np.arange(count, dtype=np.uint8) % 2, n)
        for n, count in enumerate(frames)
    ]
    known = {"streams": ("audio", "face", "body"), "task": "all", **options}
    return SpeakerSet(
        "ava-asd",
        "train",
        clips=infos,
        synthetic=False,
        _source=Levels(frames),
        _rows=list(range(len(frames))),
        **known,
    )


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 300), st.none() | st.integers(1, 70), st.integers(0, 3))
@settings(deadline=None)
def test_every_clip_is_in_one_batch_of_its_length(
    frames: list[int], budget: int, window: int | None, epoch: int
) -> None:
    data = levels(frames)
    for train in (True, False):
        loader = data.loader(budget, train=train, window=window)
        if train:
            loader.set_epoch(epoch)
        batches = loader.batches
        assert sorted(i for batch in batches for i in batch) == list(range(len(frames)))
        assert len(loader) == len(batches)
        kept = [min(count, window or count) for count in frames]
        for batch in batches:
            longest = max(kept[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= budget
            if not train:
                assert len({kept[i] for i in batch}) == 1
        longest_first = [max(kept[i] for i in batch) for batch in batches]
        assert longest_first == sorted(longest_first, reverse=True)


@given(lengths, st.integers(1, 300))
@settings(deadline=None)
def test_training_batches_are_as_long_as_talknets(frames: list[int], budget: int) -> None:
    """TalkNet's rule: sorted by length, as many as fit with the longest, which is the first."""
    ordered = sorted(frames, reverse=True)
    wanted = []
    while ordered:
        size = max(budget // ordered[0], 1)
        wanted.append(ordered[:size])
        ordered = ordered[size:]
    batches = levels(frames).loader(budget, train=True).batches
    assert [[frames[i] for i in batch] for batch in batches] == wanted


def test_evaluation_sees_every_frame_once() -> None:
    frames = [5, 9, 5, 9, 9, 3, 5]
    data = levels(frames)
    loader = data.loader(20)
    assert loader.batches == [[1, 3], [4], [0, 2, 6], [5]]
    seen = 0
    for batch, (streams, labels) in zip(loader.batches, loader, strict=True):
        for place, i in enumerate(batch):
            alone, known = data.clip(i)
            assert torch.equal(labels[place], known[0])
            for name, values in alone.items():
                assert torch.equal(streams[name][place], values[0])
        seen += labels.numel()
    assert seen == sum(frames)
    (streams, labels), *_ = data.loader(20, window=4)
    assert labels.shape == (5, 4) and torch.equal(labels[0], data.clip(0)[1][0, :4])
    assert torch.equal(streams["face"][0], data.clip(0, 0, 4)[0]["face"][0])


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[1], y[1]) and all(torch.equal(x[0][name], y[0][name]) for name in x[0])
        for x, y in zip(a, b, strict=True)
    )


def test_training_depends_on_seed_and_epoch_alone() -> None:
    data = levels([12, 8, 8, 12, 8, 8, 10])
    loader = data.loader(24, train=True, seed=1)
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 3 and not equal(first, second)
    again = data.loader(24, train=True, seed=1)
    again.set_epoch(1)
    assert equal(list(again), second)
    again.set_epoch(0)
    assert equal(list(again), first)
    assert not equal(list(data.loader(24, train=True, seed=2)), first)
    # those of one length are mixed anew, and the batches come in another order
    compositions, orders = set(), set()
    for epoch in range(10):
        loader.set_epoch(epoch)
        orders.add(tuple(labels.shape for _, labels in loader))
        compositions.add(str(loader.batches))
    assert len(compositions) > 1 and len(orders) > 1


def test_training_cuts_to_the_shortest_and_windows_lie_anywhere() -> None:
    data = levels([12, 10])
    ((streams, labels),) = data.loader(24, train=True)
    assert (
        labels.shape == (2, 10) and streams["audio"].shape == (2, 40, 13) and streams["face"].shape[1] == 10
    )
    assert labels.tolist() == [[0, 1] * 5] * 2  # their beginnings
    loader = levels([40]).loader(8, train=True, window=8)
    starts = set()
    for _ in range(25):
        ((streams, labels),) = loader
        assert labels.shape == (1, 8)
        first = round(float(streams["face"][0, 0, 56, 56]) * 255) - round(
            float(streams["face"][0, 1, 56, 56]) * 255
        )
        assert first == -1  # frames stay in order
        starts.add(tuple(labels[0].tolist()))
    assert starts == {(0, 1) * 4, (1, 0) * 4}


def test_streams_and_labels_of_a_window_are_in_time() -> None:
    """Without the changes, a window is what `clip` cuts."""
    data = levels([40], streams=("audio",), task="audio")  # nothing is laid over a task that a voice decides
    loader = data.loader(8, train=True, window=8)
    whole = data.clip(0)[0]["audio"][0]
    places = set()
    for _ in range(20):
        ((streams, labels),) = loader
        rows = streams["audio"][0]
        (place,) = [n for n in range(33) if torch.equal(rows[1:], whole[4 * n + 1 : 4 * n + 32])]
        assert labels[0].tolist() == [(place + n) % 2 for n in range(8)]
        places.add(place)
    assert len(places) > 5


def test_labels_stay_and_pictures_and_sound_change() -> None:
    frames = [10] * 12
    data = levels(frames)
    loader = data.loader(30, train=True)
    overlays, flips = Counter[bool](), Counter[str]()
    for epoch in range(6):
        loader.set_epoch(epoch)
        batches = {tuple(batch): None for batch in loader.batches}
        assert len(batches) == 4
        for streams, labels in loader:
            assert labels.tolist() == [[0, 1] * 5] * 3
            for place in range(3):
                sound = streams["audio"][place]
                clean = any(torch.equal(sound, data.clip(i)[0]["audio"][0]) for i in range(12))
                overlays[clean] += 1
                kinds = []
                for stream in ("face", "body"):
                    row = streams[stream][place, 0, 56] * 255
                    step = row.diff()
                    kinds.append(
                        "as it is" if (step == 1).all() else "mirrored" if (step == -1).all() else "else"
                    )
                    flips[kinds[-1]] += 1
                flips["face and body differ"] += kinds[0] != kinds[1]
    assert 20 < overlays[True] < 52 and overlays.total() == 72
    assert 18 < flips["as it is"] < 60 and 18 < flips["mirrored"] < 60 and 36 < flips["else"] < 108
    assert flips["face and body differ"] > 20


def test_each_change_is_talknets_and_the_same_for_all_frames() -> None:
    rng = np.random.default_rng(0)
    picture = np.zeros((SIDE, SIDE), np.uint8)
    picture[30:50, 20:40], picture[70:90, 60:100] = 250, 120
    frames = np.stack([picture] * 3)
    found = Counter[str]()
    for _ in range(200):
        out = changed(frames, rng)
        assert out.shape == frames.shape and out.dtype == np.uint8
        assert (out == out[0]).all()
        if np.array_equal(out, frames):
            found["as it is"] += 1
        elif np.array_equal(out, frames[:, :, ::-1]):
            found["mirrored"] += 1
        else:
            bright = (out[0] > 200).sum() / (frames[0] > 200).sum()
            # a crop of 0.7 to 1 enlarges up to twofold or cuts off; a turn keeps areas
            found["turned" if abs(bright - 1) < 0.09 and out[0, 0, 0] == 0 else "cropped"] += 1
    assert set(found) == {"as it is", "mirrored", "turned", "cropped"} and min(found.values()) > 20


@given(st.floats(-5, 5), st.integers(1, 3000), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_voice_is_laid_over_at_the_ratio_asked_for(snr: float, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wave, voice = (
        rng.normal(0, 2000, 4000).clip(-8000, 8000).astype(np.int16),
        rng.normal(0, 300, length).astype(np.int16),
    )
    voice[0] = 500
    added = overlaid(wave, voice, snr).astype(float) - wave
    repeated = np.resize(voice, 4000).astype(float)
    scale = (added @ repeated) / (repeated @ repeated)
    assert np.abs(added - scale * repeated).max() <= 1  # rounded, and so is what the scale is measured by
    ratio = 10 * np.log10((wave.astype(float) ** 2).mean() / ((scale * repeated) ** 2).mean())
    assert ratio == pytest.approx(snr, abs=0.01)


def test_overlaid_sound_does_not_wrap_and_silence_stays() -> None:
    loud = np.full(100, 30000, np.int16)
    assert (overlaid(loud, loud, 0.0) == 32767).all() and (overlaid(-loud, -loud, 0.0) == -32768).all()
    for wave, voice in ((loud * 0, loud), (loud, loud * 0), (loud, loud[:0]), (loud[:0], loud)):
        assert np.array_equal(overlaid(wave, voice, 3.0), wave)


def test_loader_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="frames must be at least 1, not 0"):
        levels([3]).loader(0)
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        levels([3]).loader(10, window=0)


# --- the twin ---------------------------------------------------------------------------------------------------------


def test_the_made_folder_is_what_would_be_rendered_but_for_the_jpeg(made: Path, drawn: Path) -> None:
    disk = load_speakers("synth-speakers", "train", root=made)
    memory = load_speakers("synth-speakers", "train", root=drawn, limit=5, seed=3)
    assert len(disk) == len(memory) == 5 and disk.synthetic and memory.synthetic
    assert [clip.condition for clip in disk.clips] == list(synth.CONDITIONS)
    for i in range(5):
        one, other = disk.clips[i], memory.clips[i]
        assert (one.entity, one.video, one.frames, one.fps, one.index, one.condition) == (
            other.entity,
            other.video,
            other.frames,
            other.fps,
            other.index,
            other.condition,
        )
        assert np.array_equal(one.labels, other.labels)
        assert one.kinds is not None and other.kinds is not None and np.array_equal(one.kinds, other.kinds)
        assert np.array_equal(disk.wave(i), memory.wave(i)) and disk.params(i) == memory.params(i)
        for stream in ("face", "body"):
            assert np.array_equal(disk.masks(i)[stream], memory.masks(i)[stream])
            difference = disk.pictures(i, stream).astype(int) - memory.pictures(i, stream)
            assert abs(difference).mean() < 2.5
    limited = load_speakers("synth-speakers", "train", root=made, limit=2, seed=9)
    assert [clip.entity for clip in limited.clips] == [clip.entity for clip in disk.clips[:2]]


def test_parameters_draw_the_clip_again_and_with_a_stream_muted(drawn: Path) -> None:
    data = load_speakers("synth-speakers", "train", root=drawn, limit=5, seed=3)
    i = next(n for n, clip in enumerate(data.clips) if clip.labels.any())
    again, muted = draw_clips([(data.params(i), ()), (data.params(i), ("audio",))])
    streams, labels = data.clip(i)
    found = inputs_of(again)
    assert all(torch.equal(found[name], values) for name, values in streams.items())
    assert again.labels.tolist() == labels[0].tolist() == muted.labels.tolist()
    silent = inputs_of(muted, ("audio", "face"))
    assert list(silent) == ["audio", "face"] and torch.equal(silent["face"], found["face"])
    assert not torch.equal(silent["audio"], found["audio"])
    masks = data.masks(i)
    assert masks["face"].max() <= len(synth.FACE_PARTS) and masks["body"].max() <= len(synth.BODY_PARTS)
    assert np.array_equal(masks["face"], again.face_parts) and np.array_equal(masks["body"], again.body_parts)
    assert data.clips[i].kinds is not None
    assert ((data.clips[i].kinds == synth.KINDS.index("speaking")) == (data.clips[i].labels == 1)).all()


def test_it_is_rendered_once(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(synth, "draw_apart", stop)
    monkeypatch.setattr(synth, "render", stop)
    assert len(load_speakers("synth-speakers", "train", root=drawn, limit=5, seed=3)) == 5
    assert [path.name for path in drawn.iterdir()] == [".cache"]
    for options in (
        {"limit": 4, "seed": 3},
        {"limit": 5, "seed": 4},
        {"limit": 5, "seed": 3, "task": "face"},
    ):
        with pytest.raises(AssertionError, match="rendered again"):
            load_speakers("synth-speakers", "train", root=drawn, **options)  # type: ignore[arg-type]


def test_a_task_of_one_stream_is_rendered_although_a_folder_was_made(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    data = load_speakers("synth-speakers", "train", root=tmp_path, limit=1, task="body")
    assert data.task == "body" and data.params(0)["task"] == "body" and (tmp_path / ".cache").is_dir()


def test_others_can_read_the_twin_as_talknets_layout(made: Path) -> None:
    """By TalkNet's own rules, written anew: lists, sorted crops, sound."""
    place = made / "synth-speakers"
    with open(place / "csv" / "train_orig.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == TITLES.split(",")
    data = load_speakers("synth-speakers", "train", root=made)
    for i, line in enumerate((place / "csv" / "train_loader.csv").read_text().splitlines()):
        entity, frames, fps, labels, index = line.split("\t")
        assert (int(frames), float(fps), int(index)) == (data.clips[i].frames, 25.0, i)
        assert json.loads(labels) == data.clips[i].labels.tolist()
        mine = [row for row in rows if row["entity_id"] == entity]
        assert len(mine) == int(frames)
        for frame, row in enumerate(mine):
            label = json.loads(labels)[frame]
            assert (
                row["label"] == ("NOT_SPEAKING", "SPEAKING_AUDIBLE")[label] and int(row["label_id"]) == label
            )
            assert float(row["frame_timestamp"]) == pytest.approx(frame / 25)
        changes = 1 + sum(a != b for a, b in zip(json.loads(labels), json.loads(labels)[1:], strict=False))
        assert len({row["instance_id"] for row in mine}) == changes
        video = mine[0]["video_id"]
        rate, wave = wavfile.read(place / "clips_audios" / "train" / video / f"{entity}.wav")
        assert rate == RATE and np.array_equal(wave, data.wave(i)) and len(wave) == int(frames) * 640
        for kind in ("clips_videos", "clips_videos_body"):
            folder = place / kind / "train" / video / entity
            assert {path.name for path in folder.iterdir()} == {
                f"{float(row['frame_timestamp']):.2f}.jpg" for row in mine
            }
    assert (place / "csv" / "train_condition.csv").read_text().startswith("entity_id,condition\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit("train.jsonl", '"kinds"', '"kind"'),
            "train.jsonl:1: not how .* was drawn; delete .* data make synth-speakers",
        ),
        (edit("train.jsonl", '"kinds": [', '"kinds": [0, '), "train.jsonl:1: not how"),
        (edit("train.jsonl", "\n", "\n{}\n"), "train.jsonl: 6 lines for 5 clips; delete"),
        (
            edit("csv/train_condition.csv", "optimal", ""),
            "train_condition.csv:2: expected entity_id and condition",
        ),
    ],
)
def test_a_damaged_twin_is_refused(
    made: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    damage(tmp_path / "synth-speakers")
    with pytest.raises(ValueError, match=message):
        load_speakers("synth-speakers", "train", root=tmp_path)


def test_damaged_masks_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    data = load_speakers("synth-speakers", "train", root=tmp_path)
    first, second = sorted((tmp_path / "synth-speakers" / "clips_masks").rglob("*.png"))[:2]
    cut(first)
    second.unlink()
    with pytest.raises(
        ValueError, match=r"\.png: truncated or not an image; delete .* data make synth-speakers"
    ):
        data.masks(0)
    with pytest.raises(FileNotFoundError, match=r"\.png: no such file"):
        data.masks(1)


# --- catalog and command line -----------------------------------------------------------------------------------------


def test_command_line_makes_lists_and_checks_the_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data", str(tmp_path)]
    assert main(["data", "make", "synth-speakers", "-n", "4", *root]) == 2
    assert "count must be at least 5, one for each condition, not 4" in capsys.readouterr().err
    assert main(["data", "make", "synth-speakers", "-n", "5", "--seed", "1", *root]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["synth-speakers"]
    assert main(["data", "list", *root]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert (
        " here " in lines["synth-speakers"] and " absent " in lines["ava-asd"] and " absent " in lines["wasd"]
    )
    assert main(["data", "check", "synth-speakers", *root]) == 0
    summary = capsys.readouterr().out
    for split in ("train", "val", "test"):
        assert f"{split}: 5 clips of" in summary
    assert summary.count("with audio, face, body") == 3 and summary.count("5 conditions, fingerprint") == 3
    cut(next((tmp_path / "synth-speakers" / "clips_videos" / "val").rglob("0.40.jpg")))
    assert main(["data", "check", "synth-speakers", *root]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "0.40.jpg: truncated or not an image" in error


def test_sets_without_an_address_say_where_they_come_from(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data", str(tmp_path / "nothing")]
    for action in ("get", "check"):
        for name, told in (
            ("ava-asd", "selib data make ava-asd --videos DIR"),
            ("wasd", "github.com/Tiago-Roxo/WASD"),
        ):
            assert main(["data", action, name, *root]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and told in error
    assert main(["data", "get", "synth-speakers", *root]) == 2
    assert "it is rendered: selib data make synth-speakers" in capsys.readouterr().err
    assert main(["data", "make", "wasd", *root]) == 2
    assert "'wasd' cannot be made" in capsys.readouterr().err
    assert main(["data", "make", "ava-asd", *root]) == 2
    assert "selib data make ava-asd --videos DIR" in capsys.readouterr().err
    assert main(["data", "check", "ava-asd", "--data", str(small)]) == 0
    assert (
        "train: 4 clips of 42 frames with audio, face, body, 67% speaking, fingerprint"
        in capsys.readouterr().out
    )
    shutil.rmtree(small / "ava-asd" / "clips_videos_body")
    assert main(["data", "check", "ava-asd", "--data", str(small)]) == 0
    assert "frames with audio, face, 67% speaking" in capsys.readouterr().out


def test_making_the_twin_leaves_nothing_behind_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speakers, "write_crop", stop)
    monkeypatch.setattr(synth, "draw_apart", lambda clips: [synth.render(*clip) for clip in clips[:1]])
    with pytest.raises(KeyboardInterrupt):
        catalog.make("synth-speakers", tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


# --- from raw videos --------------------------------------------------------------------------------------------------

COLUMNS = TITLES.rsplit(",", 2)[0]
FLASH, CLICK = 1.4, 1.6  # seconds


def film(file: Path, fps: float = 25, seconds: float = 2.4) -> None:
    """160x120: a left half that turns white at FLASH for a frame, a right half of 40, and a click at CLICK."""
    frames = []
    for number in range(round(seconds * fps)):
        frame = np.zeros((120, 160, 3), np.uint8)
        frame[:, :80] = 255 if number == round(FLASH * fps) else 90
        frame[:, 80:] = 40
        frames.append(frame)
    wave = np.random.default_rng(0).normal(0, 20, round(seconds * RATE)).astype(np.int16)
    wave[round(CLICK * RATE) : round(CLICK * RATE) + 160] += 12000
    write_video(file, frames, fps=fps, audio=wave)


def row(video: str, time: float, box: str, label: str, entity: str) -> str:
    return f"{video},{time:.2f},{box},{label},{entity}"


def track(video: str, entity: str, box: str, start: float, stop: float, fps: float = 25) -> list[str]:
    """Speaking from the flash on; heard from the click on."""
    found = []
    for number in range(round(start * fps), round(stop * fps)):
        time = number / fps
        label = (
            "NOT_SPEAKING" if time < FLASH else "SPEAKING_NOT_AUDIBLE" if time < CLICK else "SPEAKING_AUDIBLE"
        )
        found.append(row(video, time, box, label, entity))
    return found


LEFT, RIGHT = "0.1,0.2,0.4,0.8", "0.6,0.2,1.02,0.8"


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    film(folder / "aaaaaaaaaaa.mp4")
    film(folder / "trainval" / "bbbbbbbbbbb.mp4", fps=30)
    return folder


@pytest.fixture
def raw(films: Path, tmp_path: Path) -> Path:
    """Two films and their annotations: those of one with titles, of the other as AVA ships them, without."""
    place = tmp_path / "raw"
    shutil.copytree(films, place)
    a, b = "aaaaaaaaaaa", "bbbbbbbbbbb"
    one = track(a, f"{a}_0000_0060:1", LEFT, 1.0, 2.0) + track(a, f"{a}_0000_0060:0", RIGHT, 0.2, 1.0)
    (place / "ava_activespeaker_train_v1.0.csv").write_text("\n".join([COLUMNS, *one]) + "\n")
    (place / "ava_activespeaker_val_v1.0").mkdir()
    other = track(b, f"{b}_0000_0060:0", LEFT, 1.0, 2.0, fps=30)
    (place / "ava_activespeaker_val_v1.0" / f"{b}-activespeaker.csv").write_text("\n".join(other) + "\n")
    return place


def test_raw_videos_are_cut_in_time(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    assert main(["data", "make", "ava-asd", "--videos", str(raw), "--data", str(root)]) == 0
    assert capsys.readouterr().out.strip() == str(root / "ava-asd") and [p.name for p in root.iterdir()] == [
        "ava-asd"
    ]
    assert main(["data", "check", "ava-asd", "--data", str(root)]) == 0
    train = load_speakers("ava-asd", "train", root=root)
    assert [(clip.entity[-1], clip.video, clip.frames, clip.fps, clip.index) for clip in train.clips] == [
        ("0", "aaaaaaaaaaa", 20, 25.0, 0),
        ("1", "aaaaaaaaaaa", 25, 25.0, 1),
    ]
    val = load_speakers("ava-asd", "val", root=root)
    assert [(clip.frames, clip.fps) for clip in val.clips] == [(30, 30.0)]
    for data, i, fps in ((train, 1, 25), (val, 0, 30)):
        streams, labels = data.clip(i)
        times = [1.0 + n / fps for n in range(data.clips[i].frames)]
        assert labels[0].tolist() == [float(time >= CLICK - 1e-6) for time in times]  # not audible is no
        flash, click = round((FLASH - 1) * fps), (CLICK - 1) * fps
        bright = streams["face"][0].mean((1, 2)) * 255
        assert bright.argmax() == flash and bright[flash] > 240
        assert (bright[torch.arange(len(bright)) != flash] - 90).abs().max() < 8
        loud = (
            int(streams["audio"][0, :, 0].diff().argmax()) + 1
        )  # the first row whose window, of 2.5 rows, holds it
        assert click - 0.7 <= loud / 4 <= click + 0.1
        assert len(data.wave(i)) == pytest.approx(
            data.clips[i].frames / fps * RATE, abs=80
        )  # as timestamps are rounded
        body = data.pictures(i, "body")[0].astype(
            int
        )  # 3.5 by 4 faces: the left half, a part of the right, and beyond
        assert (
            abs(body[40, 50] - 90) < 8
            and abs(body[40, 105] - 40) < 8
            and body[40, 2] == 110
            and body[110, 50] == 110
        )
    right = train.pictures(0).astype(int)
    assert (abs(right - 40) < 8).all() and train.clips[0].labels.sum() == 0
    with Image.open(root / "ava-asd/clips_videos/train/aaaaaaaaaaa/aaaaaaaaaaa_0000_0060:1/1.40.jpg") as crop:
        assert crop.size == (48, 72) and crop.mode == "RGB"  # TalkNet keeps the box as it is
    rows = (root / "ava-asd" / "csv" / "train_orig.csv").read_text().splitlines()
    assert rows[0] == TITLES and len(rows) == 46
    assert (
        rows[21]
        == f"aaaaaaaaaaa,1.00,{LEFT},NOT_SPEAKING,aaaaaaaaaaa_0000_0060:1,0,aaaaaaaaaaa_0000_0060:1:0"
    )
    assert rows[-1].endswith("SPEAKING_AUDIBLE,aaaaaaaaaaa_0000_0060:1,1,aaaaaaaaaaa_0000_0060:1:2")
    assert {line.split(",")[8] for line in rows[31:36]} == {"2"}
    with pytest.raises(FileExistsError, match="already there; delete it to prepare it anew"):
        catalog.make("ava-asd", root, videos=raw)


def test_annotations_at_another_rate_than_the_films(raw: Path, tmp_path: Path) -> None:
    """Every fifth frame is annotated: the sound goes with it."""
    a = "aaaaaaaaaaa"
    rows = track(a, f"{a}_0000_0060:1", LEFT, 1.0, 2.0, fps=5)
    (raw / "ava_activespeaker_train_v1.0.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    prepare(raw, raw, tmp_path / "data" / "ava-asd")
    data = load_speakers("ava-asd", "train", root=tmp_path / "data")
    assert data.clips[0].frames == 5 and data.clips[0].fps == pytest.approx(5)
    streams = data.clip(0)[0]
    assert streams["face"][0].mean((1, 2)).argmax() == 2  # 1.40 s
    heard = 1.0 + (int(streams["audio"][0, :, 0].diff().argmax()) + 1) / 4 / 5
    assert CLICK - 0.125 - 0.05 < heard <= CLICK + 0.01  # a window lasts 0.125 s, a row 0.05 s


def drop_video(place: Path) -> None:
    (place / "aaaaaaaaaaa.mp4").unlink()


def late(place: Path) -> None:
    file = place / "ava_activespeaker_train_v1.0.csv"
    file.write_text(
        file.read_text() + row("aaaaaaaaaaa", 3.5, LEFT, "NOT_SPEAKING", "aaaaaaaaaaa_0003_0004:1") + "\n"
    )


def late_picture(place: Path) -> None:
    """Sound goes on after the last picture."""
    write_video(
        place / "aaaaaaaaaaa.mp4",
        [np.zeros((64, 64, 3), np.uint8)] * 20,
        fps=25,
        audio=np.ones(40000, np.int16),
    )


def mute(place: Path) -> None:
    write_video(place / "aaaaaaaaaaa.mp4", [np.zeros((64, 64, 3), np.uint8)] * 60, fps=25)


CSV = "ava_activespeaker_train_v1.0.csv"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_video, FileNotFoundError, "1 of the 2 annotated videos are missing: aaaaaaaaaaa; fetch them"),
        (lambda p: cut(p / "aaaaaaaaaaa.mp4", 0.5), ValueError, "aaaaaaaaaaa.mp4: (damaged or )?cut short"),
        (
            lambda p: (p / "trainval" / "bbbbbbbbbbb.mp4").write_bytes(b"page"),
            ValueError,
            "bbbbbbbbbbb.mp4: not a video",
        ),
        (mute, ValueError, "aaaaaaaaaaa.mp4: has no audio stream"),
        (
            late,
            ValueError,
            "aaaaaaaaaaa.mp4: its sound ends at 2.4. s, and aaaaaaaaaaa_0003_0004:1 is annotated to 3.50 s",
        ),
        (late_picture, ValueError, "aaaaaaaaaaa.mp4: ends at 0.76 s, and .* is annotated at 0.84 s"),
        (
            lambda p: shutil.copy(p / "aaaaaaaaaaa.mp4", p / "trainval"),
            ValueError,
            "is a video of that name too",
        ),
        (
            lambda p: (p / CSV).rename(p / "boxes.csv"),
            ValueError,
            "boxes.csv: its name must say which of train, val, test",
        ),
        (edit(CSV, "entity_box_x1", "x1"), ValueError, f"{CSV}:1: expected the columns {COLUMNS}"),
        (
            edit(CSV, "NOT_SPEAKING", "QUIET"),
            ValueError,
            f"{CSV}:2: the label 'QUIET' is none of NOT_SPEAKING, ",
        ),
        (
            edit(CSV, LEFT, "0.4,0.2,0.1,0.8"),
            ValueError,
            f"{CSV}:2: the box 0.4, 0.2, 0.1, 0.8 has no area within 0 to 1",
        ),
        (edit(CSV, LEFT, "1.4,0.2,1.5,0.8"), ValueError, f"{CSV}:2: the box 1.4, .* has no area"),
        (edit(CSV, ",1.04,", ",soon,"), ValueError, f"{CSV}:3: expected video_id,frame_timestamp,"),
        (edit(CSV, ",1.04,", ",-1.04,"), ValueError, f"{CSV}:3: the timestamp -1.04 is none"),
        (
            edit(CSV, ",1.04,", ",1.00,"),
            ValueError,
            f"{CSV}:3: a second box of aaaaaaaaaaa_0000_0060:1 at 1.00 s",
        ),
        (edit(CSV, ",0.20,", ",0.20"), ValueError, f"{CSV}:27: expected video_id,"),
        (
            edit(CSV, "\naaaaaaaaaaa,1.04", "\nbbbbbbbbbbb,1.04"),
            ValueError,
            f"{CSV}:3: .* is in video bbbbbbbbbbb here and in aaaaaaaaaaa before",
        ),
        (
            lambda p: [file.unlink() for file in p.rglob("*.csv")],
            FileNotFoundError,
            "holds no csv file; put the official",
        ),
    ],
)
def test_preparing_refuses_by_name_and_leaves_nothing(
    raw: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(raw)
    with pytest.raises(error, match=message) as caught:
        prepare(raw, raw, tmp_path / "data" / "ava-asd")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() or list((tmp_path / "data").iterdir()) == []


def test_prepare_wants_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="videos: no such folder"):
        prepare(tmp_path / "videos", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="boxes: no such file or folder"):
        prepare(tmp_path, tmp_path / "boxes", tmp_path / "out")


# --- average precision ------------------------------------------------------------------------------------------------


def plainly(scores: np.ndarray, labels: np.ndarray) -> float:
    """From the definition, for every threshold: the area under the best precision at that recall or more."""
    points = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = [bool(label) for score, label in zip(scores, labels, strict=True) if score >= threshold]
        points.append((sum(found) / labels.sum(), sum(found) / len(found)))
    area, before = 0.0, 0.0
    for place, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[place:])
        before = recall
    return area


def by_sklearn(scores: np.ndarray, labels: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)  # recall falls from 1 to 0
    best = np.maximum.accumulate(precision)  # at that recall or more
    return float(-np.sum(np.diff(recall) * best[:-1]))


def officially(scores: np.ndarray, labels: np.ndarray) -> float:
    """ActivityNet's computation in its own order of steps: a row is a step."""
    hits = labels[np.argsort(-scores, kind="stable")].cumsum()
    precision = np.concatenate([[0], hits / np.arange(1, len(hits) + 1), [0]])
    recall = np.concatenate([[0], hits / labels.sum(), [1]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = np.where(recall[1:] != recall[:-1])[0] + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


detections = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-4, 4), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@given(detections)
@settings(deadline=None)
def test_average_precision_of_tied_scores(case: tuple[list[int], list[bool]]) -> None:
    scores, labels = np.array(case[0], float), np.array(case[1], int)
    if not labels.any():
        labels[0] = 1
    found = frame_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(plainly(scores, labels), abs=1e-12)
    assert found == pytest.approx(by_sklearn(scores, labels), abs=1e-12)
    # neither the order of the frames nor a monotone change of the scores matters
    order = np.random.default_rng(len(scores)).permutation(len(scores))
    again = frame_average_precision(
        torch.from_numpy(np.exp(scores[order])), torch.from_numpy(labels[order] == 1)
    )
    assert again == pytest.approx(found, abs=1e-12)
    assert labels.mean() - 1e-12 <= found <= 1


@given(st.integers(1, 200), st.integers(0, 10**6))
@settings(deadline=None)
def test_average_precision_of_distinct_scores_is_the_official_one(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.permutation(count).astype(float), (rng.random(count) < 0.4).astype(int)
    labels[rng.integers(count)] = 1
    found = frame_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(officially(scores, labels), abs=1e-12)
    assert found == pytest.approx(by_sklearn(scores, labels), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "labels", "wanted"),
    [
        ([3, 2, 1], [1, 0, 1], 0.5 * 1 + 0.5 * 2 / 3),
        ([3, 2, 1], [0, 1, 1], 2 / 3),  # precision 0, 1/2, 2/3: the last is the best for both
        ([3, 2, 1, 0], [1, 1, 0, 0], 1.0),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0.25),
        ([1, 1, 0], [1, 0, 1], 2 / 3),
        ([5], [1], 1.0),
    ],
)
def test_average_precision_by_hand(scores: list[float], labels: list[int], wanted: float) -> None:
    assert frame_average_precision(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(wanted)
    shaped = frame_average_precision(torch.tensor([scores]).float(), torch.tensor([labels]).float())
    assert shaped == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "no frame is labelled 1"),
        (torch.zeros(0), torch.zeros(0), "no frame is labelled 1"),
        (torch.zeros(3), torch.ones(4), r"must have one shape, got \(3,\) and \(4,\)"),
        (torch.tensor([0.0, float("nan")]), torch.ones(2), "scores must be finite"),
        (torch.tensor([0.0, float("inf")]), torch.ones(2), "scores must be finite"),
        (torch.zeros(2), torch.tensor([1, 2]), "labels must be 0 or 1"),
    ],
)
def test_average_precision_refuses(scores: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_average_precision(scores, labels)
