"""kill -9 at any moment costs time and nothing else."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest

from tests.targets.command_line import COMMAND, assert_same_bytes, build_arguments, run, run_apart


def processes_below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a build and everything it started, as a cluster's walltime does."""
    for victim in [*processes_below(process.pid), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.wait()


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_build_killed_at_random_moments_resumes_to_the_same_bytes(city, tiny_teacher, tmp_path, expected, workers):
    """Ten kills in all: five of a serial build, five of one with workers; a kill falls anywhere, writing included."""
    arguments = build_arguments(city, tmp_path, tiny_teacher, "--workers", workers, "--frames", "both")
    started = time.monotonic()
    scratch = tmp_path / "scratch"
    run_apart(*build_arguments(city, scratch, tiny_teacher, "--workers", workers, "--frames", "both"))
    duration = time.monotonic() - started
    shutil.rmtree(scratch)
    random = np.random.default_rng(int(workers))
    for kill in range(5):
        process = start(arguments)
        time.sleep(random.uniform(0.4, 1.0) * duration)
        kill_all(process)
        if kill % 2:  # what a killed writer leaves, in case no kill fell into a write
            for record in list((tmp_path / "mini_train.zarr" / "progress").glob("0000[0-9].json"))[:1]:
                record.unlink()
    run_apart(*arguments)
    assert_same_bytes(tmp_path, expected)
    assert run("verify", "--cache", tmp_path, "--split", "mini_train", "--samples", "0").returncode == 0


def test_a_killed_worker_does_not_stop_the_build(city, tiny_teacher, tmp_path, expected):
    process = start(build_arguments(city, tmp_path, tiny_teacher, "--workers", "2", "--frames", "both"))
    killed = 0
    random = np.random.default_rng(5)
    while process.poll() is None and killed < 3:
        workers = [p for p in processes_below(process.pid) if p.is_running() and _is_dask_worker(p)]
        finished = len(list((tmp_path / "mini_train.zarr" / "progress").glob("0000[0-9].json")))
        if workers and finished >= killed:
            time.sleep(random.uniform(0, 1.5))
            with suppress(psutil.NoSuchProcess):
                workers[killed % len(workers)].send_signal(signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    assert process.wait(300) == 0
    assert killed >= 1
    assert_same_bytes(tmp_path, expected)


def _is_dask_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def test_a_local_cluster_listens_on_loopback_only(city, tiny_teacher, tmp_path):
    process = start(build_arguments(city, tmp_path, tiny_teacher, "--workers", "2"))
    seen = set()
    while process.poll() is None:
        for p in [*processes_below(process.pid), psutil.Process(process.pid)]:
            with suppress(psutil.Error):
                seen |= {c.laddr.ip for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        time.sleep(0.02)
    assert process.returncode == 0
    assert seen == {"127.0.0.1"}
