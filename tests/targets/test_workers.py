"""Worker processes of a build and their GPUs. Nothing here needs a GPU: torch's answers about GPUs are replaced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from occfeat_targets.build import estimate, shard, workers
from occfeat_targets.build.cluster import run_on_dask
from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import make_plan
from occfeat_targets.build.workers import Workers, choose_workers, find_build_devices
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.messages import describe_plan
from occfeat_targets.targets import teacher as teacher_module
from occfeat_targets.targets import teacher_devices
from occfeat_targets.targets.teacher import LoadedTeacher, gpu_bytes, teacher_spec
from occfeat_targets.targets.teacher_devices import find_devices, free_memory
from tests.targets.command_line import build_arguments, run
from tests.targets.toy_source import build

TEACHERS = {name: teacher_spec(f"random:facebook/dinov2-{name}") for name in ("small", "base", "large", "giant")}
GB = 10**9


def give_gpus(patch: pytest.MonkeyPatch, count: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


@pytest.mark.parametrize(
    ("count", "name", "devices"),
    [
        (0, "auto", ("cpu",)),
        (2, "auto", ("cuda:0", "cuda:1")),
        (2, "cpu", ("cpu",)),
        (3, "cuda", ("cuda:0", "cuda:1", "cuda:2")),
        (2, "cuda:1", ("cuda:1",)),
    ],
)
def test_cuda_stands_for_all_gpus_and_cuda_1_for_one(monkeypatch, count, name, devices):
    give_gpus(monkeypatch, count)
    assert find_devices(name) == devices


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda", "--device cuda: torch .* sees no GPU: use --device cpu"),
        (0, "cuda:1", "--device cuda:1: torch .* sees no GPU: use --device cpu"),
        (2, "cuda:7", "--device cuda:7: GPU 7 asked for, torch sees 2, from cuda:0: use --device cuda"),
        (2, "gpu", "--device gpu: auto, cpu, cuda or cuda:N expected"),
    ],
)
def test_a_missing_gpu_is_refused_before_the_data_set_is_read(monkeypatch, tmp_path, count, device, message):
    give_gpus(monkeypatch, count)
    arguments = build_arguments(tmp_path / "none", tmp_path / "cache", "random:facebook/dinov2-small")
    result = run(*arguments, "--device", device, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.stderr)
    assert not result.stdout and not list(tmp_path.iterdir())


def options(**changes: object) -> BuildOptions:
    return BuildOptions(dataroot="data", cache="cache", split="train", **changes)  # type: ignore[arg-type]


def test_a_planning_machine_needs_no_gpu_for_a_cluster_or_for_a_build_without_teacher(monkeypatch):
    give_gpus(monkeypatch, 0)
    assert find_build_devices(options(device="cuda"), "tcp://10.0.0.1:8786") == ("cpu",)
    assert find_build_devices(options(device="cuda", teacher=None), None) == ("cpu",)


def choose(
    teacher: str | None, gpus: int, free_gb: float, *, cores: int = 64, asked: int | None = None, **more: object
) -> Workers:
    """The workers for 1000 shards of six cameras."""
    spec = None if teacher is None else TEACHERS[teacher]
    plan = SimpleNamespace(
        options=options(**more), teacher=spec, shards=range(1000), cache=SimpleNamespace(spec=TargetSpec(teacher=spec))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "count_cores", lambda: cores)
        patch.setattr(teacher_devices, "free_memory", lambda device: int(free_gb * GB))
        devices = tuple(f"cuda:{i}" for i in range(gpus)) or ("cpu",)
        return choose_workers(plan, devices, workers=asked)  # type: ignore[arg-type]


def test_one_process_a_core_is_spread_over_the_gpus_with_at_most_16_on_one():
    assert choose("small", 2, 80) == Workers(32, ("cuda:0", "cuda:1"), 8)
    assert choose("small", 2, 80, cores=8) == Workers(8, ("cuda:0", "cuda:1"), 8)
    assert choose("small", 2, 80, cores=1) == Workers(0, ("cuda:0",), 8)
    assert choose("small", 2, 80, asked=1) == Workers(1, ("cuda:0",), 8)
    assert choose("small", 0, 0, cores=4) == Workers(4, ("cpu",), 1)
    assert choose(None, 2, 80, cores=4) == Workers(4, ("cuda:0",), 1)


def test_array_tasks_on_one_machine_use_different_gpus():
    used = [choose("small", 2, 80, shard=(k, 4)) for k in range(4)]
    assert used == [Workers(0, (f"cuda:{k % 2}",), 8) for k in range(4)]


def test_the_free_memory_limits_first_the_processes_and_then_the_batch():
    assert choose("small", 1, 8).processes < 16
    assert choose("giant", 1, 40).processes < choose("large", 1, 40).processes
    small_gpu = choose("giant", 1, 8)
    assert small_gpu.processes == 1 and 1 <= small_gpu.keyframes_per_batch < 8
    assert choose("giant", 1, 8, keyframes_per_batch=20).keyframes_per_batch == 20
    crowded = choose("small", 1, 10, asked=10)
    assert crowded.processes == 10 and crowded.keyframes_per_batch < 8


@given(
    name=st.sampled_from(list(TEACHERS)), gpus=st.integers(1, 8), free_gb=st.floats(0.5, 160), cores=st.integers(1, 128)
)
def test_default_workers_fit_into_the_free_memory(name, gpus, free_gb, cores):
    least = gpu_bytes(TEACHERS[name], 6)
    try:
        chosen = choose(name, gpus, free_gb, cores=cores)
    except ValueError as err:
        assert least > free_gb * GB
        assert f"{estimate.format_bytes(int(free_gb * GB))} free: use fewer --workers, end other" in str(err)
        return
    on_one = -(-max(chosen.processes, 1) // len(chosen.devices))
    assert on_one * gpu_bytes(TEACHERS[name], 6 * chosen.keyframes_per_batch) <= max(free_gb * GB, least)
    assert on_one <= 16 and chosen.processes <= cores


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch):
    def refuse(device):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    with pytest.raises(ValueError, match=r"cuda:1 cannot be used \(CUDA error: out of memory\): end other programs"):
        free_memory("cuda:1")


def toy_plan(toy, cache, teacher):
    return make_plan(
        BuildOptions(
            toy, cache, "all", source="toy", teacher=teacher, image_size=(48, 80), feature_size=(56, 98),
            teacher_dtype="float32", keyframes_per_shard=4,
        )
    )  # fmt: skip


def test_the_plan_announces_workers_gpus_and_the_time_of_the_teacher_on_them(toy, tiny_teacher, tmp_path, monkeypatch):
    plan = toy_plan(toy, tmp_path, tiny_teacher)
    timed = []

    def seconds_per_image(spec, device, images):
        timed.append((device, images))
        return 10.0

    monkeypatch.setattr(teacher_module, "seconds_per_image", seconds_per_image)
    last = describe_plan(plan, Workers(8, ("cuda:0", "cuda:1"), 2))[-1]
    assert timed == [("cuda:0", 2 * 3)]
    # 4 keyframes of 3 images, half of them on each GPU
    assert (
        f"time: about {estimate.format_seconds(estimate._START_SECONDS + 60)} from now with 8 workers on 2 GPUs" in last
    )
    assert "2 keyframes per teacher batch" in last
    assert "in this process on cuda:1, 1 keyframe per" in describe_plan(plan, Workers(0, ("cuda:1",), 1))[-1]


def test_the_announced_time_honours_the_number_of_workers_and_the_cores(monkeypatch):
    monkeypatch.setattr("occfeat_targets.targets.teacher_devices.matmul_flops", lambda dtype: 1e12)

    def seconds(teacher: str | None, processes: int, cores: int) -> float:
        spec = TargetSpec(teacher=None if teacher is None else TEACHERS[teacher])
        found = estimate.estimate_seconds(
            spec, 100, devices=("cpu",), processes=processes, cores=cores, keyframes_per_batch=1
        )
        return found - estimate._START_SECONDS

    assert [round(seconds(None, processes, 4), 3) for processes in (1, 2, 4, 8)] == [6, 3, 1.5, 1.5]
    teacher = {processes: seconds("small", processes, 4) - seconds(None, processes, 4) for processes in (1, 2, 3, 4, 8)}
    assert teacher[1] == pytest.approx(teacher[2]) == pytest.approx(teacher[4]) == pytest.approx(teacher[8])
    assert teacher[3] == pytest.approx(4 / 3 * teacher[4])  # three workers of one thread each


def test_a_cluster_worker_with_a_gpu_takes_eight_keyframes_at_a_time(toy, tiny_teacher, tmp_path, monkeypatch):
    plan = toy_plan(toy, tmp_path, tiny_teacher)
    loaded, sizes = LoadedTeacher(plan.teacher, "cpu"), []

    class OnGpu:
        spec, device = plan.teacher, torch.device("cuda", 0)

        def __call__(self, images):
            sizes.append(len(images))
            return loaded(images)

    task = plan.task(0, device="cuda")
    monkeypatch.setattr(shard, "_teacher", lambda task: OnGpu())
    monkeypatch.setattr(shard, "KEYFRAMES_PER_GPU_BATCH", 3)
    assert shard.build_shard(task).error is None
    assert shard.build_shard(replace(task, keyframes_per_batch=2)).error is None
    assert sizes == [9, 3, 6, 6]


def test_the_command_line_builds_on_a_gpu(toy, tiny_teacher, tmp_path, monkeypatch):
    """The teacher itself runs on the CPU."""
    give_gpus(monkeypatch, 2)
    monkeypatch.setattr(teacher_devices, "free_memory", lambda device: 80 * GB)
    monkeypatch.setattr(teacher_module, "find_devices", lambda name: {"cuda:0": ("cpu",)}[name])
    built = build(toy, tmp_path / "cache", tiny_teacher, "--device", "cuda", "--teacher-dtype", "float32")
    assert "in this process on cuda:0, 8 keyframes per teacher batch\n" in built.stdout
    assert "is complete: 4 keyframes" in built.stdout


def test_local_worker_k_uses_device_k(city, tiny_teacher, tmp_path):
    """Worker 1 of two has a GPU that does not exist, so exactly its shards fail."""
    plan = make_plan(
        BuildOptions(
            city, tmp_path, "mini_train", teacher=tiny_teacher, image_size=(96, 160), feature_size=(56, 98),
            keyframes_per_shard=1,
        )
    )  # fmt: skip
    reports = list(
        run_on_dask(
            plan.shards, lambda number: plan.task(number, device="cpu", num_threads=1), lambda: True, workers=2,
            devices=("cpu", "cuda:99"),
        )
    )  # fmt: skip
    errors = [report.error for report in reports if report.error is not None]
    assert len(reports) == 10 and 1 <= len(errors) <= 9
    assert all(error.startswith("--device cuda:99: ") for error in errors)
