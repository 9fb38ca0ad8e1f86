"""The design of the study: arms, sizes, and the runs that follow from them, as values.

An arm is a way to start a network; a run is one training and its evaluation. Arms with the same seed see the same samples in
the same order, so their results are paired.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = ("vehicles", "map")
NONE, OCCUPANCY, FEATURES, OCCFEAT = "none", "occupancy only", "features only", "OccFeat"
OCCFEAT_RANDOM = f"{OCCFEAT}, random teacher"
IMG_ALSO = "Img-ALSO"
LONGER = "none, 3 times the steps"
OCCFEAT_LONGER = f"{OCCFEAT}, 3 times the steps"


@dataclass(frozen=True)
class Arm:
    """name: as in the tables. pretrain: options of `occfeat-train pretrain`, None for no pretraining. teacher: whose features it learns.

    longer: how many times the steps of the other arms it is finetuned. Arms of the same options and teacher share their pretraining.
    """

    name: str
    pretrain: tuple[str, ...] | None = ()
    teacher: str = "trained"
    longer: int = 1


ARMS = (
    Arm(NONE, None),
    Arm(LONGER, None, longer=3),  # whether pretraining only saves steps
    Arm(FEATURES, ("--feat-only",)),
    Arm(OCCUPANCY, ("--occ-only",)),
    Arm(IMG_ALSO, ("--method", "img-also")),
    Arm(OCCFEAT),  # the paper's lambda, 0.01
    Arm(OCCFEAT_LONGER, longer=3),
    Arm(f"{OCCFEAT}, lambda 0.1", ("--lambda", "0.1")),
    Arm(f"{OCCFEAT}, lambda 1", ("--lambda", "1")),
    Arm(f"{FEATURES}, random teacher", ("--feat-only",), "random"),
    Arm(OCCFEAT_RANDOM, (), "random"),
    Arm(f"{OCCFEAT}, lambda 1, random teacher", ("--lambda", "1"), "random"),
)


@dataclass(frozen=True)
class City:
    """The synthetic city. tune: scenes on which settings are chosen; test: scenes of the reported numbers. Both are in another town than train.

    image_size: of the data set; cached, feature_size: of the cache's student images and of the teacher's input (height, width).
    """

    train: int = 200
    tune: int = 10
    test: int = 36
    keyframes: int = 4
    image_size: tuple[int, int] = (180, 320)
    cached: tuple[int, int] = (116, 212)
    feature_size: tuple[int, int] = (140, 252)
    grid: tuple[int, int, int] = (8, 50, 50)
    bounds: tuple[int, ...] = (-5, 5, -25, 25, -25, 25)
    seed: int = 7
    seconds: float = 0.6  # to make a keyframe, and to compute a teacher's features of it, on two cores
    teacher_seconds: float = 0.3

    @property
    def scenes(self) -> dict[str, int]:
        """{split: scenes}."""
        return {"train": self.train, "tune": self.tune, "held_out": self.test}

    def samples(self, labels: float = 100) -> int:
        """Training keyframes with a share of the labels [%]: the last scene of each complete block, at least one."""
        return max(int(self.train * labels / 100), 1) * self.keyframes


@dataclass(frozen=True)
class Size:
    """How much is trained. pretrain: steps. finetune: {labels [%]: steps}. curve: validations on tune during a finetuning.

    network, recipe, of_task: fields of the config that differ from the presets small/*; `recipe` only in finetuning, of_task[task] only in
    that of a task. rate: training samples per second of all jobs together,
    on `machine`, for the announced times. jobs: trainings at a time.
    """

    city: City
    seeds: int
    pretrain: int
    finetune: dict[float, int]
    network: dict[str, str]
    recipe: dict[str, str]
    rate: float
    machine: str
    arms: tuple[Arm, ...] = ARMS
    of_task: dict[str, dict[str, str]] = field(default_factory=dict)
    batch: int = 8
    curve: int = 4
    jobs: int = 2
    tasks: int = 2  # processes that build a cache


@dataclass(frozen=True)
class Run:
    """One training and its evaluation on `split`. after: the pretraining that it starts from."""

    name: str
    arm: Arm
    seed: int
    steps: int
    batch: int
    options: tuple[str, ...]
    split: str = "held_out"
    task: str = ""
    labels: float = 100
    after: str = ""

    @property
    def samples(self) -> int:
        return self.steps * self.batch


def slug(text: str) -> str:
    """A name as part of a file name."""
    return text.lower().replace(", ", "-").replace(" ", "-")


def runs_of(size: Size, teachers: set[str]) -> list[Run]:
    """All runs, one seed after the other, so that a study that is stopped has whole seeds. Arms whose teacher is not there are left out."""
    runs: list[Run] = []
    for seed in range(size.seeds):
        for arm in size.arms:
            if arm.teacher not in teachers and reads_features(arm):
                continue
            if arm.pretrain is not None and start_of(size, arm) == arm:
                runs.append(_pretraining(size, arm, seed))
            runs += [_finetuning(size, arm, seed, task, labels) for labels in size.finetune for task in TASKS]
    return runs


def teachers_of(size: Size) -> set[str]:
    """Names of the teachers whose features the arms learn."""
    return {arm.teacher for arm in size.arms if reads_features(arm)}


def reads_features(arm: Arm) -> bool:
    """Whether the arm's pretraining needs the features of its teacher."""
    return arm.pretrain is not None and not {"--occ-only", "img-also"} & set(arm.pretrain)


def start_of(size: Size, arm: Arm) -> Arm:
    """The arm whose pretraining an arm starts from: itself, or one before it."""
    return next(each for each in size.arms if (each.pretrain, each.teacher) == (arm.pretrain, arm.teacher))


def _pretraining(size: Size, arm: Arm, seed: int) -> Run:
    assert arm.pretrain is not None
    settings = _settings(size, size.pretrain, 100, seed, size.network)
    options = ("--preset", "small/occfeat", *arm.pretrain, *settings)
    return Run(f"{slug(arm.name)}-{seed}", arm, seed, size.pretrain, size.batch, options)


def _finetuning(size: Size, arm: Arm, seed: int, task: str, labels: float) -> Run:
    steps = size.finetune[labels] * arm.longer
    fields = {**size.network, **size.recipe, **size.of_task.get(task, {}), "labels": f"{labels:g}"}
    options = ("--preset", f"small/{task}-100", *_settings(size, steps, labels, seed, fields))
    after = "" if arm.pretrain is None else f"{slug(start_of(size, arm).name)}-{seed}"
    return Run(
        f"{slug(arm.name)}-{seed}-{task}-{labels:g}",
        arm,
        seed,
        steps,
        size.batch,
        options,
        task=task,
        labels=labels,
        after=after,
    )


def _settings(size: Size, steps: int, labels: float, seed: int, fields: dict[str, str]) -> tuple[str, ...]:
    """The options --set of a run of `steps` steps on a share of the keyframes [%]."""
    epochs = (steps + 0.5) * size.batch / size.city.samples(labels)  # half a step more, against rounding
    fields = {**fields, "optim.batch": str(size.batch), "optim.epochs": repr(epochs), "seed": str(seed)}
    return tuple(part for key, value in fields.items() for part in ("--set", f"{key}={value}"))
