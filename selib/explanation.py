"""Explain a prediction by the SE vector: one forward pass, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selib.attach import (
    Inputs,
    attached,
    bare,
    call,
    evaluating,
    hooked,
    logits_of,
    tensors,
    time_axis,
    to_device,
)
from selib.head import CHUNK, Head, Trace
from selib.heatmap import at_maxima, normalize, resize, weighted_sum
from selib.se import Layout, SEBlock, TargetSEBlock, channels_first, scaled
from selib.select import All, NormalQuantile, Select

Method = Literal["influence", "gate", "top-gate"]
METHODS: tuple[Method, ...] = ("influence", "gate", "top-gate")
Over = Literal["frame", "clip"]
Target = int | Sequence[int] | Tensor | None


class Explanation:
    """What one forward pass says about a batch. Made by :func:`explain`.

    Of a model that answers once a frame, a target, the influence and the maps are each frame's own: where (B, C) or (B, *space) is said
    of them below, it is (B, C, T) and (B, T, h, w). The gates are the clip's.

    Attributes:
        logits: (B, K) float32, or (B, T, K) with an answer a frame.
        gates: (B, C) float32, the SE vector s; (B, K, C) when every target has gates of its own.
        features: (B, C, *space) float32, the input F of the SE block, tokens laid out on their grid.
        input_size: *space of the input, the default size of a heatmap; ``None`` when the inputs leave it open.
    """

    def __init__(
        self,
        logits: Tensor,
        gates: Tensor,
        raw: Tensor,
        head: Head,
        gain: float,
        grid: tuple[int, ...] | None,
        input_size: tuple[int, ...] | None,
    ) -> None:
        self.logits = logits.float()
        self.gates = gates.float()
        maps = channels_first(raw, head.layout, head.prefix).float()
        self.features = maps.unflatten(2, grid) if grid else maps
        self.input_size = input_size
        self._raw, self._head, self._gain = raw, head, gain
        self._influence: dict[
            tuple[int, ...], Tensor
        ] = {}  # by target: several maps are made of one influence

    @property
    def predicted(self) -> Tensor:
        """(B,) or (B, T) index of the largest logit."""
        return self.logits.argmax(-1)

    def _targets(self, target: Target) -> Tensor:
        """A target of each sample (B,), or of each frame (B, T)."""
        if target is None:
            return self.predicted
        *shape, classes = self.logits.shape
        given = torch.as_tensor(target, device=self.logits.device).long()
        by_frame = given.ndim == len(shape) == 2 and given.numel() > 1
        if by_frame and list(given.shape) != shape:
            raise ValueError(
                f"target is {tuple(given.shape)}, but there are {shape[0]} clips of {shape[1]} frames"
            )
        given = given if by_frame else given.flatten()
        if not by_frame and given.numel() not in (1, shape[0]):
            raise ValueError(f"target has {given.numel()} entries, but the batch has {shape[0]} samples")
        if bool(((given < 0) | (given >= classes)).any()):
            raise ValueError(f"target={given.tolist()} is not among the {classes} classes 0..{classes - 1}")
        return given if by_frame else given.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def gates_of(self, target: Target = None) -> Tensor:
        """The SE vector (B, C) that stands before the target's logit: the same for all targets, unless each has its own."""
        if self.gates.ndim == 2:
            return self.gates
        return self.gates[torch.arange(len(self.gates), device=self.gates.device), self._targets(target)]

    def _scaled(self, gates: Tensor) -> Tensor:
        return scaled(self._raw, gates, self._gain, self._head.layout)

    @torch.no_grad()
    def with_gates(self, gates: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (B, K) or (B, T, K) under a manipulated SE vector; only the head runs.

        Args:
            gates: of the shape of :attr:`gates` or what broadcasts to it, or a function of the gates, e.g.
                ``lambda s: s * rule.mask(s)``.
        """
        new = gates(self.gates) if callable(gates) else gates.to(self.gates)
        if self.gates.ndim == 3:
            return self._head.per_target(self._raw, self._gain * new.expand_as(self.gates))
        with evaluating(self._head.model):
            self._head.prepare()
            rows = self._head.effective(self._scaled(new.expand_as(self.gates)))
            if self._head.frames:
                return self._head.clips(rows[None])[0]
            if self._head.shared:
                return self._head(rows)
            return torch.cat([self._head(rows[i : i + 1], i) for i in range(len(rows))])

    @torch.no_grad()
    def influence(self, target: Target = None) -> Tensor:
        """How much the target's logit falls when one gate is set to zero and the others stay: (B, C), exact for any head.

        For global average pooling + linear it is w[k,c]·s[c]·mean(F[c]) and costs nothing; any other head runs C times, without
        the network before it. A gate is zero for the whole clip: (B, C, T) is the fall in each of its frames.
        """
        targets = self._targets(target)
        key = tuple(targets.flatten().tolist())
        if key not in self._influence:
            self._influence[key] = self._each_gates_fall(targets)
        return self._influence[key].clone()

    def _each_gates_fall(self, targets: Tensor) -> Tensor:
        head = self._head
        if head.frames:
            return self._falls(torch.eye(self.gates.shape[1], dtype=torch.bool), targets).movedim(0, 1)
        if head.linear is not None:
            pooled = head.effective(self._scaled(self.gates_of(targets))).float().flatten(1)
            return head.linear.weight[targets] * pooled
        with evaluating(head.model):
            head.prepare()
            rows = head.effective(self._scaled(self.gates))
            base = self.with_gates(self.gates).gather(1, targets[:, None])
            return torch.stack(
                [base[i] - self._ablated(rows[i], i, int(targets[i])) for i in range(len(rows))]
            )

    def _ablated(self, row: Tensor, sample: int, target: int) -> Tensor:
        """The target's logit with each of the C channels of one map set to zero: (C,)."""
        axis = 0 if self._head.layout == "BC*" else -1
        channels = row.shape[axis]
        chunk = max(1, 2**24 // max(1, row.numel()))  # 64 MB of float32 maps at a time
        found = []
        for start in range(0, channels, chunk):
            index = torch.arange(start, min(channels, start + chunk), device=row.device)
            rows = row[None].repeat(len(index), *[1] * row.ndim)
            rows.movedim(axis + 1 if axis == 0 else -1, 1)[
                torch.arange(len(index), device=row.device), index
            ] = 0
            found.append(self._head(rows, sample)[:, target])
        return torch.cat(found)

    def _falls(self, closed: Tensor, targets: Tensor) -> Tensor:
        """The fall (n, B, T) of each frame's target in n cases, in which the gates ``closed`` (n, C) are zero for the whole clip."""
        head = self._head
        with evaluating(head.model):
            head.prepare()
            rows = head.effective(self._scaled(self.gates))
            first = closed.to(rows.device).new_zeros(1, closed.shape[1])
            # The logits with all gates as they are come from the same run: what is rounded alike cancels.
            open_gates = (~torch.cat([first, closed.to(rows.device)])).to(rows.dtype)
            ones = [1] * (rows.ndim - 2)
            shape = (
                (-1, 1, closed.shape[1], *ones) if head.layout == "BC*" else (-1, 1, *ones, closed.shape[1])
            )
            index = targets[None, :, :, None]
            found = [
                logits.gather(3, index.expand(len(logits), -1, -1, -1))[..., 0]
                for part in open_gates.reshape(shape).split(max(1, CHUNK // rows.numel()))
                for logits in [head.clips(rows * part)]
            ]
        base, *fallen = torch.cat(found)
        return base - torch.stack(fallen)

    @torch.no_grad()
    def modalities(
        self, target: Target = None, *, names: Sequence[str] | Mapping[str, int] | None = None
    ) -> Modalities:
        """How much each modality counts, from gates on features that stand side by side, a segment of channels for each modality.

        Args:
            target: as of :meth:`influence`.
            names: the modalities in the order of their segments, which are equally wide, or {name: channels}; by default the model's
                attribute ``modalities``.

        Raises:
            ValueError: names that do not fit the channels, or none and a model that does not say them.
        """
        targets = self._targets(target)
        channels = self.gates.shape[-1]
        segments = _segments(
            names if names is not None else getattr(self._head.model, "modalities", None), channels
        )
        index = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(list(segments.values())))
        member = (index == torch.arange(len(segments))[:, None]).to(self.gates.device)  # (M, C)
        gates = self.gates_of(targets)
        means = gates @ member.to(gates).T / member.sum(1)
        if self._head.frames:
            influence = self._falls(member, targets).movedim(0, 1)
        else:
            logits = [self.with_gates(self.gates * keep) for keep in (torch.ones_like(member[0]), *~member)]
            base, *fallen = (y.gather(1, targets[:, None])[:, 0] for y in logits)
            influence = torch.stack([base - y for y in fallen], 1)
        size = influence.abs().flatten(2).mean(2) if influence.ndim == 3 else influence.abs()
        return Modalities(tuple(segments), means, influence, _shares(size), _shares(means))

    def channel_weights(self, method: Method = "influence", target: Target = None) -> Tensor:
        """What a method ranks channels by: the influence, or the gates. (B, C)."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
        return self.influence(target) if method == "influence" else self.gates_of(target)

    def selected(
        self, method: Method = "influence", target: Target = None, select: Select | None = None
    ) -> Tensor:
        """Which channels a heatmap is made of: bool (B, C). Without ``select``: the paper's rule for "top-gate", else all.

        By influence, every frame has channels of its own.
        """
        return self._chosen(self.channel_weights(method, target), method, select)

    @staticmethod
    def _chosen(weights: Tensor, method: Method, select: Select | None) -> Tensor:
        rule = select or (NormalQuantile() if method == "top-gate" else All())
        return rule.mask(weights.mT).mT if weights.ndim == 3 else rule.mask(weights)

    def _read_maps(self) -> Tensor:
        """The maps as the head reads them: their positive part where it begins with a ReLU. Maps without negative values need no trial."""
        if not bool((self.features < 0).any()):
            return self.features
        self._head.prepare()
        return self.features.relu() if self._head.rectifies else self.features

    @torch.no_grad()
    def map(
        self,
        method: Method = "influence",
        target: Target = None,
        select: Select | None = None,
        *,
        over: Over = "frame",
    ) -> Tensor:
        """The heatmap before resizing and scaling: (B, *space), in units of the logit for "influence".

        For "influence" and global average pooling + linear the map is Σ_c w[k,c]·s[c]·F[c]: its mean over space is the target's
        logit minus its bias. For another head each channel's influence is spread over space in proportion to the channel's map.

        With an answer a frame, each frame's influence is spread over that frame of the channel's map, so that the mean of the map over
        the image axes is in each frame the sum of the influence of the channels that are not zero there. If the map has another number
        of frames, the influence is interpolated linearly between them; if it has no time axis, the mean over the frames is spread.
        With ``over="clip"`` it is the influence on the mean over the frames, spread over time as well: its mean over all axes is the sum
        of the influence. A head that carries what it saw from frame to frame answers in one frame for what was seen in another; there
        this map says where *and when*. A head that reads nothing of a frame but its maximum gets all of it where that maximum stands.
        """
        if over not in ("frame", "clip"):
            raise ValueError(f'over={over!r} is unknown: use "frame" or "clip"')
        if self.features.ndim < 3:
            raise ValueError(
                "the SE block sits on a vector (B, C), which has no positions: there is no heatmap, only gates and influence"
            )
        ranking = self.channel_weights(method, target)
        if over == "clip" and ranking.ndim == 3:
            ranking = ranking.mean(2)
        mask = self._chosen(ranking, method, select)
        maps = self._read_maps()
        if method == "top-gate":
            return weighted_sum(maps, mask / mask.sum(1, keepdim=True).clamp_min(1))
        if method == "gate":
            return weighted_sum(maps, self.gates_of(target) * mask)
        if self._head.linear is not None:
            weights = self._head.linear.weight[self._targets(target)] * self._gain * self.gates_of(target)
            return weighted_sum(maps, weights * mask)
        # The share of each position: signed maps have means near zero, so there the magnitude counts.
        maps = at_maxima(maps, self._head.time) if self._head.reads == "max" else maps.abs()
        if ranking.ndim == 3:
            return _spread(maps, ranking * mask, self._head.time)
        mean = maps.flatten(2).mean(2)
        weights = ranking * mask / mean.where(mean > 0, torch.ones_like(mean))
        return weighted_sum(maps, weights)

    def heatmap(
        self,
        method: Method = "influence",
        target: Target = None,
        *,
        select: Select | None = None,
        size: Sequence[int] | None = None,
        over: Over = "frame",
    ) -> Tensor:
        """The heatmap (B, *size) in [0, 1]; ``size`` defaults to the input's.

        Args:
            method: ``"influence"``: the channels weighted by their effect on the target's logit; evidence against the target is cut off
                at zero. ``"gate"``: weighted by their gates. ``"top-gate"``: the paper, the mean of the maps whose gates stand out.
            target: class index, one per sample or one for all; the predicted class by default. Only "influence" depends on it, unless
                every target has gates of its own.
            select: which channels take part, by the method's own ranking; see :mod:`selib.select`.
            over: with an answer a frame, "influence" on each frame's answer, or on that of the whole clip; see :meth:`map`.

        Raises:
            ValueError: unknown method, target out of range, no spatial map, or a size that does not fit.
        """
        raw = self.map(method, target, select, over=over)
        size = size if size is not None else self.input_size
        if size is None:
            raise ValueError("the inputs do not say which size the heatmap should have: pass size=")
        return normalize(resize(raw.relu() if method == "influence" else raw, size))


def _spread(maps: Tensor, influence: Tensor, time: int | None) -> Tensor:
    """Influence (B, C, T) of channels spread over their maps (B, C, *space), none negative, frame by frame -> (B, *space)."""
    if time is None:
        maps, influence = maps[:, :, None], influence.mean(2, keepdim=True)
    else:
        maps = maps.movedim(2 + time, 2)
        if influence.shape[2] != maps.shape[2]:
            influence = F.interpolate(influence, maps.shape[2], mode="linear", align_corners=False)
    flat = maps.flatten(3) if maps.ndim > 3 else maps[..., None]
    mean = flat.mean(3)
    weights = influence / mean.where(mean > 0, torch.ones_like(mean))
    spread = torch.einsum("bct,bctp->btp", weights, flat).reshape(len(maps), *maps.shape[2:])
    return spread[:, 0] if time is None else spread.movedim(1, 1 + time)


@dataclass(frozen=True)
class Modalities:
    """How much each of M modalities counts, by the gates on the fused features.

    Attributes:
        names: the modalities.
        gates: (B, M) the mean SE value of each modality's segment, as the authors of BIAS read it.
        influence: (B, M), or (B, M, T) with an answer a frame: how much the target's logit falls when all gates of a segment are set to
            zero and the others stay. It need not add up over the modalities.
        share: (B, M) the mean over time of the influence's magnitude, as a share of the modalities' sum; zeros where that is zero.
        gate_share: (B, M) the gates as a share of their sum.
    """

    names: tuple[str, ...]
    gates: Tensor
    influence: Tensor
    share: Tensor
    gate_share: Tensor


def _shares(parts: Tensor) -> Tensor:
    """Parts (B, M), none negative, as shares of their sum."""
    total = parts.sum(1, keepdim=True)
    return parts / total.where(total > 0, torch.ones_like(total))


def _segments(names: Any, channels: int) -> dict[str, int]:
    """{modality: channels} of the fused channels, in their order."""
    if names is None:
        raise ValueError(
            "the model has no attribute modalities that names the segments of the fused channels: pass names=, in their order"
        )
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"names={names!r}: the names of the modalities are needed, in the order of their channels"
        )
    if isinstance(names, Mapping):
        if any(width < 1 for width in names.values()) or sum(names.values()) != channels:
            raise ValueError(
                f"names={dict(names)}: the channels do not add up to the {channels} of the SE block"
            )
        return dict(names)
    if len(set(names)) < len(names) or channels % len(names):
        raise ValueError(
            f"names={tuple(names)}: {channels} channels are not {len(names)} equal segments of different names; "
            "pass {name: channels}"
        )
    return dict.fromkeys(names, channels // len(names))


@dataclass(frozen=True)
class Streams:
    """Explanations of a model with several SE blocks, by the stream names given to ``attach_se(at={…})``.

    Attributes:
        logits: (B, K), or (B, T, K) with an answer a frame.
    """

    logits: Tensor
    streams: dict[str, Explanation]

    def modalities(
        self,
        target: Target = None,
        *,
        names: Sequence[str] | Mapping[str, int] | None = None,
        stream: str = "fusion",
    ) -> Modalities:
        """How much each modality counts, from the gates on the fused features: :meth:`Explanation.modalities` of one stream.

        Args:
            stream: whose block sits on the fused features.

        Raises:
            ValueError: no such stream, or names that do not fit its channels.
        """
        if stream not in self.streams:
            raise ValueError(
                f"stream={stream!r}: there is no such SE block, only {', '.join(self.streams)}; name the one on the fused features"
            )
        return self.streams[stream].modalities(target, names=names)


@dataclass(frozen=True)
class _Gated:
    """A module that maps F to F' = gain·s·F: an attached block, or one the model was born with."""

    module: nn.Module
    gate: nn.Module  # its output is the gates
    layout: Layout = "BC*"
    prefix: int = 0
    grid: tuple[int, ...] | None = None
    gain: float = 1.0


def native_se(model: nn.Module, inputs: Inputs) -> str | None:
    """The name of the last SE block that the model itself has (MobileNetV3, EfficientNet, RegNetY, SENet …), or None.

    It is known by what it does: its output is its input times the (B, C, 1, …) output of one of its own submodules.
    """
    seen = _native(bare(model), inputs)
    return seen[0] if seen else None


def _native(model: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
    vectors: list[tuple[str, Tensor]] = []
    found: list[tuple[str, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if (
                not isinstance(output, Tensor)
                or output.ndim < 4
                or not args
                or not isinstance(args[0], Tensor)
            ):
                return
            if output.shape[2:].numel() == 1:
                vectors.append((name, output))
            elif args[0].shape == output.shape:
                for inner, gates in reversed(vectors):
                    fits = inner.startswith(f"{name}.") and gates.shape[:2] == output.shape[:2]
                    if fits and torch.equal(args[0] * gates, output):
                        found.append((name, inner))
                        break

        return look

    with evaluating(model), hooked(*((m, hook(name)) for name, m in model.named_modules() if name)):
        call(model, inputs)
    return found[-1] if found else None


_OTHER_HEAD = "the head is no longer the linear layer that the gates of each target were attached to: call selib.detach_se(model), then attach them again"


class SEExplainer:
    """Explain many batches: ``with selib.SEExplainer(model) as explain: ex = explain(images)``.

    The hooks live as long as the ``with`` block. Model mode, gradients, buffers and outputs are untouched.

    Args:
        model: with attached SE blocks, or with blocks of its own, of which the last one is read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self._hooks = ExitStack()
        self._places: dict[str, _Gated] | None = None
        self._inside: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        self._last: tuple[nn.Linear, Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._places = None

    def _prepare(self, inputs: Inputs) -> dict[str, _Gated]:
        blocks = attached(self.model)
        places = {n: _Gated(b, b.vector, b.layout, b.prefix, b.grid, b.gain) for n, b in blocks.items()}
        if not places:
            native = _native(self.model, inputs)
            if native is None:
                raise ValueError(
                    "the model has no SE block: call selib.attach_se(model, example) and train it, or selib.fit_gates(model, loader)"
                )
            module, gate = native
            places = {"": _Gated(self.model.get_submodule(module), self.model.get_submodule(gate))}

        def inside(name: str) -> Callable[..., None]:
            return lambda m, args, output: self._inside.__setitem__(name, args[0])

        def gates(name: str) -> Callable[..., None]:
            return lambda m, args, output: self._gates.__setitem__(name, output)

        def linear(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._last = (module, args[0], output) if isinstance(module, nn.Linear) else None

        for name, place in places.items():
            self._hooks.enter_context(hooked((place.module, inside(name)), (place.gate, gates(name))))
        self._hooks.enter_context(
            hooked(*((m, linear) for m in self.model.modules() if isinstance(m, nn.Linear)))
        )
        return places

    def __call__(self, inputs: Inputs) -> Explanation | Streams:
        """One forward pass -> Explanation; Streams when several blocks are attached.

        Raises:
            ValueError: no SE block, or logits that are not (B, K) or (B, T, K).
        """
        place = next((p.device for p in self.model.parameters()), None)
        if place is not None and place.type != "meta" and any(t.device != place for t in tensors(inputs)):
            inputs = to_device(inputs, place)
        with evaluating(self.model):
            if self._places is None:
                self._places = self._prepare(inputs)
            self._last = None
            trace = self._trace()
            with trace.recording() if trace else nullcontext():
                output = call(self.model, inputs)
            logits = logits_of(output, inputs)
            last = self._last if logits.ndim == 2 else None
            final = (last[0], last[1]) if last and (last[2] is logits or last[2] is output) else None
            explanations = {
                name: self._explanation(
                    name, place, inputs, logits, final, trace if logits.ndim == 3 else None
                )
                for name, place in self._places.items()
            }
            self._inside.clear()
            self._gates.clear()
            self._last = None
        return explanations[""] if list(explanations) == [""] else Streams(logits.float(), explanations)

    def _trace(self) -> Trace | None:
        """Where to remember the forward pass of a model that answers once a frame; of others only the maps are kept."""
        blocks = [
            p.module
            for p in (self._places or {}).values()
            if isinstance(p.module, SEBlock) and p.module.frames
        ]
        return (
            Trace(self.model, [self.model.get_submodule(block.site) for block in blocks]) if blocks else None
        )

    def _explanation(
        self,
        name: str,
        place: _Gated,
        inputs: Inputs,
        logits: Tensor,
        last: tuple[nn.Linear, Tensor] | None,
        trace: Trace | None,
    ) -> Explanation:
        if name not in self._inside:
            raise ValueError(
                f"the SE block {name or 'of this model'} was not run: forward took another path than the example did"
            )
        raw = self._inside[name]
        if name not in self._gates:  # those of each target are computed where the linear layer stood
            raise ValueError(_OTHER_HEAD)
        gates = self._gates[name] if isinstance(place.module, SEBlock) else self._gates[name].flatten(1)
        scales = place.gain * gates if isinstance(place.module, TargetSEBlock) else None
        gated = (
            None if scales is not None else partial(scaled, gates=gates, gain=place.gain, layout=place.layout)
        )
        head = Head(
            self.model,
            place.module,
            inputs,
            raw,
            logits,
            gated=gated,
            layout=place.layout,
            prefix=place.prefix,
            last=last,
            scales=scales,
            trace=trace,
        )
        if scales is not None and head.linear is None:
            raise ValueError(_OTHER_HEAD)
        axes = len(place.grid) if place.grid else raw.ndim - 2
        own = inputs.get(name) if isinstance(inputs, Mapping) else None
        for given in (own, inputs):  # the input that the stream is named after goes before the others
            sizes = {space for t in tensors(given) if (space := _input_space(t.shape, axes, head))}
            if sizes:
                break
        return Explanation(
            logits, gates, raw, head, place.gain, place.grid, sizes.pop() if len(sizes) == 1 else None
        )


def _input_space(shape: Sequence[int], axes: int, head: Head) -> tuple[int, ...] | None:
    """The *space of an input of this shape that a map with so many spatial axes shows, or None: it has others."""
    clip = len(shape) == 4 and axes == 3  # (B, T, H, W)
    if head.frames is None:
        space = tuple(shape[1:] if clip or len(shape) == 2 else shape[2:])
    elif axes == 1:
        space = (head.frames,)
    elif axes == 2 and len(shape) == 3:  # (B, moments, coefficients), shown as the map has them
        space = tuple(shape[1:] if time_axis(shape[1:], head.frames) == head.time else shape[:0:-1])
    elif len(shape) == 5 and shape[1] == head.frames != shape[2]:  # (B, T, C, H, W)
        space = (shape[1], *shape[3:])
    elif len(shape) == 4 and (axes == 3) != (shape[1] % head.frames == 0):
        return None  # an image, or a clip to a map that is none
    else:
        space = tuple(shape[1:] if clip else shape[2:])
    return space if len(space) == axes > 0 else None


def explain(model: nn.Module, inputs: Inputs) -> Any:
    """Explain a batch with one forward pass and no gradients -> :class:`Explanation` (:class:`Streams` for several blocks).

    Args:
        model: with an SE block attached by ``attach_se`` or ``fit_gates``, or with SE blocks of its own.
        inputs: a batch as the model takes it: a tensor, a tuple of arguments or a dict of keyword arguments; moved to the model's device.

    Raises:
        ValueError: the model has no SE block, does not return logits (B, K) or (B, T, K), or has another head than its block was attached to.
    """
    with SEExplainer(model) as explainer:
        return explainer(inputs)
