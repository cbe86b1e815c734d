"""Train the networks that come with the package, from nothing, on rendered images and clips.

``python -m studies.networks.shipped synth-objects`` or ``synth-faces`` (minutes), ``synth-speakers`` (forty).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from selib import fit, save_checkpoint
from selib.forward import Task
from studies.data import ImageSet, load, load_faces, load_speakers
from studies.networks import SHIPPED, ActiveSpeaker, active_speaker, build
from studies.profiles import base

WINDOW = 40  # frames of a training clip


def train_objects(root: Path) -> None:
    """14 passes over 4,000 images."""
    train, val = load("synth-objects", "train", root=root), load("synth-objects", "val", root=root)
    _train_images(train, val, epochs=14, lr=None, task="multiclass")


def train_faces(root: Path) -> None:
    """20 passes over 8,000 faces."""
    train = load_faces("synth-faces", "train", root=root, limit=8000, seed=1)
    val = load_faces("synth-faces", "val", root=root, limit=1000, seed=1)
    _train_images(train, val, epochs=20, lr=4e-3, task="multilabel")


def _train_images(train: ImageSet, val: ImageSet, *, epochs: int, lr: float | None, task: Task) -> None:
    torch.manual_seed(0)
    model = build("small_resnet", len(train.classes), image_size=train.size)
    loaders = train.loader(64, train=True), val.loader(500)
    print(fit(model, *loaders, epochs=epochs, optimizer="adamw", lr=lr, task=task)[-1])
    save_checkpoint(
        model,
        SHIPPED[train.name],
        architecture="small_resnet",
        classes=train.classes,
        image_size=train.size,
        task=task,
    )


def train_speakers(root: Path) -> None:
    """First the eyes, each alone on the task that it alone solves; then the rest over them; then all of it.

    Shown everything at once, the network takes the hands, which are easier to see, and never the mouth.
    """
    torch.manual_seed(0)
    model = active_speaker()

    def step(
        part: ActiveSpeaker, task: str, clips: int, epochs: int, lr: float = 3e-3, seed: int = 1
    ) -> None:
        shown = load_speakers(
            "synth-speakers", "train", root=root, limit=clips, seed=seed, task=task, streams=part.modalities
        )
        loader = shown.loader(8 * WINDOW, train=True, window=WINDOW)
        fit(part, loader, epochs=epochs, optimizer="adamw", lr=lr, task="multilabel")

    eyes = {stream: model.get_submodule(stream) for stream in ("face", "body")}
    for stream, epochs in (("face", 5), ("body", 8)):
        alone = active_speaker((stream,))
        step(alone, stream, 500, epochs)
        eyes[stream].load_state_dict(alone.get_submodule(stream).state_dict())
        eyes[stream].requires_grad_(False)
    step(model, "all", 1000, 10)
    for eye in eyes.values():
        eye.requires_grad_(True)
    step(model, "all", 1000, 6, 2e-3)
    step(model, "all", 1000, 8, 2e-3, seed=2)
    save_checkpoint(
        model,
        SHIPPED["synth-speakers"],
        architecture="active_speaker",
        classes=["speaking"],
        image_size=112,
        task="multilabel",
    )


TRAIN = {"synth-objects": train_objects, "synth-faces": train_faces, "synth-speakers": train_speakers}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TRAIN:
        sys.exit(f"usage: python -m studies.networks.shipped {{{','.join(TRAIN)}}}")
    TRAIN[sys.argv[1]](base() / "runs" / "shipped")  # no set lies there: images and clips are rendered
