"""`selib explain`: heatmaps of image files, folders and videos; one-line errors and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selib
from selib import attach_se, video
from selib.checkpoint import save_checkpoint
from selib.cli import main
from selib.files import read_image
from studies.networks import SHIPPED, build


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("selib: error: ")
    return said[0].removeprefix("selib: error: ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["x.png"], "x.png: no such file"),
        (["x.mp4"], "x.mp4: no such file"),
        (["."], ". holds no images and no videos"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *files, "--checkpoint", "no.safetensors", "--out", "o"]) == 2
    assert message in error(capsys)
    assert not list(tmp_path.iterdir())


def test_usage_errors_exit_2_and_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["train"], ["explain", "x.png"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"selib {selib.__version__}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with an SE block, untrained."""
    torch.manual_seed(0)
    model = build("small_resnet", 3, widths=(8, 16, 16)).eval()
    attach_se(model, torch.zeros(1, 3, 32, 32), reduction=4)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(
        model,
        path,
        architecture="small_resnet",
        classes=["cat", "dog", "owl"],
        image_size=32,
        widths=(8, 16, 16),
    )
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    """Two image files of different shapes, one of them grey."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "one.jpg")
    Image.fromarray(generator.integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "two.png")
    return [str(tmp_path / "one.jpg"), str(tmp_path / "two.png")]


@pytest.mark.parametrize("method", ["influence", "gate", "top-gate"])
def test_explain_writes_overlays_and_lines(
    tmp_path: Path, checkpoint: Path, photographs: list[str], method: str
) -> None:
    out = tmp_path / "out"
    arguments = [
        "explain",
        *photographs,
        "--checkpoint",
        str(checkpoint),
        "--method",
        method,
        "--gates",
        "--target",
        "dog",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png",
        "explanations.jsonl",
        "one.png",
        "two.png",
    ]
    assert Image.open(out / "one.png").size == (60, 40)
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["one.jpg", "two.png"]
    for line in lines:
        assert (
            line["target"] == "dog"
            and line["method"] == method
            and line["prediction"] in {"cat", "dog", "owl"}
        )
        assert 1 / 3 <= line["probability"] <= 1
        assert len(line["gates"]) == 16 and len(line["top_channels"]) == 10


@pytest.fixture(scope="module")
def faces_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for upright images that says yes to two of three attributes, with gates for each."""
    torch.manual_seed(0)
    model = build("small_resnet", 3, image_size=(40, 24), widths=(8, 16, 16)).eval()
    block = attach_se(model, torch.rand(1, 3, 40, 24), reduction=4, per_target=True)
    torch.nn.init.zeros_(model.classifier.weight)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
        block.fc2.bias.copy_(torch.tensor([0.0, 20.0, -20.0]).repeat_interleave(16))
    path = tmp_path_factory.mktemp("checkpoint") / "faces.safetensors"
    options = {"image_size": (40, 24), "task": "multilabel", "widths": (8, 16, 16)}
    save_checkpoint(model, path, architecture="small_resnet", classes=["Smiling", "Bald", "Young"], **options)
    return path


@pytest.mark.parametrize(
    ("target", "shown", "gate"), [(None, "Young", 0), ("Bald", "Bald", 1), ("0", "Smiling", 0.5)]
)
def test_explain_says_every_yes_of_a_multilabel_checkpoint(
    tmp_path: Path,
    faces_checkpoint: Path,
    photographs: list[str],
    capsys: pytest.CaptureFixture[str],
    target: str | None,
    shown: str,
    gate: float,
) -> None:
    arguments = [
        "explain",
        *photographs,
        "--gates",
        "--checkpoint",
        str(faces_checkpoint),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments + (["--target", target] if target else [])) == 0
    assert Image.open(tmp_path / "out" / "one.png").size == (60, 40)
    lines = [json.loads(line) for line in (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["predictions"] == {"Smiling": pytest.approx(0.731059), "Young": pytest.approx(0.952574)}
        assert line["target"] == shown and "prediction" not in line and "probability" not in line
        assert line["gates"] == pytest.approx([gate] * 16, abs=1e-6) and len(line["top_channels"]) == 10
    assert f"{photographs[0]}: Young (0.953), Smiling (0.731)" in capsys.readouterr().out


def test_a_folder_is_explained_and_a_bad_file_is_skipped(
    tmp_path: Path, checkpoint: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for path in map(Path, photographs):
        path.rename(folder / "deep" / path.name)
    whole = (folder / "deep" / "one.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not a picture")
    assert (
        main(["explain", str(folder), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    )
    said = capsys.readouterr()
    assert (
        "half.jpg is not a readable image" in said.err and "1 of the files could not be explained" in said.err
    )
    written = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")
    )
    assert written == ["contact_sheet.png", "deep/one.png", "deep/two.png", "explanations.jsonl"]
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"))
    assert sheet.std() > 20  # pictures are on it
    bad = tmp_path / "bad"
    bad.mkdir()
    (folder / "half.jpg").rename(bad / "half.jpg")
    assert main(["explain", str(bad), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()


def test_no_file_is_overwritten_by_its_overlay(
    tmp_path: Path, checkpoint: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(photographs[0]).parent
    before = {path: path.read_bytes() for path in map(Path, photographs)}
    for files, out, message in (
        (photographs, folder, "two.png would be overwritten by its own overlay"),
        ([str(folder)], folder, "holds no images and no videos outside of --out"),
        ([*photographs, photographs[1]], folder / "maps", "two.png would have one overlay: use two --out"),
    ):
        assert main(["explain", *files, "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
        assert message in error(capsys)
    inside = folder / "maps"  # a second run does not explain what the first one wrote
    for _ in range(2):
        assert main(["explain", str(folder), "--checkpoint", str(checkpoint), "--out", str(inside)]) == 0
        assert len((inside / "explanations.jsonl").read_text().splitlines()) == 2
    assert {path: path.read_bytes() for path in before} == before


def test_a_photograph_on_its_side_is_turned_upright(tmp_path: Path, checkpoint: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by 90 degrees clockwise to see it
    upright.save(tmp_path / "upright.png")
    turned.save(tmp_path / "phone.png", exif=exif)
    (tmp_path / "a_$5_or_$6.png").write_bytes((tmp_path / "upright.png").read_bytes())  # no formula
    assert (
        main(["explain", str(tmp_path), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    )
    overlays = [
        np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        for name in ("upright", "phone", "a_$5_or_$6")
    ]
    assert np.array_equal(overlays[0], overlays[1]) and np.array_equal(overlays[0], overlays[2])


def test_a_photograph_and_its_film_of_one_name_are_both_explained(tmp_path: Path, checkpoint: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 34, 46, 3), dtype=np.uint8)
    video.write(tmp_path / "IMG_1.mp4", list(frames), fps=10)
    Image.fromarray(frames[0]).save(tmp_path / "IMG_1.jpg")
    assert (
        main(["explain", str(tmp_path), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    )
    assert {path.name for path in (tmp_path / "out").glob("IMG_1*")} == {"IMG_1.png", "IMG_1.mp4"}
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:  # a row for the film, one for images
        assert sheet.size == (2 * 160 + 8, 2 * (34 + 160 + 8))


@pytest.mark.parametrize("sound", [True, False])
def test_a_video_is_explained_frame_by_frame(tmp_path: Path, checkpoint: Path, sound: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 34, 47, 3), dtype=np.uint8)
    wave = (3000 * np.sin(np.arange(16000) / 5)).astype(np.int16)
    even = [frame[:, :46] for frame in frames]
    video.write(tmp_path / "film.mp4", even, fps=10, audio=wave[:9600] if sound else None)
    out = tmp_path / "out"
    assert (
        main(["explain", str(tmp_path / "film.mp4"), "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    )
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(line["video"] == "film.mp4" and "gates" not in line for line in lines)
    assert [frame.shape for _, frame in video.read_frames(out / "film.mp4")] == [(34, 46, 3)] * 6
    if sound:
        assert np.abs(video.read_audio(out / "film.mp4")).max() > 1000
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (6 * 160 + 5 * 8, 34 + 160 + 8)


def test_a_checkpoint_without_a_block_has_influence_but_no_gates(
    tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build("small_resnet", 3, widths=(8, 16, 16)).eval()
    path = tmp_path / "bare.safetensors"
    save_checkpoint(
        model,
        path,
        architecture="small_resnet",
        classes=["cat", "dog", "owl"],
        image_size=32,
        widths=(8, 16, 16),
    )
    arguments = ["explain", *photographs, "--checkpoint", str(path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--method", "gate"]) == 2
    assert "has no SE block whose gates could be read" in error(capsys) and not (tmp_path / "out").exists()
    assert main(arguments) == 0


def test_a_detector_of_speakers_is_not_for_images(
    tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(SHIPPED["synth-speakers"])
    assert main(["explain", *photographs, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")]) == 2
    assert "does not take images" in error(capsys) and not (tmp_path / "out").exists()


def test_without_a_video_decoder_images_are_explained_and_videos_skipped(
    tmp_path: Path,
    checkpoint: Path,
    photographs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "selib.video")
    monkeypatch.delattr(selib, "video")
    out = tmp_path / "out"
    arguments = ["explain", *photographs, str(tmp_path / "film.mp4"), "--checkpoint", str(checkpoint)]
    assert main([*arguments, "--out", str(out)]) == 1
    assert "videos need PyAV: pip install 'selib[video]'" in capsys.readouterr().err
    assert len((out / "explanations.jsonl").read_text().splitlines()) == 2


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 60)[None].repeat(40, 0).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = read_image(tmp_path / "ramp.png")
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert torch.equal(image[0, 0], torch.from_numpy((ramp[0] / 257).round().astype(np.uint8)))


@pytest.mark.parametrize("target", ["3", "-1", "cow"])
def test_explain_refuses_a_class_the_model_has_not(
    tmp_path: Path, checkpoint: Path, photographs: list[str], capsys: pytest.CaptureFixture[str], target: str
) -> None:
    arguments = [
        "explain",
        *photographs,
        "--checkpoint",
        str(checkpoint),
        f"--target={target}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    assert error(capsys) == f"--target {target}: the model has 3 classes, numbered from 0: cat, dog, owl"


def test_explain_refuses_a_file_that_is_no_checkpoint(
    tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    assert (
        main(
            [
                "explain",
                *photographs,
                "--checkpoint",
                str(tmp_path / "model.safetensors"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "model.safetensors" in error(capsys)
