"""What a clean clone needs: the same packages everywhere, pinned by hash; modules without circles; a README that is true."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import selib
from studies.report import check_readme

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "selib").rglob("*.py"))
}


def requirements() -> dict[str, Requirement]:
    listed = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    return {Requirement(text).name: Requirement(text) for text in listed}


def test_the_conda_environment_agrees_with_pyproject() -> None:
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == [f"python {PROJECT['project']['requires-python']}", "pip"]
    *listed, last = pip["pip"]
    assert last == "--editable ."
    assert {Requirement(text).name: Requirement(text) for text in listed} == requirements()


def test_every_requirement_is_locked_at_a_version_it_allows() -> None:
    pins = {
        name: Version(version) for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", LOCK, re.MULTILINE)
    }
    for name, requirement in requirements().items():
        assert pins[name] in requirement.specifier, name
    assert "setuptools" in pins, "make install builds without isolation"


def test_every_pin_has_a_hash_and_no_address() -> None:
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE))
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[\w.-]+==", entry) and "--hash=sha256:" in entry, entry
    assert not re.search(r"://|@ |--index|--find-links|--extra|--trusted", LOCK)


def test_make_installs_the_uv_that_is_pinned_and_ci_calls_make_test() -> None:
    assert re.search(r"^UV := \d+\.\d+\.\d+$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
    assert script.read_text().endswith("exec make test\n")


def test_version_licence_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["version"] == project["version"] == selib.__version__
    assert citation["license"] == project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Roxo", "Costa", "Inácio", "Proença"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_shows_the_committed_numbers() -> None:
    check_readme(ROOT / "README.md", ROOT / "results", ROOT / "notebooks")


@pytest.mark.parametrize("command", ["make study", "make test", "make lab"])
def test_the_readme_names_commands_that_exist(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def imported(path: Path) -> set[str]:
    """The selib modules that a module imports, anywhere but for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(submodules or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & MODULES.keys()


def test_modules_import_without_circles_and_only_the_top_knows_notebooks() -> None:
    graph = {name: imported(path) - {"selib", name} for name, path in MODULES.items() if name != "selib"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    for name, needed in graph.items():
        if name not in {"studies.report", "selib.cli", "selib.__main__"}:
            assert not needed & {"studies.run", "studies.report", "selib.cli"}, name
    floor = {"selib.se", "selib.heatmap", "selib.select", "selib.metrics", "selib.stats"}
    for name in floor | {name for name in graph if name.startswith("studies.twins")}:
        assert {module for module in graph[name] if not module.startswith("studies.twins")} <= floor, name


def test_nothing_is_pickled() -> None:
    for name, path in MODULES.items():
        assert not re.search(
            r"(import|from) (pickle|joblib|dill)|torch\.load\(|torch\.save\(|allow_pickle=True",
            path.read_text(),
        ), name


def test_the_command_line_starts_without_torch_or_papermill() -> None:
    code = (
        "import sys; from selib.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'papermill', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout and "explain" in done.stdout
