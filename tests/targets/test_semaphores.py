import mmap
import os
import time

from occfeat_targets.build.semaphores import remove_semaphores


def test_only_old_semaphores_that_no_process_has_open_are_removed(tmp_path):
    for name in ("sem.mp-left", "sem.mp-open", "sem.mp-new", "sem.other"):
        (tmp_path / name).write_bytes(bytes(32))
        if name != "sem.mp-new":
            os.utime(tmp_path / name, times=(0, time.time() - 3600))
    with (tmp_path / "sem.mp-open").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        os.utime(tmp_path / "sem.mp-open", times=(0, time.time() - 3600))
        remove_semaphores(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sem.mp-new", "sem.mp-open", "sem.other"]
