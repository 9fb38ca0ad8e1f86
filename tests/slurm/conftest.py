"""A real Slurm, started for the tests."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE = 600  # seconds until a test gives up


@dataclass(frozen=True)
class Slurm:
    """The commands of the tests' own Slurm. SLURM_CONF names it."""

    def call(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState; of the first task of an array."""
        words = self.call("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def ids(self, folder: Path) -> dict[str, str]:
        """{job name: id of the newest} of all jobs that were submitted from a folder of scripts, in any state."""
        lines = self.call("squeue", "--states=all", "--noheader", "--sort=i", "--format=%F %o").splitlines()
        jobs = (line.strip().split(" ", 1) for line in lines)
        return {Path(script).stem: number for number, script in jobs if Path(script).parent == folder}

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.call('squeue', '--states=all')}"
            time.sleep(0.1)

    def wait_for(self, job: str) -> str:
        """The state in which a job ends."""
        active = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
        self.wait_until(lambda: self.field(job, "JobState") not in active, f"job {job} does not end")
        return self.field(job, "JobState")

    def begin_again_now(self, job: str) -> None:
        """A requeued job begins soon, instead of after the two minutes that Slurm waits. A node refuses it in the second of its end."""
        self.wait_until(lambda: self.field(job, "JobState") == "PENDING", f"job {job} is not requeued")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Slurm with two nodes, both this machine."""
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs Slurm ({', '.join(missing)} not found): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield Slurm()
    subprocess.run([SCRIPT, "stop", folder], check=True)
