"""The distributions that setuptools builds: the source distribution can be tested, and the wheel holds only the packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

FOLDERS = ("occfeat_targets", "occfeat_train", "tests", "pipelines", "docs")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions of a copy of this repository."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    code = (
        "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_sdist(out); b.build_wheel(out)"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, check=True)
    return out


def sources(*folders: str) -> set[str]:
    return {
        str(file.relative_to(REPOSITORY))
        for folder in folders
        for file in (REPOSITORY / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_source_distribution_has_all_that_its_tests_need(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources(*FOLDERS) <= names
    assert {"constraints.txt", "Makefile", "environment.yml", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_has_the_packages_with_their_templates_and_types_and_nothing_else(distributions):
    names = zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist()
    assert {name for name in names if ".dist-info/" not in name} == sources("occfeat_targets", "occfeat_train")
    assert {"occfeat_targets/py.typed", "occfeat_train/py.typed"} <= set(names)
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(next(distributions.glob("*.whl"))).read(metadata).decode()
    assert "Classifier: Typing :: Typed\n" in text
    assert "Project-URL: Paper, https://arxiv.org/abs/2404.14027\n" in text


def test_constraints_pin_what_the_project_requires_to_a_version_that_it_accepts():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(pin.name): pin
        for pin in map(Requirement, (line for line in lines if not line.startswith("#")))
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]:
        wanted = Requirement(text)
        versions = [part.version for part in pinned[canonicalize_name(wanted.name)].specifier]
        assert versions and all(wanted.specifier.contains(version) for version in versions), text
    # nuscenes-devkit needs NumPy below 2, of which only 1.26.4 is left; without it pip takes 2.4.6.
    numpy = pinned.pop("numpy").specifier
    assert sorted(numpy.filter(["1.26.3", "1.26.4", "2.4.6", "2.5.0"])) == ["1.26.4", "2.4.6"]
    assert all([part.operator for part in pin.specifier] == ["=="] for pin in pinned.values())
