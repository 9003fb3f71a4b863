"""install() on a codebase of NVIDIA's kind: attributes, values, pickles with their source, the ABI of its plugins."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from foreign import TARGETS, Import, assert_close, bindings, code_of, codebase, run
from torch import Tensor

import clone_fast
from clone_fast.compat import nvidia as dialect
from clone_fast.compat.plugins import PLUGINS

OPS = ("bias_act", "upfirdn2d", "conv2d_resample")
ALL = {f"torch_utils.ops.{op}.{op}" for op in OPS} | {"training.networks.modulated_conv2d"}


@pytest.fixture
def nvidia() -> Iterator[Import]:
    with codebase("nvidia") as module:
        yield module


def expected(module: Import, device: str | torch.device = "cpu") -> tuple[torch.nn.Module, Tensor, list[Tensor]]:
    network = module("training.networks").Generator().to(device)
    w = torch.randn(2, 3).to(device)
    return network, w, run(network, w)


@pytest.mark.parametrize("before", [True, False])
def test_same_results_whenever_it_is_installed(nvidia: Import, before: bool, device: torch.device) -> None:
    if before:
        clone_fast.install()
    networks = nvidia("training.networks")
    clone_fast.uninstall()
    network, w, theirs = expected(nvidia, device)
    report = clone_fast.install()
    assert report.replaced.keys() >= ALL, report
    assert all("the same in a trial" in report.replaced[where].evidence for where in ALL)
    assert_close(run(network, w), theirs)
    for where in ALL - {"torch_utils.ops.conv2d_resample.conv2d_resample"}:  # within modulated_conv2d, which is ours
        assert report.replaced[where].served > 0, report
        assert not report.replaced[where].passed, report
    recorded = {where for where, told in report.replaced.items() if told.by == "CUDA graphs of itself"}
    assert recorded == {"training.networks.Generator", "training.networks.Discriminator"}
    assert networks.conv2d_resample.upfirdn2d is networks.upfirdn2d.upfirdn2d  # one bound by value, one at home


def test_uninstall_restores_every_binding(nvidia: Import) -> None:
    modules = [nvidia(f"torch_utils.ops.{op}") for op in OPS]
    modules += [nvidia("training.networks"), nvidia("torch_utils.persistence"), nvidia("torch_utils.custom_ops")]
    modules += [sys.modules["torch.utils.cpp_extension"]]
    before, path = bindings(*modules), list(sys.meta_path)
    clone_fast.install()
    assert any(one[2] is not two[2] for one, two in zip(before, bindings(*modules), strict=True))
    clone_fast.uninstall()
    after = bindings(*modules)
    assert [name for one, name in zip(before, after, strict=True) if one[2] is not name[2]] == []
    assert sys.meta_path == path


def test_what_took_ours_by_value_is_restored_too(nvidia: Import) -> None:
    clone_fast.install()
    resample, upfirdn2d = (nvidia(f"torch_utils.ops.{name}") for name in ("conv2d_resample", "upfirdn2d"))
    kept = upfirdn2d.upfirdn2d
    assert resample.upfirdn2d is kept
    report = clone_fast.install()
    clone_fast.uninstall()
    assert resample.upfirdn2d is upfirdn2d.upfirdn2d is inspect.unwrap(kept)
    served = report.replaced["torch_utils.ops.upfirdn2d.upfirdn2d"].served
    kept(torch.randn(1, 1, 4, 4), None)  # a reference that somebody kept is the original's now
    assert report.replaced["torch_utils.ops.upfirdn2d.upfirdn2d"].served == served


def test_install_twice_and_nested(nvidia: Import) -> None:
    bias_act = nvidia("torch_utils.ops.bias_act")
    theirs = bias_act.bias_act
    report = clone_fast.install()
    assert clone_fast.install() is report
    with clone_fast.installed() as inner:
        assert inner is report
    assert bias_act.bias_act is not theirs
    clone_fast.uninstall()
    clone_fast.uninstall()
    with clone_fast.installed():
        assert bias_act.bias_act is not theirs
    assert bias_act.bias_act is theirs


def test_modules_out_of_a_pickle(nvidia: Import) -> None:
    """Pickled before, loaded where its source is known to nobody: before and after install, as G.pkl is."""
    network, w, theirs = expected(nvidia)
    data = pickle.dumps(network)
    persistence = nvidia("torch_utils.persistence")

    def load() -> torch.nn.Module:
        persistence._src_to_module_dict.clear()
        return pickle.loads(data)

    loaded = load()
    report = clone_fast.install()
    assert_close(run(loaded, w), theirs)
    name = f"{code_of(loaded).__module__}.modulated_conv2d"
    assert name.startswith("_imported_module_")
    assert report.replaced[name].served > 0
    later = load()
    assert type(later) is not type(loaded)
    assert_close(run(later, w), theirs)
    assert report.replaced[f"{code_of(later).__module__}.modulated_conv2d"].served > 0
    made = sys.modules[code_of(later).__module__]
    clone_fast.uninstall()
    assert not hasattr(made.modulated_conv2d, "__wrapped__")


def test_deepcopy_and_pickle_without_us(nvidia: Import, tmp_path: Path) -> None:
    network, w, theirs = expected(nvidia)
    clone_fast.install()
    assert_close(run(copy.deepcopy(network), w), theirs)
    data = pickle.dumps(network)
    assert b"clone_fast" not in data
    whole = io.BytesIO()
    torch.save(network, whole)
    assert b"clone_fast" not in whole.getvalue()
    torch.save({"w": w.detach(), "y": theirs[0]}, tmp_path / "seen.pt")
    (tmp_path / "network.pkl").write_bytes(data)
    (tmp_path / "without.py").write_text(
        "import pickle, sys, torch\n"
        f"sys.path.insert(0, {str(TARGETS / 'nvidia')!r})\n"
        "import types; pkg = types.ModuleType('pkg_resources'); sys.modules['pkg_resources'] = pkg\n"
        "network = pickle.load(open('network.pkl', 'rb'))\n"
        "seen = torch.load('seen.pt')\n"
        "torch.testing.assert_close(network(seen['w']), seen['y'], rtol=1e-4, atol=1e-5)\n"
        "assert 'clone_fast' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "without.py"], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


def test_signatures_stay(nvidia: Import) -> None:
    modules = [nvidia(f"torch_utils.ops.{op}") for op in OPS]
    before = [(inspect.signature(f), f.__name__, f.__module__) for f in map(getattr, modules, OPS)]
    clone_fast.install()
    ours = [getattr(module, op) for module, op in zip(modules, OPS, strict=True)]
    assert [(inspect.signature(f), f.__name__, f.__module__) for f in ours] == before
    assert [pickle.loads(pickle.dumps(f)) for f in ours[:2]] == ours[:2]  # their decorator hides the third from pickle


def test_names_that_others_import_stay_theirs(nvidia: Import) -> None:
    clone_fast.install()
    upfirdn2d, bias_act = (nvidia(f"torch_utils.ops.{name}") for name in ("upfirdn2d", "bias_act"))
    assert upfirdn2d._parse_padding([1, 2]) == [1, 1, 2, 2]
    assert upfirdn2d._get_filter_size(torch.zeros(3, 4)) == (4, 3)
    assert bias_act.activation_funcs["lrelu"].def_gain == pytest.approx(2**0.5)
    assert bias_act.activation_funcs["swish"].cuda_idx == 9


@pytest.mark.parametrize("op", ["bias_act", "upfirdn2d", "conv2d_resample", "modulated_conv2d"])
def test_positional_order(nvidia: Import, op: str) -> None:
    """Every case of the trial, with its arguments by position, against the original in this very process."""
    clone_fast.install()
    home = nvidia("training.networks" if op == "modulated_conv2d" else f"torch_utils.ops.{op}")
    ours = getattr(home, op)
    theirs, order = ours.__wrapped__, list(inspect.signature(getattr(dialect, op)).parameters.values())
    for case in getattr(dialect, f"{op}_cases")():
        bound = dict(zip((p.name for p in order), case.args, strict=False)) | case.kwargs
        positions = [bound.get(p.name, p.default) for p in order]
        torch.testing.assert_close(ours(*positions), theirs(*positions), rtol=0.02, atol=1e-3)


def test_float16_keeps_what_overflows_without_normalisation(nvidia: Import) -> None:
    networks = nvidia("training.networks")
    x, w, s = torch.randn(2, 5, 8, 8).half(), torch.randn(4, 5, 3, 3) * 1e3, torch.randn(2, 5) * 1e3
    theirs = networks.modulated_conv2d(x, w, s, padding=1)
    report = clone_fast.install()
    ours = networks.modulated_conv2d(x, w, s, padding=1)
    assert report.replaced["training.networks.modulated_conv2d"].served == 1
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding": [1, 1]}, {"up": 4, "padding": 1}])
def test_what_ours_is_not_made_for_is_the_originals(nvidia: Import, options: dict[str, object]) -> None:
    networks = nvidia("training.networks")
    f = networks.upfirdn2d.setup_filter([1, 3, 3, 1])
    call = (torch.randn(2, 5, 8, 8), torch.randn(4, 5, 3, 3), torch.randn(2, 5))
    theirs = networks.modulated_conv2d(*call, resample_filter=f, **options)
    report = clone_fast.install()
    assert torch.equal(networks.modulated_conv2d(*call, resample_filter=f, **options), theirs)
    entry = report.replaced["training.networks.modulated_conv2d"]
    assert (entry.served, entry.passed.total()) == (0, 1)
    assert "1 passed on: " in str(report)


def test_bad_input_meets_the_originals_errors(nvidia: Import) -> None:
    bias_act, upfirdn2d = (nvidia(f"torch_utils.ops.{name}") for name in ("bias_act", "upfirdn2d"))
    clone_fast.install()
    with pytest.raises(AssertionError):
        bias_act.bias_act(torch.randn(2, 3), torch.randn(3).half())
    with pytest.raises(KeyError):
        bias_act.bias_act(torch.randn(2, 3), act="mish")
    with pytest.raises(AssertionError):
        upfirdn2d.upfirdn2d(torch.randn(1, 2, 4, 4), torch.ones(4).half())
    with pytest.raises(TypeError):
        upfirdn2d.upfirdn2d(torch.randn(1, 2, 4, 4), torch.ones(4), nonsense=1)


def test_autocast_and_the_reference_that_was_asked_for(nvidia: Import) -> None:
    networks, bias_act = nvidia("training.networks"), nvidia("torch_utils.ops.bias_act")
    report = clone_fast.install()
    with torch.autocast("cpu", torch.bfloat16):
        y = networks.modulated_conv2d(torch.randn(2, 5, 8, 8), torch.randn(4, 5, 3, 3), torch.randn(2, 5), padding=1)
    assert y.dtype == torch.bfloat16
    assert "autocast decides the original's dtypes" in report.replaced["training.networks.modulated_conv2d"].passed
    bias_act.bias_act(torch.randn(2, 3), impl="ref")
    assert report.replaced["torch_utils.ops.bias_act.bias_act"].passed == {"impl='ref' was asked for": 1}


def test_unknown_signatures_are_left_alone(nvidia: Import) -> None:
    other = nvidia("training.networks_stylegan3").modulated_conv2d
    report = clone_fast.install()
    assert nvidia("training.networks_stylegan3").modulated_conv2d is other
    assert "its signature is unknown: (x, w, s, demodulate=True" in str(report)


def test_another_meaning_is_left_alone(nvidia: Import) -> None:
    """The signature is right and the module is; one constant is not."""
    bias_act = nvidia("torch_utils.ops.bias_act")
    bias_act.activation_funcs["lrelu"].def_alpha = 0.1
    theirs = bias_act.bias_act
    report = clone_fast.install()
    assert bias_act.bias_act is theirs
    reason = report.left_alone["torch_utils.ops.bias_act.bias_act"]
    assert reason.startswith("it differs from ours: with act='lrelu' results differ by")


def test_old_module_of_setuptools_is_there_for_who_asks_and_no_longer(nvidia: Import) -> None:
    present = "pkg_resources" in sys.modules
    clone_fast.install()
    assert nvidia("torch_utils.ops.conv2d_gradfix").old is False
    assert ("pkg_resources" in sys.modules) == present


def test_installing_draws_no_random_number(nvidia: Import) -> None:
    state = torch.get_rng_state()
    clone_fast.install()
    nvidia("training.networks")
    assert torch.equal(torch.get_rng_state(), state)


class FromPlugin(torch.autograd.Function):
    """bias_act as its codebase wraps the plugin: y is kept for all but swish, which keeps x."""

    @staticmethod
    def forward(ctx, x, b, act, alpha, gain, clamp):  # type: ignore[no-untyped-def]
        none = x.new_empty(0)
        call = PLUGINS["bias_act_plugin"][1]["bias_act"]
        y = call(x, b, none, none, none, 0, 1, act, alpha, gain, clamp)
        ctx.save_for_backward(x, b, y)
        ctx.options = (1, act, alpha, gain, clamp)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = FromPluginBackward.apply(dy, *ctx.saved_tensors, ctx.options)
        return dx, dx.sum([0, 2, 3]), None, None, None, None


class FromPluginBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, b, y, options):  # type: ignore[no-untyped-def]
        none, (dim, act, *rest) = x.new_empty(0), options
        refs = (x, none) if act == 9 else (none, y)
        ctx.save_for_backward(dy, x, b, y)
        ctx.options = options
        call = PLUGINS["bias_act_plugin"][1]["bias_act"]
        return call(dy, b if act == 9 else none, *refs, none, 1, dim, act, *rest)

    @staticmethod
    def backward(ctx, ddx):  # type: ignore[no-untyped-def]
        (dy, x, b, y), (dim, act, *rest) = ctx.saved_tensors, ctx.options
        none = x.new_empty(0)
        refs = (x, none) if act == 9 else (none, y)
        call = PLUGINS["bias_act_plugin"][1]["bias_act"]
        d_dy = FromPluginBackward.apply(ddx, x, b, y, ctx.options)
        d_x = call(ddx, b if act == 9 else none, *refs, dy, 2, dim, act, *rest)
        return d_dy, d_x, d_x.sum([0, 2, 3]), None, None


@pytest.mark.parametrize("act", range(1, 10))
@pytest.mark.parametrize("clamp", [-1.0, 0.5])
def test_bias_act_plugin(act: int, clamp: float) -> None:
    """Values, first and second derivatives of every activation against our own op."""
    name = dialect.ACTIVATIONS[act - 1]
    x, b = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x.requires_grad_()
    b.requires_grad_()
    v = torch.randn_like(x)

    def outcome(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((y * v).sum(), (x, b), create_graph=True)
        energy = (first[0] * v).sum() + first[1].square().sum()
        second = torch.autograd.grad(energy, (x, b), allow_unused=True) if energy.requires_grad else (None, None)
        zeros = torch.zeros_like
        return [y, *first, *(zeros(t) if g is None else g for g, t in zip(second, (x, b), strict=True))]

    theirs = outcome(FromPlugin.apply(x, b, act, 0.2, 0.7, clamp))
    ours = outcome(clone_fast.bias_act(x, b, act=name, alpha=0.2, gain=0.7, clamp=None if clamp < 0 else clamp))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other)


def test_upfirdn2d_plugin() -> None:
    x, f = torch.randn(2, 3, 6, 7), torch.randn(3, 4)
    y = PLUGINS["upfirdn2d_plugin"][1]["upfirdn2d"](x, f, 2, 1, 1, 2, 2, 1, -1, 3, True, 1.5)
    expected = clone_fast.upfirdn2d(x, f, up=[2, 1], down=[1, 2], padding=[2, 1, -1, 3], flip_filter=True, gain=1.5)
    assert torch.equal(y, expected)


def test_get_plugin_answers_known_names(nvidia: Import) -> None:
    custom_ops, bias_act = nvidia("torch_utils.custom_ops"), nvidia("torch_utils.ops.bias_act")
    clone_fast.install()
    assert bias_act._init()
    assert bias_act._plugin.bias_act
    assert sys.modules["bias_act_plugin"] is bias_act._plugin
    with pytest.raises(Exception, match=r"."):  # the original's: it would have to compile what is not there
        custom_ops.get_plugin("filtered_lrelu_plugin", sources=["/nowhere/filtered_lrelu.cpp"])
    clone_fast.uninstall()
    assert "bias_act_plugin" not in sys.modules
