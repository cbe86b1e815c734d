"""Batches of clips: TalkNet's lengths and changes, seeds and epochs; average precision over frames."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from studies.data import SpeakerSet
from studies.data.speakers import changed, overlaid
from studies.data.talknet import ClipInfo
from studies.metrics import frame_average_precision
from studies.twins import speakers as synth

SIDE = 112


class Levels:
    """A source without files: a picture's grey says frame and column, the sound is noise."""

    def read(self, info: ClipInfo, stream: str) -> np.ndarray:
        if stream == "audio":
            return np.random.default_rng(info.row).normal(0, 1000, info.frames * 640).astype(np.int16)
        frames = np.arange(info.frames, dtype=np.uint8)[:, None, None]
        return np.tile(np.arange(SIDE, dtype=np.uint8)[None, None] + frames, (1, SIDE, 1))


def levels(
    frames: list[int], synthetic: bool = False, streams: tuple[str, ...] = synth.STREAMS
) -> SpeakerSet:
    infos = [
        ClipInfo(f"clip{n}", "v", 25.0, np.arange(count, dtype=np.uint8) % 2, n)
        for n, count in enumerate(frames)
    ]
    return SpeakerSet("ava-asd", "train", streams, infos, synthetic, Levels())  # type: ignore[arg-type]


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 300), st.none() | st.integers(1, 70), st.integers(0, 3))
@settings(deadline=None)
def test_every_clip_is_in_one_batch_of_its_length(
    frames: list[int], budget: int, window: int | None, epoch: int
) -> None:
    data = levels(frames)
    kept = [min(count, window or count) for count in frames]
    for train in (True, False):
        loader = data.loader(budget, train=train, window=window)
        loader.set_epoch(epoch)
        batches = loader.batches
        assert sorted(i for batch in batches for i in batch) == list(range(len(frames)))
        assert len(loader) == len(batches)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(kept[i] for i in batch) <= budget
            assert train or len({kept[i] for i in batch}) == 1
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
        compositions.add(str(loader.batches))
        orders.add(tuple(labels.shape for _, labels in loader))
    assert len(compositions) > 1 and len(orders) > 1


def test_training_cuts_to_the_shortest_and_windows_lie_anywhere() -> None:
    ((streams, labels),) = levels([12, 10]).loader(24, train=True)
    assert streams["audio"].shape == (2, 40, 13) and streams["face"].shape[1] == 10
    assert labels.tolist() == [[0, 1] * 5] * 2  # their beginnings
    data = levels([40], synthetic=True)
    loader = data.loader(8, train=True, window=8)
    whole = data.clip(0)[0]["audio"][0]
    places = set()
    for _ in range(25):
        ((streams, labels),) = loader
        rows = streams["audio"][0]
        (place,) = [n for n in range(33) if torch.equal(rows[1:], whole[4 * n + 1 : 4 * n + 32])]
        assert labels.tolist() == [[(place + n) % 2 for n in range(8)]]
        assert (streams["face"][0, :, 0, 0] * 255).round().tolist() == [place + n for n in range(8)]
        places.add(place)
    assert len(places) > 5


def test_labels_stay_and_pictures_and_sound_change() -> None:
    data = levels([10] * 12)
    loader = data.loader(30, train=True)
    clean = [data.clip(i)[0]["audio"][0] for i in range(12)]
    kinds = Counter[str]()
    for _ in range(6):
        for streams, labels in loader:
            assert labels.tolist() == [[0, 1] * 5] * 3
            for place in range(3):
                kinds["clean"] += any(torch.equal(streams["audio"][place], sound) for sound in clean)
                shown = []
                for stream in ("face", "body"):
                    step = (streams[stream][place, 0, 56] * 255).diff()
                    shown.append(
                        "as it is" if (step == 1).all() else "mirrored" if (step == -1).all() else "else"
                    )
                kinds.update(shown)
                kinds["face and body differ"] += shown[0] != shown[1]
    assert 20 < kinds["clean"] < 52  # of 72
    assert 18 < kinds["as it is"] < 60 and 18 < kinds["mirrored"] < 60 and 36 < kinds["else"] < 108
    assert kinds["face and body differ"] > 20


def test_the_twins_clips_are_not_changed() -> None:
    data = levels([10] * 6, synthetic=True)
    for streams, _ in data.loader(30, train=True):
        sounds = [data.clip(i)[0]["audio"][0] for i in range(6)]
        assert all(any(torch.equal(one, sound) for sound in sounds) for one in streams["audio"])
        assert all(torch.equal(one, data.clip(0)[0]["face"][0]) for one in streams["face"])


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
    wave = rng.normal(0, 2000, 4000).clip(-8000, 8000).astype(np.int16)
    voice = rng.normal(0, 300, length).astype(np.int16)
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


def by_sklearn(scores: np.ndarray, labels: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)  # recall falls from 1 to 0
    best = np.maximum.accumulate(precision)  # at that recall or more
    return float(-np.sum(np.diff(recall) * best[:-1]))


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=60), st.booleans())
@settings(deadline=None)
def test_average_precision_is_the_area_under_the_best_precision(
    frames: list[tuple[int, bool]], distinct: bool
) -> None:
    scores, labels = (np.array(column, float) for column in zip(*frames, strict=True))
    if distinct:
        scores = scores + np.arange(len(scores)) / 100
    labels[0] = 1
    found = frame_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(by_sklearn(scores, labels), abs=1e-12)
    # neither the order of the frames nor a monotone change of the scores matters
    order = np.random.default_rng(len(scores)).permutation(len(scores))
    mixed, known = torch.from_numpy(np.exp(scores[order])), torch.from_numpy(labels[order] == 1)
    assert frame_average_precision(mixed, known) == pytest.approx(found, abs=1e-12)


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
        (torch.zeros(3), torch.ones(4), r"must have one shape, got \(3,\) and \(4,\)"),
        (torch.tensor([0.0, float("nan")]), torch.ones(2), "scores must be finite"),
        (torch.zeros(2), torch.tensor([1, 2]), "labels must be 0 or 1"),
    ],
)
def test_average_precision_refuses(scores: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_average_precision(scores, labels)
