"""The dialect of stylegan2-ada-pytorch, of stylegan3's StyleGAN2 and of what carries copies of them, on our ops.

Each function has the signature of the one that it stands for, which is also how that is recognised. Paddings, filters,
`up` and `down` mean the same there and here, [x, y] where they are two. Written from the behaviour that the papers and
the callers show; no line is taken from NVIDIA's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clone_fast import ops
from clone_fast.compat.replacement import exact_dtypes, wanted
from clone_fast.compat.trial import Case, drawn

ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")  # indices from 1
FIR = (1.0, 3.0, 3.0, 1.0)


def bias_act(
    x: Any,
    b: Any = None,
    dim: Any = 1,
    act: Any = "linear",
    alpha: Any = None,
    gain: Any = None,
    clamp: Any = None,
    impl: Any = "cuda",
) -> Tensor:
    """bias, activation, gain, clamp, in this order."""
    wanted(impl == "cuda", f"impl={impl!r} was asked for")
    return ops.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)


def bias_act_cases() -> Iterator[Case]:
    """Every activation, by default and with all options."""
    x, b = drawn(2, 3, 4, 5), drawn(3)
    for act in ACTIVATIONS:
        yield Case(f"act={act!r}", (x, b), {"act": act}, (x, b))
        yield Case(f"act={act!r}, gain and clamp", (x,), {"act": act, "gain": 0.7, "clamp": 0.5}, (x,))
    yield Case("another slope", (x, b), {"act": "lrelu", "alpha": 0.3}, (x, b))
    last = drawn(5)
    yield Case("the bias on the last axis", (x, last, 3, "lrelu"), {}, (x, last))


def upfirdn2d(
    x: Any,
    f: Any,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    flip_filter: Any = False,
    gain: Any = 1,
    impl: Any = "cuda",
) -> Tensor:
    """True convolution unless flip_filter; no filter is the identity."""
    wanted(impl == "cuda", f"impl={impl!r} was asked for")
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    return ops.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain)


def upfirdn2d_cases() -> Iterator[Case]:
    """Filters without symmetry, all three forms of padding, both axes different."""
    x = drawn(2, 3, 6, 7)
    square, separable = (drawn(*shape, dtype=torch.float32, grad=False) for shape in ((3, 4), (4,)))
    yield Case("a filter [3, 4]", (x, square), {"padding": 1}, (x,))
    yield Case("padding [x, y]", (x, square), {"padding": [2, 1]}, (x,))
    yield Case("four paddings, one of them a crop", (x, square, 2, 1, [2, 1, -1, 3]), {"gain": 4}, (x,))
    yield Case("a flipped filter", (x, square), {"down": [2, 1], "padding": 2, "flip_filter": True}, (x,))
    yield Case("a separable filter", (x, separable, [1, 2], 1, 2), {"gain": 2.0}, (x,))
    yield Case("no filter", (x, None), {"up": 2}, (x,))


def _convolution(x: Any, weight: Any, up: Any, down: Any, padding: Any, f: Any) -> dict[str, Any]:
    """up, down and resample_filter of our op for a convolution that keeps the size, or changes it by 2."""
    exact_dtypes(x)
    wanted(isinstance(up, int) and isinstance(down, int), f"up={up!r}, down={down!r} for each axis")
    k = weight.shape[-1]
    wanted(isinstance(padding, int) and padding == k // 2, f"padding={padding!r} with a kernel of {k}")
    return {"up": up, "down": down, "resample_filter": None if up == down == 1 else f}


def _correlated(weight: Tensor, flip_weight: Any, up: int) -> Tensor:
    """Our op correlates, and takes the adjoint of that for up=2; the flag counts the other way round there."""
    return weight.flip([2, 3]) if bool(flip_weight) == (up > 1) else weight


def conv2d_resample(
    x: Any,
    w: Any,
    f: Any = None,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    groups: Any = 1,
    flip_weight: Any = True,
    flip_filter: Any = False,
) -> Tensor:
    """The convolution of a discriminator's layer."""
    wanted(groups == 1 and w.ndim == 4, f"groups={groups!r}")
    wanted(not flip_filter, "flip_filter")
    wanted(w.dtype == x.dtype, f"w is {w.dtype}, x is {x.dtype}")
    geometry = _convolution(x, w, up, down, padding, f)
    return ops.modulated_conv2d(x, _correlated(w, flip_weight, up), None, demodulate=False, **geometry)


def _fir() -> Tensor:
    return ops.setup_filter(FIR)


def conv2d_resample_cases() -> Iterator[Case]:
    """Same size, twice and half, kernels 3 and 1, both flags of the kernel."""
    x, f = drawn(2, 3, 6, 8), _fir()
    for k in (3, 1):
        w = drawn(4, 3, k, k)
        for up, down in ((1, 1), (2, 1), (1, 2)):
            for flip in (True, False):
                options = {"f": f, "up": up, "down": down, "padding": k // 2, "flip_weight": flip}
                yield Case(f"kernel {k}, up {up}, down {down}, flip_weight={flip}", (x, w), options, (x, w))


def modulated_conv2d(
    x: Any,
    weight: Any,
    styles: Any,
    noise: Any = None,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    resample_filter: Any = None,
    demodulate: Any = True,
    flip_weight: Any = True,
    fused_modconv: Any = True,
) -> Tensor:
    """epsilon counts on unscaled weights, float16 is normalised before; the two ways of fused_modconv are one here."""
    wanted(weight.ndim == 4, f"weight has {weight.ndim} axes")
    geometry = _convolution(x, weight, up, down, padding, resample_filter)
    weight = _correlated(weight, flip_weight, up)
    return ops.modulated_conv2d(x, weight, styles, demodulate=bool(demodulate), noise=noise, **geometry)


def modulated_conv2d_cases() -> Iterator[Case]:
    """Both ways of fused_modconv, all sizes, both kinds of noise; styles so small that epsilon shows; float16."""
    x, styles, weight, f = drawn(2, 5, 6, 6), drawn(2, 5), drawn(4, 5, 3, 3), _fir()
    for fused in (True, False):
        for up, down in ((1, 1), (2, 1), (1, 2)):
            size = 6 * up // down
            for flip in (True, False):
                noise = drawn(size, size) if flip else drawn(2, 1, size, size)
                options = {
                    "noise": noise, "up": up, "down": down, "padding": 1, "resample_filter": f, "flip_weight": flip,
                    "fused_modconv": fused,
                }  # fmt: skip
                name = f"up {up}, down {down}, flip_weight={flip}, fused_modconv={fused}"
                yield Case(name, (x, weight, styles), options, (x, weight, styles, noise))
        one = drawn(3, 5, 1, 1)
        plain = {"demodulate": False, "fused_modconv": fused}
        yield Case(f"no demodulation, fused_modconv={fused}", (x, one, styles), plain, (x, one, styles))
        small = drawn(2, 5, scale=1e-5)
        same = {"padding": 1, "fused_modconv": fused}
        yield Case(f"styles of 1e-5, fused_modconv={fused}", (x, weight, small), same, (x, weight, small))
        half = (x.detach().half(), weight.detach().float(), small.detach().float())
        yield Case(f"float16, fused_modconv={fused}", half, same, tolerance=1e-2)
