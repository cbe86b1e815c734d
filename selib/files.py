"""Explain files: images, folders of them and videos become overlays, contact sheets and lines of JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib import plot
from selib.atomic import replacing, write_text
from selib.attach import attach_se
from selib.checkpoint import load_checkpoint
from selib.explanation import Method, SEExplainer
from selib.forward import attached
from selib.native import native_se
from selib.pixels import normalize, sides

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
SHEET = 48  # pictures on a contact sheet
THUMBNAIL = 160  # pixels, high and wide
FRAMES = 24  # of a video on its contact sheet

Picture = NDArray[np.uint8]  # RGB (H, W, 3)
Part = tuple[dict[str, Any], Picture]  # an image or frame: its line of JSON, its overlay as a thumbnail


def read_image(path: str | Path) -> Tensor:
    """An image file, turned upright: RGB uint8 (3, H, W).

    Raises:
        ValueError: a file that is no image, or a damaged one.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I"):  # 16 bits, as X-rays have; Pillow would cut them off at 255
            grey = np.asarray(picture, dtype=np.float64) / 257
            picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        return _tensor(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{path} is not a readable image ({error}): replace it or leave it out") from None


def explain_files(
    paths: Sequence[Path],
    checkpoint: str | Path,
    out: Path,
    *,
    method: Method = "influence",
    target: str | None = None,
) -> int:
    """Explain images and videos with the model of a checkpoint, and write everything into the folder ``out``.

    ``<name>.png`` is the overlay of an image and ``<name>.mp4`` that of a video. ``contact_sheet.png`` (and
    ``contact_sheet_2.png``, …) shows them, and ``explanations.jsonl`` has a line for each image and frame. A
    file that cannot be read is reported on stderr and skipped.

    Args:
        paths: files, and folders whose images and videos are taken at any depth.
        target: a class by name or number; by default the one with the largest logit.

    Returns:
        How many files were skipped.

    Raises:
        ValueError, OSError: what concerns all files: the checkpoint, the target, names that clash, or gates
            asked for where there is no SE block.
    """
    todo, skipped = _jobs(paths, out), 0
    model, meta = _model(checkpoint, method)
    number = _class_number(target, meta["classes"])
    results = _Results(out)
    with SEExplainer(model) as explain:
        ask = _Question(explain, meta["classes"], sides(meta["image_size"]), meta["task"], method, number)
        for path, name in tqdm(todo, desc="explain", unit="file", disable=len(todo) < 2, leave=False):
            one = _explain_video if path.suffix.lower() in VIDEOS else _explain_image
            try:
                parts = one(ask, path, out / name)
            except (ValueError, OSError, ImportError) as error:  # ImportError: there is no video decoder
                tqdm.write(f"selib: skipped: {' '.join(str(error).split())}", file=sys.stderr)
                skipped += 1
                continue
            results.add(name, parts)
            said = ", ".join(f"{answer} ({share:.3f})" for answer, share in _answers(parts[0][0]))
            frames = f" … {len(parts)} frames" if len(parts) > 1 else ""
            tqdm.write(f"{path}: {said or 'nothing'}{frames}", file=sys.stdout)
    results.write()
    return skipped


def _jobs(paths: Sequence[Path], out: Path) -> list[tuple[Path, str]]:
    """The files to explain, each with the name of its overlay in ``out``; what lies in ``out`` is left out.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: a folder without images and videos, or overlays that would overwrite files or each other.
    """
    found: list[tuple[Path, str]] = []
    written = out.resolve()
    for path in paths:
        if not path.is_dir():
            found.append((path, _overlay_name(Path(path.name))))
            continue
        if path.resolve() == written:
            raise ValueError(f"--out {out} is the folder of the images: name another")
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGES + VIDEOS]
        files = [file for file in files if file.is_file() and written not in file.resolve().parents]
        if not files:
            raise ValueError(f"{path} holds no images and no videos")
        found += [(file, _overlay_name(file.relative_to(path))) for file in files]
    counts = Counter(name for _, name in found)
    for path, name in found:
        if counts[name] > 1:
            raise ValueError(f"{path}: two files have this name, and so would their overlays: use two --out")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.resolve() == written / name:
            raise ValueError(f"{path} would be overwritten by its own overlay: name another --out")
    return found


def _overlay_name(file: Path) -> str:
    return file.with_suffix(".mp4" if file.suffix.lower() in VIDEOS else ".png").as_posix()


def _model(checkpoint: str | Path, method: Method) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint. Without an SE block it gets one that changes nothing, to read influence."""
    model, meta = load_checkpoint(checkpoint)
    if hasattr(model, "example"):
        raise ValueError(f"{checkpoint}: its network does not take images")
    example = torch.zeros(1, 3, *sides(meta["image_size"]))
    if not attached(model) and not native_se(model, example):
        if method != "influence":
            said = "has no SE block whose gates could be read: use influence, or selib.fit_gates first"
            raise ValueError(f"--method {method}: {checkpoint} {said}")
        attach_se(model, example)
    return model, meta


def _class_number(text: str | None, classes: Sequence[str]) -> int | None:
    """The class number of --target."""
    if text is None or text in classes:
        return None if text is None else classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise ValueError(f"--target {text}: the model has {len(classes)} classes, numbered from 0: {shown}")


@dataclass(frozen=True)
class _Question:
    """What is asked of a model; ``target`` None: about the class with the largest logit."""

    explain: SEExplainer
    classes: Sequence[str]
    size: tuple[int, int]
    task: str
    method: Method
    target: int | None

    def __call__(self, image: Tensor) -> tuple[Picture, dict[str, Any]]:
        """The overlay of an image uint8 (3, H, W), and its line of JSON."""
        # Stretched, not cropped: the heatmap covers the whole picture. Pillow takes the width first.
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(self.size[::-1])
        found = self.explain(normalize(_tensor(small)[None]))
        logits = found.logits[0]
        shown = int(logits.argmax()) if self.target is None else self.target
        line: dict[str, Any] = {"method": self.method, "target": self.classes[shown]}
        if self.task == "multilabel":
            answers = zip(self.classes, logits.sigmoid().tolist(), strict=True)
            line["predictions"] = {name: round(share, 6) for name, share in answers if share > 0.5}
        else:
            line["prediction"] = self.classes[int(logits.argmax())]
            line["probability"] = round(float(logits.softmax(0).max()), 6)
        influence = found.influence(shown)[0]
        line["top_channels"] = influence.topk(min(10, len(influence))).indices.tolist()
        line["gates"] = [round(gate, 6) for gate in found.gates_of(shown)[0].tolist()]
        heatmap = found.heatmap(self.method, target=shown, size=image.shape[1:])[0]
        return plot.overlay(image, heatmap), line


def _answers(line: dict[str, Any]) -> list[tuple[str, float]]:
    """What the model said, the surest first."""
    answers = line["predictions"] if "predictions" in line else {line["prediction"]: line["probability"]}
    return sorted(answers.items(), key=lambda answer: -answer[1])


def _explain_image(ask: _Question, path: Path, overlay_file: Path) -> list[Part]:
    overlay, line = ask(read_image(path))
    with replacing(overlay_file) as part:
        Image.fromarray(overlay).save(part, format="PNG")
    return [({"image": path.name, **line}, _thumbnail(overlay))]


def _explain_video(ask: _Question, path: Path, overlay_file: Path) -> list[Part]:
    from selib import video  # images are explained without a video decoder, too

    fps = video.frame_rate(path)
    parts: list[Part] = []

    def overlays() -> Iterator[Picture]:
        for time, frame in tqdm(video.read_frames(path, fps=fps), desc=path.name, unit="frame", leave=False):
            overlay, line = ask(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1))
            parts.append(({"video": path.name, "time": round(time, 4), **line}, _thumbnail(overlay)))
            yield overlay

    try:
        sound = video.read_audio(path)
    except ValueError:  # a silent film
        sound = None
    video.write(overlay_file, overlays(), fps=fps, audio=sound)
    return parts


@dataclass
class _Results:
    """Contact sheets, written into the folder ``out`` as they fill, and the lines of explanations.jsonl."""

    out: Path
    sheets: int = 0
    waiting: list[tuple[str, Picture]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, name: str, parts: list[Part]) -> None:
        """A file's lines, and its thumbnails: all, or frames at even distances."""
        self.lines += [json.dumps({**line, "overlay": name}) + "\n" for line, _ in parts]
        for place in np.linspace(0, len(parts) - 1, min(len(parts), FRAMES)).astype(int):
            line, thumbnail = parts[place]
            title = "\n".join([name, *(f"{answer} {share:.0%}" for answer, share in _answers(line)[:1])])
            # Matplotlib would read what stands between two dollars as a formula.
            self.waiting.append((title.replace("$", r"\$"), thumbnail))
            if len(self.waiting) == SHEET:
                self._write_sheet()

    def write(self) -> None:
        """What has not been written yet; nothing where no file could be explained."""
        if self.waiting:
            self._write_sheet()
        if self.lines:
            write_text(self.out / "explanations.jsonl", "".join(self.lines))

    def _write_sheet(self) -> None:
        self.sheets += 1
        titles, pictures = zip(*self.waiting, strict=True)
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        figure = plot.contact_sheet(images, columns=8, titles=titles)
        name = "contact_sheet.png" if self.sheets == 1 else f"contact_sheet_{self.sheets}.png"
        with replacing(self.out / name) as part:
            figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
        self.waiting.clear()


def _thumbnail(overlay: Picture) -> Picture:
    return np.asarray(ImageOps.pad(Image.fromarray(overlay), (THUMBNAIL, THUMBNAIL), color="white"))


def _tensor(picture: Image.Image) -> Tensor:
    """An RGB PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
