import math
import types

import torch
import torch.nn.functional as F

from .. import custom_ops

_plugin = None


def _act(func, alpha=0.0, gain=1.0, idx=0):
    return types.SimpleNamespace(func=func, def_alpha=alpha, def_gain=gain, cuda_idx=idx)


activation_funcs = {
    "linear": _act(lambda x, alpha: x, idx=1),
    "relu": _act(lambda x, alpha: F.relu(x), gain=math.sqrt(2), idx=2),
    "lrelu": _act(F.leaky_relu, 0.2, math.sqrt(2), idx=3),
    "tanh": _act(lambda x, alpha: torch.tanh(x), idx=4),
    "sigmoid": _act(lambda x, alpha: torch.sigmoid(x), idx=5),
    "elu": _act(lambda x, alpha: F.elu(x), idx=6),
    "selu": _act(lambda x, alpha: F.selu(x), idx=7),
    "softplus": _act(lambda x, alpha: F.softplus(x), idx=8),
    "swish": _act(lambda x, alpha: torch.sigmoid(x) * x, gain=math.sqrt(2), idx=9),
}


def _init():
    global _plugin
    if _plugin is None:
        _plugin = custom_ops.get_plugin("bias_act_plugin", sources=["/there/bias_act.cpp", "/there/bias_act.cu"])
    return True


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    assert isinstance(x, torch.Tensor)
    assert impl in ("ref", "cuda")
    assert clamp is None or clamp >= 0
    spec = activation_funcs[act]
    if b is not None:
        assert b.ndim == 1
        assert b.dtype == x.dtype
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, spec.def_alpha if alpha is None else alpha)
    x = x * (spec.def_gain if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)
