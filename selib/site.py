"""Find the feature map that feeds the classifier, by running the model, not by knowing it.

It is the last map whose positions reach the output and that nothing bypasses. What reaches what is asked by
changing a map a little and looking for what changes behind it. A copy of the model is asked: probing leaves
no trace in the model itself.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selib.forward import Inputs, batch_size, call, evaluating, hooked, logits_of, take, tensors
from selib.layout import MapLayout, Space, map_layout
from selib.se import Layout, channels_first

# ---- what the layers say about the channels
# ------------------------------------------------------------------

_FIRST = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
)  # channels on axis 1
_LAST = (nn.Linear, nn.LayerNorm)  # channels on the last axis
_KEEPS = ("torch.nn.modules.activation", "torch.nn.modules.dropout")  # and nn.Identity: as they came


def _channels_of(module: nn.Module, *, read: bool) -> tuple[Layout, int] | None:
    """Where a layer reads (or writes) its channels, and how many."""
    names = ("in_channels", "in_features") if read else ("out_channels", "out_features")
    for name in (*names, "num_features", "num_channels"):
        if isinstance(module, (*_FIRST, *_LAST)) and hasattr(module, name):
            return ("BC*" if isinstance(module, _FIRST) else "B*C"), getattr(module, name)
    if isinstance(module, nn.LayerNorm):
        return "B*C", module.normalized_shape[-1]
    return None


Noted = tuple[Layout, Tensor]
"""A layout, and the tensor it is of, which must live for its id to be its own."""


@dataclass
class _Seen:
    """What one pass over the model shows: its modules' outputs in order, and who reads and writes them."""

    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    read: dict[int, Noted] = field(default_factory=dict)
    written: dict[int, Noted] = field(default_factory=dict)

    def watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if isinstance(module, nn.RNNBase) and module.batch_first:
                _note(self.written, output[0], ("B*C", output[0].shape[-1]))
            if not isinstance(output, Tensor):
                return
            before = args[0] if args and isinstance(args[0], Tensor) else None
            if before is not None:
                _note(self.read, before, _channels_of(module, read=True))
            _note(self.written, output, _channels_of(module, read=False))
            kept = type(module).__module__ in _KEEPS or isinstance(module, nn.Identity)
            if before is not None and kept and id(before) in self.written:
                self.written.setdefault(id(output), self.written[id(before)])
            self.outputs.append((name, output))

        return hook

    def known(self, output: Tensor) -> Layout | None:
        """Where the next layer reads the channels of a map, else where they were written."""
        noted = self.read.get(id(output)) or self.written.get(id(output))
        return noted[0] if noted else None


def _note(notes: dict[int, Noted], tensor: Tensor, found: tuple[Layout, int] | None) -> None:
    if found and tensor.ndim > 2 and tensor.shape[1 if found[0] == "BC*" else -1] == found[1]:
        notes.setdefault(id(tensor), (found[0], tensor))


# ---- candidates
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A module whose output is a feature map.

    Attributes:
        frames: the model answers once a frame.
        grid_from: the module whose map (B, C, *space) lies on the grid of these tokens, "" where there is
            none.
    """

    name: str
    shape: tuple[int, ...]
    layout: MapLayout
    frames: bool = False
    grid_from: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} {self.shape}"


def a_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters and has buffers and attributes of its own.

    Raises:
        ValueError: the model cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses what autograd has computed
                shared[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the model cannot be copied ({why}), so it cannot be probed without leaving traces: name the "
            "module whose output is the feature map with at="
        ) from error


def _try(model: nn.Module, inputs: Inputs, example: Inputs) -> Any:
    """Run the model on ``inputs``, a part of the user's ``example``."""
    try:
        return call(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(example)) or type(example).__name__
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model cannot run on the example {shapes}: {why}") from error


def _varies(x: Tensor) -> bool:
    """Whether any row has two values along the last axis."""
    return bool((x != x[..., :1]).any())


def _frames(logits: Tensor) -> int | None:
    """T of logits (B, T, K), None of (B, K)."""
    return logits.shape[1] if logits.ndim == 3 else None


def _one_sample(inputs: Inputs) -> Inputs:
    batch = batch_size(inputs)
    return inputs if batch is None else take(inputs, 0, batch)


def _maps_before(seen: _Seen, output: Tensor) -> list[tuple[str, Space]]:
    """The maps (B, C, *space) that were ready before an output."""
    found: list[tuple[str, Space]] = []
    for name, tensor in seen.outputs:
        if tensor is output:
            break
        if tensor.ndim in (4, 5) and len(tensor) == len(output) and seen.known(tensor) != "B*C":
            found.append((name, tuple(tensor.shape[2:])))
    return found


def candidates(model: nn.Module, inputs: Inputs, example: Inputs) -> tuple[list[Site], list[str]]:
    """The spatial maps that modules called once return, in the order in which they are ready.

    Returns:
        The sites, each by its outermost name, and the outputs whose layout cannot be told, as text.
    """
    seen = _Seen()
    with hooked(*((module, seen.watch(name)) for name, module in model.named_modules() if name)):
        logits = logits_of(_try(model, inputs, example), inputs)
    shapes = [t.shape for t in tensors(inputs)]
    contrast = any(_varies(t.flatten(1)) for t in tensors(inputs) if t.ndim > 1)
    sites: dict[int, Site] = {}
    unread: dict[int, str] = {}
    for name, output in seen.outputs:  # children return before their parents: the outermost name wins
        if output.ndim < 3 or seen.calls[name] > 1 or len(output) != len(logits):
            continue
        before = _maps_before(seen, output) if output.ndim == 3 else []
        layout = map_layout(
            output.shape, shapes, _frames(logits), seen.known(output), [space for _, space in before]
        )
        if layout is None or layout.channels < 2:
            unread[id(output)] = f"{name!r} {tuple(output.shape)}"
            continue
        positions = channels_first(output, layout.layout, layout.prefix).flatten(2)
        # One value repeated over the positions is no map (VGG's 7x7 pooling of a 1x1 map).
        if positions.shape[2] < 2 or (contrast and not _varies(positions)):
            continue
        source = next((n for n, space in reversed(before) if space == layout.grid), "")
        sites.pop(id(output), None)
        sites[id(output)] = Site(name, tuple(output.shape), layout, logits.ndim == 3, source)
    return list(sites.values()), list(unread.values())


# ---- probing
# -------------------------------------------------------------------------------------------------


class _Probe:
    """Changes maps of a model and looks at what changes behind them.

    A change is random, positive, and as large as the map's values; where it has no effect, a ten times larger
    one is tried, since a maximum or a rounding may swallow the first.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> None:
        self.model, self.inputs, self.sites = model, inputs, sites
        self.held: dict[str, Tensor] = {}  # maps that keep their values whatever changes before them
        self.clean = self._run({})
        again = self._run({})[0]
        self._noise = float(
            (again - self.clean[0]).abs().nan_to_num().max()
        )  # of operators that are not exact

    def _run(self, changed: dict[str, Callable[[Tensor], Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and a fingerprint of every site's map, with some maps changed and the held ones as they
        were.
        """
        marks: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., Tensor]:
            def look(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                marks[name] = torch.stack([output.double().sum(), output.double().square().sum()])
                if name in self.held:
                    return self.held[name].clone()
                return changed[name](output) if name in changed else output

            return look

        torch.default_generator.manual_seed(0)  # dropout in evaluation mode: the same in every pass
        with hooked(*((self.model.get_submodule(s.name), hook(s.name)) for s in self.sites)):
            return logits_of(call(self.model, self.inputs), self.inputs).double(), marks

    def _change(self, site: Site, strength: float, channel: int | None) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            output = output.clone()
            positions = channels_first(output, site.layout.layout, site.layout.prefix)
            region = positions if channel is None else positions[:, channel]
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(region.shape, generator=generator).to(region.device, region.dtype)
            region += strength * (region.abs().mean() or 1.0) * noise
            return output

        return change

    def reached(self, *sites: Site, channel: int | None = None) -> Tensor:
        """Which logits (B, K) or (B, T, K) change when these maps do, or one channel of them."""
        found = torch.zeros_like(self.clean[0], dtype=torch.bool)
        for strength in (1.0, 10.0):
            changed = {site.name: self._change(site, strength, channel) for site in sites}
            logits, _ = self._run(changed)
            found |= ~((logits - self.clean[0]).abs() <= self._noise)  # NaN counts as a change
            if bool(found.any()):
                break
        return found

    def hold(self, site: Site) -> None:
        """Keep a map as it is from now on."""
        keep: list[Tensor] = []
        torch.default_generator.manual_seed(0)
        with hooked((self.model.get_submodule(site.name), lambda m, a, output: keep.append(output.clone()))):
            call(self.model, self.inputs)
        self.held[site.name] = keep[0]

    def beside(self, site: Site) -> list[Site]:
        """The candidates that are not computed from this one: what precedes it, and other streams."""
        after: set[str] = set()
        held, self.held = self.held, {}
        for strength in (1.0, 10.0):
            _, marks = self._run({site.name: self._change(site, strength, None)})
            after |= {name for name in marks if not torch.equal(marks[name], self.clean[1][name])}
        self.held = held
        return [s for s in self.sites if s.name not in after and s.name != site.name]

    def feeds(self, site: Site) -> bool:
        """Whether a map's positions reach the logits, and it is not the classifier's own output
        (SqueezeNet's).
        """
        found = self.reached(site)
        if found.shape[-1] == site.layout.channels > 1 and bool(found.any()):
            return bool(self.reached(site, channel=0)[..., 1:].any())
        return bool(found.any())


def find_site(model: nn.Module, example: Inputs) -> Site:
    """The feature map that feeds the classifier: the last one whose positions reach the logits, unbypassed.

    For a vision transformer with a class token that is the map before the last block: after it, only the
    class token is read.

    Raises:
        ValueError: if no spatial map feeds the output, or several do side by side (the candidates are
            listed).
    """
    model = a_copy(model)
    with evaluating(model), torch.random.fork_rng(devices=[]):
        inputs = _one_sample(example)  # shapes and changes need no more than one sample
        sites, unread = candidates(model, inputs, example)
        probe = _Probe(model, inputs, sites)
        feeding = [site for site in reversed(sites) if probe.feeds(site)]
        for site in feeding:
            beside = probe.beside(site)
            probe.hold(site)
            if not bool(probe.reached(*beside).any()):
                return site
            probe.held.clear()
        side_by_side = []
        for site in feeding:
            if probe.feeds(site):
                probe.hold(site)
                side_by_side.append(site)
    if side_by_side:
        streams = ", ".join(f"'stream{i}': {s.name!r}" for i, s in enumerate(side_by_side))
        raise ValueError(
            "several feature maps feed the classifier side by side: "
            f"{', '.join(map(str, side_by_side))}. Name the one to explain with at={side_by_side[0].name!r}, "
            f"or all with at={{{streams}}}"
        )
    raise ValueError(_nothing_found(model, unread))


def _nothing_found(model: nn.Module, unread: Sequence[str]) -> str:
    if unread:
        return (
            "no feature map of a known layout feeds the output of this model. Outputs whose layout cannot be "
            f"told: {', '.join(unread[-8:])}. Name one with at=…, and say layout= and grid= with it"
        )
    names = ", ".join(name for name, _ in list(model.named_modules())[1:9])
    return (
        "no spatial feature map feeds the output of this model, so there is nothing to draw a heatmap from: "
        f"name a module with at=… (modules: {names} …)"
    )


def named_site(model: nn.Module, example: Inputs, name: str) -> Site:
    """The site that the user named.

    Raises:
        ValueError: no such module, or its output is not one map (B, C, …).
    """
    names = dict(model.named_modules())
    if name not in names or not name:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"at={name!r}: the model has no such module{hint}")
    try:
        model = a_copy(model)
    except ValueError:
        pass  # one forward pass is nothing that the model's owner would not do
    seen = _Seen()
    outputs: list[Any] = []
    watched = [(module, seen.watch(n)) for n, module in model.named_modules() if n]
    target = (model.get_submodule(name), lambda m, a, output: outputs.append(output))
    with evaluating(model), hooked(*watched, target):
        logits = logits_of(_try(model, example, example), example)
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim < 2:
        called = len(outputs) != 1
        found = f"is called {len(outputs)} times" if called else f"returns {type(outputs[0]).__name__}"
        raise ValueError(
            f"at={name!r} {found}: an SE block needs a module that is called once and returns one tensor "
            "(B, C, …)"
        )
    output = outputs[0]
    shape = tuple(output.shape)
    if shape[0] != len(logits):
        raise ValueError(
            f"at={name!r} returns {shape} for a batch of {len(logits)}: an SE block needs one map (C, …) for "
            "each sample, first axis first"
        )
    before = _maps_before(seen, output)
    shapes = [t.shape for t in tensors(example)]
    layout = map_layout(shape, shapes, _frames(logits), seen.known(output), [space for _, space in before])
    layout = layout or MapLayout("BC*", shape[1])  # also a vector (B, C): gates, but no heatmap
    source = next((n for n, space in reversed(before) if space == layout.grid), "")
    return Site(name, shape, layout, logits.ndim == 3, source)
