"""The teacher on the device: in one process, and in several processes that share the device as in a build."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.targets.teacher import LoadedTeacher, flops_per_image, gpu_bytes, teacher_spec
from pipelines.gpu_check.measure import Check


def teacher(check: Check) -> None:
    """Images/s of the teacher as the build calls it, with its copies, and of the model alone; then in several processes."""
    spec = teacher_spec("random:facebook/dinov2-small", input_size=(56, 56) if check.small else None)
    model = LoadedTeacher(spec, check.device.type)
    for count in (6,) if check.small else (6, 48, 192):
        images = np.random.default_rng(0).integers(0, 256, (count, *spec.input_size, 3), np.uint8)
        pixels = torch.randn(count, 3, *spec.input_size, device=check.device)

        def alone(pixels: Tensor = pixels) -> None:
            with torch.inference_mode(), check.autocast(spec.dtype == "bfloat16"):
                model.teacher.dense_tokens(pixels)

        whole, bare = check.ms(lambda i=images: model(i), rounds=3), check.ms(alone, rounds=3)
        rate = flops_per_image(spec) * count / bare / 1e9
        check.record(f"{count} images", images_per_s=round(1e3 * count / whole), dtype=spec.dtype,
                     model_images_per_s=round(1e3 * count / bare), tflop_per_s=round(rate, 2))  # fmt: skip
    with check.guarded("processes"):
        shared_by_processes(check, spec, counts=(1, 2) if check.small else (1, 2, 4), images=6 if check.small else 48)


def shared_by_processes(check: Check, spec: TeacherSpec, counts: tuple[int, ...], images: int) -> None:
    """Images/s of 1, 2, ... processes together, and the GPU memory of a process against the estimate of a build."""
    context = multiprocessing.get_context("spawn")
    free = torch.cuda.mem_get_info(check.device)[0] if check.is_cuda else 0
    connections, processes = [], []
    try:
        for _ in range(counts[-1]):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, spec, check.device.type, images), daemon=True)
            process.start()
            there.close()  # so that recv() raises EOFError if the process ends
            connections.append(here)
            processes.append(process)
        for connection in connections:
            connection.recv()
        if check.is_cuda:
            used, estimated = (free - torch.cuda.mem_get_info(check.device)[0]) / counts[-1], gpu_bytes(spec, images)
            check.record("memory of a process", gb=round(used / 1e9, 2), estimated_gb=round(estimated / 1e9, 2),
                         ok=used <= estimated)  # fmt: skip
        for count in counts:
            for connection in connections[:count]:
                connection.send(0.2 if check.small else 3.0)
            rates = [connection.recv() for connection in connections[:count]]
            check.record(f"processes that share the device: {count}", images=images, images_per_s=round(sum(rates)))
    finally:
        for process in processes:
            process.kill()
            process.join()


def serve(connection: Connection, spec: TeacherSpec, device: str, images: int) -> None:
    """A process that runs the teacher as long as it is told to [s], and sends the images/s."""
    model = LoadedTeacher(spec, device)
    batch = np.zeros((images, *spec.input_size, 3), np.uint8)
    model(batch)
    connection.send("ready")
    while True:
        seconds = connection.recv()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            model(batch)
            count += images
        connection.send(count / (time.perf_counter() - began))
