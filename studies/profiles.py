"""How much work a run does: one row per quantity, and what the smoke and the full profile have instead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """The sizes that notebooks derive everything from; a notebook never asks for the profile's name.

    The defaults are those of the standard profile.
    """

    name: str = "standard"
    face_train: int = 1800  # images of synth-faces to render and learn from
    face_test: int = 1000  # and to report on
    face_seeds: tuple[int, ...] = (0, 1, 2)  # one training run for each, with SE and without
    face_epochs: int = 2  # passes over them, or over CelebA, on a CPU
    face_gpu_epochs: int | None = None  # the same on a GPU, with ResNet-18; None: there as on a CPU
    face_from_shipped: bool = True  # start from the shipped network, or from nothing
    celeba_limit: int | None = (
        None  # images of each split of CelebA; None keeps all 162,770, 19,867 and 19,962
    )
    standing_epochs: int = 20  # of a block that learns on the features of a finished network
    lone_train: int = (
        1800  # of the training faces, so many for networks that are asked for one attribute alone
    )
    lone_epochs: int = 5  # passes over them
    pairs_per_attribute: int = 8  # faces in a localisation table, for each attribute that has a place
    speaker_train: int = 160  # clips of synth-speakers to render and train on
    speaker_test: int = 200  # and to report on, a fifth of them under each condition
    speaker_seeds: tuple[int, ...] = (0, 1, 2)  # one training run for each, with SE and without
    speaker_epochs: int = 1  # passes over them, or over a real set, on a CPU, with the compact network
    speaker_gpu_epochs: int | None = None  # on a GPU, with the network of the size of BIAS; None: as on a CPU
    speaker_from_shipped: bool = True  # start from the shipped network, or from nothing
    speaker_limit: int | None = None  # clips of each split of AVA-ActiveSpeaker or WASD; None keeps all
    speaker_lone: int = 64  # clips of a task that one stream alone solves
    speaker_lone_test: int = 24  # and to report on
    speaker_lone_epochs: int = 2  # passes over them
    speaker_explained: int = 16  # clips in tables of localisation and of modalities, for each condition
    speaker_gate_clips: int = 64  # clips that label-free gates are learned from
    speaker_gate_epochs: int = 12  # passes over them
    gate_epochs: int | None = None  # passes of the gate fit over cached features; None leaves it to fit_gates
    frozen: tuple[str, ...] = ("lite0", "lite1", "lite2")  # pretrained networks of the object study
    unlabelled: int = 2000  # photographs that their gates are fitted on, at most
    gate_counts: tuple[int, ...] = (100, 500, 2000)  # and how many of them in the table of gates
    gate_seeds: tuple[int, ...] = (0, 1, 2)  # one fit for each
    held: int = 2500  # other photographs, for reports; from them
    photos: int = 450  # are explained, and
    photos_others: int = 150  # choose thresholds
    mosaics: int = 100  # of the grid pointing game
    road_images: int = 40  # explained photographs that are taken apart, pass by pass
    train_premise: bool = False  # train the networks with and without SE again, or read their records
    explain_images: int = 200  # validation images in a localisation table
    faithfulness_images: int = 60  # of them in a deletion and insertion table, which costs a pass per step
    resamples: int = 1000  # bootstrap resamples behind every interval
    cell_timeout: int = 1800  # seconds after which a notebook cell counts as hanging


SMOKE = Profile(
    name="smoke",
    face_train=300,
    face_test=120,
    face_seeds=(0,),
    face_epochs=1,
    celeba_limit=300,
    standing_epochs=3,
    lone_train=300,
    lone_epochs=1,
    pairs_per_attribute=2,
    speaker_train=40,
    speaker_test=25,
    speaker_seeds=(0,),
    speaker_limit=20,
    speaker_lone=20,
    speaker_lone_test=10,
    speaker_lone_epochs=1,
    speaker_explained=3,
    speaker_gate_clips=10,
    speaker_gate_epochs=2,
    gate_epochs=60,
    frozen=("lite0",),
    unlabelled=240,
    gate_counts=(100,),
    gate_seeds=(0,),
    held=240,
    photos=40,
    photos_others=12,
    mosaics=8,
    road_images=4,
    explain_images=32,
    faithfulness_images=16,
    resamples=200,
    cell_timeout=300,
)

FULL = Profile(
    name="full",
    face_train=5000,
    face_test=1500,
    face_epochs=10,
    face_gpu_epochs=12,
    face_from_shipped=False,
    lone_train=4000,
    pairs_per_attribute=16,
    speaker_train=1200,
    speaker_test=400,
    speaker_epochs=10,
    speaker_gpu_epochs=25,
    speaker_from_shipped=False,
    speaker_lone=400,
    speaker_lone_test=60,
    speaker_lone_epochs=4,
    speaker_explained=40,
    speaker_gate_clips=200,
    speaker_gate_epochs=20,
    mosaics=200,
    road_images=120,
    train_premise=True,
    explain_images=300,
    faithfulness_images=80,
    resamples=10000,
    cell_timeout=36000,
)

PROFILES = {profile.name: profile for profile in (SMOKE, Profile(), FULL)}


def profile(name: str | None = None) -> Profile:
    """The profile of that name, by default the one that SELIB_PROFILE names, else standard.

    Raises:
        ValueError: an unknown name.
    """
    chosen = name or os.environ.get("SELIB_PROFILE") or "standard"
    if chosen not in PROFILES:
        raise ValueError(f"unknown profile {chosen!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[chosen]


def base() -> Path:
    """The folder that `data/` and `runs/` lie in: the working directory, or the one above `notebooks/`.

    JupyterLab, nbval and papermill start a kernel in the notebook's own folder, the command line does not.
    """
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def checkpoints(sizes: Profile) -> Path:
    """Where notebooks leave networks and features: SELIB_CHECKPOINTS, else ``runs/<profile>/checkpoints``."""
    return Path(os.environ.get("SELIB_CHECKPOINTS") or base() / "runs" / sizes.name / "checkpoints")
