"""The keyframes that a probe is fitted to and those that it is tested on, which never share a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occfeat_targets.cache.reader import CacheReader, frame_index
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.store import Cache
from occfeat_targets.common.plural import count


@dataclass(frozen=True)
class Half:
    """keyframes: numbers in the cache of `reader`, in its order."""

    reader: CacheReader
    keyframes: tuple[int, ...]

    @property
    def num_scenes(self) -> int:
        scenes = self.reader.cache.identity.scenes
        return len({scenes[keyframe] for keyframe in self.keyframes})


def choose_halves(
    train: CacheReader, test: CacheReader | None = None, *, samples: int = 100, seed: int = 0, frame: str | None = None
) -> tuple[Half, Half]:
    """At most `samples` random keyframes of each half.

    With `test`, the halves are the two caches. Otherwise half of the scenes of `train`, drawn at random, are tested; of an odd
    number of scenes, one more is fitted to. Skipped keyframes and those without a grid in the reference frame are left out.

    Raises CacheError if a cache has no features or no labels, or no usable keyframe, or if the caches were built with other
    options; ValueError if a scene would be in both halves, or if there is no scene left to test on.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: at least 1 keyframe of each half expected")
    index = frame_index(train.cache, frame)
    rng = np.random.default_rng(seed)
    for reader in (train, test) if test is not None else (train,):
        _require_contents(reader.cache)
    if test is None:
        usable = _usable(train, index)
        scene_of = train.cache.identity.scenes
        scenes = rng.permutation(sorted({scene_of[k] for k in usable}))
        if len(scenes) < 2:
            raise ValueError(
                f"the keyframes of {train.cache.path} are all of {scenes[0]}: keyframes of one scene show the same objects, so the "
                "probe would be tested on what it was fitted to. Pass --test-split with a cache of other scenes"
            )
        first = set(scenes[: -(-len(scenes) // 2)])
        members = ([k for k in usable if scene_of[k] in first], [k for k in usable if scene_of[k] not in first])
    else:
        _require_same_targets(train.cache, test.cache)
        members = (_usable(train, index), _usable(test, index))
        shared = {train.cache.identity.scenes[k] for k in members[0]} & {
            test.cache.identity.scenes[k] for k in members[1]
        }
        if shared:
            raise ValueError(
                f"{train.cache.path} and {test.cache.path} share {count(len(shared), 'scene')} ({', '.join(sorted(shared)[:3])}): "
                "the probe would be tested on what it was fitted to. Choose another --test-split, or leave it out to test on half of the scenes"
            )  # fmt: skip
    chosen = [tuple(sorted(int(k) for k in rng.permutation(keyframes)[:samples])) for keyframes in members]
    return Half(train, chosen[0]), Half(train if test is None else test, chosen[1])


def _require_contents(cache: Cache) -> None:
    if cache.spec.teacher is None:
        raise CacheError(
            f"{cache.path} has no features (--teacher none), so there is nothing to probe: build a cache with a teacher"
        )
    if not cache.spec.labels:
        raise CacheError(
            f"{cache.path} has no labels, so there are no classes to separate: build a cache with labels, from a data set that "
            "has annotations or maps and without --no-labels"
        )


def _require_same_targets(train: Cache, test: Cache) -> None:
    differences = train.spec.differences(test.spec)
    if differences:
        raise CacheError(
            f"{train.path} and {test.path} were built with other options, so a probe of one says nothing about the other: "
            f"{'; '.join(differences)}. Build both with the same options"
        )


def _usable(reader: CacheReader, index: int) -> list[int]:
    has_grid = reader.grid_from_ego[:, index].any((-1, -2))
    usable = [int(k) for k in np.flatnonzero(reader.is_valid & has_grid)]
    if not usable:
        raise CacheError(
            f"{reader.cache.path} has no keyframe with targets in frame {reader.cache.spec.frames[index]}: 'occfeat-targets "
            "status' lists what is missing, skipped and masked"
        )
    return usable
