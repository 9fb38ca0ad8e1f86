"""nuScenes' official splits: names of scenes, as the devkit's `create_splits_scenes` gives them.

They are copied so that neither a build nor the synthetic city needs the devkit, which asks for NumPy 1. A test compares them with it.
"""

from __future__ import annotations

import json
from pathlib import Path

from occfeat_targets.sources.keyframe import DatasetError

# {split: ranges of the scenes' numbers}
_NUMBERS = {
    "mini_train": "61 553 655 757 796 1077 1094 1100",
    "mini_val": "103 916",
    "train": (
        "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 206-214 "
        "218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 471-472 "
        "474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 "
        "700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 "
        "815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992 "
        "994-1025 1044-1058 1074-1102 1104-1110"
    ),
    "val": (
        "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 "
        "777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
    ),
    "test": (
        "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 833-842 "
        "844-846 932-933 935-943 1026-1043"
    ),
    "train_detect": (
        "1-2 41-76 161-168 170-176 190-196 199-200 202-204 206-214 254-264 283-306 315-318 321 323-324 347-375 382 "
        "420-439 457-459 461-465 467-469 471-472 474-480 566 568 570-578 580 582-583 665-679 681 683-689 739-741 744 "
        "746-747 749-752 757-765 767-769 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-991 "
        "1011-1025 1074-1102 1104-1105"
    ),
}


def split_scenes() -> dict[str, list[str]]:
    """{split: names of its scenes, ascending}."""
    splits = {name: _names(ranges) for name, ranges in _NUMBERS.items()}
    detect = set(splits["train_detect"])
    return splits | {"train_track": [name for name in splits["train"] if name not in detect]}


def own_splits(file: Path) -> dict[str, list[str]]:
    """The splits in a splits.json beside the tables, as the devkit reads it: {split: names of its scenes}; none without the file.

    Raises DatasetError if it is no such file.
    """
    if not file.exists():
        return {}
    try:
        splits = json.loads(file.read_text())
    except (OSError, ValueError) as err:
        raise DatasetError(f"{file} cannot be read ({err}): restore or delete it") from err
    is_valid = isinstance(splits, dict) and all(
        isinstance(scenes, list) and all(isinstance(scene, str) for scene in scenes) for scenes in splits.values()
    )
    if not is_valid:
        raise DatasetError(f'{file}: {{"split": ["scene", ...], ...}} expected: restore or delete it')
    return {split: list(dict.fromkeys(scenes)) for split, scenes in splits.items()}


def _names(ranges: str) -> list[str]:
    names = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        names += [f"scene-{n:04d}" for n in range(int(first), int(last or first) + 1)]
    return names
