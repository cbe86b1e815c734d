"""TalkNet's layout read strictly, and the twin in the cache and in the same files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from studies.audio import mfcc
from studies.cli import main
from studies.data import available, catalog, draw_clips, load, load_speakers, talknet
from studies.data.speaker_twin import write_speakers
from studies.data.speakers import inputs_of
from studies.twins import speakers as synth

RATE, SIDE = 16000, 112
BOX = "entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2"
TITLES = f"video_id,frame_timestamp,{BOX},label,entity_id,label_id,instance_id"

# --- a small set, written by the test in TalkNet's layout ---

CLIPS = {  # entity: video, frames, first timestamp, fps; the second sorts its crops by number, not by name
    "abcdefghijk_0000_0060:0": ("abcdefghijk", 12, 3.0, 25.0),
    "abcdefghijk_0900_0960:1": ("abcdefghijk", 8, 9.9, 25.0),
    "0dY0t1NRXeo_72-92_0_1:2": ("0dY0t1NRXeo_72-92", 10, 0.0, 30.0),
    "lmnopqrstuv_0000_0060:0": ("lmnopqrstuv", 12, 1.0, 25.0),
}
FIRST, SECOND = list(CLIPS)[:2]
LOADER, ORIG = "csv/train_loader.csv", "csv/train_orig.csv"
AUDIO = f"clips_audios/train/abcdefghijk/{SECOND}.wav"
FACES = f"clips_videos/train/abcdefghijk/{SECOND}"
BODIES = f"clips_videos_body/train/abcdefghijk/{SECOND}"


def labels_of(entity: str) -> list[int]:
    return [int((frame + len(entity)) % 3 > 0) for frame in range(CLIPS[entity][1])]


def grey_of(entity: str, frame: int, body: bool = False) -> int:
    return 10 + 60 * list(CLIPS).index(entity) + 4 * frame + (2 if body else 0)


def wave_of(entity: str) -> np.ndarray:
    """Noise as long as TalkNet cuts it: from the first timestamp to the last, which is one frame too
    short.
    """
    _, frames, _, fps = CLIPS[entity]
    rng = np.random.default_rng(list(CLIPS).index(entity))
    return rng.normal(0, 2000, round((frames - 1) / fps * RATE)).astype(np.int16)


def write_set(place: Path) -> None:
    (place / "csv").mkdir(parents=True)
    listed, rows = [], [TITLES]
    for index, (entity, (video, frames, first, fps)) in enumerate(CLIPS.items()):
        listed.append(f"{entity}\t{frames}\t{fps}\t{labels_of(entity)}\t{index}")
        folder = place / "clips_audios" / "train" / video
        folder.mkdir(parents=True, exist_ok=True)
        wavfile.write(folder / f"{entity}.wav", RATE, wave_of(entity))
        for frame, label in enumerate(labels_of(entity)):
            time = first + frame / fps
            name = ("NOT_SPEAKING", "SPEAKING_AUDIBLE")[label]
            rows.append(f"{video},{time:.2f},0.1,0.1,0.5,0.5,{name},{entity},{label},{entity}:0")
            for kind, size in (("clips_videos", (90, 140)), ("clips_videos_body", (60, 50))):
                crops = place / kind / "train" / video / entity
                crops.mkdir(parents=True, exist_ok=True)
                grey = grey_of(entity, frame, body=kind == "clips_videos_body")
                Image.new("RGB", size, (grey, grey, grey)).save(crops / f"{time:.2f}.jpg")
    (place / LOADER).write_text("\n".join(listed) + "\n")
    (place / ORIG).write_text("\n".join(rows) + "\n")


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


# --- reading ---


def test_clips_are_read_as_they_lie_there(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    assert len(data) == 4 and data.streams == ("audio", "face", "body") and not data.synthetic
    assert repr(data) == "SpeakerSet(ava-asd train: 4 clips of 42 frames, audio, face, body)"
    for i, (entity, (video, frames, _, fps)) in enumerate(CLIPS.items()):
        info = data.clips[i]
        assert (info.entity, info.video, info.frames, info.fps, info.row) == (entity, video, frames, fps, i)
        assert info.labels.tolist() == labels_of(entity) and info.condition is None
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
        rows = mfcc(data.wave(i), fps=data.clips[i].fps)
        (found,) = data.clip(i)[0]["audio"]
        held = min(len(rows), len(found))
        assert held < len(found) and torch.equal(found[:held], rows[:held])
        assert torch.equal(found[held:], rows[-1:].expand(len(found) - held, -1))


def test_sound_that_lasts_longer_is_cut_and_one_frame_may_have_none(small: Path) -> None:
    video, frames, _, _ = CLIPS[FIRST]
    file = small / "ava-asd" / "clips_audios" / "train" / video / f"{FIRST}.wav"
    wave = np.random.default_rng(0).normal(0, 2000, 3 * RATE).astype(np.int16)
    wavfile.write(file, RATE, wave)
    data = load_speakers("ava-asd", "train", root=small, streams=["audio"])
    assert torch.equal(data.clip(0)[0]["audio"][0], mfcc(wave)[: 4 * frames])
    (small / "ava-asd" / LOADER).write_text(f"{FIRST}\t1\t25\t[1]\t0\n")
    wavfile.write(file, RATE, wave[:0])  # TalkNet cuts the sound of a single frame to nothing
    data = load_speakers("ava-asd", "train", root=small, streams=["audio"])
    (rows,) = data.clip(0)[0]["audio"]
    assert rows.shape == (4, 13) and rows.isfinite().all()


def test_a_window_is_cut_from_all_streams_in_time(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    whole, labels = data.clip(0)
    part, some = data.clip(0, 3, 9)
    assert torch.equal(some, labels[:, 3:9])
    for stream in ("face", "body"):
        assert torch.equal(part[stream], whole[stream][:, 3:9])
    assert part["audio"].shape == (1, 24, 13)
    # the first row has no sample before it
    assert torch.equal(part["audio"][:, 1:], whole["audio"][:, 13:36])
    for start, stop in ((-1, 3), (3, 3), (0, 13), (5, 4)):
        with pytest.raises(ValueError, match=f"has frames 0 to 12: start={start}, stop={stop}"):
            data.clip(0, start, stop)


def test_only_the_streams_asked_for_are_needed(small: Path) -> None:
    shutil.rmtree(small / "ava-asd" / "clips_videos_body")
    data = load_speakers("ava-asd", "train", root=small, streams=("face", "audio"))
    assert data.streams == ("audio", "face") and list(data.clip(0)[0]) == ["audio", "face"]
    with pytest.raises(ValueError, match="loaded with the streams audio, face, not with 'body'"):
        data.pictures(0, "body")
    with pytest.raises(FileNotFoundError, match=r"clips_videos_body/train/.* leave 'body' out of streams="):
        load_speakers("ava-asd", "train", root=small)
    for call in (data.masks, data.params):
        with pytest.raises(ValueError, match="ava-asd was filmed: only synth-speakers has"):
            call(0)


def test_limit_and_subset_choose_clips(pristine: Path) -> None:
    data = load_speakers("ava-asd", "train", root=pristine)
    entities = [clip.entity for clip in data.clips]

    def chosen(seed: int) -> list[int]:
        some = load_speakers("ava-asd", "train", root=pristine, limit=2, seed=seed)
        return [entities.index(clip.entity) for clip in some.clips]

    assert all(len(rows) == 2 and rows == sorted(rows) for rows in map(chosen, range(8)))
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 1
    some, part = load_speakers("ava-asd", "train", root=pristine, limit=2, seed=1), data.subset(chosen(1))
    assert torch.equal(part.clip(1)[0]["face"], some.clip(1)[0]["face"])
    assert part.fingerprint == some.fingerprint != data.fingerprint
    assert data.subset([2, 0]).clips[0].entity == entities[2] and len(data.subset(slice(1, None))) == 3


def test_the_fingerprint_follows_the_lists(small: Path, pristine: Path) -> None:
    before = load_speakers("ava-asd", "train", root=pristine).fingerprint
    assert len(before) == 16 and load_speakers("ava-asd", "train", root=small).fingerprint == before
    listed = small / "ava-asd" / LOADER
    listed.write_text(listed.read_text().replace("[1, ", "[0, ", 1).replace("[0, 1, 1", "[1, 1, 1", 1))
    assert load_speakers("ava-asd", "train", root=small).fingerprint != before


def test_what_has_been_decoded_is_kept_up_to_a_limit(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_speakers("ava-asd", "train", root=small)
    first = kept.clip(0)[0]
    monkeypatch.setattr(talknet, "KEPT", 0)
    anew = load_speakers("ava-asd", "train", root=small)
    assert torch.equal(anew.clip(0)[0]["face"], first["face"])
    shutil.rmtree(small / "ava-asd" / "clips_videos")
    assert torch.equal(kept.clip(0)[0]["face"], first["face"])
    with pytest.raises(FileNotFoundError):
        anew.clip(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ava"}, "name must be one of ava-asd, wasd, synth-speakers, not 'ava'"),
        ({"split": "dev"}, "split must be one of train, val, test, not 'dev'"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"streams": ()}, "streams must be some of audio, face, body"),
        ({"streams": "audio"}, "streams must be some of"),
        ({"streams": ("face", "face")}, "each once"),
        ({"streams": ("face", "hands")}, "streams must be some of"),
        ({"task": "face"}, "task for ava-asd must be one of all, not 'face'"),
        ({"name": "synth-speakers", "task": "hands"}, "must be one of all, audio, face, body, not 'hands'"),
    ],
)
def test_arguments_are_checked(pristine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_speakers(**{"name": "ava-asd", "split": "train", "root": pristine, **options})


def test_sets_that_are_not_there(pristine: Path) -> None:
    with pytest.raises(FileNotFoundError, match="val_loader.csv: no such file"):
        load_speakers("ava-asd", "val", root=pristine)
    with pytest.raises(FileNotFoundError, match=r"wasd: not found in .*/WASD\).*wasd_metadata.csv"):
        load_speakers("wasd", "train", root=pristine)
    with pytest.raises(ValueError, match="studies.data.load_speakers reads"):
        load("ava-asd", root=pristine)
    assert available("ava-asd", pristine) and not available("wasd", pristine)
    assert available("synth-speakers", pristine)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (LOADER, "\t25.0\t", "\t0\t", "loader.csv:1: .* has 0 frames a second, not a number above 0"),
        (LOADER, "\t30.0\t", "\tnan\t", "loader.csv:3: .* has nan frames a second"),
        (LOADER, "\t30.0\t", "\tfast\t", "loader.csv:3: expected entity, frames, fps, .* between tabs"),
        (LOADER, "\t8\t", "\t9\t", f"loader.csv:2: {SECOND} has 8 labels for 9 frames"),
        (LOADER, "\t8\t", "\t0\t", f"loader.csv:2: {SECOND} has 8 labels for 0 frames"),
        (LOADER, "\t8\t", "\t-8\t", "loader.csv:2: .* 8 labels for -8 frames"),
        (LOADER, "[", "[2, ", "loader.csv:1: the labels of .* are not a list of 0 and 1"),
        (LOADER, "\t25.0\t[", "\t25.0\t", "loader.csv:1: expected entity, frames, fps, .labels. and index"),
        (LOADER, "\t0\n", "\tfirst\n", "loader.csv:1: expected entity"),
        (LOADER, "\t0\n", "\n", "loader.csv:1: expected entity, frames, fps, .* between tabs"),
        (LOADER, "\n", "\n\n", "loader.csv:2: expected entity, frames, fps, .* found ''"),
        (LOADER, SECOND, FIRST, f"loader.csv:2: names {FIRST} again, after line 1"),
        (LOADER, SECOND, "nobody", "loader.csv:2: train_orig.csv has no nobody"),
        (ORIG, "entity_id", "entity", "orig.csv:1: has no column entity_id, but video_id,"),
        (ORIG, ",0.1,0.1", ",0.1", "orig.csv:2: has 9 values for 10 columns"),
        (ORIG, "abcdefghijk,3.04", "other,3.04", "orig.csv:3: .* is other here and abcdefghijk before"),
    ],
)
def test_loading_refuses_by_file_and_line(small: Path, file: str, old: str, new: str, message: str) -> None:
    edit(small / "ava-asd" / file, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        load_speakers("ava-asd", "train", root=small)
    assert "\n" not in str(caught.value) and "; prepare ava-asd again" in str(caught.value)


def test_names_that_lead_elsewhere_are_refused(small: Path) -> None:
    for file in (LOADER, ORIG):
        text = (small / "ava-asd" / file).read_text()
        (small / "ava-asd" / file).write_text(text.replace(SECOND, "../elsewhere"))
    with pytest.raises(ValueError, match="loader.csv:2: '../elsewhere' cannot be the name of a file"):
        load_speakers("ava-asd", "train", root=small)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda p: (p / LOADER).unlink(),
            FileNotFoundError,
            "loader.csv: no such file; prepare ava-asd again",
        ),
        (lambda p: (p / ORIG).unlink(), FileNotFoundError, "orig.csv: no such file"),
        (lambda p: (p / LOADER).write_text("\n"), ValueError, "loader.csv: is empty"),
        (
            lambda p: (p / AUDIO).unlink(),
            FileNotFoundError,
            f"{SECOND}.wav: not there, though .*csv:2 names it",
        ),
        (
            lambda p: shutil.rmtree(p / FACES),
            FileNotFoundError,
            f"{FACES}: not there, though .*csv:2 names it",
        ),
        (
            lambda p: (p / FACES / "9.98.jpg").unlink(),
            ValueError,
            "7 crops, fewer than the 8 frames of .*csv:2",
        ),
        (lambda p: (p / BODIES / "9.98.jpg").unlink(), ValueError, f"{BODIES}: 7 crops, fewer than the 8"),
        (
            lambda p: (p / FACES / "9.98.jpg").rename(p / FACES / "face9.jpg"),
            ValueError,
            f"{FACES}/face9.jpg: crops are named by their time in seconds",
        ),
    ],
)
def test_loading_says_what_is_missing(
    small: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(small / "ava-asd")
    with pytest.raises(error, match=message) as caught:
        load_speakers("ava-asd", "train", root=small)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def cut(file: Path, share: float = 0.6) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def write_sound(wave: np.ndarray, rate: int = RATE) -> Callable[[Path], None]:
    return lambda place: wavfile.write(place / AUDIO, rate, wave)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / AUDIO), rf"{SECOND}.wav: cut short: \d+ of 4480 samples"),
        (lambda p: cut(p / AUDIO, 0), f"{SECOND}.wav: not a WAV file"),
        (lambda p: (p / AUDIO).write_bytes(b"RIFF, as if"), f"{SECOND}.wav: not a WAV file"),
        (write_sound(wave_of(SECOND), 8000), "1 channels, 16 bits, 8000 Hz.; convert it"),
        (write_sound(np.stack([wave_of(SECOND)] * 2, 1)), "2 channels, 16 bits, 16000 Hz"),
        (write_sound(wave_of(SECOND) / 2**15), "not a WAV file of one channel, 16 bits"),
        (write_sound(wave_of(SECOND)[:2000]), "0.12 s of sound for 0.28 s of pictures .*train_loader.csv:2"),
        (lambda p: cut(p / FACES / "9.98.jpg"), f"{SECOND}/9.98.jpg: truncated or not an image"),
        (lambda p: cut(p / BODIES / "9.98.jpg", 0), f"{SECOND}/9.98.jpg: empty file"),
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


def test_conditions_come_from_wasds_metadata(small: Path) -> None:
    (small / "ava-asd").rename(small / "wasd")
    file = small / "wasd" / "csv" / "wasd_metadata.csv"
    rows = "Video,Category,FPS\nabcdefghijk,2,25\n0dY0t1NRXeo_72-92,4,30\nlmnopqrstuv,0,25\nnot_here,1,30\n"
    file.write_text(rows)
    found = [clip.condition for clip in load_speakers("wasd", "train", root=small).clips]
    assert found == ["face occlusion", "face occlusion", "surveillance", "optimal"]
    for old, new, message in (
        ("lmnopqrstuv,0", "lmnopqrstuv,5", "video lmnopqrstuv has the category 5, not 0 to 4"),
        ("lmnopqrstuv,0,25\n", "", "video lmnopqrstuv has the category None"),
        ("Category", "Kind", "wasd_metadata.csv:1: has no column Category"),
    ):
        file.write_text(rows.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_speakers("wasd", "train", root=small)


# --- the twin ---


def test_the_made_folder_is_what_would_be_rendered_but_for_the_jpeg(made: Path, drawn: Path) -> None:
    disk = load_speakers("synth-speakers", "train", root=made)
    memory = load_speakers("synth-speakers", "train", root=drawn, limit=5, seed=3)
    assert len(disk) == len(memory) == 5 and disk.synthetic and memory.synthetic
    assert [clip.condition for clip in disk.clips] == list(synth.CONDITIONS)
    for i, (one, other) in enumerate(zip(disk.clips, memory.clips, strict=True)):
        for name in ("entity", "video", "fps", "row", "condition"):
            assert getattr(one, name) == getattr(other, name)
        assert np.array_equal(one.labels, other.labels)
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


def test_it_is_rendered_once(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(synth, "draw", stop)
    assert len(load_speakers("synth-speakers", "train", root=drawn, limit=5, seed=3)) == 5
    assert [path.name for path in drawn.iterdir()] == [".cache"]
    for options in ({"limit": 4}, {"seed": 4}, {"task": "face"}):
        with pytest.raises(AssertionError, match="rendered again"):
            load_speakers("synth-speakers", "train", root=drawn, **{"limit": 5, "seed": 3, **options})


def test_a_task_of_one_stream_is_rendered_although_a_folder_was_made(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    data = load_speakers("synth-speakers", "train", root=tmp_path, limit=1, task="body")
    assert data.params(0)["task"] == "body" and (tmp_path / ".cache").is_dir()


def test_others_can_read_the_twin_as_talknets_layout(made: Path) -> None:
    """By TalkNet's own rules, written anew: lists, sorted crops, sound."""
    place = made / "synth-speakers"
    with open(place / ORIG, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == TITLES.split(",")
    data = load_speakers("synth-speakers", "train", root=made)
    for i, line in enumerate((place / LOADER).read_text().splitlines()):
        entity, frames, fps, listed, index = line.split("\t")
        labels = json.loads(listed)
        assert (int(frames), float(fps), int(index)) == (data.clips[i].frames, 25.0, i)
        assert labels == data.clips[i].labels.tolist()
        mine = [row for row in rows if row["entity_id"] == entity]
        assert [int(row["label_id"]) for row in mine] == labels
        for frame, row in enumerate(mine):
            assert row["label"] == ("NOT_SPEAKING", "SPEAKING_AUDIBLE")[labels[frame]]
            assert float(row["frame_timestamp"]) == pytest.approx(frame / 25)
        changes = 1 + sum(a != b for a, b in pairwise(labels))
        assert len({row["instance_id"] for row in mine}) == changes
        video = mine[0]["video_id"]
        rate, wave = wavfile.read(place / "clips_audios" / "train" / video / f"{entity}.wav")
        assert rate == RATE and np.array_equal(wave, data.wave(i)) and len(wave) == int(frames) * 640
        for kind in ("clips_videos", "clips_videos_body"):
            names = {path.name for path in (place / kind / "train" / video / entity).iterdir()}
            assert names == {f"{float(row['frame_timestamp']):.2f}.jpg" for row in mine}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"params"', '"how"', "train.jsonl:1: .*; delete .* data make synth-speakers"),
        ('"entity": "tr', '"entity": "no', "train.jsonl: does not name the clips of the list"),
        ("\n", '\n{"entity": "x", "params": {}}\n', "train.jsonl: does not name the clips of the list"),
    ],
)
def test_a_damaged_twin_is_refused(made: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    edit(tmp_path / "synth-speakers" / "train.jsonl", old, new)
    with pytest.raises(ValueError, match=message):
        load_speakers("synth-speakers", "train", root=tmp_path)


def test_damaged_masks_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "synth-speakers", tmp_path / "synth-speakers")
    data = load_speakers("synth-speakers", "train", root=tmp_path)
    first, second = sorted((tmp_path / "synth-speakers" / "clips_masks").rglob("*.png"))[:2]
    cut(first)
    second.unlink()
    with pytest.raises(ValueError, match=r"\.png: truncated or not an image; delete .* data make"):
        data.masks(0)
    with pytest.raises(FileNotFoundError, match=r"\.png: no such file"):
        data.masks(1)


# --- catalog and command line ---


def test_command_line_makes_lists_and_checks_the_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data", str(tmp_path)]
    assert main(["data", "make", "synth-speakers", "-n", "4", *root]) == 2
    assert "count must be at least 5" in capsys.readouterr().err
    assert main(["data", "make", "synth-speakers", "-n", "5", "--seed", "1", *root]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["synth-speakers"]
    assert main(["data", "check", "synth-speakers", *root]) == 0
    summary = capsys.readouterr().out
    for split in ("train", "val", "test"):
        assert f"{split}: 5 clips of" in summary
    assert summary.count("with audio, face, body") == 3 and summary.count("5 conditions, fingerprint") == 3
    cut(next((tmp_path / "synth-speakers" / "clips_videos" / "val").rglob("0.40.jpg")))
    assert main(["data", "check", "synth-speakers", *root]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "0.40.jpg: truncated or not an image" in error


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("get ava-asd", "studies data make ava-asd --videos DIR"),
        ("check ava-asd", "studies data make ava-asd --videos DIR"),
        ("make ava-asd", "studies data make ava-asd --videos DIR"),
        ("get wasd", "github.com/Tiago-Roxo/WASD"),
        ("check wasd", "github.com/Tiago-Roxo/WASD"),
        ("make wasd", "'wasd' cannot be made"),
        ("get synth-speakers", "studies data make synth-speakers"),
    ],
)
def test_sets_without_an_address_say_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, told: str
) -> None:
    assert main(["data", *command.split(), "--data", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error


def test_a_set_is_checked_with_the_streams_it_has(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "ava-asd", "--data", str(small)]) == 0
    assert "train: 4 clips of 42 frames with audio, face, body, 67% speaking" in capsys.readouterr().out
    shutil.rmtree(small / "ava-asd" / "clips_videos_body")
    assert main(["data", "check", "ava-asd", "--data", str(small)]) == 0
    assert "frames with audio, face, 67% speaking" in capsys.readouterr().out


def test_making_the_twin_leaves_nothing_behind_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talknet, "write_crop", stop)
    with pytest.raises(KeyboardInterrupt):
        catalog.make("synth-speakers", tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
