"""Explain a prediction by the SE vector: one forward pass, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from selib import modalities
from selib.forward import (
    Gated,
    Head,
    Inputs,
    attached,
    bare,
    call,
    evaluating,
    hooked,
    logits_of,
    tensors,
    to_device,
)
from selib.heatmap import at_maxima, input_space, normalize, resize, spread, weighted_sum
from selib.layout import Space, grid_of, input_spaces
from selib.modalities import Modalities
from selib.native import find_native
from selib.se import SEBlock, TargetSEBlock, channels_first, scaled
from selib.select import NormalQuantile, Select

Method = Literal["influence", "gate", "top-gate"]
METHODS: tuple[Method, ...] = ("influence", "gate", "top-gate")
Over = Literal["frame", "clip"]
Target = int | Sequence[int] | Tensor | None

CHUNK = 2**24  # numbers of the maps that the head runs on at a time: 64 MB of float32


class Explanation:
    """What one forward pass says about a batch. Made by :func:`explain`.

    Of a model that answers once a frame, a target, the influence and the maps are each frame's own: (B, C)
    and (B, *space) stand for (B, C, T) and (B, T, h, w) then. The gates are the clip's.

    Attributes:
        logits: (B, K) float32, or (B, T, K) with an answer a frame.
        gates: (B, C) float32, the SE vector s; (B, K, C) when every target has gates of its own.
        features: (B, C, *space) float32, the input F of the SE block, tokens laid out on their grid.
        input_size: *space of the input, the default size of a heatmap; ``None`` when it is not known.
        streams: {name: explanation} where there are several SE blocks; this one is of the last that ran.
    """

    def __init__(
        self,
        logits: Tensor,
        gates: Tensor,
        raw: Tensor,
        head: Head,
        grid: Space | None,
        input_size: Space | None,
    ) -> None:
        self.logits = logits.float()
        self.gates = gates.float()
        maps = channels_first(raw, head.layout, head.prefix).float()
        self.features = maps.unflatten(2, grid) if grid else maps
        self.input_size = input_size
        self.streams: dict[str, Explanation] = {}
        self._raw, self._head = raw, head
        self._influence: dict[tuple[int, ...], Tensor] = {}  # by target

    @property
    def predicted(self) -> Tensor:
        """(B,) or (B, T) index of the largest logit."""
        return self.logits.argmax(-1)

    # ---- heatmaps ----------

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
            method: ``"influence"``: the channels weighted by their effect on the target's logit; evidence
                against the target is cut off at zero. ``"gate"``: weighted by their gates. ``"top-gate"``:
                the paper, the mean of the maps whose gates stand out.
            target: class index, one per sample or one for all; the predicted class by default. Only
                "influence" depends on it, unless every target has gates of its own.
            select: which channels take part, by the method's own ranking; see :mod:`selib.select`.
            over: with an answer a frame, "influence" on each frame's answer, or on that of the whole clip.

        Raises:
            ValueError: unknown method, target out of range, no spatial map, or a size that does not fit.
        """
        raw = self.map(method, target, select, over=over)
        size = size if size is not None else self.input_size
        if size is None:
            raise ValueError("the inputs do not say which size the heatmap should have: pass size=")
        return normalize(resize(raw.relu() if method == "influence" else raw, size))

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

        For "influence" and global average pooling + linear it is Σ_c w[k,c]·s[c]·F[c]: its mean over space is
        the target's logit minus its bias. For another head each channel's influence is spread over space in
        proportion to the channel's map, or put where its maximum stands if the head reads nothing else.

        With an answer a frame, each frame's influence is spread over that frame; it is interpolated where the
        map has another number of frames. With ``over="clip"`` it is the influence on the mean over the
        frames, spread over time as well: a recurrent head answers in one frame for what was seen in another,
        and this map says where *and when*.
        """
        if over not in ("frame", "clip"):
            raise ValueError(f'over={over!r} is unknown: use "frame" or "clip"')
        if self.features.ndim < 3:
            where = f"; heatmaps are in streams: {', '.join(self.streams)}" if self.streams else ""
            raise ValueError(
                "the SE block sits on a vector (B, C): there is no heatmap, only gates and influence" + where
            )
        head, maps = self._head, self._read_maps(exact=method == "influence")
        if method == "influence" and head.linear is not None:
            weights = head.linear.weight[self._targets(target)] * head.gain * self.gates_of(target)
            return weighted_sum(
                maps, weights if select is None else weights * self.selected(method, target, select)
            )
        ranking = self.channel_weights(method, target)
        if over == "clip" and ranking.ndim == 3:
            ranking = ranking.mean(2)
        mask = self._chosen(ranking, method, select)
        if method == "top-gate":
            return weighted_sum(maps, mask / mask.sum(1, keepdim=True).clamp_min(1))
        if method == "gate":
            return weighted_sum(maps, ranking * mask)
        # The share of each position: signed maps have means near zero, so there the magnitude counts.
        maps = at_maxima(maps, head.time) if head.reads == "max" else maps.abs()
        if ranking.ndim == 3:
            return spread(maps, ranking * mask, head.time)
        mean = maps.flatten(2).mean(2)
        return weighted_sum(maps, ranking * mask / mean.where(mean > 0, torch.ones_like(mean)))

    def _read_maps(self, *, exact: bool) -> Tensor:
        """The maps as the head reads them: their positive part where it begins with a ReLU."""
        if bool((self.features < 0).any()):
            try:
                self._head.prepare()
            except RuntimeError:
                if exact:  # gates can be read though the head cannot be run
                    raise
            return self.features.relu() if self._head.rectifies else self.features
        return self.features

    # ---- channels ----------

    def gates_of(self, target: Target = None) -> Tensor:
        """The SE vector (B, C) of the target: the same for all, unless each target has its own."""
        if self.gates.ndim == 2:
            return self.gates
        return self.gates[torch.arange(len(self.gates), device=self.gates.device), self._targets(target)]

    def channel_weights(self, method: Method = "influence", target: Target = None) -> Tensor:
        """What a method ranks channels by: the influence, or the gates. (B, C)."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
        return self.influence(target) if method == "influence" else self.gates_of(target)

    def selected(
        self, method: Method = "influence", target: Target = None, select: Select | None = None
    ) -> Tensor:
        """The channels of a heatmap, bool (B, C): by ``select``, else the paper's rule or all."""
        return self._chosen(self.channel_weights(method, target), method, select)

    @staticmethod
    def _chosen(weights: Tensor, method: Method, select: Select | None) -> Tensor:
        rule = NormalQuantile() if select is None and method == "top-gate" else select
        if rule is None:
            return torch.ones_like(weights, dtype=torch.bool)
        return rule.mask(weights.mT).mT if weights.ndim == 3 else rule.mask(weights)

    @torch.no_grad()
    def influence(self, target: Target = None) -> Tensor:
        """How much the target's logit falls when one gate is set to zero and the others stay: (B, C).

        Exact for any head. For global average pooling + linear it is w[k,c]·s[c]·mean(F[c]) and costs
        nothing; any other head runs C times, without the network before it. A gate is zero for the whole
        clip: (B, C, T) is the fall in each of its frames.
        """
        targets = self._targets(target)
        key = tuple(targets.flatten().tolist())
        if key not in self._influence:
            head = self._head
            if head.linear is not None:
                means = head.effective(self._scaled(self.gates_of(targets))).float().flatten(1)
                self._influence[key] = head.linear.weight[targets] * means
            else:
                every = torch.eye(self.gates.shape[-1], dtype=torch.bool)
                self._influence[key] = self._falls(every, targets)
        return self._influence[key].clone()

    def _falls(self, closed: Tensor, targets: Tensor) -> Tensor:
        """The fall of each target's logit in n cases, in which the gates ``closed`` bool (n, C) are zero.

        Returns:
            (B, n), or (B, n, T) with an answer a frame.
        """
        head = self._head
        kept = ~closed.to(self._raw.device)
        found = []
        with evaluating(head.model):
            head.prepare()
            maps = head.effective(self._scaled(self.gates_of(targets)))
            for sample in range(len(maps)):
                row, fallen = maps[sample : sample + 1], []
                for part in kept.split(max(1, CHUNK // row.numel())):
                    # All gates as they are in the same run: what is rounded alike cancels.
                    scales = torch.cat([torch.ones_like(part[:1]), part])
                    logits = head(scaled(row, scales, 1.0, head.layout), sample)
                    index = targets[sample].expand(len(scales), *targets.shape[1:])[..., None]
                    base, *others = logits.gather(-1, index)[..., 0]
                    fallen.append(base - torch.stack(others))
                found.append(torch.cat(fallen))
        return torch.stack(found)

    @torch.no_grad()
    def with_gates(self, gates: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (B, K) or (B, T, K) under a manipulated SE vector; only the head runs.

        Args:
            gates: of the shape of :attr:`gates` or what broadcasts to it, or a function of the gates, e.g.
                ``lambda s: s * rule.mask(s)``.
        """
        head = self._head
        new = gates(self.gates) if callable(gates) else gates.to(self.gates)
        if self.gates.ndim == 3:
            return head.per_target(self._raw, head.gain * new.expand_as(self.gates))
        with evaluating(head.model):
            head.prepare()
            rows = head.effective(self._scaled(new.expand_as(self.gates)))
            if head.shared:
                return head(rows)
            return torch.cat([head(rows[i : i + 1], i) for i in range(len(rows))])

    @torch.no_grad()
    def modalities(self, target: Target = None, *, names: modalities.Names | None = None) -> Modalities:
        """How much each modality counts, from gates on features side by side, a segment of channels for each.

        Args:
            target: as of :meth:`influence`.
            names: the modalities in the order of their segments, which are equally wide, or {name: channels};
                by default the model's attribute ``modalities``.

        Raises:
            ValueError: names that do not fit the channels, or none and a model that does not say them.
        """
        targets = self._targets(target)
        names = names if names is not None else getattr(self._head.model, "modalities", None)
        segments = modalities.segments_of(names, self.gates.shape[-1])
        member = modalities.members(segments)
        influence = self._falls(member, targets)
        return modalities.summarize(
            list(segments), member.to(self.gates.device), self.gates_of(targets), influence
        )

    def _scaled(self, gates: Tensor) -> Tensor:
        return scaled(self._raw, gates, self._head.gain, self._head.layout)

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


# ---- explaining ----------

_OTHER_HEAD = (
    "the head is no longer the linear layer that the gates of each target were attached to: call "
    "selib.detach_se(model), then attach them again"
)


def explain(model: nn.Module, inputs: Inputs) -> Explanation:
    """Explain a batch with one forward pass and no gradients.

    Args:
        model: with an SE block attached by ``attach_se`` or ``fit_gates``, or with SE blocks of its own, of
            which the last one is read.
        inputs: a batch as the model takes it: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        ValueError: the model has no SE block, does not return logits (B, K) or (B, T, K), or has another head
            than its block was attached to.
    """
    with SEExplainer(model) as explainer:
        return explainer(inputs)


class SEExplainer:
    """Explain many batches: ``with selib.SEExplainer(model) as explain: ex = explain(images)``.

    The hooks live as long as the ``with`` block. Model mode, gradients, buffers and outputs are untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self._hooks = ExitStack()
        self._places: dict[str, Gated] = {}
        self._maps: dict[str, Tensor] = {}  # in the order in which the blocks run
        self._gates: dict[str, Tensor] = {}
        self._grids: dict[str, Space] = {}
        self._last: tuple[nn.Linear, Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._places = {}

    def __call__(self, inputs: Inputs) -> Explanation:
        """One forward pass -> Explanation.

        Raises:
            ValueError: no SE block, or logits that are not (B, K) or (B, T, K).
        """
        place = next((p.device for p in self.model.parameters()), None)
        if place is not None and place.type != "meta" and any(t.device != place for t in tensors(inputs)):
            inputs = to_device(inputs, place)
        with evaluating(self.model):
            if not self._places:
                self._watch(inputs)
            self._last = None
            self._maps.clear()
            self._gates.clear()
            output = call(self.model, inputs)
            logits = logits_of(output, inputs)
            last = self._last if logits.ndim == 2 else None
            final = (last[0], last[1]) if last and (last[2] is logits or last[2] is output) else None
            for name in self._places.keys() - self._maps.keys():
                said = name or "of this model"
                raise ValueError(f"the SE block {said} was not run: forward took another path than before")
            found: dict[str, Explanation] = {}
            for name in self._maps:  # in the order in which the blocks ran
                before = [ex._head for ex in found.values()]
                found[name] = self._explanation(name, inputs, logits, final, before)
            self._maps.clear()
            self._gates.clear()
            self._last = None
        ex = found[list(found)[-1]]
        if list(found) != [""]:
            ex.streams = {name: found[name] for name in self._places}
        return ex

    def _watch(self, inputs: Inputs) -> None:
        """Set the hooks that read F and s off every block, and the last linear layer."""
        blocks = attached(self.model)
        for name, block in blocks.items():
            site = self.model.get_submodule(block.site)
            self._places[name] = Gated(block, block.vector, site, block.layout, block.prefix, block.gain)
        if not blocks:
            native = find_native(self.model, inputs)
            if native is None:
                raise ValueError(
                    "the model has no SE block: call selib.attach_se(model, example) and train it, or "
                    "selib.fit_gates(model, loader)"
                )
            module, gate = (self.model.get_submodule(name) for name in native)
            self._places = {"": Gated(module, gate, module)}

        def keep(store: dict[str, Any], name: str, read: Callable[..., Any]) -> Callable[..., None]:
            return lambda module, args, output: store.__setitem__(name, read(args, output))

        def linear(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
            self._last = module, args[0], output

        watched: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, place in self._places.items():
            watched.append((place.module, keep(self._maps, name, lambda args, output: args[0])))
            watched.append((place.gate, keep(self._gates, name, lambda args, output: output)))
        for name, block in blocks.items():
            if block.grid_from:
                shape = keep(self._grids, name, lambda args, output: tuple(output.shape[2:]))
                watched.append((self.model.get_submodule(block.grid_from), shape))
        watched += [(m, linear) for m in self.model.modules() if isinstance(m, nn.Linear)]
        self._hooks.enter_context(hooked(*watched))

    def _explanation(
        self,
        name: str,
        inputs: Inputs,
        logits: Tensor,
        last: tuple[nn.Linear, Tensor] | None,
        before: Sequence[Head],
    ) -> Explanation:
        place, raw = self._places[name], self._maps[name]
        if name not in self._gates:  # those of each target are computed where the linear layer stood
            raise ValueError(_OTHER_HEAD)
        gates = self._gates[name] if isinstance(place.module, SEBlock) else self._gates[name].flatten(1)
        head = Head(self.model, place, inputs, raw, logits, gates, last=last, before=before)
        if isinstance(place.module, TargetSEBlock) and head.linear is None:
            raise ValueError(_OTHER_HEAD)
        grid = self._grid(name, raw, inputs)
        axes = len(grid) if grid else raw.ndim - 2
        own = inputs.get(name) if isinstance(inputs, Mapping) else None
        for given in (own, inputs):  # the input that the stream is named after goes before the others
            shown = [input_space(t.shape, axes, head.frames, head.time) for t in tensors(given)]
            sizes = {space for space in shown if space}
            if sizes:
                break
        return Explanation(logits, gates, raw, head, grid, sizes.pop() if len(sizes) == 1 else None)

    def _grid(self, name: str, raw: Tensor, inputs: Inputs) -> Space | None:
        """How the tokens of this input lie, which may differ from the example's."""
        block = self._places[name].module
        if not isinstance(block, SEBlock) or block.grid is None:
            return None
        if name in self._grids:
            return self._grids[name]
        count = raw.shape[2] if block.layout == "BC*" else raw.shape[1] - block.prefix
        return grid_of(count, block.grid, input_spaces(t.shape for t in tensors(inputs)))
