"""Plain state dicts by an architecture's name: what fits is loaded, what is assumed is said, no pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import selib
from selib.cli import main
from selib.images import Preparation
from selib.loading import load

ARCH, K = "shufflenet_v2_x0_5", 3


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return models.shufflenet_v2_x0_5(num_classes=K).eval()


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def same(one: nn.Module, two: nn.Module) -> bool:
    x = torch.randn(2, 3, 64, 64)
    return torch.equal(one(x), two(x))


WRAPPED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda state: state,
    "of a training script": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "model in a dict": lambda state: {"model": state},
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_state_dicts_load_however_they_are_wrapped(kind: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(WRAPPED[kind](network.state_dict()), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", ARCH)
    assert same(loaded.model, network) and not loaded.model.training
    assert loaded.classes == ["class 0", "class 1", "class 2"]
    assert loaded.preparation == Preparation((224, 224), 256)
    assert loaded.assumed == (f"{ARCH} of torchvision", "3 classes, without names")


def test_safetensors_and_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load(tmp_path / "w.safetensors", "test_vit")
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded.model(x), model(x))
    assert loaded.preparation.size == (160, 160) and loaded.preparation.mean == (0.5, 0.5, 0.5)
    assert loaded.assumed[0] == "test_vit of timm" and len(loaded.classes) == 7


def test_the_names_of_imagenet_come_with_a_thousand_outputs(tmp_path: Path) -> None:
    torch.save(models.shufflenet_v2_x0_5().state_dict(), tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth", ARCH)
    assert loaded.classes[281] == "tabby" and loaded.assumed[1] == "1000 classes, named as ImageNet's"


def test_what_is_said_goes_before_the_architectures_own(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n\nowl\n")
    grey = (0.5, 0.5, 0.5)
    loaded = load(weights, ARCH, classes=tmp_path / "names.txt", image_size=[112], mean=grey, std=grey)
    assert loaded.classes == ["cat", "dog", "owl"] and loaded.assumed == (f"{ARCH} of torchvision",)
    assert loaded.preparation == Preparation((112, 112), 128, grey, grey)
    assert load(weights, ARCH, image_size=[96, 64], resize="stretch").preparation.shorter is None
    assert load(weights, ARCH, resize="300").preparation.shorter == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "shuflenet_v2"},
            r"--arch shuflenet_v2 is no name of torchvision or timm: shufflenet",
        ),
        ({"architecture": "resnet18"}, "holds other weights than those of resnet18: torchvision's network"),
        ({"architecture": None}, "holds weights only: say --arch"),
        ({"path": "none.pth"}, "none.pth: no such checkpoint"),
        ({"classes": "two.txt"}, "two.txt has 2 names, but the model 3 outputs"),
        ({"resize": "100"}, "--resize 100: say stretch, or pixels from 224 on"),
        ({"image_size": [0]}, "image_size=0"),
    ],
)
def test_what_does_not_fit_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    options: dict[str, Any] = {"path": weights, "architecture": ARCH} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(options.pop("path"), options.pop("architecture"), **options)
    assert "\n" not in str(error.value)


def test_pickled_modules_are_refused_with_the_remedy(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"holds pickled Python, which is not loaded: save .*state_dict"):
        load(tmp_path / "module.pth", ARCH)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(
        ValueError, match=r"cut\.pth is no file of weights, or is cut short|holds pickled Python"
    ):
        load(tmp_path / "cut.pth", ARCH)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load(tmp_path / "empty.pth", ARCH)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
        coarse.resize((480, 300)).save(folder / f"{number:02}.jpg")
    return folder


def test_from_weights_and_photographs_to_overlays(
    weights: Path, photos: Path, tmp_path: Path, network: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    """One's own model, on the command line; the overlay is drawn on what the network saw."""
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(weights), "--arch", ARCH, "--out", str(out)]
    assert main(["explain", f"{photos}/0[01].jpg", *arguments]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "00.png",
        "01.png",
        "contact_sheet.png",
        "explanations.jsonl",
    ]
    assert Image.open(out / "00.png").size == (262, 262)  # 224 of 256 parts of 300 pixels
    said = capsys.readouterr().out
    assert f"assumed: {ARCH} of torchvision" in said and "class" in said
    line = json.loads((out / "explanations.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        logits = network(selib.images.prepared(network, photos / "00.jpg").batch)[0]
    assert line["prediction"] == f"class {int(logits.argmax())}" and "gates" not in line
    assert main(["explain", str(photos / "00.jpg"), *arguments, "--method", "top-gate"]) == 2
    assert "use influence, or --fit FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_from_weights_to_an_explanation_inside_an_onnx_file(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    arguments = ["export", "--checkpoint", str(weights), "--arch", ARCH, "--out", str(path)]
    assert main([*arguments, "--method", "top-gate", "--fit", str(photos)]) == 0
    assert "gates" in capsys.readouterr().out
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert (
        said["method"] == "top-gate"
        and said["preparation"]["size"] == [224, 224]
        and len(said["classes"]) == K
    )
