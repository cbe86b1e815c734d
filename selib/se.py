"""The squeeze-and-excitation block (Hu et al., CVPR 2018), placed before a classifier as in Roxo et al.
(2024).

:class:`SEBlock` has one SE vector for all classes, :class:`TargetSEBlock` one for each; the bottleneck of
:class:`HeadSEBlock` is the classifier itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layout = Literal["BC*", "B*C"]
"""Where the channels are: ``"BC*"`` is (B, C, *space), ``"B*C"`` is (B, *space, C), tokens included."""

Start = Literal["identity", "paper"]
Form = Literal["bottleneck", "head"]
""""bottleneck" as published; "head": the classifier is the bottleneck, see :class:`HeadSEBlock`."""

LEAST = 1e-6  # what a standard deviation is at least, where it divides
BLOCK = "_selib_se"  # a module whose output is gated carries its block under this name


def channels_first(x: Tensor, layout: Layout, prefix: int = 0) -> Tensor:
    """View a feature map as (B, C, *space), without the ``prefix`` leading tokens that are no positions."""
    if layout == "BC*":
        return x
    return x[:, prefix:].movedim(-1, 1) if prefix else x.movedim(-1, 1)


def scaled(x: Tensor, gates: Tensor, gain: float, layout: Layout) -> Tensor:
    """F' = gain·s·F: a map in its own layout and gates (B, C) -> the same shape and dtype."""
    s = (gain * gates).to(x.dtype)
    ones = [1] * (x.ndim - 2)
    return x * (s.reshape(*s.shape, *ones) if layout == "BC*" else s.reshape(s.shape[0], *ones, -1))


class SEBlock(nn.Module):
    """Squeeze, excite, scale: s = σ(W₂ ReLU(W₁ mean(F))), F' = g·s·F.

    The gates ``s`` are the SE vector of the paper. With ``start="identity"`` W₂ and its bias are zero, so
    s = ½, and the gain g is 2: the block changes nothing until it is trained. With ``start="paper"`` the
    weights start as PyTorch's layers do and g = 1, the block as published.

    The children ``features`` and ``vector`` are identities through which F and s pass, for hooks. A block
    that is ``transparent``, as ``fit_gates`` leaves it, reports its gates and lets F pass unchanged.

    Args:
        channels: C.
        reduction: r; the bottleneck has max(1, C // r) units.
        start: see above.
        layout: see :data:`Layout`; *space may be empty, 1-D, 2-D or 3-D.
        prefix: leading tokens of a (B, N, C) map that are no positions (1 for a class token). They are gated,
            since the classifier may read them, but neither squeezed nor shown.
        grid: the spatial shape of the tokens of a (B, N, C) map; ``None`` when the map has its own.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        start: Start = "identity",
        layout: Layout = "BC*",
        prefix: int = 0,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(
                f"channels and reduction must be at least 1, got channels={channels}, reduction={reduction}"
            )
        if layout not in ("BC*", "B*C"):
            raise ValueError(f'layout={layout!r} is unknown: use "BC*" or "B*C"')
        self.channels = channels
        self.layout: Layout = layout
        self.prefix = prefix
        self.grid = grid
        # Set by attach_se: the module whose output is gated, its stream, whether the model answers once a
        # frame, and the module whose output shows the grid of another input.
        self.site = self.stream = self.grid_from = ""
        self.frames = self.transparent = False
        self.task = "multiclass"  # or "multilabel": what the outputs were, when the block was trained
        self.features, self.vector = nn.Identity(), nn.Identity()
        self.bottleneck = max(1, channels // reduction)
        self._override: Tensor | Callable[[Tensor], Tensor] | None = None
        self.register_load_state_dict_pre_hook(_keep_own_weights)
        self._make()
        self.restart(start)

    def _make(self) -> None:
        self.fc1 = nn.Linear(self.channels, self.bottleneck)
        self.fc2: nn.Linear | Stacked = nn.Linear(self.bottleneck, self.channels)

    def restart(self, start: Start) -> None:
        """Initialise the weights anew; the block acts on F, transparent before or not."""
        if start not in ("identity", "paper"):
            raise ValueError(f'start={start!r} is unknown: use "identity" or "paper"')
        self.gain = 2.0 if start == "identity" else 1.0
        self.transparent = False
        self._reset(start)

    def _reset(self, start: Start) -> None:
        for layer in (self.fc1, self.fc2):
            layer.reset_parameters()
        if start == "identity":
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def squeeze(self, x: Tensor) -> Tensor:
        """z = mean of F over its positions: F in its own layout -> (B, C)."""
        z = channels_first(x, self.layout, self.prefix)
        return z.flatten(2).mean(2) if z.ndim > 2 else z

    def excite(self, z: Tensor) -> Tensor:
        """The gates (B, C) in (0, 1) of z (B, C), always computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return self.opened(self.evidence(z))

    def evidence(self, z: Tensor) -> Tensor:
        """What the gates are learned from, and no learning changes: z itself."""
        return z.to(self.fc1.weight.dtype)

    def opened(self, evidence: Tensor) -> Tensor:
        """s = σ(W₂ ReLU(W₁ z)): (B, C) -> gates (B, C) in (0, 1)."""
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(evidence))))

    def gates(self, x: Tensor) -> Tensor:
        """The SE vector (B, C) of a feature map, or what :meth:`override` puts in its place."""
        gates = self.excite(self.squeeze(x))
        if self._override is None:
            return gates
        if callable(self._override):
            return self._override(gates)
        return self._override.to(gates).expand_as(gates)

    def scale(self, x: Tensor, gates: Tensor) -> Tensor:
        """F' = g·s·F for gates (B, C); keeps the dtype of ``x``."""
        return scaled(x, gates, self.gain, self.layout)

    def _seen(self, x: Tensor) -> Tensor:
        """The feature map, once its channels are checked, as ``features`` shows it to hooks."""
        axis = 1 if self.layout == "BC*" else -1
        if x.shape[axis] != self.channels:
            raise ValueError(
                f"the SE block has {self.channels} channels, but the feature map {tuple(x.shape)} has "
                f"{x.shape[axis]} on axis {axis}: attach it again with an example of the right shape"
            )
        return self.features(x)

    @property
    def acts(self) -> bool:
        """Whether the gates scale F: unless the block is transparent, and always under :meth:`override`."""
        return not self.transparent or self._override is not None

    def forward(self, x: Tensor) -> Tensor:
        x = self._seen(x)
        gates = self.vector(self.gates(x))
        # A copy: what follows may work in place, and F is still to be shown.
        return self.scale(x, gates) if self.acts else x.clone()

    @contextmanager
    def override(self, gates: Tensor | Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the SE vector within a ``with`` block.

        Args:
            gates: a tensor that broadcasts to the shape of the gates, or a function of the block's own gates,
                for example ``lambda s: s * selib.TopFraction(0.1).mask(s)`` to keep the top decile only.
        """
        before, self._override = self._override, gates
        try:
            yield
        finally:
            self._override = before

    def extra_repr(self) -> str:
        return f"channels={self.channels}, layout={self.layout!r}, gain={self.gain:g}"


def _keep_own_weights(block: SEBlock, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    # A checkpoint of the bare model has no keys of this block: it loads, and the block keeps its weights.
    own = {prefix + name: parameter.detach() for name, parameter in block.named_parameters()}
    if not any(key in state for key in own):
        state.update(own)


class Stacked(nn.Module):
    """K linear layers side by side: (B, K, inputs) -> (B, K, outputs), y_k = W_k x_k + b_k."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        # Flat: optimizers tell by its single axis that it must not decay.
        self.bias = nn.Parameter(torch.empty(count * outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every layer as ``nn.Linear`` starts."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bki,koi->bko", x, self.weight) + self.bias.view(self.weight.shape[:2])


class TargetSEBlock(SEBlock):
    """An SE block for each of K targets, before a head that is global average pooling and a linear layer.

        s_k = σ(W₂_k ReLU(W₁_k z)),    y_k = Σ_c w[k,c]·g·s[k,c]·z[c] + b_k,    z = mean(F)

    A map cannot be scaled in K ways at once, so F passes unchanged, and the gates (B, K, C) act where its
    mean meets the weights of the linear layer: on each target's logit by itself.

    Args:
        channels, reduction, start, layout, grid: see :class:`SEBlock`; every target has a bottleneck of its
            own.
        targets: K.
        rectifies: the head reads the mean of ReLU(F), and so does the squeeze (DenseNet).
    """

    targets: int

    def __init__(
        self,
        channels: int,
        targets: int,
        reduction: int = 16,
        *,
        start: Start = "identity",
        layout: Layout = "BC*",
        grid: tuple[int, ...] | None = None,
        rectifies: bool = False,
    ) -> None:
        if targets < 1:
            raise ValueError(f"targets must be at least 1, got targets={targets}")
        vars(self)["targets"] = targets  # before there is a module: the layers are made by it
        super().__init__(channels, reduction, start=start, layout=layout, grid=grid)
        self.rectifies = rectifies

    def _make(self) -> None:
        self.fc1 = nn.Linear(self.channels, self.targets * self.bottleneck)
        self.fc2 = Stacked(self.targets, self.bottleneck, self.channels)

    def squeeze(self, x: Tensor) -> Tensor:
        """z: the map, or its mean as the linear layer reads it -> (B, C)."""
        return super().squeeze(x.relu() if self.rectifies else x)

    def opened(self, evidence: Tensor) -> Tensor:
        """s_k = σ(W₂_k ReLU(W₁_k z)): (B, C) -> gates (B, K, C) in (0, 1)."""
        hidden = torch.relu(self.fc1(evidence)).unflatten(1, (self.targets, self.bottleneck))
        return torch.sigmoid(self.fc2(hidden))

    def scale(self, x: Tensor, gates: Tensor) -> Tensor:
        """g·s_k·z of every target: z (B, C) and gates (B, K, C) -> (B, K, C)."""
        return x[:, None] * (self.gain * gates).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """F -> F: the gates come later, in :meth:`logits`."""
        return self._seen(x).clone()

    def logits(self, layer: nn.Linear, z: Tensor, output: Tensor) -> Tensor:
        """y (B, K) from z (B, C) and what the linear layer makes of it.

        The difference to the gated logits is added, so that scales of 1 leave the output as it is, bit for
        bit.
        """
        gates = self.vector(self.gates(z))
        if not self.acts:
            return output
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(gates.dtype)
            change = ((self.scale(z, gates) - z[:, None]) * layer.weight.to(gates.dtype)).sum(2)
        return (output + change).to(output.dtype)

    def extra_repr(self) -> str:
        return f"targets={self.targets}, {super().extra_repr()}"


class HeadSEBlock(SEBlock):
    """An SE block whose bottleneck is the classifier, before global average pooling and a linear layer W, b.

        p = softmax(t (W z + b)),    e = z · Wᵀp / (std(z) std(W)),    s = σ(a·e + c)

    What the network says about a sample decides which channels are open there: those that its answer rests
    on. Only a and one c a channel are learned, so a hundred unlabelled images do. With one class in place of
    p, the gates are those of that class. The sharpness t is 1; :func:`selib.fit_gates` sets it to 4, so that
    the answer counts for more than its rivals.

    Args:
        layer: the linear layer; it stays the model's, and the block reads its weights as they are.
        start, layout, grid: see :class:`SEBlock`; ``"paper"`` starts at a = 1 and c = 0.
        rectifies: the head reads the mean of ReLU(F), and so does the squeeze (DenseNet).
    """

    layer: nn.Linear

    def __init__(
        self,
        layer: nn.Linear,
        *,
        start: Start = "identity",
        layout: Layout = "BC*",
        grid: tuple[int, ...] | None = None,
        rectifies: bool = False,
    ) -> None:
        vars(self)["layer"] = layer  # not a child: its weights are saved once, with the model
        super().__init__(layer.in_features, start=start, layout=layout, grid=grid)
        self.rectifies = rectifies

    def _make(self) -> None:
        self.sharpness: Tensor
        self.register_buffer("sharpness", torch.ones(()))
        self.slope = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(self.channels))

    def _reset(self, start: Start) -> None:
        nn.init.constant_(self.slope, 0 if start == "identity" else 1)
        nn.init.zeros_(self.offset)

    def squeeze(self, x: Tensor) -> Tensor:
        """z: the map, or its mean as the linear layer reads it -> (B, C)."""
        return super().squeeze(x.relu() if self.rectifies else x)

    def evidence(self, z: Tensor, p: Tensor | None = None) -> Tensor:
        """e (B, C) of z (B, C), for the network's own probabilities of the classes or others, p (B, K)."""
        weight, bias = self.layer.weight.to(self.offset), self.layer.bias
        z = z.to(weight)
        if p is None:  # not a call of the layer, whose hooks belong to the model's own pass
            p = (self.sharpness * F.linear(z, weight, bias if bias is None else bias.to(z))).softmax(1)
        z = z / z.std(1, keepdim=True).clamp_min(LEAST)
        return z * (p @ weight) / weight.std().clamp_min(LEAST)

    def opened(self, evidence: Tensor) -> Tensor:
        """s = σ(a·e + c): evidence (B, C) -> gates (B, C) in (0, 1)."""
        return torch.sigmoid(self.slope * evidence + self.offset)


# Hooks that find their block in the module: they survive deepcopy, pickling and torch.compile.


def apply_block(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """F -> F' behind the module that makes F."""
    return vars(module)[BLOCK](output)


def apply_target_gates(layer: nn.Linear, args: Any, output: Tensor) -> Tensor:
    """The logits under each target's own gates, behind the linear layer."""
    return vars(layer)[BLOCK].logits(layer, args[0], output)
