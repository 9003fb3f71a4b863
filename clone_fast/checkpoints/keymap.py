"""The names and shapes of one network in both families, NVIDIA's (ours too) and rosinality's: one table.

The numbers are the same; nothing is flipped or scaled. A tensor of rosinality has the same elements with axes
of length one before or after. The low-pass filters are not mapped but made anew: NVIDIA keeps one of sum 1
per layer, rosinality one of sum 4 where it enlarges and of sum 1 where it reduces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clone_fast.nn.architecture import RESAMPLE_TAPS


@dataclass(frozen=True)
class Pair:
    """One tensor's name in both families. rosinality's shape is (1,) * before + shape + (1,) * after."""

    nvidia: str
    rosinality: str
    before: int = 0
    after: int = 0

    def to_rosinality(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * self.before + shape + (1,) * self.after

    def to_nvidia(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """None if `shape` is not rosinality's shape of anything."""
        end = len(shape) - self.after
        inner = shape[self.before : end]
        return inner if end >= self.before and self.to_rosinality(inner) == shape else None


def _styled_layer(nvidia: str, rosinality: str, noise: int) -> list[Pair]:
    return [
        Pair(f"{nvidia}.weight", f"{rosinality}.conv.weight", before=1),
        Pair(f"{nvidia}.affine.weight", f"{rosinality}.conv.modulation.weight"),
        Pair(f"{nvidia}.affine.bias", f"{rosinality}.conv.modulation.bias"),
        Pair(f"{nvidia}.noise_strength", f"{rosinality}.noise.weight", after=1),
        Pair(f"{nvidia}.bias", f"{rosinality}.activate.bias"),
        Pair(f"{nvidia}.noise_const", f"noises.noise_{noise}", before=2),
    ]


def _to_rgb(nvidia: str, rosinality: str) -> list[Pair]:
    return [
        Pair(f"{nvidia}.weight", f"{rosinality}.conv.weight", before=1),
        Pair(f"{nvidia}.affine.weight", f"{rosinality}.conv.modulation.weight"),
        Pair(f"{nvidia}.affine.bias", f"{rosinality}.conv.modulation.bias"),
        Pair(f"{nvidia}.bias", f"{rosinality}.bias", before=1, after=2),
    ]


def _blocks(resolution: int) -> Iterator[tuple[int, int]]:
    """(index, resolution) of 8, 16, ..., resolution."""
    return enumerate(2**i for i in range(3, resolution.bit_length()))


def generator_pairs(resolution: int, mapping_layers: int) -> list[Pair]:
    """Every tensor of the generator but `mapping.w_avg`, which rosinality keeps beside the state dict."""
    pairs = [
        Pair(f"mapping.fc{i}.{name}", f"style.{i + 1}.{name}")  # style.0 is the normalisation
        for i in range(mapping_layers)
        for name in ("weight", "bias")
    ]
    pairs.append(Pair("synthesis.b4.const", "input.input", before=1))
    pairs += _styled_layer("synthesis.b4.conv1", "conv1", noise=0)
    pairs += _to_rgb("synthesis.b4.torgb", "to_rgb1")
    for j, r in _blocks(resolution):
        pairs += _styled_layer(f"synthesis.b{r}.conv0", f"convs.{2 * j}", noise=2 * j + 1)
        pairs += _styled_layer(f"synthesis.b{r}.conv1", f"convs.{2 * j + 1}", noise=2 * j + 2)
        pairs += _to_rgb(f"synthesis.b{r}.torgb", f"to_rgbs.{j}")
    return pairs


def discriminator_pairs(resolution: int) -> list[Pair]:
    """Every tensor of the discriminator."""
    names = [(f"b{resolution}.fromrgb", "convs.0.0", "convs.0.1")]
    skips = []
    for i, r in enumerate(reversed([r for _, r in _blocks(resolution)]), start=1):
        names.append((f"b{r}.conv0", f"convs.{i}.conv1.0", f"convs.{i}.conv1.1"))
        names.append((f"b{r}.conv1", f"convs.{i}.conv2.1", f"convs.{i}.conv2.2"))
        skips.append(Pair(f"b{r}.skip.weight", f"convs.{i}.skip.1.weight"))
    names.append(("b4.conv", "final_conv.0", "final_conv.1"))
    names += [
        (f"b4.{ours}", f"final_linear.{i}", f"final_linear.{i}") for i, ours in enumerate(("fc", "out"))
    ]
    pairs = [Pair(f"{ours}.weight", f"{weight}.weight") for ours, weight, _ in names]
    return pairs + [Pair(f"{ours}.bias", f"{bias}.bias") for ours, _, bias in names] + skips


def generator_kernels(resolution: int) -> dict[str, float]:
    """rosinality's low-pass buffers of the generator: name -> sum."""
    names = [
        name for j, _ in _blocks(resolution) for name in (f"convs.{2 * j}.conv.blur", f"to_rgbs.{j}.upsample")
    ]
    return {f"{name}.kernel": 4.0 for name in names}


def discriminator_kernels(resolution: int) -> dict[str, float]:
    """rosinality's low-pass buffers of the discriminator: name -> sum."""
    blocks = range(1, len(list(_blocks(resolution))) + 1)
    return {f"convs.{i}.{branch}.0.kernel": 1.0 for i in blocks for branch in ("conv2", "skip")}


def low_pass(total: float = 1.0) -> Tensor:
    """The filter of every resampling, [4, 4] float32: outer([1, 3, 3, 1]), scaled to this sum."""
    taps = torch.tensor(RESAMPLE_TAPS, dtype=torch.float32)
    kernel = torch.outer(taps, taps)
    return kernel * (total / kernel.sum())
