"""modulated_conv2d on finished weights, shared or per sample: the op that convolves, and its gradients.

And how a weight is finished that takes a factor and no styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.convolution_gradients import convolution_gradients, second_gradients
from clone_fast.ops.dispatch import is_whole, launch_step
from clone_fast.ops.registration import Recorded, as_result, composite_gradients, empty_result, like, register
from clone_fast.ops.resampling_gradients import filtered_down
from clone_fast.ops.streams import made_beside
from clone_fast.reference import modulated_conv2d as spec

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? noise, Tensor? noise_strength, Tensor? bias, Tensor? resample_filter, "
    "int up, int down, str act, float gain, float? clamp"
)


def _reference(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """On finished weights."""
    return spec.modulated_conv2d(
        x,
        weight,
        demodulate=False,
        up=up,
        down=down,
        resample_filter=resample_filter,
        noise=noise,
        noise_strength=noise_strength,
        bias=bias,
        act=act,
        gain=gain,
        clamp=clamp,
    )


def run(backend: str, x: Tensor, *args: Any) -> Tensor:
    """ARGUMENTS on a backend, in one launch or composed of steps."""
    if backend == "reference":
        return as_result(_reference(x, *args), x)
    up, down = args[5:7]
    if (up, down) != (1, 1) and not is_whole("modulated_conv2d", backend, x, *args):
        return as_result(_composed(backend, x, *args), x)
    y: Tensor = launch_step("modulated_conv2d", "", backend, x, *args)
    return y


def _composed(
    backend: str,
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    *activation: Any,
) -> Tensor:
    """The resampling convolution in two launches, each on the best leaf: the filter finishes it, or goes before it."""

    def step(name: str, *args: Any) -> Tensor:
        y: Tensor = launch_step("modulated_conv2d", name, backend, *args)
        return y

    k, epilogue = weight.shape[-1], (noise, noise_strength, bias, *activation)
    f = torch.ones([1, 1], device=x.device) if resample_filter is None else resample_filter
    if up == 2:
        z = step("conv", x, weight, 2, 0, True)
        return step("finish", z, f, spec.upsampling_padding(f, k), 4.0, *epilogue)
    return convolve_filtered(backend, filtered_down(backend, x, f, k), weight, *epilogue)


def convolve_filtered(backend: str, filtered: Tensor, weight: Tensor, *epilogue: Any) -> Tensor:
    """The second of the two launches of `down`, of what `filtered_down` made. epilogue: noise and so on."""
    stride = 1 if weight.shape[-1] == 1 else 2  # a 1x1 kernel is decimated inside the FIR
    y: Tensor = launch_step("modulated_conv2d", "conv_finish", backend, filtered, weight, stride, 0, *epilogue)
    return y


def fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """What `run` returns, with nothing in it."""
    up, down = args[4], args[5]
    height, width = (size * up // down for size in x.shape[2:])
    return empty_result(x, [x.shape[0], weight.shape[-4], height, width])


def empty(weight: Tensor, styles: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, O, I, k, k] in the memory order [N, k, k, O, I] that the convolutions read; without styles no N."""
    *_, o, i, k, _ = weight.shape
    if styles is None:
        return weight.new_empty([k, k, o, i], dtype=dtype).permute(2, 3, 0, 1)
    return weight.new_empty([styles.shape[0], k, k, o, i], dtype=dtype).permute(0, 3, 4, 1, 2)


def _run_backward(backend: str, dy: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients to x, weight, noise, noise_strength and bias; an empty tensor where none is wanted."""
    *inputs, wanted = args
    found = convolution_gradients(backend, dy, y, *args)
    return tuple(like(found[i], inputs[i]) if wanted[i] else dy.new_empty([0]) for i in range(5))


def _fake_backward(dy: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, wanted = args
    return tuple(torch.empty_like(inputs[i]) if wanted[i] else dy.new_empty([0]) for i in range(5))


def gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> Sequence[Tensor | None]:
    """Of `convolve` recorded with its result."""
    if recorded.backend == "reference":
        return composite_gradients(_reference, recorded.args, wanted, grads[0])
    found = _backward_op(grads[0], *recorded.results, *recorded.args, [i in wanted for i in range(5)], recorded.backend)
    return [found[i] for i in wanted]


def _first_derivative(dy: Tensor, y: Tensor, *args: Any) -> list[Tensor | None]:
    """What the op below computes, differentiable again where grad mode is on."""
    *inputs, wanted = args
    positions = [i for i in range(5) if wanted[i]]
    found = dict(zip(positions, composite_gradients(_reference, inputs, positions, dy), strict=True))
    return [found.get(i) for i in range(5)]


def _second_gradients(recorded: Recorded, grads: list[Any], wanted: list[int]) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled() or grads[2] is not None or grads[3] is not None:  # rare: by PyTorch's own autograd
        used = [i for i, grad in enumerate(grads) if grad is not None]
        return composite_gradients(
            lambda *a: [_first_derivative(*a)[i] for i in used], recorded.args, wanted, [grads[i] for i in used]
        )
    found = second_gradients(convolve, _backward_op, recorded, grads[0], grads[1], grads[4], wanted)
    return [found[i] for i in wanted]


convolve = register(
    "modulated_conv2d",
    f"({ARGUMENTS}) -> Tensor",
    run=run,
    fake=fake,
    gradients=gradients,
    differentiable=[0, 1, 2, 3, 4],
    keep_results=True,
)
_backward_op = register(
    "modulated_conv2d_backward",
    f"(Tensor dy, Tensor y, {ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    gradients=_second_gradients,
    differentiable=[0, 2, 3, 4, 5],  # not y: what the backward takes from it are slopes, constant but for their kinks
)


def _run_scaled(_: str, weight: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, dtype))
    return torch.mul(wide, factor, out=torch.empty_like(wide, dtype=dtype))


def _scaled_gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> Sequence[Tensor | None]:
    weight, factor, _ = recorded.args
    return [_scaled_op(grads[0], factor, weight.dtype, recorded.backend)]


_scaled_op = register(
    "scaled_weight",
    "(Tensor weight, float factor, ScalarType dtype) -> Tensor",
    run=_run_scaled,
    fake=lambda weight, factor, dtype: torch.empty_like(weight, dtype=dtype),
    gradients=_scaled_gradients,
    differentiable=[0],
    dropped=[0],
)


def scaled_weight(weight: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """weight * factor in dtype, rounded once: PyTorch's conversion does both in one launch, on every backend.

    On a lane, as `modulated_weights`: the weight's gradient, too, is nothing that the layers before this one wait for.
    """
    return made_beside(weight.device, "weights", lambda: _scaled_op(weight, factor, dtype, "reference"), [weight])
