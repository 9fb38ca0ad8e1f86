"""The corruptions of nuScenes-C (RoboBEV, arXiv 2304.06719; paper, Figure 4) as a part of a cache's spec.

A corrupted cache is a clean one with other student images. Its folder beside the clean cache says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# {name: folders in a downloaded nuScenes-C: that of the published code, then that of its documentation}
CORRUPTIONS = {
    "brightness": ("Brightness",),
    "low-light": ("LowLight",),
    "fog": ("Fog",),
    "snow": ("Snow",),
    "motion-blur": ("MotionBlur",),
    "color-quant": ("ColorQuant",),
    "camera-crash": ("CameraCrash", "Camera"),
    "frame-lost": ("FrameLost", "Frame"),
}
SEVERITIES = {1: "easy", 2: "mid", 3: "hard"}  # {severity: its name, which is also a folder of nuScenes-C}
LOST_VIEWS = ("camera-crash", "frame-lost")  # corruptions that make some views black and leave the others as they are
# native: the full image is corrupted, compressed as JPEG, then resized, as published. network: the resized image is corrupted.
# downloaded: the images of nuScenes-C.
PROTOCOLS = ("native", "network", "downloaded")


@dataclass(frozen=True)
class CorruptionSpec:
    """A corruption of the student images. name: of CORRUPTIONS; severity: of SEVERITIES; protocol: of PROTOCOLS.

    seed: random numbers depend on it, the image's file name, the corruption and the severity. masks_lost: views that
    camera-crash or frame-lost lose are masked in `camera_valid`; as published, they are only black.
    """

    name: str
    severity: int
    seed: int = 0
    protocol: str = "native"
    masks_lost: bool = False

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ValueError(f"corruption {self.name!r}: one of {', '.join(CORRUPTIONS)} expected")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity {self.severity!r}: 1 (easy), 2 (mid) or 3 (hard) expected")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r}: one of {', '.join(PROTOCOLS)} expected")
        if self.masks_lost and self.name not in LOST_VIEWS:
            raise ValueError(f"--mask-lost with {self.name}, which loses no view: only {' and '.join(LOST_VIEWS)} do")

    @property
    def folder(self) -> str:
        """Folder of the corrupted cache, relative to that of the clean one: ``corruptions/fog-2``.

        Caches of another protocol, seed or treatment of lost views lie in another folder, such as ``corruptions-network``.
        """
        parts = ["corruptions"]
        parts += [self.protocol] * (self.protocol != "native") + ["masked"] * self.masks_lost
        parts += [f"seed-{self.seed}"] * (self.seed != 0)
        return f"{'-'.join(parts)}/{self.name}-{self.severity}"

    def describe(self) -> str:
        how = {
            "native": "at native size, before a JPEG of quality 95",
            "network": "after the resize to the cached size",
            "downloaded": "read from a downloaded nuScenes-C",
        }[self.protocol]
        seed = "" if self.protocol == "downloaded" else f", seed {self.seed}"
        lost = "; lost views are masked" if self.masks_lost else ""
        return (
            f"images corrupted: {self.name}, severity {self.severity} ({SEVERITIES[self.severity]}), {how}{seed}{lost}"
        )


def wanted_corruptions(name: str, severity: int | None) -> Sequence[tuple[str, int]]:
    """(name, severity) of each corruption that is asked for. name: one of CORRUPTIONS, or ``all``. severity: None for all three."""
    names = CORRUPTIONS if name == "all" else (name,)
    return [(each, level) for each in names for level in (SEVERITIES if severity is None else (severity,))]
