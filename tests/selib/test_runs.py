"""Runs on disk: what is resumed, what is only loaded, and what is another run."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import QUIET, colours, loader, toy
from tiny_models import random, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from selib.checkpoint import data_fingerprint, fingerprint, load_checkpoint
from selib.train import fit
from studies.data import ImageSet

STATE = "state.safetensors"


def images(seed: int = 0) -> ImageSet:
    x, y = colours(48, seed)
    x = ((x - x.min()) / (x.max() - x.min()) * 255).round().to(torch.uint8)
    return ImageSet("toy", "train", x, y, ["r", "g", "b"], synthetic=True)


def shuffled(kind: str) -> DataLoader:
    return images().loader(16, train=True, seed=3) if kind == "ours" else loader(48)


def test_looking_at_the_data_does_not_turn_their_generator() -> None:
    images, labels = colours()
    own = DataLoader(
        TensorDataset(images, labels), 16, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    before = own.generator.get_state()
    first = data_fingerprint(own)
    assert torch.equal(own.generator.get_state(), before) and data_fingerprint(own) == first


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_is_an_unbroken_run(tmp_path: Path, kind: str, after: int) -> None:
    common = QUIET | {"epochs": 4, "seed": 5, "gate_sparsity": 0.1}
    whole = toy(se=True)
    expected = fit(whole, shuffled(kind), loader(seed=9), out=tmp_path / "whole", **common)

    steps: list[int] = []
    step = torch.optim.SGD.step

    def interrupted(self: torch.optim.SGD, *args: Any) -> Any:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", interrupted)
        fit(toy(se=True), shuffled(kind), loader(seed=9), out=tmp_path / "broken", **common)
    log = tmp_path / "broken" / "metrics.jsonl"
    assert len(log.read_text().splitlines()) == after // 3

    model = toy(se=True)
    torch.manual_seed(99)
    found = fit(model, shuffled(kind), loader(seed=9), out=tmp_path / "broken", **common)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (found, expected)]
    assert strip[0] == strip[1]
    assert same(dict(model.state_dict()), dict(whole.state_dict()))
    assert [json.loads(row) for row in log.read_text().splitlines()] == found
    assert sorted(os.listdir(tmp_path / "broken")) == ["metrics.jsonl", STATE]


def test_a_run_on_disk_is_the_same_as_one_that_is_not(tmp_path: Path) -> None:
    kept, gone = toy(), toy()
    fit(kept, shuffled("torch"), loader(seed=9), epochs=2, out=tmp_path, **QUIET)
    fit(gone, shuffled("torch"), loader(seed=9), epochs=2, **QUIET)
    assert same(dict(kept.state_dict()), dict(gone.state_dict()))


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_finished_run_is_only_loaded(tmp_path: Path, kind: str) -> None:
    model, other, data = toy(), toy(), shuffled(kind)
    history = fit(model, data, epochs=1, out=tmp_path, **QUIET)
    stamp = (tmp_path / STATE).stat().st_mtime_ns
    assert fit(other, data, epochs=1, out=tmp_path, **QUIET) == history
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert (tmp_path / STATE).stat().st_mtime_ns == stamp


def frozen() -> nn.Module:
    model = toy()
    model.body.requires_grad_(False)
    return model


def restarted() -> nn.Module:
    model = toy()
    nn.init.zeros_(model.fc.weight)
    return model


def with_dropout() -> nn.Module:
    """The same weights in other modules."""
    model = toy()
    model.add_module("unused", nn.Dropout(0.3))
    return model


def relabelled() -> DataLoader:
    x, y = colours()
    return DataLoader(TensorDataset(x, y.flip(0)), 16, shuffle=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, "lr was 0.1, now 0.2"),
        ({"epochs": 3}, "epochs was 1, now 3"),
        ({"seed": 4}, "seed was 0, now 4"),
        ({"optimizer": "adamw"}, "optimizer was sgd, now adamw"),
        ({"task": "multilabel"}, "task was multiclass, now multilabel"),
        ({"auxiliary": 0.1}, "auxiliary was 0.4, now 0.1"),
        ({"precision": "bf16"}, "precision was float32, now bf16"),
        ({"train": loader(seed=1)}, "training data was [0-9a-f]{16}, now"),
        ({"train": relabelled()}, "training data was"),
        ({"train": loader(80)}, "training data was"),
        ({"train": loader(shuffle=False)}, "training data was"),
        ({"train": DataLoader(TensorDataset(*colours()), 8, shuffle=True)}, "training data was"),
        ({"train": images().loader(16, train=True)}, "training data was"),
        ({"val": loader(seed=9)}, "validation data was None, now"),
        ({"model": restarted()}, r"\(initial weights was [0-9a-f]{16}, now [0-9a-f]{16}\)"),
        ({"model": frozen()}, r"parameters that learn was 267 \(\w+\), now 27 \(\w+\)"),
        ({"model": with_dropout()}, "initial weights was"),
        ({"model": toy(se=True)}, r"parameters that learn was 267 \(\w+\), now"),
        ({"model": toy(classes=4)}, r"parameters that learn was 267 \(\w+\), now 276"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    stored = (tmp_path / STATE).read_bytes()
    asked = {"model": toy(), "train": loader(), "epochs": 1, "out": tmp_path} | QUIET | copy.copy(change)
    with pytest.raises(ValueError, match=f"holds another run .*{message}.*: remove it, or pass another out="):
        fit(**asked)
    assert (tmp_path / STATE).read_bytes() == stored


def test_another_block_or_validation_set_is_another_run(tmp_path: Path) -> None:
    common = QUIET | {"epochs": 1, "out": tmp_path}
    fit(toy(se=True), loader(), loader(seed=9), **common)
    with pytest.raises(ValueError, match="validation data was"):
        fit(toy(se=True), loader(), loader(seed=8), **common)
    block = toy(se=True)
    block.selib_se.gain = 2.0  # the other start: the same weights mean something else
    with pytest.raises(ValueError, match="initial weights was"):
        fit(block, loader(), loader(seed=9), **common)


def test_a_run_of_an_earlier_version_is_not_trusted(tmp_path: Path) -> None:
    from selib import checkpoint

    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    tensors, metadata = checkpoint.read(tmp_path / STATE)
    settings = json.loads(metadata["settings"])
    del settings["training data"]
    checkpoint.write(tmp_path / STATE, tensors, metadata | {"settings": json.dumps(settings)})
    with pytest.raises(ValueError, match="training data was not recorded, now"):
        fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)


def test_a_state_cut_short_and_one_that_is_no_checkpoint(tmp_path: Path) -> None:
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    path = tmp_path / STATE
    with pytest.raises(ValueError, match="holds weights only: build the model"):
        load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"state.safetensors is not a safetensors file, or is cut short"):
        fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)


# ---- fingerprints ----------


def test_a_fingerprint_follows_weights_names_of_dtypes_and_decisions() -> None:
    model = toy()
    first = fingerprint(model)
    assert (
        first == fingerprint(toy()) == fingerprint(torch.compile(model, backend="eager")) and len(first) == 16
    )
    assert fingerprint(model, "seed 1") not in (first, fingerprint(model, "seed 2"))
    assert fingerprint(copy.deepcopy(model).half()) != first
    assert fingerprint(toy(se=True)) != first
    model.body[1].running_mean[0] += 1e-6
    assert fingerprint(model) != first


class Lists(Dataset):
    """Samples that are read one by one, each changed at random."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.scale * torch.rand(3), index % 2


class Stream(IterableDataset):
    def __init__(self, seed: int) -> None:
        self.data = random(8, 3, seed=seed)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data)


def test_data_of_every_kind_have_a_fingerprint_that_repeats() -> None:
    kinds: list[Any] = [
        (lambda seed: loader(seed=seed)),
        (lambda seed: images(seed).loader(16)),
        (lambda seed: images(seed).loader(16, train=True)),
        (lambda seed: images().loader(16, train=True, seed=seed)),
        (lambda seed: DataLoader(Lists(1 + seed), 4, shuffle=True)),
        (lambda seed: DataLoader(Stream(seed), 4)),
        (lambda seed: [(random(2, 3, seed=seed), torch.zeros(2))] * 3),
        (lambda seed: [({"face": random(2, 3, seed=seed)}, torch.zeros(2))] * 3),
    ]
    for make in kinds:
        state, data = torch.get_rng_state(), make(0)
        found = data_fingerprint(data)
        torch.rand(1)
        assert data_fingerprint(data) == data_fingerprint(make(0)) == found != data_fingerprint(make(1))
        torch.set_rng_state(state)
        data_fingerprint(data)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_data_set_may_bring_its_own_fingerprint() -> None:
    one, two = Lists(1), Lists(1)
    one.fingerprint, two.fingerprint = "a", "b"
    assert data_fingerprint(DataLoader(one, 4)) != data_fingerprint(DataLoader(two, 4))
    two.fingerprint = "a"
    assert data_fingerprint(DataLoader(one, 4)) == data_fingerprint(DataLoader(two, 4))
    assert data_fingerprint(DataLoader(one, 4)) != data_fingerprint(DataLoader(two, 2))


class Batches(list[Any]):
    """A loader without a dataset."""

    def __init__(self, fingerprint: str) -> None:
        super().__init__([(torch.rand(2, 3), torch.zeros(2))])
        self.fingerprint = fingerprint


def test_a_loader_without_a_data_set_may_bring_one_too() -> None:
    assert data_fingerprint(Batches("a")) == data_fingerprint(Batches("a")) != data_fingerprint(Batches("b"))
