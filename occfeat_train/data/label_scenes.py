"""The scenes whose labels finetuning uses: a share of the split, or a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from occfeat_targets.common.plural import count


def label_scenes(scenes: Sequence[str], percent: float) -> list[str]:
    """Every (100 / percent)-th scene of the split, in its order, at least one (paper 4.1 leaves the choice open).

    scenes: scene name of each valid keyframe, in the split's order, so that every chosen scene has valid keyframes.
    """
    names = list(dict.fromkeys(scenes))
    count = max(round(len(names) * percent / 100), 1)
    return [names[i * len(names) // count] for i in range(count)]


def read_scenes(file: Path, available: Sequence[str]) -> list[str]:
    """Scene names from a file, one per line, with comments after #. Raises ValueError if a scene is not available."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    names = list(dict.fromkeys(line for line in lines if line))
    known = set(available)
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ValueError(
            f"{file} lists {count(len(names), 'scene')}, {len(missing)} of them not among the {len(known)} of this split that have valid keyframes"
            + (f" ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})" if missing else "")
            + ": correct the list, or build a cache that has them"
        )
    return names
