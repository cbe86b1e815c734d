"""Films of clips, and frames with their people marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selib import video
from studies import clips
from studies.data.crops import crop

FPS, RATE = 25, 16000


def crops(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 112, 112), dtype=np.uint8)


def test_spans_and_envelope_by_hand() -> None:
    assert clips.spans(torch.tensor([1, 1, 0, 0, 1, 0, 1])) == [(0, 2), (4, 5), (6, 7)]
    assert clips.spans(np.zeros(3)) == []
    assert clips.envelope(np.array([0, 2, -4, 1, 0, 0]), 3).tolist() == [[0, 0.5], [-1, 0.25], [0, 0]]


# ---- films ----------------------------------------------------------------------------------------


def film(frames: int = 20, **change: Any) -> clips.Film:
    still = np.repeat(crops(1), frames, 0)
    details: dict[str, Any] = {
        "scores": {"all": np.full(frames, 0.75)},
        "wave": np.zeros(frames * 640, np.int16),
    }
    return clips.Film({"face": still, "body": still}, **details | change)


def test_between_frames_of_a_still_only_the_headline_and_the_cursor_change() -> None:
    one = film()
    first, second = one[4], one[12]
    assert first.shape == second.shape == one[0].shape and first.dtype == np.uint8
    assert np.array_equal(first[20:244], second[20:244])
    changed = np.flatnonzero((first[244:] != second[244:]).any((0, 2)))
    width = first.shape[1]
    near = [abs(changed - (t + 0.5) / 20 * (width - 1)) <= 6 for t in (4, 12)]
    assert len(changed) and (near[0] | near[1]).all() and near[0].any() and near[1].any()
    assert len(list(one)) == len(one) == 20
    with pytest.raises(IndexError):
        one[20]


def test_a_film_draws_each_streams_map_on_its_own_crop() -> None:
    maps = np.zeros((20, 112, 112))
    maps[3] = 1.0
    plain, mapped = film(), film(maps={"body": maps})
    assert np.array_equal(plain[2], mapped[2])
    difference = (plain[3] != mapped[3]).any(2)
    assert not difference[:, :224].any() and difference[60:200, 240:440].mean() > 0.99


def test_the_score_without_a_modality_is_drawn_dashed_and_the_modality_struck_out() -> None:
    both = film(scores={"all": np.full(20, 0.75), "without body": np.full(20, 0.25)}, off={"body", "audio"})
    plain = film()
    blue, orange = (np.array(colour) for colour in clips.LINES)
    rows = both[0][244:].astype(int)

    def drawn(colour: np.ndarray) -> np.ndarray:
        """Columns, past the cursor and left of the legend, in which the colour is to be seen."""
        return (np.abs(rows[:, 30:240] - colour).max(2) < 40).any(0)

    assert drawn(blue).all() and 0.3 < drawn(orange).mean() < 0.9
    assert np.array_equal(both[0][20:244, :224], plain[0][20:244, :224])
    assert both[0][20:244, 232:].std() < 0.5 * plain[0][20:244, 232:].std()


def test_a_film_of_one_small_stream_and_nothing_else_is_drawn() -> None:
    small = clips.Film({"face": np.zeros((3, 40, 40), np.uint8)})
    assert small[0].shape == (20 + 80 + 24, 240, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": {"hand": np.zeros((20, 112, 112))}}, "maps for 'hand'"),
        ({"maps": {"face": np.zeros((20, 7, 7))}}, r"maps for 'face' of \(20, 7, 7\) do not fit"),
        ({"scores": {"all": np.zeros(3)}}, r"'all' has the shape \(3,\)"),
        ({"labels": np.zeros(19)}, r"'labels' has the shape \(19,\)"),
    ],
)
def test_a_film_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        film(**change)


def test_a_film_becomes_a_video_with_its_sound(tmp_path: Path) -> None:
    tone = (8000 * np.sin(np.arange(6400) / 8)).astype(np.int16)
    scenes = clips.Film({"face": crops(10)}, wave=tone)
    video.write(tmp_path / "film.mp4", scenes, fps=FPS, audio=tone)
    back = [frame for _, frame in video.read_frames(tmp_path / "film.mp4")]
    assert len(back) == 10 and back[0].shape == scenes[0].shape
    assert np.corrcoef(video.read_audio(tmp_path / "film.mp4")[1600:4800], tone[1600:4800])[0, 1] > 0.9


# ---- annotated frames -----------------------------------------------------------------------------


def test_who_speaks_has_a_solid_green_box_and_who_does_not_a_broken_red_one() -> None:
    grey = np.full((120, 400, 3), 128, np.uint8)
    marks = [clips.Mark((50, 40, 110, 100), 0.9), clips.Mark((250, 40, 310, 100), 0.2)]
    (found,) = clips.annotate([grey], [marks])
    green, red = (np.array(c) for c in (clips.SPEAKS, clips.SILENT))
    below = [
        (np.abs(found[99, left + 4 : left + 56].astype(int) - c).max(1) < 40).mean()
        for left, c in ((50, green), (250, red))
    ]
    assert below[0] == 1 and 0.3 < below[1] < 0.9
    assert (found[44:96, 54:106] == 128).all()  # nothing inside without a map
    assert (grey == 128).all()  # the input is left alone
    assert np.array_equal(next(clips.annotate([grey], [[]])), grey)


def test_a_map_lies_where_its_crop_was_taken_also_beyond_the_edge() -> None:
    black = np.zeros((100, 100, 3), np.uint8)
    heatmap = np.zeros((112, 112))
    heatmap[:56, 56:] = 1.0  # the upper right quarter of a box that leaves the frame on the left
    box = (-40.0, 20.0, 40.0, 100.0)
    (found,) = clips.annotate([black], [[clips.Mark(box, 0.1, heatmap=heatmap)]])
    (bare,) = clips.annotate([black], [[clips.Mark(box, 0.1)]])
    where = (found.astype(int) - bare).any(2)
    assert where[25:57, 3:36].all() and not where[63:].any() and not where[:, 42:].any()
    seen = crop(np.repeat(np.where(where, 255, 0)[..., None], 3, 2).astype(np.uint8), box)
    inside = np.zeros((112, 112), bool)
    inside[10:50, 62:100] = True
    assert seen[inside].min() > 200 and seen[70:, 62:].max() < 50


@pytest.mark.parametrize("box", [(-500.0, -400.0, 5.0, 5.0), (95.0, 95.0, 300.0, 900.0)])
def test_a_box_mostly_outside_is_drawn_as_far_as_it_is_seen(box: tuple[float, ...]) -> None:
    frame = np.zeros((100, 100, 3), np.uint8)
    (found,) = clips.annotate(
        [frame], [[clips.Mark(box, 0.9, np.ones((7, 7)), box, np.ones((7, 7)), "a long name")]]
    )
    assert found.shape == frame.shape and found.any()


def test_every_frame_needs_its_marks() -> None:
    frame = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="shorter"):
        list(clips.annotate([frame, frame], [[]]))


def test_the_probability_of_one_logit_and_of_two_classes() -> None:
    logits = torch.tensor([[0.0], [2.0]])
    assert clips.probability(logits).tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-2))])
    two = torch.cat([torch.zeros(2, 1), logits], 1)  # a softmax over 0 and x is a sigmoid of x
    assert clips.probability(two, 1).tolist() == pytest.approx(clips.probability(logits).tolist())
