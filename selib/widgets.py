"""The explorer for JupyterLab: look at images, turn the knobs of an explanation, see what each changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selib.explainer import explain
from selib.images import Images, Transform, image_files, prepared

try:
    from PIL import Image

    from selib.explorer import Explorer, check_count
    from selib.views import ImageSubject, Rival, Subject
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selib.widgets needs {error.name}: pip install 'selib[widgets]'", name=error.name
    ) from None


class ImageSet(Protocol):
    """A set of images uint8 (N, 3, H, W) that :func:`explorer` can show, with what is known of them.

    ``masks`` bool (N, H, W) or ``boxes`` (N, 4), where it has them, are outlined.
    """

    name: str
    images: Tensor
    targets: Tensor  # class numbers (N,), or (N, K) of a multi-label set
    synthetic: bool  # rendered: the caption says so

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def multilabel(self) -> bool: ...

    def batch(self, indices: Any) -> Tensor: ...  # (B, 3, H, W) as the model takes it


def explorer(
    model: nn.Module,
    images: Any,
    *,
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
    labels: Sequence[int] | None = None,
    truth: Sequence[Tensor] | None = None,
    rivals: Mapping[str, Rival] | None = None,
    seed: int | None = None,
) -> Explorer:
    """Look at what a model looks at, image by image.

    Args:
        model: with an SE block (``selib.attach_se``), or with one of its own.
        images: as :func:`selib.explain` takes them, at most 200 (else ValueError); or a set of images, see
            :class:`ImageSet`.
        classes: the names of the model's outputs, by default numbers; a set knows them.
        transform: of images, see :func:`selib.explain`; a set does it itself.
        labels: the true class of each image, to look at the wrong ones alone; a set knows them.
        truth: where the object is in each image, bool (H, W) of what the model sees; a set knows it.
        rivals: {name: another method}, to compare with; see :data:`selib.Rival`.
        seed: the network's, for the caption of a saved picture.
    """
    origin = type(model).__name__ + (f", seed {seed}" if seed is not None else "")
    spell = partial(_spelled, sys._getframe(1))
    make = partial(ImageSubject, model, rivals=rivals or {}, called=spell(model, "model"))
    if hasattr(images, "targets"):
        check_count(len(images.images))
        origin = f"{images.name}{' (synthetic)' if images.synthetic else ''}, {origin}"
        return Explorer(_of_set(images, classes or images.classes, make, spell(images, "images")), origin)
    images = image_files(Path(images)) if isinstance(images, (str, Path)) else images
    if not isinstance(images, Image.Image):
        check_count(len(images))
    found = prepared(model, images, transform)
    count = len(found.names)
    for name, values in (("labels", labels), ("truth", truth)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}= has {len(values)} entries for {count} images")
    if classes is None:
        classes = [f"class {k}" for k in range(explain(model, found.batch[:1]).logits.shape[-1])]
    way = "" if transform is None else f", transform={spell(transform, 'transform')}"
    called = spell(images, "images")

    def subject(found: Images, i: int, **known: Any) -> Subject:
        code = found.sources[i] or f"{called}[{i}:{i + 1}]"
        batch = found.batch[i : i + 1]
        return make(found.pixels[i], batch, code + way, found.names[i], classes, False, **known)

    def added(given: Any, names: Sequence[str]) -> list[Subject]:
        more = prepared(model, given, transform)
        if names:  # of uploaded files, which have no path here
            more = replace(more, names=list(names), sources=[repr(name) for name in names])
        return [subject(more, i) for i in range(len(more.names))]

    subjects = []
    for i in range(count):
        label = None if labels is None else int(labels[i])
        subjects.append(subject(found, i, label=label, truth=None if truth is None else truth[i]))
    return Explorer(subjects, origin, added)


def _of_set(images: Any, classes: Sequence[str], make: Callable[..., Any], called: str) -> list[Subject]:
    masks, boxes = getattr(images, "masks", None), getattr(images, "boxes", None)
    subjects = []
    for i, image in enumerate(images.images):
        label = None if images.multilabel else int(images.targets[i])
        title = f"image {i}" if label is None else f"image {i}, {classes[label]}"
        batch, code = images.batch([i]), f"{called}.batch([{i}])"
        truth = masks[i] if masks is not None else None
        if masks is None and boxes is not None:
            left, top, right, bottom = (int(edge) for edge in boxes[i])
            truth = torch.zeros(image.shape[1:], dtype=torch.bool)
            truth[top:bottom, left:right] = True
        subjects.append(make(image, batch, code, title, classes, images.multilabel, label=label, truth=truth))
    return subjects


def _spelled(frame: FrameType, value: object, otherwise: str) -> str:
    """What the caller calls a value, so that copied lines run where they are pasted."""
    names = [name for name, own in frame.f_locals.items() if own is value and not name.startswith("_")]
    return otherwise if otherwise in names or not names else names[0]
