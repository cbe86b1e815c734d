"""Find the feature map that feeds the classifier, by running the model, not by knowing it.

It is the last map whose positions reach the output and that nothing bypasses. What reaches what is asked by
changing a map a little and looking for what changes behind it. A copy of the model is asked: probing leaves
no trace in the model itself.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from selib.forward import Inputs, batch_size, call, evaluating, hooked, logits_of, take, tensors
from selib.layout import MapLayout, Space, map_layout
from selib.se import Layout, channels_first

# ---- what the layers say about the channels ----------

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


# ---- candidates ----------


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

    Weights that are all zero, as a new classifier's may be, are random in the copy: a probe would see nothing
    pass through them.

    Raises:
        ValueError: the model cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        empty = nn.parameter.is_lazy(p) or p.device.type == "meta"
        if not (empty or name.endswith("bias") or bool(p.any())):
            noise = 0.1 * torch.randn(p.shape, generator=generator)
            shared[id(p)] = nn.Parameter(noise.to(p), requires_grad=False)
    for module in model.modules():
        forward = vars(module).get("forward")
        wrapped = isinstance(forward, FunctionType) and not hasattr(module, "_orig_mod")
        if wrapped or isinstance(module, torch.jit.ScriptModule):
            shared[id(module)] = module  # a copy of it would run the original's forward
        for tensor in _inside(vars(module)):
            if not tensor.is_leaf:  # deepcopy refuses what autograd has computed
                shared[id(tensor)] = tensor.detach()
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the model cannot be copied ({why}), so it cannot be probed without leaving traces: name the "
            "module whose output is the feature map with at="
        ) from error


def _inside(value: Any) -> Iterator[Tensor]:
    """The tensors of nested containers, as they are."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _inside(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _inside(inner)


def _try(model: nn.Module, inputs: Inputs, example: Inputs) -> Any:
    """Run the model on ``inputs``, a part of the user's ``example``."""
    try:
        return call(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(example)) or type(example).__name__
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model cannot run on the example {shapes}: {why}") from error


Noted = tuple[Layout, Tensor]
"""A layout, and the tensor it is of, which must live for its id to be its own."""


class _Look:
    """One pass over the model: the outputs of its modules in order, and who reads and writes them."""

    def __init__(self, model: nn.Module, inputs: Inputs, example: Inputs) -> None:
        self.outputs: list[tuple[str, Any]] = []
        self._read: dict[int, Noted] = {}
        self._written: dict[int, Noted] = {}
        with hooked(*((module, self._watch(name)) for name, module in model.named_modules() if name)):
            self.logits = logits_of(_try(model, inputs, example), inputs)
        self.shapes = [t.shape for t in tensors(inputs)]
        self.frames = self.logits.shape[1] if self.logits.ndim == 3 else None

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs.append((name, output))
            if isinstance(module, nn.RNNBase) and module.batch_first and isinstance(output[0], Tensor):
                _note(self._written, output[0], ("B*C", output[0].shape[-1]))
            if not isinstance(output, Tensor):
                return
            _note(self._written, output, _channels_of(module, read=False))
            if args and isinstance(args[0], Tensor):
                _note(self._read, args[0], _channels_of(module, read=True))
                kept = type(module).__module__ in _KEEPS or isinstance(module, nn.Identity)
                if kept and id(args[0]) in self._written:
                    self._written.setdefault(id(output), self._written[id(args[0])])

        return hook

    def _known(self, output: Tensor) -> Layout | None:
        """Where the next layer reads the channels of a map, else where they were written."""
        noted = self._read.get(id(output)) or self._written.get(id(output))
        return noted[0] if noted else None

    def calls(self, name: str) -> int:
        return sum(called == name for called, _ in self.outputs)

    def site(self, name: str, output: Tensor) -> Site | None:
        """A module's output as a feature map; None where its layout cannot be told."""
        maps: list[tuple[str, Space]] = []  # those (B, C, *space) that were ready before
        for other, tensor in self.outputs:
            if tensor is output or output.ndim != 3:
                break
            is_map = isinstance(tensor, Tensor) and tensor.ndim in (4, 5) and len(tensor) == len(output)
            if is_map and self._known(tensor) != "B*C":
                maps.append((other, tuple(tensor.shape[2:])))
        spaces = [space for _, space in maps]
        layout = map_layout(output.shape, self.shapes, self.frames, self._known(output), spaces)
        if layout is None:
            return None
        source = next((other for other, space in reversed(maps) if space == layout.grid), "")
        return Site(name, tuple(output.shape), layout, self.frames is not None, source)


def _note(notes: dict[int, Noted], tensor: Tensor, found: tuple[Layout, int] | None) -> None:
    if found and tensor.ndim > 2 and tensor.shape[1 if found[0] == "BC*" else -1] == found[1]:
        notes.setdefault(id(tensor), (found[0], tensor))


def candidates(model: nn.Module, inputs: Inputs, example: Inputs) -> tuple[list[Site], list[str]]:
    """The spatial maps that modules called once return, in the order in which they are ready.

    Returns:
        The sites, each by its outermost name, and the outputs whose layout cannot be told, as text.
    """
    look = _Look(model, inputs, example)
    contrast = any(_varies(t.flatten(1)) for t in tensors(inputs) if t.ndim > 1)
    sites: dict[int, Site] = {}
    unread: dict[int, str] = {}
    for name, output in look.outputs:  # children return before their parents: the outermost name wins
        is_map = isinstance(output, Tensor) and output.ndim > 2 and len(output) == len(look.logits)
        if not is_map or look.calls(name) > 1:
            continue
        site = look.site(name, output)
        if site is None or site.layout.channels < 2:
            unread[id(output)] = f"{name!r} {tuple(output.shape)}"
            continue
        positions = channels_first(output, site.layout.layout, site.layout.prefix).flatten(2)
        # One value repeated over the positions is no map (VGG's 7x7 pooling of a 1x1 map).
        if positions.shape[2] > 1 and (_varies(positions) or not contrast):
            sites.pop(id(output), None)
            sites[id(output)] = site
    return list(sites.values()), list(unread.values())


def _varies(x: Tensor) -> bool:
    """Whether any row has two values along the last axis."""
    return bool((x != x[..., :1]).any())


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
    with evaluating(model):
        look = _Look(model, example, example)
    outputs = [output for called, output in look.outputs if called == name]
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim < 2:
        once = (
            f"returns {type(outputs[0]).__name__}" if len(outputs) == 1 else f"is called {len(outputs)} times"
        )
        raise ValueError(
            f"at={name!r} {once}: an SE block needs a module that is called once and returns one tensor "
            "(B, C, …)"
        )
    output = outputs[0]
    shape = tuple(output.shape)
    if shape[0] != len(look.logits):
        raise ValueError(
            f"at={name!r} returns {shape} for a batch of {len(look.logits)}: an SE block needs a map (C, …) "
            "for each sample, first axis first"
        )
    vector = Site(name, shape, MapLayout("BC*", shape[1]), look.frames is not None)  # no heatmap
    return look.site(name, output) or vector


# ---- probing ----------


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
                marks[name] = torch.stack([output.float().sum(), output.float().square().sum()])
                if name in self.held:
                    return self.held[name].clone()
                return changed[name](output) if name in changed else output

            return look

        torch.default_generator.manual_seed(0)  # dropout in evaluation mode: the same in every pass
        with hooked(*((self.model.get_submodule(s.name), hook(s.name)) for s in self.sites)):
            return logits_of(call(self.model, self.inputs), self.inputs).float(), marks

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
        for strength in (1.0, 10.0):
            _, marks = self._run({site.name: self._change(site, strength, None)})
            after |= {name for name in marks if not torch.equal(marks[name], self.clean[1][name])}
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
        batch = batch_size(example)
        inputs = example if batch is None else take(example, 0, batch)  # one sample is enough
        sites, unread = candidates(model, inputs, example)
        probe = _Probe(model, inputs, sites)
        feeding = []
        for site in reversed(sites):
            if not probe.feeds(site):
                continue
            feeding.append(site)
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
