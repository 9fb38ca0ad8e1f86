"""numba's machine code is kept somewhere even where neither the package nor the home directory is writable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from occfeat_targets.common import compiled
from tests.conftest import REPOSITORY

# A module that may not write beside itself: numba creates a folder there, which a file of that name prevents also for root.
MODULE = """
from occfeat_targets.common.compiled import compiled

@compiled()
def double(x):
    return 2 * x
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "doubles.py").write_text(MODULE)
    (folder / "__pycache__").write_text("a file")
    return folder


def run(module: Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    """Import the module and call its function, with a home directory that cannot exist."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))},
        "HOME": "/proc/nowhere", "TMPDIR": str(temporary), "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{module}",
    }  # fmt: skip
    code = "from doubles import double; import os; print(double(21), os.environ.get('NUMBA_CACHE_DIR'))"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory in which nobody can create files")
def test_a_read_only_installation_without_a_home_keeps_machine_code_in_a_temporary_folder(module, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for _ in range(2):
        result = run(module, temporary)
        assert result.returncode == 0, result.stderr
        folder = temporary / f"occfeat-numba-{os.getuid()}"
        assert result.stdout == f"42 {folder}\n"
        assert f"keeps its machine code in {folder}: set NUMBA_CACHE_DIR" in result.stderr
        assert result.stderr.count("\n") == 1
        assert len(list(folder.rglob("*.nbc"))) == 1  # compiled once


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the temporary directory is the user's own here")
@pytest.mark.parametrize("trap", ["writable", "link", "of another user"])
def test_machine_code_is_not_read_from_a_folder_that_another_user_can_write_to(trap, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"occfeat-numba-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777 if trap == "writable" else 0o700)
    if trap == "of another user":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)
    own = compiled._own_folder()
    assert own.parent == tmp_path
    assert own != folder
    assert own.stat().st_mode & 0o077 == 0


def test_machine_code_of_two_runs_is_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    assert compiled._own_folder() == compiled._own_folder()
