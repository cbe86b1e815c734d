"""Images of every kind become the same batch; what is no image is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

import selib
from selib.images import Batches, Preparation, batches, preparation_of, prepared, read_image, shown
from selib.pixels import MEAN, STD, normalize


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    selib.attach_se(model, torch.zeros(1, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Two images uint8 that no resize changes: 224 pixels of 256."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(28, 2).repeat_interleave(28, 3)


def pictures(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def kinds(pixels: Tensor, folder: Path) -> dict[str, Any]:
    files = []
    for number, picture in enumerate(pictures(pixels)):
        files.append(folder / f"{number}.png")
        picture.save(files[-1])
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    return {
        "uint8": pixels,
        "numpy": arrays,
        "PIL": pictures(pixels),
        "files": files,
        "names": [str(file) for file in files],
        "a folder": folder,
        "a folder by name": str(folder),
        "arrays": list(arrays),
        "tensors": list(pixels),
        "mixed": [files[0], arrays[1]],
    }


def test_all_kinds_of_images_are_one_batch(model: nn.Module, pixels: Tensor, tmp_path: Path) -> None:
    whole = Preparation((224, 224), None)
    for kind, given in kinds(pixels, tmp_path).items():
        found = prepared(model, given, whole)
        assert torch.equal(found.batch, normalize(pixels)), kind
        assert torch.equal(torch.stack(found.pixels), pixels), kind
        assert torch.equal(selib.explain(model, given, transform=whole).logits, model(normalize(pixels))), (
            kind
        )
    assert prepared(model, tmp_path).names == ["0.png", "1.png"]
    one = prepared(model, pixels[0], whole)
    assert torch.equal(one.batch, normalize(pixels[:1]))
    grey = prepared(model, pixels[:, 0].numpy(), whole)
    assert torch.equal(grey.batch, normalize(pixels[:, :1].expand(-1, 3, -1, -1)))


def test_explain_and_explorer_see_the_same(model: nn.Module, pixels: Tensor, tmp_path: Path) -> None:
    for kind, given in kinds(pixels, tmp_path).items():
        ex = selib.explain(model, given)
        view = selib.widgets.explorer(model, given)
        torch.testing.assert_close(view.subject.explanation("image").logits, ex.logits[:1])
        assert torch.equal(torch.from_numpy(view.subject.thumbnail).permute(2, 0, 1), ex.pixels[0]), kind


def test_the_centre_of_a_picture_is_what_torchvisions_presets_see(model: nn.Module) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    wide = Image.fromarray(coarse).resize((900, 540), Image.Resampling.BICUBIC)
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    want, found = preset(wide), prepared(model, [wide])
    assert found.batch.shape == (1, 3, 224, 224)
    assert (found.batch[0] - want).abs().mean() < 0.03  # one crop and one resize, in another order
    other = prepared(model, [wide], preset)
    assert torch.equal(other.batch[0], want)
    assert (other.pixels[0].float() - found.pixels[0].float()).abs().mean() < 2  # normalised back


def test_sizes_may_differ(model: nn.Module) -> None:
    several = [Image.new("RGB", size, "teal") for size in ((40, 300), (640, 480), (224, 224), (1, 1))]
    assert prepared(model, several).batch.shape == (4, 3, 224, 224)
    assert selib.explain(model, several).heatmap().shape == (4, 224, 224)
    with pytest.raises(ValueError, match="transform= makes images of several sizes"):
        prepared(model, several, lambda picture: torch.zeros(3, *picture.size))


def test_a_timm_network_brings_its_own_configuration() -> None:
    how = preparation_of(timm.create_model("vit_tiny_patch16_224"))
    assert (how.size, how.shorter) == ((224, 224), 248)
    assert how.mean == how.std == (0.5, 0.5, 0.5)
    assert preparation_of(models.resnet18()) == Preparation((224, 224), 256, MEAN, STD)


@pytest.mark.parametrize(
    "given",
    [3, None, "words.txt", [], [[1]], np.zeros((2, 8, 8, 3)), torch.zeros(2, 1, 8, 8).byte(), {}.keys()],
)
def test_what_is_no_image_is_refused_in_a_line(model: nn.Module, given: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"PIL images, file names, a folder|not a readable image"
    ) as error:
        selib.explain(model, given)
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_a_damaged_file_are_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        selib.explain(model, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        selib.explain(model, tmp_path)
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        read_image(tmp_path / "broken.png")


def test_batches_read_files_when_their_turn_comes(model: nn.Module, pixels: Tensor, tmp_path: Path) -> None:
    kinds(pixels, tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    found = Batches(model, tmp_path, size=2)
    assert len(found) == 2 and found[0].shape == (2, 3, 224, 224)
    with pytest.raises(ValueError, match=r"2\.png"):
        list(found)
    loader = [torch.zeros(2, 3, 8, 8)]
    assert batches(model, loader) is loader
    assert batches(model, iter(loader)) is not None


def test_gates_are_fitted_on_a_folder(pixels: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    for number in range(12):
        Image.fromarray(pixels[number % 2].roll(number, 1).permute(1, 2, 0).numpy()).save(
            tmp_path / f"{number:02}.png"
        )
    report = selib.fit_gates(model.eval(), tmp_path, epochs=2, progress=False)
    assert 0 <= report.agreement <= 1


def test_pixels_come_back_from_what_the_model_takes(model: nn.Module, pixels: Tensor) -> None:
    assert torch.equal(torch.stack(selib.explain(model, normalize(pixels)).pixels), pixels)
    assert torch.equal(shown(pixels[0] / 255, Preparation()), pixels[0])  # in [0, 1] already
    strange = shown(torch.linspace(-9, 9, 48).view(3, 4, 4), None)
    assert strange.min() == 0 and strange.max() == 255
    assert shown(torch.rand(1, 4, 4), None).shape == (3, 4, 4)


def test_show_draws_each_image_beside_its_heatmap(model: nn.Module, pixels: Tensor) -> None:
    page = selib.explain(model, pixels).show(classes=["a", "b", "c"])
    assert page.width == 2 * 224 + 8
    drawn = np.asarray(page)
    assert (drawn[20:244, :224] == pixels[0].permute(1, 2, 0).numpy()).all()
    with pytest.raises(ValueError, match="no images"):
        selib.explain(model, (normalize(pixels),)).show()
