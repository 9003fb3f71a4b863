"""Named directions of the demo network: turn the head, smile, grey hair, ...

The program that draws the portraits knows each one's attributes. A small network learns to read them off an image; it
then labels what the generator draws, and a linear fit from w to the labels gives for every attribute the shortest move
of w that changes this attribute and, to first order, none of the others (Shen et al. 2020, "InterFaceGAN", for the
linear fit; the conditioning is solved for all attributes at once).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clone_fast.demo import portraits
from clone_fast.nn import Generator

EDITABLE = (
    "yaw",
    "pitch",
    "smile",
    "mouth_open",
    "eye_openness",
    "skin_tone",
    "age",
    "hair_length",
    "hair_volume",
    "hair_lightness",
    "hair_redness",
    "glasses",
    "beard",
    "light_azimuth",
    "light_warmth",
    "background_lightness",
    "clothing_lightness",
)


class AttributeReader(nn.Module):
    """Reads the attributes of EDITABLE off portraits: [N, 3, R, R] -> [N, len(EDITABLE)], each at zero mean and unit
    variance over the portraits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 8 * width, 8 * width]
        layers: list[nn.Module] = []
        for i, o in pairwise(channels):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * 4, len(EDITABLE))

    def forward(self, images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, 64)
        read: Tensor = self.head(self.features(small).flatten(1))
        return read


def _batches(batch: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator(device=device).manual_seed(seed)
    while True:
        attributes = portraits.sample(batch * 8, generator=source, device=device)
        with torch.no_grad():
            images = portraits.render(attributes, resolution=128)
        labels = torch.stack([attributes[name] for name in EDITABLE], dim=1)
        yield from zip(images.split(batch), labels.split(batch), strict=True)


def train_reader(
    *, seconds: float, seed: int, device: torch.device, batch: int = 128
) -> tuple[AttributeReader, dict[str, float]]:
    """Train a reader on fresh portraits for some time; with the share of each attribute's variance that it explains."""
    torch.manual_seed(seed)
    reader = AttributeReader().to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    stream = _batches(batch, seed + 1, device)
    labels = torch.cat([next(stream)[1] for _ in range(16)])
    mean, std = labels.mean(dim=0), labels.std(dim=0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        images, wanted = next(stream)
        loss = F.mse_loss(reader(images), (wanted - mean) / std)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    reader.eval()
    with torch.no_grad():
        held = [next(stream) for _ in range(8)]
        errors = torch.cat([(reader(x) - (y - mean) / std).square() for x, y in held]).mean(dim=0)
    return reader, dict(zip(EDITABLE, (1 - errors).tolist(), strict=True))


@torch.no_grad()
def fit_directions(
    generator: Generator, reader: AttributeReader, *, samples: int = 16384, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Directions [w_dim] by attribute, one standard deviation of w long, towards more of it; and the share of each
    attribute's variance that the linear fit explains.

    With w of covariance S and the attributes fitted as B w, the move that changes attribute a alone and is shortest in
    standard deviations of w is S B^T (B S B^T)^-1 e_a.

    Raises:
        ValueError: w has fewer dimensions than there are attributes, so that no move changes one alone.
    """
    if generator.w_dim < len(EDITABLE):
        raise ValueError(f"w_dim must be >= {len(EDITABLE)}, the number of attributes, got {generator.w_dim}")
    device = generator.mapping.w_avg.device
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    w = generator.mapping(z)[:, 0]
    read = torch.cat(
        [reader(generator.synthesis(part[:, None].expand(-1, generator.num_ws, -1))) for part in w.split(128)]
    )
    centred, attributes = (w - w.mean(dim=0)).double(), (read - read.mean(dim=0)).double()
    covariance = centred.t() @ centred / samples
    ridge = covariance.diagonal().mean() * 1e-3
    fit = torch.linalg.solve(
        covariance + ridge * torch.eye(len(covariance), device=device, dtype=torch.float64),
        centred.t() @ attributes / samples,
    ).t()
    explained = 1 - (attributes - centred @ fit.t()).square().mean(dim=0) / attributes.square().mean(dim=0)
    inverse = torch.linalg.inv(fit @ covariance @ fit.t())
    moves = covariance @ fit.t() @ inverse / inverse.diagonal().sqrt()
    directions = {name: moves[:, i].float().cpu() for i, name in enumerate(EDITABLE)}
    return directions, dict(zip(EDITABLE, explained.tolist(), strict=True))
