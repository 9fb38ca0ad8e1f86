"""The scenes whose labels finetuning uses: a share of the split by the config's rule, or a list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from occfeat_targets.cache.store import Cache
from occfeat_targets.common.plural import count
from occfeat_train.config import Config


def table_order(cache: Cache) -> list[str]:
    """Scenes of the cache in the order of the data set's own table; empty if the cache does not say it."""
    return list(cache.provenance.get("table_order", []))


def resolve_order(cache: Cache, config: Config) -> tuple[Config, list[str]]:
    """The config with the order in which the scenes of this cache can be counted, and a note if it is not the one asked for."""
    chosen = config.label_scenes
    if not (config.uses_label_share and chosen.needs_order and chosen.order == "table") or table_order(cache):
        return config, []
    note = (
        f"{cache.path} does not say in which order the data set's own table has its scenes (an earlier release built it, or the data "
        "set has no such table): they are counted in the split's order, as with --scene-order split"
    )
    return replace(config, label_scenes=replace(chosen, order="split")), [note]


def label_scenes(cache: Cache, usable: Collection[str], config: Config) -> list[str]:
    """The scenes of the cache that are a share of config.labels percent, in the split's order, at least one.

    usable: those with valid keyframes. The config's order of scenes is resolved. Raises ValueError without usable scenes.
    """
    if not usable:
        raise ValueError(f"{cache.path}: no valid keyframe among the {len(cache)}: build it again with --retry-skipped")
    split = list(dict.fromkeys(cache.identity.scenes))
    ordered = table_order(cache) if config.label_scenes.order == "table" else []
    chosen = set(config.label_scenes.choose(ordered or split, usable, config.labels))
    return [name for name in split if name in chosen]


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
