"""Scene names that are in the devkit's own split lists.

They are copied here because the devkit takes seconds to load and only `sources.nuscenes` imports it. A test compares them
with the devkit's lists.
"""

from __future__ import annotations

_MINI = ("61 553 655 757 796 1077 1094 1100", "103 916")
_TRAINVAL = (
    "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 206-214 "
    "218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 471-472 "
    "474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 700-701 "
    "703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 815-817 "
    "819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992 994-1025 "
    "1044-1058 1074-1102 1104-1110",
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 777-778 "
    "780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073",
)
_VERSIONS = {"v1.0-mini": _MINI, "v1.0-trainval": _TRAINVAL}


def _expand(ranges: str) -> list[str]:
    names = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        names += [f"scene-{n:04d}" for n in range(int(first), int(last or first) + 1)]
    return names


def split_names(version: str) -> tuple[list[str], list[str]]:
    """The devkit's training and validation scenes of "v1.0-mini" or "v1.0-trainval"."""
    if version not in _VERSIONS:
        raise ValueError(f"version {version!r} is none of {', '.join(_VERSIONS)}")
    train, val = _VERSIONS[version]
    return _expand(train), _expand(val)


def choose_names(version: str | None, scenes: int, val_scenes: int) -> tuple[str, list[str], list[str]]:
    """(version, training names, validation names); without a version, the smallest with enough names."""
    if version is None:
        train, val = split_names("v1.0-mini")
        version = "v1.0-mini" if scenes <= len(train) and val_scenes <= len(val) else "v1.0-trainval"
    train, val = split_names(version)
    if scenes > len(train) or val_scenes > len(val):
        raise ValueError(
            f"{version} has names for {len(train)} training and {len(val)} validation scenes, "
            f"{scenes} and {val_scenes} were requested"
        )
    return version, train[:scenes], val[:val_scenes]
