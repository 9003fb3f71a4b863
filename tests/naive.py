"""The networks and their ops a second time, as float64 numpy written from the formulas: what the tests compare with.

Nothing here shares code or an algorithm with the package: FIRs and convolutions go channel by channel through scipy,
every sample has modulated weights of its own, resampling inserts its zeros explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal
from scipy.special import expit

Array = NDArray[np.float64]

SQRT2 = 2**0.5
BLUR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64  # the low-pass of StyleGAN2


def array(x: Any) -> Array:
    """A tensor, or None, as float64 numpy."""
    return None if x is None else x.detach().to("cpu").double().numpy()


# ---- bias_act ----------------------------------------------------------------------------------------------------

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017

# name: (formula of x and alpha, default alpha, default gain)
ACTIVATIONS: dict[str, tuple[Any, float, float]] = {
    "linear": (lambda x, a: x, 0, 1),
    "relu": (lambda x, a: np.maximum(x, 0), 0, SQRT2),
    "lrelu": (lambda x, a: np.where(x > 0, x, a * x), 0.2, SQRT2),
    "tanh": (lambda x, a: (np.exp(2 * x) - 1) / (np.exp(2 * x) + 1), 0, 1),
    "sigmoid": (lambda x, a: 1 / (1 + np.exp(-x)), 0, 1),
    "elu": (lambda x, a: np.where(x > 0, x, np.exp(x) - 1), 0, 1),
    "selu": (lambda x, a: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * (np.exp(x) - 1)), 0, 1),
    "softplus": (lambda x, a: np.log(1 + np.exp(x)), 0, 1),
    "swish": (lambda x, a: x * expit(x), 0, SQRT2),
}


def bias_act(
    x: Array,
    b: Array | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Array:
    formula, default_alpha, default_gain = ACTIVATIONS[act]
    if b is not None:
        x = np.moveaxis(np.moveaxis(x, dim, -1) + b, -1, dim)
    y = formula(x, default_alpha if alpha is None else alpha) * (default_gain if gain is None else gain)
    return y if clamp is None else np.minimum(np.maximum(y, -clamp), clamp)


# ---- upfirdn2d ---------------------------------------------------------------------------------------------------


def zero_insert(image: Array, up_x: int, up_y: int) -> Array:
    """up - 1 zeros behind every sample of [H, W]."""
    out = np.zeros([image.shape[0] * up_y, image.shape[1] * up_x])
    out[::up_y, ::up_x] = image
    return out


def upfirdn2d(
    x: Array,
    f: Array,
    *,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Array:
    """up and down as (x, y), padding as (x0, x1, y0, y1)."""
    f2d = np.outer(f, f) if f.ndim == 1 else f
    x0, x1, y0, y1 = padding

    def one(image: Array) -> Array:
        z = zero_insert(image, *up)
        z = np.pad(z, [(max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))])
        z = z[max(-y0, 0) : len(z) - max(-y1, 0), max(-x0, 0) : z.shape[1] - max(-x1, 0)]
        z = signal.convolve2d(z, f2d[::-1, ::-1] if flip_filter else f2d, mode="valid")
        return gain * z[:: down[1], :: down[0]]

    return np.stack([np.stack([one(channel) for channel in sample]) for sample in x])


# ---- modulated_conv2d --------------------------------------------------------------------------------------------


def conv2d(x: Array, w: Array, *, up: int = 1, down: int = 1, f: Array | None = None) -> Array:
    """One sample [I, H, W] with weights [O, I, k, k] of its own."""
    k, (height, width) = w.shape[-1], x.shape[1:]
    taps = BLUR if f is None else np.outer(f, f) if f.ndim == 1 else f
    out = []
    for kernels in w:
        total: Any = 0.0
        for image, kernel in zip(x, kernels, strict=True):
            if up == 2:
                # a transposed convolution scatters: the kernel is not flipped when the zeros are in the image
                z = signal.convolve2d(zero_insert(image, 2, 2), kernel, mode="full")
                z = 4 * signal.convolve2d(z, taps, mode="full")
                # centre: output 2i sees what lies around input i, the even filter looks half a pixel ahead
                top, left = (k // 2 + len(taps) // 2 - 1, k // 2 + taps.shape[1] // 2 - 1)
                total = total + z[top : top + 2 * height, left : left + 2 * width]
            elif down == 2:
                pads = [[(n - 1) // 2 + k // 2, (n - 2) // 2 + k // 2] for n in taps.shape]
                z = signal.convolve2d(np.pad(image, pads), taps, mode="valid")
                total = total + signal.correlate2d(z, kernel, mode="valid")[::2, ::2]
            else:
                total = total + signal.correlate2d(np.pad(image, k // 2), kernel, mode="valid")
        out.append(total)
    return np.stack(out)


def modulated_conv2d(
    x: Array,
    weight: Array,
    styles: Array | None = None,
    *,
    up: int = 1,
    down: int = 1,
    f: Array | None = None,
    demodulate: bool = True,
    noise: Array | None = None,
    noise_strength: float = 1.0,
    bias: Array | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Array:
    samples = []
    for n, sample in enumerate(x):
        w = weight
        if styles is not None:
            w = w * styles[n][None, :, None, None]
            if demodulate:
                w = w / np.sqrt((w**2).sum(axis=(1, 2, 3), keepdims=True) + eps)
        y = conv2d(sample, w, up=up, down=down, f=f)
        if noise is not None:
            y = y + noise_strength * (noise if noise.ndim == 2 else noise[n % len(noise), 0])
        samples.append(y)
    return bias_act(np.stack(samples), bias, act=act, gain=gain, clamp=clamp)


# ---- laplacian_pyramid -------------------------------------------------------------------------------------------

BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16


def reduce(image: Array) -> Array:
    """[H, W] -> [ceil(H/2), ceil(W/2)]."""
    for axis in (0, 1):
        image = ndimage.correlate1d(image, BINOMIAL, axis=axis, mode="nearest")
    return image[::2, ::2]


def expand(image: Array, height: int, width: int) -> Array:
    z = zero_insert(np.pad(image, 1, mode="edge"), 2, 2)
    for axis in (0, 1):
        z = ndimage.correlate1d(z, 2 * BINOMIAL, axis=axis, mode="constant")
    return z[2 : 2 + height, 2 : 2 + width]


def laplacian_pyramid(x: Array, levels: int) -> list[Array]:
    n, c = x.shape[:2]
    bands, current = [], [image for sample in x for image in sample]
    for _ in range(levels - 1):
        coarser = [reduce(image) for image in current]
        bands.append([fine - expand(low, *fine.shape) for fine, low in zip(current, coarser, strict=True)])
        current = coarser
    return [np.stack(band).reshape(n, c, *band[0].shape) for band in [*bands, current]]


def charbonnier(d: Array, eps: float) -> Array:
    """The hypotenuse over |d| and eps."""
    return np.hypot(d, eps)


# ---- the networks ------------------------------------------------------------------------------------------------

State = Mapping[str, Array]


def normalize(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)


def fully_connected(x: Array, state: State, name: str, *, act: str = "linear", lr: float = 1.0) -> Array:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return bias_act(x @ (weight * lr / np.sqrt(x.shape[1])).T, bias * lr, act=act)


def mapping(z: Array | None, c: Array | None, state: State, *, layers: int = 8, prefix: str = "mapping.") -> Array:
    """w [N, w_dim] before truncation."""
    parts = [] if z is None else [normalize(z)]
    if c is not None:
        parts.append(normalize(fully_connected(c, state, f"{prefix}embed")))
    x = np.concatenate(parts, axis=1)
    for i in range(layers):
        x = fully_connected(x, state, f"{prefix}fc{i}", act="lrelu", lr=0.01)
    return x


def synthesis(
    ws: Array, state: State, resolution: int, *, noise: Mapping[str, Array] | None = None, clamp: float | None = 256.0
) -> Array:
    """ws [N, num_ws, w_dim] -> image; noise maps by layer name, those left out are noise_const."""
    image: Any = None
    x = np.repeat(state["synthesis.b4.const"][None], len(ws), axis=0)
    index = 0  # of the next latent

    def layer(x: Array, name: str, w: Array, up: int) -> Array:
        key = f"synthesis.{name}"
        return modulated_conv2d(
            x,
            state[f"{key}.weight"],
            fully_connected(w, state, f"{key}.affine"),
            up=up,
            noise=(noise or {}).get(name, state[f"{key}.noise_const"]),
            noise_strength=float(state[f"{key}.noise_strength"]),
            bias=state[f"{key}.bias"],
            act="lrelu",
            clamp=clamp,
        )

    r = 4
    while r <= resolution:
        if r > 4:
            x = layer(x, f"b{r}.conv0", ws[:, index], up=2)
            index += 1
        x = layer(x, f"b{r}.conv1", ws[:, index], up=1)
        index += 1
        key = f"synthesis.b{r}.torgb"
        weight = state[f"{key}.weight"] / np.sqrt(x.shape[1])
        styles = fully_connected(ws[:, index], state, f"{key}.affine")  # the next block uses this one too
        rgb = modulated_conv2d(x, weight, styles, demodulate=False, bias=state[f"{key}.bias"], clamp=clamp)
        if image is not None:
            image = upfirdn2d(image, BLUR, up=(2, 2), padding=(2, 1, 2, 1), gain=4)
        image = rgb if image is None else image + rgb
        r *= 2
    return image


def minibatch_stddev(x: Array, group: int, channels: int = 1) -> Array:
    """Sample n stands in group n mod (N / group)."""
    n, c, h, w = x.shape
    out = np.zeros([n, channels, h, w])
    for i in range(n):
        members = [m for m in range(n) if m % (n // group) == i % (n // group)]
        std = np.sqrt(x[members].var(axis=0) + 1e-8)  # [C, H, W]
        for k in range(channels):
            out[i, k] = std[k * (c // channels) : (k + 1) * (c // channels)].mean()
    return np.concatenate([x, out], axis=1)


def discriminator(
    image: Array, state: State, *, c: Array | None = None, group: int | None = 4, clamp: float | None = 256.0
) -> Array:
    def layer(x: Array, name: str, *, act: str = "lrelu", down: int = 1, gain: float = 1.0) -> Array:
        weight = state[f"{name}.weight"]
        limit = clamp * gain if clamp is not None and act == "lrelu" else None
        return modulated_conv2d(
            x,
            weight / np.sqrt(weight[0].size),
            down=down,
            bias=state.get(f"{name}.bias"),
            act=act,
            gain=gain * (SQRT2 if act == "lrelu" else 1),
            clamp=limit,
        )

    resolution = image.shape[-1]
    x = layer(image, f"b{resolution}.fromrgb")
    for r in [2**i for i in range(resolution.bit_length() - 1, 2, -1)]:
        skip = layer(x, f"b{r}.skip", act="linear", down=2, gain=0.5**0.5)
        x = skip + layer(layer(x, f"b{r}.conv0"), f"b{r}.conv1", down=2, gain=0.5**0.5)
    x = minibatch_stddev(x, len(x) if group is None else min(group, len(x)))
    x = fully_connected(layer(x, "b4.conv").reshape(len(x), -1), state, "b4.fc", act="lrelu")
    x = fully_connected(x, state, "b4.out")
    if c is not None:
        label = mapping(None, c, state)
        x = (x * label).sum(axis=1, keepdims=True) / np.sqrt(label.shape[1])
    return x
