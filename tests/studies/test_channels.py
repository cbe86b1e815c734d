"""Channels at zero and at their mean, beside selib's own test and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selib import TopFraction, attach_se, cache_features, channel_test
from selib.features import FeatureCache
from studies.channels import ablation


class Net(nn.Module):
    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def cached(model: nn.Module, images: Tensor) -> FeatureCache:
    return cache_features(model, [images[:9], images[9:]])


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(20, 3, 8, 8)
    block = attach_se(model, images[:2], reduction=2)
    nn.init.ones_(block.fc1.bias)
    nn.init.normal_(block.fc2.weight, std=3)
    return model, images


@pytest.mark.parametrize("own", [True, False])
def test_zero_is_selibs_channel_test(own: bool) -> None:
    model, images = net()
    cache = cached(model, images)
    targets = None if own else torch.arange(20) % 4
    ranking = cache.influence()
    found = ablation(cache, ranking, q=0.25, targets=targets)
    same = channel_test(model.selib_se, cache, ranking=ranking, targets=targets, select=TopFraction(0.25))
    assert torch.equal(found["only"], same["original_only_top"])
    assert torch.equal(found["without"], same["original_without_top"])
    assert len(torch.cat([found["only"], found["without"]]).unique()) == 2  # the comparison says something


def test_the_mean_is_that_of_the_other_images() -> None:
    model, images = net()
    cache = cached(model, images)
    ranking = torch.rand(20, 12, generator=torch.Generator().manual_seed(1))
    found = ablation(cache, ranking, "mean", q=0.5)
    with torch.no_grad():
        pooled = model.body(images).mean((2, 3))
        for i in range(20):
            others = pooled[torch.arange(20) != i].mean(0)
            top = ranking[i].argsort(descending=True)[:6]
            only, without = others.clone(), pooled[i].clone()
            only[top], without[top] = pooled[i, top], others[top]
            want = model.fc(pooled[i]).argmax()
            assert bool(found["only"][i]) == bool(model.fc(only).argmax() == want)
            assert bool(found["without"][i]) == bool(model.fc(without).argmax() == want)


def test_all_channels_kept_leave_every_decision() -> None:
    model, images = net()
    cache = cached(model, images)
    for fill in ("zero", "mean"):
        assert ablation(cache, cache.influence(), fill, q=1.0)["only"].all()


def test_what_has_no_pooled_values_is_refused() -> None:
    model, images = net()
    cache = cached(model, images)
    with pytest.raises(ValueError, match="fill='noise'"):
        ablation(cache, cache.influence(), "noise")  # type: ignore[arg-type]
    head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 4))
    flat = nn.Sequential(Net().body, head).eval()
    attach_se(flat, images[:2], at="0")
    with pytest.raises(ValueError, match="global average pooling"):
        ablation(cached(flat, images), torch.rand(20, 12))
