"""One description of a StyleGAN2 network, shared by its generator and its discriminator."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

RESAMPLE_TAPS = (1, 3, 3, 1)  # the low-pass of every resampling in StyleGAN2


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What fixes the shapes and the arithmetic of a StyleGAN2 generator (skip) and discriminator (resnet).

    The defaults are config F at 1024x1024 (Karras et al. 2020).

    Attributes:
        img_resolution: width and height in pixels, a power of two from 8 to 1024.
        img_channels: 3 for RGB.
        z_dim, w_dim: sizes of the input and of the intermediate latent.
        c_dim: size of the class label, 0 if unconditional.
        channel_base, channel_max: a layer at resolution r has min(channel_base // r, channel_max) channels.
        mapping_layers: depth of the mapping network.
        conv_clamp: limit of the activations (times each layer's extra gain), None for none.
        mbstd_group_size: samples that share a minibatch standard deviation, None for the whole batch.
        mbstd_num_channels: channels of that feature.

    Raises:
        ValueError: a value is outside of what the networks can be built with.
    """

    img_resolution: int = 1024
    img_channels: int = 3
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0
    channel_base: int = 32768
    channel_max: int = 512
    mapping_layers: int = 8
    conv_clamp: float | None = 256.0
    mbstd_group_size: int | None = 4
    mbstd_num_channels: int = 1

    def __post_init__(self) -> None:
        resolution = self.img_resolution
        if resolution not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f"img_resolution must be a power of two from 8 to 1024, got {resolution!r}")
        for name, least in (
            ("img_channels", 1),
            ("z_dim", 0 if self.c_dim else 1),
            ("w_dim", 1),
            ("c_dim", 0),
            ("channel_base", resolution),
            ("channel_max", 1),
            ("mapping_layers", 1),
            ("mbstd_num_channels", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        group = self.mbstd_group_size
        if group is not None and not (isinstance(group, int) and group >= 1):
            raise ValueError(f"mbstd_group_size must be None or an integer >= 1, got {group!r}")
        if self.mbstd_num_channels > 0 and self.channels(4) % self.mbstd_num_channels:
            raise ValueError(
                f"mbstd_num_channels must divide the {self.channels(4)} channels at 4x4, got {self.mbstd_num_channels}"
            )
        if self.conv_clamp is not None and not self.conv_clamp > 0:
            raise ValueError(f"conv_clamp must be None or > 0, got {self.conv_clamp!r}")

    @property
    def block_resolutions(self) -> list[int]:
        """[4, 8, ..., img_resolution]."""
        return [2**i for i in range(2, self.img_resolution.bit_length())]

    @property
    def num_ws(self) -> int:
        """Number of latents w that one image takes: 2 log2(img_resolution) - 2."""
        return 2 * (self.img_resolution.bit_length() - 1) - 2

    def channels(self, resolution: int) -> int:
        """Channels of the layers at this resolution."""
        return min(self.channel_base // resolution, self.channel_max)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of `to_dict`; raises ValueError on a name that is no field."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of an Architecture: {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON, as it stands in the header of our files."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))
