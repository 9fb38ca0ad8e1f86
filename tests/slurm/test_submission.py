"""Submission of the jobs of a recipe and of single commands, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipelines.__main__ import main as recipes
from pipelines.slurm.__main__ import main
from pipelines.slurm.site import DEFAULTS
from pipelines.slurm.submit import run_on_slurm
from pipelines.steps import Step
from tests.slurm.steps import BUILD, EVALUATE, TRAIN, program, step


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """A folder with sbatch, which writes its arguments to `calls` and counts jobs, and squeue, which prints `queue`."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    (folder / "queue").touch()
    program(folder, "sbatch", f"echo $* >> {folder}/calls; echo $((100 + $(wc -l < {folder}/calls)))")
    program(folder, "squeue", f"cat {folder}/queue")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def recipe(folder: Path) -> list[Step]:
    return [
        step("t", BUILD, folder, "build"),
        step("p", TRAIN, folder, "train", "t"),
        step("e", EVALUATE, folder, "evaluate", "p", "t"),
    ]


def test_jobs_wait_for_those_that_they_need(tmp_path, stand_ins):
    run_on_slurm(recipe(tmp_path), DEFAULTS, tmp_path)
    after, folder = "--kill-on-invalid-dep=yes", tmp_path / "slurm"
    assert (stand_ins / "calls").read_text().splitlines() == [
        f"--parsable {folder}/t-plan.sh",
        f"--parsable --dependency=afterok:101 {after} {folder}/t-shards.sh",
        f"--parsable --dependency=afterok:102 {after} {folder}/t.sh",
        f"--parsable --dependency=afterok:103 {after} {folder}/p.sh",
        f"--parsable --dependency=afterok:104:103 {after} {folder}/e.sh",
    ]


def test_finished_steps_and_jobs_in_the_queue_are_not_submitted_again(tmp_path, stand_ins, capsys):
    steps, folder = recipe(tmp_path), tmp_path / "slurm"
    steps[0].done.parent.mkdir(parents=True, exist_ok=True)
    steps[0].done.touch()
    (stand_ins / "queue").write_text(f"55 {folder}/p.sh\n56 /elsewhere/slurm/e.sh\n")
    run_on_slurm(steps, DEFAULTS, tmp_path)
    assert (stand_ins / "calls").read_text() == (
        f"--parsable --dependency=afterok:55 --kill-on-invalid-dep=yes {folder}/e.sh\n"
    )
    assert "3 steps, 1 finished, 1 in the queue; 1 job to submit" in capsys.readouterr().out
    (stand_ins / "queue").write_text(f"55 {folder}/p.sh\n57 {folder}/e.sh\n")
    run_on_slurm(steps, DEFAULTS, tmp_path)
    assert len((stand_ins / "calls").read_text().splitlines()) == 1


def test_the_part_of_a_build_after_what_is_in_the_queue_is_submitted(tmp_path, stand_ins):
    (stand_ins / "queue").write_text(f"55 {tmp_path}/slurm/t-shards.sh\n")
    run_on_slurm(recipe(tmp_path)[:1], DEFAULTS, tmp_path)
    assert (stand_ins / "calls").read_text() == (
        f"--parsable --dependency=afterok:55 --kill-on-invalid-dep=yes {tmp_path}/slurm/t.sh\n"
    )


def test_a_refused_job_is_an_error_that_says_what_to_do(tmp_path, stand_ins):
    program(stand_ins, "sbatch", "echo 'invalid partition' >&2; exit 1")
    with pytest.raises(ValueError, match=r"Slurm refused a job, see above: correct the site file"):
        run_on_slurm(recipe(tmp_path), DEFAULTS, tmp_path)


def command_line(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_one_command_is_submitted_as_a_job(tmp_path, stand_ins):
    assert command_line("p", "--out", tmp_path, "--", *TRAIN).exit_code == 0
    assert (stand_ins / "calls").read_text() == f"--parsable {tmp_path}/slurm/p.sh\n"
    assert "--requeue" in (tmp_path / "slurm" / "p.sh").read_text()
    (tmp_path / "slurm" / "p.done").touch()
    again = command_line("p", "--out", tmp_path, "--", *EVALUATE)
    assert again.exit_code == 1 and "p has finished" in again.output and "pass another NAME, or delete" in again.output


def test_printed_scripts_are_written_but_not_submitted_and_need_no_slurm(tmp_path, monkeypatch):
    (tmp_path / "site.toml").write_text("[build]\nshards = 7\n")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        result = command_line("t", "--out", tmp_path, "--site", tmp_path / "site.toml", "--print", "--", *BUILD)
        missing = command_line("t", "--out", tmp_path, "--", *BUILD)
    assert result.exit_code == 0
    for name in ("t-plan", "t-shards", "t", "submit"):
        assert (tmp_path / "slurm" / f"{name}.sh").read_text() in result.output
    assert "--array=0-6" in result.output
    assert (
        missing.exit_code == 1
        and "run this on a machine from which jobs are submitted, or pass --print" in missing.output
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["a/b", "--", *TRAIN], "NAME is 'a/b': letters, digits and ._- are expected"),
        (["p", "--", "ls"], "'ls': occfeat_targets or occfeat_train and its command are expected"),
        (["p", "--", "occfeat_train", "pretrian"], "occfeat_train has no command 'pretrian': did you mean pretrain?"),
    ],
)
def test_a_wrong_command_line_says_what_is_expected(arguments, error):
    result = command_line(*arguments)
    assert result.exit_code == 2 and error in result.output.replace("\n", " ")


def test_a_recipe_is_submitted_as_jobs_and_its_status_names_their_logs(tmp_path, stand_ins):
    out = tmp_path / "out"
    arguments = ["run", "demo", "--miniature", "--out", str(out)]
    refused = CliRunner().invoke(recipes, [*arguments, "--print"])
    assert refused.exit_code == 2 and "--site and --print are about batch jobs: add --slurm" in refused.output
    printed = CliRunner().invoke(recipes, [*arguments, "--slurm", "--print"])
    assert printed.exit_code == 0 and "#SBATCH --array=0-19" in printed.output
    assert not (stand_ins / "calls").exists()
    assert CliRunner().invoke(recipes, [*arguments, "--slurm"]).exit_code == 0
    calls = (stand_ins / "calls").read_text().splitlines()
    scripts = {*(out / "slurm").glob("*.sh")} - {out / "slurm" / "submit.sh"}
    assert len(calls) == len(scripts) > 3 and all(f"#SBATCH --job-name={s.stem}\n" in s.read_text() for s in scripts)
    log = out / "slurm" / "city.101.log"
    log.touch()
    assert f"begun, see {log}" in CliRunner().invoke(recipes, ["status", "demo", "--out", str(out)]).output
