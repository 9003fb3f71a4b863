"""bias_act: add a bias, apply an activation, scale, clamp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation with the defaults that StyleGAN2 layers read off it.

    Attributes:
        function: (x, alpha) -> y, elementwise.
        alpha: default shape parameter (slope of lrelu), 0 where there is none.
        gain: default output scale, sqrt(2) where it keeps the variance of a rectified Gaussian.
        homogeneous: whether function(g * x) = g * function(x) for every g > 0.
    """

    function: Callable[[Tensor, float], Tensor]
    alpha: float = 0.0
    gain: float = 1.0
    homogeneous: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x, homogeneous=True),
    "relu": Activation(lambda x, alpha: F.relu(x), gain=2**0.5, homogeneous=True),
    "lrelu": Activation(F.leaky_relu, alpha=0.2, gain=2**0.5, homogeneous=True),
    "tanh": Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu": Activation(lambda x, alpha: F.elu(x)),
    "selu": Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish": Activation(lambda x, alpha: torch.sigmoid(x) * x, gain=2**0.5),
}


def activation_defaults(act: str, alpha: float | None, gain: float | None) -> tuple[float, float]:
    """(alpha, gain) with the activation's own values where None was given."""
    spec = ACTIVATIONS[act]
    return (spec.alpha if alpha is None else float(alpha), spec.gain if gain is None else float(gain))


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """See `clone_fast.ops.bias_act.bias_act`. Half precision is computed in float32 and rounded once."""
    alpha_value, gain_value = activation_defaults(act, alpha, gain)
    spec, compute = ACTIVATIONS[act], torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute)
    if b is not None:
        shaped = b.to(compute).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
        # The gain may move in front of such an activation, and then costs no pass over x of its own.
        inside = gain_value if spec.homogeneous and gain_value > 0 else 1.0
        y = torch.add(shaped * inside, y, alpha=inside)
        gain_value /= inside
    y = spec.function(y, alpha_value)
    if gain_value != 1.0:
        y = y * gain_value
    if clamp is not None:
        y = F.hardtanh(y, -clamp, clamp)  # clamp with a backward of one pass
    return y.clone() if y is x else y.to(x.dtype)  # always a new tensor
