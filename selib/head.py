"""The part of a model that follows the gates, run by itself on any number of feature maps.

No model is cut in two for it. The model runs on one sample with the gated map replaced, under ``torch.func.vmap`` over the replacements:
what comes before the map does not depend on them and is computed once, what comes after runs as one batch. So any head works, with its
side inputs and its own reshaping.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from selib.attach import (
    Inputs,
    Linear,
    agrees,
    average,
    call,
    channels_first,
    evaluating,
    hooked,
    logits_of,
    reads_mean,
)
from selib.se import Layout, SEBlock


def take(inputs: Any, sample: int, size: int) -> Any:
    """One sample of a batch of ``size``, as a batch of one; tensors of another first axis are shared and stay whole."""
    if isinstance(inputs, Tensor):
        return inputs[sample : sample + 1] if inputs.ndim and inputs.shape[0] == size else inputs
    if isinstance(inputs, Mapping):
        return {k: take(v, sample, size) for k, v in inputs.items()}
    return tuple(take(v, sample, size) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


def repeat(inputs: Any, count: int) -> Any:
    """A batch of one, ``count`` times, without copying."""
    if isinstance(inputs, Tensor):
        return inputs.expand(count, *inputs.shape[1:]) if inputs.ndim and inputs.shape[0] == 1 else inputs
    if isinstance(inputs, Mapping):
        return {k: repeat(v, count) for k, v in inputs.items()}
    return tuple(repeat(v, count) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


class Head:
    """What follows a gated feature map in a model.

    Args:
        model: the model, unchanged since ``logits`` were computed.
        module: the module whose output is the gated map F'.
        inputs: the batch that was explained.
        scaled: F' of that batch, in the model's own layout; F where the targets have gates of their own.
        logits: (B, K) of that batch: every way of running the head is checked against them before it is used.
        layout, prefix: of the map.
        last: the last linear layer of the forward pass with its input, if its output was the logits.
        scales: (B, K, C) of the map's means where every target has its own.

    Attributes:
        linear: the closed form when the head is global average pooling + linear, else ``None``.
        rectifies: the head begins with a ReLU, so that only the positive part of the map counts (DenseNet).
        pooled: the head reads the map only through its mean over space, so 1x1 maps do.
        shared: the head reads nothing but this map, so any sample's input will do for all.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        inputs: Inputs,
        scaled: Tensor,
        logits: Tensor,
        *,
        layout: Layout = "BC*",
        prefix: int = 0,
        last: tuple[nn.Linear, Tensor] | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self.model, self.module, self.inputs, self.scaled, self.logits = model, module, inputs, scaled, logits
        self.layout, self.prefix = layout, prefix
        device = scaled.device.type  # the head runs later, but as the model ran: in the same precision
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.linear: Linear | None = None
        self.rectifies = self.pooled = False
        self._vmap: bool | None = None
        self.shared = False
        if last is not None and scaled.ndim > 2 and not prefix:
            layer, into = last
            rectifies = reads_mean(scaled, layout, into)
            linear = Linear(layer.weight, layer.bias)
            if rectifies is not None and self._is(linear, into.float(), scales):
                self.linear = linear
                self.rectifies = rectifies and bool((scaled < 0).any())
                self.pooled = self.shared = True

    def _is(self, linear: Linear, means: Tensor, scales: Tensor | None) -> bool:
        """Whether the logits are those of a linear layer: a subclass may do more than its weights say."""
        if scales is None:
            return agrees(linear(means), self.logits)
        # Gated logits are computed as a difference to those without gates, and so as exact as these.
        return agrees(linear(means[:, None] * scales), self.logits, like=linear(means))

    def _run(self, rows: Tensor, sample: int) -> Tensor:
        one = take(self.inputs, sample, len(self.scaled))

        def replaced(inputs: Any, output: Tensor) -> Tensor:
            # A copy: an in-place ReLU behind the map must not change the caller's.
            with hooked((self.module, lambda m, args, out: output.clone())), torch.autocast(*self._autocast):
                return logits_of(call(self.model, inputs))

        with ExitStack() as stack:
            if isinstance(self.module, SEBlock):
                # It runs on one sample here, for nothing: gates that were overridden for a batch would not fit.
                stack.enter_context(self.module.override(lambda gates: gates))
            if not self._vmap:
                return replaced(repeat(one, len(rows)), rows)
            stack.enter_context(warnings.catch_warnings())
            # Operators without a batching rule are looped over, which is no loss here.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(lambda row: replaced(one, row[None])[0], randomness="same")(rows)

    def _reproduces(self, rows: Tensor, samples: slice, sample: int) -> bool:
        try:
            got = self._run(rows, sample)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return False  # a head that cannot take a map of this size, or an operator that vmap does not know
        return agrees(got, self.logits[samples])

    def prepare(self) -> None:
        """Find out, by running it, what kind of head this is. Called once, before the first run.

        Raises:
            RuntimeError: if no way of running it gives the logits back.
        """
        if self.linear is not None or self._vmap is not None:
            return
        with evaluating(self.model):
            for self._vmap in (True, False):
                if self._reproduces(self.scaled[:1], slice(0, 1), 0):
                    break
            else:
                self._vmap = None
                raise RuntimeError(
                    "running the head does not give the logits back: the model is random in evaluation mode, or has changed since it was "
                    "explained"
                )
            everything = slice(None)
            self.shared = len(self.scaled) > 1 and self._reproduces(self.scaled, everything, 0)
            if self.scaled.ndim > 2:
                probe, samples = (self.scaled, everything) if self.shared else (self.scaled[:1], slice(0, 1))
                self.rectifies = bool((probe < 0).any()) and self._reproduces(probe.relu(), samples, 0)
                probe = probe.relu() if self.rectifies else probe
                self.pooled = not self.prefix and self._reproduces(average(probe, self.layout), samples, 0)

    def effective(self, x: Tensor) -> Tensor:
        """The map as the head reads it, as small as possible: rectified and pooled where that changes nothing."""
        x = x.relu() if self.rectifies else x
        return average(x, self.layout) if self.pooled else x

    def per_target(self, maps: Tensor, scales: Tensor) -> Tensor:
        """Logits (n, K) of maps (n, …) that every target scales in its own way, (n, K, C); differentiable in ``scales``.

        Raises:
            ValueError: the head is not global average pooling + linear.
        """
        if self.linear is None:
            raise ValueError(
                "the head is not global average pooling + linear, so its targets cannot have scales (n, K, C) of their own: give (n, C)"
            )
        return self.linear(self.effective(maps).flatten(1).float()[:, None] * scales)

    def __call__(self, rows: Tensor, sample: int = 0) -> Tensor:
        """Gated maps (n, …), as F' or as :meth:`effective` gives them -> logits (n, K); differentiable in ``rows``.

        Args:
            sample: whose inputs to take for what bypasses the map; of no account when ``shared``.
        """
        self.prepare()
        if self.linear is not None:
            x = rows.relu() if self.rectifies else rows
            return self.linear(channels_first(x, self.layout).flatten(2).mean(2).float())
        return self._run(rows, sample).float()
