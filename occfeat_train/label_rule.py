"""The rule that chooses the scenes whose labels finetuning uses.

The paper (4.1) finetunes with 1 % and 10 % of the labels, and does not say which. SLidR and ALSO, of the same group, walk the
scenes of the split in the order of the data set's table, and keep the last of each block of 100 or 10.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

import numpy as np

from occfeat_train.conversion import require_one_of


@dataclass(frozen=True)
class LabelScenesConfig:
    """Which scenes are a share of `labels` percent.

    rule: ``last-of-block`` (SLidR, ALSO), ``first-of-block``, or ``random``. order: the order in which scenes are counted: that of
    the data set's own ``table``, or of the ``split``'s list. seed: of ``random`` alone, so that runs of several seeds use the same scenes.
    """

    rule: Literal["last-of-block", "first-of-block", "random"] = "last-of-block"
    order: Literal["table", "split"] = "table"
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of(self, "rule", "order")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"label_scenes.seed={self.seed}: a whole number from 0 to 2^63 - 1 expected")

    @property
    def needs_order(self) -> bool:
        """Whether the choice depends on the order of the scenes."""
        return self.rule != "random"

    def describe(self) -> str:
        """``last of each block, table order``."""
        return f"{self.rule.replace('-of-', ' of each ')}, {self.order} order" if self.needs_order else f"random, seed {self.seed}"  # fmt: skip

    def choose(self, scenes: Sequence[str], usable: Collection[str], percent: float) -> list[str]:
        """At least one of the usable scenes.

        scenes: all names, in the order in which they are counted. usable: those with valid keyframes, at least one.
        percent: above 0 and at most 100.
        """
        valid = [name for name in scenes if name in usable]
        if self.rule == "last-of-block":
            return _last_of_block(scenes, valid, Fraction(str(percent)) / 100)
        count = max(round(len(valid) * percent / 100), 1)
        if self.rule == "first-of-block":
            return [valid[i * len(valid) // count] for i in range(count)]
        # Names are sorted before, so that the same seed chooses the same scenes in any order, and fewer of them for a smaller share.
        names = sorted(scenes)
        drawn = [names[i] for i in np.random.default_rng(self.seed).permutation(len(names))]
        return [name for name in drawn if name in usable][:count]


# A run lists and hashes its label scenes, so runs are compared by these scenes, and not by the fields that choose them.
LABEL_CHOICE = tuple(f"label_scenes.{field.name}" for field in fields(LabelScenesConfig))


def _last_of_block(scenes: Sequence[str], valid: Sequence[str], share: Fraction) -> list[str]:
    """The last valid scene of each complete block of 1 / share scenes; the last of all if there is none.

    A block ends with the scene at which the number of scenes times the share passes a whole number: at 1 % with scene 100, 200, ...
    Scenes without valid keyframes count, so that a damaged scene changes the choice in no other block.
    """
    complete = int(len(scenes) * share)
    is_valid, last = set(valid), {}
    for index, name in enumerate(scenes):
        if name in is_valid and (block := int(index * share)) < complete:
            last[block] = name
    return list(last.values()) or [valid[-1]]
