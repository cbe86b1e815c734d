"""AVA-ActiveSpeaker cut from raw videos into TalkNet's layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selib.video import write as write_video
from studies.cli import main
from studies.data import catalog, load_speakers
from studies.data.ava import prepare

RATE = 16000
BOX = "entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2"
COLUMNS = f"video_id,frame_timestamp,{BOX},label,entity_id"
FLASH, CLICK = 1.4, 1.6  # seconds
A, B = "aaaaaaaaaaa", "bbbbbbbbbbb"
LEFT, RIGHT = "0.1,0.2,0.4,0.8", "0.6,0.2,1.02,0.8"
CSV = "ava_activespeaker_train_v1.0.csv"


def film(file: Path, fps: float = 25, seconds: float = 2.4) -> None:
    """160x120: a left half that turns white at FLASH for a frame, a right half of 40, and a click at
    CLICK.
    """
    frames = []
    for number in range(round(seconds * fps)):
        frame = np.zeros((120, 160, 3), np.uint8)
        frame[:, :80] = 255 if number == round(FLASH * fps) else 90
        frame[:, 80:] = 40
        frames.append(frame)
    wave = np.random.default_rng(0).normal(0, 20, round(seconds * RATE)).astype(np.int16)
    wave[round(CLICK * RATE) : round(CLICK * RATE) + 160] += 12000
    file.parent.mkdir(exist_ok=True)
    write_video(file, frames, fps=fps, audio=wave)


def track(entity: str, box: str, start: float, stop: float, fps: float = 25) -> list[str]:
    """Speaking from the flash on; heard from the click on."""
    found = []
    for number in range(round(start * fps), round(stop * fps)):
        time = number / fps
        said = "SPEAKING_NOT_AUDIBLE" if time < CLICK else "SPEAKING_AUDIBLE"
        label = "NOT_SPEAKING" if time < FLASH else said
        found.append(f"{entity[:11]},{time:.2f},{box},{label},{entity}")
    return found


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    film(folder / f"{A}.mp4")
    film(folder / "trainval" / f"{B}.mp4", fps=30)
    return folder


@pytest.fixture
def raw(films: Path, tmp_path: Path) -> Path:
    """Two films and their annotations: those of one with titles, of the other as AVA ships them, without."""
    place = tmp_path / "raw"
    shutil.copytree(films, place)
    one = track(f"{A}_0000_0060:1", LEFT, 1.0, 2.0) + track(f"{A}_0000_0060:0", RIGHT, 0.2, 1.0)
    (place / CSV).write_text("\n".join([COLUMNS, *one]) + "\n")
    (place / "ava_activespeaker_val_v1.0").mkdir()
    other = track(f"{B}_0000_0060:0", LEFT, 1.0, 2.0, fps=30)
    (place / "ava_activespeaker_val_v1.0" / f"{B}-activespeaker.csv").write_text("\n".join(other) + "\n")
    return place


@pytest.fixture
def prepared(raw: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    assert main(["data", "make", "ava-asd", "--videos", str(raw), "--data", str(root)]) == 0
    return root


def test_raw_videos_are_cut_in_time(prepared: Path) -> None:
    train = load_speakers("ava-asd", "train", root=prepared)
    val = load_speakers("ava-asd", "val", root=prepared)
    assert [(clip.entity[-1], clip.video, clip.frames, clip.fps) for clip in train.clips] == [
        ("0", A, 20, 25.0),
        ("1", A, 25, 25.0),
    ]
    assert [(clip.frames, clip.fps) for clip in val.clips] == [(30, 30.0)]
    for data, i, fps in ((train, 1, 25), (val, 0, 30)):
        streams, labels = data.clip(i)
        times = [1.0 + n / fps for n in range(data.clips[i].frames)]
        assert labels[0].tolist() == [float(time >= CLICK - 1e-6) for time in times]  # not audible is no
        flash, click = round((FLASH - 1) * fps), (CLICK - 1) * fps
        bright = streams["face"][0].mean((1, 2)) * 255
        assert bright.argmax() == flash and bright[flash] > 240
        assert (bright[torch.arange(len(bright)) != flash] - 90).abs().max() < 8
        # the first row whose window, of 2.5 rows, holds it
        loud = int(streams["audio"][0, :, 0].diff().argmax()) + 1
        assert click - 0.7 <= loud / 4 <= click + 0.1
        # as timestamps are rounded
        assert len(data.wave(i)) == pytest.approx(data.clips[i].frames / fps * RATE, abs=80)
        # 3.5 by 4 faces: the left half, a part of the right, and beyond
        body = data.pictures(i, "body")[0].astype(int)
        assert abs(body[40, 50] - 90) < 8 and abs(body[40, 105] - 40) < 8
        assert body[40, 2] == 110 and body[110, 50] == 110
    assert (abs(train.pictures(0).astype(int) - 40) < 8).all() and train.clips[0].labels.sum() == 0


def test_what_is_cut_lies_there_as_talknet_writes_it(prepared: Path, raw: Path) -> None:
    assert [path.name for path in prepared.iterdir()] == ["ava-asd"]
    assert main(["data", "check", "ava-asd", "--data", str(prepared)]) == 0
    with Image.open(prepared / "ava-asd/clips_videos/train" / A / f"{A}_0000_0060:1/1.40.jpg") as crop:
        assert crop.size == (48, 72) and crop.mode == "RGB"  # TalkNet keeps the box as it is
    rows = (prepared / "ava-asd/csv/train_orig.csv").read_text().splitlines()
    assert rows[0] == f"{COLUMNS},label_id,instance_id" and len(rows) == 46
    assert rows[21] == f"{A},1.00,{LEFT},NOT_SPEAKING,{A}_0000_0060:1,0,{A}_0000_0060:1:0"
    assert rows[-1].endswith(f"SPEAKING_AUDIBLE,{A}_0000_0060:1,1,{A}_0000_0060:1:2")
    assert {line.split(",")[8] for line in rows[31:36]} == {"2"}
    with pytest.raises(FileExistsError, match="already there; delete it to prepare it anew"):
        catalog.make("ava-asd", prepared, videos=raw)


def test_annotations_at_another_rate_than_the_films(raw: Path, tmp_path: Path) -> None:
    """Every fifth frame is annotated: the sound goes with it."""
    rows = track(f"{A}_0000_0060:1", LEFT, 1.0, 2.0, fps=5)
    (raw / CSV).write_text("\n".join([COLUMNS, *rows]) + "\n")
    prepare(raw, tmp_path / "data" / "ava-asd")
    data = load_speakers("ava-asd", "train", root=tmp_path / "data")
    assert data.clips[0].frames == 5 and data.clips[0].fps == pytest.approx(5)
    streams = data.clip(0)[0]
    assert streams["face"][0].mean((1, 2)).argmax() == 2  # 1.40 s
    heard = 1.0 + (int(streams["audio"][0, :, 0].diff().argmax()) + 1) / 4 / 5
    assert CLICK - 0.125 - 0.05 < heard <= CLICK + 0.01  # a window lasts 0.125 s, a row 0.05 s


def refused(raw: Path, out: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare(raw, out / "data" / "ava-asd")
    assert "\n" not in str(caught.value)
    assert not (out / "data").exists() or list((out / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("entity_box_x1", "x1", f":1: expected the columns {COLUMNS}"),
        ("NOT_SPEAKING", "QUIET", ":2: the label 'QUIET' is none of NOT_SPEAKING, "),
        (LEFT, "0.4,0.2,0.1,0.8", ":2: the box 0.4, 0.2, 0.1, 0.8 has no area within 0 to 1"),
        (LEFT, "1.4,0.2,1.5,0.8", ":2: the box 1.4, .* has no area"),
        (",1.04,", ",soon,", ":3: expected video_id,frame_timestamp,"),
        (",1.04,", ",-1.04,", ":3: the timestamp -1.04 is not one"),
        (",1.04,", ",1.00,", f":3: a second box of {A}_0000_0060:1 at 1.00 s"),
        (",0.20,", ",0.20", ":27: expected video_id,"),
        (f"\n{A},1.04", f"\n{B},1.04", f":3: .* is in video {B} here and in {A} before"),
        (f"{A},1.04", "../b,1.04", ":3: '../b' or .* cannot be the name of a file"),
    ],
)
def test_preparing_refuses_rows_by_file_and_line(
    raw: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (raw / CSV).read_text()
    assert old in text
    (raw / CSV).write_text(text.replace(old, new, 1))
    refused(raw, tmp_path, ValueError, CSV + message)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def late(place: Path) -> None:
    with open(place / CSV, "a") as opened:
        opened.write(f"{A},3.50,{LEFT},NOT_SPEAKING,{A}_0003_0004:1\n")


def silent(place: Path, frames: int = 60, audio: np.ndarray | None = None) -> None:
    write_video(place / f"{A}.mp4", [np.zeros((64, 64, 3), np.uint8)] * frames, fps=25, audio=audio)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / f"{A}.mp4").unlink(), FileNotFoundError, f"1 of the 2 annotated .*: {A}; fetch them"),
        (lambda p: cut(p / f"{A}.mp4"), ValueError, f"{A}.mp4: .*cut short"),
        (lambda p: (p / f"trainval/{B}.mp4").write_bytes(b"page"), ValueError, f"{B}.mp4: not a video"),
        (silent, ValueError, f"{A}.mp4: .*(no audio|no sound)"),
        (late, ValueError, f"{A}.mp4: its sound ends at 2.4. s, and {A}_0003_0004:1 is annotated to 3.50 s"),
        (
            lambda p: silent(p, 20, np.ones(40000, np.int16)),  # sound goes on after the last picture
            ValueError,
            f"{A}.mp4: ends at 0.76 s, and .* is annotated at 0.84 s",
        ),
        (lambda p: shutil.copy(p / f"{A}.mp4", p / "trainval"), ValueError, "is a video of that name too"),
        (
            lambda p: (p / CSV).rename(p / "boxes.csv"),
            ValueError,
            "boxes.csv: its name must say which of train",
        ),
        (lambda p: [f.unlink() for f in p.rglob("*.csv")], FileNotFoundError, "holds no csv file; put the"),
        (shutil.rmtree, FileNotFoundError, "raw: no such folder"),
    ],
)
def test_preparing_refuses_files_by_name_and_leaves_nothing(
    raw: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(raw)
    refused(raw, tmp_path, error, message)
