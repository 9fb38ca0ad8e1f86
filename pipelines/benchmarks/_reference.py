"""The reference networks, run from a checkout of aharley/simple_bev.

    git clone https://github.com/aharley/simple_bev
    pip install --no-deps --target simple_bev/packages efficientnet_pytorch einops torchvision

Its files are not changed. This module changes at run time: no pretrained weights are loaded; the device is an argument; the
CUDA operation, which needs a GPU to be built, is always replaced by the reference's own `ms_deform_attn_core_pytorch` ("for
debug and test"); the four heads after `raw_feat`, which pretraining does not use, are replaced by the identity.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.views import IMAGENET_MEAN, IMAGENET_STD, Views

ENCODERS = {"efficientnet-b0": "effb0", "resnet-50": "res50", "resnet-101": "res101"}
_HEADS = ("feat_head", "segmentation_head", "instance_offset_head", "instance_center_head")


class Reference(nn.Module):
    """Segnet, Bevformernet or Liftnet with a grid centred on the reference camera: views -> `raw_feat` (B, 128, H, W)."""

    def __init__(
        self,
        checkout: Path,
        network: str,
        backbone: str,
        grid: VoxelGrid,
        device: torch.device,
        rand_flip: bool = False,
    ) -> None:
        """network: "simplebev", "bevformer" or "lss". rand_flip: use the reference's flips of images and maps.

        Raises ValueError if the checkout or a package that it needs is missing.
        """
        super().__init__()
        self.grid = grid
        z, forward, right = grid.shape
        with _imported(checkout, device) as modules:
            lower, upper = grid.lower, grid.upper  # (up, forward, right)
            bounds = (lower[2], upper[2], -upper[0], -lower[0], lower[1], upper[1])
            centre = torch.from_numpy(np.linalg.inv(GRID_FROM_CAMERA_AXES)[:3, 3])[None]  # 1 m below the camera
            self.vox_util = modules["vox"].Vox_util(forward, z, right, centre, bounds)
            arguments: dict[str, Any] = {"encoder_type": ENCODERS[backbone], "rand_flip": rand_flip}
            if network == "simplebev":
                self.model = modules["segnet"].Segnet(forward, z, right, self.vox_util, **arguments)
            elif network == "lss":
                self.model = modules["liftnet2"].Liftnet(forward, z, right, upper[1], do_rgbcompress=False, **arguments)
            else:
                self.model = modules["bevformernet"].Bevformernet(forward, z, right, **arguments)
        for name in _HEADS:
            setattr(self.model.decoder, name, nn.Identity())
        self.basic, self.geom = modules["basic"], modules["geom"]
        self.to(device)

    def forward(self, views: Views) -> Tensor:
        mean, std = (torch.tensor(v, device=views.images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pix_from_cam, cam0_from_cam = self.rig(views)
        return self.model(views.images * std + mean - 0.5, pix_from_cam, cam0_from_cam, self.vox_util)[0]

    @staticmethod
    def rig(views: Views) -> tuple[Tensor, Tensor]:
        """pix_T_cams and cam0_T_camXs, (B, V, 4, 4) each. The reference's grid is in camera axes."""
        turn = torch.from_numpy(np.linalg.inv(GRID_FROM_CAMERA_AXES)).to(views.cam_from_grid)
        cam0_from_cam = turn @ torch.linalg.inv(views.cam_from_grid.double())
        pix_from_cam = torch.eye(4, dtype=torch.float64, device=turn.device).repeat(*views.intrinsics.shape[:2], 1, 1)
        pix_from_cam[..., :3, :3] = views.intrinsics
        return pix_from_cam.float(), cam0_from_cam.float()

    def lift(self, features: Tensor, views: Views) -> Tensor:
        """Unprojection and mean over cameras as in `Segnet.forward`: (B, V, C, h, w) -> (B, C * Z, H, W)."""
        batch, cams, _, h, w = features.shape
        pix_from_cam, cam0_from_cam = (t.flatten(0, 1) for t in self.rig(views))
        height, width = views.images.shape[-2:]
        cam_from_cam0 = self.geom.safe_inverse(cam0_from_cam)
        z, forward, right = self.grid.shape
        volumes = self.vox_util.unproject_image_to_mem(
            features.flatten(0, 1),
            self.basic.matmul2(self.geom.scale_intrinsics(pix_from_cam, w / width, h / height), cam_from_cam0),
            cam_from_cam0,
            forward, z, right,
            xyz_camA=self.model.xyz_camA.to(features.device).repeat(batch * cams, 1, 1),
        ).unflatten(0, (batch, cams))  # fmt: skip
        mean = self.basic.reduce_masked_mean(volumes, (volumes.abs() > 0).float(), dim=1)
        return mean.permute(0, 1, 3, 2, 4).flatten(1, 2)


@contextlib.contextmanager
def _imported(checkout: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    if not (checkout / "nets" / "segnet.py").is_file():
        raise ValueError(
            f"--reference {checkout} holds no nets/segnet.py: git clone https://github.com/aharley/simple_bev and give its path"
        )
    _define_missing_operations()
    sys.modules.setdefault("MultiScaleDeformableAttention", types.ModuleType("MultiScaleDeformableAttention"))
    paths = [str(checkout), str(checkout / "packages")]
    sys.path[:0] = paths
    working, cuda = Path.cwd(), Tensor.cuda
    os.chdir(checkout / "nets")  # the reference imports its modules from ".."
    try:
        import efficientnet_pytorch
        import torchvision

        efficientnet_pytorch.EfficientNet.from_pretrained = efficientnet_pytorch.EfficientNet.from_name
        for name in ("resnet50", "resnet101"):
            build = getattr(torchvision.models.resnet, name)
            setattr(torchvision.models, name, lambda pretrained, build=build: build(weights=None))
        import nets.bevformernet
        import nets.liftnet2
        import nets.ops.functions.ms_deform_attn_func
        import nets.ops.modules.ms_deform_attn
        import nets.segnet
        import utils.basic
        import utils.geom
        import utils.vox

        operation = nets.ops.functions.ms_deform_attn_func.ms_deform_attn_core_pytorch
        nets.ops.modules.ms_deform_attn.MSDeformAttnFunction = types.SimpleNamespace(
            apply=lambda value, shapes, _, places, weights, __: operation(value, shapes, places, weights)
        )
        for owner in (utils.basic, utils.geom, utils.vox.Vox_util):
            for function in vars(owner).values():
                if isinstance(function, types.FunctionType) and function.__defaults__:
                    function.__defaults__ = tuple(str(device) if v == "cuda" else v for v in function.__defaults__)
        Tensor.cuda = lambda self, *_, **__: self.to(device)
        modules = {"segnet": nets.segnet, "bevformernet": nets.bevformernet, "liftnet2": nets.liftnet2}
        yield {**modules, "basic": utils.basic, "geom": utils.geom, "vox": utils.vox}
    except ImportError as err:
        raise ValueError(
            f"the reference lacks {err.name} ({err}): pip install --no-deps --target {checkout}/packages "
            "efficientnet_pytorch einops torchvision"
        ) from err
    finally:
        Tensor.cuda = cuda
        os.chdir(working)
        sys.path[:] = [path for path in sys.path if path not in paths]


def _define_missing_operations() -> None:
    """Make a torchvision importable whose compiled part does not fit this torch. Only its ResNets are used."""
    if "torchvision" not in sys.modules and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []  # the operations exist as long as their library object
