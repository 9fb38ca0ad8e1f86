"""Selection of a split's scenes, and keyframes with missing files or unusable views."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from occfeat_targets.sources.keyframe import DatasetError, Keyframe, Split


def parse_scenes(text: str) -> tuple[str, ...]:
    """Scene names from "a,b,c", or from a file with one name per line and comments after #. Raises DatasetError if empty."""
    listed = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    stripped = (name.partition("#")[0].strip() for name in listed)
    names = tuple(dict.fromkeys(name for name in stripped if name))
    if not names:
        raise DatasetError(f"--scenes {text}: scene names joined by commas, or a file with one name per line, expected")
    return names


def choose_scenes(split: Split, names: Sequence[str]) -> Split:
    """The split with only these scenes, in the split's order. Raises DatasetError that names unknown scenes."""
    there = list(dict.fromkeys(keyframe.scene for keyframe in split.keyframes))
    unknown = [name for name in names if name not in there]
    if unknown:
        raise DatasetError(
            f"--scenes: {len(unknown)} of {len(names)} are not among the {len(there)} scenes of {split.name} in this data "
            f"set ({_few(unknown)}; it has {_few(there)}): correct the names, or choose another --split"
        )
    keyframes = tuple(keyframe for keyframe in split.keyframes if keyframe.scene in names)
    return replace(
        split,
        keyframes=keyframes,
        missing_scenes=(),
        left_out_scenes=tuple(name for name in there if name not in names),
        locations=tuple(sorted({keyframe.location for keyframe in keyframes})),
    )


def note_problems(split: Split, wanted: Collection[int], *, mask_cameras: bool) -> Split:
    """The split with a `problem` set on the wanted keyframes that cannot be built: missing files, unusable views.

    mask_cameras: unusable views are only noted in the view, unless the keyframe has no other.
    Each folder is listed once, which is much faster on a network file system than checking every file.
    """
    there: dict[Path, set[str]] = {}

    def is_missing(path: Path) -> bool:
        if path.parent not in there:
            there[path.parent] = _files_in(path.parent)
        return path.name not in there[path.parent]

    def noted(keyframe: Keyframe) -> Keyframe:
        views = tuple(
            replace(view, problem=f"{view.path} is missing") if view.problem is None and is_missing(view.path) else view
            for view in keyframe.cameras
        )
        keyframe = replace(keyframe, cameras=views)
        sweeps = [f"{sweep.path} is missing" for sweep in keyframe.sweeps if is_missing(sweep.path)]
        broken = [view.problem for view in views if view.problem is not None]
        if keyframe.problem is not None or not (sweeps or broken):
            return keyframe
        if mask_cameras and not sweeps and len(broken) < len(views):
            return keyframe
        first, *more = [*broken, *sweeps]
        parts = len(views) + len(keyframe.sweeps)
        return replace(keyframe, problem=first + (f", and {len(more)} more of its {parts} files" if more else ""))

    keyframes = list(split.keyframes)
    for index in wanted:
        keyframes[index] = noted(keyframes[index])
    return replace(split, keyframes=tuple(keyframes))


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            # Only links are accessed. A link to nothing or to itself is no file.
            return {e.name for e in entries if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def describe_problems(keyframes: Sequence[Keyframe]) -> str | None:
    """Numbers of keyframes that cannot be built, per scene; None if all can be built."""
    return _numbers(keyframes, [keyframe for keyframe in keyframes if keyframe.problem is not None])


def describe_masked(keyframes: Sequence[Keyframe]) -> str | None:
    """Numbers of keyframes with views that are already known to be unusable, per scene; None if there are none."""
    can_build = [keyframe for keyframe in keyframes if keyframe.problem is None]
    return _numbers(keyframes, [k for k in can_build if any(view.problem is not None for view in k.cameras)])


def _numbers(keyframes: Sequence[Keyframe], chosen: Sequence[Keyframe]) -> str | None:
    bad = Counter(keyframe.scene for keyframe in chosen)
    if not bad:
        return None
    total = Counter(keyframe.scene for keyframe in keyframes)
    scenes = [f"{scene}: {number} of {total[scene]}" for scene, number in bad.items()]
    return f"{sum(bad.values())} of {len(keyframes)} keyframes, in {len(bad)} of {len(total)} scenes ({_few(scenes)})"


def require_no_problems(split: Split, wanted: Collection[int]) -> None:
    """Raises DatasetError if a wanted keyframe has a problem, with counts per scene, examples and remedies."""
    keyframes = [split.keyframes[index] for index in wanted]
    problems = [f"sample {k.token} of {k.scene}: {k.problem}" for k in keyframes if k.problem is not None]
    if not problems:
        return
    bad = {keyframe.scene for keyframe in keyframes if keyframe.problem is not None}
    whole = list(dict.fromkeys(keyframe.scene for keyframe in keyframes if keyframe.scene not in bad))
    alone = f"; or build only complete scenes with --scenes ({_few(whole)})" if whole else ""
    more = f"\n  ... and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise DatasetError(
        f"{describe_problems(keyframes)} cannot be built. Download what is missing{alone}; or leave these keyframes out with "
        "--on-error skip, or only their cameras with --on-error mask-camera:\n  " + "\n  ".join(problems[:3]) + more
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
