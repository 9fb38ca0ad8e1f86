"""The command line: occfeat-train check, config, pretrain, finetune, evaluate, report, import-reference.

Exit codes: 0 all is well, or a signal asked to stop and the run can be continued; 1 an error; 2 wrong usage.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_train.config import Backbone, Config, Lifting, NetworkConfig
from occfeat_train.presets import FEAT_ONLY, LABELS, OCC_ONLY, PRESETS, finetuning, preset

DIRECTORY = click.Path(path_type=Path, file_okay=False)
PRETRAINING = "table1/simplebev-enb0/occfeat"
NETWORK = click.Choice(get_args(Lifting))
BACKBONE = click.Choice(get_args(Backbone))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="occfeat")
def main() -> None:
    """Training bird's-eye-view networks from a cache of OccFeat targets."""


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what the user can mend as one line and exit 1; OCCFEAT_TRACEBACK=1 shows where it came from."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as err:
            if os.environ.get("OCCFEAT_TRACEBACK"):
                raise
            click.echo(f"error: {err}", err=True)
            sys.exit(1)

    return wrapper


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several decorators as one, in the order in which they show in --help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


cache_option = click.option(
    "--cache", type=DIRECTORY, default=Path("cache"), show_default=True, envvar="OCCFEAT_CACHE",
    help="Directory of caches; a split lies in CACHE/SPLIT.zarr.",
)  # fmt: skip
machine_options = options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that read ahead."),
    click.option("--progress/--no-progress", default=True, help="Progress bars."),
)
training_options = options(
    click.option("--split", default="train", show_default=True, help="Split to train on."),
    click.option("--out", type=DIRECTORY, help="Run directory; a run that stands there is continued. [default: runs/NAME]"),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the config; see 'config show'."),
    click.option("--network", type=NETWORK, help="How image features get to the map, instead of the preset's."),
    click.option("--backbone", type=BACKBONE, help="Of the image encoder, instead of the preset's."),
    click.option("--backbone-weights", metavar="WEIGHTS", help="default, a hub id, a local folder, a MoCo .pth.tar, or none (from scratch)."),
    click.option("--epochs", type=float, help="Instead of the preset's."),
    click.option("--batch", type=click.IntRange(1), help="Samples a forward pass, all processes together."),
    click.option("--seed", type=click.IntRange(0), help="Of initial weights, order and augmentation."),
    click.option("--compile/--no-compile", default=None, help="torch.compile the network."),
    click.option("--validate", metavar="SPLIT", help="Evaluate this split whenever a checkpoint is written."),
    click.option("--save-every", type=click.IntRange(0), default=0, help="Steps between checkpoints.  [default: an epoch]"),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Write RUN/tensorboard beside RUN/log.jsonl."),
)  # fmt: skip


def resolve(config: Config, overrides: tuple[str, ...], shortcuts: dict[str, Any]) -> Config:
    """A preset with the options on top. --set comes last."""
    fields = {
        "network": "network.lifting",
        "backbone": "network.backbone",
        "backbone_weights": "network.weights",
        "epochs": "optim.epochs",
        "batch": "optim.batch",
        "seed": "seed",
        "compile": "compile",
    }
    given = [f"{fields[name]}={json.dumps(value)}" for name, value in shortcuts.items() if value is not None]
    return config.override([*given, *overrides])


def variant(name: str, shortcuts: dict[str, Any], initial: Path | None, *, arms: bool = False) -> str:
    """A run's name that says which network it has, where that is not the preset's, and which run it starts from.

    arms: say so, too, where it starts from none: several such runs are compared.
    """
    parts = [name, *(shortcuts[option] for option in ("network", "backbone") if shortcuts[option])]
    if initial is not None:
        path = initial.resolve()
        is_checkpoint = path.parent.name == "checkpoints"
        parts += ["from", path.parent.parent.name, path.name] if is_checkpoint else ["from", path.name]
    elif arms:
        parts.append("scratch")
    return "-".join(parts)


def inherit(config: Config, initial: Path | None, *, network: bool) -> Config:
    """A preset with the initial run's reference frame, and with its whole network where no preset was asked for."""
    if initial is None:
        return config
    from occfeat_train.training.checkpoint import find_checkpoint

    found = find_checkpoint(initial).about.config
    return replace(config, frame=found.frame, network=found.network if network else config.network)


def start_training(
    config: Config, name: str, cache: Path, split: str, out: Path | None, device: str, validate: str | None, loop: dict[str, Any],
    initial: Path | None = None, scenes: Path | None = None, preset: str = "",
) -> None:  # fmt: skip
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import Place, run_training

    place = Place(cache, split, out or Path("runs") / name.replace("/", "-"), validate, LoopOptions(**loop))
    with processes(device) as process:
        say = click.echo if process.is_main else lambda line: None
        finished = run_training(config, place, process, say, initial=initial, scenes_file=scenes, preset=preset)
        if finished:
            say(f"finished: {place.out}")
        else:
            say(f"stopped by a signal and saved: run the same command again to continue {place.out}")


@main.command()
@cache_option
@click.option("--split", required=True, help="Split of the cache: train, val, mini_train, ...")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Random keyframes to read.")
@reports_errors
def check(cache: Path, split: str, samples: int) -> None:
    """Say whether a cache is ready to be trained on: read random keyframes and sample their targets."""
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_train.data.check import check_cache

    reader = CacheReader(cache / f"{split}.zarr")
    click.echo("\n".join([*reader.cache.spec.describe(), *reader.cache.warnings]))
    click.echo("\n".join(check_cache(reader, samples).describe()))
    click.echo(f"{reader.cache.path} is ready")


@main.group()
def config() -> None:
    """What a run would be: named presets and their fields."""


@config.command("list")
def list_presets() -> None:
    """The presets, named after the paper's table rows, and the cache that one needs if not one of the default size."""
    width = max(map(len, PRESETS))
    for name, chosen in PRESETS.items():
        height, wide = chosen.smallest_cache()
        needs = f"{name:{width}}  a cache built with --image-size {height}x{wide}"
        click.echo(name if height <= STUDENT_SIZE[0] else needs)


@config.command()
@click.argument("name")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field.")
@reports_errors
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Every field of a preset, or of the config of a run directory, as key=value."""
    file = Path(name) / "config.json"
    chosen = Config.from_dict(json.loads(file.read_text())["config"]) if file.is_file() else preset(name)
    chosen = chosen.override(overrides)
    for key, value in chosen.flat().items():
        click.echo(f"{key}={json.dumps(value)}")
    click.echo("# needs a cache built with --image-size {}x{} or more".format(*chosen.smallest_cache()))


@main.command()
@cache_option
@click.option(
    "--preset", "asked", help=f"See 'config list'.  [default: {PRETRAINING}; its network, with --from, is that run's]"
)
@click.option("--occ-only", is_flag=True, help="Occupancy alone (Table 3).")
@click.option("--feat-only", is_flag=True, help="Features alone (Table 3).")
@click.option("--lambda", "lambda_", type=float, help="Weight of the feature loss (eq. 1, Table 4).")
@click.option(
    "--from", "initial", type=click.Path(path_type=Path), help="Run or checkpoint whose network and head to start from."
)
@training_options
@machine_options
@reports_errors
def pretrain(
    cache: Path, asked: str | None, occ_only: bool, feat_only: bool, lambda_: float | None, initial: Path | None, split: str, out: Path | None,
    overrides: tuple[str, ...], device: str, validate: str | None, workers: int, save_every: int, tensorboard: bool,
    progress: bool, **shortcuts: Any,
) -> None:  # fmt: skip
    """Pretrain a network on occupancy and features (paper 3); the preset's defaults are the paper's."""
    name = asked or PRETRAINING
    chosen = inherit(preset(name), initial, network=asked is None)
    if chosen.task != "pretrain":
        raise click.UsageError(f"--preset {name} is a finetuning: occfeat-train finetune --preset {name}")
    row = name
    if occ_only + feat_only + (lambda_ is not None) > 1:
        raise click.UsageError("--occ-only, --feat-only and --lambda exclude each other")
    if occ_only or feat_only:
        chosen = replace(chosen, loss=OCC_ONLY if occ_only else FEAT_ONLY)
        name += "-occ-only" if occ_only else "-feat-only"
    if lambda_ is not None:
        chosen = replace(chosen, loss=replace(chosen.loss, feat=lambda_))
        name += f"-lambda-{lambda_:g}"
    loop = {"save_every": save_every, "workers": workers, "tensorboard": tensorboard, "progress": progress}
    chosen, name = resolve(chosen, overrides, shortcuts), variant(name, shortcuts, initial)
    start_training(chosen, name, cache, split, out, device, validate, loop, initial=initial, preset=row)


@main.command()
@cache_option
@click.option(
    "--from",
    "initial",
    type=click.Path(path_type=Path),
    help="Pretrained run or checkpoint; without it, backbone weights alone.",
)
@click.option("--task", type=click.Choice(["vehicles", "map"]), help="What to segment.  [default: vehicles]")
@click.option(
    "--labels",
    type=click.FloatRange(0, 100, min_open=True),
    help=f"Percent of the training scenes with labels; the paper's recipes are for {', '.join(f'{p:g}' for p in LABELS)}.  [default: 100]",
)
@click.option(
    "--scenes",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with the label scenes' names instead, one a line.",
)
@click.option("--preset", "asked", help="A finetuning of 'config list' instead of --task and --labels.")
@training_options
@machine_options
@reports_errors
def finetune(
    cache: Path, initial: Path | None, task: Any, labels: float | None, scenes: Path | None, asked: str | None, split: str,
    out: Path | None, overrides: tuple[str, ...], device: str, validate: str | None, workers: int, save_every: int,
    tensorboard: bool, progress: bool, **shortcuts: Any,
) -> None:  # fmt: skip
    """Finetune for vehicles or map on a share of the labels, from a pretraining or from none (paper 4.1).

    With --from, the reference frame is the pretraining's, and so is the network unless --preset names one.
    """
    if asked is not None:
        if task is not None or labels is not None:
            raise click.UsageError("--preset already says --task and --labels")
        name, chosen = asked, preset(asked)
        if chosen.task == "pretrain":
            raise click.UsageError(f"--preset {name} is a pretraining: occfeat-train pretrain --preset {name}")
    else:
        task, labels = task or "vehicles", 100.0 if labels is None else labels
        name, chosen = f"{task}-{labels:g}", finetuning(task, labels, NetworkConfig())
    chosen = inherit(chosen, initial, network=asked is None)
    if scenes is not None:
        name += f"-{scenes.stem}"
    loop = {"save_every": save_every, "workers": workers, "tensorboard": tensorboard, "progress": progress}
    chosen, name = resolve(chosen, overrides, shortcuts), variant(name, shortcuts, initial, arms=True)
    start_training(
        chosen, name, cache, split, out, device, validate, loop, initial=initial, scenes=scenes, preset=asked or ""
    )


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@cache_option
@click.option("--split", default="val", show_default=True, help="Split to evaluate on, all of it.")
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples a forward pass and process."
)
@click.option("--frame", help="Reference frame of the grid: ego, or a camera's name.  [default: the run's]")
@click.option("--out", type=DIRECTORY, help="Where SPLIT.json goes.  [default: RUN/evaluation]")
@machine_options
@reports_errors
def evaluate(
    run: Path, cache: Path, split: str, batch: int, frame: str | None, out: Path | None, device: str, workers: int, progress: bool
) -> None:  # fmt: skip
    """Evaluate the newest checkpoint of a RUN: IoU at 0.5 over the whole split, at the best threshold, per class, by distance."""
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import Place, run_evaluation

    place = Place(cache, split, out or run / "evaluation", options=LoopOptions(workers=workers, progress=progress))
    with processes(device) as process:
        say = click.echo if process.is_main else lambda line: None
        run_evaluation(run, place, process, say, batch=batch, frame=frame)


@main.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@cache_option
@click.option("--split", default="val", show_default=True, help="Split to measure and show the runs on.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The file to write."
)
@click.option("--samples", type=click.IntRange(1), default=3, show_default=True, help="Keyframes to show.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reports_errors
def report(runs: tuple[Path, ...], cache: Path, split: str, out: Path, samples: int, device: str) -> None:
    """One HTML file about RUNs: curves, figures of merit, and what the networks make of a few keyframes.

    Results of 'evaluate' are used where they stand; what was not evaluated yet is.
    """
    from occfeat_train.distributed import processes
    from occfeat_train.report.page import write_report

    with processes(device) as process:
        write_report(runs, cache, split, out, process, click.echo, samples)


@main.command("import-reference")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--network",
    type=NETWORK,
    required=True,
    help="Segnet is simplebev, Bevformernet bevformer, liftnet2's Liftnet lss.",
)
@click.option("--backbone", type=BACKBONE, required=True, help="Its encoder.")
@click.option("--out", type=DIRECTORY, required=True, help="Run directory to make.")
@click.option(
    "--grid", metavar="ZxHxW", default="8x200x200", show_default=True, help="Cells up, forward, right of its grid."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field, such as network.image_size=448x800."
)
@reports_errors
def import_reference(
    checkpoint: Path, network: str, backbone: str, out: Path, grid: str, overrides: tuple[str, ...]
) -> None:  # fmt: skip
    """Take a CHECKPOINT of aharley/simple_bev and make a run of it, for 'evaluate' and 'finetune --from'.

    The run's compat is simple-bev: it computes what the reference does, on a cache whose grid is in the cameras' frames.
    """
    from occfeat_targets.cache.grid import VoxelGrid
    from occfeat_train.simple_bev.import_reference import import_reference

    cells = grid.split("x")
    if len(cells) != 3 or not all(n.isdigit() for n in cells):
        raise click.UsageError(f"--grid {grid}: ZxHxW expected, such as 8x200x200")
    chosen = NetworkConfig(network, backbone, weights="none", compat="simple-bev")  # type: ignore[arg-type]
    config = finetuning("vehicles", 100, chosen).override(overrides)
    z, h, w = (int(n) for n in cells)
    made = import_reference(checkpoint, config, VoxelGrid((z, h, w)), out)
    click.echo(
        f"{made}: {network} {backbone}, image size {config.network.image_size[0]}x{config.network.image_size[1]}"
    )
