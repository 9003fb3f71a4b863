"""The house, checked: who may import whom, one name on every floor, files that fit in a reader's head."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

import clone_fast
from clone_fast.checkpoints import save_network
from clone_fast.photo import save_png

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "clone_fast"
OPS = ("bias_act", "upfirdn2d", "modulated_conv2d", "laplacian_pyramid", "styles", "minibatch_stddev")
# on every floor, too, but with nothing to differentiate, nor to choose a backend for
IN_PLACE = ("adam", "scaled_copy")
MAX_LINES = 400

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("reads the checkout, and there is none", allow_module_level=True)


@dataclass(frozen=True)
class Layer:
    """A part of clone_fast and what it may import besides itself, the standard library and `errors`."""

    name: str
    imports: str = ""  # parts of clone_fast, anywhere in a file
    lazily: str = ""  # parts of clone_fast or other packages, inside a function only
    packages: str = "torch"  # other people's packages, anywhere in a file


ANY = "*"

# Read from the bottom: a layer imports layers that stand above it, so nothing goes round in a circle.
HOUSE = (
    Layer("errors", packages=""),
    Layer("_layout", packages=""),
    Layer("_compiler", packages=""),
    Layer("files", packages=""),
    Layer("stepwise", packages=""),
    Layer("reference", packages="torch"),
    Layer("kernels", packages="torch triton"),
    Layer("_C", packages=""),  # csrc, compiled; absent where there is no nvcc
    Layer("cuda", imports="_C _compiler kernels"),  # kernels: how memory is to lie, which both floors want the same way
    Layer("ops", imports="_compiler reference", lazily="kernels cuda _C triton"),
    Layer("nn", imports="_compiler ops"),
    Layer("losses", imports="ops"),
    Layer("checkpoints", imports="nn files", lazily="demo", packages="torch numpy safetensors"),
    Layer("photo", imports="files", packages="torch numpy PIL"),
    Layer("metrics", imports="nn stepwise", lazily="lpips", packages="torch numpy PIL pytorch_msssim"),
    Layer("progress"),
    Layer("settings", imports="nn"),
    Layer("memory", imports="nn settings"),
    Layer("capture", imports="ops"),
    Layer("stills", imports="nn capture"),
    Layer("compat", imports="ops capture", lazily=ANY),  # a target codebase is imported when it is to be accelerated
    Layer("descent", imports="capture ops"),
    Layer("draws", imports="capture nn"),
    Layer(
        "latent",
        imports="ops losses nn metrics progress capture descent memory stepwise",
        lazily="lpips",
        packages="torch tqdm",
    ),
    Layer("known", imports="ops"),
    Layer("players", imports="nn"),
    Layer("adversary", imports="ops losses known players nn descent settings"),
    Layer("iteration", imports="ops losses known nn progress settings capture descent draws latent adversary"),
    Layer("tweak", imports="iteration adversary losses nn progress settings memory latent stepwise"),
    Layer("rehearsal", imports="nn settings capture stills latent iteration"),
    Layer("edit", imports="nn checkpoints files", packages="torch numpy safetensors"),
    Layer("demo", imports="nn ops losses checkpoints photo metrics files", packages=ANY),
    Layer(
        "inversion",  # what invert returns: its files, its edits
        imports="latent tweak progress photo metrics edit checkpoints nn files",
        lazily="demo",
        packages="torch numpy safetensors",
    ),
    Layer(
        "invert",
        imports="inversion rehearsal latent tweak losses progress photo metrics edit checkpoints nn files stepwise "
        "stills",
        lazily="demo",
        packages="torch tqdm safetensors",
    ),
    Layer("tune", imports="invert tweak latent losses progress photo checkpoints"),
    Layer("many", imports="invert inversion tweak memory nn stepwise"),
    Layer(
        "report",
        imports="inversion invert metrics edit photo files",
        packages="torch numpy PIL matplotlib",
    ),
    Layer("processes"),
    Layer("lock", packages=""),
    Layer("folder", imports="many inversion report photo files processes lock", packages="torch tqdm"),
    Layer("options", imports="nn inversion", packages="torch click"),
    Layer("cli", imports=ANY, packages=ANY),
    Layer("__main__", imports="cli", packages=""),
)
LAYERS = {layer.name: layer for layer in HOUSE}
LAZY_UPWARDS = {("checkpoints", "demo")}  # the shipped network, when it is asked for by name


@dataclass(frozen=True)
class Import:
    """One imported name, and where it stands."""

    target: str  # dotted
    line: int
    lazy: bool  # inside a function, or for the type checker only


def python_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = ("clone_fast", *relative.parts) if relative.parts[0] == "kernels" else relative.parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """clone_fast.ops.upfirdn2d -> ops; clone_fast itself -> ''."""
    return (*module.split("."), "")[1]


def imports_in(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import statement, and every `import_module("...")` whose name starts with a literal."""

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        base = module.split(".")
        base = base[: len(base) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def literal(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr) and node.values:
            node = node.values[0]
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node)
            # `from clone_fast import ops` names a part, `from clone_fast.ops import upfirdn2d` is within one
            targets = [f"{base}.{alias.name}" for alias in node.names] if base == "clone_fast" else [base]
            yield from (Import(target, node.lineno, lazy) for target in targets)
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("import_module"):
            yield Import(literal(node.args[0]).rstrip("."), node.lineno, lazy)
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        inside = lazy or only_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), lazy=False)


def complaint(module: str, found: Import) -> str | None:
    """Why this import is against the table, or None."""
    own = layer_of(module)
    package, *rest = found.target.split(".")
    if package in {"", *sys.stdlib_module_names}:
        return None
    if own == "":  # clone_fast/__init__.py collects the public names
        return f"{module} imports cli" if rest[:1] == ["cli"] else None
    if own not in LAYERS:
        return f"{module} is in no layer: give {own!r} a line in HOUSE"
    layer = LAYERS[own]
    if package == "clone_fast":
        target = rest[0] if rest else "clone_fast itself"
        allowed = {own, "errors", *(LAYERS if layer.imports == ANY else layer.imports.split())}
    else:
        target, allowed = package, set(layer.packages.split())
    if found.lazy:
        allowed |= set(layer.lazily.split())
    if target in allowed or (package != "clone_fast" and ANY in allowed):
        return None
    return f"{module}:{found.line} imports {found.target}; {own} may import {', '.join(sorted(allowed))}"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_imports_follow_the_house(path: Path) -> None:
    found = imports_in(path.read_text(), module_name(path), is_package=path.name == "__init__.py")
    complaints = [text for one in found if (text := complaint(module_name(path), one))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("clone_fast.reference.upfirdn2d", "import numpy"),
        ("clone_fast.reference.upfirdn2d", "from clone_fast.ops import upfirdn2d"),
        ("clone_fast.reference.upfirdn2d", "from ..ops.checks import describe"),
        ("clone_fast.kernels.upfirdn2d", "from clone_fast.reference import upfirdn2d"),
        ("clone_fast.ops.upfirdn2d", "from clone_fast.kernels import upfirdn2d"),
        ("clone_fast.ops.upfirdn2d", "import importlib; importlib.import_module(f'clone_fast.kernels.{1}')"),
        ("clone_fast.ops.upfirdn2d", "import triton"),
        ("clone_fast.nn.layers", "from clone_fast import reference"),
        ("clone_fast.losses", "from .nn import layers"),
        ("clone_fast.compat.nvidia", "import torch_utils"),
        ("clone_fast.latent.optimise", "import clone_fast.tweak"),
        ("clone_fast.checkpoints.native", "from clone_fast.demo import portraits"),
        ("clone_fast.report", "def f():\n    from clone_fast import cli"),
        ("clone_fast.edit", "import clone_fast"),
        ("clone_fast", "from clone_fast.cli import main"),
        ("clone_fast.helpers", "import torch"),
    ],
)
def test_the_table_forbids(module: str, line: str) -> None:
    """The checker itself: each of these lines is against the rules, and is seen."""
    found = list(imports_in(line, module, is_package=False))
    assert any(complaint(module, one) for one in found), found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("clone_fast.reference.upfirdn2d", "import math\nimport torch.nn.functional as F"),
        ("clone_fast.kernels.upfirdn2d", "import triton.language as tl"),
        ("clone_fast.ops.upfirdn2d", "def f():\n    import clone_fast.kernels.upfirdn2d"),
        ("clone_fast.ops.upfirdn2d", "from ..errors import BackendError"),
        ("clone_fast.compat.nvidia", "def install():\n    import torch_utils"),
        ("clone_fast.checkpoints", "def demo_network():\n    from clone_fast.demo import portraits"),
    ],
)
def test_the_table_allows(module: str, line: str) -> None:
    found = imports_in(line, module, is_package=False)
    assert not [text for one in found if (text := complaint(module, one))]


def test_the_house_has_no_circle() -> None:
    """Every layer imports only layers that stand above it in the table."""
    above: set[str] = set()
    for layer in HOUSE:
        assert layer.imports == ANY or set(layer.imports.split()) <= above, layer.name
        lazy = {part for part in layer.lazily.split() if part in LAYERS}
        assert {part for part in lazy if (layer.name, part) not in LAZY_UPWARDS} <= above, layer.name
        above.add(layer.name)


@pytest.mark.parametrize("op", [*OPS, *IN_PLACE])
def test_op_has_a_room_on_every_floor(op: str) -> None:
    """Compulsory are reference, ops and tests; an op that a machine floor lacks runs on the reference."""
    rooms = (f"clone_fast/reference/{op}.py", f"clone_fast/ops/{op}.py", f"tests/test_{op}.py")
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def test_machine_floors_hold_ops_only() -> None:
    """What lies in kernels/ or csrc/ bears the name of an op; a helper is a header or starts with `_`."""
    stems = {path.stem for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc").glob("*.cu")]}
    assert {stem for stem in stems if not stem.startswith("_")} <= {*OPS, *IN_PLACE}


def test_kernels_is_a_namespace_package() -> None:
    """With an __init__.py the folder is the package `kernels`, which on PyPI is another project's name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_are_short() -> None:
    native = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cu", ".cuh", ".cpp", ".h"}]
    lengths = {relative(path): len(path.read_text().splitlines()) for path in [*python_files(), *native]}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_no_assert_as_validation(path: Path) -> None:
    """`python -O` removes asserts, and they tell a user nothing. One for mypy says so in its line."""
    source = path.read_text()
    asserts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    lines = source.splitlines()
    assert [f"line {n}" for n in asserts if "for the type checker" not in lines[n - 1]] == []


def test_public_names_are_documented() -> None:
    public = {name: getattr(clone_fast, name) for name in clone_fast.__all__}
    callables = {name: thing for name, thing in public.items() if callable(thing)}
    assert callables
    assert [name for name, thing in callables.items() if not documented(name, thing)] == []


def documented(name: str, thing: object) -> bool:
    """A text of its own: neither the base class's nor the signature that @dataclass writes."""
    if inspect.isclass(thing):
        text = vars(thing).get("__doc__") or ""
        return bool(text.strip()) and not text.startswith(f"{name}(")
    return bool(inspect.getdoc(thing))


HEAVY = ("torch._dynamo", "sympy")  # a second or more, from a disk
# On leaves, as on a GPU, so that what the ops do there for R1 is in it; reports how heavy what it needed was.
INVERSION = """
import sys
import clone_fast.cli, spec_leaf
from clone_fast.ops import dispatch
light = [name for name in (*HEAVY, "matplotlib", "triton") if name in sys.modules]
dispatch.leaf = lambda op, name: dispatch.Leaf(spec_leaf.steps(op))
for name, module in list(sys.modules.items()):
    if name.startswith("clone_fast.ops.") and hasattr(module, "resolve"):
        module.resolve = lambda *args: "triton"
registration, seconds = sys.modules["clone_fast.ops.registration"], []
composite = registration.composite_gradients
sys.modules["clone_fast.ops.minibatch_stddev"].composite_gradients = lambda *a: seconds.append(1) or composite(*a)
clone_fast.cli.main(["invert", *sys.argv[1:]], standalone_mode=False)
print(light, [name for name in HEAVY if name in sys.modules], bool(seconds))
"""


@pytest.mark.parametrize("networks", ["both", "delta"])
def test_importing_is_light(tmp_path: Path, networks: str) -> None:
    """What takes longer to import than this package waits until it is wanted."""
    save_network(tiny.network(), tmp_path / "tiny.safetensors")
    save_png(tmp_path / "photo.png", tiny.photo())
    code = f"HEAVY = {HEAVY}{INVERSION}"
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    steps = ["--latent-steps", "1", "--steps", "1", "--device", "cpu", "--mode", "clone", "--networks", networks]
    photo, network, out = (str(tmp_path / name) for name in ("photo.png", "tiny.safetensors", "out"))
    ended = subprocess.run(
        [sys.executable, "-c", code, photo, "--network", network, "--out", out, *steps],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n")[-2] == "[] [] True"
