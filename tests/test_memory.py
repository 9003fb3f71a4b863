"""A memory that is full: what is kept, and what the message advises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from played import PlayedGraphs
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import capture, memory
from clone_fast.errors import MemoryLimitError
from clone_fast.latent import optimise as search
from clone_fast.latent.optimise import LatentSettings
from clone_fast.nn import Architecture
from clone_fast.tweak import Tweak, TweakSettings, tweak

PHOTO = tiny.photo()
ARCH = Architecture()


class Full:
    """A similarity that runs out of memory at its n-th call."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, image: Tensor, photo: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return F.mse_loss(image, photo)


def run(s: TweakSettings, at: int) -> Any:
    net = tiny.network()
    return tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, s, similarity=Full(at))


def test_a_tweak_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(MemoryLimitError, match=r"^tweak: .* 16x16 with batch=4 .* of cpu; precision='bf16' should fit"):
        run(tiny.settings(), at=1)
    with pytest.raises(MemoryLimitError, match="use a smaller network"):
        run(tiny.settings(mode="recon", precision="bf16", recompute=True), at=1)


def test_a_tweak_that_stops_fitting_keeps_the_last_check() -> None:
    with pytest.warns(RuntimeWarning, match="does not fit .* the weights of the last check are kept"):
        done = run(tiny.settings(steps=20, check_every=2), at=6)
    assert (done.stopped, done.steps) == ("memory", 6)
    assert [row["step"] for row in done.rows] == [1, 2, 4]
    with torch.no_grad():
        got = tiny.psnr(done.latent.draw(done.generator), PHOTO)
    assert got == pytest.approx(done.rows[-1]["psnr"], abs=1e-3)
    assert not any(p.requires_grad for p in done.generator.parameters())


@pytest.mark.parametrize("at", [1, 6])
def test_a_search_that_does_not_fit(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    forward, calls = net.generator.synthesis.forward, 0

    def full(ws: Tensor, *args: Any, **more: Any) -> Tensor:
        nonlocal calls
        calls += ws.requires_grad
        if calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(ws, *args, **more)

    monkeypatch.setattr(net.generator.synthesis, "forward", full)
    s = LatentSettings(steps=9, start_samples=8, check_every=2)
    if at == 1:
        with pytest.raises(MemoryLimitError, match=r"^latent: an iteration at 16x16 does not fit"):
            search(net.generator, PHOTO, s)
        return
    with pytest.warns(RuntimeWarning, match="the latent of the last check is kept"):
        found = search(net.generator, PHOTO, s)
    assert [row["step"] for row in found.rows] == [1, 2, 4]
    assert bool(found.latent.ws.isfinite().all())


class NoRoom(PlayedGraphs):
    """Graphs that do not fit."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_graph_that_does_not_fit_ends_the_tweak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager iteration would need no less."""
    net = tiny.network()
    with monkeypatch.context() as patch:
        patch.setattr(capture, "graphs_of", lambda device: NoRoom())
        args = (net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings(steps=9, r1_gamma=0.0))
        with pytest.warns(RuntimeWarning, match="does not fit .* the weights of the last check are kept") as told:
            done = tweak(*args)
    assert (done.stopped, done.steps, len(done.rows), len(told)) == ("memory", 2, 1, 1)


def test_what_was_half_made_is_gone_when_free_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    net, made = tiny.network(), list[weakref.ref[Any]]()

    def restart(self: Tweak, *args: Any, **more: Any) -> None:
        made.append(weakref.ref(self))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def free(device: torch.device) -> int:
        gc.collect()
        assert made[0]() is None
        return 1000

    monkeypatch.setattr(Tweak, "restart", restart)
    monkeypatch.setattr(memory, "free_bytes", free)
    with pytest.raises(MemoryLimitError, match="use a smaller network"):
        tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings())


def test_the_advice_names_the_largest_batch_that_fits() -> None:
    s = TweakSettings(batch=4, precision="bf16", recompute=True)
    needs = {batch: memory.iteration_bytes(ARCH, replace(s, batch=batch)) for batch in (2, 3, 4)}
    recon = memory.iteration_bytes(ARCH, replace(s, mode="recon"))
    assert recon < needs[2] < needs[3] < needs[4]
    for free, want in (
        (needs[4] * 2, "batch=3 "),
        (needs[3] * 1.01, "batch=2 "),
        (needs[2] * 1.01, "mode='recon' "),
        (recon * 1.01, memory.SMALLER),
    ):
        assert memory.advice(ARCH, s, int(free)).startswith(want)
    s = TweakSettings(batch=8, precision="bf16", recompute=True)
    assert memory.advice(ARCH, s, None).startswith("batch=4 ")  # what D's groups divide


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_recomputing_is_advised_where_it_is_enough(mode: str) -> None:
    s = TweakSettings(mode=mode, precision="bf16")
    need = memory.iteration_bytes(ARCH, replace(s, recompute=True))
    assert need < 0.9 * memory.iteration_bytes(ARCH, s)
    assert memory.advice(ARCH, s, int(need * 1.3)).startswith("recompute=True should fit")
    assert not memory.advice(ARCH, s, int(need)).startswith("recompute")


@pytest.mark.parametrize(("fraction", "want"), [(1.0, 50), (0.4, 30), (0.05, 0)])
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_free_is_what_this_process_may_have(
    name: str, fraction: float, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 bytes others have 40 and this process 10; PyTorch wants devices by number here."""
    wanted = int(name[5:] or 0)

    def told(value: Any) -> Any:
        def of(device: int) -> Any:
            assert device == wanted
            return value

        return of

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", told((50, 100)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", told(fraction))
    monkeypatch.setattr(torch.cuda, "memory_reserved", told(10))
    assert memory.free_bytes(torch.device(name)) == want
