"""Every network is pretrained, resumed, finetuned and evaluated with the same commands, as are reference checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.spec import CAMERAS
from occfeat_train.cli import main
from occfeat_train.config import LIFTINGS
from occfeat_train.simple_bev.import_reference import read_state_dict
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.saving import CheckpointError
from tests.conftest import random_arrays, small_identity, small_spec
from tests.train.reference_seeds import GOLDEN, seeded_state_dict

SMALL = ["--no-tensorboard", "--no-progress", "--backbone-weights", "none", "--batch", "2", "--epochs", "1"]
FIELDS = ["--set", "network.channels=8", "--set", "network.image_size=32x48"]


def write_cache(path: Path, **changes: Any) -> Path:
    """4 keyframes of random contents with six level cameras, 60 degrees apart and 1 m above the grid's origin."""
    cache = create_cache(
        path / "train.zarr", small_spec(image_size=(40, 60), **changes), small_identity(4), keyframes_per_shard=2, provenance={}
    )  # fmt: skip
    angles = np.arange(6) * np.pi / 6
    turns = [rigid((np.cos(a), 0, np.sin(a), 0), (0, 1, 0)) @ inverse_rigid(GRID_FROM_CAMERA_AXES) for a in angles]
    for shard in range(cache.num_shards):
        arrays = random_arrays(cache, shard)
        arrays["cam_from_ego"][:] = turns
        arrays["intrinsics"][:] = [[30, 0, 30], [0, 30, 20], [0, 0, 1]]
        arrays["grid_from_ego"][:] = np.eye(4)
        cache.write_shard(shard, arrays, {"skipped": {}, "cosine": None})
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("network", LIFTINGS)
def test_a_network_is_pretrained_resumed_finetuned_and_evaluated(cache, tmp_path, network):
    options = ["--cache", cache, "--network", network, *SMALL, *FIELDS, "--save-every", "1"]
    said = run("pretrain", *options, "--out", tmp_path / "run")
    assert f"occfeat: {network} efficientnet-b0" in said
    whole = find_checkpoint(tmp_path / "run")
    assert whole.step == 2
    assert whole.info.config.network.lifting == network

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    shutil.rmtree(stopped / "checkpoints" / whole.path.name)
    assert "continuing at step 1 of 2" in run("pretrain", *options, "--out", stopped)
    again = find_checkpoint(stopped).weights()
    assert all(torch.equal(value, again[name]) for name, value in whole.weights().items())

    said = run("finetune", "--cache", cache, "--from", tmp_path / "run", *SMALL, "--out", tmp_path / "vehicles")
    assert f"vehicles: {network} efficientnet-b0" in said
    run("evaluate", tmp_path / "vehicles", "--cache", cache, "--split", "train", "--no-progress")
    results = json.loads((tmp_path / "vehicles" / "evaluation" / "train.json").read_text())
    assert results["samples"] == 4
    assert np.isfinite(results["miou"] if "miou" in results else results["iou"])


def test_another_network_than_the_pretrained_is_refused(cache, tmp_path):
    run("pretrain", "--cache", cache, *SMALL, *FIELDS, "--out", tmp_path / "run")
    other = ["finetune", "--cache", cache, "--from", tmp_path / "run", *SMALL, "--out", tmp_path / "other"]
    message = run(*other, "--network", "lss", code=1)
    assert "network.lifting=lss: " in message and "holds a simplebev efficientnet-b0 with 8 channels" in message


def test_the_default_run_directory_contains_the_networks_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("pretrain", "--cache", cache, "--preset", "small/occfeat", "--network", "lss", *SMALL, *FIELDS)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small-occfeat-lss"]


# -- from the reference repository ------------------------------------------------------------------------------------


def reference_checkpoint(path: Path, name: str, **extra: Any) -> Path:
    """A checkpoint in the format of the reference's trainer."""
    weights = seeded_state_dict(GOLDEN / f"{name}_64x112_40x8x40.npz")
    state = {f"module.{key}": torch.from_numpy(np.asarray(value)) for key, value in weights.items()}
    torch.save({"optimizer_step": 25_000, "model_state_dict": state, **extra}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network", "backbone"),
    [
        ("segnet-effb0", "simplebev", "efficientnet-b0"),
        ("bevformernet-res50", "bevformer", "resnet-50"),
        ("liftnet2-res101", "lss", "resnet-101"),
    ],
)
def test_a_checkpoint_of_the_reference_is_evaluated_and_finetuned(tmp_path, name, network, backbone):
    grid = ["--grid", "8x40x40", "--set", "network.image_size=32x48"]
    file, out = reference_checkpoint(tmp_path / "model.pth", name), tmp_path / "imported"
    said = run("import-reference", file, "--network", network, "--backbone", backbone, "--out", out, *grid)
    assert str(out / "checkpoints" / "step-00000000") in said
    info = find_checkpoint(out).info
    assert (info.config.network.lifting, info.config.network.compat) == (network, "simple-bev")
    assert info.initial.startswith("imported from model.pth")

    assert info.config.frame == "cameras"  # the reference chooses one of them at random
    cache = write_cache(tmp_path / "cache", grid=info.grid, frames=CAMERAS)
    run("evaluate", out, "--cache", cache, "--split", "train", "--no-progress")
    assert (out / "evaluation" / "train.json").is_file()
    tuned = ["finetune", "--cache", cache, "--from", out, *SMALL, "--set", "optim.epochs=0.5"]
    assert f"network and head from {out}" in run(*tuned, "--out", tmp_path / "tuned")


def test_a_bare_state_dict_is_imported_and_that_of_another_network_refused(tmp_path):
    weights = seeded_state_dict(GOLDEN / "segnet-effb0_64x112_40x8x40.npz")
    file = tmp_path / "bare.pth"
    torch.save({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}, file)

    def imported(*arguments: str, code: int) -> str:
        return run("import-reference", file, "--out", tmp_path / "out", *arguments, code=code)

    said = imported("--network", "lss", "--backbone", "efficientnet-b0", code=1)
    assert f"{file} is of a simplebev, not of a lss: pass --network simplebev" in said
    said = imported("--network", "simplebev", "--backbone", "resnet-50", code=1)
    assert "does not fit this network" in said
    said = imported("--network", "simplebev", "--backbone", "efficientnet-b0", "--grid", "7x40x40", code=1)
    assert "no multiple of the grid's 7 levels" in said
    said = imported("--network", "simplebev", "--backbone", "efficientnet-b0", "--grid", "7x40", code=2)
    assert "--grid 7x40: ZxHxW expected" in said
    whole = torch.load(file)
    torch.save({**whole, "bev_compressor.0.weight": whole["bev_compressor.0.weight"] * float("nan")}, file)
    said = imported("--network", "simplebev", "--backbone", "efficientnet-b0", code=1)
    assert f"{file} can't be used: network.lifting.compressor.0.weight of " in said and "are not finite" in said
    torch.save(whole, file)
    assert not (tmp_path / "out").exists()
    imported("--network", "simplebev", "--backbone", "efficientnet-b0", code=0)
    assert "holds another run" in imported(
        "--network", "simplebev", "--backbone", "efficientnet-b0", "--set", "seed=1", code=1
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_and_the_state_of_a_schedule_do_not_matter(tmp_path, prefix):
    weights = {"decoder.weight": torch.tensor(2.0)}
    schedule = {"_last_lr": [np.float64(1e-4)], "last_epoch": np.int64(3), "rate": np.float32(1)}
    content = {f"{prefix}{name}": value for name, value in weights.items()}
    torch.save({"model_state_dict": content, "scheduler_state_dict": schedule}, tmp_path / "model.pth")
    assert read_state_dict(tmp_path / "model.pth") == weights


def test_the_method_that_an_older_torch_saved_in_its_schedule_is_named_with_the_remedy(tmp_path):
    schedule = {"anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos}
    torch.save({"model_state_dict": {}, "scheduler_state_dict": schedule}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"is refused, because it holds .*never run. .*\['model_state_dict'\]"):
        read_state_dict(tmp_path / "model.pth")


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("code was run",))


def test_other_files_are_refused_and_code_in_them_is_not_run(tmp_path, capsys):
    options = ["--network", "simplebev", "--backbone", "efficientnet-b0", "--out", tmp_path / "out"]
    file = tmp_path / "file.pth"
    torch.save({"model_state_dict": {}, "x": Harmful()}, file)
    assert "is refused" in run("import-reference", file, *options, code=1)
    assert "code was run" not in capsys.readouterr().out
    contents = {
        "nothing": {},
        "model_state_dict": {"model_state_dict": {"a": 1}},
        "list": [torch.zeros(1)],
        "model, epoch": {"model": {}, "epoch": 3},
    }
    for found, content in contents.items():
        torch.save(content, file)
        assert (
            f" holds no state_dict, alone or as one of 'state_dict', 'model_state_dict', 'model', 'teacher' (it has {found}): "
            in run("import-reference", file, *options, code=1)
        )
    torch.save({"weight": torch.zeros(1)}, file)
    assert "weight is no name of a Segnet, Bevformernet or Liftnet" in run(
        "import-reference", file, "--network", "lss", *options[2:], code=1
    )
    for text in (b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b'{"a": 1}', b"\x00" * 99):
        file.write_bytes(text)
        said = run("import-reference", file, *options, code=1)
        assert f"{file} can't be read, because it is no checkpoint of torch.save, or damaged: download it again" in said
    assert "is a directory" in run("import-reference", tmp_path, *options, code=1)
