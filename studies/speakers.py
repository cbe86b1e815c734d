"""The study of active speakers: clips, networks, their precision, and where the map of the face lies.

On AVA-ActiveSpeaker or WASD, or on their rendered twin. Where the mouth is, only the twin knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import Explanation, StreamGateReport, attach_se, explain, fit_stream_gates, load_weights, video
from selib.atomic import write_text
from selib.forward import call, evaluating, logits_of, to_device
from selib.heatmap import at_maxima, normalize, resize, weighted_sum
from studies import baselines, metrics, tables
from studies.benchmark import Scores
from studies.data import SpeakerSet, available, draw_clips, load_speakers
from studies.explainers import CHANCE, READINGS, SAME_COUNT
from studies.metrics import Interval, percentile
from studies.networks import SHIPPED, ActiveSpeaker, build
from studies.profiles import Profile
from studies.training import History, acting, on_gpu, train_once, with_new_gates
from studies.twins import speakers as synth
from studies.twins.speakers import CONDITIONS, FACE_PARTS, STREAMS

Frames = Sequence[NDArray[np.float64]]  # a number for every frame, clip by clip

MOUTH = 1 + FACE_PARTS.index("mouth")
WINDOW = 40  # frames of a training clip: 1.6 seconds
WHOLE = "SE influence, clip mean"
MEANS = ("mean of channels", "mean of channels, at their maxima", SAME_COUNT)
CONTROLS = (*MEANS, "centre prior", "uniform noise")
PUBLISHED = dict(zip(CONDITIONS, (97.8, 98.4, 95.9, 85.6, 82.5), strict=True))
"""mAP in % of BIAS on WASD (Roxo et al., arXiv 2412.05150); on AVA-ActiveSpeaker 92.4."""


# ---- data and networks -------------------------------------------------------------------------------------


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

    @property
    def description(self) -> str:
        """Data, network and training in a line, for captions."""
        made = " (synthetic)" if self.train.synthetic else ""
        clips = f"{len(self.train)} training and {len(self.test)} test clips"
        passes = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        start = " from the shipped weights" if self.from_shipped else ""
        return f"{self.name}{made}, {clips}, {self.architecture}, {passes}{start}"


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
    alone = task != "all"
    real = next((name for name in ("wasd", "ava-asd") if available(name, root)), "synth-speakers")
    name = "synth-speakers" if alone else data or real
    twin = name == "synth-speakers"
    limits = (profile.speaker_limit, profile.speaker_limit)
    if alone:
        limits = (profile.speaker_lone, profile.speaker_lone_test)
    elif twin:
        limits = (profile.speaker_train, profile.speaker_test)
    held = "test" if twin else "val"  # the benchmarks keep the labels of their test splits to themselves
    train = load_speakers(name, "train", root=root, limit=limits[0], task=task)
    test = load_speakers(name, held, root=root, limit=limits[1], task=task)
    gpu_epochs = profile.speaker_gpu_epochs if on_gpu(device) and not alone else None
    return Setup(
        f"{name}-{task}" if alone else name,
        train,
        test,
        profile.speaker_lone_epochs if alone else gpu_epochs or profile.speaker_epochs,
        "bias" if gpu_epochs else "active_speaker",
        3000 if gpu_epochs else 4 * WINDOW,
        twin and not gpu_epochs and profile.speaker_from_shipped,
    )


def network(setup: Setup, *, se: bool, seed: int) -> ActiveSpeaker:
    """The network before training; with and without SE it starts from the same weights at the same seed.

    From nothing the blocks start in their published form. In a trained network that would halve every
    feature: there they start as the identity.
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
) -> tuple[ActiveSpeaker, History]:
    """Train the network of a setup, or load it from the folder ``out``: the network and its history.

    Every stream has a loss of its own beside the fused one, weighted 0.4 (TalkNet, Light-ASD).
    """
    return train_once(
        network(setup, se=se, seed=seed),
        setup.train.loader(setup.batch_frames, train=True, seed=seed, window=WINDOW),
        out=out,
        name=f"{setup.name}-{'se' if se else 'plain'}-seed{seed}",
        device=device,
        epochs=setup.epochs,
        optimizer="adamw",
        lr=5e-4 if setup.from_shipped else 1.5e-3,
        task="multilabel",
        seed=seed,
    )


def sparse(
    model: ActiveSpeaker, setup: Setup, *, clips: int, sparsity: float, epochs: int, seed: int
) -> tuple[ActiveSpeaker, StreamGateReport]:
    """Label-free gates in all streams at once on a copy of a network trained without SE: copy and report.

    The copy answers as the network does; its influence is that of the network as it is.
    """
    gated = with_new_gates(model, model.example(), seed=seed, at=model.sites, reduction=1)
    some = setup.train.subset(range(min(clips, len(setup.train))))
    loader = some.loader(setup.batch_frames, window=WINDOW)
    return gated, fit_stream_gates(gated, loader, sparsity, task="multilabel", epochs=epochs, seed=seed)


# ---- precision ---------------------------------------------------------------------------------------------


def scored(model: nn.Module, clips: SpeakerSet, *, gated: bool = False) -> list[NDArray[np.float64]]:
    """The logit of "speaking" of every frame, (T,) for each clip: whole clips, as the benchmarks are read.

    Args:
        gated: under the gates of :func:`sparse`, which leave the network as it was.
    """
    with acting(model) if gated else nullcontext():
        return clip_logits(model, (clips.clip(i)[0] for i in range(len(clips))))


def clip_logits(model: nn.Module, clips: Iterable[Mapping[str, Tensor]]) -> list[NDArray[np.float64]]:
    """The logits (T,) of every clip, given as a batch of one."""
    device = next(model.parameters()).device
    with evaluating(model, eager=False):
        outputs = [logits_of(call(model, to_device(inputs, device))) for inputs in clips]
    return [logits.flatten().double().cpu().numpy() for logits in outputs]


def labels_of(clips: SpeakerSet) -> list[NDArray[np.int64]]:
    """The labels of every clip: (T,) of 0 and 1."""
    return [np.asarray(clip.labels, np.int64) for clip in clips.clips]


def rows_by_condition(clips: SpeakerSet) -> dict[str, NDArray[np.int64]]:
    """{condition: its clips}, for those that there are, and "all"."""
    named = np.array([clip.condition or "" for clip in clips.clips])
    found = {name: np.flatnonzero(named == name) for name in dict.fromkeys((*CONDITIONS, *named.tolist()))}
    return {name: rows for name, rows in found.items() if name and len(rows)} | {"all": np.arange(len(clips))}


def first_faces(clips: SpeakerSet, frames: int = 38) -> dict[str, Tensor]:
    """{condition: the first frames of its first clip's face (T, H, W)}; nothing for a set without any."""
    found = {}
    for condition, rows in rows_by_condition(clips).items():
        if condition != "all":
            row = rows[0]
            inputs, _ = clips.clip(row, 0, min(frames, clips.clips[row].frames))
            found[condition.replace(" ", "\n")] = inputs["face"][0]
    return found


def precision(
    scores: Frames, labels: Sequence[NDArray[np.int64]], rows: Sequence[int] | NDArray[np.int64] | None = None
) -> float:
    """Frame-level mAP (AVA-ActiveSpeaker's) over the frames of all clips or of these ``rows``, in [0, 1]."""
    chosen = range(len(labels)) if rows is None else rows
    said, true = (torch.from_numpy(np.concatenate([v[i] for i in chosen])) for v in (scores, labels))
    return metrics.frame_average_precision(said, true)


def precision_gain(
    with_se: Sequence[Frames],
    without: Sequence[Frames],
    labels: Sequence[NDArray[np.int64]],
    rows: NDArray[np.int64],
    *,
    resamples: int,
) -> Interval:
    """mAP with minus without, the mean over seeds, with its 95 % interval over clips."""
    speaks = np.array([row.any() for row in labels])

    def gain(drawn: NDArray[np.int64]) -> float:
        pairs = zip(with_se, without, strict=True)
        return float(np.mean([precision(a, labels, drawn) - precision(b, labels, drawn) for a, b in pairs]))

    def resample(rng: np.random.Generator) -> float:  # the same clips for all networks
        drawn = rng.choice(rows, len(rows))
        while not speaks[drawn].any():  # precision is not defined where nobody speaks
            drawn = rng.choice(rows, len(rows))
        return gain(drawn)

    return percentile(gain(rows), resample, resamples=resamples)


def precision_table(
    runs: Mapping[str, Sequence[Frames]], clips: SpeakerSet, *, resamples: int
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """mAP by condition with and without SE, and the paired differences in points.

    Args:
        runs: {"with SE": [scores of a seed, …], "without": […]}, of :func:`scored`.
    """
    labels, rows, gains = labels_of(clips), [], {}
    with_se, without = runs["with SE"], runs["without"]
    for name, members in rows_by_condition(clips).items():
        gain = precision_gain(with_se, without, labels, members, resamples=resamples)
        gains[name] = Interval(*(100 * value for value in gain))
        means = [
            100 * float(np.mean([precision(run, labels, members) for run in form]))
            for form in (with_se, without)
        ]
        rows.append([name, len(members), *means, list(gains[name]), PUBLISHED.get(name)])
    table = tables.spec(
        "Frame-level mAP in %, with and without the SE blocks",
        "condition | clips | with SE | without | difference in points, paired | BIAS on real WASD, published",
        rows,
        f"Means over {len(without)} seeds; intervals over clips.",
        "The last column is what the twin's conditions are named after, measured by its authors on real "
        "videos: it is no rival of these numbers.",
    )
    return table, gains


def gate_range(ex: Explanation) -> dict[str, list[float]]:
    """The smallest, the mean and the largest gate of each stream."""
    gates = {name: stream.gates for name, stream in ex.streams.items()}
    return {name: [float(s.min()), float(s.mean()), float(s.max())] for name, s in gates.items()}


def sparse_table(report: StreamGateReport, whole: Frames, gated: Frames, clips: SpeakerSet) -> dict[str, Any]:
    """Label-free gates on the network trained without SE: what is open, and what is kept."""
    labels = labels_of(clips)
    agrees = float(np.mean((np.concatenate(whole) > 0) == (np.concatenate(gated) > 0)))
    shares = {f"gates open, {stream}": f"{100 * share:.0f} %" for stream, share in report.open_gates.items()}
    shares["decisions kept, test frames"] = f"{100 * agrees:.1f} %"
    shares["mAP before"] = f"{100 * precision(whole, labels):.1f} %"
    shares["mAP gated"] = f"{100 * precision(gated, labels):.1f} %"
    caption = f"Sparse label-free gates in all three blocks at once, λ = {report.sparsity:g}"
    note = "The network trained without SE, one seed; no labels are used."
    return tables.spec(caption, "measure | value", [list(item) for item in shares.items()], note)


# ---- where the face map lies -------------------------------------------------------------------------------


def speaking_clips(clips: SpeakerSet, count: int, *, conditions: Sequence[str] | None = None) -> list[int]:
    """The first ``count`` clips, of these conditions, with at least ten speaking frames."""
    kept = [
        i
        for i, clip in enumerate(clips.clips)
        if sum(clip.labels) >= 10 and (conditions is None or clip.condition in conditions)
    ]
    return kept[:count]


def face_maps(
    model: nn.Module, ex: Explanation, inputs: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """The maps (T, H, W) of one clip's face: every reading of ``ex``, Grad-CAM and the controls."""
    found = {name: ex.heatmap(method, 0, select=rule)[0] for name, (method, rule) in READINGS.items()}
    found[WHOLE] = ex.heatmap("influence", 0, over="clip")[0]
    found["Grad-CAM"] = baselines.clip_grad_cam(model, inputs, "face")
    crops, maps = inputs["face"][0], ex.features.relu()
    drawn = torch.randperm(maps.shape[1], generator=baselines.generator_of(seed, crops))
    chosen = maps.new_zeros(1, maps.shape[1])
    chosen[0, drawn[: int(ex.selected("top-gate", 0).sum())]] = 1
    means = (maps.mean(1), at_maxima(maps, time=0).mean(1), weighted_sum(maps, chosen))
    found |= {name: normalize(resize(m, crops.shape))[0] for name, m in zip(MEANS, means, strict=True)}
    frames, targets = crops[:, None], torch.zeros(len(crops), dtype=torch.long, device=crops.device)
    found["centre prior"] = baselines.centre_prior(frames, targets)
    found["uniform noise"] = baselines.uniform_noise(seed, cells=maps.shape[-1])(frames, targets)
    return found | {CHANCE: torch.ones_like(crops)}


def localise(model: nn.Module, clips: SpeakerSet, rows: Sequence[int], *, seed: int) -> Scores:
    """How much of each map's energy lies on the mouth ("energy") and within one cell of it ("near").

    A clip is one picture here, its speaking frames side by side: a frame where the map is dark counts little.
    """
    device = next(model.parameters()).device
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        inputs = to_device(clips.clip(row)[0], device)
        mouth = torch.from_numpy(clips.masks(row)["face"] == MOUTH)
        speaking = torch.tensor(clips.clips[row].labels, dtype=torch.bool) & mouth.flatten(1).any(1)
        ex = explain(model, inputs).streams["face"]
        cell = synth.SIDE // ex.features.shape[-1]
        masks = {"near": metrics.dilate(mouth, (cell, cell)), "energy": mouth}
        for name, values in face_maps(model, ex, inputs, seed=seed).items():
            shown = values.cpu()[speaking].flatten(0, 1)[None]
            cells = found.setdefault(name, {kind: [] for kind in masks})
            for kind, mask in masks.items():
                energy = metrics.energy_in_mask(shown, mask[speaking].flatten(0, 1)[None])
                cells[kind].append(float(energy[0]))
    table = {name: {kind: np.array(v) for kind, v in cells.items()} for name, cells in found.items()}
    return Scores(np.array(rows), table)


def mean_energy(scores: Mapping[str, Sequence[Scores]]) -> dict[str, dict[str, dict[str, float]]]:
    """{network: {map: {"near": …, "energy": …}}}, means over clips and seeds of :func:`localise`."""

    def mean(runs: Sequence[Scores], name: str) -> dict[str, float]:
        return {
            kind: float(np.mean([run.cell(name, kind).mean() for run in runs])) for kind in ("near", "energy")
        }

    return {network: {name: mean(runs, name) for name in runs[0].values} for network, runs in scores.items()}


# ---- a video of two people, and cost -----------------------------------------------------------------------


def street(clips: SpeakerSet, rows: Sequence[int], film: Path, boxes: Path) -> tuple[Path, Path]:
    """Two people of the twin side by side in a video: the first as in the clip, the second listening.

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

    sound = speaker.audio[: length * synth.RATE // synth.FPS]
    video.write(film, (scene(t) for t in range(length)), fps=synth.FPS, audio=sound)
    face = "entity_box_x1,entity_box_y1,entity_box_x2,entity_box_y2"
    lines = [f"frame_timestamp,{face},body_x1,body_y1,body_x2,body_y2,entity_id"]
    for name, (_, x) in places.items():
        box = f"{x + 50},30,{x + 210},190,{x + 62},200,{x + 198},336,{name}"
        lines += [f"{t / synth.FPS:.2f},{box}" for t in range(length)]
    write_text(boxes, "\n".join(lines) + "\n")
    return film, boxes


def cost(model: ActiveSpeaker) -> tuple[float, dict[str, float]]:
    """Seconds of the bare forward pass of a clip of 100 frames, and explanations in forward passes.

    Medians over nine rounds, after one that warms up. An explanation is compared with the passes right before
    and after it: the machine's speed wanders.
    """
    inputs = model.example(100, 1)

    def seconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            work()
        return time.perf_counter() - started

    def bare() -> float:
        return seconds(lambda: model(**inputs))

    def face() -> Explanation:
        return explain(model, inputs).streams["face"]

    kinds: dict[str, Callable[[], Any]] = {
        "gates and top-gate heatmap of the face": lambda: face().heatmap("top-gate", 0),
        "modality importance": lambda: explain(model, inputs).modalities(0),
        "influence heatmap of the face": lambda: face().heatmap("influence", 0),
    }
    passes = [bare(), bare()]
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(10):
        for kind, work in kinds.items():
            took = seconds(work)
            passes.append(bare())
            ratios[kind].append(2 * took / (passes[-1] + passes[-2]))
    return float(np.median(passes[1:])), {kind: float(np.median(r[1:])) for kind, r in ratios.items()}


def cost_table(forward: float, cost: Mapping[str, float]) -> dict[str, Any]:
    """What :func:`cost` measured."""
    return tables.spec(
        "Time for one clip of 100 frames, as a multiple of the forward pass",
        "what | forward passes",
        [list(item) for item in cost.items()],
        "Medians of nine rounds, each against the passes right before and after it. "
        f"A pass took {1000 * forward:.0f} ms here and now.",
    )
