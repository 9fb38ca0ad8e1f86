"""The batch jobs of a step, as scripts: one of each step, and for a build also one that plans it and an array that builds shards.

job.sh is the template. The script NAME.sh of a step NAME runs its commands, and creates its file `done`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.slurm.site import Resources
from pipelines.steps import Step

# torchrun passes on only signals that it is told to, and kills its processes 30 s later unless it is told to wait. Slurm limits the time.
_TORCHRUN = "-m torch.distributed.run --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=600"


@dataclass(frozen=True)
class Job:
    """A script, and the names of the jobs that must have succeeded before."""

    name: str
    script: str
    after: tuple[str, ...]


def jobs_of(step: Step, resources: Resources, folder: Path) -> list[Job]:
    """The jobs of a step, in order; the last one has the step's name. folder: of scripts and logs, an absolute path.

    A build is planned first, so that the data set's tables are read once. After its array, the build's own command checks that all
    shards are there, and fails as a build does if keyframes were skipped.
    """
    if step.kind != "build":
        return [_step_job(step, resources, folder, step.after)]
    build, tasks = _python(_without_workers(step.commands[0])), resources.shards
    plan, shards = f"{step.name}-plan", f"{step.name}-shards"
    line = f"{build} --shard $SLURM_ARRAY_TASK_ID/{tasks}"
    return [
        Job(plan, _script(plan, [f"{build} --plan-only"], step, resources, folder), step.after),
        Job(shards, _script(shards, [line], step, resources, folder, array=f"0-{tasks - 1}"), (plan,)),
        _step_job(step, resources, folder, (shards,)),
    ]


def _step_job(step: Step, resources: Resources, folder: Path, after: tuple[str, ...]) -> Job:
    lines = [_training(command, resources) if _is_training(command) else _python(command) for command in step.commands]
    return Job(step.name, _script(step.name, lines, step, resources, folder, done=step.done), after)


def _script(
    name: str, commands: Sequence[str], step: Step, resources: Resources, folder: Path, *, array: str = "", done: Path | None = None
) -> str:  # fmt: skip
    # Others that need more than their time would begin again and again.
    stops = step.kind in ("build", "train")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("job.sh").render(
        name=name,
        folder=shlex.quote(str(Path.cwd())),
        log=shlex.quote(str(folder / f"{name}.{'%A_%a' if array else '%j'}.log")),
        options=[*["--requeue", "--signal=B:USR1@90"] * stops, *[f"--array={array}"] * bool(array), *resources.options],
        setup=resources.setup,
        stops=stops,
        commands=commands,
        done="" if done is None else shlex.quote(str(done.absolute())),
        done_folder="" if done is None else shlex.quote(str(done.absolute().parent)),
    )


def _without_workers(command: Sequence[str]) -> Sequence[str]:
    """A build without --workers: the tasks of an array are its workers."""
    if "--workers" not in command:
        return command
    index = command.index("--workers")
    return [*command[:index], *command[index + 2 :]]


def _is_training(command: Sequence[str]) -> bool:
    return command[0] == "occfeat_train" and command[1] in ("pretrain", "finetune")


def _python(command: Sequence[str]) -> str:
    return f"{shlex.quote(sys.executable)} -m {shlex.join(command)}"


def _training(command: Sequence[str], resources: Resources) -> str:
    """One process, or one for each GPU of each node under torchrun, which srun starts once on each node."""
    if resources.nodes * resources.processes == 1:
        return _python(command)
    if resources.nodes == 1:
        where = "--standalone --local-addr=127.0.0.1"
    else:  # the batch script, which fills in hostname, runs on the first node
        where = (
            f'--nnodes={resources.nodes} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" '
            '--rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"'
        )
    # Since Slurm 22.05, srun does not take over --cpus-per-task. Without --kill-on-bad-exit, nodes would wait for one that has failed.
    srun = f"srun --cpus-per-task={resources.cpus} --kill-on-bad-exit=1 {shlex.quote(sys.executable)}"
    return f"{srun} {_TORCHRUN} {where} --nproc-per-node={resources.processes} -m {shlex.join(command)}"
