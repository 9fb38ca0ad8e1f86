"""The type in which the teacher computes: chosen where it computes, and then the cache's, wherever the build continues."""

from __future__ import annotations

from dataclasses import replace

import pytest

from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import make_plan
from occfeat_targets.build.workers import Workers, find_build_devices
from occfeat_targets.messages import describe_plan
from occfeat_targets.targets import teacher as teacher_module
from tests.targets.command_line import run
from tests.targets.toy_source import WHERE


@pytest.mark.parametrize("begun_with", ["bfloat16", "float32"])
def test_a_build_continues_in_the_type_it_was_begun_with_whatever_suits_the_machine(
    toy, tiny_teacher, tmp_path, monkeypatch, begun_with
):
    other = {"bfloat16": "float32", "float32": "bfloat16"}[begun_with]
    monkeypatch.setattr(teacher_module, "native_dtype", lambda device="auto": begun_with)
    arguments = ("build", "--source", "toy", "--dataroot", toy, *WHERE, tmp_path, "--teacher", tiny_teacher)
    arguments += ("--image-size", "48x80", "--feature-size", "56x98", "--shard-size", "2")
    assert f"the teacher computes in {begun_with}, which suits this machine" in run(*arguments, "--plan-only").stdout
    run(*arguments, "--shard", "0/2")
    monkeypatch.setattr(teacher_module, "native_dtype", lambda device="auto": other)
    output = run(*arguments, "--shard", "1/2").stdout
    assert f"computed in {begun_with}" in output and "is complete" in output
    assert ("this machine has no native bfloat16" in output) == (begun_with == "bfloat16")
    refused = run(*arguments, "--teacher-dtype", other, check=False)
    assert refused.returncode == 1 and f"'dtype': '{begun_with}'" in refused.stderr


def test_a_new_cache_has_the_type_that_suits_a_worker_of_the_scheduler(toy, tiny_teacher, tmp_path, monkeypatch):
    """The planning machine has no GPU, and --device cuda is about the workers."""
    asked = []

    def ask_worker(scheduler, function, device):
        asked.append((scheduler, function is teacher_module.native_dtype, device))
        return "bfloat16"

    monkeypatch.setattr("occfeat_targets.build.plan.ask_worker", ask_worker)
    options = BuildOptions(
        toy, tmp_path, "all", source="toy", teacher=tiny_teacher, device="cuda", image_size=(48, 80), feature_size=(56, 98),
        keyframes_per_shard=2,
    )  # fmt: skip
    assert find_build_devices(options, "tcp://a:1") == ("cpu",)
    plan = make_plan(options, scheduler="tcp://a:1")
    assert asked == [("tcp://a:1", True, "cuda")]
    assert plan.cache.spec.teacher.dtype == "bfloat16"
    again = make_plan(replace(options, device="cpu"), scheduler="tcp://a:1")
    assert again.cache.spec == plan.cache.spec and len(asked) == 1
    assert (
        "time: depends on the workers of tcp://a:1" in describe_plan(plan, Workers(0, ("cpu",), None, "tcp://a:1"))[-1]
    )
