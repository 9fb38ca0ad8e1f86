"""A build on a Dask cluster inside one allocation of Slurm: srun python -m pipelines.slurm.allocation [OPTIONS OF A BUILD].

dask-jobqueue's SLURMRunner gives each task of srun its role: task 0 is the scheduler, task 1 the build, all others are workers. They talk
over TLS: others on the cluster could otherwise run code on the workers as this user. Task 0 makes the credentials, and the others read
them from a folder of the working directory that only this user may open. The build deletes it at its end.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

# Set before distributed is imported, here and by workers. They end with tracebacks; the build itself reports errors of shards.
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")

import dask
from distributed import Security
from distributed.core import rpc

from occfeat_targets.build.cluster import WORKER_SETTINGS
from occfeat_targets.cache.records import write_file
from occfeat_targets.cli import main
from occfeat_targets.common.command_line import reports_errors

# Name in distributed's config -> attribute of Security.
_TLS = {
    "ca-file": "tls_ca_file",
    **{
        f"{role}.{part}": f"tls_{role}_{part}" for role in ("scheduler", "worker", "client") for part in ("key", "cert")
    },
}
_PATIENCE = 300.0  # seconds in which task 0 must start


def share_credentials(folder: Path, *, make: bool) -> dict[str, str]:
    """Settings of distributed with the credentials in a folder, which one process makes. Raises ValueError if none does."""
    file = folder / "tls.json"
    if make:
        folder.mkdir(mode=0o700)
        credentials = Security.temporary()
        write_file(file, json.dumps({key: getattr(credentials, name) for key, name in _TLS.items()}).encode())
    end = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            raise ValueError(
                f"{file.absolute()} is missing after {_PATIENCE:g} s: start the job in a directory that all its nodes share"
            )
        time.sleep(0.1)
    return {f"distributed.comm.tls.{key}": value for key, value in json.loads(file.read_text()).items()}


@reports_errors("targets,cluster")
def run_task(arguments: list[str]) -> None:
    """Play the role of this task of srun. Exits as the build does."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "0")) < 3:
        raise ValueError(
            "at least three tasks of srun are expected, a scheduler, the build and a worker: srun python -m pipelines.slurm.allocation ..."
        )
    from dask_jobqueue.slurm import SLURMRunner

    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    folder = Path(".dask-" + "-".join(os.environ.get(name, "0") for name in names))
    security = share_credentials(folder, make=os.environ.get("SLURM_PROCID") == "0")
    with dask.config.set({**WORKER_SETTINGS, **security, "distributed.comm.require-encryption": True}):
        runner = SLURMRunner(
            scheduler_file=str(folder / "scheduler.json"),
            scheduler_options={"protocol": "tls://", "dashboard": False},
            worker_class="distributed.Nanny",
            worker_options={"nthreads": 1, "memory_limit": 0},
        )
        # Only the task of the build comes here. The runner's own connection, with which it ends the scheduler, has no credentials.
        address = runner.scheduler_address
        runner.scheduler_comm = rpc(address, connection_args=Security().get_connection_args("client"))  # type: ignore[assignment]
        try:
            with runner:
                main(["build", *arguments, "--scheduler", address])
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run_task(sys.argv[1:])
