"""Work that goes side by side in a capture, and how it ends in an error."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from clone_fast.capture import Captured, CudaGraphs
from clone_fast.nn import Architecture, Discriminator, Generator, Network
from clone_fast.ops import streams
from clone_fast.ops.streams import SMALL, aside, beside, joined, left_beside, made_beside, ready


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


CYCLES = 20_000_000  # of a GPU, about 10 ms


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What replays it."""
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    graphs.aside(run)
    return graphs.record(run)


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
