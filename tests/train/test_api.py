"""The Python API: F_B as in evaluation, the README's example, and what importing the packages loads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import occfeat_targets
import occfeat_train
from occfeat_targets.cache.geometry import inverse_rigid, rigid
from occfeat_targets.cache.spec import CAMERAS, TargetSpec
from occfeat_targets.sources.keyframe import CameraView, Keyframe
from occfeat_train.distributed import Process
from occfeat_train.ops.views import Views
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.saving import CheckpointError
from occfeat_train.training.stages import RunOptions, prepare_evaluation
from tests.conftest import REPOSITORY, readme_code
from tests.train.runs import WORKERS, copy_of, pretrain, steps, succeed, update_digests


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{reference frame: run of one step}."""
    folder = tmp_path_factory.mktemp("runs")
    for frame in ("ego", "cameras"):
        succeed(*pretrain(cache, folder / frame, *steps(1), "--set", f"frame={frame}"))
    return {frame: folder / frame for frame in ("ego", "cameras")}


def batched(sample: dict) -> dict:
    """The sample as a batch of one."""
    return {name: value[None] if isinstance(value, torch.Tensor) else value for name, value in sample.items()}


def inputs(sample: dict) -> list[torch.Tensor]:
    return [sample[name] for name in ("images", "intrinsics", "cam_from_ego")]


def views_of(network: occfeat_train.FeatureNetwork) -> list[Views]:
    """A list to which every later input of the inner network is appended."""
    seen: list[Views] = []
    network.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    return seen


@pytest.mark.parametrize("frame", ["ego", "cameras"])
def test_features_equal_those_of_evaluation(cache, runs, frame, tmp_path):
    _, keyframes, task = prepare_evaluation(runs[frame], RunOptions(cache, "val", tmp_path), None)
    computed: list[torch.Tensor] = []
    task.network.register_forward_hook(lambda module, given, result: computed.append(result))
    evaluate(task, keyframes, Process(0, 1, torch.device("cpu")), batch=1, progress=False)

    network, dataset = occfeat_train.load(runs[frame]), occfeat_train.open_cache(cache / "val.zarr")
    assert network.frame == {"ego": "ego", "cameras": "CAM_FRONT"}[frame]
    assert len(computed) == len(dataset) == 5
    for expected, sample in zip(computed, map(batched, dataset), strict=True):
        grid_from_ego = sample["grid_from_ego"][:, dataset.frames.index(network.frame)]
        with torch.no_grad():
            assert torch.equal(network.features(*inputs(sample), grid_from_ego), expected)


@pytest.mark.parametrize("frame", ["ego", "cameras"])
def test_the_default_grid_is_at_the_position_of_a_builds_grid(cache, runs, frame):
    """In the ego frame, and in a camera frame if camera and LiDAR have the same timestamp."""
    network, sample = occfeat_train.load(runs[frame]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    ego_from_front = rigid((0.5, -0.5, 0.5, -0.5), (1.7, 0.1, 1.5))
    sample["cam_from_ego"] = sample["cam_from_ego"].double()
    sample["cam_from_ego"][0, network.cameras.index("CAM_FRONT")] = torch.from_numpy(inverse_rigid(ego_from_front))
    views = tuple(CameraView(Path(), (1, 1), np.eye(3), ego_from_front, np.eye(4)) for _ in CAMERAS)
    assemble = pytest.importorskip("occfeat_targets.build.assemble", reason="needs the extra 'targets'")
    built = assemble.grids_from_ego(Keyframe("", "", 0, "", cameras=views), TargetSpec(frames=(network.frame,)))

    seen = views_of(network)
    with torch.no_grad():
        network.features(*inputs(sample))
        network.features(*inputs(sample), torch.from_numpy(built))
    torch.testing.assert_close(seen[0].cam_from_grid, seen[1].cam_from_grid, rtol=0, atol=1e-12)


def test_nothing_outside_of_an_area_is_read(cache, runs):
    network, sample = occfeat_train.load(runs["ego"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    images, *calibration = inputs(sample)
    part = sample["image_area"].clone()
    part[0, :, 2:] = torch.tensor([20, 30])  # a quarter of 40x60
    seen = views_of(network)
    with torch.no_grad():
        whole = network.features(images, *calibration)
        assert torch.equal(network.features(images, *calibration, image_area=sample["image_area"]), whole)
        assert not torch.equal(network.features(images, *calibration, image_area=part), whole)
    assert seen[2].area.tolist() == [[[0, 0, 16, 24]] * 6]
    for wrong, message in (
        (part[:, 1:], r"torch.int32 of shape \(1, 5, 4\): expected a tensor .* of \(1, 6, 4\)"),
        (part.numpy(), "of type ndarray: expected a torch.Tensor"),
        (part.flip(-1), r"\[30.0, 20.0, 0.0, 0.0\]: expected .* top < bottom, left < right"),
    ):
        with pytest.raises(ValueError, match=f"image_area is {message}"):
            network.features(images, *calibration, image_area=wrong)

    centers = torch.from_numpy(network.grid.voxel_centers()).view(-1, 3)
    given = {name: sample[name][0] for name in ("intrinsics", "cam_from_ego")}
    given |= {"grid_from_ego": sample["grid_from_ego"][0, 0], "image_size": (40, 60)}
    views = [
        occfeat_train.voxel_features(sample["features"][0], centers, **given, image_area=area)[1].sum()
        for area in (None, sample["image_area"][0], part[0], part[0] * 0)
    ]
    assert views[0] == views[1] > views[2] > views[3] == 0


def test_float_images_give_the_same_features_as_uint8(cache, runs):
    network, sample = occfeat_train.load(runs["ego"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    images, *calibration = inputs(sample)
    with torch.no_grad():
        assert torch.equal(network.features(images.float() / 255, *calibration), network.features(images, *calibration))


def test_features_pass_gradients_to_weights_and_images(cache, runs):
    network, sample = occfeat_train.load(runs["ego"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    assert not network.training
    images = (sample["images"].float() / 255).requires_grad_()
    bev = network.features(images, sample["intrinsics"], sample["cam_from_ego"])
    assert bev.shape == (1, network.channels, *network.grid.map_shape) and bev.dtype == torch.float32
    (bev * torch.randn(bev.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in [*network.named_parameters(), ("images", images)]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_larger_images_are_resized_with_their_intrinsics(cache, runs):
    """An image and intrinsics of twice the size are the same after the resize."""
    network, sample = occfeat_train.load(runs["ego"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    _, intrinsics, cam_from_ego = inputs(sample)
    flat = torch.tensor([40, 90, 200], dtype=torch.uint8)[:, None, None].expand(1, 6, 3, 32, 48)
    large = flat.repeat_interleave(2, 3).repeat_interleave(2, 4)
    seen = views_of(network)
    with torch.no_grad():
        network.features(flat, intrinsics, cam_from_ego)
        network.features(large, intrinsics * torch.tensor([[2], [2], [1]]), cam_from_ego)
    torch.testing.assert_close(seen[1].images, seen[0].images, rtol=0, atol=1e-5)
    assert torch.equal(seen[1].intrinsics, intrinsics.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": lambda x: x[0]}, r"images of shape \(6, 3, 40, 60\): expected \(B, V, 3, H, W\)"),
        ({"images": lambda x: x.movedim(2, 4)}, r"expected \(B, V, 3, H, W\)"),
        ({"images": lambda x: x.int()}, "images are torch.int32: expected uint8, or float in"),
        ({"images": lambda x: x.float()}, "float images hold values of 0 to 255: expected .0, 1., neither 0 to 255"),
        ({"images": lambda x: x.float() * torch.nan}, "float images hold values of nan to nan"),
        ({"images": lambda x: x[..., :16]}, "images of 40x16 would be enlarged to this network's 32x48"),
        ({"intrinsics": lambda x: x[:, :5]}, r"intrinsics is torch.float32 of shape \(1, 5, 3, 3\).*expected float of"),
        ({"cam_from_ego": lambda x: x.long()}, "cam_from_ego is torch.int64"),
        ({"cam_from_ego": lambda x: x * torch.nan}, "cam_from_ego holds a NaN or an infinity"),
    ],
)
def test_features_refuse_wrong_inputs(cache, runs, change, message):
    network, sample = occfeat_train.load(runs["ego"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    given = {name: sample[name] for name in ("images", "intrinsics", "cam_from_ego")}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        network.features(**given)


def test_images_are_enlarged_if_the_run_allowed_it(cache, runs):
    network, about = occfeat_train.load(runs["ego"]), find_checkpoint(runs["ego"]).info
    allowed = replace(about, config=replace(about.config, allow_upsampling=True))
    images, intrinsics, cam_from_ego = inputs(batched(occfeat_train.open_cache(cache / "val.zarr")[0]))
    with torch.no_grad():
        bev = occfeat_train.FeatureNetwork(network.network, allowed).features(
            images[..., :16], intrinsics, cam_from_ego
        )
    assert bev.isfinite().all()


def test_an_imported_reference_has_its_grid_in_the_front_cameras_frame(runs):
    """Its checkpoint has no cache and therefore no names of frames and cameras."""
    network, about = occfeat_train.load(runs["cameras"]), find_checkpoint(runs["cameras"]).info
    imported = occfeat_train.FeatureNetwork(network.network, replace(about, targets={}))
    assert imported.frame == "CAM_FRONT" and imported.cameras == CAMERAS


def test_a_network_in_a_camera_frame_needs_its_cameras_or_the_grid(cache, runs):
    network, sample = occfeat_train.load(runs["cameras"]), batched(occfeat_train.open_cache(cache / "val.zarr")[0])
    two = [sample[name][:, :2] for name in ("images", "intrinsics", "cam_from_ego")]
    with pytest.raises(ValueError, match="lies in the frame of CAM_FRONT, and 2 cameras given: .* or grid_from_ego"):
        network.features(*two)
    with torch.no_grad():
        assert network.features(*two, sample["grid_from_ego"][:, 1]).isfinite().all()


def test_features_refuse_a_sample_without_a_grid_and_allow_other_masked_cameras(cache, runs):
    network, dataset = occfeat_train.load(runs["cameras"]), occfeat_train.open_cache(cache / "val.zarr")
    pair = torch.utils.data.default_collate([dataset[0], dataset[1]])
    images, intrinsics, cam_from_ego = inputs(pair)
    grids = pair["grid_from_ego"][:, dataset.frames.index("CAM_FRONT")]

    def masked(tensor: torch.Tensor, *cameras: str) -> torch.Tensor:
        """With these cameras of the second sample masked."""
        tensor = tensor.clone()
        tensor[1, [CAMERAS.index(camera) for camera in cameras]] = 0
        return tensor

    with torch.no_grad():
        back = masked(cam_from_ego, "CAM_BACK")
        area = masked(pair["image_area"], "CAM_BACK")  # as in a cache
        assert network.features(images, intrinsics, back, image_area=area).isfinite().all()
    front, everything = masked(cam_from_ego, "CAM_FRONT"), masked(cam_from_ego, *CAMERAS)
    zeros = grids * torch.tensor([1, 0])[:, None, None]
    for cameras, grid, why in (
        (front, None, r"is masked, so it has no grid \(cam_from_ego of CAM_FRONT is all zeros\)"),
        (front, zeros, r"is masked, so it has no grid \(grid_from_ego is all zeros\)"),
        (everything, grids, "all cameras are masked"),
    ):
        with pytest.raises(
            ValueError, match=rf'sample 1 of the batch: .*{why}.*leave it out; sample\["camera_valid"\]'
        ):
            network.features(images, intrinsics, cameras, grid)


def test_load_refuses_damaged_and_infinite_weights(runs, tmp_path):
    damaged = copy_of(runs["ego"], tmp_path / "damaged")
    file = find_checkpoint(damaged).path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in"):
        occfeat_train.load(damaged)

    infinite = find_checkpoint(copy_of(runs["ego"], tmp_path / "infinite"))
    weights = infinite.weights()
    next(t for t in weights.values() if t.is_floating_point()).view(-1)[0] = torch.inf
    save_file(weights, infinite.path / "model.safetensors")
    update_digests(infinite.path)
    with pytest.raises(CheckpointError, match="are not finite: use another checkpoint"):
        occfeat_train.load(infinite.path)


@WORKERS
def test_the_readmes_example_of_training_runs(cache, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(cache)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pretrained").symlink_to(runs["ego"])
    names: dict[str, object] = {}
    code = readme_code("From Python")[1]
    exec(code, names)
    assert 'image_area=sample["image_area"]' in code  # a cache's cameras may not fill their images
    assert names["bev"].shape == (1, 8, 12, 12)
    assert len(names["targets"]) == len(names["num_views"]) == len(names["centers"]) > 0


@pytest.mark.parametrize("package", [occfeat_targets, occfeat_train])
def test_every_name_of_the_api_exists_and_is_documented(package):
    for name in package.__all__:
        assert name in dir(package)
        value = getattr(package, name)
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_packages_loads_no_heavy_library():
    code = (
        "import sys, occfeat_targets, occfeat_train\n"
        "print(sorted({'torch', 'numba', 'dask', 'nuscenes', 'transformers', 'numpy'} & set(sys.modules)))\n"
        "occfeat_targets.VoxelGrid\n"
        "print(sorted({'torch', 'numba', 'dask', 'nuscenes', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert output.split() == ["[]", "[]"]
