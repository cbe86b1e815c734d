"""The study of active speakers: what a network sees and hears when it says "speaking", and whether that is true.

On AVA-ActiveSpeaker or WASD, or on their rendered twin. What only a twin can answer (where the mouth is, what becomes of the answer
when a stream falls silent) is asked of the twin alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import baselines, metrics, video
from selib.atomic import write_text
from selib.attach import attach_se, attached, call, evaluating, logits_of, to_device
from selib.explanation import Explanation, Method, Streams, explain
from selib.gates import StreamsGateReport, fit_gates
from selib.heatmap import at_maxima, normalize, resize, weighted_sum
from selib.select import Select, TopFraction
from selib.stats import Interval, bootstrap, percentile
from selib.train import accelerator, fit, load_weights, save_checkpoint
from studies.benchmark import Scores
from studies.data import SpeakerSet, available, load_speakers
from studies.data.speakers import ClipLoader, draw_clips, inputs_of
from studies.networks import SHIPPED, ActiveSpeaker, active_speaker, build
from studies.objects import CHANCE, OURS, SAME_COUNT
from studies.profiles import Profile, base
from studies.twins import speakers as synth
from studies.twins.speakers import CONDITIONS, FACE_PARTS, STREAMS

MOUTH = 1 + FACE_PARTS.index("mouth")
WINDOW = 40  # frames of a training clip: 1.6 seconds
LEARNING_RATE = {True: 5e-4, False: 1.5e-3}  # peak, from the shipped weights or from nothing
WHOLE = "SE influence, clip mean"
CONTROLS = (
    "mean of channels",
    "mean of channels, at their maxima",
    SAME_COUNT,
    "centre prior",
    "uniform noise",
)
PUBLISHED = {
    "optimal": 97.8,
    "speech impairment": 98.4,
    "face occlusion": 95.9,
    "human voice noise": 85.6,
    "surveillance": 82.5,
}
"""mAP in % of BIAS on WASD (Roxo et al., arXiv 2412.05150); on AVA-ActiveSpeaker 92.4. For those who hold the data to aim at."""


# ---- data and networks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Clips of a profile and how the networks on them are trained."""

    name: str
    train: SpeakerSet
    test: SpeakerSet
    epochs: int
    architecture: str
    batch_frames: int  # video frames in a training batch
    from_shipped: bool

    def loader(self, seed: int) -> ClipLoader:
        """Training batches. Real clips are augmented; the twin's have all the variety that its test clips have."""
        return self.train.loader(
            self.batch_frames, train=True, seed=seed, window=WINDOW, augment=not self.train.synthetic
        )

    @property
    def description(self) -> str:
        """Data, network and training in a line, for captions."""
        made = " (synthetic)" if self.train.synthetic else ""
        passes = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        start = " from the shipped weights" if self.from_shipped else ""
        return f"{self.name}{made}, {len(self.train)} training and {len(self.test)} test clips, {self.architecture}, {passes}{start}"


def clips_of(
    profile: Profile,
    root: str | Path | None = None,
    *,
    data: str | None = None,
    task: str = "all",
    device: str = "auto",
) -> Setup:
    """The clips of a profile: WASD or AVA-ActiveSpeaker where ``root`` holds them, else the twin.

    Args:
        data: "wasd", "ava-asd" or "synth-speakers".
        task: "audio", "face" or "body": a task of the twin that this stream alone solves.
        device: on a GPU the full profile trains the network of the size of BIAS.
    """
    real = next((name for name in ("wasd", "ava-asd") if available(name, root)), "synth-speakers")
    name = "synth-speakers" if task != "all" else data or real
    twin = name == "synth-speakers"
    large = (
        profile.speaker_gpu_epochs is not None and accelerator(device).device.type == "cuda" and task == "all"
    )
    counts = (
        (profile.speaker_train, profile.speaker_test)
        if task == "all"
        else (profile.speaker_lone, profile.speaker_lone_test)
    )
    held = "test" if twin else "val"  # the benchmarks keep the labels of their test splits to themselves
    options: dict[str, Any] = {"task": task} if twin else {}
    train = load_speakers(
        name, "train", root=root, limit=counts[0] if twin else profile.speaker_limit, **options
    )
    test = load_speakers(name, held, root=root, limit=counts[1] if twin else profile.speaker_limit, **options)
    epochs = profile.speaker_gpu_epochs if large and profile.speaker_gpu_epochs else profile.speaker_epochs
    tag = name if task == "all" else f"{name}-{task}"
    return Setup(
        tag,
        train,
        test,
        epochs if task == "all" else profile.speaker_lone_epochs,
        "bias" if large else "active_speaker",
        3000 if large else 4 * WINDOW,
        twin and not large and profile.speaker_from_shipped,
    )


def network(setup: Setup, *, se: bool, seed: int) -> ActiveSpeaker:
    """The network before training; with and without SE it starts from the same weights at the same seed.

    From nothing the blocks start in their published form. In a trained network that would halve every feature, so there they start as
    the identity.
    """
    torch.manual_seed(seed)
    model = build(setup.architecture, 1)
    assert isinstance(model, ActiveSpeaker)
    if setup.from_shipped:
        load_weights(model, SHIPPED["synth-speakers"])
    if se:
        attach_se(model, model.example(), at=model.sites, start="identity" if setup.from_shipped else "paper")
    return model


def trained(
    setup: Setup, *, se: bool, seed: int, out: Path, device: str = "auto"
) -> tuple[ActiveSpeaker, list[dict[str, float]]]:
    """Train the network of a setup, or load it when it was trained into the folder ``out`` before.

    Every stream has a loss of its own beside the fused one, weighted 0.4 (TalkNet, Light-ASD). Returns the model in evaluation mode and
    the history of :func:`selib.train.fit`.
    """
    model = network(setup, se=se, seed=seed)
    folder = out / f"{setup.name}-{'se' if se else 'plain'}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        history = fit(
            model,
            setup.loader(seed),
            epochs=setup.epochs,
            optimizer="adamw",
            lr=LEARNING_RATE[setup.from_shipped],
            task="multilabel",
            seed=seed,
            device=device,
            out=folder,
            progress=False,
        )
    return model.eval(), history


def make_shipped(path: Path | None = None) -> None:
    """Train the network that comes with the package, from nothing, on rendered clips of another seed than the study's.

    First its eyes, each alone on the task that it alone solves: a network that is shown everything at once takes the hands, which are
    easier to see, and never looks at the mouth. Then the rest over them while they stand still, then all of it.
    Forty minutes on two cores.
    """
    root = base() / "runs" / "shipped"  # no set lies there: clips are rendered
    torch.manual_seed(0)
    model = active_speaker()

    def step(
        name: str, part: ActiveSpeaker, task: str, clips: int, epochs: int, lr: float = 3e-3, seed: int = 1
    ) -> None:
        shown = load_speakers(
            "synth-speakers", "train", root=root, limit=clips, seed=seed, task=task, streams=part.modalities
        )
        loader = shown.loader(8 * WINDOW, train=True, window=WINDOW, augment=False)
        fit(part, loader, epochs=epochs, out=root / name, optimizer="adamw", lr=lr, task="multilabel")

    eyes = [model.get_submodule(stream) for stream in ("face", "body")]
    for stream, encoder, passes in zip(("face", "body"), eyes, (5, 8), strict=True):
        alone = active_speaker((stream,))
        step(stream, alone, stream, 500, passes)
        encoder.load_state_dict(alone.get_submodule(stream).state_dict())
        encoder.requires_grad_(False)
    step("head", model, "all", 1000, 10)
    for encoder in eyes:
        encoder.requires_grad_(True)
    step("all", model, "all", 1000, 6, 2e-3)
    step("more", model, "all", 1000, 8, 2e-3, seed=2)
    save_checkpoint(
        model,
        path or SHIPPED["synth-speakers"],
        architecture="active_speaker",
        classes=["speaking"],
        image_size=synth.SIDE,
        task="multilabel",
    )


# ---- precision -------------------------------------------------------------------------------------------------------------


def scored(model: nn.Module, clips: SpeakerSet) -> list[NDArray[np.float64]]:
    """The logit of "speaking" of every frame, clip by clip: (T,) each. One clip at a time, whole, as the benchmarks are read."""
    device = next(model.parameters()).device
    with evaluating(model, eager=False):
        return [
            logits_of(call(model, to_device(clips.clip(i)[0], device))).flatten().double().cpu().numpy()
            for i in range(len(clips))
        ]


def labels_of(clips: SpeakerSet) -> list[NDArray[np.int64]]:
    """The labels of every clip: (T,) of 0 and 1."""
    return [np.asarray(clip.labels, np.int64) for clip in clips.clips]


def rows_by_condition(clips: SpeakerSet) -> dict[str, NDArray[np.int64]]:
    """{condition: its clips}, those that there are, and "all"."""
    named = np.array([clip.condition or "" for clip in clips.clips])
    found = {
        name: np.flatnonzero(named == name) for name in dict.fromkeys((*CONDITIONS, *named.tolist())) if name
    }
    return {name: rows for name, rows in found.items() if len(rows)} | {"all": np.arange(len(clips))}


def precision(
    scores: Sequence[NDArray[np.float64]],
    labels: Sequence[NDArray[np.int64]],
    rows: Sequence[int] | NDArray[np.int64],
) -> float:
    """Frame-level mAP (AVA-ActiveSpeaker's) over the frames of some clips, in [0, 1]."""
    said, true = (torch.from_numpy(np.concatenate([values[i] for i in rows])) for values in (scores, labels))
    return metrics.frame_average_precision(said, true)


def precision_gain(
    with_se: Sequence[Sequence[NDArray[np.float64]]],
    without: Sequence[Sequence[NDArray[np.float64]]],
    labels: Sequence[NDArray[np.int64]],
    rows: NDArray[np.int64],
    *,
    resamples: int,
) -> Interval:
    """mAP with minus without, averaged over seeds, with the 95 % interval over clips: every resample draws clips for all networks at once."""

    def gain(drawn: NDArray[np.int64]) -> float:
        return float(
            np.mean(
                [
                    precision(a, labels, drawn) - precision(b, labels, drawn)
                    for a, b in zip(with_se, without, strict=True)
                ]
            )
        )

    speaks = np.array([row.any() for row in labels])

    def drawn(rng: np.random.Generator) -> float:
        # Precision is not defined where nobody speaks: with a handful of clips that is drawn now and then, and drawn again.
        while not speaks[chosen := rng.choice(rows, len(rows))].any():
            pass
        return gain(chosen)

    return percentile(gain(rows), drawn, resamples=resamples)


def precision_table(
    runs: Mapping[str, Sequence[Sequence[NDArray[np.float64]]]], clips: SpeakerSet, *, resamples: int
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """mAP by condition with and without SE, the paired difference in points, and that difference by condition.

    Args:
        runs: {"with SE": [scores of a seed, …], "without": […]}, of :func:`scored`.
    """
    labels, rows, gains = labels_of(clips), [], {}
    for name, members in rows_by_condition(clips).items():
        gains[name] = Interval(
            *(
                100 * v
                for v in precision_gain(
                    runs["with SE"], runs["without"], labels, members, resamples=resamples
                )
            )
        )
        means = [
            100 * float(np.mean([precision(run, labels, members) for run in runs[form]]))
            for form in ("with SE", "without")
        ]
        rows.append([name, len(members), *means, list(gains[name]), PUBLISHED.get(name)])
    table = {
        "caption": "Frame-level mAP in %, with and without the SE blocks",
        "columns": [
            "condition",
            "clips",
            "with SE",
            "without",
            "difference in points, paired",
            "BIAS on real WASD, published",
        ],
        "rows": rows,
        "notes": [
            f"Means over {len(runs['without'])} seeds; intervals over clips. Not harmed means: the interval lies above -0.5 points.",
            "The last column is what the twin's conditions are named after, measured by its authors on real videos: it is no rival of these numbers.",
        ],
    }
    return table, gains


# ---- where the face map lies -----------------------------------------------------------------------------------------------


def speaking_clips(clips: SpeakerSet, count: int, *, conditions: Sequence[str] | None = None) -> list[int]:
    """The first clips with at least ten speaking frames, of these conditions, at most ``count``, the conditions in turn."""
    kept = [
        i
        for i, clip in enumerate(clips.clips)
        if sum(clip.labels) >= 10 and (conditions is None or clip.condition in conditions)
    ]
    return kept[:count]


def streams_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Streams:
    """Explain one batch of clips: a model with several blocks."""
    found = explain(model, dict(inputs))
    assert isinstance(found, Streams)
    return found


def face_maps(
    model: nn.Module, ex: Explanation, inputs: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """The maps of one clip's face by every reading ``ex`` of its SE vector, and the controls: (T, H, W) in [0, 1] each."""
    crops = inputs["face"][0]
    readings: tuple[tuple[Method, Select | None], ...] = (
        ("top-gate", None),
        ("gate", None),
        ("influence", None),
        ("influence", TopFraction(0.10)),
    )
    found = {
        name: ex.heatmap(method, 0, select=rule)[0]
        for name, (method, rule) in zip(OURS, readings, strict=True)
    }
    found[WHOLE] = ex.heatmap("influence", 0, over="clip")[0]
    return found | {"Grad-CAM": baselines.clip_grad_cam(model, inputs, "face")} | _controls(ex, crops, seed)


def _controls(ex: Explanation, crops: Tensor, seed: int) -> dict[str, Tensor]:
    maps, size = ex.features.relu(), crops.shape
    generator = baselines.generator_of(seed, crops)
    channels = maps.shape[1]
    count = int(ex.selected("top-gate", 0).sum())
    chosen = (
        torch.zeros(1, channels)
        .index_fill_(1, torch.randperm(channels, generator=generator)[:count], 1)
        .to(maps)
    )
    frames = crops[:, None]
    zeros = torch.zeros(len(crops), dtype=torch.long, device=crops.device)
    made = (
        normalize(resize(maps.mean(1), size))[0],
        normalize(resize(at_maxima(maps, time=0).mean(1), size))[0],
        normalize(resize(weighted_sum(maps, chosen), size))[0],
        baselines.centre_prior(frames, zeros),
        baselines.uniform_noise(seed, cells=maps.shape[-1])(frames, zeros),
    )
    return dict(zip(CONTROLS, made, strict=True))


def localise(model: nn.Module, clips: SpeakerSet, rows: Sequence[int], *, seed: int) -> Scores:
    """How much of each map's energy lies on the mouth ("energy") and within one cell of it ("near"), over the speaking frames of a clip.

    A clip is one picture here, all its frames side by side: a frame in which the map is dark counts little. "area" is the mouth's share of
    those frames, what a map that knows nothing would get.
    """
    device = next(model.parameters()).device
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        inputs = to_device(clips.clip(row)[0], device)
        mouth = torch.from_numpy(clips.masks(row)["face"] == MOUTH)
        speaking = torch.tensor(clips.clips[row].labels, dtype=torch.bool) & mouth.flatten(1).any(1)
        ex = streams_of(model, inputs).streams["face"]
        maps = face_maps(model, ex, inputs, seed=seed)
        cell = synth.SIDE // ex.features.shape[-1]
        near = metrics.dilate(mouth, (cell, cell))
        for name, values in maps.items():
            shown = values.cpu()[speaking].flatten(0, 1)[None]
            cells = found.setdefault(name, {"near": [], "energy": []})
            for kind, mask in (("near", near), ("energy", mouth)):
                cells[kind].append(
                    float(metrics.energy_in_mask(shown, mask[speaking].flatten(0, 1)[None])[0])
                )
        area = found.setdefault(CHANCE, {"near": [], "energy": []})
        for kind, mask in (("near", near), ("energy", mouth)):
            area[kind].append(float(mask[speaking].double().mean()))
    return Scores(
        np.array(rows),
        {name: {kind: np.array(v) for kind, v in cells.items()} for name, cells in found.items()},
    )


# ---- what each stream is worth ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """What each of M modalities is worth in N clips, over their speaking frames.

    Attributes:
        names: the modalities.
        influence: (N, M) mean fall of the logit when the modality's gates are zero.
        share: (N, M) mean magnitude of that fall, as a share of all modalities'.
        gate_share: (N, M) mean gate of the modality's segment, as a share: how the authors of BIAS read it.
    """

    names: tuple[str, ...]
    influence: NDArray[np.float64]
    share: NDArray[np.float64]
    gate_share: NDArray[np.float64]


def worth(model: nn.Module, batches: Sequence[tuple[Mapping[str, Tensor], Sequence[int]]]) -> Worth:
    """The worth of the modalities in clips, given as (inputs of one clip, its labels)."""
    influence, share, gates = [], [], []
    names: tuple[str, ...] = ()
    for inputs, labels in batches:
        found = streams_of(model, inputs).modalities(0)
        names = tuple(found.names)
        falls = found.influence[0].double().cpu().numpy()[:, np.asarray(labels, bool)]  # (M, speaking frames)
        size = np.abs(falls).mean(1)
        influence.append(falls.mean(1))
        share.append(size / max(size.sum(), 1e-12))
        gates.append(found.gate_share[0].double().cpu().numpy())
    return Worth(names, np.stack(influence), np.stack(share), np.stack(gates))


def batches_of(clips: SpeakerSet, rows: Sequence[int]) -> list[tuple[dict[str, Tensor], list[int]]]:
    """(inputs, labels) of some clips, as :func:`worth` takes them."""
    return [(clips.clip(i)[0], list(clips.clips[i].labels)) for i in rows]


def drawn_again(
    clips: SpeakerSet,
    rows: Sequence[int],
    *,
    muted: Sequence[str] = (),
    change: Mapping[str, Any] | None = None,
) -> list[tuple[dict[str, Tensor], list[int]]]:
    """The same clips of the twin rendered anew with streams muted or parameters changed, as (inputs, labels)."""
    found = draw_clips([({**clips.params(i), **(change or {})}, tuple(muted)) for i in rows])
    return [(inputs_of(clip, clips.streams), clip.labels.tolist()) for clip in found]


@dataclass(frozen=True)
class Muting:
    """Modality influence beside the truth: (N, M) each, over the speaking frames of N clips."""

    names: tuple[str, ...]
    influence: NDArray[np.float64]
    drop: NDArray[np.float64]  # of the logit when the clip is rendered again with the modality muted


def muting(model: nn.Module, clips: SpeakerSet, rows: Sequence[int]) -> Muting:
    """What the fusion gates say a modality is worth, and what the network loses when it is muted in the picture or the sound."""
    whole = batches_of(clips, rows)
    said = worth(model, whole)
    before = _speaking_logits(model, whole)
    drops = [before - _speaking_logits(model, drawn_again(clips, rows, muted=(name,))) for name in said.names]
    return Muting(said.names, said.influence, np.stack(drops, 1))


def _speaking_logits(
    model: nn.Module, batches: Sequence[tuple[Mapping[str, Tensor], Sequence[int]]]
) -> NDArray[np.float64]:
    """The mean logit over the speaking frames of each clip: (N,)."""
    device = next(model.parameters()).device
    with evaluating(model, eager=False):
        return np.array(
            [
                float(
                    logits_of(call(model, to_device(inputs, device)))
                    .flatten()[torch.tensor(labels, dtype=torch.bool, device=device)]
                    .mean()
                )
                for inputs, labels in batches
            ]
        )


def spearman_interval(studies: Mapping[str, Muting], *, resamples: int) -> Interval:
    """Spearman's correlation of influence and drop over all clips and modalities of the studies, with its interval over clips."""

    def correlation(drawn: Sequence[NDArray[np.int64]]) -> float:
        said, true = (
            np.concatenate(
                [
                    getattr(study, kind)[rows].ravel()
                    for study, rows in zip(studies.values(), drawn, strict=True)
                ]
            )
            for kind in ("influence", "drop")
        )
        return float(metrics.spearman(torch.from_numpy(said)[None], torch.from_numpy(true)[None])[0])

    sizes = [len(study.drop) for study in studies.values()]
    return percentile(
        correlation([np.arange(n) for n in sizes]),
        lambda rng: correlation([rng.integers(n, size=n) for n in sizes]),
        resamples=resamples,
    )


def muting_table(
    models: Mapping[str, nn.Module], setups: Mapping[str, Setup], studies: Mapping[str, Muting]
) -> dict[str, Any]:
    """Single-stream tasks: mAP, influence of every modality, and what muting it costs, in means over clips."""
    rows = []
    for task, study in studies.items():
        clips = setups[task].test
        mean_ap = 100 * precision(scored(models[task], clips), labels_of(clips), range(len(clips)))
        rows.append(
            [task, len(study.drop), mean_ap, *study.influence.mean(0).tolist(), *study.drop.mean(0).tolist()]
        )
    names = next(iter(studies.values())).names
    return {
        "caption": "Tasks that one stream alone solves: modality influence beside the fall of the logit when the clip is drawn again with the modality muted",
        "columns": [
            "the stream that tells",
            "clips",
            "mAP in %",
            *(f"influence of {n}" for n in names),
            *(f"fall without {n}" for n in names),
        ],
        "rows": rows,
        "notes": [
            "In logits, over the speaking frames; one network for each task, trained with SE, one seed."
        ],
        "synthetic": True,
    }


def share_table(found: Mapping[str, Worth], *, resamples: int) -> dict[str, Any]:
    """Modality shares by condition: influence, and the gates as the authors read them."""
    names = next(iter(found.values())).names
    rows = [
        [
            condition,
            *(list(bootstrap(w.share[:, m], resamples=resamples)) for m in range(len(names))),
            *(float(w.gate_share[:, m].mean()) for m in range(len(names))),
        ]
        for condition, w in found.items()
    ]
    return {
        "caption": "What each modality is worth, by condition",
        "columns": [
            "condition",
            *(f"{n}: share of influence" for n in names),
            *(f"{n}: share of gates" for n in names),
        ],
        "rows": rows,
        "notes": [
            "Speaking frames. Influence: the fall of the logit when the modality's segment of the fusion gates is set to zero. Intervals over clips."
        ],
    }


def share_change(after: Worth, before: Worth, modality: str, *, resamples: int) -> Interval:
    """How the share of influence of a modality changes between the same clips drawn twice: paired interval of after - before."""
    m = after.names.index(modality)
    return bootstrap(after.share[:, m] - before.share[:, m], resamples=resamples)


def share_between(a: Worth, b: Worth, modality: str, *, resamples: int) -> Interval:
    """How a modality's share of influence differs between two groups of clips, a - b, with the interval over both groups' clips."""
    x, y = (w.share[:, w.names.index(modality)] for w in (a, b))
    return percentile(
        float(x.mean() - y.mean()),
        lambda rng: rng.choice(x, len(x)).mean() - rng.choice(y, len(y)).mean(),
        resamples=resamples,
    )


# ---- how few gates will do -------------------------------------------------------------------------------------------------


def gate_variants(
    model: ActiveSpeaker, clips: SpeakerSet, *, seed: int
) -> dict[str, dict[str, list[NDArray[np.float64]]]]:
    """Scores of every clip when one modality's segment of the fusion gates is cut down, and the others stay.

    Returns:
        {modality: {"top 10 % by gate", "top 10 % by influence", "random 10 %", "none": scores of each clip}}, and "all" for all segments
        at once. "none" closes the segment.
    """
    rule = TopFraction(0.10)
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for row in range(len(clips)):
        ex = streams_of(model, clips.clip(row)[0]).streams["fusion"]
        segments = dict(zip(model.modalities, ex.gates[0].chunk(len(model.modalities)), strict=True))
        influence = ex.influence(0)[0].abs().mean(1).chunk(len(segments))
        generator = torch.Generator().manual_seed(seed * 100003 + row)
        masks: dict[str, list[Tensor]] = {}
        for values, effect in zip(segments.values(), influence, strict=True):
            chance = torch.rand(len(values), generator=generator).to(values)
            rankings = {"top 10 % by gate": values, "top 10 % by influence": effect, "random 10 %": chance}
            for kind, ranking in rankings.items():
                masks.setdefault(kind, []).append(rule.mask(ranking[None])[0].to(values))
            masks.setdefault("none", []).append(torch.zeros_like(values))
        cases = [
            (which, kind)
            for kind in masks
            for which in (*segments, "all")
            if (which, kind) != ("all", "none")
        ]
        kept = torch.stack(
            [
                torch.cat(
                    [
                        part if which in (name, "all") else torch.ones_like(part)
                        for name, part in zip(segments, masks[kind], strict=True)
                    ]
                )
                for which, kind in cases
            ]
        )
        with evaluating(model):
            gates = (ex.gates * kept)[:, :, None] * attached(model)["fusion"].gain
            logits = model.decide(ex.features * gates).flatten(1).double().cpu().numpy()
        for (which, kind), row_of in zip(cases, logits, strict=True):
            found.setdefault(which, {}).setdefault(kind, []).append(row_of)
    return found


def gate_table(
    model: ActiveSpeaker, clips: SpeakerSet, whole: Sequence[NDArray[np.float64]], *, seed: int
) -> dict[str, Any]:
    """mAP when only a tenth of one modality's fusion gates stay open (the table of BIAS), with as many random ones beside it."""
    labels, everything = labels_of(clips), range(len(clips))
    found = gate_variants(model, clips, seed=seed)
    kinds = list(next(iter(found.values())))
    rows = [
        [which, *(100 * precision(cells[k], labels, everything) if k in cells else None for k in kinds)]
        for which, cells in found.items()
    ]
    return {
        "caption": "mAP in % when one modality's segment of the fusion gates is cut down",
        "columns": ["modality", *kinds],
        "rows": rows,
        "notes": [
            f'{len(clips)} test clips; with all gates {100 * precision(whole, labels, everything):.1f} %. The other modalities keep theirs; "all": every segment is cut down.'
        ],
    }


def sparse(
    model: ActiveSpeaker, setup: Setup, *, clips: int, sparsity: float, epochs: int, seed: int
) -> tuple[ActiveSpeaker, Any]:
    """Label-free gates on a copy of a network trained without SE, in all streams at once: the gated copy and the report."""
    gated = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_se(gated, gated.example(), at=gated.sites, reduction=1)
    some = setup.train.subset(range(min(clips, len(setup.train))))
    report = fit_gates(
        gated,
        some.loader(setup.batch_frames, window=WINDOW),
        sparsity,
        task="multilabel",
        epochs=epochs,
        seed=seed,
    )
    return gated, report


def sparse_table(
    report: StreamsGateReport,
    whole: Sequence[NDArray[np.float64]],
    gated: Sequence[NDArray[np.float64]],
    clips: SpeakerSet,
) -> dict[str, Any]:
    """Label-free gates on the network trained without SE: what is open, and what is kept."""
    labels, everything = labels_of(clips), range(len(clips))
    agrees = float(np.mean((np.concatenate(whole) > 0) == (np.concatenate(gated) > 0)))
    return {
        "caption": f"Sparse label-free gates in all three blocks at once, λ = {report.sparsity:g}",
        "columns": ["measure", "value"],
        "rows": [
            *(
                [f"gates open, {stream}", f"{100 * share:.0f} %"]
                for stream, share in report.open_gates.items()
            ),
            ["decisions kept, test frames", f"{100 * agrees:.1f} %"],
            ["mAP before", f"{100 * precision(whole, labels, everything):.1f} %"],
            ["mAP gated", f"{100 * precision(gated, labels, everything):.1f} %"],
        ],
        "notes": ["The network trained without SE, one seed; no labels are used."],
    }


def street(clips: SpeakerSet, rows: Sequence[int], film: Path, boxes: Path) -> tuple[Path, Path]:
    """Two people of the twin side by side in one video with one sound track: the first as in the clip, the second at rest, listening.

    Writes an MP4 of 640×360 and a CSV with the boxes of face and body of each, and returns both paths.
    """
    speaker, listener = draw_clips([(clips.params(rows[0]), ()), (clips.params(rows[1]), STREAMS)])
    places = {"left": (speaker, 30), "right": (listener, 350)}  # the left edge of each
    length = min(len(clip.labels) for clip, _ in places.values())

    def scene(t: int) -> NDArray[np.uint8]:
        picture = np.full((360, 640), 40, np.uint8)
        for clip, x in places.values():
            picture[20:340, x : x + 260] = 60
            picture[30:190, x + 50 : x + 210] = cv2.resize(
                clip.faces[t], (160, 160), interpolation=cv2.INTER_CUBIC
            )
            picture[200:336, x + 62 : x + 198] = cv2.resize(
                clip.bodies[t], (136, 136), interpolation=cv2.INTER_CUBIC
            )
        return np.repeat(picture[:, :, None], 3, 2)

    video.write(
        film,
        (scene(t) for t in range(length)),
        fps=synth.FPS,
        audio=speaker.audio[: length * synth.RATE // synth.FPS],
    )
    columns = "frame_timestamp,entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2,body_x1,body_y1,body_x2,body_y2,entity_id"
    lines = [
        f"{t / synth.FPS:.2f},{x + 50},30,{x + 210},190,{x + 62},200,{x + 198},336,{name}"
        for name, (_, x) in places.items()
        for t in range(length)
    ]
    write_text(boxes, "\n".join([columns, *lines]) + "\n")
    return film, boxes


# ---- cost ------------------------------------------------------------------------------------------------------------------


def cost(model: ActiveSpeaker, *, frames: int = 100, rounds: int = 9) -> tuple[float, dict[str, float]]:
    """What one clip of ``frames`` frames costs: the seconds of the bare forward pass, and explanations of several kinds in forward passes.

    Medians over the rounds. An explanation is compared with the passes right before and after it: the machine's speed wanders.
    """
    inputs = model.example(frames, 1)

    def bare() -> None:
        with torch.no_grad():
            model(**inputs)

    def reading(method: Method) -> Callable[[], Any]:
        return lambda: streams_of(model, inputs).streams["face"].heatmap(method, 0)

    def seconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    kinds: dict[str, Callable[[], Any]] = {
        "gates and top-gate heatmap of the face": reading("top-gate"),
        "modality importance": lambda: streams_of(model, inputs).modalities(0),
        "influence heatmap of the face": reading("influence"),
    }
    bare()
    passes = [seconds(bare)]
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, work in kinds.items():
            took = seconds(work)
            passes.append(seconds(bare))
            if turn:  # the first round warms up
                ratios[kind].append(2 * took / (passes[-1] + passes[-2]))
    return float(np.median(passes)), {kind: float(np.median(r)) for kind, r in ratios.items()}
