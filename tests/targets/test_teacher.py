import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.targets.quantize import quantization_cosine, quantize
from occfeat_targets.targets.teacher import (
    LoadedTeacher,
    flops_per_image,
    load_teacher,
    teacher_spec,
)
from occfeat_targets.targets.teacher_devices import matmul_flops

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
