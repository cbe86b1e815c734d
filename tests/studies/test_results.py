"""Results files: what goes in comes back, what JSON cannot hold is refused, nothing is half written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from studies import profiles, results


def save(out: Path | None, **metrics: object) -> Path:
    return results.save(
        "00_x",
        profile="smoke",
        seed=3,
        params={"level": 1},
        data={},
        metrics=metrics,
        timings={"train": 1.5},
        out=out,
    )


def test_what_is_saved_is_loaded_with_array_types_as_plain_numbers(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        a=np.float32(0.5),
        b=torch.tensor([1, 2]),
        c=(1, np.array([[2.0]])),
        d=None,
        e="ü",
        f=torch.tensor(True),
    )
    assert path == tmp_path / "00_x.json"
    loaded = results.load(path)
    assert loaded["metrics"] == {"a": 0.5, "b": [1, 2], "c": [1, [[2.0]]], "d": None, "e": "ü", "f": True}
    assert (loaded["notebook"], loaded["profile"], loaded["seed"]) == ("00_x", "smoke", 3)
    keys = ["schema", "notebook", "profile", "seed", "params", "data", "metrics", "versions", "timings"]
    assert list(loaded) == keys


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_every_json_value_survives_the_conversion(value: object) -> None:
    assert json.loads(json.dumps(results._plain(value, "metrics"), allow_nan=False)) == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(math.inf)])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_key(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match=r"metrics\.table\[1\]\.energy is -?(nan|inf)"):
        save(tmp_path, table=[0, {"energy": bad}])
    assert list(tmp_path.iterdir()) == []


def test_an_object_is_refused_by_the_name_of_its_key_and_the_old_file_stays(tmp_path: Path) -> None:
    path = save(tmp_path, a=1)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"metrics\.model is a object"):
        save(tmp_path, model=object())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["00_x.json"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), results.replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.json", "old")]


def test_comparable_leaves_out_time_machine_commit_and_places(tmp_path: Path) -> None:
    common = {"profile": "smoke", "seed": 0, "data": {}, "metrics": {"a": 1}}
    here = {"data_root": "here", "results_dir": "here", "device": "cpu", "level": 1}
    there = {"data_root": "there", "results_dir": "there", "device": "auto", "level": 1}
    one = results.load(results.save("n", params=here, timings={"total": 1.0}, out=tmp_path / "1", **common))
    two = results.load(
        results.save(
            "n", params=there, timings={"total": 9.0, "device": "meta"}, out=tmp_path / "2", **common
        )
    )
    two["versions"]["commit"] = "another"
    assert one != two
    assert results.comparable(one) == results.comparable(two)
    assert one["params"] == {"level": 1, "precision": "float32"}
    assert (
        one["timings"]["total"] == 1.0 and one["timings"]["device"] == "cpu" and one["timings"]["cores"] >= 1
    )
    changed = {**one, "metrics": {"a": 2}}
    assert results.comparable(one) != results.comparable(changed)


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("SELIB_RESULTS", raising=False)
    assert results.directory("full") == tmp_path / "runs" / "full" / "results"
    assert results.figures_directory(results.directory("full")) == tmp_path / "runs" / "full" / "figures"
    monkeypatch.setenv("SELIB_RESULTS", str(tmp_path / "elsewhere"))
    assert results.directory("full") == tmp_path / "elsewhere"
    assert results.figures_directory(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "figures"
    assert results.directory("full", tmp_path) == tmp_path


@pytest.mark.parametrize("content", ["", '{"schema": 1', "[1]", '{"schema": 0}'])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "04_objects.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"04_objects\.json is not a results file .*run its notebook again"):
        results.load(path)


def test_equal_figures_are_equal_bytes_in_both_formats(tmp_path: Path) -> None:
    for place in ("one", "two"):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1], [1, 0], label="line")
        path = results.save_figure(figure, "00_x_line", tmp_path / place / "results", profile="smoke")
        assert path == tmp_path / place / "figures" / "00_x_line.png"
    for suffix in ("png", "pdf"):
        one, two = (
            (tmp_path / place / "figures" / f"00_x_line.{suffix}").read_bytes() for place in ("one", "two")
        )
        assert one == two
        assert len(one) > 500
    assert len(list((tmp_path / "one" / "figures").iterdir())) == 2


def test_a_figure_that_is_listed_must_have_been_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.figures\.maps is not saved"):
        save(tmp_path, figures={"maps": "Heatmaps."})
    results.save_figure(Figure(figsize=(1, 1)), "maps", tmp_path)
    save(tmp_path, figures={"maps": "Heatmaps."})


def test_describe_says_what_the_numbers_were_made_on() -> None:
    counts = {"images": 5, "size": [32, 48], "classes": 2}
    item = SimpleNamespace(
        name="synth-objects", split="val", counts=counts, synthetic=True, fingerprint="ab12"
    )
    assert results.describe(item) == {
        "synth-objects/val": {**counts, "synthetic": True, "fingerprint": "ab12"}
    }


def test_a_run_keeps_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    displayed: list[object] = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    run = results.Run("04_x", "smoke", 3, results_dir=tmp_path / "results", level=1, device="cpu")
    assert run.sizes is profiles.profile("smoke")
    run.show(Figure(figsize=(1, 1)), "maps", "Two maps.")
    spec = {"caption": "Accuracy", "columns": ["data", "accuracy"], "rows": [["cifar10", 0.5]]}
    run.table("accuracy", spec)
    run.keep(accuracy=np.float32(0.5))
    run.timings["fit"] = 2.0
    item = SimpleNamespace(name="d", split="val", counts={"images": 5}, synthetic=True, fingerprint="ab12")
    run.save(["It works."], data=[item])

    picture, table, findings = displayed
    assert picture.data[:4] == b"\x89PNG"
    assert table.data.startswith("**Accuracy**\n\n| data | accuracy |")
    assert findings.data == "- It works."
    assert (tmp_path / "figures" / "04_x_maps.pdf").is_file()
    result = results.load(tmp_path / "results" / "04_x.json")
    assert (result["profile"], result["seed"]) == ("smoke", 3)
    assert result["params"] == {"level": 1, "precision": "float32"}
    assert result["data"]["d/val"]["images"] == 5
    assert result["metrics"] == {
        "findings": ["It works."],
        "tables": {"accuracy": spec},
        "figures": {"04_x_maps": "Two maps."},
        "accuracy": 0.5,
    }
    assert result["timings"]["total"] > 0 and result["timings"]["fit"] == 2.0


def test_profiles_by_name_environment_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELIB_PROFILE", raising=False)
    assert profiles.profile().name == "standard"
    monkeypatch.setenv("SELIB_PROFILE", "smoke")
    assert profiles.profile().name == "smoke"
    assert profiles.profile("full").name == "full"
    with pytest.raises(ValueError, match="unknown profile 'fast': choose one of smoke, standard, full"):
        profiles.profile("fast")


def test_no_profile_does_less_than_a_smaller_one() -> None:
    smoke, standard, full = (profiles.PROFILES[name] for name in ("smoke", "standard", "full"))
    for field in (
        "speaker_train",
        "unlabelled",
        "held",
        "photos",
        "mosaics",
        "road_images",
        "explain_images",
        "resamples",
    ):
        assert 0 < getattr(smoke, field) <= getattr(standard, field) <= getattr(full, field)
    assert len(standard.face_seeds) >= 3 and len(standard.gate_seeds) >= 3 and len(full.speaker_seeds) >= 3
