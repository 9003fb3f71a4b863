"""The strongest plain PyTorch of the benchmarks: it computes what clone_fast's networks and its tweak compute."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from clone_fast.latent import Latent
from clone_fast.losses import Reconstruction
from clone_fast.nn import Network
from clone_fast.tweak import Tweak

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "strong.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)

RESOLUTION = 32


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def strong() -> Any:
    return importlib.import_module("benchmarks.strong")


def steps() -> Any:
    return importlib.import_module("benchmarks.steps")


def pair(rgb: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """The baseline's networks and clone_fast's, of the same weights."""
    made = []
    for build in (lambda g, d: strong().StrongNetworks(g, d, strong().Plan(dtype, rgb)), steps().OwnNetworks):
        net = copy.deepcopy(tiny.network(resolution=RESOLUTION)).to(device)
        net.generator.requires_grad_(True)
        made.append(build(net.generator, tiny.judge(net).requires_grad_(True)))
    return made[0], made[1]


def inputs(net: Network | Any, n: int) -> tuple[Tensor, Tensor]:
    """Latents of n photos, different in every layer, and the photos."""
    with torch.no_grad():
        ws = net.generator.mapping(torch.randn(n, 16))
    photos = torch.cat([tiny.photo(RESOLUTION, seed) for seed in range(n)])
    return ws + 0.1 * torch.randn_like(ws), photos


def assert_same_gradients(mine: nn.Module, other: nn.Module) -> None:
    """Each within rounding of its own largest value; what is 0 but for rounding, of the largest of all."""
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    assert wanted
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, want in wanted.items():
        bound = 2e-4 * float(want.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(got[name], want, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("rgb", ["sum", "conv"])
def test_the_generator_is_the_same(rgb: str) -> None:
    mine, own = pair(rgb)
    z, (ws, _) = torch.randn(3, 16), inputs(own, 3)
    torch.testing.assert_close(mine.mapping(z), own.mapping(z), rtol=1e-5, atol=1e-5)
    drawn = []
    for networks in (mine, own):
        latent = ws.clone().requires_grad_(True)
        image = networks.synthesis(latent)
        (image * torch.linspace(-1, 1, image.numel()).reshape(image.shape)).sum().backward()
        drawn.append((image.detach(), latent.grad))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert_same_gradients(mine.generator.synthesis, own.generator.synthesis)


@pytest.mark.parametrize("rgb", ["sum", "conv"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_the_discriminator_is_the_same(rgb: str, n: int) -> None:
    mine, own = pair(rgb)
    images = [torch.randn(n, 3, RESOLUTION, RESOLUTION) for _ in range(2)]
    judged = []
    for networks in (mine, own):
        real, fake = (image.clone().requires_grad_(True) for image in images)
        on_real, on_fake = networks.paired_logits(real, fake)
        (on_real.square().sum() - 3 * on_fake.sum()).backward()
        judged.append((on_real.detach(), on_fake.detach(), networks.logits(real).detach(), real.grad, fake.grad))
    torch.testing.assert_close(judged[0], judged[1], rtol=1e-4, atol=1e-4)
    assert_same_gradients(mine.discriminator, own.discriminator)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_the_loss_is_the_same(size: int) -> None:
    photo, image = torch.rand(2, 3, size, size), torch.rand(2, 3, size, size)
    found = []
    factors = strong().borders(size, photo.device)
    for loss in (lambda x: strong().reconstruction(x, photo, factors), Reconstruction(photo)):
        x = image.clone().requires_grad_(True)
        value = loss(x)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-3 * float(found[1][1].abs().max()))


def arguments(kind: str, net: Any, n: int) -> tuple[Tensor, ...]:
    ws, photo = inputs(net, n)
    if kind != "CloneStep":
        return ws, photo
    return ws[:1], photo[:1], torch.randn(3, 16), torch.rand(3, 3, RESOLUTION, RESOLUTION) * 2 - 1


@pytest.mark.parametrize("rgb", ["sum", "conv"])
@pytest.mark.parametrize(("kind", "n"), [("TweakStep", 1), ("TweakStep", 3), ("LatentStep", 1), ("CloneStep", 1)])
def test_three_steps_give_the_same_losses(kind: str, n: int, rgb: str) -> None:
    mine, own = pair(rgb)
    given = arguments(kind, own, n)
    curves = []
    for networks in (mine, own):
        step = getattr(steps(), kind)(networks, *given)
        curves.append(torch.stack([step() for _ in range(3)]))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=1e-5)
    assert (curves[0][1:] != curves[0][:-1]).all(), "nothing moved"


@pytest.mark.parametrize("mode", ["recon", "clone"])
def test_three_steps_are_those_of_the_tweak(mode: str) -> None:
    """The real loop, with the terms and the random numbers that the timed step has."""
    net, module = tiny.network(resolution=RESOLUTION), steps()
    ws, photo = inputs(net, 1)
    real = torch.rand(1, 3, RESOLUTION, RESOLUTION).repeat(3, 1, 1, 1)  # all alike: which is picked does not matter
    settings = module.tweak_settings(mode, batch=4, one_pass=False)
    work = Tweak(
        net.generator, net.discriminator, Latent(ws), photo, settings, real_images=real if mode == "clone" else None
    )
    networks, _ = pair("sum")
    if mode == "recon":
        step = module.TweakStep(networks, ws, photo)
    else:
        step = module.CloneStep(networks, ws, photo, torch.empty(3, 16), real)
    source = torch.Generator().manual_seed(0)
    for _ in range(3):
        torch.rand([], generator=source)
        if mode == "clone":
            step.z.copy_(torch.randn(3, 16, generator=source))
            torch.randint(3, [3], generator=source)
        values = work.step(1.0)
        wanted = [values["loss"]] if mode == "recon" else [values["loss"], values["loss_d"]]
        torch.testing.assert_close(step().reshape(-1), torch.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "n"), [("TweakStep", 2), ("LatentStep", 1), ("CloneStep", 1)])
def test_in_bf16_the_losses_are_near(kind: str, n: int) -> None:
    mine, own = pair("sum", torch.bfloat16)
    given = arguments(kind, own, n)
    curves = [
        torch.stack([step() for _ in range(3)])
        for step in (getattr(steps(), kind)(networks, *given) for networks in (mine, own))
    ]
    torch.testing.assert_close(curves[0], curves[1], rtol=steps().NEAR["bf16"], atol=0.01)


@pytest.mark.parametrize("rgb", ["sum", "conv"])
@pytest.mark.parametrize("kind", ["TweakStep", "LatentStep", "CloneStep"])
def test_the_compiler_takes_it_whole(kind: str, rgb: str) -> None:
    """No break in the graph; what the compiler makes of it is the GPU's affair."""
    mine, own = pair(rgb)
    given = arguments(kind, own, 1)
    wanted = getattr(steps(), kind)(own, *given)()
    torch._dynamo.reset()
    step = getattr(steps(), kind)(
        mine, *given, compile_=lambda f: torch.compile(f, dynamic=False, fullgraph=True, backend="aot_eager")
    )
    torch.testing.assert_close(step(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["TweakStep", "LatentStep", "CloneStep"])
def test_a_replayed_step_is_the_eager_one(kind: str, compiled: bool) -> None:
    """Three steps on a side stream, then three replays, against six eager ones of the same networks."""
    given = tuple(tensor.cuda() for tensor in arguments(kind, tiny.network(resolution=RESOLUTION), 1))
    made = [pair("sum", device="cuda")[0] for _ in range(2)]
    eager = getattr(steps(), kind)(made[0], *given)
    wanted = torch.stack([eager() for _ in range(6)])[3:]
    step = getattr(steps(), kind)(made[1], *given, compile_=steps().compiled if compiled else None)
    stream, graph, values = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(3):
        graph.replay()
        values.append(loss.clone())
    torch.testing.assert_close(torch.stack(values), wanted, rtol=1e-3, atol=1e-4)
