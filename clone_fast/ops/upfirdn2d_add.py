"""upfirdn2d with another image added: where StyleGAN2 resamples, it adds right behind.

The sum of a generator's RGB images is one, that of the two gradients where a discriminator's block begins is the other.
On a fast backend it costs no pass of its own over the larger image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.checks import check_addend
from clone_fast.ops.dispatch import launch_step, resolve, step_if_any
from clone_fast.ops.registration import Recorded, as_result, empty_result, register
from clone_fast.ops.upfirdn2d import (
    adjoint,
    downsample2d,
    enlarging_padding,
    registered,
    shrinking_padding,
    upsample2d,
)
from clone_fast.reference import upfirdn2d as spec

__all__ = ["downsampled_branch", "upsample2d_add"]

ONE, TWO = [1, 1], [2, 2]


def run(backend: str, x: Tensor, other: Tensor, *args: Any) -> Tensor:
    """upfirdn2d(x, *args) + other, in one launch where a leaf can."""
    if backend == "reference":
        f, up, down, padding, flip, gain = args
        y = spec.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=gain)
        return as_result(y + other, x)
    done: Tensor | None = step_if_any("upfirdn2d", "add", backend, x, other, *args)
    return launch_step("upfirdn2d", "", backend, x, *args).add_(other) if done is None else done


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    x, other, f, up, down, padding, flip, gain = recorded.args
    found: dict[int, Tensor] = {}
    if 0 in wanted:
        others = adjoint(x.shape[2:], grads[0].shape[2:], f, up, down, padding)
        found[0] = registered(grads[0], f, *others, not flip, gain, recorded.backend)
    if 1 in wanted:
        found[1] = grads[0].to(other.dtype)
    return [found[i] for i in wanted]


_op = register(
    "upfirdn2d_add",
    "(Tensor x, Tensor other, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain) -> Tensor",
    run=run,
    fake=lambda x, other, *_: empty_result(x, other.shape),
    gradients=_gradients,
    differentiable=[0, 1],
    dropped=[0, 1],
)


def upsample2d_add(x: Tensor, f: Tensor, other: Tensor, *, backend: str = "auto") -> Tensor:
    """upsample2d(x, f) + other: the image so far at twice its resolution, and what the next block draws (Karras et al.
    2020, StyleGAN2, figure 7).

    Args:
        x: [N, C, H, W], floating point.
        f: filter float32 [fh, fw], or [taps] for a separable one. Gets no gradient.
        other: [N, C, 2 H, 2 W], of x's dtype or one that x's has room for.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, C, 2 H, 2 W] in x's dtype and layout; differentiable to x and other any number of times.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "upsample2d_add"
    padding = enlarging_padding(x, f, TWO)
    n, c, height, width = x.shape
    check_addend(op, other, x, [n, c, 2 * height, 2 * width])
    args = (f, TWO, ONE, padding, False, 4.0)
    chosen = resolve("upfirdn2d", backend, x, *args)
    if chosen == "reference":
        return upsample2d(x, f, backend=chosen) + other
    y: Tensor = _op(x, other, *args, chosen)
    return y


def joined(
    mine: Tensor | None, shrunk: Tensor | None, size: Sequence[int], f: Tensor, padding: list[int], backend: str
) -> Tensor | None:
    """The gradient to an image of this size (y, x), of its own and of that to what a filter with down 2 made of it."""
    if shrunk is None:
        return mine
    args = (f, *adjoint(size, shrunk.shape[2:], f, ONE, TWO, padding), True, 1.0, backend)
    both: Tensor = registered(shrunk, *args) if mine is None else _op(shrunk, mine, *args)
    return both


class _Branch(torch.autograd.Function):
    """Of registered ops, in both directions: so differentiable again. Itself it is no op, as it returns its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, padding: list[int], backend: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(f)
        ctx.size, ctx.padding, ctx.backend = x.shape[2:], padding, backend
        ctx.set_materialize_grads(False)
        return x.view_as(x), registered(x, f, ONE, TWO, padding, False, 1.0, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (f,) = ctx.saved_tensors
        mine, shrunk = grads
        return joined(mine, shrunk, ctx.size, f, ctx.padding, ctx.backend), None, None, None


def downsampled_branch(x: Tensor, f: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x and downsample2d(x, f), where a residual block begins: on the way back the gradients of both become one in the
    pass that enlarges the second.

    Args:
        x: [N, C, H, W], floating point.
        f: filter float32 [fh, fw], or [taps] for a separable one. Gets no gradient.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, C, H, W] and [N, C, H // 2, W // 2] in x's dtype and layout; differentiable any number of times.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    padding = shrinking_padding(x, f, TWO)
    chosen = resolve("upfirdn2d", backend, x, f, ONE, TWO, padding, False, 1.0)
    # a compiler takes no `Function` that returns its input, and fuses by itself
    if chosen == "reference" or torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return x, downsample2d(x, f, backend=chosen)
    both: tuple[Tensor, Tensor] = _Branch.apply(x, f, padding, chosen)
    return both
