"""What the GPU tests of the fast backends share: random calls of every op, and how one is held against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from clone_fast import ops
from clone_fast.ops.bias_act import ACTIVATIONS
from clone_fast.ops.registration import layout_of
from clone_fast.reference.upfirdn2d import setup_filter

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["triton", "cuda"]
IMAGE_OPS = ("bias_act", "upfirdn2d", "modulated_conv2d", "laplacian_pyramid")  # test_styles.py has the other


@dataclass(frozen=True)
class Call:
    """One call of a public op: the tensors that may want a gradient, in float64 on the CPU, and the rest."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    fixed: tuple[str, ...] = ()
    tf32: bool = False

    def __str__(self) -> str:
        shapes = {name: list(value.shape) for name, value in self.tensors.items()}
        options = {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return f"{self.op} {shapes} {options} {self.dtype} {self.layout}{' tf32' if self.tf32 else ''}"

    @property
    def function(self) -> Callable[..., Tensor]:
        name = "laplacian_pyramid_loss" if self.op == "laplacian_pyramid" else self.op
        moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return partial(getattr(ops, name), **moved)

    def inputs(self, device: str = "cuda", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Rounded to the call's dtype first, so that a float64 run sees the same numbers."""
        made = {}
        for name, value in self.tensors.items():
            value = value.to(self.dtype).to(device, dtype or self.dtype)
            if name in ("x", "y") and value.ndim == 4:
                value = placed(value, self.layout)
            made[name] = value.detach().requires_grad_(name not in self.fixed)
        return made


def placed(x: Tensor, layout: str) -> Tensor:
    """x in a layout: contiguous, channels_last, strided (a view into something larger) or offset (misaligned)."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        n, c, h, w = x.shape
        larger = x.new_full([n, c + 1, 2 * h, w + 3], float("nan"))
        view = larger[:, 1:, ::2, 2 : w + 2]
        return view.copy_(x)
    if layout == "offset":
        return x.new_full([x.numel() + 1], float("nan"))[1:].view(x.shape).copy_(x)
    return x.contiguous()


# ---- comparison --------------------------------------------------------------------------------------------------


def calm(y: Tensor, clamp: float | None) -> Tensor:
    """A gradient for y that is small at the kinks of an activation, where rounding picks the side."""
    dy = y.detach() / y.detach().abs().max().clamp_min(1e-30)
    if clamp is not None:
        dy = dy * (1 - y.detach().abs() / clamp).clamp_min(0)
    return dy + (0 if dy.abs().max() > 0 else 1)


def results(function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The result and the gradients to the inputs that want one."""
    y = function(**inputs)
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"result": y.detach(), **dict(zip(wanted, grads, strict=True))}


def complaints(call: Call, backend: str) -> list[str]:
    """What is wrong with a call on this backend: error beyond twice that of the plain reference plus a rounding."""
    torch.backends.cudnn.allow_tf32 = call.tf32
    try:
        exact = call.inputs(dtype=torch.float64)
        with torch.no_grad():
            dy = calm(call.function(**exact, backend="reference"), call.options.get("clamp")).to(call.dtype)
        want = results(partial(call.function, backend="reference"), exact, dy)
        plain = results(partial(call.function, backend="reference"), call.inputs(), dy)
        got = results(partial(call.function, backend=backend), call.inputs(), dy)
    finally:
        torch.backends.cudnn.allow_tf32 = False
    found = []
    for name, exact_value in want.items():
        value, reference = got[name], plain[name]
        if value.dtype != reference.dtype or value.shape != reference.shape:
            found.append(f"{name}: {value.dtype} {list(value.shape)}, not {reference.dtype} {list(reference.shape)}")
            continue
        layout = layout_of(call.inputs()["x"])
        if name == "result" and value.ndim == 4 and not value.is_contiguous(memory_format=layout):
            found.append(f"result: strides {value.stride()} of {list(value.shape)}")
        error, plain_error = ((v.double() - exact_value).abs().max().item() for v in (value, reference))
        scale = max(exact_value.abs().max().item(), reduced_scale(call, name, dy))
        # With TF32 PyTorch may use more bits than that for some shapes; the rounding of TF32 is the floor all the same.
        eps = 2.0**-10 if call.tf32 else torch.finfo(value.dtype).eps
        allowed = 2 * plain_error + eps * scale
        if not error <= allowed:
            found.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest {exact_value.abs().max():.3g}")
        if value.numel() > 8 and exact_value.norm() > 1e-3 * scale and not cosine(value, exact_value) > 0.99:
            found.append(f"{name}: cosine {cosine(value, exact_value):.5f}")
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def reduced_scale(call: Call, name: str, dy: Tensor) -> float:
    """The size of the terms of a sum that may cancel out: where it does, a rounding of the terms is what remains."""
    if name in ("b", "bias", "noise_strength"):
        terms = dy.double().abs().sum().item() * abs(call.options.get("gain") or 1.5)
        return terms * 2.0**-24 / torch.finfo(call.dtype).eps * (4 if name == "noise_strength" else 1)
    return 0.0


# ---- random calls ------------------------------------------------------------------------------------------------


def draw(op: str, seed: int, count: int) -> Iterator[Call]:
    """Calls of every kind that the op has, small enough that hundreds of them take seconds."""
    for i in range(count):
        pick = Random(f"{op}-{seed}-{i}")
        torch.manual_seed(pick.getrandbits(30))
        call = {
            "bias_act": _bias_act,
            "upfirdn2d": _upfirdn2d,
            "laplacian_pyramid": _laplacian_pyramid,
            "modulated_conv2d": _modulated_conv2d,
        }[op](pick)
        layouts = ["contiguous", "channels_last", "channels_last", "strided", "offset"]
        yield replace(call, dtype=pick.choice(FLOATS), layout=pick.choice(layouts))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _image(pick: Random, channels: list[int], largest: int = 48) -> list[int]:
    n = pick.choice([1, 1, 2, 3, 5])
    return [n, pick.choice(channels), *(pick.choice([1, 2, 3, 7, 8, 16, 17, 31, 32, largest]) for _ in range(2))]


def _bias_act(pick: Random) -> Call:
    shape = pick.choice([_image(pick, [1, 3, 8, 16, 33, 64]), [pick.randint(1, 9), pick.randint(1, 600)]])
    dim = 1 if len(shape) == 4 and pick.random() < 0.7 else pick.randrange(len(shape))
    tensors = {"x": 2 * _normal(*shape)}
    if pick.random() < 0.8:
        tensors["b"] = _normal(shape[dim])
    options: dict[str, Any] = {"dim": dim, "act": pick.choice(list(ACTIVATIONS))}
    options |= {"gain": pick.choice([None, 0.7, -1.3]), "clamp": pick.choice([None, 1.5])}
    options |= {"alpha": pick.choice([None, 0.3])}
    return Call("bias_act", tensors, options)


def _taps(pick: Random, lengths: list[int]) -> Tensor:
    return torch.rand(pick.choice(lengths)) + 0.1


def _upfirdn2d(pick: Random) -> Call:
    shape = _image(pick, [1, 3, 8, 16, 32, 40])
    taps = _taps(pick, [1, 2, 3, 4, 4, 4, 6, 12])
    f = pick.choice([setup_filter(taps, separable=True), setup_filter(taps[:, None] * _taps(pick, [1, 3, 4])[None])])
    f = setup_filter([1, 3, 3, 1]) if pick.random() < 0.3 else f
    options: dict[str, Any] = {"f": f, "flip_filter": pick.random() < 0.5, "gain": pick.choice([1.0, 4.0, -0.5])}
    simple = [(1, 1), (2, 1), (1, 2)]
    options["up"], options["down"] = (
        pick.choice(simple)
        if pick.random() < 0.6
        else ([pick.randint(1, 3), pick.randint(1, 3)], [pick.randint(1, 3), pick.randint(1, 3)])
    )
    size = max(f.shape)
    options["padding"] = [pick.randint(size // 2 - 1, size) for _ in range(4)]
    if min(shape[2:]) > 4 and pick.random() < 0.3:
        options["padding"][pick.randrange(4)] = -1
    options["padding"][1] += size  # so that something is always left
    options["padding"][3] += size
    return Call("upfirdn2d", {"x": _normal(*shape)}, options)


def _laplacian_pyramid(pick: Random) -> Call:
    shape = _image(pick, [1, 3, 3, 4], pick.choice([48, 65, 130, 200]))
    levels = pick.randint(1, 8)
    options: dict[str, Any] = {"levels": levels, "charbonnier": pick.choice([None, None, 0.1])}
    options["weights"] = pick.choice([None, [pick.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(levels)]])
    options["mse"] = pick.choice([0.0, 0.0, 1.0, 3.0])
    return Call("laplacian_pyramid", {"x": _normal(*shape), "y": _normal(*shape)}, options)


def _modulated_conv2d(pick: Random) -> Call:
    n, i, height, width = _image(pick, [3, 8, 16, 17, 32, 64, 96])
    up, down = pick.choice([(1, 1), (1, 1), (2, 1), (1, 2)])
    if down == 2:
        height, width = 2 * height, 2 * width
    o, k = pick.choice([3, 16, 20, 32, 64]), pick.choice([1, 3, 3])
    size = [height * up // down, width * up // down]
    own = pick.random() < 0.3
    tensors = {"x": _normal(n, i, height, width) * (2 * torch.rand(i, 1, 1, dtype=torch.float64))}
    tensors["weight"] = _normal(*([n] if own else []), o, i, k, k) / math.sqrt(i * k * k)
    options: dict[str, Any] = {"up": up, "down": down, "demodulate": False, "styles": None}
    if pick.random() < 0.7:
        tensors["styles"] = 1 + 0.5 * _normal(n, i)
        del options["styles"]
        options["demodulate"] = pick.random() < 0.7
    if pick.random() < 0.6:
        tensors["noise"] = _normal(*pick.choice([size, [1, 1, *size], [n, 1, *size]]))
        if pick.random() < 0.7:
            tensors["noise_strength"] = _normal()
    if pick.random() < 0.7:
        tensors["bias"] = _normal(o)
    if up * down > 1:
        options["resample_filter"] = setup_filter(pick.choice([[1, 3, 3, 1], [1, 3, 3, 1], [1, 2, 1], [1, 4, 2, 3, 1]]))
    acts = ["linear", "relu", "lrelu", "lrelu", "lrelu", "swish", "tanh"]
    options |= {
        "act": pick.choice(acts),
        "clamp": pick.choice([None, 2.0]),
        "gain": pick.choice([None, None, 0.5, -0.5]),
    }
    return Call("modulated_conv2d", tensors, options)
