"""Contents of a cache: the TargetSpec that determines its bytes, and the resulting arrays.

The spec is validated before anything is written, stored in the cache's attributes, and hashed into the fingerprint that
builds and training runs compare. Caches with the same fingerprint hold interchangeable targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from occfeat_targets.cache.arrays import (
    ArraySpec,
    camera_arrays,
    instance_arrays,
    label_arrays,
    point_arrays,
    volume_arrays,
)
from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.common.plural import count

FORMAT_VERSION = 2

# Cameras of nuScenes in Simple-BEV's order, which is the order of the camera axis of every array.
CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
EGO_FRAME = "ego"
# Map layers of the divider class. BEVFusion's "divider" contains both kinds of line.
DIVIDERS = {"road": ("road_divider",), "road+lane": ("road_divider", "lane_divider")}
# BEVFusion draws lines of 2 pixels of 0.5 m with OpenCV, which paints 3 to 5 pixels per row, depending on the slope. We
# draw the nominal metre.
DIVIDER_WIDTH = 1.0
# 1600x900 times exactly 0.3. Simple-BEV's augmentation resizes to at most 1.2 x 224x400 = 268x480: nothing is upsampled.
STUDENT_SIZE = (270, 480)
LARGEST_RESIZE = 1.2  # largest factor by which Simple-BEV's augmentation multiplies a network's image size
EGO_BOX = 2.2  # [m]; returns with |x| and |y| below it in the sensor's frame are from the ego vehicle (Simple-BEV)

# Fields that are younger than the format, and the value of a cache without them, whose fingerprint stays what it was.
LATER = {"rays": False, "dynamic": "smear", "instances": False, "corruption": None}
# What is done about objects that move during the sweeps of a keyframe.
DYNAMIC = ("carve", "boxes", "smear")
BOXES_NOTE = "the occupancy uses annotated boxes (--dynamic boxes), so pretraining on it is not free of labels"


def largest_network(image_size: tuple[int, int], resize: float) -> tuple[int, int]:
    """(height, width) [px] of the largest network image size, in multiples of 16, for which cached images are not enlarged.

    resize: largest factor by which training multiplies the network's image size.
    """
    height, width = (next(n for n in range(side // 16 * 16, -1, -16) if int(resize * n) <= side) for side in image_size)
    return height, width


def check_format(version: int) -> None:
    """Raises ValueError if this release does not read this format version."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"this cache has format version {version}, this library writes and reads {FORMAT_VERSION}: "
            "use the matching release of occfeat, or rebuild the cache"
        )


@dataclass(frozen=True)
class TeacherSpec:
    """The frozen image model of paper 3.3 and its input.

    name: hub id, local folder, or ``random:<hub id>`` for seeded random weights of that architecture. It says where the
    weights were found and does not count when specs are compared. digest: digest of the loaded weights.
    layer: ``post-norm``, the output of the final LayerNorm (x_norm_patchtokens; of the last layer, if the model has no final
    norm), or ``pre-norm``, its input (as ScaLR).
    input_size: (height, width) [px], exact multiples of patch_size. dim: channels N_y. dtype: of the computation.
    mean, std: normalisation of RGB in [0, 1]; the family's, unless the model's image processor has others.
    """

    name: str = field(compare=False)
    digest: str
    input_size: tuple[int, int]
    patch_size: int
    dim: int
    layer: str = "post-norm"
    dtype: str = "float32"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(int(n) for n in self.input_size))
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if any(n < self.patch_size or n % self.patch_size for n in self.input_size):
            height, width = ((max(n // self.patch_size, 1)) * self.patch_size for n in self.input_size)
            raise ValueError(
                f"teacher input {self.input_size[0]}x{self.input_size[1]} is no multiple of the patch size "
                f"{self.patch_size} of {self.name}, which would crop and misplace features: "
                f"the nearest below is --feature-size {height}x{width}"
            )
        if self.layer not in ("post-norm", "pre-norm"):
            raise ValueError(f"teacher layer {self.layer!r}: post-norm or pre-norm expected")

    @property
    def is_random(self) -> bool:
        return self.name.startswith("random:")

    @property
    def map_size(self) -> tuple[int, int]:
        """(h, w) tokens of one view."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size


@dataclass(frozen=True)
class TargetSpec:
    """Everything that determines a cache's bytes, given the data set.

    source: the kind of data set. cameras: its cameras, in the order of the camera axis of every array.
    frames: reference frames with a grid: ``ego`` and/or camera channels.
    num_sweeps: LiDAR sweeps accumulated in the occupancy, including the keyframe's own.
    dynamic: moving objects in earlier sweeps. ``carve``: voxels that the own sweep's rays pass are emptied. ``boxes``: returns inside
    of annotated boxes move with them, which uses labels. ``smear``: nothing is done, as always with one sweep.
    ego_box: returns with abs(x) and abs(y) below this [m] in the sensor's frame are from the ego vehicle and dropped.
    max_points: LiDAR returns stored of each keyframe at most, of all its sweeps; 0 for none.
    rays: whether the cache tells which voxels the LiDAR's rays have passed.
    labels: kinds of labels in the cache. dividers: map layers of the divider class. compat: None or ``simple-bev``.
    instances: whether the cache also has centres and offsets of single vehicles, as Simple-BEV's heads predict them.
    corruption: how the student images are corrupted, in the copy of a cache for evaluations.
    """

    source: str = "nuscenes"
    grid: VoxelGrid = field(default_factory=VoxelGrid)
    frames: tuple[str, ...] = (EGO_FRAME,)
    cameras: tuple[str, ...] = CAMERAS
    image_size: tuple[int, int] = STUDENT_SIZE
    teacher: TeacherSpec | None = None
    feature_dtype: str = "float16"
    num_sweeps: int = 1
    ego_box: float = EGO_BOX
    labels: tuple[str, ...] = tuple(LABEL_KINDS)
    dividers: str = "road"
    divider_width: float = DIVIDER_WIDTH
    compat: str | None = None
    max_points: int = 0
    rays: bool = False
    dynamic: str = "smear"
    instances: bool = False
    corruption: CorruptionSpec | None = None
    resize: str = "dct-scaled, antialiased bilinear"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("frames", "cameras", "image_size", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_format(self.format_version)
        unknown = [f for f in self.frames if f != EGO_FRAME and f not in self.cameras]
        if unknown or not self.frames or len(set(self.frames)) != len(self.frames):
            raise ValueError(
                f"frames {self.frames}: 'ego' and/or camera channels of {self.cameras} expected, each once"
            )
        if min(self.image_size) < 16:
            raise ValueError(f"image size {self.image_size}: at least 16x16 pixels expected")
        if self.feature_dtype not in ("float16", "int8"):
            raise ValueError(f"feature dtype {self.feature_dtype!r}: float16 or int8 expected")
        if self.num_sweeps < 1:
            raise ValueError(f"{self.num_sweeps} sweeps: at least 1 (the keyframe's own) expected")
        if self.dynamic not in DYNAMIC or (self.num_sweeps == 1 and self.dynamic != "smear"):
            raise ValueError(
                f"dynamic {self.dynamic!r} of {count(self.num_sweeps, 'sweep')}: one of {', '.join(DYNAMIC)} expected; with one sweep, smear"
            )
        if any(kind not in LABEL_KINDS for kind in self.labels):
            raise ValueError(f"labels {self.labels}: some of {tuple(LABEL_KINDS)} expected")
        if self.dividers not in DIVIDERS:
            raise ValueError(f"dividers {self.dividers!r}: road or road+lane expected")
        if self.instances and not (
            self.compat == "simple-bev" and any(LABEL_KINDS[kind].instances for kind in self.labels)
        ):
            raise ValueError(
                f"instances with labels {', '.join(self.labels) or 'none'} and compat {self.compat}: they are those of Simple-BEV's "
                "vehicle labels: pass --compat simple-bev, and vehicles among --label-kinds"
            )
        if self.compat not in (None, "simple-bev"):
            raise ValueError(f"compat {self.compat!r}: simple-bev or nothing expected")

    @property
    def uses_boxes(self) -> bool:
        """Whether the occupancy depends on annotations."""
        return self.dynamic == "boxes"

    def to_dict(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self))), "grid": self.grid.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TargetSpec:
        values = dict(data)
        check_format(values["format_version"])
        values["grid"] = VoxelGrid.from_dict(values["grid"])
        if values["teacher"] is not None:
            values["teacher"] = TeacherSpec(**values["teacher"])
        if values.get("corruption") is not None:
            values["corruption"] = CorruptionSpec(**values["corruption"])
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over all fields except the teacher's name, and except those of LATER with their default."""
        identity = self.to_dict()
        for name, value in LATER.items():
            if identity.get(name, ...) == value:
                del identity[name]
        if self.teacher is not None:
            del identity["teacher"]["name"]
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def differences(self, other: TargetSpec) -> list[str]:
        """One line for each field in which two specs differ: ``field: mine != theirs``."""
        mine, theirs = self.to_dict(), other.to_dict()
        lines = []
        for name in (name for name in mine if getattr(self, name) != getattr(other, name)):
            a, b = mine[name], theirs[name]
            if isinstance(a, dict) and isinstance(b, dict):
                a, b = ({key: d[key] for key in a if a[key] != b[key]} for d in (a, b))
            lines.append(f"{name}: {a} != {b}")
        return lines

    def describe(self) -> list[str]:
        """The spec in a few lines of text."""
        height, width = self.image_size
        up, forward, right = self.grid.cell_size
        moving = f", moving objects: {self.dynamic}" if self.num_sweeps > 1 else ""
        lines = [
            f"grid {self.grid}, in {', '.join(self.frames)}; sweeps per keyframe: {self.num_sweeps}{moving}",
            f"cells {up:g} m high, {forward:g} m long (forward), {right:g} m wide (right)",
        ]
        if self.grid.shape_warning is not None:
            lines.append(f"warning: {self.grid.shape_warning}")
        trained, plain = ("{}x{}".format(*largest_network(self.image_size, r)) for r in (LARGEST_RESIZE, 1.0))
        lines.append(
            f"images {height}x{width} of {count(len(self.cameras), 'camera')}: without upsampling, networks can train at up to {trained} "
            f"(resized by up to {LARGEST_RESIZE:g}) and be evaluated at up to {plain}"
        )
        if self.corruption is not None:
            lines.append(self.corruption.describe())
        if self.uses_boxes:
            lines.append(f"note: {BOXES_NOTE}")
        if self.teacher is None:
            lines.append("teacher: none, no features")
        else:
            (height, width), (h, w) = self.teacher.input_size, self.teacher.map_size
            lines.append(
                f"teacher {self.teacher.name} ({self.teacher.digest}), {height}x{width} -> {h}x{w} tokens of "
                f"{self.teacher.dim}, {self.teacher.layer}, computed in {self.teacher.dtype}, stored as {self.feature_dtype}"
            )
        lines.append(f"labels: {', '.join(self.labels) or 'none'}" + (f" ({self.compat})" if self.compat else ""))
        if self.instances:
            lines.append("instances: squared distances to the centres of vehicles, and offsets from them")
        if self.max_points:
            lines.append(f"LiDAR points of each keyframe, at most {self.max_points}")
        if self.rays:
            lines.append("rays: which voxels the LiDAR's rays have passed (observed, free)")
        return lines

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of a cache, in the order in which a shard writes them."""
        cams, frames, grid = len(self.cameras), len(self.frames), self.grid
        specs = camera_arrays(cams, frames, self.image_size)
        if self.teacher is not None:
            h, w = self.teacher.map_size
            dims = ("camera", "token_y", "token_x")
            specs.append(
                ArraySpec(
                    "features", (cams, h, w, self.teacher.dim), (*dims, "channel"), self.feature_dtype,
                    "teacher patch tokens; (y, x) is centred at ((y + 0.5) * H / h, (x + 0.5) * W / w) of the image",
                )
            )  # fmt: skip
            if self.feature_dtype == "int8":
                specs.append(
                    ArraySpec(
                        "feature_scale", (cams, h, w), dims, "float16", "multiply int8 features of a token by this"
                    )
                )
        specs += volume_arrays(frames, grid, with_rays=self.rays)
        for name, kind in LABEL_KINDS.items():
            if name in self.labels:
                specs += label_arrays(kind, frames, grid)
                specs += instance_arrays(kind, frames, grid) if self.instances and kind.instances else ()
        if self.max_points:
            specs += point_arrays(self.max_points, self.num_sweeps)
        return tuple(specs)

    @property
    def bytes_per_keyframe(self) -> int:
        """Estimated bytes on disk of one keyframe."""
        return sum(array.bytes_on_disk for array in self.arrays())
