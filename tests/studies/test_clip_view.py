"""The explorer for clips, driven as plain Python; what it shares with images is in selib/test_explorer.py."""

from __future__ import annotations

import io
import wave as wav
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import Detector, detector

from selib import attach_se, explain, widgets
from selib.select import Channels, TopFraction
from studies import clip_view, clips


def pixels(view: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.images[0])).convert("RGB"), dtype=int)


def click(widget: widgets.Explorer, place: int) -> None:
    """On a channel's map."""
    widget.strip.maps._hear(None, {"kind": "click", "index": place, "x": 0.5, "y": 0.5}, [])


def player() -> tuple[widgets.Explorer, Detector, dict[str, clip_view.Clip]]:
    torch.manual_seed(0)
    model = detector(others=3.0)
    found = {
        name: (
            {
                "audio": 9 * torch.randn(1, 4 * n, 13),
                "face": torch.rand(1, n, 112, 112),
                "body": torch.rand(1, n, 112, 112),
            },
            torch.ones(1, n),
            np.arange(640 * n, dtype=np.int16),
        )
        for name, n in (("long", 20), ("short", 12))
    }
    return clip_view.explorer(model, found), model, found


def test_every_control_of_a_clip_redraws() -> None:
    widget, _, _ = player()
    knobs = widget.knobs | widget.switches
    knobs["share"].value = 1.0
    seen = [pixels(widget.view)]
    for name, value in (
        ("frame", 7),
        ("face", False),
        ("audio", False),
        ("face", True),
        ("method", "gate"),
        ("share", 0.5),
        ("item", 1),
        ("share", 1.0),
        ("method", "influence"),
        ("frame", 3),
        ("smooth", False),
        ("opacity", 0.3),
        ("colours", "viridis"),
        ("compare", "mean of channels"),
    ):
        knobs[name].value = value
        seen.append(pixels(widget.view))
        changed = seen[-1].shape != seen[-2].shape or np.abs(seen[-1] - seen[-2]).max() > 20
        assert changed, name
    before = widget.charts.images[0]
    knobs["stream"].value = "body"
    assert widget.charts.images[0] != before


def test_a_clip_is_drawn_as_the_explanation_says() -> None:
    widget, model, found = player()
    inputs, labels, sound = found["long"]
    ex = explain(model, inputs)
    widget.switches["face"].value = False
    widget.knobs["method"].value, widget.knobs["share"].value, widget.knobs["frame"].value = "gate", 0.5, 11
    gates = ex.streams["fusion"].gates.clone()
    gates[:, 2:4] = 0
    without = ex.streams["fusion"].with_gates(gates)[0].sigmoid()[:, 0]
    with_all = ex.logits[0].sigmoid()[:, 0]
    heatmap = ex.streams["body"].heatmap("gate", 0, select=TopFraction(0.5))[0]
    expected = clips.Film(
        {"face": inputs["face"][0], "body": inputs["body"][0]},
        {"body": heatmap},
        scores={"all": with_all, "without face": without},
        labels=labels[0],
        wave=sound,
        off={"face"},
    )
    assert np.array_equal(pixels(widget.view), expected[11])
    assert not torch.allclose(with_all, without)


def test_moving_through_time_runs_nothing_again_and_neither_does_going_back() -> None:
    widget, model, _ = player()
    widget.switches["face"].value = False
    widget.knobs["method"].value = "gate"
    runs, made = len(model.seen), set()
    for t in range(20):
        widget.knobs["frame"].value = t
        made.add(widget.view.images[0])
    assert len(made) == 20 and len(model.seen) == runs
    before = widget.view.images
    for control, value in (
        (widget.switches["face"], True),
        (widget.knobs["method"], "influence"),
        (widget.knobs["method"], "gate"),
        (widget.switches["face"], False),
    ):
        control.value = value
    assert widget.view.images == before and len(model.seen) == runs


def test_a_rival_is_not_made_again_while_the_selection_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], clip_view.baselines.clip_grad_cam
    monkeypatch.setattr(
        clip_view.baselines, "clip_grad_cam", lambda *given: made.append(given[2]) or real(*given)
    )
    widget, _, _ = player()
    widget.knobs["compare"].value = "Grad-CAM"
    for share in np.linspace(0.02, 1, 40).round(2):  # more selections than maps are kept
        widget.knobs["share"].value = share
    assert made == ["face", "body"]


def test_channels_are_picked_for_each_stream() -> None:
    widget, _, _ = player()
    widget.knobs["share"].value = 1.0
    dropped = widget.strip.channels[0]
    click(widget, 0)
    face = widget.rule
    widget.knobs["stream"].value = "body"
    assert "picked by hand" == widget.knobs["rule"].value and widget.rule == TopFraction(1.0)
    click(widget, 1)
    assert isinstance(widget.rule, Channels) and widget.strip.channels[1] not in widget.rule.indices
    widget.knobs["stream"].value = "face"
    assert widget.rule == face and dropped not in face.indices


def test_the_threshold_reaches_over_all_frames() -> None:
    widget, model, found = player()
    ex = explain(model, found["long"][0]).streams["face"]
    influence = ex.influence(0)[0]
    slider = widget.knobs["threshold"]
    assert slider.min == pytest.approx(float(influence.min())) and slider.max >= float(influence.max())
    assert influence.max() > influence[:, 0].max()


def test_another_clip_brings_its_length_and_its_sound() -> None:
    widget, _, found = player()
    widget.knobs["frame"].value = 19
    widget.knobs["item"].value = 1
    frame = widget.knobs["frame"]
    assert frame.max == frame.value == 11 and frame.fps == 25
    with wav.open(io.BytesIO(frame.sound)) as file:
        assert (file.getnchannels(), file.getframerate()) == (1, 16000)
        assert np.array_equal(np.frombuffer(file.readframes(10**6), "<i2"), found["short"][2])


def test_clips_need_modalities_a_fusion_and_a_stream_of_pictures() -> None:
    _, model, found = player()
    inputs = found["long"][0]
    with pytest.raises(ValueError, match="1 to 200 images or clips, not 0"):
        clip_view.explorer(model, {})
    with pytest.raises(ValueError, match="2 class names do not fit 1 logits"):
        clip_view.explorer(model, found, classes=["speaks", "is silent"])
    with pytest.raises(ValueError, match=r"long: no stream of grey pictures \(1, T, H, W\), only audio"):
        clip_view.explorer(model, {"long": ({"audio": inputs["audio"]}, None, None)})
    single = Detector().eval()
    attach_se(single, inputs, at={"face": "face"})
    with pytest.raises(ValueError, match='an SE block called "fusion"'):
        clip_view.explorer(single, found)
    blind = Detector().eval()
    attach_se(blind, inputs, at={"fusion": "fuse"})
    with pytest.raises(ValueError, match="no SE block on a stream of pictures: face, body have none"):
        clip_view.explorer(blind, found)
    model.modalities = ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="6 fused channels are no 4 equal segments"):
        clip_view.explorer(model, found)
    model.modalities = ()
    with pytest.raises(ValueError, match="give the model an attribute modalities"):
        clip_view.explorer(model, found)


def test_the_two_lines_name_the_stream() -> None:
    widget, _, _ = player()
    widget.knobs["stream"].value, widget.knobs["share"].value = "body", 0.5
    lines = widget.lines.value.replace("&quot;", '"').replace("&#x27;", "'")
    assert "ex = selib.explain(model, clips['long'][0])" in lines
    assert 'ex.streams["body"].heatmap("influence", target=0, select=selib.TopFraction(0.5))' in lines
