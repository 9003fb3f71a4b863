"""The least work of a step: its operations and bytes, counted layer by layer, and the time that a GPU needs for them.

A layer is one convolution with all that is fused around it. Three products may belong to it: forward reads the input
and writes the output; the gradient to the input reads the output's and writes the input's; the gradient to the weights
reads the input and the output's gradient. Every activation is thus written once and read once per use; what a
backward needs besides (the sign of an activation) is not counted, nor are masks, statistics, images between layers and
the loss. Operations are those of the products alone, twice their multiplications. The floor of a product is the
larger of the times for its operations and its bytes, that of a step their sum, since a layer waits for the one before.

A weight that is updated moves 32 + 3 e bytes: Adam reads weight, gradient and two moments and writes three of these,
the gradient is written, and a copy of e bytes is written once and read by forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clone_fast.nn import Architecture


@dataclass(frozen=True)
class Layer:
    """One convolution of one image: elements in and out, weights, operations of a product."""

    inputs: int
    outputs: int
    weights: int
    operations: int


def _layer(i: int, o: int, size: int, result: int, k: int) -> Layer:
    """Of i channels at size^2 to o at result^2. Its taps meet the smaller of the two images, as up and down by 2 do."""
    weights = i * o * k * k
    return Layer(i * size**2, o * result**2, weights, 2 * weights * min(size, result) ** 2)


def generator_layers(arch: Architecture) -> list[Layer]:
    """Of the synthesis network, with the affine layers of the styles."""
    found = []
    for r in arch.block_resolutions:
        c, coarser = arch.channels(r), arch.channels(r // 2)
        styled = [(c, c, r)] if r == 4 else [(coarser, c, r // 2), (c, c, r)]
        found += [_layer(i, o, size, r, 3) for i, o, size in styled]
        found.append(_layer(c, arch.img_channels, r, r, 1))
        found += [_layer(arch.w_dim, i, 1, 1, 1) for i in [*(i for i, _, _ in styled), c]]
    return found


def discriminator_layers(arch: Architecture) -> list[Layer]:
    """Of the residual discriminator; the skip convolution runs at half the resolution, filtered on the way."""
    top, last = arch.img_resolution, arch.channels(4)
    found = [_layer(arch.img_channels, arch.channels(top), top, top, 1)]
    for r in arch.block_resolutions[:0:-1]:
        c, below = arch.channels(r), arch.channels(r // 2)
        found += [_layer(c, c, r, r, 3), _layer(c, below, r, r // 2, 3)]
        skip = _layer(c, below, r // 2, r // 2, 1)
        found.append(Layer(c * r * r, skip.outputs, skip.weights, skip.operations))
    found.append(_layer(last + arch.mbstd_num_channels, last, 4, 4, 3))
    return [*found, _layer(16 * last, last, 1, 1, 1), _layer(last, 1, 1, 1, 1)]


@dataclass(frozen=True)
class Floor:
    """What a step must do at least.

    Attributes:
        products: (operations, bytes) of each.
    """

    products: Sequence[tuple[int, int]]

    @property
    def operations(self) -> int:
        return sum(operations for operations, _ in self.products)

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.products)

    def seconds(self, bandwidth: float, rate: float) -> float:
        """At so many bytes and operations per second."""
        return sum(max(operations / rate, moved / bandwidth) for operations, moved in self.products)


def _products(layers: Sequence[Layer], images: int, element: int, wanted: int) -> list[tuple[int, int]]:
    """So many of the three of every layer."""
    each = [(images * layer.operations, images * (layer.inputs + layer.outputs) * element) for layer in layers]
    return each * wanted  # the three products of a layer move the same two images


def _updated(layers: Sequence[Layer], element: int) -> list[tuple[int, int]]:
    return [(0, sum(layer.weights for layer in layers) * (32 + 3 * element))]


def floor(step: str, arch: Architecture, batch: int, element: int) -> Floor:
    """Of a step of benchmarks/steps.py.

    Args:
        step: "tweak"; "latent", which needs no gradient to the weights; or "clone", whose batch of images G draws once
            and learns from once, while D judges them twice, with the real ones beside them the first time.
        batch: images that G draws.
        element: bytes of an activation.
    """
    g, d = generator_layers(arch), discriminator_layers(arch)
    if step == "latent":
        return Floor(_products(g, batch, element, 2))
    found = _products(g, batch, element, 3) + _updated(g, element)
    if step == "clone":
        found += _products(d, 2 * batch, element, 3) + _updated(d, element)
        found += _products(d, batch, element, 2)
    return Floor(found)
