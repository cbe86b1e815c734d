"""docs/your-model.md: every snippet runs, one after the other, and the last of a file's own without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ALONE = [block for block in BLOCKS if block.startswith("# onnxruntime")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((320, 240)).save(f"photos/{number}.jpg")
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=3).state_dict(), "weights.pth")
    scope: dict[str, Any] = {}
    for block in BLOCKS:
        if block not in ALONE:
            exec(compile(block, "your-model.md", "exec"), scope)  # noqa: S102 (our own page)
    assert Image.open("heatmaps.png").width == 2 * 224 + 8
    assert scope["report"].agreement > 0.5 and scope["unlearned"].shape == scope["ours"].shape
    code = f"{ALONE[0]}\nimport sys\nassert 'torch' not in sys.modules and 'selib' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"cat", "dog", "owl"}
    assert Image.open("overlay.png").size == (224, 224)


def test_there_is_a_short_one_for_onnxruntime() -> None:
    lines = [line for line in ALONE[0].splitlines() if line and not line.startswith(("import", "from", "#"))]
    assert len(ALONE) == 1 and len(lines) <= 15 and "torch" not in ALONE[0]
