"""Figure 4: the steps that build corrupted caches and evaluate runs on them.

CACHE/corruptions/fog-2/val.zarr     and 23 others, made from CACHE/val.zarr
RUN/corruptions.json                 IoU per corruption, mRR, and mCE against the run without pretraining
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES, CorruptionSpec
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import CacheError
from occfeat_targets.common.plural import count
from pipelines.recipes.data import Settings, build_name, cache_folder, dataroot, sizes
from pipelines.recipes.trainings import Training, run_directory
from pipelines.steps import Step

SUFFIX = "-corruptions"  # of the steps that evaluate a run


def caches(settings: Settings) -> dict[str, tuple[CorruptionSpec, Path]]:
    """{step that builds it: (its corruption, its folder)}."""
    specs = [CorruptionSpec(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    clean = cache_folder(settings, large=False)
    return {f"build-{spec.name}-{spec.severity}": (spec, clean / spec.folder) for spec in specs}


def builds(settings: Settings) -> list[Step]:
    """The builds of the corrupted caches; none if they are expected to be there."""
    root = dataroot(settings)
    if root is None:
        return []
    clean = cache_folder(settings, large=False)
    steps = []
    for name, (spec, folder) in caches(settings).items():
        command = (
            "occfeat_targets", "build", "--dataroot", str(root), "--cache", str(clean), "--split", "val",
            "--corruption", spec.name, "--severity", str(spec.severity), *(("--workers", "0") if settings.miniature else ()),
        )  # fmt: skip
        after = (build_name("val", large=False),)
        steps.append(Step(name, (command,), folder / "val.finished", "build", after, sizes(settings).val))
    return steps


def check_corrupted_caches(settings: Settings) -> None:
    """Raises ValueError that lists corrupted caches that are expected and not there, or not finished."""
    missing = [str(folder) for _, folder in caches(settings).values() if not _is_finished(folder / "val.zarr")]
    if missing:
        clean = cache_folder(settings, large=False)
        raise ValueError(
            f"{count(len(missing), 'corrupted cache')} not there or not finished ({', '.join(missing)}): pass --dataroot to build them, or build them with\n"
            f"occfeat-targets build --cache {clean} --split val --corruption all"
        )


def _is_finished(cache: Path) -> bool:
    try:
        return not open_cache(cache).pending_shards()
    except CacheError:
        return False


def evaluation_steps(trainings: Sequence[Training], seed: int, settings: Settings) -> list[Step]:
    """The runs of a seed on all corrupted caches. The first is the baseline of the others."""
    clean = cache_folder(settings, large=False)
    first = trainings[0]
    steps = []
    for each in trainings:
        run = run_directory(settings.out, each, seed)
        baseline = run_directory(settings.out, first, seed)
        command = (
            "occfeat_train", "evaluate", str(run), "--cache", str(clean), "--split", "val", "--no-progress",
            "--corruptions", str(clean / "corruptions"), *(("--baseline", str(baseline)) if each != first else ()),
        )  # fmt: skip
        needed = (f"{first.run_name(seed)}{SUFFIX}",) if each != first else ()
        after = (each.run_name(seed), build_name("val", large=False), *caches(settings), *needed)
        samples = len(caches(settings)) * sizes(settings).val
        name = f"{each.run_name(seed)}{SUFFIX}"
        steps.append(Step(name, (command,), run / "corruptions.finished", "evaluate", after, samples))
    return steps
