"""The command line: occfeat-train check, config, pretrain, finetune, evaluate, report, figures, import-reference.

Exit codes: 0 success; 1 error; 2 wrong usage; 3 training stopped early by a signal, with a checkpoint saved; 130
interrupted by a second Ctrl-C.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from occfeat_targets.common.command_line import (
    SETTINGS,
    VARIABLES,
    LocalPath,
    WorkOrder,
    describe_variables,
    examples,
    names_of,
)
from occfeat_targets.common.terminal import echo
from occfeat_train.cache_needs import bytes_per_keyframe
from occfeat_train.config import REFERENCE_LIFTINGS, Config, NetworkConfig
from occfeat_train.options import (
    BACKBONE,
    COUNT,
    DIRECTORY,
    PATH,
    UPSAMPLING_OPTION,
    cache_option,
    machine_options,
    reports_errors,
    set_option,
)
from occfeat_train.presets import PRESETS, finetuning, preset
from occfeat_train.report_commands import figures, report
from occfeat_train.train_commands import finetune, pretrain


@click.group(cls=WorkOrder, context_settings=SETTINGS, epilog=describe_variables(VARIABLES))
@click.version_option(package_name="occfeat")
def main() -> None:
    """Train bird's-eye-view networks on a cache of OccFeat targets.

    The commands are listed in the order of work. 'occfeat-train COMMAND --help' shows the options, with examples.
    """


@main.command(
    short_help="Check whether a cache can be trained on.", epilog=examples("occfeat-train check --split train")
)
@cache_option
@click.option("--split", metavar="SPLIT", required=True, help="Split of the cache: train, val, mini_train, ...")
@click.option("--samples", type=COUNT, metavar="N", default=64, help="Random keyframes to read.")
@reports_errors
def check(cache: Path, split: str, samples: int) -> None:
    """Check whether a cache can be trained on: read random keyframes and sample their target features."""
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_train.data.check import check_cache

    reader = CacheReader(cache / f"{split}.zarr")
    echo("\n".join([*reader.cache.spec.describe(), *reader.cache.warnings]))
    readiness = check_cache(reader, samples)
    echo("\n".join(readiness.describe()))
    echo(f"{reader.cache.path} is ready for {' and '.join(readiness.ready_for)}")


@main.group(cls=WorkOrder)
def config() -> None:
    """List presets and show their fields."""


@config.command("list", short_help="List the presets.", epilog=examples("occfeat-train config list"))
def list_presets() -> None:
    """List the presets, named after the rows of the paper's tables, and the cache each needs if not the default one."""
    width = max(map(len, PRESETS))
    for name, chosen in PRESETS.items():
        needs = " ".join(chosen.build_options)
        echo(f"{name:{width}}  a cache built with {needs}" if needs else name)


@config.command(
    short_help="Print every field of a preset or run.",
    epilog=examples(
        "occfeat-train config show table1/simplebev-enb0/occfeat",
        "occfeat-train config show runs/vehicles-1-scratch",
    ),
)
@click.argument("name")
@set_option(help="Change a field.")
@reports_errors
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Print every field of a preset or of a run directory's config, as key=value."""
    file = Path(name) / "config.json"
    try:
        chosen = Config.from_dict(json.loads(file.read_text())["config"]) if file.is_file() else preset(name)
    except ValueError as err:
        raise ValueError(f"{err}; as a run, there is no {file}" if not file.exists() else str(err)) from err
    chosen = chosen.override(overrides)
    for key, value in chosen.flat().items():
        echo(f"{key}={json.dumps(value)}")
    height, width = chosen.smallest_cache()
    others = [option for option in chosen.build_options if not option.startswith("--image-size")]
    more = f", and {' '.join(others)}" if others else ""
    echo(f"# needs a cache built with --image-size {height}x{width} or more{more}")
    if (size := bytes_per_keyframe(chosen)) is not None:
        echo(f"# about {size / 1e6:.1f} MB per keyframe of nuScenes, {size * 28_130 / 1e9:.0f} GB for its train split")


main.add_command(pretrain)
main.add_command(finetune)


@main.command(
    short_help="Evaluate a run on a whole split.",
    epilog=examples(
        "occfeat-train evaluate runs/vehicles-1-scratch",
        "occfeat-train evaluate runs/vehicles-1-scratch/checkpoints/best --split val",
        "occfeat-train evaluate runs/occfeat --corruptions cache/corruptions --baseline runs/scratch  # Figure 4",
    ),
)
@click.argument("run", type=PATH)
@cache_option
@click.option(
    "--split",
    metavar="SPLIT",
    default="val",
    help="Split to evaluate; keyframes that were skipped, or whose frame is that of a masked camera, are left out.",
)
@click.option("--batch", type=COUNT, metavar="N", default=8, help="Samples per forward pass and rank.")
@click.option(
    "--frame", metavar="FRAME", help="Reference frame of the grid: ego, or the name of a camera.  [default: the run's]"
)
@click.option(
    "--out",
    type=DIRECTORY,
    help="Directory of the results, written to SPLIT.json.  [default: RUN/evaluation; of a checkpoint RUN/evaluation/NAME]",
)
@click.option(
    "--corruptions",
    type=DIRECTORY,
    metavar="DIR",
    help="Evaluate on all corrupted caches of the split in DIR, and on the clean one in --cache; written to RUN/corruptions.json, or to RUN/corruptions-network.json and the like for another protocol, seed or masking. The same command continues.  [default: none]",
)
@click.option(
    "--baseline",
    type=PATH,
    metavar="RUN",
    help="Run that the mean corruption error (mCE) of --corruptions compares with; it is evaluated, too.  [default: none]",
)
@UPSAMPLING_OPTION
@machine_options
@reports_errors
def evaluate(
    run: Path, cache: Path, split: str, batch: int, frame: str | None, out: Path | None, corruptions: Path | None, baseline: Path | None,
    allow_upsampling: bool, device: str, workers: int, progress: bool,
) -> None:  # fmt: skip
    """Evaluate the newest checkpoint of RUN, or a checkpoint such as RUN/checkpoints/best: IoU over all usable keyframes of the split at 0.5 and at the best threshold, per class and distance."""
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import RunOptions, run_evaluation

    loop = LoopOptions(workers=workers, progress=progress)
    if corruptions is None and baseline is not None:
        raise click.UsageError("--baseline is for --corruptions: pass both, or leave it out")
    if corruptions is not None:
        from occfeat_train.training.robustness import CorruptionOptions, run_corruptions

        if out is not None:
            raise click.UsageError(
                "--out: the results of --corruptions are written to RUN/corruptions.json (of another protocol, seed or masking, to RUN/corruptions-network.json and the like): leave it out"
            )
        given = CorruptionOptions(corruptions, baseline, batch, frame, allow_upsampling)
        with processes(device) as process:
            run_corruptions(run, RunOptions(cache, split, run, loop=loop), given, process)
        return
    is_checkpoint = run.parent.name == "checkpoints"
    default = run.parent.parent / "evaluation" / run.name if is_checkpoint else run / "evaluation"
    options = RunOptions(cache, split, out or default, loop=loop)
    with processes(device) as process:
        run_evaluation(run, options, process, batch=batch, frame=frame, allow_upsampling=allow_upsampling)


main.add_command(report)
main.add_command(figures)


@main.command(
    "import-reference",
    short_help="Convert a checkpoint of aharley/simple_bev into a run.",
    epilog=examples(
        "occfeat-train import-reference model.pth --network simplebev --backbone resnet-101 --out runs/segnet"
    ),
)
@click.argument("checkpoint", type=LocalPath(path_type=Path, exists=True))
@click.option(
    "--network",
    type=names_of(REFERENCE_LIFTINGS),
    required=True,
    help="simplebev for Segnet, bevformer for Bevformernet, lss for liftnet2's Liftnet.",
)
@click.option("--backbone", type=BACKBONE, required=True, help="Image encoder of the checkpoint.")
@click.option("--out", type=DIRECTORY, required=True, help="Run directory to create.")
@click.option("--grid", metavar="ZxHxW", default="8x200x200", help="Number of grid cells up, forward, right.")
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
    echo(f"{made}: {network} {backbone}, image size {'x'.join(map(str, config.network.image_size))}")
