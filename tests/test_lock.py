"""lock.py: a folder belongs to the run whose processes live."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clone_fast.errors import OutputError
from clone_fast.lock import FolderLock

TAKE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))"


def elsewhere(folder: Path, rank: int) -> bool:
    """Whether another program can take the byte of a process."""
    done = subprocess.run([sys.executable, "-c", TAKE, folder / ".lock", str(rank)], capture_output=True)
    return done.returncode == 0


def test_a_folder_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out", 0)
    assert [elsewhere(tmp_path / "out", rank) for rank in (0, 1)] == [False, True]  # the others are for the others
    lock.close()
    assert elsewhere(tmp_path / "out", 0)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_process_that_lives_holds_the_folder(tmp_path: Path, rank: int) -> None:
    """The first or another one of a run whose launcher was killed."""
    hold = TAKE.replace("fcntl.lockf(open(sys.argv[1], 'ab')", "f = open(sys.argv[1], 'ab'); fcntl.lockf(f")
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print('held', flush=True); input()", tmp_path / ".lock", str(rank)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run is at work there"):
            FolderLock(tmp_path, 0)
        holder.kill()
    FolderLock(tmp_path, 0).close()


def test_without_locks_it_is_the_users_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="no other run") as told:
        locks = [FolderLock(tmp_path, rank) for rank in (0, 1)]
    assert len(told) == 1  # not one for each process
    for lock in locks:
        lock.close()
