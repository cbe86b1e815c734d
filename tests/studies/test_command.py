"""The command `studies`: options, exit codes, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_notebooks

import selib
from studies import report
from studies import run as study
from studies import speakers as speaking
from studies.cli import main
from studies.data import load_speakers
from studies.networks import SHIPPED


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("studies: error: ")
    return said[0].removeprefix("studies: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "fast"], "unknown profile 'fast': choose one of smoke, standard, full"),
        (["run", "07_cost"], "unknown notebook '07_cost': choose from 00_good"),
        (["run", "-p", "level"], "-p level: give a parameter as KEY=VALUE"),
        (["run", "-p", "lvl=1"], "00_good has no parameter 'lvl'"),
        (["run", "--jobs", "0"], "jobs is 0: give 1 or more"),
        (["report", "runs/smoke"], "no results in runs/smoke"),
        (["data", "check", "cifra10"], "cifra10"),
        (
            ["film", "x.mp4", "--boxes", "x.csv", "--checkpoint", "no.safetensors", "--out", "o"],
            "no.safetensors",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_notebooks.good(tmp_path / "notebooks", "00_good")
    assert main(arguments) == 2
    assert message in error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]


def test_a_failed_notebook_is_exit_code_1_and_an_interrupt_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        study,
        "run",
        lambda *_, **__: [
            study.Outcome("00_x", "done", 1),
            study.Outcome("01_y", "failed", 1, "cell 3 (a): E: b"),
        ],
    )
    assert main(["run"]) == 1
    assert error(capsys) == "01_y: cell 3 (a): E: b"
    monkeypatch.setattr(study, "run", lambda *_, **__: [study.Outcome("00_x", "done", 1)])
    assert main(["run"]) == 0

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", interrupted)
    assert main(["run"]) == 130


def test_run_hands_its_options_to_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def run(names: list[str], **options: object) -> list[study.Outcome]:
        seen.update(options, names=names)
        return []

    monkeypatch.setattr(study, "run", run)
    main(
        [
            "run",
            "00",
            "04_objects",
            "--profile",
            "full",
            "--data",
            "d",
            "--out",
            "o",
            "--jobs",
            "2",
            "--resume",
            "-p",
            "a=[1]",
            "-p",
            "b=x",
        ]
    )
    assert seen == {
        "names": ["00", "04_objects"],
        "profile": "full",
        "data": "d",
        "out": "o",
        "jobs": 2,
        "resume": True,
        "parameters": {"a": [1], "b": "x"},
    }


def test_report_prints_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "report", lambda run: (Path(run, "index.md"), Path(run, "index.html")))
    assert main(["report", "runs/smoke"]) == 0
    assert capsys.readouterr().out.split() == ["runs/smoke/index.md", "runs/smoke/index.html"]


def test_usage_errors_exit_2_and_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["explain"], ["report"], ["data", "fetch"], ["film", "a.mp4"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"studies {selib.__version__}"


@pytest.mark.slow
def test_a_film_of_people_is_marked_by_the_shipped_detector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = load_speakers("synth-speakers", "test", root=tmp_path, limit=2)
    film, boxes = speaking.street(clips, [0, 1], tmp_path / "street.mp4", tmp_path / "boxes.csv")
    capsys.readouterr()  # of the rendering
    arguments = ["film", str(film), "--boxes", str(boxes), "--checkpoint"]
    assert main([*arguments, str(SHIPPED["synth-objects"]), "--out", str(tmp_path / "out")]) == 2
    assert "no detector of speakers" in error(capsys)
    assert main([*arguments, str(SHIPPED["synth-speakers"]), "--out", str(tmp_path)]) == 2
    assert "street.mp4 would be overwritten" in error(capsys)
    assert main([*arguments, str(SHIPPED["synth-speakers"]), "--out", str(tmp_path / "out")]) == 0
    assert "left speaks in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()]
    assert {line["entity"] for line in lines} == {"left", "right"}
    assert (tmp_path / "out" / "street.mp4").is_file()


def test_data_makes_lists_and_checks_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--data", str(tmp_path)]
    assert main(["data", "list", *here]) == 0
    assert "here" not in capsys.readouterr().out.split()
    assert main(["data", "make", "synth-objects", "-n", "24", "--seed", "3", *here]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "synth-objects")
    assert main(["data", "list", *here]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "here" in line.split()] == ["synth-objects"]
    assert main(["data", "check", "synth-objects", *here]) == 0
    assert "train: 24 images" in capsys.readouterr().out
    assert main(["data", "make", "synth-objects", *here]) == 2
    assert "already there" in error(capsys)
    assert main(["data", "get", "imagenet", *here]) == 2
    assert "imagenet" in error(capsys)
