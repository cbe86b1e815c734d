"""How long the kernel takes to redraw the explorer after a knob was moved.

Run `python benchmarks/redraw_latency.py [--out results/standard]` on an idle machine. It prints medians and
95th percentiles in milliseconds; with --out they become a results file that `studies report` shows.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torchvision.models import resnet18

from selib import attach_se, load_checkpoint, widgets
from studies import baselines, clip_view
from studies.data import load, load_speakers
from studies.networks import SHIPPED
from studies.profiles import base
from studies.results import machine, save

MOVES = 60


def timed(control: Any, value: Any) -> float:
    """Milliseconds of one move."""
    started = time.perf_counter()
    control.value = value
    return 1000 * (time.perf_counter() - started)


def moved(explorer: widgets.Explorer) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of every move of every knob: the first time that a value is seen, and of later moves."""
    knobs = explorer.knobs
    moves = {
        "top share": ("share", np.geomspace(0.01, 1.0, MOVES).round(3).tolist()),
        "target": ("target", [value for _, value in knobs["target"].options]),
        "method": ("method", ["gate", "top-gate", "influence"]),
        "opacity": ("opacity", np.linspace(0.1, 0.9, 17).round(2).tolist()),
        "frame": ("frame", list(range(knobs["frame"].max + 1))),
    }
    found = {}
    for name, (knob, values) in moves.items():
        if len(values) > 1:
            control = knobs[knob]
            new = [timed(control, value) for value in values if value != control.value]
            found[name] = new, [timed(control, value) for value in islice(cycle(values), MOVES)]
    if knobs["frame"].max > 0:  # with some channels left out, each frame has channels and logits of its own
        control, values = knobs["frame"], moves["frame"][1]
        knobs["share"].value = 0.3
        new = [timed(control, value) for value in values[:-1]]
        found["frame, top 30 %"] = new, [timed(control, value) for value in islice(cycle(values), MOVES)]
    for name, pictures, kind in (
        ("pick a channel", explorer.strip.maps, "click"),
        ("drag the cut", explorer.charts, "drag"),
        ("look at a channel", explorer.charts, "move"),
    ):
        took = []
        for move in range(MOVES):
            at = {"index": move % 8 if kind == "click" else 0, "x": 0.2 + 0.6 * move / MOVES, "y": 0.5}
            started = time.perf_counter()
            pictures._hear(None, {"kind": kind} | at, [])
            took.append(1000 * (time.perf_counter() - started))
        found[name] = took, took  # always another selection
    return found


def explorers() -> dict[str, widgets.Explorer]:
    """A large image and a deep network, a small image and network, a clip and a recurrent head."""
    torch.manual_seed(0)
    deep = resnet18(num_classes=100).eval()
    attach_se(deep, torch.zeros(1, 3, 224, 224))
    photographs = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    names = [f"class {k}" for k in range(100)]
    small, meta = load_checkpoint(SHIPPED["synth-objects"])
    attach_se(small, torch.zeros(1, 3, 64, 64))
    objects = load("synth-objects", "val", root=base() / "data", limit=4)
    listener: Any = load_checkpoint(SHIPPED["synth-speakers"])[0]
    attach_se(listener, listener.example(), at=listener.sites)
    clips = load_speakers("synth-speakers", "test", root=base() / "data", limit=2)
    return {
        "ResNet-18, 224×224, 100 classes": widgets.explorer(
            deep, photographs, classes=names, rivals=baselines.rivals(deep)
        ),
        f"small ResNet, {len(meta['classes'])} classes": widgets.explorer(
            small, objects, rivals=baselines.rivals(small)
        ),
        "active speaker, face and body, 40 to 60 frames": clip_view.explorer(listener, clips),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", metavar="DIR", help="where the results file goes")
    chosen = parser.parse_args()
    rows: list[list[Any]] = []
    for name, explorer in explorers().items():
        for knob, (new, later) in moved(explorer).items():
            times = float(np.median(new)), float(np.median(later)), float(np.quantile(later, 0.95))
            rows.append([name, knob, *times])
    table = {
        "caption": "Kernel time of a redraw of the explorer after one move of a knob, in milliseconds",
        "columns": [
            "view",
            "knob",
            "median, first seen",
            "median, seen before",
            "95th percentile, seen before",
        ],
        "rows": rows,
        "notes": [
            f"First seen: each value once; seen before: {MOVES} moves through the same values.",
            "It depends on the machine.",
        ],
    }
    print(json.dumps({"rows": rows, **machine("cpu")}, indent=1))
    if chosen.out:
        worst, first = max(row[3] for row in rows), max(rows, key=lambda row: row[2])
        findings = [
            f"The slowest knob is redrawn in {worst:.0f} ms (median).",
            f"First seen, the slowest is '{first[1]}' of '{first[0]}', {first[2]:.0f} ms (median).",
        ]
        title = "Benchmark: redrawing the explorer"
        metrics = {"title": title, "findings": findings, "tables": {"redraw": table}}
        save(
            "redraw_latency",
            profile="standard",
            seed=0,
            params={},
            data={},
            metrics=metrics,
            timings={"device": "cpu"},
            out=chosen.out,
        )


if __name__ == "__main__":
    main()
