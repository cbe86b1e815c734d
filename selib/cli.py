"""The command `selib`: heatmaps of images and videos from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selib import __version__

# PyTorch takes seconds to import, so commands import what they need when they run: --help is instant.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :func:`execute`."""
    parser = argparse.ArgumentParser(prog="selib", description="What did the network look at?")
    parser.add_argument("--version", action="version", version=f"selib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="heatmaps of images, of folders of them, and of videos")
    explain.add_argument("files", nargs="+", metavar="IMAGE|VIDEO|FOLDER", type=Path)
    add_model_options(explain)
    explain.add_argument("--target", metavar="K", help="class, by number or name; default: the predicted one")
    explain.set_defaults(command=_explain)
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --method and --out."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of selib.save_checkpoint")
    parser.add_argument("--method", default="influence", choices=("influence", "gate", "top-gate"))
    parser.add_argument("--out", required=True, metavar="DIR", type=Path)


def _explain(chosen: argparse.Namespace) -> int:
    from selib.files import explain_files

    skipped = explain_files(chosen.files, chosen.checkpoint, chosen.out, chosen.method, chosen.target)
    if skipped:
        print(f"selib: error: {skipped} of the files could not be explained, see above", file=sys.stderr)
    return 1 if skipped else 0
