"""The SE block: its equation by hand in every layout, against torchvision's block, and the promises of its
docstring.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from selib.se import SEBlock, channels_first, scaled
from selib.select import TopK

SPACES = {"vector": (), "1-D": (7,), "2-D": (3, 4), "3-D": (2, 3, 4)}


def randomized(block: SEBlock, seed: int = 0) -> SEBlock:
    """The block with weights that open and close gates clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return block


def features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(block: SEBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (B, C) and F' of a (B, C, N) map, one number at a time."""
    w1, b1, w2, b2 = (
        t.tolist() for t in (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    )
    gates, out = [], []
    for sample in x.double().tolist():
        z = [sum(channel) / len(channel) for channel in sample]
        hidden = [
            max(0.0, sum(w * v for w, v in zip(row, z, strict=True)) + b)
            for row, b in zip(w1, b1, strict=True)
        ]
        logit = [
            sum(w * v for w, v in zip(row, hidden, strict=True)) + b for row, b in zip(w2, b2, strict=True)
        ]
        s = [1 / (1 + 2.718281828459045**-v) for v in logit]
        gates.append(s)
        out.append([[block.gain * g * v for v in channel] for g, channel in zip(s, sample, strict=True)])
    return torch.tensor(gates), torch.tensor(out)


def test_a_block_of_two_channels_with_numbers_one_can_check_on_paper() -> None:
    block = SEBlock(2, 2, start="paper")
    with torch.no_grad():
        block.fc1.weight.copy_(torch.tensor([[1.0, -1.0]]))
        block.fc1.bias.fill_(1)
        block.fc2.weight.copy_(torch.tensor([[torch.log(torch.tensor(3.0))], [0.0]]))
        block.fc2.bias.zero_()
    x = torch.tensor(
        [[[1.0, 3.0], [0.0, 4.0]]]
    )  # means 2 and 2: hidden = 2 - 2 + 1 = 1, gates = σ(ln 3) = 3/4 and σ(0) = 1/2
    assert torch.allclose(block.gates(x), torch.tensor([[0.75, 0.5]]))
    assert torch.allclose(block(x), torch.tensor([[[0.75, 2.25], [0.0, 2.0]]]))


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_equation_in_every_layout(space: tuple[int, ...], start: str) -> None:
    x = features(3, 6, *space)
    block = randomized(SEBlock(6, 2, start=start))
    gates, out = by_hand(block, x.flatten(2) if space else x[..., None])
    assert torch.allclose(block.gates(x), gates, atol=1e-6)
    assert torch.allclose(block(x), out.reshape(x.shape), atol=1e-5)

    last = randomized(SEBlock(6, 2, start=start, layout="B*C"))
    moved = x.movedim(1, -1)
    assert torch.allclose(last.gates(moved), gates, atol=1e-6)
    assert torch.allclose(last(moved), block(x).movedim(1, -1), atol=1e-6)
    assert last(moved).shape == moved.shape


def test_a_class_token_is_gated_but_not_squeezed() -> None:
    tokens = features(2, 1 + 6, 4)
    block = randomized(SEBlock(4, 1, layout="B*C", prefix=1, grid=(2, 3)))
    plain = randomized(SEBlock(4, 1, layout="B*C"))
    assert torch.allclose(block.gates(tokens), plain.gates(tokens[:, 1:]))
    expected = tokens * block.gain * block.gates(tokens)[:, None]
    assert torch.allclose(block(tokens), expected)
    assert channels_first(tokens, "B*C", 1).shape == (2, 4, 6)
    assert torch.equal(channels_first(tokens, "B*C", 1)[:, :, 0], tokens[:, 1])


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("layout", ["BC*", "B*C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_identity_start_changes_nothing_at_all(
    space: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = 1e3 * features(4, 5, *space).to(dtype)
    x = x if layout == "BC*" else x.movedim(1, -1)
    out = SEBlock(5, layout=layout)(x)
    assert torch.equal(out, x) and out.dtype == dtype
    assert not torch.equal(SEBlock(5, layout=layout, start="paper")(x), x)


def test_the_identity_start_learns() -> None:
    block, x = SEBlock(5, 2), features(8, 5, 4)
    optimizer = torch.optim.SGD(block.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (block(x) ** 2).sum().backward()
        optimizer.step()
    assert (block.gates(x) < 0.45).all()
    assert block.fc1.weight.grad is not None and block.fc1.weight.grad.abs().max() > 0


def test_the_paper_start_is_torchvisions_block() -> None:
    ours, theirs = SEBlock(12, 4, start="paper"), SqueezeExcitation(12, 3)
    theirs.load_state_dict(
        {k: v[..., None, None] if v.ndim == 2 else v for k, v in ours.state_dict().items()}, strict=True
    )
    x = features(3, 12, 5, 4)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours.fc1.out_features == theirs.fc1.out_channels == 3


@pytest.mark.parametrize(("channels", "reduction", "width"), [(64, 16, 4), (5, 16, 1), (10, 4, 2), (7, 1, 7)])
def test_the_width_of_the_bottleneck(channels: int, reduction: int, width: int) -> None:
    assert SEBlock(channels, reduction).fc1.out_features == width


def test_restart_draws_new_weights_and_sets_the_form() -> None:
    block = SEBlock(6, 2)
    assert block.gain == 2 and not block.fc2.weight.any() and block.fc1.weight.any()
    before = block.fc1.weight.clone()
    block.restart("paper")
    assert block.gain == 1 and block.fc2.weight.any() and block.fc2.bias.any()
    assert not torch.equal(block.fc1.weight, before)
    block.restart("identity")
    assert torch.equal(block(features(2, 6, 3)), features(2, 6, 3))


# ---- override ----------


def test_override_by_tensor_and_by_function() -> None:
    block, x = randomized(SEBlock(4, 1)), features(3, 4, 5)
    own, plain = block.gates(x), block(x)
    one = torch.tensor([1.0, 0.0, 0.5, 0.25])
    with block.override(one):
        assert torch.equal(block.gates(x), one.expand(3, 4))
        assert torch.allclose(block(x), 2 * one[:, None] * x)
        with block.override(lambda s: s * TopK(1).mask(s)):
            assert torch.equal(block.gates(x), own * (own == own.amax(1, keepdim=True)))
        assert torch.equal(block.gates(x), one.expand(3, 4))
    assert torch.equal(block(x), plain)


def test_override_ends_with_an_error() -> None:
    block, x = randomized(SEBlock(4, 1)), features(3, 4, 5)
    plain = block(x)
    with pytest.raises(RuntimeError, match="stop"), block.override(torch.zeros(4)):
        assert not block(x).any()
        raise RuntimeError("stop")
    assert torch.equal(block(x), plain)


# ---- what the gates depend on ----------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 10**6))
def test_gates_lie_between_0_and_1_and_do_not_depend_on_batch_mates_or_positions(
    batch: int, channels: int, space: list[int], seed: int
) -> None:
    x = features(batch, channels, *space, seed=seed)
    block = randomized(SEBlock(channels, 2), seed)
    gates = block.gates(x)
    assert gates.shape == (batch, channels) and ((gates >= 0) & (gates <= 1)).all()
    alone = torch.cat([block(x[i : i + 1]) for i in range(batch)])
    assert torch.allclose(block(x), alone, atol=1e-5)
    if space:
        order = torch.randperm(x.flatten(2).shape[2], generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(block.gates(x.flatten(2)[:, :, order]), gates, atol=1e-5)


def test_autocast_keeps_the_gates_in_float32() -> None:
    block, x = randomized(SEBlock(8, 2)), features(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x[:, :, 0] @ x[:, :, 0].mT).dtype == torch.bfloat16  # autocast is on
        gates, out = block.gates(x), block(x.bfloat16())
    assert gates.dtype == torch.float32 and torch.equal(gates, block.gates(x))
    assert out.dtype == torch.bfloat16


def test_scaled_keeps_shape_and_dtype() -> None:
    x, gates = torch.ones(2, 3, 4, dtype=torch.float16), torch.tensor([[0.5, 1.0, 0.0], [1.0, 0.25, 2.0]])
    out = scaled(x, gates, 2.0, "BC*")
    assert out.dtype == torch.float16 and torch.equal(out[:, :, 0], (2 * gates).half())
    tokens = scaled(x.movedim(1, -1), gates, 2.0, "B*C")
    assert torch.equal(tokens, out.movedim(1, -1))


def test_the_child_features_sees_the_map_before_the_gates() -> None:
    block, x = randomized(SEBlock(4, 1)), features(2, 4, 3)
    seen: list[Tensor] = []
    block.features.register_forward_hook(lambda m, args, output: seen.append(output))
    out = block(x)
    assert len(seen) == 1 and torch.equal(seen[0], x) and not torch.equal(out, x)


# ---- state and errors ----------


def test_state_round_trip_and_deepcopy() -> None:
    block, x = randomized(SEBlock(6, 2)), features(2, 6, 3)
    assert list(block.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    other = SEBlock(6, 2)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))
    twin = copy.deepcopy(block)
    nn.init.zeros_(twin.fc2.weight)
    assert torch.equal(other(x), block(x)) and not torch.equal(twin(x), block(x))


def test_half_a_state_is_refused() -> None:
    state = SEBlock(6, 2).state_dict()
    del state["fc2.bias"]
    with pytest.raises(RuntimeError, match=r"fc2\.bias"):
        SEBlock(6, 2).load_state_dict(state)


@pytest.mark.parametrize(("layout", "axis"), [("BC*", "axis 1"), ("B*C", "axis -1")])
def test_wrong_channels(layout: str, axis: str) -> None:
    with pytest.raises(ValueError, match=rf"6 channels, but the feature map \(2, 5, 4\) has . on {axis}"):
        SEBlock(6, layout=layout)(torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"reduction": 0}, "reduction=0"),
        ({"start": "zero"}, "start='zero'"),
        ({"layout": "NCHW"}, "layout='NCHW'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SEBlock(**({"channels": 8} | arguments))
    if "start" in arguments:
        with pytest.raises(ValueError, match=message):
            SEBlock(8).restart("zero")
