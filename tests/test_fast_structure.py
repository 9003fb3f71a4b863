"""What a fast backend must stand besides being right: graphs, streams, devices, compilers, second order, misuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fast import BACKENDS, FLOATS, IMAGE_OPS, Call, calm, complaints, cosine, results
from grids import assert_op_check
from torch import Tensor

from clone_fast import ops
from clone_fast.errors import BackendError
from clone_fast.ops import setup_filter

pytestmark = pytest.mark.gpu
OPS = torch.ops.clone_fast


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def call_of(op: str, *, dtype: torch.dtype = torch.float32, kind: str = "plain") -> Call:
    """One that every backend takes; `kind` is of modulated_conv2d."""
    if op == "bias_act":
        return Call(op, {"x": _normal(2, 8, 20, 33), "b": _normal(8)}, {"act": "lrelu", "clamp": 1.5}, dtype)
    if op == "upfirdn2d":
        options: dict[str, Any] = {"f": setup_filter([1, 3, 3, 1]), "up": 2, "padding": [2, 1, 2, 1], "gain": 4.0}
        return Call(op, {"x": _normal(2, 8, 20, 33)}, options, dtype, "channels_last")
    if op == "laplacian_pyramid":
        return Call(op, {"x": _normal(2, 3, 70, 65), "y": _normal(2, 3, 70, 65)}, {"levels": 4}, dtype)
    up, down = {"up": (2, 1), "down": (1, 2)}.get(kind, (1, 1))
    tensors = {"x": _normal(2, 32, 16, 24), "weight": _normal(32, 32, 3, 3) / 17, "styles": _normal(2, 32)}
    tensors |= {"noise": _normal(16 * up // down, 24 * up // down), "noise_strength": _normal(), "bias": _normal(32)}
    options = {"up": up, "down": down, "act": "lrelu", "clamp": 2.0}
    options |= {"resample_filter": setup_filter([1, 3, 3, 1])} if up * down > 1 else {}
    return Call(op, tensors, options, dtype, "channels_last")


EVERY = [(op, "plain") for op in IMAGE_OPS] + [("modulated_conv2d", "up"), ("modulated_conv2d", "down")]
every_op = pytest.mark.parametrize(("op", "kind"), EVERY, ids=[f"{op}-{kind}" for op, kind in EVERY])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def taken(call: Call, backend: str) -> None:
    """Skip, visibly, what a backend has no kernel for."""
    try:
        call.function(**call.inputs(), backend=backend)
    except BackendError as error:
        pytest.skip(str(error))


def prepared(op: str, kind: str, backend: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], Tensor]:
    """The op's function on this backend, inputs for it, and a gradient for its result."""
    call = call_of(op, dtype=dtype, kind=kind)
    taken(call, backend)
    function = partial(call.function, backend=backend)
    inputs = call.inputs()
    with torch.no_grad():
        return function, inputs, calm(function(**inputs), call.options.get("clamp"))


# ---- graphs, streams, devices ------------------------------------------------------------------------------------


@every_op
@every_backend
def test_capture_and_replay_with_changed_inputs(op: str, kind: str, backend: str) -> None:
    function, static, dy = prepared(op, kind, backend, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(function, static, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(function, static, dy)
    for _ in range(2):
        fresh = {name: torch.randn_like(value) for name, value in static.items()}
        for name, value in static.items():
            with torch.no_grad():
                value.copy_(fresh[name])
        graph.replay()
        replayed = {name: value.clone() for name, value in captured.items()}
        eager = results(function, {name: value.requires_grad_() for name, value in fresh.items()}, dy)
        for name, value in eager.items():
            assert torch.equal(value, replayed[name]), name


@every_op
@every_backend
def test_side_stream(op: str, kind: str, backend: str) -> None:
    """Work launched on any stream but the current one would read the inputs before they are there."""
    function, inputs, dy = prepared(op, kind, backend, torch.bfloat16)
    want = results(function, inputs, dy)
    late = {name: torch.full_like(value, float("nan")).requires_grad_() for name, value in inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for name, value in inputs.items():
                late[name].copy_(value)
        got = results(function, late, dy)
    torch.cuda.synchronize()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@every_op
@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_process(op: str, kind: str, backend: str, dtype: torch.dtype) -> None:
    call = call_of(op, dtype=dtype, kind=kind)
    taken(call, backend)
    found = []
    for device in ("cuda:0", "cuda:1"):
        inputs = call.inputs(device)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.options.items()}
        function = partial(call.function.func, **options, backend=backend)  # type: ignore[attr-defined]
        with torch.no_grad():
            dy = calm(function(**inputs), call.options.get("clamp"))
        found.append(results(function, inputs, dy))
    assert torch.cuda.current_device() == 0
    for name, value in found[0].items():
        other = found[1][name]
        assert other.device == torch.device("cuda:1")
        # float32 is multiplied by cuDNN, which does not choose the same algorithm on every device.
        bits = op != "modulated_conv2d" or dtype != torch.float32
        torch.testing.assert_close(other.cpu(), value.cpu(), **({"rtol": 0, "atol": 0} if bits else {}), msg=name)


@every_op
@every_backend
def test_the_same_call_gives_the_same_bits(op: str, kind: str, backend: str) -> None:
    function, inputs, dy = prepared(op, kind, backend, torch.float16)
    first = results(function, inputs, dy)
    for _ in range(3):
        for name, value in results(function, inputs, dy).items():
            assert torch.equal(value, first[name]), name


# ---- batches and sizes -------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("op", IMAGE_OPS)
@pytest.mark.parametrize("batch", [8, 64])
def test_batches(op: str, backend: str, batch: int) -> None:
    call = call_of(op, dtype=torch.bfloat16)
    taken(call, backend)
    grown = {
        name: _normal(batch, *value.shape[1:]) if name in ("x", "y", "styles") else value
        for name, value in call.tensors.items()
    }
    assert not complaints(Call(op, grown, call.options, call.dtype, call.layout), backend)


@every_backend
def test_many_elements(backend: str) -> None:
    """Just below 2^31: where a 32-bit index times a stride would turn over."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.empty(1, 64, 8191, 4096, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        b = torch.randn(64, device="cuda", dtype=torch.bfloat16)
        y = ops.bias_act(x, b, act="lrelu", backend=backend)
        part = (slice(None), slice(None), slice(8100, None))
        want = ops.bias_act(x[part], b, act="lrelu", backend="reference")
        torch.testing.assert_close(y[part], want, rtol=2**-7, atol=1e-5)
        del y
        f = setup_filter([1, 3, 3, 1]).cuda()
        y = ops.upfirdn2d(x, f, padding=[2, 1, 2, 1], backend=backend)
        want = ops.upfirdn2d(x[part], f, padding=[2, 1, -3, 1], backend="reference")
        torch.testing.assert_close(y[:, :, -want.shape[2] :], want, rtol=2**-7, atol=1e-5)
        del y


# ---- compilers ---------------------------------------------------------------------------------------------------


@every_op
@every_backend
def test_compiles_as_one_graph(op: str, kind: str, backend: str) -> None:
    function, inputs, dy = prepared(op, kind, backend, torch.float16)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = results(function, inputs, dy)
    for name, value in results(compiled, inputs, dy).items():
        assert torch.equal(value, want[name]), name


@every_op
def test_compiles_by_inductor_with_the_automatic_choice(op: str, kind: str) -> None:
    """Not only one graph: with neighbours that a compiler fuses, and the choice made while it is traced."""
    call = call_of(op, kind=kind)
    inputs = call.inputs()

    def function(**tensors: Tensor) -> Tensor:
        return (call.function(**{name: value * 1.5 for name, value in tensors.items()}) * 2).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    dy = torch.ones([], device="cuda")
    want = results(function, inputs, dy)
    for name, value in results(compiled, inputs, dy).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5 * value.abs().max().item())


@every_backend
def test_op_check(backend: str) -> None:
    x, b = (
        torch.randn(2, 8, 9, 10, device="cuda", requires_grad=True),
        torch.randn(8, device="cuda", requires_grad=True),
    )
    f = setup_filter([1, 3, 3, 1]).cuda()
    assert_op_check(OPS.bias_act.default, (x, b, 1, "swish", 0.0, 1.4, 0.5, backend))
    dy = torch.randn_like(x)
    assert_op_check(OPS.bias_act_backward.default, (dy, x, b, 1, "swish", 0.0, 1.4, 0.5, True, backend))
    assert_op_check(OPS.upfirdn2d.default, (x, f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0, backend))
    image, target = (
        torch.randn(1, 3, 19, 20, device="cuda", requires_grad=True),
        torch.randn(1, 3, 19, 20, device="cuda"),
    )
    for charbonnier in (None, 0.1):
        assert_op_check(OPS.laplacian_pyramid.default, (image, target, 3, [1.0] * 3, charbonnier, 0.5, True, backend))


@every_backend
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_op_check_of_the_convolution(backend: str, up: int, down: int) -> None:
    call = call_of("modulated_conv2d", dtype=torch.bfloat16, kind={2: "up"}.get(up, {2: "down"}.get(down, "plain")))
    taken(call, backend)
    made = call.inputs()
    f = setup_filter([1, 3, 3, 1]).cuda()
    weight = OPS.modulated_weights(made["weight"], made["styles"], True, 1e-8, torch.bfloat16, "triton").detach()
    rest = (made["noise"], made["noise_strength"], made["bias"], f, up, down, "lrelu", 1.4, 2.0)
    assert_op_check(OPS.modulated_conv2d.default, (made["x"], weight.requires_grad_(), *rest, backend))


# ---- second derivatives ------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish", "softplus", "tanh"])
def test_second_derivative_of_bias_act(act: str, backend: str) -> None:
    found = []
    x, b = _normal(3, 8, 5, 6).cuda(), _normal(8).cuda()
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        inputs = [value.to(dtype).requires_grad_() for value in (x, b)]
        y = ops.bias_act(*inputs, act=act, backend=name)
        dy = y.detach().cos().requires_grad_()
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        total = sum((grad.sin() * (1 + grad)).sum() for grad in first)
        found.append(torch.autograd.grad(total, [*inputs, dy], allow_unused=True))
    for want, got in zip(*found, strict=True):
        if want is None or not want.any():
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@every_backend
def test_second_derivative_of_upfirdn2d(backend: str) -> None:
    f = torch.rand(4, 3, device="cuda")
    found = []
    x = _normal(2, 3, 9, 11).cuda()
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        inner = x.to(dtype).requires_grad_()
        y = ops.upfirdn2d(inner, f.to(dtype), up=[2, 1], down=[1, 2], padding=[2, 1, 3, -1], backend=name)
        (dx,) = torch.autograd.grad((y**3).sum(), inner, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), inner)[0])
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())


@every_backend
@pytest.mark.parametrize("kind", ["plain", "up", "down"])
def test_second_derivative_of_the_convolution_is_the_composite(kind: str, backend: str) -> None:
    call = call_of("modulated_conv2d", kind=kind)
    found = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        if name == backend:
            taken(call, backend)
        inputs = call.inputs(dtype=dtype)
        y = call.function(**inputs, backend=name)
        (dx,) = torch.autograd.grad((y**2).sum(), inputs["x"], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(inputs.values())))
    for want, got in zip(*found, strict=True):
        assert cosine(got, want) > 0.999
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3 * want.abs().max().item())


# ---- misuse ------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("op", IMAGE_OPS)
def test_float64_is_refused_with_the_reason(op: str, backend: str) -> None:
    call = call_of(op)
    with pytest.raises(BackendError, match="float64"):
        call.function(**call.inputs(dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("op", IMAGE_OPS)
def test_float64_may_not_fall_back_unseen(op: str) -> None:
    call = call_of(op)
    with pytest.raises(BackendError, match="CLONE_FAST_STRICT=1 forbids"):
        call.function(**call.inputs(dtype=torch.float64))


@pytest.mark.parametrize(
    ("op", "name"), [("bias_act", "b"), ("laplacian_pyramid", "y"), ("modulated_conv2d", "weight")]
)
def test_mixed_devices(op: str, name: str) -> None:
    call = call_of(op)
    inputs = call.inputs()
    inputs[name] = inputs[name].cpu()
    with pytest.raises(ValueError, match=f"^{op}: {name} must be on cuda:0 as x is, got cpu"):
        call.function(**inputs)


def test_a_filter_elsewhere_or_with_a_gradient() -> None:
    x, f = torch.randn(1, 2, 8, 8, device="cuda"), setup_filter([1, 3, 3, 1])
    with pytest.raises(ValueError, match="f must be on cuda:0 as x is, got cpu"):
        ops.upfirdn2d(x, f)
    with pytest.raises(ValueError, match="f must not require a gradient"):
        ops.upfirdn2d(x, f.cuda().requires_grad_())


@pytest.mark.parametrize("op", IMAGE_OPS)
def test_empty_and_too_large(op: str) -> None:
    call = call_of(op)
    inputs = call.inputs()
    large = torch.empty(1, device="cuda").expand(2, inputs["x"].shape[1], 2**15, 2**15)
    for x in (inputs["x"][:, :, :0], large):
        with pytest.raises(ValueError, match=f"^{op}: x must"):
            call.function(**inputs | {"x": x})


@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinity_and_nan_pass_through(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]], device="cuda", dtype=dtype)
    for act in ("linear", "lrelu"):
        for clamp in (None, 7.0):
            got, want = (ops.bias_act(x, act=act, clamp=clamp, backend=name) for name in (backend, "reference"))
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


def test_explain_says_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLONE_FAST_STRICT")
    x = torch.randn(1, 2, 8, 8, device="cuda")
    lines = ops.explain("upfirdn2d", x, setup_filter([1, 3, 3, 1]).cuda()).splitlines()
    assert lines[1:] == ["upfirdn2d on triton: accepted", "upfirdn2d on reference: accepted"]
    assert "float64" in ops.explain("bias_act", x.double())
