"""Models that answer once a frame: hand oracles, ablation of the whole model, modalities, training, gates,
and Light-ASD rebuilt.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import FeatureAblation
from tiny_models import (
    TwoStreams,
    close,
    gradients_seen,
    hooks,
    image,
    open_and_close,
    random,
    run,
    same,
    snapshot,
)
from torch import Tensor, nn

from selib.attach import attach_se, detach_se
from selib.checkpoint import load_checkpoint, save_checkpoint
from selib.explainer import SEExplainer, explain
from selib.explanation import Explanation
from selib.features import cache_features, channel_test
from selib.forward import attached, call, logits_of
from selib.gates import bernoulli_kl, fit_gates
from selib.heatmap import normalize, resize, time_axis
from selib.layout import map_layout
from selib.se import SEBlock
from selib.select import TopK
from selib.site import find_site
from selib.stream_gates import StreamGateReport, fit_stream_gates
from selib.train import attribute_scores, evaluate, fit, predict
from studies.networks import build

# ---- models ----------


class Gru(nn.Module):
    """(B, T, width) -> (B, T, 2·hidden)."""

    def __init__(self, width: int, hidden: int = 5) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Lstm(nn.Module):
    """Time first, with a state of its own."""

    def __init__(self, width: int, hidden: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden)
        self.start = nn.Parameter(torch.randn(1, 1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(1, len(x), -1).contiguous()
        return self.lstm(
            x.transpose(0, 1), (start, x.mean((1, 2))[None, :, None].expand_as(start).contiguous())
        )[0].transpose(0, 1)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x))


class Cells(nn.Module):
    """A loop that writes into a buffer of its own: vmap cannot follow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, state = torch.zeros(*x.shape[:2], 10), torch.zeros(len(x), 10)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            out[:, t] = state
        return out


class Encoder(nn.Module):
    """Crops (B, T, H, W) -> (B, 8, T), through a map (B, 6, T, H/2, W/2). ``reduce`` says what is read of
    each frame of it.
    """

    def __init__(self, reduce: str = "mean") -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv3d(1, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
            nn.BatchNorm3d(6),
            nn.ReLU(inplace=True),
            nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.act = nn.Identity() if reduce == "signed mean" else nn.ReLU(inplace=True)
        self.reduce = reduce
        self.temporal = nn.Conv1d(96 if reduce == "grid" else 6, 8, 3, padding=1)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.act(self.spatial(crops[:, None]))
        if self.reduce == "max":
            x = (
                F.adaptive_max_pool2d(x.transpose(1, 2).flatten(0, 1), 1)
                .flatten(1)
                .unflatten(0, (len(crops), -1))
                .mT
            )
        elif self.reduce == "grid":
            x = x.movedim(2, -1).flatten(1, 3)
        else:
            x = x.mean((3, 4))
        return self.temporal(x).relu()


class Fuse(nn.Module):
    def forward(self, *streams: Tensor) -> Tensor:
        return torch.cat(streams, 1)


class Speakers(nn.Module):
    """Two streams, their fusion, something temporal, an answer a frame."""

    modalities = ("audio", "face")

    def __init__(
        self, head: type[nn.Module] = Gru, *, reduce: str = "mean", flat: bool = False, outputs: int = 3
    ) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Conv1d(5, 8, 5, 4, 2), nn.BatchNorm1d(8), nn.ReLU())
        self.face = Encoder(reduce)
        self.fuse, self.head, self.classifier = Fuse(), head(16), nn.Linear(10, outputs)
        self.auxiliary = nn.ModuleDict({name: nn.Linear(8, outputs) for name in self.modalities})
        self.flat = flat

    def forward(self, face: Tensor, audio: Tensor) -> Any:
        streams = {"audio": self.audio(audio.transpose(1, 2)), "face": self.face(face)}
        logits = self.classifier(self.head(self.fuse(*streams.values()).transpose(1, 2)))
        if self.training:
            return {
                "logits": logits,
                "auxiliary": {n: self.auxiliary[n](x.transpose(1, 2)) for n, x in streams.items()},
            }
        return logits.flatten(0, 1) if self.flat else logits

    def example(self) -> dict[str, Tensor]:
        return clips(2, 5)


SITES = {"face": "face.spatial", "fusion": "fuse"}


def clips(batch: int = 2, frames: int = 7, seed: int = 1) -> dict[str, Tensor]:
    return {
        "face": random(batch, frames, 8, 8, seed=seed),
        "audio": random(batch, 4 * frames, 5, seed=seed + 1),
    }


def speakers(
    *args: Any, at: Any = SITES, gated: bool = True, **options: Any
) -> tuple[nn.Module, dict[str, SEBlock]]:
    """A model with gates that differ between channels and clips, or that change nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Speakers(*args, **options).eval()
        for p in model.parameters():  # logits that differ more than PyTorch's own start makes them
            nn.init.normal_(p, std=0.6)
    attach_se(model, clips(), at=at, reduction=2)
    for seed, block in enumerate(attached(model).values() if gated else ()):
        open_and_close(block, seed)
    return model, attached(model)


@torch.no_grad()
def answers(model: nn.Module, inputs: Any) -> Tensor:
    return logits_of(call(model, inputs), inputs)


def ablated(
    model: nn.Module, inputs: Any, block: SEBlock, channels: list[list[int]], targets: Tensor
) -> Tensor:
    """Influence (B, len(channels), T) of groups of channels by running the whole model; targets (B, T)."""

    def answer() -> Tensor:
        return answers(model, inputs).gather(2, targets[..., None])[..., 0]

    base, columns = answer(), []
    for group in channels:
        keep = torch.ones(block.channels)
        keep[group] = 0
        with block.override(lambda s, keep=keep: s * keep):
            columns.append(base - answer())
    return torch.stack(columns, 1)


def each(n: int) -> list[list[int]]:
    return [[i] for i in range(n)]


# ---- what shapes mean ----------


@pytest.mark.parametrize(
    ("shape", "inputs", "frames", "expected"),
    [
        ((2, 32, 7, 28, 28), [(2, 7, 112, 112)], 7, ("BC*", 32)),
        ((2, 7, 28, 28, 32), [(2, 7, 112, 112)], 7, ("B*C", 32)),
        ((2, 28, 28, 28, 28), [(2, 28, 112, 112)], 28, ("BC*", 28)),
        ((2, 100, 128), [(2, 100, 112, 112)], 100, ("B*C", 128)),  # no 10x10 grid of tokens
        ((2, 128, 100), [(2, 100, 112, 112)], 100, ("BC*", 128)),
        ((2, 100, 100), [(2, 100, 112, 112)], 100, ("BC*", 100)),
        ((2, 100, 128), [(2, 3, 100, 112, 112)], None, ("B*C", 128)),  # one answer a clip
        ((2, 128, 100), [(2, 3, 100, 112, 112)], None, ("BC*", 128)),
        ((2, 50, 128), [(2, 100, 112, 112)], 100, ("B*C", 128)),  # at half the rate
        ((2, 128, 200), [(2, 100, 112, 112)], 100, ("BC*", 128)),
        ((2, 7, 9), [(2, 100, 112, 112)], 100, ("BC*", 7)),
        ((2, 300, 13, 100), [(2, 400, 13)], 100, ("BC*", 300)),
        ((2, 300, 100, 13), [(2, 400, 13)], 100, ("BC*", 300)),
        ((2, 100, 13, 64), [(2, 400, 13)], 100, ("B*C", 64)),
    ],
)
def test_maps_over_time_are_read_as_such(shape: Any, inputs: Any, frames: int | None, expected: Any) -> None:
    layout = map_layout(shape, inputs, frames)
    assert layout is not None and (layout.layout, layout.channels) == expected and layout.grid is None


def test_images_are_read_as_before() -> None:
    layout = map_layout((2, 100, 128), [(2, 3, 112, 112)])
    assert layout is not None and (layout.layout, layout.grid) == ("B*C", (10, 10))


def test_the_time_axis() -> None:
    assert time_axis((), 9) is None and time_axis((4,), 9) == 0 and time_axis((9, 3, 3), 9) == 0
    assert (
        time_axis((13, 100), 100) == 1 and time_axis((100, 13), 100) == 0 and time_axis((13, 400), 100) == 1
    )
    assert (
        time_axis((13, 50), 100) == 1 and time_axis((7, 9), 100) is None and time_axis((100, 100), 100) == 1
    )


def test_logits_of_flattened_frames() -> None:
    flat, x = random(14, 3), clips()
    assert torch.equal(logits_of(flat, x), flat.reshape(2, 7, 3)) and torch.equal(
        logits_of(flat[:, 0], x), flat[:, :1].reshape(2, 7, 1)
    )
    assert logits_of(flat).shape == (14, 3) and logits_of(flat[:2], x).shape == (2, 3)
    assert logits_of(flat, [x["face"], random(5, 2)]).shape == (14, 3)  # no common batch
    assert logits_of(flat[:13], x).shape == (13, 3)


def test_a_map_of_all_frames_in_one_axis_is_refused() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x.flatten(0, 1)[:, None]).mean((2, 3)))

    with pytest.raises(
        ValueError, match=r"at='body' returns \(14, 4, 8, 8\) for a batch of 2: an SE block needs a map"
    ):
        attach_se(Frames(), random(2, 7, 8, 8), at="body")


def test_the_place_is_found_without_a_name() -> None:
    model = Speakers().eval()
    site = find_site(model, clips())
    assert site.name == "head" and site.frames and site.layout.layout == "B*C"
    before = run(model, clips())
    attach_se(model, clips())
    assert torch.equal(run(model, clips()), before)
    ex = explain(model, clips())
    assert isinstance(ex, Explanation) and ex.heatmap().shape == (2, 7)


# ---- influence ----------


class PerFrame(nn.Module):
    """(B, 2, T, h, w) as it is; the mean of each frame, weighted, and its sum up to now if ``mixes``."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.body, self.fc, self.mixes = nn.Conv3d(2, 2, 1, bias=False), nn.Linear(2, 2, bias=False), mixes
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(2)[..., None, None, None])
            self.fc.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x).mean((3, 4)).mT)
        return logits.cumsum(1) if self.mixes else logits


def by_hand(*, mixes: bool = False) -> tuple[nn.Module, Explanation]:
    """One clip of three frames of 1x2; channel means 1, 2, 0 and ½, 0, 3; scales ½ and 1."""
    model = PerFrame(mixes=mixes).eval()
    x = torch.tensor(
        [[[[[0.0, 2.0]], [[2.0, 2.0]], [[0.0, 0.0]]], [[[1.0, 0.0]], [[0.0, 0.0]], [[2.0, 4.0]]]]]
    )
    block = attach_se(model, x, at="body")
    with block.override(torch.tensor([0.25, 0.5])):
        return model, explain(model, x)


def test_influence_of_a_linear_head_by_hand() -> None:
    _, ex = by_hand()
    assert ex.logits.shape == (1, 3, 2) and torch.allclose(
        ex.logits[0], torch.tensor([[1.5, -0.5], [1.0, 3.0], [6.0, -12.0]])
    )
    assert ex.predicted.tolist() == [[0, 1, 0]]
    assert torch.allclose(ex.influence(0), torch.tensor([[[0.5, 1.0, 0.0], [1.0, 0.0, 6.0]]]))
    assert torch.allclose(ex.influence(1), torch.tensor([[[1.5, 3.0, 0.0], [-2.0, 0.0, -12.0]]]))
    assert torch.allclose(
        ex.influence(), torch.tensor([[[0.5, 3.0, 0.0], [1.0, 0.0, 6.0]]])
    )  # of classes 0, 1, 0
    # Σ_c influence · map / mean(map), frame by frame
    assert torch.allclose(ex.map(target=0), torch.tensor([[[[2.0, 1.0]], [[1.0, 1.0]], [[4.0, 8.0]]]]))
    assert torch.allclose(ex.map(target=1), torch.tensor([[[[-4.0, 3.0]], [[3.0, 3.0]], [[-8.0, -16.0]]]]))
    # scaled over the whole clip, not frame by frame; evidence against the class is cut off
    assert torch.allclose(ex.heatmap(target=0), normalize(ex.map(target=0))) and ex.heatmap(
        target=0
    ).shape == (1, 3, 1, 2)
    assert torch.allclose(
        ex.heatmap(target=0)[0, :, 0], torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 7.0]]) / 7
    )
    assert torch.allclose(ex.heatmap(target=1)[0, :, 0], torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    # every frame has a channel of its own
    assert ex.selected(target=0, select=TopK(1)).tolist() == [[[False, True, False], [True, False, True]]]
    assert torch.allclose(
        ex.map(target=0, select=TopK(1)), torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]], [[4.0, 8.0]]]])
    )
    # the gates are the clip's
    assert ex.selected("gate", select=TopK(1)).tolist() == [[False, True]]
    assert torch.allclose(ex.map("gate")[0, :, 0], torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 2.0]]))
    assert ex._head.reads == "mean" and not ex._head.rectifies


def test_influence_reaches_later_frames_by_hand() -> None:
    _, ex = by_hand(mixes=True)
    assert torch.allclose(ex.influence(0), torch.tensor([[[0.5, 1.5, 1.5], [1.0, 1.0, 7.0]]]))
    # channel 0 is zero in the last frame and channel 1 in the second: there their influence has no place
    assert torch.allclose(ex.map(target=0), torch.tensor([[[[2.0, 1.0]], [[1.5, 1.5]], [[14 / 3, 28 / 3]]]]))
    assert torch.allclose(
        ex.with_gates(torch.tensor([0.0, 0.5])),
        ex.logits - torch.tensor([[[0.5, 1.5], [1.5, 4.5], [1.5, 4.5]]]),
    )


HEADS = {
    "gru": {"head": Gru},
    "lstm": {"head": Lstm},
    "attention": {"head": Attention},
    "python loop": {"head": Cells},
    "max": {"reduce": "max"},
    "signed mean": {"reduce": "signed mean"},
    "every position": {"reduce": "grid"},
    "flattened": {"flat": True},
    "one output": {"outputs": 1},
}
READS = {"max": "max", "every position": None}


@pytest.mark.parametrize("name", HEADS)
def test_ablating_gates_in_the_head_is_ablating_them_in_the_model(name: str) -> None:
    model, blocks = speakers(**HEADS[name])
    x = clips(3)
    before, before_hooks = snapshot(model), hooks(model)
    ex = explain(model, x)
    assert ex is ex.streams["fusion"] and ex.logits.shape[:2] == (3, 7)
    assert torch.equal(ex.logits, answers(model, x))
    targets = torch.randint(ex.logits.shape[2], (3, 7), generator=torch.Generator().manual_seed(0))
    for stream, block in blocks.items():
        e = ex.streams[stream]
        expected = ablated(model, x, block, each(block.channels), targets)
        assert (
            close(e.influence(targets), expected, ex.logits)
            and expected.abs().max() > 1e-2 * ex.logits.abs().max()
        )
        assert e.influence().dtype == torch.float32
        new = torch.rand(e.gates.shape, generator=torch.Generator().manual_seed(1))
        with block.override(new):
            assert close(e.with_gates(new), answers(model, x), ex.logits)
        assert close(e.with_gates(e.gates), ex.logits)
    face = ex.streams["face"]
    assert face._head.reads == READS.get(name, "mean") and face._head.rectifies == (name != "signed mean")
    assert same(snapshot(model), before) and hooks(model) == before_hooks


@pytest.mark.parametrize("name", ["gru", "python loop", "max", "every position"])
def test_influence_on_a_clip_costs_at_most_four_passes_through_the_encoders(name: str) -> None:
    model, _ = speakers(**HEADS[name])
    passes: list[int] = []
    model.face.spatial[0].register_forward_hook(lambda m, args, output: passes.append(len(args[0])))
    for stream in SITES:
        passes.clear()
        explain(model, clips(1)).streams[stream].influence(0)
        assert sum(passes) <= 4


def test_a_map_that_is_changed_in_place_behind_the_block() -> None:
    class InPlace(Speakers):
        def forward(self, face: Tensor, audio: Tensor) -> Any:
            heard = self.audio(audio.transpose(1, 2))
            heard += 1
            return self.classifier(self.head(self.fuse(heard, self.face(face)).transpose(1, 2)))

    torch.manual_seed(0)
    model = InPlace().eval()
    block = open_and_close(attach_se(model, clips(), at="face.spatial", reduction=2))
    ex = explain(model, clips())
    expected = ablated(model, clips(), block, each(6), torch.zeros(2, 7, dtype=torch.long))
    assert close(ex.influence(0), expected, ex.logits)


class Twice(nn.Module):
    """One encoder for two readings of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.map, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x).relu(), self.encoder(-x).relu()
        return self.fc(self.map(first).tanh().cumsum(1) + second)


class Shared(Twice):
    """The second reading is another module's, which calls the encoder, and reads the map as well."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Module()
        self.late.encoder = self.encoder
        self.late.forward = lambda m, x: m.cumsum(1) + self.encoder(-x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.late(self.map(self.encoder(x).relu()).tanh(), x))


@pytest.mark.parametrize("kind", [Twice, Shared])
def test_modules_called_twice(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), random(2, 5, 4)
    block = open_and_close(attach_se(model, x, at="map", reduction=2))
    ex = explain(model, x)
    assert close(
        ex.influence(1), ablated(model, x, block, each(6), torch.ones(2, 5, dtype=torch.long)), ex.logits
    )


def test_a_site_within_a_site() -> None:
    model, blocks = speakers(at={"outer": "face", "inner": "face.spatial", "fusion": "fuse"})
    ex = explain(model, clips())
    for name, block in blocks.items():
        expected = ablated(model, clips(), block, each(block.channels), torch.zeros(2, 7, dtype=torch.long))
        assert close(ex.streams[name].influence(0), expected, ex.logits) and expected.abs().max() > 0


def test_a_model_that_is_random_in_evaluation_is_an_error() -> None:
    class Random(Speakers):
        def forward(self, face: Tensor, audio: Tensor) -> Any:
            return super().forward(face, audio) + torch.rand(1)

    model = Random().eval()
    attach_se(model, clips(), at="face.spatial")
    with pytest.raises(RuntimeError, match="does not give the logits back"):
        explain(model, clips()).influence()


# ---- maps ----------


def test_each_frames_influence_is_spread_over_that_frame() -> None:
    model, _ = speakers()
    ex = explain(model, clips()).streams["face"]
    influence, maps = ex.influence(1), ex.features.relu()
    alive = maps.flatten(3).amax(3) > 0
    assert ex.map(target=1).shape == (2, 7, 4, 4)
    assert close(ex.map(target=1).mean((2, 3)), (influence * alive).sum(1), influence)
    expected = sum(
        influence[:, c, :, None, None] * maps[:, c] / maps[:, c].mean((2, 3), keepdim=True).clamp_min(1e-30)
        for c in range(6)
    )
    assert close(ex.map(target=1), expected)
    heat = ex.heatmap(target=1)
    assert (
        heat.shape == (2, 7, 8, 8)
        and heat.flatten(1).amin() == 0
        and heat.flatten(1).amax(1).tolist() == [1, 1]
    )
    assert (heat.flatten(2).amax(2) < 0.99).any()  # frames compare: not every one reaches 1
    assert torch.equal(heat, normalize(resize(ex.map(target=1).relu(), (7, 8, 8))))
    assert ex.heatmap("gate").shape == (2, 7, 8, 8) and ex.heatmap("gate", size=(3, 5, 6)).shape == (
        2,
        3,
        5,
        6,
    )


def test_influence_on_the_whole_clip_is_spread_over_time_as_well() -> None:
    model, _ = speakers()
    ex = explain(model, clips()).streams["face"]
    influence, maps = ex.influence(1).mean(2), ex.features.relu()
    alive = maps.flatten(2).amax(2) > 0
    found = ex.map(target=1, over="clip")
    assert close(found.mean((1, 2, 3)), (influence * alive).sum(1), influence)
    shares = maps / maps.mean((2, 3, 4), keepdim=True).clamp_min(1e-30)
    assert close(found, torch.einsum("bc,bcthw->bthw", influence, shares))
    assert torch.equal(ex.heatmap(target=1, over="clip"), normalize(resize(found.relu(), (7, 8, 8))))
    with pytest.raises(ValueError, match="over='film' is unknown"):
        ex.map(over="film")
    kept = ex.map(
        target=1, select=TopK(2), over="clip"
    )  # by influence on the clip: the same channels in every frame
    assert close(kept, torch.einsum("bc,bcthw->bthw", influence * TopK(2).mask(influence), shares))


def test_a_head_that_reads_maxima_gets_its_influence_where_they_stand() -> None:
    torch.manual_seed(0)
    model = reading_maxima()
    x = random(2, 1, 5, 8, 8)
    open_and_close(attach_se(model, x, at="body", reduction=2))
    ex = explain(model, x)
    influence = ex.influence(0)
    assert ex._head.reads == "max"
    maps = ex.features
    tops = maps.amax((3, 4), keepdim=True)
    expected = torch.einsum("bct,bcthw->bthw", influence, ((maps == tops) & (tops > 0)).float()) * 16
    assert close(ex.map(target=0), expected) and (ex.map(target=0) != 0).sum() <= 4 * 5 * 2
    whole = (
        torch.einsum(
            "bc,bct,bcthw->bthw",
            influence.mean(2),
            tops[..., 0, 0] / tops.mean((2, 3, 4))[:, :, None].clamp_min(1e-30),
            (maps == tops).float(),
        )
        * 16
    )
    assert close(ex.map(target=0, over="clip"), whole)


def reading_maxima() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv3d(1, 4, (1, 2, 2), (1, 2, 2)), nn.ReLU())
            self.gru, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, clip: Tensor) -> Tensor:
            return self.fc(self.gru(self.body(clip).amax((3, 4)).mT)[0])

    return Model().eval()


def test_maps_over_time_alone() -> None:
    model, _ = speakers()
    ex = explain(model, clips()).streams["fusion"]
    assert ex.features.shape == (2, 16, 7) and ex.heatmap().shape == (2, 7)
    assert close(ex.map(target=2), (ex.influence(2) * (ex.features != 0)).sum(1))


class Rate(nn.Module):
    """The map has another number of frames than the answers, or none: ``body`` returns it."""

    def __init__(self, body: nn.Module, frames: int | None) -> None:
        super().__init__()
        self.body, self.fc, self.frames = body, nn.Linear(4, 2), frames

    def forward(self, clip: Tensor, still: Tensor) -> Tensor:
        x = self.body(clip[:, None] if self.frames else still)
        if not self.frames:
            return self.fc(x.mean((2, 3)))[:, None] * clip.mean((2, 3))[..., None]
        return self.fc(F.interpolate(x.mean((3, 4)), clip.shape[1], mode="nearest").cumsum(2).mT)


def test_a_map_at_another_rate_and_one_without_time() -> None:
    torch.manual_seed(0)
    x = (random(2, 8, 9, 9), random(2, 1, 11, 11))
    slow = Rate(nn.Sequential(nn.Conv3d(1, 4, (2, 3, 3), (2, 1, 1)), nn.ReLU()), 4).eval()
    block = open_and_close(attach_se(slow, x, at="body", reduction=2))
    ex = explain(slow, x)
    influence = ex.influence(0)
    assert close(influence, ablated(slow, x, block, each(4), torch.zeros(2, 8, dtype=torch.long)), ex.logits)
    assert (
        influence.shape == (2, 4, 8)
        and ex.map(target=0).shape == (2, 4, 7, 7)
        and ex.heatmap().shape == (2, 8, 9, 9)
    )
    pairs = influence.unflatten(2, (4, 2)).mean(3)  # linear interpolation from 8 to 4 moments
    alive = ex.features.flatten(3).amax(3) > 0
    assert close(ex.map(target=0).mean((2, 3)), (pairs * alive).sum(1))

    still = Rate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), None).eval()
    block = open_and_close(attach_se(still, x, at="body", reduction=2))
    ex = explain(still, x)
    assert close(
        ex.influence(0), ablated(still, x, block, each(4), torch.zeros(2, 8, dtype=torch.long)), ex.logits
    )
    assert ex.map(target=0).shape == (2, 9, 9) and ex.heatmap().shape == (2, 11, 11)
    assert close(ex.map(target=0).mean((1, 2)), ex.influence(0).mean(2).sum(1))


def test_a_spectrogram_is_shown_as_its_map_has_it() -> None:
    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3, (1, 2), 1), nn.ReLU(), nn.AvgPool2d((1, 2)))
            self.gru, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, mfcc: Tensor) -> Tensor:
            return self.fc(self.gru(self.body(mfcc.mT[:, None]).mean(2).mT)[0])

    torch.manual_seed(0)
    model, x = Audio().eval(), random(2, 24, 13)
    block = open_and_close(attach_se(model, x, at="body", reduction=2))
    ex = explain(model, x)
    assert (
        ex.features.shape == (2, 4, 13, 6) and ex.input_size == (13, 24) and ex.heatmap().shape == (2, 13, 24)
    )
    assert ex._head.reads == "mean"
    assert close(
        ex.influence(1), ablated(model, x, block, each(4), torch.ones(2, 6, dtype=torch.long)), ex.logits
    )
    assert close(ex.map(target=1).mean(1), (ex.influence(1) * (ex.features.amax(2) > 0)).sum(1))


def test_sizes_come_from_the_input_of_that_name() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = (
                nn.Conv3d(1, 2, (1, 3, 3)),
                nn.Conv3d(3, 2, (1, 3, 3)),
                nn.Linear(4, 2),
            )

        def forward(self, face: Tensor, body: Tensor) -> Tensor:
            pooled = [self.one(face[:, None]).mean((3, 4)), self.two(body.transpose(1, 2)).mean((3, 4))]
            return self.fc(torch.cat(pooled, 1).mT)

    x = {"face": random(1, 5, 8, 8), "body": random(1, 5, 3, 6, 10)}  # (B, T, H, W) and (B, T, C, H, W)
    model = Both().eval()
    attach_se(model, x, at={"face": "one", "body": "two"})
    ex = explain(model, x)
    assert {name: e.heatmap().shape for name, e in ex.streams.items()} == {
        "face": (1, 5, 8, 8),
        "body": (1, 5, 6, 10),
    }
    detach_se(model)
    attach_se(model, x, at={"a": "one", "b": "two"})
    with pytest.raises(ValueError, match="pass size="):
        explain(model, x).streams["a"].heatmap()


# ---- targets ----------


def test_targets_of_clips_and_of_frames() -> None:
    model, _ = speakers()
    ex = explain(model, clips()).streams["face"]
    by_class = torch.stack([ex.influence(k) for k in range(3)])
    assert close(ex.influence([2, 0]), torch.stack([by_class[2, 0], by_class[0, 1]]))
    frames = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [2, 2, 1, 1, 0, 0, 2]])
    expected = torch.stack(
        [torch.stack([by_class[frames[b, t], b, :, t] for t in range(7)], 1) for b in range(2)]
    )
    assert close(ex.influence(frames), expected) and ex.heatmap(target=frames).shape == (2, 7, 8, 8)
    assert torch.equal(ex.influence(), ex.influence(ex.predicted))
    for target, message in (
        (3, r"target=\[3\] is not among the 3 classes 0..2"),
        ([0, 1, 2], "target has 3 entries, but the batch has 2 samples"),
        (frames[:, :5], r"target is \(2, 5\), but there are 2 clips of 7 frames"),
        (frames + 1, "is not among the 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            ex.influence(target)


# ---- batch mates ----------


@pytest.mark.parametrize("head", [Gru, Cells])
def test_batch_mates_do_not_matter(head: type[nn.Module]) -> None:
    model, _ = speakers(head)
    x = clips(3)
    alone = {k: v[1:2] for k, v in x.items()}
    together, apart = explain(model, x), explain(model, alone)
    scale = together.logits.abs().max()
    for name, ex in apart.streams.items():
        mates = together.streams[name]
        assert (ex.gates - mates.gates[1:2]).abs().max() <= 1e-5
        assert (ex.influence(0) - mates.influence(0)[1:2]).abs().max() <= 1e-5 * scale
        for method in ("influence", "gate"):
            assert (ex.heatmap(method, 0) - mates.heatmap(method, 0)[1:2]).abs().max() <= 1e-4
    one, two = apart.modalities(0), together.modalities(0)
    assert (one.share - two.share[1:2]).abs().max() <= 1e-5 and (
        one.gates - two.gates[1:2]
    ).abs().max() <= 1e-5


# ---- modalities ----------


def test_modalities_against_captum() -> None:
    model, blocks = speakers()
    x = clips(3)
    ex = explain(model, x)
    found = ex.modalities(1)
    gates = ex.streams["fusion"].gates
    segments = torch.arange(16) // 8

    def logits(s: Tensor) -> Tensor:
        with blocks["fusion"].override(s):
            return run(model, x)[..., 1]

    expected = torch.stack(
        [
            FeatureAblation(lambda s, t=t: logits(s)[:, t]).attribute(gates, feature_mask=segments[None])[
                :, [0, 8]
            ]
            for t in range(7)
        ],
        2,
    )
    assert found.names == ("audio", "face")
    assert found.influence.shape == (3, 2, 7) and close(found.influence, expected, ex.logits)
    assert close(
        found.influence,
        ablated(
            model,
            x,
            blocks["fusion"],
            [list(range(8)), list(range(8, 16))],
            torch.ones(3, 7, dtype=torch.long),
        ),
        ex.logits,
    )
    means = torch.stack([gates[:, :8].mean(1), gates[:, 8:].mean(1)], 1)
    assert torch.allclose(found.gates, means) and torch.allclose(
        found.gate_share, means / means.sum(1, keepdim=True)
    )
    size = expected.abs().mean(2)
    assert torch.allclose(found.share, size / size.sum(1, keepdim=True), atol=1e-4)
    assert (
        torch.allclose(found.share.sum(1), torch.ones(3))
        and (found.share[:, 0] - found.share[:, 1]).abs().min() > 1e-3
    )

    uneven = ex.modalities(1, names={"first": 2, "rest": 14})
    groups = [[0, 1], list(range(2, 16))]
    assert uneven.names == ("first", "rest")
    assert close(
        uneven.influence,
        ablated(model, x, blocks["fusion"], groups, torch.ones(3, 7, dtype=torch.long)),
        ex.logits,
    )
    assert torch.allclose(uneven.gates[:, 1], gates[:, 2:].mean(1))
    whole = ex.modalities(1, names=["all"])
    assert torch.equal(whole.share, torch.ones(3, 1))
    assert ex.streams["face"].modalities(1, names=("a", "b", "c")).gates.shape == (3, 3)


def test_modalities_of_the_only_block_and_of_images() -> None:
    model, _ = speakers(at="fuse")
    ex = explain(model, clips())
    assert isinstance(ex, Explanation) and ex.streams == {}
    assert ex.modalities(0).names == ("audio", "face") and ex.modalities(0).influence.shape == (2, 2, 7)

    torch.manual_seed(0)
    pictures, x = TwoStreams().eval(), (image(32), random(3, 1, 16, 16))
    block = open_and_close(attach_se(pictures, x, at="fuse", reduction=2))
    found = explain(pictures, x).modalities([0, 1, 2], names={"a": 3, "b": 5})
    gates = explain(pictures, x).gates
    mask = (torch.arange(8) > 2).long()[None]

    def logits(s: Tensor) -> Tensor:
        with block.override(s):
            return run(pictures, x)

    expected = FeatureAblation(logits).attribute(gates, target=torch.tensor([0, 1, 2]), feature_mask=mask)[
        :, [0, 3]
    ]
    assert found.influence.shape == (3, 2) and close(found.influence, expected, logits(gates))
    assert torch.allclose(found.share, expected.abs() / expected.abs().sum(1, keepdim=True), atol=1e-4)


def test_a_modality_that_is_not_read_has_no_share() -> None:
    model, _ = speakers()
    with torch.no_grad():
        model.head.gru.weight_ih_l0[:, 8:] = 0
        model.head.gru.weight_ih_l0_reverse[:, 8:] = 0
    found = explain(model, clips()).modalities(0)
    assert torch.allclose(found.share, torch.tensor([[1.0, 0.0]]).expand(2, 2), atol=1e-6)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert explain(model, clips()).modalities(0).share.eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("a", "b", "c")}, r"16 channels are not 3 equal segments"),
        ({"names": ("a", "a")}, r"names=\('a', 'a'\)"),
        ({"names": {"a": 8, "b": 9}}, r"do not add up to the 16 of the SE block"),
        ({"names": {"a": 16, "b": 0}}, "do not add up"),
        ({"names": "audio"}, "names='audio': give the modalities"),
        ({"names": []}, r"names=\[\]"),
        ({"target": 9}, r"target=\[9\]"),
    ],
)
def test_modalities_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model, _ = speakers()
    with pytest.raises(ValueError, match=message):
        explain(model, clips()).modalities(**options)


def test_a_model_that_does_not_name_its_modalities() -> None:
    torch.manual_seed(0)
    model, x = TwoStreams().eval(), (image(32), random(3, 1, 16, 16))
    attach_se(model, x, at="fuse")
    with pytest.raises(ValueError, match="no attribute modalities .* pass names="):
        explain(model, x).modalities()


# ---- training and evaluation ----------


class Loader:
    """Clips of several lengths, as a loader that is no DataLoader gives them: speaking is what is loud."""

    def __init__(self, lengths: tuple[int, ...] = (4, 6, 5), *, columns: int = 1) -> None:
        self.batches = []
        for seed, frames in enumerate(lengths):
            labels = (random(3, frames, columns, seed=seed) > 0).float()
            x = clips(3, frames, seed=10 * seed)
            x["audio"] = x["audio"] + 2 * labels[..., :1].repeat_interleave(4, 1)
            self.batches.append((x, labels[..., 0] if columns == 1 else labels))
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def train(model: nn.Module, loader: Any, **options: Any) -> list[dict[str, float]]:
    settings = {
        "epochs": 2,
        "optimizer": "adamw",
        "lr": 3e-3,
        "task": "multilabel",
        "device": "cpu",
        "progress": False,
    }
    return fit(model, loader, **(settings | options))


def fresh(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Speakers(**options)


def test_fit_learns_from_frames_and_from_the_streams_by_themselves() -> None:
    loader, model = Loader(), fresh(outputs=1)
    assert torch.equal(model.auxiliary["audio"].weight, fresh(outputs=1).auxiliary["audio"].weight)
    history = train(model, loader, epochs=12, val=loader, lr=2e-2)
    assert loader.epochs == list(range(12)) and history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["val_mean_ap"] > 0.8
    alone = model.eval().audio(loader.batches[0][0]["audio"].mT)
    assert (model.auxiliary["audio"](alone.mT)[..., 0] > 0).eq(loader.batches[0][1] > 0).float().mean() > 0.7
    without = fresh(outputs=1)
    train(without, loader, auxiliary=0.0)
    assert torch.equal(without.auxiliary["audio"].bias, fresh(outputs=1).auxiliary["audio"].bias)


def test_the_objective_is_the_loss_and_the_weighted_sum_of_the_further_ones() -> None:
    loader, seen = Loader((4,)), []
    model, twin = fresh(outputs=1), fresh(outputs=1).train()
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            {
                id(p): p.grad.clone()
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None
            }
        )
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        history = train(model, loader, epochs=1, auxiliary=0.25)
    x, labels = loader.batches[0]
    out = twin(**x)
    losses = [
        F.binary_cross_entropy_with_logits(y[..., 0], labels)
        for y in (out["logits"], *out["auxiliary"].values())
    ]
    (losses[0] + 0.25 * (losses[1] + losses[2])).backward()
    assert history[0]["loss"] == pytest.approx(losses[0].item(), rel=1e-2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (
            torch.allclose(seen[0][id(p)], q.grad, atol=5e-3 * float(q.grad.abs().max()) + 1e-7)
            or q.grad.abs().max() < 1e-6
        )


def test_flattened_frames_and_several_outputs_learn_alike() -> None:
    class Flat(Speakers):
        def forward(self, face: Tensor, audio: Tensor) -> Any:
            out = super().forward(face, audio)
            return {"logits": out["logits"].flatten(0, 1)} if self.training else out.flatten(0, 1)

    for columns in (1, 2):
        loader = Loader(columns=columns)
        states = []
        for kind in (Speakers, Flat):
            torch.manual_seed(0)
            model = kind(outputs=columns)
            train(model, loader, auxiliary=0.0)
            states.append({k: v for k, v in model.state_dict().items() if "auxiliary" not in k})
            logits, targets = predict(model, loader)
            assert logits.shape == targets.shape == (45, columns)
            assert torch.equal(targets, torch.cat([y.reshape(-1, columns) for _, y in loader.batches]))
            expected = torch.cat([run(model.eval(), x).reshape(-1, columns) for x, _ in loader.batches])
            assert torch.allclose(logits, expected, atol=1e-5)
            scores = evaluate(model, loader, task="multilabel")
            again = attribute_scores(logits, targets)
            assert scores["mean_ap"] == pytest.approx(float(again["ap"].nanmean()))
        assert all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(states[0].values(), states[1].values(), strict=True)
        )


def test_classes_of_frames() -> None:
    loader = Loader()
    loader.batches = [(x, y.long()) for x, y in loader.batches]
    model = fresh(outputs=2)
    train(model, loader, task="multiclass", epochs=1)
    logits, targets = predict(model, loader)
    scores = evaluate(model, loader)
    assert scores["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)


def test_clips_of_one_frame_beside_longer_ones() -> None:
    loader = Loader((1, 4))
    model = fresh(outputs=1, flat=True).eval()
    logits, targets = predict(model, loader)
    assert logits.shape == (15, 1)
    assert torch.equal(targets[:, 0], torch.cat([y.flatten() for _, y in loader.batches]))
    assert set(evaluate(model, loader, task="multilabel")) >= {"mean_ap", "loss"}


def test_targets_that_are_not_one_a_frame() -> None:
    loader = Loader((4,))
    loader.batches = [(x, y[:, :3]) for x, y in loader.batches]
    for ask in (
        lambda: train(fresh(outputs=1), loader),
        lambda: evaluate(fresh(outputs=1), loader, task="multilabel"),
    ):
        with pytest.raises(
            ValueError,
            match=r"targets \(3, 3\) do not fit logits \(3, 4, 1\): the model answers once a frame",
        ):
            ask()


def test_the_weight_of_the_further_losses_is_a_setting_of_a_run(tmp_path: Path) -> None:
    loader = Loader((4, 4))
    train(fresh(outputs=1), loader, out=tmp_path / "new", epochs=1, auxiliary=0.3)
    assert len(train(fresh(outputs=1), loader, out=tmp_path / "new", epochs=1, auxiliary=0.3)) == 1
    with pytest.raises(ValueError, match=r"auxiliary was 0.3, now 0.4"):
        train(fresh(outputs=1), loader, out=tmp_path / "new", epochs=1)


def test_a_detector_with_blocks_that_differ_goes_to_a_file_and_back(tmp_path: Path) -> None:
    from selib.attach import BlockOptions, attach_blocks

    torch.manual_seed(0)
    options = {"streams": ["audio", "face"], "widths": [4, 4, 6], "width": 10}
    model = build("active_speaker", 1, image_size=112, **options).eval()
    places = {"face": "face.spatial", "fusion": "fuse", "late": "head"}
    kinds = {"face": BlockOptions(100, "paper"), "fusion": BlockOptions(4), "late": BlockOptions(1)}
    for seed, block in enumerate(attach_blocks(model, model.example(), places, kinds).values()):
        open_and_close(block, seed)
    save_checkpoint(
        model,
        tmp_path / "m.safetensors",
        architecture="active_speaker",
        classes=["speaking"],
        image_size=112,
        task="multilabel",
        **options,
    )
    again, meta = load_checkpoint(tmp_path / "m.safetensors")
    for name, block in attached(model).items():
        other = attached(again)[name]
        assert (block.gain, block.layout, block.bottleneck, block.frames) == (
            other.gain,
            other.layout,
            other.bottleneck,
            other.frames,
        )
    assert attached(again)["late"].layout == "B*C" and [b.bottleneck for b in attached(again).values()] == [
        1,
        5,
        10,
    ]
    x = model.example(5)
    assert torch.equal(run(again, x), run(model, x)) and meta["task"] == "multilabel"


# ---- gates without labels ----------


def batches(count: int = 6, frames: int = 7) -> list[Any]:
    return [clips(3, frames, seed=20 * i) for i in range(count)]


@pytest.mark.slow
def test_gates_of_one_block_from_cached_clips() -> None:
    model, _ = speakers(at="fuse")
    loader = batches()
    cache = cache_features(model, loader)
    logits = torch.cat([run(model, x) for x in loader])
    assert cache.logits.shape == (18, 7, 3) and torch.allclose(cache.logits, logits, atol=1e-5)
    assert close(cache.run(cache.scales), logits) and close(cache.run(cache.scales, batch=5), logits)
    block = attached(model)[""]
    scales = torch.rand(18, 16, generator=torch.Generator().manual_seed(0))
    for i, x in enumerate(loader):
        with block.override(scales[3 * i : 3 * i + 3] / block.gain):
            assert close(cache.run(scales)[3 * i : 3 * i + 3], run(model, x), logits)
    kinds = channel_test(block, cache, task="multilabel")
    assert kinds["original"].all() and kinds["gated"].shape == (18, 7, 3)
    assert channel_test(block, cache)["gated"].shape == (18, 7)
    with pytest.raises(ValueError, match="the SE block was trained with the network"):
        fit_gates(model, cache, task="multilabel")
    model, _ = speakers(at="fuse", gated=False)
    cache, means = cache_features(model, loader), []
    for sparsity in (0.0, 30.0):
        report = fit_gates(model, cache, sparsity, task="multilabel", epochs=150)
        means.append(float(explain(model, loader[0]).gates.mean()))
        assert report.images == 18 and 0 <= report.agreement <= 1
    assert means[1] < 0.1 < means[0]
    with pytest.raises(ValueError, match="not global average pooling"):
        cache.influence()


def student_and_gates(model: nn.Module, blocks: dict[str, SEBlock], x: Any) -> tuple[Tensor, list[Tensor]]:
    gates: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, o: gates.append(m.gates(a[0]))) for b in blocks.values()]
    student = model(**x)
    for handle in handles:
        handle.remove()
    return student, gates


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_the_loss_of_clips_is_the_designs(task: Any) -> None:
    """One step against the equation, of cached clips and of the same ones in a loader; the gradient through
    the GRU is the model's.
    """
    for at in ("fuse", {"face": "face.spatial", "fusion": "fuse"}):
        model, blocks = speakers(at=at, gated=False)
        loader = batches(2)
        teachers = [run(model, x) for x in loader]
        with gradients_seen() as seen:
            fit = fit_gates if at == "fuse" else fit_stream_gates
            fit(model, loader, 0.7, task=task, epochs=1)
        if at == "fuse":
            held = torch.randperm(6, generator=torch.Generator().manual_seed(0))[2:]
            x = {k: torch.cat([b[k] for b in loader])[held] for k in loader[0]}
            teacher = torch.cat(teachers)[held]
        else:
            x, teacher = loader[0], teachers[0]
        torch.manual_seed(0)
        for block in blocks.values():
            block.restart("paper")
        student, gates = student_and_gates(model, blocks, x)
        if task == "multilabel":
            divergence = bernoulli_kl(teacher, student).sum(2).mean()
        else:
            divergence = (
                (teacher.softmax(2) * (teacher.log_softmax(2) - student.log_softmax(2))).sum(2).mean()
            )
        loss = divergence + 0.7 * torch.stack([s.mean() for s in gates]).mean()
        weights = [p for b in blocks.values() for p in (*b.fc1.parameters(), *b.fc2.parameters())]
        expected = torch.autograd.grad(loss, weights)
        assert len(seen) == 1 and len(gates) == len(blocks)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[0], expected, strict=True))


@pytest.mark.slow
def test_gates_of_streams_side_by_side() -> None:
    model, blocks = speakers(outputs=1, gated=False)
    loader = [
        (clips(2, frames, seed=frames), torch.zeros(2, frames)) for frames in (4, 5, 6, 7, 8)
    ]  # of several lengths
    model.train()
    model.face.eval()
    model.classifier.bias.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    attached(model)["face"].fc1.weight.requires_grad_(False)
    before, rng, n_hooks = snapshot(model), torch.get_rng_state(), hooks(model)
    reports = {}
    for sparsity in (0.0, 30.0):
        reports[sparsity] = fit_stream_gates(model, loader, sparsity, task="multilabel", epochs=15)
        assert (
            same(snapshot(model), before)
            and torch.equal(torch.get_rng_state(), rng)
            and hooks(model) == n_hooks
        )
    assert not blocks["face"].fc1.weight.requires_grad and blocks["face"].fc2.weight.requires_grad
    assert all(p.grad is None and b.gain == 1 for b in blocks.values() for p in b.parameters())
    report = reports[30.0]
    assert isinstance(report, StreamGateReport) and set(report.open_gates) == {"face", "fusion"}
    assert (
        all(report.open_gates[n] <= reports[0.0].open_gates[n] for n in blocks)
        and max(report.open_gates.values()) < 0.2
    )
    assert (
        report.held_out == 2
        and report.epochs == 15
        and report.seconds > 0
        and 0 <= report.agreement_positive <= 1
    )
    assert set(report.as_dict()) >= {"agreement", "open_gates"}


@pytest.mark.slow
def test_the_streams_agree_with_the_network_as_it_was() -> None:
    model, blocks = speakers(outputs=1, gated=False)
    loader = batches(12)
    logits = run(model, loader[9])
    wanted = logits > 0
    report = fit_stream_gates(model, loader, 0.0, task="multilabel", epochs=10)
    assert torch.equal(run(model, loader[9]), logits) and all(b.transparent for b in blocks.values())
    with ExitStack() as stack:
        for block in blocks.values():
            stack.enter_context(block.override(lambda s: s))  # here the gates act
        got = run(model, loader[9]) > 0  # the tenth batch of twelve is held out
        gates = explain(model, loader[9])  # what reaches the fusion depends on the gates of the face
    assert report.agreement == pytest.approx(float((got == wanted).double().mean()), abs=1e-9)
    assert report.agreement_positive == pytest.approx(float(got[wanted].double().mean()))
    for name in blocks:
        assert report.open_gates[name] == pytest.approx(
            float((gates.streams[name].gates > 0.5).double().mean())
        )
    first = {n: b.fc2.weight.clone() for n, b in blocks.items()}
    other, others = speakers(outputs=1, gated=False)
    torch.rand(3)
    fit_stream_gates(other, loader, 0.0, task="multilabel", epochs=10)
    assert all(torch.equal(first[n], others[n].fc2.weight) for n in first)  # the seed decides


def test_streams_that_act_are_refused_and_an_interrupted_fit_changes_nothing() -> None:
    model, blocks = speakers(outputs=1)
    loader = batches(3)
    logits, weights = run(model, loader[0]), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the SE block was trained with the network, which needs it"):
        fit_stream_gates(model, loader, epochs=1)
    assert torch.equal(run(model, loader[0]), logits) and same(dict(model.state_dict()), dict(weights))

    class Stops(list[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            if self.passes == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    for before in (False, True):  # with fresh blocks, then with some that were fitted before
        model, blocks = speakers(outputs=1, gated=False)
        if before:
            fit_stream_gates(model, loader, epochs=1)
        logits, weights = run(model, loader[0]), copy.deepcopy(model.state_dict())
        kept = [(b.gain, b.transparent, b.task) for b in blocks.values()]
        with pytest.raises(KeyboardInterrupt):
            fit_stream_gates(model, Stops(loader), task="multilabel", epochs=5)
        assert [(b.gain, b.transparent, b.task) for b in blocks.values()] == kept
        assert torch.equal(run(model, loader[0]), logits) and same(dict(model.state_dict()), dict(weights))


def test_streams_of_images_have_sparse_gates_too() -> None:
    torch.manual_seed(0)
    model, x = TwoStreams().eval(), (image(32), random(3, 1, 16, 16))
    attach_se(model, x, at={"face": "face_encoder", "body": "body_encoder", "fusion": "fuse"}, reduction=1)
    report = fit_stream_gates(model, [(x, torch.zeros(3))] * 3, 30.0, epochs=40, lr=0.05)
    assert max(report.open_gates.values()) < 0.3 and report.held_out == 3


def test_a_loader_that_shuffles_is_refused() -> None:
    class Turns(list[Any]):
        def __iter__(self) -> Any:
            self.append(self.pop(0))
            return super().__iter__()

    model, blocks = speakers(gated=False)
    before = {name: block.fc2.weight.clone() for name, block in blocks.items()}
    with pytest.raises(ValueError, match="gives other batches in every pass: turn off its shuffling"):
        fit_stream_gates(model, Turns(batches(3)), epochs=1)
    assert all(torch.equal(before[name], block.fc2.weight) for name, block in blocks.items())


def test_each_kind_of_model_has_its_own_function() -> None:
    model, _ = speakers()
    with pytest.raises(ValueError, match="one attached SE block is needed, this one has: face, fusion"):
        fit_gates(model, batches(2))
    with pytest.raises(ValueError, match="the model has no SE blocks"):
        fit_stream_gates(Speakers(), batches(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -1.0}, "sparsity=-1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"loader": iter([])}, "the loader is an iterator, which gives its batches once"),
        ({"loader": []}, "batches in the loader: 0, but fit_stream_gates needs at least two"),
        ({"loader": [clips()]}, "batches in the loader: 1"),
    ],
)
def test_what_several_blocks_do_not_offer(options: dict[str, Any], message: str) -> None:
    model, _ = speakers(gated=False)
    with pytest.raises(ValueError, match=message):
        fit_stream_gates(model, **({"loader": batches(2)} | options))


def test_clips_of_several_lengths_cannot_be_cached() -> None:
    model, _ = speakers(at="fuse")
    with pytest.raises(
        ValueError, match="clips of 5 to 7 frames: to be kept in memory they must be equally long"
    ):
        fit_gates(model, [clips(2, 7), clips(2, 5)], epochs=1)
    bypassed, _ = speakers(at="face.spatial")
    with pytest.raises(ValueError, match="the head reads more than the gated map"):
        cache_features(bypassed, batches(2))


# ---- Light-ASD ----------
# Liao et al., "A Light Weight Model for Active Speaker Detection", CVPR 2023, from its description: two
# inputs, two encoders of factorised convolutions, a bidirectional GRU, several forward methods, and a
# classifier that is not part of it.


class Paths(nn.Module):
    """Two paths of factorised convolutions, of kernels 3 and 5, their sum, and a pointwise convolution."""

    def __init__(self, before: int, width: int, *, visual: bool, halves: bool = False) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if visual else (nn.Conv2d, nn.BatchNorm2d)

        def layer(inputs: int, kernel: Any, stride: Any = 1) -> nn.Sequential:
            return nn.Sequential(
                conv(inputs, width, kernel, stride, tuple(k // 2 for k in kernel), bias=False),
                norm(width),
                nn.ReLU(),
            )

        stride = (1, 2, 2) if halves else 1
        for k in (3, 5):
            space, time = ((1, k, k), (k, 1, 1)) if visual else ((k, 1), (1, k))
            self.add_module(f"path{k}", nn.Sequential(layer(before, space, stride), layer(width, time)))
        self.last = layer(width, (1, 1, 1) if visual else (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.path3(x) + self.path5(x))


class VisualEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.pool1 = (
            Paths(1, 32, visual=True, halves=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.block2, self.pool2 = Paths(32, 64, visual=True), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.block3, self.maxpool = Paths(64, 128, visual=True), nn.AdaptiveMaxPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.pool2(self.block2(self.pool1(self.block1(x)))))
        batch, channels, frames, height, width = x.shape
        x = self.maxpool(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
        return x.view(batch, frames, channels)


class AudioEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.pool1 = Paths(1, 32, visual=False), nn.MaxPool2d((1, 3), (1, 2), (0, 1))
        self.block2, self.pool2 = Paths(32, 64, visual=False), nn.MaxPool2d((1, 3), (1, 2), (0, 1))
        self.block3 = Paths(64, 128, visual=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block3(self.pool2(self.block2(self.pool1(self.block1(x))))).mean(2).transpose(1, 2)


class BGRU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        ahead, back = self.gru(x)[0].chunk(2, dim=2)
        return F.gelu(ahead + back)


class LightASD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visualEncoder, self.audioEncoder, self.GRU = VisualEncoder(), AudioEncoder(), BGRU(128)

    def forward_visual_frontend(self, x: Tensor) -> Tensor:
        return self.visualEncoder((x[:, None] / 255 - 0.4161) / 0.1688)

    def forward_audio_frontend(self, x: Tensor) -> Tensor:
        return self.audioEncoder(x[:, None].transpose(2, 3))

    def forward_audio_visual_backend(self, audio: Tensor, visual: Tensor) -> Tensor:
        return self.GRU(audio + visual).reshape(-1, 128)

    def forward_visual_backend(self, visual: Tensor) -> Tensor:
        return visual.reshape(-1, 128)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        heard, seen = self.forward_audio_frontend(audio), self.forward_visual_frontend(visual)
        return self.forward_audio_visual_backend(heard, seen), self.forward_visual_backend(seen)


class Scored(nn.Module):
    """All that a user adds: the classifier, which Light-ASD keeps in its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(128, 2)

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        return self.classifier(self.model(audio, visual)[0])


@pytest.fixture(scope="module")
def light_asd() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Scored(LightASD()).eval()
        for p in model.parameters():
            p.data.mul_(1.5)
    return model, (
        random(2, 20, 13),
        255 * torch.rand(2, 5, 112, 112, generator=torch.Generator().manual_seed(0)),
    )


def test_light_asd_has_its_published_size(light_asd: Any) -> None:
    model, (audio, visual) = light_asd
    assert sum(p.numel() for p in model.model.parameters()) == pytest.approx(1.02e6, rel=0.03)
    assert run(model, (audio, visual)).shape == (10, 2)


LIGHT_SITES = {
    "inside": (
        {"face": "model.visualEncoder.block3", "audio": "model.audioEncoder.block3"},
        (128, 5, 14, 14),
        (128, 13, 5),
    ),
    "whole": ({"face": "model.visualEncoder", "audio": "model.audioEncoder"}, (128, 5), (128, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", LIGHT_SITES)
def test_light_asd_is_explained_without_editing_it(light_asd: Any, place: str) -> None:
    model, x = light_asd
    at, face_shape, audio_shape = LIGHT_SITES[place]
    before, names, n_hooks = run(model, x), list(model.state_dict()), hooks(model)
    blocks = attach_se(model, x, at=at)
    try:
        assert torch.equal(run(model, x), before)  # attaching changes nothing
        for seed, block in enumerate(blocks.values()):
            open_and_close(block, seed)
        ex = explain(model, x)
        assert ex.logits.shape == (2, 5, 2) and torch.equal(ex.logits.flatten(0, 1), run(model, x))
        assert (
            ex.streams["face"].features.shape[1:] == face_shape
            and ex.streams["audio"].features.shape[1:] == audio_shape
        )
        targets = torch.ones(2, 5, dtype=torch.long)
        some = list(range(0, 128, 32))
        for name, block in blocks.items():
            found = ex.streams[name].influence(1)
            expected = ablated(model, x, block, [[c] for c in some], targets)
            assert (
                found.shape == (2, 128, 5)
                and close(found[:, some], expected, ex.logits)
                and expected.abs().max() > 0
            )
        sizes = {n: tuple(e.heatmap(target=1).shape) for n, e in ex.streams.items()}
        inside = {"face": (2, 5, 112, 112), "audio": (2, 13, 20)}
        assert sizes == (inside if place == "inside" else {"face": (2, 5), "audio": (2, 5)})
        if place == "inside":
            assert ex.streams["face"]._head.reads == "max" and ex.streams["audio"]._head.reads == "mean"
            alone = explain(model, tuple(t[1:] for t in x)).streams["face"]
            assert (
                alone.influence(1) - ex.streams["face"].influence(1)[1:]
            ).abs().max() <= 1e-5 * ex.logits.abs().max()
    finally:
        detach_se(model)
    assert (
        torch.equal(run(model, x), before) and list(model.state_dict()) == names and hooks(model) == n_hooks
    )
    assert not any("forward" in vars(m) for m in model.modules())


# ---- our own detector ----------


def test_the_compact_detector_is_explained_in_all_its_streams() -> None:
    torch.manual_seed(0)
    model = build("active_speaker", 1, image_size=112, widths=(4, 4, 6), width=8).eval()
    x = model.example(6, 2)
    blocks = attach_se(model, x, at=model.sites)
    for seed, block in enumerate(blocks.values()):
        open_and_close(block, seed)
    ex = explain(model, x)
    for name, block in blocks.items():
        expected = ablated(model, x, block, each(block.channels), torch.zeros(2, 6, dtype=torch.long))
        assert close(ex.streams[name].influence(), expected, ex.logits)
        assert math.prod(ex.streams[name].heatmap().shape[2:]) == (1 if name == "fusion" else 112 * 112)
    assert ex.modalities().names == ("audio", "face", "body")
    with SEExplainer(model) as explainer:  # clips of other lengths, one after the other
        lengths = [
            explainer(model.example(frames)).streams["face"].influence().shape[2] for frames in (3, 6, 4)
        ]
    assert lengths == [3, 6, 4]
