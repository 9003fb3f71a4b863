"""A plugin for compute-sanitizer, `pytest -p sanitized`: what the tests compare with is computed on the CPU.

cuDNN writes through the copy engine, which initcheck takes for memory that nobody wrote; and a pyramid of plain PyTorch
is thousands of launches, each of which is watched. The loss runs at a few of its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of these arguments, computed there."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        here, named = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        return tree_map_only(Tensor, Tensor.cuda, function(*here, **named))

    return moved


class ConvolutionsOnTheCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = on_the_cpu(func) if func in CONVOLUTIONS and args[0].is_cuda else func
        return run(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _plain_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if hasattr(request.module, "differentiated"):  # the loss and its gradient by autograd
        monkeypatch.setattr(request.module, "differentiated", on_the_cpu(request.module.differentiated))
        monkeypatch.setattr(request.module, "SMALL", [(1, 1), (7, 1), (17, 24)])
        monkeypatch.setattr(request.module, "LARGE", [(129, 130), (300, 520)])
    with ConvolutionsOnTheCpu():
        yield
