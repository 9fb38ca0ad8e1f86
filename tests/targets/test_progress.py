"""Progress on a terminal and in a file."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from occfeat_targets.common import progress
from occfeat_targets.common.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only element."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_one_line_a_minute_and_one_at_the_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(2000, unit="step", desc="train", initial=1000) as bar:
        for step in range(1000):
            clock[0] += 0.5
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    output = sys.stderr.getvalue()
    assert "\r" not in output
    lines = output.splitlines()
    assert len(lines) == 9  # 500 s
    assert lines[0] == "train: 56% 1120/2000 [01:00<07:20,  2.00step/s, loss 119]"
    assert lines[-1] == "train: 100% 2000/2000 [08:20<00:00,  2.00step/s, loss 999]"


def test_the_last_line_is_not_printed_twice(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(100_000, unit="B", unit_scale=True) as bar, bar.external_write_mode():
        clock[0] += 60
        bar.update(100_000)
    bar.close()
    assert sys.stderr.getvalue() == "100% 100k/100k [01:00<00:00, 1.67kB/s]\n"


@pytest.mark.parametrize(("output", "disable"), [(Terminal(), False), (Terminal(), True), (io.StringIO(), True)])
def test_a_terminal_gets_a_bar_and_a_disabled_one_prints_nothing(output, disable, monkeypatch):
    monkeypatch.setattr(sys, "stderr", output)
    with progress_bar(3, unit="step", disable=disable) as bar:
        assert isinstance(bar, tqdm)
        bar.update(3)
    assert ("\r" in output.getvalue()) == (not disable)
    assert ("3/3" in output.getvalue()) == (not disable)
