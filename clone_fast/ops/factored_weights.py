"""modulated_conv2d where the weight is frozen: the styles' gradient without that of the weights.

The weights of a sample are made[n, o, i] = weight[o, i] * s[n, i] * d[n, o], s the styles and d the demodulation. An op
makes them and their factors; another convolves with them and is differentiated to the factors, which takes sums over
the pixels of images that are there in place of a convolution. Of the demodulation d = (sum of s^2 * energy + eps)^-1/2
there is left

dstyles[n, i] = ds[n, i] - s[n, i] * sum over o of dd[n, o] * d[n, o]^3 * energy[o, i]

Where the gradient is to be differentiated again, it is that of `finished_weights`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast._compiler import constant_result
from clone_fast.ops import finished_weights
from clone_fast.ops.convolution_gradients import factor_gradients
from clone_fast.ops.dispatch import launch_step, note, step_backend
from clone_fast.ops.registration import Recorded, composite_gradients, like, register
from clone_fast.ops.resampling_gradients import remembered, with_dgrad_weight
from clone_fast.ops.streams import made_beside
from clone_fast.reference import modulated_conv2d as spec

FEWEST = 16  # output channels: for fewer, the weight gradient reads x once where this reads x and dx
SMALLEST = 3  # kernel: of a smaller one the weight gradient costs no more, and in TF32 it is nearer


@constant_result
def _rounds() -> bool:
    """Whether float32 convolutions may round their factors to TF32."""
    return torch.backends.cudnn.allow_tf32


def serves(x: Tensor, weight: Tensor, styles: Tensor | None) -> bool:
    """Whether the backward of this call, on a leaf, shall come here. It needs the gradient to x at any rate."""
    if styles is None or weight.ndim == 5 or weight.requires_grad or not (x.requires_grad and styles.requires_grad):
        return False
    # In float16 weights and styles are normalised first, and products of an image with its gradient have no range. In
    # float32 every bit is wanted, and sums over an image and its gradient lose one more than those of the weights.
    exact = x.dtype == torch.float16 or (x.dtype == torch.float32 and not _rounds())
    fits = not exact and weight.shape[0] >= FEWEST and weight.shape[-1] >= SMALLEST
    if not fits or step_backend("modulated_conv2d", "factored") == "reference":
        return False
    note("the styles' gradient by sums over images")
    return torch.is_grad_enabled()


def _empty(weight: Tensor, styles: Tensor, demodulate: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    compute = torch.promote_types(dtype, torch.float32)
    (n, i), o = styles.shape, weight.shape[0]
    made = finished_weights.empty(weight, styles, dtype)
    shapes = ([n, i], [n, o], [o, i]) if demodulate else ([n, i], [0], [0])
    return made, *(weight.new_empty(shape, dtype=compute) for shape in shapes)


def _run_weights(backend: str, *args: Any) -> tuple[Tensor, ...]:
    made, s, d, energy = launch_step("modulated_conv2d", "factored", backend, *args, spec.SMALLEST_STYLE)
    return made, s, s.new_empty([0]) if d is None else d, s.new_empty([0]) if energy is None else energy


def _weights_gradients(recorded: Recorded, grads: list[Any], wanted: list[int]) -> Sequence[Tensor | None]:
    _, ds, dd, _ = grads
    if torch.is_grad_enabled():
        used = [i for i, grad in enumerate(grads) if grad is not None]

        def factors(weight: Tensor, styles: Tensor, demodulate: bool, eps: float, dtype: torch.dtype) -> list[Any]:
            made = spec.factored_weights(weight, styles, demodulate=demodulate, eps=eps, dtype=dtype)
            return [made[i] for i in used]

        return composite_gradients(factors, recorded.args, wanted, [grads[i] for i in used])
    _, s, d, energy = recorded.results
    dtype, ds = recorded.args[1].dtype, torch.zeros_like(s) if ds is None else ds
    if dd is None:
        return [ds.to(dtype)]
    return [_weights_backward_op(ds, dd, s, d, energy, dtype, recorded.backend)]


_weights_op = register(
    "factored_weights",
    "(Tensor weight, Tensor styles, bool demodulate, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_weights,
    fake=lambda weight, styles, demodulate, eps, dtype: _empty(weight, styles, demodulate, dtype),
    gradients=_weights_gradients,
    differentiable=[1],
    keep_results=True,
)
_weights_backward_op = register(
    "factored_weights_backward",
    "(Tensor ds, Tensor dd, Tensor s, Tensor d, Tensor energy, ScalarType dtype) -> Tensor",
    run=lambda backend, *args: launch_step("modulated_conv2d", "factored_backward", backend, *args),
    fake=lambda ds, dd, s, d, energy, dtype: torch.empty_like(s, dtype=dtype),
)


def _run_backward(backend: str, dy: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients to x, s, d, noise, noise_strength and bias; an empty tensor where none is wanted."""
    *inputs, wanted = args
    targets = _targets(*inputs)
    found = factor_gradients(backend, dy, y, *args)
    return tuple(
        dy.new_empty([0]) if target is None or not want else like(grad, target)
        for grad, target, want in zip(found, targets, [True] * 3 + wanted, strict=True)
    )


def _targets(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    return x, *args[-2:], *args[:3]


def _fake_backward(dy: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, wanted = args
    return tuple(
        dy.new_empty([0]) if target is None or not want else torch.empty_like(target)
        for target, want in zip(_targets(*inputs), [True] * 3 + wanted, strict=True)
    )


def by_weights(backend: str, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """What the op below computes, and is differentiated by its weights, which are linear in either factor."""
    *rest, s, d = args
    change = (s / s.detach())[:, None, :, None, None]
    if d is not None:
        change = change * (d / d.detach())[:, :, None, None, None]
    y: Tensor = finished_weights.convolve(x, (weight.detach() * change).to(weight.dtype), *rest, backend)
    return y


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        return composite_gradients(lambda *args: by_weights(recorded.backend, *args), recorded.args, wanted, grads[0])
    want_sums = [i in wanted for i in (2, 3, 4)]
    dx, ds, dd, *sums = _backward_op(grads[0], *recorded.results, *recorded.args, want_sums, recorded.backend)
    found = dict(zip((0, 11, 12, 2, 3, 4), (dx, ds, dd, *sums), strict=True))
    return [found[i] for i in wanted]


_op = register(
    "factored_conv2d",
    f"({finished_weights.ARGUMENTS}, Tensor s, Tensor? d) -> Tensor",
    run=lambda backend, *args: finished_weights.run(backend, *args[:-2]),
    fake=lambda *args: finished_weights.fake(*args[:-2]),
    gradients=_gradients,
    differentiable=[0, 2, 3, 4, 11, 12],
    keep_results=True,
)
_backward_op = register(
    "factored_conv2d_backward",
    f"(Tensor dy, Tensor y, {finished_weights.ARGUMENTS}, Tensor s, Tensor? d, bool[] want_sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)


def factors(
    x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, eps: float, used_by: str, up: int = 1, down: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weights for x, and what they are made of besides: s [N, I] and, where demodulated, d [N, O].

    used_by: the backend of the convolution, which has this up and down.
    """
    factored = step_backend("modulated_conv2d", "factored")
    # beside, also for the sake of its gradient, for which the layers before this one need not wait
    args = (weight, styles, demodulate, eps, x.dtype, factored)
    make = functools.partial(with_dgrad_weight, lambda: _weights_op(*args), x, used_by, up, down)
    made, s, d, _ = remembered(made_beside(x.device, "weights", make, reads=[weight, styles]), 4)
    return made, s, d if demodulate else None


def factored_conv2d(
    x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, eps: float, *args: Any, backend: str
) -> Tensor:
    """`modulated_conv2d` with a gradient to all but the weight; the weight of any dtype, args as of `convolve`."""
    made, *rest = factors(x, weight, styles, demodulate, eps, backend, *args[4:6])
    y: Tensor = _op(x, made, *args, *rest, backend)
    return y
