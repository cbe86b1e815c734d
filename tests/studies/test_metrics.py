"""Localisation and faithfulness against results computed by hand, by libraries, and by definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from studies import metrics as m

LOCALISATION = [m.pointing_game, m.energy_in_mask, m.average_precision]


def box(batch: int = 1, size: int = 8) -> Tensor:
    """A 4 × 2 box: 8 of 64 pixels."""
    mask = torch.zeros(batch, size, size, dtype=torch.bool)
    mask[:, 2:6, 3:5] = True
    return mask


def some_pairs(seed: int, batch: int = 5, size: int = 6, levels: int = 0) -> tuple[Tensor, Tensor]:
    """Random maps and masks; ``levels`` makes ties."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, size, size, generator=g)
    masks = torch.rand(batch, size, size, generator=g) < 0.3
    masks[:, 0, 0] = True
    return (maps * levels).floor() / levels if levels else maps, masks


# ---- localisation ----------


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_mask_grows_by_whole_pixels_on_every_side(seed: int, rows: int, columns: int) -> None:
    masks = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(seed)) < 0.08
    grown = m.dilate(masks, (rows, columns))
    square = np.ones((1, 2 * rows + 1, 2 * columns + 1), bool)
    assert np.array_equal(grown.numpy(), ndimage.binary_dilation(masks.numpy(), square))


def test_only_masks_grow() -> None:
    assert int(m.dilate(box(), (1, 1)).sum()) == 6 * 4
    with pytest.raises(TypeError, match="dilate takes bool masks"):
        m.dilate(box().float(), (1, 1))


@pytest.mark.parametrize("metric", LOCALISATION)
def test_a_map_that_is_the_mask_scores_one_and_its_opposite_zero(metric):
    mask = box(3)
    assert metric(mask.float(), mask).tolist() == [1, 1, 1]
    worst = metric((~mask).float(), mask)
    # AP of the worst order: the object's pixels come last, in one tie with precision 8/64.
    assert worst.tolist() == ([0.125] * 3 if metric is m.average_precision else [0, 0, 0])


@pytest.mark.parametrize("metric", LOCALISATION)
def test_a_constant_map_gets_the_area_of_the_mask(metric):
    assert metric(torch.full((2, 8, 8), 0.3), box(2)).tolist() == pytest.approx([8 / 64] * 2)


def test_zero_maps_have_no_energy():
    assert m.energy_in_mask(torch.zeros(1, 8, 8), box()).item() == 0


def test_small_cases_by_hand():
    h = torch.tensor([[[0.9, 0.8], [0.8, 0.1]]])
    mask = torch.tensor([[[False, True], [False, True]]])
    assert m.pointing_game(h, mask).item() == 0
    assert m.energy_in_mask(h, mask).item() == pytest.approx(0.9 / 2.6)
    assert m.average_precision(h, mask).item() == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert m.iou(h, mask, 0.8).item() == 1 / 4
    assert m.iou(h, mask, 0.85).item() == 0
    assert m.iou(h, mask, 0.05).item() == 2 / 4
    two_maxima = torch.tensor([[[0.9, 0.9], [0.2, 0.1]]])
    assert m.pointing_game(two_maxima, mask).item() == 0.5


def test_average_precision_is_scikit_learns_ties_included():
    for levels in (0, 3):
        maps, masks = some_pairs(1, levels=levels)
        pairs = zip(masks.flatten(1), maps.flatten(1), strict=True)
        expected = [average_precision_score(t, h) for t, h in pairs]
        assert m.average_precision(maps, masks).tolist() == pytest.approx(expected)
        assert m.ranked_precision(maps.flatten(1), masks.flatten(1)).tolist() == pytest.approx(expected)
    assert m.ranked_precision(torch.rand(1, 4), torch.zeros(1, 4, dtype=torch.bool)).isnan().all()


def test_best_threshold_is_the_best_of_its_grid_and_the_smallest_of_equals():
    maps, masks = some_pairs(3, batch=8, levels=40)  # values that lie on thresholds
    grid = [i / 40 for i in range(1, 40)]
    found = m.best_threshold(maps.double(), masks)
    means = [m.iou(maps.double(), masks, t).mean().item() for t in grid]
    assert m.iou(maps.double(), masks, found).mean().item() == pytest.approx(max(means))
    assert m.best_threshold(box().float() * 0.5, box()) == 1 / 40  # every threshold up to 0.5 gives IoU 1
    on_the_grid = box().double() * 0.5 + (~box()).double() * (19 / 40)
    assert (
        m.best_threshold(on_the_grid, box()) == 0.5
    )  # a value equal to the threshold is above it, as in iou
    object_at_06 = box().float() * 0.6 + (~box()).float() * 0.31
    assert m.best_threshold(object_at_06, box()) == pytest.approx(0.325)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), levels=st.sampled_from([0, 2, 7]))
def test_scale_and_batch_mates_change_nothing_and_scores_are_fractions(seed, scale, levels):
    maps, masks = some_pairs(seed, levels=levels)
    for metric in LOCALISATION:
        together = metric(maps, masks)
        assert ((together >= 0) & (together <= 1 + 1e-12)).all()
        assert torch.allclose(metric(maps * scale, masks), together, atol=1e-6)
        alone = torch.cat([metric(maps[i : i + 1], masks[i : i + 1]) for i in range(len(maps))])
        assert torch.equal(alone, together)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_only_energy_and_iou_see_more_than_the_order(seed):
    maps, masks = some_pairs(seed)
    for metric in (m.pointing_game, m.average_precision):
        assert torch.allclose(metric(maps.double() ** 3, masks), metric(maps.double(), masks))


@pytest.mark.parametrize(
    ("maps", "masks", "error", "message"),
    [
        (torch.rand(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool), ValueError, "empty"),
        (torch.rand(1, 8, 8) - 1, box(), ValueError, "≥ 0"),
        (torch.full((1, 8, 8), torch.nan), box(), ValueError, "finite"),
        (torch.rand(1, 8, 7), box(), ValueError, r"\(1, 8, 7\)"),
        (torch.rand(1, 8, 8), box().float(), TypeError, "bool"),
    ],
)
def test_bad_pairs_are_named(maps, masks, error, message):
    with pytest.raises(error, match=message):
        m.energy_in_mask(maps, masks)


# ---- rank correlation ----------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([0, 2, 5]))
def test_spearman_is_scipys(seed, levels):
    a, b = some_pairs(seed, batch=2, levels=levels)[0], some_pairs(seed + 1, batch=2, levels=levels)[0]
    expected = [scipy_stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert m.spearman(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_spearman_extremes():
    x = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    assert m.spearman(x, x**3).item() == 1
    assert m.spearman(x, -x).item() == -1
    assert m.spearman(x, torch.ones_like(x)).item() == 0
    with pytest.raises(ValueError, match="of one shape"):
        m.spearman(x, x[:, :3])


# ---- faithfulness ----------

REGION = box()[0]


def region_sum(images: Tensor) -> Tensor:
    """Logits (mean of the region in channel 0, 0): the probability is a sigmoid of what is left of it."""
    value = (images[:, 0] * REGION).sum((1, 2)) / REGION.sum()
    return torch.stack([value, torch.zeros_like(value)], 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def trapezoid(points: list[float]) -> float:
    return sum((a + b) / 2 for a, b in itertools.pairwise(points)) / (len(points) - 1)


def test_deletion_of_a_linear_model_in_closed_form():
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0, REGION] = 4.0
    mean = 4.0 * 8 / 64  # what a deleted pixel of channel 0 becomes
    target = torch.tensor([0])
    # Eight steps of eight pixels. The right map deletes the region in the first, the wrong one in the last.
    right = trapezoid([sigmoid(4.0)] + [sigmoid(mean)] * 8)
    wrong = trapezoid([sigmoid(4.0)] * 8 + [sigmoid(mean)])
    assert m.deletion(region_sum, images, REGION[None].float(), target, steps=8).item() == pytest.approx(
        right
    )
    assert m.deletion(region_sum, images, (~REGION)[None].float(), target, steps=8).item() == pytest.approx(
        wrong
    )
    assert right < wrong


def test_insertion_of_a_linear_model_in_closed_form():
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0, REGION] = 4.0
    blurred = (m.blur(images)[0, 0] * REGION).sum().item() / 8
    target = torch.tensor([0])
    right = trapezoid([sigmoid(blurred)] + [sigmoid(4.0)] * 8)
    wrong = trapezoid([sigmoid(blurred)] * 8 + [sigmoid(4.0)])
    assert m.insertion(region_sum, images, REGION[None].float(), target, steps=8).item() == pytest.approx(
        right
    )
    assert m.insertion(region_sum, images, (~REGION)[None].float(), target, steps=8).item() == pytest.approx(
        wrong
    )


def test_the_curve_starts_and_ends_at_its_images_and_any_batch_size_gives_it(monkeypatch):
    g = torch.Generator().manual_seed(0)
    images, maps = torch.rand(3, 3, 8, 8, generator=g), torch.rand(3, 8, 8, generator=g)
    targets = torch.tensor([0, 1, 0])
    end = torch.zeros_like(images)
    fractions, curve = m.perturbation_curve(region_sum, images, end, maps, targets, steps=5)
    assert fractions.tolist() == pytest.approx([0, 13 / 64, 26 / 64, 38 / 64, 51 / 64, 1])
    at = region_sum(images).softmax(1)[range(3), targets]
    assert torch.allclose(curve[:, 0], at)
    assert torch.allclose(curve[:, -1], torch.full((3,), 0.5))
    monkeypatch.setattr(m, "BATCH", 4)
    assert torch.equal(m.perturbation_curve(region_sum, images, end, maps, targets, steps=5)[1], curve)


def test_equal_pixels_go_in_reading_order():
    images = torch.ones(1, 1, 2, 2)
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.extend(x[:, 0].flatten(1))
        return torch.zeros(len(x), 2)

    m.perturbation_curve(
        predict, images, torch.zeros_like(images), torch.ones(1, 2, 2), torch.tensor([0]), steps=4
    )
    assert [x.tolist() for x in seen] == [
        [1, 1, 1, 1],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]


def test_deletion_and_insertion_pixel_by_pixel():
    g = torch.Generator().manual_seed(0)
    images, maps = torch.randn(2, 3, 8, 8, generator=g), torch.rand(2, 8, 8, generator=g)
    targets, weights = torch.tensor([1, 3]), torch.randn(4, 3 * 64, generator=g)

    def predict(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T

    def area(start: Tensor, end: Tensor, heat: Tensor, target: int) -> float:
        """One image, four pixels at a time."""
        now, points = start.clone(), []
        for step in range(17):
            points.append(predict(now[None]).softmax(1)[0, target].item())
            for pixel in heat.flatten().argsort(descending=True)[4 * step : 4 * step + 4].tolist():
                now[:, pixel // 8, pixel % 8] = end[:, pixel // 8, pixel % 8]
        return trapezoid(points)

    blurred = m.blur(images)
    for i, target in enumerate(targets.tolist()):
        mean = images[i].mean((1, 2), keepdim=True).expand(3, 8, 8)
        one = (images[i : i + 1], maps[i : i + 1], targets[i : i + 1])
        found = [float(measure(predict, *one, steps=16)) for measure in (m.deletion, m.insertion)]
        assert found[0] == pytest.approx(area(images[i], mean, maps[i], target), abs=1e-5)
        assert found[1] == pytest.approx(area(blurred[i], images[i], maps[i], target), abs=1e-5)


def test_blur_keeps_a_constant_and_spreads_a_point_by_the_gaussian():
    assert torch.allclose(m.blur(torch.full((1, 3, 8, 8), 2.5)), torch.full((1, 3, 8, 8), 2.5))
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    spread = m.blur(point)[0, 0]
    # away from the border, torchvision's
    assert torch.allclose(spread[5:-5, 5:-5], gaussian_blur(point, 11, 5.0)[0, 0, 5:-5, 5:-5], atol=1e-7)
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread[10, 13] / spread[10, 10]).item() == pytest.approx(math.exp(-9 / 50), abs=1e-5)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # grad-cam hands a tensor to numpy
def test_imputation_is_grad_cams_without_its_noise():
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 12, 12, generator=g)
    removed = torch.rand(2, 12, 12, generator=g) < 0.7
    removed[1, :6] = True  # a large hole at the border
    other = NoisyLinearImputer(noise=0.0)
    expected = torch.stack([other(x, (~r).float()) for x, r in zip(images, removed, strict=True)])
    found = m.impute(images, removed)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found[~removed[:, None].expand_as(found)], images[~removed[:, None].expand_as(images)])


def test_imputation_reproduces_a_constant_and_survives_an_empty_image():
    removed = torch.zeros(1, 8, 8, dtype=torch.bool)
    removed[:, 2:7, 1:6] = True
    assert torch.allclose(
        m.impute(torch.full((1, 3, 8, 8), 0.7), removed), torch.full((1, 3, 8, 8), 0.7), atol=1e-4
    )
    assert (
        m.impute(torch.ones(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)).tolist()
        == torch.zeros(1, 3, 8, 8).tolist()
    )


def test_large_images_are_filled_at_a_quarter_of_their_resolution():
    g = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 6, 6, generator=g), (66, 64), mode="bicubic")
    heat = F.interpolate(torch.rand(2, 1, 5, 5, generator=g), (66, 64), mode="bicubic")[:, 0]
    removed = heat > heat.flatten(1).median(1).values[:, None, None]
    exact, found = m.impute(images, removed), m.fill(images, removed)
    hole = removed[:, None].expand_as(images)
    assert (found - exact)[hole].abs().mean() < 0.3 * (images - exact)[hole].abs().mean()
    assert torch.equal(
        m.fill(images[:, :, :8, :8], removed[:, :8, :8]), m.impute(images[:, :, :8, :8], removed[:, :8, :8])
    )


def test_road_ranks_the_right_map_above_the_wrong_one_and_is_seeded():
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, REGION] = 4.0
    targets = torch.zeros(2, dtype=torch.long)
    right, wrong = REGION.float().expand(2, 8, 8), (~REGION).float().expand(2, 8, 8)
    best, worst = m.road(region_sum, images, right, targets), m.road(region_sum, images, wrong, targets)
    # Without the region its pixels are imputed from zeros: P falls from sigmoid(4) to 0.5, up to the noise.
    assert best.tolist() == pytest.approx([(sigmoid(4) - 0.5) / 2] * 2, abs=0.01)
    assert (worst < 0).all()
    assert torch.equal(m.road(region_sum, images, right, targets), best)
    assert torch.equal(m.road(region_sum, images[1:], right[1:], targets[1:]), best[1:])


def test_decisions_of_their_own_are_asked_by_sigmoid():
    images, heat = torch.zeros(1, 3, 8, 8), REGION.float().expand(1, 8, 8)
    images[:, 0, REGION] = 4.0

    def predict(x: Tensor) -> Tensor:
        score = x[:, 0, REGION].mean(1)
        return torch.stack([score, score + 5], 1)  # the other output never lets go of softmax

    target = torch.tensor([0])
    _, curve = m.perturbation_curve(
        predict, images, torch.zeros_like(images), heat, target, 1, task="multilabel"
    )
    assert curve[0].tolist() == pytest.approx([sigmoid(4), 0.5])
    assert m.road(predict, images, heat, target, task="multilabel").item() == pytest.approx(
        (sigmoid(4) - 0.5) / 2, abs=0.01
    )
    for measure in (m.deletion, m.insertion, m.road):
        one = measure(predict, images, heat, target)
        assert one.item() < 0.05 and measure(predict, images, heat, target, task="multilabel") > 0.2
        with pytest.raises(ValueError, match="task='sigmoid' is unknown"):
            measure(predict, images, heat, target, task="sigmoid")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_faithfulness_has_its_range_and_does_not_know_batch_mates(seed):
    g = torch.Generator().manual_seed(seed)
    images, maps = torch.randn(3, 3, 8, 8, generator=g), torch.rand(3, 8, 8, generator=g)
    targets = torch.tensor([0, 1, 1])
    for metric in (m.deletion, m.insertion):
        together = metric(region_sum, images, maps, targets)
        assert ((together >= 0) & (together <= 1)).all()
        alone = torch.cat(
            [metric(region_sum, images[i : i + 1], maps[i : i + 1], targets[i : i + 1]) for i in range(3)]
        )
        assert torch.allclose(alone, together, atol=1e-6)
        assert torch.equal(metric(region_sum, images, maps * 7, targets), together)  # the order alone counts


def test_bad_maps_and_steps_are_named():
    images, targets = torch.rand(1, 3, 8, 8), torch.tensor([0])
    with pytest.raises(ValueError, match="resize"):
        m.deletion(region_sum, images, torch.rand(1, 4, 4), targets)
    with pytest.raises(ValueError, match="steps"):
        m.deletion(region_sum, images, torch.rand(1, 8, 8), targets, steps=0)
