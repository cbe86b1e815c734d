"""A video of one's own with boxes becomes a video with its people marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import detector

from selib import video
from studies.audio import mfcc
from studies.data.crops import crop
from studies.people import explain_video

FPS, RATE = 25, 16000
WIDE, HIGH, LENGTH = 240, 160, 50
ANN, BOB = (30.0, 20.0, 70.0, 60.0), (150.0, 30.0, 190.0, 70.0)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of two people: Ann's face is bright in the first, Bob's in the second, with noise."""
    folder = tmp_path_factory.mktemp("own")
    frames = []
    for t in range(LENGTH):
        frame = np.full((HIGH, WIDE, 3), 110, np.uint8)
        for (x1, y1, x2, y2), bright in ((ANN, t < 25), (BOB, t >= 25)):
            frame[int(y1) : int(y2), int(x1) : int(x2)] = 230 if bright else 20
        frames.append(frame)
    sound = np.random.default_rng(0).integers(-8000, 8000, LENGTH * 640).astype(np.int16)
    sound[:RATE] = 0
    video.write(folder / "own.mp4", frames, fps=FPS, audio=sound)
    return folder


def table(
    path: Path, rows: list[tuple[Any, ...]], header: str = "frame_timestamp,x1,y1,x2,y2,entity"
) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def shown(t: int, box: tuple[float, ...], name: str) -> tuple[Any, ...]:
    return (t / FPS, *box, name)


def test_a_video_and_boxes_become_an_annotated_video(own: Path) -> None:
    # Ann in every frame; Bob with a gap of one second, and the boxes of his second track every fifth frame.
    rows = [shown(t, ANN, "Ann") for t in range(LENGTH)] + [shown(t, BOB, "Bob") for t in range(10)]
    boxes = table(own / "a.csv", rows + [shown(t, BOB, "Bob") for t in range(35, LENGTH, 5)])
    model = detector()
    found = explain_video(model, own / "own.mp4", boxes, own / "out.mp4")
    ann, before, after = found
    assert [(row["entity"], row["start"], row["stop"]) for row in found] == [
        ("Ann", 0, 2),
        ("Bob", 0, 0.4),
        ("Bob", 1.4, 46 / FPS),
    ]
    # 20 · brightness - 10: 230/255 gives 8.0, 20/255 gives -8.4; the codec changes both by less than 1.
    assert (np.array(ann["probabilities"][:25]) > 0.999).all() and (
        np.array(ann["probabilities"][25:]) < 0.001
    ).all()
    assert ann["speaking"] == 0.5 and before["speaking"] == 0 and after["speaking"] == 1
    assert ann["seconds"][:3] == [0, 0.04, 0.08] and ann["frames"] == len(ann["probabilities"]) == 50
    assert ann["shares"]["face"] > 0.99 and sum(ann["shares"].values()) == pytest.approx(1)

    made = [frame for _, frame in video.read_frames(own / "out.mp4")]
    source = [frame for _, frame in video.read_frames(own / "own.mp4")]
    assert len(made) == LENGTH and made[0].shape == source[0].shape
    quiet, loud = np.split(video.read_audio(own / "out.mp4")[: LENGTH * 640].astype(float), [RATE])
    assert loud.std() > 20 * quiet[:-800].std()
    moved = np.array(
        [np.abs(a.astype(int) - b)[32:68, 152:188].max() for a, b in zip(made, source, strict=True)]
    )
    assert (
        (moved[:10] > 60).all() and (moved[11:34] < 25).all() and (moved[35:46] > 60).all()
    )  # Bob's gap is left alone
    edge = made[5][59, 35:65].astype(int), made[30][59, 35:65].astype(int)  # Ann's box, below
    assert (edge[0][:, 1] > edge[0][:, 0]).mean() > 0.9 and (
        edge[1][:, 0] > edge[1][:, 1]
    ).any()  # green, then red


def test_the_model_is_shown_the_crops_and_the_sound_of_each_stretch(own: Path) -> None:
    rows = [shown(t, tuple(edge + t for edge in ANN), "Ann") for t in range(10)]
    rows += [shown(25, BOB, "Bob"), shown(31, tuple(edge + 12 for edge in BOB), "Bob")]  # 0.24 s apart
    body = (10.0, 10.0, 100.0, 150.0)
    bodies = [(*row[:5], row[5], *body) for row in rows]
    header = "frame_timestamp,x1,y1,x2,y2,entity,body_x1,body_y1,body_x2,body_y2"
    model = detector()
    explain_video(model, own / "own.mp4", table(own / "b.csv", bodies, header), own / "b.mp4")
    first, second = (next(x for x in model.seen if x["face"].shape[:2] == (1, frames)) for frames in (10, 7))
    source = [frame for _, frame in video.read_frames(own / "own.mp4")]
    sound = video.read_audio(own / "own.mp4")
    assert first["audio"].shape == (1, 40, 13) and second["audio"].shape == (1, 28, 13)
    for t in (0, 4, 9):
        assert torch.equal(first["face"][0, t] * 255, torch.from_numpy(crop(source[t], rows[t][1:5])).float())
        assert torch.equal(first["body"][0, t] * 255, torch.from_numpy(crop(source[t], body)).float())
    # Half-way between the boxes of frames 25 and 31 the box is half-way, too.
    half = tuple(edge + 6 for edge in BOB)
    assert torch.equal(second["face"][0, 3] * 255, torch.from_numpy(crop(source[28], half)).float())
    heard = mfcc(torch.from_numpy(sound[RATE : RATE + 7 * 640]))
    assert torch.equal(second["audio"][0, : len(heard)], heard)


def test_fractions_of_the_frame_and_avas_names_are_read_as_well(own: Path) -> None:
    pixels = [shown(t, ANN, "Ann") for t in range(LENGTH)]
    scale = np.array([WIDE, HIGH] * 2)
    fractions = [shown(t, tuple(np.array(ANN) / scale), "Ann") for t in range(LENGTH)]
    header = "frame_timestamp,entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2,entity_id"
    found = [
        explain_video(detector(), own / "own.mp4", boxes, own / "c.mp4")
        for boxes in (table(own / "c.csv", pixels), table(own / "d.csv", fractions, header))
    ]
    assert found[0] == found[1]


def test_a_long_stretch_is_explained_in_even_pieces(own: Path) -> None:
    boxes = table(own / "e.csv", [shown(t, ANN, "Ann") for t in range(LENGTH)])
    model = detector()
    whole, pieces = (
        explain_video(model, own / "own.mp4", boxes, own / "e.mp4", window=window) for window in (250, 20)
    )
    assert sorted({len(x["face"][0]) for x in model.seen}) == [16, 17, 50]
    assert pieces[0]["probabilities"] == pytest.approx(whole[0]["probabilities"], abs=1e-6)


GOOD = [shown(t, ANN, "Ann") for t in range(LENGTH)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*GOOD[:7], shown(7, (240, 0, 300, 50), "Ann")],
            "line 9: the box 240, 0, 300, 50 lies outside the frame of 240x160 pixels",
        ),
        ([*GOOD[:7], shown(7, (50, 0, 40, 50), "Ann")], "line 9: the box 50, 0, 40, 50 is empty"),
        (
            [shown(t, ANN, "Ann") for t in range(45, 55)],
            "line 8: frame_timestamp 2.04 is beyond the end of own.mp4, which lasts 2.00 s",
        ),
        ([*GOOD[:7], (-0.1, *ANN, "Ann")], "line 9: frame_timestamp -0.1 is before the video"),
        ([*GOOD[:9], *GOOD[20:23]], "line 11: only 3 frames of Ann without a gap"),
        ([*GOOD[:7], shown(3, BOB, "Ann")], "line 9: a second box of Ann at 0.12 s: see line 5"),
        ([*GOOD[:7], ("soon", *ANN, "Ann")], "line 9: frame_timestamp 'soon' is not a number"),
        ([*GOOD[:7], (0.3, *ANN[:3], "nan", "Ann")], "line 9: y2 'nan' is not a number"),
        ([*GOOD[:7], (0.3, *ANN)], "line 9: other fields than the 6 that the first line names"),
        ([], "holds no boxes"),
    ],
)
def test_wrong_boxes_are_named_by_file_and_line(own: Path, rows: list[Any], message: str) -> None:
    boxes = table(own / "wrong.csv", rows)
    with pytest.raises(ValueError, match="wrong.csv") as error:
        explain_video(detector(), own / "own.mp4", boxes, own / "wrong.mp4")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (own / "wrong.mp4").exists() and not list(own.glob(".*"))


def test_a_file_without_names_a_silent_video_and_another_model_are_refused(own: Path, tmp_path: Path) -> None:
    boxes = table(own / "f.csv", GOOD)
    with pytest.raises(
        ValueError, match="f.csv: line 1: no column frame_timestamp, .*entity: the first line names"
    ):
        explain_video(
            detector(), own / "own.mp4", table(tmp_path / "f.csv", GOOD, "a,b,c,d,e,f"), tmp_path / "f.mp4"
        )
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        explain_video(detector(), own / "own.mp4", tmp_path / "none.csv", tmp_path / "f.mp4")
    video.write(tmp_path / "silent.mp4", [np.zeros((HIGH, WIDE, 3), np.uint8)] * LENGTH, fps=FPS)
    with pytest.raises(ValueError, match=r"silent\.mp4: .*no (audio|sound)"):
        explain_video(detector(), tmp_path / "silent.mp4", boxes, tmp_path / "f.mp4")
    with pytest.raises(ValueError, match=r"f\.webm: the marked film is an \.mp4"):
        explain_video(detector(), own / "own.mp4", boxes, tmp_path / "f.webm")
    assert not (tmp_path / "f.mp4").exists()
