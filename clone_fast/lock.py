"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path

from clone_fast.errors import OutputError


class FolderLock:
    """A folder, held by one run of one or several processes, on one host or more. The system lets go of it for a
    process that ends, however it ends, so a lock that is held means a process that is alive.

    Byte i of the file `.lock` stands for process i. The first process takes all of them, which says that nobody is
    there, and gives all but its own to the others. The file stays: to remove it is a race.

    Raises:
        OutputError: the folder cannot be written, or another run holds it.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / ".lock").open("ab")
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error
        if rank:
            self._take(rank, 1)
        elif self._take(0, 0):  # length 0: to the end, wherever that may be
            fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)
        else:
            warnings.warn(f"{folder}: its file system has no locks; no other run may be at work there", stacklevel=2)

    def _take(self, start: int, length: int) -> bool:
        """False if this file system has no locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return False
            self.close()
            wanted = "wait for its processes, or end them"
            raise OutputError(f"{self._folder}: another run is at work there; {wanted}") from error
        return True

    def close(self) -> None:
        """Let go of it."""
        self._file.close()
