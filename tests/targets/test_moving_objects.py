"""pipelines/moving_objects.py: accumulated sweeps against the geometry of the synthetic city."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from pipelines.moving_objects import main


def test_a_folder_that_is_no_city_of_this_command_is_refused(tmp_path):
    (tmp_path / "v1.0-mini").mkdir()
    refused = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert refused.exit_code == 1 and f"the city in {tmp_path} is not one of this command" in refused.output


@pytest.mark.slow
def test_the_table_of_a_small_city(tmp_path):
    """The second run reads the city of the first; another seed or number of scenes could not, because its worlds are another city's."""
    arguments = ["--out", str(tmp_path / "city"), "--scenes", "1", "--keyframes", "2", "--sweeps", "5", "--seed", "3"]
    first, second = (CliRunner().invoke(main, arguments, catch_exceptions=False).output for _ in range(2))
    lines = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    rows = {(cells[0], cells[1]): [float(value) for value in cells[2:]] for cells in lines}
    assert list(rows) == [("1", "-"), ("5", "smear"), ("5", "carve"), ("5", "boxes")]
    assert "SIMULATED: a synthetic city. 1 keyframe of 1 scene" in first
    assert [line for line in first.splitlines() if line.startswith("| ")] == [
        line for line in second.splitlines() if line.startswith("| ")
    ]
    other = CliRunner().invoke(main, [*arguments[:-1], "4"])
    assert other.exit_code == 1 and "'seed': 3}, expected" in other.output and "choose another --out" in other.output
    precision, recall = ({name: row[column] for name, row in rows.items()} for column in (0, 1))
    assert precision["1", "-"] > 95  # the truth contains what one sweep sees
    assert recall["5", "smear"] > recall["5", "carve"] >= recall["1", "-"]
