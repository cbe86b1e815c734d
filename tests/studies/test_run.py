"""The runner: it keeps what ran to its end, names what failed, and skips what is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import tiny_notebooks
from matplotlib.figure import Figure

from studies import notebooks, results
from studies import run as study

STALL = "import time\ntime.sleep(60)"
FAILING = "level = 2\nraise ValueError('a long story\\n  the point')"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[study.Outcome]]:
    """Five notebooks run once: one passes, the others fail, hang, save nothing, or kill their kernel."""
    root = tmp_path_factory.mktemp("study {with braces}")
    folder = root / "notebooks"
    tiny_notebooks.good(folder, "00_good")
    tiny_notebooks.write(folder, "01_bad", tiny_notebooks.SAVE.format(name="01_bad"), FAILING)
    tiny_notebooks.write(folder, "02_stall", "x = 1", STALL)
    tiny_notebooks.write(folder, "03_silent", "x = 1")
    tiny_notebooks.write(folder, "04_dead", "import os\nos._exit(3)")
    places = {"data": root / "data", "out": root / "run", "folder": folder}
    return root, study.run(profile="smoke", timeout=4, jobs=2, **places)


@pytest.mark.slow
def test_outcomes_name_the_cell_and_the_last_line_of_the_error(ran: tuple[Path, list[study.Outcome]]) -> None:
    _, outcomes = ran
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("00_good", "done"),
        ("01_bad", "failed"),
        ("02_stall", "failed"),
        ("03_silent", "failed"),
        ("04_dead", "failed"),
    ]
    assert outcomes[1].error == "cell 4 (level = 2): ValueError: the point"
    assert outcomes[2].error == "cell 4 (import time): ran into its limit of 4 s"
    assert outcomes[3].error == "wrote no results/03_silent.json: a notebook ends with run.save(…)"
    assert outcomes[4].error.startswith("its process ended with code ") and "died" in outcomes[4].error


@pytest.mark.slow
def test_only_what_ran_to_its_end_is_kept(ran: tuple[Path, list[study.Outcome]]) -> None:
    files = sorted(
        path.relative_to(ran[0] / "run").as_posix() for path in (ran[0] / "run").rglob("*") if path.is_file()
    )
    assert files == [
        "00_good.html",
        "00_good.ipynb",
        "01_bad.failed.ipynb",
        "02_stall.failed.ipynb",
        "03_silent.failed.ipynb",
        "04_dead.failed.ipynb",
        "results/00_good.json",
    ]
    assert all(not path.name.startswith(".") for path in (ran[0] / "run").iterdir())


@pytest.mark.slow
def test_the_notebook_is_given_profile_data_and_results_and_runs_beside_its_source(
    ran: tuple[Path, list[study.Outcome]],
) -> None:
    result = results.load(ran[0] / "run" / "results" / "00_good.json")
    assert (result["profile"], result["metrics"]["level"]) == ("smoke", 1)
    assert result["params"] == {"level": 1, "precision": "float32"}
    assert result["metrics"]["store"] == str(ran[0] / "run" / "checkpoints")
    executed = nbformat.read(ran[0] / "run" / "00_good.ipynb", as_version=4)
    injected = next(cell for cell in executed.cells if "injected-parameters" in cell.metadata.tags)
    assert f'data_root = "{ran[0] / "data"}"' in injected.source
    assert "level 1" in (ran[0] / "run" / "00_good.html").read_text()


@pytest.mark.slow
def test_resume_skips_the_same_and_runs_again_what_changed(ran: tuple[Path, list[study.Outcome]]) -> None:
    root = ran[0]
    again = {"profile": "smoke", "resume": True}
    again |= {"data": root / "data", "out": root / "run", "folder": root / "notebooks"}
    assert study.run(["00"], **again) == [study.Outcome("00_good", "skipped", 0.0)]
    (outcome,) = study.run(["00_good"], parameters={"level": 5}, **again)
    assert outcome.status == "done"
    assert results.load(root / "run" / "results" / "00_good.json")["metrics"]["level"] == 5

    path, given = root / "notebooks" / "00_good.ipynb", {"profile": "smoke", "level": 5}
    given["data_root"] = str(root / "data")
    assert study._is_done(path, root / "run", given)
    assert not study._is_done(path, root / "run", {**given, "level": 6})
    assert not study._is_done(path, root / "run", {**given, "profile": "full"})
    path.write_text(path.read_text().replace("print(", "print( "))
    assert not study._is_done(path, root / "run", given)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_kernel_and_leaves_nothing(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    tiny_notebooks.write(
        tmp_path / "notebooks",
        "00_slow",
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n{STALL}",
    )
    command = [sys.executable, "-m", "studies", "run", "--profile", "smoke"]
    # A shell starts background jobs with SIGINT ignored, and children inherit that: undo it
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    runner = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=restore)  # noqa: PLW1509
    while runner.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.1)
    runner.send_signal(sent)
    _, said = runner.communicate(timeout=60)
    assert runner.returncode == status, said
    assert "Traceback" not in said
    assert list((tmp_path / "runs" / "smoke").iterdir()) == []
    kernel = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel outlived the runner")


def test_a_cell_that_took_its_whole_limit_fails_even_if_it_passed() -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("# wait\nx.wait()"), nbformat.v4.new_markdown_cell("")]
    )
    notebook.cells[0].metadata["papermill"] = {"duration": 4.0}
    assert study.failure(notebook, 4) == "cell 1 (x.wait()): ran into its limit of 4 s"
    assert study.failure(notebook, 5) == ""


def test_bad_input_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    tiny_notebooks.good(folder, "00_good")
    common = {"folder": folder, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="unknown notebook '07_cost': choose from 00_good"):
        study.run(["07_cost"], **common)
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        study.run(profile="fast", **common)
    with pytest.raises(
        ValueError,
        match="00_good has no parameter 'lvl': it has profile, seed, device, data_root, results_dir, level",
    ):
        study.run(parameters={"lvl": 1}, **common)
    with pytest.raises(ValueError, match="'results_dir' is set by the runner"):
        study.run(parameters={"results_dir": "x"}, **common)
    with pytest.raises(ValueError, match="jobs is 0"):
        study.run(jobs=0, **common)
    with pytest.raises(FileNotFoundError, match="no notebooks in .*root of the repository"):
        study.run(folder=tmp_path / "nowhere", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_find_takes_names_numbers_and_files_in_the_order_given(tmp_path: Path) -> None:
    for name in ("00_a", "01_b", "04_c"):
        tiny_notebooks.good(tmp_path, name)
    (tmp_path / "draft.ipynb").write_text("")
    assert [path.stem for path in notebooks.find((), tmp_path)] == ["00_a", "01_b", "04_c"]
    assert [path.stem for path in notebooks.find(["04", "notebooks/00_a.ipynb", "04_c"], tmp_path)] == [
        "04_c",
        "00_a",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=True", True),
        ("a=null", None),
        ("a=[1, 2]", [1, 2]),
        ("a=(1, 2)", (1, 2)),
        ("a=plain words", "plain words"),
        ('a="1"', "1"),
        ("a=b=c", "b=c"),
        ("a=", ""),
    ],
)
def test_parameters_are_read_as_literals(text: str, value: object) -> None:
    assert study.literal(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1", "a b=1"])
def test_a_parameter_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE"):
        study.literal(text)


def test_first_cell(tmp_path: Path) -> None:
    title, seconds = notebooks.first_cell(tiny_notebooks.good(tmp_path, "00_a"))
    assert (title, seconds) == ("The 00_a", {"smoke": 2, "standard": 90, "full": 7200})
    with pytest.raises(ValueError, match="01_b.ipynb: the first cell must hold"):
        path = tiny_notebooks.good(tmp_path, "01_b")
        path.write_text(path.read_text().replace("**Run time**", "Run time"))
        notebooks.first_cell(path)


def executed(folder: Path, name: str = "00_a") -> nbformat.NotebookNode:
    """A notebook as papermill leaves it: an injected cell, timestamps, a progress bar, a widget."""
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    v4 = nbformat.v4
    notebook.metadata |= {"papermill": {"duration": 1.2}, "widgets": {"state": {}}, "selib": {"digest": "0"}}
    notebook.cells.insert(
        2, v4.new_code_cell("results_dir = 'x'", metadata={"tags": ["injected-parameters"]})
    )
    cell = notebook.cells[3]
    cell.metadata |= {
        "papermill": {"duration": 1.0},
        "execution": {"iopub.execute_input": "now"},
        "tags": ["nbval-check-output"],
    }
    cell.outputs = [
        v4.new_output("stream", name="stderr", text="50%|####"),
        v4.new_output("stream", name="stdout", text="level 1\n"),
        v4.new_output(
            "display_data",
            {"text/plain": "IntProgress()", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
        ),
        v4.new_output(
            "display_data", {"text/plain": "Explorer()", "text/html": "<img>", "image/png": "AAAA"}
        ),
        v4.new_output("execute_result", {"text/plain": "3"}, execution_count=3),
    ]
    cell.execution_count = 3
    return notebook


def test_clean_leaves_what_a_reader_wants(tmp_path: Path) -> None:
    tiny_notebooks.good(tmp_path, "00_a")
    notebook = executed(tmp_path)
    cleaned = notebooks.clean(notebook)
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert [dict(cell.metadata) for cell in cleaned.cells] == [
        {},
        {"tags": ["parameters"]},
        {"tags": ["injected-parameters"]},
        {"tags": ["nbval-check-output"]},
    ]
    stream, explorer, value = cleaned.cells[3].outputs
    assert stream.text == "level 1\n"
    assert explorer.data == {"text/plain": "Explorer()", "image/png": "AAAA"}  # its still picture
    assert cleaned.cells[3].execution_count == value.execution_count == 3
    assert len(notebook.cells[3].outputs) == 5, "the argument is left as it is"


@pytest.mark.slow
def test_publish_commits_notebook_results_and_figures(tmp_path: Path) -> None:
    folder, run = tmp_path / "notebooks", tmp_path / "run"
    path = tiny_notebooks.good(folder, "00_a")
    finding = results.Run("00_a", "standard", 0, results_dir=run / "results")
    finding.show(Figure(figsize=(1, 1)), "map", "A map.")
    finding.save([])
    nbformat.write(executed(folder), run / "00_a.ipynb")
    notebooks.publish(run, folder, tmp_path / "results")
    text = path.read_text()
    assert "level 1" in text and "papermill" not in text and "injected" not in text
    files = sorted(
        file.relative_to(tmp_path / "results").as_posix() for file in (tmp_path / "results").rglob("*.*")
    )
    assert files == ["standard/00_a.json", "standard/figures/00_a_map.pdf", "standard/figures/00_a_map.png"]

    tiny_notebooks.write(folder, "00_a", "print('edited')")
    with pytest.raises(ValueError, match=r"00_a\.ipynb has been edited since it ran"):
        notebooks.publish(run, folder, tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="no results in"):
        notebooks.publish(tmp_path / "nowhere")
