"""A command without the packages of its extra names the extra in one line."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from occfeat_targets.options import reports_errors as of_targets
from occfeat_train.options import reports_errors as of_train
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("package", "missing", "arguments", "extra"),
    [
        ("occfeat_targets", "simplejpeg", ["build", "--split", "mini_train", "--teacher", "none"], "targets"),
        ("occfeat_targets", "numba", ["synth", "--out", "city"], "targets"),
        ("occfeat_train", "torch", ["pretrain"], "train"),
        ("occfeat_train", "torch", ["evaluate", "run"], "train"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(package, missing, arguments, extra, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from {package}.cli import main; main({arguments!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == f"error: the Python package {missing} is missing: pip install -e '.[{extra}]' in the repository\n"
    )


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("3", "the Python package dask_jobqueue is missing: pip install -e '.[targets,cluster]'"),
        ("2", "at least three tasks of srun are expected, a scheduler, the build and a worker"),
    ],
)
def test_a_build_in_an_allocation_without_its_extra_or_srun_says_what_is_missing(tasks, expected, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    code = (
        "import sys; sys.modules['dask_jobqueue'] = None; from pipelines.slurm.allocation import run_task; run_task([])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {expected}")


@pytest.mark.parametrize("reports_errors", [of_targets, of_train])
@pytest.mark.parametrize("module", ["dask.config", "occfeat_targets.no_such_module"])
def test_only_a_package_of_others_is_reported_as_missing(reports_errors, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)

    @click.command()
    @reports_errors
    def command() -> None:
        __import__(module)

    result = CliRunner().invoke(command)
    assert result.exit_code == 1
    assert ("the Python package dask is missing" in result.stderr) == module.startswith("dask")
    assert isinstance(result.exception, SystemExit if module.startswith("dask") else ModuleNotFoundError)
