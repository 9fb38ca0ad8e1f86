"""`occfeat-targets preview`: pictures of keyframes that make wrong transforms visible, and an HTML page with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.reader import CacheReader, frame_index
from occfeat_targets.cache.records import writing
from occfeat_targets.cache.store import Cache
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.pictures.cameras import read_features
from occfeat_targets.pictures.canvas import png
from occfeat_targets.pictures.colors import FeatureColors
from occfeat_targets.pictures.html import render
from occfeat_targets.pictures.sheet import draw_keyframe, why_absent

MAX_FITTED = 8  # keyframes to which the colours are fitted


def choose_keyframes(
    cache: Cache, *, numbers: str | None = None, tokens: Sequence[str] = (), samples: int = 4
) -> list[int]:
    """Indices of keyframes given by number ("0,5,9") or sample token; else `samples` finished ones, evenly spread.

    Raises ValueError on invalid numbers and on keyframes that are not in the cache.
    """
    try:
        chosen = [int(number) for number in numbers.split(",")] if numbers is not None else []
    except ValueError:
        raise ValueError(f"keyframes {numbers!r}: numbers joined by commas expected, such as 0,5,9") from None
    _check_keyframes(cache, chosen)
    for token in tokens:
        if token not in cache.identity.tokens:
            raise ValueError(f"{cache.path} has no sample {token!r}: correct the token, or choose another --split")
        chosen.append(cache.identity.tokens.index(token))
    if not chosen:
        built = [k for shard in sorted(cache.finished_shards()) for k in cache.shard_range(shard)]
        if not built:
            raise ValueError(f"nothing of {cache.path} is built yet: run 'occfeat-targets build' first")
        chosen = [built[i] for i in np.linspace(0, len(built) - 1, min(samples, len(built))).round().astype(int)]
    return list(dict.fromkeys(chosen))


def _check_keyframes(cache: Cache, keyframes: Sequence[int]) -> None:
    for keyframe in keyframes:
        if not 0 <= keyframe < len(cache):
            raise ValueError(
                f"{cache.path} has no keyframe {keyframe}: it has {len(cache)}, choose 0 to {len(cache) - 1}"
            )


def read_returns(cache: Cache, keyframes: Sequence[int], dataroot: Path | None) -> dict[int, NDArray[np.float64]]:
    """{keyframe: (n, 3) LiDAR returns in the ego frame at LiDAR time [m], all sweeps, without returns from the ego vehicle}.

    They are read from the cache, or from the data set if the cache was built without --points. dataroot: by default the one
    the cache was built from. Raises ValueError if the data set is missing or lacks a keyframe.
    """
    spec = cache.spec
    if spec.max_points:
        reader = CacheReader(cache, allow_incomplete=True)
        return {keyframe: reader.points(keyframe).xyz.astype(np.float64) for keyframe in keyframes}
    from occfeat_targets.build.planned import open_plan
    from occfeat_targets.sources.source import open_source
    from occfeat_targets.targets.points import points_of

    origin = dataroot or cache.provenance.get("dataroot")
    if origin is None or not Path(origin).is_dir():
        raise ValueError(f"there is no data set at {origin}: pass --dataroot, or leave --points out")
    source = open_source(spec.source)
    plan = open_plan(cache, Path(origin))
    if plan is not None:
        there = plan.find(cache, keyframes)
    else:  # a cache of an earlier release
        split = source.read_split(
            Path(origin),
            cache.path.stem,
            version=cache.provenance.get("version"),
            num_sweeps=spec.num_sweeps,
            with_boxes=False,
        )
        indices = {token: index for index, token in enumerate(cache.identity.tokens)}
        there = {indices[keyframe.token]: keyframe for keyframe in split.keyframes if keyframe.token in indices}
    returns = {}
    for number in keyframes:
        if number not in there:
            raise ValueError(
                f"{origin} lacks sample {cache.identity.tokens[number]}: pass the --dataroot that {cache.path} was built from"
            )
        sweeps = [source.read_sweep(sweep.path) for sweep in there[number].sweeps]
        returns[number] = points_of(there[number], sweeps, spec.ego_box).xyz.astype(np.float64)
    return returns


def fit_features(reader: CacheReader, keyframes: Sequence[int]) -> FeatureColors | None:
    """Feature colours for all sheets, fitted to up to MAX_FITTED of these keyframes; None without features."""
    valid = [k for k in keyframes if why_absent(reader, k) is None]
    if reader.cache.spec.teacher is None or not valid:
        return None
    fitted = [read_features(reader, k) for k in valid[:: -(-len(valid) // MAX_FITTED)]]
    return FeatureColors.fit(np.concatenate([features[is_shown] for features, is_shown in fitted]))


def write_preview(
    cache: Cache | Path,
    out: Path,
    keyframes: Sequence[int],
    *,
    frame: str | None = None,
    points: bool = False,
    dataroot: Path | None = None,
    progress: bool = True,
) -> Path:
    """Write one PNG per keyframe and an index.html that shows them offline. Returns the path of the page.

    frame: reference frame of the grid; the cache's first by default. points: also draw the LiDAR returns, from the data set
    at `dataroot` (default: the one the cache was built from). Raises ValueError if the cache lacks a keyframe or the frame,
    the data set is missing, or `out` is not writable.
    """
    reader = CacheReader(cache, allow_incomplete=True)
    cache = reader.cache
    _check_keyframes(cache, keyframes)
    frame_index(cache, frame)
    with writing(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    valid = [k for k in keyframes if why_absent(reader, k) is None]
    returns = read_returns(cache, valid, dataroot) if points and valid else {}
    feature_colors = fit_features(reader, keyframes)
    names = [f"keyframe-{keyframe:06d}.png" for keyframe in keyframes]
    with progress_bar(len(keyframes), desc="preview", unit="keyframe", disable=not progress) as bar:
        for keyframe, name in zip(keyframes, names, strict=True):
            sheet = draw_keyframe(
                reader, keyframe, frame=frame, returns=returns.get(keyframe), feature_colors=feature_colors
            )
            with writing(str(out / name)):
                (out / name).write_bytes(png(sheet))
            bar.update()
    page = render(
        Path(__file__).with_name("preview.html"),
        title=f"{cache.path.stem}: {len(keyframes)} of {len(cache)} keyframes",
        warnings=cache.warnings,
        cache=cache,
        points=points,
        pictures=list(zip(keyframes, names, strict=True)),
    )
    with writing(str(out / "index.html")):
        (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"
