"""Motion: routes over the street grid, lane paths with rounded turns, and speeds along them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled
from occfeat_targets.synth.layout import LANE_WIDTH, District, Node

Array = NDArray[np.float64]
Step = tuple[int, int]

_LEFT_RADIUS, _RIGHT_RADIUS = 7.5, 10.5
_COMFORT_LATERAL, _COMFORT_BRAKING = 2.2, 1.8  # [m/s^2]


@dataclass(frozen=True)
class Motion:
    """A pose as a function of time: times (n,) [s], poses (n, 3) global x, y [m] and yaw [rad], unwrapped."""

    times: Array
    poses: Array

    @staticmethod
    def resting(x: float, y: float, yaw: float) -> Motion:
        return Motion(np.zeros(1), np.array([[x, y, yaw]]))

    def at(self, t: float | Array) -> Array:
        """(..., 3) poses at time(s) t; before the first and after the last time it stands still."""
        return np.stack([np.interp(t, self.times, self.poses[:, k]) for k in range(3)], axis=-1)

    def shifted(self, delay: float) -> Motion:
        return Motion(self.times + delay, self.poses)


def turn_left(step: Step) -> Step:
    return -step[1], step[0]


def turn_right(step: Step) -> Step:
    return step[1], -step[0]


def _is_node(district: District, node: Node) -> bool:
    return 0 <= node[0] < len(district.avenues) and 0 <= node[1] < len(district.streets)


def random_walk(
    district: District,
    start: Node,
    step: Step,
    length: float,
    rng: np.random.Generator,
    turn_at: int | None = None,
) -> list[Node]:
    """Nodes from `start` first along `step`, at least `length` metres.

    Goes straight with probability 1/2 where it can, never back; with `turn_at`, straight up to that node, then turns.
    """
    nodes = [start, (start[0] + step[0], start[1] + step[1])]
    travelled = 0.0
    while travelled < length:
        here = nodes[-1]
        turns = [s for s in (turn_left(step), turn_right(step)) if _is_node(district, (here[0] + s[0], here[1] + s[1]))]
        ahead = _is_node(district, (here[0] + step[0], here[1] + step[1]))
        index = len(nodes) - 1
        if turn_at is not None and index <= turn_at:
            straight = ahead and index < turn_at
        else:
            straight = ahead and rng.random() < 0.5
        if not straight:
            step = turns[rng.integers(len(turns))]
        nodes.append((here[0] + step[0], here[1] + step[1]))
        a, b = (np.array(_node_uv(district, n)) for n in nodes[-2:])
        travelled += float(np.abs(b - a).sum())
    return nodes


def _node_uv(district: District, node: Node) -> tuple[float, float]:
    return district.avenues[node[0]].centre, district.streets[node[1]].centre


def _runs(nodes: list[Node]) -> list[tuple[Node, Step, Node]]:
    """A route as straight runs: (first node, step, last node)."""
    runs: list[tuple[Node, Step, Node]] = []
    for a, b in itertools.pairwise(nodes):
        step = (b[0] - a[0], b[1] - a[1])
        if runs and runs[-1][1] == step:
            runs[-1] = (runs[-1][0], step, b)
        else:
            runs.append((a, step, b))
    return runs


def _lane_line(district: District, run: tuple[Node, Step, Node], lane: int, shift: float) -> float:
    """The constant street coordinate of a lane: u on an avenue, v on a street. Lane 0 is the leftmost."""
    (i, j), step, _ = run
    road = district.avenues[i] if step[0] == 0 else district.streets[j]
    offset = (road.lanes - 0.5 - lane) * LANE_WIDTH + shift
    # Left of (du, dv) is (-dv, du).
    return road.centre + (-step[1] if step[0] == 0 else step[0]) * offset


def lane_path(district: District, nodes: list[Node], rng: np.random.Generator, shift: float = 0.0) -> Array:
    """(n, 2) street coordinates, about every 0.5 m, of a vehicle's path along `nodes`.

    It keeps to one lane between turns: the leftmost before a left turn, the rightmost before a right turn. `shift`
    moves it further left within the lane [m].
    """
    runs = _runs(nodes)
    lines = []
    for k, run in enumerate(runs):
        (i, j), step, _ = run
        lanes = (district.avenues[i] if step[0] == 0 else district.streets[j]).lanes
        if k + 1 < len(runs):
            lane = 0 if runs[k + 1][1] == turn_left(step) else lanes - 1
        else:
            lane = int(rng.integers(lanes))
        lines.append(_lane_line(district, run, lane, shift))
    corners = [np.array(_node_uv(district, nodes[0]))]
    corners[0][0 if runs[0][1][0] == 0 else 1] = lines[0]
    for run, line, line_next in zip(runs, lines, lines[1:], strict=False):
        corners.append(np.array([line, line_next] if run[1][0] == 0 else [line_next, line]))
    end = np.array(_node_uv(district, nodes[-1]))
    end[0 if runs[-1][1][0] == 0 else 1] = lines[-1]
    corners.append(end)

    pieces, position = [], corners[0]
    for corner, run, after in zip(corners[1:-1], runs, runs[1:], strict=False):
        a, b = np.array(run[1], np.float64), np.array(after[1], np.float64)
        radius = _LEFT_RADIUS if after[1] == turn_left(run[1]) else _RIGHT_RADIUS
        begin = corner - radius * a
        pieces.append(_straight(position, begin))
        angles = np.linspace(0, np.pi / 2, int(radius * np.pi) + 1)[:-1, None]
        pieces.append(begin + radius * (np.sin(angles) * a + (1 - np.cos(angles)) * b))
        position = corner + radius * b
    pieces.append(_straight(position, corners[-1]))
    return np.concatenate([*pieces, corners[-1][None]])


def _straight(a: Array, b: Array) -> Array:
    n = max(1, int(np.linalg.norm(b - a) / 0.5))
    return a + (b - a) * np.linspace(0, 1, n + 1)[:-1, None]


def drive(district: District, path_uv: Array, top_speed: float) -> Motion:
    """Drive a path [street coordinates], braking for bends; the motion starts at time 0."""
    xy = district.to_global(path_uv)
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    xy, steps = xy[np.concatenate([[True], steps > 1e-6])], steps[steps > 1e-6]
    heading = np.unwrap(np.arctan2(*np.diff(xy, axis=0).T[::-1]))
    heading = np.concatenate([heading[:1], (heading[1:] + heading[:-1]) / 2, heading[-1:]])
    # Steering takes time: average the heading over about 3 m.
    padded = np.pad(heading, 3, mode="edge")
    heading = np.convolve(padded, np.full(7, 1 / 7), mode="valid")
    curvature = np.abs(np.diff(heading)) / steps
    speed = np.minimum(top_speed, np.sqrt(_COMFORT_LATERAL / np.maximum(curvature, 1e-4)))
    _limit_acceleration(speed, steps)
    times = np.concatenate([[0.0], np.cumsum(steps / speed)])
    return Motion(times, np.column_stack([xy, heading]))


@compiled()
def _limit_acceleration(speed: Array, steps: Array) -> None:
    """Lower speeds (n,) [m/s] in place, so that none needs more than comfortable braking over `steps` (n,) [m]."""
    for k in range(1, len(speed)):
        speed[k] = min(speed[k], np.sqrt(speed[k - 1] ** 2 + 2 * _COMFORT_BRAKING * steps[k]))
    for k in range(len(speed) - 2, -1, -1):
        speed[k] = min(speed[k], np.sqrt(speed[k + 1] ** 2 + 2 * _COMFORT_BRAKING * steps[k]))


def walk(district: District, path_uv: Array, speed: float) -> Motion:
    """Walk a polyline [street coordinates] at a constant speed: the motion starts at time 0."""
    dense = np.concatenate([_straight(a, b) for a, b in itertools.pairwise(path_uv)] + [path_uv[-1:]])
    xy = district.to_global(dense)
    ahead = np.diff(xy, axis=0)
    heading = np.unwrap(np.arctan2(ahead[:, 1], ahead[:, 0]))
    times = np.concatenate([[0.0], np.cumsum(np.linalg.norm(ahead, axis=1) / speed)])
    return Motion(times, np.column_stack([xy, np.append(heading, heading[-1])]))


class Clearance:
    """Collision checks: a body is a row of discs along its length at given times."""

    def __init__(self, times: Array) -> None:
        self._times = times
        self._bodies: list[tuple[Array, float]] = []

    def try_add(self, motion: Motion, length: float, width: float) -> bool:
        """Add a body unless it is too near to one added before."""
        count = max(1, int(np.ceil(length / width)))
        poses = np.broadcast_to(motion.at(self._times), (len(self._times), 3))
        along = np.linspace(-0.5, 0.5, count) * max(length - width, 0.0)
        axis = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=-1)
        discs = poses[:, None, :2] + along[:, None] * axis[:, None]
        radius = 0.58 * width + 0.15
        for others, other_radius in self._bodies:
            if _come_nearer(discs, others, (radius + other_radius) ** 2):
                return False
        self._bodies.append((discs, radius))
        return True


@compiled()
def _come_nearer(a: Array, b: Array, square: float) -> bool:
    """Whether two rows of discs, (times, n, 2) and (times, m, 2) [m], come nearer than sqrt(square) at any time."""
    for t in range(a.shape[0]):
        for i in range(a.shape[1]):
            for j in range(b.shape[1]):
                if (a[t, i, 0] - b[t, j, 0]) ** 2 + (a[t, i, 1] - b[t, j, 1]) ** 2 < square:
                    return True
    return False
