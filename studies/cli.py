"""The command `studies`: run the notebooks, report, fetch and make data, mark a film with who speaks."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from selib import __version__
from selib.cli import add_model_options, execute

# As in selib.cli, each command imports what it needs.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status, see :func:`selib.cli.execute`."""
    return execute(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="studies", description="The notebooks and their data.")
    parser.add_argument("--version", action="version", version=f"studies {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="execute the notebooks into runs/<profile>/"))

    report = commands.add_parser("report", help="tables and figures of a finished run as Markdown and HTML")
    report.add_argument("run", metavar="DIR", help="what `studies run` wrote, such as runs/standard")
    report.set_defaults(command=_report)

    data = commands.add_parser("data", help="list, make, get and check data sets")
    _add_data(data.add_subparsers(required=True, metavar="ACTION"))

    film = commands.add_parser("film", help="a video of people, marked with who speaks and why")
    film.add_argument("video", metavar="VIDEO", type=Path)
    text = "where the people are: frame_timestamp, x1, y1, x2, y2, entity"
    film.add_argument("--boxes", required=True, metavar="CSV", type=Path, help=text)
    add_model_options(film)
    film.set_defaults(command=_film)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="such as 04_objects or 04; default: all"
    )
    run.add_argument("--profile", metavar="smoke|standard|full", help="default: SELIB_PROFILE, else standard")
    _add_root(run)
    run.add_argument("--out", metavar="DIR", help="default: runs/<profile>")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="notebooks at once, on the same cores (1)"
    )
    run.add_argument(
        "--resume", action="store_true", help="skip what is done with this source and parameters"
    )
    text = "set a notebook parameter"
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help=text)
    run.set_defaults(command=_run)


def _add_data(actions: argparse._SubParsersAction) -> None:
    texts = {
        "list": "the data sets, and which of them are here",
        "make": "render a synthetic set, or cut ava-asd from its videos",
        "get": "download a set from its official address",
        "check": "read a set strictly and say what is wrong with it",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text)
        if name != "list":
            action.add_argument("name", metavar="NAME")
        if name == "make":
            action.add_argument(
                "-n", dest="count", type=int, metavar="COUNT", help="training images or clips"
            )
            action.add_argument("--seed", type=int, default=0, metavar="S")
            action.add_argument("--videos", metavar="DIR", help="of ava-asd: its videos and annotations")
        _add_root(action)
        action.set_defaults(command=_data, action=name)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="where the data sets lie; default: SELIB_DATA, else data"
    )


def _run(chosen: argparse.Namespace) -> int:
    from studies.run import literal, run

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unwinds, and so ends the workers and their kernels
    outcomes = run(
        chosen.notebooks,
        profile=chosen.profile,
        data=chosen.data,
        out=chosen.out,
        jobs=chosen.jobs,
        resume=chosen.resume,
        parameters=dict(literal(text) for text in chosen.parameters),
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"studies: error: {outcome.name}: {outcome.error}", file=sys.stderr)
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


def _film(chosen: argparse.Namespace) -> int:
    from studies.people import explain_film

    explain_film(chosen.video, chosen.boxes, chosen.checkpoint, chosen.out, method=chosen.method)
    return 0
