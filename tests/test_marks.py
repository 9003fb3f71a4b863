"""Rehearsals that a process before has compiled are not run again: what a mark stands for, and who leaves one.

Without a GPU: nothing is compiled, and the marks lie in a folder of the test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from clone_fast import capture, invert
from clone_fast.adversary import Adversary
from clone_fast.capture import Captured, alike
from clone_fast.errors import MemoryLimitError
from clone_fast.latent import LatentSettings
from clone_fast.nn import Precision
from clone_fast.ops import backend, dispatch, marks
from clone_fast.tweak import TweakSettings

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"latent_steps": 2, "steps": 2, "device": "cpu"}
KIND = ("invert", tiny.arch(), None, alike(LatentSettings()), alike(TweakSettings()), (True, (1, 0.5), torch.half))

# A process of its own; on standard output: how many rehearsals were run in it.
SCRIPT = """
import json, sys
import tiny
from clone_fast import capture, invert
from clone_fast.ops import marks
ran = []
def compile_ahead(run, device):
    ran.append(device)
    run()
    return True
capture.compile_ahead, marks.compiles = compile_ahead, lambda device: True
for options in json.loads(sys.argv[1]):
    invert(tiny.photo(), tiny.network(), **options)
print(len(ran))
"""


class Machine:
    """What would compile.

    Attributes:
        ran: rehearsals that were run.
        works: whether it compiles all that they want.
        folder: of the marks.
    """

    def __init__(self, folder: Path) -> None:
        self.ran, self.works, self.folder = 0, True, folder

    def compile_ahead(self, run: Callable[[], None], device: torch.device) -> bool:
        self.ran += 1
        run()
        return self.works

    def in_a_new_process(self, act: Callable[..., Any], *args: Any, **options: Any) -> int:
        """How many rehearsals it runs."""
        capture._rehearsed.clear()
        before = self.ran
        act(*args, **options)
        return self.ran - before


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path / "cache" / "clone_fast")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(found.folder.parent))
    monkeypatch.setattr(capture, "compile_ahead", found.compile_ahead)
    monkeypatch.setattr(capture, "_rehearsed", set())
    monkeypatch.setattr(marks, "compiles", lambda device: True)
    return found


def inversion(**changes: Any) -> None:
    invert(tiny.photo(), tiny.network(), **OPTIONS | changes)


# ---- who runs --------------------------------------------------------------------------------------------------------


def test_a_later_process_runs_none(tmp_path: Path) -> None:
    """Neither that of the whole nor those within it, which the stages ask for; and the hash of a word, which differs
    from process to process, does not matter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    counts = []
    for seed, options in enumerate([OPTIONS, OPTIONS | {"steps": 3}, OPTIONS | {"precision": "bf16"}]):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", SCRIPT, json.dumps([options])]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        counts.append(int(ended.stdout.split()[-1]))
    assert counts == [1, 0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "recon"},
        {"precision": "bf16"},
        {"tweak_settings": TweakSettings(r1_gamma=0.0)},
        {"latent_settings": LatentSettings(space="w")},
        {"latent": tiny.latent(tiny.network())},
        {"real_images": torch.zeros(2, 3, 16, 16)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_kind_is_rehearsed(changes: dict[str, Any], machine: Machine) -> None:
    assert machine.in_a_new_process(inversion) == 1
    assert machine.in_a_new_process(inversion, **changes) == 1
    assert machine.in_a_new_process(inversion, **changes) == 0
    assert machine.in_a_new_process(inversion) == 0


def test_networks_and_labels_are_told_apart(machine: Machine) -> None:
    def conditional(label: int | None) -> None:
        invert(tiny.photo(), tiny.network(c_dim=3), label=label, mode="recon", **OPTIONS)

    ran = [machine.in_a_new_process(conditional, label) for label in (None, 1, 2)]
    other = machine.in_a_new_process(invert, tiny.photo(32), tiny.network(resolution=32), mode="recon", **OPTIONS)
    assert (ran, other) == ([1, 1, 0], 1)


def test_what_has_no_name_is_rehearsed_as_ever(machine: Machine) -> None:
    """A loss of one's own: nobody knows what it launches."""
    options = {"similarity": lambda image, photo: (image - photo).square().mean()}
    assert machine.in_a_new_process(inversion, **options) == 1
    assert machine.in_a_new_process(inversion, **options) == 1
    assert len(capture._rehearsed) > 1


def test_those_within_have_marks_of_their_own(machine: Machine) -> None:
    def act(kinds: list[str]) -> None:
        inner = [Captured(lambda: None, CPU, kind) for kind in kinds]
        capture.rehearse(CPU, ("outer", *kinds), lambda: [one.rehearse() for one in inner] and None)

    assert machine.in_a_new_process(act, ["one", "two"]) == 1
    assert machine.in_a_new_process(Captured(lambda: None, CPU, "two")) == 0
    assert machine.in_a_new_process(act, ["two"]) == 1
    assert len(list(machine.folder.iterdir())) == 4


# ---- who leaves a mark -----------------------------------------------------------------------------------------------


def test_a_failure_leaves_none(machine: Machine) -> None:
    machine.works = False
    assert machine.in_a_new_process(inversion) == 1
    assert not machine.folder.exists()
    machine.works = True
    assert machine.in_a_new_process(inversion) == 1
    assert machine.in_a_new_process(inversion) == 0


def test_an_error_leaves_none(machine: Machine) -> None:
    def broken() -> None:
        capture.rehearse(CPU, "within", lambda: None)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        capture.rehearse(CPU, "broken", broken)
    assert not machine.folder.exists()
    assert not capture.rehearsing()


def test_a_full_memory_leaves_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not fit may fit the next time."""

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Adversary, "turn", full)
        with pytest.raises(MemoryLimitError):
            inversion()
    assert not machine.folder.exists()
    assert machine.in_a_new_process(inversion) == 1
    assert machine.in_a_new_process(inversion) == 0


def test_without_the_cache_there_are_none(machine: Machine) -> None:
    assert machine.in_a_new_process(inversion) == 1
    for mark in machine.folder.iterdir():
        assert not mark.stat().st_size
        mark.unlink()
    assert machine.in_a_new_process(inversion) == 1


def test_a_folder_that_cannot_be_written_has_none(machine: Machine) -> None:
    machine.folder.parent.write_text("a file")
    assert machine.in_a_new_process(inversion) == 1
    assert machine.in_a_new_process(inversion) == 1


def test_where_nothing_is_compiled_there_are_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "compiles", dispatch.compiles)
    assert machine.in_a_new_process(inversion) == 1
    assert marks.name(CPU, KIND) is None
    assert not machine.folder.exists()


@pytest.mark.parametrize("failed", ["", "ended by signal 9"])
def test_what_compiling_side_by_side_says(failed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clone_fast.kernels import _ahead

    monkeypatch.setattr(_ahead, "compile_ahead", lambda run: _ahead.Outcome(3, failed))
    assert not dispatch.compile_ahead(lambda: None, CPU)
    monkeypatch.setattr(dispatch, "compiles", lambda device: True)
    assert dispatch.compile_ahead(lambda: None, CPU) is not bool(failed)


# ---- what it is called -----------------------------------------------------------------------------------------------


def test_its_name_is_within_tritons_cache(machine: Machine) -> None:
    name = marks.name(CPU, KIND)
    assert name is not None
    assert Path(name).parent == machine.folder
    assert name == marks.name(CPU, KIND)


UNNAMED = (object(), int, nn.Linear, tiny.network(), lambda: None, frozenset("ab"))


@pytest.mark.parametrize("kind", UNNAMED, ids=lambda kind: type(kind).__name__)
def test_what_differs_between_processes_has_none(kind: Any, machine: Machine) -> None:
    assert marks.name(CPU, ("kind", kind)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, 1),
        (1, 1.0),
        ("1", 1),
        (None, "None"),
        (("a", "b"), ("a', 'b",)),
        ((("a",), "b"), ("a", ("b",))),
        (tiny.arch(), replace(tiny.arch(), mapping_layers=3)),
        (torch.half, torch.bfloat16),
    ],
    ids=str,
)
def test_kinds_are_told_apart(one: Hashable, other: Hashable, machine: Machine) -> None:
    assert marks.name(CPU, one) != marks.name(CPU, other)


def test_what_is_set_around_it_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [marks.name(CPU, KIND)]
    monkeypatch.setenv("CLONE_FAST_STRICT", "0")
    names.append(marks.name(CPU, KIND))
    with Precision.named("tf32").active():
        names.append(marks.name(CPU, KIND))
    with backend("triton"):
        names.append(marks.name(CPU, KIND))
    with torch.autocast("cpu"):
        names.append(marks.name(CPU, KIND))
    monkeypatch.setitem(dispatch._leaves, ("styles", "cuda"), "another reason")
    names.append(marks.name(CPU, KIND))
    for chip, count in (("H200", 132), ("H200", 16), ("H100", 132)):
        properties = types.SimpleNamespace(name=chip, major=9, minor=0, multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        names.append(marks.name(torch.device("cuda:1"), KIND))
        assert marks.name(torch.device("cuda:0"), KIND) == names[-1]
    for built in (("2.13", "3.7", "sources", ""), ("2.13", "3.6", "sources", ""), ("2.13", "3.6", "others", "1 2")):
        monkeypatch.setattr(marks, "_built", lambda found=built: found)
        names.append(marks.name(CPU, KIND))
    assert None not in names
    assert len(set(names)) == len(names)


def test_what_it_is_built_from() -> None:
    import triton

    torch_version, triton_version, sources, extension = marks._built()
    assert (torch_version, triton_version) == (torch.__version__, triton.__version__)
    assert sources == marks._digest([ROOT / "clone_fast", ROOT / "kernels"]) or not (ROOT / "kernels").exists()
    assert len(sources) == 64
    assert (extension == "") == isinstance(dispatch.leaf("bias_act", "cuda"), str)


def test_sources_are_told_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = [tmp_path / "a" / "one.py", tmp_path / "a" / "two.py"]
    for file in files:
        file.write_text("x = 1")
    first = marks._digest([tmp_path])
    (tmp_path / "a" / "other.txt").write_text("no source")
    os.utime(files[0], (0, 0))
    assert marks._digest([tmp_path]) == first
    os.utime(files[0], (1, 1))
    times = files[0].stat()
    files[0].write_text("x = 2")
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert marks._digest([tmp_path]) != first
    files[0].write_text("x = 1")
    files[1].rename(tmp_path / "a" / "three.py")
    assert marks._digest([tmp_path]) != first
