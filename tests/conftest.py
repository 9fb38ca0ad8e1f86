"""Fixtures: a real keyframe if there is one, a small synthetic city, a tiny teacher, and small caches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported. One thread is as fast for such small models, does not compete with other tests for cores, and
# rounds like the single-threaded workers of a local cluster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Installed before these modules are imported, so that their functions check the annotated shapes at every call. Excluded are
# files with Triton and numba kernels, because a compiler reads their functions, and networks/network.py, because tests give
# BEVNetwork simpler encoders and decoders than it annotates.
SHAPED = [
    *(
        f"occfeat_train.ops.{name}"
        for name in ("cross_attention", "deformable", "instance_norm", "mean_over_views", "mirror", "resize", "views")
    ),
    *(f"occfeat_train.networks.{name}" for name in ("bevformer", "cvt", "decoder", "encoder", "lss", "simplebev")),
    *(f"occfeat_train.data.{name}" for name in ("augment", "batch", "queries")),
    *(
        f"occfeat_train.tasks.{name}"
        for name in (
            "base",
            "heads",
            "img_also",
            "instance_losses",
            "instances",
            "losses",
            "metrics",
            "pretraining",
            "segmentation",
        )
    ),
    "occfeat_train.simple_bev.quirks",
]
install_import_hook(SHAPED, "beartype.beartype")

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, Identity

REPOSITORY = Path(__file__).parents[1]

# Tests must not fail on a busy machine, so the duration of examples is not limited.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked, as outside of tests. For tests of our own error messages and of torch.compile."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs the synthetic city as slow, and skip the tests that need a GPU where there is none."""
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "city" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
        if not has_gpu and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def readme_code(section: str) -> list[str]:
    """The Python code blocks of a section of the README, in order."""
    text = (REPOSITORY / "README.md").read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [block.split("\n```", 1)[0] for block in text.split("```python\n")[1:]]


@pytest.fixture(scope="session")
def real_sample() -> Path:
    """A dataroot (v1.0-mini) with one real keyframe of mini_train. Its licence does not allow it in this repository."""
    path = Path(os.environ.get("OCCFEAT_REAL_SAMPLE", REPOSITORY.parent / "shared" / "nuscenes-real-sample"))
    if not path.is_dir():
        pytest.skip(f"no real nuScenes keyframe at {path}: set OCCFEAT_REAL_SAMPLE to a v1.0-mini dataroot")
    return path


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic city: two training scenes and one validation scene of 5 keyframes, images of 192x320. Tests must not change it.

    The first pytest-xdist worker that needs it writes it for all workers.
    """
    pytest.importorskip("simplejpeg", reason="a build needs the extra 'targets'")
    from occfeat_targets.synth import write_city

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / "city"
    with FileLock(folder / "city.lock"):
        if not out.exists():
            write_city(
                out, scenes=2, val_scenes=1, keyframes=5, image_size=(192, 320), sweeps_per_keyframe=3, seed=3,
                progress=False,
            )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local folder with a DINOv2 of two layers and 32 channels, so that builds are fast."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("teacher") / "tiny-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


SMALL_GRID = VoxelGrid((4, 20, 12), (-2, -10, -6), (2, 10, 6))


def small_spec(**changes: object) -> TargetSpec:
    """A spec with a few kilobytes per keyframe."""
    values: dict[str, object] = {
        "grid": SMALL_GRID,
        "image_size": (16, 24),
        "teacher": TeacherSpec("tiny", "r0", (28, 42), 14, 8),
        **changes,
    }
    return TargetSpec(**values)  # type: ignore[arg-type]


def small_identity(n: int = 7) -> Identity:
    return Identity(tuple(f"token{i}" for i in range(n)), ("scene-0061",) * n, tuple(range(0, n * 500_000, 500_000)))


def random_arrays(cache: Cache, shard: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random contents of a shard, determined by its number and the seed; all keyframes and cameras are valid."""
    rng = np.random.default_rng((seed, shard))
    n = len(cache.shard_range(shard))
    arrays = {}
    always = {"is_valid": True, "camera_valid": True, "image_area": (0, 0, *cache.spec.image_size)}
    for array in cache.spec.arrays():
        values = rng.integers(0, 100, (n, *array.shape)).astype(array.dtype)
        if array.name in always:
            values[:] = always[array.name]
        arrays[array.name] = values
    return arrays


@pytest.fixture
def small_cache(tmp_path: Path) -> Cache:
    """A cache of 7 keyframes in shards of 3, created but without shards."""
    return create_cache(
        tmp_path / "train.zarr", small_spec(), small_identity(), keyframes_per_shard=3, provenance={"simulated": []}
    )


@pytest.fixture
def finished_cache(small_cache: Cache) -> Cache:
    for shard in range(small_cache.num_shards):
        small_cache.write_shard(shard, random_arrays(small_cache, shard), {"skipped": {}, "cosine": None})
    return small_cache


class Marker:
    """Runs code when it is unpickled. Here the code creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)
