"""CVT: the reference's attention, embeddings and layers for the same weights, in float64; geometry in closed form."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.cvt import CVT, Rays, cell_centers, find_rays
from occfeat_train.ops.views import Views
from tests.train.reference_seeds import GOLDEN, seeded_direction, seeded_state_dict
from tests.train.test_lifting import BACKWARD, FORWARD, PINHOLE, random_views, views_of

_PARTS = {
    "feature_proj": "key", "feature_linear": "value", "bev_embed": "cell", "img_embed": "pixel", "cam_embed": "camera",
    "cross_attend.to_q": "to_queries", "cross_attend.to_k": "to_keys", "cross_attend.to_v": "to_values",
    "cross_attend.proj": "output", "cross_attend.prenorm": "norm1", "cross_attend.postnorm": "norm2",
    "cross_attend.mlp": "feed_forward",
}  # fmt: skip
GRID = VoxelGrid((2, 30, 40))  # 4 x 5 queries, as in the golden file


def our_name(name: str) -> str:
    if match := re.fullmatch(r"cross_views\.(\d)\.(\w+?(?:\.[a-z]\w*?)?)((?:\.\d)?\.\w+)", name):
        return f"views.{match[1]}.{_PARTS[match[2]]}{match[3]}"
    return name.replace("layers.", "refine.").replace("bev_embedding.learned_features", "queries")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN / "cvt" / "stages.npz") as file:
        return {k: v if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in file.items()}


@pytest.fixture
def lifting() -> CVT:
    """With the reference's weights, but for the upsampling, in float64 and training mode."""
    model = CVT(GRID, 12).double()
    own = model.state_dict()
    for name, array in seeded_state_dict(GOLDEN / "cvt" / "stages.npz").items():
        ours = our_name(name)
        assert ours in own, name
        # 1x1 convolutions of positions are linear layers here
        own[ours] = torch.from_numpy(np.asarray(array)).view_as(own[ours])
    model.load_state_dict(own)
    return model.train()


def stages_of(golden: dict[str, Any]) -> list[tuple[Tensor, Rays]]:
    """(features, rays) of both stages, at the reference's own positions."""
    centers, found = golden["centers"].flatten(0, 1)[:, None], []
    for i, size in enumerate(((4, 6), (2, 3))):
        features = torch.from_numpy(seeded_direction(f"features {i}", (6, 12, *size))).requires_grad_()
        is_key = torch.ones(2, 3, size[0] * size[1], dtype=torch.bool)
        found.append((features, Rays(golden[f"pixels_{i}"].flatten(0, 1), centers, is_key)))
    return found


def test_embeddings_equal_the_references(lifting: CVT, golden: dict[str, Any]) -> None:
    for i, (_, rays) in enumerate(stages_of(golden)):
        cells, pixels = lifting.views[i].embed(golden["cells"], rays)
        for ours, name in ((cells, f"positions_{i}"), (pixels, f"directions_{i}")):
            torch.testing.assert_close(ours, golden[name].flatten(0, 1).flatten(2).mT, atol=1e-6, rtol=0)


def test_attention_and_layers_equal_the_references_with_gradients_and_statistics(
    lifting: CVT, golden: dict[str, Any]
) -> None:
    stages, coarse = stages_of(golden), lifting.queries.expand(2, -1, -1, -1)
    for i, (features, rays) in enumerate(stages):
        coarse = lifting.views[i](coarse, features.unflatten(0, (2, 3)), golden["cells"], rays)
        torch.testing.assert_close(coarse, golden[f"attended_{i}"], atol=1e-6, rtol=0)
        coarse = lifting.refine[i](coarse)
    torch.testing.assert_close(coarse, golden["out"], atol=1e-6, rtol=0)
    (coarse * torch.from_numpy(seeded_direction("out", tuple(coarse.shape)))).sum().backward()
    for i, (features, _) in enumerate(stages):
        torch.testing.assert_close(features.grad, golden[f"gradient_{i}"], atol=1e-6, rtol=1e-6)
    parameters, buffers = dict(lifting.named_parameters()), dict(lifting.named_buffers())
    tensors = {name: parameters[our_name(name)].grad for name in golden["gradients_of"].tolist()}
    tensors |= {name: buffers[our_name(name)] for name in golden["statistics_of"].tolist()}
    expected = torch.cat([golden["gradients"], golden["statistics"]])
    for (name, tensor), (norm, along) in zip(tensors.items(), expected.tolist(), strict=True):
        assert tensor is not None
        assert tensor.norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-6), name
        direction = torch.from_numpy(seeded_direction(name, tuple(tensor.shape)).reshape(-1))
        # the directions were made for the reference's shapes, which have the same number of elements
        assert (tensor.flatten() * direction).sum().item() == pytest.approx(along, rel=1e-6, abs=1e-5), name


def test_every_tensor_but_those_of_the_upsampling_was_compared(lifting: CVT, golden: dict[str, Any]) -> None:
    compared = {our_name(name) for name in golden["names"].tolist()}
    assert {name for name in lifting.state_dict() if not name.startswith("up.")} == compared


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_a_pixel_is_the_point_of_its_ray_at_a_depth_of_one_metre() -> None:
    """Maps are 4 x 6 tokens of 10 x 10 px: the centre of token (1, 3) is 5 px right of and 5 px above the principal point."""
    rays = find_rays(views_of([FORWARD, BACKWARD], [PINHOLE, PINHOLE]), (4, 6), torch.float64)
    expected = [[5 / 30, 1, 5 / 30, 1], [-5 / 30, -1, 5 / 30, 1]]  # right, forward, up
    torch.testing.assert_close(rays.pixels[:, 6 + 3], torch.tensor(expected, dtype=torch.float64))
    assert rays.centers.tolist() == [[[0, 0, 0, 1]]] * 2 and rays.is_key.all()


def test_rays_at_the_references_positions_are_the_references(golden: dict[str, Any]) -> None:
    """Its 4 x 6 pixels are at (32 / 3 i, 48 / 5 j), ours at (8 i + 4, 8 j + 4): with fitting intrinsics, the rays are the same."""
    intrinsics = golden["intrinsics"].clone()
    for axis, pitch in ((0, 48 / 5), (1, 32 / 3)):
        intrinsics[..., axis, :] *= 8 / pitch
        intrinsics[..., axis, 2] += 4
    rays = find_rays(Views(torch.zeros(2, 3, 3, 32, 48), intrinsics, golden["cam_from_ego"]), (4, 6), torch.float64)
    torch.testing.assert_close(rays.pixels, golden["pixels_0"].flatten(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(rays.centers[:, 0], golden["centers"].flatten(0, 1), atol=1e-6, rtol=0)


def test_a_masked_camera_has_no_rays_and_no_keys() -> None:
    views = random_views(0)
    views.cam_from_grid[0, 2] = 0
    views.intrinsics[0, 2] = 0
    rays = find_rays(views, (4, 6), torch.float32)
    assert rays.is_key.all(-1).tolist() == [[True, True, False, True]]
    assert not rays.pixels[2].any() and not rays.centers[2].any() and rays.pixels.isfinite().all()


def test_positions_are_the_centres_of_coarse_cells_that_cover_the_grid() -> None:
    grid = VoxelGrid((1, 4, 6), (-1, -2, 10), (1, 6, 22))
    found = cell_centers(grid, (2, 3), torch.device("cpu"))  # cells of 4 x 4 m
    assert found.tolist() == [[12, 0], [16, 0], [20, 0], [12, 4], [16, 4], [20, 4]]


@pytest.mark.parametrize(
    ("shape", "coarse"), [((8, 200, 200), (25, 25)), ((3, 7, 18), (1, 3)), ((1, 1, 1), (1, 1)), ((2, 33, 64), (5, 8))]
)
def test_any_grid_is_possible(shape: tuple[int, int, int], coarse: tuple[int, int]) -> None:
    lifting = CVT(VoxelGrid(shape), 6).eval()
    assert lifting.queries.shape == (6, *coarse)
    assert lifting(torch.randn(1, 4, 6, 2, 3), random_views(0)).shape == (1, 6, *shape[1:])


def test_the_order_of_cameras_and_doubled_cameras_do_not_matter() -> None:
    """A doubled rig has every score twice, so the softmax is the same."""
    torch.manual_seed(0)
    lifting, views, features = CVT(GRID, 8).eval(), random_views(1), torch.randn(1, 4, 8, 4, 6)

    def lifted(order: list[int]) -> Tensor:
        chosen = (t[:, order] for t in (views.images, views.intrinsics, views.cam_from_grid))
        with torch.no_grad():
            return lifting(features[:, order], Views(*chosen))

    expected = lifted([0, 1, 2, 3])
    torch.testing.assert_close(lifted([2, 0, 3, 1]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lifted([0, 1, 2, 3, 3, 2, 1, 0]), expected, atol=1e-5, rtol=1e-5)
    assert (lifted([0, 1, 2]) - expected).abs().max() > 1e-3


def test_the_map_depends_on_the_calibration() -> None:
    torch.manual_seed(0)
    lifting, views, features = CVT(GRID, 8).eval(), random_views(1), torch.randn(1, 4, 8, 4, 6)
    turned = replace(views, cam_from_grid=views.cam_from_grid.roll(1, 1))
    zoomed = replace(views, intrinsics=views.intrinsics * torch.tensor([[2.0], [2], [1]]))
    with torch.no_grad():
        plain = lifting(features, views)
        for other in (turned, zoomed):
            assert (lifting(features, other) - plain).abs().max() > 1e-3
