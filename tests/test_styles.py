"""styles: the affine layers of a generator against numpy, gradients, registration, messages; and the CUDA kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from fast import BACKENDS
from grids import assert_close_as_dtype, assert_op_check, assert_same, compiled
from spec_leaf import steps, styles_backward
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.errors import BackendError
from clone_fast.nn import Architecture
from clone_fast.ops import dispatch, styles
from clone_fast.ops.dispatch import Leaf
from clone_fast.reference import styles as spec

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"


@dataclass(frozen=True)
class Case:
    """Layers of so many styles, and which latent each reads."""

    rows: tuple[int, ...]
    reads: tuple[int, ...]
    n: int = 2
    latents: int = 4
    w_dim: int = 8
    gain: float = 0.3

    @property
    def factors(self) -> list[float]:
        return [1.0, 0.5, -3.0][: len(self.rows)] + [1.0] * (len(self.rows) - 3)

    def made(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """ws, weights, biases."""
        shapes = [[self.n, self.latents, self.w_dim], *([c, self.w_dim] for c in self.rows), *([c] for c in self.rows)]
        return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]

    def __call__(self, *tensors: Tensor, backend: str = "auto") -> list[Tensor]:
        ws, *both = tensors
        count, options = len(self.rows), {"weight_gain": self.gain, "factors": self.factors}
        return styles(ws, both[:count], both[count:], reads=self.reads, backend=backend, **options)


CASES = [
    Case((3, 5, 2), (0, 1, 1)),
    Case((2, 1), (3, 0), n=1, w_dim=4),
    Case((4, 2, 3, 2), (0, 0, 0, 0), latents=1),
    Case((1,), (2,), n=3, w_dim=5, gain=1.0),
    Case((2, 3, 2), (2, 0, 2), gain=-1.5),  # one that several layers read, apart
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=["reference", "leaf"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """On the reference, and on a leaf in plain PyTorch; what its step "backward" was called with."""
    called: list[tuple[Any, ...]] = []
    if request.param == "leaf":
        leaf = steps("styles")
        backward = leaf.launch_backward
        leaf.launch_backward = lambda *args: called.append(args) or backward(*args)
        monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(leaf))
        monkeypatch.setattr(sys.modules["clone_fast.ops.styles"], "resolve", lambda *args: LEAF)
    return called


# ---- the meaning -------------------------------------------------------------------------------------------------


@every_case
def test_against_numpy(case: Case, path: list[Any]) -> None:
    tensors = case.made()
    ws, *both = (naive.array(value) for value in tensors)
    count = len(case.rows)
    for i, got in enumerate(case(*tensors)):
        want = np.array([case.gain * both[i] @ w + both[count + i] for w in ws[:, case.reads[i]]])
        assert_same(got, case.factors[i] * want)


@every_case
def test_gradients(case: Case, path: list[Any]) -> None:
    tensors = case.made()
    assert gradcheck(case, tensors)
    assert gradgradcheck(case, tensors)
    assert gradcheck(lambda *args: [part.square() for part in case(*args)], tensors)


@pytest.mark.parametrize("used", [[0], [2, 1], [0, 1, 2]], ids=str)
def test_layers_whose_styles_no_one_used(used: list[int], path: list[Any]) -> None:
    case = CASES[0]
    tensors = case.made()
    slopes = [torch.randn(case.n, case.rows[i]).double() for i in used]
    got = torch.autograd.grad([case(*tensors)[i] for i in used], tensors, slopes, allow_unused=True)
    both = [i + offset for offset in (1, 4) for i in range(3)]
    assert [i for i in both if got[i] is not None] == sorted(i + offset for offset in (1, 4) for i in used)
    plain = case(*tensors, backend="reference")
    want = torch.autograd.grad([plain[i] for i in used], tensors, slopes, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("wanted", "flags"), [([0], (True, False)), ([2, 4], (False, True)), ([0, 1], (True, True))])
def test_what_is_frozen_gets_no_gradient(wanted: list[int], flags: tuple[bool, bool], path: list[Any]) -> None:
    case = CASES[0]
    tensors = [value.requires_grad_(i in wanted) for i, value in enumerate(case.made())]
    torch.cat(case(*tensors), 1).square().sum().backward()
    assert [i for i, value in enumerate(tensors) if value.grad is not None] == wanted
    assert all(args[-2:] == flags for args in path)


def test_expanded_latents(path: list[Any]) -> None:
    """As a mapping network gives them: the same for all layers, without a copy."""
    case = Case((3, 2), (0, 3))
    w, *both = case.made()
    w = w[:, :1].detach().requires_grad_()
    assert gradcheck(lambda w, *both: case(w.expand(-1, 4, -1), *both), (w, *both))


def test_new_tensors(path: list[Any]) -> None:
    """Each with memory of its own: a compiler takes no two results that share one."""
    found = CASES[0](*CASES[0].made())
    assert len({part.untyped_storage().data_ptr() for part in found}) == 3
    assert all(part.is_contiguous() for part in found)


# ---- the leaf beside Triton --------------------------------------------------------------------------------------


@every_case
@pytest.mark.usefixtures("nan_empty")
def test_products_layer_by_layer(case: Case) -> None:
    """kernels/styles.py has no kernel, and so runs anywhere."""
    leaf = pytest.importorskip("clone_fast.kernels.styles")
    ws, *both = (value.detach() for value in case.made())
    weights, biases = both[: len(case.rows)], both[len(case.rows) :]
    options = (list(case.reads), case.gain, case.factors)
    pairs = [(leaf.launch(ws, weights, biases, *options), spec.styles(ws, weights, biases, *options))]
    grads = [torch.randn(c, case.n).double().t() for c in case.rows]
    for flags in (True, False), (False, True), (True, True):
        args = (ws, grads, weights, *options, *flags)
        (dws, *got), (want_dws, *want) = leaf.launch_backward(*args), styles_backward(*args)
        pairs += [([dws], [want_dws]), *zip(got, want, strict=True)]
    for got, want in pairs:
        for one, other in zip(got, want, strict=True):
            assert one.is_contiguous()
            torch.testing.assert_close(one, other)


# ---- registration, compilers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", LEAF])
def test_op_check(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps(op)))
    case = CASES[0]
    ws, *both = case.made()
    options = (list(case.reads), case.gain, case.factors)
    assert_op_check(OPS.styles.default, (ws, both[:3], both[3:], *options, backend))
    grads = [torch.randn(case.n, c).double() for c in case.rows]
    for want_ws, want_layers in (True, False), (False, True), (True, True):
        given = (ws.detach(), grads, [weight.detach() for weight in both[:3]], *options, want_ws, want_layers)
        assert_op_check(OPS.styles_backward.default, (*given, LEAF))


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_compiles_without_a_graph_break(path: list[Any], dynamic_batch: bool) -> None:
    case = CASES[0]
    ws, *both = case.made()
    compiled(lambda ws: torch.cat(case(ws, *both), 1), ws, both, dynamic_batch=dynamic_batch)


@pytest.mark.slow
def test_compiles_to_machine_code(path: list[Any]) -> None:
    ws, *both = CASES[0].made(torch.float32)
    compiled(lambda ws: torch.cat(CASES[0](ws * 2, *both), 1), ws, both, backend="inductor")


def test_autocast_changes_nothing(path: list[Any]) -> None:
    tensors = CASES[0].made(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = CASES[0](*tensors)
    for one, other in zip(inside, CASES[0](*tensors), strict=True):
        assert torch.equal(one, other)


# ---- messages ----------------------------------------------------------------------------------------------------

WS, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "ws must be a floating-point tensor [N, L, w_dim], got NoneType", {"ws": None}),
        (TypeError, "ws must be a floating-point tensor [N, L, w_dim], got int64 [2, 3, 4]", {"ws": WS.long()}),
        (ValueError, "ws must be [N, L, w_dim] and not empty, got float32 [3, 4]", {"ws": WS[0]}),
        (ValueError, "ws must be [N, L, w_dim] and not empty, got float32 [0, 3, 4]", {"ws": WS[:0]}),
        (
            ValueError,
            "weights, biases, reads and factors must be as many, 1 at least, got 1, 1, 2 and 1",
            {"reads": [0, 1]},
        ),
        (
            ValueError,
            "weights, biases, reads and factors must be as many, 1 at least, got 0, 0, 0 and 0",
            {"weights": [], "biases": [], "reads": []},
        ),
        (ValueError, "weights[0] must be float32 [C, 4], got float32 [4, 5]", {"weights": [WEIGHT.t()]}),
        (ValueError, "weights[0] must be float32 [C, 4], got float64 [5, 4]", {"weights": [WEIGHT.double()]}),
        (ValueError, "weights[0] must have 1 row at least, got float32 [0, 4]", {"weights": [WEIGHT[:0]]}),
        (ValueError, "weights[0] must be on cpu as x is, got meta", {"weights": [WEIGHT.to("meta")]}),
        (TypeError, "weights[0] must be a floating-point tensor float32 [C, 4], got float", {"weights": [1.0]}),
        (ValueError, "biases[0] must be float32 [5], got float32 [4]", {"biases": [BIAS[:4]]}),
        (ValueError, "reads[0] must be one of the 3 latents of ws, got 3", {"reads": [3]}),
        (ValueError, "reads[0] must be one of the 3 latents of ws, got -1", {"reads": [-1]}),
        (TypeError, "factors[0] must be a number, got str", {"factors": ["1"]}),
        (TypeError, "weight_gain must be a number, got list", {"weight_gain": [1.0]}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"ws": WS, "weights": [WEIGHT], "biases": [BIAS], "reads": [0], **changed}
    with pytest.raises(error) as raised:
        styles(given.pop("ws"), given.pop("weights"), given.pop("biases"), **given)
    assert str(raised.value) == f"styles: {message}"


# ---- on a GPU ----------------------------------------------------------------------------------------------------

SMALL = Case((40, 3, 64, 17), (2, 0, 2, 1), w_dim=132)


def config_f(n: int) -> Case:
    """All layers of StyleGAN2 at 1024."""
    arch = Architecture()
    rows, reads = [], []
    for i, resolution in enumerate(arch.block_resolutions):
        channels = arch.channels(resolution)
        rows += [arch.channels(resolution // 2), channels, channels] if i else [channels, channels]
        reads += range(max(2 * i - 1, 0), 2 * i + 2)
    return Case(tuple(rows), tuple(reads), n, arch.num_ws, 512, 512**-0.5)


def results(case: Case, tensors: Sequence[Tensor], slopes: Sequence[Tensor], backend: str) -> list[Tensor]:
    """The styles, and the gradients to all that want one."""
    found = case(*tensors, backend=backend)
    wanted = [value for value in tensors if value.requires_grad]
    return [*found, *torch.autograd.grad(found, wanted, [slope.to(found[0].dtype) for slope in slopes])]


def given(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """On the GPU: ws, weights and biases, and gradients of the styles, some of them views with strides."""
    slopes = [torch.randn(case.n, c + 3, device="cuda")[:, 3:] for c in case.rows]
    slopes[0] = torch.randn(case.rows[0], case.n, device="cuda").t()
    return case.made(torch.float32, "cuda"), slopes


def check(
    case: Case, change: Callable[[Tensor], Tensor] = lambda ws: ws, wanted: str = "both", backend: str = "cuda"
) -> None:
    """Against float64. The results of a small case are few numbers, of which one may be luckily right: its draws, and
    its layers, go together."""
    count, draws = len(case.rows), []
    for _ in range(1 if case.w_dim * sum(case.rows) > 2**20 else 8):
        (ws, *both), slopes = given(case)
        tensors = [change(ws).detach().requires_grad_(wanted != "layers")]
        tensors += [value.requires_grad_(wanted != "ws") for value in both]
        exact = [value.detach().double().requires_grad_(value.requires_grad) for value in tensors]
        got, plain = (results(case, tensors, slopes, name) for name in (backend, "reference"))
        assert all(one.dtype == torch.float32 and one.is_contiguous() for one in got)
        draws.append(list(zip(got, results(case, exact, slopes, "reference"), plain, strict=True)))
    if len(draws) > 1:
        kinds = [count, *([1] if wanted != "layers" else []), *([count] * 2 if wanted != "ws" else [])]
        parts = [[draw[sum(kinds[:i]) : sum(kinds[: i + 1])] for draw in draws] for i in range(len(kinds))]
        assert sum(kinds) == len(draws[0])
        draws = [[_joined(part) for part in parts]]
    for one, other, value in draws[0]:
        assert_close_as_dtype(one, naive.array(other), value)


def _joined(draws: list[list[tuple[Tensor, Tensor, Tensor]]]) -> tuple[Tensor, ...]:
    """What was got, wanted and plain, each as one vector."""
    flat = [three for draw in draws for three in draw]
    return tuple(torch.cat([value.flatten() for value in part]) for part in zip(*flat, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["ws", "layers", "both"])
@pytest.mark.parametrize("n", [*range(1, 11), 17])
def test_on_cuda(n: int, wanted: str, backend: str) -> None:
    check(replace(SMALL, n=n), wanted=wanted, backend=backend)
    check(config_f(n), wanted=wanted, backend=backend)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("w_dim", [1, 6, 8, 128, 508, 512, 516, 1028])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_odd_sizes_on_cuda(w_dim: int, n: int) -> None:
    check(replace(SMALL, w_dim=w_dim, n=n))
    check(Case((1,), (2,), n=n, w_dim=w_dim))
    check(Case((2,) * 48, tuple(i * 7 % 5 for i in range(48)), n=n, w_dim=w_dim, latents=6))
    check(Case((64,) * 6, (0,) * 6, n=n, w_dim=w_dim, latents=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
def test_latents_that_lie_otherwise_on_cuda() -> None:
    check(SMALL, lambda ws: ws[:, :1].expand(-1, SMALL.latents, -1))
    check(SMALL, lambda ws: ws.transpose(0, 2).contiguous().transpose(0, 2))
    check(SMALL, lambda ws: torch.cat([ws, ws], 2)[:, :, 1 : SMALL.w_dim + 1])  # not on 16 bytes
    check(SMALL, lambda ws: torch.cat([ws, ws], 2)[:, :, 4 : SMALL.w_dim + 4])


@pytest.mark.gpu
def test_reasons_on_cuda() -> None:
    many = Case((1,) * 49, (0,) * 49)
    for case, dtype, backend, reason in (
        (SMALL, torch.float64, "cuda", "float64 runs on the reference only"),
        (SMALL, torch.float64, "triton", "float64 runs on the reference only"),
        (SMALL, torch.float64, "auto", "CLONE_FAST_STRICT=1 forbids"),
        (SMALL, torch.half, "cuda", "in float32 only"),
        (many, torch.float32, "cuda", "up to 48 layers, got 49"),
    ):
        with pytest.raises(BackendError, match=reason):
            case(*case.made(dtype, "cuda"), backend=backend)
    for case, dtype in (SMALL, torch.half), (many, torch.float32):
        case(*case.made(dtype, "cuda"))  # on the other leaf


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 5])
def test_replayed_with_changed_inputs(n: int) -> None:
    case = config_f(n)
    tensors, slopes = given(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(case, tensors, slopes, "auto")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case, tensors, slopes, "auto")
    for _ in range(3):
        with torch.no_grad():
            for value in (*tensors, *slopes):
                value.normal_()
        graph.replay()
        for one, other in zip(captured, results(case, tensors, slopes, "auto"), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_side_stream() -> None:
    """Work launched on any stream but the current one would read the inputs before they are there."""
    case = config_f(2)
    tensors, slopes = given(case)
    want = results(case, tensors, slopes, "auto")
    late = [torch.full_like(value, float("nan")).requires_grad_() for value in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for value, there in zip(late, tensors, strict=True):
                value.copy_(there)
        got = results(case, late, slopes, "auto")
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_op_check_on_cuda() -> None:
    ws, *both = SMALL.made(torch.float32, "cuda")
    options = (list(SMALL.reads), SMALL.gain, SMALL.factors)
    assert_op_check(OPS.styles.default, (ws, both[:4], both[4:], *options, "cuda"))
    grads = [torch.randn(SMALL.n, c, device="cuda") for c in SMALL.rows]
    given = (ws.detach(), grads, [weight.detach() for weight in both[:4]], *options, True, True)
    assert_op_check(OPS.styles_backward.default, (*given, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_on_cuda(compiler: str) -> None:
    ws, *both = SMALL.made(torch.float32, "cuda")
    compiled(lambda ws: torch.cat(SMALL(ws * 2, *both), 1), ws, both, backend=compiler)


@pytest.mark.gpu
def test_second_derivative_on_cuda() -> None:
    found = []
    tensors, slopes = given(SMALL)
    for name, dtype in ("cuda", torch.float32), ("reference", torch.float64):
        inputs = [value.detach().to(dtype).requires_grad_() for value in tensors]
        parts = SMALL(*inputs, backend=name)
        slope = [value.to(dtype) for value in slopes]
        first = torch.autograd.grad(parts, inputs, slope, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs[:5]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
