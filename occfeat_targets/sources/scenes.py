"""Selection of a split's scenes, and keyframes with missing files or unusable views."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
            f"set ({_few(unknown)}; it has {_few(there)}): correct the names or the path of the file with them, or choose another --split"
        )
    keyframes = tuple(keyframe for keyframe in split.keyframes if keyframe.scene in names)
    return replace(
        split,
        keyframes=keyframes,
        missing_scenes=(),
        left_out_scenes=tuple(name for name in there if name not in names),
        locations=tuple(sorted({keyframe.location for keyframe in keyframes})),
    )


class Files:
    """Which files are there.

    list_folders: list each folder once, which for many files is much faster on a network file system than to look for every one.
    """

    def __init__(self, *, list_folders: bool) -> None:
        self._list_folders = list_folders
        self._there: dict[Path, set[str]] = {}

    def is_missing(self, path: Path) -> bool:
        if not self._list_folders:
            return not os.path.isfile(path)
        if path.parent not in self._there:
            self._there[path.parent] = _files_in(path.parent)
        return path.name not in self._there[path.parent]


def note_problem(keyframe: Keyframe, files: Files, *, mask_cameras: bool) -> Keyframe:
    """The keyframe with its `problem` set if it cannot be built: missing files, unusable views.

    mask_cameras: unusable views are only noted in the view, unless the keyframe has no other.
    """
    views = tuple(
        replace(view, problem=f"{view.path} is missing")
        if view.problem is None and files.is_missing(view.path)
        else view
        for view in keyframe.cameras
    )
    keyframe = replace(keyframe, cameras=views)
    sweeps = [f"{sweep.path} is missing" for sweep in keyframe.sweeps if files.is_missing(sweep.path)]
    broken = [view.problem for view in views if view.problem is not None]
    if keyframe.problem is not None or not (sweeps or broken):
        return keyframe
    if mask_cameras and not sweeps and len(broken) < len(views):
        return keyframe
    first, *more = [*broken, *sweeps]
    parts = len(views) + len(keyframe.sweeps)
    return replace(keyframe, problem=first + (f", and {len(more)} more of its {parts} files" if more else ""))


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            # Only links are accessed. A link to nothing or to itself is no file.
            return {e.name for e in entries if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


@dataclass
class Problems:
    """Which of some keyframes cannot be built.

    scenes: the scene of each keyframe. problems: (scene, sample token, problem) of those that cannot be built. masked: scenes of
    those with views that are already known to be unusable.
    """

    scenes: list[str] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)

    def add(self, keyframe: Keyframe) -> None:
        self.scenes.append(keyframe.scene)
        if keyframe.problem is not None:
            self.problems.append((keyframe.scene, keyframe.token, keyframe.problem))
        elif any(view.problem is not None for view in keyframe.cameras):
            self.masked.append(keyframe.scene)

    def describe(self) -> str | None:
        """Numbers of keyframes that cannot be built, per scene; None if all can be built."""
        return self._numbers([scene for scene, _, _ in self.problems])

    def describe_masked(self) -> str | None:
        """Numbers of keyframes with masked views, per scene; None if there are none."""
        return self._numbers(self.masked)

    def _numbers(self, chosen: Sequence[str]) -> str | None:
        bad, total = Counter(chosen), Counter(self.scenes)
        if not bad:
            return None
        scenes = [f"{scene}: {number} of {total[scene]}" for scene, number in bad.items()]
        return f"{len(chosen)} of {len(self.scenes)} keyframes, in {len(bad)} of {len(total)} scenes ({_few(scenes)})"

    def require_none(self) -> None:
        """Raises DatasetError if a keyframe cannot be built, with counts per scene, examples and remedies."""
        if not self.problems:
            return
        examples = [f"sample {token} of {scene}: {problem}" for scene, token, problem in self.problems]
        bad = {scene for scene, _, _ in self.problems}
        whole = list(dict.fromkeys(scene for scene in self.scenes if scene not in bad))
        alone = f"; or build only complete scenes with --scenes ({_few(whole)})" if whole else ""
        more = f"\n  ... and {len(examples) - 3} more" if len(examples) > 3 else ""
        raise DatasetError(
            f"{self.describe()} cannot be built. Download what is missing{alone}; or leave these keyframes out with "
            "--on-error skip, or only their cameras with --on-error mask-camera:\n  " + "\n  ".join(examples[:3]) + more
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
