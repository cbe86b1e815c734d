"""Networks that notebooks share: the same run is found again, any other one is trained for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selib
from selib.forward import attached
from studies import recipes, training
from studies.data import ImageSet
from studies.networks import SHIPPED
from studies.recipes import Recipe


def images(seed: int = 0, count: int = 70, name: str = "synth-objects") -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    targets = torch.arange(count) % 10
    classes = [f"class {k}" for k in range(10)]
    return ImageSet(name, "train", pixels, targets, classes, synthetic=True)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe("set", images(), replace(images(1), split="val"), 1, "small_resnet", from_shipped=False)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many epochs each call of fit had still to train."""
    counted: list[int] = []

    def fit(model: nn.Module, *args: Any, **options: Any) -> Any:
        steps: list[int] = []
        handle = model.register_forward_hook(lambda module, *_: steps.append(1) if module.training else None)
        history = selib.fit(model, *args, **options)
        handle.remove()
        counted.append(len(steps))
        return history

    monkeypatch.setattr(training, "fit", fit)
    return counted


def gates(model: nn.Module) -> Tensor:
    return selib.explain(model, images().batch([0])).gates


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(recipe: Recipe, out: Path, **options: Any) -> tuple[nn.Module, Any]:
    return recipes.trained(recipe, out=out, **{"se": True, "seed": 0, "progress": False, **options})


def test_the_same_run_is_trained_once_and_then_loaded(
    recipe: Recipe, tmp_path: Path, trainings: list[int]
) -> None:
    first, history = run(recipe, tmp_path)
    again, same = run(recipe, tmp_path)
    # the same pixels and labels in other tensors are the same data
    third, _ = run(replace(recipe, train=images(), val=replace(images(1), split="val")), tmp_path)
    assert trainings == [1, 0, 0] and history == same
    assert torch.equal(weights(first), weights(again)) and torch.equal(weights(first), weights(third))
    assert not again.training and len(list(tmp_path.iterdir())) == 1


def changed_pixel() -> ImageSet:
    data = images()
    data.images[-1, 0, 0, 0] ^= 1
    return data


def changed_label() -> ImageSet:
    data = images()
    data.targets[-1] = 0
    return data


OTHER = {
    "one pixel": lambda r: replace(r, train=changed_pixel()),
    "one label": lambda r: replace(r, train=changed_label()),
    "fewer images": lambda r: replace(r, train=r.train.subset(range(69))),
    "the same images in another order": lambda r: replace(r, train=r.train.subset(range(69, -1, -1))),
    "other validation images, which the history tells of": lambda r: replace(r, val=images(2)),
    "more epochs": lambda r: replace(r, epochs=2),
    "another architecture": lambda r: replace(r, architecture="resnet18"),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_other_data_settings_or_architecture_are_another_run(
    recipe: Recipe, tmp_path: Path, trainings: list[int], change: Any
) -> None:
    run(recipe, tmp_path)
    other = change(recipe)
    run(other, tmp_path)
    assert len(trainings) == 2 and trainings[1] >= 1
    run(recipe, tmp_path)
    assert trainings[2] == 0, "the first network is still there"


def test_another_start_is_another_run(
    recipe: Recipe, tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped.safetensors"
    monkeypatch.setitem(SHIPPED, "synth-objects", shipped)
    start = replace(recipe, from_shipped=True)
    for seed in (3, 4):  # the shipped file is replaced under the same name
        torch.manual_seed(seed)
        model = recipes.build("small_resnet", 10, image_size=32)
        selib.save_checkpoint(
            model, shipped, architecture="small_resnet", classes=recipe.train.classes, image_size=32
        )
        run(start, tmp_path / "store")
    run(recipe, tmp_path / "store")  # from nothing
    assert trainings == [1, 1, 1] and len(list((tmp_path / "store").iterdir())) == 3


def test_forms_and_seeds_are_runs_of_their_own(recipe: Recipe, tmp_path: Path, trainings: list[int]) -> None:
    forms = ({"se": False}, {"se": True}, {"se": True, "per_target": True}, {"se": True, "seed": 1})
    found = [run(recipe, tmp_path, **form)[0] for form in forms]
    assert trainings == [1, 1, 1, 1]
    names = sorted(folder.name.rsplit("-", 1)[0] for folder in tmp_path.iterdir())
    assert names == ["set-plain-seed0", "set-se-per-target-seed0", "set-se-seed0", "set-se-seed1"]
    plain, *with_se = (recipes.network(recipe, se=se, seed=0).state_dict() for se in (False, True))
    assert all(torch.equal(plain[key], with_se[0][key]) for key in plain)
    assert [gates(model).ndim for model in found[1:3]] == [2, 3] and not attached(found[0])


def test_a_broken_network_file_is_named(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path)
    file = next(tmp_path.glob("*/state.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.safetensors is not a safetensors file, or is cut short"):
        run(recipe, tmp_path)


def test_new_gates_are_on_a_copy_and_start_from_their_seed(recipe: Recipe) -> None:
    model = recipes.network(recipe, se=False, seed=0).eval()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second, other = (
        training.with_new_gates(model, recipe.train.batch([0]), seed=seed, reduction=1) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state) and not hasattr(model, "selib_se")
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(other))
