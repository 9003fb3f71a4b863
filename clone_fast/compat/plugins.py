"""The compiled extensions that these codebases build at run time, answered by modules of the same functions.

Two families, two interfaces: fused and upfirdn2d of rosinality's, bias_act_plugin and upfirdn2d_plugin of NVIDIA's.
Like theirs these functions know no gradient: the codebases wrap them in autograd functions of their own. An extension
is recognised by its name and by the names of its sources.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clone_fast import ops
from clone_fast.compat.nvidia import ACTIVATIONS
from clone_fast.compat.replacement import wanted

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
LINEAR, LRELU = 1, 3


def _present(x: Tensor | None) -> Tensor | None:
    """An empty tensor stands for none."""
    return x if x is not None and x.numel() else None


# ------------------------------------------------------------------------------------------------------------
# rosinality's


def _fused_bias_act(
    input: Tensor, bias: Tensor, refer: Tensor, act: int, grad: int, alpha: float, scale: float
) -> Tensor:
    """scale * act(input + bias); for grad=1 scale * (input + bias) * slope of act where its result is refer."""
    if act not in (LINEAR, LRELU) or grad not in (0, 1, 2):
        raise ValueError(f"fused_bias_act: act must be 1 or 3 and grad 0, 1 or 2, got act={act}, grad={grad}")
    b = _present(bias)
    if grad == 2:
        return torch.zeros_like(input)
    if grad == 0 or act == LINEAR:
        return ops.bias_act(input, b, act="linear" if act == LINEAR else "lrelu", alpha=alpha, gain=scale)
    x = ops.bias_act(input, b)
    return torch.where(refer > 0, x, x * alpha) * scale


def _upfirdn2d_nhwc(
    input: Tensor, kernel: Tensor, up_x: int, up_y: int, down_x: int, down_y: int,
    pad_x0: int, pad_x1: int, pad_y0: int, pad_y1: int,
) -> Tensor:  # fmt: skip
    """Images [major, H, W, minor]."""
    f = kernel if kernel.dtype == input.dtype == torch.float64 else kernel.float()
    x = input.permute(0, 3, 1, 2).contiguous()
    y = ops.upfirdn2d(x, f, up=[up_x, up_y], down=[down_x, down_y], padding=[pad_x0, pad_x1, pad_y0, pad_y1])
    return y.permute(0, 2, 3, 1).contiguous()


# ------------------------------------------------------------------------------------------------------------
# NVIDIA's


def _bias_act(
    x: Tensor, b: Tensor, xref: Tensor, yref: Tensor, dy: Tensor, grad: int, dim: int,
    act: int, alpha: float, gain: float, clamp: float,
) -> Tensor:  # fmt: skip
    """Of order grad: the result; x * act' * gain; x * act'' * gain * dy. What the slopes need is in xref or in yref."""
    name = ACTIVATIONS[act - 1]
    if grad == 0:
        limit = clamp if clamp >= 0 else None
        return ops.bias_act(x, _present(b), dim=dim, act=name, alpha=alpha, gain=gain, clamp=limit)
    compute = torch.promote_types(x.dtype, torch.float32)
    before, after, upper = (None if t is None else t.to(compute) for t in map(_present, (xref, yref, dy)))
    if before is not None and _present(b) is not None:
        before = before + b.to(compute).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    if name == "swish" and before is not None:
        after = torch.sigmoid(before) * before * gain
    y = x.to(compute) * gain * _slope(name, grad, before, after, alpha, gain)
    if upper is not None:
        y = y * upper
    if clamp >= 0 and after is not None:
        y = torch.where(after.abs() < clamp, y, 0.0)
    return y.to(x.dtype)


def _slope(name: str, order: int, before: Tensor | None, after: Tensor | None, alpha: float, gain: float) -> Any:
    """The first or second derivative of an activation, from its argument or from its result times gain."""
    first = order == 1
    if name == "linear":
        return 1.0 if first else 0.0
    if name == "swish":
        x = _given(before, name)
        s = torch.sigmoid(x)
        return s + x * s * (1 - s) if first else s * (1 - s) * (2 + x * (1 - 2 * s))
    y = _given(after, name) / gain
    if name in ("relu", "lrelu"):
        below = alpha if name == "lrelu" else 0.0
        return torch.where(y > 0, 1.0, below).to(y.dtype) if first else 0.0
    if name == "tanh":
        return 1 - y * y if first else -2 * y * (1 - y * y)
    if name == "sigmoid":
        return y * (1 - y) if first else y * (1 - y) * (1 - 2 * y)
    if name == "elu":
        return torch.where(y >= 0, 1.0 if first else 0.0, y + 1)
    if name == "selu":
        return torch.where(y >= 0, SELU_SCALE if first else 0.0, y + SELU_SCALE * SELU_ALPHA)
    e = torch.exp(-y)  # softplus
    return 1 - e if first else e * (1 - e)


def _given(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(f"bias_act_plugin: the gradient of {name} needs a reference that is not given")
    return x


def _upfirdn2d(
    x: Tensor, f: Tensor, upx: int, upy: int, downx: int, downy: int,
    padx0: int, padx1: int, pady0: int, pady1: int, flip: bool, gain: float,
) -> Tensor:  # fmt: skip
    return ops.upfirdn2d(
        x, f, up=[upx, upy], down=[downx, downy], padding=[padx0, padx1, pady0, pady1], flip_filter=flip, gain=gain
    )


# ------------------------------------------------------------------------------------------------------------
# who asks for them

# name of the extension -> what the names of its sources begin with, its functions
PLUGINS: dict[str, tuple[str, dict[str, Callable[..., Tensor]]]] = {
    "fused": ("fused_bias_act", {"fused_bias_act": _fused_bias_act}),
    "upfirdn2d": ("upfirdn2d", {"upfirdn2d": _upfirdn2d_nhwc}),
    "bias_act_plugin": ("bias_act", {"bias_act": _bias_act}),
    "upfirdn2d_plugin": ("upfirdn2d", {"upfirdn2d": _upfirdn2d}),
}


def _plugin(name: str, sources: Any) -> ModuleType:
    wanted(name in PLUGINS, f"the extension {name!r} is not ours")
    beginning, functions = PLUGINS[name]
    files = [Path(source).name for source in ([sources] if isinstance(sources, str) else sources)]
    strange = [file for file in files if not file.startswith(beginning)]
    wanted(not strange, f"the extension {name!r} is made of {', '.join(strange)}")
    module = ModuleType(name, f"{name} on clone_fast's ops.")
    vars(module).update(functions)
    return module


class Plugins:
    """Those of one installation: each is made once, and is in sys.modules as one that was built would be."""

    def __init__(self) -> None:
        self._made: dict[str, ModuleType] = {}

    def _answer(self, name: str, sources: Any) -> ModuleType:
        plugin = _plugin(name, sources)
        plugin = self._made.setdefault(name, plugin)
        sys.modules.setdefault(name, plugin)
        return plugin

    def load(self, name: Any, sources: Any = (), *args: Any, is_python_module: Any = True, **kwargs: Any) -> ModuleType:
        """`torch.utils.cpp_extension.load`."""
        wanted(is_python_module, f"the extension {name!r} is no Python module")
        return self._answer(name, sources)

    def get_plugin(self, module_name: Any, sources: Any = (), *args: Any, **kwargs: Any) -> ModuleType:
        """NVIDIA's `custom_ops.get_plugin`, which would look for a compiler first."""
        return self._answer(module_name, sources)

    def forget(self) -> None:
        """Take them out of sys.modules; who holds one keeps it, and it goes on working."""
        for name, plugin in self._made.items():
            if sys.modules.get(name) is plugin:
                del sys.modules[name]
        self._made.clear()
