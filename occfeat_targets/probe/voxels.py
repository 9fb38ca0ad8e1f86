"""Occupied voxels of keyframes: target features, colours, positions, and the labels of their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.probe.views import Views


@dataclass(frozen=True)
class Voxels:
    """n occupied voxels, each seen by a camera.

    features: (n, C) the teacher's, mean over the views (paper 3.3). colors: (n, 3) RGB in [0, 1] of the cached images,
    mean over the views. centers: (n, 3) (right, forward, up) in the grid [m].
    labels: {kind: (n, K) whether the bird's-eye cell of the voxel is of each class}. is_valid: {kind: (n,)} whether the cell is valid.
    scene, keyframe: (n,) names of scenes, numbers of keyframes.
    """

    features: NDArray[np.float32]
    colors: NDArray[np.float32]
    centers: NDArray[np.float32]
    labels: Mapping[str, NDArray[np.bool_]]
    is_valid: Mapping[str, NDArray[np.bool_]]
    scene: NDArray[np.str_]
    keyframe: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def concatenate(cls, parts: Sequence[Voxels]) -> Voxels:
        def joined(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        def joined_kinds(name: str) -> dict[str, NDArray[Any]]:
            return {kind: np.concatenate([getattr(part, name)[kind] for part in parts]) for kind in parts[0].labels}

        return cls(
            joined("features"), joined("colors"), joined("centers"), joined_kinds("labels"), joined_kinds("is_valid"),
            joined("scene"), joined("keyframe"),
        )  # fmt: skip


def read_voxels(reader: CacheReader, keyframe: int, frame: int, most: int, rng: np.random.Generator) -> Voxels:
    """The occupied voxels of a keyframe that a camera sees, at most `most` of them, drawn at random.

    frame: number of the reference frame. Raises ValueError on features that are not finite, CacheError as `CacheReader.read`.
    """
    cache = reader.cache
    grid = cache.spec.grid
    volume = grid.unpack_volume(reader.read("occupancy", keyframe)[frame])
    flat = np.flatnonzero(volume)
    views = Views.of(reader, keyframe, frame, grid.centers_of(flat))
    seen = np.flatnonzero(views.is_seen.any(0))
    chosen = np.sort(rng.permutation(seen)[:most])
    flat, views = flat[chosen], views.at(chosen)
    maps = reader.read_features(keyframe)
    if not np.isfinite(maps).all():
        raise ValueError(
            f"keyframe {keyframe} (sample {cache.identity.tokens[keyframe]}) of {cache.path} has features that are not finite: "
            "check the teacher's weights, then build the cache again"
        )
    _, row, column = np.unravel_index(flat, grid.shape)
    labels, is_valid = {}, {}
    for name in cache.spec.labels:
        masks, valid = reader.read_labels(LABEL_KINDS[name], keyframe)
        labels[name] = masks[frame][:, row, column].T
        is_valid[name] = np.ones(len(flat), np.bool_) if valid is None else valid[frame][row, column]
    return Voxels(
        features=views.mean(maps), colors=views.mean(reader.read("images", keyframe)) / 255, centers=grid.centers_of(flat),
        labels=labels, is_valid=is_valid, scene=np.full(len(flat), cache.identity.scenes[keyframe]),
        keyframe=np.full(len(flat), keyframe),
    )  # fmt: skip
