"""The explorer for clips: a detector's heatmaps frame by frame, its sound, and a switch for each modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import baselines, plot
from selib.forward import bare, to_device
from selib.explanation import Explanation, Method, explain
from selib.heatmap import normalize, resize
from selib.plot import Picture
from selib.select import Select, TopFraction
from selib.views import Settings, cells, check_names, spelled
from selib.widgets import Explorer, check_count
from studies.clips import Film, probability
from studies.data import SpeakerSet

MAPS = 32  # kept of a clip, about a megabyte each

Clip = tuple[Mapping[str, Tensor], Tensor | None, NDArray[np.int16] | None]
"""Inputs of one clip with B = 1, its labels (1, T), and its sound int16 (N,); ``None`` where there is none."""


def explorer(
    model: nn.Module,
    clips: SpeakerSet | Mapping[str, Clip],
    *,
    classes: Sequence[str] = ("speaking",),
    seed: int | None = None,
) -> Explorer:
    """Look at what a detector looks at, clip by clip.

    Args:
        model: with SE blocks on visual streams and one on the fused streams, called "fusion", whose channels are
            equal segments in the order of ``model.modalities``.
        clips: a set of at most 200 clips; or {name: clip} at 25 frames a second, see :data:`Clip`.
        classes: the names of the model's outputs.
        seed: the network's, for the caption of a saved picture.

    Raises:
        ValueError: no clips, more than 200, or what does not fit the model.
    """
    check_count(len(clips))
    origin = type(model).__name__ + (f", seed {seed}" if seed is not None else "")
    if isinstance(clips, Mapping):
        subjects = [
            ClipSubject(model, clip, name, classes, fps=25.0, inputs=f"clips[{name!r}][0]")
            for name, clip in clips.items()
        ]
        return Explorer(subjects, origin)
    subjects = []
    for i, info in enumerate(clips.clips):
        clip, name = (*clips.clip(i), clips.wave(i)), f"clip {i}, {info.condition or info.entity}"
        subjects.append(ClipSubject(model, clip, name, classes, fps=info.fps, inputs=f"clips.clip({i})[0]"))
    return Explorer(subjects, f"{clips.name}{' (synthetic)' if clips.synthetic else ''}, {origin}")


class ClipSubject:
    """A clip of several streams and what a detector makes of it: a :class:`selib.views.Subject`.

    Args:
        inputs: how the inputs are written in Python.
    """

    rivals = ("Grad-CAM", "mean of channels")

    def __init__(
        self, model: nn.Module, clip: Clip, name: str, outputs: Sequence[str], *, fps: float, inputs: str
    ) -> None:
        self.name, self.outputs, self.multilabel = name, outputs, len(outputs) == 1
        self._inputs, labels, self.wave = clip
        self._labels = None if labels is None else labels[0].cpu()
        self.pictures = {stream: plot.pixels(x[0]) for stream, x in self._inputs.items() if x.ndim == 4}
        if not self.pictures:
            raise ValueError(
                f"{name}: no stream of grey pictures (1, T, H, W), only {', '.join(self._inputs)}"
            )
        self.frames = len(next(iter(self.pictures.values())))
        self.modalities: tuple[str, ...] = tuple(getattr(bare(model), "modalities", ()))
        if not self.modalities:
            raise ValueError("give the model an attribute modalities, the segments of the fused channels")
        self.fps, self._model, self._spelled = fps, model, inputs
        self._maps = lru_cache(MAPS)(self._make_maps)
        self._scores = lru_cache(None)(self._make_scores)
        self._film = lru_cache(1)(self._make_film)

    @cached_property
    def whole(self) -> Explanation:
        """The explanation, one forward pass."""
        found = explain(self._model, self._inputs)
        if "fusion" not in found.streams:
            raise ValueError(
                'modalities are switched at an SE block called "fusion": '
                'attach_se(…, at={"face": …, "fusion": …})'
            )
        channels, names = found.streams["fusion"].gates.shape[1], ", ".join(self.modalities)
        if channels % len(self.modalities):
            raise ValueError(
                f"{channels} fused channels are no {len(self.modalities)} equal segments: {names}"
            )
        check_names(self.outputs, found.logits)
        if not any(stream in found.streams for stream in self.pictures):
            raise ValueError(f"no SE block on a stream of pictures: {', '.join(self.pictures)} have none")
        return found

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream in self.pictures if stream in self.whole.streams)

    @property
    def thumbnail(self) -> Picture:
        grey = next(iter(self.pictures.values()))[self.frames // 2]
        return np.repeat(grey[..., None], 3, 2)

    def explanation(self, stream: str) -> Explanation:
        return self.whole.streams[stream]

    def picture(self, settings: Settings, t: int) -> Picture:
        """Frame t, its heatmaps, the sound, and the score with everything and without what is off."""
        return self._film(settings)[t]

    def _make_film(self, settings: Settings) -> Film:
        target, off = settings.target, settings.off
        frames, maps = dict(self.pictures), {}
        for stream, rule in zip(self.streams, settings.rules, strict=True):
            if stream in off:
                continue
            maps[stream] = self._maps(stream, settings.method, target, rule, settings.smooth)
            if settings.rival in self.rivals:
                beside = f"{stream}: {settings.rival}"
                frames[beside] = self.pictures[stream]
                maps[beside] = self._maps(stream, settings.rival, target, TopFraction(1.0), True)
        scores = {"all": self._scores(frozenset(), target)}
        if off:
            scores[f"without {', '.join(sorted(off))}"] = self._scores(off, target)
        look = {"opacity": settings.opacity, "colormap": settings.colormap}
        details = {"labels": self._labels, "wave": self.wave, "off": off, "fps": self.fps}
        return Film(frames, maps, scores=scores, **details, **look)  # type: ignore[arg-type]

    def _make_scores(self, off: frozenset[str], target: int) -> NDArray[np.float32]:
        """Probability of the target (T,) with the gates of some modalities at zero."""
        fusion = self.whole.streams["fusion"]
        keep = torch.tensor([float(name not in off) for name in self.modalities], device=fusion.gates.device)
        keep = keep.repeat_interleave(fusion.gates.shape[1] // len(keep))
        logits = fusion.with_gates(lambda s: s * keep) if off else fusion.logits
        return probability(logits[0], target)

    def _make_maps(
        self, stream: str, method: str, target: int, rule: Select, smooth: bool
    ) -> NDArray[np.uint8]:
        """A stream's heatmaps (T, H, W), 0 to 255, by one of our methods or a rival."""
        ex, size = self.explanation(stream), self.pictures[stream].shape
        if method == "Grad-CAM":
            inputs = to_device(dict(self._inputs), ex.features.device)
            maps = baselines.clip_grad_cam(self._model, inputs, stream, target)
        elif method == "mean of channels":
            maps = normalize(resize(ex.features.relu().mean(1), size))[0]
        elif smooth:
            maps = ex.heatmap(method, target, select=rule)[0]  # type: ignore[arg-type]
        else:
            small = cells(ex, method, target, rule)  # type: ignore[arg-type]
            maps = F.interpolate(small[None], size, mode="nearest")[0, 0]
        return plot.pixels(maps)

    def code(self, stream: str, method: Method, target: int, rule: Select) -> str:
        return (
            f"ex = selib.explain(model, {self._spelled})\n"
            f'heatmap = ex.streams["{stream}"].heatmap("{method}", target={target}, select={spelled(rule)})'
        )
