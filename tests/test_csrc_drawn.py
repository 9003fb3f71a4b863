"""The image that the CUDA leaf of modulated_conv2d draws of its result: what can be seen of it without a GPU."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import ROOT
from torch import Tensor


@pytest.fixture
def leaf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a device with room for everything."""
    pytest.importorskip("clone_fast._C")
    module = importlib.import_module("clone_fast.cuda.modulated_conv2d")
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    return module


def call(rgb_weight: Tensor, **changed: Any) -> tuple[Any, ...]:
    given = {
        "x": torch.zeros(2, 32, 5, 7, dtype=torch.float16),
        "weight": torch.zeros(2, 32, 32, 3, 3, dtype=torch.float16),
        "noise": None,
        "noise_strength": None,
        "bias": None,
        "act": "lrelu",
        "gain": 1.0,
        "clamp": None,
        "rgb_weight": rgb_weight,
        "rgb_bias": None,
        "rgb_clamp": None,
    }
    return tuple((given | changed).values())


def test_what_is_drawn(leaf: Any) -> None:
    for outputs in (1, 2, 3, 4):
        assert leaf.supports_drawn(*call(torch.zeros(outputs, 32, 1, 1, dtype=torch.float16))) is None
        assert leaf.supports_drawn(*call(torch.zeros(2, outputs, 32, 1, 1, dtype=torch.float16))) is None


def test_reasons(leaf: Any) -> None:
    rgb = torch.zeros(3, 32, 1, 1, dtype=torch.float16)
    x, weight = call(rgb)[:2]

    def reason(rgb_weight: Tensor = rgb, **changed: Any) -> str:
        return str(leaf.supports_drawn(*call(rgb_weight, **changed)))

    assert "1 to 4 channels, not 5" in reason(torch.zeros(5, 32, 1, 1, dtype=torch.float16))
    assert "1 to 4 channels, not 0" in reason(torch.zeros(2, 0, 32, 1, 1, dtype=torch.float16))
    assert "1x1 kernel, not 3x3" in reason(torch.zeros(3, 32, 3, 3, dtype=torch.float16))
    assert "rgb_weight must have x's dtype torch.float16, got torch.float32" in reason(rgb.float())
    assert "no kernel for float32" in reason(rgb.float(), x=x.float(), weight=weight.float())
    assert "float64" in reason(rgb.double(), x=x.double(), weight=weight.double())
    assert "swish" in reason(act="swish")
    assert "gain" in reason(gain=0.0)
    assert "3x3 kernel" in reason(weight=weight[..., :1, :1])
    assert "at most 64" in reason(weight=torch.zeros(72, 32, 3, 3, dtype=torch.float16))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float16, torch.float32, torch.float64])
def test_what_the_kernel_is_told(
    leaf: Any, monkeypatch: pytest.MonkeyPatch, bias: torch.dtype | None, per_sample: bool
) -> None:
    """A weight is read where it lies, whatever its strides are, and a bias of few bytes is put in order before."""
    told: list[Any] = []

    def run(op: Any, drawing: Any, stream: int) -> None:
        """What csrc/modulated_conv2d.h says that these numbers mean."""
        told.append(drawing)
        samples, pixels = op.n, op.height * op.width
        kind = {True: ctypes.c_float, False: ctypes.c_uint16}
        wn, wf, wc = drawing.weight_strides
        image = (ctypes.c_uint16 * (samples * pixels * drawing.channels)).from_address(drawing.rgb)
        for n in range(samples):
            for f in range(drawing.channels):
                word = ctypes.c_uint16.from_address(drawing.weight + 2 * (n * wn + f * wf + 31 * wc)).value
                for p in range(pixels):
                    image[(n * pixels + p) * drawing.channels + f] = word
        if drawing.bias:
            told.append((kind[drawing.bias_float] * drawing.channels).from_address(drawing.bias)[:])

    names = SimpleNamespace(Conv3x3=SimpleNamespace, Drawing=SimpleNamespace, modulated_conv2d_3x3_drawn=run)
    monkeypatch.setattr(leaf, "_C", names)
    monkeypatch.setattr(leaf, "stream", lambda _: 0)
    weight = torch.randn(2, 3, 64, 1, 3, 1, dtype=torch.float16).permute(0, 4, 2, 5, 3, 1)[:, :, ::2, ..., 1]
    weight = weight if per_sample else weight[1]
    rgb_bias = None if bias is None else torch.randn(6, dtype=bias)[::2]
    y, rgb = leaf.launch_drawn(*call(weight, rgb_bias=rgb_bias, rgb_clamp=0.5))
    assert y.shape == (2, 32, 5, 7)
    assert torch.equal(rgb, weight[..., 31, :, :].expand(2, 3, 5, 7))
    assert told[0].clamp == 0.5
    if rgb_bias is not None:
        wanted = rgb_bias if bias == torch.float16 else rgb_bias.float()
        assert told[1] == (wanted.view(torch.uint16) if bias == torch.float16 else wanted).tolist()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """csrc/_modulated_conv2d_drawing.cuh, compiled for the CPU."""
    if not (ROOT / "csrc").exists():
        pytest.skip("reads the checkout, and there is none")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    folder: Path = tmp_path_factory.mktemp("drawing")
    for name in ("_modulated_conv2d_drawing.cuh", "modulated_conv2d.h", "launch.cuh", "dtype.h"):
        shutil.copy(ROOT / "csrc" / name, folder)
    shutil.copy(ROOT / "tests" / "emulated_cuda.h", folder / "cuda_runtime.h")
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).write_text("#include <cuda_runtime.h>\n")
    shutil.copy(ROOT / "tests" / "emulated_warp.h", folder / "_modulated_conv2d_load.cuh")
    source = ROOT / "tests" / "emulated_drawing.cu"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-I.", "-x", "c++"]
    subprocess.run(["g++", *flags, str(source), "-o", "drawing.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "drawing.so")).draw_pixels


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "width", "outputs", "per_sample", "clamp"),
    [(32, 128, 3, True, inf), (24, 77, 4, False, 0.7), (64, 41, 1, True, 1.0), (40, 5, 2, True, inf)],
)
def test_lanes_and_channels(
    drawn: Any, channels: int, width: int, outputs: int, per_sample: bool, clamp: float, bias: torch.dtype | None
) -> None:
    """The part of every lane in the matrix instruction, and what each of them stores."""
    n = 2
    y = torch.randn(n, width, channels, dtype=torch.bfloat16)
    weight = torch.randn(n, channels, outputs, dtype=torch.bfloat16).transpose(1, 2) * channels**-0.5
    weight = weight if per_sample else weight[1:].expand(n, -1, -1)
    shift = None if bias is None else torch.randn(outputs, dtype=bias)
    rgb = torch.full([n, width, outputs], float("nan"), dtype=torch.bfloat16)
    strides = (ctypes.c_int64 * 3)(*weight.stride())
    at = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (y, weight, shift, rgb)]
    limit = ctypes.c_float(clamp)
    drawn(n, width, channels, at[0], outputs, at[1], strides, at[2], bias == torch.float32, limit, at[3])
    wanted = y.double() @ weight.double().mT + (0 if shift is None else shift.double())
    wanted = wanted.clamp(-clamp, clamp)
    assert (rgb.double() - wanted).abs().max() <= torch.finfo(torch.bfloat16).eps * wanted.abs().max()
