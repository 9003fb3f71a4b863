"""install() on codebases of rosinality's kind: extensions built at import, ops by value, modules, their variants."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from foreign import Import, assert_close, bindings, codebase, run
from torch import Tensor, nn
from torch.nn import functional as F

import clone_fast
from clone_fast.compat.plugins import PLUGINS


@pytest.fixture
def rosinality() -> Iterator[Import]:
    with codebase("rosinality") as module:
        yield module


@pytest.fixture
def pure() -> Iterator[Import]:
    with codebase("pure") as module:
        yield module


def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that is there before us, and gives what nvcc would."""
    from torch.utils import cpp_extension

    def load(name: str, sources: list[str], **kwargs: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(PLUGINS[name][1])
        return module

    monkeypatch.setattr(cpp_extension, "load", load)


OPS = {"op.upfirdn2d.upfirdn2d", "op.fused_act.fused_leaky_relu"}


def test_import_compiles_nothing(rosinality: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "_jit_compile", lambda *a, **k: pytest.fail("it compiles"))
    report = clone_fast.install()
    model = rosinality("model")
    assert report.replaced["torch.utils.cpp_extension.load"].served == 2
    assert report.replaced.keys() >= OPS | {"model.ModulatedConv2d"}, report
    assert all("the same in a trial" in report.replaced[where].evidence for where in OPS)
    run(model.Generator(), torch.randn(2, 3))
    assert all(report.replaced[where].served for where in OPS | {"model.ModulatedConv2d"}), report


def test_same_results_when_installed_after(
    rosinality: Import, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    compiled(monkeypatch)
    model, layers = rosinality("model"), rosinality("layers")
    network, style = model.Generator().to(device), torch.randn(2, 3).to(device)
    theirs = run(network, style)
    modules = [model, layers, rosinality("op"), rosinality("op.fused_act"), sys.modules["op.upfirdn2d"]]
    before = bindings(*modules)
    report = clone_fast.install()
    assert layers.upfirdn2d is model.upfirdn2d is sys.modules["op"].upfirdn2d
    assert_close(run(network, style), theirs)
    assert_close(run(copy.deepcopy(network), style), theirs)
    assert not any(entry.passed for where, entry in report.replaced.items() if where.startswith("op")), report
    clone_fast.uninstall()
    after = bindings(*modules)
    assert [two for one, two in zip(before, after, strict=True) if one[2] is not two[2]] == []
    assert_close(run(network, style), theirs, 0)


def test_its_own_gradients_over_our_extensions(rosinality: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest tier alone: their autograd functions, first and second order, on the functions of the two plugins."""
    clone_fast.install()
    model, layers = rosinality("model"), rosinality("layers")
    network, style = model.Generator(), torch.randn(2, 3)
    ours = run(network, style)
    clone_fast.uninstall()
    assert not hasattr(layers.upfirdn2d, "__wrapped__")
    assert_close(run(network, style), ours)


def test_state_and_class_stay(rosinality: Import) -> None:
    clone_fast.install()
    model = rosinality("model")
    network = model.Generator()
    assert type(network.activate) is rosinality("op").FusedLeakyReLU
    assert network.activate.negative_slope == 0.2  # the second argument by position, in this version
    assert list(dict(network.named_parameters())) == [
        "input",
        *(f"conv1.{name}" for name in ("weight", "modulation.weight", "modulation.bias")),
        "activate.bias",
        *(f"to_rgb.{name}" for name in ("weight", "modulation.weight", "modulation.bias")),
    ]


def test_deltas_of_every_sample(rosinality: Import) -> None:
    clone_fast.install()
    layer = rosinality("hyper").ModulatedConv2d(5, 4, 3, 3, upsample=True)
    clone_fast.uninstall()
    x, style = torch.randn(2, 5, 6, 6), torch.randn(2, 3)

    def outcome(delta: Tensor | None) -> list[Tensor]:
        y = layer(x, style, weights_delta=delta)
        wanted = [*layer.parameters(), *([] if delta is None else [delta])]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    deltas = [None, torch.randn(2, 4, 5, 3, 3, requires_grad=True), torch.randn(2, 4, 5, 1, 1, requires_grad=True)]
    theirs = [outcome(delta) for delta in deltas]
    report = clone_fast.install()
    for delta, expected in zip(deltas, theirs, strict=True):
        assert_close(outcome(delta), expected)
    assert report.replaced["hyper.ModulatedConv2d"].served == 3, report


def test_styles_as_input_are_left_alone(rosinality: Import) -> None:
    report = clone_fast.install()
    layer = rosinality("stylespace").ModulatedConv2d(5, 4, 3, 3)
    y, style = layer(torch.randn(2, 5, 6, 6), torch.randn(2, 3))
    assert style.shape == (2, 1, 5, 1, 1)
    again, _ = layer(torch.randn(2, 5, 6, 6), style, input_is_stylespace=True)
    assert again.shape == y.shape
    assert "input_is_stylespace=False" in report.left_alone["stylespace.ModulatedConv2d"]


def test_another_epsilon_is_seen_and_left_alone(rosinality: Import) -> None:
    report = clone_fast.install()
    module = rosinality("other_epsilon")
    assert not hasattr(module.ModulatedConv2d.forward, "__wrapped__")
    assert "it differs from ours: with " in report.left_alone["other_epsilon.ModulatedConv2d"]


def test_a_class_that_cannot_be_tried_is_left_alone(rosinality: Import) -> None:
    report = clone_fast.install()
    assert "it cannot be tried here: TypeError" in _with_class(report, rosinality)


def _with_class(report: clone_fast.compat.Report, module: Import) -> str:
    layers = module("layers")

    class ModulatedConv2d(nn.Module):
        def __init__(self, widths: dict[str, int]) -> None:
            super().__init__()

        def forward(self, input, style):  # type: ignore[no-untyped-def]
            return input

    ModulatedConv2d.__module__ = "layers"
    layers.ModulatedConv2d = ModulatedConv2d
    clone_fast.uninstall()
    return clone_fast.install().left_alone["layers.ModulatedConv2d"]


def test_a_module_that_was_changed_goes_its_own_way(rosinality: Import) -> None:
    """Another padding, half precision, hooks on what ours would skip: each the original's."""
    report = clone_fast.install()
    model = rosinality("model")
    x, style = torch.randn(2, 5, 6, 6), torch.randn(2, 3)
    layer = model.ModulatedConv2d(5, 4, 3, 3)
    layer.padding = 0
    assert layer(x, style).shape == (2, 4, 4, 4)
    layer = model.ModulatedConv2d(5, 4, 3, 3, upsample=True)
    seen: list[Tensor] = []
    layer.blur.register_forward_hook(lambda module, args, y: seen.append(y))
    layer(x, style)
    assert len(seen) == 1
    layer = model.ModulatedConv2d(5, 4, 3, 3).bfloat16()
    assert layer(x.bfloat16(), style.bfloat16()).dtype == torch.bfloat16
    entry = report.replaced["model.ModulatedConv2d"]
    assert (entry.served, entry.passed.total()) == (0, 3), report


def test_two_paddings_are_before_and_after(rosinality: Import) -> None:
    """The same numbers mean [x, y] in the other family."""
    clone_fast.install()
    y = rosinality("op").upfirdn2d(torch.randn(1, 1, 4, 4), torch.ones(3, 3), pad=(2, 1))
    assert y.shape == (1, 1, 5, 5)
    assert clone_fast.upfirdn2d(torch.randn(1, 1, 4, 4), torch.ones(3, 3), padding=[2, 1]).shape == (1, 1, 4, 6)


def test_kernel_in_the_dtype_of_the_image(rosinality: Import) -> None:
    clone_fast.install()
    x, kernel = torch.randn(1, 2, 6, 6).half(), torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 16
    y = rosinality("op").upfirdn2d(x, kernel.half(), up=2, pad=(2, 1))
    assert y.dtype == torch.float16
    expected = clone_fast.upfirdn2d(x, kernel, up=2, padding=[2, 1, 2, 1])
    torch.testing.assert_close(y, expected)


def test_pure_torch_needs_no_gpu(pure: Import) -> None:
    report = clone_fast.install()
    op = pure("op")
    assert all("the same in a trial" in report.replaced[where].evidence for where in OPS), report
    x, b = torch.randn(2, 3, 4, 4), torch.randn(3)
    expected = F.leaky_relu(x + b[:, None, None], 0.2) * 2**0.5
    torch.testing.assert_close(op.fused_leaky_relu(x, b), expected)
    torch.testing.assert_close(op.FusedLeakyReLU(3, False)(x), F.leaky_relu(x, 0.2) * 2**0.5)
    assert op.upfirdn2d(x, torch.ones(3, 3), pad=(1, 1)).shape == x.shape


@pytest.mark.parametrize("call", ["three axes", "a slope"])
def test_where_versions_differ_the_original_decides(pure: Import, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    report = clone_fast.install()
    op = pure("op")
    x, b = torch.randn(2, 3, 3), torch.randn(3)
    if call == "three axes":
        torch.testing.assert_close(op.fused_leaky_relu(x, b), F.leaky_relu(x + b, 0.2) * 2**0.5)
    else:
        torch.testing.assert_close(op.fused_leaky_relu(x[0], b, 0.5), F.leaky_relu(x[0] + b, 0.2) * 2**0.5)
    assert report.replaced["op.fused_act.fused_leaky_relu"].passed.total() == 1


def test_ops_that_cannot_run_here_are_known_by_signature_and_module(
    rosinality: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prebuilt extension that is missing, as in BasicSR: their NameError comes at the first call, ours serves it."""
    compiled(monkeypatch)
    fused = rosinality("op.fused_act")
    del fused.fused
    report = clone_fast.install()
    entry = report.replaced["op.fused_act.fused_leaky_relu"]
    assert "it cannot be tried here: NameError" in entry.evidence
    assert fused.FusedLeakyReLU(3)(torch.randn(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "sources", "options", "reason"),
    [
        ("mine", ["mine.cpp"], {}, "the extension 'mine' is not ours"),
        ("fused", ["fused_adam.cpp"], {}, "the extension 'fused' is made of fused_adam.cpp"),
        ("fused", ["fused_bias_act.cpp"], {"is_python_module": False}, "the extension 'fused' is no Python module"),
    ],
)
def test_other_extensions_are_built_as_ever(
    monkeypatch: pytest.MonkeyPatch, name: str, sources: list[str], options: dict[str, Any], reason: str
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "load", (built := cpp_extension.load))
    monkeypatch.setattr(cpp_extension, "_jit_compile", lambda *args, **kwargs: args[0])
    with clone_fast.installed() as report:
        assert cpp_extension.load(name, sources, **options) == name
        assert report.replaced["torch.utils.cpp_extension.load"].passed == {reason: 1}
    assert cpp_extension.load is built


@pytest.mark.parametrize(("act", "grad"), [(1, 0), (3, 0), (3, 1), (1, 1), (3, 2)])
def test_fused_plugin(act: int, grad: int) -> None:
    x, b, y = torch.randn(2, 3, 4, 4), torch.randn(3), torch.randn(2, 3, 4, 4)
    got = PLUGINS["fused"][1]["fused_bias_act"](x, b, y, act, grad, 0.3, 1.5)
    z = x + b[:, None, None]
    slope = {1: torch.ones_like(x), 3: torch.where((z if grad == 0 else y) > 0, 1.0, 0.3)}[act]
    torch.testing.assert_close(got, z * slope * 1.5 if grad < 2 else torch.zeros_like(x))


def test_upfirdn2d_plugin_with_channels_last() -> None:
    x, k = torch.randn(2, 6, 7, 3), torch.randn(3, 4)
    y = PLUGINS["upfirdn2d"][1]["upfirdn2d"](x, k, 2, 1, 1, 2, 2, 1, -1, 3)
    images = x.permute(0, 3, 1, 2)
    expected = clone_fast.upfirdn2d(images.contiguous(), k, up=[2, 1], down=[1, 2], padding=[2, 1, -1, 3])
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1))
