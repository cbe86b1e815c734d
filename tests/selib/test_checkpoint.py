"""Checkpoints: what is written, what is built again, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tiny_models as zoo
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import image, open_and_close, random, run, same
from torch import Tensor, nn

from selib import checkpoint as c
from selib import explain
from selib.attach import attach_se
from selib.checkpoint import load_checkpoint, load_weights, save_checkpoint
from selib.forward import attached
from studies.networks import build
from studies.networks.small_resnet import small_resnet

WIDTHS = (4, 6, 8)
META: dict[str, Any] = {"architecture": "small_resnet", "classes": ["cat", "dog", "ü"]}


def resnet(size: int, *, start: str | None = None, at: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = small_resnet(3, image_size=size, widths=WIDTHS)
    zoo.liven(model)
    if start:
        blocks = attach_se(model, torch.zeros(1, 3, size, size), start=start, reduction=3, at=at)
        for block in blocks.values() if isinstance(blocks, dict) else [blocks]:
            open_and_close(block)
    return model.eval()


def saved(model: nn.Module, path: Path, **changes: Any) -> Path:
    save_checkpoint(model, path, **({"image_size": 32, "widths": WIDTHS} | META | changes))
    return path


def rewritten(path: Path, change: Any) -> None:
    """The same file with other metadata."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["selib"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(meta)
    save_file(tensors, path, {"selib": json.dumps(meta)})


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("start", "at"),
    [(None, None), ("identity", None), ("paper", "stem"), ("paper", {"a": "stem", "b": "stages"})],
)
def test_a_checkpoint_rebuilds_the_model(tmp_path: Path, size: int, start: str | None, at: Any) -> None:
    model, x = resnet(size, start=start, at=at), random(2, 3, size, size)
    path = saved(model, tmp_path / "new" / "a.safetensors", image_size=size)
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]
    other, meta = load_checkpoint(path)
    assert not other.training and torch.equal(run(other, x), run(model, x))
    assert (meta["classes"], meta["image_size"]) == (META["classes"], (size, size))
    assert meta["architecture"] == "small_resnet" and same(dict(other.state_dict()), dict(model.state_dict()))
    kinds = [{n: (b.site, b.gain, b.channels) for n, b in attached(m).items()} for m in (model, other)]
    assert kinds[0] == kinds[1]
    if start and not isinstance(at, dict):
        one, two = explain(model, x), explain(other, x)
        assert torch.equal(one.gates, two.gates) and torch.equal(one.heatmap(), two.heatmap())


@pytest.mark.parametrize("size", [32, [40, 24], (24, 80)])
def test_rectangular_images_and_the_task(tmp_path: Path, size: Any) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    model, x = small_resnet(3, image_size=size, widths=WIDTHS).eval(), random(2, 3, height, width)
    open_and_close(attach_se(model, x, reduction=3))
    assert model.stem[0].stride == ((1, 1) if max(height, width) <= 32 else (2, 2))
    path = saved(model, tmp_path / "a.safetensors", image_size=size, task="multilabel")
    other, meta = load_checkpoint(path)
    assert torch.equal(run(other, x), run(model, x)) and other.stem[0].stride == model.stem[0].stride
    assert meta["image_size"] == (height, width)
    assert meta["task"] == "multilabel"


def test_older_checkpoints_name_no_task(tmp_path: Path) -> None:
    path = saved(resnet(32), tmp_path / "a.safetensors")
    rewritten(path, lambda meta: meta.pop("task"))
    assert load_checkpoint(path)[1]["task"] == "multiclass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (32,)}, r"image_size=\(32,\): pass the side of a square"),
        ({"image_size": (32, 0)}, "image_size="),
        ({"image_size": [3, 32, 32]}, "image_size="),
        ({"task": "regression"}, "task='regression' is unknown"),
    ],
)
def test_a_checkpoint_that_could_not_be_read_is_not_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        saved(resnet(32), tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_a_torchvision_model_and_a_compiled_one(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", random(1, 3, 64, 64)
    model = build("squeezenet1_1", 3).eval()
    open_and_close(attach_se(model, x))
    compiled = torch.compile(model, backend="eager")
    save_checkpoint(compiled, path, architecture="squeezenet1_1", classes=["a", "b", "c"], image_size=64)
    other, _ = load_checkpoint(path)
    assert torch.equal(run(other, x), run(model, x))
    expected = run(model, x)
    nn.init.zeros_(model.selib_se.fc2.bias)
    load_weights(compiled, path)
    assert torch.equal(run(model, x), expected)


# ---- networks of other packages ----------


class Tokens(nn.Module):
    """16 patches of 32x32 images as tokens (B, 16, 6), and a linear layer on their mean."""

    def __init__(self, num_classes: int, scale: float) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 6, 8, 8), nn.LayerNorm(6)
        self.fc, self.scale = nn.Linear(6, num_classes), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(self.norm(self.patches(x).flatten(2).mT).mean(1))


def tokens(architecture: str, num_classes: int, *, image_size: Any, scale: float = 1.0) -> nn.Module:
    """What a package registers under selib.networks."""
    if architecture != "tokens":
        raise ValueError("this package knows tokens only")
    return Tokens(num_classes, scale)


def test_a_network_comes_from_the_package_that_builds_it(tmp_path: Path, monkeypatch: Any) -> None:
    path, model = tmp_path / "a.safetensors", Tokens(3, 0.5).eval()
    open_and_close(attach_se(model, image(32), at="norm", grid=(2, 8), reduction=2))  # it cannot be told
    packages = ["studies.networks:build", f"{__name__}:tokens"]
    plugins = [EntryPoint(name, name, "selib.networks") for name in packages]
    monkeypatch.setattr(c, "entry_points", lambda group: plugins)
    save_checkpoint(model, path, architecture="tokens", classes=["a", "b", "c"], image_size=32, scale=0.5)
    other, _ = load_checkpoint(path)
    assert torch.equal(run(other, image(32)), run(model, image(32)))
    assert attached(other)[""].grid == (2, 8)
    monkeypatch.setattr(c, "entry_points", lambda group: plugins[:1])
    with pytest.raises(ValueError, match="'tokens' is unknown .*: install what builds it"):
        load_checkpoint(path)


# ---- weights ----------


def test_weights_of_the_bare_model_load_with_a_block_attached(tmp_path: Path) -> None:
    bare = resnet(32)
    path = saved(bare, tmp_path / "a.safetensors")
    model = resnet(32, start="paper")
    nn.init.zeros_(model.classifier.weight)
    gates = model.selib_se.fc2.weight.clone()
    load_weights(model, path)
    assert torch.equal(model.classifier.weight, bare.classifier.weight)
    assert torch.equal(model.selib_se.fc2.weight, gates)


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1])
def test_a_checkpoint_cut_short(tmp_path: Path, keep: int) -> None:
    path = saved(resnet(32), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    for load in (load_checkpoint, lambda p: load_weights(resnet(32), p)):
        with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file, or is cut") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("weights, honestly " * 20)
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        load_checkpoint(tmp_path / "text.safetensors")
    save_file(resnet(32).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="holds weights only: build the model"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_another_architecture_changes_nothing(tmp_path: Path) -> None:
    path = saved(resnet(32, start="paper"), tmp_path / "a.safetensors")
    others = (zoo.build("sequential")[0], small_resnet(4, widths=WIDTHS), small_resnet(3), resnet(32))
    for model in others:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError, match=r"a\.safetensors is a checkpoint of another architecture: "
        ) as error:
            load_weights(model, path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert same(dict(model.state_dict()), dict(before))
    with pytest.raises(ValueError, match=r"classifier.bias is \(3,\), in the model \(4,\)"):
        load_weights(small_resnet(4, widths=WIDTHS), saved(resnet(32), path))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet19"},
        {"classes": ["a", "b"]},
        {"architecture": "squeezenet1_1"},
        {"architecture": "squeezenet1_1", "widths": None},
    ],
)
def test_metadata_that_does_not_fit_the_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    path = saved(resnet(32), tmp_path / "a.safetensors")

    def other(meta: dict[str, Any]) -> None:
        if change.get("widths", WIDTHS) is None:
            del meta["options"]["widths"]
        meta.update({k: v for k, v in change.items() if k != "widths"})

    rewritten(path, other)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    path = saved(resnet(32), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(c, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        saved(resnet(32, start="paper"), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
