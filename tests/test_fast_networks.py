"""The networks on the fast backends are those of the reference: results and gradients of every weight."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from clone_fast import ops
from clone_fast.losses import r1_penalty
from clone_fast.nn import Architecture, Discriminator, Generator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("which", ["generator", "discriminator", "R1 of a discriminator"])
def test_a_network_is_that_of_the_reference(which: str) -> None:
    """The demo's size, in float32: result and all gradients, for R1 the second ones; automatic choice, no fallback."""
    torch.manual_seed(0)
    arch = Architecture(img_resolution=64, z_dim=32, w_dim=32, channel_base=2048, channel_max=64)
    network = (Generator if which == "generator" else Discriminator)(arch).cuda().requires_grad_()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter.normal_(std=0.3)
    x = torch.randn(3, 32, device="cuda") if which == "generator" else torch.randn(3, 3, 64, 64, device="cuda")
    found = []
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), ("auto", torch.float32)):
        copy = deepcopy(network).to(dtype)
        with ops.backend(name):
            y = r1_penalty(copy, x.to(dtype)) if which.startswith("R1") else copy(x.to(dtype), None)
            y.square().mean().backward()
        # R1 does not depend on a bias, which some say by zeros and some by no gradient.
        grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in copy.named_parameters()}
        # Each noise strength is one sum that may cancel out: together they are a vector like the others.
        strengths = torch.stack([grads.pop(key) for key in list(grads) if key.endswith("noise_strength")] or [y.sum()])
        found.append({"y": y.detach(), "noise_strengths": strengths.detach(), **grads})
    exact, plain, fast = found
    assert fast.keys() == exact.keys()
    for key, want in exact.items():
        error, allowed = ((grads[key].double() - want).norm().item() for grads in (fast, plain))
        assert error <= 3 * allowed + 1e-5 * want.norm().item(), key
