"""The console script `selib`: run the notebooks, report, fetch data, explain images."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from selib import __version__

# torch and papermill take seconds to import: each command imports what it needs, so that --help is instant


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 a notebook failed or a file was skipped, 2 bad input, 130 interrupted.

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
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="name or number, such as 04_objects or 04; default: all",
    )
    run.add_argument("--profile", metavar="smoke|standard|full", help="default: SELIB_PROFILE, else standard")
    run.add_argument("--data", metavar="DIR", help="where the data sets lie; default: SELIB_DATA, else data")
    run.add_argument("--out", metavar="DIR", help="default: runs/<profile>")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="notebooks at once; they share the cores (default 1)"
    )
    run.add_argument(
        "--resume", action="store_true", help="skip what is done with the same source and parameters"
    )
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a notebook parameter",
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
            action.add_argument(
                "-n", dest="count", type=int, metavar="COUNT", help="training images or clips"
            )
            action.add_argument("--seed", type=int, default=0, metavar="S")
            action.add_argument(
                "--videos", metavar="DIR", help="for ava-asd: its videos and their annotations"
            )
        action.add_argument(
            "--data", metavar="DIR", help="where the data sets lie; default: SELIB_DATA, else data"
        )
        action.set_defaults(command=_data, action=name)

    explain = commands.add_parser("explain", help="heatmaps of images, of folders of them, and of videos")
    explain.add_argument("files", nargs="+", metavar="IMAGE|VIDEO|FOLDER", type=Path)
    explain.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="written by selib.train.save_checkpoint"
    )
    explain.add_argument("--method", default="influence", choices=("influence", "gate", "top-gate"))
    explain.add_argument(
        "--target", metavar="K", help="output, by number or name; default: that of the largest logit"
    )
    explain.add_argument(
        "--boxes",
        metavar="CSV",
        type=Path,
        help="for a detector of speakers: where the people of the video are",
    )
    explain.add_argument("--out", required=True, metavar="DIR", type=Path)
    explain.set_defaults(command=_explain)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    from studies import run as study

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unwinds, and so ends the workers and their kernels
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
    from studies.report import report

    for path in report(chosen.run):
        print(path)
    return 0


def _data(chosen: argparse.Namespace) -> int:
    from studies.data import catalog

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
    from selib.files import explain_files

    skipped = explain_files(
        chosen.files,
        chosen.checkpoint,
        chosen.out,
        method=chosen.method,
        target=chosen.target,
        boxes=chosen.boxes,
    )
    if skipped:
        print(f"selib: error: {skipped} of the files could not be explained, see above", file=sys.stderr)
    return 1 if skipped else 0
