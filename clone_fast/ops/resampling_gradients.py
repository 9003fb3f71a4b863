"""How the gradients of a convolution that resamples are made of steps: a convolution of stride 2 and its filter.

up:    h = adjoint FIR of g, in the same pass if a leaf can; dx = conv of h with stride 2; dw = correlation of h and x
down:  dx = adjoint FIR of (transposed conv of g); dw = correlation of FIR(x) and g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from clone_fast.ops.dispatch import is_whole, launch_step, own_step
from clone_fast.ops.registration import like
from clone_fast.ops.streams import SMALL, left_beside, side_by_side
from clone_fast.ops.upfirdn2d import adjoint
from clone_fast.reference.modulated_conv2d import downsampling_padding, upsampling_padding
from clone_fast.reference.upfirdn2d import filter_size, output_size

Found = TypeVar("Found")

ONE = [1, 1]
TWO = [2, 2]


def both_gradients(
    weight: Tensor, reads: list[Tensor], dw: Callable[[], Tensor] | None, dx: Callable[[], Found]
) -> tuple[Tensor | None, Found]:
    """Both gradients of a convolution, side by side; dw reads these images, and is None where it is not wanted."""
    if dw is None:
        return None, dx()
    # in the weight's memory order: a copy later on, for which nothing waits, would be made on another stream
    return left_beside(weight.device, "wgrad", [weight], lambda: like(dw(), weight), dx, reads)


def with_dgrad_weight(
    make: Callable[[], tuple[Tensor, ...]], x: Tensor, backend: str, up: int, down: int
) -> tuple[Tensor, ...]:
    """What `make` makes, first of it the weight of a convolution of x, and in a capture a copy of that weight in the
    order that dgrad reads, where it would copy it.

    In the backward the copy would be one more launch between two layers, short as it is, and meanwhile weight gradients
    on their lanes take the GPU, which dgrad then waits for. Here both are made on a lane, ahead of the layers.

    Not of images that are not `SMALL`: there weight gradients are waited for, and do better before dgrad, or beside it,
    than beside the pass over memory that follows it.
    """
    made = make()
    if up == down or not (side_by_side(x.device) and torch.is_grad_enabled() and x.requires_grad):
        return made
    result = x.nbytes // x.shape[1] * made[0].shape[-4] * up**2 // down**2
    if max(x.nbytes, result) > SMALL:
        return made
    with torch.no_grad():
        copy = own_step("modulated_conv2d", "dgrad_weight", backend, x, made[0].transpose(-3, -4), down == 2)
    return made if copy is None else (*made, copy)


def remembered(made: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The first so many of them; the weight among these knows its copy for `dgrad_weight`."""
    for copy in made[count:]:
        made[0].dgrad_weight = copy  # type: ignore[attr-defined]
    return made[:count]


def dgrad_weight(weight: Tensor) -> Tensor:
    """The weight with O and I exchanged: a view, unless `with_dgrad_weight` made a copy."""
    found: Tensor = getattr(weight, "dgrad_weight", weight.transpose(-3, -4))
    return found


def _fir(backend: str, x: Tensor, f: Tensor, *args: Any) -> Tensor:
    y: Tensor = launch_step("upfirdn2d", "", backend, x, f, *args)
    return y


def size_transposed(x: Tensor, k: int) -> list[int]:
    """[height, width] of a transposed convolution of x with stride 2 and a kernel of this size."""
    return [2 * (n - 1) + k for n in x.shape[2:]]


def up_padding(x: Tensor, g: Tensor, weight: Tensor, f: Tensor) -> list[int]:
    """Of the adjoint FIR, from g's size to that of the transposed convolution."""
    k = weight.shape[-1]
    return adjoint(size_transposed(x, k), g.shape[2:], f, ONE, ONE, upsampling_padding(f, k))[2]


def up_gradients(
    backend: str, step: Any, g: Tensor, x: Tensor, weight: Tensor, f: Tensor, want_dx: bool, want_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    k = weight.shape[-1]
    filtered = g.shape[-1] % 2 == 1  # h is odd in size, as a kernel is, and g is twice x
    h = g if filtered else _fir(backend, g, f, ONE, ONE, up_padding(x, g, weight, f), True, 4.0)
    dw, dx = both_gradients(
        weight,
        [h, x],
        (lambda: step("wgrad", h, x, k, 2, 0, weight.ndim == 5, weight.dtype).transpose(-3, -4)) if want_dw else None,
        lambda: step("conv", h, dgrad_weight(weight), 2, 0, False) if want_dx else None,
    )
    return dx, dw


def filtered_down(backend: str, x: Tensor, f: Tensor, k: int) -> Tensor:
    """What the convolution of `down` reads, whose kernel has this size: of 1x1 it is decimated inside the FIR."""
    return _fir(backend, x, f, ONE, TWO if k == 1 else ONE, downsampling_padding(f, k), False, 1.0)


def size_filtered_down(x: Tensor, f: Tensor, k: int) -> list[int]:
    """[height, width] of `filtered_down`."""
    down, (x0, x1, y0, y1) = 2 if k == 1 else 1, downsampling_padding(f, k)
    (fw, fh), (height, width) = filter_size(f), x.shape[2:]
    return [output_size(height, fh, 1, down, y0, y1), output_size(width, fw, 1, down, x0, x1)]


def down_gradients(
    backend: str, step: Any, g: Tensor, x: Tensor, weight: Tensor, f: Tensor, want_dx: bool, want_dw: bool,
    onward: Callable[[], Any] | None = None, filtered_x: Tensor | None = None,
) -> tuple[Any, Tensor | None]:  # fmt: skip
    """onward: makes what takes the place of the gradient to x. filtered_x: what the convolution read, where kept."""
    k = weight.shape[-1]
    stride, down = (1, TWO) if k == 1 else (2, ONE)
    padding = downsampling_padding(f, k)

    def input_gradient() -> Tensor:
        if k > 1 and adjoint(x.shape[2:], size_transposed(g, k), f, ONE, down, padding)[2] == upsampling_padding(f, k):
            # a transposed convolution and its filter are `up`, whose filter has a gain of 4
            args = (g, dgrad_weight(weight), None, None, None, f.flip(*range(f.ndim)), 2, 1, "linear", 0.25, None)
            if is_whole("modulated_conv2d", backend, *args):
                return step("", *args)
        filtered = step("conv", g, dgrad_weight(weight), stride, 0, True)
        return _fir(backend, filtered, f, *adjoint(x.shape[2:], filtered.shape[2:], f, ONE, down, padding), True, 1.0)

    def weight_gradient() -> Tensor:
        filtered = filtered_down(backend, x, f, k) if filtered_x is None else filtered_x
        dw: Tensor = step("wgrad", filtered, g, k, stride, 0, weight.ndim == 5, weight.dtype)
        return dw

    dw, dx = both_gradients(
        weight,
        [x if filtered_x is None else filtered_x, g],
        weight_gradient if want_dw else None,
        onward or (lambda: input_gradient() if want_dx else None),
    )
    return dx, dw
