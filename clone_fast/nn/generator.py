"""StyleGAN2's generator: mapping network, and synthesis network with skip connections to RGB.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"; numeric conventions as in the published
networks, so that their weights draw the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clone_fast.nn.architecture import RESAMPLE_TAPS, Architecture
from clone_fast.nn.layers import (
    FullyConnectedLayer,
    at_least_float32,
    fast_layout,
    in_one_go,
    limit_in,
    run,
)
from clone_fast.nn.mapping import MappingNetwork
from clone_fast.ops import modulated_conv2d, modulated_conv2d_torgb, setup_filter, styles, upsample2d_add
from clone_fast.ops.bias_act import ACTIVATIONS
from clone_fast.ops.modulated_conv2d_torgb import IMAGE_LANE
from clone_fast.ops.streams import aside, at_home, beside, joined, made_beside, ready, side_by_side

NOISE_MODES = ("const", "random", "none")
GROUPS = (8, 32)  # resolutions of the last blocks of groups whose styles are made at once, where not all are
EARLY = 32  # largest resolution of noise maps that the first convolution waits for


class Prepared(NamedTuple):
    """What a layer of the synthesis network takes besides its image and weights, made for all layers at once.

    Attributes:
        styles: [N, in_channels], the factors of the input channels.
        bias: [out_channels].
        noise: map [r, r] or [N, 1, r, r]; None for none.
        noise_strength: scalar; None where the layer takes no noise.
    """

    styles: Tensor
    bias: Tensor
    noise: Tensor | None = None
    noise_strength: Tensor | None = None


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution with noise and leaky ReLU, optionally to twice the resolution."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        *,
        up: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.act_gain = ACTIVATIONS["lrelu"].gain
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, given: Prepared) -> Tensor:
        f = self.resample_filter.float()
        return modulated_conv2d(x, self.weight, given.styles, up=self.up, resample_filter=f, **self._rest(x, given))

    def drawn(self, x: Tensor, given: Prepared, torgb: ToRGBLayer, to_rgb: Prepared) -> tuple[Tensor, Tensor]:
        """What `forward` returns, of a layer that keeps the resolution, and the image that torgb makes of it.

        to_rgb.styles: what the affine layer says over the square root of in_channels, in place of a demodulation.
        """
        return modulated_conv2d_torgb(
            x,
            self.weight,
            given.styles,
            torgb.weight,
            to_rgb.styles,
            **self._rest(x, given),
            rgb_bias=to_rgb.bias,
            rgb_clamp=limit_in(x.dtype, torgb.conv_clamp),
        )

    def _rest(self, x: Tensor, given: Prepared) -> dict[str, Any]:
        """What follows the convolution."""
        return {
            "noise": given.noise,
            "noise_strength": given.noise_strength,
            "bias": given.bias,
            "act": "lrelu",
            "gain": self.act_gain,
            "clamp": limit_in(x.dtype, self.conv_clamp),
        }


class ToRGBLayer(nn.Module):
    """Modulated 1x1 convolution to the image, without demodulation; see `SynthesisLayer.drawn`."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))


class SynthesisBlock(nn.Module):
    """The layers of one resolution, and the image so far at that resolution."""

    resample_filter: Tensor

    def __init__(self, arch: Architecture, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.first = resolution == 4
        channels = arch.channels(resolution)
        self.num_conv = 1 if self.first else 2
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        if self.first:
            self.const = nn.Parameter(torch.randn(channels, resolution, resolution))
        else:
            below = arch.channels(resolution // 2)
            self.conv0 = SynthesisLayer(below, channels, arch.w_dim, resolution, up=2, conv_clamp=arch.conv_clamp)
        self.conv1 = SynthesisLayer(channels, channels, arch.w_dim, resolution, conv_clamp=arch.conv_clamp)
        self.torgb = ToRGBLayer(channels, arch.img_channels, arch.w_dim, conv_clamp=arch.conv_clamp)

    def layers(self) -> Iterator[tuple[str, SynthesisLayer | ToRGBLayer]]:
        """In the order they run, by name."""
        if not self.first:
            yield "conv0", self.conv0
        yield from (("conv1", self.conv1), ("torgb", self.torgb))

    def forward(self, x: Tensor, given: Mapping[str, Prepared]) -> tuple[Tensor, Tensor]:
        """The features of this resolution, and the image that is drawn of them.

        x: of the first block its constant [N, C, 4, 4]. given: what every layer takes, by name.
        """
        if not self.first:
            x = self.conv0(x, given["conv0"])
        return self.conv1.drawn(x, given["conv1"], self.torgb, given["torgb"])

    def image(self, rgb: Tensor, img: Tensor | None) -> Tensor:
        """The image so far, float32 at least: of what `forward` drew and of the image up to the block before.

        It is contiguous from the first, which is small, on: the last would be a pass more.
        """
        if img is None:
            return rgb.to(at_least_float32(rgb.dtype), memory_format=torch.contiguous_format)
        return upsample2d_add(img, self.resample_filter.float(), rgb)  # in img's float32 and layout


class SynthesisNetwork(nn.Module):
    """w to image: [N, num_ws, w_dim] -> [N, img_channels, R, R]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.block_resolutions = arch.block_resolutions
        self.num_ws = arch.num_ws
        for resolution in self.block_resolutions:
            self.add_module(f"b{resolution}", SynthesisBlock(arch, resolution))

    def _layers(self, blocks: Sequence[int] | None = None) -> list[tuple[str, SynthesisLayer | ToRGBLayer]]:
        """b4.conv1, b4.torgb, b8.conv0, b8.conv1, b8.torgb, ...; of the blocks of these resolutions, or of all."""
        found = [(f"b{r}", self.get_submodule(f"b{r}")) for r in blocks or self.block_resolutions]
        return [(f"{name}.{key}", layer) for name, block in found for key, layer in block.layers()]  # type: ignore[operator]

    def styles(self, ws: Tensor, blocks: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The styles [N, in_channels] of every layer, by its name, float32 at least.

        Args:
            ws: [N, num_ws, w_dim], or [N, 1, w_dim] where all layers take the same.
            blocks: resolutions of the blocks whose layers are wanted; None for all.
        """
        # torgb and the next conv0 read the same
        order = [read for i in range(len(self.block_resolutions)) for read in range(max(2 * i - 1, 0), 2 * i + 2)]
        reads = dict(zip(dict(self._layers()), order, strict=True))
        layers = self._layers(blocks)
        affines = [layer.affine for _, layer in layers]
        ws = ws.to(at_least_float32(ws.dtype))
        found = styles(
            ws,
            [affine.weight.to(ws.dtype) for affine in affines],
            [affine.bias.to(ws.dtype) for affine in affines],
            reads=[reads[name] if ws.shape[1] > 1 else 0 for name, _ in layers],
            weight_gain=affines[0].weight_gain,
            # what is not demodulated is divided by the root of its fan-in instead
            factors=[layer.weight.shape[1] ** -0.5 if isinstance(layer, ToRGBLayer) else 1.0 for _, layer in layers],
        )
        return {name: style for (name, _), style in zip(layers, found, strict=True)}

    def _groups(self, ws: Tensor) -> list[list[int]]:
        """Resolutions of the blocks whose styles are made at once: all, unless affine layers are tuned in a capture."""
        limits: Sequence[int] = ()
        if side_by_side(ws.device) and torch.is_grad_enabled():
            limits = GROUPS if any(layer.affine.weight.requires_grad for _, layer in self._layers()) else ()
        groups: dict[int, list[int]] = {}
        for resolution in self.block_resolutions:
            groups.setdefault(sum(resolution > limit for limit in limits), []).append(resolution)
        return list(groups.values())

    def _noise(self, n: int, noise_mode: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The maps that n images take, by the name of the layer; those that are given go before the mode's."""
        maps = {}
        for name, const in self.noise_consts().items():
            if name in given:
                maps[name] = given[name]
            elif noise_mode == "const":
                maps[name] = const
            elif noise_mode == "random":
                maps[name] = torch.randn(n, 1, *const.shape, device=const.device)
        return maps

    def _late(self, noise: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Of these maps those for which the first layers need not wait: in a capture large ones that are converted to
        this dtype. Not those of several images, whose memory is wanted again; and none that gets a gradient, which is
        summed with those of biases, on one lane."""
        late = {}
        for name, value in noise.items() if side_by_side(device) else ():
            large = EARLY**2 < value.numel() == value.shape[-1] ** 2
            if large and value.dtype != dtype and not value.requires_grad:
                late[name] = value.view_as(value)  # our own, to remember when it was ready
        return late

    def _prepared(
        self, ws: Tensor, noise: Mapping[str, Tensor], dtype: torch.dtype | None, recompute: bool
    ) -> tuple[Tensor, Callable[[int], dict[str, Prepared]]]:
        """The first block's image, and what gives each block what its layers take; to be asked in the order they run.

        The styles of a later group are asked for with its first block, and made long before, beside the layers. So the
        way back comes to them just after that block: the gradients of its affine layers, and Adam, do not wait for the
        blocks of lower resolution.
        """
        const: Tensor = self.get_parameter("b4.const")
        layers = dict(self._layers())
        noisy = {name: layer for name, layer in layers.items() if isinstance(layer, SynthesisLayer)}
        values = [layer.bias for layer in layers.values()] + [layer.noise_strength for layer in noisy.values()]
        own = dtype or const.dtype
        ws, late = ws.view_as(ws), self._late(noise, own, ws.device)
        early = {name: value for name, value in noise.items() if name not in late}
        ready([ws])

        def tables() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            return at_home(in_one_go(values, own)), at_home(in_one_go(list(early.values()), own))

        def made(blocks: Sequence[int]) -> tuple[Tensor, ...]:
            found = tuple(self.styles(ws, blocks).values())
            if not recompute:  # weights modulated ahead of their layer are kept for longer
                ready(found)
            return found

        first, *later = self._groups(ws)
        # no gradient of these is waited for before an optimiser has its turn
        (small, given), found = beside(ws.device, "tables", tables, partial(made, first))
        styles = dict(zip(dict(self._layers(first)), found, strict=True))
        x = made_beside(
            ws.device, "const", lambda: fast_layout(const.expand(ws.shape[0], -1, -1, -1), dtype), [const, ws]
        )
        biases = dict(zip(layers, small, strict=False))
        strengths = dict(zip(noisy, small[len(layers) :], strict=True))
        maps = dict(zip(early, given, strict=True))

        def of_block(resolution: int) -> dict[str, Prepared]:
            if resolution == EARLY // 2:  # not before: they fill the machine, and no layer here waits for them
                ready(late.values())
            for group in later:
                if resolution == group[0]:
                    mine = dict(self._layers(group))
                    reads = [value for layer in mine.values() for value in (layer.affine.weight, layer.affine.bias)]
                    found = made_beside(ws.device, "styles", partial(made, group), [*reads, ws])
                    styles.update(zip(mine, found, strict=True))
            if next(iter(late), "").startswith(f"b{resolution}."):  # the first of them
                large = list(late.values())
                found = made_beside(ws.device, "noise", lambda: tuple(one.to(own) for one in large), large)
                maps.update(zip(late, found, strict=True))
            return {
                name.partition(".")[2]: Prepared(styles[name], biases[name], maps.get(name), strengths.get(name))
                for name, _ in self._layers([resolution])
            }

        return x, of_block

    def noise_names(self) -> list[str]:
        """Names of the layers that take noise, in the order they run: b4.conv1, b8.conv0, b8.conv1, ..."""
        return ["b4.conv1"] + [f"b{r}.conv{i}" for r in self.block_resolutions[1:] for i in (0, 1)]

    def noise_consts(self) -> dict[str, Tensor]:
        """The constant noise map [r, r] of each of these layers, by its name."""
        return {name: self.get_buffer(f"{name}.noise_const") for name in self.noise_names()}

    def forward(
        self,
        ws: Tensor,
        noise_mode: str = "const",
        noise: Mapping[str, Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Draw images.

        Args:
            ws: [N, num_ws, w_dim] float32, or [N, 1, w_dim] where all layers take the same.
            noise_mode: "const" takes each layer's noise_const, "random" draws anew for every image, "none" is 0.
            noise: maps [r, r] or [N, 1, r, r] by layer name (see `noise_names`), in place of the mode's.
            dtype: of the convolutions' activations, see `PRECISIONS`; None for that of the parameters. The sum of the
                RGB images is float32 at least.
            recompute: save memory: the backward computes block after block once more.

        Returns:
            [N, img_channels, R, R] float32, about in [-1, 1].

        Raises:
            ValueError: ws has another shape, or noise_mode or a name in noise is unknown.
        """
        if ws.ndim != 3 or ws.shape[1] not in (1, self.num_ws) or ws.shape[2] != self.arch.w_dim:
            raise ValueError(f"ws must be [N, {self.num_ws} or 1, {self.arch.w_dim}], got {list(ws.shape)}")
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        noise = noise or {}
        unknown = set(noise) - set(self.noise_names())
        if unknown:
            raise ValueError(f"noise for layers that are not there: {', '.join(sorted(unknown))}")
        img: Any = None
        x, prepared = self._prepared(ws, self._noise(ws.shape[0], noise_mode, noise), dtype, recompute)
        for resolution in self.block_resolutions:
            block: Any = self.get_submodule(f"b{resolution}")
            given = prepared(resolution)
            x, rgb = run(block, x, given, recompute=recompute, lane=IMAGE_LANE)
            # beside the next blocks, which do not need it
            reads = [rgb] if img is None else [rgb, img]
            img = aside(x.device, IMAGE_LANE, partial(block.image, rgb, img), reads)
        joined(x.device, IMAGE_LANE)
        image: Tensor = img
        return image


class Generator(nn.Module):
    """StyleGAN2 generator: z [N, z_dim] (and c [N, c_dim]) to images [N, img_channels, R, R] in about [-1, 1]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.synthesis = SynthesisNetwork(arch)
        self.mapping = MappingNetwork(arch.z_dim, arch.c_dim, arch.w_dim, arch.num_ws, num_layers=arch.mapping_layers)
        self.z_dim, self.c_dim, self.w_dim = arch.z_dim, arch.c_dim, arch.w_dim
        self.img_resolution, self.img_channels, self.num_ws = arch.img_resolution, arch.img_channels, arch.num_ws

    def sample(self, n: int, source: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Random inputs: z [n, z_dim] from N(0, I), and uniformly random classes [n, c_dim], None if unconditional.

        Drawn with a CPU generator, so that a seed gives the same on every device, then moved to the network's.
        """
        device = self.mapping.w_avg.device
        z = torch.randn(n, self.z_dim, generator=source).to(device)
        if not self.c_dim:
            return z, None
        classes = torch.randint(self.c_dim, [n], generator=source)
        return z, F.one_hot(classes, self.c_dim).float().to(device)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "random",
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Arguments and errors as of `mapping` and `synthesis`."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        if truncation_psi == 1 or truncation_cutoff is None:
            ws = ws[:, :1]  # all are the same
        image: Tensor = self.synthesis(ws, noise_mode=noise_mode, dtype=dtype)
        return image
