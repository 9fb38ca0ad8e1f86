"""Modules import only from modules listed above them, and only certain modules import heavy libraries."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from occfeat_targets.cli import main as targets_main
from occfeat_train.cli import main as train_main
from tests.conftest import REPOSITORY


def listed(package: str) -> list[str]:
    """A package's modules in the order of the README's file tree, dotted: "cache.grid"."""
    readme = (REPOSITORY / "README.md").read_text()
    block = readme.split(f"\n{package}/", 1)[1].split("\n```", 1)[0]
    names, folder = [], ""
    for line in block.splitlines()[1:]:
        if not line.startswith(" "):
            break
        match = re.match(r"(  |    )(\w+)(/|\.py) ", line)
        assert match, line
        if match[3] == "/":
            folder = match[2] + "."
        else:
            names.append((folder if len(match[1]) == 4 else "") + match[2])
    return names


def imports(file: Path) -> set[str]:
    """Every module a file imports, at any depth, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import: use an absolute one"
            package = REPOSITORY.joinpath(*(node.module or "").split("."))
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if package.is_dir() else {node.module or ""}
            )
    return found


def modules(package: str) -> dict[str, Path]:
    """{dotted name: file} without the synthetic city, which is a separate program."""
    root = REPOSITORY / package
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in sorted(root.rglob("*.py"))}
    return {name: file for name, file in files.items() if "__" not in name and not name.startswith("synth.")}


@pytest.mark.parametrize("package", ["occfeat_targets", "occfeat_train"])
def test_the_readme_lists_every_module_once(package):
    assert sorted(listed(package)) == sorted(modules(package))


@pytest.mark.parametrize("package", ["occfeat_targets", "occfeat_train"])
def test_a_module_imports_only_from_those_listed_above_it(package):
    order = listed(package)
    for name, file in modules(package).items():
        own = {i.removeprefix(f"{package}.") for i in imports(file) if i.startswith(f"{package}.")}
        own = {i for i in own if i.split(".")[0] != "synth"}
        assert own <= set(order[: order.index(name)]), f"{name} imports {sorted(own - set(order[: order.index(name)]))}"


def test_every_package_has_a_docstring():
    for package in ("occfeat_targets", "occfeat_train"):
        for folder in {file.parent for file in modules(package).values()}:
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize(
    ("library", "where"),
    [
        ("nuscenes", set()),  # only tests need the devkit
        ("dask", {"cluster.py"}),
        ("distributed", {"cluster.py"}),
        ("torch", {"teacher*.py", "pickled.py", "state_dict.py"}),
        ("transformers", {"teacher*.py"}),
        ("pyquaternion", {"slow_nuscenes.py", "slow_lidar.py"}),
        ("shapely", {"slow_labels.py"}),
        ("cv2", {"labels.py"}),
        ("jinja2", {"html.py"}),
        ("numba", {"compiled.py"}),
        ("simplejpeg", {"images.py"}),
    ],
)
def test_a_heavy_library_is_imported_only_where_it_is_needed(library, where):
    found = {
        "teacher*.py" if file.name.startswith("teacher") else file.name
        for file in (REPOSITORY / "occfeat_targets").rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(file))
    }
    assert found == where


def test_only_the_table_of_sources_names_a_data_set():
    """The row in SOURCES is a string, and no other module imports a data set or lists its cameras."""
    root = REPOSITORY / "occfeat_targets"
    files = [
        file for file in root.rglob("*.py") if "synth" not in file.parts and file.name not in ("nuscenes.py", "spec.py")
    ]
    assert not [file for file in files if "occfeat_targets.sources.nuscenes" in imports(file)]
    assert not [file for file in files if "CAM_FRONT" in file.read_text()]


def test_the_trainer_needs_nothing_of_the_targets_but_the_cache_contract_what_both_share_and_for_reports_its_pictures():
    pictures: set[str] = set()
    for name, file in modules("occfeat_train").items():
        used = {i for i in imports(file) if i.startswith("occfeat_targets.")}
        pictures |= {i for i in used if i.startswith("occfeat_targets.pictures.")}
        assert {i.split(".")[1] for i in used} <= {"cache", "common"} | (
            {"pictures"} if name.startswith("report.") else set()
        ), name
        assert not {n.split(".")[0] for n in imports(file)} & {"nuscenes", "dask", "distributed", "cv2", "shapely"}
    for name in pictures:
        used = {i for i in imports(REPOSITORY / f"{name.replace('.', '/')}.py") if i.startswith("occfeat_targets.")}
        assert {i.split(".")[1] for i in used} <= {"cache", "common", "pictures"}, name


@pytest.mark.parametrize("package", ["occfeat_targets", "occfeat_train"])
def test_only_pictures_and_report_import_matplotlib_and_never_its_global_state(package):
    for name, file in modules(package).items():
        used = {i for i in imports(file) if i.split(".")[0] == "matplotlib"}
        assert not used or name.split(".")[0] in ("pictures", "report"), name
        assert "matplotlib.pyplot" not in used, name


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from occfeat_targets.cli import main; import occfeat_train.cli\n"
        "print(sorted({'torch', 'numba', 'dask', 'nuscenes', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_everything_is_printed_by_echo_which_makes_names_printable():
    allowed = {"common/terminal.py", "common/progress.py"}
    for package in ("occfeat_targets", "occfeat_train"):
        for file in modules(package).values():
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            names = {ast.unparse(function) for function in calls}
            where = str(file.relative_to(REPOSITORY / package))
            assert not names & {"print", "click.echo", "click.secho"} or where in allowed, where


def surface(command: click.Command, path: str) -> list[str]:
    """Every command with its options, in order."""
    lines = [" ".join([path, *(max(p.opts, key=len) for p in command.params)])]
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            lines += surface(command.commands[name], f"{path} {name}")
    return lines


def test_the_command_line_has_the_listed_options():
    found = [*surface(targets_main, "occfeat-targets"), *surface(train_main, "occfeat-train")]
    expected = (REPOSITORY / "tests" / "command_line.txt").read_text().splitlines()
    assert found == expected, "if the change is intended, update tests/command_line.txt and CHANGELOG.md"
