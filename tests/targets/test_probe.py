"""occfeat-targets probe: closed forms, from a cache to the result and through the command line."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from occfeat_targets.cache.spec import EGO_FRAME
from occfeat_targets.probe import probe as probe_module
from occfeat_targets.probe.inputs import BASELINES, INPUTS, TEACHER
from occfeat_targets.probe.probe import probe_cache
from occfeat_targets.probe.table import conclusion, describe_result
from tests.conftest import small_spec
from tests.targets.command_line import run
from tests.targets.probe_caches import CENTERS, IS_RIGHT, columns, scenes, vehicles, write_cache

VEHICLES = {"labels": ("vehicles",)}
BY_COLUMN = {"features": columns((6, 2, 3, 8)), "images": 77}
DISTANCE = np.hypot(CENTERS[..., 0], CENTERS[..., 1])


def cache_of(folder, n=10, split="train", **contents):
    spec = contents.pop("spec", small_spec(**VEHICLES))
    return write_cache(
        folder / f"{split}.zarr", scenes(n), spec=spec, **{**BY_COLUMN, **vehicles(IS_RIGHT), **contents}
    )


def probe(reader, test=None, **options):
    return probe_cache(reader, test, progress=False, **options)


def areas(result, name="vehicles"):
    (found,) = (found for found in result.classes if found.name == name)
    return found.auc


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_features_that_tell_the_class_give_1_and_a_constant_colour_gives_one_half(tmp_path):
    """The only camera looks forward, and vehicles are on the right, as are the higher columns of its tokens."""
    found = areas(probe(cache_of(tmp_path)))
    assert found[TEACHER] == 1
    assert found["colour"] == 0.5
    assert found["height and distance"] < 0.6


def test_colours_that_tell_the_class_give_1_and_constant_features_give_one_half(tmp_path):
    result = probe(cache_of(tmp_path, features=3, images=columns((6, 16, 24, 3))))
    assert areas(result)[TEACHER] == 0.5
    assert areas(result)["colour"] == areas(result)["colour, height and distance"] == 1
    assert result.baseline in BASELINES and result.difference == pytest.approx(-0.5)
    assert "separate these classes no better than colour" in conclusion(result)


def test_height_and_distance_tell_a_class_that_depends_on_them(tmp_path):
    found = areas(probe(cache_of(tmp_path, **vehicles(DISTANCE > 6))))
    assert found["height and distance"] == 1


def test_random_features_tell_nothing(tmp_path):
    rng = np.random.default_rng(0)
    contents = {"features": rng.normal(size=(40, 6, 2, 3, 8)), **vehicles(rng.random((40, 1, 20, 12)) < 0.3)}
    result = probe(cache_of(tmp_path, 40, **contents))
    for name in INPUTS:
        assert areas(result)[name] == pytest.approx(0.5, abs=0.06)
    assert result.difference_interval[0] < 0 < result.difference_interval[1]
    assert "The interval contains 0" in conclusion(result)


def test_cells_that_are_not_valid_are_left_out(tmp_path):
    """Vehicles are wrong in the right half's far cells, which are not valid."""
    is_far = DISTANCE > 5
    spec = small_spec(**VEHICLES)
    valid = spec.grid.pack_map(~is_far)
    reader = cache_of(tmp_path, **vehicles(IS_RIGHT ^ is_far), **{"labels/vehicles_valid": valid})
    result = probe(reader)
    assert areas(result)[TEACHER] == 1
    (found,) = result.classes
    assert found.test[1] < result.test.voxels


def test_the_interval_is_that_of_a_bootstrap_over_scenes(tmp_path):
    rng = np.random.default_rng(0)
    noisy = IS_RIGHT ^ (rng.random((12, 1, 20, 12)) < 0.2)
    result = probe(cache_of(tmp_path, 12, **vehicles(noisy)))
    (found,) = result.classes
    low, high = found.interval[TEACHER]
    assert low < found.auc[TEACHER] < high < 1
    assert result.difference_interval[0] > 0
    assert conclusion(result).startswith("The teacher's features separate these classes better than")
    few = probe(
        write_cache(tmp_path / "few.zarr", scenes(8), spec=small_spec(**VEHICLES), **BY_COLUMN, **vehicles(noisy[:8]))
    )
    assert few.test.scenes == 4 and few.classes[0].interval == {} and few.difference_interval is None
    assert "It has no interval, which takes voxels of a class in 5 test scenes" in conclusion(few)


def test_a_class_that_cannot_be_probed_is_a_dash_with_the_reason(tmp_path):
    spec = small_spec()
    maps = np.zeros((5, *spec.grid.map_shape), np.bool_)
    maps[0], maps[1] = True, IS_RIGHT
    reader = cache_of(tmp_path, spec=spec, **{"labels/map": spec.grid.pack_map(maps)})
    result = probe(reader)
    reasons = {found.name: found.reason for found in result.classes}
    assert reasons["road"] == "only voxels of this class in the training half"
    assert reasons["crosswalk"] == "no voxels of this class in the training half"
    assert reasons["sidewalk"] is reasons["vehicles"] is None
    assert result.mean[TEACHER] == 1
    text = "\n".join(describe_result(result))
    assert "crosswalk: no voxels of this class in the training half" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| crosswalk"))
    assert row.count(" - ") == len(INPUTS)


def test_a_class_may_be_missing_in_the_test_half_and_all_cells_may_be_invalid(tmp_path):
    train = cache_of(tmp_path)
    test = write_cache(
        tmp_path / "val.zarr",
        ["other"],
        spec=small_spec(**VEHICLES),
        **BY_COLUMN,
        **vehicles(np.zeros((20, 12), np.bool_)),
    )
    result = probe(train, test)
    assert result.classes[0].reason == "no voxels of this class in the test half"
    assert result.mean == {} and result.baseline is result.difference is None
    assert conclusion(result).startswith("No class can be probed")
    invalid = write_cache(
        tmp_path / "invalid.zarr", ["other"], spec=small_spec(**VEHICLES), **BY_COLUMN, **{"labels/vehicles_valid": 0}
    )
    assert probe(train, invalid).classes[0].reason == "no valid voxels in the test half"


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_the_same_result_as_json(tmp_path):
    train = cache_of(tmp_path, simulated=["the city is synthetic"])
    file = tmp_path / "probe.json"
    out = run("probe", "--cache", tmp_path, "--split", "train", "--json", file).stdout
    assert out.startswith("fits probes to 5 keyframes of 5 scenes of ")
    assert "SIMULATED: the city is synthetic" in out and f"written to {file}" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| vehicles"))
    assert "| 1.00 (1.00 to 1.00)" in row and "| 0.50 (0.50 to 0.50)" in row
    assert json.loads(file.read_text()) == json.loads(json.dumps(probe(train).to_dict()))


def test_the_same_seed_gives_the_same_result_and_another_seed_another(tmp_path):
    rng = np.random.default_rng(0)
    cache_of(tmp_path, **vehicles(IS_RIGHT ^ (rng.random((10, 1, 20, 12)) < 0.3)))
    outs = [run("probe", "--cache", tmp_path, "--split", "train", "--seed", seed).stdout for seed in ("0", "0", "1")]
    assert outs[0] == outs[1] != outs[2]


def test_samples_limits_the_keyframes_of_each_half(tmp_path):
    cache_of(tmp_path)
    out = run("probe", "--cache", tmp_path, "--split", "train", "--samples", "2").stdout
    assert "fits probes to 2 keyframes of 2 scenes" in out and "tests them on 2 keyframes of 2 scenes" in out


def test_the_test_split_is_tested(tmp_path):
    cache_of(tmp_path)
    write_cache(tmp_path / "val.zarr", ["x"], spec=small_spec(**VEHICLES), **BY_COLUMN, **vehicles(IS_RIGHT))
    out = run("probe", "--cache", tmp_path, "--split", "train", "--test-split", "val").stdout
    assert "10 keyframes of 10 scenes" in out and "tests them on 1 keyframe of 1 scene of" in out


def test_the_frame_is_that_of_the_grid_and_the_labels(tmp_path):
    """Only the labels in the frame of CAM_FRONT are on the right."""
    spec = small_spec(frames=(EGO_FRAME, "CAM_FRONT"), **VEHICLES)
    is_front = CENTERS[..., 1] > 5
    cache_of(tmp_path, spec=spec, **vehicles(np.stack([is_front, IS_RIGHT])))
    results = {}
    for frame in ("CAM_FRONT", None):
        file = tmp_path / "probe.json"
        run("probe", "--cache", tmp_path, "--split", "train", "--json", file, *(["--frame", frame] if frame else []))
        results[frame] = json.loads(file.read_text())
    assert [results[frame]["frame"] for frame in results] == ["CAM_FRONT", "ego"]
    assert [results[frame]["mean"][TEACHER] == 1 for frame in results] == [True, False]
    failed = run("probe", "--cache", tmp_path, "--split", "train", "--frame", "CAM_BACK", check=False)
    assert failed.returncode == 1 and "no grid in frame 'CAM_BACK'" in failed.stderr


def test_an_unfinished_cache_is_probed_as_far_as_it_is_built(tmp_path):
    cache_of(tmp_path, 12, is_cut=True)
    out = run("probe", "--cache", tmp_path, "--split", "train").stdout
    assert "fits probes to 3 keyframes of 3 scenes" in out and "tests them on 3 keyframes of 3 scenes" in out


def test_the_table_is_printed_even_if_the_json_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache_of(tmp_path)
    monkeypatch.setattr("occfeat_targets.cache.records.write_file", fail)
    failed = run("probe", "--cache", tmp_path, "--split", "train", "--json", tmp_path / "x.json", check=False)
    assert failed.returncode == 1 and "| vehicles" in failed.stdout
    assert "could not write" in failed.stderr and "x.json" in failed.stderr


def test_a_half_holds_a_limited_number_of_voxels(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "MAX_VOXELS", 50)
    result = probe(cache_of(tmp_path))
    assert result.train.voxels == result.test.voxels == 50


@pytest.mark.parametrize(
    ("names", "folds"),
    [
        (["a", "b"], "scenes"),
        (["a", "a"], "keyframes of one scene"),
        (["a"], "quadrants of one keyframe"),
    ],
)
def test_the_strength_is_cross_validated_over_scenes_if_there_are_some(tmp_path, names, folds):
    spec = small_spec(**VEHICLES)
    train = write_cache(tmp_path / "train.zarr", names, spec=spec, **BY_COLUMN, **vehicles(IS_RIGHT))
    test = write_cache(tmp_path / "val.zarr", ["x"], spec=spec, **BY_COLUMN, **vehicles(IS_RIGHT))
    result = probe(train, test)
    assert result.folds == folds and areas(result)[TEACHER] == 1
