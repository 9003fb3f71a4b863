"""Which backend runs a call: the order of the three ways to ask, and what happens when a backend cannot.

This machine may have no GPU and this version may have no kernels, so the leaves here are made up, and tensors that
claim to be on CUDA are fake.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clone_fast.errors import BackendError, CloneFastError
from clone_fast.ops import (
    backend,
    bias_act,
    dispatch,
    explain,
    laplacian_pyramid_loss,
    minibatch_stddev,
    modulated_conv2d,
    setup_filter,
    styles,
    upfirdn2d,
)
from clone_fast.ops.dispatch import Leaf, backends, resolve

X = torch.ones(1, 2, 4, 4)
CALLS: dict[str, Callable[..., Tensor]] = {
    "bias_act": lambda **kwargs: bias_act(X, **kwargs),
    "upfirdn2d": lambda **kwargs: upfirdn2d(X, setup_filter([1, 1]), **kwargs),
    "modulated_conv2d": lambda **kwargs: modulated_conv2d(X, torch.ones(1, 2, 1, 1), torch.ones(1, 2), **kwargs),
    "laplacian_pyramid": lambda **kwargs: laplacian_pyramid_loss(X, X, **kwargs),
    "styles": lambda **kwargs: styles(X[0], [X[0, 0]], [X[0, 0, 0]], reads=[1], **kwargs)[0],
    "minibatch_stddev": lambda **kwargs: minibatch_stddev(X, 1, **kwargs),
}


def made(**functions: Callable[..., Any]) -> Leaf:
    """A leaf of these functions."""
    return Leaf(types.SimpleNamespace(**functions))


@pytest.fixture
def cuda_x() -> Iterator[Tensor]:
    """A tensor without memory that says it is on CUDA."""
    with FakeTensorMode():
        yield torch.empty(1, 2, 4, 4, device="cuda")


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Backends that this installation shall have: name -> why it refuses every call, None if it accepts."""
    present: dict[str, str | None] = {}

    def leaf(op: str, name: str) -> Leaf | str:
        if name not in present:
            return f"{name} is not installed"
        return made(supports=lambda *args: present[name], launch=lambda x, *args: x + 1)

    monkeypatch.setattr(dispatch, "leaf", leaf)
    monkeypatch.setattr(dispatch, "_warned", set())
    return present


# ---- order -------------------------------------------------------------------------------------------------------


def test_call_before_context_before_environment(
    monkeypatch: pytest.MonkeyPatch, leaves: dict[str, str | None], cuda_x: Tensor
) -> None:
    leaves |= {"cuda": None, "triton": None}
    assert resolve("bias_act", "auto", cuda_x) == "cuda"
    monkeypatch.setenv("CLONE_FAST_BACKEND", "triton")
    assert resolve("bias_act", "auto", cuda_x) == "triton"
    with backend("reference"):
        assert resolve("bias_act", "auto", cuda_x) == "reference"
        assert resolve("bias_act", "cuda", cuda_x) == "cuda"
        with backend("triton"):
            assert resolve("bias_act", "auto", cuda_x) == "triton"
        assert resolve("bias_act", "auto", cuda_x) == "reference"
        with backend("auto"):
            assert resolve("bias_act", "auto", cuda_x) == "cuda"
    assert resolve("bias_act", "auto", cuda_x) == "triton"
    monkeypatch.setenv("CLONE_FAST_BACKEND", "")
    assert resolve("bias_act", "auto", cuda_x) == "cuda"


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="stop"), backend("triton"):
        raise RuntimeError("stop")
    assert resolve("bias_act", "auto", X) == "reference"


def test_auto_takes_the_best_that_accepts(leaves: dict[str, str | None], cuda_x: Tensor) -> None:
    assert resolve("bias_act", "auto", cuda_x) == "reference"
    leaves["triton"] = None
    assert resolve("bias_act", "auto", cuda_x) == "triton"
    leaves["cuda"] = None
    assert resolve("bias_act", "auto", cuda_x) == "cuda"


def test_on_the_cpu_auto_is_the_reference(leaves: dict[str, str | None]) -> None:
    leaves |= {"cuda": None, "triton": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("bias_act", "auto", X) == "reference"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_asks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = CALLS[op](backend="reference")
    assert torch.equal(CALLS[op](), want)
    monkeypatch.setenv("CLONE_FAST_BACKEND", "triton")
    with pytest.raises(BackendError, match=f"^{op}: backend 'triton' cannot run this call: "):
        CALLS[op]()
    with backend("cuda"), pytest.raises(BackendError, match=f"^{op}: backend 'cuda' cannot run this call: "):
        CALLS[op]()
    with backend("cuda"):
        assert torch.equal(CALLS[op](backend="reference"), want)


# ---- names -------------------------------------------------------------------------------------------------------


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "backend must be one of auto, reference, triton, cuda, got "
    with pytest.raises(ValueError, match=known + "'CUDA'"):
        bias_act(X, backend="CUDA")
    with pytest.raises(ValueError, match=known + "'fast'"), backend("fast"):
        pass
    monkeypatch.setenv("CLONE_FAST_BACKEND", "tritn")
    with pytest.raises(ValueError, match=known + "'tritn'"):
        bias_act(X)


# ---- a backend that cannot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_is_missing_raises_with_the_reason(name: str, leaves: dict[str, str | None]) -> None:
    with pytest.raises(BackendError) as raised:
        bias_act(X, backend=name)
    assert str(raised.value) == f"bias_act: backend {name!r} cannot run this call: {name} is not installed"
    assert isinstance(raised.value, CloneFastError)
    leaves[name] = None
    with pytest.raises(BackendError) as raised:
        bias_act(X, backend=name)
    assert (
        str(raised.value)
        == f"bias_act: backend {name!r} cannot run this call: {name} runs on CUDA tensors, x is on cpu"
    )


def test_a_named_backend_that_refuses_raises_with_its_reason(leaves: dict[str, str | None], cuda_x: Tensor) -> None:
    leaves["triton"] = "no float64"
    with pytest.raises(BackendError, match=r"^upfirdn2d: backend 'triton' cannot run this call: no float64$"):
        resolve("upfirdn2d", "triton", cuda_x)


def test_auto_warns_once_for_each_reason_of_a_fallback(leaves: dict[str, str | None], cuda_x: Tensor) -> None:
    leaves |= {"cuda": "no float64", "triton": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another fast backend is no fallback
        assert resolve("upfirdn2d", "auto", cuda_x) == "triton"
    leaves["triton"] = "filter too large"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = {resolve("upfirdn2d", "auto", cuda_x) for _ in range(3)}
    assert chosen == {"reference"}
    message = "upfirdn2d: fell back to the reference (cuda: no float64; triton: filter too large)"
    assert [(w.category, str(w.message)) for w in caught] == [(RuntimeWarning, message)]
    leaves["cuda"] = "no bfloat16"
    with pytest.warns(RuntimeWarning, match="no bfloat16"):
        assert resolve("upfirdn2d", "auto", cuda_x) == "reference"


def test_strict_forbids_the_fallback(
    leaves: dict[str, str | None], cuda_x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves |= {"cuda": "no float64", "triton": None}
    monkeypatch.setenv("CLONE_FAST_STRICT", "1")
    assert resolve("upfirdn2d", "auto", cuda_x) == "triton"
    leaves["triton"] = "no float64"
    with pytest.raises(
        BackendError, match=r"\(cuda: no float64; triton: no float64\); CLONE_FAST_STRICT=1 forbids that"
    ):
        resolve("upfirdn2d", "auto", cuda_x)
    leaves.clear()  # what is not installed is not passed over
    assert resolve("upfirdn2d", "auto", cuda_x) == "reference"


def test_a_leaf_is_launched_below_the_registered_op(
    leaves: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its arguments in the order of the schema, forward and backward."""
    seen: list[Any] = []

    def launch(x: Tensor, *args: Any) -> Tensor:
        seen.append(args)
        return x + 1

    def launch_backward(dy: Tensor, *args: Any) -> tuple[Tensor, None]:
        seen.append(args)
        return 3 * dy, None

    monkeypatch.setattr(dispatch, "leaf", lambda op, name: made(launch=launch, launch_backward=launch_backward))
    x = X.clone().requires_grad_()
    b = torch.ones(2)
    y = torch.ops.clone_fast.bias_act.default(x, b, 1, "relu", 0.0, 3.0, None, "triton")
    assert torch.equal(y, X + 1)
    assert seen[0][1:] == (1, "relu", 0.0, 3.0, None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, 3 * torch.ones_like(x))
    assert seen[1][2:] == (1, "relu", 0.0, 3.0, None, False)


def test_a_step_that_a_leaf_lacks_is_done_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {
        "cuda": made(launch=torch.neg, launch_conv=torch.neg, supports_conv=lambda x: "too many channels"),
        "triton": made(launch=torch.neg, launch_conv=torch.abs, launch_wgrad=torch.exp),
    }
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaves[name])
    assert dispatch.launch_step("modulated_conv2d", "conv", "cuda", -X).equal(X)
    assert dispatch.launch_step("modulated_conv2d", "wgrad", "cuda", X).equal(X.exp())
    message = r"no backend runs its step 'x' \(cuda: it has no x; triton: it has no x\)"
    with pytest.raises(BackendError, match=message):
        dispatch.launch_step("modulated_conv2d", "x", "cuda", X)


def test_the_registered_op_says_what_is_missing(leaves: dict[str, str | None]) -> None:
    with pytest.raises(BackendError, match=r"cuda: cuda is not installed; triton: triton is not installed"):
        torch.ops.clone_fast.bias_act.default(X, None, 0, "relu", 0.0, 1.0, None, "cuda")


# ---- leaves ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_leaves() -> Iterator[None]:
    dispatch._leaves.clear()
    yield
    dispatch._leaves.clear()


def package(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    module.__path__ = []
    vars(module).update(contents)
    return module


@pytest.mark.usefixtures("fresh_leaves")
def test_triton_leaves_are_modules_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(*args: Any) -> None:
        return None

    monkeypatch.setitem(sys.modules, "triton", package("triton"))
    monkeypatch.setitem(sys.modules, "clone_fast.kernels", package("clone_fast.kernels"))
    name = "clone_fast.kernels.upfirdn2d"
    monkeypatch.setitem(sys.modules, name, package(name, supports=supports, launch=torch.add))
    found = dispatch.leaf("upfirdn2d", "triton")
    assert isinstance(found, Leaf)
    assert found.why_not("", (X, X)) is None
    assert found.launch("", X, X).equal(2 * X)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda module: None if "bias_act" in module else module)
    assert dispatch.leaf("bias_act", "triton") == "this version has no Triton kernel of bias_act"


@pytest.mark.usefixtures("fresh_leaves")
def test_cuda_leaves_need_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clone_fast._C", package("clone_fast._C"))
    name = "clone_fast.cuda.upfirdn2d"
    monkeypatch.setitem(sys.modules, name, package(name, launch=torch.add))
    found = dispatch.leaf("upfirdn2d", "cuda")
    assert isinstance(found, Leaf)
    assert found.launch("", X, X).equal(2 * X)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda module: None if "bias_act" in module else module)
    assert dispatch.leaf("bias_act", "cuda") == "this version has no CUDA kernel of bias_act"


@pytest.mark.usefixtures("fresh_leaves")
@pytest.mark.parametrize(
    ("missing", "op", "name", "reason"),
    [
        ("triton", "bias_act", "triton", "the package triton is not installed"),
        ("clone_fast.kernels", "bias_act", "triton", "clone_fast.kernels is not installed"),
        ("clone_fast._C", "bias_act", "cuda", "this installation was built without the CUDA extension clone_fast._C"),
    ],
)
def test_reasons_for_missing_leaves(
    missing: str, op: str, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"triton", "clone_fast.kernels", "clone_fast._C"} - {missing}
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda module: module if module in found else None)
    assert dispatch.leaf(op, name) == reason


def test_no_leaf_is_the_reference() -> None:
    with pytest.raises(ValueError, match=r"no leaves on backend 'reference'"):
        dispatch.leaf("bias_act", "reference")


# ---- what a user sees --------------------------------------------------------------------------------------------


def test_backends_has_a_row_for_each_op_and_backend(
    leaves: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves["triton"] = None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = backends()
    assert [(op, name) for op, name, _ in rows] == [
        (op, name) for op in dispatch.OPS for name in ("reference", "triton", "cuda")
    ]
    assert {name: reason for _, name, reason in rows} == {
        "reference": None,
        "triton": None,
        "cuda": "cuda is not installed",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ("upfirdn2d", "triton", "no CUDA device is visible") in backends()


def test_explain(leaves: dict[str, str | None]) -> None:
    leaves["triton"] = None
    assert explain("upfirdn2d", X, setup_filter([1, 3, 3, 1]), up=2, padding=[2, 1, 2, 1]).splitlines() == [
        "upfirdn2d on cuda: cuda is not installed",
        "upfirdn2d on triton: triton runs on CUDA tensors, x is on cpu",
        "upfirdn2d on reference: accepted",
    ]
    assert explain("laplacian_pyramid", X, X).splitlines()[-1] == "laplacian_pyramid on reference: accepted"


def test_explain_says_how_a_leaf_would_run(leaves: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = made(supports=lambda *args: None, launch=lambda x, *args: x, describe=lambda x, *args: "in two passes")
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaf if name == "triton" else "none")
    monkeypatch.setattr(dispatch, "_why_not", lambda op, name, x, args: None if name == "triton" else "none")
    assert explain("bias_act", X).splitlines() == [
        "bias_act on cuda: none",
        "bias_act on triton: accepted, in two passes",
        "bias_act on reference: accepted",
    ]


def test_explain_says_where_the_steps_run(leaves: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an op that a leaf composes of steps, some of which are another leaf's."""
    composer = made(
        supports=lambda *args: "not in one",
        launch=None,
        composes=lambda *args: None,
        launch_finish=lambda z, *args: z[..., 1:, 1:],
    )
    other = made(
        supports=lambda *args: "none",
        launch=None,
        launch_conv=lambda x, *args: torch.zeros(1, 1, 9, 9),
        launch_modulate=lambda weight, *args: weight,
    )
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: {"cuda": composer, "triton": other}[name])
    monkeypatch.setattr(dispatch, "_why_not", lambda op, name, x, args: None if name == "cuda" else "none")
    filter_, weight = setup_filter([1, 3, 3, 1]), torch.ones(1, 2, 3, 3)
    lines = explain("modulated_conv2d", X, weight, torch.ones(1, 2), up=2, resample_filter=filter_).splitlines()
    assert lines[0] == "modulated_conv2d on cuda: accepted, conv on triton"


def test_explain_says_where_all_of_an_op_runs(leaves: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    other = made(launch=lambda x, *args: x)
    found = {"cuda": made(composes=lambda *args: None), "triton": other}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: found[name])
    monkeypatch.setattr(dispatch, "_why_not", lambda op, name, x, args: None)
    assert explain("minibatch_stddev", X, 1).splitlines()[0] == "minibatch_stddev on cuda: accepted, on triton"


def test_explain_refuses_what_the_op_refuses() -> None:
    with pytest.raises(ValueError, match=r"^explain: op must be one of bias_act, upfirdn2d, .*, got 'conv2d'$"):
        explain("conv2d", X)
    with pytest.raises(TypeError, match=r"^upfirdn2d: f must be a tensor"):
        explain("upfirdn2d", X, None)


def test_an_op_that_a_leaf_refuses_and_composes_runs_on_its_backend(
    cuda_x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = {"supports": lambda *args: "no", "launch": lambda x, *args: x}
    found: dict[str, Leaf | str] = {"cuda": made(**refuses, composes=lambda *args: None), "triton": made(**refuses)}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: found[name])
    assert resolve("modulated_conv2d", "auto", cuda_x) == "cuda"
    assert resolve("modulated_conv2d", "cuda", cuda_x) == "cuda"
    assert not dispatch.is_whole("modulated_conv2d", "cuda", cuda_x)
    with pytest.raises(BackendError, match="no"):
        resolve("modulated_conv2d", "triton", cuda_x)
    found["triton"] = "not installed"  # whose steps were part of it
    with pytest.raises(BackendError, match="no"):
        resolve("modulated_conv2d", "cuda", cuda_x)
