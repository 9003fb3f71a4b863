"""Leaves in plain PyTorch, to test without a GPU what clone_fast/ops does with leaves.

They offer every step that a fast leaf offers, computed straight from its definition, in any dtype up to float64. GPU
tests hold the real steps against them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from clone_fast.ops.registration import as_result
from clone_fast.reference import bias_act, laplacian_pyramid, minibatch_stddev, modulated_conv2d, styles, upfirdn2d
from clone_fast.reference.bias_act import ACTIVATIONS

OPTIONS = ("dim", "act", "alpha", "gain", "clamp")


def differentiating(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run in a thread of its own: inside an op's implementation PyTorch's autograd is off, and is so per thread."""

    def run(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    return run


def through(y: Tensor, inputs: Any, dy: Tensor, **options: bool) -> tuple[Tensor, ...]:
    """Gradients of a result with this one; of a scalar, as PyTorch imports sympy where it is given gradients."""
    return torch.autograd.grad((y * dy).sum(), inputs, **options)


def _bias_act(x: Tensor, b: Tensor | None, *options: Any) -> Tensor:
    return bias_act.bias_act(x, b, **dict(zip(OPTIONS, options, strict=True)))


@differentiating
def bias_act_backward(dy: Tensor, x: Tensor, b: Tensor | None, *options: Any) -> tuple[Tensor, Tensor | None]:
    *options, want_db = options  # type: ignore[assignment]
    x = x.detach().requires_grad_()
    (dx,) = through(_bias_act(x, None if b is None else b.detach(), *options), x, dy)
    if b is None or not want_db:
        return dx, None
    return dx, dx.movedim(options[0], 0).flatten(1).sum(1) if x.ndim > 1 else dx


@differentiating
def bias_act_second(v: Tensor, dy: Tensor, x: Tensor, b: Tensor | None, *options: Any) -> Tensor:
    x = x.detach().requires_grad_()
    y = _bias_act(x, None if b is None else b.detach(), *options)
    (dx,) = through(y, x, dy.detach(), create_graph=True)
    return through(dx, x, v)[0]


def _upfirdn2d(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float) -> Tensor:
    return upfirdn2d.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain)


def _upfirdn2d_add(x: Tensor, other: Tensor, f: Tensor, *options: Any) -> Tensor:
    return as_result(_upfirdn2d(x, f, *options) + other, x)


def _loss(
    x: Tensor, y: Tensor, levels: int, weights: Sequence[float], charbonnier: float | None, mse: float
) -> Tensor:
    loss = laplacian_pyramid.laplacian_pyramid_loss
    return loss(x, y, levels=levels, weights=weights, charbonnier=charbonnier, mse=mse)


@differentiating
def laplacian_keep(
    x: Tensor, y: Tensor, levels: int, weights: Sequence[float], charbonnier: float | None, mse: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    image = (x.to(compute) - y.to(compute)).detach()
    coarse = image.new_empty([*x.shape[:2], 0, 0], dtype=torch.float32)
    if levels > 1:
        second = laplacian_pyramid.reduce(image).requires_grad_()
        image = image - laplacian_pyramid.expand(second.detach(), *x.shape[2:])
        below = _loss(second, torch.zeros_like(second), levels - 1, weights[1:], charbonnier, 0.0)
        coarse = torch.autograd.grad(below, second)[0].float()
    band = image.requires_grad_()
    (slope,) = torch.autograd.grad(laplacian_pyramid.distance(band, charbonnier).sum(), band)
    kept = slope.to(torch.int8 if charbonnier is None else compute)
    return _loss(x, y, levels, weights, charbonnier, mse).detach(), kept, coarse


@differentiating
def laplacian_backward(
    dloss: Tensor, slope: Tensor, coarse: Tensor, weight: float, x: Tensor, y: Tensor, mse: float
) -> Tensor:
    """d band / d image is the identity less expand(reduce(image)); the second level is reduce(image)."""
    slopes = slope.to(dloss.dtype) * (dloss * (weight / slope.numel()))
    squares = (x.to(dloss.dtype) - y.to(dloss.dtype)) * (dloss * (2 * mse / slope.numel()))
    if not coarse.numel():
        return (slopes + squares).to(x.dtype)
    image = torch.zeros_like(slopes, requires_grad=True)
    second = laplacian_pyramid.reduce(image)
    back = coarse.to(dloss.dtype) * dloss
    (beside,) = through(second, image, back, retain_graph=True)
    (below,) = through(laplacian_pyramid.expand(second, *image.shape[2:]), image, -slopes)
    return (slopes + beside + below + squares).to(x.dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    f: Tensor | None,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    return modulated_conv2d.modulated_conv2d(
        x,
        weight,
        up=up,
        down=down,
        resample_filter=f,
        demodulate=False,
        noise=noise,
        noise_strength=noise_strength,
        bias=bias,
        act=act,
        gain=gain,
        clamp=clamp,
    )


def conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    weights = weight if weight.ndim == 5 else weight.expand(x.shape[0], *weight.shape)
    results = []
    for sample, w in zip(x.split(1), weights, strict=True):
        if transposed:
            results.append(F.conv_transpose2d(sample, w.transpose(0, 1), stride=stride, padding=padding))
        else:
            results.append(F.conv2d(sample, w, stride=stride, padding=padding))
    return torch.cat(results)


def dgrad_weight(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """In the order of the modulation, [.., k, k, O, I]."""
    packed = weight.to(x.dtype).movedim((-4, -3), (-2, -1)).contiguous()
    return packed.movedim((-4, -3), (-2, -1))


def conv_add(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    return as_result(conv(x, weight, 1, weight.shape[-1] // 2, False) + other, x)


def finish(
    z: Tensor, f: Tensor, padding: list[int], filter_gain: float, noise: Tensor | None, strength: Tensor | None,
    bias: Tensor | None, act: str, gain: float, clamp: float | None,
) -> Tensor:  # fmt: skip
    y = upfirdn2d.upfirdn2d(z, f, padding=padding, gain=filter_gain)
    if noise is not None:
        y = y + (noise if strength is None else noise * strength)
    return bias_act.bias_act(y, bias, act=act, gain=gain, clamp=clamp)


def conv_finish(x: Tensor, weight: Tensor, stride: int, padding: int, *epilogue: Any) -> Tensor:
    one = torch.ones([1, 1], device=x.device)
    return finish(conv(x, weight, stride, padding, False), one, [0, 0, 0, 0], 1.0, *epilogue)


def wgrad(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    size = [b.shape[1], a.shape[1], k, k]
    each = [
        conv2d_weight(one, size, other, stride=stride, padding=padding)
        for one, other in zip(a.split(1), b.split(1), strict=True)
    ]
    return (torch.stack(each) if per_sample else torch.stack(each).sum(0)).to(dtype)


def act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    slope = torch.full_like(y, gain)
    if act != "linear":
        slope = torch.where(y > 0, slope, slope * ACTIVATIONS[act].alpha)
    if clamp is not None:
        slope = torch.where(y.abs() < torch.tensor(clamp, dtype=y.dtype, device=y.device), slope, 0)
    g = dy * slope
    noise_sums = g.sum(1).flatten() if want_noise and noise is not None else None
    strength_sums = (g * noise).flatten(1).sum(1) if want_strength and noise is not None else None
    dots = None
    if want_dots:
        z = torch.where(slope == 0, 0, y / slope)
        z = z if noise is None else z - noise * (1 if noise_strength is None else noise_strength)
        dots = (g * (z if bias is None else z - bias[:, None, None])).sum([2, 3])[:, None]
    return g, noise_sums, strength_sums, g.sum([2, 3]) if want_bias else None, dots


def act_fir(
    dy: Tensor, y: Tensor, noise: Tensor | None, noise_strength: Tensor | None, bias: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    *activation, want_dots, f, padding, flip, filter_gain = args
    g, *sums = act_backward(dy, y, noise, noise_strength, *activation, bias, want_dots)
    return upfirdn2d.upfirdn2d(g, f, padding=padding, flip_filter=flip, gain=filter_gain), *sums


def fir_act(z: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    *activation, want_bias, f, padding, flip, filter_gain = args
    dy = upfirdn2d.upfirdn2d(z, f, padding=padding, flip_filter=flip, gain=filter_gain)
    g, _, _, bias_sums, _ = act_backward(dy, y, None, None, *activation, False, False, want_bias)
    return g, bias_sums


def branch_backward(
    dy: Tensor, dshrunk: Tensor, y: Tensor, x: Tensor, weight: Tensor, act: str, gain: float, clamp: float | None,
    want_dx: bool, want_dw: bool, want_bias: bool, f: Tensor, padding: list[int], flip: bool, filter_gain: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """With one program for each sample."""
    dy = dy + upfirdn2d.upfirdn2d(dshrunk, f, up=2, padding=padding, flip_filter=flip, gain=filter_gain)
    g = act_backward(dy, y, None, None, act, gain, clamp, False, False, False)[0]
    dx, dw = torch.einsum("oi,nohw->nihw", weight.flatten(1), g), torch.einsum("nohw,nihw->noi", g, x).flatten(1)
    return dx if want_dx else None, dw if want_dw else None, g.sum([2, 3]) if want_bias else None


def drawn(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *epilogue, act, gain, clamp, image_weight, image_bias, image_clamp = args
    y = _convolution(x, weight, *epilogue, None, 1, 1, act, gain, clamp)
    plain = (None, None, image_bias, None, 1, 1, "linear", 1.0, image_clamp)
    return tuple(as_result(one, x) for one in (y, _convolution(y, image_weight, *plain)))  # type: ignore[return-value]


def drawn_act_backward(
    dy: Tensor | None, dimage: Tensor, y: Tensor, image_weight: Tensor, image: Tensor | None,
    image_clamp: float | None, *args: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """With one program for each sample."""
    if image is not None and image_clamp is not None:
        dimage = torch.where(image.abs() < torch.tensor(image_clamp, dtype=image.dtype, device=image.device), dimage, 0)
    *activation, want_weight, want_bias = args
    w = (image_weight if image_weight.ndim == 5 else image_weight.expand(len(y), *image_weight.shape)).flatten(2)
    through = torch.einsum("nfc,nfhw->nchw", w, dimage)
    found = act_backward(through if dy is None else dy + through, y, *activation)
    of_weight = torch.einsum("nfhw,nchw->nfc", dimage, y).flatten(1)
    return *found, of_weight if want_weight else None, dimage.sum([2, 3]) if want_bias else None


def act_sums(
    noise_sums: Tensor | None,
    strength_sums: Tensor | None,
    bias_sums: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dnoise = None
    if noise_sums is not None and noise is not None:
        dnoise = noise_sums.view(-1, noise.numel()).sum(0).view(noise.shape)
        dnoise = (dnoise if noise_strength is None else dnoise * noise_strength).to(noise.dtype)
    dstrength = None if strength_sums is None else strength_sums.sum().to(dtype)
    return dnoise, dstrength, None if bias_sums is None else bias_sums.sum(0).to(dtype)


def pointwise_backward(
    dy: Tensor, y: Tensor, x: Tensor, weight: Tensor, act: str, gain: float, clamp: float | None, want_dx: bool,
    want_dw: bool, want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Its programs have a row of an image each; where there is but one, nothing is left to be added."""
    g = act_backward(dy, y, None, None, act, gain, clamp, False, False, False)[0]
    w = (weight if weight.ndim == 5 else weight.expand(len(x), *weight.shape)).flatten(2)
    dx = torch.einsum("noi,nohw->nihw", w, g)
    dw, dbias = torch.einsum("nohw,nihw->nhoi", g, x).flatten(0, 1).flatten(1), g.sum(3).movedim(2, 1).flatten(0, 1)
    if len(dw) == (len(x) if weight.ndim == 5 else 1):
        dw = dw.reshape(weight.shape)
    return dx if want_dx else None, dw if want_dw else None, (
        (dbias[0] if len(dbias) == 1 else dbias) if want_bias else None
    )


def pointwise_sums(sums: Tensor, weight: Tensor) -> Tensor:
    of_each = sums.view(weight.numel() // sums.shape[1], -1, sums.shape[1])
    return of_each.sum(1).view(weight.shape).to(weight.dtype)


def modulate(weight: Tensor, styles: Tensor | None, demodulate: bool, eps: float, dtype: torch.dtype) -> Tensor:
    if styles is None:
        return weight.to(dtype).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    made = modulated_conv2d.modulated_weights(weight, styles, demodulate=demodulate, eps=eps, dtype=dtype)
    return made.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


@differentiating
def modulate_backward(
    dw: Tensor, weight: Tensor, styles: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None]:
    if styles is None:
        return dw.to(weight.dtype), None
    weight, styles = weight.detach().requires_grad_(), styles.detach().requires_grad_()
    dweight, dstyles = through(modulate(weight, styles, *options), (weight, styles), dw)
    return dweight, dstyles


def factored(weight: Tensor, styles: Tensor, demodulate: bool, eps: float, dtype: torch.dtype, _: float) -> Any:
    made, *rest = modulated_conv2d.factored_weights(weight, styles, demodulate=demodulate, eps=eps, dtype=dtype)
    return made.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2), *rest


def factored_backward(ds: Tensor, dd: Tensor, s: Tensor, d: Tensor, energy: Tensor, dtype: torch.dtype) -> Tensor:
    return (ds - s * ((dd * d**3) @ energy)).to(dtype)


def factor_gradients(
    x: Tensor, dx: Tensor, s: Tensor, dots: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    compute = torch.promote_types(x.dtype, torch.float32)
    ds = (x.to(compute) * dx.to(compute)).sum([2, 3]) / s
    return ds, None if dots is None or d is None else dots.sum(1) / d


def kept(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    f, k = args[4], args[0].shape[-1]
    padding = modulated_conv2d.downsampling_padding(f, k)
    filtered = upfirdn2d.upfirdn2d(x, f, down=2 if k == 1 else 1, padding=padding)
    return _convolution(x, *args), filtered


@differentiating
def stddev_backward(dy: Tensor, x: Tensor, *args: int) -> Tensor:
    leaf = x.detach().requires_grad_()
    return as_result(through(minibatch_stddev.minibatch_stddev(leaf, *args), leaf, dy.detach())[0], x)


def styles_backward(
    ws: Tensor, grads: list[Tensor], weights: list[Tensor], reads: list[int], gain: float, factors: list[float],
    want_ws: bool, want_layers: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    scaled = [grad * factor for grad, factor in zip(grads, factors, strict=True)]
    dws = torch.zeros_like(ws, memory_format=torch.contiguous_format)
    for grad, weight, read in zip(scaled, weights, reads, strict=True):
        dws[:, read] += grad @ weight * gain
    dweights = [grad.t() @ ws[:, read] * gain for grad, read in zip(scaled, reads, strict=True)]
    dbiases = [grad.sum(0) for grad in scaled]
    return dws if want_ws else ws.new_empty([0]), *((dweights, dbiases) if want_layers else ([], []))


SPEC: dict[str, dict[str, Callable[..., Any]]] = {
    "bias_act": {"launch": _bias_act, "launch_backward": bias_act_backward, "launch_second": bias_act_second},
    "upfirdn2d": {"launch": _upfirdn2d, "launch_add": _upfirdn2d_add},
    "laplacian_pyramid": {"launch": _loss, "launch_keep": laplacian_keep, "launch_backward": laplacian_backward},
    "modulated_conv2d": {
        "launch": _convolution,
        "launch_conv": conv,
        "launch_conv_add": conv_add,
        "launch_dgrad_weight": dgrad_weight,
        "launch_conv_finish": conv_finish,
        "launch_kept": kept,
        "launch_finish": finish,
        "launch_wgrad": wgrad,
        "launch_act_backward": act_backward,
        "launch_act_fir": act_fir,
        "launch_fir_act": fir_act,
        "launch_branch_backward": branch_backward,
        "launch_drawn": drawn,
        "launch_drawn_act_backward": drawn_act_backward,
        "launch_act_sums": act_sums,
        "launch_pointwise_backward": pointwise_backward,
        "launch_pointwise_sums": pointwise_sums,
        "launch_modulate": modulate,
        "launch_modulate_backward": modulate_backward,
        "launch_factored": factored,
        "launch_factored_backward": factored_backward,
        "launch_factor_gradients": factor_gradients,
    },
    "styles": {"launch": styles.styles, "launch_backward": styles_backward},
    "minibatch_stddev": {
        "launch": lambda x, *args: as_result(minibatch_stddev.minibatch_stddev(x, *args), x),
        "launch_backward": stddev_backward,
    },
}


def steps(op: str, *, whole: bool = True) -> types.SimpleNamespace:
    """The leaf of an op; where it is not `whole`, modulated_conv2d has to be composed of steps where it resamples, and
    the gradients of a 1x1 convolution, alone or with a filter's, and of a resampling one, the former's sum with an
    image and the image drawn of a result are, too."""
    functions = dict(SPEC[op])
    if op == "modulated_conv2d" and not whole:
        for name in ("pointwise_backward", "branch_backward", "act_fir", "fir_act", "conv_add", "drawn", "kept"):
            del functions[f"launch_{name}"]
        functions["supports"] = lambda *args: None if args[6:8] == (1, 1) else "fuses no resampling"
    if op in ("upfirdn2d", "modulated_conv2d"):
        launch = functions["launch"]
        functions["launch"] = lambda x, *args: as_result(launch(x, *args), x)
    return types.SimpleNamespace(**functions)
