"""Does the loader keep a GPU fed? Images per second, as JSON.

Decodes images into the cache, then runs the training loader over them. Takes CelebA where DIR holds it, else
the twin, written to a temporary folder. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

from studies.data import available, catalog, load_faces
from studies.data.cache import cores, forget
from studies.data.objects import data_root
from studies.results import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, nargs=2, default=(112, 92), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=512)
    chosen = parser.parse_args()
    name = "celeba" if available("celeba", chosen.data) else "synth-faces"
    with tempfile.TemporaryDirectory() as temporary:
        root = data_root(chosen.data) if name == "celeba" else Path(temporary)
        rates = {}
        if name == "synth-faces":
            start = perf_counter()
            catalog.make(name, root, chosen.images)
            rates["render and write"] = chosen.images * 2.5 / (perf_counter() - start)  # all four splits
        forget(root, f"{name}-train-{chosen.images}")
        start = perf_counter()
        faces = load_faces(name, root=root, size=tuple(chosen.size), limit=chosen.images)
        rates["check and decode into the cache"] = len(faces) / (perf_counter() - start)
        start = perf_counter()
        load_faces(name, root=root, size=tuple(chosen.size), limit=chosen.images)
        rates["load again"] = len(faces) / (perf_counter() - start)
        loader = faces.loader(min(chosen.batch, len(faces)), train=True)
        for title in ("first epoch", "second epoch"):
            start = perf_counter()
            count = sum(len(targets) for _, targets in loader)
            rates[f"training loader, {title}"] = count / (perf_counter() - start)
    shown = {title: round(rate) for title, rate in rates.items()}
    print(
        json.dumps(
            {
                "data": name,
                "images": len(faces),
                "size": chosen.size,
                "batch": chosen.batch,
                "images/s": shown,
            }
            | {"threads": cores()}
            | machine("cpu"),
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
