"""What the op tests share: layouts, dtypes, and the rules by which two results count as equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import naive
import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def as_layout(x: Tensor, layout: str) -> Tensor:
    """The same values: contiguous, channels_last, or strided as a view into something larger."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        larger = x.new_full([x.shape[0], x.shape[1], 2 * x.shape[3], x.shape[2] + 1], float("nan"))
        view = larger[:, :, ::2, 1:].transpose(2, 3)
        view.copy_(x)
        return view
    return x.contiguous()


def assert_same(got: Tensor, want: naive.Array, tolerance: float = 1e-12) -> None:
    """Equal up to float64 rounding, relative to the largest value."""
    assert got.dtype == torch.float64
    assert list(got.shape) == list(want.shape)
    np.testing.assert_allclose(naive.array(got), want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))


def assert_close_as_dtype(got: Tensor, want: naive.Array, plain: Tensor) -> None:
    """The error is at most twice that of the plain computation in this dtype, plus one rounding of the result."""
    error = np.abs(naive.array(got) - want).max()
    allowed = 2 * np.abs(naive.array(plain) - want).max() + torch.finfo(got.dtype).eps * np.abs(want).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_op_check(op: Any, args: tuple[Any, ...]) -> None:
    """All of opcheck: schema, autograd registration, fake and AOT dispatch with dynamic sizes."""
    result = torch.library.opcheck(op, args)
    assert set(result) == {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }


def compiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor] = (),
    *,
    backend: str = "aot_eager",
    dynamic_batch: bool = False,
) -> None:
    """The function compiles as one graph and its result and first gradients are those of eager."""
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for run in (function, fast):
        leaf = x.detach().clone().requires_grad_()
        if dynamic_batch:
            torch._dynamo.mark_dynamic(leaf, 0)
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
