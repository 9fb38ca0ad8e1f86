"""The scenes whose labels are used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_train.data.label_scenes import label_scenes


@pytest.mark.parametrize(("percent", "count"), [(1, 7), (10, 70), (100, 700), (0.01, 1)])
def test_a_share_of_700_scenes_is_spread_evenly(percent, count):
    scenes = [f"scene-{i:04}" for i in range(700)]
    chosen = label_scenes([scene for scene in scenes for _ in range(3)], percent)
    assert chosen == scenes[:: 700 // count]


def test_chosen_scenes_keep_the_splits_order():
    assert label_scenes(["b", "b", "a", "c", "d", "d"], 50) == ["b", "c"]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 100))
def test_a_share_has_its_size_and_no_duplicates(count, percent):
    scenes = [str(i) for i in range(count)]
    chosen = label_scenes(scenes, percent)
    assert len(set(chosen)) == len(chosen) == max(round(count * percent / 100), 1)
    assert set(chosen) <= set(scenes)
