import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.targets import teacher as teacher_module
from occfeat_targets.targets.quantize import quantization_cosine, quantize
from occfeat_targets.targets.teacher import (
    LoadedTeacher,
    TeacherError,
    flops_per_image,
    load_teacher,
    matmul_flops,
    teacher_spec,
)
from tests.train.test_encoder_weights import Marker

SMALL = "random:facebook/dinov2-small"


def images(spec: TeacherSpec, n: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *spec.input_size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def small() -> LoadedTeacher:
    return LoadedTeacher(teacher_spec(SMALL, dtype="float32", input_size=(56, 98)))


def test_default_input_is_the_largest_patch_multiple_within_224x400():
    assert teacher_spec(SMALL).input_size == (224, 392)
    assert teacher_spec("random:facebook/dinov3-vits16-pretrain-lvd1689m").input_size == (224, 400)


def test_dinov2_small_is_vit_s_14():
    spec = teacher_spec(SMALL)
    assert (spec.dim, spec.patch_size, spec.map_size) == (384, 14, (16, 28))
    model = LoadedTeacher(dataclasses.replace(spec, dtype="float32")).teacher.model
    assert sum(p.numel() for p in model.parameters()) == 22_056_576  # of facebook/dinov2-small
    assert flops_per_image(spec) == pytest.approx(23.0e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("random:facebook/dinov2-base", 768),
        ("random:facebook/dinov2-large", 1024),
        ("random:facebook/dinov2-giant", 1536),
        ("random:facebook/dinov2-with-registers-large", 1024),
        ("random:facebook/dinov3-vitb16-pretrain-lvd1689m", 768),
    ],
)
def test_larger_teachers_are_known(name, dim):
    assert teacher_spec(name).dim == dim


def test_the_final_layernorm_of_pre_norm_tokens_gives_the_post_norm_tokens(small):
    pre = LoadedTeacher(dataclasses.replace(small.spec, layer="pre-norm"))
    pixels = images(small.spec)
    with torch.inference_mode():
        normed = small.teacher.model.layernorm(torch.from_numpy(pre(pixels)))
    np.testing.assert_allclose(normed.numpy(), small(pixels), atol=1e-4)
    assert pre(pixels).std() != pytest.approx(small(pixels).std(), abs=0.01)


def test_bfloat16_stays_close_to_float32(small):
    fast = LoadedTeacher(dataclasses.replace(small.spec, dtype="bfloat16"))
    a, b = small(images(small.spec)), fast(images(small.spec))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.999


def test_random_weights_are_reproducible_and_do_not_change_the_global_generator(small):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = LoadedTeacher(small.spec)
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(again(images(small.spec)), small(images(small.spec)))


def test_a_teacher_is_frozen_and_in_evaluation_mode(small):
    assert not small.teacher.model.training
    assert not any(p.requires_grad for p in small.teacher.model.parameters())


def test_a_process_loads_its_teacher_once(tiny_teacher):
    spec = teacher_spec(tiny_teacher, input_size=(28, 28))
    before = torch.get_num_threads()
    assert load_teacher(spec, num_threads=1) is load_teacher(spec)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_threads_of_a_new_process_load_one_teacher(tiny_teacher, tmp_path):
    """Nothing of transformers is imported before, as in a worker of Dask, and random weights need the process's generator."""
    names = [tiny_teacher, SMALL]
    specs = [teacher_spec(name, input_size=(28, 28)) for name in names]
    (tmp_path / "specs").write_bytes(pickle.dumps(specs))
    code = (
        "import pickle, sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from occfeat_targets.targets.teacher import load_teacher\n"
        "start = threading.Barrier(8)\n"
        "def load(spec):\n"
        "    start.wait()\n"
        "    return load_teacher(spec, 'cpu')\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    for spec in pickle.load(open(sys.argv[1], 'rb')):\n"
        "        print(len(set(pool.map(load, [spec] * 8))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "specs")]
    assert subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).split() == ["1", "1"]


def digest_of(folder) -> str:
    return teacher_spec(str(folder), input_size=(28, 42), dtype="float32").digest


def copy_of(teacher: str, to: Path, **config: object) -> Path:
    """A copy of a teacher's folder with changed settings in its config.json."""
    teacher_module._config.cache_clear()
    folder = Path(shutil.copytree(teacher, to))
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_teacher_is_identified_by_its_weights_and_not_by_their_location(tiny_teacher, tmp_path, monkeypatch):
    spec = teacher_spec(tiny_teacher, input_size=(28, 42), dtype="float32")
    monkeypatch.chdir(Path(tiny_teacher).parent)
    for name in (Path(tiny_teacher).name, f"{Path(tiny_teacher).name}/", f"{tiny_teacher}/"):
        again = teacher_spec(name, input_size=(28, 42), dtype="float32")
        assert (again.name, again.digest) == (tiny_teacher, spec.digest)
        assert TargetSpec(teacher=again).fingerprint == TargetSpec(teacher=spec).fingerprint
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    assert digest_of(copy) == spec.digest
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    assert digest_of(copy / "pytorch_model.bin") == spec.digest


def test_pickled_weights_are_read_only_if_their_file_is_named(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    torch.save({"weight": Marker(tmp_path / "ran")}, copy / "pytorch_model.bin")
    assert digest_of(copy) == digest_of(Path(tiny_teacher))
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"^the model in .* has only pickled weights, .*or pass .*/copy/pytorch_model.bin itself"
    ):
        digest_of(copy)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        digest_of(copy / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    torch.save(state, copy / "pytorch_model.bin")
    assert digest_of(copy / "pytorch_model.bin") == digest_of(Path(tiny_teacher))


def test_one_flipped_bit_or_another_architecture_is_another_teacher(tiny_teacher, tmp_path):
    spec = teacher_spec(tiny_teacher, input_size=(28, 42), dtype="float32")
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest_of(copy) != spec.digest
    assert digest_of(copy_of(tiny_teacher, tmp_path / "heads", num_attention_heads=4)) != spec.digest
    with pytest.raises(TeacherError, match=f"have digest {digest_of(copy)}, the cache was started with {spec.digest}"):
        LoadedTeacher(dataclasses.replace(spec, name=str(copy)))


def test_random_teachers_of_different_architectures_have_different_digests():
    digests = {teacher_spec(f"random:facebook/{n}").digest for n in ("dinov2-small", "dinov2-with-registers-small")}
    assert len(digests) == 2


def hub_names(name: str) -> str:
    """A tensor's name in the checkpoints of facebookresearch/dinov2; only prefixes are converted."""
    return name.replace("encoder.layer.", "blocks.").replace("embeddings.", "").replace("layernorm.", "norm.")


UNFIT = {
    "torch hub's names": (
        lambda state: {hub_names(n): v for n, v in state.items()},
        "missing: .*unexpected: .*blocks.0",
    ),
    "a prefix": (lambda state: {f"module.{n}": v for n, v in state.items()}, "missing: .*unexpected: .*module."),
    "a layer less": (
        lambda state: {n: v for n, v in state.items() if "layer.1." not in n},
        r"\d+ missing: encoder.layer.1.attention.*: pass a folder",
    ),
    "a layer more": (
        lambda state: (
            state | {n.replace("layer.1.", "layer.2."): v.clone() for n, v in state.items() if "layer.1." in n}
        ),
        r"\d+ unexpected: encoder.layer.2.attention",
    ),
    "another shape": (
        lambda state: state | {"layernorm.bias": torch.zeros(48)},
        r"1 of another shape: layernorm.bias \(48,\) instead of \(32,\)",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_match_the_model_are_refused_by_name(tiny_teacher, tmp_path, name):
    change, reason = UNFIT[name]
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=reason):
        teacher_spec(str(copy))
    spec = teacher_spec(tiny_teacher, input_size=(28, 42))
    with pytest.raises(TeacherError, match=reason):  # in a worker, if the file changed after planning
        LoadedTeacher(dataclasses.replace(spec, name=str(copy)))


def test_an_additional_head_and_a_missing_mask_token_are_accepted(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    del state["embeddings.mask_token"]
    state |= {"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert digest_of(copy) == digest_of(tiny_teacher)


def test_half_precision_weights_are_used_in_float32(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy", dtype="float16")
    state = {name: value.half() for name, value in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    spec = teacher_spec(str(copy), input_size=(28, 42), dtype="float32")
    assert np.isfinite(LoadedTeacher(spec)(images(spec))).all()


@pytest.mark.parametrize("damage", ["git-lfs pointer", "cut", "empty", "a file instead of a folder"])
def test_an_invalid_weight_file_is_refused_with_the_remedy(tiny_teacher, tmp_path, damage):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    contents = {"git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n", "cut": data[: len(data) // 2]}
    weights.write_bytes(contents.get(damage, b""))
    with pytest.raises(TeacherError, match=r"cannot be loaded .*a folder in transformers' layout"):
        teacher_spec(str(weights if damage.startswith("a file") else copy))


def test_a_folders_processor_determines_the_normalisation(tiny_teacher, tmp_path):
    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert teacher_spec(str(copy)).mean == (0.1, 0.2, 0.3)
    assert teacher_spec(tiny_teacher).mean == (0.485, 0.456, 0.406)


def test_an_unreachable_hub_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=r"hf download facebook/dinov2-base.*--teacher random:facebook/dinov2-small"):
        teacher_spec("facebook/dinov2-base")


def test_a_folder_without_weights_and_an_unknown_architecture_are_refused(tiny_teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(f"{tiny_teacher}/config.json", tmp_path / "empty")
    with pytest.raises(TeacherError, match="expected a folder in transformers' layout"):
        teacher_spec(str(tmp_path / "empty"))
    with pytest.raises(TeacherError, match="unknown architecture"):
        teacher_spec("random:facebook/dinov2-huge")
    with pytest.raises(TeacherError, match="float32, bfloat16 or auto"):
        teacher_spec(SMALL, dtype="float16")


def test_images_of_another_size_are_refused(small):
    with pytest.raises(ValueError, match="teacher input"):
        small(np.zeros((1, 56, 56, 3), np.uint8))


def test_a_nan_from_the_model_is_an_error(small):
    broken = LoadedTeacher(small.spec)
    broken.teacher.model.layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        broken(images(small.spec, 1))


def test_int8_with_a_scale_per_token_is_accurate_to_half_a_step():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 384)).astype(np.float32) * np.exp(rng.normal(size=(50, 1)) * 3).astype(np.float32)
    features[7] = 0
    quantized, scale = quantize(features)
    assert quantized.dtype == np.int8
    assert np.abs(quantized).max() <= 127
    wide = scale.astype(np.float32)[:, None]
    assert (np.abs(quantized * wide - features) <= wide * 0.51).all()
    assert not quantized[7].any()
    keep = np.arange(50) != 7
    mean, low = quantization_cosine(features[keep], quantized[keep])
    assert 0.9999 < low <= mean <= 1


def test_matmul_flops_are_plausible():
    assert 1e8 < matmul_flops("float32", size=256, rounds=2) < 1e14
