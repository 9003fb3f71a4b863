"""Checks of arguments, shared by the ops: the message names op, argument, what was wanted and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

INT_MAX = 2**31 - 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """A tensor as dtype and shape, anything else as its type."""
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)}"
    return type(value).__name__


def check_image(op: str, name: str, value: object) -> None:
    """A non-empty floating tensor [N, C, H, W] of fewer than 2^31 elements."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor [N, C, H, W], got {describe(value)}")
    if value.ndim != 4 or value.numel() == 0:
        raise ValueError(f"{op}: {name} must be [N, C, H, W] and not empty, got {describe(value)}")
    if value.numel() > INT_MAX:
        raise ValueError(f"{op}: {name} must have fewer than 2^31 elements, got {describe(value)}")


def check_result(op: str, shape: Sequence[int]) -> None:
    """A result that 32-bit indices can reach."""
    if math.prod(shape) > INT_MAX:
        raise ValueError(f"{op}: the result must have fewer than 2^31 elements, got {list(shape)}")


def check_tensor(
    op: str,
    name: str,
    value: object,
    like: Tensor,
    *shapes: Sequence[int | str],
    dtype: torch.dtype | None = None,
) -> None:
    """A floating tensor of one of these shapes on the device of `like`, of this dtype if one is given.

    A letter in a shape stands for any size. Text is made only where a check fails: under torch.compile, writing a size
    into a message would fix it.
    """

    def wanted() -> str:
        texts = [f"[{', '.join(map(str, shape))}]" for shape in shapes]
        return " ".join(([] if dtype is None else [_name(dtype)]) + [" or ".join(texts)])

    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor {wanted()}, got {describe(value)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as x is, got {value.device}")
    if dtype not in (None, value.dtype) or not any(_matches(value.shape, shape) for shape in shapes):
        raise ValueError(f"{op}: {name} must be {wanted()}, got {describe(value)}")


def _matches(shape: Sequence[int], pattern: Sequence[int | str]) -> bool:
    return len(shape) == len(pattern) and all(
        isinstance(want, str) or got == want for got, want in zip(shape, pattern, strict=True)
    )


def check_odd(op: str, weight: Tensor, in_channels: int) -> tuple[int, int]:
    """O and k of a weight [..., O, I, k, k], of which there must be some and an odd number."""
    out_channels, _, k, across = weight.shape[-4:]
    if out_channels == 0 or k != across or k % 2 == 0:
        raise ValueError(f"{op}: weight must be [O, {in_channels}, k, k] with odd k, got {describe(weight)}")
    return out_channels, k


def check_addend(op: str, other: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """What is added to a result of this shape in x's dtype: as large, and of a dtype that this one has room for."""
    check_tensor(op, "other", other, x, shape)
    check_result(op, shape)
    if torch.promote_types(x.dtype, other.dtype) != x.dtype:
        raise ValueError(f"{op}: other must be of a dtype that {describe(x)} has room for, got {describe(other)}")


def check_filter(op: str, name: str, f: object, like: Tensor) -> None:
    """A float32 filter [fh, fw] or [taps] that wants no gradient (float64 beside float64 images, for tests)."""
    if not isinstance(f, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor float32 [fh, fw] or [taps], got {describe(f)}")
    allowed = (torch.float32, torch.float64) if like.dtype == torch.float64 else (torch.float32,)
    if f.dtype not in allowed or f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"{op}: {name} must be float32 [fh, fw] or [taps], got {describe(f)}")
    if f.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as x is, got {f.device}")
    if f.requires_grad:
        raise ValueError(f"{op}: {name} must not require a gradient, as the op has none to it, got requires_grad=True")


def check_activation(op: str, act: object, clamp: object, known: Collection[str]) -> None:
    """An activation of a known name, and a clamp that is not negative."""
    if act not in known:
        raise ValueError(f"{op}: act must be one of {', '.join(known)}, got {act!r}")
    if clamp is not None and not (isinstance(clamp, (int, float)) and clamp >= 0):
        raise ValueError(f"{op}: clamp must be None or a number >= 0, got {clamp!r}")


def check_number(op: str, name: str, value: object) -> None:
    """A plain number, or None where the default is meant."""
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
