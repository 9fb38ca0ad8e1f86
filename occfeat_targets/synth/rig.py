"""The sensor rig: poses and firing times of nuScenes' six cameras and its LiDAR.

Numbers are rounded from the public calibration. Ego frame: x forward, y left, z up, origin on the ground below the
rear axle. The LiDAR turns clockwise at 20 Hz; its own axes are x right, y forward, z up. A sweep begins and ends at the
car's left side, and each camera fires as the beams pass its optical axis: no two of them share a timestamp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, scale_intrinsics

SWEEP_PERIOD_US = 50_000
KEYFRAME_PERIOD_US = 500_000
REFERENCE_SIZE = (900, 1600)

NUM_RINGS, NUM_COLUMNS = 32, 1084
RING_ELEVATIONS: NDArray[np.float64] = np.radians(np.linspace(-30.67, 10.67, NUM_RINGS))
# A sweep's azimuths in the LiDAR's axes: from the left side (-x) over the front (+y) to the right, rear and left.
COLUMN_AZIMUTHS: NDArray[np.float64] = np.pi - np.arange(NUM_COLUMNS) * (2 * np.pi / NUM_COLUMNS)

# (x right, y down, z forward) of a camera that looks along the ego's x axis, as columns of ego axes.
_EGO_FROM_CAMERA_AXES = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


@dataclass(frozen=True)
class Camera:
    """position [m] and viewing angles [degrees] on the ego: yaw to the left, pitch downwards, roll clockwise."""

    channel: str
    position: tuple[float, float, float]
    yaw: float
    pitch: float
    roll: float
    focal: float
    principal: tuple[float, float]

    @property
    def ego_from_sensor(self) -> Matrix:
        return _mount(self.position, _turn(self.yaw, self.pitch, self.roll) @ _EGO_FROM_CAMERA_AXES)

    @property
    def delay_us(self) -> int:
        """Firing time relative to the end of the sweep, negative [us]."""
        swept = (90.0 - self.yaw) % 360.0 / 360.0
        return round(swept * SWEEP_PERIOD_US) - SWEEP_PERIOD_US + 2_000

    def intrinsics(self, image_size: tuple[int, int]) -> Matrix:
        """(3, 3) for an image of (height, width)."""
        full = np.array([[self.focal, 0, self.principal[0]], [0, self.focal, self.principal[1]], [0, 0, 1]], np.float64)
        return scale_intrinsics(full, image_size[1] / REFERENCE_SIZE[1], image_size[0] / REFERENCE_SIZE[0])


def _turn(yaw: float, pitch: float, roll: float) -> Matrix:
    """Rz(yaw) Ry(pitch) Rx(roll) of angles in degrees."""
    y, p, r = np.radians([yaw, pitch, roll])
    rz = np.array([[np.cos(y), -np.sin(y), 0], [np.sin(y), np.cos(y), 0], [0, 0, 1]], np.float64)
    ry = np.array([[np.cos(p), 0, np.sin(p)], [0, 1, 0], [-np.sin(p), 0, np.cos(p)]])
    rx = np.array([[1, 0, 0], [0, np.cos(r), -np.sin(r)], [0, np.sin(r), np.cos(r)]])
    turned: Matrix = rz @ ry @ rx
    return turned


def _mount(position: tuple[float, float, float], rotation: Matrix) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = position
    return matrix


def body_pose(x: float, y: float, z: float, yaw: float, pitch: float, roll: float) -> Matrix:
    """(4, 4) global_from_ego of a car body; angles in radians, pitch positive nose-down."""
    return _mount((x, y, z), _turn(*np.degrees([yaw, pitch, roll])))


CAMERAS = (
    Camera("CAM_FRONT", (1.70, 0.02, 1.51), 0.3, 0.3, 0.1, 1266, (816, 492)),
    Camera("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.4, 0.8, -0.5, 1261, (808, 495)),
    Camera("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.2, -0.1, -0.1, 1273, (827, 480)),
    Camera("CAM_BACK", (0.03, 0.0, 1.58), 179.9, -1.0, -0.2, 809, (829, 482)),
    Camera("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 108.6, 0.9, 0.2, 1257, (792, 493)),
    Camera("CAM_BACK_RIGHT", (1.01, -0.48, 1.56), -110.8, 0.9, -0.6, 1260, (807, 501)),
)
LIDAR_CHANNEL = "LIDAR_TOP"
EGO_FROM_LIDAR: Matrix = _mount((0.94, 0.0, 1.84), _turn(-89.9, 0.3, -1.4))


def quaternion(rotation: Matrix) -> list[float]:
    """(3, 3) rotation -> quaternion w, x, y, z, by its largest component (Shepperd's method)."""
    trace = np.trace(rotation)
    squares = np.array([trace, *np.diag(rotation)]) * [1, 2, 2, 2] + [1, *[1 - trace] * 3]
    a = rotation
    q = np.array([
        [squares[0], a[2, 1] - a[1, 2], a[0, 2] - a[2, 0], a[1, 0] - a[0, 1]],
        [a[2, 1] - a[1, 2], squares[1], a[0, 1] + a[1, 0], a[0, 2] + a[2, 0]],
        [a[0, 2] - a[2, 0], a[0, 1] + a[1, 0], squares[2], a[1, 2] + a[2, 1]],
        [a[1, 0] - a[0, 1], a[0, 2] + a[2, 0], a[1, 2] + a[2, 1], squares[3]],
    ])[int(np.argmax(squares))]  # fmt: skip
    unit: list[float] = (q / np.linalg.norm(q)).tolist()
    return unit
