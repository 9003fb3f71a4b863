"""Writing files so that none is ever half there."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from clone_fast.errors import OutputError


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file next to `path`, which it replaces in one step at the end; removed if the block raises.

    Raises:
        OutputError: the folder cannot be made or written, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target}: a directory; give a file name")
    aside = target.with_name(f".{uuid.uuid4().hex[:16]}.part")
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
