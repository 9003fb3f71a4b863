"""What is published: the files of the wheel, its metadata and command, the pins, the folder of the kernels.

The tests of `Installed` need no checkout: the gate runs them against the wheel in an environment of its own.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import clone_fast

ROOT = Path(__file__).resolve().parent.parent
IS_CHECKOUT = (ROOT / "pyproject.toml").exists()
needs_checkout = pytest.mark.skipif(not IS_CHECKOUT, reason="reads the checkout, and there is none")
MOUNT = "from clone_fast._layout import mount_kernels\n\nmount_kernels()\n"
# where it is not the distribution's
IMPORT_NAMES = {"pillow": "PIL", "scikit-image": "skimage", "pytorch-msssim": "pytorch_msssim"}


def python(*args: str, cwd: Path, **env: str) -> str:
    """Run this interpreter elsewhere; its output, or a failure that shows its errors."""
    command, env = [sys.executable, *args], {**os.environ, **env}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestInstalled:
    def test_version_is_one(self) -> None:
        assert metadata.version("clone_fast") == clone_fast.__version__

    def test_python_and_licence(self) -> None:
        about = metadata.metadata("clone_fast")
        assert about["Requires-Python"] == ">=3.10"
        assert about["License-Expression"] == "MIT"

    def test_types_are_shipped(self) -> None:
        assert resources.files("clone_fast").joinpath("py.typed").is_file()

    def test_demo_network_is_shipped(self) -> None:
        network = resources.files("clone_fast").joinpath("demo", "generator.safetensors")
        assert network.is_file()

    def test_kernels_are_a_namespace_of_ours(self) -> None:
        kernels = importlib.import_module("clone_fast.kernels")
        assert kernels.__file__ is None
        assert [folder for folder in kernels.__path__ if Path(folder, "README.md").is_file()]

    def test_command_starts_main(self) -> None:
        (command,) = metadata.entry_points(group="console_scripts", name="clone-fast")
        assert command.value == "clone_fast.cli:main"
        assert callable(command.load())

    def test_module_runs_as_the_command(self, tmp_path: Path) -> None:
        assert "demo" in python("-m", "clone_fast", "--help", cwd=tmp_path)

    def test_import_needs_no_extra(self, tmp_path: Path) -> None:
        """Whoever installs the bare package can import it and see the command's help."""
        code = (
            "import sys\n"
            "for extra in ('skimage', 'lpips', 'scipy', 'hypothesis', 'pytest'):\n"
            "    sys.modules[extra] = None\n"
            "import clone_fast, clone_fast.cli\n"
        )
        python("-c", code, cwd=tmp_path)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel built from a copy of the checkout by the build backend, without a network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("clone_fast", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})", cwd=tree)
    (wheel,) = out.iterdir()
    return set(zipfile.ZipFile(wheel).namelist())


@needs_checkout
class TestWheel:
    def test_every_module_is_in_it(self, names: set[str]) -> None:
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "clone_fast").rglob("*.py")}
        sources |= {f"clone_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
        assert sources <= names

    def test_data_is_in_it(self, names: set[str]) -> None:
        networks = {str(path.relative_to(ROOT)) for path in (ROOT / "clone_fast").rglob("*.safetensors")}
        assert {"clone_fast/py.typed", "clone_fast/kernels/README.md", *networks} <= names

    def test_nothing_else_is_in_it(self, names: set[str]) -> None:
        tops = {name.split("/")[0] for name in names}
        assert tops == {"clone_fast", f"clone_fast-{clone_fast.__version__}.dist-info"}
        assert "clone_fast/kernels/__init__.py" not in names


@needs_checkout
class TestSetup:
    def test_setup_imports_setuptools_only(self) -> None:
        """pip runs setup.py before any dependency is there: no torch, and no network either."""
        modules = imported_packages(ast.walk(ast.parse((ROOT / "setup.py").read_text())))
        offline = sys.stdlib_module_names - {"urllib", "http", "socket", "ftplib"}
        assert modules <= {"setuptools", *offline}

    def test_build_brings_its_tools(self) -> None:
        """What compiles csrc/ comes with pip: ninja and pybind11; the compiler is the machine's."""
        requires = re.search(r"^requires = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        assert requires
        names = {canonicalize_name(Requirement(line).name) for line in ast.literal_eval(requires.group(1))}
        assert names == {"setuptools", "ninja", "pybind11"}

    def test_sources_of_the_extension_are_published(self) -> None:
        assert "graft csrc" in (ROOT / "MANIFEST.in").read_text().splitlines()

    def test_gate_can_be_executed(self) -> None:
        assert os.access(ROOT / ".ci" / "run", os.X_OK)

    @pytest.mark.parametrize("extras", ["demo", "test", "lint", "dev"])
    def test_every_dependency_is_pinned_once(self, extras: str) -> None:
        names = [canonicalize_name(pin.name) for pin in pins()]
        assert len(names) == len(set(names))
        wanted = {canonicalize_name(need.name) for need in declared(extras)} - {"clone-fast"}
        assert wanted <= set(names)

    def test_pins_are_exact_and_come_from_anywhere(self) -> None:
        """One `==` each, no address, no local version: from where, and for which hardware, pip decides."""
        for pin in pins():
            assert pin.url is None
            assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier)), pin

    def test_pins_meet_the_lower_bounds(self) -> None:
        tested = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins()}
        for extras in ("", "demo", "test", "lint"):
            for need in declared(extras):
                assert need.specifier.contains(tested[canonicalize_name(need.name)]), need

    def test_imports_are_declared(self) -> None:
        """At module level the package imports only what pip installs with it."""
        sources = (path.read_text() for path in (ROOT / "clone_fast").rglob("*.py"))
        imported = set().union(*(imported_packages(ast.parse(source).body) for source in sources))
        ours = {IMPORT_NAMES.get(need.name, need.name) for need in declared("")} | {"clone_fast"}
        assert imported - set(sys.stdlib_module_names) <= ours


@needs_checkout
class TestCheckoutLayout:
    """`kernels/` at the root is `clone_fast.kernels`, and nothing else at the root gets into the package."""

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for folder in ("clone_fast", "kernels", "elsewhere"):
            (tmp_path / folder).mkdir()
        shutil.copy(ROOT / "clone_fast" / "_layout.py", tmp_path / "clone_fast")
        (tmp_path / "clone_fast" / "__init__.py").write_text(MOUNT)
        (tmp_path / "kernels" / "probe.py").write_text("FOUND = True\n")
        (tmp_path / "setup.py").write_text("raise SystemExit('setup.py was imported')\n")
        return tmp_path

    def run(self, tree: Path, code: str) -> str:
        return python("-S", "-c", code, cwd=tree / "elsewhere", PYTHONPATH=str(tree)).strip()

    def test_package_mounts_the_kernels(self) -> None:
        assert "mount_kernels()" in (ROOT / "clone_fast" / "__init__.py").read_text()

    def test_kernels_beside_the_package(self, tree: Path) -> None:
        code = "from clone_fast import kernels as k; from clone_fast.kernels import probe as p; "
        code += "print(p.__name__, p.FOUND, k.__file__)"
        assert self.run(tree, code) == "clone_fast.kernels.probe True None"

    def test_find_spec_sees_them(self, tree: Path) -> None:
        code = (
            "import importlib, importlib.util as u, clone_fast; importlib.invalidate_caches()\n"
            "print(*(u.find_spec('clone_fast.kernels' + n) is not None for n in ('', '.probe', '.absent')))"
        )
        assert self.run(tree, code) == "True True False"

    def test_root_is_not_part_of_the_package(self, tree: Path) -> None:
        code = "import pkgutil, clone_fast as c; print(*(m.name for m in pkgutil.iter_modules(c.__path__)))"
        assert self.run(tree, code) == "_layout"

    def test_kernels_inside_the_package_win(self, tree: Path) -> None:
        (tree / "clone_fast" / "kernels").mkdir()
        (tree / "clone_fast" / "kernels" / "probe.py").write_text("FOUND = 'inside'\n")
        assert self.run(tree, "import clone_fast.kernels.probe as p; print(p.FOUND)") == "inside"

    def test_a_strangers_kernels_are_left_alone(self, tree: Path) -> None:
        (tree / "kernels" / "__init__.py").write_text("")
        code = "import importlib.util as u, clone_fast; print(u.find_spec('clone_fast.kernels'))"
        assert self.run(tree, code) == "None"


def imported_packages(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names of what these statements import; relative imports are our own."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def pins() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def declared(extra: str) -> list[Requirement]:
    """What the installed metadata asks for: with no extra the package's own, else what the extra adds."""
    needs = [Requirement(line) for line in metadata.requires("clone_fast") or []]
    if not extra:
        return [need for need in needs if "extra" not in str(need.marker)]
    return [need for need in needs if f'extra == "{extra}"' in str(need.marker)]
