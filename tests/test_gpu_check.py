"""The GPU check, run on a CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY


def run_check(out: Path, *options: str) -> tuple[int, dict[str, dict], list[dict]]:
    """Exit code, {part: its newest record with a state}, and all records."""
    command = [sys.executable, "-m", "pipelines.gpu_check", "--device", "cpu", "--small", "--out", str(out), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all("part" in record for record in records), done.stderr
    return done.returncode, {record["part"]: record for record in records if "state" in record}, records


def test_dry_run_of_every_part_finds_nothing_bad(tmp_path):
    code, states, records = run_check(tmp_path, "--minutes", "60")
    bad = [record for record in records if "error" in record or record.get("ok") is False]
    assert not bad and code == 0
    assert {state["state"] for state in states.values()} == {"done"}
    skipped = {(record["part"], record["what"]) for record in records if "skipped" in record}
    assert ("step", "waits of the host") in skipped and ("kernels", "head, Triton") in skipped
    assert [r["images"] for r in records if r.get("what", "").startswith("processes that share")] == [6, 6]
    gradients = [record for record in records if record.get("what", "").endswith(": gradient")]
    assert gradients and all("device_float32" in g and "host_float32" in g for g in gradients)


def test_a_part_that_raises_hangs_or_aborts_affects_no_other_part(tmp_path):
    faults = ("env=raise", "correct=hang", "lss=abort")
    parts = ("env", "correct", "lss", "teacher")
    code, states, _ = run_check(
        tmp_path, "--parts", *parts, "--fault", *faults, "--limit", "correct=1", "--minutes", "60"
    )
    assert code == 1
    assert {name: states[name]["state"] for name in parts} == {
        "env": "failed", "correct": "ended", "lss": "ended", "teacher": "done",
    }  # fmt: skip
    assert "ZeroDivisionError" in states["env"]["error"]
    assert states["correct"]["error"] == "ended after 1 s"
    assert states["lss"]["error"] == "its process ended with -6"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_refuses_to_start(tmp_path):
    command = [sys.executable, "-m", "pipelines.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "sees no GPU; --device cpu --small is a dry run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_parts_after_the_deadline_are_reported_as_not_started(tmp_path):
    code, states, _ = run_check(tmp_path, "--parts", "env", "--minutes", "0")
    assert code == 1 and states["env"]["state"] == "not begun"


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")
def test_the_script_passes_options_on_and_skips_a_broken_wheel(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "WHEELS": str(tmp_path / "wheels")}
    script = REPOSITORY / "pipelines" / "gpu_check" / "run.sh"
    command = ["/bin/bash", str(script), "--device", "cpu", "--small", "--parts", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed" in done.stdout and "| env | done |" in done.stdout
    assert "| env | done |" in (tmp_path / "log.txt").read_text()
