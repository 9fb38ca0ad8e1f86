"""Random parameters of the augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from occfeat_train.config import NO_AUGMENTATION, AugmentConfig
from tests.train.test_augment import DEFAULT, SIZE, drawn, values


def test_parameters_are_determined_by_seed_epoch_and_sample():
    assert values(drawn(seed=(1, 2, 3))) == values(drawn(seed=(1, 2, 3)))
    others = [values(drawn(seed=seed)) for seed in ((1, 2, 3), (0, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert all(a["resized"] != b["resized"] for i, a in enumerate(others) for b in others[:i])


@pytest.mark.parametrize(
    ("switch", "affected"),
    [
        ({"resize": (1.0, 1.0)}, {"resized", "crop"}),
        ({"crop": 0.0}, {"crop"}),
        ({"flip_images": False}, {"mirror"}),
        ({"flip_bev": False}, {"bev_flip"}),
        ({"shuffle_cameras": False}, {"cameras"}),
        ({"num_cameras": 4}, {"cameras"}),
        ({"random_frame": False}, {"frame"}),
    ],
)
def test_switching_one_augmentation_off_does_not_change_the_others(switch, affected):
    changed = set()
    for seed in range(10):
        before, after = values(drawn(seed=seed)), values(drawn(replace(DEFAULT, **switch), seed=seed))
        changed |= {name for name in before if before[name] != after[name]}
    assert changed == affected


def test_sizes_and_crops_cover_simple_bevs_ranges_and_stay_inside():
    draws = [drawn(seed=seed) for seed in range(500)]
    resized, crop = (np.stack([getattr(d, name) for d in draws]) for name in ("resized", "crop"))
    factor = resized / SIZE
    assert 0.795 < factor.min() < 0.805
    assert 1.195 < factor.max() < 1.2
    assert np.abs(factor[..., 0] - factor[..., 1]).max() < 1 / 224  # one factor per camera, rounded down
    shift = crop - ((resized - SIZE) / 2).astype(int)
    assert np.abs(shift).max() == 43  # below int(0.2 * 224) = 44, on both axes
    assert (np.abs(shift).max((0, 1)) == 43).all()
    assert np.unique(resized[0, :, 1]).size > 1  # each camera has its own size


def test_flips_frames_and_camera_orders_are_uniform():
    draws = [drawn(seed=seed) for seed in range(500)]
    assert abs(np.mean([d.mirror for d in draws]) - 0.5) < 0.05
    assert (np.abs(np.mean([d.bev_flip for d in draws], axis=0) - 0.5) < 0.1).all()
    assert np.unique([d.frame for d in draws], return_counts=True)[1].tolist() == pytest.approx([100] * 5, abs=30)
    assert len({tuple(d.cameras) for d in draws}) > 300
    assert all(sorted(d.cameras) == list(range(6)) for d in draws)


def test_a_random_subset_of_cameras_stays_in_order_unless_shuffled():
    config = AugmentConfig(num_cameras=2)
    assert {tuple(sorted(drawn(config, seed).cameras)) for seed in range(300)} == {
        (a, b) for a in range(6) for b in range(a + 1, 6)
    }
    assert any(list(drawn(config, s).cameras) != sorted(drawn(config, s).cameras) for s in range(9))
    ordered = replace(config, shuffle_cameras=False)
    assert all(list(drawn(ordered, s).cameras) == sorted(drawn(config, s).cameras) for s in range(9))


def test_evaluation_only_resizes():
    for seed in range(5):
        d = drawn(NO_AUGMENTATION, seed, frames=[3])
        assert (d.resized == SIZE).all()
        assert not d.crop.any()
        assert not d.mirror.any()
        assert not d.bev_flip.any()
        assert d.cameras.tolist() == list(range(6))
        assert d.frame == 3
