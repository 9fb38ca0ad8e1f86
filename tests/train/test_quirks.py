"""The reference's defects in closed form. `test_reference` compares complete networks with its outputs.

The slow references of `test_lifting` and `test_bevformer` also reproduce them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import LIFTINGS, REFERENCE_LIFTINGS
from occfeat_train.simple_bev.quirks import ReferenceBEVFormer, ReferenceLSS
from tests.train.test_lifting import FORWARD, GRID, by_voxel, lift_reference, one_camera, random_views, views_of


def test_every_reference_variant_is_of_a_lifting_and_cvt_is_not_in_the_reference() -> None:
    assert REFERENCE_LIFTINGS.keys() == LIFTINGS.keys() - {"cvt"}


def test_lifting_stretches_the_map_and_fades_at_its_border() -> None:
    """u = 30 + 10 i is x = 3 + i in the feature map, sampled at 6 / 5 x - 0.5. Row 2 of 4 is sampled at 8 / 3 - 0.5."""
    grid = VoxelGrid((1, 1, 9), (-1, 2, -4.5), (1, 4, 4.5))
    ramp = torch.arange(1.0, 7).expand(1, 1, 1, 4, 6)
    volume = by_voxel(lift_reference(ramp, one_camera(), grid), grid).flatten()
    # x = -1, 0, ... 7: outside, half of token 1, then the ramp at 0.7, 1.9, 3.1, 4.3; x = 6 is beyond 5.5
    expected = torch.tensor([0, 0.5, 1.7, 2.9, 4.1, 5.3, 0.5 * 6, 0, 0]) / (1 + 1e-6)
    torch.testing.assert_close(volume, expected, atol=1e-5, rtol=0)


def test_lifting_counts_a_view_if_any_bilinear_weight_is_inside_the_map() -> None:
    """With 2 tokens per row the index is 2 x - 0.5. At x = -0.4 no weight is inside the map, at x = -0.2 a tenth."""
    pinhole = np.array([[0, 0, 0], [0, 0, 20], [0, 0, 1.0]])
    grid = VoxelGrid((1, 1, 1), (-1, 2, -1), (1, 4, 1))
    ones = torch.ones(1, 2, 1, 2, 2)
    found = []
    for x in (-0.6, -0.4, -0.2, 0.5):
        pinholes = [pinhole + np.array([[0, 0, at * 30], [0, 0, -5], [0, 0, 0]]) for at in (x, 0.5)]
        found.append(lift_reference(ones, views_of([FORWARD] * 2, pinholes), grid).item())
    # the other view is at row 2 * 0.75 - 0.5 = 1, column 0.5, with all of its weight
    np.testing.assert_allclose(found, [1 / (1 + 1e-6), 1 / (1 + 1e-6), 1.1 / 2, 2 / 2], rtol=2e-6)


def test_maps_of_fewer_than_two_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="features of 1x6 tokens: expected at least 2x2 for simple-bev"):
        lift_reference(torch.ones(1, 2, 2, 1, 6), random_views(0, cams=2), GRID)


def test_cells_attend_to_the_transposed_cell() -> None:
    anchors = ReferenceBEVFormer(VoxelGrid((1, 3, 3)), 4).cell_anchors(torch.device("cpu"))
    torch.testing.assert_close(
        anchors, torch.tensor([[row, column] for row in range(3) for column in range(3)]).float()
    )


def test_the_voxel_index_is_truncated() -> None:
    """The index is an integer at voxel centres and is truncated. Along up it counts from the top."""
    line = ReferenceLSS(VoxelGrid((1, 1, 4), (-1, -1, 0), (1, 1, 4)), 1)
    rights = torch.tensor([-0.6, -0.4, 0.0, 0.6, 1.4, 1.6, 3.4, 3.6, 4.4, 4.6])
    index, is_inside = line.voxels(torch.stack([rights, *[torch.zeros(10)] * 2], 1))
    assert is_inside.tolist() == [False] + [True] * 8 + [False]
    assert index[is_inside].tolist() == [0, 0, 0, 0, 1, 2, 3, 3]
    column = ReferenceLSS(VoxelGrid((4, 1, 1), (0, -1, -1), (4, 1, 1)), 1)
    ups = torch.tensor([-0.6, -0.4, 0.4, 0.6, 2.4, 2.6, 4.4, 4.6])
    index, is_inside = column.voxels(torch.stack([*[torch.zeros(8)] * 2, ups], 1))
    assert is_inside.tolist() == [False, True, True, True, True, True, True, False]
    assert index[is_inside].tolist() == [0, 0, 1, 2, 3, 3]
