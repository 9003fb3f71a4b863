"""bias_act on CUDA: forward, first and second gradient, by csrc/bias_act.cu and csrc/_bias_act_gradients.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dtype_reason, pointer, stream
from clone_fast.kernels._dense import extents, layout_of

# The numbers of `Act` in csrc/bias_act.h.
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")


def supports(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    return dtype_reason(x)


def _op(x: Tensor, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> _C.BiasAct:
    limit = math.nan if clamp is None else clamp
    return _C.BiasAct(DTYPES[x.dtype], *extents(x, dim), ACTIVATIONS.index(act), alpha, gain, limit)


def launch(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    """clamp(gain * act(x + b)), in x's shape, dtype and layout."""
    layout = layout_of(x)
    x, b = x.contiguous(memory_format=layout), None if b is None else b.contiguous()
    y = torch.empty_like(x, memory_format=layout)
    _C.bias_act(_op(x, dim, act, alpha, gain, clamp), pointer(x), pointer(b), pointer(y), stream(x))
    return y


def launch_backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    want_db: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx like x, db like b or None): the gradient at x + b, 0 where the result stands at the clamp or beyond."""
    layout = layout_of(x)
    x, b = x.contiguous(memory_format=layout), None if b is None else b.contiguous()
    dy = dy.contiguous(memory_format=layout)
    dx = torch.empty_like(x, memory_format=layout)
    op = _op(x, dim, act, alpha, gain, clamp)
    if b is None or not want_db:
        _C.bias_act_gradient(op, pointer(dy), pointer(x), pointer(b), pointer(dx), stream(x))
        return dx, None
    db = torch.empty_like(b)
    partial = torch.empty(_C.bias_act_partials(op), dtype=torch.float32, device=x.device)
    _C.bias_act_gradients(
        op, pointer(dy), pointer(x), pointer(b), pointer(dx), pointer(db), pointer(partial), stream(x)
    )
    return dx, db


def launch_second(
    v: Tensor,
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """v * dy * (the derivative of the slope at x + b), in x's shape, dtype and layout."""
    layout = layout_of(x)
    x, b = x.contiguous(memory_format=layout), None if b is None else b.contiguous()
    v, dy = v.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    result = torch.empty_like(x, memory_format=layout)
    op = _op(x, dim, act, alpha, gain, clamp)
    _C.bias_act_second(op, pointer(v), pointer(dy), pointer(x), pointer(b), pointer(result), stream(x))
    return result
