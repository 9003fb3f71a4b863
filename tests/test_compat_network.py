"""accelerate() on loaded networks: out of a pickle with its source, of imported classes, copies; and what it leaves."""

from __future__ import annotations

import copy
import importlib
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from foreign import TARGETS, Import, assert_close, bindings, built, code_of, codebase, run  # noqa: F401 (built: a fixture)
from torch import Tensor, nn

import clone_fast

Copy = Callable[[nn.Module], nn.Module]


def saved(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    assert b"clone_fast" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network))


COPIES: dict[str, Copy] = {"itself": lambda one: one, "deepcopy": copy.deepcopy, "pickle": pickled, "saved": saved}


@dataclass(frozen=True)
class Target:
    """A network of tests/targets, and which of its ops it calls."""

    family: str
    name: str
    input: tuple[int, ...]
    ops: tuple[str, ...]

    def load(self, module: Import) -> nn.Module:
        """NVIDIA's as G.pkl is loaded, its classes made of the source that it brings; rosinality's as its class."""
        if self.family == "rosinality":
            return getattr(module("model"), self.name)()
        data = pickle.dumps(getattr(module("training.networks"), self.name)())
        module("torch_utils.persistence")._src_to_module_dict.clear()
        network: nn.Module = pickle.loads(data)
        assert code_of(network).__module__.startswith("_imported_module_")
        return network

    def ops_of(self, network: nn.Module) -> set[str]:
        """Their dotted names in the report."""
        return {op.replace("SOURCE", code_of(network).__module__) for op in self.ops}


MODULATED, BIAS_ACT = "SOURCE.modulated_conv2d", "torch_utils.ops.bias_act.bias_act"
RESAMPLE, UPFIRDN2D = "torch_utils.ops.conv2d_resample.conv2d_resample", "torch_utils.ops.upfirdn2d.upfirdn2d"
THEIRS = ("op.fused_act.fused_leaky_relu", "op.upfirdn2d.upfirdn2d")
LOADED = (
    Target("nvidia", "Generator", (2, 3), (MODULATED, BIAS_ACT, UPFIRDN2D)),
    Target("nvidia", "Discriminator", (2, 3, 8, 6), (BIAS_ACT, RESAMPLE)),
    Target("rosinality", "Generator", (2, 3), ("model.ModulatedConv2d", *THEIRS)),
    Target("rosinality", "Discriminator", (2, 3, 8, 6), THEIRS),
)


@pytest.fixture(params=LOADED, ids=lambda target: f"{target.family}-{target.name}")
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture
def module(target: Target) -> Iterator[Import]:
    with codebase(target.family) as load:
        yield load


@pytest.fixture
def rosinality() -> Iterator[Import]:
    with codebase("rosinality") as load:
        yield load


def served(report: clone_fast.compat.Report) -> set[str]:
    """The ops that answered every call; not the networks, which there are graphs of on a GPU alone."""
    ops = {where: entry for where, entry in report.replaced.items() if entry.by.startswith("clone_fast.")}
    return {where for where, entry in ops.items() if entry.served and not entry.passed}


@pytest.mark.parametrize("made", COPIES)
def test_same_results_on_our_ops(module: Import, target: Target, made: str, device: torch.device) -> None:
    """Values, first and second derivatives; of the object itself and of copies, before and after."""
    network = target.load(module).to(device)
    w = torch.randn(target.input).to(device)
    theirs = run(network, w)
    before = COPIES[made](network)
    report = clone_fast.accelerate(network)
    for one in (before, COPIES[made](network)):
        assert_close(run(one, w), theirs)
    assert served(report) == target.ops_of(network), report
    assert not report.left_alone, report


def test_to_the_last_digit_in_float64(module: Import, target: Target) -> None:
    network = target.load(module).double()
    for part in network.modules():  # NVIDIA's filters are float32 whatever the network is
        if "resample_filter" in part._buffers:
            part.resample_filter = part.resample_filter.float()  # type: ignore[assignment, operator]
    w = torch.randn(target.input, dtype=torch.float64)
    theirs = run(network, w)
    report = clone_fast.accelerate(network)
    assert_close(run(network, w), theirs, 1e-11)
    assert served(report) == target.ops_of(network), report


def test_nothing_in_the_object_changes(module: Import, target: Target) -> None:
    network = target.load(module)

    def seen() -> list[object]:
        parts = [(name, type(part), sorted(vars(part))) for name, part in network.named_modules()]
        return [*parts, *((name, id(p)) for name, p in network.named_parameters()), *network.state_dict()]

    before, data = seen(), pickle.dumps(network)
    clone_fast.accelerate(network)
    assert seen() == before
    assert pickle.dumps(network) == data


def test_it_loads_where_we_are_not(module: Import, target: Target, tmp_path: Path) -> None:
    network = target.load(module)
    w = torch.randn(target.input)
    clone_fast.accelerate(network)
    torch.save(network, tmp_path / "network.pt")
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(network))
    torch.save({"w": w, "y": network(w).detach()}, tmp_path / "seen.pt")
    paths = [str(TARGETS / target.family), *([str(TARGETS / "pure")] if target.family == "rosinality" else [])]
    (tmp_path / "without.py").write_text(
        "import pickle, sys, torch\n"
        "sys.modules['clone_fast'] = None  # importing it fails\n"
        f"for path in {paths}: sys.path.insert(0, path)\n"
        "torch.Tensor.cuda = lambda x: x  # which pure calls\n"
        "seen = torch.load('seen.pt')\n"
        "for network in (pickle.load(open('network.pkl', 'rb')), torch.load('network.pt', weights_only=False)):\n"
        "    torch.testing.assert_close(network(seen['w']), seen['y'], rtol=1e-4, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "without.py"], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


def test_uninstall_undoes_it(module: Import, target: Target) -> None:
    network = target.load(module)
    names = {code_of(network).__module__, *(op.rpartition(".")[0] for op in target.ops_of(network))}
    theirs = [module(name) for name in sorted(names)]
    before = bindings(*theirs)
    report = clone_fast.accelerate(network)
    assert any(one[2] is not two[2] for one, two in zip(before, bindings(*theirs), strict=True))
    clone_fast.uninstall()
    assert all(one[2] is two[2] for one, two in zip(before, bindings(*theirs), strict=True))
    network(torch.randn(target.input))
    assert not served(report)


def test_it_looks_at_this_network_only(module: Import, target: Target) -> None:
    """Neither at what is imported later, nor at builders of extensions; `install` does, and keeps what is there."""
    from torch.utils import cpp_extension

    network, load, path = target.load(module), cpp_extension.load, list(sys.meta_path)
    report = clone_fast.accelerate(network)
    assert cpp_extension.load is load
    assert sys.meta_path == path
    again = clone_fast.accelerate(network)
    assert again.replaced == report.replaced
    whole = clone_fast.install()
    assert len(sys.meta_path) == len(path) + 1
    assert all(whole.replaced[where] is entry for where, entry in report.replaced.items())
    assert clone_fast.accelerate(network).replaced == report.replaced


def test_the_end_of_installed_is_the_end_of_all(module: Import, target: Target) -> None:
    report = clone_fast.accelerate(target.load(module))
    with clone_fast.installed():
        assert all(entry.active for entry in report.replaced.values())
    assert not any(entry.active for entry in report.replaced.values())


def test_features_inside_of_a_network(module: Import, target: Target) -> None:
    """Hooks that read and change them, on every layer, see what they saw."""
    network = target.load(module)
    w = torch.randn(target.input)
    seen: list[Tensor] = []

    def hook(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        seen.append(y.detach().clone())
        return y * 1.1 + 0.3

    for name, layer in network.named_children():
        if name.startswith("conv"):
            layer.register_forward_hook(hook)
    theirs, features = run(network, w), list(seen)
    seen.clear()
    report = clone_fast.accelerate(network)
    assert_close(run(network, w), theirs)
    assert_close(seen, features)
    assert served(report) == target.ops_of(network), report


def test_deltas_of_every_sample_are_served(rosinality: Import) -> None:
    layer = rosinality("hyper").ModulatedConv2d(5, 4, 3, 3, upsample=True)
    x, style, delta = torch.randn(2, 5, 6, 6), torch.randn(2, 3), torch.randn(2, 4, 5, 3, 3, requires_grad=True)

    def outcome() -> list[Tensor]:
        y = layer(x, style, weights_delta=delta)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [delta, *layer.parameters()])]

    theirs = outcome()
    report = clone_fast.accelerate(layer)
    assert_close(outcome(), theirs)
    assert report.replaced["hyper.ModulatedConv2d"].served == 1


UNKNOWN = {
    "stylespace": "its forward is unknown: (self, input, style, input_is",
    "other_epsilon": "it differs from ours: ",
}


@pytest.mark.parametrize("variant", UNKNOWN)
def test_unknown_variants_are_left_alone(rosinality: Import, variant: str) -> None:
    """Their modulated convolution, that is; the op within is known, and ours."""
    layer = rosinality(variant).ModulatedConv2d(5, 4, 3, 3, upsample=True)
    forward, x, style = type(layer).forward, torch.randn(2, 5, 6, 6), torch.randn(2, 3)
    theirs = layer(x, style)
    report = clone_fast.accelerate(nn.Sequential(layer))
    assert type(layer).forward is forward
    torch.testing.assert_close(layer(x, style), theirs)
    assert UNKNOWN[variant] in report.left_alone.pop(f"{variant}.ModulatedConv2d")
    assert not report.left_alone
    assert served(report) == {"op.upfirdn2d.upfirdn2d"}, report


def test_styles_as_input(rosinality: Import) -> None:
    """Of a class that takes them, on both ways through it; NVIDIA's function has no other input anyway."""
    layer = rosinality("stylespace").ModulatedConv2d(5, 4, 3, 3, upsample=True)
    x, w = torch.randn(2, 5, 6, 6), torch.randn(2, 3)
    theirs, style = layer(x, w)
    clone_fast.accelerate(layer)
    torch.testing.assert_close(layer(x, style, input_is_stylespace=True), (theirs, style))


def test_an_object_with_a_forward_of_its_own(rosinality: Import) -> None:
    network = rosinality("model").Generator()
    layer = network.to_rgb
    layer.forward = MethodType(lambda self, input, style: input[:, :3] * 2, layer)
    w = torch.randn(2, 3)
    theirs = network(w)
    report = clone_fast.accelerate(network)
    assert_close([network(w)], [theirs])
    assert report.left_alone == {"to_rgb": "this object has a forward of its own"}
    assert report.replaced["model.ModulatedConv2d"].served == 1


def test_a_class_that_its_module_has_no_more(rosinality: Import) -> None:
    model = rosinality("model")
    network, w = model.Generator(), torch.randn(2, 3)
    theirs = run(network, w)
    importlib.reload(model)
    assert not isinstance(network, model.Generator)
    report = clone_fast.accelerate(network)
    assert_close(run(network, w), theirs)
    assert report.replaced["model.ModulatedConv2d"].served == 2
    del sys.modules["model"]
    assert "its module is no longer imported" in str(clone_fast.accelerate(network))


def test_what_is_none_of_these() -> None:
    report = clone_fast.accelerate(nn.Sequential(nn.Linear(2, 3)))
    assert report.left_alone == {"Sequential": "nothing of another codebase that is known"}
    with pytest.raises(TypeError, match=r"accelerate: network must be a torch.nn.Module, got dict"):
        clone_fast.accelerate({"G_ema": nn.Linear(2, 3)})  # type: ignore[arg-type]


def test_classes_of_the_script_itself(tmp_path: Path) -> None:
    paths = [str(TARGETS / "pure"), str(TARGETS / "rosinality")]
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path[:0] = {paths}\n"
        + (TARGETS / "rosinality" / "model.py").read_text()
        + "import clone_fast\n"
        "torch.Tensor.cuda = lambda x: x  # which pure calls\n"
        "network, w = Generator(), torch.randn(2, 3)\n"
        "theirs = network(w)\n"
        "report = clone_fast.accelerate(network)\n"
        "torch.testing.assert_close(network(w), theirs, rtol=1e-4, atol=1e-5)\n"
        "assert report.replaced['__main__.ModulatedConv2d'].served == 2, report\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(clone_fast.__file__).parent.parent)}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, env=env)
