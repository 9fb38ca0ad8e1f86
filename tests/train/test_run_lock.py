"""Only one training at a time writes to a run directory, and a process's rank must be below the number of processes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
import torch

from occfeat_train.distributed import Process, ranks
from occfeat_train.training import run_lock
from occfeat_train.training.run_lock import locked_run
from occfeat_train.training.saving import CheckpointError
from tests.train.runs import pretrain, refuse, steps, succeed

ALONE = Process(0, 1, torch.device("cpu"))


def test_a_second_training_of_a_run_is_refused_and_names_the_first(cache, tmp_path):
    out = tmp_path / "run"
    with locked_run(out, ALONE):
        message = refuse(*pretrain(cache, out, *steps(1)), out=out)
        assert f"{out} is in use by process {os.getpid()} on {socket.gethostname()}: wait for it or stop it" in message
        assert os.listdir(out) == ["lock"]
    assert "lock" not in succeed(*pretrain(cache, out, *steps(1)))
    assert not (out / "lock").exists()


def test_a_lock_that_a_killed_training_left_is_named_and_does_not_block(cache, tmp_path):
    """The system unlocks the file of a killed process; test_resume.py kills some."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "lock").write_text("process 123 on node7\n")
    (out / ".config.json.node7-123.partial").write_text("{")  # killed even before the run's config was complete
    output = succeed(*pretrain(cache, out, *steps(1)))
    assert f"{out / 'lock'} was left by process 123 on node7, which no longer runs" in output
    assert not (out / "lock").exists()


def test_a_lock_deleted_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    """Otherwise a third training could lock a new file of the same name."""
    lock, calls = run_lock._lock, []

    def locks(descriptor: int, file: Path) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            file.unlink()
        return lock(descriptor, file)

    monkeypatch.setattr(run_lock, "_lock", locks)
    with locked_run(tmp_path, ALONE):
        assert len(calls) == 2
        with pytest.raises(CheckpointError, match="is in use by process"), locked_run(tmp_path, ALONE):
            pass
        assert (tmp_path / "lock").exists()


def test_a_file_system_without_locks_is_stated(tmp_path, monkeypatch, capsys):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for left, named in (("", "\n"), ("process 1 on a", " (")):
        (tmp_path / "lock").write_text(left)
        with locked_run(tmp_path, ALONE):
            pass
        assert f"without locks: make sure that no other training writes to it{named}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "3"}, "WORLD_SIZE not set, RANK='3', LOCAL_RANK not set: a number of processes and a rank below it"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "WORLD_SIZE='2', RANK='2'"),
        ({"WORLD_SIZE": "2"}, "RANK not set, LOCAL_RANK not set: .* unset WORLD_SIZE to train with one"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', RANK not set"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_a_rank_outside_of_the_processes_is_refused(cache, tmp_path, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=expected):
        ranks()
    assert "start the processes with torchrun" in refuse(*pretrain(cache, tmp_path / "run"), out=tmp_path / "run")


def test_ranks_are_those_of_torchrun(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks() == (1, 0, 0)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (4, 3, 1)
