"""Work that goes side by side in a capture, and how it ends in an error."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from played_streams import Machine, play_streams
from recorded import captured
from torch import Tensor

from clone_fast.capture import Captured
from clone_fast.nn import Architecture, Discriminator, Generator, Network
from clone_fast.nn.layers import run
from clone_fast.ops import streams
from clone_fast.ops.streams import SMALL, as_it_comes, aside, beside, joined, left_beside, made_beside, ready


def test_without_a_capture_one_comes_after_the_other() -> None:
    order: list[str] = []
    both = [partial(lambda name: order.append(name) or name, name) for name in ("run", "meanwhile")]
    assert beside(torch.device("cpu"), "lane", *both) == ("run", "meanwhile")
    assert order == ["run", "meanwhile"]


def test_without_a_capture_everything_is_as_if_there_were_no_lanes() -> None:
    cpu, x = torch.device("cpu"), torch.ones(3)
    ready([x])
    made = made_beside(cpu, "lane", lambda: x * 2, [x])
    assert not hasattr(x, "ready")
    assert not hasattr(made, "lane")
    assert left_beside(cpu, "lane", [made], lambda: 1, lambda: 2, [x]) == (1, 2)
    assert aside(cpu, "lane", lambda: x * 3, [x]).tolist() == [3, 3, 3]
    joined(cpu, "lane")


def test_what_is_made_of_a_weight_keeps_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once more, by a recomputation say, it belongs to the gradient of what was made at first."""

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    lanes: list[str] = []
    monkeypatch.setattr(streams, "_capturing", lambda device: True)
    monkeypatch.setattr(streams, "_lane", lambda device, name: lanes.append(name) or Stream())
    monkeypatch.setattr(streams, "_launched", lambda lane, after, reads, run: run())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    weights = [torch.ones(3) for _ in range(4)]
    order = [0, 1, 2, 3, 3, 1, 2, 0, 0]
    for i in order:
        made_beside(torch.device("cpu"), "lane", partial(torch.add, weights[i], 1), [weights[i]])
    first = lanes[:4]
    assert first[0] == first[2] != first[1] == first[3]
    assert lanes == [first[i] for i in order]


class Layer(torch.autograd.Function):
    """x times the sum of a weight. Its gradient to x is launched on the main stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, machine: Machine, name: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.machine, ctx.name = machine, name
        return x * weight.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        ctx.machine.now = ctx.machine.main
        ctx.machine.launch(f"dx {ctx.name}")
        return grads[0] * weight.sum(), (grads[0] * x).expand_as(weight), None, None


def chain(machine: Machine, weights: list[Tensor], uses: list[int]) -> Tensor:
    """Layers of these weights, whose gradients are made on a lane."""

    def made(i: int, grad: Tensor) -> None:
        lane = machine.lane(None, "weights")
        lane.wait_stream(machine.main)
        machine.now = lane
        machine.launch(f"dw {i}")

    for i, weight in enumerate(weights):
        weight.register_hook(partial(made, i))
    x = torch.ones([], requires_grad=True)
    for place, i in enumerate(uses):
        x = Layer.apply(x, weights[i], machine, str(place))
    return x


def leaves(*sizes: int) -> list[Tensor]:
    return [torch.rand(size, requires_grad=True) for size in sizes]


def test_without_a_capture_all_comes_at_the_end() -> None:
    weights, found = leaves(6, 1), []
    with as_it_comes(torch.device("cpu"), "step", weights, lambda *all_of: found.append(all_of), 1):
        (weights[0].sum() + weights[1].sum()).backward()
        assert not found
    assert found == [tuple(weights)]


def test_as_it_comes_waits_for_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones together, on two lanes in turn; what is left on the current stream, which waits for no lane before."""
    machine, runs = play_streams(monkeypatch), []
    weights = leaves(1, 6, 1, 2, 3, 8, 1, 4)  # the last one takes no part
    y = chain(machine, weights, list(range(7)))

    def run(*chosen: Tensor) -> None:
        which = [i for i, weight in enumerate(weights) if any(weight is one for one in chosen)]
        runs.append((machine.now.name, which, set(machine.now.done)))
        assert all(weights[i].grad is not None for i in which if i < 7)
        machine.launch(f"run {which}")

    aside(torch.device("cpu"), "step", lambda: machine.launch("rates"), [])
    with as_it_comes(torch.device("cpu"), "step", weights, run, 5):
        y.backward()
        machine.now = machine.main
        machine.main.wait_stream(machine.lanes["weights"])  # as autograd does in the end
    wanted = [("step", [5, 6]), ("step in turn", [3, 4]), ("step", [1, 2]), ("main", [0, 7])]
    assert [(name, which) for name, which, _ in runs] == wanted
    for name, which, done in runs:
        assert "rates" in done
        assert {f"dw {i}" for i in which if i < 7} <= done
        written = {f"dx {i}" for i in range(7) if i >= min(which)}
        assert {one for one in done if one.startswith("dx")} == written, name
    assert not [one for one in runs[1][2] | runs[3][2] if one.startswith("run")]
    assert {f"run {which}" for _, which, _ in runs} <= machine.main.done
    assert {"main"} | set(machine.lanes) == {"main", "weights", "step", "step in turn"}
    for weight in weights[1:7]:
        assert weight.grad is not None
        assert machine.told[weight.grad.untyped_storage().data_ptr()] <= {"step", "step in turn"}
    assert not weights[0]._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_a_leaf_of_several_uses_has_all_of_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, runs = play_streams(monkeypatch), []
    weights = leaves(3, 3, 3)
    uses = [1, 0, 1, 2, 1]
    want = torch.autograd.grad(chain(machine, weights, uses), weights)
    y = chain(machine, weights, uses)
    with as_it_comes(torch.device("cpu"), "step", weights, lambda *some: runs.append(some), 3):
        y.backward()
        machine.now = machine.main
    assert [i for some in runs for i, weight in enumerate(weights) if any(weight is one for one in some)] == [2, 0, 1]
    for weight, grad in zip(weights, want, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, grad)


def test_an_error_in_a_backward_ends_the_hooks_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    play_streams(monkeypatch)
    (weight,), runs = leaves(3), []
    with pytest.raises(ZeroDivisionError), as_it_comes(torch.device("cpu"), "step", [weight], runs.append, 5):
        raise ZeroDivisionError
    weight.sum().backward()
    assert not runs


CYCLES = 20_000_000  # of a GPU, about 10 ms


def slowly(x: Tensor, factor: float) -> Tensor:
    """x times this, late."""
    torch.cuda._sleep(CYCLES)
    return x * factor


class Late(torch.autograd.Function):
    """made * x, whose gradient to `made` is late and left beside."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(made, x)
        return made * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        made, x = ctx.saved_tensors
        g = grads[0] + 0  # which nothing keeps but those who work on it
        of_made, of_x = left_beside(x.device, "other", [made], lambda: slowly(x, 1) * g, lambda: made * g, [x, g])
        return of_made, of_x


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1 << 12, SMALL // 4 + 1], ids=["small", "large"])
def test_what_is_late_beside_is_whole(size: int) -> None:
    """Made late, and its gradient made later: neither is read before it is there, nor what they read overwritten."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight, x = (torch.rand(size, device=device, requires_grad=True) for _ in range(2))
    total = [torch.empty_like(weight) for _ in range(4)]

    def run() -> None:
        weight.grad = x.grad = None
        source = weight * 2
        ready([source])
        late, made = torch.rand_like(x), []
        for factor in (3.0, 5.0):
            made.append(made_beside(device, "weights", partial(slowly, source, factor), [source]))
            late = late * 2
        y = Late.apply(made[1], Late.apply(made[0], x))
        seen = aside(device, "seen", partial(slowly, y.detach(), 2), [y])
        y.sum().backward()
        for _ in range(8):  # whatever was given back is full of something else
            late = torch.full_like(late, float("nan"))
        joined(device, "seen")
        for into, value in zip(total, (y.detach(), seen, weight.grad, x.grad), strict=True):
            into.copy_(value)

    replay = captured(run)
    w, value = weight.detach(), x.detach()
    want = [60 * w * w * value, 120 * w * w * value, 120 * w * value, 60 * w * w]
    for _ in range(3):
        for tensor in total:
            tensor.fill_(torch.nan)
        replay()
        for got, exact in zip(total, want, strict=True):
            torch.testing.assert_close(got, exact)


class Read(torch.autograd.Function):
    """made * x, whose "gradient" to `made` is that to x, read late and beside."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(made)
        return made * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        (made,) = ctx.saved_tensors
        dx = grads[0] * made
        of_made, _ = left_beside(dx.device, "other", [made], partial(slowly, dx, 1), lambda: None, [dx])
        return of_made, dx


@pytest.mark.gpu
def test_what_a_lane_reads_is_not_added_to_in_place() -> None:
    """As autograd does with a gradient that it alone holds, when the next one for the same tensor arrives."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight, x = (torch.rand(1 << 12, device=device, requires_grad=True) for _ in range(2))
    total = [torch.empty_like(weight) for _ in range(2)]

    def run() -> None:
        weight.grad = x.grad = None
        source, h = weight * 2, x * 1
        twice = h * 2
        made = made_beside(device, "weights", partial(slowly, source, 3.0), [source])
        (Read.apply(made, h) + twice).sum().backward()
        for into, value in zip(total, (weight.grad, x.grad), strict=True):
            into.copy_(value)

    replay = captured(run)
    for _ in range(3):
        replay()
        torch.testing.assert_close(total[0], 36 * weight.detach())
        torch.testing.assert_close(total[1], 6 * weight.detach() + 2)


@pytest.mark.parametrize("lane", ["image", None])
def test_what_a_recomputation_leaves_aside_is_waited_for(lane: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that ends before a lane has joined is an error, and nothing that was computed once more is used."""
    machine = play_streams(monkeypatch)

    class Block(torch.nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            y = x.square()
            aside(x.device, "image", lambda: machine.launch(f"draw {self.calls}"), [y])
            return y, y.sin()

    block, x = Block(), torch.ones(3, requires_grad=True)
    results = run(block, x, recompute=True, lane=lane)
    joined(x.device, "image")
    sum(one.sum() for one in results).backward()
    assert block.calls == 2
    assert machine.lanes["image"].done >= {"draw 1", "draw 2"}
    assert ("draw 2" in machine.main.done) == (lane is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_networks_have_the_eager_gradients(
    dtype: torch.dtype, recompute: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of lanes everywhere: what goes beside must wait for what it needs, and nothing may overwrite what it reads."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose roundings make much of little
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    arch = Architecture(img_resolution=256, z_dim=64, w_dim=64, channel_base=8192, channel_max=128, mapping_layers=2)
    net = Network(Generator(arch), Discriminator(arch)).to(torch.device("cuda"))
    generator, discriminator = net.generator.requires_grad_(not frozen), net.discriminator
    assert discriminator is not None
    discriminator.requires_grad_(not frozen)
    ws = torch.randn(4, generator.num_ws, arch.w_dim, device="cuda", requires_grad=True)
    inputs = [ws] if frozen else [ws, *generator.synthesis.parameters(), *discriminator.parameters()]
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            before = generator.synthesis(ws, dtype=dtype)
        image = generator.synthesis(ws, dtype=dtype, recompute=recompute)
        score = discriminator(image, dtype=dtype, recompute=recompute).sum() + image.square().mean()
        grads = torch.autograd.grad(score, inputs, allow_unused=True)
        made = [before, image.detach(), *(grad for grad in grads if grad is not None)]
        if not found:
            found.extend(torch.empty_like(value) for value in made)
        for into, value in zip(found, made, strict=True):
            into.copy_(value)

    run()
    want = [value.clone() for value in found]
    assert len(want) > 2
    replay = captured(run)
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    for _ in range(3):
        for tensor in found:
            tensor.fill_(torch.nan)
        replay()
        for i, (got, exact) in enumerate(zip(found, want, strict=True)):
            # a single number, a noise's strength, is a sum over images that may cancel out
            size = max(float(exact.norm()), 0.1 if exact.ndim == 0 else 0.0)
            assert float((got - exact).norm()) <= allowed * size + 1e-6, (i, list(exact.shape))


class Full(torch.autograd.Function):
    """Nothing, but that its gradient finds the memory full while it is captured."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return find_it_full(grads[0])


def find_it_full(x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise torch.OutOfMemoryError("full")
    return x * 2


@pytest.mark.gpu
@pytest.mark.parametrize("first", [find_it_full, Full.apply], ids=["forward", "backward"])
@pytest.mark.parametrize("in_lane", [True, False])
def test_a_full_memory_is_told_from_beside_other_work(first: Callable[[Tensor], Tensor], in_lane: bool) -> None:
    """What is under way beside does not hide the error, nor keep the memory; the next capture succeeds."""
    device = torch.device("cuda", torch.cuda.current_device())
    x, total = torch.ones(1 << 20, device=device, requires_grad=True), torch.zeros([], device=device)

    def iteration(function: Callable[[Tensor], Tensor]) -> None:
        x.grad = None
        both = (partial(function, x), lambda: x * 3)
        one, two = beside(device, "other", *(both if in_lane else both[::-1]))
        (one + two).sum().backward()
        total.copy_(cast(Tensor, x.grad)[0])

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)

    spoiled, sound, earlier = (Captured(partial(iteration, f), device, "a test") for f in (first, torch.sin, torch.sin))
    for _ in range(2):
        earlier()  # what a process keeps of its first capture is there
    earlier.release()
    spoiled()
    before = reserved()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        spoiled()
    assert reserved() <= before
    assert torch.randn(2, device=device).isfinite().all()
    for _ in range(3):
        total.fill_(torch.nan)
        sound()
        assert total.item() == pytest.approx(3 + math.cos(1), rel=1e-6)
    assert len(sound.replays) == 1
