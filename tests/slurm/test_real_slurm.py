"""The scripts on a real Slurm: builds as arrays and trainings, undisturbed and interrupted, have the same results as without Slurm."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from occfeat_train.training.log import read_log
from pipelines.__main__ import main as recipes
from pipelines.slurm.site import read_site
from pipelines.slurm.submit import queued_jobs, run_on_slurm
from pipelines.steps import Step
from tests.conftest import REPOSITORY
from tests.slurm.conftest import Slurm
from tests.targets.command_line import assert_same_bytes, build_arguments, contents, run
from tests.train.runs import assert_same_run, evaluate, pretrain, start_process, steps, write_caches

pytestmark = pytest.mark.slow
# Requests that fit on the test's nodes; a training runs one process on each GPU of each node.
SITE = """
cpus = 1
memory = "1G"
[build]
shards = 2
[train]
gpus = {gpus}
nodes = {nodes}
[evaluate]
gpus = 0
"""


def submit(steps: list[Step], folder: Path, *, nodes: int = 1, gpus: int = 0) -> dict[str, str]:
    """Submit the steps; {job name: id}."""
    site = folder / "site.toml"
    site.write_text(SITE.format(nodes=nodes, gpus=gpus))
    run_on_slurm(steps, read_site(site), folder)
    return queued_jobs(folder / "slurm")


def log_of(folder: Path, name: str) -> str:
    return "\n".join(file.read_text() for file in sorted((folder / "slurm").glob(f"{name}*.log")))


@pytest.fixture(scope="module")
def undisturbed_cache(city, tiny_teacher, tmp_path_factory):
    cache = tmp_path_factory.mktemp("undisturbed")
    run(*build_arguments(city, cache, tiny_teacher, "--shard-size", "1", "--workers", "0"))
    return contents(cache)


def build_step(city: Path, teacher: str, folder: Path) -> Step:
    command = ("occfeat_targets", *build_arguments(city, folder / "cache", teacher, "--shard-size", "1"))
    return Step("targets", (command,), folder / "targets.done", "build")


def first_shard_of_task_0(folder: Path) -> bool:
    return any((folder / "cache" / "mini_train.zarr" / "progress").glob("*0000.json"))


def kill_task_0(folder: Path) -> None:
    """SIGKILL, as the system sends it for lack of memory."""
    for process in psutil.process_iter(["cmdline"]):
        if {"0/2", str(folder / "cache")} <= {*(process.info["cmdline"] or ())}:
            process.kill()


def test_an_array_build_of_which_a_task_was_killed_and_requeued_has_the_bytes_of_a_local_build(
    slurm: Slurm, city, tiny_teacher, undisturbed_cache, tmp_path
):
    step = build_step(city, tiny_teacher, tmp_path)
    ids = submit([step], tmp_path)
    assert {*ids} == {"targets-plan", "targets-shards", "targets"}
    task = f"{ids['targets-shards']}_0"
    slurm.wait_until(lambda: first_shard_of_task_0(tmp_path), "no shard is built")
    slurm.call("scontrol", "requeue", task)
    slurm.begin_again_now(task)
    assert slurm.wait_for(ids["targets"]) == "COMPLETED", log_of(tmp_path, "targets")
    assert slurm.field(task, "Restarts") == "1"
    assert step.is_finished
    assert "reading the tables" in log_of(tmp_path, "targets-plan")
    assert "reading the tables" not in log_of(tmp_path, "targets-shards")
    assert_same_bytes(tmp_path / "cache", undisturbed_cache)


def test_a_build_of_which_a_task_died_is_submitted_again_and_has_the_bytes_of_a_local_build(
    slurm: Slurm, city, tiny_teacher, undisturbed_cache, tmp_path
):
    """What needs a job that has failed is cancelled. The same command submits it again, and keeps finished shards."""
    step = build_step(city, tiny_teacher, tmp_path)
    ids = submit([step], tmp_path)
    slurm.wait_until(lambda: first_shard_of_task_0(tmp_path), "no shard is built")
    kill_task_0(tmp_path)
    assert slurm.wait_for(f"{ids['targets-shards']}_0") == "FAILED"
    assert slurm.wait_for(ids["targets"]) == "CANCELLED"
    assert not step.is_finished
    again = submit([step], tmp_path)
    assert slurm.wait_for(again["targets"]) == "COMPLETED", log_of(tmp_path, "targets")
    assert_same_bytes(tmp_path / "cache", undisturbed_cache)
    assert submit([step], tmp_path) == {}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_caches(tmp_path_factory.mktemp("caches"))


MANY = [*steps(60), "--save-every", "1000"]


def stop_and_continue(slurm: Slurm, cache: Path, folder: Path, *, nodes: int, gpus: int) -> Path:
    """Submit a training and its evaluation, and send the signal that Slurm sends before the time limit."""
    out = folder / "run"
    training = Step("pretraining", (("occfeat_train", *pretrain(cache, out, *MANY)),), folder / "trained", "train")
    after = (("occfeat_train", *evaluate(out, cache)),)
    evaluation = Step("evaluation", after, folder / "evaluated", "evaluate", ("pretraining",))
    ids = submit([training, evaluation], folder, nodes=nodes, gpus=gpus)
    slurm.wait_until(lambda: (out / "log.jsonl").exists() and len(read_log(out)) > 2, "no step is trained")
    slurm.call("scancel", "--batch", "--signal=USR1", ids["pretraining"])
    slurm.begin_again_now(ids["pretraining"])
    assert queued_jobs(folder / "slurm") == ids
    assert slurm.wait_for(ids["evaluation"]) == "COMPLETED", log_of(folder, "pretraining")
    assert slurm.field(ids["pretraining"], "Restarts") == "1"
    assert "continuing at step " in log_of(folder, "pretraining")
    assert training.is_finished and evaluation.is_finished
    return out


def test_a_training_that_was_told_to_stop_is_requeued_and_has_the_loss_curve_of_an_undisturbed_one(
    slurm: Slurm, cache, tmp_path
):
    with start_process(pretrain(cache, tmp_path / "whole", *MANY)) as whole:
        output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    assert_same_run(stop_and_continue(slurm, cache, tmp_path, nodes=1, gpus=0), tmp_path / "whole")


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 1)])
def test_two_processes_under_torchrun_on_one_node_and_on_two_are_stopped_requeued_and_have_the_same_loss_curve(
    slurm: Slurm, cache, tmp_path, nodes, gpus
):
    with start_process(pretrain(cache, tmp_path / "whole", *MANY), processes=2) as whole:
        output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    assert_same_run(stop_and_continue(slurm, cache, tmp_path, nodes=nodes, gpus=gpus), tmp_path / "whole")


def test_a_build_on_a_dask_cluster_inside_one_allocation_has_the_bytes_of_a_local_build(
    slurm: Slurm, city, tiny_teacher, undisturbed_cache, tmp_path, monkeypatch
):
    if find_spec("dask_jobqueue") is None:
        pytest.skip("needs dask-jobqueue: pip install -e '.[cluster]'")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    options = build_arguments(city, tmp_path / "cache", tiny_teacher, "--shard-size", "1")[1:]
    build = f"srun {sys.executable} -m pipelines.slurm.allocation {shlex.join(options)}"
    sbatch = [
        "sbatch",
        "--parsable",
        "--ntasks=4",
        "--cpus-per-task=1",
        "--mem=4G",
        f"--chdir={tmp_path}",
        "--output=log",
    ]
    job = slurm.call(*sbatch, f"--wrap={build}").strip()
    state = slurm.wait_for(job)
    log = (tmp_path / "log").read_text()
    assert state == "COMPLETED", log
    assert "depends on the workers of tls://" in log
    assert_same_bytes(tmp_path / "cache", undisturbed_cache)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "log"]  # no credentials are left


def test_a_recipe_runs_as_batch_jobs_to_its_end(slurm: Slurm, tmp_path):
    """Figure 5 in miniature: a city, two builds, a training and its pictures."""
    site, out = tmp_path / "site.toml", tmp_path / "out"
    site.write_text(SITE.format(nodes=1, gpus=0))
    arguments = ["fig5", "--out", str(out)]
    result = CliRunner().invoke(recipes, ["run", *arguments, "--miniature", "--slurm", "--site", str(site)])
    assert result.exit_code == 0, result.output
    for job in queued_jobs(out / "slurm").values():
        assert slurm.wait_for(job) == "COMPLETED", log_of(out, "*")
    status = CliRunner().invoke(recipes, ["status", *arguments]).output
    assert "5 of 5 steps finished" in status
