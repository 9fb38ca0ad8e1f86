"""The cache that a run needs: its size, and its teacher."""

from __future__ import annotations

from pathlib import Path

from occfeat_targets.cache.spec import CAMERAS, EGO_FRAME, STUDENT_SIZE, TargetSpec, TeacherSpec
from occfeat_train.config import DEFAULT_TEACHER, READS_POINTS, Config

# Teachers that presets ask for, and their channels N_y.
CHANNELS = {
    "facebook/dinov2-small": 384, "facebook/dinov2-base": 768, "facebook/dinov2-large": 1024, "facebook/dinov2-giant": 1536
}  # fmt: skip
_POINTS = 40_000  # LiDAR returns stored of a sweep of nuScenes at most


def bytes_per_keyframe(config: Config) -> int | None:
    """Estimated bytes on disk of a keyframe of nuScenes in a cache with these options; None for a teacher not in CHANNELS."""
    name = DEFAULT_TEACHER if config.teacher == "any" else config.teacher
    if name not in CHANNELS:
        return None
    height, width = config.smallest_cache()
    options = config.build_options
    spec = TargetSpec(
        image_size=(height, width) if height > STUDENT_SIZE[0] else STUDENT_SIZE,
        teacher=TeacherSpec(name, "", (224, 392), 14, CHANNELS[name]),
        frames=CAMERAS if "--frames cameras" in options else (EGO_FRAME,),
        compat="simple-bev" if "--compat simple-bev" in options else None,
        instances="--compat simple-bev" in options,
        rays="--rays" in options,
        max_points=_POINTS if config.task in READS_POINTS else 0,
    )
    return spec.bytes_per_keyframe


def wrong_teacher(wanted: str, teacher: TeacherSpec) -> str | None:
    """Why a cache's features are not those of `wanted`; None if they are, as far as the cache says.

    A teacher from a hub id must have that name, also with random weights. Weights from a folder or a file are anyone's; of
    the teachers in CHANNELS they must have the number of channels.
    """
    name, channels = teacher.name.removeprefix("random:"), CHANNELS.get(wanted, teacher.dim)
    if wanted == "any" or (teacher.dim == channels and (name == wanted or Path(name).is_absolute())):
        return None
    return f"its features are those of {teacher.name} with {teacher.dim} channels, the run wants teacher={wanted}" + (
        f" with {channels}" if wanted in CHANNELS else ""
    )
