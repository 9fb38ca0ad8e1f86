"""The build on a Dask cluster whose workers come and go. Most clusters are in this process, and tasks are plain functions."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import dask
import pytest
from distributed import Client, LocalCluster, Security, get_worker

from occfeat_targets.build import cluster as module
from occfeat_targets.build.cluster import ask_worker, read_scheduler_file, run_on_dask
from occfeat_targets.build.shard import ShardReport
from tests.targets.command_line import build_arguments, run

PATIENCE = 120  # seconds until a test gives up
# Tasks are pickled, so what they share is global.
MEETING = threading.Barrier(5)
RELEASED = threading.Event()


@contextmanager
def cluster(workers: int) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=workers, processes=False, threads_per_worker=1, protocol="tcp", dashboard_address="127.0.0.1:0",
        memory_limit=0,
    ) as made:  # fmt: skip
        yield made


def build_at_once(shard: int) -> ShardReport:
    return ShardReport(shard, 1)


def meet_the_others(shard: int) -> ShardReport:
    MEETING.wait(PATIENCE)
    return ShardReport(shard, 1)


def fail_first(shard: int) -> ShardReport:
    if shard > 0:
        assert RELEASED.wait(PATIENCE)
    return ShardReport(shard, 1, error="broken" if shard == 0 else None)


def test_a_process_builds_with_local_workers_more_than_once(tmp_path):
    """As for several corrupted caches. In a process of its own, because the tests have imported distributed."""
    script = tmp_path / "twice.py"
    script.write_text(
        "from occfeat_targets.build.cluster import run_on_dask\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        "        assert list(run_on_dask((), print, lambda: True, workers=1)) == []\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_local_cluster_refuses_clients_without_its_own_credentials():
    """A client may run any code on the workers."""
    with module._local_client(1) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        for stranger, security in [(address.replace("tls:", "tcp:"), None), (address, Security.temporary())]:
            with pytest.raises(OSError):
                Client(stranger, timeout="1s", security=security)
        assert client.submit(int, "7").result() == 7


def test_an_address_with_tls_needs_credentials():
    with pytest.raises(
        ValueError, match=r"no Dask scheduler answers at tls://127.0.0.1:9 .*check your TLS configuration"
    ):
        list(run_on_dask((0, 1), int, lambda: True, scheduler="tls://127.0.0.1:9"))


def test_local_workers_without_the_package_of_tls_are_refused_with_the_remedy(monkeypatch):
    def refuse(**_):
        raise ImportError("Using `Security.temporary` requires `cryptography`")

    monkeypatch.setattr("distributed.LocalCluster", refuse)
    with pytest.raises(
        ValueError, match=r"install it with pip install -e '\.\[targets\]' in the repository, or use --workers 0"
    ):
        list(run_on_dask((0, 1), int, lambda: True, workers=2))


def assert_all_built(reports, count):
    assert sorted(report.shard for report in reports) == list(range(count))
    assert not any(report.error for report in reports)


def test_an_adaptive_cluster_without_workers_starts_them(monkeypatch):
    monkeypatch.setattr(module, "build_shard", build_at_once)
    with cluster(0) as made:
        made.adapt(minimum=0, maximum=2, interval="100 ms")
        reports = list(run_on_dask(tuple(range(40)), int, lambda: True, scheduler=made.scheduler_address))
    assert_all_built(reports, 40)


def test_a_build_does_not_become_the_default_of_the_process(monkeypatch):
    """Otherwise other uses of Dask in this process would run on the cluster, and fail once its scheduler is lost."""
    monkeypatch.setattr(module, "build_shard", build_at_once)
    with cluster(1) as made:
        for _ in run_on_dask((0, 1), int, lambda: True, scheduler=made.scheduler_address):
            assert dask.config.get("scheduler", None) is None


def test_workers_that_join_later_get_tasks_before_any_is_finished(monkeypatch):
    """Five tasks finish only when five workers have one at the same time. At the start there is one worker."""
    monkeypatch.setattr(module, "build_shard", meet_the_others)
    monkeypatch.setattr(module, "_AHEAD", 1)
    monkeypatch.setattr(module, "_TOP_UP_SECONDS", 0.1)
    with cluster(1) as made:
        threading.Timer(1, made.scale, [5]).start()
        reports = list(run_on_dask(tuple(range(5)), int, lambda: True, scheduler=made.scheduler_address))
    assert_all_built(reports, 5)


def test_a_worker_is_asked_even_if_it_joins_later():
    """As for the type in which it computes fastest, before a cache is created."""
    with cluster(0) as made:
        threading.Timer(0.5, made.scale, [1]).start()
        assert ask_worker(made.scheduler_address, name_of_worker, "worker") == "worker 0"


def name_of_worker(prefix: str) -> str:
    return f"{prefix} {get_worker().name}"


def test_a_build_waits_for_workers_and_says_so_once(monkeypatch):
    monkeypatch.setattr(module, "build_shard", build_at_once)
    monkeypatch.setattr(module, "_TOP_UP_SECONDS", 0.1)
    monkeypatch.setattr(module, "_NOTICE_SECONDS", 0.2)
    lines: list[str] = []
    with cluster(0) as made:

        def start_one(line: str) -> None:
            lines.append(line)
            threading.Timer(1, made.scale, [1]).start()

        address = made.scheduler_address
        reports = list(run_on_dask((0, 1), int, lambda: True, scheduler=address, print_line=start_one))
    assert len(reports) == 2
    assert lines == [
        f"the Dask scheduler at {address} has no workers, and the build waits for some: "
        f"start them with 'dask worker {address}'"
    ]


def test_after_a_failure_only_the_tasks_that_workers_have_are_built(monkeypatch):
    """Of 18 tasks at the scheduler one fails. The only worker has at most four others, and they wait until the rest is withdrawn."""
    withdraw = module._withdraw

    def withdraw_and_release(client, running):
        withdraw(client, running)
        RELEASED.set()

    monkeypatch.setattr(module, "build_shard", fail_first)
    monkeypatch.setattr(module, "_withdraw", withdraw_and_release)
    RELEASED.clear()
    reports: list[ShardReport] = []
    with cluster(1) as made:
        going = lambda: not any(report.error for report in reports)  # noqa: E731
        for report in run_on_dask(tuple(range(40)), int, going, scheduler=made.scheduler_address):
            reports.append(report)
    assert 1 <= len(reports) <= 5
    assert reports[0].error == "broken"


def test_a_scheduler_that_dies_is_an_error_that_says_how_to_continue_and_nothing_else(tmp_path, capfd):
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen(
        [*command, "--no-dashboard", "--scheduler-file", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    asked = 0

    def keep_going() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            scheduler.kill()
        return True

    try:
        deadline = time.monotonic() + PATIENCE
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        address = read_scheduler_file(file)
        lost = f"the connection to the Dask scheduler at {address} was lost .*. Finished shards are kept: start the scheduler"
        with pytest.raises(ValueError, match=lost) as raised:
            list(run_on_dask(tuple(range(40)), int, keep_going, scheduler=address))
        assert "\n" not in str(raised.value)
        assert capfd.readouterr().err == ""
    finally:
        scheduler.kill()
        scheduler.wait()


@pytest.mark.parametrize("content", [None, "", "[]", json.dumps({"workers": {}})])
def test_a_scheduler_file_that_cannot_be_used_is_an_error_that_names_it(tmp_path, content):
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    result = run(*build_arguments(tmp_path / "data", tmp_path / "cache", "none"), "--scheduler-file", file, check=False)
    assert result.returncode == 1
    assert f"--scheduler-file {file} cannot be used" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()
