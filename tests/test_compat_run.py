"""`clone-fast run`, and what install() does to imports: scripts see what Python would show them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from foreign import TARGETS, codebase

import clone_fast
from clone_fast.compat.imports import ImportHook

ROOT = Path(clone_fast.__file__).parent.parent

SEEN = """
import json, pickle, sys, warnings
import beside

class Thing:
    pass

def test():
    spec = globals().get("__spec__")
    assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
    assert sys.modules["__main__"].__dict__ is globals()
    names = sorted(globals().keys() - {"__cached__", "__annotations__"})  # which not every Python has
    seen = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "spec": spec and spec.name}
    return {"names": names, **seen}

if __name__ == "__main__":
    print(json.dumps(test()))
"""


def python(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").touch()
    for folder in (tmp_path, tmp_path / "tool"):
        (folder / "seen.py").write_text(SEEN)
        (folder / "beside.py").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(SEEN)
    (tmp_path / "folder" / "beside.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    "call", [["tool/seen.py"], ["-m", "tool.seen"], ["{project}/folder"]], ids=["script", "module", "folder"]
)
def test_a_script_sees_what_python_shows(project: Path, call: list[str]) -> None:
    args = ["1", "--report", "-m", "--", "--help", "-x=y z"]
    call = [part.format(project=project) for part in call]
    theirs = json.loads(python(*call, *args, cwd=project).stdout)
    ours = json.loads(python("-m", "clone_fast", "run", *call, *args, cwd=project).stdout)
    assert ours == theirs
    assert ours["argv"][1:] == args


def test_a_script_that_needs_its_extensions_runs(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(TARGETS / 'rosinality')!r})\n"
        "import torch, model\nprint(tuple(model.Generator()(torch.randn(2, 3)).shape))\n"
    )
    done = python("-m", "clone_fast", "run", "--report", "train.py", cwd=tmp_path)
    assert done.stdout == "(2, 3, 16, 16)\n"
    assert "model.ModulatedConv2d -> clone_fast.modulated_conv2d" in done.stderr
    assert "2 calls served" in done.stderr


def test_what_a_script_raises_comes_through(tmp_path: Path) -> None:
    run = ("-m", "clone_fast", "run")
    (tmp_path / "ends.py").write_text("import sys; sys.exit(3)")
    python(*run, "ends.py", cwd=tmp_path, code=3)
    (tmp_path / "fails.py").write_text("import warnings; warnings.warn('mind'); raise EOFError('too short')")
    failed = python(*run, "fails.py", cwd=tmp_path, code=1)
    assert failed.stderr.rstrip().endswith("EOFError: too short")
    assert "fails.py:1: UserWarning: mind" in failed.stderr
    assert "During handling" not in failed.stderr
    missing = python(*run, "nothing.py", cwd=tmp_path, code=2)
    assert missing.stderr == "Error: nothing.py: no such script\n"


def test_imports_keep_their_loaders() -> None:
    with codebase("nvidia") as module:
        clone_fast.install()
        made = module("torch_utils.misc")
        assert type(made.__loader__).__name__ == "SourceFileLoader"
        assert "exec_module" not in vars(made.__loader__)
        assert "profiled_function" in made.__loader__.get_source("torch_utils.misc")


def test_reload_and_what_is_not_there() -> None:
    with codebase("nvidia") as module:
        report = clone_fast.install()
        bias_act = module("torch_utils.ops.bias_act")
        first = bias_act.bias_act
        importlib.reload(bias_act)
        assert bias_act.bias_act is not first
        assert hasattr(bias_act.bias_act, "__wrapped__"), report
        with pytest.raises(ModuleNotFoundError, match="nothing"):
            module("torch_utils.nothing")
        clone_fast.uninstall()
        assert not hasattr(bias_act.bias_act, "__wrapped__")
        assert not any(isinstance(finder, ImportHook) for finder in sys.meta_path)


def test_a_report_without_targets_says_so() -> None:
    with clone_fast.installed() as report:
        text = str(report)
    assert text.startswith(f"clone_fast: {len(report.replaced)} replaced, ")
    assert "On a CPU our ops run their reference" in text


def test_our_own_ops_are_not_a_target() -> None:
    before = clone_fast.bias_act, clone_fast.upfirdn2d, clone_fast.modulated_conv2d
    with clone_fast.installed() as report:
        assert before == (clone_fast.bias_act, clone_fast.upfirdn2d, clone_fast.modulated_conv2d)
        assert not any(where.startswith("clone_fast") for where in {**report.replaced, **report.left_alone})
