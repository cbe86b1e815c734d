"""Fixtures shared by all tests: the real data sets, unpacked once outside the repository."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """A data root that holds real CIFAR-10 as a tree of JPEGs; skips where its archive is absent."""
    return _unpacked("cifar10.tar.xz", "cifar10")


@pytest.fixture(scope="session")
def tiny_imagenet_root() -> Path:
    """A data root that holds 50 classes of real Tiny-ImageNet; skips where its archive is absent."""
    return _unpacked("tiny-imagenet-50.tar.xz", "tiny-imagenet-200")


@pytest.fixture(scope="session")
def faces_root() -> Path:
    """A data root that holds real faces, with attributes and with masks; skips where an archive is absent."""
    _unpacked("celebamask-hq.tar.xz", "celebamask-hq")
    return _unpacked("celeba-10k.tar.xz", "celeba")


def _unpacked(archive: str, folder: str) -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("SELIB_TEST_CACHE") or user / "selib-tests")
    if (root / folder).is_dir():
        return root
    if not (ARCHIVES / archive).is_file():
        pytest.skip(f"needs the archive {archive} in {ARCHIVES}")
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder}-", dir=root))
    try:
        with tarfile.open(ARCHIVES / archive) as opened:
            opened.extractall(temporary, filter="data")
        # another worker may have been quicker: then its folder stands, and this one goes
        if not (root / folder).is_dir():
            os.replace(temporary / folder, root / folder)
    except OSError:
        if not (root / folder).is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root
