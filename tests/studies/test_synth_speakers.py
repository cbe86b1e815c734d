"""The synthetic speakers: what is said, seen and labelled goes together, and muting one stream leaves the
others alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from studies.twins import speakers as synth
from studies.twins import voice

MOUTH = 1 + synth.FACE_PARTS.index("mouth")
HANDS = 1 + synth.BODY_PARTS.index("hands")


def scene(kind: str, condition: str = "optimal", **changes: object) -> synth.Params:
    """A clip of one turn of that kind."""
    params = synth.sample(np.random.default_rng(3), condition)
    mouth, voice, body = synth.DOES[kind]
    turn = {"start": 0, "stop": params["frames"], "kind": kind, "mouth": mouth, "voice": voice, "body": body}
    return params | {"turns": [turn], "fidget": False, "hands": "both"} | changes


def loudness(audio: np.ndarray) -> np.ndarray:
    """Mean magnitude in each video frame."""
    return np.abs(audio.astype(float)).reshape(-1, synth.RATE // synth.FPS).mean(1)


def test_a_larger_count_only_adds_clips_and_seeds_and_splits_differ():
    few, many = synth.scenes(3, "test"), synth.scenes(5, "test")
    assert many[:3] == few
    assert synth.scenes(1, "test", seed=1)[0]["seed"] != few[0]["seed"] != synth.scenes(1, "train")[0]["seed"]
    assert [p["condition"] for p in many] == list(synth.CONDITIONS)


def test_the_names_are_read_by_the_rules_of_talknet_and_bias():
    for p in [*synth.scenes(3, "val", seed=7), *synth.scenes(2, "train", task="body")]:
        assert p["entity"][:11] == p["video"]
        assert "_".join(p["entity"].split("_")[:-2]) == p["video"]


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError, match=r"muted=\['smell'\]: the streams are audio, face, body"):
        synth.render(synth.scenes(1, "test")[0], ["smell"])


def test_a_clip_is_drawn_the_same_here_and_in_a_process_of_its_own():
    clips = [(params, ("face",)) for params in synth.scenes(4, "test")]
    apart = synth.draw(clips)
    for (params, muted), clip in zip(clips, apart, strict=True):
        here = synth.render(params, muted)
        for name in ("faces", "bodies", "audio", "labels", "face_parts", "body_parts"):
            assert np.array_equal(getattr(clip, name), getattr(here, name)), name
        assert here.faces.shape == here.body_parts.shape == (params["frames"], 112, 112)
        assert len(here.audio) == params["frames"] * 640


def test_a_failing_process_says_why():
    with pytest.raises(OSError, match="KeyError"):
        synth.draw([({"frames": 3}, ())] * 4)


@pytest.mark.parametrize("stream", synth.STREAMS)
def test_muting_one_stream_changes_nothing_else(stream):
    params = scene("speaking")
    whole, muted = synth.render(params), synth.render(params, (stream,))
    held = {"audio": ("audio",), "face": ("faces", "face_parts"), "body": ("bodies", "body_parts")}
    for name, fields in held.items():
        same = [np.array_equal(getattr(whole, field), getattr(muted, field)) for field in fields]
        assert all(same) if name != stream else not any(same), name
    assert np.array_equal(whole.labels, muted.labels)


def test_a_muted_stream_shows_no_speech():
    params = scene("speaking")
    whole, muted = synth.render(params), synth.render(params, synth.STREAMS)
    mouth = [(clip.face_parts == MOUTH).sum((1, 2)) for clip in (whole, muted)]
    assert mouth[0].max() > 1.5 * mouth[1].max()
    assert loudness(muted.audio).max() < 0.1 * loudness(whole.audio).max()
    rows = [
        np.array([np.nonzero(parts == HANDS)[0].min() for parts in clip.body_parts])
        for clip in (whole, muted)
    ]
    assert rows[0].min() < rows[1].min() - 8  # the highest hand


def test_mouth_and_voice_go_together_where_the_person_speaks_and_only_there():
    together = {kind: [] for kind in ("speaking", "off-sync")}
    for kind, found in together.items():
        for seed in range(12):
            course = synth._course(scene(kind, seed=seed), ())
            found.append(np.corrcoef(course.opening, loudness(course.audio))[0, 1])
    assert np.mean(together["speaking"]) > 0.6
    assert np.mean(together["off-sync"]) < 0.3


@pytest.mark.parametrize(
    ("kind", "moves", "sounds"),
    [
        ("speaking", True, True),
        ("off-sync", True, True),
        ("silent", False, False),
        ("listening", False, True),
        ("jaw", True, False),
    ],
)
def test_every_kind_moves_and_sounds_as_it_should(kind, moves, sounds):
    course = synth._course(scene(kind), ())
    assert bool(course.opening.max() > 0.15) == moves
    assert bool(loudness(course.audio).max() > 300) == sounds
    clip = synth.render(scene(kind))
    assert clip.labels.tolist() == [int(kind == "speaking")] * len(clip.labels)


def test_what_hides_the_mouth_hides_all_of_it():
    for occluder in ("mask", "hand", "microphone"):
        parts = synth.render(scene("speaking", occluder=occluder)).face_parts
        assert not (parts == MOUTH).any(), occluder
        assert (parts == 1 + synth.FACE_PARTS.index("occluder")).mean() > 0.05


def test_putting_a_mask_on_changes_only_pictures():
    plain, masked = (synth.render(scene("speaking", occluder=name)) for name in ("none", "mask"))
    assert np.array_equal(plain.audio, masked.audio) and np.array_equal(plain.labels, masked.labels)
    hands = [clip.body_parts == HANDS for clip in (plain, masked)]
    assert np.array_equal(*hands)


def test_in_a_task_of_one_stream_the_others_say_nothing():
    for task, key in (("audio", "voice"), ("face", "mouth"), ("body", "body")):
        turns = [turn for p in synth.scenes(200, "train", task=task) for turn in p["turns"]]
        label = np.array([turn["kind"] == "speaking" for turn in turns], float)
        for other in ("voice", "mouth", "body"):
            busy = np.array([turn[other] != "rest" for turn in turns], float)
            r = np.corrcoef(label, busy)[0, 1]
            assert r == pytest.approx(1) if other == key else abs(r) < 0.2


def test_a_resonator_is_the_recursive_filter_of_its_poles():
    pole = 0.97 * np.exp(0.3j)
    source = np.random.default_rng(0).standard_normal(4000)
    a = [1, -2 * pole.real, abs(pole) ** 2]
    assert np.allclose(voice.resonant(source, pole), lfilter([sum(a)], a, source), atol=1e-6)


def test_the_voice_has_the_formants_of_its_vowel():
    syllable = voice.Syllable(0.0, 0.4, 1.0, "a", 0.0)
    man = {"pitch": 100.0, "tract": 1.0, "breath": 0.02}
    spectrum = np.abs(np.fft.rfft(voice.sound(np.random.default_rng(0), [syllable], man, 6400)))
    hertz = np.fft.rfftfreq(6400, 1 / synth.RATE)
    near, between = (
        spectrum[(hertz > low) & (hertz < high)].max() for low, high in ((640, 820), (1400, 2100))
    )
    assert near > 3 * between
