"""Run a model as it is, or only its head: the part that follows the gates, on any number of feature maps.

No model is cut in two. It runs on one sample, and in place of the module that makes the gated map stands one
that returns other maps, as many as are asked for. What is beside the map runs on the one sample, what follows
on all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selib.heatmap import time_axis
from selib.se import BLOCK, Layout, SEBlock, channels_first, scaled
from selib.stand_in import Beside, Stored, repeated, standing_in

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Task = Literal["multiclass", "multilabel"]

# What a head raises on a map of another size, or on several maps beside the tensors of one sample.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
_CHANGED = (
    "running the head does not give the logits back: the model is random in evaluation mode, "
    "or has changed since it was explained"
)


# ---- the whole model ----------


def bare(model: nn.Module) -> nn.Module:
    """The model inside a ``torch.compile`` or (Distributed)DataParallel wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def attached(model: nn.Module) -> dict[str, SEBlock]:
    """The attached blocks by stream name ("" for a single one); empty when there are none."""
    modules = bare(model).modules()
    found = [vars(module)[BLOCK] for module in modules if BLOCK in vars(module)]
    return {block.stream: block for block in found}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def map_tensors(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Change every tensor of a nested tuple, list or dict."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(change, value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        changed = [map_tensors(change, value) for value in inputs]
        return type(inputs)(*changed) if hasattr(inputs, "_fields") else type(inputs)(changed)
    return inputs


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of a nested tuple, list or dict, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, inputs)
    return found


def to_device(inputs: Any, device: torch.device) -> Any:
    """The tensors of a nested tuple, list or dict, moved."""
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def batch_size(inputs: Any) -> int | None:
    """B, the first axis that all tensors of the inputs share, or None."""
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors(inputs)}
    return sizes.pop() or None if len(sizes) == 1 else None


def take(inputs: Any, sample: int, size: int) -> Any:
    """One sample of a batch of ``size``; tensors with another first axis are shared and stay whole."""

    def one(tensor: Tensor) -> Tensor:
        return tensor[sample : sample + 1] if tensor.ndim and tensor.shape[0] == size else tensor

    return map_tensors(one, inputs)


def logits_of(output: Any, inputs: Any = None) -> Tensor:
    """The logits of a model's output, (B, K), or (B, T, K) of a model that answers once a frame.

    They are a tensor, the entry "logits" of a dict, or the first tensor there is.

    Args:
        inputs: what the model ran on. Logits (B·T, K) of a batch of B clips are laid out as (B, T, K) by it.

    Raises:
        ValueError: if there are none, or they are not (B,), (B, K) or (B, T, K).
    """
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        output = output["logits"]
    found = tensors(output)
    if not found or found[0].ndim not in (1, 2, 3):
        what = f"a tensor of shape {tuple(found[0].shape)}" if found else type(output).__name__
        raise ValueError(
            f"the model returned {what}, but class logits (B, K) are needed, or (B, T, K) with an answer a "
            "frame: wrap it so that it returns them"
        )
    logits = found[0] if found[0].ndim > 1 else found[0][:, None]
    return _by_sample(logits, batch_size(inputs))


def _by_sample(logits: Tensor, samples: int | None) -> Tensor:
    """Logits (B·T, K) of B clips as (B, T, K); others stay as they are."""
    if logits.ndim == 2 and samples and len(logits) > samples and len(logits) % samples == 0:
        return logits.unflatten(0, (samples, -1))
    return logits


def check_task(task: Task) -> None:
    """Raise ValueError unless ``task`` is known."""
    if task not in ("multiclass", "multilabel"):
        raise ValueError(f'task={task!r} is unknown: use "multiclass" or "multilabel"')


def decisions(logits: Tensor, task: Task) -> Tensor:
    """The class (…) int64 of logits (…, K); for ``multilabel`` each output's yes or no, (…, K) bool."""
    return logits > 0 if task == "multilabel" else logits.argmax(-1)


@contextmanager
def evaluating(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own mode is put back afterwards.

    With ``eager`` nothing runs compiled: compiled code does not call hooks that were set after it was made.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            if eager and "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks that do not outlive the ``with`` block."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


# ---- recognising global average pooling + linear ----------


def agrees(got: Tensor, want: Tensor, like: Tensor | None = None) -> bool:
    """Whether logits are the same up to rounding, relative to the largest of ``like`` (default ``want``)."""
    slack = 1e-4 if want.dtype in (torch.float32, torch.float64) else 5e-2
    largest = (want if like is None else like).abs().max().clamp_min(1e-6)
    return got.shape == want.shape and bool((got - want).abs().max() <= slack * largest)


class Linear:
    """A linear layer behind global average pooling: means (n, C) -> logits (n, K).

    Means (n, K, C), one set for each logit, are read each by its own row of weights.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.detach().float()  # (K, C)
        zeros = torch.zeros(len(self.weight), device=self.weight.device)
        self.bias = zeros if layer.bias is None else layer.bias.detach().float()

    def __call__(self, means: Tensor) -> Tensor:
        if means.ndim == 3:
            return (means * self.weight).sum(2) + self.bias
        return means @ self.weight.T + self.bias


def reads_mean(x: Tensor, layout: Layout, into: Tensor) -> bool | None:
    """Whether ``into`` (B, C) is the mean of a map: False for mean(F), True for mean(ReLU(F)), else None."""
    exact = into.dtype in (torch.float32, torch.float64)
    slack = (1e-5 if exact else 2e-2) * float(into.abs().max() + 1e-12)
    for rectifies in (False, True):
        mean = channels_first(x.relu() if rectifies else x, layout).flatten(2).mean(2)
        if mean.shape == into.shape and torch.allclose(mean.float(), into.float(), rtol=1e-4, atol=slack):
            return rectifies
    return None


# ---- the head ----------


@dataclass(frozen=True)
class Gated:
    """A place where F becomes F' = gain·s·F: an attached block, or one that the model was born with.

    Attributes:
        module: takes F.
        gate: its output is the gates.
        site: its output is F'.
    """

    module: nn.Module
    gate: nn.Module
    site: nn.Module
    layout: Layout = "BC*"
    prefix: int = 0
    gain: float = 1.0


Reading = Literal["mean", "max"]


class Head:
    """What follows a gated feature map in a model.

    Args:
        model: the model, unchanged since ``logits`` were computed.
        place: where the gated map is made.
        inputs: the batch that was explained.
        raw: F of that batch, in its own layout.
        logits: (B, K) or (B, T, K) of that batch; every way of running the head is checked against them.
        scales: (B, C), or (B, K, C) where every target has its own: what F was multiplied with in that pass.
        last: the last linear layer of the forward pass with its input, if its output was the logits.
        before: the heads of the gated maps that were made before this one, and need not be made again.

    Attributes:
        block: the module that takes F.
        linear: the closed form when the head is global average pooling + linear, else ``None``.
        rectifies: the head begins with a ReLU, so that only the positive part of the map counts (DenseNet).
        reads: the head reads of the map, or of each frame of it, only the ``"mean"`` or the ``"max"`` over
            space.
        shared: the head reads nothing but this map, so any sample's inputs do for all.
        frames: T of a model that answers once a frame, else ``None``.
        time: which axis of the map's space is time there, ``None`` where there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Gated,
        inputs: Inputs,
        raw: Tensor,
        logits: Tensor,
        scales: Tensor,
        *,
        last: tuple[nn.Linear, Tensor] | None = None,
        before: Sequence[Head] = (),
    ) -> None:
        self.model, self.site, self.inputs, self.logits = model, place.site, inputs, logits
        self.block, self.gain, self.layout, self.prefix = place.module, place.gain, place.layout, place.prefix
        self.scales, self._raw, self._before = scales, raw, before
        device = raw.device.type  # the head runs later, but as the model ran: in the same precision
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.linear: Linear | None = None
        self.rectifies = self.shared = self._prepared = self._repeats = False
        self.reads: Reading | None = None
        self.frames = logits.shape[1] if logits.ndim == 3 else None
        space = channels_first(raw, self.layout, self.prefix).shape[2:]
        self.time = time_axis(space, self.frames) if self.frames else None
        if last is not None and raw.ndim > 2 and not self.prefix:
            self._recognise(*last)

    def _recognise(self, layer: nn.Linear, into: Tensor) -> None:
        """Set the closed form if the layer reads the mean of the map, by value, and returns the logits."""
        rectifies = reads_mean(self.scaled, self.layout, into)
        linear, means = Linear(layer), into.float()
        if rectifies is None:
            return
        if self.scales.ndim == 2:
            found = agrees(linear(means), self.logits)  # a subclass may do more than its weights say
        else:  # gated logits are a difference to those without gates, and so as exact as these
            found = agrees(linear(means[:, None] * self.scales), self.logits, like=linear(means))
        if found:
            self.linear = linear
            self.rectifies = rectifies and bool((self.scaled < 0).any())
            self.reads, self.shared, self._prepared = "mean", True, True

    @cached_property
    def scaled(self) -> Tensor:
        """F', computed anew: a ReLU may have changed the module's. F where targets have their own gates."""
        if self.scales.ndim == 3:
            return self._raw
        return scaled(self._raw, self.scales, 1.0, self.layout)

    def prepare(self) -> None:
        """Find out, by running it, what kind of head this is. Called once, before the first run.

        Raises:
            RuntimeError: if no way of running it gives the logits back.
        """
        if self._prepared:
            return
        with evaluating(self.model):
            for self._repeats in (False, True):
                if self._find_reading():
                    break
            else:
                raise RuntimeError(_CHANGED)
            self._prepared = True
            batch = len(self._raw)
            if batch > 1:
                self.shared = self._gives(self.effective(self.scaled), self.logits, 0)
            if batch > 1 and not self.shared:  # one sample may have been read by chance: ask another
                twice = [-1, -1]
                if not self._gives(self.effective(self.scaled[twice]), self.logits[twice], -1):
                    self.reads, self.rectifies = None, False
                    self.shared = self._gives(self.scaled, self.logits, 0)

    def _find_reading(self) -> bool:
        """Try a map, with negative values if there is one, as the head may read it, all ways side by side."""
        negative = (self.scaled < 0).flatten(1).any(1)
        sample = int(negative.int().argmax())
        first, logits = self.scaled[sample : sample + 1], self.logits[sample : sample + 1]
        signs = (False, True) if bool(negative[sample]) else (False,)
        attempts: list[tuple[Reading | None, ...]] = [("mean", "max"), (None,)]
        if self.prefix or not self._reduced_axes(first):
            del attempts[0]
        for ways in attempts:
            tried = [(way, sign) for way in ways for sign in signs]
            rows = [self._reduced(first.relu() if sign else first, way) for way, sign in tried]
            try:
                # At least two rows: one would prove little.
                found = self._run(torch.cat([*rows, rows[0]]), sample)
            except _FAILURES:
                continue
            if len(found) != len(tried) + 1:
                continue  # the rows were taken for something else than samples
            hits = [pair for pair, got in zip(tried, found, strict=False) if agrees(got[None], logits)]
            if hits and hits[0] != (None, True):
                self.reads = hits[0][0]
                self.rectifies = (self.reads, True) in hits
                return True
        return False

    def _gives(self, rows: Tensor, logits: Tensor, sample: int) -> bool:
        try:
            return agrees(self._run(rows, sample), logits)
        except _FAILURES:
            return False

    def _reduced_axes(self, x: Tensor) -> list[int]:
        first = 2 if self.layout == "BC*" else 1
        return [first + axis for axis in range(x.ndim - 2) if axis != self.time]

    def _reduced(self, x: Tensor, way: Reading | None) -> Tensor:
        """A map with every axis of space but time reduced to one position."""
        if way is None:
            return x
        axes = self._reduced_axes(x)
        return x.mean(axes, keepdim=True) if way == "mean" else x.amax(axes, keepdim=True)

    def effective(self, x: Tensor) -> Tensor:
        """The map as the head reads it, as small as possible: rectified and reduced where nothing changes."""
        return self._reduced(x.relu() if self.rectifies else x, self.reads)

    def _run(self, rows: Tensor, sample: int) -> Tensor:
        """Logits (n, …) of one sample's inputs with the gated map replaced by ``rows`` (n, …)."""
        count, batch = len(rows), len(self._raw)
        inputs = take(self.inputs, sample % batch, batch)
        ready = {head.site: take(head.scaled, sample % batch, batch) for head in self._before}
        if self._repeats:
            inputs, ready = (map_tensors(lambda x: repeated(x, count), given) for given in (inputs, ready))
        own = Stored(self.site, rows)
        stand_ins = [own, *(Stored(module, x) for module, x in ready.items())]
        with standing_in(stand_ins), torch.autocast(*self._autocast), Beside():
            logits = logits_of(call(self.model, inputs))
        if own.calls != 1:
            raise RuntimeError(_CHANGED)
        return _by_sample(logits, count)

    def __call__(self, rows: Tensor, sample: int = 0) -> Tensor:
        """Gated maps (n, …), as F' or as :meth:`effective` gives them -> logits (n, K) or (n, T, K).

        Differentiable in ``rows``.

        Args:
            sample: whose inputs to take for what bypasses the map; of no account when ``shared``.
        """
        self.prepare()
        if self.linear is not None:
            rows = rows.relu() if self.rectifies else rows
            return self.linear(channels_first(rows, self.layout).flatten(2).mean(2).float())
        return self._run(rows, sample).float()

    def per_target(self, maps: Tensor, scales: Tensor) -> Tensor:
        """Logits (n, K) of maps (n, …) under scales (n, K, C), one set for each target; differentiable in
        them.

        Raises:
            ValueError: the head is not global average pooling + linear.
        """
        if self.linear is None:
            raise ValueError(
                "the head is not global average pooling + linear: give scales (n, C) for all targets"
            )
        return self.linear(self.effective(maps).flatten(1).float()[:, None] * scales)
