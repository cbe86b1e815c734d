"""The part of a model that follows the gates, run by itself on any number of feature maps.

No model is cut in two for it. The model runs on one sample with the gated map replaced, under ``torch.func.vmap`` over the replacements:
what comes before the map does not depend on them and is computed once, what comes after runs as one batch. So any head works, with its
side inputs and its own reshaping.

Of a model that answers once a frame the encoders cost far more than what follows them, and one pass through them more than an explanation
may cost. There the pass that was explained is remembered (:class:`Trace`): a module that nothing replaced reaches is not run again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

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
    tensors,
    time_axis,
)
from selib.se import Layout, SEBlock

CHUNK = 2**22  # numbers of the clips' maps that the head runs on at a time: 16 MB of float32
# What comes of a map whose size the head cannot take, or of an operator that vmap does not know.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


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


# ---- not computing again what does not change --------------------------------------------------------------------------------


@contextmanager
def other_forwards(changed: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Other ``forward`` methods for some modules within a ``with`` block; their hooks stay."""
    before = []
    try:
        for module, forward in changed:
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in reversed(before):
            vars(module).pop("forward", None)
            vars(module).update({} if own is None else {"forward": own})


class Trace:
    """What the modules of a model returned in one forward pass, so that they need not run again.

    Kept are the outermost modules that hold no gated one, each called once. An output that was changed in place afterwards is not what
    the module returned, and is not kept.

    Args:
        sites: the modules whose outputs are gated, or that gate by themselves.
    """

    def __init__(self, model: nn.Module, sites: Iterable[nn.Module]) -> None:
        self._calls: dict[nn.Module, int] = {}
        self._depth = 0
        self._kept: dict[nn.Module, tuple[Any, list[int]]] = {}
        self._ready: dict[nn.Module, list[nn.Module]] = {}
        self._model, self._sites = model, list(sites)
        self._watched: set[nn.Module] = set()

    def like(self) -> Trace:
        """A trace of the same model with nothing in it."""
        return Trace(self._model, self._sites)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the forward pass that runs within the ``with`` block."""
        sites = set(self._sites)
        everywhere = list(self._model.named_modules(remove_duplicate=False))
        above = {name[:end] for name, m in everywhere if m in sites for end in _ends(name)}
        around = {m for name, m in everywhere if name in above}
        blocks = {inner for _, m in everywhere if isinstance(m, SEBlock) for inner in m.modules()}
        # What holds a site must run.
        self._watched = (
            {m for _, m in everywhere if not isinstance(m, torch.jit.ScriptModule)} - around - blocks
        )
        # Hooks for all modules: two in place of two for each, and they come before the modules' own: a site returns F, which the block's
        # hook turns into F'.
        enter, leave = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        )
        try:
            yield
        finally:
            enter.remove()
            leave.remove()
        for module, (output, versions) in list(self._kept.items()):
            if self._calls[module] > 1 or versions != _versions(output):
                del self._kept[module]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += module in self._watched

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self._watched:
            return
        self._depth -= 1
        self._calls[module] = self._calls.get(module, 0) + 1
        found = tensors(output)
        if self._depth or not found or any(t.is_inference() for t in found):
            return
        self._kept[module] = output, _versions(output)
        if module in self._sites:
            self._ready[module] = list(self._kept)

    @contextmanager
    def replaying(
        self, *, reached: Callable[[Tensor], bool] | None = None, before: nn.Module | None = None
    ) -> Iterator[None]:
        """Run no module again that a change of the gated maps does not reach.

        Args:
            reached: whether the change reaches a tensor; a module runs if it reaches one of its arguments.
            before: where tensors cannot tell, only what was ready before this site is taken from memory.
        """
        ready = self._ready.get(before, []) if before is not None else self._kept

        def replay(module: nn.Module, output: Any) -> Callable[..., Any]:
            forward = module.forward

            def replayed(*args: Any, **kwargs: Any) -> Any:
                live = reached and (_any((args, kwargs), reached) or not tensors((args, kwargs)))
                return forward(*args, **kwargs) if live else output

            return replayed

        with other_forwards(
            [(module, replay(module, self._kept[module][0])) for module in ready if module in self._kept]
        ):
            yield


def _ends(name: str) -> list[int]:
    """Where the names of the modules end that hold the module of this name: 0 for the model itself."""
    return [0, *(place for place, letter in enumerate(name) if letter == ".")] if name else []


def _versions(output: Any) -> list[int]:
    return [t._version for t in tensors(output)]


def _any(arguments: Any, holds: Callable[[Tensor], bool]) -> bool:
    """Whether something holds of any tensor among a module's arguments. Where one cannot be seen, it may."""
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, (tuple, list)):
        return any(_any(item, holds) for item in arguments)
    if isinstance(arguments, Tensor):
        return holds(arguments)
    return not (
        arguments is None or isinstance(arguments, (bool, int, float, str, torch.dtype, torch.device))
    )


def _mapped(x: Tensor) -> bool:
    """Whether a tensor depends on what vmap replaces."""
    return torch._C._functorch.is_batchedtensor(x)


class _Recurrent(torch.autograd.Function):
    """A recurrent layer under vmap, which has no rule for it: the replaced rows join its batch axis."""

    @staticmethod
    def forward(layer: Callable[..., Any], axis: int, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        output, after = layer(x, (state if len(state) > 1 else state[0]) if state else None)
        return output, *tensors(after)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass  # only ever run under vmap, where the layer itself is differentiated

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], layer: Callable[..., Any], axis: int, x: Tensor, *state: Tensor
    ) -> Any:  # type: ignore[override]
        n = info.batch_size

        def join(t: Tensor, dim: int | None, axis: int, ndim: int) -> Tensor:
            t = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.movedim(0, axis) if ndim == 2 else t.movedim(0, axis).flatten(axis, axis + 1)

        ndim = x.ndim - (dims[2] is not None)  # 2 without a batch axis
        states = [join(t, dim, 1, ndim) for t, dim in zip(state, dims[3:], strict=True)]
        found = _Recurrent.forward(layer, axis, join(x, dims[2], axis, ndim), *states)
        axes = (axis, *[1] * (len(found) - 1))
        return tuple(
            t if ndim == 2 else t.unflatten(a, (n, -1)) for t, a in zip(found, axes, strict=True)
        ), axes


def _recurrent(layer: nn.RNNBase) -> tuple[nn.Module, Callable[..., Any]]:
    forward = layer.forward

    def mapped(x: Any, state: Any = None) -> Any:
        if not isinstance(x, Tensor) or not _any((x, state), _mapped):
            return forward(x, state)
        output, *after = _Recurrent.apply(forward, 0 if layer.batch_first else 1, x, *tensors(state))
        return output, after[0] if len(after) == 1 else tuple(after)

    return layer, mapped


_CHANGED = "running the head does not give the logits back: the model is random in evaluation mode, or has changed since it was explained"


# ---- the head --------------------------------------------------------------------------------------------------------------


class Head:
    """What follows a gated feature map in a model.

    Args:
        model: the model, unchanged since ``logits`` were computed.
        module: the module whose output is the gated map F'.
        inputs: the batch that was explained.
        raw: F of that batch, in the model's own layout.
        gated: F -> F', kept until it is asked for; nothing where the targets have gates of their own.
        logits: (B, K) or (B, T, K) of that batch: every way of running the head is checked against them before it is used.
        layout, prefix: of the map.
        trace: that forward pass, of a model that answers once a frame; without it the encoders run again, once for each question.
        last: the last linear layer of the forward pass with its input, if its output was the logits.
        scales: (B, K, C) of the map's means where every target has its own.

    Attributes:
        linear: the closed form when the head is global average pooling + linear, else ``None``.
        rectifies: the head begins with a ReLU, so that only the positive part of the map counts (DenseNet).
        pooled: the head reads the map only through its mean over space, so 1x1 maps do.
        shared: the head reads nothing but this map, so any sample's input will do for all.
        frames: T of a model that answers once a frame, else ``None``.
        time: which axis of the map's space is time there, ``None`` where there is none.
        reads: the head reads each frame only through its ``"mean"`` or ``"max"`` over the other axes, so 1x1 maps of frames do.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        inputs: Inputs,
        raw: Tensor,
        logits: Tensor,
        *,
        gated: Callable[[Tensor], Tensor] | None = None,
        layout: Layout = "BC*",
        prefix: int = 0,
        last: tuple[nn.Linear, Tensor] | None = None,
        scales: Tensor | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.model, self.module, self.inputs, self.logits = model, module, inputs, logits
        self._raw, self._gated = raw, gated
        self.layout, self.prefix = layout, prefix
        device = raw.device.type  # the head runs later, but as the model ran: in the same precision
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.linear: Linear | None = None
        self.rectifies = self.pooled = False
        self._vmap: bool | None = None
        self.shared = False
        self.frames = logits.shape[1] if logits.ndim == 3 else None
        self.time = (
            time_axis(channels_first(raw, layout, prefix).shape[2:], self.frames) if self.frames else None
        )
        self.reads: Literal["mean", "max"] | None = None
        self._trace = trace
        self._alone: tuple[Any, Trace | None] | None = None
        if last is not None and raw.ndim > 2 and not prefix:
            layer, into = last
            rectifies = reads_mean(self.scaled, layout, into)
            linear = Linear(layer.weight, layer.bias)
            if rectifies is not None and self._is(linear, into.float(), scales):
                self.linear = linear
                self.rectifies = rectifies and bool((self.scaled < 0).any())
                self.pooled = self.shared = True

    @cached_property
    def scaled(self) -> Tensor:
        """The gated map F', or F where the targets have gates of their own. Computed anew: an in-place ReLU may have changed the module's."""
        return self._raw if self._gated is None else self._gated(self._raw)

    def _is(self, linear: Linear, means: Tensor, scales: Tensor | None) -> bool:
        """Whether the logits are those of a linear layer: a subclass may do more than its weights say."""
        if scales is None:
            return agrees(linear(means), self.logits)
        # Gated logits are computed as a difference to those without gates, and so as exact as these.
        return agrees(linear(means[:, None] * scales), self.logits, like=linear(means))

    def _run(self, rows: Tensor, sample: int) -> Tensor:
        one = take(self.inputs, sample, len(self._raw))

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
        except FAILURES:
            return False
        return agrees(got, self.logits[samples])

    def prepare(self) -> None:
        """Find out, by running it, what kind of head this is. Called once, before the first run.

        Raises:
            RuntimeError: if no way of running it gives the logits back.
        """
        if self.linear is not None or self._vmap is not None:
            return
        with evaluating(self.model):
            if self.frames:
                self._prepare_clips()
                return
            for self._vmap in (True, False):
                if self._reproduces(self.scaled[:1], slice(0, 1), 0):
                    break
            else:
                self._vmap = None
                raise RuntimeError(_CHANGED)
            everything = slice(None)
            self.shared = len(self._raw) > 1 and self._reproduces(self.scaled, everything, 0)
            if self.scaled.ndim > 2:
                probe, samples = (self.scaled, everything) if self.shared else (self.scaled[:1], slice(0, 1))
                self.rectifies = bool((probe < 0).any()) and self._reproduces(probe.relu(), samples, 0)
                probe = probe.relu() if self.rectifies else probe
                self.pooled = not self.prefix and self._reproduces(average(probe, self.layout), samples, 0)

    def _prepare_clips(self) -> None:
        """As for images, with few runs: a recurrent head takes its time. The ways to read a map run side by side."""
        signs = (False, True) if bool((self.scaled < 0).any()) else (False,)
        reductions: list[list[Literal["mean", "max"] | None]] = [["mean", "max"], [None]]
        if self.scaled.ndim == 2 + (self.time is not None):
            del reductions[0]
        for self._vmap in (True, False):
            for ways in ([(way, sign) for way in part for sign in signs] for part in reductions):
                rows = torch.stack(
                    [self._read(self.scaled.relu() if sign else self.scaled, way) for way, sign in ways]
                )
                try:
                    found = self._run_clips(rows, self.inputs, self._trace)
                except FAILURES:
                    continue
                hits = [way for way, logits in zip(ways, found, strict=True) if agrees(logits, self.logits)]
                if hits and (hits[0][0] or not hits[0][1]):
                    self.reads = hits[0][0]
                    self.rectifies = (self.reads, True) in hits
                    return
        self._vmap = None
        raise RuntimeError(_CHANGED)

    def _read(self, x: Tensor, way: Literal["mean", "max"] | None) -> Tensor:
        """Maps (b, C, …, T, …) with all axes of space but time reduced to one."""
        if way is None:
            return x
        first = 2 if self.layout == "BC*" else 1
        axes = [first + axis for axis in range(x.ndim - 2) if axis != self.time]
        return x.mean(axes, keepdim=True) if way == "mean" else x.amax(axes, keepdim=True)

    def _run_clips(self, rows: Tensor, inputs: Any, trace: Trace | None) -> Tensor:
        """Logits (n, b, T, K) of a batch of b clips, n times with other maps: rows (n, b, …)."""

        def replaced(row: Tensor) -> Tensor:
            with hooked((self.module, lambda m, args, out: row.clone())), torch.autocast(*self._autocast):
                return logits_of(call(self.model, inputs), inputs)

        recurrent = (_recurrent(m) for m in self.model.modules() if isinstance(m, nn.RNNBase))
        block = isinstance(self.module, SEBlock)  # its output is replaced: it need not compute one
        with ExitStack() as stack:
            stack.enter_context(other_forwards([(self.module, lambda x: x)] if block else []))
            stack.enter_context(other_forwards(recurrent if self._vmap else []))
            if trace is not None:
                site = (
                    self.model.get_submodule(self.module.site)
                    if isinstance(self.module, SEBlock)
                    else self.module
                )
                stack.enter_context(
                    trace.replaying(reached=_mapped) if self._vmap else trace.replaying(before=site)
                )
            if not self._vmap:
                return torch.stack([replaced(row) for row in rows])
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(replaced, randomness="same")(rows)

    def clips(self, rows: Tensor) -> Tensor:
        """Gated maps (n, B, …) of the explained batch of clips, as :meth:`effective` gives them -> logits (n, B, T, K)."""
        self.prepare()
        return self._run_clips(rows, self.inputs, self._trace).float()

    def reads_only_the_map(self) -> bool:
        """Whether nothing bypasses the map, so that any sample's input will do for all (``shared``)."""
        self.prepare()
        if self.frames and len(self._raw) > 1 and not self.shared:
            with evaluating(self.model):
                self.shared = agrees(self(self.effective(self.scaled)), self.logits)
        return self.shared

    def _one_clip(self) -> tuple[Any, Trace | None]:
        """The inputs of the first clip, and what the modules make of them."""
        if self._alone is None:
            inputs = take(self.inputs, 0, len(self._raw))
            trace = None if self._trace is None else self._trace.like()
            if trace is not None:
                with evaluating(self.model), trace.recording(), torch.autocast(*self._autocast):
                    call(self.model, inputs)
            self._alone = inputs, trace
        return self._alone

    def effective(self, x: Tensor) -> Tensor:
        """The map as the head reads it, as small as possible: rectified and pooled where that changes nothing."""
        x = x.relu() if self.rectifies else x
        if self.frames:
            return self._read(x, self.reads)
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
        """Gated maps (n, …), as F' or as :meth:`effective` gives them -> logits (n, K) or (n, T, K); differentiable in ``rows``.

        Args:
            sample: whose inputs to take for what bypasses the map; of no account when ``shared``. Of clips it is the first.
        """
        self.prepare()
        if self.linear is not None:
            x = rows.relu() if self.rectifies else rows
            return self.linear(channels_first(x, self.layout).flatten(2).mean(2).float())
        if self.frames:
            return self._run_clips(rows[:, None], *self._one_clip())[:, 0].float()
        return self._run(rows, sample).float()
