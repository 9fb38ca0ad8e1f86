"""The build from end to end: every way to run it gives the same bytes, and each option changes what it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from distributed import Security

from occfeat_targets.build.cluster import read_scheduler_file
from occfeat_targets.build.run import Outcome
from occfeat_targets.build.shard import ShardReport
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources.nuscenes import read_split
from occfeat_targets.targets import teacher
from occfeat_targets.targets.teacher import teacher_spec
from tests.targets.command_line import assert_same_bytes, build_arguments, contents, run, run_in_subprocess, write_table


def test_a_build_prints_its_contents_size_estimated_time_and_rate(city, tiny_teacher, tmp_path):
    result = run(*build_arguments(city, tmp_path, tiny_teacher, "--workers", "0"))
    output = result.stdout
    assert re.search(r"10/10 \[.*(keyframe/s|s/keyframe)", result.stderr)
    assert "10 keyframes of 2 scenes" in output
    assert "6 of the split's 8 scenes are not in this data set" in output
    assert "per keyframe" in output
    assert re.search(r"free\); time: about .* in this process\n", output)
    assert "SIMULATED: the data set is a synthetic city\n" in output
    assert "is complete: 10 keyframes" in output
    assert "wait" in output


def test_a_finished_build_is_not_built_again(city, tiny_teacher, serial, expected):
    output = run(*build_arguments(city, serial, tiny_teacher, "--workers", "0", "--frames", "both")).stdout
    assert "to build here: 0 shards" in output
    assert_same_bytes(serial, expected)


def test_array_tasks_build_the_same_bytes_without_a_scheduler(city, tiny_teacher, tmp_path, expected):
    outputs = [
        run(*build_arguments(city, tmp_path, tiny_teacher, "--shard", f"{k}/3", "--frames", "both")).stdout
        for k in range(3)
    ]
    assert "shards are left to other tasks" in outputs[0]
    assert "is complete" in outputs[2]
    assert_same_bytes(tmp_path, expected)


@contextmanager
def dask_cluster(directory: Path, *options: str) -> Iterator[Path]:
    """The scheduler file of a scheduler and two workers of several threads, started separately with these options."""
    address_file = directory / "scheduler.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": directory}
    dask = [sys.executable, "-m", "distributed.cli"]
    processes = [
        subprocess.Popen(
            [*dask[:2], "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
             "--scheduler-file", str(address_file), *options], **quiet
        )
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not address_file.exists() or not address_file.read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        address = json.loads(address_file.read_text())["address"]
        for _ in range(2):
            worker = [*dask[:2], "distributed.cli.dask_worker", address, "--nthreads", "4", "--no-dashboard"]
            worker += options
            processes.append(subprocess.Popen(worker, **quiet))
        yield address_file
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def test_an_external_scheduler_with_tls_and_two_workers_of_several_threads_builds_the_same_bytes(
    city, tiny_teacher, tmp_path, expected, monkeypatch
):
    """Paths are relative, and the workers have another working directory than the command."""
    here = [Path(os.path.relpath(path)) for path in (city, tmp_path)]
    teacher = os.path.relpath(tiny_teacher)
    credentials = Security.temporary()
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    for file, text in zip(
        files.values(),
        (credentials.tls_ca_file, credentials.tls_client_cert, credentials.tls_client_key),
        strict=True,
    ):
        file.write_text(text)
    # As in the README.
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CA_FILE", str(files["ca"]))
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT", str(files["cert"]))
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY", str(files["key"]))
    options = ["--tls-ca-file", files["ca"], "--tls-cert", files["cert"], "--tls-key", files["key"]]
    with dask_cluster(tmp_path, "--protocol", "tls", *map(str, options)) as file:
        assert read_scheduler_file(file).startswith("tls://")
        run_in_subprocess(*build_arguments(*here, teacher, "--scheduler-file", str(file), "--frames", "both"))
    assert_same_bytes(tmp_path, expected)


def test_an_unreachable_scheduler_is_named(city, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("occfeat_targets.build.cluster._CONNECT_TIMEOUT", "1s")
    result = run(*build_arguments(city, tmp_path, tiny_teacher, "--scheduler", "tcp://127.0.0.1:9"), check=False)
    assert result.returncode == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in result.stderr


def test_local_workers_that_do_not_start_are_explained(city, tiny_teacher, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("distributed.LocalCluster", refuse)
    result = run(*build_arguments(city, tmp_path, tiny_teacher, "--workers", "2"), check=False)
    assert result.returncode == 1
    assert "2 local workers did not start (Nanny failed to start.): run the same command again" in result.stderr


def test_labels_can_be_left_out_and_chosen(city, tiny_teacher, tmp_path):
    for labels, names in [(["--no-labels"], set()), (["--label-kinds", "map"], {"labels/map"})]:
        cache = tmp_path / labels[0]
        run(*build_arguments(city, cache, "none", "--workers", "0", *labels))
        assert {name for name in contents(cache) if name.startswith("labels/")} == names
        assert "features" not in contents(cache)


def test_without_annotations_only_map_labels_are_built(broken_city, tmp_path):
    """The test split has no boxes but has maps."""
    write_table(broken_city, "sample_annotation", [])
    write_table(broken_city, "instance", [])
    output = run(*build_arguments(broken_city, tmp_path / "cache", "none", "--workers", "0")).stdout
    assert "no vehicles labels: v1.0-mini has no annotations" in output
    assert {n for n in contents(tmp_path / "cache") if n.startswith("labels/")} == {"labels/map"}
    asked = run(*build_arguments(broken_city, tmp_path / "c2", "none", "--label-kinds", "vehicles"), check=False)
    assert asked.returncode == 1
    assert "no annotations" in asked.stderr


def test_a_map_that_does_not_cover_the_ego_is_a_warning_with_scenes_and_location(broken_city, tmp_path, city):
    arguments = ["--label-kinds", "map", "--workers", "0"]
    assert "warning" not in run(*build_arguments(city, tmp_path / "right", "none", *arguments)).stdout
    (file,) = (p for p in (broken_city / "maps" / "expansion").glob("*.json") if p.stem in located(city, "mini_train"))
    tables = json.loads(file.read_text())
    for node in tables["node"]:
        node["x"] += 10_000
    file.write_text(json.dumps(tables))
    output = run(*build_arguments(broken_city, tmp_path / "moved", "none", *arguments)).stdout
    scenes = list(dict.fromkeys(open_cache(tmp_path / "moved" / "mini_train.zarr").identity.scenes))
    expected = ", ".join(f"{scene} at {file.stem}" for scene in scenes)
    assert f"warning: no road in the map labels of 2 scenes ({expected}): check that the maps" in output
    assert not contents(tmp_path / "moved")["labels/map"].any()


def located(city: Path, split: str) -> set[str]:
    """The locations of a split."""
    return set(read_split(city, split, version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False).locations)


def test_a_scene_is_only_reported_without_road_if_no_shard_has_any():
    reports = [
        ShardReport(0, 2, has_expected={("map", "scene-1"): False}),
        ShardReport(1, 2, has_expected={("map", "scene-1"): True, ("map", "scene-2"): False}),
        ShardReport(2, 2, has_expected={("map", "scene-2"): False}),
    ]
    assert Outcome(reports).lacks_expected == [("map", "scene-2")]


def test_a_missing_map_expansion_is_printed_or_refused(broken_city, tmp_path):
    shutil.rmtree(broken_city / "maps" / "expansion")
    output = run(*build_arguments(broken_city, tmp_path / "cache", "none", "--workers", "0")).stdout
    assert "no map labels: no map expansion" in output
    asked = run(*build_arguments(broken_city, tmp_path / "c2", "none", "--label-kinds", "map"), check=False)
    assert asked.returncode == 1
    assert "nuScenes-map-expansion-v1.3.zip" in asked.stderr


def test_the_lss_directory_layout_gives_the_same_cache(city, tiny_teacher, tmp_path, expected):
    root = tmp_path / "root"
    root.mkdir()
    (root / "mini").symlink_to(city)
    run(*build_arguments(root, tmp_path / "cache", tiny_teacher, "--workers", "0", "--frames", "both"))
    assert_same_bytes(tmp_path / "cache", expected)


def test_sweeps_add_voxels_and_lose_none(city, tmp_path, expected):
    run(
        *build_arguments(
            city, tmp_path, "none", "--workers", "0", "--frames", "both", "--sweeps", "3", "--dynamic", "smear"
        )
    )
    more = contents(tmp_path)["occupancy"]
    assert not (expected["occupancy"] & ~more).any()
    assert np.unpackbits(more).sum() > 1.2 * np.unpackbits(expected["occupancy"]).sum()


def test_int8_features_are_close_to_float16_and_the_cosine_is_printed_and_stored(
    city, tiny_teacher, tmp_path, expected
):
    output = run(*build_arguments(city, tmp_path, tiny_teacher, "--workers", "0", "--feature-dtype", "int8")).stdout
    assert "int8 features: cosine to float16 0.99" in output
    found = contents(tmp_path)
    features = found["features"].astype(np.float32) * found["feature_scale"][..., None].astype(np.float32)
    truth = expected["features"].astype(np.float32)
    cosine = (features * truth).sum(-1) / np.linalg.norm(features, axis=-1) / np.linalg.norm(truth, axis=-1)
    assert cosine.min() > 0.999
    assert np.abs(features - truth).max() < 0.02 * np.abs(truth).max()
    record = open_cache(tmp_path / "mini_train.zarr").finished_shards()[0]
    assert record["cosine"][1] == pytest.approx(cosine[:2].min(), abs=1e-4)
    assert "cosine to float16" in run("info", "--cache", tmp_path, "--split", "mini_train").stdout


def test_teacher_batches_change_no_more_than_rounding(city, tiny_teacher, tmp_path, expected):
    run(*build_arguments(city, tmp_path, tiny_teacher, "--workers", "0", "--frames", "both", "--teacher-batch", "2"))
    found = contents(tmp_path)
    np.testing.assert_allclose(
        found["features"].astype(np.float32), expected["features"].astype(np.float32), rtol=1e-2, atol=1e-2
    )
    np.testing.assert_array_equal(found["occupancy"], expected["occupancy"])


def test_a_build_continues_with_a_moved_teacher_and_refuses_another(city, tiny_teacher, tmp_path, expected):
    first, moved, cache = tmp_path / "tiny", tmp_path / "elsewhere", tmp_path / "cache"
    shutil.copytree(tiny_teacher, first)
    run(*build_arguments(city, cache, str(first), "--shard", "0/2", "--frames", "both"))
    first.rename(moved)
    run(*build_arguments(city, cache, str(moved), "--shard", "1/2", "--frames", "both"))
    assert_same_bytes(cache, expected)
    begun_with = open_cache(cache / "mini_train.zarr").spec.teacher.digest
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    other = teacher_spec(str(moved)).digest
    refused = run(*build_arguments(city, cache, str(moved), "--frames", "both"), check=False)
    assert refused.returncode == 1
    assert f"'digest': '{begun_with}'" in refused.stderr
    assert f"'digest': '{other}'" in refused.stderr
    moved.rename(first)
    teacher._load_once.cache_clear()  # this process still holds the weights that the cache was started with
    verified = run("verify", "--cache", cache, "--split", "mini_train", "--samples", "1", check=False)
    assert verified.returncode == 1
    assert f"have digest {other}, the cache was started with {begun_with}" in verified.stderr


def test_contradictory_ways_to_run_are_refused(city, tmp_path):
    result = run(*build_arguments(city, tmp_path, "none", "--workers", "2", "--shard", "0/2"), check=False)
    assert result.returncode == 2
    assert "choose one" in result.stderr
    result = run(*build_arguments(city, tmp_path, "none", "--shard", "2/2"), check=False)
    assert result.returncode == 2
    assert "0 <= K < N" in result.stderr
