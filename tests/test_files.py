"""files.py: a folder that comes in one step, what is left of one that did not."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from pathlib import Path

import pytest

from clone_fast.errors import OutputError
from clone_fast.files import remove_leftovers, side_by_side, write_aside, write_folder_aside


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


# ---- side by side ----------------------------------------------------------------------------------------------------


def slowly(path: Path) -> None:
    time.sleep(0.2)
    with write_aside(path) as file:  # makes the folder anew if that is gone
        file.write(b"1")


def test_files_are_written_while_the_block_goes_on(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=10)  # two of them and the block: broken if one waits for another
    with side_by_side() as start:
        start(together.wait)
        start(together.wait)
        together.wait()
        start(slowly, tmp_path / "a")
    assert names(tmp_path) == {"a"}


def test_the_first_error_of_those_started_is_raised() -> None:
    other = threading.Event()

    def fail_late() -> None:
        other.wait(10)
        raise OutputError("started first")

    def fail_at_once() -> None:
        other.set()
        raise OutputError("failed first")

    def write() -> None:
        with side_by_side() as start:
            start(fail_late)
            start(fail_at_once)

    with pytest.raises(OutputError, match="started first"):
        write()


def test_ctrl_c_waits_for_what_is_being_written(tmp_path: Path) -> None:
    block_is_over = threading.Event()

    def interrupted(path: Path) -> None:
        block_is_over.wait(10)
        _thread.interrupt_main()
        slowly(path)

    def write() -> None:
        with write_folder_aside(tmp_path / "result", within=tmp_path) as folder, side_by_side() as start:
            start(interrupted, folder / "a")
            block_is_over.set()

    # who is in the background of a shell without job control ignores interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == set()
    time.sleep(0.4)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nobody_writes_once_the_block_has_raised(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with write_folder_aside(tmp_path / "result", within=tmp_path) as folder, side_by_side() as start:
            start(slowly, folder / "a")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == set()
    time.sleep(0.4)
    assert names(tmp_path) == set()
