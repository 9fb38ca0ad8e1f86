"""All families of teachers: tokens have their patch's position and equal those of transformers. A toy family is one class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from occfeat_targets.targets.teacher import TEACHERS, LoadedTeacher, TeacherError, _config, teacher_spec
from tests.targets.command_line import build_arguments, contents, run

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = TINY | {"intermediate_size": 48}
TEXT = {"text_config": MLP | {"vocab_size": 20}}
PATCH = 14

# {family: function that creates a tiny model with random weights}
MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY, image_size=56, patch_size=PATCH)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**TINY, image_size=56, patch_size=PATCH, num_register_tokens=3)
    ),
    "dinov3_vit": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**MLP, patch_size=PATCH, num_register_tokens=3)
    ),
    "radio": lambda: transformers.RadioModel(transformers.RadioConfig(**TINY, patch_size=PATCH, max_img_size=56)),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(**TEXT, vision_config=MLP | {"image_size": 56, "patch_size": PATCH})
    ),
    "siglip_vision_model": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**MLP, image_size=56, patch_size=PATCH)
    ),
    "siglip2": lambda: transformers.Siglip2Model(
        transformers.Siglip2Config(**TEXT, vision_config=MLP | {"num_patches": 16, "patch_size": PATCH})
    ),
    "siglip2_vision_model": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**MLP, num_patches=16, patch_size=PATCH)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: local folder}. All tensors are random; some would be zero by default, such as position embeddings."""
    parent = tmp_path_factory.mktemp("families")
    for family, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(parent / family)
    return {family: parent / family for family in MODELS}


def load(folder: Path, size: tuple[int, int] = (56, 98), **options: Any) -> LoadedTeacher:
    return LoadedTeacher(teacher_spec(str(folder), input_size=size, dtype="float32", **options), "cpu")


def test_code_in_a_teachers_folder_is_never_run_and_nothing_asks(folders, tmp_path, monkeypatch):
    """The model has a type that transformers knows, and then one that it does not know."""
    folder, marker = tmp_path / "own", tmp_path / "marker"
    shutil.copytree(folders["dinov2"], folder)
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoImageProcessor": "own.Processor"}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "preprocessor_config.json").write_text(json.dumps(own | {"image_processor_type": "Processor"}))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    assert load(folder)(images()).shape == load(folders["dinov2"])(images()).shape
    (folder / "config.json").write_text(json.dumps(config | own | {"model_type": "own"}))
    _config.cache_clear()
    with pytest.raises(TeacherError, match="is a model of type 'own'"):
        load(folder)
    assert not asked and not marker.exists()


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 56, 98, 3), dtype=np.uint8)


def by_hand(family: str, folder: Path, pixels: np.ndarray) -> torch.Tensor:
    """(n, tokens, C) tokens of transformers' model, called as in its documentation."""
    model = getattr(transformers, type(MODELS[family]()).__name__).from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    if family == "radio":
        return model(pixel_values=x).features
    if family.startswith("dino"):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        prefix = 1 if family == "dinov2" else 4
        return model(pixel_values=(x - mean) / std).last_hidden_state[:, prefix:]
    x = x * 2 - 1
    if family.startswith("siglip2"):
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(i.numpy(), PATCH)) for i in x])
        return model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32),
            spatial_shapes=torch.tensor([[4, 7]] * len(x)),
        ).last_hidden_state
    return model(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state


@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_equals_the_patch_tokens_of_transformers(folders, family):
    with torch.inference_mode():
        expected = by_hand(family, folders[family], images())
    found = load(folders[family])(images())
    assert found.shape == (2, 4, 7, 32)
    np.testing.assert_allclose(found.reshape(2, 28, 32), expected, atol=1e-4)


@pytest.mark.parametrize("family", TEACHERS)
def test_a_token_reacts_most_to_its_own_patch(folders, family):
    teacher, pixels = load(folders[family]), images()[:1]
    before = teacher(pixels)
    for row, column in ((0, 0), (0, 6), (3, 0), (2, 5)):
        changed = pixels.copy()
        changed[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] ^= 255
        reaction = np.linalg.norm(teacher(changed) - before, axis=-1)[0]
        assert np.unravel_index(reaction.argmax(), reaction.shape) == (row, column)


@pytest.mark.parametrize("family", TEACHERS)
def test_equal_patches_at_different_positions_get_different_tokens(folders, family):
    """So the position embeddings, interpolated to the image's size, are used."""
    pixels = images()[:1]
    pixels[:, PATCH:] = np.tile(
        pixels[:, PATCH : 2 * PATCH, :PATCH], (1, 3, 7, 1)
    )  # below the first row, equal patches
    tokens = load(folders[family])(pixels)[0, 1:].reshape(21, 32)
    distances = np.linalg.norm(tokens[:, None] - tokens, axis=-1) + np.eye(21)
    assert distances.min() > 5e-3


@pytest.mark.parametrize("family", TEACHERS)
def test_the_final_norm_of_pre_norm_tokens_gives_post_norm_tokens_or_pre_norm_is_refused(folders, family):
    if family == "radio":
        with pytest.raises(TeacherError, match="no final LayerNorm.*pass --teacher-layer post-norm"):
            load(folders[family], layer="pre-norm")
        return
    pre, post = load(folders[family], layer="pre-norm"), load(folders[family])
    assert pre.spec.digest == post.spec.digest
    norm = getattr(post.teacher.model, post.teacher.final_norm)
    with torch.inference_mode():
        np.testing.assert_allclose(norm(torch.from_numpy(pre(images()))), post(images()), atol=1e-4)


@pytest.mark.parametrize("layer", ["post-norm", "pre-norm"])
@pytest.mark.parametrize("family", TEACHERS)
def test_threads_may_share_a_teacher(folders, family, layer):
    """Each of 120 calls gets the features of its own images, and not those of another thread or layer."""
    if (family, layer) == ("radio", "pre-norm"):
        pytest.skip("RADIO has no final norm")
    teacher, inputs = load(folders[family], layer=layer), [images(seed) for seed in range(6)]
    expected = [teacher(pixels) for pixels in inputs]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(teacher, inputs * 20)):
            np.testing.assert_allclose(found, expected[i % len(inputs)], atol=1e-5)


def test_a_checkpoint_with_both_towers_is_the_same_teacher_as_its_image_model(folders, tmp_path):
    for family in ("siglip", "siglip2"):
        both = getattr(transformers, type(MODELS[family]()).__name__).from_pretrained(folders[family])
        both.vision_model.save_pretrained(tmp_path / family)
        assert load(tmp_path / family).spec.digest == load(folders[family]).spec.digest
        np.testing.assert_array_equal(load(tmp_path / family)(images()), load(folders[family])(images()))


@pytest.mark.parametrize(
    ("name", "dim", "patch"),
    [
        ("random:nvidia/C-RADIOv4-H", 1280, 16),
        ("random:google/siglip2-so400m-patch14-224", 1152, 14),
        ("random:google/siglip2-base-patch16-naflex", 768, 16),
    ],
)
def test_published_architectures_are_known(name, dim, patch):
    spec = teacher_spec(name, dtype="float32")
    assert (spec.dim, spec.patch_size, spec.map_size) == (dim, patch, (224 // patch, 400 // patch))
    assert spec.is_random


def test_default_statistics_are_those_of_the_family(folders):
    assert load(folders["siglip2"]).spec.mean == (0.5, 0.5, 0.5)
    assert load(folders["dinov3_vit"]).spec.mean == (0.485, 0.456, 0.406)
    (folders["radio"] / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "do_normalize": False, "image_mean": [0.4, 0.4, 0.4]})
    )
    assert load(folders["radio"]).spec.mean == (0, 0, 0)  # the model itself normalises images


@pytest.mark.parametrize(
    "config", [{"model_type": name} for name in ("vit", "clip", "clip_vision_model", "swin")] + [{}]
)
def test_a_model_of_an_unknown_family_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        TeacherError,
        match="(model of type .*|has no model_type in a config.json): one of dinov2, .*siglip2_vision_model expected",
    ):
        teacher_spec(str(tmp_path))


class MeanColour:
    """A toy family whose tokens are the mean colours of the patches."""

    architectures: ClassVar[dict[str, Any]] = {}
    dim, digest, mean, std = 3, "mean", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, name, config, layer):
        self.name, self.patch = name, config["patch_size"]

    def flops(self, map_size):
        return 1e6

    def to(self, device):
        pass

    def dense_tokens(self, images):
        return F.avg_pool2d(images, self.patch).permute(0, 2, 3, 1)


def test_a_new_family_is_one_class_and_one_row(city, tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "mean_colour", f"{__name__}:MeanColour")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps({"model_type": "mean_colour", "patch_size": 14}))
    cache = tmp_path / "cache"
    output = run(*build_arguments(city, cache, str(tmp_path / "toy"), "--workers", "0", "--no-labels")).stdout
    assert "4x7 tokens of 3" in output
    verified = run("verify", "--cache", cache, "--split", "mini_train", "--samples", "1").stdout
    assert "features at cosine 0.999" in verified or "features at cosine 1.0" in verified
    found = contents(cache)
    assert found["features"].shape == (10, 6, 4, 7, 3)
    # The student's images show the same at another size, so their mean colours are nearly the same.
    np.testing.assert_allclose(found["features"].mean(axis=(2, 3)), found["images"].mean(axis=(2, 3)) / 255, atol=0.01)
