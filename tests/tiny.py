"""Networks and photos that are as small as they can be, for the tests of what trains or tunes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clone_fast.inversion import Inversion
from clone_fast.invert import invert
from clone_fast.latent import Latent, LatentSettings
from clone_fast.nn import Architecture, Discriminator, Generator, Network
from clone_fast.tweak import TweakSettings


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For a test file that imports it: ops this small take longer on two threads, and very long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arch(resolution: int = 16, c_dim: int = 0) -> Architecture:
    return Architecture(
        img_resolution=resolution, z_dim=16, w_dim=16, c_dim=c_dim, channel_base=256, channel_max=16, mapping_layers=2
    )


def network(seed: int = 0, *, resolution: int = 16, c_dim: int = 0) -> Network:
    """A network with random weights, and with what an untrained one has at zero: biases, noise strengths, w_avg."""
    shape = arch(resolution, c_dim)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Network(Generator(shape).eval(), Discriminator(shape).eval(), {"name": f"tiny{seed}"})
        with torch.no_grad():
            for name, value in [*net.generator.named_parameters(), *net.generator.named_buffers()]:
                if name.endswith("noise_strength"):
                    value.fill_(0.3)
                elif name.endswith(("bias", "w_avg")):
                    value.add_(torch.randn_like(value) * 0.1)
            net.generator.synthesis.get_parameter(f"b{resolution}.torgb.weight").mul_(0.5)
    for module in (net.generator, net.discriminator):
        assert module is not None
        module.requires_grad_(False)
    return net


def judge(net: Network) -> Discriminator:
    assert net.discriminator is not None
    return net.discriminator


def photo(resolution: int = 16, seed: int = 0) -> Tensor:
    """[1, 3, R, R] in [-1, 1]: random, and smooth on the scale of a quarter of it."""
    rough = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return nn.functional.interpolate(rough, size=resolution, mode="bilinear")


def psnr(image: Tensor, wanted: Tensor) -> float:
    """In dB, of images in [-1, 1]."""
    return -10 * math.log10(float((image.clamp(-1, 1) - wanted).double().square().mean()) / 4)


def latent(net: Network, seed: int = 0, *, noise: bool = False) -> Latent:
    """Of a random z; with noise maps of its own if wanted."""
    source = torch.Generator().manual_seed(seed)
    g = net.generator
    label = torch.eye(g.c_dim)[:1] if g.c_dim else None
    with torch.no_grad():
        ws = g.mapping(torch.randn(1, g.z_dim, generator=source), label)
    maps = {}
    if noise:
        for name in g.synthesis.noise_names():
            maps[name] = torch.randn(g.synthesis.get_buffer(f"{name}.noise_const").shape, generator=source)
    return Latent(ws.clone(), maps)


def settings(**changes: Any) -> TweakSettings:
    """Settings of a tweak with nothing left to a default that an ablation may move."""
    values: dict[str, Any] = {
        "mode": "clone",
        "steps": 3,
        "local_probability": 1.0,
        "reconstruction_weight": 10.0,
        "adversarial_weight": 0.5,
        "cohesion_weight": 1.5,
        "paired_weight": 2.0,
        "edit_weight": 3.0,
        "edit_reach": 0.5,
        "batch": 4,
        "generator_lr": 0.003,
        "discriminator_lr": 0.002,
        "noise_lr": 0.1,
        "r1_gamma": 0.2,
        "r1_interval": 2,
        "saturating": False,
        "one_pass": False,
        "tune_mapping": False,
        "precision": "tf32",
        "check_every": 1,
    }
    return TweakSettings(**values | changes)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_state(module: nn.Module, want: dict[str, Tensor]) -> None:
    """Parameters and buffers equal `want` bit for bit."""
    got = module.state_dict()
    assert list(got) == list(want)
    changed = [name for name, value in want.items() if not torch.equal(got[name], value)]
    assert not changed, f"changed: {changed}"


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters and buffers that are not what they were."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def inverted(net: Any = None, wanted: Any = None, **changes: Any) -> Inversion:
    """`invert` in a few steps on the CPU, with settings of which none is a default that may move."""
    options: dict[str, Any] = {
        "device": "cpu",
        "latent_settings": LatentSettings(steps=3, start_samples=8, check_every=1),
        "tweak_settings": settings(),
    }
    return invert(photo() if wanted is None else wanted, net or network(), **options | changes)
