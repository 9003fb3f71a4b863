"""StyleGAN2's generator and discriminator on the fused ops, with parameters named as in NVIDIA's files."""

from __future__ import annotations

from clone_fast.nn.architecture import Architecture
from clone_fast.nn.discriminator import Discriminator
from clone_fast.nn.generator import Generator, SynthesisNetwork
from clone_fast.nn.mapping import MappingNetwork
from clone_fast.nn.network import Draw, Network, drawn, frozen
from clone_fast.nn.precision import PRECISIONS, Precision, settled

__all__ = [
    "PRECISIONS",
    "Architecture",
    "Discriminator",
    "Draw",
    "Generator",
    "MappingNetwork",
    "Network",
    "Precision",
    "SynthesisNetwork",
    "drawn",
    "frozen",
    "settled",
]
