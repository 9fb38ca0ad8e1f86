"""Site files, and the scripts of batch jobs: their commands, and what they do with signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipelines.slurm.jobs import jobs_of
from pipelines.slurm.site import DEFAULTS, Resources, read_site
from pipelines.steps import Kind
from tests.conftest import REPOSITORY
from tests.slurm.steps import BUILD, EVALUATE, TRAIN, program, step


def read(folder: Path, **tables: str) -> dict[Kind, Resources]:
    file = folder / "site.toml"
    file.write_text("\n".join([tables.pop("top", ""), *(f"[{name}]\n{text}" for name, text in tables.items())]))
    return read_site(file)


def last_lines(script: str) -> list[str]:
    """The commands of a script."""
    return [line.removeprefix("run ") for line in script.splitlines() if " -m " in line]


def test_the_example_of_a_site_file_has_the_defaults_and_a_place_for_partition_and_account():
    for kind, given in read_site(REPOSITORY / "pipelines" / "slurm" / "site.toml").items():
        assert {*given.options} - {*DEFAULTS[kind].options} == {
            f"--partition={'gpu' if given.gpus else 'cpu'}",
            "--account=project",
        }
        assert given.shards == DEFAULTS[kind].shards


def test_a_site_file_changes_all_jobs_or_those_of_a_kind(tmp_path):
    site = read(tmp_path, top='account = "a"\ncpus = 3\nsbatch = ["--qos=long"]', train="cpus = 5\ngpus = 4\nnodes = 2")
    assert "--account=a" in site["cpu"].options and "--cpus-per-task=3" in site["cpu"].options
    assert {"--cpus-per-task=5", "--gres=gpu:4", "--nodes=2"} <= {*site["train"].options}
    assert all(
        given.options[-1] == "--qos=long" for given in site.values()
    )  # the last of two values of an option counts


@pytest.mark.parametrize(
    ("tables", "error"),
    [
        ({"top": "walltime = 3"}, "walltime is unknown; expected are time, cpus, memory,"),
        ({"train": "gpus = -1"}, "gpus = -1, but a whole number of at least 0 is expected"),
        ({"build": "shards = 0"}, "shards = 0, but a whole number of at least 1 is expected"),
        ({"top": "time = 60"}, "time = 60, but a string is expected"),
        ({"top": 'setup = "module load x"'}, "setup = 'module load x', but a list of strings is expected"),
        ({"top": "gpus = 4"}, r"4 GPUs for \[build\], which uses one node and at most one GPU: put nodes and gpus"),
        ({"top": "="}, "cannot be read"),
    ],
)
def test_a_wrong_entry_of_a_site_file_is_refused_with_what_is_expected(tmp_path, tables, error):
    with pytest.raises(ValueError, match=error):
        read(tmp_path, **tables)


def test_a_build_is_planned_then_built_by_an_array_and_then_checked(tmp_path):
    plan, shards, check = jobs_of(
        step("t", BUILD, tmp_path, "build", "city"), read(tmp_path, build="shards = 7")["build"], tmp_path
    )
    assert [(job.name, job.after) for job in (plan, shards, check)] == [
        ("t-plan", ("city",)), ("t-shards", ("t-plan",)), ("t", ("t-shards",)),
    ]  # fmt: skip
    assert last_lines(plan.script)[-1].endswith("-m occfeat_targets build --split train --plan-only")
    assert last_lines(shards.script)[-1].endswith("build --split train --shard $SLURM_ARRAY_TASK_ID/7")
    assert "#SBATCH --array=0-6\n" in shards.script and "--array" not in plan.script + check.script
    assert last_lines(check.script)[-1].endswith("build --split train")
    assert check.script.endswith(f"touch {tmp_path / 't.done'}\n") and "touch" not in plan.script + shards.script


def test_the_tasks_of_an_array_are_the_workers_of_a_build(tmp_path):
    command = (*BUILD, "--workers", "3", "--rays")
    plan, shards, check = jobs_of(step("t", command, tmp_path, "build"), DEFAULTS["build"], tmp_path)
    assert last_lines(plan.script)[-1].endswith("--split train --rays --plan-only")
    assert last_lines(shards.script)[-1].endswith("--split train --rays --shard $SLURM_ARRAY_TASK_ID/20")
    assert last_lines(check.script)[-1].endswith("--split train --workers 3 --rays")


def test_a_training_runs_once_for_each_gpu_of_each_node(tmp_path):
    training = step("p", TRAIN, tmp_path, "train")
    for tables, expected in [
        ("gpus = 1", []),
        ("gpus = 4", ["srun", "--standalone", "--nproc-per-node=4"]),
        ("gpus = 4\nnodes = 2", ["srun", "--nnodes=2", '--rdzv-endpoint="$(hostname):', "--nproc-per-node=4"]),
    ]:
        (job,) = jobs_of(training, read(tmp_path, train=tables)["train"], tmp_path)
        (line,) = last_lines(job.script)
        assert line.endswith("-m occfeat_train pretrain --out 'a run'")
        assert all(f" {word}" in f" {line}" for word in expected) and ("srun" in line) == bool(expected)
        assert "SIGUSR1" in line or not expected  # torchrun passes it on


def test_only_jobs_that_can_continue_are_requeued(tmp_path):
    for kind, command in (("build", BUILD), ("train", TRAIN), ("evaluate", EVALUATE), ("cpu", EVALUATE)):
        (*_, job) = jobs_of(step("s", command, tmp_path, kind), DEFAULTS[kind], tmp_path)
        assert ("--requeue" in job.script) == ("--signal=B:USR1@90" in job.script) == (kind in ("build", "train"))
        assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0


def test_lines_of_setup_run_before_the_commands_in_the_folder_of_the_submission(tmp_path):
    resources = read(tmp_path, top='setup = ["module load cuda"]')["cpu"]
    (job,) = jobs_of(step("s", EVALUATE, tmp_path, "cpu"), resources, tmp_path)
    assert job.script.index("module load cuda") < job.script.index("evaluate")
    assert f"#SBATCH --chdir={Path.cwd()}\n" in job.script


@contextmanager
def started_job(folder: Path, train: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Start the script of a training, with stand-ins for Python and scontrol, when the former has started."""
    monkeypatch.setattr("sys.executable", "python")
    program(folder, "python", train)
    program(folder, "scontrol", f"echo $* > {folder}/requeued")
    (job,) = jobs_of(step("p", TRAIN, folder, "train"), DEFAULTS["train"], folder)
    (folder / "p.sh").write_text(job.script)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    (folder / "started").unlink(missing_ok=True)
    process = subprocess.Popen(["bash", folder / "p.sh"], cwd=folder, env=environment, start_new_session=True)
    try:
        while not (folder / "started").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


LOOP = "touch started\nwhile true; do sleep 0.05; done"


def test_the_signal_before_the_time_limit_is_passed_on_and_the_job_is_requeued(tmp_path, monkeypatch):
    with started_job(tmp_path, f"trap 'sleep 0.2; touch saved; exit 3' USR1\n{LOOP}", monkeypatch) as job:
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 3
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert not (tmp_path / "p.done").exists()


def test_a_job_that_fails_or_finishes_is_not_requeued(tmp_path, monkeypatch):
    for code in (1, 0):
        with started_job(tmp_path, f"touch started\nsleep 0.1\nexit {code}", monkeypatch) as job:
            assert job.wait(timeout=60) == code
        assert not (tmp_path / "requeued").exists()
        assert (tmp_path / "p.done").exists() == (code == 0)


def test_a_training_that_finishes_in_spite_of_the_signal_is_finished(tmp_path, monkeypatch):
    with started_job(tmp_path, f"trap 'exit 0' USR1\n{LOOP}", monkeypatch) as job:
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0
    assert (tmp_path / "p.done").exists() and not (tmp_path / "requeued").exists()


def test_a_cancelled_job_waits_until_its_training_has_saved_and_is_not_requeued(tmp_path, monkeypatch):
    """scancel sends SIGTERM to all processes of a job."""
    with started_job(
        tmp_path, f"trap 'sleep 0.2; touch saved; exit 3' TERM\necho $$ > pid\n{LOOP}", monkeypatch
    ) as job:
        job.send_signal(signal.SIGTERM)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert job.wait(timeout=60) == 3
    assert (tmp_path / "saved").exists() and not (tmp_path / "requeued").exists()
