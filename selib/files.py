"""Explain files: images, folders of them and videos become overlays, contact sheets and lines of JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib import plot, video
from selib.atomic import replacing, write_text
from selib.attach import attach_se, attached
from selib.explanation import Explanation, Method, explain, native_se
from selib.pixels import normalize
from selib.train import load_checkpoint
from studies.people import explain_video
from studies.networks import ActiveSpeaker, sides

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
SHEET = 48  # pictures on a contact sheet
THUMBNAIL = 160  # pixels
FRAMES = 24  # of a video on its contact sheet

Job = tuple[Path, str]
"""A file, and the name of its overlay below the output folder."""
Frame = tuple[dict[str, Any], NDArray[np.uint8]]
"""A line of JSON and a thumbnail."""


def jobs(paths: Sequence[Path], out: Path) -> list[Job]:
    """The files to explain: those named, and all images and videos in the folders named, at any depth, but for what lies in ``out``.

    Raises:
        FileNotFoundError: nothing of that name. ValueError: a folder without images and videos, two files whose overlays would have
            the same name, or a file that its overlay would overwrite.
    """
    found: list[Job] = []
    written = out.resolve()
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGES + VIDEOS and file.is_file()
            )
            if path.resolve() == written:
                raise ValueError(
                    f"--out {out} is the folder of the images: name another, or their overlays would overwrite them"
                )
            if path.resolve() in written.parents:  # what a run before wrote there
                inside = [file for file in inside if written not in file.resolve().parents]
            if not inside:
                raise ValueError(f"{path} holds no images and no videos")
            found += [(file, _overlay_of(file.relative_to(path))) for file in inside]
        else:
            found.append((path, _overlay_of(Path(path.name))))
    counts = Counter(name for _, name in found)
    for path, name in found:
        if counts[name] > 1:
            raise ValueError(
                f"{path}: two files have this name, and so would their overlays: rename one or use two --out"
            )
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.resolve() == (written / name).resolve():
            raise ValueError(
                f"{path} would be overwritten by its own overlay: name another folder with --out"
            )
    return found


def _overlay_of(file: Path) -> str:
    return file.with_suffix(".mp4" if file.suffix.lower() in VIDEOS else ".png").as_posix()


@dataclass(frozen=True)
class Explainer:
    """A model of a checkpoint with what is asked of it; ``target`` None: the output of the largest logit."""

    model: nn.Module
    classes: Sequence[str]
    size: tuple[int, int]
    task: str
    method: Method
    target: int | None

    def __call__(self, picture: Image.Image) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """The overlay of a picture, uint8 (H, W, 3), and its line of JSON."""
        height, width = self.size
        small = picture.resize(
            (width, height)
        )  # stretched, not cropped: the heatmap covers the whole picture
        found = explain(self.model, normalize(_pixels(small)[None]))
        if not isinstance(found, Explanation):
            raise TypeError("the checkpoint has several SE blocks: it explains no single images")
        shown = int(found.logits[0].argmax()) if self.target is None else self.target
        heatmap = found.heatmap(self.method, target=shown, size=(picture.height, picture.width))[0]
        line = {
            "method": self.method,
            "target": self.classes[shown],
            **_answer(found.logits[0], self.classes, self.task),
            "top_channels": found.influence(shown)[0].topk(min(10, found.gates.shape[-1])).indices.tolist(),
            "gates": [round(gate, 6) for gate in found.gates_of(shown)[0].tolist()],
        }
        return plot.overlay(_pixels(picture), heatmap), line


def explain_files(
    paths: Sequence[Path],
    checkpoint: str | Path,
    out: Path,
    *,
    method: Method = "influence",
    target: str | None = None,
    boxes: Path | None = None,
) -> int:
    """Explain images and videos with the model of a checkpoint, and write all about it into the folder ``out``.

    ``<name>.png`` is the overlay of an image and ``<name>.mp4`` that of a video; ``contact_sheet.png`` (and ``contact_sheet_2.png``, …)
    shows them all, ``explanations.jsonl`` has a line for each image and each frame. A file that cannot be read is reported on stderr and
    skipped. With a detector of speakers and ``boxes`` (a CSV as :func:`studies.people.explain_video` reads it) one video is marked with
    who speaks.

    Returns:
        How many files were skipped.

    Raises:
        ValueError, OSError: what concerns all files: the checkpoint, the target, names that clash, a method without an SE block.
    """
    todo = jobs(paths, out)
    model, meta = load_checkpoint(checkpoint)
    if isinstance(model, ActiveSpeaker):
        _speakers(model, todo, out, method, boxes)
        return 0
    if boxes is not None:
        raise ValueError(f"--boxes {boxes}: the checkpoint is no detector of speakers")
    height, width = sides(meta["image_size"])
    _with_block(model, torch.zeros(1, 3, height, width), method, checkpoint)
    explainer = Explainer(
        model, meta["classes"], (height, width), meta["task"], method, number_of(target, meta["classes"])
    )
    sheets, lines, done = Sheets(out), [], 0
    for path, name in tqdm(todo, desc="explain", unit="file", disable=len(todo) < 2, leave=False):
        try:
            if path.suffix.lower() in VIDEOS:
                parts = _film(explainer, path, out / name)
            else:
                overlay, line = explainer(_read(path))
                _save(Image.fromarray(overlay), out / name)
                parts = [({"image": path.name, **line}, _thumbnail(overlay))]
        except (ValueError, OSError) as error:
            tqdm.write(f"selib: skipped: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        done += 1
        lines += [json.dumps({**line, "overlay": name}) + "\n" for line, _ in parts]
        for line, thumbnail in _some(parts):
            sheets.add(f"{name}\n{_first(line)}", thumbnail)
        tqdm.write(
            f"{path}: {said(parts[0][0])}" + f" … {len(parts)} frames" * (len(parts) > 1), file=sys.stdout
        )
    if done:
        write_text(out / "explanations.jsonl", "".join(lines))
        sheets.write()
    return len(todo) - done


@dataclass
class Sheets:
    """Contact sheets of at most 48 pictures, written into the folder ``out`` as they fill."""

    out: Path
    number: int = 1
    waiting: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)

    def add(self, title: str, picture: NDArray[np.uint8]) -> None:
        self.waiting.append(
            (title.replace("$", r"\$"), picture)
        )  # Matplotlib would read what stands between two as a formula
        if len(self.waiting) == SHEET:
            self.write()

    def write(self) -> None:
        """Write what is waiting."""
        if self.waiting:
            titles, pictures = zip(*self.waiting, strict=True)
            fig = plot.contact_sheet(
                torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), columns=8, titles=titles
            )
            with replacing(self.out / f"contact_sheet{f'_{self.number}' * (self.number > 1)}.png") as part:
                fig.savefig(part, format="png", dpi=150, metadata={"Software": None})
            self.number, self.waiting = self.number + 1, []


def _with_block(model: nn.Module, example: Tensor, method: Method, checkpoint: str | Path) -> None:
    """A model without an SE block gets one that changes nothing: enough for influence, but its gates say nothing."""
    if attached(model) or native_se(model, example):
        return
    if method != "influence":
        raise ValueError(
            f"--method {method}: {checkpoint} has no SE block whose gates could be read: use influence, or selib.fit_gates first"
        )
    attach_se(model, example)


def _film(explainer: Explainer, path: Path, overlay_file: Path) -> list[Frame]:
    """A video's overlays, frame by frame, with its sound; what is kept of a frame is small."""
    fps = video.frame_rate(path)
    found: list[Frame] = []

    def frames() -> Iterator[NDArray[np.uint8]]:
        for time, frame in tqdm(video.read_frames(path, fps=fps), desc=path.name, unit="frame", leave=False):
            even = Image.fromarray(
                np.ascontiguousarray(frame)[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
            )
            overlay, line = explainer(even)
            found.append(({"video": path.name, "time": round(time, 4), **line}, _thumbnail(overlay)))
            yield overlay

    try:
        sound = video.read_audio(path)
    except ValueError:  # a silent film
        sound = None
    video.write(overlay_file, frames(), fps=fps, audio=sound)
    return found


def _speakers(
    model: ActiveSpeaker, todo: Sequence[Job], out: Path, method: Method, boxes: Path | None
) -> None:
    """One video of people with boxes, marked with who speaks."""
    if len(todo) != 1 or todo[0][0].suffix.lower() not in VIDEOS:
        raise ValueError("a detector of speakers explains one video at a time: give one, with --boxes")
    ((path, name),) = todo
    if boxes is None:
        raise ValueError(
            f"{path}: a detector needs to know where the people are: give a CSV of their boxes with --boxes"
        )
    if not attached(model):
        attach_se(model, model.example(), at=model.sites)
    people = explain_video(model, path, boxes, out / name, method=method)
    write_text(
        out / "explanations.jsonl",
        "".join(json.dumps({"video": path.name, "overlay": name, **row}) + "\n" for row in people),
    )
    for row in people:
        print(f"{path}: {row['entity']} speaks in {row['speaking']:.0%} of {row['frames']} frames")


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as part:
        picture.save(part, format="PNG")


def _thumbnail(overlay: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most 160 pixels high and wide, on a white square."""
    small = Image.fromarray(overlay)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    page = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    page.paste(small, ((THUMBNAIL - small.width) // 2, (THUMBNAIL - small.height) // 2))
    return np.asarray(page)


def _some(parts: list[Frame]) -> list[Frame]:
    """All, or frames at even distances."""
    if len(parts) <= FRAMES:
        return parts
    return [parts[int(place)] for place in np.linspace(0, len(parts) - 1, FRAMES)]


def _answer(logits: Tensor, classes: Sequence[str], task: str) -> dict[str, object]:
    """What the model says of an image: its class with its probability, or for many answers those that are yes."""
    if task == "multilabel":
        found = zip(classes, logits.tolist(), logits.sigmoid().tolist(), strict=True)
        return {
            "predictions": {name: round(probability, 6) for name, logit, probability in found if logit > 0}
        }
    predicted = int(logits.argmax())
    return {"prediction": classes[predicted], "probability": round(float(logits.softmax(0)[predicted]), 6)}


def _ranked(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    answers = line["predictions"] if "predictions" in line else {line["prediction"]: line["probability"]}
    return sorted(answers.items(), key=lambda answer: -answer[1])


def said(line: Mapping[str, Any]) -> str:
    """The answer of a line of explanations.jsonl, for the screen: the surest first."""
    return ", ".join(f"{name} ({probability:.3f})" for name, probability in _ranked(line)) or "nothing"


def _first(line: Mapping[str, Any]) -> str:
    return next((f"{name} {probability:.0%}" for name, probability in _ranked(line)), "nothing")


def number_of(text: str | None, classes: Sequence[str]) -> int | None:
    """The class number of --target; ValueError when the model has no such class."""
    if text is None or text in classes:
        return None if text is None else classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise ValueError(f"--target {text}: the model has {len(classes)} classes, numbered from 0: {shown}")


def _pixels(picture: Image.Image) -> Tensor:
    """An RGB PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read(path: Path) -> Image.Image:
    """An image file as an upright RGB PIL image; ValueError naming the file when it is damaged."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"{path} is not a readable image ({error}): replace it or leave it out") from None
