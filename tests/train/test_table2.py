"""Table 2 in miniature: pretraining and finetuning with two image sizes, from one cache or from two that belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from occfeat_train.presets import preset
from tests.train.runs import QUIET, config_of, evaluate, finetune, pretrain, refuse, steps, succeed, write_caches

# Image sizes of the rows -> their miniatures. A network of 64x96 reads up to 76x115 pixels.
SIZES = {"224x400": "32x48", "448x800": "64x96"}
TINY = ["--backbone-weights", "none", "--set", "network.channels=8", "--set", "optim.accumulation=1", "--batch", "2"]
# (preset of the pretraining or None, preset of the finetuning without its share of labels); the last row is the other way round.
ROWS = [
    (None, "224x400"),
    ("224x400/occfeat", "224x400"),
    ("224x400/occfeat-100ep", "224x400"),
    (None, "448x800"),
    ("448x800/occfeat", "448x800"),
    ("224x400/occfeat-100ep", "448x800"),
    ("448x800/occfeat", "224x400"),
]


def small(name: str, cache: Path, out: Path, *more: object) -> list[str]:
    """Options of a preset of Table 2, with the miniature of its image size."""
    size = ["--set", f"network.image_size={SIZES[name.split('/')[0]]}"]
    named = ["--preset", f"table2/simplebev-enb0-{name}", "--cache", cache, "--out", out]
    return [str(a) for a in (*named, *TINY, *size, *steps(1), "--no-tensorboard", *QUIET, *more)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is large enough for all rows."""
    return write_caches(tmp_path_factory.mktemp("large"), image_size=(80, 120))


def test_every_row_has_its_presets():
    for start, size in ROWS:
        network = preset(f"table2/simplebev-enb0-{size}/vehicles-1").network
        assert network.image_size == tuple(map(int, size.split("x")))
        if start is not None:
            config = preset(f"table2/simplebev-enb0-{start}")
            assert config.optim.epochs == (100 if start.endswith("100ep") else 50)
            assert config.network.image_size == tuple(map(int, start.split("/")[0].split("x")))
            needed = "--image-size 540x960" if start.startswith("448") else None
            assert config.build_options == ([needed] if needed else [])


@pytest.mark.slow
def test_all_rows_are_trained_and_evaluated_from_one_cache(large, tmp_path):
    for start in dict.fromkeys(start for start, _ in ROWS if start is not None):
        succeed("pretrain", *small(start, large, tmp_path / start))
    for start, size in ROWS:
        out = tmp_path / f"{start or 'none'}-{size}".replace("/", "-")
        given = [] if start is None else ["--from", tmp_path / start]
        output = succeed("finetune", *small(f"{size}/vehicles-1", large, out, *given))
        is_other_size = start is not None and not start.startswith(size)
        assert ("network.image_size=" in output and "overrides" in output) == is_other_size
        assert ("network from" in output) == (start is not None)
        assert "enlarged" not in output and "differs from the cache" not in output
        assert "x".join(map(str, config_of(out)["network"]["image_size"])) == SIZES[size]
        assert "enlarged" not in succeed(*evaluate(out, large))
        results = json.loads((out / "evaluation" / "val.json").read_text())
        assert results["samples"] == 5 and not results["enlarged"]


def test_a_finetuning_on_another_cache_names_what_its_arrays_hold_differently(cache, pretrained, large, tmp_path):
    """The pretraining's cache has images of 40x60 and features, the finetuning's larger images and other labels."""
    write_caches(tmp_path / "labels", image_size=(80, 120), dim=0, labels=("vehicles",))
    run, size = tmp_path / "run", ["--set", "network.image_size=64x96"]
    output = succeed(*finetune(tmp_path / "labels", run, "--from", pretrained, *steps(1), *size))
    there = pretrained / "checkpoints" / "step-00000002"
    assert f"differs from the cache that {there} was trained on: image_size=[80, 120] here, [40, 60] there\n" in output
    assert "differs from the cache" not in succeed(*finetune(cache, tmp_path / "same", "--from", pretrained, *steps(1)))


def test_a_run_is_evaluated_on_smaller_images_only_if_that_is_allowed(cache, large, tmp_path):
    """Also a run that was not trained on enlarged images."""
    run = tmp_path / "run"
    succeed(*pretrain(large, run, "--set", "network.image_size=64x96", *steps(1)))
    message = refuse(*evaluate(run, cache, "--out", tmp_path))
    assert "has images of 40x60, network.image_size=64x96 needs up to 64x96" in message
    assert "build it with --image-size 64x96, or evaluate with --allow-upsampling" in message
    assert not (tmp_path / "val.json").exists()
    output = succeed(*evaluate(run, cache, "--out", tmp_path, "--allow-upsampling"))
    assert "the cache's images of 40x60 are enlarged to up to 64x96 (--allow-upsampling)" in output
    assert json.loads((tmp_path / "val.json").read_text())["enlarged"]
    output = succeed(*evaluate(run, large, "--out", tmp_path, "--allow-upsampling"))
    assert "enlarged" not in output and not json.loads((tmp_path / "val.json").read_text())["enlarged"]
