"""occfeat_targets: the offline half of OccFeat. A data set such as nuScenes in, a cache of pretraining targets out.

From Python: `build_cache` builds a cache, `voxelize` a volume of points. The rest of the package may change from release to
release; the trainer imports `occfeat_targets.common` and `occfeat_targets.cache`, and its report `occfeat_targets.pictures`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occfeat_targets.api import GRID_FROM_CAMERA_AXES, GRID_FROM_EGO_AXES, VoxelGrid, build_cache, voxelize

# Not `build`: Python sets that name to the package occfeat_targets.build as soon as a module of it is imported.
__all__ = ["GRID_FROM_CAMERA_AXES", "GRID_FROM_EGO_AXES", "VoxelGrid", "build_cache", "voxelize"]


def __getattr__(name: str) -> Any:
    """Import NumPy only when a name is used, and numba and Dask when a function is called."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from occfeat_targets import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
