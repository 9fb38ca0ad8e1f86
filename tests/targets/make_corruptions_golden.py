"""Makes golden/corruptions.npz with the package imagecorruptions 1.1.2 (Apache-2.0), which is no dependency of this project.

Its random numbers are replaced by those of ours. nuScenes-C gives it images in the channel order blue, green, red. It needs NumPy 1:

    pip install imagecorruptions==1.1.2 'numpy<2' 'setuptools<80' opencv-python-headless
    PYTHONPATH=. python tests/targets/make_corruptions_golden.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "golden" / "corruptions.npz"
# {ours: {severity: that of imagecorruptions}}
PUBLISHED = {
    "brightness": {1: 2, 2: 4, 3: 5},
    "fog": {1: 2, 2: 4, 3: 5},
    "snow": {1: 1, 2: 2, 3: 3},
    "motion-blur": {1: 2, 2: 4, 3: 5},
}
NAME = Path("golden.jpg")


def smooth_image(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: waves and noise in colours, a white and a black part."""
    rng = np.random.Generator(np.random.SFC64(5))
    y, x = np.mgrid[:height, :width] / width
    waves = [np.sin(9 * x + 4 * y + phase) + np.cos(13 * y - 3 * x * phase) for phase in (0.0, 1.5, 2.5)]
    image = 118 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    image[: height // 8, : width // 4], image[-height // 8 :, -width // 6 :] = 255, 0
    return np.clip(image, 0, 255).astype(np.uint8)


def main() -> None:
    from imagecorruptions import corruptions as published
    from PIL import Image

    from occfeat_targets.cache.corruption import CorruptionSpec
    from occfeat_targets.targets.corruptions import generator
    from occfeat_targets.targets.weather import SNOW

    image = smooth_image(48, 64)
    arrays: dict[str, Any] = {"image": image}
    for name, severities in PUBLISHED.items():
        for severity, theirs in severities.items():
            rng, zoom = generator(CorruptionSpec(name, severity), NAME.name), SNOW[severity][2]

            def normal(size: Any, loc: float, scale: float, rng: Any = rng, zoom: int = zoom) -> Any:
                whole, (height, width) = np.zeros(size), (-(-n // zoom) for n in size)
                top, left = (size[0] - height) // 2, (size[1] - width) // 2
                whole[top : top + height, left : left + width] = rng.normal(loc, scale, (height, width))
                return whole

            random = SimpleNamespace(uniform=rng.uniform, normal=normal)
            published.np = SimpleNamespace(**{**vars(np), "float_": np.float64, "random": random})
            function = getattr(published, name.replace("-", "_"))
            corrupted = np.uint8(function(Image.fromarray(np.ascontiguousarray(image[..., ::-1])), theirs))
            arrays[f"{name}-{severity}"] = corrupted[..., ::-1]
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
