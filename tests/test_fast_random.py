"""Every op on every fast backend against float64, on random calls: dtypes, layouts, shapes, options, all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fast import BACKENDS, IMAGE_OPS, Call, complaints, draw

from clone_fast.errors import BackendError
from clone_fast.ops import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

GROUPS, SIZE = 25, 20  # 500 calls of every op
MAY_REFUSE = {("cuda", "modulated_conv2d")}  # a leaf for some shapes only; those are counted


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("op", IMAGE_OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend: str, op: str, group: int) -> None:
    found = []
    ran = 0
    for call in draw(op, group, SIZE):
        try:
            found += [f"{call}: {text}" for text in complaints(call, backend)]
            ran += 1
        except BackendError as error:
            if (backend, op) not in MAY_REFUSE or dispatch.CANNOT not in str(error):
                raise
    assert not found, "\n".join(found)
    assert ran == SIZE or (backend, op) in MAY_REFUSE


@pytest.mark.parametrize("group", range(5))
def test_random_convolutions_in_tf32(group: int) -> None:
    """Against the reference with TF32, whose error is what sets the bar."""
    found = []
    for call in draw("modulated_conv2d", 1000 + group, SIZE):
        call = replace(call, dtype=torch.float32, tf32=True)
        found += [f"{call}: {text}" for text in complaints(call, "triton")]
    assert not found, "\n".join(found)


def test_the_cuda_convolution_is_reached() -> None:
    """What it is for: 3x3, 32 and 64 channels, half precision."""
    for channels in (32, 64):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(2, channels, 33, 70, dtype=torch.float64)
            weight = torch.randn(channels, channels, 3, 3, dtype=torch.float64) / channels
            styles = torch.randn(2, channels, dtype=torch.float64)
            tensors = {"x": x, "weight": weight, "styles": styles}
            call = Call("modulated_conv2d", tensors, {"act": "lrelu"}, dtype, "channels_last")
            assert not complaints(call, "cuda")
