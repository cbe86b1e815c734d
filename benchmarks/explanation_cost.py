"""What an explanation costs over one bare forward pass, with Grad-CAM beside it, as JSON.

``python benchmarks/explanation_cost.py [--network resnet18] [--batch 8]`` on an idle machine; quote ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from selib import attach_se, explain
from studies import baselines
from studies.networks import build
from studies.results import machine


def seconds(call: Callable[[], object]) -> float:
    """Median of at least a second of runs."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=1.0).median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    chosen = parser.parse_args()
    model = build(chosen.network, 1000, image_size=chosen.size).eval()
    images = torch.randn(chosen.batch, 3, chosen.size, chosen.size)
    targets = torch.zeros(chosen.batch, dtype=torch.long)

    @torch.no_grad()
    def forward() -> object:
        return model(images)

    bare = seconds(forward)
    block = attach_se(model, images[:1])
    cost = {
        "bare forward": bare,
        "explain": seconds(lambda: explain(model, images)),
        "explain + influence heatmap": seconds(lambda: explain(model, images).heatmap("influence")),
        "Grad-CAM": seconds(lambda: baselines.cams(model, block.features)["Grad-CAM"](images, targets)),
    }
    row = {name: {"ms": round(1000 * s, 2), "over forward": round(s / bare, 3)} for name, s in cost.items()}
    found = {"network": chosen.network, "batch": chosen.batch, "cost": row, **machine("cpu")}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
