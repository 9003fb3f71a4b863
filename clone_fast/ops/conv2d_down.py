"""conv2d_down: the two convolutions of a discriminator's block, the second of which halves the resolution.

On the way back the second one's filter ends where the activation of the first begins. As two ops the gradient between
them was an image of all channels, written by the one and read by the other. And what the second one reads, filtered, is
kept for its weight gradient, which would filter once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops import finished_weights
from clone_fast.ops.convolution_gradients import IN_ONE_PASS, _behind_activation, _summed, _through_activation
from clone_fast.ops.dispatch import launch_step, resolve, runs_step, step_if_any
from clone_fast.ops.modulated_conv2d import (
    UNCHANGED,
    check_arguments,
    fused_activation,
    modulated_conv2d,
    modulated_weights,
)
from clone_fast.ops.registration import Recorded, as_result, empty_result, like, register
from clone_fast.ops.resampling_gradients import (
    ONE,
    dgrad_weight,
    down_gradients,
    filtered_down,
    size_filtered_down,
    size_transposed,
)
from clone_fast.ops.upfirdn2d import adjoint
from clone_fast.reference.bias_act import activation_defaults
from clone_fast.reference.modulated_conv2d import downsampling_padding

__all__ = ["conv2d_down"]

# positions: 0 to 5 are the first convolution's; those of the second read its result
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, str act, float gain, float? clamp, Tensor down_weight, Tensor? down_bias, "
    "Tensor resample_filter, str down_act, float down_gain, float? down_clamp, bool keep_filtered, str down_backend"
)
DIFFERENTIABLE = [0, 1, 2, 6, 7]
OF_Y = -1  # in the place of such a position
KEPT = 1 << 29  # bytes of what is kept, at most: the largest images are better filtered twice than held all the way


def _both(args: Sequence[Any], y: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of either convolution, as `finished_weights` takes them, of those above and the first's result."""
    x, weight, bias, act, gain, clamp, down_weight, down_bias, f, *down_activation, _, _ = args
    first = (x, weight, None, None, bias, None, 1, 1, act, gain, clamp)
    return first, (y, down_weight, None, None, down_bias, f, 1, 2, *down_activation)


def _run(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, z, and what lies between them filtered, which is empty where it is not to be kept."""
    y = finished_weights.run(backend, *_both(args, None)[0])
    *_, keep_filtered, down_backend = args
    second = _both(args, y)[1]
    if not keep_filtered:
        return y, finished_weights.run(down_backend, *second), y.new_empty([0])
    found = step_if_any("modulated_conv2d", "kept", down_backend, *second)
    if found is not None:
        z, filtered = found
        return y, as_result(z, y), as_result(filtered, y)
    _, weight, *shifts, f, _, _, act, gain, clamp = second
    filtered = as_result(filtered_down(down_backend, y, f, weight.shape[-1]), y)
    z = finished_weights.convolve_filtered(down_backend, filtered, weight, *shifts, act, gain, clamp)
    return y, as_result(z, y), filtered


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, down_weight, f, keep_filtered = args[0], args[1], args[6], args[8], args[-2]
    n, _, height, width = x.shape
    m = weight.shape[-4]
    filtered = [n, m, *size_filtered_down(x, f, down_weight.shape[-1])]
    return (
        empty_result(x, [n, m, height, width]),
        empty_result(x, [n, down_weight.shape[-4], height // 2, width // 2]),
        empty_result(x, filtered) if keep_filtered else x.new_empty([0]),
    )


def _gradients(recorded: Recorded, grads: list[Any], wanted: list[int]) -> Sequence[Tensor | None]:
    """Of y, too: a second derivative comes back through it, which is the first convolution's result as of an op."""
    if grads[1] is not None and not torch.is_grad_enabled() and recorded.backend != "reference":
        flags = [i in wanted for i in DIFFERENTIABLE]
        of_both = _backward_op(*recorded.results, *grads[:2], *recorded.args, flags, recorded.backend)
        return [of_both[DIFFERENTIABLE.index(i)] for i in wanted]
    (y, z, _), (dy, dz, _) = recorded.results, grads
    first, second = _both(recorded.args, y)
    found: dict[int, Tensor | None] = {}

    def take(op: Recorded, grad: Tensor, positions: dict[int, int]) -> None:
        """What an op's gradient finds at places 0, 1 and 4 of its arguments, at these positions."""
        places = [place for place, position in positions.items() if position in needed]
        if places:
            of_op = finished_weights.gradients(op, [grad], places)
            found.update(zip((positions[place] for place in places), of_op, strict=True))

    needed = {*wanted, OF_Y} if set(wanted) & {0, 1, 2} else set(wanted)
    if dz is not None:
        take(Recorded(second, (z,), recorded.args[-1]), dz, {0: OF_Y, 1: 6, 4: 7})
        through = found.get(OF_Y)
        if through is not None:
            dy = through if dy is None else dy + through
    if dy is not None:
        take(Recorded(first, (y,), recorded.backend), dy, {0: 0, 1: 1, 4: 2})
    return [found.get(i) for i in wanted]


def _run_backward(
    backend: str, y: Tensor, z: Tensor, filtered: Tensor, dy: Tensor | None, dz: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """A gradient for each of DIFFERENTIABLE; an empty tensor where none is wanted."""
    *inputs, wanted = args
    found = _first_gradients(backend, (y, z, filtered), dy, dz, inputs, wanted)
    return tuple(
        like(grad, inputs[i]) if want else y.new_empty([0])
        for i, grad, want in zip(DIFFERENTIABLE, found, wanted, strict=True)
    )


def _first_gradients(
    backend: str,
    results: tuple[Tensor, ...],
    dy: Tensor | None,
    dz: Tensor,
    inputs: Sequence[Any],
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients to DIFFERENTIABLE, None where not wanted."""
    y, z, filtered = results
    want_x, want_weight, want_bias, want_down_weight, want_down_bias = wanted
    (x, weight, _, _, bias, *_, act, gain, clamp), second = _both(inputs, y)
    *_, keep_filtered, down_backend = inputs
    _, down_weight, _, _, down_bias, f, *_, down_act, down_gain, down_clamp = second
    activation, sums_of_bias = (act, gain, clamp), [False, False, want_bias]

    def step(name: str, *args: Any) -> Any:
        return launch_step("modulated_conv2d", name, down_backend, *args)

    down_sums = [False, False, want_down_bias]
    shifts, down_activation = (None, None, down_bias), (down_act, down_gain, down_clamp)
    geometry = (y, down_weight, f, 1)
    h, *parts, _ = _through_activation(down_backend, dz, z, geometry, shifts, down_activation, down_sums, False)

    def in_one_pass() -> tuple[Tensor, list[Tensor | None]] | None:
        """The filter of the second convolution and the activation of the first, where a leaf can and that is faster.

        Of few pixels the second convolution and its filter may be one launch, too.
        """
        k = down_weight.shape[-1]
        if k == 1 or dy is not None or y.shape[2] * y.shape[3] < IN_ONE_PASS:
            return None
        size = size_transposed(h, k)
        fir = (f, adjoint(y.shape[2:], size, f, ONE, ONE, downsampling_padding(f, k))[2], True, 1.0)
        unfiltered = y.new_empty([1, 1, 1, 1]).expand(*y.shape[:2], *size)  # to ask with
        if not runs_step("modulated_conv2d", "fir_act", unfiltered, y, *activation, want_bias, *fir):
            return None
        unfiltered = step("conv", h, dgrad_weight(down_weight), 2, 0, True)
        g, of_bias = step("fir_act", unfiltered, y, *activation, want_bias, *fir)
        return g, [None, None, of_bias]

    def onward() -> tuple[Tensor, list[Tensor | None]] | None:
        """The gradient behind the first convolution's activation and the parts of its sums."""
        if not any(wanted[:3]):
            return None
        found = in_one_pass()
        if found is not None:
            return found
        through, _ = down_gradients(down_backend, step, h, y, down_weight, f, True, False)
        through = through if dy is None else through + dy
        of_first = (x, weight, None, 1)
        g, *sums, _ = _through_activation(
            backend, through, y, of_first, (None, None, bias), activation, sums_of_bias, False
        )
        return g, sums

    def rest() -> tuple[Any, Tensor | None]:
        kept = filtered if keep_filtered else None
        return down_gradients(down_backend, step, h, y, down_weight, f, True, want_down_weight, onward, kept)

    (_, _, of_down_bias), (first, of_down_weight) = _summed(down_backend, parts, *shifts, rest)
    of_x = of_weight = of_bias = None
    if first is not None:
        g, sums = first
        rest_of = (x, weight, None, None, bias, None, 1, 1)
        of_x, of_weight, _, _, of_bias = _behind_activation(backend, g, sums, *rest_of, want_x, want_weight)
    return [of_x, of_weight, of_bias, of_down_weight, of_down_bias]


def _fake_backward(
    y: Tensor, z: Tensor, filtered: Tensor, dy: Tensor | None, dz: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *inputs, wanted = args
    return tuple(
        torch.empty_like(inputs[i]) if want else y.new_empty([0])
        for i, want in zip(DIFFERENTIABLE, wanted, strict=True)
    )


_op = register(
    "conv2d_down",
    f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    gradients=_gradients,
    differentiable=DIFFERENTIABLE,
    keep_results=True,
)
_backward_op = register(
    "conv2d_down_backward",
    f"(Tensor y, Tensor z, Tensor filtered, Tensor? dy, Tensor dz, {ARGUMENTS}, bool[] wanted) "
    f"-> ({', '.join(['Tensor'] * 5)})",
    run=_run_backward,
    fake=_fake_backward,
)


def conv2d_down(
    x: Tensor,
    weight: Tensor,
    down_weight: Tensor,
    resample_filter: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    down_bias: Tensor | None = None,
    down_act: str = "linear",
    down_gain: float | None = None,
    down_clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The two convolutions of a block of StyleGAN2's discriminator (Karras et al. 2020, figure 7).

    y = modulated_conv2d(x, weight, None, demodulate=False, bias=..., act=..., gain=..., clamp=...)
    z = modulated_conv2d(y, down_weight, None, demodulate=False, down=2, resample_filter=..., bias=down_bias, ...)

    Args:
        x: [N, I, H, W], floating point; H and W even.
        weight: [M, I, k, k]. down_weight: [O, M, k', k'].
        resample_filter: float32 [fh, fw] or [taps]. Gets no gradient.
        bias, act, gain, clamp: of the first convolution, as of `modulated_conv2d`; down_bias and so on: of the second.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        z [N, O, H / 2, W / 2] in x's dtype and layout; differentiable to x, weights and biases, twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    of_first: dict[str, Any] = {"bias": bias, "act": act, "gain": gain, "clamp": clamp}
    of_second: dict[str, Any] = {"bias": down_bias, "act": down_act, "gain": down_gain, "clamp": down_clamp}
    of_second |= {"down": 2, "resample_filter": resample_filter}
    if weight.shape[-4] == x.shape[1]:  # then x stands for y, too, in what follows
        first, fused, chosen = _resolved(x, weight, backend, **of_first)
        second, down_fused, down_chosen = _resolved(x, down_weight, backend, **of_second)
        if fused and down_fused and "reference" not in (chosen, down_chosen):
            both = (x, *first, *fused, *second, resample_filter, *down_fused)
            keep_filtered = torch.is_grad_enabled() and second[0].requires_grad and x.nbytes <= KEPT
            return _op(*both, keep_filtered, down_chosen, chosen)[1]
    y = modulated_conv2d(x, weight, None, demodulate=False, **of_first, backend=backend)
    return modulated_conv2d(y, down_weight, None, demodulate=False, **of_second, backend=backend)


def _resolved(
    x: Tensor,
    weight: Tensor,
    backend: str,
    bias: Tensor | None,
    act: str,
    gain: float | None,
    clamp: float | None,
    down: int = 1,
    resample_filter: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor | None], tuple[str, float, float | None] | None, str]:
    """Weight and bias as the op takes them, the activation where it is done with the convolution, and the backend."""
    eps = 1e-8  # of a demodulation that there is not
    rest = (None, None, bias, act, gain, clamp, eps)
    limit = check_arguments(x, weight, None, 1, down, resample_filter, False, *rest)
    fused = fused_activation(act, activation_defaults(act, None, gain)[1], limit)
    last = fused or UNCHANGED
    chosen = resolve("modulated_conv2d", backend, x, weight, None, None, bias, resample_filter, 1, down, *last)
    if chosen != "reference":
        weight = modulated_weights(weight, None, x, False, eps, chosen, down=down).to(x.dtype)
    return (weight, None if bias is None else bias.to(x.dtype)), fused, chosen
