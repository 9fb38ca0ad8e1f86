import pytest

from occfeat_targets.common.plural import count


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (28130, "28,130 steps"), (1.0, "1 step"), (0.5, "0.5 steps")],
)
def test_a_noun_agrees_with_its_number(n, text):
    assert count(n, "step") == text
