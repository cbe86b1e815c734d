"""The study of active speakers: its arithmetic by hand, its networks and clips for real, in small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import selib
from selib import video
from selib.forward import attached
from studies import baselines, modalities, profiles, training
from studies import speakers as speaking
from studies.data import load_speakers
from studies.modalities import Muting, Worth
from studies.networks import active_speaker


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def clips(root):
    return load_speakers("synth-speakers", "test", root=root, limit=10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = active_speaker().eval()
    selib.attach_se(model, model.example(), at=model.sites, start="paper")
    return model


# ---- precision -------------------------------------------------------------------------------------------


def test_precision_is_over_the_frames_of_all_clips_together():
    scores, labels = [np.array([3.0, 0.0]), np.array([2.0, 1.0])], [np.array([1, 0]), np.array([0, 1])]
    assert speaking.precision(scores, labels, [0]) == 1.0
    # 3 (yes), 2 (no), 1 (yes), 0 (no): precision 1 at the first yes, 2/3 at the second
    assert speaking.precision(scores, labels, [0, 1]) == pytest.approx((1 + 2 / 3) / 2)


def test_the_gain_is_that_of_the_means_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 2, 30) for _ in range(12)]
    good = [y + 0.3 * rng.standard_normal(30) for y in labels]
    bad = [y + 2.0 * rng.standard_normal(30) for y in labels]
    rows = np.arange(12)
    gain = speaking.precision_gain([good], [bad], labels, rows, resamples=50)
    assert gain.mean == pytest.approx(
        speaking.precision(good, labels, rows) - speaking.precision(bad, labels, rows)
    )
    assert 0 < gain.low < gain.mean < gain.high
    assert speaking.precision_gain([good], [good], labels, rows, resamples=20) == (0, 0, 0)


def test_clips_are_grouped_by_condition(clips):
    rows = speaking.rows_by_condition(clips)
    assert list(rows) == [*speaking.CONDITIONS, "all"]
    assert rows["face occlusion"].tolist() == [2, 7] and len(rows["all"]) == 10


def test_the_table_has_a_row_for_each_condition_and_no_difference_where_there_is_none(clips, model):
    scores = speaking.scored(model, clips)
    assert [len(s) for s in scores] == [clip.frames for clip in clips.clips]
    table, gains = speaking.precision_table({"with SE": [scores], "without": [scores]}, clips, resamples=10)
    assert all(row[2] == row[3] and row[4] == [0, 0, 0] for row in table["rows"])
    assert gains["all"] == (0, 0, 0)


# ---- maps ------------------------------------------------------------------------------------------------


def test_the_area_is_the_share_of_the_mouth_and_no_map_exceeds_its_energy(clips, model):
    row = speaking.speaking_clips(clips, 1, conditions=["optimal"])[0]
    scores = speaking.localise(model, clips, [row], seed=0)
    mouth = clips.masks(row)["face"] == speaking.MOUTH
    frames = np.asarray(clips.clips[row].labels, bool) & mouth.any((1, 2))
    assert scores.cell(speaking.CHANCE, "energy")[0] == pytest.approx(mouth[frames].mean())
    assert set(scores.values) == {
        *speaking.READINGS,
        speaking.WHOLE,
        *speaking.CONTROLS,
        "Grad-CAM",
        speaking.CHANCE,
    }
    for name in scores.values:
        assert 0 <= scores.cell(name, "energy")[0] <= scores.cell(name, "near")[0] <= 1


def test_grad_cam_leaves_the_model_as_it_was(clips, model):
    model.head.train()
    inputs = clips.clip(0)[0]
    heat = baselines.clip_grad_cam(model, inputs, "face")
    assert heat.shape == inputs["face"].shape[1:] and 0 <= heat.min() and heat.max() <= 1
    assert model.head.training and not model.face.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(x.requires_grad for x in inputs.values())
    model.eval()


# ---- modalities ------------------------------------------------------------------------------------------


def test_worth_is_the_influence_over_the_speaking_frames(clips, model):
    row = speaking.speaking_clips(clips, 1)[0]
    ((inputs, labels),) = modalities.batches_of(clips, [row])
    found = modalities.worth(model, [(inputs, labels)])
    block, keep = attached(model)["fusion"], np.asarray(labels, bool)
    with torch.no_grad():
        whole = model(**inputs)[0, keep, 0]
        for m, name in enumerate(found.names):
            mask = torch.ones(3, 128)
            mask[m] = 0
            with block.override(lambda s, mask=mask: s * mask.flatten()):
                closed = model(**inputs)[0, keep, 0]
            assert found.influence[0, m] == pytest.approx(float((whole - closed).mean()), abs=1e-5), name
    assert found.share.sum() == pytest.approx(1) and found.gate_share.sum() == pytest.approx(1)


@pytest.mark.slow
def test_a_network_that_does_not_hear_loses_nothing_without_the_sound(clips):
    torch.manual_seed(0)
    deaf = active_speaker().eval()
    deaf.head.gru.weight_ih_l0.data[:, :128] = 0
    deaf.head.gru.weight_ih_l0_reverse.data[:, :128] = 0
    selib.attach_se(deaf, deaf.example(), at=deaf.sites)
    rows = speaking.speaking_clips(clips, 2)
    study = modalities.muting(deaf, clips, rows)
    assert study.names == ("audio", "face", "body")
    assert np.abs(study.drop[:, 0]).max() < 1e-6 and np.abs(study.influence[:, 0]).max() < 1e-6
    assert np.abs(study.drop[:, 1:]).max(0).min() > 1e-6


def test_spearman_over_clips_and_modalities():
    influence = np.arange(12.0).reshape(4, 3)
    same = Muting(("a", "b", "c"), influence, influence**3)
    other = Muting(("a", "b", "c"), influence, -influence)
    assert modalities.spearman_interval({"x": same}, resamples=20).mean == pytest.approx(1)
    assert modalities.spearman_interval({"x": other}, resamples=20).high == pytest.approx(-1)


def test_shares_are_compared_pairwise_and_between_groups():
    before = Worth(
        ("audio", "face"), np.zeros((3, 2)), np.array([[0.5, 0.5], [0.4, 0.6], [0.3, 0.7]]), np.zeros((3, 2))
    )
    after = Worth(
        ("audio", "face"), np.zeros((3, 2)), np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]), np.zeros((3, 2))
    )
    assert modalities.share_change(after, before, "face", resamples=50) == pytest.approx((-0.2, -0.2, -0.2))
    between = modalities.share_between(after, before, "audio", resamples=200)
    assert between.mean == pytest.approx(0.2) and between.low < 0.2 < between.high


@pytest.mark.slow
def test_closing_gates_by_way_of_the_head_is_closing_them_in_the_network(clips, model):
    one = clips.subset([0])
    found = modalities.gate_variants(model, one, seed=0)
    mask = torch.ones(3, 128)
    mask[1] = 0
    with torch.no_grad(), attached(model)["fusion"].override(lambda s: s * mask.flatten()):
        want = model(**one.clip(0)[0])[0, :, 0]
    assert np.allclose(found["face"]["none"][0], want, atol=1e-5)
    assert set(found) == {"audio", "face", "body", "all"} and "none" not in found["all"]


# ---- networks and videos ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_is_trained_once_and_then_loaded(root, tmp_path):
    setup = speaking.clips_of(profiles.profile("smoke"), root)
    setup = replace(setup, train=setup.train.subset(range(8)), batch_frames=320, from_shipped=False)
    first, history = speaking.trained(setup, se=True, seed=0, out=tmp_path)
    again, same = speaking.trained(setup, se=True, seed=0, out=tmp_path)
    assert history == same and set(attached(first)) == {"face", "body", "fusion"}
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    plain, _ = speaking.trained(setup, se=False, seed=0, out=tmp_path)
    assert not attached(plain) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_other_clips_batches_or_another_start_are_another_run(root, tmp_path, monkeypatch):
    setup = speaking.clips_of(profiles.profile("smoke"), root)
    setup = replace(setup, train=setup.train.subset(range(8)), from_shipped=False)
    folders = []
    monkeypatch.setattr(training, "fit", lambda *args, out, **options: folders.append(out))
    others = (
        {"train": setup.train.subset(range(7))},
        {"batch_frames": 320},
        {"epochs": 2},
        {"from_shipped": True},
        {"architecture": "bias"},
    )
    for change in ({}, *others, {}):
        speaking.trained(replace(setup, **change), se=True, seed=0, out=tmp_path)
    assert folders[0] == folders[-1] and len(set(folders)) == 1 + len(others)


def test_label_free_gates_leave_the_network_alone(root, clips):
    torch.manual_seed(0)
    plain = active_speaker().eval()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    setup = speaking.Setup("synth-speakers", clips, clips, 1, "active_speaker", 120, False)
    gated, report = speaking.sparse(plain, setup, clips=6, sparsity=1.0, epochs=1, seed=0)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())
    assert set(attached(gated)) == set(report.open_gates) == {"face", "body", "fusion"}
    some = clips.subset(range(2))
    before, after, under = (
        speaking.scored(plain, some),
        speaking.scored(gated, some),
        speaking.scored(gated, some, gated=True),
    )
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    assert not any(np.allclose(one, two) for one, two in zip(before, under, strict=True))
    assert all(block.transparent and not block.acts for block in attached(gated).values())


@pytest.mark.slow
def test_two_people_in_a_video_are_told_apart_by_their_boxes(clips, model, tmp_path):
    from studies.people import explain_video

    film, boxes = speaking.street(clips, [0, 1], tmp_path / "a.mp4", tmp_path / "a.csv")
    frames = [frame for _, frame in video.read_frames(film)]
    assert frames[0].shape == (360, 640, 3)
    people = explain_video(model, film, boxes, tmp_path / "out.mp4")
    assert {row["entity"] for row in people} == {"left", "right"}
    assert len(video.read_audio(tmp_path / "out.mp4")) > 0
