"""The benchmark of planning, on small tables."""

from __future__ import annotations

import json

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources import nuscenes
from tests.conftest import REPOSITORY

TABLES = ("scene", "sample", "sample_data", "ego_pose", "sample_annotation", "instance")


def test_tables_of_any_size_can_be_written_and_planned(tmp_path, monkeypatch, capsys):
    """pipelines/benchmarks/planning.py, with 2 scenes of 3 keyframes."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "pipelines" / "benchmarks"))
    from _tables import VERSION, Size
    from planning import run as measure

    size = Size(scenes=2, samples=6, sample_data=500, annotations=70, instances=40, map_polygons=60)
    measure(tmp_path, size, train_scenes=2, teacher="none", num_measured=1)
    assert "| task 0 of 1 |" in capsys.readouterr().out
    found = {name: json.loads((tmp_path / "data" / VERSION / f"{name}.json").read_text()) for name in TABLES}
    assert {name: len(records) for name, records in found.items()} == {
        "scene": 2, "sample": 6, "sample_data": 500, "ego_pose": 500, "sample_annotation": 70, "instance": 40
    }  # fmt: skip
    cache = open_cache(tmp_path / "cache" / "train.zarr")
    assert len(cache) == 6 and cache.spec.labels == ("vehicles", "map")
    keyframes = nuscenes.read_split(
        tmp_path / "data", "train", version=None, cameras=CAMERAS, num_sweeps=5, with_boxes=True
    ).keyframes
    assert [len(k.sweeps) for k in keyframes] == [1, 5, 5] * 2 and not any(k.problem for k in keyframes)
    assert sum(len(k.vehicle_corners) for k in keyframes) > 10
    assert sum(Size().keyframes[:700]) == 28_149 and sum(Size().keyframes) == 34_149
