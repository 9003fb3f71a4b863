"""The strongest plain PyTorch that we could write: the baseline of every claim about a step.

The networks of clone_fast.nn over their very parameters, written for torch.compile and for nothing else: activations in
bf16 and channels_last, weights not modulated per sample (x * s, a convolution with the shared weight, * d), every FIR
as shifted slices that the compiler fuses into what stands beside it. No op of clone_fast is called here.

StyleGAN2: Karras et al. 2020. Laplacian pyramid: Burt and Adelson 1983, one pyramid of the difference since it is
linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clone_fast.losses import pyramid_levels
from clone_fast.nn import Discriminator, Generator, MappingNetwork, SynthesisNetwork
from clone_fast.nn.generator import SynthesisLayer, ToRGBLayer
from clone_fast.nn.layers import Conv2dLayer, FullyConnectedLayer

ROOT2 = 2**0.5


@dataclass(frozen=True)
class Plan:
    """What can be written in more than one way; the defaults are to be those that measure best.

    Attributes:
        dtype: of activations and of the weights that convolutions read; images, styles and statistics are float32.
        rgb: how the 1x1 convolutions to three channels run: "conv", by cuDNN, or "sum", as sums of products that fuse
            with their neighbours.
    """

    dtype: torch.dtype = torch.bfloat16
    rgb: str = "sum"


def _sliced(x: Tensor, pad: int, down: int, gain: float) -> Tensor:
    x = F.pad(x, [pad] * 4)
    for dim in (2, 3):
        last = x.shape[dim] - 3  # where the last tap starts, and one more
        a, b, c, d = (x[(slice(None),) * dim + (slice(i, last + i, down),)] for i in range(4))
        x = (a + d + 3 * (b + c)) * (gain**0.5 / 8)
    return x


class _Fir(torch.autograd.Function):
    """`fir` with its adjoint, which is a FIR of the same kind: PyTorch's own would scatter every slice into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: int, gain: float) -> Tensor:
        ctx.pad, ctx.gain = pad, gain
        return _sliced(x, pad, 1, gain)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _sliced(dy, 3 - ctx.pad, 1, ctx.gain), None, None


def fir(x: Tensor, pad: int, *, down: int = 1, gain: float = 1.0) -> Tensor:
    """Filter [N, C, H, W] with [1 3 3 1] along both axes, `pad` zeros on every side, then decimate."""
    if down > 1:
        return _sliced(x, pad, down, gain)
    y: Tensor = _Fir.apply(x, pad, gain)
    return y


def _phases(x: Tensor, dim: int, factors: Sequence[Tensor]) -> Tensor:
    """Interpolate by 2 along an axis: every sample becomes two, weighted sums of its neighbour, itself, its neighbour.

    Args:
        factors: of these three, each of a shape that broadcasts to [size, 2]. Unlike a stack of two phases the sum of
            products has no kernel of its own.
    """
    size = x.shape[dim]
    padded = F.pad(x, [0, 0, 1, 1] if dim == 2 else [1, 1, 0, 0])
    taps = (padded.narrow(dim, i, size).unsqueeze(dim + 1) for i in range(3))
    a, b, c = (f.reshape(*f.shape, *(1,) * (3 - dim)) * tap for f, tap in zip(factors, taps, strict=True))
    return (a + b + c).flatten(dim, dim + 1)


def upsample(img: Tensor) -> Tensor:
    """[N, C, h, w] to twice the size: zero insertion and [1 3 3 1] / 4 along both axes."""
    phase = torch.arange(2, device=img.device, dtype=img.dtype)
    for dim in (2, 3):
        img = _phases(img, dim, ((1 - phase) / 4, 0 * phase + 0.75, phase / 4))
    return img


def _linear(layer: FullyConnectedLayer, x: Tensor) -> Tensor:
    y = F.linear(x, layer.weight.to(x.dtype) * layer.weight_gain, layer.bias.to(x.dtype) * layer.bias_gain)
    return y if layer.activation == "linear" else F.leaky_relu(y, 0.2) * ROOT2


def mapping(net: MappingNetwork, z: Tensor) -> Tensor:
    """z [N, z_dim] -> ws [N, num_ws, w_dim] of an unconditional network."""
    x = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
    for i in range(net.num_layers):
        x = _linear(net.get_submodule(f"fc{i}"), x)  # type: ignore[arg-type]
    return x[:, None].expand(-1, net.num_ws or 1, -1)


def _limited(y: Tensor, clamp: float | None) -> Tensor:
    return y if clamp is None else y.clamp(-clamp, clamp)


def _styled(layer: SynthesisLayer, x: Tensor, w: Tensor, noise: Tensor, plan: Plan) -> Tensor:
    """x [N, I, h, w] -> [N, O, r, r]; float32 [N, I] and [N, O] stand before and after one shared convolution."""
    styles = _linear(layer.affine, w)
    energy = layer.weight.square().sum(dim=[2, 3])  # [O, I]
    scale = (styles.square() @ energy.t() + 1e-8).rsqrt()
    x = x * styles.to(plan.dtype)[:, :, None, None]
    weight = layer.weight.to(plan.dtype)
    if layer.up == 2:
        y = fir(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, gain=4.0)
    else:
        y = F.conv2d(x, weight, padding=1)
    noise = (noise * layer.noise_strength).to(plan.dtype)
    y = y * scale.to(plan.dtype)[:, :, None, None] + noise + layer.bias.to(plan.dtype)[:, None, None]
    return _limited(F.leaky_relu(y, 0.2) * layer.act_gain, layer.conv_clamp)


def _rgb(layer: ToRGBLayer, x: Tensor, w: Tensor, plan: Plan) -> Tensor:
    """x [N, I, r, r] -> float32 [N, 3, r, r]."""
    styles = _linear(layer.affine, w) * layer.weight.shape[1] ** -0.5
    if plan.rgb == "conv":
        y = F.conv2d(x * styles.to(plan.dtype)[:, :, None, None], layer.weight.to(plan.dtype)).float()
    else:
        modulated = layer.weight[None, :, :, 0, 0] * styles[:, None]  # [N, 3, I], small enough to be per sample
        y = torch.stack([(x * m[:, :, None, None]).sum(dim=1) for m in modulated.unbind(1)], dim=1)
    return _limited(y + layer.bias[:, None, None], layer.conv_clamp)


def synthesis(net: SynthesisNetwork, ws: Tensor, plan: Plan) -> Tensor:
    """ws float32 [N, num_ws, w_dim] -> images float32 [N, C, R, R], with every layer's constant noise."""
    x = net.get_submodule("b4").const[None].expand(ws.shape[0], -1, -1, -1)  # type: ignore[index]
    x = x.to(plan.dtype, memory_format=torch.channels_last)
    img, index = None, 0
    for resolution in net.block_resolutions:
        block = net.get_submodule(f"b{resolution}")
        for name in ["conv1"] if resolution == 4 else ["conv0", "conv1"]:
            layer = block.get_submodule(name)
            x = _styled(layer, x, ws[:, index], layer.noise_const, plan)  # type: ignore[arg-type]
            index += 1
        rgb = _rgb(block.get_submodule("torgb"), x, ws[:, index], plan)  # type: ignore[arg-type]
        img = rgb if img is None else upsample(img) + rgb
    return img.contiguous()  # type: ignore[union-attr]


def _conv(layer: Conv2dLayer, x: Tensor, plan: Plan, gain: float = 1.0) -> Tensor:
    """x [N, I, H, W] -> [N, O, H / down, W / down]."""
    weight = layer.weight * layer.weight_gain
    k = weight.shape[-1]
    if layer.down == 1:
        y = F.conv2d(x.to(plan.dtype), weight.to(plan.dtype), padding=k // 2)
    else:
        y = F.conv2d(fir(x, 2), weight.to(plan.dtype), stride=2)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)[:, None, None]
    if layer.activation == "lrelu":
        y = F.leaky_relu(y, 0.2)
    y = _limited(y * (layer.act_gain * gain), None if layer.conv_clamp is None else layer.conv_clamp * gain)
    return y.to(plan.dtype, memory_format=torch.channels_last)


def logits(net: Discriminator, img: Tensor, group: int, plan: Plan) -> Tensor:
    """img float32 [N, C, R, R] -> float32 [N, 1] of an unconditional network.

    group: samples that share a minibatch standard deviation; sample n belongs to group n mod (N / group).
    """
    x = img.contiguous(memory_format=torch.channels_last)
    for resolution in net.block_resolutions:
        block = net.get_submodule(f"b{resolution}")
        if hasattr(block, "fromrgb"):
            x = _conv(block.fromrgb, x, plan)  # type: ignore[arg-type]
        skip = _conv(block.skip, fir(x, 1, down=2), plan, 0.5**0.5)  # type: ignore[arg-type]
        x = skip + _conv(block.conv1, _conv(block.conv0, x, plan), plan, 0.5**0.5)  # type: ignore[arg-type]
    last = net.b4
    if last.num_channels > 0:
        _, c, h, w = x.shape
        y = x.float().reshape(group, -1, last.num_channels, c // last.num_channels, h, w)
        y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [N / group, F]
        x = torch.cat([x, y[:, :, None, None].repeat(group, 1, h, w).to(x.dtype)], dim=1)
    features = _linear(last.fc, _conv(last.conv, x, plan).flatten(1))
    return _linear(last.out, features.float())


def paired_logits(net: Discriminator, real: Tensor, fake: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Both [N, C, R, R] in one pass, interleaved so that the groups of either stay what they are by themselves."""
    both = torch.stack([real, fake], dim=1).flatten(0, 1)
    judged = logits(net, both, group_of(net, real.shape[0]), plan)
    return judged[0::2], judged[1::2]


def group_of(net: Discriminator, n: int) -> int:
    """Samples in a minibatch group of n images."""
    return min(net.b4.group_size or n, n)


Borders = dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def borders(resolution: int, device: torch.device) -> Borders:
    """For every size of a pyramid's level the factors of `_halved` (to that size) and of `_doubled` (from it).

    What a repeated border would bring is at hand in the taps that lie inside, whose factors are larger there. Made
    once: computed in the graph, they would be kernels of their own.
    """
    made: Borders = {}
    for level in range(1, pyramid_levels(resolution)):
        size = resolution >> level
        first, last = torch.zeros(2, size, 1, device=device)
        first[0], last[-1] = 1.0, 1.0
        phase = torch.arange(2, device=device)
        here = (6 - 2 * phase + (1 - phase) * first + (1 + 3 * phase) * last) / 8
        halving = ((6 + 5 * first[:, 0]) / 16, (4 + last[:, 0]) / 16)
        made[size] = halving, ((1 - phase) / 8, here, (1 + 3 * phase) / 8)
    return made


def _halved(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Low-pass [1 4 6 4 1] / 16 and decimate by 2 an even size, borders repeated."""
    for dim in (2, 3):
        size = x.shape[dim] // 2
        middle, after = (f.reshape(-1, *(1,) * (3 - dim)) for f in factors)
        padded = F.pad(x, [0, 0, 2, 2] if dim == 2 else [2, 2, 0, 0])
        a, b, c, d, e = (padded[(slice(None),) * dim + (slice(i, i + 2 * size - 1, 2),)] for i in range(5))
        x = (a + e) / 16 + b / 4 + middle * c + after * d
    return x


def _doubled(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Zero insertion and [1 4 6 4 1] / 8 along both axes, borders repeated."""
    for dim in (2, 3):
        x = _phases(x, dim, factors)
    return x


def reconstruction(image: Tensor, photo: Tensor, factors: Borders) -> Tensor:
    """Laplacian pyramid loss plus mean square error, as clone_fast.losses.Reconstruction, of square [N, C, R, R]."""
    current = image - photo
    loss = current.square().mean()
    for _ in range(pyramid_levels(photo.shape[-1]) - 1):
        halving, doubling = factors[current.shape[-1] // 2]
        coarser = _halved(current, halving)
        loss = loss + (current - _doubled(coarser, doubling)).abs().mean()
        current = coarser
    return loss + current.abs().mean()


def arranged(module: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out in memory as cuDNN reads them, in place; their values stay."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in module.modules():
        if isinstance(layer, SynthesisLayer) and layer.up == 2:
            swapped = layer.weight.data.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            layer.weight.data = swapped.transpose(0, 1)
    return module


class StrongNetworks:
    """The networks as `benchmarks.steps` wants them. The generator's synthesis and the discriminator are those given.

    Args:
        generator, discriminator: unconditional; their weights are laid out anew, not changed.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator | None, plan: Plan) -> None:
        self.generator, self.discriminator, self.plan = generator, discriminator, plan
        for module in (generator, discriminator):
            if module is not None:
                arranged(module)
        self.borders = borders(generator.img_resolution, next(generator.parameters()).device)

    def mapping(self, z: Tensor) -> Tensor:
        return mapping(self.generator.mapping, z)

    def synthesis(self, ws: Tensor) -> Tensor:
        return synthesis(self.generator.synthesis, ws, self.plan)

    def logits(self, images: Tensor) -> Tensor:
        net = self.discriminator
        if net is None:
            raise ValueError("these networks have no discriminator")
        return logits(net, images, group_of(net, images.shape[0]), self.plan)

    def paired_logits(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self.discriminator is None:
            raise ValueError("these networks have no discriminator")
        return paired_logits(self.discriminator, real, fake, self.plan)

    def reconstruction(self, images: Tensor, photo: Tensor) -> Tensor:
        return reconstruction(images, photo, self.borders)
