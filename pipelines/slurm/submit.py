"""Writing the scripts of a recipe's jobs, and submitting them with Slurm's own dependencies.

submit.sh, beside the scripts, submits them: it can be read, edited and run again like them.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from pipelines.slurm.jobs import Job, jobs_of
from pipelines.slurm.site import Resources
from pipelines.steps import Kind, Step


def run_on_slurm(steps: Sequence[Step], site: Mapping[Kind, Resources], out: Path, *, print_only: bool = False) -> None:
    """Submit the jobs of all steps that are neither finished nor in Slurm's queue. Their scripts are written to out/slurm.

    print_only: print the scripts, and submit nothing. Raises ValueError if there is no Slurm here, or if it refuses a job; those
    before it are submitted.
    """
    folder = (out / "slurm").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    left = [step for step in steps if not step.is_finished]
    queued = {} if print_only else queued_jobs(folder)
    jobs = [job for step in left for job in not_queued(jobs_of(step, site[step.kind], folder), queued)]
    submission = folder / "submit.sh"
    scripts = {folder / f"{job.name}.sh": job.script for job in jobs} | {
        submission: submission_script(jobs, queued, folder)
    }
    for file, text in scripts.items():
        write_file(file, text.encode())
    waiting = sum(step.name in queued for step in left)
    echo(
        f"{count(len(steps), 'step')}, {len(steps) - len(left)} finished, {waiting} in the queue; {count(len(jobs), 'job')} to submit; "
        f"scripts and logs are in {folder}"
    )
    if print_only:
        for file, text in scripts.items():
            echo(f"\n# {file}\n{text}")
    elif jobs and subprocess.run(["bash", str(submission)], check=False).returncode:
        raise ValueError(
            f"Slurm refused a job, see above: correct the site file or {folder}, and run the same command again, which submits only jobs "
            "that are not in the queue"
        )


def not_queued(jobs: Sequence[Job], queued: Mapping[str, str]) -> list[Job]:
    """The jobs of a step after the last one that is in the queue."""
    last = max((index for index, job in enumerate(jobs) if job.name in queued), default=-1)
    return list(jobs[last + 1 :])


def queued_jobs(folder: Path) -> dict[str, str]:
    """{job name: id} of jobs that were submitted from a folder of scripts, and still wait or run. Raises ValueError without Slurm."""
    command = ["squeue", "--me", "--noheader", "--format=%F %o"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as err:
        told = err.stderr.strip() if isinstance(err, subprocess.CalledProcessError) else str(err)
        raise ValueError(
            f"'{shlex.join(command)}' failed ({told}): run this on a machine from which jobs are submitted, or pass --print to only "
            "write the scripts"
        ) from err
    jobs = (line.strip().split(" ", 1) for line in lines)
    return {Path(script).stem: number for number, script in jobs if Path(script).parent == folder}


def submission_script(jobs: Sequence[Job], queued: Mapping[str, str], folder: Path) -> str:
    """The text of submit.sh: one sbatch for each job, which begins when those that it needs have succeeded."""
    lines = ["#!/bin/bash", "# A job whose dependency has failed is cancelled.", "set -euo pipefail", "declare -A job"]
    known = {job.name for job in jobs} | set(queued)
    for name in dict.fromkeys(name for job in jobs for name in job.after if name in queued):
        lines.append(f"job[{name}]={queued[name]}  # in the queue already")
    for job in jobs:
        needed = "".join(f":${{job[{name}]}}" for name in job.after if name in known)
        options = f"--dependency=afterok{needed} --kill-on-invalid-dep=yes " if needed else ""
        lines += [
            f"job[{job.name}]=$(sbatch --parsable {options}{shlex.quote(str(folder / f'{job.name}.sh'))})",
            f'echo "{job.name}: job ${{job[{job.name}]}}"',
        ]
    return "\n".join([*lines, ""])
