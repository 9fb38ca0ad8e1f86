"""The test run refuses calls whose shapes differ from the annotations; see conftest.py."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from occfeat_train.networks.decoder import BEVDecoder
from occfeat_train.ops.mean_over_views import lift, sample_voxel_features_numpy
from occfeat_train.ops.views import Views
from tests.conftest import REPOSITORY
from tests.train.test_batch import make_batch
from tests.train.test_lifting import FORWARD, GRID, PINHOLE, SIZE, one_camera


def test_a_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="B V C h w"):
        lift(torch.ones(2, 3, 4, 6), one_camera(), GRID)


def test_a_size_that_differs_between_arguments_is_refused() -> None:
    maps = np.zeros((2, 4, 6, 8), np.float16)
    with pytest.raises(TypeCheckError, match="V 4 4"):
        sample_voxel_features_numpy(maps, None, FORWARD[None], PINHOLE[None], SIZE, np.zeros((1, 3), np.float32))


def test_a_size_that_differs_between_fields_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="B V 3 3"):
        Views(torch.zeros(1, 2, 3, *SIZE), torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 4, 4))


def test_a_size_that_differs_within_a_batch_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="B V"):
        dataclasses.replace(make_batch(2), mirror=torch.zeros(2, 2, dtype=torch.bool))


def test_another_type_of_elements_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="Float"):
        BEVDecoder(8)(torch.zeros(1, 8, 4, 4, dtype=torch.int64))


def test_a_result_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = BEVDecoder(8)
    monkeypatch.setattr(decoder.up1, "forward", lambda up, x: x[:, :4])
    with pytest.raises(TypeCheckError, match="B C H W"):
        decoder(torch.zeros(1, 8, 16, 16))


def test_every_shape_is_a_string() -> None:
    """ruff removes the quotes of a single name, so such a shape starts with a space; without quotes it would not be checked."""
    annotation = re.compile(
        r"\b(?:Bool|Float|Int|Shaped|UInt)\d*\[(?:torch\.)?(?:Tensor|NDArray\[\w+\]),\s*([^\"\s][^\]]*)\]"
    )
    files = sorted((REPOSITORY / "occfeat_train").rglob("*.py"))
    assert [f"{file}: {shape}" for file in files for shape in annotation.findall(file.read_text())] == []
