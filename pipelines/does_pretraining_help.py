"""Does pretraining help? A small version of the paper's Table 3 on the synthetic city: IoU of vehicles and map with 1 %, 10 %
and 100 % of the labels, without pretraining and after pretraining on occupancy, on features and on both.

    python pipelines/does_pretraining_help.py --out study

Creates the city and its caches, pretrains and finetunes each variant with each seed, evaluates each run on the whole
validation split, and prints the table. A seed is one pretraining and its finetunings. Finished runs are not repeated, so an
interrupted study continues. All steps use the two command lines.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

VARIANTS: dict[str, list[str] | None] = {
    "none": None,
    "occupancy only": ["--occ-only"],
    "features only": ["--feat-only"],
    "OccFeat": [],
}
TASKS = ("vehicles", "map")
LABELS = (1, 10, 100)


def call(module: str, log: Path, *arguments: str | Path) -> None:
    """Run a command line with one thread and append its output to a log."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with log.open("a") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if code:
        raise click.ClickException(f"{' '.join(command)} exited with {code}; see {log}")


def make_caches(out: Path, scenes: int, val_scenes: int, keyframes: int) -> None:
    city, log = out / "city", out / "caches.log"
    version = ["--version", "v1.0-trainval"]
    if not (city / "done").exists():
        size = ["--scenes", str(scenes), "--val-scenes", str(val_scenes), "--keyframes", str(keyframes)]
        call(
            "occfeat_targets",
            log,
            "synth",
            "--out",
            city,
            *version,
            *size,
            "--image-size",
            "135x240",
            "--sweeps",
            "1",
            "--seed",
            "7",
        )
        (city / "done").touch()
    for split in ("train", "val"):
        call(
            "occfeat_targets", log, "build", "--dataroot", city, *version, "--cache", out / "cache", "--split", split,
            "--teacher", "random:facebook/dinov2-small", "--image-size", "80x140", "--feature-size", "112x196",
            "--grid", "8x50x50", "--range", "-5", "5", "-25", "25", "-25", "25",
        )  # fmt: skip


def one_seed(out: Path, variant: str, seed: int) -> None:
    """Run a pretraining, its finetunings and their evaluations."""
    runs = out / "runs"
    name = f"{variant.replace(' ', '-')}-{seed}"
    log = runs / f"{name}.log"
    shared = ["--cache", out / "cache", "--seed", seed, "--no-progress", "--no-tensorboard", "--save-every", 1000]
    extra = VARIANTS[variant]
    start: list[str | Path] = []
    if extra is not None:
        call("occfeat_train", log, "pretrain", *shared, "--preset", "small/occfeat", *extra, "--out", runs / name)
        start = ["--from", runs / name]
    for task in TASKS:
        for labels in LABELS:
            run = runs / f"{name}-{task}-{labels}"
            if (run / "evaluation" / "val.json").exists():
                continue
            call("occfeat_train", log, "finetune", *shared, "--preset", f"small/{task}-{labels}", *start, "--out", run)
            call("occfeat_train", log, "evaluate", run, "--cache", out / "cache", "--no-progress")


def results(out: Path, variant: str, task: str, labels: int, key: str) -> list[float]:
    files = sorted((out / "runs").glob(f"{variant.replace(' ', '-')}-[0-9]*-{task}-{labels}/evaluation/val.json"))
    return [json.loads(file.read_text())[key] or 0.0 for file in files]


def table(out: Path, key: str) -> str:
    lines = ["| pretraining | " + " | ".join(f"{task} {labels} %" for task in TASKS for labels in LABELS) + " |"]
    lines.append("| --- " * (1 + len(TASKS) * len(LABELS)) + "|")
    for variant in VARIANTS:
        cells = []
        for task in TASKS:
            for labels in LABELS:
                found = results(out, variant, task, labels, key)
                spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
                cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "-")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("study"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--scenes", default=40, show_default=True, help="Training scenes.")
@click.option("--val-scenes", default=12, show_default=True)
@click.option("--keyframes", default=10, show_default=True, help="Keyframes per scene.")
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, with one thread each.")
def main(out: Path, seeds: int, scenes: int, val_scenes: int, keyframes: int, jobs: int) -> None:
    began = time.time()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    count = seeds * (len(VARIANTS) - 1) + seeds * len(VARIANTS) * len(TASKS) * len(LABELS)
    click.echo(
        f"{count} runs on {scenes * keyframes} keyframes, {jobs} at a time; SIMULATED: synthetic city, random teacher"
    )
    make_caches(out, scenes, val_scenes, keyframes)
    with ThreadPoolExecutor(jobs) as pool:
        jobs_done = [
            pool.submit(one_seed, out, variant, seed) for seed in range(seeds) for variant in reversed(VARIANTS)
        ]
        for job in jobs_done:
            job.result()
    click.echo(f"\nIoU at 0.5 [%], mean ± standard deviation over {seeds} seeds\n\n{table(out, 'iou')}")
    click.echo(f"\nIoU at the best threshold\n\n{table(out, 'iou_best')}\n\n{(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
