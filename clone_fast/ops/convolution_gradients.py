"""The derivatives of modulated_conv2d on finished weights: the first from the steps that the leaves offer.

g = dy * gain * slope, and its sums to bias and noise      one pass over dy and y, with what comes back through an image
1x1, with few channels on one side: all in one pass over dy, y and x, but for sums of its programs
plain: dx = conv of g with the transposed weight; dw = correlation of x and g
up, down: `resampling_gradients`

The second is made of the op and of the first, since dx and dw are linear in g, and in weight or in x: of v, which comes
to dx, and u, which comes to dw,

to g:      conv of v with the weight + conv of x with u
to weight: correlation of v and g
to x:      what dx is, with u for the weight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from clone_fast.ops.dispatch import launch_best, launch_step, step_if_any
from clone_fast.ops.registration import Recorded, like
from clone_fast.ops.resampling_gradients import both_gradients, down_gradients, up_gradients, up_padding
from clone_fast.ops.streams import left_beside

Found = TypeVar("Found")

IN_ONE_PASS = 512 * 512  # pixels; of fewer, activation and filter are slower in one pass, as they do not run alone


def convolution_gradients(
    backend: str,
    dy: Tensor,
    y: Tensor,
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
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients to x, weight, noise, noise_strength and bias, None where not wanted."""
    want_dx, want_dw, *want_sums = wanted
    if (weight.shape[-1], up, down) == (1, 1, 1) and not any(want_sums[:2]):
        pointwise = (dy, y, x, weight, act, gain, clamp, want_dx, want_dw, want_sums[2])
        found = step_if_any("modulated_conv2d", "pointwise_backward", backend, *pointwise)
        if found is not None:
            dx, *parts = found
            return [dx, *_pointwise_summed(backend, parts, weight, bias)]
    if (act, gain, clamp, any(want_sums)) == ("linear", 1.0, None, False) and dy.stride() == y.stride():
        g, parts = dy, [None] * 3
    else:
        geometry, shifts = (x, weight, resample_filter, up), (noise, noise_strength, bias)
        g, *parts, _ = _through_activation(backend, dy, y, geometry, shifts, (act, gain, clamp), want_sums, False)
    inputs = (x, weight, noise, noise_strength, bias, resample_filter, up, down)
    return _behind_activation(backend, g, parts, *inputs, want_dx, want_dw)


def _through_activation(
    backend: str,
    dy: Tensor,
    y: Tensor,
    geometry: tuple[Tensor, Tensor, Tensor | None, int],
    shifts: tuple[Tensor | None, ...],
    activation: tuple[str, float, float | None],
    want_sums: list[bool],
    want_dots: bool,
) -> Any:
    """`act_backward`: g, the parts of the sums, the dots. For `up`, where a leaf can, with h in place of g.

    geometry: x, weight, resample_filter, up. shifts: noise, noise_strength, bias.
    """
    x, weight, f, up = geometry
    if up == 2 and f is not None and y.shape[2] * y.shape[3] >= IN_ONE_PASS:
        fir = (f, up_padding(x, y, weight, f), True, 4.0)
        args = (dy, y, *shifts, *activation, *want_sums, want_dots, *fir)
        found = step_if_any("modulated_conv2d", "act_fir", backend, *args)
        if found is not None:
            return found
    *noise, bias = shifts
    of_dots = (bias, True) if want_dots else ()
    return launch_best("modulated_conv2d", "act_backward", dy, y, *noise, *activation, *want_sums, *of_dots)


def _behind_activation(
    backend: str,
    g: Tensor,
    parts: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    want_dx: bool,
    want_dw: bool,
) -> list[Tensor | None]:
    """Gradients to x, weight, noise, noise_strength and bias of g, or h, and these parts of sums."""

    def step(name: str, *args: Any) -> Any:
        return launch_step("modulated_conv2d", name, backend, *args)

    def rest() -> tuple[Tensor | None, Tensor | None]:
        if up == 1 and down == 1:
            k = weight.shape[-1]
            dw, dx = both_gradients(
                weight,
                [x, g],
                (lambda: step("wgrad", x, g, k, 1, k // 2, weight.ndim == 5, weight.dtype)) if want_dw else None,
                lambda: step("conv", g, weight.transpose(-3, -4), 1, k // 2, True) if want_dx else None,
            )
            return dx, dw
        if not (want_dx or want_dw):
            return None, None
        f = torch.ones([1, 1], device=x.device) if resample_filter is None else resample_filter
        resample = up_gradients if up == 2 else down_gradients
        return resample(backend, step, g, x, weight, f, want_dx, want_dw)

    sums, (dx, dw) = _summed(backend, parts, noise, noise_strength, bias, rest)
    return [dx, dw, *sums]


def factor_gradients(
    backend: str,
    dy: Tensor,
    y: Tensor,
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
    s: Tensor,
    d: Tensor | None,
    want_sums: list[bool],
) -> list[Tensor | None]:
    """Gradients to x, s and d, and where wanted to noise, noise_strength and bias; see `factored_weights`.

    c, the convolution alone, is linear in s[n, i] with x[n, i], and in d[n, o] with itself. So

    s[n, i] ds[n, i] = sum over the pixels of x[n, i] dx[n, i]
    d[n, o] dd[n, o] = sum over the pixels of g[n, o] c[n, o], where g c = dy y - g (noise * noise_strength + bias)

    since g z = dy y for an activation of slopes alone, and g = 0 beyond the clamp.
    """
    geometry, shifts = (x, weight, resample_filter, up), (noise, noise_strength, bias)
    activation = (act, gain, clamp)
    g, *parts, dots = _through_activation(backend, dy, y, geometry, shifts, activation, want_sums, d is not None)
    inputs = (x, weight, noise, noise_strength, bias, resample_filter, up, down)
    return _of_factors(backend, g, parts, dots, *inputs, s, d)


def _of_factors(
    backend: str,
    g: Tensor,
    parts: Sequence[Tensor | None],
    dots: Tensor | None,
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    s: Tensor,
    d: Tensor | None,
) -> list[Tensor | None]:
    """Gradients to x, s, d, noise, noise_strength and bias of the convolution's gradient, and parts of sums."""
    inputs = (x, weight, noise, noise_strength, bias, resample_filter, up, down)
    dx, _, *sums = _behind_activation(backend, g, parts, *inputs, True, False)

    def of_factors() -> tuple[Tensor, Tensor | None]:  # in the memory order of s and d, as `both_gradients` says
        ds, dd = launch_step("modulated_conv2d", "factor_gradients", backend, x, dx, s, dots, d)
        return like(ds, s), None if d is None else like(dd, d)

    reads = [tensor for tensor in (x, dx, dots) if tensor is not None]
    (ds, dd), _ = left_beside(x.device, "wgrad", [s], of_factors, lambda: None, reads)
    return [dx, ds, dd, *sums]


def drawn_gradients(
    backend: str,
    dy: Tensor | None,
    dimage: Tensor,
    y: Tensor,
    image: Tensor,
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    s: Tensor | None,
    d: Tensor | None,
    image_weight: Tensor,
    image_bias: Tensor | None,
    image_clamp: float | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients to x, weight, noise, noise_strength, bias, s, d, image_weight and image_bias, None where not wanted.

    Of a convolution without resampling and of the image that a 1x1 kernel draws of its result: what comes back through
    the image, the sum with dy, the activation and all sums are one pass over y. With s the gradients are those of
    `factor_gradients`, and the weight has none.
    """
    want_dx, want_dw, *want_sums = wanted[:5]
    factor = s if any(wanted[5:7]) else None
    activation = (noise, noise_strength, act, gain, clamp, *want_sums, bias, factor is not None and d is not None)
    args = (dy, dimage, y, image_weight, image, image_clamp, *activation, *wanted[7:])
    g, *parts, dots, of_image_weight, of_image_bias = launch_best("modulated_conv2d", "drawn_act_backward", *args)
    # ahead of the convolution, which the lanes that add these up would wait for
    dw_image, _, _, db_image = _pointwise_summed(backend, (of_image_weight, of_image_bias), image_weight, image_bias)
    inputs = (x, weight, noise, noise_strength, bias, None, 1, 1)
    if factor is not None:
        dx, ds, dd, *sums = _of_factors(backend, g, parts, dots, *inputs, factor, d)
        return [dx, None, *sums, ds, dd, dw_image, db_image]
    dx, dw, *sums = _behind_activation(backend, g, parts, *inputs, want_dx, want_dw)
    return [dx, dw, *sums, None, None, dw_image, db_image]


def _summed(
    backend: str,
    parts: Sequence[Tensor | None],
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    rest: Callable[[], Found],
) -> tuple[list[Tensor | None], Found]:
    """The sums over the gradient of an activation to these three, of their parts, and what `rest` finds beside."""
    given = (noise, noise_strength, bias)
    wanted = [(of, part) for of, part in zip(given, parts, strict=True) if of is not None and part is not None]
    if not wanted:
        return [None] * 3, rest()

    def add_up() -> list[Tensor | None]:  # in the memory order of what they are of, as `both_gradients` says
        args = (*parts, noise, noise_strength, wanted[0][0].dtype)
        found = launch_step("modulated_conv2d", "act_sums", backend, *args)
        return [None if one is None or of is None else like(one, of) for one, of in zip(found, given, strict=True)]

    of, reads = zip(*wanted, strict=True)
    return left_beside(reads[0].device, "sums", of, add_up, rest, reads)


def _pointwise_summed(
    backend: str, parts: Sequence[Tensor | None], weight: Tensor, bias: Tensor | None
) -> list[Tensor | None]:
    """Gradients to weight, noise, noise_strength and bias, of what the pass over a 1x1 convolution left of them: sums
    of its programs, or all there is where one program did it."""
    of_weight, of_bias = parts

    def add_up() -> Tensor:  # in the weight's memory order, as `both_gradients` says
        return like(launch_step("modulated_conv2d", "pointwise_sums", backend, of_weight, weight), weight)

    def weight_gradient() -> Tensor | None:
        if of_weight is None or of_weight.shape == weight.shape:
            return of_weight
        return left_beside(weight.device, "wgrad", [weight], add_up, lambda: None, [of_weight])[0]

    if of_bias is None or of_bias.ndim == 1:
        return [weight_gradient(), None, None, of_bias]
    # a step of its own for each: what made the weights and what made the tables are two lanes
    sums, dw = _summed(backend, (None, None, of_bias), None, None, bias, weight_gradient)
    return [dw, *sums]


def second_gradients(
    op: Callable[..., Tensor],
    first: Callable[..., tuple[Tensor, ...]],
    recorded: Recorded,
    v: Tensor | None,
    u: Tensor | None,
    to_bias: Tensor | None,
    wanted: list[int],
) -> dict[int, Tensor | None]:
    """Gradients of the first derivative's results to its arguments (dy, y, x, weight, ...), by position.

    Args:
        op, first: modulated_conv2d on finished weights, and its first derivative.
        recorded: of the first derivative.
        v, u, to_bias: what comes to dx, to dw and to the bias' sums; None for nothing.
    """
    dy, y, x, weight, _, _, _, f, up, down, act, gain, clamp, _ = recorded.args
    linear = (None, None, None, f, up, down, "linear", 1.0, None)
    v, u = (None if one is None else like(one, of) for one, of in ((v, x), (u, weight)))

    def sloped(value: Tensor) -> Tensor:
        """value * gain * slope."""
        if (act, gain, clamp) == ("linear", 1.0, None):
            return value
        args = (value, y, None, None, act, gain, clamp, False, False, False)
        result: Tensor = launch_best("modulated_conv2d", "act_backward", *args)[0]
        return result

    found: dict[int, Tensor | None] = dict.fromkeys(wanted)
    if 0 in wanted:
        parts = [] if v is None else [op(v, weight, *linear, recorded.backend)]
        parts += [] if u is None else [op(x, u, *linear, recorded.backend)]
        if to_bias is not None:
            parts.append(to_bias.to(y.dtype)[:, None, None].expand_as(y))
        found[0] = sloped(like(sum(parts[1:], parts[0]), y)) if parts else None
    g = sloped(dy) if (v is not None and 3 in wanted) or (u is not None and 2 in wanted) else None
    if g is not None and u is not None and 2 in wanted:
        found[2] = first(g, y, x, u, *linear, [True, False, False, False, False], recorded.backend)[0]
    if g is not None and v is not None and 3 in wanted:
        found[3] = first(g, y, v, weight, *linear, [False, True, False, False, False], recorded.backend)[1]
    return found
