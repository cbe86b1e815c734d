"""Every notebook keeps the conventions, runs in the smoke profile, and writes what a sound model writes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode

from studies import results
from studies.notebooks import clean, first_cell, own_cells, read
from studies.report import report
from studies.run import Outcome, run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
PLANNED: set[int] = set()
PARAMETERS = {"profile": None, "seed": 0, "device": "auto", "data_root": None, "results_dir": None}

# notebook -> path in its metrics -> (low, high): what smoke must reach on the twin; a broken model does not
EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "00_quickstart": {
        "predicted/0": (281, 285),  # a cat: tabby, tiger, Persian, Siamese or Egyptian
        "predicted/1": (967, 967),  # espresso
        "predicted/3": (872, 872),  # tripod
        "probability/1": (0.9, 0.97),
        "probability/3": (0.9, 0.98),
        "complete": (0.0, 1e-3),  # the influence map adds up to the logit
        "contrast/0": (0.6, 0.95),  # the log-odds move the cat's map
        "contrast/1": (0.97, 1.0),  # and leave that of the espresso, which has no rival
        "alike/influence/0": (0.7, 0.96),  # tripod and reflex camera: the logits share much
        "alike/log-odds influence/0": (-0.6, 0.3),  # the log-odds do not
        "open_gates": (0.03, 0.15),
        "few/gated": (0.85, 1.0),
        "few/original_only_top": (0.9, 1.0),
        "few/original_without_top": (0.0, 0.1),
        "few/another_only": (0.0, 0.4),
        "few/random_only": (0.0, 0.4),
        "same/influence": (-0.2, 0.6),  # with a random classifier
    },
    "01_se_block": {
        "by_hand/ordinary/0": (0.8, 1.0),  # on what it learned from
        "by_hand/ordinary/1": (0.4, 0.85),  # and on unseen images
        "by_hand/through the classifier/1": (0.85, 1.0),
        "rule_empty/labels alone (paper)": (0.9, 1.0),
        "rule_empty/label-free": (0.0, 0.1),
        "curves/labels alone (paper)/without the top/2": (0.8, 1.0),  # the top decile
        "curves/labels + λ·mean(s)/only the top/2": (0.9, 1.0),
        "curves/label-free/only the top/2": (0.93, 1.0),
        "curves/label-free/without the top/2": (0.0, 0.1),
        "curves/label-free/only another image's/2": (0.05, 0.5),
        "curves/label-free/random: without/2": (0.7, 1.0),
    },
    "02_celeba": {
        "accuracy/fine, without": (0.88, 0.89),  # from the committed records, on real faces
        "by_hand/accuracy": (0.95, 1.0),  # on the twin; saying the more frequent answer gives 0.8
        "by_hand/gates/0": (0.75, 1.0),  # kept by the top decile alone, of the yes decisions
        "by_hand/random/1": (0.85, 1.0),
        "twin_gates/agreement": (0.97, 1.0),
        "twin_gates/open_gates": (0.01, 0.25),
        "twin/SE influence/near/mean": (0.5, 0.95),
        "twin/mean of channels/near/mean": (0.2, 0.5),
        "twin/uniform noise/near/mean": (0.15, 0.35),
        "twin/SE influence/pointing/mean": (0.2, 0.7),
    },
    "03_active_speaker": {
        "precision/all/with SE": (75.0, 100.0),  # the share of speaking frames is under 50
        "precision/all/without": (75.0, 100.0),
        "localised/with SE/mean of channels/near": (0.35, 0.75),  # the mouth and a cell around it are 0.22
        "localised/with SE/uniform noise/near": (0.15, 0.3),
        "muting/audio/drop/0": (1.5, 15.0),  # who is asked what he hears loses it without the sound
        "muting/audio/drop/2": (-0.7, 0.7),  # and nothing without the hands
        "spearman/0": (0.4, 1.0),
    },
    "04_objects": {
        "gains/lite0/λ = 1/0": (0.5, 1.0),  # from the committed records, in points
        "gates/0/agreement": (0.85, 1.0),
        "gates/0/open": (0.003, 0.05),
        "gates/0/only": (0.9, 1.0),
        "gates/0/without": (0.0, 0.05),
        "gates/0/only_another": (0.05, 0.45),
        "gates/0/only_random": (0.05, 0.45),
        "gates/1/without": (0.0, 0.9),
        "scores/lite0/0/SE top-gate (paper)/ap/mean": (0.3, 0.5),
        "scores/lite0/0/mean of channels/ap/mean": (0.12, 0.28),
        "scores/lite0/0/influence = CAM = Grad-CAM = HiResCAM/ap/mean": (0.35, 0.55),
        "scores/lite0/0/uniform noise/ap/mean": (0.1, 0.25),  # the object's area is 0.16
    },
}

# Under xdist the other worker has the other core.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def shown(cell: NotebookNode) -> str:
    """The text among a cell's outputs (not the images, whose base64 can spell anything)."""
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text", ""))
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def checked(notebook: NotebookNode) -> list[str]:
    """What the cells show that no profile changes: those that nbval is told to compare."""
    return [
        shown(cell) for cell in own_cells(notebook) if "nbval-check-output" in cell.metadata.get("tags", [])
    ]


def code(path: Path) -> ast.Module:
    """The code of a notebook as a syntax tree, without magics."""
    sources = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    return ast.parse("\n".join(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in sources))


def test_numbers_are_unique_and_gap_free_but_for_the_planned_ones() -> None:
    assert {"00_quickstart", "01_se_block", "02_celeba", "03_active_speaker", "04_objects"} <= set(NAMES)
    numbers = [int(name[:2]) for name in NAMES]
    assert all(re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name) for name in NAMES)
    assert len(set(numbers)) == len(numbers)
    assert set(range(max(numbers) + 1)) - set(numbers) <= PLANNED


@each_notebook
def test_first_cell_says_what_how_long_and_where_next(path: Path) -> None:
    title, seconds = first_cell(path)
    assert list(seconds) == ["smoke", "standard", "full"]
    assert len(title.split()) <= 12, "the README has it"
    source = read(path).cells[0].source
    question = source.split("\n\n")[1]
    assert question.endswith((".", "?")) and not question.startswith("**")
    assert f"results/{path.stem}.json" in source
    links = re.findall(r"\]\(([^)]+\.ipynb)\)", source)
    assert links
    for link in links:
        assert (path.parent / link).is_file(), link


@each_notebook
def test_the_second_cell_holds_the_parameters_as_literals(path: Path) -> None:
    cells = read(path).cells
    tagged = [index for index, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [1]
    found: dict[str, Any] = {}
    for statement in ast.parse(cells[1].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        found[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
    assert {name: found.get(name, "missing") for name in PARAMETERS} == PARAMETERS


@each_notebook
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    for node in ast.walk(code(path)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 40, node.name


@each_notebook
def test_it_ends_with_findings_and_references(path: Path) -> None:
    notebook = read(path)
    assert notebook.cells[-1].cell_type == "markdown" and re.search(
        r"^#+ References", notebook.cells[-1].source, re.MULTILINE
    )
    headings = re.findall(
        r"^#+ (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.MULTILINE
    )
    assert any(heading.lower().startswith(("conclusion", "findings")) for heading in headings[-3:])
    assert "findings" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@each_notebook
def test_it_is_committed_with_outputs_and_without_what_changes_from_run_to_run(path: Path) -> None:
    assert path.stat().st_size <= 1_500_000
    notebook = read(path)
    assert clean(notebook) == notebook, "commit it with `make publish`"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert checked(notebook) and all(checked(notebook)), "nbval compares nothing"
    text = "\n".join(map(shown, notebook.cells))
    assert not re.search(r"(^|[\s'\"(=])/(home|root|tmp|Users|var|work|mnt)/", text)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """All notebooks, run once in the smoke profile on the twins: their folder, and what became of them.

    `make test` names a folder whose networks and twins the browser's test uses, too.
    """
    own = tmp_path_factory.mktemp("smoke") / "checkpoints"
    out = Path(os.environ.get("SELIB_CHECKPOINTS", own)).parent
    return out, run(profile="smoke", data=out / "data", out=out, folder=ROOT / "notebooks", jobs=JOBS)


def test_all_notebooks_run_in_the_smoke_profile(smoke: tuple[Path, list[Outcome]]) -> None:
    assert [(outcome.name, outcome.error) for outcome in smoke[1]] == [(name, "") for name in NAMES]


@each_notebook
def test_the_results_say_what_was_found_and_on_what(smoke: tuple[Path, list[Outcome]], path: Path) -> None:
    result = results.load(smoke[0] / "results" / f"{path.stem}.json")
    assert (result["notebook"], result["profile"], result["seed"]) == (path.stem, "smoke", 0)
    real = {name for name, entry in result["data"].items() if not entry["synthetic"]}
    assert result["data"] and real <= {"scikit-image/test"}, "there are no other real data here"
    assert result["metrics"]["findings"] and all(
        isinstance(text, str) for text in result["metrics"]["findings"]
    )
    assert result["timings"]["total"] > 0


@each_notebook
def test_the_results_are_those_of_a_sound_model(smoke: tuple[Path, list[Outcome]], path: Path) -> None:
    metrics = results.load(smoke[0] / "results" / f"{path.stem}.json")["metrics"]
    assert EXPECTED.get(path.stem), "say in EXPECTED what a broken model would miss"
    for key, (low, high) in EXPECTED[path.stem].items():
        value: Any = metrics
        for part in key.split("/"):
            value = value[int(part) if isinstance(value, list) else part]
        assert low <= value <= high, key


def test_the_report_holds_every_notebook_and_needs_no_network(smoke: tuple[Path, list[Outcome]]) -> None:
    markdown, page = report(smoke[0])
    html = page.read_text()
    for path in NOTEBOOKS:
        assert f"## {first_cell(path)[0]}" in markdown.read_text()
        assert f'href="{path.stem}.html"' in html
    assert not re.search(r"""<script|<link|(src|url)\s*[=(]\s*(?!["']?data:)""", html)


@each_notebook
def test_what_no_profile_changes_is_as_committed(smoke: tuple[Path, list[Outcome]], path: Path) -> None:
    assert checked(read(smoke[0] / path.name)) == checked(read(path))


def test_nbval_executes_the_quickstart_again_to_the_same_numbers(
    smoke: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    places = {"SELIB_DATA": str(smoke[0] / "data"), "SELIB_RESULTS": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbval-lax",
            "--nbval-current-env",
            "notebooks/00_quickstart.ipynb",
        ],
        check=False,
        cwd=ROOT,
        env={**os.environ, **places, "SELIB_PROFILE": "smoke", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    one, two = (results.load(folder / "00_quickstart.json") for folder in (smoke[0] / "results", tmp_path))
    assert results.comparable(one) == results.comparable(two)
