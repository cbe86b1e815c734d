"""The networks that name speakers: shapes, streams, and the factorised convolution against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import selib
from studies.networks import active_speaker, bias, build
from studies.networks.detector import Factorised


@pytest.mark.parametrize("streams", [("audio", "face", "body"), ("audio", "face"), ("face",)])
def test_logits_of_every_frame_and_of_every_stream_while_training(streams):
    model = active_speaker(streams).eval()
    inputs = model.example(6, 2)
    assert model(**inputs).shape == (2, 6, 1)
    assert model.modalities == streams
    out = model.train()(**inputs)
    assert out["logits"].shape == (2, 6, 1)
    assert {name: x.shape for name, x in out["auxiliary"].items()} == {name: (2, 6, 1) for name in streams}


def test_the_factorised_convolution_is_two_three_dimensional_ones():
    torch.manual_seed(0)
    layer = Factorised(3, 8, 3, 2).eval()
    x = torch.randn(2, 3, 5, 12, 12)
    space, time = layer.space[0].weight[:, :, None], layer.time[0].weight[..., None]

    def norm(y, layers):
        return layers[1](y.flatten(3)).relu().view_as(y)

    middle = norm(F.conv3d(x, space, stride=(1, 2, 2), padding=(0, 1, 1)), layer.space)
    want = norm(F.conv3d(middle, time, padding=(1, 0, 0)), layer.time)
    assert torch.allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize("make", [active_speaker, bias])
def test_blocks_go_before_the_temporal_parts_and_on_the_fusion_and_change_nothing(make):
    model = make().eval()
    inputs = model.example(4, 1)
    before = model(**inputs)
    blocks = selib.attach_se(model, inputs, at=model.sites)
    assert set(blocks) == {"face", "body", "fusion"}
    assert torch.equal(model(**inputs), before)
    ex = selib.explain(model, inputs)
    assert ex.streams["face"].features.ndim == 5
    assert ex.streams["fusion"].gates.shape == (1, 3 * 128)
    assert ex.streams["body"].heatmap("gate", 0).shape == (1, 4, 112, 112)


def test_deciding_on_the_fused_streams_is_the_rest_of_the_forward_pass():
    model = active_speaker().eval()
    inputs = model.example(5, 2)
    fused = []
    model.fuse.register_forward_hook(lambda m, args, out: fused.append(out))
    logits = model(**inputs)
    assert torch.equal(model.decide(fused[0]), logits)


def test_a_checkpoint_with_three_blocks_comes_back(tmp_path):
    torch.manual_seed(0)
    model = active_speaker(("audio", "face")).eval()
    selib.attach_se(model, model.example(), at=model.sites, start="paper")
    selib.save_checkpoint(
        model,
        tmp_path / "m.safetensors",
        architecture="active_speaker",
        classes=["speaking"],
        image_size=112,
        task="multilabel",
        streams=["audio", "face"],
    )
    again, meta = selib.load_checkpoint(tmp_path / "m.safetensors")
    assert meta["task"] == "multilabel"
    assert torch.equal(again(**model.example(7, 1)), model(**model.example(7, 1)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bias(("smell",)), "some of audio, face, body"),
        (
            lambda: active_speaker(("face",))(
                face=torch.zeros(1, 2, 112, 112), body=torch.zeros(1, 2, 112, 112)
            ),
            "takes face, but was given face, body",
        ),
        (lambda: build("active_speaker", 2), "one output, speaking, not 2"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
