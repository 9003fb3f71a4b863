"""Many photos: a folder in, a folder of clones out, by one process or by several that share the work.

Every photo has one place for its result, which follows from its name alone, and a result comes there in one step. So
what is there is done, and a run can be killed at any moment and started again. Photos are handed out one at a time: a
slow one holds up nobody but the process that has it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clone_fast.errors import BackendError, CheckpointError, CloneFastError, OutputError, SettingsError
from clone_fast.files import remove_leftovers, write_folder_aside
from clone_fast.inversion import Inversion
from clone_fast.lock import FolderLock
from clone_fast.many import invert_each
from clone_fast.photo import photo_files
from clone_fast.processes import Processes, processes
from clone_fast.report import save_result

StrPath = str | os.PathLike[str]

OF_THE_RUN = (SettingsError, CheckpointError, BackendError)
"""Errors of an inversion that say nothing about its photo: the next photo would meet the same."""

LOOK = 0.5  # seconds between two looks of the first process at what the others have done


@dataclass
class Tally:
    """What a run over a folder came to.

    Attributes:
        done: photos of which this run made the result.
        skipped: photos whose result was there before.
        failures: (photo, reason) of those that have none, in the order in which they failed.
        ended: processes that ended before their work was done.
        seconds: from the first photo handed out to the last result.
    """

    done: int
    skipped: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_hour(self) -> float:
        """Photos done in an hour at this rate."""
        return self.done / self.seconds * 3600 if self.seconds else 0.0


def result_folder(photo: str, out: StrPath) -> Path:
    """Where the result of a photo goes: a folder with the photo's whole name, suffix and subfolder too.

    So no two photos have the same one, nor one inside of another's, whatever else is in their folder.
    """
    return Path(out) / photo


def is_done(photo: str, out: StrPath) -> bool:
    """Whether the result of a photo is there; it comes in one step, so what is there is whole."""
    return (result_folder(photo, out) / "metrics.json").is_file()


def invert_folder(
    photos: StrPath,
    out: StrPath,
    network: StrPath | None = None,
    *,
    at_once: int | None = None,
    networks: str = "both",
    device: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Tally | None:
    """Invert every photo of a folder whose result is not there yet, together with the other processes of the run.

    Args:
        photos: a folder, see `clone_fast.photo.photo_files`; `out` is left out of it.
        out: where the results go, see `result_folder`; no two runs can be at work there at the same time.
        network: as for `invert`; opened once by each process.
        at_once: photos that a process has in hand at a time, see `invert_each`.
        networks: how much of the tweaked networks is kept, see `Inversion.save`.
        device: as for `invert`; with several processes "auto" and "cuda" mean a GPU for each.
        quiet: no progress on stderr; failures are still told there, as they happen.
        options: those of `invert`, the same for every photo.

    Returns:
        The tally of all processes, in the first one; None in the others. A photo that cannot be inverted is a failure
        in it, and not an error.

    Raises:
        PhotoError, OutputError: there are no photos, the results cannot be written there, or another run is at work.
        CheckpointError, SettingsError, BackendError: no photo can be inverted so.
        GroupError: the other processes are out of reach; what this one had in hand is written.
        KeyboardInterrupt: Ctrl-C; nothing is kept of what was in hand.
    """
    source, target = Path(photos), Path(out)
    with processes() as group:
        options["device"] = group.device(device)
        lock: FolderLock | None = None

        def plan() -> tuple[list[str], int]:
            nonlocal lock
            names = _names(source, target)
            lock = FolderLock(target, 0)
            remove_leftovers(target)
            todo = [name for name in names if not is_done(name, target)]
            return todo, len(names) - len(todo)

        try:
            agreed = group.agree(plan)
            if agreed is None:  # the first process tells why
                return None
            todo, skipped = agreed
            lock = lock or FolderLock(target, group.rank)
            with _Board(group, len(todo), quiet) as board:
                if todo:
                    _work(group, source, target, todo, networks, {"network": network, "at_once": at_once, **options})
                ended = group.finish()
            return board.tally(todo, target, skipped, ended) if group.rank == 0 else None
        finally:
            if lock is not None:
                lock.close()


def _names(source: Path, target: Path) -> list[str]:
    """The photos relative to their folder, without what lies in the folder of the results."""
    if source.resolve() == target.resolve():
        raise OutputError(f"{target}: holds the photos; results are named after them and need another folder")
    results = target.resolve()
    return [
        path.relative_to(source).as_posix() for path in photo_files(source) if results not in path.resolve().parents
    ]


def _work(
    group: Processes, source: Path, target: Path, todo: list[str], networks: str, options: dict[str, Any]
) -> None:
    """Invert photos of `todo` until all are handed out."""
    mine: list[str] = []

    def hand_out() -> Iterator[Path]:
        for number in group.numbers(len(todo)):
            mine.append(todo[number])
            yield source / todo[number]

    for index, outcome in invert_each(hand_out(), **options):
        name = mine[index]
        if isinstance(outcome, OF_THE_RUN):
            raise outcome
        reason = str(outcome) if isinstance(outcome, CloneFastError) else _keep(outcome, name, target, networks)
        del outcome  # an error too keeps tensors alive, and the next photo needs the memory
        if reason is None:
            group.add("done", 1)
        else:
            reason = " ".join(reason.split()).removeprefix(f"{source / name}: ")
            group.append("failures", json.dumps([name, reason]) + "\n")
            group.add("failed", 1)  # after the text: who sees the number finds the line


def _keep(inversion: Inversion, name: str, target: Path, networks: str) -> str | None:
    """Write a result into its place; returns why it cannot be written."""
    if inversion.settings.get("interrupted"):  # what was cut short must not stand there as done
        raise KeyboardInterrupt
    try:
        with write_folder_aside(result_folder(name, target), within=target) as folder:
            save_result(inversion, folder, networks=networks)
    except (CloneFastError, torch.OutOfMemoryError) as error:
        return str(error)
    return None


class _Board:
    """What the first process tells of all: one line of progress, and failures as they come. In the others, nothing.

    It looks from a thread of its own, since the first process is at work like the others.
    """

    def __init__(self, group: Processes, total: int, quiet: bool) -> None:
        self._group, self._total, self._quiet = group, total, quiet
        self._failures: list[tuple[str, str]] = []
        self._began, self._seconds = time.monotonic(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._stderr = sys.stderr
        self._bar: Any = None

    def __enter__(self) -> _Board:
        if self._group.rank == 0:
            from tqdm import tqdm

            # Not on a terminal a bar is a line of a log: rarely, then.
            interval = 0.1 if self._stderr.isatty() else 10.0
            self._bar = tqdm(
                total=self._total, desc="photos", unit="photo", mininterval=interval, file=self._stderr,
                disable=self._quiet or not self._total, dynamic_ncols=True,
            )  # fmt: skip
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.monotonic() - self._began
        if self._bar is not None:
            self._stop.set()
            self._thread.join()
            self._look()
            self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK):
            self._look()

    def _look(self) -> None:
        done, failed = self._group.add("done", 0), self._group.add("failed", 0)
        if failed > len(self._failures):
            for line in self._group.text("failures").splitlines()[len(self._failures) :]:
                name, reason = json.loads(line)
                self._failures.append((name, reason))
                self._bar.write(f"Failed: {name}: {reason}", file=self._stderr)
        rate = done / (time.monotonic() - self._began) * 3600
        self._bar.set_postfix_str(f"{rate:.0f} an hour, {failed} failed", refresh=False)
        self._bar.update(max(0, done + failed - self._bar.n))

    def tally(self, todo: list[str], target: Path, skipped: int, ended: list[int]) -> Tally:
        """Of all processes, once they are done or gone."""
        failed = {name for name, _ in self._failures}
        lost = [name for name in todo if name not in failed and not is_done(name, target)]
        failures = [*self._failures, *((name, "the process that had it ended") for name in lost)]
        return Tally(len(todo) - len(failures), skipped, failures, ended, self._seconds)
