"""The command `selib`: heatmaps of images and videos from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selib import __version__

if TYPE_CHECKING:
    from selib.loading import Loaded

# PyTorch takes seconds to import, so commands import what they need when they run: --help is instant.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :func:`execute`."""
    parser = argparse.ArgumentParser(prog="selib", description="What did the network look at?")
    parser.add_argument("--version", action="version", version=f"selib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="heatmaps of images, of folders of them, and of videos")
    explain.add_argument("files", nargs="+", metavar="IMAGE|VIDEO|FOLDER", help="or a pattern in quotes")
    add_model_options(explain)
    _add_preparation(explain)
    explain.add_argument("--target", metavar="K", help="class, by number or name; default: the predicted one")
    explain.add_argument(
        "--gates", action="store_true", help="every channel's gate in explanations.jsonl, too"
    )
    explain.set_defaults(command=_explain)
    export = commands.add_parser("export", help="one ONNX file that answers and explains")
    add_model_options(export, out="FILE.onnx")
    _add_preparation(export)
    export.add_argument("--contrast", action="store_true", help="influence on the log-odds")
    export.set_defaults(command=_export)
    return execute(parser, arguments)


def execute(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, call the function that the parser sets as ``command``, and return the exit status.

    0: done; 1: a file was skipped or a notebook failed; 2: bad input, one line on stderr; 130: interrupted.
    """
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.command(chosen))
    except (ValueError, TypeError, OSError, ImportError) as error:
        remedy = ": pip install 'selib[study]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"{parser.prog}: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def add_model_options(parser: argparse.ArgumentParser, out: str = "DIR") -> None:
    """--checkpoint, --method and --out."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of selib.save_checkpoint")
    parser.add_argument("--method", default="influence", choices=("influence", "gate", "top-gate"))
    parser.add_argument("--out", required=True, metavar=out, type=Path)


def _add_preparation(parser: argparse.ArgumentParser) -> None:
    """What a plain state dict does not say."""
    group = parser.add_argument_group(
        "of a plain state dict as --checkpoint", "what is not said is the architecture's default"
    )
    group.add_argument("--arch", metavar="NAME", help="such as resnet50: a name of torchvision or timm")
    group.add_argument("--classes", metavar="FILE", help="the names of the classes, a line each")
    group.add_argument("--image-size", metavar="PX", type=int, nargs="+", help="a side, or height and width")
    group.add_argument("--mean", metavar="M", type=float, nargs=3, help="of the RGB channels in [0, 1]")
    group.add_argument("--std", metavar="S", type=float, nargs=3)
    group.add_argument(
        "--resize", metavar="PX|stretch", help="the shorter side, before the centre is cropped"
    )
    group.add_argument("--fit", metavar="FOLDER", help="fit sparse gates first, on these unlabelled images")


def _loaded(chosen: argparse.Namespace) -> Loaded:
    """The model that the options name, with an SE block; says what is assumed."""
    from selib.loading import load, with_block

    loaded = load(
        chosen.checkpoint,
        chosen.arch,
        classes=chosen.classes,
        image_size=chosen.image_size,
        mean=chosen.mean,
        std=chosen.std,
        resize=chosen.resize,
    )
    for line in loaded.assumed:
        print(f"assumed: {line}")
    print(with_block(loaded, chosen.method, chosen.fit), end="")
    return loaded


def _explain(chosen: argparse.Namespace) -> int:
    from selib.files import explain_files, find_jobs

    jobs = find_jobs(chosen.files, chosen.out)
    skipped = explain_files(jobs, _loaded(chosen), chosen.out, chosen.method, chosen.target, chosen.gates)
    if skipped:
        print(f"selib: error: {skipped} of the files could not be explained, see above", file=sys.stderr)
    return 1 if skipped else 0


def _export(chosen: argparse.Namespace) -> int:
    from dataclasses import asdict

    from torch import randn

    from selib.portable import export, save_onnx

    loaded = _loaded(chosen)
    example = randn(2, 3, *loaded.preparation.size)
    made = export(loaded.model, example, chosen.method, contrast=chosen.contrast)
    save_onnx(made, chosen.out, classes=loaded.classes, preparation=asdict(loaded.preparation))
    print(f"{chosen.out}: x {list(example.shape[1:])}, target -> logits, gates, heatmap")
    return 0
