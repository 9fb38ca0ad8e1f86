"""A build killed with SIGKILL at any moment resumes to the same bytes. OCCFEAT_KILLS sets the number of kills."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.targets.command_line import COMMAND, assert_same_bytes, build_arguments, run, run_in_subprocess

KILLS = int(os.environ.get("OCCFEAT_KILLS", "3"))


def processes_below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a build and all of its child processes, as a cluster does at the walltime limit."""
    for victim in processes_below(process.pid):
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()


def finished_shards(cache: Path) -> int:
    return len(list((cache / "mini_train.zarr" / "progress").glob("0000[0-9].json")))


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_build_killed_at_random_moments_resumes_to_the_same_bytes(city, tiny_teacher, tmp_path, expected, workers):
    """Each kill comes shortly after the cache was created, or after up to two more shards were finished."""
    arguments = build_arguments(city, tmp_path, tiny_teacher, "--workers", workers, "--frames", "both")
    random = np.random.default_rng(int(workers))
    killed = 0
    for kill in range(KILLS):
        awaited = finished_shards(tmp_path) + kill % 3
        process = start(arguments)
        while process.poll() is None:
            if (tmp_path / "mini_train.zarr").exists() and finished_shards(tmp_path) >= awaited:
                time.sleep(random.uniform(0, 0.3))
                kill_all(process)
            time.sleep(0.005)
        killed += process.returncode == -signal.SIGKILL
        if kill % 2:  # the state after a kill during a write, in case no kill came during one
            for record in list((tmp_path / "mini_train.zarr" / "progress").glob("0000[0-9].json"))[:1]:
                record.unlink()
    assert killed >= 1
    run_in_subprocess(*arguments)
    assert_same_bytes(tmp_path, expected)
    assert run("verify", "--cache", tmp_path, "--split", "mini_train", "--samples", "0").returncode == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_ends_a_build_with_one_line_that_says_how_to_continue(city, tiny_teacher, tmp_path, workers):
    """A terminal sends it to all processes of the build."""
    options = ["--workers", workers, "--frames", "both", "--shard-size", "1"]
    arguments = build_arguments(city, tmp_path, tiny_teacher, *options)
    with subprocess.Popen(
        ["env", "--default-signal=INT", *COMMAND, *arguments],  # a shell ignores it in programs in the background
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        while not finished_shards(tmp_path):
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    # Python's tracker of semaphores may add a warning
    assert "\ninterrupted: finished shards are kept; run the same command again to continue\n" in output
    assert "Traceback" not in output


def test_killed_workers_do_not_stop_the_build(city, tiny_teacher, tmp_path, expected):
    """Workers are killed one at a time, a random time after a shard was finished. Their shards are built again.

    Three at most in one build, because Dask gives up on a task whose workers died four times.
    """
    random = np.random.default_rng(5)
    killed = 0
    for attempt in range(KILLS):
        cache = tmp_path / str(attempt)
        process = start(
            build_arguments(city, cache, tiny_teacher, "--workers", "2", "--frames", "both", "--shard-size", "1")
        )
        killed_here = 0
        while process.poll() is None and killed_here < 3:
            workers = [p for p in processes_below(process.pid) if _is_dask_worker(p)]
            if workers and finished_shards(cache) >= max(1, 2 * killed_here):
                time.sleep(random.uniform(0, 0.3))
                with suppress(psutil.NoSuchProcess):
                    workers[killed_here % len(workers)].send_signal(signal.SIGKILL)
                    killed_here += 1
            time.sleep(0.02)
        assert process.wait(300) == 0
        assert killed_here >= 1
        assert_same_bytes(cache, expected)
        killed += killed_here
        if killed >= KILLS:
            break
    assert killed >= KILLS


def _is_dask_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def test_two_local_workers_build_the_same_bytes_and_listen_on_loopback_only(city, tiny_teacher, tmp_path, expected):
    process = start(build_arguments(city, tmp_path, tiny_teacher, "--workers", "2", "--frames", "both"))
    seen = set()
    while process.poll() is None:
        for p in [*processes_below(process.pid), psutil.Process(process.pid)]:
            with suppress(psutil.Error):
                seen |= {c.laddr.ip for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        time.sleep(0.1)
    assert process.returncode == 0
    assert seen == {"127.0.0.1"}
    assert_same_bytes(tmp_path, expected)
