"""occfeat-train evaluate --corruptions: a run on all corrupted caches of a split (paper, Figure 4).

The results of a run are in RUN/corruptions.json, which is written after each cache, so that the same command continues. Those of another
protocol, seed or treatment of lost views are in a file of their own, such as RUN/corruptions-network.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from occfeat_targets.cache.corruption import CORRUPTIONS, LOST_VIEWS, SEVERITIES, CorruptionSpec
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.common.provenance import describe_origin
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process, gpu_names, prepare_together
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.metrics import as_text
from occfeat_train.tasks.robustness import corruption_errors, mean_of_all, means, resilience_rates
from occfeat_train.training.checkpoint import Checkpoint
from occfeat_train.training.compatibility import measured, notes_on_data, require_fit
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.saving import saving
from occfeat_train.training.stages import PACKAGES, RunOptions, prepare_evaluation

CLEAN = "clean"


@dataclass(frozen=True)
class CorruptionOptions:
    """directory: of the corrupted caches, NAME-SEVERITY/SPLIT.zarr. baseline: a run that mCE compares with, or None."""

    directory: Path
    baseline: Path | None = None
    batch: int = 8
    frame: str | None = None
    allow_upsampling: bool = False


@dataclass(frozen=True)
class _Prepared:
    """A run that is to be evaluated. file: of its results. datasets: {"clean" or NAME-SEVERITY: data set}. done: {the same: result}.

    unfinished: NAME-SEVERITY of caches whose build is not finished; they are not in `datasets`.
    """

    run: Path
    file: Path
    checkpoint: Checkpoint
    task: Task
    datasets: dict[str, KeyframeDataset]
    done: dict[str, dict[str, Any]]
    unfinished: tuple[str, ...]

    @property
    def absent(self) -> list[str]:
        """NAME-SEVERITY of all that cannot be evaluated."""
        return [name for name in _all_names() if name not in self.datasets]

    @property
    def missing(self) -> list[str]:
        return [name for name in self.datasets if name not in self.done]

    def scores(self) -> dict[str, dict[int, float]]:
        """{corruption: {severity: IoU [%]}}."""
        found: dict[str, dict[int, float]] = {}
        for name in CORRUPTIONS:
            levels = {
                level: self.done[f"{name}-{level}"]["iou"] for level in SEVERITIES if f"{name}-{level}" in self.done
            }
            if levels:
                found[name] = levels
        return found


def results_file(run: Path, corruptions: Sequence[CorruptionSpec]) -> Path:
    """RUN/corruptions.json; of a checkpoint RUN/evaluation/NAME/corruptions.json.

    corruptions: of the caches; their protocol, seed and masking give the file its name, as the build names their directory.
    """
    is_checkpoint = run.parent.name == "checkpoints"
    named_after = next((spec for spec in corruptions if spec.masks_lost), corruptions[0])
    name = Path(named_after.folder).parent.name
    return (run.parent.parent / "evaluation" / run.name if is_checkpoint else run) / f"{name}.json"


def run_corruptions(path: Path, options: RunOptions, corruption: CorruptionOptions, process: Process) -> dict[str, Any]:
    """Evaluate a run, and the baseline if there is one, on the clean split and on all corrupted caches that are there.

    options: `cache` is the directory of the clean cache; `out` and training options are not read. Results in a run's file that are of
    the same weights and cache are kept. Returns what is written to the run's file.
    A cache that is not finished is listed with the missing ones. Raises ValueError if there is no finished corrupted cache, if one holds other
    keyframes than the clean one or another corruption than its folder says, or if they differ in protocol, seed or masking.
    """
    paths = [path] if corruption.baseline is None else [path, corruption.baseline]
    runs = prepare_together(lambda: [_prepare(each, options, corruption) for each in paths])
    process.print(*dict.fromkeys(line for each in runs for line in _notes(each)))
    if runs[0].absent:
        process.print(f"missing in {corruption.directory}: {_listed(runs[0].absent, runs[0].unfinished)}")
    samples = sum(-(-len(each.datasets[name]) // process.world) for each in runs for name in each.missing)
    todo = sum(len(each.missing) for each in runs)
    process.print(
        f"{count(todo, 'evaluation')} of {sum(len(each.datasets) for each in runs)} to do, {count(samples, 'sample')} a rank, on {process.device}"
    )
    bar = progress_bar(
        samples, unit="sample", desc="corruptions", disable=not (options.loop.progress and process.is_main)
    )
    with bar:
        for each in reversed(runs):  # the baseline first, so that the run's file has its errors
            for name in each.missing:
                metric = evaluate(
                    each.task, each.datasets[name], process, batch=corruption.batch, workers=options.loop.workers,
                    progress=False, advance=bar.update,
                )  # fmt: skip
                iou = each.task.score(metric.results())
                if iou is None:
                    raise ValueError(
                        f"{each.datasets[name].reader.cache.path} has no labelled cell, so there is no IoU: build the split with more scenes"
                    )
                each.done[name] = {
                    **measured(each.checkpoint, each.datasets[name]),
                    "iou": iou,
                    "samples": metric.num_samples,
                }
                _write(each, _summary(each, options.split, None, process), process)
    summary = _summary(runs[0], options.split, runs[1] if len(runs) > 1 else None, process)
    _write(runs[0], summary, process)
    process.print(*describe(summary), f"written to {runs[0].file}")
    return summary


def _all_names() -> list[str]:
    return [f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES]


def _prepare(run: Path, options: RunOptions, corruption: CorruptionOptions) -> _Prepared:
    checkpoint, clean, task = prepare_evaluation(
        run, options, corruption.frame, allow_upsampling=corruption.allow_upsampling
    )
    info = checkpoint.info
    if info.config.is_pretext:
        raise ValueError(f"{run} is a pretraining: --corruptions evaluates runs of finetune")
    if clean.reader.cache.spec.corruption is not None:
        raise ValueError(f"{clean.reader.cache.path} holds corrupted images: pass the clean one's directory as --cache")
    readers = _open_corrupted(corruption.directory, options.split)
    unfinished = [name for name, reader in readers.items() if len(reader.records) < reader.cache.num_shards]
    datasets = {CLEAN: clean}
    for name in (name for name in readers if name not in unfinished):
        dataset = KeyframeDataset(readers[name], task.config, training=False)
        require_fit(dataset, info.grid, info.feature_dim, str(checkpoint.path))
        if dataset.digest != clean.digest:
            raise ValueError(
                f"{dataset.reader.cache.path} has other keyframes than {clean.reader.cache.path}, and IoUs over different keyframes cannot be "
                "compared: make it again, with --overwrite"
            )
        datasets[name] = dataset
    if len(datasets) == 1:
        raise ValueError(
            f"no {'finished ' * bool(unfinished)}corrupted cache of {options.split} at {corruption.directory}: expected "
            f"fog-1/{options.split}.zarr and others, which 'occfeat-targets build --split {options.split} --corruption all' makes in "
            "CACHE/corruptions" + (f"; not finished: {', '.join(unfinished)}" if unfinished else "")
        )
    specs = [reader.cache.spec.corruption for reader in readers.values()]
    file = results_file(run, [spec for spec in specs if spec is not None])
    done = _read_done(file, checkpoint, datasets)
    return _Prepared(run, file, checkpoint, task, datasets, done, tuple(unfinished))


def _open_corrupted(directory: Path, split: str) -> dict[str, CacheReader]:
    """{NAME-SEVERITY: its cache, finished or not}. Raises ValueError if a cache is not what its folder says, or they do not belong together."""
    readers, specs = {}, {}
    for name in _all_names():
        path = directory / name / f"{split}.zarr"
        if not path.is_dir():
            continue
        readers[name] = CacheReader(path, allow_incomplete=True)
        spec = readers[name].cache.spec.corruption
        held = "clean images" if spec is None else f"{spec.name}-{spec.severity}"
        if spec is None or held != name:
            raise ValueError(f"{path} holds {held}, but its folder says {name}: move it, or make it again")
        specs[path] = spec
    for field in ("protocol", "seed", "masks_lost"):  # the other six corruptions lose no view that could be masked
        chosen = {path: spec for path, spec in specs.items() if field != "masks_lost" or spec.name in LOST_VIEWS}
        found = {getattr(spec, field): path for path, spec in chosen.items()}
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise ValueError(
                f"{first} has {field} {one}, {second} has {field} {other}: results of the two cannot be compared; keep each in a directory "
                "of its own, as the build does"
            )
    return readers


def _listed(names: Sequence[str], unfinished: Sequence[str]) -> str:
    return ", ".join(f"{name} (not finished)" if name in unfinished else name for name in names)


def _read_done(
    file: Path, checkpoint: Checkpoint, datasets: Mapping[str, KeyframeDataset]
) -> dict[str, dict[str, Any]]:
    """Results of an earlier call that are of the same weights, cache and keyframes."""
    try:
        found = json.loads(file.read_text())["evaluations"]
        return {
            name: found[name]
            for name, dataset in datasets.items()
            if name in found and measured(checkpoint, dataset).items() <= found[name].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or damaged: evaluated again
        return {}


def _notes(prepared: _Prepared) -> list[str]:
    caches = [dataset.reader.cache for dataset in prepared.datasets.values()]
    lines = [line for cache in caches for line in cache.warnings] + prepared.checkpoint.info.warnings()
    lines += notes_on_data(prepared.datasets[CLEAN])
    how = {cache.spec.corruption.protocol for cache in caches if cache.spec.corruption is not None}
    return [
        f"{prepared.checkpoint.path}: {prepared.checkpoint.describe_step()}; corruptions: {', '.join(sorted(how))}",
        *lines,
    ]


def _summary(prepared: _Prepared, split: str, baseline: _Prepared | None, process: Process) -> dict[str, Any]:
    scores, info = prepared.scores(), prepared.checkpoint.info
    clean = prepared.done[CLEAN]["iou"] if CLEAN in prepared.done else None
    rates = resilience_rates(scores, clean or 0.0)
    summary: dict[str, Any] = {
        "checkpoint": str(prepared.checkpoint.path),
        "task": info.config.task,
        "split": split,
        "clean": clean,
        "scores": {name: {str(level): iou for level, iou in levels.items()} for name, levels in scores.items()},
        "mean": means(scores),
        "resilience_rate": rates,
        "mRR": mean_of_all(rates),
        "missing": prepared.absent,
        "not_finished": list(prepared.unfinished),
    }
    if baseline is not None:
        errors = corruption_errors(scores, baseline.scores())
        summary |= {
            "baseline": {
                "checkpoint": str(baseline.checkpoint.path),
                "clean": baseline.done[CLEAN]["iou"],
                "mean": means(baseline.scores()),
            },
            "corruption_error": errors,
            "mCE": mean_of_all(errors),
        }
    caches = [dataset.reader.cache for dataset in prepared.datasets.values()]
    specs = {name: dataset.reader.cache.spec.corruption for name, dataset in prepared.datasets.items()}
    return summary | {
        "simulated": list(dict.fromkeys([line for cache in caches for line in cache.warnings] + info.warnings())),
        "origin": describe_origin(PACKAGES, gpu_names(process)),
        "corruptions": {name: asdict(spec) for name, spec in specs.items() if spec is not None},
        "evaluations": prepared.done,
    }


def _write(prepared: _Prepared, summary: Mapping[str, Any], process: Process) -> None:
    if process.is_main:
        with saving(prepared.file):
            prepared.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(prepared.file, json.dumps(summary, indent=1).encode())


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The results as a table."""
    has_baseline = "baseline" in summary
    header = ["IoU at 0.5 [%]", "easy", "mid", "hard", "mean", "RR", *(["baseline", "CE"] * has_baseline)]
    rows = [[CLEAN, "", "", "", as_text(summary["clean"]), ""]]
    if has_baseline:
        rows[0] += [as_text(summary["baseline"]["clean"]), ""]
    for name in CORRUPTIONS:
        levels = summary["scores"].get(name, {})
        row = [
            name,
            *(as_text(levels.get(str(severity))) for severity in SEVERITIES),
            as_text(summary["mean"].get(name)),
        ]
        row.append(as_text(summary["resilience_rate"].get(name)))
        if has_baseline:
            row += [as_text(summary["baseline"]["mean"].get(name)), as_text(summary["corruption_error"].get(name))]
        rows.append(row)
    rows.append(["mean of all eight", "", "", "", "", as_text(summary["mRR"])])
    if has_baseline:
        rows[-1] += ["", as_text(summary["mCE"])]
    lines = [f"{row[0]:18}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in [header, *rows]]
    if summary["missing"]:
        lines.append(f"missing: {_listed(summary['missing'], summary['not_finished'])}; mRR and mCE need all 24")
    return lines
