"""modulated_conv2d: StyleGAN2's convolution with everything that stands around it."""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast.reference.bias_act import bias_act
from clone_fast.reference.convolution import conv2d, conv_transpose2d
from clone_fast.reference.upfirdn2d import filter_size, upfirdn2d


def demodulation(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """Factors [N, O] that bring the modulated weights of every output channel to unit norm (StyleGAN2, eq. 3)."""
    energy = weight.square().sum(dim=[2, 3])  # [O, I]
    return (styles.square() @ energy.t() + eps).rsqrt()


def resampled_conv2d(x: Tensor, weight: Tensor, *, up: int, down: int, f: Tensor | None) -> Tensor:
    """Correlate with weight [O, I, k, k], same size but for a resampling by 2 that is filtered with f.

    up: transposed convolution with stride `up`, then the FIR with gain up^2. down: the FIR, then a convolution with
    stride `down`; a 1x1 kernel decimates inside the FIR, which is the same and costs a quarter.
    """
    k = weight.shape[-1]
    if up == 1 and down == 1:
        return conv2d(x, weight, padding=k // 2)
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    fw, fh = filter_size(f)
    if up > 1:
        y = conv_transpose2d(x, weight.transpose(0, 1), stride=up)
        px0, px1 = (fw + up - 1) // 2 + k // 2 - (k - 1), (fw - up) // 2 + k // 2 - (k - up)
        py0, py1 = (fh + up - 1) // 2 + k // 2 - (k - 1), (fh - up) // 2 + k // 2 - (k - up)
        return upfirdn2d(y, f, padding=[px0, px1, py0, py1], gain=float(up**2))
    pads = [(fw - down + 1) // 2, (fw - down) // 2, (fh - down + 1) // 2, (fh - down) // 2]
    if k == 1:
        return conv2d(upfirdn2d(x, f, down=down, padding=pads), weight)
    return conv2d(upfirdn2d(x, f, padding=[p + k // 2 for p in pads]), weight, stride=down)


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

    The weight is shared over the batch: activations are scaled by the style before the convolution and by the
    demodulation after it, which equals convolving every sample with weights of its own.
    """
    scale = None
    if styles is not None:
        compute = torch.promote_types(torch.promote_types(x.dtype, styles.dtype), torch.float32)
        weight, styles = weight.to(compute), styles.to(compute)
        if x.dtype == torch.float16 and demodulate:
            # Keeps the intermediate inside float16's range; demodulation cancels both factors again.
            tiny, fan_in = torch.finfo(compute).tiny, weight[0].numel()
            weight = weight * (fan_in**-0.5 / weight.abs().amax(dim=[1, 2, 3], keepdim=True).clamp_min(tiny))
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
