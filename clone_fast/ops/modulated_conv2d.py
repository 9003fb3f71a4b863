"""modulated_conv2d: StyleGAN2's convolutions with everything around them, as one op."""

from __future__ import annotations

from torch import Tensor

from clone_fast.ops.checks import (
    check_activation,
    check_filter,
    check_image,
    check_number,
    check_result,
    check_tensor,
    describe,
)
from clone_fast.ops.dispatch import resolve
from clone_fast.ops.registration import define, empty_result
from clone_fast.reference import modulated_conv2d as spec
from clone_fast.reference.bias_act import ACTIVATIONS, activation_defaults

__all__ = ["modulated_conv2d"]


def _reference(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    demodulate: bool,
    act: str,
    gain: float,
    clamp: float | None,
    eps: float,
) -> Tensor:
    return spec.modulated_conv2d(
        x,
        weight,
        styles,
        up=up,
        down=down,
        resample_filter=resample_filter,
        demodulate=demodulate,
        noise=noise,
        noise_strength=noise_strength,
        bias=bias,
        act=act,
        gain=gain,
        clamp=clamp,
        eps=eps,
    )


def _fake(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    up, down = args[5], args[6]
    height, width = (size * up // down for size in x.shape[2:])  # type: ignore[operator]
    return empty_result(x, [x.shape[0], weight.shape[0], height, width])


_op = define(
    "modulated_conv2d",
    "(Tensor x, Tensor weight, Tensor? styles, Tensor? noise, Tensor? noise_strength, Tensor? bias, "
    "Tensor? resample_filter, int up, int down, bool demodulate, str act, float gain, float? clamp, float eps) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    differentiable=[0, 1, 2, 3, 4, 5],
)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None,
    *,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """Modulate, convolve, demodulate, add noise and bias, activate (Karras et al. 2020, StyleGAN2, section 2.2).

    y = clamp(gain * act(conv(x, w') + noise_strength * noise + bias)) with w'[n,o,i] = weight[o,i] * styles[n,i], and
    with demodulation w'[n,o] / sqrt(sum of w'[n,o]^2 + eps). The convolution is a correlation that keeps the size.
    up=2 is a transposed convolution with stride 2 followed by the filter with gain 4; down=2 the filter followed by a
    convolution with stride 2.

    Args:
        x: [N, I, H, W], floating point.
        weight: [O, I, k, k], k odd, shared over the batch.
        styles: [N, I], the factor of every input channel; None for the plain convolution of a discriminator.
        up, down: 1 or 2, not both 2.
        resample_filter: float32 [fh, fw] or [taps], as of `setup_filter`; needed where up or down is 2.
        demodulate: bring the modulated weights of every output channel to unit norm; needs styles.
        noise: [H', W'], [1, 1, H', W'] or [N, 1, H', W'] at the size of the result, added before the bias; or None.
        noise_strength: scalar tensor, the factor of the noise; None for 1.
        bias: [O].
        act, gain, clamp: as in `bias_act`.
        eps: inside the square root of the demodulation; 1e-8 on the unscaled weights is NVIDIA's convention.
        backend: "auto", "reference", "triton" or "cuda".

    In float16 with demodulation weights and styles are normalised first, as NVIDIA's networks do, so that nothing
    overflows; bfloat16 has the range and takes no such branch.

    Returns:
        [N, O, H * up / down, W * up / down] in x's dtype and layout; differentiable to x, weight, styles, noise,
        noise_strength and bias, twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "modulated_conv2d"
    check_image(op, "x", x)
    n, in_channels, height, width = x.shape
    check_tensor(op, "weight", weight, x, ["O", in_channels, "k", "k"])
    out_channels, k = weight.shape[0], weight.shape[2]
    if out_channels == 0 or k != weight.shape[3] or k % 2 == 0:
        raise ValueError(f"{op}: weight must be [O, {in_channels}, k, k] with odd k, got {describe(weight)}")
    if styles is not None:
        check_tensor(op, "styles", styles, x, [n, in_channels])
    elif demodulate:
        raise ValueError(f"{op}: demodulate=True needs styles [{n}, {in_channels}], got None")
    if (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise ValueError(f"{op}: up and down must be 1 or 2 and not both 2, got up={up!r}, down={down!r}")
    if down == 2 and (height % 2 or width % 2):
        raise ValueError(f"{op}: x must have an even height and width for down=2, got {describe(x)}")
    if up == 2 or down == 2:
        check_filter(op, "resample_filter", resample_filter, x)
    size = (height * up // down, width * up // down)
    check_result(op, [n, out_channels, *size])
    if noise is not None:
        check_tensor(op, "noise", noise, x, size, (1, 1, *size), (n, 1, *size))
    if noise_strength is not None:
        check_tensor(op, "noise_strength", noise_strength, x, [])
    if bias is not None:
        check_tensor(op, "bias", bias, x, [out_channels])
    check_activation(op, act, clamp, ACTIVATIONS)
    check_number(op, "gain", gain)
    check_number(op, "eps", eps)
    _, gain_value = activation_defaults(act, None, gain)
    limit = None if clamp is None else float(clamp)
    tensors = (weight, styles, noise, noise_strength, bias, resample_filter)
    args = (*tensors, up, down, demodulate, act, gain_value, limit, float(eps))
    return _op(resolve(op, backend, x, *args), x, *args)
