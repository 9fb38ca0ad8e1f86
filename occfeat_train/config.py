"""The config of a run: frozen dataclasses, saved with every run and checkpoint. The defaults are the paper's (section 4.1).

A variant is a named preset (presets.py) or a changed field: ``--set optim.lr=1e-4``. There is no interpolation and no class
path; derived values are properties.
"""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import EGO_FRAME, LARGEST_RESIZE, STUDENT_SIZE
from occfeat_train.conversion import assign, build, require_one_of
from occfeat_train.label_rule import LabelScenesConfig
from occfeat_train.optim_config import OptimConfig as OptimConfig

# Pretext tasks: classes of tasks/ that read no labels. Every kind of label is a task, too: its segmentation.
PRETEXTS = {
    "occfeat": "occfeat_train.tasks.pretraining:Pretraining",
    "img-also": "occfeat_train.tasks.img_also:ImgALSO",
}
DEFAULT_TEACHER = "facebook/dinov2-small"  # the paper's, and the default of a build
READS_POINTS = ("img-also",)  # tasks that need a cache built with --points
# The segmentation of a kind of labels, by loss.heads.
SEGMENTATIONS = {
    "segmentation": "occfeat_train.tasks.segmentation:Segmentation",
    "simple-bev": "occfeat_train.tasks.instances:InstanceSegmentation",
}
# Liftings, and their variants with the defects of the reference repository (network.compat=simple-bev).
LIFTINGS = {
    "simplebev": "occfeat_train.networks.simplebev:SimpleBEV",
    "bevformer": "occfeat_train.networks.bevformer:BEVFormer",
    "lss": "occfeat_train.networks.lss:LSS",
    "cvt": "occfeat_train.networks.cvt:CVT",
}
REFERENCE_LIFTINGS = {
    "simplebev": "occfeat_train.simple_bev.quirks:ReferenceSimpleBEV",
    "bevformer": "occfeat_train.simple_bev.quirks:ReferenceBEVFormer",
    "lss": "occfeat_train.simple_bev.quirks:ReferenceLSS",
}
Backbone = Literal["efficientnet-b0", "resnet-50", "resnet-101"]
# Fields that change the meaning of F_B: with another value, the same weights compute another function. `--from` inherits
# them. FIXED are those that also change the shapes or names of the weights.
FIXED = ("network.lifting", "network.backbone", "network.channels")
MEANING = (*FIXED, "network.image_size", "network.compat", "network.efficientnet", "frame")


def lifting_class(lifting: str, compat: str) -> str:
    """Name of the class of a lifting, for pkgutil.resolve_name. Raises ValueError if the tables have none."""
    table = LIFTINGS if compat == "none" else REFERENCE_LIFTINGS
    if lifting not in table:
        where = "" if compat == "none" else f" with compat={compat!r}"
        raise ValueError(f"lifting={lifting!r}{where}: one of {', '.join(table)} expected")
    return table[lifting]


@dataclass(frozen=True)
class NetworkConfig:
    """The BEV network (paper 3.1).

    weights: initial weights of the image backbone: ``default`` (RN-50 MoCo-v2, the others supervised, all on ImageNet), a hub id, a local
    folder, a file of torchvision, timm or MoCo, or ``none``. channels: N_B. drop_connect: EfficientNet's stochastic depth.
    image_size: (height, width) of the student's input [px], multiples of 16.
    recompute: activation checkpointing of the encoder's first blocks, which have the largest maps, and of BEVFormer's
    layers. ``auto`` uses it on a CPU, and on a GPU once a step exceeds its memory. freeze_batchnorm: use running statistics in training, so that a sample's result does not depend on its
    micro-batch. compat: ``simple-bev`` reproduces the reference code's defects, for weights that were trained with them.
    efficientnet: padding and BatchNorm epsilon of EfficientNet-B0. ``tensorflow`` is that of google/efficientnet-b0 and of
    timm's tf_efficientnet_b0, ``torch`` that of torchvision and of timm's efficientnet_b0.
    """

    lifting: str = "simplebev"
    backbone: Backbone = "efficientnet-b0"
    weights: str = "default"
    channels: int = 128
    drop_connect: float = 0.2
    image_size: tuple[int, int] = (224, 400)
    recompute: Literal[True, False, "auto"] = "auto"
    freeze_batchnorm: bool = False
    compat: Literal["none", "simple-bev"] = "none"
    efficientnet: Literal["tensorflow", "torch"] = "tensorflow"

    def __post_init__(self) -> None:
        require_one_of(self, "backbone", "recompute", "compat", "efficientnet")
        lifting_class(self.lifting, self.compat)
        if self.efficientnet == "torch" and (self.backbone != "efficientnet-b0" or self.compat != "none"):
            raise ValueError(
                f"network.efficientnet=torch with backbone={self.backbone}, compat={self.compat}: it is for efficientnet-b0 "
                "and compat=none; the reference's EfficientNet has TensorFlow's padding"
            )
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"network.channels={self.channels}: an even number of at least 2 expected")
        if self.lifting == "bevformer" and self.channels % 4:
            raise ValueError(f"network.channels={self.channels}: a multiple of BEVFormer's 4 heads expected")
        if any(n < 16 or n % 16 for n in self.image_size):
            height, width = (max(round(n / 16), 1) * 16 for n in self.image_size)
            raise ValueError(
                f"network.image_size={self.image_size[0]}x{self.image_size[1]}: the encoder needs multiples of 16, "
                f"the nearest is {height}x{width}"
            )
        if not 0 <= self.drop_connect < 1:
            raise ValueError(f"network.drop_connect={self.drop_connect}: at least 0 and less than 1 expected")


@dataclass(frozen=True)
class AugmentConfig:
    """Simple-BEV's augmentations ("we use augmentations from [24]"), used only in training.

    resize: range of the ratio of resized to final size, sampled uniformly for each camera.
    crop: the centre of the crop moves by up to this fraction of the final height in both directions; black outside.
    flip_images: mirror each image with p = 0.5, and mirror its features back before the lifting.
    flip_bev: mirror the lifted volume along each axis with p = 0.5, and mirror F_B back after the decoder.
    shuffle_cameras: shuffle the order of the cameras. num_cameras: keep only this many cameras; 0 keeps all.
    random_frame: use the grid in a random camera's frame if the cache has camera frames.
    """

    resize: tuple[float, float] = (0.8, LARGEST_RESIZE)
    crop: float = 0.2
    flip_images: bool = True
    flip_bev: bool = True
    shuffle_cameras: bool = True
    num_cameras: int = 0
    random_frame: bool = True

    def __post_init__(self) -> None:
        low, high = self.resize
        if not 0 < low <= high:
            raise ValueError(f"augment.resize={self.resize}: two increasing factors above 0 expected")
        if not 0 <= self.crop < 1:
            raise ValueError(f"augment.crop={self.crop}: at least 0 and less than 1 expected")
        if self.num_cameras < 0:
            raise ValueError(f"augment.num_cameras={self.num_cameras}: at least 0 expected (0 keeps all)")

    def largest(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Largest (height, width) [px] to which images are resized, for a network of `image_size`."""
        height, width = (int(self.resize[1] * n) for n in image_size)
        return height, width


NO_AUGMENTATION = AugmentConfig(
    resize=(1.0, 1.0), crop=0, flip_images=False, flip_bev=False, shuffle_cameras=False, random_frame=False
)


@dataclass(frozen=True)
class LossConfig:
    """occ: weight of eq. 2, 1 or 0 (``--feat-only``). feat: lambda of eq. 1; 0 leaves the features out (``--occ-only``).

    occ_on: voxels of eq. 2: ``all``, or those that the LiDAR's rays have ``observed``.
    occlusion: which views of a voxel the target features of eq. 3 are the mean of: ``none``, all that its centre projects into,
    or ``zbuffer``, without those in which other occupied voxels hide it.
    pos_weight: weight of positive cells in the segmentation's cross-entropy (Simple-BEV).
    heads: what a segmentation predicts: the ``segmentation`` alone, or with ``simple-bev`` centres and offsets too, with that
    repository's losses.
    """

    occ: float = 1.0
    feat: float = 0.01
    occ_on: Literal["all", "observed"] = "all"
    occlusion: Literal["none", "zbuffer"] = "none"
    pos_weight: float = 2.13
    heads: Literal["segmentation", "simple-bev"] = "segmentation"

    def __post_init__(self) -> None:
        require_one_of(self, "occ_on", "occlusion", "heads")
        weights = (self.occ, self.feat)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"loss.occ={self.occ} and loss.feat={self.feat}: weights of at least 0, not both 0, expected"
            )
        if not (math.isfinite(self.pos_weight) and self.pos_weight > 0):
            raise ValueError(f"loss.pos_weight={self.pos_weight}: a number above 0 expected")


@dataclass(frozen=True)
class Config:
    """One run.

    task: a pretext task (PRETEXTS), or the kind of labels that are segmented. labels: percentage of the training scenes whose labels finetuning uses. label_scenes: which scenes these are. frame: reference frame of the grid: ``cameras``
    (a random camera in training, CAM_FRONT in evaluation), ``ego``, or the name of a camera. ``auto`` is resolved before a
    run starts: to ``cameras`` if the cache has camera frames, otherwise to ``ego``. allow_upsampling: whether the cached
    images may be enlarged. precision: of autocast; ``auto`` is bfloat16 on a GPU that computes it (sm_80 or newer), otherwise
    float32. float32 excludes TF32. teacher: hub id of the teacher that the cache must have features of, or ``any``. compile: torch.compile for image encoder and decoder; ``auto`` for long runs on a GPU.
    """

    task: str = "occfeat"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    labels: float = 100
    label_scenes: LabelScenesConfig = field(default_factory=LabelScenesConfig)
    frame: str = "auto"
    allow_upsampling: bool = False
    teacher: str = "any"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal[True, False, "auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of(self, "precision", "compile")
        if self.task not in (*PRETEXTS, *LABEL_KINDS):
            raise ValueError(f"task={self.task!r}: one of {', '.join((*PRETEXTS, *LABEL_KINDS))} expected")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: a whole number of 64 bits expected")
        if self.loss.heads != "segmentation" and (self.is_pretext or not LABEL_KINDS[self.task].instances):
            with_instances = ", ".join(kind.name for kind in LABEL_KINDS.values() if kind.instances)
            raise ValueError(f"loss.heads={self.loss.heads} with task={self.task}: it is for {with_instances}")
        if not 0 < self.labels <= 100:
            raise ValueError(f"labels={self.labels}: percent of the training scenes, above 0 and at most 100, expected")

    @property
    def is_pretext(self) -> bool:
        """Whether the task is a pretext task, which reads no labels."""
        return self.task in PRETEXTS

    @property
    def uses_label_share(self) -> bool:
        """Whether the task reads the labels of a part of the scenes only."""
        return not self.is_pretext and self.labels < 100

    @property
    def task_class(self) -> Any:
        """The class of the task, a subclass of tasks.base.Task. Imports torch."""
        return pkgutil.resolve_name(PRETEXTS.get(self.task) or SEGMENTATIONS[self.loss.heads])

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Raises ValueError on an unknown field. A config of an earlier release, without label_scenes, has the rule of that time."""
        return build(cls, {"label_scenes": {"rule": "first-of-block", "order": "split"}, **data}, "")

    def override(self, assignments: Iterable[str]) -> Config:
        """Change fields with ``key=value`` strings, such as ``optim.lr=1e-4``. Raises ValueError that names the invalid one."""
        data = self.to_dict()
        for assignment in assignments:
            assign(data, assignment, list(self.flat()))
        return Config.from_dict(data)

    def flat(self) -> dict[str, Any]:
        """{dotted field: value}, in the order of the classes."""
        out: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return out

    def smallest_cache(self, like: tuple[int, int] = STUDENT_SIZE) -> tuple[int, int]:
        """(height, width) [px] of the smallest cached images with the aspect ratio of `like` that are never enlarged."""
        scale = max(n / given for n, given in zip(self.augment.largest(self.network.image_size), like, strict=True))
        return math.ceil(like[0] * scale), math.ceil(like[1] * scale)

    @property
    def build_options(self) -> list[str]:
        """Options that a build of a cache for this run needs and that are not the default."""
        height, width = self.smallest_cache()
        large = [f"--image-size {height}x{width}"] if height > STUDENT_SIZE[0] else []
        teacher = [f"--teacher {self.teacher}"] if self.teacher not in ("any", DEFAULT_TEACHER) else []
        frames = ["--frames cameras"] * (self.frame not in ("auto", EGO_FRAME))
        instances = ["--compat simple-bev", "--instances"] * (self.loss.heads == "simple-bev")
        rays = ["--rays"] * (self.task == "occfeat" and self.loss.occ_on == "observed")
        return [*large, *teacher, *frames, *instances, *rays, *["--points"] * (self.task in READS_POINTS)]

    def differences(self, other: Config) -> list[str]:
        """One line for each field in which two configs differ."""
        mine, theirs = self.flat(), other.flat()
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]
