"""The Python API of occfeat_train: a trained network for any PyTorch program, and a cache as a torch data set.

`import occfeat_train` loads none of this; the names in `occfeat_train.__all__` are looked up here at their first use.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, GRID_FROM_EGO_AXES, inverse_rigid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.points import Points
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import CAMERAS, EGO_FRAME
from occfeat_targets.common.plural import count
from occfeat_train.arguments import check_images, check_voxels, checked_area, checked_path, refuse_samples
from occfeat_train.data.augment import resample, transform_area, transform_intrinsics
from occfeat_train.data.dataset import CALIBRATION
from occfeat_train.data.frames import reference_frames
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.ops.mean_over_views import sample_voxel_features
from occfeat_train.ops.views import Views
from occfeat_train.training.checkpoint import RunInfo, find_checkpoint
from occfeat_train.training.initial import restore

# What a sample of a cache holds, besides calibration and labels: key -> the arrays it is made of, where the cache has them.
_CONTENTS = {"images": ("images",), "occupancy": ("occupancy",), "features": ("features", "feature_scale")}


def load(path: str | Path) -> FeatureNetwork:
    """The network of a run directory's newest checkpoint, or of a checkpoint directory, on the CPU in evaluation mode.

    It is read as 'occfeat-train evaluate' reads it. Raises CheckpointError, a ValueError, if there is no checkpoint, if a
    byte of it changed (SHA-256), if it does not fit its own config, or if a weight is not finite; ValueError if path is no path.
    """
    checkpoint = find_checkpoint(checked_path(path, "the directory of a run or a checkpoint"))
    return FeatureNetwork(restore(checkpoint).network, checkpoint.info).eval()


class FeatureNetwork(nn.Module):
    """A network whose `features` gives F_B of the paper's section 3.1; made by `load`.

    An ordinary module: move it with `.to(device)`, train it, wrap it in DDP (calling the module is calling `features`).
    `load` returns it in evaluation mode: BatchNorm uses its running statistics and no layer is dropped at random. Call
    `.train()` to train it. Its parameters require gradients from the start.

    network: the BEVNetwork itself. grid: the VoxelGrid whose plane F_B covers. channels: N_B. image_size: (height, width)
    [px] at which the network computes. frame: where its grid lies, "ego" or the name of one of `cameras`, the names of the
    cameras in the order it was trained with. simulated: what in its training data was not real, one phrase each.
    """

    def __init__(self, network: BEVNetwork, info: RunInfo) -> None:
        super().__init__()
        config = info.config
        frames = tuple(info.targets.get("frames", (EGO_FRAME, *CAMERAS)))  # an imported reference names none
        self.network = network
        self.grid, self.channels, self.image_size = info.grid, config.network.channels, config.network.image_size
        self.cameras = tuple(info.targets.get("cameras", CAMERAS))
        self.frame = frames[reference_frames(frames, config.frame, training=False)[0]]
        self.simulated = info.simulated
        self._allow_upsampling = config.allow_upsampling

    def features(
        self,
        images: Tensor,
        intrinsics: Tensor,
        cam_from_ego: Tensor,
        grid_from_ego: Tensor | None = None,
        image_area: Tensor | None = None,
    ) -> Tensor:
        """F_B of a batch of B samples seen by V cameras each.

        images: (B, V, 3, H, W) RGB, uint8 in [0, 255] or float in [0, 1], not normalised. Images of another size than
            `image_size` are resized to it, each axis by its own factor, as evaluation does.
        intrinsics: (B, V, 3, 3) of exactly these images [px], of any float type; pixel i covers [i, i + 1).
        cam_from_ego: (B, V, 4, 4) from the ego frame (x forward, y left, z up) to each camera's axes (x right, y down,
            z forward) [m]; of float64 or float32.
        grid_from_ego: (B, 4, 4) from the ego frame to the grid's (right, forward, up) [m]. By default it follows from
            `frame`. ego: the ego frame with its origin 0.5 m up. A camera: that camera's frame in `cam_from_ego`, with its
            origin 1 m below; the V cameras are then those of `cameras`, in that order. A cache's own `grid_from_ego` of a
            camera differs from that by the ego's motion between the LiDAR's timestamp and the camera's.
        image_area: (B, V, 4) (top, left, bottom, right) [px] of the part of each image that shows the scene, of any type; the
            whole images by default.

        A camera whose cam_from_ego is all zeros is masked: nothing is read from its image. In the frame of a masked camera
        there is no grid: leave such samples out, which a cache's sample["camera_valid"] shows.
        Returns (B, channels, grid height, grid width): rows forward, columns right, index 0 the rearmost and leftmost. It
        is float32, or what torch.autocast makes of it; 'evaluate' computes in bfloat16 on a GPU, unless told otherwise.
        Gradients reach the weights and float images, not the calibration.
        Raises ValueError on arguments of another type, shape or range or that are not finite, on images that would be enlarged (unless the run
        was trained with allow_upsampling), where grid_from_ego is needed, and on samples whose cameras are all masked or
        whose grid would lie in the frame of a masked camera (grid_from_ego is all zeros, or by default cam_from_ego of `frame`).
        """
        features: Tensor = self(images, intrinsics, cam_from_ego, grid_from_ego, image_area)
        return features

    def forward(
        self,
        images: Tensor,
        intrinsics: Tensor,
        cam_from_ego: Tensor,
        grid_from_ego: Tensor | None = None,
        image_area: Tensor | None = None,
    ) -> Tensor:
        """The same as `features`."""
        check_images(
            images, intrinsics, cam_from_ego, grid_from_ego, (0, 0) if self._allow_upsampling else self.image_size
        )
        area = None if image_area is None else checked_area(image_area, cam_from_ego)
        cams = cam_from_ego.detach().cpu().double().numpy()
        grid = self._default_grid(cams) if grid_from_ego is None else grid_from_ego.detach().cpu().double().numpy()
        refuse_samples(~cams.any(axis=(1, 2, 3)), "all cameras are masked (cam_from_ego is all zeros)")
        refuse_samples(
            ~grid.any(axis=(1, 2)),
            "the camera whose frame holds the grid is masked, so it has no grid "
            + (
                f"(cam_from_ego of {self.frame} is all zeros)"
                if grid_from_ego is None
                else "(grid_from_ego is all zeros)"
            ),
        )
        cam_from_grid = torch.from_numpy(cams @ inverse_rigid(grid)[:, None])
        batch, views, _, *size = images.shape
        source_size, device = (size[0], size[1]), images.device
        resized = torch.tensor(self.image_size, device=device).expand(batch, views, 2)
        crop = torch.zeros_like(resized)
        mirror = torch.zeros(batch, views, dtype=torch.bool, device=device)
        pixels = (images.float() * 255 if images.is_floating_point() else images).permute(0, 1, 3, 4, 2).contiguous()
        pinhole = intrinsics.detach().to(device, torch.float64)
        if area is not None:
            area = transform_area(area.to(device), source_size, resized, crop, mirror, self.image_size)
        features: Tensor = self.network(
            Views(
                images=resample(pixels, resized, crop, mirror, self.image_size),
                intrinsics=transform_intrinsics(pinhole, source_size, resized, crop, mirror, self.image_size),
                cam_from_grid=cam_from_grid.to(device),
                area=area,
            )
        )
        return features

    def _default_grid(self, cam_from_ego: NDArray[Any]) -> NDArray[np.float64]:
        """(B, V, 4, 4) -> (B, 4, 4), as occfeat-targets places the grid."""
        if self.frame == EGO_FRAME:
            return np.broadcast_to(GRID_FROM_EGO_AXES, (len(cam_from_ego), 4, 4))
        if cam_from_ego.shape[1] != len(self.cameras):
            raise ValueError(
                f"this network's grid lies in the frame of {self.frame}, and {count(cam_from_ego.shape[1], 'camera')} given: "
                f"expected the {len(self.cameras)} of {', '.join(self.cameras)}, in this order, or grid_from_ego"
            )
        return GRID_FROM_CAMERA_AXES @ cam_from_ego[:, self.cameras.index(self.frame)]


def open_cache(path: str | Path, *, keys: Collection[str] | None = None) -> CacheDataset:
    """A finished cache, CACHE/SPLIT.zarr, as a data set of its valid keyframes.

    keys: of a sample's images, occupancy, features, vehicles, vehicles_valid and map, those to read; by default all that the
    cache has. Raises CacheError, a ValueError, if there is no cache, or it is not finished, damaged, or lacks a key, and
    ValueError if path is no path or keys is no list.
    """
    if isinstance(keys, str):
        raise ValueError(f"keys={keys!r} is a string: pass a list, such as [{keys!r}]")
    if keys is not None and not isinstance(keys, Collection):
        raise ValueError(f"keys={keys!r}: expected a list of names, such as ['images']")
    return CacheDataset(checked_path(path, "the directory of a cache, CACHE/SPLIT.zarr,"), keys)


class CacheDataset(Dataset[dict[str, Any]]):
    """The valid keyframes of a cache, in its order; made by `open_cache`. It can be pickled, for a DataLoader's workers.

    A sample is a dictionary of V cameras' data and of maps and volumes in F reference frames, which torch's default
    collate_fn stacks:

        images: (V, 3, H, W) uint8 RGB.
        camera_valid: (V,) bool; false for a masked camera, whose image is black and whose calibration and features are zero.
        image_area: (V, 4) int32 (top, left, bottom, right) [px] of the part of each image that the camera fills.
        intrinsics: (V, 3, 3) float32 of these images [px]. cam_from_ego: (V, 4, 4) float32 [m].
        grid_from_ego: (F, 4, 4) float32, to the (right, forward, up) of each reference frame's grid [m]; zeros, like
            everything in this frame, if it is a masked camera's.
        occupancy: (F, Z, H_B, W_B) bool. All volumes and maps start at the lowest, rearmost, leftmost cell.
        features: (V, h, w, N_y) float16 tokens of the teacher, channels last.
        vehicles, vehicles_valid: (F, H_B, W_B) bool; not valid: hardly visible vehicles.
        map: (F, 5, H_B, W_B) bool: road, sidewalk, crosswalk, parking area, road divider.
        Other kinds of labels: likewise, under their names.
        token: the sample's, a string.

    Features and labels are there if the cache has them. LiDAR points differ in number, so they are not part of a sample; see
    `points`. Reading raises CacheError where a chunk is damaged.
    grid: the VoxelGrid. frames: names of the F reference frames. cameras: names of the V cameras. tokens, scenes: of each
    sample. simulated: what in the cache is not real, one phrase each.
    """

    def __init__(self, path: str | Path, keys: Collection[str] | None = None) -> None:
        self._reader = CacheReader(Path(path))
        cache = self._reader.cache
        there = {array.name for array in cache.spec.arrays()}
        labels = [array for kind in LABEL_KINDS.values() for array in kind.arrays]
        contents = _CONTENTS | {array.removeprefix("labels/"): (array,) for array in labels}
        has = {key: arrays for key, arrays in contents.items() if arrays[0] in there}
        self._keys = list(has if keys is None else keys)
        missing = [key for key in self._keys if key not in has]
        if missing:
            raise CacheError(f"{path} has no {', '.join(missing)}: ask for some of {', '.join(has)}, or build it anew")
        read = [*CALIBRATION, *(a for key in self._keys for a in has[key])]
        cache.require_files(read)
        self._keyframes = np.flatnonzero(self._reader.is_valid)
        self.grid, self.frames, self.cameras = cache.spec.grid, cache.spec.frames, cache.spec.cameras
        self.tokens = tuple(cache.identity.tokens[i] for i in self._keyframes)
        self.scenes = tuple(cache.identity.scenes[i] for i in self._keyframes)
        self.simulated = tuple(cache.simulated)

    def __len__(self) -> int:
        return len(self._keyframes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        keyframe = int(self._keyframes[index])
        calibration = self._reader.read_all(CALIBRATION, keyframe)
        sample: dict[str, Any] = {name: torch.from_numpy(array) for name, array in calibration.items()}
        sample |= {key: self._read(key, keyframe) for key in self._keys}
        return {**sample, "token": self.tokens[index]}

    def points(self, index: int) -> Points:
        """The LiDAR returns of a sample, as NumPy arrays; CacheError if the cache was built without --points."""
        return self._reader.points(int(self._keyframes[index]))

    def _read(self, key: str, keyframe: int) -> Tensor:
        array = self._reader.read(key if key in _CONTENTS else f"labels/{key}", keyframe)
        if key == "images":
            return torch.from_numpy(array).permute(0, 3, 1, 2)
        if key == "occupancy":
            return torch.from_numpy(self.grid.unpack_volume(array))
        if key != "features":
            return torch.from_numpy(self.grid.unpack_map(array))
        tokens = torch.from_numpy(array)
        if tokens.dtype == torch.int8:
            scale = torch.from_numpy(self._reader.read("feature_scale", keyframe))
            tokens = (tokens * scale[..., None].float()).half()
        return tokens


def voxel_features(
    features: Tensor,
    centers: Tensor,
    *,
    intrinsics: Tensor,
    cam_from_ego: Tensor,
    grid_from_ego: Tensor,
    image_size: tuple[int, int],
    image_area: Tensor | None = None,
    cell_size: tuple[float, float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Y_v of paper 3.3: the mean, over the views that see a voxel's centre, of bilinearly sampled feature maps.

    Of one sample:
    features: (V, h, w, C) float16 or float32, channels last; token (i, j) is centred at ((j + 0.5) W / w, (i + 0.5) H / h).
    centers: (n, 3) points (right, forward, up) of the grid [m], such as those of the occupied voxels.
    intrinsics: (V, 3, 3) of an image of image_size, (H, W) [px]; cam_from_ego: (V, 4, 4); grid_from_ego: (4, 4),
        all as in a sample of `open_cache`. Zeros in cam_from_ego mask a camera.
    image_area: (V, 4) (top, left, bottom, right) [px] of the part of each image that shows the scene; the whole images by default.
    cell_size: of the grid, (up, forward, right) [m], such as `dataset.grid.cell_size`. If given, centers are those of voxels that
        hide each other, as in `pretrain --occlusion zbuffer`.

    Returns (n, C) float32 and num_views (n,) uint8. A view sees a point in front of it and inside its image's area; without
    cell_size, whatever may hide the point. A point that no view sees has zeros. Gradients reach the features, if they require any.
    Raises ValueError on types and shapes that don't fit, and on a grid_from_ego of zeros: the frame of a masked camera has no grid.
    """
    check_voxels(features, centers, intrinsics, cam_from_ego, grid_from_ego, image_size, image_area, cell_size)
    grid = inverse_rigid(grid_from_ego.detach().cpu().double().numpy())
    cam_from_grid = cam_from_ego.detach().to(torch.float64) @ torch.from_numpy(grid).to(cam_from_ego.device)
    sampled, num_views = sample_voxel_features(
        features, cam_from_grid, intrinsics, image_size, centers, image_area, cell_size
    )
    return sampled.float(), num_views
