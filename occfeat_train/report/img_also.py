"""Pictures of Img-ALSO's predictions: queries from above and from behind, right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.pictures.birdseye import occupancy_colors
from occfeat_targets.pictures.colors import height_scale
from occfeat_train.data.batch import Batch
from occfeat_train.report import figures
from occfeat_train.report.figures import OUTCOMES, Prediction, key_of, key_of_heights
from occfeat_train.tasks.img_also import ImgALSO, mean_of_cells


def draw(task: ImgALSO, batches: Sequence[Batch], poses: Sequence[Matrix]) -> list[Prediction]:
    """One prediction for each keyframe."""
    return [_draw(task, batch, pose) for batch, pose in zip(batches, poses, strict=True)]


def _draw(task: ImgALSO, batch: Batch, pose: Matrix) -> Prediction:
    grid, metric, pairs = task.grid, task.metric(), task.predict(batch)
    means, queries = mean_of_cells(pairs), pairs.queries
    metric.update(*means, queries.occupied, queries.intensity)
    has_cell = means[2][0]
    xyz, predicted, true = (each[0][has_cell].cpu().numpy() for each in (queries.xyz, means[0], queries.occupied))
    outcomes = np.stack(
        [count(xyz[kind], grid) for kind in (predicted & true, predicted & ~true, ~predicted & true)], axis=-1
    )
    heights = height_scale(grid)
    maps = {
        "occupied queries, highest cell": occupancy_colors(count(xyz[true], grid) > 0, heights, grid),
        "queries predicted as occupied, highest cell": occupancy_colors(count(xyz[predicted], grid) > 0, heights, grid),
        "queries of a column, outcomes averaged": figures.mixed_outcomes(outcomes.sum(0)),
    }
    behind = figures.draw_from_behind(figures.mixed_outcomes(outcomes.sum(1)), grid, pose)
    return Prediction(
        ", ".join(f"{name} {value}" for name, value in task.columns(metric.results()).items()),
        {name: figures.draw_map(cells, grid, pose) for name, cells in maps.items()}
        | {"queries from behind, outcomes averaged": behind},
        [*key_of(OUTCOMES), key_of_heights(grid)],
    )


def count(xyz: NDArray[np.floating[Any]], grid: VoxelGrid) -> NDArray[np.int64]:
    """(Z, H, W) numbers of positions (n, 3) in the grid's cells. Others are not counted."""
    cells = np.floor(transform(grid.cells_from_grid, xyz)).astype(np.int64)[:, ::-1]
    inside = ((cells >= 0) & (cells < grid.shape)).all(axis=1)
    flat = np.ravel_multi_index(tuple(cells[inside].T), grid.shape)
    return np.bincount(flat, minlength=grid.num_voxels).reshape(grid.shape)
