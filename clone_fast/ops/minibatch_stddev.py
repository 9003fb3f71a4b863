"""minibatch_stddev: what lets a discriminator see that a batch lacks variety."""

from __future__ import annotations

from torch import Tensor

from clone_fast.ops.checks import check_image, check_result
from clone_fast.ops.dispatch import launch_step, resolve
from clone_fast.ops.registration import (
    Recorded,
    as_result,
    composite_gradients,
    empty_result,
    register,
    without_autocast,
)
from clone_fast.reference import minibatch_stddev as spec

__all__ = ["minibatch_stddev"]


def _run(backend: str, x: Tensor, group: int, num_channels: int) -> Tensor:
    if backend == "reference":
        return as_result(spec.minibatch_stddev(x, group, num_channels), x)
    y: Tensor = launch_step("minibatch_stddev", "", backend, x, group, num_channels)
    return y


def _run_backward(backend: str, dy: Tensor, x: Tensor, group: int, num_channels: int) -> Tensor:
    if backend == "reference":
        return as_result(spec.minibatch_stddev_backward(dy, x, group, num_channels), x)
    dx: Tensor = launch_step("minibatch_stddev", "backward", backend, dy, x, group, num_channels)
    return dx


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    return [_backward_op(grads[0], *recorded.args, recorded.backend)]


def _second(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    """Of the formula of the first, by PyTorch's own autograd."""
    return composite_gradients(spec.minibatch_stddev_backward, recorded.args, wanted, grads[0])


_op = register(
    "minibatch_stddev",
    "(Tensor x, SymInt group, int num_channels) -> Tensor",
    run=_run,
    fake=lambda x, group, num_channels: empty_result(x, [x.shape[0], x.shape[1] + num_channels, *x.shape[2:]]),
    gradients=_gradients,
    differentiable=[0],
)
_backward_op = register(
    "minibatch_stddev_backward",
    "(Tensor dy, Tensor x, SymInt group, int num_channels) -> Tensor",
    run=_run_backward,
    fake=lambda dy, x, group, num_channels: empty_result(x, x.shape),
    gradients=_second,
    differentiable=[0, 1],
)
_exact = without_autocast(spec.minibatch_stddev)


def minibatch_stddev(x: Tensor, group_size: int | None, num_channels: int = 1, *, backend: str = "auto") -> Tensor:
    """Append to [N, C, H, W] the mean standard deviation within groups of samples (Karras et al. 2018, section 3).

    Computed in float32 at least, appended in x's dtype.

    Sample n belongs to group n mod (N / group_size); in a group of one the feature is the constant 1e-4.

    Args:
        x: [N, C, H, W], floating point.
        group_size: samples that share a feature, N at most; None for all N.
        num_channels: F features, each of C / F channels.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, C + F, H, W] in x's dtype: x, and of every feature one number on all pixels. Differentiable to x any number
        of times.

    Raises:
        TypeError: x is no tensor of floating point.
        ValueError: N is no multiple of the group size, C none of num_channels, or an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "minibatch_stddev"
    check_image(op, "x", x)
    n, c, h, w = x.shape
    if group_size is not None and group_size < 1:
        raise ValueError(f"{op}: group_size must be None or an integer >= 1, got {group_size!r}")
    if num_channels < 1 or c % num_channels:
        raise ValueError(f"{op}: num_channels must divide x's {c} channels, got {num_channels!r}")
    check_result(op, [n, c + num_channels, h, w])
    group = n if group_size is None else min(group_size, n)
    if n % group:
        raise ValueError(f"the batch must be a multiple of the discriminator's group size {group}, got {n}")
    chosen = resolve(op, backend, x, group, num_channels)
    y: Tensor = _exact(x, group, num_channels) if chosen == "reference" else _op(x, group, num_channels, chosen)
    return y
