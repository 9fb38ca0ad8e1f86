"""Memory of this process, from Linux's /proc."""

from __future__ import annotations

from pathlib import Path


def forget_peak() -> bool:
    """Reset the peak. Returns False where this is not possible, i.e. not on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def megabytes(name: str) -> float:
    """name: "VmRSS" (current) or "VmHWM" (peak)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6
