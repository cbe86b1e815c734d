"""How much work a run does: one row per profile, one comment per quantity."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """The sizes that notebooks derive everything from; a notebook never asks for the profile's name."""

    name: str
    cifar_epochs: int  # passes over the CIFAR-10 training images on a CPU, with the small network
    tiny_epochs: int  # passes over the Tiny-ImageNet training images on a CPU, with the small network
    gpu_epochs: (
        int | None
    )  # passes on a GPU, with ResNet-18; None keeps the small network and the passes above there too
    tiny_classes: int  # the first so many Tiny-ImageNet classes, in sorted order
    train_limit: int | None  # training images kept of a real set, balanced over classes; None keeps all
    twin_train: int  # images of synth-objects to render and train on
    twin_epochs: int  # passes over them
    face_train: int  # images of synth-faces to render and train on
    face_test: int  # and to report on
    face_seeds: tuple[int, ...]  # one training run for each, with SE and without
    face_epochs: int  # passes over them, or over CelebA, on a CPU
    face_gpu_epochs: int | None  # the same on a GPU, with ResNet-18; None keeps the small network there too
    face_from_shipped: bool  # start from the shipped network, or from nothing
    celeba_limit: (
        int | None
    )  # images of each split of the real CelebA; None keeps all 162,770, 19,867 and 19,962
    lone_train: int  # of the training faces, so many for networks that are asked for one attribute alone
    lone_epochs: int  # passes over them
    pairs_per_attribute: int  # faces in a localisation table, for each attribute that has a place
    speaker_train: int  # clips of synth-speakers to render and train on
    speaker_test: int  # and to report on, a fifth of them under each condition
    speaker_seeds: tuple[int, ...]  # one training run for each, with SE and without
    speaker_epochs: int  # passes over them, or over a real set, on a CPU, with the compact network
    speaker_gpu_epochs: (
        int | None
    )  # the same on a GPU, with the network of the size of BIAS; None keeps the compact one there too
    speaker_from_shipped: bool  # start from the shipped network, or from nothing
    speaker_limit: int | None  # clips of each split of AVA-ActiveSpeaker or WASD; None keeps all
    speaker_lone: int  # clips of a task that one stream alone solves
    speaker_lone_test: int  # and to report on
    speaker_lone_epochs: int  # passes over them
    speaker_explained: (
        int  # clips in a localisation table and in a table of modalities, for each condition there
    )
    speaker_gate_clips: int  # clips that label-free gates are learned from
    speaker_gate_epochs: int  # passes over them
    seeds: tuple[int, ...]  # one training run per seed; intervals over seeds need at least three
    gate_epochs: (
        int | None
    )  # passes of the gate distillation over cached features; None leaves it to fit_gates
    explain_images: int  # validation images in a localisation table
    faithfulness_images: (
        int  # validation images in a deletion and insertion table, which costs a pass per step
    )
    resamples: int  # bootstrap resamples behind every interval
    cell_timeout: int  # seconds after which a notebook cell counts as hanging


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            cifar_epochs=1,
            tiny_epochs=1,
            gpu_epochs=None,
            tiny_classes=5,
            train_limit=1500,
            twin_train=800,
            twin_epochs=1,
            face_train=300,
            face_test=120,
            face_seeds=(0,),
            face_epochs=1,
            face_gpu_epochs=None,
            face_from_shipped=True,
            celeba_limit=300,
            lone_train=300,
            lone_epochs=1,
            pairs_per_attribute=2,
            speaker_train=40,
            speaker_test=25,
            speaker_seeds=(0,),
            speaker_epochs=1,
            speaker_gpu_epochs=None,
            speaker_from_shipped=True,
            speaker_limit=20,
            speaker_lone=20,
            speaker_lone_test=10,
            speaker_lone_epochs=1,
            speaker_explained=3,
            speaker_gate_clips=10,
            speaker_gate_epochs=2,
            seeds=(0,),
            gate_epochs=60,
            explain_images=32,
            faithfulness_images=16,
            resamples=200,
            cell_timeout=300,
        ),
        Profile(
            name="standard",
            cifar_epochs=1,
            tiny_epochs=4,
            gpu_epochs=None,
            tiny_classes=20,
            train_limit=None,
            twin_train=3000,
            twin_epochs=2,
            face_train=2500,
            face_test=1000,
            face_seeds=(0, 1, 2),
            face_epochs=2,
            face_gpu_epochs=None,
            face_from_shipped=True,
            celeba_limit=None,
            lone_train=1800,
            lone_epochs=5,
            pairs_per_attribute=8,
            speaker_train=160,
            speaker_test=200,
            speaker_seeds=(0, 1, 2),
            speaker_epochs=1,
            speaker_gpu_epochs=None,
            speaker_from_shipped=True,
            speaker_limit=None,
            speaker_lone=64,
            speaker_lone_test=24,
            speaker_lone_epochs=2,
            speaker_explained=16,
            speaker_gate_clips=64,
            speaker_gate_epochs=12,
            seeds=(0,),
            gate_epochs=None,
            explain_images=200,
            faithfulness_images=60,
            resamples=1000,
            cell_timeout=1800,
        ),
        Profile(
            name="full",
            cifar_epochs=3,
            tiny_epochs=6,
            gpu_epochs=60,
            tiny_classes=50,
            train_limit=None,
            twin_train=8000,
            twin_epochs=4,
            face_train=5000,
            face_test=1500,
            face_seeds=(0, 1, 2),
            face_epochs=10,
            face_gpu_epochs=12,
            face_from_shipped=False,
            celeba_limit=None,
            lone_train=4000,
            lone_epochs=5,
            pairs_per_attribute=16,
            speaker_train=1200,
            speaker_test=400,
            speaker_seeds=(0, 1, 2),
            speaker_epochs=10,
            speaker_gpu_epochs=25,
            speaker_from_shipped=False,
            speaker_limit=None,
            speaker_lone=400,
            speaker_lone_test=60,
            speaker_lone_epochs=4,
            speaker_explained=40,
            speaker_gate_clips=200,
            speaker_gate_epochs=20,
            seeds=(0, 1, 2),
            gate_epochs=None,
            explain_images=300,
            faithfulness_images=80,
            resamples=10000,
            cell_timeout=36000,
        ),
    )
}


def profile(name: str | None = None) -> Profile:
    """The profile of that name; None: the one that SELIB_PROFILE names, else standard. Unknown: ValueError."""
    chosen = name or os.environ.get("SELIB_PROFILE") or "standard"
    if chosen not in PROFILES:
        raise ValueError(f"unknown profile {chosen!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[chosen]


def base() -> Path:
    """The folder that `data/` and `runs/` lie in: the working directory, or the folder above when it is `notebooks/`.

    JupyterLab, nbval and papermill start a kernel in the notebook's own folder, the command line in the one above.
    """
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here
