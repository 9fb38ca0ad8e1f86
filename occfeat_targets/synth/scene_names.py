"""Names of the synthetic city's scenes: those of nuScenes' splits, so that the devkit finds them."""

from __future__ import annotations

from occfeat_targets.sources.splits import split_scenes

# {version: its training and validation split}
_SPLITS = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}


def choose_names(version: str | None, scenes: int, val_scenes: int) -> tuple[str, list[str], list[str]]:
    """(version, training names, validation names); without a version, the smallest with enough names."""
    scenes_of = split_scenes()
    names = {key: [scenes_of[split] for split in splits] for key, splits in _SPLITS.items()}
    if version is None:
        train, val = names["v1.0-mini"]
        version = "v1.0-mini" if scenes <= len(train) and val_scenes <= len(val) else "v1.0-trainval"
    if version not in names:
        raise ValueError(f"version {version!r} is none of {', '.join(names)}")
    train, val = names[version]
    if scenes > len(train) or val_scenes > len(val):
        raise ValueError(
            f"{version} has names for {len(train)} training and {len(val)} validation scenes, "
            f"{scenes} and {val_scenes} were requested"
        )
    return version, train[:scenes], val[:val_scenes]
