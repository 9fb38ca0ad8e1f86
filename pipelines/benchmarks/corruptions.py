"""nuScenes-C's corruptions of a 1600x900 image, against the package imagecorruptions 1.1.2 where it is installed; one thread.

python pipelines/benchmarks/corruptions.py [--dataroot nuscenes]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from _inputs import find_dataroot, find_images
from _timing import compare, machine, table

from occfeat_targets.cache.corruption import CORRUPTIONS, LOST_VIEWS, CorruptionSpec
from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.targets.corruptions import corrupt
from occfeat_targets.targets.images import load_image
from occfeat_targets.verify.slow_corruptions import corrupt_reference

# Severities of imagecorruptions that are our severity 2. It has no LowLight and no ColorQuant.
PUBLISHED = {"brightness": 4, "fog": 4, "snow": 2, "motion-blur": 4}


def published(name: str, image: np.ndarray) -> Callable[[], Any] | None:
    try:
        import imagecorruptions
    except ImportError:
        return None
    return partial(imagecorruptions.corrupt, image, corruption_name=name.replace("-", "_"), severity=PUBLISHED[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot; its first image is used")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each table")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    (path, *_), _ = find_images(find_dataroot(options.dataroot))
    image = cv2.imread(str(path))[..., ::-1].copy()
    print(f"{machine()}\n{image.shape[1]}x{image.shape[0]}, one thread, severity 2")
    for name in CORRUPTIONS:
        if name in LOST_VIEWS:
            continue
        spec = CorruptionSpec(name, 2)
        change = partial(corrupt, corruption=spec, file=path)
        contenders: dict[str, Callable[[], Any]] = {
            f"ours: {name}": partial(change, image),
            "JPEG -> corrupted image of 270x480": partial(load_image, path, [STUDENT_SIZE], corrupt=change),
            "slow reference": partial(corrupt_reference, image, spec, path),
        }
        if name in PUBLISHED and (theirs := published(name, image)) is not None:
            contenders["imagecorruptions"] = theirs
        print(f"\n{table(compare(contenders, ours=f'ours: {name}', seconds=options.seconds, min_rounds=3))}")


if __name__ == "__main__":
    main()
