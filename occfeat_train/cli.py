"""The command line: occfeat-train check, config, pretrain, finetune, evaluate, report, import-reference.

Exit codes: 0 success; 1 error; 2 wrong usage; 3 training stopped early by a signal, with a checkpoint saved; 130
interrupted by a second Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.common.command_line import LocalPath, names_of
from occfeat_targets.common.paths import local_path
from occfeat_train.config import PRETEXTS, Config, NetworkConfig
from occfeat_train.options import (
    BACKBONE,
    DIRECTORY,
    NETWORK,
    PATH,
    cache_option,
    initial_option,
    machine_options,
    reports_errors,
    set_option,
    training_options,
)
from occfeat_train.presets import FEAT_ONLY, LABELS, OCC_ONLY, PRESETS, finetuning, preset

PRETRAINING = "table1/simplebev-enb0/occfeat"
STOPPED, INTERRUPTED = 3, 130  # exit codes of a training that the same command continues


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="occfeat")
def main() -> None:
    """Train bird's-eye-view networks on a cache of OccFeat targets."""


# Options that change a field of the preset.
FIELDS = {
    "network": "network.lifting",
    "backbone": "network.backbone",
    "backbone_weights": "network.weights",
    "epochs": "optim.epochs",
    "batch": "optim.batch",
    "seed": "seed",
    "compile": "compile",
}


def inherit(config: Config, initial: Path | None, *, network: bool) -> Config:
    """A preset with the reference frame of the initial run, and with its network if `network` is true."""
    if initial is None:
        return config
    from occfeat_train.training.checkpoint import find_checkpoint

    found = find_checkpoint(initial).info.config
    return replace(config, frame=found.frame, network=found.network if network else config.network)


def run_name(name: str, given: dict[str, Any], *, arms: bool) -> str:
    """Default name of a run: the preset, options that change the network, and the run it starts from.

    arms: also mark runs that start from no other run, because such runs are compared.
    """
    parts = [name, *(given[option] for option in ("network", "backbone") if given[option])]
    if given["initial"] is not None:
        path = given["initial"].resolve()
        is_checkpoint = path.parent.name == "checkpoints"
        parts += ["from", path.parent.parent.name, path.name] if is_checkpoint else ["from", path.name]
    elif arms:
        parts.append("scratch")
    return "-".join(parts).replace("/", "-")


def train(config: Config, name: str, given: dict[str, Any], *, preset: str, arms: bool = False) -> None:
    """Train with the values of `initial_option`, `training_options` and `machine_options`. --set is applied last.

    Exits with STOPPED or INTERRUPTED if the training has not finished.
    """
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import RunOptions, run_training

    changed = [f"{FIELDS[option]}={json.dumps(given[option])}" for option in FIELDS if given[option] is not None]
    config = config.override([*changed, *given["overrides"]])
    out = given["out"] or local_path("runs") / run_name(name, given, arms=arms)
    loop = LoopOptions(*(given[option] for option in ("save_every", "workers", "tensorboard", "progress")))
    options = RunOptions(
        given["cache"], given["split"], out, given["validate"], loop, given["initial"], given.get("scenes"), preset,
        given["allow_unfinished"],
    )  # fmt: skip
    again = f"run the same command again to continue {out}"
    try:
        with processes(given["device"]) as process:
            finished = run_training(config, options, process)
            process.print(f"finished: {out}" if finished else f"stopped by a signal and saved: {again}")
    except KeyboardInterrupt:
        click.echo(f"interrupted, and nothing saved after the newest checkpoint: {again}", err=True)
        sys.exit(INTERRUPTED)
    if not finished:
        sys.exit(STOPPED)


@main.command()
@cache_option
@click.option("--split", required=True, help="Split of the cache: train, val, mini_train, ...")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Random keyframes to read.")
@reports_errors
def check(cache: Path, split: str, samples: int) -> None:
    """Check whether a cache can be trained on: read random keyframes and sample their target features."""
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_train.data.check import check_cache

    reader = CacheReader(cache / f"{split}.zarr")
    click.echo("\n".join([*reader.cache.spec.describe(), *reader.cache.warnings]))
    readiness = check_cache(reader, samples)
    click.echo("\n".join(readiness.describe()))
    click.echo(f"{reader.cache.path} is ready for {' and '.join(readiness.ready_for)}")


@main.group()
def config() -> None:
    """List presets and show their fields."""


@config.command("list")
def list_presets() -> None:
    """List the presets, named after the rows of the paper's tables, and the cache each needs if not of the default size."""
    width = max(map(len, PRESETS))
    for name, chosen in PRESETS.items():
        height, wide = chosen.smallest_cache()
        needs = f"{name:{width}}  a cache built with --image-size {height}x{wide}"
        click.echo(name if height <= STUDENT_SIZE[0] else needs)


@config.command()
@click.argument("name")
@set_option(help="Change a field.")
@reports_errors
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Print every field of a preset or of a run directory's config, as key=value."""
    file = Path(name) / "config.json"
    chosen = Config.from_dict(json.loads(file.read_text())["config"]) if file.is_file() else preset(name)
    chosen = chosen.override(overrides)
    for key, value in chosen.flat().items():
        click.echo(f"{key}={json.dumps(value)}")
    click.echo("# needs a cache built with --image-size {}x{} or more".format(*chosen.smallest_cache()))


@main.command()
@cache_option
@click.option(
    "--preset",
    "asked",
    help=f"A pretraining preset of 'config list'; without it, --from also sets the network.  [default: {PRETRAINING}]",
)
@click.option("--method", type=names_of(PRETEXTS), help="Pretext task.  [default: the preset's, occfeat]")
@click.option("--occ-only", is_flag=True, help="Only the occupancy loss (Table 3).")
@click.option("--feat-only", is_flag=True, help="Only the feature loss (Table 3).")
@click.option("--lambda", "lambda_", type=float, help="Weight of the feature loss (eq. 1, Table 4).")
@initial_option(help="Run or checkpoint with the initial weights of network and head.")
@training_options
@machine_options
@reports_errors
def pretrain(
    asked: str | None, method: str | None, occ_only: bool, feat_only: bool, lambda_: float | None, **given: Any
) -> None:
    """Pretrain a network on occupancy and features (paper, section 3). The defaults are the paper's values."""
    name = row = asked or PRETRAINING
    chosen = inherit(preset(name), given["initial"], network=asked is None)
    if not chosen.is_pretext:
        raise click.UsageError(f"--preset {name} is a finetuning preset: use occfeat-train finetune --preset {name}")
    if method not in (None, chosen.task):
        chosen, name = replace(chosen, task=method), f"{name}-{method}"
    if occ_only + feat_only + (lambda_ is not None) > 1:
        raise click.UsageError("--occ-only, --feat-only and --lambda exclude each other: pass one of them")
    if chosen.task != "occfeat" and (occ_only or feat_only or lambda_ is not None):
        raise click.UsageError(f"--occ-only, --feat-only and --lambda are about occfeat's losses, not {chosen.task}'s")
    if occ_only or feat_only:
        chosen = replace(chosen, loss=OCC_ONLY if occ_only else FEAT_ONLY)
        name += "-occ-only" if occ_only else "-feat-only"
    if lambda_ is not None:
        chosen = replace(chosen, loss=replace(chosen.loss, feat=lambda_))
        name += f"-lambda-{lambda_:g}"
    train(chosen, name, given, preset=row)


@main.command()
@cache_option
@initial_option(
    help="Pretrained run or checkpoint to start from; without it, only the backbone is initialised from trained weights."
)
@click.option("--task", type=names_of(LABEL_KINDS), help="Kind of labels to segment.  [default: vehicles]")
@click.option(
    "--labels",
    type=click.FloatRange(0, 100, min_open=True),
    help=f"Percentage of the training scenes whose labels are used; the paper's recipes are for {', '.join(f'{p:g}' for p in LABELS)}.  [default: 100]",
)
@click.option(
    "--scenes",
    type=LocalPath(path_type=Path, exists=True, dir_okay=False),
    help="File with the names of the scenes whose labels are used, one per line; replaces --labels.",
)
@click.option("--preset", "asked", help="A finetuning preset of 'config list'; replaces --task and --labels.")
@training_options
@machine_options
@reports_errors
def finetune(task: str | None, labels: float | None, asked: str | None, **given: Any) -> None:
    """Finetune for segmentation of a kind of labels with a fraction of them, with or without pretraining (paper, section 4.1).

    With --from, the reference frame is that of the pretrained run. The network is too, unless --preset is given.
    """
    if asked is None:
        task, labels = task or "vehicles", 100.0 if labels is None else labels
        name, chosen = f"{task}-{labels:g}", finetuning(task, labels, NetworkConfig())
    elif task is not None or labels is not None:
        raise click.UsageError("--preset replaces --task and --labels: pass one or the other")
    else:
        name, chosen = asked, preset(asked)
    if chosen.is_pretext:
        raise click.UsageError(f"--preset {name} is a pretraining preset: use occfeat-train pretrain --preset {name}")
    if given["scenes"] is not None:
        name += f"-{given['scenes'].stem}"
    train(inherit(chosen, given["initial"], network=asked is None), name, given, preset=asked or "", arms=True)


@main.command()
@click.argument("run", type=PATH)
@cache_option
@click.option(
    "--split",
    default="val",
    show_default=True,
    help="Split to evaluate; keyframes that were skipped, or whose frame is that of a masked camera, are left out.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples per forward pass and rank."
)
@click.option("--frame", help="Reference frame of the grid: ego, or the name of a camera.  [default: the run's]")
@click.option(
    "--out", type=DIRECTORY, help="Directory of the results, written to SPLIT.json.  [default: RUN/evaluation]"
)
@machine_options
@reports_errors
def evaluate(
    run: Path, cache: Path, split: str, batch: int, frame: str | None, out: Path | None, device: str, workers: int, progress: bool
) -> None:  # fmt: skip
    """Evaluate the newest checkpoint of RUN: IoU over all usable keyframes of the split at 0.5 and at the best threshold, per class and distance."""
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import RunOptions, run_evaluation

    loop = LoopOptions(workers=workers, progress=progress)
    options = RunOptions(cache, split, out or run / "evaluation", loop=loop)
    with processes(device) as process:
        run_evaluation(run, options, process, batch=batch, frame=frame)


@main.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@cache_option
@click.option("--split", default="val", show_default=True, help="Split to evaluate and to draw keyframes from.")
@click.option("--out", type=PATH, default=Path("report.html"), show_default=True, help="Output file.")
@click.option("--samples", type=click.IntRange(1), default=3, show_default=True, help="Number of keyframes to draw.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reports_errors
def report(runs: tuple[Path, ...], cache: Path, split: str, out: Path, samples: int, device: str) -> None:
    """Write one HTML file about RUNs: training curves, metrics, and predictions for a few keyframes.

    Existing results of 'evaluate' are used. Runs without results are evaluated first.
    """
    from occfeat_train.distributed import processes
    from occfeat_train.report.page import write_report

    with processes(device) as process:
        write_report(runs, cache, split, out, process, process.print, samples)


@main.command("import-reference")
@click.argument("checkpoint", type=LocalPath(path_type=Path, exists=True))
@click.option(
    "--network",
    type=NETWORK,
    required=True,
    help="simplebev for Segnet, bevformer for Bevformernet, lss for liftnet2's Liftnet.",
)
@click.option("--backbone", type=BACKBONE, required=True, help="Image encoder of the checkpoint.")
@click.option("--out", type=DIRECTORY, required=True, help="Run directory to create.")
@click.option(
    "--grid", metavar="ZxHxW", default="8x200x200", show_default=True, help="Number of grid cells up, forward, right."
)
@set_option(help="Change a field, such as network.image_size=448x800.")
@reports_errors
def import_reference(
    checkpoint: Path, network: str, backbone: str, out: Path, grid: str, overrides: tuple[str, ...]
) -> None:
    """Convert a CHECKPOINT of aharley/simple_bev into a run, for 'evaluate' and 'finetune --from'.

    The run has network.compat=simple-bev: it computes the same function as the reference. It needs a cache of --frames cameras.
    """
    from occfeat_targets.cache.grid import VoxelGrid
    from occfeat_train.simple_bev.import_reference import import_reference

    cells = grid.split("x")
    if len(cells) != 3 or not all(n.isdigit() for n in cells):
        raise click.UsageError(f"--grid {grid}: ZxHxW expected, such as 8x200x200")
    chosen = NetworkConfig(network, backbone, weights="none", compat="simple-bev")  # type: ignore[arg-type]
    config = finetuning("vehicles", 100, chosen).override(overrides)
    z, h, w = map(int, cells)
    made = import_reference(checkpoint, config, VoxelGrid((z, h, w)), out)
    click.echo(f"{made}: {network} {backbone}, image size {'x'.join(map(str, config.network.image_size))}")
