"""A step of Adam, of all tensors that are ready at once. In place, and nothing to differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clone_fast.ops.dispatch import is_fast, step_if_any
from clone_fast.reference import adam as spec

__all__ = ["adam_"]


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    rate: Tensor,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
    **scaled: Any,
) -> None:
    """One step of Adam (Kingma and Ba 2015, "Adam", algorithm 1), in place.

    Args:
        parameters, gradients, means, squares: of any shape, the four of a parameter alike; means of the gradients and
            of their squares, of the steps before.
        steps: [] each, how many there were before this one.
        rate: [], the learning rate, on their device.
        betas: how much of both means stays. epsilon: added to the root of the second.
        scaled: `grad_scale` and `found_inf` of a GradScaler, for gradients that are too large by a factor, and may be
            infinite; then PyTorch's own function takes the step.
    """
    args = (parameters, gradients, means, squares, steps, rate, betas, epsilon)
    if not parameters or (not scaled and is_fast(rate.device) and step_if_any("adam", "", "cuda", *args)):
        return
    spec.adam_(*args, **scaled)
