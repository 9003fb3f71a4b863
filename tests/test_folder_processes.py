"""invert-folder by several processes: the work is shared, none of it lost, and whoever dies takes nobody along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_world import World, assert_one_line, build, copies, folder_command, results, run, tree

from clone_fast.inversion import Inversion
from clone_fast.processes import Processes

HERE = Path(__file__).resolve().parent
PATIENCE = 120  # seconds after which a run that does not end is a failure


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


class Run:
    """A run of several processes on one machine."""

    def __init__(self, launcher: subprocess.Popen[str], folder: Path, size: int, *arguments: object) -> None:
        self.launcher, self.said, self.errors = launcher, folder / "said", folder / "errors"
        order = {"size": size, "arguments": [str(argument) for argument in arguments]}
        assert launcher.stdin is not None
        launcher.stdin.write(json.dumps({**order, "said": str(self.said), "errors": str(self.errors)}) + "\n")
        launcher.stdin.flush()
        self.pids: list[int] = self.answer()["pids"]
        self.ended = False

    def answer(self) -> dict[str, list[int]]:
        assert self.launcher.stdout is not None
        return json.loads(self.launcher.stdout.readline())

    def finish(self) -> tuple[list[int], str, str]:
        """Exit codes by rank, stdout, stderr. A run that does not end is killed, and has codes of its own then."""
        guard = threading.Timer(PATIENCE, self.send, [signal.SIGKILL])
        guard.start()
        codes = self.answer()["codes"]
        guard.cancel()
        self.ended = True
        return codes, self.said.read_text(), self.errors.read_text()

    def send(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):  # it ended before
                os.kill(pid, number)

    def stop_in_a_write(self, out: Path, after: int = 0) -> None:
        """All processes, while a result is being written and so many are there; to be killed or continued."""
        end = time.monotonic() + PATIENCE
        while True:
            while not (unfinished(out) and len(results(out)) >= after):
                assert time.monotonic() < end
                time.sleep(0.001)
            self.send(signal.SIGSTOP)
            while not all(stopped(pid) for pid in self.pids):
                time.sleep(0.001)
            if unfinished(out):
                return
            self.send(signal.SIGCONT)  # it was there just in time


def stopped(pid: int) -> bool:
    """T in /proc: the signal has come through; Z or nothing there: it ended before."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(
        [sys.executable, str(HERE / "forked.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        yield process


@pytest.fixture
def start(world: World, launcher: subprocess.Popen[str], tmp_path: Path) -> Iterator[Any]:
    """start(size, photos, out): a run that does not outlive the test."""
    runs: list[Run] = []

    def start(size: int, photos: Path, out: Path) -> Run:
        folder = tmp_path / f"run{len(runs)}"
        folder.mkdir()
        runs.append(Run(launcher, folder, size, *folder_command(world, photos, out)))
        return runs[-1]

    yield start
    for one in runs:
        if not one.ended:
            one.send(signal.SIGKILL)
            one.finish()


def unfinished(out: Path) -> list[Path]:
    return list(out.glob(".*.part"))


def test_three_processes_share_a_folder(world: World, tmp_path: Path, start: Any) -> None:
    names = copies(world, tmp_path / "photos", 4)
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    codes, said, errors = start(3, tmp_path / "photos", tmp_path / "out").finish()
    assert codes == [1, 0, 0], errors
    assert results(tmp_path / "out") == names
    assert not unfinished(tmp_path / "out")
    # one summary and one line of progress, of the first process, with the failure of whichever had that photo
    assert said.count("done      4 in ") == 1
    assert said.count("failed    bad.png: is not an image") == 1
    assert errors.count("Failed: bad.png: is not an image") == 1
    assert "5/5" in errors
    # who had a photo changes nothing about its clone
    alone = run(*folder_command(world, tmp_path / "photos", tmp_path / "alone"))
    assert alone.exit_code == 1
    for name in names:
        one, other = (Inversion.load(tmp_path / out / name) for out in ("out", "alone"))
        assert torch.equal(one.image, other.image)


@pytest.mark.parametrize("after", [0, 2])
def test_killed_in_the_middle_of_a_write_and_started_again(
    world: World, tmp_path: Path, start: Any, after: int
) -> None:
    names = copies(world, tmp_path / "photos", 6)
    out = tmp_path / "out"
    killed = start(2, tmp_path / "photos", out)
    killed.stop_in_a_write(out, after)
    killed.send(signal.SIGKILL)
    assert killed.finish()[0] == [-signal.SIGKILL] * 2
    assert unfinished(out)
    before = results(out)
    assert after <= len(before) < len(names)
    kept = {name: tree(out / name) for name in before}
    codes, said, errors = start(2, tmp_path / "photos", out).finish()
    assert codes == [0, 0], errors
    assert f"done      {len(names) - len(before)} in " in said
    assert results(out) == names
    assert not unfinished(out)
    assert {name: tree(out / name) for name in before} == kept
    for name in names:
        Inversion.load(out / name)


def test_a_process_that_dies_does_not_stop_the_others(world: World, tmp_path: Path, start: Any) -> None:
    names = copies(world, tmp_path / "photos", 8)
    out = tmp_path / "out"
    running = start(3, tmp_path / "photos", out)
    running.stop_in_a_write(out)
    os.kill(running.pids[1], signal.SIGKILL)
    running.send(signal.SIGCONT)
    codes, said, errors = running.finish()
    assert codes == [1, -signal.SIGKILL, 0], errors
    assert "ended     process 1, before its work was done" in said
    lost = [name for name in names if name not in results(out)]
    assert len(lost) <= 1  # what it had in hand
    for name in lost:
        assert f"failed    {name}: the process that had it ended" in said
    codes, said, errors = start(2, tmp_path / "photos", out).finish()
    assert codes == [0, 0], errors
    assert results(out) == names
    assert not unfinished(out)


def test_without_the_first_process_the_others_end(world: World, tmp_path: Path, start: Any) -> None:
    """It holds the store; what the others have in hand is written all the same."""
    copies(world, tmp_path / "photos", 8)
    out = tmp_path / "out"
    running = start(3, tmp_path / "photos", out)
    running.stop_in_a_write(out)
    os.kill(running.pids[0], signal.SIGKILL)
    running.send(signal.SIGCONT)
    codes, _, errors = running.finish()
    assert codes == [-signal.SIGKILL, 2, 2], errors
    assert errors.count("Error: ") == 2
    assert "Traceback" not in errors
    for name in results(out):
        Inversion.load(out / name)


def test_what_is_wrong_with_all_of_it_is_told_once(world: World, tmp_path: Path, start: Any) -> None:
    codes, said, errors = start(2, tmp_path / "nowhere", tmp_path / "out").finish()
    assert codes == [2, 0]
    assert said == ""
    assert errors.splitlines() == [f"Error: {tmp_path / 'nowhere'}: is not a folder of photos"]


@pytest.mark.slow
def test_by_torchrun(world: World, tmp_path: Path) -> None:
    """The command of the README."""
    names = copies(world, tmp_path / "photos", 3)
    command = folder_command(world, tmp_path / "photos", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clone_fast",
         *map(str, command)],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == names
    assert done.stdout.count("done      3 in ") == 1


def test_a_launcher_that_says_too_little(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    copies(world, tmp_path / "photos", 1)
    assert_one_line(run(*folder_command(world, tmp_path / "photos", tmp_path / "out")), "did not come together", "RANK")


def test_no_number_is_handed_out_twice() -> None:
    """Many at once ask for the next one, over one store."""
    store = dist.HashStore()
    got: list[list[int]] = [[] for _ in range(8)]

    def ask(rank: int) -> None:
        got[rank].extend(Processes(rank, 8, store).numbers(500))

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in got for number in numbers) == list(range(500))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    group = Processes(11, 16, dist.HashStore())
    assert [group.device(name) for name in ("auto", "cuda", None)] == ["cuda:3"] * 3
    assert [group.device(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    assert chosen == ["cuda:3"] * 3 + ["cuda:1"]
    assert Processes(0, 1, dist.HashStore()).device("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert group.device("auto") == "auto"
