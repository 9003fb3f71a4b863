"""StyleGAN2's residual discriminator with minibatch standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clone_fast.nn.architecture import RESAMPLE_TAPS, Architecture
from clone_fast.nn.layers import Conv2dLayer, FullyConnectedLayer, at_least_float32, fast_layout, in_one_go, run
from clone_fast.nn.mapping import MappingNetwork
from clone_fast.nn.tables import bias_table
from clone_fast.ops import conv2d_branch, conv2d_down, downsampled_branch, minibatch_stddev, setup_filter


class DiscriminatorBlock(nn.Module):
    """Residual block to half the resolution; the first one also reads the image."""

    resample_filter: Tensor

    def __init__(self, arch: Architecture, resolution: int) -> None:
        super().__init__()
        clamp = arch.conv_clamp
        channels, below = arch.channels(resolution), arch.channels(resolution // 2)
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        if resolution == arch.img_resolution:
            self.fromrgb = Conv2dLayer(arch.img_channels, channels, 1, activation="lrelu", conv_clamp=clamp)
        self.conv0 = Conv2dLayer(channels, channels, 3, activation="lrelu", conv_clamp=clamp)
        self.conv1 = Conv2dLayer(channels, below, 3, activation="lrelu", down=2, conv_clamp=clamp)
        self.skip = Conv2dLayer(channels, below, 1, bias=False)  # of the image at half the resolution

    def forward(self, x: Tensor, biases: Mapping[str, Tensor] | None = None) -> Tensor:
        """biases: of fromrgb, conv0 and conv1 as these take them, by name; None: made there."""
        biases, f = biases or {}, self.resample_filter.float()
        if hasattr(self, "fromrgb"):
            weight, rest = self.fromrgb.finished(x.dtype, bias=biases.get("fromrgb"))
            x, shrunk = conv2d_branch(x, weight, f, **rest)
        else:
            x, shrunk = downsampled_branch(x, f)
        # each branch at sqrt(1/2), so that the sum keeps the variance
        weight, first = self.conv0.finished(x.dtype, bias=biases.get("conv0"))
        down_weight, second = self.conv1.finished(x.dtype, 0.5**0.5, biases.get("conv1"))
        second = {f"down_{name}": value for name, value in second.items()}
        y = conv2d_down(x, weight, down_weight, self.conv1.resample_filter.float(), **first, **second)
        return self.skip(shrunk, gain=0.5**0.5, other=y)


class DiscriminatorEpilogue(nn.Module):
    """The last block, at 4x4: minibatch standard deviation, convolution, two fully connected layers."""

    resample_filter: Tensor

    def __init__(self, arch: Architecture, out_features: int) -> None:
        super().__init__()
        self.group_size, self.num_channels = arch.mbstd_group_size, arch.mbstd_num_channels
        channels = arch.channels(4)
        self.conv = Conv2dLayer(
            channels + self.num_channels, channels, 3, activation="lrelu", conv_clamp=arch.conv_clamp
        )
        self.fc = FullyConnectedLayer(channels * 16, channels, activation="lrelu")
        self.out = FullyConnectedLayer(channels, out_features)

    def features(self, x: Tensor, group_size: int | None, bias: Tensor | None = None) -> Tensor:
        """[N, channels, 4, 4] to [N, channels], float32 at least. bias: of conv, as it takes it."""
        if self.num_channels > 0:
            x = minibatch_stddev(x, group_size, self.num_channels)
        x = self.conv(x, bias=bias)
        x = x.to(at_least_float32(x.dtype), memory_format=torch.contiguous_format)
        features: Tensor = self.fc(x.flatten(1))
        return features


class Discriminator(nn.Module):
    """StyleGAN2 discriminator: images [N, img_channels, R, R] (and c [N, c_dim]) to logits [N, 1]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.block_resolutions = arch.block_resolutions[:0:-1]
        for resolution in self.block_resolutions:
            self.add_module(f"b{resolution}", DiscriminatorBlock(arch, resolution))
        label_dim = arch.channels(4) if arch.c_dim > 0 else 0
        if label_dim:
            self.mapping = MappingNetwork(0, arch.c_dim, label_dim, None, num_layers=8, w_avg_beta=None)
        self.b4 = DiscriminatorEpilogue(arch, label_dim or 1)

    def _biased(self) -> list[tuple[str, Any]]:
        """The convolutions that have a bias, by name, in the order of `bias_table`."""
        names = [f"b{r}.{layer}" for r in self.block_resolutions for layer in ("conv0", "conv1")]
        names = [f"b{self.arch.img_resolution}.fromrgb", *names, "b4.conv"]
        return [(name, self.get_submodule(name)) for name in names]

    def _biases(self, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        """By block and layer what the convolutions take for a bias in this dtype: made for all of them at once."""
        layers, factor = self._biased(), None
        values = [layer.bias for _, layer in layers]
        if layers[0][1].folds(dtype):
            factor = bias_table(self.arch, values[0].device).to(values[0].dtype).sqrt()
        found: dict[str, dict[str, Tensor]] = {}
        for (name, _), value in zip(layers, in_one_go(values, dtype, factor), strict=True):
            block, _, layer = name.partition(".")
            found.setdefault(block, {})[layer] = value
        return found

    def features(
        self,
        img: Tensor,
        *,
        per_image: bool = False,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The activations [N, channels(4)] before the last layer, float32 at least.

        per_image: leave every image in a group of its own, so that the features of one do not depend on the rest of
        its batch. dtype: of the convolutions' activations, see `PRECISIONS`; None for img's. recompute: save memory:
        the backward computes block after block once more. watch: is shown the activations [N, channels(4), 4, 4] before
        the minibatch standard deviation: up to there an image is on its own.

        Raises:
            ValueError: img has another shape, or N is no multiple of the minibatch group.
        """
        wanted = (self.arch.img_channels, self.arch.img_resolution, self.arch.img_resolution)
        if img.ndim != 4 or tuple(img.shape[1:]) != wanted:
            raise ValueError(f"img must be [N, {wanted[0]}, {wanted[1]}, {wanted[2]}], got {list(img.shape)}")
        x = fast_layout(img, dtype)
        biases = self._biases(x.dtype)
        for resolution in self.block_resolutions:
            name = f"b{resolution}"
            x = run(self.get_submodule(name), x, biases[name], recompute=recompute)
        if watch is not None:
            watch(x)
        return self.b4.features(x, 1 if per_image else self.b4.group_size, biases["b4"]["conv"])

    def forward(
        self,
        img: Tensor,
        c: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Logits [N, 1], float32 at least: the higher, the more real. dtype, recompute, watch: as in `features`.

        Raises:
            ValueError: img or c has another shape or is missing, or N is no multiple of the minibatch group.
        """
        logits: Tensor = self.b4.out(self.features(img, dtype=dtype, recompute=recompute, watch=watch))
        if self.arch.c_dim == 0:
            return logits
        label = self.mapping(None, c)
        return (logits * label).sum(dim=1, keepdim=True) / label.shape[1] ** 0.5
