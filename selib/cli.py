"""The console script `selib`: run the notebooks, report, fetch data, explain images."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selib import __version__

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# torch and papermill take seconds to import: each command imports what it needs, so that --help is instant

VIDEO = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 a notebook failed, 2 bad input, 130 interrupted.

    Bad input (ValueError, TypeError, OSError from below) becomes one line on stderr.
    """
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.command(chosen))
    except (ValueError, TypeError, OSError) as error:
        print(f"selib: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selib: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selib", description="What did the network look at?")
    parser.add_argument("--version", action="version", version=f"selib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute the notebooks into runs/<profile>/")
    run.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="name or number, such as 04_objects or 04; default: all"
    )
    run.add_argument("--profile", metavar="smoke|standard|full", help="default: SELIB_PROFILE, else standard")
    run.add_argument("--data", metavar="DIR", help="where the data sets lie; default: SELIB_DATA, else data")
    run.add_argument("--out", metavar="DIR", help="default: runs/<profile>")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="notebooks at once; they share the cores (default 1)"
    )
    run.add_argument("--resume", action="store_true", help="skip what is done with the same source and parameters")
    run.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="set a notebook parameter"
    )
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="tables and figures of a finished run as Markdown and HTML")
    report.add_argument("run", metavar="DIR", help="what `selib run` wrote, such as runs/standard")
    report.set_defaults(command=_report)

    data = commands.add_parser("data", help="list, make, get and check data sets")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    for name, text in (
        ("list", "the data sets, and which of them are here"),
        ("make", "render a synthetic set, or cut ava-asd from its videos"),
        ("get", "download a set from its official address"),
        ("check", "read a set strictly and say what is wrong with it"),
    ):
        action = actions.add_parser(name, help=text)
        if name != "list":
            action.add_argument("name", metavar="NAME")
        if name == "make":
            action.add_argument("-n", dest="count", type=int, metavar="COUNT", help="training images or clips")
            action.add_argument("--seed", type=int, default=0, metavar="S")
            action.add_argument("--videos", metavar="DIR", help="for ava-asd: its videos and their annotations")
        action.add_argument("--data", metavar="DIR", help="where the data sets lie; default: SELIB_DATA, else data")
        action.set_defaults(command=_data, action=name)

    explain = commands.add_parser("explain", help="heatmaps of images")
    explain.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    explain.add_argument("--checkpoint", required=True, metavar="FILE", help="written by selib.train.save_checkpoint")
    explain.add_argument("--method", default="influence", choices=("influence", "gate", "top-gate"))
    explain.add_argument("--target", metavar="K", help="output, by number or name; default: that of the largest logit")
    explain.add_argument("--out", required=True, metavar="DIR", type=Path)
    explain.set_defaults(command=_explain)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    from selib import study

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, and so ends the workers and their kernels
    outcomes = study.run(
        chosen.notebooks,
        profile=chosen.profile,
        data=chosen.data,
        out=chosen.out,
        jobs=chosen.jobs,
        resume=chosen.resume,
        parameters=dict(study.literal(text) for text in chosen.parameters),
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"selib: error: {outcome.name}: {outcome.error}", file=sys.stderr)
    return 1 if failed else 0


def _report(chosen: argparse.Namespace) -> int:
    from selib.report import report

    for path in report(chosen.run):
        print(path)
    return 0


def _data(chosen: argparse.Namespace) -> int:
    from selib.data import catalog

    if chosen.action == "list":
        for line in catalog.list_sets(chosen.data):
            print(line)
    elif chosen.action == "make":
        print(catalog.make(chosen.name, chosen.data, chosen.count, chosen.seed, videos=chosen.videos))
    elif chosen.action == "get":
        print(catalog.get(chosen.name, chosen.data))
    else:
        print(catalog.check(chosen.name, chosen.data))
    return 0


def _explain(chosen: argparse.Namespace) -> int:
    videos = [path for path in chosen.images if path.suffix.lower() in VIDEO]
    if videos:
        raise ValueError(f"{videos[0]}: videos are not supported yet, give images")
    stems = [path.stem for path in chosen.images]
    twice = next((path for path in chosen.images if stems.count(path.stem) > 1), None)
    if twice:
        raise ValueError(
            f"{twice}: two images have this name, and so would their overlays: rename one or use two --out"
        )

    from PIL.Image import fromarray

    from selib import explain, load_checkpoint
    from selib.data import normalize
    from selib.models import sides
    from selib.plot import overlay
    from selib.results import replacing, write_text

    model, meta = load_checkpoint(chosen.checkpoint)
    classes: list[str] = meta["classes"]
    target = _target(chosen.target, classes)
    height, width = sides(meta["image_size"])
    pictures = {path: _read(path) for path in chosen.images}  # all are read before anything is written
    lines = []
    for path, picture in pictures.items():
        small = picture.resize((width, height))  # stretched, not cropped: the heatmap covers the whole picture
        explanation = explain(model, normalize(_pixels(small)[None]))
        shown = int(explanation.logits[0].argmax()) if target is None else target
        heatmap = explanation.heatmap(chosen.method, target=shown, size=(picture.height, picture.width))[0]
        with replacing(chosen.out / f"{path.stem}.png") as part:
            fromarray(overlay(_pixels(picture), heatmap)).save(part, format="PNG")
        lines.append(
            {
                "image": path.name,
                "overlay": f"{path.stem}.png",
                "method": chosen.method,
                "target": classes[shown],
                **_answer(explanation.logits[0], classes, meta["task"]),
                "top_channels": explanation.influence(shown)[0]
                .topk(min(10, explanation.gates.shape[-1]))
                .indices.tolist(),
                "gates": [round(gate, 6) for gate in explanation.gates_of(shown)[0].tolist()],
            }
        )
        print(f"{path}: {_said(lines[-1])}")
    write_text(chosen.out / "explanations.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return 0


def _answer(logits: Tensor, classes: Sequence[str], task: str) -> dict[str, object]:
    """What the model says of an image: its class with its probability, or for many answers those that are yes."""
    if task == "multilabel":
        found = zip(classes, logits.tolist(), logits.sigmoid().tolist(), strict=True)
        return {"predictions": {name: round(probability, 6) for name, logit, probability in found if logit > 0}}
    predicted = int(logits.argmax())
    return {"prediction": classes[predicted], "probability": round(float(logits.softmax(0)[predicted]), 6)}


def _said(line: Mapping[str, Any]) -> str:
    """The answer of a line of explanations.jsonl, for the screen: the surest first."""
    answers = line["predictions"] if "predictions" in line else {line["prediction"]: line["probability"]}
    ranked = sorted(answers.items(), key=lambda answer: -answer[1])
    return ", ".join(f"{name} ({probability:.3f})" for name, probability in ranked) or "nothing"


def _target(text: str | None, classes: Sequence[str]) -> int | None:
    """The class number of --target; ValueError when the model has no such class."""
    if text is None or text in classes:
        return None if text is None else classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise ValueError(f"--target {text}: the model has {len(classes)} classes, numbered from 0: {shown}")


def _pixels(picture: Image) -> Tensor:
    """An RGB PIL image as uint8 (3, H, W)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read(path: Path) -> Image:
    """An image file as an RGB PIL image; ValueError naming the file when it is damaged."""
    from PIL.Image import open as open_image

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return open_image(path).convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"{path} is not a readable image ({error}): replace it or leave it out") from None
