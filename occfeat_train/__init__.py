"""occfeat_train: the training half of OccFeat. It needs a cache, and neither data set, devkit nor Dask.

From Python: `load` gives a trained network, `open_cache` a cache as a torch data set, `voxel_features` the targets of paper
3.3. The rest of the package may change from release to release.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occfeat_train.api import CacheDataset, FeatureNetwork, load, open_cache, voxel_features

__all__ = ["CacheDataset", "FeatureNetwork", "load", "open_cache", "voxel_features"]


def __getattr__(name: str) -> Any:
    """Import torch only when a name is used: `--help` does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from occfeat_train import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
