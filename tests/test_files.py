"""files.py: a folder that comes in one step, what is left of one that did not, and one run at a time."""

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
from clone_fast.files import FolderLock, remove_leftovers, write_aside, write_folder_aside


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with write_folder_aside(tmp_path / "deep" / "result", within=tmp_path) as folder:
        assert (folder.parent, folder.name[0]) == (tmp_path, ".")
        with write_aside(folder / "a") as file:
            file.write(b"1")
        assert not (tmp_path / "deep").exists()
    assert names(tmp_path) == {"deep", "deep/result", "deep/result/a"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with write_folder_aside(tmp_path / "result", within=tmp_path) as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == set()


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with write_folder_aside(tmp_path / "result", within=tmp_path) as folder:
        (folder / "a").write_text("1")
    with (
        pytest.raises(OutputError, match="result: cannot be written"),
        write_folder_aside(tmp_path / "result", within=tmp_path) as folder,
    ):
        (folder / "a").write_text("2")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="file: cannot be written"),
        write_folder_aside(tmp_path / "file", within=tmp_path),
    ):
        pass
    assert (tmp_path / "result" / "a").read_text() == "1"
    assert names(tmp_path) == {"result", "result/a", "file"}


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".0123456789abcdef.part", ".mine.part", "0123456789abcdef.part", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / ".fedcba9876543210.part").write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine.part", "0123456789abcdef.part", ".git"}


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
