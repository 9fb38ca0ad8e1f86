"""The corrupted images of a keyframe's views, made from the clean ones or read from a downloaded nuScenes-C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES, CorruptionSpec
from occfeat_targets.cache.geometry import fit
from occfeat_targets.sources.keyframe import CameraView
from occfeat_targets.targets.corruptions import corrupt, lost_cameras
from occfeat_targets.targets.images import letterbox, load_image


def downloaded_folder(root: Path, corruption: CorruptionSpec) -> Path:
    """``ROOT/Fog/mid``, with the folders of the cameras in it. Raises ValueError if the folder has none of the published names."""
    names = [f"{folder}/{SEVERITIES[corruption.severity]}" for folder in CORRUPTIONS[corruption.name]]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"--nuscenes-c {root} has no folder {' or '.join(names)}: expected the unpacked image folder of nuScenes-C, with a folder for "
        "each corruption"
    )


def load_corrupted(
    views: Sequence[CameraView],
    is_seen: NDArray[np.bool_],
    size: tuple[int, int],
    corruption: CorruptionSpec,
    folder: Path | None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The images (V, size, 3) of all views, and which of them are lost (V,), that is black.

    is_seen: (V,) false for views that the clean cache masks; they are not read. size: (height, width) [px]. folder: of
    `downloaded_folder`, where images are read instead of corrupted.
    Raises ValueError that names the file and the remedy as `load_image`.
    """
    lost = np.array(lost_cameras(corruption, [view.path for view in views]))
    if corruption.protocol == "downloaded":
        lost[:] = False
    images = np.zeros((len(views), *size, 3), np.uint8)
    for i in np.flatnonzero(is_seen & ~lost):
        images[i] = _load(views[i], size, corruption, folder)
        lost[i] = not images[i].any()  # downloaded images do not say which are lost
    return images, lost & is_seen


def _load(
    view: CameraView, size: tuple[int, int], corruption: CorruptionSpec, folder: Path | None
) -> NDArray[np.uint8]:
    path = view.path if folder is None else folder / view.path.parent.name / view.path.name
    if folder is not None and not path.is_file():
        raise ValueError(
            f"image {path} is missing: --nuscenes-c must hold the images of all keyframes; unpack nuScenes-C again"
        )
    top, left, bottom, right = area = fit(view.source_size, size)
    part = (bottom - top, right - left)
    change = (lambda image: corrupt(image, corruption, path)) if corruption.protocol == "native" else None
    (image,) = load_image(path, [part], expected_size=view.source_size, corrupt=change)
    if corruption.protocol == "network":
        image = corrupt(image, corruption, path)
    return letterbox(image, area, size)
