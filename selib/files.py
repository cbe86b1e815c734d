"""Explain files: images, folders of them and videos become overlays, contact sheets and lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from selib import plot
from selib.atomic import replacing, write_text
from selib.explainer import SEExplainer
from selib.explanation import Method
from selib.images import SUFFIXES as IMAGES
from selib.images import as_tensor, read_image
from selib.loading import Loaded

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
ACROSS, ROWS = 8, 6  # pictures on a contact sheet
THUMBNAIL = 160  # pixels, high and wide

Picture = NDArray[np.uint8]  # RGB (H, W, 3)
Line = dict[str, Any]  # what explanations.jsonl says of an image or frame
Part = tuple[Line, Picture]  # of an image or frame: its line, and its overlay as a thumbnail
Ask = Callable[[Tensor], tuple[Picture, Line]]  # an image uint8 (3, H, W) -> its overlay and its line


def explain_files(
    jobs: Mapping[str, Path],
    loaded: Loaded,
    out: Path,
    method: Method,
    target: str | None,
    gates: bool = False,
) -> int:
    """Explain images and videos with a model, and write everything into the folder ``out``.

    ``<name>.png`` is the overlay of an image and ``<name>.mp4`` that of a video. ``contact_sheet.png`` (and
    ``contact_sheet_2.png``, …) shows them, and ``explanations.jsonl`` has a line for each image and frame. A
    file that cannot be read is reported on stderr and skipped; the number of these is returned.

    Args:
        jobs: of :func:`find_jobs`.
        target: a class by name or number; by default the one with the largest logit.
        gates: whether the lines have the gates of every channel.
    """
    skipped = 0
    number = _class_number(target, loaded.classes)
    lines: list[str] = []
    rows: list[Sequence[Part]] = []  # of the contact sheets: films have one each, images share them
    with SEExplainer(loaded.model) as explainer:
        ask = partial(_explain, explainer, loaded, method, number, gates)
        bar = tqdm(jobs.items(), desc="explain", unit="file", disable=len(jobs) < 2, leave=False)
        for name, path in bar:
            explain = _explain_video if path.suffix.lower() in VIDEOS else _explain_image
            try:
                parts = explain(ask, path, out / name)
            except (ValueError, OSError, ImportError) as error:  # ImportError: there is no video decoder
                tqdm.write(f"selib: skipped: {' '.join(str(error).split())}", file=sys.stderr)
                skipped += 1
                continue
            lines += [json.dumps({**line, "overlay": name}) + "\n" for line, _ in parts]
            places = np.linspace(0, len(parts) - 1, min(len(parts), ACROSS)).astype(int)
            shown = [parts[place] for place in places]
            full = not rows or len(rows[-1]) == ACROSS or "video" in rows[-1][0][0]
            rows = [*rows, shown] if len(parts) > 1 or full else [*rows[:-1], [*rows[-1], *shown]]
            said = ", ".join(_answers(parts[0][0])) or "nothing"
            frames = f" … {len(parts)} frames" if len(parts) > 1 else ""
            tqdm.write(f"{path}: {said}{frames}", file=sys.stdout)
    _write_sheets(out, rows)
    if lines:
        write_text(out / "explanations.jsonl", "".join(lines))
    return skipped


def find_jobs(patterns: Sequence[str], out: Path) -> dict[str, Path]:
    """The files to explain by the names of their overlays in ``out``; what lies in ``out`` is left out.

    Args:
        patterns: files; folders, whose images and videos are taken at any depth; patterns such as
            ``photos/*.jpg`` that the shell left as they are.
    """
    paths: list[Path] = []
    for pattern in patterns:
        named = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        if not named:
            raise FileNotFoundError(f"{pattern}: no such file")
        paths += [Path(name) for name in named]
    jobs: dict[str, Path] = {}
    for path in paths:
        root, files = path.parent, [path]
        if path.is_dir():
            root, files = path, [file for file in sorted(path.rglob("*")) if file.is_file()]
            files = [file for file in files if file.suffix.lower() in IMAGES + VIDEOS]
            files = [file for file in files if out.resolve() not in file.resolve().parents]
            if not files:
                raise ValueError(f"{path} holds no images and no videos outside of --out {out}")
        for file in files:
            suffix = ".mp4" if file.suffix.lower() in VIDEOS else ".png"
            name = file.relative_to(root).with_suffix(suffix).as_posix()
            if name in jobs:
                raise ValueError(f"{file} and {jobs[name]} would have one overlay: use two --out")
            if file.resolve() == (out / name).resolve():
                raise ValueError(f"{file} would be overwritten by its own overlay: name another --out")
            jobs[name] = file
    return jobs


def _class_number(text: str | None, classes: Sequence[str]) -> int | None:
    """The class number of --target."""
    if text is None:
        return None
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise ValueError(f"--target {text}: the model has {len(classes)} classes, numbered from 0: {shown}")


def _explain(
    explainer: SEExplainer, loaded: Loaded, method: Method, target: int | None, gates: bool, image: Tensor
) -> tuple[Picture, Line]:
    """The overlay of an image uint8 (3, H, W), and its line; ``target`` None: of the largest logit."""
    how, classes = loaded.preparation, loaded.classes
    picture = Image.fromarray(plot.rgb(image))
    seen, found = how.seen(picture), explainer(how(picture)[None])
    logits = found.logits[0]
    best = int(logits.argmax())
    target = best if target is None else target
    line: Line = {"method": method, "target": classes[target]}
    if loaded.task == "multilabel":
        answers = zip(classes, logits.sigmoid().tolist(), strict=True)
        line["predictions"] = {name: round(share, 6) for name, share in answers if share > 0.5}
    else:
        line |= {"prediction": classes[best], "probability": round(float(logits.softmax(0)[best]), 6)}
    influence = found.influence(target)[0]
    line["top_channels"] = influence.topk(min(10, len(influence))).indices.tolist()
    if gates:
        line["gates"] = [round(gate, 6) for gate in found.gates_of(target)[0].tolist()]
    heatmap = found.heatmap(method, target=target, size=seen.size[::-1])[0]
    return plot.overlay(as_tensor(seen), heatmap), line


def _answers(line: Line) -> list[str]:
    """What the model said, the surest first."""
    shares = line["predictions"] if "predictions" in line else {line["prediction"]: line["probability"]}
    surest = sorted(shares.items(), key=lambda answer: -answer[1])
    return [f"{name} ({share:.3f})" for name, share in surest]


def _explain_image(ask: Ask, path: Path, overlay_file: Path) -> list[Part]:
    overlay, line = ask(read_image(path))
    _save(overlay, overlay_file)
    return [({"image": path.name, **line}, _thumbnail(overlay))]


def _explain_video(ask: Ask, path: Path, overlay_file: Path) -> list[Part]:
    from selib import video  # images are explained without a video decoder, too

    fps = video.frame_rate(path)
    parts: list[Part] = []

    def overlays() -> Iterator[Picture]:
        for time, frame in tqdm(video.read_frames(path, fps=fps), desc=path.name, unit="frame", leave=False):
            overlay, line = ask(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1))
            parts.append(({"video": path.name, "time": round(time, 4), **line}, _thumbnail(overlay)))
            yield overlay

    sound = None
    with suppress(ValueError):  # a silent film
        sound = video.read_audio(path)
    video.write(overlay_file, overlays(), fps=fps, audio=sound)
    return parts


def _write_sheets(out: Path, rows: Sequence[Sequence[Part]]) -> None:
    for start in range(0, len(rows), ROWS):
        number = f"_{start // ROWS + 1}" if start else ""
        drawn = []
        for row in rows[start : start + ROWS]:
            drawn.append(plot.row_of([thumbnail for _, thumbnail in row], [_title(line) for line, _ in row]))
        _save(plot.column_of(drawn), out / f"contact_sheet{number}.png")


def _title(line: Line) -> str:
    """Name, time of a frame, and the surest answer."""
    name = line["image"] if "image" in line else f"{line['time']:.2f} s of {line['video']}"
    return "\n".join(plot.elided(text, THUMBNAIL) for text in [name, *_answers(line)[:1]])


def _save(picture: Picture, path: Path) -> None:
    with replacing(path) as part:
        Image.fromarray(picture).save(part, format="PNG")


def _thumbnail(overlay: Picture) -> Picture:
    return np.array(ImageOps.pad(Image.fromarray(overlay), (THUMBNAIL, THUMBNAIL), color="white"))
