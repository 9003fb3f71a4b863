"""Losses of images whose gradients are known before the backward comes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clone_fast.ops.scaled_copy import scaled_copy_


def known(loss: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of an image, and its gradient: for `Known`, when it suits to find out."""
    alone = image.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(alone)
    (gradient,) = torch.autograd.grad(value, alone)
    return value.detach(), gradient


class Known(torch.autograd.Function):
    """(image, value, gradient): a loss of the image of which both are `known`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return scaled_copy_(torch.empty_like(gradient), gradient, slope), None, None


class KnownOfEach(torch.autograd.Function):
    """A loss of images whose gradient is known, up to a factor for each of them; and the images, first `count` of them,
    then the rest. The gradient may be of any dtype and lie as it likes.

    The gradient of what is made of these parts joins its part of the known one in the pass that multiplies that, and
    lays it out as the images. Those of slices would be filled up with zeros, and added to all of it.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, count: int, loss: Tensor, gradient: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gradient, factor)
        ctx.count, ctx.dtype, ctx.strides = count, images.dtype, images.stride()
        ctx.set_materialize_grads(False)
        images = images.detach()
        return loss.clone(), images[:count], images[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor | None, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, factor = ctx.saved_tensors
        whole = torch.empty_strided(gradient.shape, ctx.strides, dtype=ctx.dtype, device=gradient.device)
        factor = factor * (0 if slope is None else slope)
        for part, theirs in zip((slice(ctx.count), slice(ctx.count, None)), parts, strict=True):
            scaled_copy_(whole[part], gradient[part], factor[part], theirs)
        return whole, None, None, None, None
