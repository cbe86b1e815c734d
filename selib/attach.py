"""Put an SE block before the classifier of any model, in place, and take it out again.

The place is found by running the model, not by knowing it: the last feature map whose positions reach the output. What reaches what is
asked with NaN, which survives every layer: poison a map and see whether the output is poisoned.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from selib.se import Layout, SEBlock, Start, TargetSEBlock, channels_first

ATTRIBUTE = "selib_se"  # the name of the block in the model, and so the prefix of its parameters
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Task = Literal["multiclass", "multilabel"]


# ---- running a model as it is --------------------------------------------------------------------------------------------


def bare(model: nn.Module) -> nn.Module:
    """The model inside a ``torch.compile`` or (Distributed)DataParallel wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of a nested tuple, list or dict, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return [t for item in inputs for t in tensors(item)] if isinstance(inputs, (tuple, list)) else []


def to_device(inputs: Any, device: torch.device) -> Any:
    """The tensors of a nested tuple, list or dict, moved."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: to_device(v, device) for k, v in inputs.items()}
    return type(inputs)(to_device(v, device) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


def batch_size(inputs: Any) -> int | None:
    """B, the first axis that all tensors of the inputs share, or None."""
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors(inputs)}
    return sizes.pop() or None if len(sizes) == 1 else None


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
            f"the model returned {what}, but class logits (B, K) are needed, or (B, T, K) with an answer a frame: wrap it so that it "
            "returns them"
        )
    logits = found[0] if found[0].ndim > 1 else found[0][:, None]
    batch = batch_size(inputs) if logits.ndim == 2 else None
    flattened = batch is not None and len(logits) > batch and len(logits) % batch == 0
    return logits.unflatten(0, (batch, -1)) if flattened else logits


def check_task(task: Task) -> None:
    """ValueError for a task that there is not."""
    if task not in ("multiclass", "multilabel"):
        raise ValueError(f'task={task!r} is unknown: use "multiclass" or "multilabel"')


def decisions(logits: Tensor, task: Task) -> Tensor:
    """What logits (…, K) decide: a class (…) int64, or for ``multilabel`` yes or no for each output, (…, K) bool."""
    return logits > 0 if task == "multilabel" else logits.argmax(-1)


@contextmanager
def evaluating(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own mode is put back afterwards.

    With ``eager`` nothing runs compiled: compiled code does not call the hooks that were set after it was made.
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


# ---- reading shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapLayout:
    """How a module's output is a feature map: layout, C, leading tokens that are no positions, grid behind a token axis."""

    layout: Layout
    channels: int
    prefix: int = 0
    grid: tuple[int, ...] | None = None


def _grid(n: int, space: tuple[int, ...]) -> tuple[int, int] | None:
    """The (h, w) with h·w = n whose shape is that of the input (H, W)."""
    h = round((n * space[-2] / space[-1]) ** 0.5)
    return (h, n // h) if h > 0 and h * (n // h) == n and _same_shape((h, n // h), space[-2:]) else None


def _stretch(space: Sequence[int], reference: Sequence[int]) -> float:
    """How far the strides of the two image axes differ: 1 for the same proportions."""
    strides = [r / s for r, s in zip(reference[-2:], space[-2:], strict=True)]
    return max(strides) / min(strides)


def _same_shape(space: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether ``space`` is ``reference`` seen at a coarser scale, the same in both image axes up to rounding."""
    return all(s <= r for s, r in zip(space, reference, strict=True)) and _stretch(space, reference) < 1.5


def map_layout(
    shape: Sequence[int], input_shapes: Sequence[Sequence[int]], frames: int | None = None
) -> MapLayout | None:
    """Read a shape as a feature map of one of the inputs, or None where it cannot be one.

    Channels come first unless only the other reading has the input's proportions. A (B, N, C) output of an image model is a
    token map when N, less at most five leading tokens, is a grid of those proportions.

    Args:
        frames: T of a model that answers once a frame. The axis of T frames is time there, and tokens are no grid.
    """
    clips = {frames} if frames else {s[2] for s in input_shapes if len(s) == 5}
    if len(shape) == 3 and (frames or len(clips.intersection(shape[1:])) == 1):
        axes = [axis for axis in (1, 2) if shape[axis] in clips]
        axes = axes or [axis for axis in (1, 2) if frames and at_rate_of(shape[axis], frames)]
        return MapLayout("B*C", shape[2]) if axes == [1] else MapLayout("BC*", shape[1])
    if frames and len(shape) in (4, 5):
        time = time_axis(shape[2:], frames) is not None if len(shape) == 4 else shape[2] == frames
        if time or shape[1] == frames:
            return MapLayout("BC*", shape[1]) if time else MapLayout("B*C", shape[-1])
    spaces = [tuple(s[2:]) if len(s) > 2 else tuple(s[1:]) for s in input_shapes if len(s) > 1]
    if len(shape) in (4, 5):
        same = [s for s in spaces if len(s) == len(shape) - 2]
        first, last = tuple(shape[2:]), tuple(shape[1:-1])
        if any(_same_shape(last, s) for s in same) and not any(_same_shape(first, s) for s in same):
            return MapLayout("B*C", shape[-1])
        return MapLayout("BC*", shape[1])
    if len(shape) == 3:
        _, a, b = shape
        for space in (s for s in spaces if len(s) >= 2):
            grids = [(prefix, grid) for prefix in range(min(6, a)) if (grid := _grid(a - prefix, space))]
            if grids:  # 21 tokens of a square image: five and 4x4, not one and 4x5
                prefix, grid = min(grids, key=lambda found: _stretch(found[1], space))
                return MapLayout("B*C", b, prefix, grid)
            grid = _grid(b, space)
            if grid:
                return MapLayout("BC*", a, 0, grid)
        if any(len(s) == 1 for s in spaces):
            return MapLayout("B*C", b) if any(a == s[0] != b for s in spaces) else MapLayout("BC*", a)
    return None


def at_rate_of(n: int, frames: int) -> bool:
    """Whether n moments can be those of so many frames, at this rate or at a multiple or fraction of it."""
    return n > 1 and (n % frames == 0 or frames % n == 0)


def time_axis(space: Sequence[int], frames: int) -> int | None:
    """Which axis of a map's *space is time, in a model that answers once for each of ``frames`` frames; None where there is none.

    It is the first of three and the only one of one. Of two (a spectrogram) it is the one of T moments, or of a multiple or
    fraction of T; the last where both are, as torchaudio lays them out.
    """
    if len(space) != 2:
        return 0 if space else None
    for fits in (lambda n: n == frames, lambda n: at_rate_of(n, frames)):
        found = [axis for axis in (0, 1) if fits(space[axis])]
        if found:
            return found[-1]
    return None


def _varies(x: Tensor) -> bool:
    """Whether any row has two values along the last axis."""
    return bool((x != x[..., :1]).any())


# ---- finding the feature map that feeds the classifier -------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A module whose output is a feature map."""

    name: str
    shape: tuple[int, ...]
    layout: MapLayout
    frames: bool = False  # the model answers once a frame

    def __str__(self) -> str:
        return f"{self.name!r} {self.shape}"


def _try(model: nn.Module, inputs: Inputs, example: Inputs) -> Any:
    """Run the model on ``inputs``, a part of the user's ``example``."""
    try:
        return call(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(example)) or type(example).__name__
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model cannot run on the example {shapes}: {why}") from error


def _one_sample(inputs: Any) -> Any:
    """The first sample of a batch, when every tensor in it has the same first axis."""
    if batch_size(inputs) is None:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {k: _one_sample(v) for k, v in inputs.items()}
    return tuple(_one_sample(v) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _candidates(model: nn.Module, inputs: Inputs, example: Inputs) -> list[Site]:
    """Every spatial map that a module called once returns, in the order in which they are ready, each by its outermost name."""
    outputs: list[tuple[str, Tensor]] = []
    calls: dict[str, int] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    with hooked(*((module, recorder(name)) for name, module in model.named_modules() if name)):
        logits = logits_of(_try(model, inputs, example), inputs)
    frames = _frames(logits)
    shapes = [t.shape for t in tensors(inputs)]
    contrast = any(_varies(t.flatten(1)) for t in tensors(inputs) if t.ndim > 1)
    sites: dict[int, Site] = {}
    for (
        name,
        output,
    ) in outputs:  # children return before their parents, so the outermost name of a tensor wins
        layout = map_layout(output.shape, shapes, frames) if output.ndim else None
        if layout and layout.channels > 1 and calls[name] == 1 and len(output) == len(logits):
            positions = channels_first(output, layout.layout, layout.prefix).flatten(2)
            # One value repeated over the positions is no map (VGG's 7x7 pooling of a 1x1 map).
            if positions.shape[2] < 2 or (contrast and not _varies(positions)):
                continue
            sites.pop(id(output), None)
            sites[id(output)] = Site(name, tuple(output.shape), layout, frames is not None)
    return list(sites.values())


def _frames(logits: Tensor) -> int | None:
    """T of logits (B, T, K), None of (B, K)."""
    return logits.shape[1] if logits.ndim == 3 else None


def _poison(layout: MapLayout, channel: int | None = None) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        positions = channels_first(output, layout.layout, layout.prefix)
        (positions if channel is None else positions[:, channel]).fill_(torch.nan)
        return output

    return hook


def find_site(model: nn.Module, example: Inputs) -> Site:
    """The feature map that feeds the classifier: the last one whose positions reach the logits and that nothing bypasses.

    For a vision transformer with a class token that is the map before the last block: after it, only the class token is read. A map
    with one channel a class, each read by its own logit alone, is the classifier's output (SqueezeNet's), not what feeds it.

    Raises:
        ValueError: if no spatial map feeds the output, or several do side by side (the candidates are listed).
    """
    held: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}

    def poisoned(*sites: Site, channel: int | None = None) -> Tensor:
        """Which logits (B, K) or (B, T, K) turn NaN when these maps do and the held ones keep their values."""
        poisons = ((model.get_submodule(s.name), _poison(s.layout, channel)) for s in sites)
        with hooked(*poisons, *held.values()):
            return logits_of(call(model, inputs), inputs).isnan()

    def hold(site: Site) -> None:
        module, clean = model.get_submodule(site.name), []
        with hooked((module, lambda m, a, output: clean.append(output.clone()))):
            call(model, inputs)
        held[site.name] = module, lambda m, a, output: clean[0].clone()

    def beside(site: Site) -> list[Site]:
        """The candidates that are not computed from this one: what precedes it, and other streams."""
        after: set[str] = set()

        def look(name: str) -> Callable[..., None]:
            return lambda m, a, output: after.add(name) if output.isnan().any() else None

        looks = ((model.get_submodule(s.name), look(s.name)) for s in candidates)
        with hooked((model.get_submodule(site.name), _poison(site.layout)), *looks):
            call(model, inputs)
        return [s for s in candidates if s.name not in after]

    def feeds(site: Site) -> bool:
        reached = poisoned(site)
        if reached.shape[-1] == site.layout.channels > 1 and reached.any():
            return bool(poisoned(site, channel=0)[..., 1:].any())
        return bool(reached.any())

    with evaluating(model):
        inputs = _one_sample(
            example
        )  # a few forward passes follow: shapes and NaN need no more than one sample
        candidates = _candidates(model, inputs, example)
        for site in reversed(candidates):
            if feeds(site):
                hold(site)
                if not poisoned(*beside(site)).any():
                    return site
                held.clear()
        side_by_side = []
        for site in reversed(candidates):
            if feeds(site):
                hold(site)
                side_by_side.append(site)
    if side_by_side:
        streams = ", ".join(f"'stream{i}': {s.name!r}" for i, s in enumerate(side_by_side))
        raise ValueError(
            f"several feature maps feed the classifier side by side: {', '.join(map(str, side_by_side))}. Name the one to explain "
            f"with at={side_by_side[0].name!r}, or all with at={{{streams}}}"
        )
    raise ValueError(
        "no spatial feature map feeds the output of this model, so there is nothing to draw a heatmap from: name a module with at=… "
        f"(modules: {', '.join(n for n, _ in list(model.named_modules())[1:9])} …)"
    )


def _named_site(model: nn.Module, example: Inputs, name: str) -> Site:
    """The site that the user named."""
    names = dict(model.named_modules())
    if name not in names or not name:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise ValueError(
            f"at={name!r}: the model has no such module" + (f"; close: {', '.join(close)}" if close else "")
        )
    outputs: list[Any] = []
    with evaluating(model), hooked((names[name], lambda m, a, output: outputs.append(output))):
        logits = logits_of(_try(model, example, example), example)
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim < 2:
        found = (
            f"is called {len(outputs)} times" if len(outputs) != 1 else f"returns {type(outputs[0]).__name__}"
        )
        raise ValueError(
            f"at={name!r} {found}: an SE block needs a module that is called once and returns one tensor (B, C, …)"
        )
    shape = tuple(outputs[0].shape)
    if shape[0] != len(logits):
        raise ValueError(
            f"at={name!r} returns {shape} for a batch of {len(logits)}: an SE block needs one map (C, …) for each sample, first axis first"
        )
    frames = _frames(logits)
    channels_axis = MapLayout("BC*", shape[1])  # also the reading of a (B, C) vector: gates, but no heatmap
    layout = map_layout(shape, [t.shape for t in tensors(example)], frames) or channels_axis
    return Site(name, shape, layout, frames is not None)


# ---- recognising global average pooling + linear ------------------------------------------------------------------------


def agrees(got: Tensor, want: Tensor, like: Tensor | None = None) -> bool:
    """Whether logits are the same up to rounding, relative to the largest of ``like`` (by default of ``want``)."""
    slack = 1e-4 if want.dtype in (torch.float32, torch.float64) else 5e-2
    largest = (want if like is None else like).abs().max().clamp_min(1e-6)
    return got.shape == want.shape and bool((got - want).abs().max() <= slack * largest)


class Linear:
    """A linear layer behind global average pooling: means (n, C) -> logits (n, K).

    Means (n, K, C) that every logit has to itself are read each by its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.detach().float()  # (K, C)
        self.bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.detach().float()

    def __call__(self, pooled: Tensor) -> Tensor:
        if pooled.ndim == 3:
            return (pooled * self.weight).sum(2) + self.bias
        return pooled @ self.weight.T + self.bias


def average(x: Tensor, layout: Layout) -> Tensor:
    """The map with every spatial axis averaged to one: (B, C, 1, …) or (B, 1, …, C)."""
    return x.mean(tuple(range(2, x.ndim) if layout == "BC*" else range(1, x.ndim - 1)), keepdim=True)


def reads_mean(x: Tensor, layout: Layout, into: Tensor) -> bool | None:
    """Whether what a layer reads, ``into`` (B, C), is the mean of a map: False for mean(F), True for mean(ReLU(F)), else None."""
    slack = (1e-5 if into.dtype in (torch.float32, torch.float64) else 2e-2) * float(into.abs().max() + 1e-12)
    for rectifies in (False, True):
        read = average(x.relu() if rectifies else x, layout).flatten(1)
        if read.shape == into.shape and torch.allclose(read.float(), into.float(), rtol=1e-4, atol=slack):
            return rectifies
    return None


def _linear_head(model: nn.Module, example: Inputs, site: Site, layout: MapLayout) -> tuple[nn.Linear, bool]:
    """The one linear layer between the mean of a site's map and the logits, by value, and whether a ReLU precedes the mean.

    Raises:
        ValueError: if the head is anything else.
    """
    maps: list[Tensor] = []
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    # A copy of the map: an in-place ReLU may follow it.
    watch = [(model.get_submodule(site.name), lambda m, args, output: maps.append(output.clone()))]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with (
        evaluating(model),
        hooked(*watch, *((m, lambda m, a, out: calls.append((m, a[0], out))) for m in layers)),
    ):
        output = _try(model, example, example)
        logits = logits_of(output)
        if calls and not layout.prefix and maps[0].ndim > 2:
            layer, into, made = calls[-1]
            rectifies = reads_mean(maps[0], layout.layout, into) if made is logits or made is output else None
            # A subclass may do more than its weights say.
            if rectifies is not None and agrees(Linear(layer.weight, layer.bias)(into.float()), logits):
                return layer, rectifies
    raise ValueError(
        f"per_target=True: what follows {site.name!r} is not global average pooling and one linear layer, so its targets cannot have "
        "gates of their own: use per_target=False, or name the averaged map with at="
    )


# ---- attaching -----------------------------------------------------------------------------------------------------------


def _apply_block(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    # A module-level function that finds its block in the module: it survives deepcopy, pickling and torch.compile.
    return module.__dict__[f"_{ATTRIBUTE}"](output)


def _apply_target_gates(layer: nn.Linear, args: Any, output: Tensor) -> Tensor:
    return layer.__dict__[f"_{ATTRIBUTE}"].logits(layer, args[0], output)


def _home(model: nn.Module) -> nn.Module:
    """The module that owns the block: the model itself, unless it is a Sequential, which would run it as one more layer."""
    while isinstance(model, nn.Sequential):
        model = model[-1]
    return model


@overload
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: str | None = ...,
    reduction: int = ...,
    start: Start = ...,
    layout: Layout | None = ...,
    pool: Literal["sample", "batch"] = ...,
    per_target: bool = ...,
) -> SEBlock: ...
@overload
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: Mapping[str, str],
    reduction: int = ...,
    start: Start = ...,
    layout: Layout | None = ...,
    pool: Literal["sample", "batch"] = ...,
    per_target: Literal[False] = ...,
) -> dict[str, SEBlock]: ...
def attach_se(
    model: nn.Module,
    example: Inputs,
    *,
    at: str | Mapping[str, str] | None = None,
    reduction: int = 16,
    start: Start = "identity",
    layout: Layout | None = None,
    pool: Literal["sample", "batch"] = "sample",
    per_target: bool = False,
) -> SEBlock | dict[str, SEBlock]:
    """Attach an SE block before the classification layer, in place (Roxo et al., 2024, section 3).

    The outputs do not change (``start="identity"``), no parameter is renamed, and a checkpoint of the bare model still loads.

    Args:
        model: any module that returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip; bare or wrapped.
            Evaluation mode is used and put back.
        example: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        at: the module whose output is the feature map, when the automatic choice is wrong; or {stream name: module} for several.
        reduction: r of the block's bottleneck.
        start: ``"identity"``, or ``"paper"`` for the usual initialisation with F' = s·F.
        layout: ``"BC*"`` or ``"B*C"`` when the shape of the map can be read both ways.
        pool: see :class:`SEBlock`.
        per_target: one block for each of the K outputs, a :class:`TargetSEBlock`, for a head that is global average pooling and one
            linear layer: the gates are (B, K, C), and so each output has maps of its own.

    Returns:
        The block, or {stream name: block}.

    Raises:
        ValueError: no spatial map, several side by side, an unknown module, an example that does not fit, blocks attached before, or
            ``per_target`` with another head or several streams.
    """
    options = BlockOptions(reduction, start, layout, pool, per_target)
    if not isinstance(at, Mapping):
        return attach_blocks(model, example, {"": at}, {"": options})[""]
    _check_streams(at)
    if per_target:
        raise ValueError(
            f"per_target=True with the streams at={dict(at)}: one module is needed, whose map is averaged for the classifier"
        )
    return attach_blocks(model, example, at, dict.fromkeys(at, options))


@dataclass(frozen=True)
class BlockOptions:
    """How an SE block is made; see :func:`attach_se`."""

    reduction: int = 16
    start: Start = "identity"
    layout: Layout | None = None
    pool: Literal["sample", "batch"] = "sample"
    per_target: bool = False


def attach_blocks(
    model: nn.Module, example: Inputs, at: Mapping[str, str | None], options: Mapping[str, BlockOptions]
) -> dict[str, SEBlock]:
    """:func:`attach_se` for streams that differ in their options.

    Args:
        at: {stream: module}; {"": module, or None to find it} for a single block without a stream.
        options: of each stream.
    """
    model = bare(model)
    if attached(model):
        raise ValueError("the model has an SE block already: call selib.detach_se(model) first")
    blocks: dict[str, SEBlock] = {}
    averaged: nn.Linear | None = None
    with torch.random.fork_rng(devices=[]):  # attaching must not shift the user's random numbers
        sites = {
            s: find_site(model, example) if w is None else _named_site(model, example, w)
            for s, w in at.items()
        }
        for stream, site in sites.items():
            o, found = options[stream], site.layout
            if o.layout and o.layout != found.layout:
                found = MapLayout(o.layout, site.shape[1 if o.layout == "BC*" else -1])
            if o.per_target:
                averaged, rectifies = _linear_head(model, example, site, found)
                blocks[stream] = TargetSEBlock(
                    found.channels,
                    averaged.out_features,
                    o.reduction,
                    start=o.start,
                    layout=found.layout,
                    grid=found.grid,
                    pool=o.pool,
                    rectifies=rectifies,
                )
            else:
                blocks[stream] = SEBlock(
                    found.channels,
                    o.reduction,
                    start=o.start,
                    layout=found.layout,
                    prefix=found.prefix,
                    grid=found.grid,
                    pool=o.pool,
                )
            blocks[stream].site, blocks[stream].stream, blocks[stream].frames = site.name, stream, site.frames
    for block in blocks.values():
        module = model.get_submodule(block.site)
        reference = next(iter(module.parameters()), next(iter(model.parameters()), torch.empty(0)))
        block.to(reference.device)
        block.train(model.training)
        module.__dict__[f"_{ATTRIBUTE}"] = (
            block  # past Module.__setattr__: the block is registered once, at home
        )
        module.register_forward_hook(_apply_block)
    if averaged is not None:
        averaged.__dict__[f"_{ATTRIBUTE}"] = blocks[""]
        averaged.register_forward_hook(_apply_target_gates)
    _home(model).add_module(ATTRIBUTE, blocks[""] if "" in blocks else nn.ModuleDict(blocks))
    _forget_compiled()
    return blocks


def _check_streams(at: Mapping[str, str]) -> None:
    wrong = [name for name in at if not name or "." in name or hasattr(nn.ModuleDict, name)]
    if wrong or not at:
        raise ValueError(
            f"at={dict(at)}: it needs stream names without dots that are no methods of nn.ModuleDict"
        )
    if len(set(at.values())) < len(at):
        raise ValueError(f"at={dict(at)}: every stream needs a module of its own")


def attached(model: nn.Module) -> dict[str, SEBlock]:
    """The attached blocks by stream name ("" for a single one); empty when there are none."""
    found = (m.__dict__[f"_{ATTRIBUTE}"] for m in bare(model).modules() if f"_{ATTRIBUTE}" in m.__dict__)
    return {block.stream: block for block in found}


def detach_se(model: nn.Module) -> None:
    """Take every attached SE block out: the model is as it was before ``attach_se``, bit for bit.

    Raises:
        ValueError: if the model has no attached block.
    """
    model = bare(model)
    if not attached(model):
        raise ValueError("the model has no attached SE block")
    for module in list(model.modules()):
        module._modules.pop(ATTRIBUTE, None)
        if module.__dict__.pop(f"_{ATTRIBUTE}", None) is not None:
            for key, hook in list(module._forward_hooks.items()):
                if hook in (_apply_block, _apply_target_gates):
                    del module._forward_hooks[key]
    _forget_compiled()


def _forget_compiled() -> None:
    # Code that torch.compile made before does not notice that hooks come or go.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
