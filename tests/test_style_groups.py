"""Styles that are made group after group: the same image and gradients, with the gradients of affine layers early."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from networks import randomised
from played_streams import play_streams
from recorded import repeated
from torch import Tensor

from clone_fast import descent
from clone_fast.descent import Descent
from clone_fast.nn import Architecture, Generator, SynthesisNetwork, generator

SMALL = Architecture(img_resolution=64, z_dim=5, w_dim=6, channel_base=256, channel_max=6)
TOGETHER = [[4, 8, 16, 32, 64]]
BLOCKS = [[4, 8], [16, 32], [64]]


def network() -> SynthesisNetwork:
    return randomised(Generator(SMALL)).double().synthesis


def grouped(patch: pytest.MonkeyPatch) -> None:
    """As in a capture, but that one comes after the other."""
    patch.setattr(generator, "side_by_side", lambda device: True)


def drawn(net: SynthesisNetwork, ws: Tensor, **options: Any) -> list[Tensor]:
    """The image, and its gradients to ws and all parameters."""
    image = net(ws, **options)
    slope = torch.linspace(-1, 1, image.numel(), dtype=image.dtype).view_as(image)
    return [image, *torch.autograd.grad((image * slope).sum(), [ws, *net.parameters()])]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "latents"), [(1, 10), (3, 10), (2, 1)])
def test_groups_draw_the_same(
    n: int, latents: int, dtype: torch.dtype | None, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, ws = network(), torch.randn(n, latents, 6).double().requires_grad_()
    noise = {"b4.conv1": torch.randn(n, 1, 4, 4).double()}
    draw = partial(drawn, net, ws, noise=noise, dtype=dtype, recompute=recompute)
    want = draw()
    grouped(monkeypatch)
    assert net._groups(ws) == BLOCKS
    got = draw()
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        if i == 1:  # the one that several groups add to
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(one, other)


def test_groups_have_the_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    net, ws, found = network(), torch.randn(1, 10, 6).double().requires_grad_(), []
    chosen = [net.get_parameter(f"{name}.affine.weight") for name in ("b8.conv0", "b32.torgb", "b64.conv1")]
    for _ in range(2):
        (slope,) = torch.autograd.grad(net(ws).square().sum(), ws, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [ws, *chosen]))
        grouped(monkeypatch)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_all_at_once_where_groups_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    net, ws = network(), torch.randn(1, 10, 6).double().requires_grad_()
    assert net._groups(ws) == TOGETHER  # not in a capture
    grouped(monkeypatch)
    assert net._groups(ws) == BLOCKS
    with torch.no_grad():
        assert net._groups(ws) == TOGETHER
    frozen = copy.deepcopy(net).requires_grad_(False)
    assert frozen._groups(ws) == TOGETHER  # a search of the latent: the sums of its gradient would be more launches
    frozen.b4.torgb.affine.weight.requires_grad_(True)
    assert frozen._groups(ws) == BLOCKS
    low = randomised(Generator(Architecture(img_resolution=16, z_dim=5, w_dim=6, channel_base=64, channel_max=6)))
    assert low.synthesis._groups(ws) == [[4, 8], [16]]


def test_maps_that_are_converted_late(monkeypatch: pytest.MonkeyPatch) -> None:
    net, dtype = network(), torch.bfloat16
    one, several = net.noise_consts(), {name: torch.randn(2, 1, 64, 64) for name in ("b64.conv0", "b64.conv1")}
    assert not net._late(one, dtype, torch.device("cpu"))  # not in a capture
    grouped(monkeypatch)
    assert list(net._late(one, dtype, torch.device("cpu"))) == ["b64.conv0", "b64.conv1"]
    one["b64.conv1"] = one["b64.conv1"].view(1, 1, 64, 64).clone().requires_grad_()
    assert list(net._late(one, dtype, torch.device("cpu"))) == ["b64.conv0"]
    assert not net._late(one, torch.float64, torch.device("cpu"))
    assert not net._late(several, dtype, torch.device("cpu"))


@pytest.mark.parametrize("together", [False, True])
def test_gradients_of_a_group_come_with_its_first_block(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, ws, order = network(), torch.randn(1, 10, 6).double(), []
    if not together:
        grouped(monkeypatch)
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    net(ws).square().sum().backward()
    place = {name: order.index(name) for name in order}
    assert len(place) == len(order) == 2 * len(net._layers())
    groups = TOGETHER if together else BLOCKS
    for group in groups:
        styles = [place[f"{name}.affine.weight"] for name, _ in net._layers(group)]
        convolutions = [place[f"{name}.weight"] for name, _ in net._layers(group)]
        below = [place[f"{name}.weight"] for name, _ in net._layers() if int(name.split(".")[0][1:]) < group[0]]
        assert max(convolutions) < min(styles)
        assert max(styles) < min(below, default=len(order))


def test_what_later_blocks_take_waits_for_the_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a lane, as if it had been launched at first; those who read it wait for it, and keep its memory. But
    large noise maps let the smallest blocks go first."""
    net, ws = network(), torch.randn(1, 10, 6).double()
    machine, done = play_streams(monkeypatch), {}
    make, block = SynthesisNetwork.styles, type(net.b4).forward

    def styles(self: SynthesisNetwork, ws: Tensor, blocks: list[int] | None = None) -> dict[str, Tensor]:
        found = make(self, ws, blocks)
        assert blocks is not None
        done[blocks[0]] = machine.now.name.split()[0], set(machine.now.done), found
        machine.launch(f"styles {blocks[0]}")
        return found

    def forward(self: Any, x: Tensor, given: Any) -> Tensor:
        first = max(group[0] for group in BLOCKS if group[0] <= self.resolution)
        assert machine.now is machine.main
        assert f"styles {first}" in machine.now.done
        assert (self.resolution == 64) == ("large maps" in machine.now.done)
        machine.launch(f"block {self.resolution}")
        return block(self, x, given)

    monkeypatch.setattr(SynthesisNetwork, "styles", styles)
    monkeypatch.setattr(type(net.b4), "forward", forward)
    joined = generator.in_one_go
    converted: list[tuple[str, set[str], list[Tensor]]] = []

    def in_one_go(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        made = joined(values, dtype)
        converted.append((machine.now.name.split()[0], set(machine.now.done), made))
        machine.launch(f"maps {len(converted)}")
        return made

    def made_beside(device: torch.device, lane: str, run: Any, reads: list[Tensor]) -> Any:
        def noted() -> Any:
            before, made = set(machine.now.done), run()
            converted.append((machine.now.name.split()[0], before, made))
            machine.launch("large maps")
            return made

        return beside(device, lane, noted if lane == "noise" else run, reads)

    beside = generator.made_beside
    monkeypatch.setattr(generator, "made_beside", made_beside)
    monkeypatch.setattr(generator, "in_one_go", in_one_go)
    machine.launch("before")
    net(ws, dtype=torch.bfloat16)
    assert [(first, name) for first, (name, *_) in done.items()] == [(4, "main"), (16, "styles"), (64, "styles")]
    for first, (_, before, found) in done.items():
        # two groups may have one lane
        assert {one for one in before if not one.startswith("styles")} == {"before"}, first
        assert "styles 4" not in before
        for style in found.values() if first > 4 else ():
            assert "main" in machine.told[style.untyped_storage().data_ptr()]
            ready: Any = style
            assert ready.ready.done >= {"before", f"styles {first}"}
            assert not any(one.startswith("block") for one in ready.ready.done)
    assert [(name, len(made)) for name, _, made in converted] == [("tables", 23), ("tables", 7), ("noise", 2)]
    assert {one for one in converted[2][1] if one.startswith("block")} == {"block 4", "block 8"}
    for one in converted[2][2]:
        assert "main" in machine.told[one.untyped_storage().data_ptr()]
    assert any(one.startswith("styles") for one in machine.told[ws.untyped_storage().data_ptr()])


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_captured_steps_are_those_of_an_eager_loop(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parameters, with Adam as their gradients come."""
    monkeypatch.setattr(descent, "ENOUGH", 1 << 16)
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    arch = Architecture(img_resolution=256, z_dim=64, w_dim=64, channel_base=8192, channel_max=128, mapping_layers=2)
    start = randomised(Generator(arch)).synthesis.to(device)
    ws, rate = torch.randn(1, arch.num_ws, arch.w_dim, device=device), torch.full([], 0.5, device=device)
    wanted = torch.rand(1, 3, 256, 256, device=device)
    for captured in (False, True):
        net = copy.deepcopy(start)
        work = Descent([(list(net.parameters()), 0.002)], betas=(0.9, 0.99))

        def run(work: Descent = work, net: SynthesisNetwork = net) -> None:
            work.step((net(ws, dtype=torch.bfloat16, recompute=recompute) - wanted).square().mean(), rate)

        repeated(run, 4, replayed=captured)
        found.append([parameter.detach() for parameter in net.parameters()])
    for got, want, before in zip(found[1], found[0], start.parameters(), strict=True):
        # where a gradient is next to nothing its rounding decides which way Adam goes
        assert float((got - want).norm()) <= 1e-2 * float((want - before).norm())
