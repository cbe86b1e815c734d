"""What an SE vector says about a prediction: gates, influence, heatmaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selib import modalities
from selib.forward import Head, evaluating
from selib.heatmap import at_maxima, normalize, resize, spread, weighted_sum
from selib.images import preparation_of, shown
from selib.layout import Space
from selib.modalities import Modalities
from selib.se import HeadSEBlock, channels_first, scaled
from selib.select import NormalQuantile, Select

Method = Literal["influence", "gate", "top-gate", "gated-influence"]
METHODS: tuple[Method, ...] = ("influence", "gate", "top-gate", "gated-influence")
Over = Literal["frame", "clip"]
Target = int | Sequence[int] | Tensor | None

CHUNK = 2**24  # numbers of the maps that the head runs on at a time: 64 MB of float32


class Explanation:
    """What one forward pass says about a batch. Made by :func:`selib.explain`.

    The network that is explained is the one that answered: with its gates where an SE block was trained with
    it, without gates after ``fit_gates``, which leaves the network as it was.

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
        self._pixels: list[Tensor] | None = None  # of images that were prepared here
        self._influence: dict[tuple[object, ...], Tensor] = {}  # by target, contrast and whether gated

    @property
    def predicted(self) -> Tensor:
        """(B,) or (B, T) index of the largest logit."""
        return self.logits.argmax(-1)

    @property
    def pixels(self) -> list[Tensor]:
        """What is shown of the images, uint8 (3, H, W) each: what the network saw of them.

        Raises:
            ValueError: the inputs are no images.
        """
        if self._pixels is None:
            inputs = self._head.inputs
            if not isinstance(inputs, Tensor) or inputs.ndim != 4:
                raise ValueError("the inputs are no images (B, 3, H, W): there are no pixels to show")
            how = preparation_of(self._head.model)
            self._pixels = [shown(image, how) for image in inputs]
        return self._pixels

    def show(
        self,
        method: Method = "influence",
        target: Target = None,
        *,
        contrast: bool = False,
        select: Select | None = None,
        classes: Sequence[str] = (),
    ) -> Any:
        """The images, each beside its heatmap, as one PIL image; a notebook draws it.

        Args:
            method, target, contrast, select: as of :meth:`heatmap`.
            classes: the names of the outputs.
        """
        from PIL import Image

        from selib import plot

        heatmaps = self.heatmap(method, target, contrast=contrast, select=select)
        number = self._targets(target).tolist()
        names = [classes[k] if classes else f"class {k}" for k in number]
        rows = []
        for image, heatmap, name in zip(self.pixels, heatmaps, names, strict=True):
            pictures = [plot.rgb(image), plot.overlay(image, heatmap)]
            rows.append(plot.row_of(pictures, ["", f"{name}: {method}"]))
        return Image.fromarray(plot.column_of(rows))

    # ---- heatmaps ----------

    def heatmap(
        self,
        method: Method = "influence",
        target: Target = None,
        *,
        contrast: bool = False,
        select: Select | None = None,
        size: Sequence[int] | None = None,
        over: Over = "frame",
    ) -> Tensor:
        """The heatmap (B, *size) in [0, 1]; ``size`` defaults to the input's.

        Args:
            method: ``"influence"``: the channels weighted by their effect on the target's logit; evidence
                against the target is cut off at zero. ``"gated-influence"``: the same under the gates, where
                the network answered without them. ``"gate"``: weighted by their gates. ``"top-gate"``: the
                paper, the mean of the maps whose gates stand out.
            target: class index, one per sample or one for all; the predicted class by default. The gates
                depend on it where every target has gates of its own, and where the block's bottleneck is the
                classifier: asked for a class, its gates are those of that class.
            contrast: influence on the target's log-odds in place of its logit, see :meth:`influence`.
            select: which channels take part, by the method's own ranking; see :mod:`selib.select`.
            over: with an answer a frame, "influence" on each frame's answer, or on that of the whole clip.

        Raises:
            ValueError: unknown method, target out of range, no spatial map, or a size that does not fit.
        """
        raw = self.map(method, target, select, contrast=contrast, over=over)
        size = size if size is not None else self.input_size
        if size is None:
            raise ValueError("the inputs do not say which size the heatmap should have: pass size=")
        return normalize(resize(raw.relu() if "influence" in method else raw, size))

    @torch.no_grad()
    def map(
        self,
        method: Method = "influence",
        target: Target = None,
        select: Select | None = None,
        *,
        contrast: bool = False,
        over: Over = "frame",
    ) -> Tensor:
        """The heatmap before resizing and scaling: (B, *space), in units of the logit for "influence".

        For "influence" and global average pooling + linear it is Σ_c w[k,c]·F'[c] (CAM, Zhou et al., 2016):
        its mean over space is the target's logit minus its bias. For another head each channel's influence
        is spread over space in proportion to the channel's map, or put where its maximum stands if the head
        reads nothing else.

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
        exact = "influence" in method
        head, maps = self._head, self._read_maps(exact=exact)
        ranking = self.channel_weights(method, target, contrast=contrast)
        if exact and head.linear is not None:
            weights = self._weights(self._targets(target), contrast, gated=method == "gated-influence")
            return weighted_sum(maps, weights if select is None else weights * select.mask(ranking))
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
        """The SE vector (B, C), where it depends on the target that of the target."""
        block = self._head.block
        if target is not None and isinstance(block, HeadSEBlock):
            with torch.no_grad():
                asked = F.one_hot(self._targets(target), self.logits.shape[1])
                return block.opened(block.evidence(block.squeeze(self._raw), asked.to(block.offset)))
        return of_target(self.gates, self._targets(target))

    def channel_weights(
        self, method: Method = "influence", target: Target = None, *, contrast: bool = False
    ) -> Tensor:
        """What a method ranks channels by: the influence, or the gates. (B, C)."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
        if "influence" in method:
            return self.influence(target, contrast=contrast, gated=method == "gated-influence")
        if contrast:
            raise ValueError(f'contrast=True belongs to "influence", not to method={method!r}')
        return self.gates_of(target)

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
    def influence(self, target: Target = None, *, contrast: bool = False, gated: bool = False) -> Tensor:
        """How much the target's logit falls when one channel is set to zero and the others stay: (B, C).

        Exact for any head. For global average pooling + linear it is w[k,c]·mean(F'[c]) and costs nothing;
        any other head runs C times, without the network before it. A channel is zero for the whole clip:
        (B, C, T) is the fall in each of its frames.

        Args:
            contrast: of the target's log-odds log p_k/(1 - p_k). A logit is not identified: one vector added
                to all rows of the classifier changes no prediction and every influence; the log-odds do not
                know it. The weights w_k - Σ_{j≠k} p_j w_j/(1 - p_k) are its gradient; another head is run,
                and the fall is exact. The same as the logit where outputs are decisions of their own.
            gated: under the gates, where the network answered without them.
        """
        targets = self._targets(target)
        key = *targets.flatten().tolist(), contrast, gated
        if key not in self._influence:
            head = self._head
            if head.linear is not None:
                means = head.effective(self._raw).float().flatten(1)
                self._influence[key] = self._weights(targets, contrast, gated) * means
            else:
                every = torch.eye(self.gates.shape[-1], dtype=torch.bool)
                self._influence[key] = self._falls(every, targets, contrast=contrast, gated=gated)
        return self._influence[key].clone()

    def _weights(self, targets: Tensor, contrast: bool, gated: bool) -> Tensor:
        """What the mean of each map weighs in the target's logit, or log-odds, of a linear head: (B, C)."""
        assert self._head.linear is not None
        rest = None
        if contrast and self._shares_one():
            logits = self.with_gates(lambda s: s) if gated else self.logits
            rest = without(logits, targets).softmax(1)  # p_j / (1 - p_k)
        return logit_weights(self._head.linear.weight, targets, self._scales(gated), rest)

    def _shares_one(self) -> bool:
        """Whether the outputs are classes, whose probabilities add up to one."""
        return self.logits.shape[-1] > 1 and getattr(self._head.block, "task", "multiclass") == "multiclass"

    def _falls(
        self, closed: Tensor, targets: Tensor, *, contrast: bool = False, gated: bool = False
    ) -> Tensor:
        """The fall of each target's logit in n cases, in which the channels ``closed`` bool (n, C) are zero.

        Returns:
            (B, n), or (B, n, T) with an answer a frame.
        """
        head = self._head
        kept = ~closed.to(self._raw.device)
        found = []
        with evaluating(head.model):
            head.prepare()
            maps = head.effective(self._scaled(of_target(self._scales(gated), targets)))
            for sample in range(len(maps)):
                row, fallen = maps[sample : sample + 1], []
                for part in kept.split(max(1, CHUNK // row.numel())):
                    # All gates as they are in the same run: what is rounded alike cancels.
                    scales = torch.cat([torch.ones_like(part[:1]), part])
                    logits = head(scaled(row, scales, 1.0, head.layout), sample)
                    index = targets[sample].expand(len(scales), *targets.shape[1:])[..., None]
                    score = logits.gather(-1, index)[..., 0]
                    if contrast and self._shares_one():
                        score = score - without(logits, index[..., 0]).logsumexp(-1)
                    base, *others = score
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
        scales = head.gain * new.expand_as(self.gates)
        if scales.ndim == 3:
            return head.per_target(self._raw, scales)
        with evaluating(head.model):
            head.prepare()
            rows = head.effective(self._scaled(scales))
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
            list(segments), member.to(self.gates.device), self.gates_of(target), influence
        )

    def _scales(self, gated: bool) -> Tensor:
        """What F is multiplied with where the network answered, or under the gates: (B, C) or (B, K, C)."""
        return self._head.gain * self.gates if gated else self._head.scales

    def _scaled(self, scales: Tensor) -> Tensor:
        return scaled(self._raw, scales, 1.0, self._head.layout)

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


def logit_weights(weight: Tensor, targets: Tensor, scales: Tensor, rest: Tensor | None) -> Tensor:
    """What the mean of each map weighs in the target's logit: w_k, times the scales of F.

    Args:
        weight: (K, C), of the linear layer.
        targets: (B,).
        scales: (B, C), or (B, K, C) where every target has its own.
        rest: p_j / (1 - p_k), (B, K) and 0 at the target: then in its log-odds, w_k - Σ_j rest_j w_j.

    Returns:
        (B, C).
    """
    if scales.ndim == 2:
        return (weight[targets] if rest is None else weight[targets] - rest @ weight) * scales
    own = weight[targets] * of_target(scales, targets)
    return own if rest is None else own - torch.einsum("bk,kc,bkc->bc", rest, weight, scales)


def of_target(values: Tensor, targets: Tensor) -> Tensor:
    """Values (B, C), or of (B, K, C) those of the targets (B,)."""
    if values.ndim == 2:
        return values
    return values[torch.arange(values.shape[0], device=values.device), targets]


def without(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (…, K) in which that of the target (…) is minus infinity."""
    return logits.scatter(-1, targets[..., None], -torch.inf)
