"""Writing files and folders so that none is ever half there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clone_fast.errors import OutputError

_ASIDE = re.compile(r"\.[0-9a-f]{16}\.part")


Start = Callable[..., None]
"""start(write, *arguments): `write` is called with them by a thread, and the caller goes on."""


@contextmanager
def side_by_side() -> Iterator[Start]:
    """Files that are written at the same time, and while the block goes on: encoding, copying and fsync leave the GIL.

    All that was started is over when the block is, however that ends. What the block raises is raised; or else the
    first error of those that were started, in this order.
    """
    started: list[Future[Any]] = []
    threads = ThreadPoolExecutor()

    def start(write: Callable[..., object], *arguments: Any) -> None:
        started.append(threads.submit(write, *arguments))

    try:
        yield start
        for each in started:
            each.result()
    finally:
        threads.shutdown()  # waits, after Ctrl-C too: nobody writes into a folder that is being removed


def _aside(folder: Path) -> Path:
    """A hidden name that nobody else has; `remove_leftovers` knows it."""
    return folder / f".{uuid.uuid4().hex[:16]}.part"


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file next to `path`, which it replaces in one step at the end; removed if the block raises.

    Raises:
        OutputError: the folder cannot be made or written, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target}: a directory; give a file name")
    aside = _aside(target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # the parent may be no directory at all
            aside.unlink(missing_ok=True)


@contextmanager
def write_folder_aside(path: str | os.PathLike[str], within: str | os.PathLike[str]) -> Iterator[Path]:
    """A new hidden folder in `within`, which becomes `path` in one step at the end; removed if the block raises.

    Files in it are best written with `write_aside`, which brings their bytes to the disk; this does so for their names.

    Args:
        path: what is to be there; nothing but an empty folder is ever replaced.
        within: a folder of the same file system, where `remove_leftovers` looks after a run that was killed.

    Raises:
        OutputError: a folder cannot be made or written, or there is something at `path`.
    """
    target, aside = Path(path), _aside(Path(within))
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(aside, target)
        _sync(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone, if all went well


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk: a file's own fsync does not."""
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what was written aside in this folder and never renamed. Nobody may be writing there.

    Raises:
        OutputError: one cannot be removed.
    """
    try:
        for path in Path(folder).iterdir():
            if _ASIDE.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path)
            elif _ASIDE.fullmatch(path.name):
                path.unlink()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be cleared of unfinished results ({error})") from error
