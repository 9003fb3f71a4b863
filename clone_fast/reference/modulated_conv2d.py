"""modulated_conv2d: StyleGAN2's convolution with everything that stands around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.reference.bias_act import bias_act
from clone_fast.reference.convolution import conv2d, conv_transpose2d
from clone_fast.reference.upfirdn2d import filter_size, upfirdn2d

SMALLEST_STYLE = 1e-20


def demodulation(weight: Tensor, styles: Tensor, eps: float | Tensor) -> Tensor:
    """Factors [N, O] that bring the modulated weights of every output channel to unit norm (StyleGAN2, eq. 3)."""
    energy = weight.square().sum(dim=[-2, -1])  # [O, I] or [N, O, I]
    return ((energy @ styles.square()[:, :, None])[:, :, 0] + eps).rsqrt()


def modulated_weights(weight: Tensor, styles: Tensor, *, demodulate: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """The weights of every sample, [N, O, I, k, k] of `dtype`: weight * style, brought to unit norm (StyleGAN2, 2.2).

    Convolving with them is what scaling the activations before and after a shared convolution is. They are rounded
    once. For float16 eps counts as in `modulated_conv2d`, which normalises weights and styles first.

    Args:
        weight: [O, I, k, k], or [N, O, I, k, k] where every sample has its own.
        styles: [N, I].
    """
    compute = torch.promote_types(
        torch.promote_types(weight.dtype, styles.dtype), torch.promote_types(dtype, torch.float32)
    )
    weight, styles = weight.to(compute), styles.to(compute)
    modulated = weight * styles[:, None, :, None, None]
    if demodulate:
        inside: float | Tensor = eps
        if dtype == torch.float16:
            largest = weight.detach().abs().amax(dim=[-3, -2, -1]) * styles.detach().abs().amax(dim=1, keepdim=True)
            inside = eps * (weight.shape[-3] * weight.shape[-1] ** 2) * largest.square()
        modulated = modulated * demodulation(weight, styles, inside)[:, :, None, None, None]
    return modulated.to(dtype)


def factored_weights(
    weight: Tensor, styles: Tensor, *, demodulate: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`modulated_weights` and what they are made of: made[n, o, i] = weight[o, i] * s[n, i] * d[n, o].

    Where a style is closer to zero than SMALLEST_STYLE, s has that size and the style's sign, so that it can be divided
    by. Next to any other style that is nothing, and without another the eps of the demodulation has made the result
    nothing already; it leaves room for products with it, but for squares, in float32 and bfloat16. Not for float16.

    Returns:
        made [N, O, I, k, k] in dtype; s [N, I], d [N, O] and the energies of the filters, the sum of weight^2 over the
        taps [O, I], in float32 at least. Without demodulation there are no d and energies.
    """
    compute = torch.promote_types(
        torch.promote_types(weight.dtype, styles.dtype), torch.promote_types(dtype, torch.float32)
    )
    styles = styles.to(compute)
    smallest = torch.where(styles < 0, -SMALLEST_STYLE, SMALLEST_STYLE)
    s = styles + torch.where(styles.abs() < SMALLEST_STYLE, smallest - styles, 0).detach()
    made = modulated_weights(weight, s, demodulate=demodulate, eps=eps, dtype=dtype)
    if not demodulate:
        return made, s, None, None
    weight = weight.to(compute)
    return made, s, demodulation(weight, s, eps), weight.square().sum(dim=[-2, -1])


def _conv(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, transposed: bool = False) -> Tensor:
    """Correlate with weight [O, I, k, k], or [N, O, I, k, k] with every sample's own; or the adjoint of that stride."""
    if weight.ndim == 4:
        if transposed:
            return conv_transpose2d(x, weight.transpose(0, 1), stride=stride)
        return conv2d(x, weight, stride=stride, padding=padding)
    n, groups = x.shape[0], x.reshape(1, -1, *x.shape[2:])
    if transposed:
        y = F.conv_transpose2d(groups, weight.transpose(1, 2).flatten(0, 1), stride=stride, groups=n)
    else:
        y = F.conv2d(groups, weight.flatten(0, 1), stride=stride, padding=padding, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


def upsampling_padding(f: Tensor, k: int) -> list[int]:
    """Of the FIR [x0, x1, y0, y1] behind a transposed convolution with stride 2 and kernel k, to twice the size."""
    return [
        p for taps in filter_size(f) for p in ((taps + 1) // 2 + k // 2 - (k - 1), taps // 2 - 1 + k // 2 - (k - 2))
    ]


def downsampling_padding(f: Tensor, k: int) -> list[int]:
    """Of the FIR [x0, x1, y0, y1] before a convolution with stride 2 and kernel k, to half the size."""
    return [p + k // 2 for taps in filter_size(f) for p in ((taps - 1) // 2, taps // 2 - 1)]


def resampled_conv2d(x: Tensor, weight: Tensor, *, up: int, down: int, f: Tensor | None) -> Tensor:
    """Correlate with weight [(N,) O, I, k, k], same size but for a resampling by 2 that is filtered with f.

    up: transposed convolution with stride 2, then the FIR with gain 4. down: the FIR, then a convolution with stride 2;
    a 1x1 kernel decimates inside the FIR, which is the same and costs a quarter.
    """
    k = weight.shape[-1]
    if up == 1 and down == 1:
        return _conv(x, weight, padding=k // 2)
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    if up == 2:
        y = _conv(x, weight, stride=2, transposed=True)
        return upfirdn2d(y, f, padding=upsampling_padding(f, k), gain=4.0)
    padding = downsampling_padding(f, k)
    if k == 1:
        return _conv(upfirdn2d(x, f, down=2, padding=padding), weight)
    return _conv(upfirdn2d(x, f, padding=padding), weight, stride=2)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None = None,
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
) -> Tensor:
    """See `clone_fast.ops.modulated_conv2d.modulated_conv2d`.

    Activations are scaled by the style before the convolution and by the demodulation after it, which equals convolving
    every sample with modulated weights of its own.
    """
    scale = None
    if styles is not None:
        compute = torch.promote_types(torch.promote_types(x.dtype, styles.dtype), torch.float32)
        weight, styles = weight.to(compute), styles.to(compute)
        if x.dtype == torch.float16 and demodulate:
            # Keeps the intermediate inside float16's range; demodulation cancels both factors again.
            tiny, fan_in = torch.finfo(compute).tiny, weight.shape[-3] * weight.shape[-1] ** 2
            weight = weight * (fan_in**-0.5 / weight.abs().amax(dim=[-3, -2, -1], keepdim=True).clamp_min(tiny))
            styles = styles / styles.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
        if demodulate:
            scale = demodulation(weight, styles, eps).to(x.dtype)[:, :, None, None]
        x = x * styles.to(x.dtype)[:, :, None, None]
    y = resampled_conv2d(x, weight.to(x.dtype), up=up, down=down, f=resample_filter)
    if noise is not None:
        noise = noise.to(y.dtype)
        if noise_strength is not None:
            noise = noise * noise_strength.to(y.dtype)
        y = y + noise if scale is None else torch.addcmul(noise, y, scale)
    elif scale is not None:
        y = y * scale
    return bias_act(y, None if bias is None else bias.to(y.dtype), act=act, gain=gain, clamp=clamp)
