"""One picture of the clean and all corrupted images of a camera, from the caches of 'occfeat-targets build --corruption all'.

python -m pipelines.corruption_sheet --cache cache --split val --keyframe 0 --camera CAM_FRONT --out corruptions.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.common.command_line import reports_errors

_TEXT = 16  # [px] height of the line above each image


def read_image(cache: Path, keyframe: int, camera: str) -> np.ndarray:
    """(H, W, 3) of a camera. Raises ValueError if there is no such cache, camera or keyframe."""
    reader = CacheReader(cache, allow_incomplete=True)
    cameras = reader.cache.spec.cameras
    if camera not in cameras:
        raise ValueError(f"--camera {camera}: {cache} has {', '.join(cameras)}")
    if not 0 <= keyframe < len(reader):
        raise ValueError(f"--keyframe {keyframe}: {cache} has keyframes 0 to {len(reader) - 1}")
    return reader.read("images", keyframe)[cameras.index(camera)]


def corrupted_cache(cache: Path, folder: str, name: str, level: int, split: str) -> Path:
    return cache / folder / f"{name}-{level}" / f"{split}.zarr"


def draw_sheet(cache: Path, split: str, keyframe: int, camera: str, folder: str = "corruptions") -> Image.Image:
    """A row for each corruption: the clean image, then easy, mid, hard. A cache that is missing stays white."""
    clean = read_image(cache / f"{split}.zarr", keyframe, camera)
    height, width = clean.shape[:2]
    sheet = Image.new("RGB", (width * (len(SEVERITIES) + 1), (height + _TEXT) * len(CORRUPTIONS)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(CORRUPTIONS):
        columns = {"clean": clean} | {
            f"{name}, severity {level} ({word})": (
                read_image(path, keyframe, camera)
                if (path := corrupted_cache(cache, folder, name, level, split)).is_dir()
                else None
            )
            for level, word in SEVERITIES.items()
        }
        for column, (title, image) in enumerate(columns.items()):
            left, top = column * width, row * (height + _TEXT)
            pen.text((left + 4, top + 2), title if image is not None else f"{title}: missing", fill="black")
            if image is not None:
                sheet.paste(Image.fromarray(image), (left, top + _TEXT))
    return sheet


@reports_errors("targets")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory of the clean cache")
    parser.add_argument("--split", required=True)
    parser.add_argument("--keyframe", type=int, default=0)
    parser.add_argument("--camera", default="CAM_FRONT")
    parser.add_argument("--folder", default="corruptions", help="such as corruptions-network")
    parser.add_argument("--out", type=Path, default=Path("corruptions.png"))
    options = parser.parse_args()
    paths = [
        corrupted_cache(options.cache, options.folder, name, level, options.split)
        for name in CORRUPTIONS
        for level in SEVERITIES
    ]
    missing = [path for path in paths if not path.is_dir()]
    draw_sheet(options.cache, options.split, options.keyframe, options.camera, options.folder).save(options.out)
    print(f"written to {options.out}")
    if missing:
        print(
            f"{len(missing)} of {len(paths)} caches are missing, such as {missing[0]}: build them with occfeat-targets build --corruption all, or correct --folder"
        )


if __name__ == "__main__":
    main()
