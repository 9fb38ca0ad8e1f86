"""Write `golden/simple_bev_instances.npz`: vehicle labels, centres and offsets of aharley/simple_bev for random boxes.

    python -m tests.targets.make_instances_golden ../simple_bev

Its get_seg_bev and get_center_and_offset_bev run unchanged, from a checkout; the data sets' libraries that the file also
imports are replaced by empty modules. Arrays:

corners (n, 8, 3): the devkit's corners of n boxes in the camera's axes [m]. visibility (n,): tokens 1 to 4.
seg, valid (Z, X), center (Z, X), offset (2, Z, X): the reference's targets on a grid of 8 x 40 x 40 cells of
1.25 x 0.5 x 0.5 m about 1 m below the camera.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.targets.label_inputs import box_corners, random_pose

GOLDEN = Path(__file__).parent / "golden" / "simple_bev_instances.npz"
CELLS, REACH = (40, 8, 40), 10.0  # Z, Y, X; [m]
MODULES = (
    "nuscenes", "nuscenes.nuscenes", "nuscenes.utils", "nuscenes.utils.splits", "nuscenes.utils.data_classes",
    "nuscenes.utils.geometry_utils", "nuscenes.map_expansion", "nuscenes.map_expansion.map_api", "lyft_dataset_sdk",
    "lyft_dataset_sdk.lyftdataset", "pyquaternion", "matplotlib", "matplotlib.pyplot", "torchvision",
)  # fmt: skip


class Normalize:
    """The file inherits from torchvision's."""

    def __init__(self, mean: object, std: object) -> None:
        pass


def stubs() -> dict[str, mock.MagicMock]:
    modules = {name: mock.MagicMock(name=name, PointCloud=object) for name in MODULES}
    modules["torchvision"].transforms.Normalize = Normalize
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of aharley/simple_bev")
    sys.path.insert(0, str(parser.parse_args().checkout.resolve()))
    with mock.patch.dict(sys.modules, stubs()):
        import nuscenesdataset
        import utils.geom
        import utils.vox
    rng = np.random.default_rng(0)
    camera_axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])  # from x forward, y left, z up
    lrts, corners = [], []
    for _ in range(14):
        pose = random_pose(rng, tilt=0.02)
        rotation, size = camera_axes @ pose[:3, :3], rng.uniform([0.3, 0.3, 1.0], [11.0, 3.0, 3.5])
        center = rng.uniform([-12, -1, -12], [12, 2, 12])
        rigid = np.vstack([np.column_stack([rotation, center]), [0, 0, 0, 1]])
        lrts.append(np.concatenate([size, rigid.flatten()]))  # length, width, height, as get_lrtlist has them
        corners.append(box_corners(center, *size, rotation))
    visibility = rng.integers(1, 5, len(lrts))
    lrtlist = torch.tensor(np.array(lrts), dtype=torch.float32)[None]
    bounds = (-REACH, REACH, -5, 5, -REACH, REACH)
    vox = utils.vox.Vox_util(*CELLS, scene_centroid=torch.tensor([[0.0, 1.0, 0.0]]), bounds=bounds, assert_cube=False)
    for name, value in vars(vox).items():
        setattr(vox, name, float(value) if isinstance(value, np.floating) else value)
    data = types.SimpleNamespace(vox_util=vox, Z=CELLS[0], Y=CELLS[1], X=CELLS[2])
    seg, valid = nuscenesdataset.NuscData.get_seg_bev(data, lrtlist, torch.from_numpy(visibility > 1).float())
    center, offset, *_ = nuscenesdataset.NuscData.get_center_and_offset_bev(data, lrtlist, seg)
    arrays = {"seg": seg[0] > 0, "valid": valid[0] > 0, "center": center[0], "offset": offset}
    found = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(GOLDEN, corners=np.array(corners), visibility=visibility, **found)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
