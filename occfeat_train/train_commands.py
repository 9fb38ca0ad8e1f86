"""The commands that train: occfeat-train pretrain, finetune."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.common.command_line import LocalPath, examples, names_of
from occfeat_targets.common.paths import local_path
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from occfeat_train.config import PRETEXTS, Config, NetworkConfig
from occfeat_train.options import caches_option, initial_option, machine_options, reports_errors, training_options
from occfeat_train.presets import FEAT_ONLY, LABELS, OCC_ONLY, PRESETS, finetuning, preset

PRETRAINING = "table1/simplebev-enb0/occfeat"
STOPPED, INTERRUPTED = 3, 130  # exit codes of a training that the same command continues


# Options that change a field of the preset.
FIELDS = {
    "network": "network.lifting",
    "backbone": "network.backbone",
    "backbone_weights": "network.weights",
    "epochs": "optim.epochs",
    "batch": "optim.batch",
    "seed": "seed",
    "compile": "compile",
    "label_rule": "label_scenes.rule",
    "scene_order": "label_scenes.order",
    "label_seed": "label_scenes.seed",
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
    if len(given["caches"]) > 1:
        parts.append(count(len(given["caches"]), "cache").replace(" ", "-"))
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
    changed = [f"{FIELDS[option]}={json.dumps(given[option])}" for option in FIELDS if given.get(option) is not None]
    changed += ["allow_upsampling=true"] * given["allow_upsampling"]
    config = config.override([*changed, *given["overrides"]])
    out = given["out"] or local_path("runs") / run_name(name, given, arms=arms)
    again = f"run the same command again{' without --overwrite' * given['overwrite']} to continue {out}"
    with exit_on_signals(f"stopped by a signal outside of the training: {again}"):
        _train(config, out, given, preset, again)


@contextlib.contextmanager
def exit_on_signals(message: str) -> Iterator[None]:
    """Exit with STOPPED on SIGTERM and SIGUSR1, before and after the training itself, which handles them on its own.

    Setting up takes seconds, in which a job may be told to stop, and the signals would end the process with another code.
    """

    def stop(*_: object) -> None:
        echo(message, err=True)
        sys.exit(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(config: Config, out: Path, given: dict[str, Any], preset: str, again: str) -> None:
    from occfeat_train.distributed import processes
    from occfeat_train.training.loop import LoopOptions
    from occfeat_train.training.stages import RunOptions, run_training

    loop = LoopOptions(*(given[option] for option in ("save_every", "workers", "tensorboard", "progress")))
    options = RunOptions(
        given["caches"][0], given["split"], out, given["validate"], loop, given["initial"], given.get("scenes"), preset,
        given["allow_unfinished"], given["overwrite"], given["caches"][1:],
    )  # fmt: skip
    try:
        with processes(given["device"]) as process:
            finished = run_training(config, options, process)
            process.print(f"finished: {out}" if finished else f"stopped by a signal and saved: {again}")
    except KeyboardInterrupt:
        echo(f"interrupted, and nothing saved after the newest checkpoint: {again}", err=True)
        sys.exit(INTERRUPTED)
    if not finished:
        sys.exit(STOPPED)


@click.command(
    short_help="Pretrain a network without labels.",
    epilog=examples(
        "occfeat-train pretrain --validate val",
        "occfeat-train pretrain --preset table1/simplebev-rn50/occfeat-100ep --out runs/rn50",
        "occfeat-train pretrain --occ-only --epochs 5 --set optim.lr=5e-4",
        "occfeat-train pretrain --method img-also  # on a cache built with --points",
        "occfeat-train pretrain --cache nuscenes --cache other  # on the keyframes of both",
    ),
)
@caches_option
@click.option(
    "--preset",
    "asked",
    metavar="NAME",
    help=f"A pretraining preset of 'config list'; without it, --from also sets the network.  [default: {PRETRAINING}, or that of --method]",
)
@click.option(
    "--method",
    type=names_of(PRETEXTS),
    help="Pretext task: occfeat, the paper's, or its baseline Img-ALSO, which needs a cache built with --points.  [default: the preset's, occfeat]",
)
@click.option("--occ-only", is_flag=True, help="Only the occupancy loss (Table 3).")
@click.option("--feat-only", is_flag=True, help="Only the feature loss (Table 3).")
@click.option(
    "--lambda",
    "lambda_",
    type=float,
    metavar="WEIGHT",
    help="Weight of the feature loss (eq. 1, Table 4).  [default: the preset's, 0.01]",
)
@click.option(
    "--occ-on",
    type=click.Choice(["all", "observed"]),
    help="Voxels of the occupancy loss: all, or only those that LiDAR rays have passed or ended in, of a cache built with --rays.  "
    "[default: the preset's, all]",
)
@click.option(
    "--occlusion",
    type=click.Choice(["none", "zbuffer"]),
    help="Depth test for the target features: none, or a depth buffer that leaves out views in which other occupied voxels hide a voxel.  "
    "[default: the preset's, none]",
)
@initial_option(help="Run or checkpoint with the initial weights of network and head.")
@training_options
@machine_options
@reports_errors
def pretrain(
    asked: str | None,
    method: str | None,
    occ_only: bool,
    feat_only: bool,
    lambda_: float | None,
    occ_on: Literal["all", "observed"] | None,
    occlusion: Literal["none", "zbuffer"] | None,
    **given: Any,
) -> None:
    """Pretrain a network on occupancy and features (paper, section 3), or with another pretext task. The defaults are the paper's values."""
    of_method = f"table1/simplebev-enb0/{method}"
    name = row = asked or (of_method if of_method in PRESETS else PRETRAINING)
    chosen = inherit(preset(name), given["initial"], network=asked is None)
    if not chosen.is_pretext:
        raise click.UsageError(f"--preset {name} is a finetuning preset: use occfeat-train finetune --preset {name}")
    if method not in (None, chosen.task):
        chosen, name = replace(chosen, task=method), f"{name}-{method}"
    if occ_only + feat_only + (lambda_ is not None) > 1:
        raise click.UsageError("--occ-only, --feat-only and --lambda exclude each other: pass one of them")
    if chosen.task != "occfeat" and (occ_only or feat_only or {lambda_, occ_on, occlusion} != {None}):
        raise click.UsageError(
            f"--occ-only, --feat-only, --lambda, --occ-on and --occlusion are about occfeat's losses, not {chosen.task}'s"
        )
    if feat_only and occ_on is not None:
        raise click.UsageError("--feat-only has no occupancy loss: leave --occ-on out")
    if occ_only or feat_only:
        chosen = replace(chosen, loss=OCC_ONLY if occ_only else FEAT_ONLY)
        name += "-occ-only" if occ_only else "-feat-only"
    if lambda_ is not None:
        chosen = replace(chosen, loss=replace(chosen.loss, feat=lambda_))
        name += f"-lambda-{lambda_:g}"
    if occ_on is not None and occ_on != chosen.loss.occ_on:
        chosen = replace(chosen, loss=replace(chosen.loss, occ_on=occ_on))
        name += f"-occ-on-{occ_on}"
    if occlusion is not None and not chosen.loss.feat:
        raise click.UsageError("--occlusion is about the feature loss, which this run does not have: leave it out")
    if occlusion is not None and occlusion != chosen.loss.occlusion:
        chosen = replace(chosen, loss=replace(chosen.loss, occlusion=occlusion))
        name += f"-occlusion-{occlusion}"
    train(chosen, name, given, preset=row)


def choice_of_scenes(config: Config, given: dict[str, Any]) -> str:
    """The part of a finetuning's default name that says which scenes it uses. Raises UsageError on options that exclude each other."""
    chosen = {name: given[name] for name in ("label_rule", "scene_order", "label_seed") if given[name] is not None}
    if given["scenes"] is not None:
        if chosen:
            raise click.UsageError(
                f"--scenes is the list of scenes: leave --{next(iter(chosen)).replace('_', '-')} out"
            )
        return f"-{given['scenes'].stem}"
    if "label_seed" in chosen and chosen.get("label_rule", config.label_scenes.rule) != "random":
        raise click.UsageError("--label-seed is for --label-rule random: add that option, or leave --label-seed out")
    words = {"label_rule": "", "scene_order": "order-", "label_seed": "scenes-"}
    return "".join(f"-{words[name]}{value}" for name, value in chosen.items())


@click.command(
    short_help="Finetune for segmentation with a fraction of the labels.",
    epilog=examples(
        "occfeat-train finetune --labels 1 --from runs/table1-simplebev-enb0-occfeat",
        "occfeat-train finetune --labels 1        # the same without pretraining",
        "occfeat-train finetune --task map --labels 10 --validate val",
    ),
)
@caches_option
@initial_option(
    help="Pretrained run or checkpoint to start from; without it, only the backbone is initialised from trained weights."
)
@click.option("--task", type=names_of(LABEL_KINDS), help="Kind of labels to segment.  [default: vehicles]")
@click.option(
    "--labels",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help=f"Percentage of the training scenes whose labels are used; the paper's recipes are for {', '.join(f'{p:g}' for p in LABELS)}.  [default: 100]",
)
@click.option(
    "--scenes",
    type=LocalPath(path_type=Path, exists=True, dir_okay=False),
    help="File with the names of the scenes whose labels are used, one per line; replaces --labels.  [default: none]",
)
@click.option(
    "--label-rule",
    type=click.Choice(["last-of-block", "first-of-block", "random"]),
    help="Scenes that --labels keeps: at 1 % the last of every 100, as in SLidR and ALSO, or the first; or random ones.  [default: the preset's, last-of-block]",
)
@click.option(
    "--scene-order",
    type=click.Choice(["table", "split"]),
    help="Order in which scenes are counted: that of the data set's own table, as in SLidR and ALSO, or of the list of the split.  [default: the preset's, table]",
)
@click.option(
    "--label-seed",
    type=click.IntRange(0),
    metavar="N",
    help="Seed of --label-rule random; --seed does not change the scenes.  [default: the preset's, 0]",
)
@click.option(
    "--preset",
    "asked",
    metavar="NAME",
    help="A finetuning preset of 'config list'; replaces --task and --labels.  [default: that of --task and --labels]",
)
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
    name += choice_of_scenes(chosen, given)
    train(inherit(chosen, given["initial"], network=asked is None), name, given, preset=asked or "", arms=True)
