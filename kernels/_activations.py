"""The formulas of bias_act for Triton: value, slope and curvature of each activation, in float32.

ACT is the name of the activation. Formulas that would cancel near 0 go by their series there: what PyTorch computes to
the last bits, these do too.
"""

from __future__ import annotations

import triton
import triton.language as tl

SELU_SCALE = tl.constexpr(1.0507009873554804934)
SELU_ALPHA = tl.constexpr(1.6732632423543772848)
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)  # from here on softplus(z) = z, as in PyTorch


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def expm1(z):
    near = 1 / 5040 + z * (1 / 40320 + z * (1 / 362880 + z * (1 / 3628800 + z / 39916800)))
    near = 1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * near)))
    near = z * (1 + z * (1 / 2 + z * near))
    return tl.where(tl.abs(z) < 1.0, near, tl.exp(z) - 1.0)


@triton.jit
def tanh(z):
    s = z * z
    near = 21844 / 6081075 + s * (-929569 / 638512875 + s * (6404582 / 10854718875))
    near = -17 / 315 + s * (62 / 2835 + s * (-1382 / 155925 + s * near))
    near = z * (1 + s * (-1 / 3 + s * (2 / 15 + s * near)))
    e = tl.exp(-2.0 * tl.abs(z))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(z) < 0.6, near, tl.where(z < 0.0, -far, far))


@triton.jit
def tanh_slope(z):
    """1 - tanh(z)^2, without the cancellation where the tanh is near 1"""
    t = tanh(z)
    e = tl.exp(-2.0 * tl.abs(z))
    q = 1.0 / (1.0 + e)
    return tl.where(tl.abs(z) < 1.0, 1.0 - t * t, 4.0 * e * q * q)


@triton.jit
def softplus(z):
    u = tl.exp(-tl.abs(z))
    near = u * (1 + u * (-1 / 2 + u * (1 / 3 + u * (-1 / 4 + u / 5))))
    log1p = tl.where(u < 0.03, near, tl.log(1.0 + u))
    return tl.where(z > SOFTPLUS_THRESHOLD, z, tl.where(z < 0.0, 0.0, z) + log1p)


@triton.jit
def activation(z, alpha, ACT: tl.constexpr):
    """act(z)"""
    if ACT == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACT == "lrelu":
        z = tl.where(z < 0.0, z * alpha, z)
    elif ACT == "tanh":
        z = tanh(z)
    elif ACT == "sigmoid":
        z = sigmoid(z)
    elif ACT == "elu":
        z = tl.where(z < 0.0, expm1(z), z)
    elif ACT == "selu":
        z = SELU_SCALE * tl.where(z < 0.0, SELU_ALPHA * expm1(z), z)
    elif ACT == "softplus":
        z = softplus(z)
    elif ACT == "swish":
        z = z * sigmoid(z)
    return z


@triton.jit
def times_slope(g, z, alpha, ACT: tl.constexpr):
    """g * act'(z); 0 where the slope is, whatever g holds."""
    if ACT == "relu":
        g = tl.where(z <= 0.0, 0.0, g)
    elif ACT == "lrelu":
        g = tl.where(z <= 0.0, g * alpha, g)
    elif ACT == "tanh":
        g = g * tanh_slope(z)
    elif ACT == "sigmoid":
        s = sigmoid(z)
        g = g * (s * (1.0 - s))
    elif ACT == "elu":
        g = tl.where(z <= 0.0, g * tl.exp(z), g)
    elif ACT == "selu":
        g = g * SELU_SCALE * tl.where(z <= 0.0, SELU_ALPHA * tl.exp(z), 1.0)
    elif ACT == "softplus":
        g = tl.where(z > SOFTPLUS_THRESHOLD, g, g * sigmoid(z))
    elif ACT == "swish":
        s = sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    return g


@triton.jit
def curvature(z, ACT: tl.constexpr):
    """act''(z), 0 for those made of straight lines"""
    if ACT == "tanh":
        c = -2.0 * tanh(z) * tanh_slope(z)
    elif ACT == "sigmoid":
        s = sigmoid(z)
        c = s * (1.0 - s) * (1.0 - 2.0 * s)
    elif ACT == "elu":
        c = tl.where(z < 0.0, tl.exp(z), 0.0)
    elif ACT == "selu":
        c = tl.where(z < 0.0, SELU_SCALE * SELU_ALPHA * tl.exp(z), 0.0)
    elif ACT == "softplus":
        s = sigmoid(z)
        c = tl.where(z > SOFTPLUS_THRESHOLD, 0.0, s * (1.0 - s))
    elif ACT == "swish":
        s = sigmoid(z)
        c = s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    else:
        c = z * 0.0
    return c
