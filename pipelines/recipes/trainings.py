"""The trainings of the paper's tables: a preset, and the pretraining that it starts from.

Presets of the same config are one training, whatever table they are named after: OccFeat of SimpleBEV with EN-B0 is a row of Tables 1, 2
and 3 and of Table 4, and is trained once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_train.config import Config
from occfeat_train.presets import PRESETS, preset

PRETRAINING_EPOCHS = 50.0  # of the paper


@dataclass(frozen=True)
class Training:
    """preset: of what is trained. start: preset of the pretraining that a finetuning starts from; empty without one."""

    preset: str
    start: str = ""

    @property
    def name(self) -> str:
        """As the trainer names it: ``table1-simplebev-enb0-vehicles-1-from-table1-simplebev-enb0-occfeat``."""
        if preset(self.preset).is_pretext:
            return slug(self.preset)
        return f"{slug(self.preset)}-{f'from-{slug(self.start)}' if self.start else 'scratch'}"

    @property
    def pretraining(self) -> Training | None:
        return Training(self.start) if self.start else None

    @property
    def large(self) -> bool:
        """Whether it needs larger images than a cache has by default."""
        return preset(self.preset).smallest_cache()[0] > STUDENT_SIZE[0]

    def run_name(self, seed: int) -> str:
        return f"{self.name}-seed-{seed}"

    def overrides(self, seed: int, *, miniature: bool) -> list[str]:
        """Values of --set."""
        return [f"seed={seed}", *(small_settings(self) if miniature else ())]

    def config(self, seed: int, *, miniature: bool) -> Config:
        return preset(self.preset).override(self.overrides(seed, miniature=miniature))


def training(name: str, start: str = "") -> Training:
    """A training by the names of presets; presets of the same config give the same value."""
    return Training(canonical(name), canonical(start) if start else "")


def canonical(name: str) -> str:
    """The first preset with the same config."""
    config = preset(name)
    return next(other for other, found in PRESETS.items() if found == config)


def slug(name: str) -> str:
    return name.replace("/", "-")


def small_settings(each: Training) -> list[str]:
    """Overrides of a miniature: a network and a training of the same kind that take seconds. Long pretrainings stay longer, large images larger."""
    config = preset(each.preset)
    epochs = 4 * config.optim.epochs / PRETRAINING_EPOCHS if config.is_pretext else 4
    size = "64x96" if each.large else "32x48"
    return [
        f"network.image_size={size}", "network.channels=8", "network.weights=none", f"optim.epochs={max(epochs, 4):g}",
        "optim.batch=2", "optim.accumulation=1",
    ]  # fmt: skip


def run_directory(out: Path, each: Training, seed: int) -> Path:
    return out / "runs" / each.run_name(seed)
