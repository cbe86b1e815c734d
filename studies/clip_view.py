"""The explorer for clips: a detector's heatmaps frame by frame, its sound, and a switch for each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import wavfile
from torch import Tensor, nn

from selib import plot
from selib.explainer import explain
from selib.explanation import Explanation
from selib.explorer import Explorer, check_count
from selib.forward import attached, bare, to_device
from selib.heatmap import normalize, resize
from selib.select import Select
from selib.views import NOTHING, Panel, Settings, Subject, arguments, heatmap
from studies import baselines
from studies.clips import RATE, Film, probability
from studies.data import SpeakerSet

Levels = NDArray[np.uint8]
MAPS = 32  # kept of a clip, about a megabyte each

Clip = tuple[Mapping[str, Tensor], Tensor | None, NDArray[np.int16] | None]
"""Inputs of one clip with B = 1, its labels (1, T) and its sound int16 (N,); ``None`` where there is none."""


def explorer(
    model: nn.Module,
    clips: SpeakerSet | Mapping[str, Clip],
    *,
    classes: Sequence[str] = ("speaking",),
    seed: int | None = None,
) -> Explorer:
    """Look at what a detector looks at, clip by clip.

    Args:
        model: with SE blocks on visual streams and one on the fused streams, called "fusion", whose channels
            are equal segments in the order of ``model.modalities``.
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


class ClipSubject(Subject):
    """A clip of several streams and what a detector makes of it: a :class:`selib.views.Subject`.

    Args:
        inputs: how the inputs are written in Python.
    """

    others = ("Grad-CAM", "mean of channels")
    label, truth = None, None

    def __init__(
        self, model: nn.Module, clip: Clip, name: str, outputs: Sequence[str], *, fps: float, inputs: str
    ) -> None:
        self.name, self.outputs, self.multilabel = name, outputs, len(outputs) == 1
        self._inputs, labels, self._wave = clip
        self._labels = None if labels is None else labels[0].cpu()
        self.sound = b"" if self._wave is None else _wav(self._wave)
        self.pictures = {stream: plot.pixels(x[0]) for stream, x in self._inputs.items() if x.ndim == 4}
        if not self.pictures:
            raise ValueError(
                f"{name}: no stream of grey pictures (1, T, H, W), only {', '.join(self._inputs)}"
            )
        first = next(iter(self.pictures.values()))
        self.frames, self.fps = len(first), fps
        self.thumbnail = np.repeat(first[len(first) // 2, :, :, None], 3, 2)
        self.streams = tuple(stream for stream in self.pictures if stream in attached(model))
        if not self.streams:
            raise ValueError(f"no SE block on a stream of pictures: {', '.join(self.pictures)} have none")
        self.modalities: tuple[str, ...] = tuple(getattr(bare(model), "modalities", ()))
        if not self.modalities:
            raise ValueError("give the model an attribute modalities, the segments of the fused channels")
        self._model, self._spelled = model, inputs
        self._maps: Callable[..., Levels] = lru_cache(MAPS)(self._make_maps)
        self._rival_maps = lru_cache(None)(self._make_rival_maps)
        self._scores = lru_cache(None)(self._make_scores)
        self._film = lru_cache(1)(self._make_film)

    @cached_property
    def whole(self) -> Explanation:
        """The explanation, one forward pass."""
        found = explain(self._model, self._inputs)
        if "fusion" not in found.streams:
            at = 'attach_se(…, at={"face": …, "fusion": …})'
            raise ValueError(f'modalities are switched at an SE block called "fusion": {at}')
        channels, names = found.streams["fusion"].gates.shape[1], ", ".join(self.modalities)
        if channels % len(self.modalities):
            raise ValueError(
                f"{channels} fused channels are no {len(self.modalities)} equal segments: {names}"
            )
        return found

    def explanation(self, stream: str) -> Explanation:
        return self.whole.streams[stream]

    def panels(self, settings: Settings, t: int) -> list[Panel]:
        """Frame t, its heatmaps, the sound, and the score with everything and without what is off."""
        return [Panel("", self._film(settings)[t])]

    def _make_film(self, settings: Settings) -> Film:
        target, off = settings.target, settings.off
        frames, maps = dict(self.pictures), {}
        for stream, rule in zip(self.streams, settings.rules, strict=True):
            if stream in off:
                continue
            maps[stream] = self._maps(stream, settings.reading, target, settings.smooth, rule)
            if settings.compare != NOTHING:
                beside = f"{stream}: {settings.compare}"
                frames[beside] = self.pictures[stream]
                maps[beside] = self._rival_maps(stream, settings.compare, target)
        scores = {"all": self._scores(frozenset(), target)}
        if off:
            scores[f"without {', '.join(sorted(off))}"] = self._scores(off, target)
        look = {"opacity": settings.opacity, "colormap": settings.colours}
        details = {"labels": self._labels, "wave": self._wave, "off": off, "fps": self.fps}
        return Film(frames, maps, scores=scores, **details, **look)  # type: ignore[arg-type]

    def _make_scores(self, off: frozenset[str], target: int) -> NDArray[np.float32]:
        """Probability of the target (T,) with the gates of some modalities at zero."""
        fusion = self.whole.streams["fusion"]
        keep = torch.tensor([float(name not in off) for name in self.modalities], device=fusion.gates.device)
        keep = keep.repeat_interleave(fusion.gates.shape[1] // len(keep))
        logits = fusion.with_gates(lambda s: s * keep) if off else fusion.logits
        return probability(logits[0], target)

    def _make_maps(self, stream: str, reading: str, target: int, smooth: bool, rule: Select) -> Levels:
        """A stream's heatmaps (T, H, W), 0 to 255."""
        settings = Settings(reading, target, (rule,), smooth=smooth)
        return plot.pixels(heatmap(self.explanation(stream), settings, rule, self.pictures[stream].shape))

    def _make_rival_maps(self, stream: str, rival: str, target: int) -> Levels:
        ex = self.explanation(stream)
        if rival == "Grad-CAM":
            inputs = to_device(dict(self._inputs), ex.features.device)
            return plot.pixels(baselines.clip_grad_cam(self._model, inputs, stream, target))
        return plot.pixels(normalize(resize(ex.features.relu().mean(1), self.pictures[stream].shape))[0])

    def code(self, stream: str, settings: Settings) -> str:
        asked = arguments(settings, settings.rules[self.streams.index(stream)])
        return (
            f'ex = selib.explain(model, {self._spelled})\nheatmap = ex.streams["{stream}"].heatmap({asked})'
        )


def _wav(wave: NDArray[np.int16]) -> bytes:
    file = BytesIO()
    wavfile.write(file, RATE, wave)
    return file.getvalue()
