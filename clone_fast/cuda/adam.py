"""adam on CUDA, by csrc/adam.cu: with enough blocks for each tensor to be as fast alone as among many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import pointer, stream


def _order(x: Tensor) -> list[int]:
    """Between elements, along each axis that has more than one."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


def _alike(one: Sequence[Tensor]) -> bool:
    """Whether the four of a parameter are float32 and lie in memory in the same order, without gaps."""
    first = one[0]
    dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
    same = all(other.dtype == torch.float32 and _order(other) == _order(first) for other in one)
    return dense and same and first.numel() > 0


def supports(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *_: object,
) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    if not all(_alike(one) for one in zip(parameters, gradients, means, squares, strict=True)):
        return "wants float32, and all of a parameter in the same order without gaps"
    return None


def launch(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    rate: Tensor,
    betas: tuple[float, float],
    epsilon: float,
) -> bool:
    """Take the step; True."""
    tensors = zip(parameters, gradients, means, squares, steps, strict=True)
    table = [(*map(pointer, one), one[0].numel()) for one in tensors]
    _C.adam(table, pointer(rate), *betas, epsilon, stream(rate))
    torch._foreach_add_(list(steps), 1)  # behind: what comes last in an iteration waits for one launch less
    # as any operation in place: a backward that still needs them as they were must find out
    torch.autograd.graph.increment_version([*parameters, *means, *squares])
    return True
