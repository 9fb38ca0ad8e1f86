"""The caches of the recipes: where they are, the commands that build them, their sizes, and checks of existing ones.

    CACHE/train.zarr, val.zarr             for networks of 224x400
    CACHE/large/train.zarr, val.zarr       for those of 448x800 (Table 2)

A training always reads the same cache, whatever recipe asks for it, so it never has to be repeated for another recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from occfeat_targets.sources.splits import split_scenes
from occfeat_train.cache_needs import bytes_per_keyframe
from occfeat_train.config import DEFAULT_TEACHER, Config
from occfeat_train.presets import preset
from occfeat_train.training.paper import DATA, EVALUATION_DATA
from pipelines.recipes.trainings import Training
from pipelines.steps import Step

RANDOM_TEACHER = f"random:{DEFAULT_TEACHER}"
LARGE = preset("table2/simplebev-enb0-448x800/occfeat")
VERSION = "v1.0-trainval"
# The city of a miniature: scenes of one keyframe.
TRAIN_SCENES, VAL_SCENES = 2, 2
_CITY = ("--version", VERSION, "--scenes", f"{TRAIN_SCENES}", "--val-scenes", f"{VAL_SCENES}", "--keyframes", "1", "--sweeps", "1", "--image-size", "90x160")  # fmt: skip
_SMALL_BUILD = (
    "--teacher-dtype", "float32", "--feature-size", "28x56", "--grid", "2x16x16", "--range", *["-5", "5", "-25", "25", "-25", "25"],
    "--workers", "0",
)  # fmt: skip
SMALL_IMAGES, LARGE_IMAGES = "40x70", "80x140"  # of a miniature


@dataclass(frozen=True)
class Settings:
    """What a recipe is run with.

    out: directory of runs, logs and reports. cache: directory of caches. dataroot: of nuScenes, from which missing caches are
    built; None if they must be there. teacher: of these builds. miniature: a synthetic city, a teacher of random weights and
    tiny networks instead.
    """

    out: Path
    cache: Path
    dataroot: Path | None = None
    teacher: str = DEFAULT_TEACHER
    seeds: int = 1
    miniature: bool = False


def dataroot(settings: Settings) -> Path | None:
    """The data set from which caches are built; None if they are expected."""
    return settings.out / "city" if settings.miniature else settings.dataroot


@dataclass(frozen=True)
class Sizes:
    """Keyframes of the splits, and scenes of the training split."""

    train: int
    val: int
    scenes: int

    def samples(self, labels: float) -> int:
        """Training keyframes with a share of the labels [%], for scenes of the same length."""
        return round(max(int(self.scenes * labels / 100), 1) * self.train / self.scenes)


def sizes(settings: Settings) -> Sizes:
    """Of the miniature's city, or of nuScenes."""
    if settings.miniature:
        return Sizes(TRAIN_SCENES, VAL_SCENES, TRAIN_SCENES)
    return Sizes(int(DATA["keyframes"]), int(EVALUATION_DATA["keyframes"]), len(split_scenes()["train"]))


def cache_folder(settings: Settings, *, large: bool) -> Path:
    return settings.cache / "large" if large else settings.cache


def build_name(split: str, *, large: bool) -> str:
    return f"build-{'large-' if large else ''}{split}"


def build_options(settings: Settings, split: str, *, large: bool) -> tuple[str, ...]:
    """Of a cache for all trainings of the paper's tables: camera frames as in Simple-BEV, and LiDAR returns for Img-ALSO."""
    height, width = LARGE.smallest_cache()
    images = LARGE_IMAGES if large else SMALL_IMAGES
    size = (
        ("--image-size", images if settings.miniature else f"{height}x{width}") if large or settings.miniature else ()
    )
    teacher = "none" if large and split == "val" else settings.teacher  # only finetunings are evaluated on it
    return (
        "--version", VERSION, "--split", split, "--frames", "cameras", "--teacher", teacher, *size,
        *(("--points",) if split == "train" else ()), *(_SMALL_BUILD if settings.miniature else ()),
    )  # fmt: skip


def data_steps(settings: Settings, *, large: Iterable[bool]) -> list[Step]:
    """The city of a miniature, and the builds of the caches with and without large images; nothing if the caches are expected."""
    root = dataroot(settings)
    if root is None:
        return []
    steps = []
    if settings.miniature:
        command = ("occfeat_targets", "synth", "--out", str(root), *_CITY)
        steps.append(Step("city", (command,), root / VERSION / "scene.json", "cpu"))
    keyframes = sizes(settings)
    for is_large in sorted(set(large)):
        folder = cache_folder(settings, large=is_large)
        for split, number in (("train", keyframes.train), ("val", keyframes.val)):
            options = build_options(settings, split, large=is_large)
            command = ("occfeat_targets", "build", "--dataroot", str(root), "--cache", str(folder), *options)
            after = ("city",) if settings.miniature else ()
            done = folder / f"{split}.finished"
            steps.append(Step(build_name(split, large=is_large), (command,), done, "build", after, number))
    return steps


def build_bytes(split: str, *, large: bool) -> int:
    """Estimated bytes of a keyframe of nuScenes in a cache, with the features of DINOv2-small."""
    task = "img-also" if split == "train" else "occfeat"  # with LiDAR returns
    found = bytes_per_keyframe(replace(LARGE if large else Config(), task=task, frame="cameras"))
    assert found is not None
    return found


def check_caches(settings: Settings, trainings: Sequence[Training], drawn: Sequence[Training]) -> None:
    """Raises ValueError that lists what is missing in caches that are expected to be there. drawn: pretrainings that also read val."""
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_train.data.dataset import KeyframeDataset
    from occfeat_train.training.compatibility import require_teacher

    problems: dict[str, None] = {}
    builds = []
    for large in sorted({each.large for each in trainings}):
        # One of those that read the same, because a check looks for every file of a cache.
        found = [(preset(each.preset), each in drawn) for each in trainings if each.large == large]
        distinct = {(c.task, c.network.image_size, c.loss, is_drawn): c for c, is_drawn in found}
        for split in ("train", "val"):
            folder = cache_folder(settings, large=large)
            try:
                reader = CacheReader(folder / f"{split}.zarr")
                for (*_, is_drawn), config in distinct.items():
                    if split == "train" or not config.is_pretext or is_drawn:
                        require_teacher(config, KeyframeDataset(reader, config, training=split == "train"))
            except ValueError as err:
                problems[str(err)] = None
                builds.append(
                    f"occfeat-targets build --cache {folder} {shlex.join(build_options(settings, split, large=large))}"
                )
    if problems:
        raise ValueError(
            f"caches are missing or do not fit: {'; '.join(problems)}\npass --dataroot to build them, or build them with\n"
            + "\n".join(builds)
        )
