"""What a clean clone needs: packages pinned by hash, commands that exist, version and citation that agree."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import selib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def requirements() -> dict[str, Requirement]:
    """Everything that make installs, by name."""
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    texts += [text for extra in EXTRAS.values() for text in extra]
    found = {Requirement(text).name: Requirement(text) for text in texts}
    del found["selib"]  # an extra that includes others
    return found


def imported(folder: str) -> set[str]:
    """The packages that the code of a folder imports."""
    nodes = [node for path in (ROOT / folder).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    owners = packages_distributions()
    return {canonicalize_name(owners[top][0]) for name in names if (top := name.partition(".")[0]) in owners}


@pytest.mark.slow
def test_every_package_that_is_imported_is_a_requirement() -> None:
    dev = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependency-groups"]["dev"]}
    everything = {canonicalize_name(name) for name in requirements()} | {"selib"}
    assert imported("selib") | imported("studies") <= everything - dev
    assert imported("tests") <= everything


def test_selib_alone_needs_little() -> None:
    needed = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert needed <= {"accelerate", "numpy", "safetensors", "torch", "tqdm"}
    assert "selib[onnx,video,widgets]" in EXTRAS["study"]


def test_the_conda_environment_is_that_of_the_study() -> None:
    python, _, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python == f"python {PROJECT['project']['requires-python']}"
    assert pip == {"pip": ["--editable .[study]"]}


def test_every_requirement_is_locked_at_a_version_it_allows() -> None:
    found = re.findall(r"^([\w.-]+)==([\w.]+)", LOCK, re.MULTILINE)
    pins = {name: Version(version) for name, version in found}
    for name, requirement in requirements().items():
        assert pins[name] in requirement.specifier, name
    assert "setuptools" in pins, "make builds without isolation"


def test_every_pin_has_a_hash_and_no_address() -> None:
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE))
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[\w.-]+==", entry) and "--hash=sha256:" in entry, entry
    assert not re.search(r"://|@ |--index|--find-links|--extra|--trusted", LOCK)


def test_ci_runs_the_commands_of_the_readme() -> None:
    assert re.search(r"^UV := \d+\.\d+\.\d+$", MAKEFILE, re.MULTILINE)
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith("exec make test\n")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make study PROFILE=smoke"]
    for command in commands:
        assert command in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("target", ["study", "lab", "test", "test-fast"])
def test_the_readme_names_commands_that_exist(target: str) -> None:
    assert f"make {target}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^{target}: ", MAKEFILE, re.MULTILINE)


def test_version_licence_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["version"] == project["version"] == selib.__version__
    assert citation["license"] == project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Roxo", "Costa", "Inácio", "Proença"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
