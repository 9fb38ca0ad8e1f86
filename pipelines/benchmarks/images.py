"""Decoding and resizing of camera JPEGs to the student's and the teacher's sizes, against a full decode and common short cuts.

python pipelines/benchmarks/images.py [--dataroot nuscenes]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from _inputs import find_dataroot, find_images
from _timing import compare, machine, table
from PIL import Image

from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.targets.images import load_image, load_image_reference

Sizes = Sequence[tuple[int, int]]


def pillow(scale: int, path: Path, sizes: Sizes) -> list[np.ndarray]:
    image = Image.open(path)
    image.draft("RGB", (1600 // scale, 900 // scale))
    image.load()
    return [np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)) for h, w in sizes]


def opencv(flag: int, interpolation: int, path: Path, sizes: Sizes) -> list[np.ndarray]:
    pixels = cv2.imread(str(path), flag)
    return [cv2.resize(pixels, (w, h), interpolation=interpolation)[..., ::-1] for h, w in sizes]


def decode_only(scale: int, path: Path, sizes: Sizes) -> None:
    content = path.read_bytes()
    simplejpeg.decode_jpeg(content, "RGB", min_height=-(-900 // scale), min_width=1600 // scale)


def in_turn(method: Callable[..., object], paths: Sequence[Path], sizes: Sizes) -> Callable[[], object]:
    """Calls the method with the next image each time, so that all contenders get all images equally often."""
    turns = itertools.cycle(paths)
    return lambda: method(next(turns), sizes)


def fidelity(results: Sequence[np.ndarray], twins: Sequence[np.ndarray]) -> str:
    """The worst image's PSNR [dB] against the reference."""
    worst = max(np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(results, twins, strict=True))
    return "the same" if worst == 0 else f"{10 * np.log10(255**2 / worst):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot; its first image per camera is used")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each table")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    paths, what = find_images(find_dataroot(options.dataroot))
    print(f"{machine()}\n{what}, 1600x900, one thread")
    methods: dict[str, Callable[..., object]] = {
        "limit: half-size decode alone": partial(decode_only, 2),
        "floor: 1/8 decode alone (entropy decoding)": partial(decode_only, 8),
        "ours: load_image": load_image,
        "full decode, Pillow bilinear (the reference)": partial(pillow, 1),
        "Pillow draft 1/2, Pillow bilinear": partial(pillow, 2),
        "OpenCV 1/2, INTER_AREA": partial(opencv, cv2.IMREAD_REDUCED_COLOR_2, cv2.INTER_AREA),
        "OpenCV full, INTER_AREA": partial(opencv, cv2.IMREAD_COLOR, cv2.INTER_AREA),
        "OpenCV full, INTER_LINEAR (aliased)": partial(opencv, cv2.IMREAD_COLOR, cv2.INTER_LINEAR),
    }
    limit, floor, ours, reference, *_ = methods
    for title, sizes in {"224x400": ((224, 400),), "270x480 and 224x392": (STUDENT_SIZE, (224, 392))}.items():
        twins = [array for path in paths for array in load_image_reference(path, sizes)]
        notes = {
            name: fidelity([array for path in paths for array in method(path, sizes)], twins)  # type: ignore[attr-defined]
            for name, method in methods.items()
            if name not in (limit, floor)
        }
        contenders = {name: in_turn(method, paths, sizes) for name, method in methods.items()}
        rows = compare(contenders, ours=ours, limit=limit, seconds=options.seconds)
        gain = next(row.to_ours for row in rows if row.name == reference)
        print(f"\nto {title}: {gain:.2f} times as fast as the reference\n")
        print(table(rows, notes, "worst PSNR, dB"))


if __name__ == "__main__":
    main()
