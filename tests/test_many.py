"""Several photos at once: the results of one after the other, each with its own end, whatever happens to the others."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from played import PlayedGraphs
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import (
    CloneFastError,
    Inversion,
    Network,
    capture,
    invert,
    invert_each,
    invert_many,
    many,
    memory,
    save_network,
)
from clone_fast.errors import DivergenceError, MemoryLimitError, PhotoError, SettingsError
from clone_fast.latent import LatentSettings
from clone_fast.tweak import Tweak, TweakSettings

invert_module = importlib.import_module("clone_fast.invert")  # the package's `invert` is the function
PHOTOS = [tiny.photo(seed=i) for i in range(5)]
QUICK: dict[str, Any] = {"latent_settings": LatentSettings(steps=2, start_samples=8, check_every=1), "device": "cpu"}


def options(**changes: Any) -> dict[str, Any]:
    return {**QUICK, "tweak_settings": tiny.settings(**changes)}


def assert_same(one: Inversion, other: Inversion) -> None:
    """To the last bit."""
    for name in ("photo", "image", "latent_only"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.latent.ws, other.latent.ws)
    assert list(one.latent.noise) == list(other.latent.noise)
    assert all(torch.equal(value, other.latent.noise[name]) for name, value in one.latent.noise.items())
    tiny.assert_state(one.generator, tiny.state(other.generator))
    assert (one.discriminator is None) == (other.discriminator is None)
    if one.discriminator is not None and other.discriminator is not None:
        tiny.assert_state(one.discriminator, tiny.state(other.discriminator))
    assert repr(one.history) == repr(other.history)
    assert (one.metrics, one.settings) == (other.metrics, other.settings)


class Watch:
    """A similarity that tells whose iteration it is, by the photo, and may act on it."""

    def __init__(self, act: Callable[[int, list[int]], None] = lambda photo, seen: None) -> None:
        self.seen: list[int] = []
        self.act = act

    def __call__(self, image: Tensor, photo: Tensor) -> Tensor:
        index = next(i for i, known in enumerate(PHOTOS) if torch.equal(known, photo))
        self.seen.append(index)
        self.act(index, self.seen)
        return F.mse_loss(image, photo)


# ---- what comes out --------------------------------------------------------------------------------------------------

SINGLE: dict[str, list[Inversion]] = {}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_many_are_one_after_the_other(mode: str, at_once: int, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, asked = tiny.network(), options(mode=mode, steps=4, local_probability=0.7)
    if mode not in SINGLE:
        SINGLE[mode] = [invert(photo, net, **asked) for photo in PHOTOS]
    if graphs:
        monkeypatch.setattr(capture, "graphs_of", lambda device: PlayedGraphs())
    results = invert_many(iter(PHOTOS), net, at_once=at_once, **asked)
    assert len(results) == 5
    for one, other in zip(results, SINGLE[mode], strict=True):
        assert_same(one, other)
        assert set(one.seconds) == {"load", "latent", "tweak", "metrics"}
    assert len({id(result.generator) for result in results}) == 5


def test_iterations_take_turns_and_a_photo_that_ends_makes_room() -> None:
    """Two at once: the next begins as soon as one has reached its target, while the other goes on."""
    net = tiny.network()
    asked = options(mode="recon", steps=40, generator_lr=1e-6, noise_lr=0.0) | {"latent_steps": 0}
    begins = [invert(photo, net, steps=1, **asked).history[0]["psnr"] for photo in PHOTOS]
    near, far = sorted(range(5), key=lambda i: -begins[i])[:2], sorted(range(5), key=lambda i: begins[i])[:3]
    asked["target_psnr"] = (begins[near[1]] + begins[far[-1]]) / 2  # two are there at once, three never get there
    watch = Watch()
    given = list(invert_each(PHOTOS, net, at_once=2, similarity=watch, **asked))
    assert sorted(index for index, _ in given) == list(range(5))
    for index, result in given:
        assert isinstance(result, Inversion)
        assert result.settings["stopped"] == ("target" if index in near else "steps")
        assert watch.seen.count(index) == result.settings["steps"] == (1 if index in near else 40)
    assert near == [0, 2]
    assert [index for index, _ in given] == [0, 2, 1, 3, 4]
    # two at a time, in turns; a photo that is measured takes its turns, too
    live = [set(watch.seen[i:]) & set(watch.seen[: i + 1]) for i in range(len(watch.seen))]
    assert max(map(len, live)) == 2
    assert any(one != other for one, other in zip(watch.seen, watch.seen[1:], strict=False))


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_turn_goes_up_to_the_next_read(every: int) -> None:
    """Or for so many iterations, if none is read: what a photo waits for, the GPU has been given by the others."""
    watch, s = Watch(), {"mode": "recon", "steps": 20, "check_every": every}
    asked = options(**s) | {"latent_steps": 0}
    list(invert_each(PHOTOS[:2], tiny.network(), at_once=2, similarity=watch, **asked))
    turns = [len(list(group)) for _, group in itertools.groupby(watch.seen)]
    assert turns[:4] == {1: [1] * 4, 4: [1, 1, 3, 3], 100: [1, 1, many.AHEAD, many.AHEAD]}[every]
    assert sum(turns) == 40


def test_photos_are_read_as_there_is_room() -> None:
    read: list[int] = []

    def photos() -> Iterator[Tensor]:
        for i, photo in enumerate(PHOTOS):
            read.append(i)
            yield photo

    steps = invert_each(photos(), tiny.network(), at_once=2, **options(mode="recon", steps=1))
    assert read == []
    next(steps)
    assert read == [0, 1]
    assert [len(read) for _ in steps] == [3, 4, 5, 5] or len(read) == 5
    assert list(invert_each([], tiny.network(), **QUICK)) == []


def test_the_networks_given_are_not_changed_and_opened_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    net = tiny.network()
    net.generator.requires_grad_(True)
    before = tiny.state(net.generator)
    steps = invert_each(PHOTOS[:3], net, at_once=2, **options(steps=2))
    next(steps)
    list(steps)
    tiny.assert_state(net.generator, before)
    assert all(p.requires_grad and p.grad is None for p in net.generator.parameters())
    save_network(tiny.network(), tmp_path / "net.safetensors")
    opened = 0
    load = invert_module.load_network

    def counted(*args: Any, **more: Any) -> Network:
        nonlocal opened
        opened += 1
        return load(*args, **more)

    monkeypatch.setattr(invert_module, "load_network", counted)
    results = invert_many(PHOTOS[:3], tmp_path / "net.safetensors", at_once=2, **options(mode="recon", steps=1))
    assert opened == 1
    assert {result.settings["network"] for result in results} == {str(tmp_path / "net.safetensors")}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_broken_photo_does_not_stop_the_others() -> None:
    net, asked = tiny.network(), options(mode="recon")
    photos = [PHOTOS[0], "no/such/photo.png", PHOTOS[2], torch.full([3, 16, 16], torch.nan), PHOTOS[4]]
    results = dict(invert_each(photos, net, at_once=2, **asked))
    assert [type(results[i]) for i in range(5)] == [Inversion, PhotoError, Inversion, PhotoError, Inversion]
    for i in (0, 2, 4):
        result = results[i]
        assert isinstance(result, Inversion)
        assert_same(result, invert(photos[i], net, **asked))
    watch = Watch()
    with pytest.raises(PhotoError, match="no/such/photo"):
        invert_many([PHOTOS[0], "no/such/photo.png", PHOTOS[2]], net, at_once=1, similarity=watch, **asked)
    assert set(watch.seen) == {0, 2}  # the others have ended before


def test_a_photo_that_diverges_is_its_own_error() -> None:
    class Diverging(Watch):
        def __call__(self, image: Tensor, photo: Tensor) -> Tensor:
            loss = super().__call__(image, photo)
            return loss * torch.nan if self.seen[-1] == 1 else loss

    results = dict(invert_each(PHOTOS[:3], tiny.network(), at_once=3, similarity=Diverging(), **options(mode="recon")))
    error = results[1]
    assert isinstance(error, DivergenceError)
    assert isinstance(results[0], Inversion)
    assert isinstance(results[2], Inversion)
    trace = error.__traceback__
    while trace is not None:  # what a photo held is free, however long its error is kept
        held = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, Tweak)]
        assert not held
        trace = trace.tb_next


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"at_once": 0}, SettingsError, "at_once must be >= 1, got 0"),
        ({"mode": "pti"}, SettingsError, "mode must be"),
        ({"stepps": 3}, TypeError, "stepps"),
        ({"device": "warp"}, SettingsError, "device 'warp'"),
        ({"real_images": torch.zeros(2, 3, 8, 8)}, SettingsError, "real_images must be"),
    ],
)
def test_what_concerns_all_is_told_at_the_call(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        invert_each(PHOTOS, tiny.network(), **{**QUICK, **changes})


def test_what_concerns_all_and_shows_later_is_raised() -> None:
    with pytest.raises(CloneFastError, match="holds no discriminator"):
        list(invert_each(PHOTOS, tiny.network().generator, at_once=2, **options()))


def interrupting(at: int) -> Callable[[int, list[int]], None]:
    def act(photo: int, seen: list[int]) -> None:
        if len(seen) == at:
            raise KeyboardInterrupt

    return act


def test_ctrl_c_ends_all_that_are_under_way_with_their_best_so_far() -> None:
    net, asked = tiny.network(), options(mode="recon", steps=9)
    watch = Watch(interrupting(at=2 * 4))  # the fourth iteration of the second photo
    results = invert_many(PHOTOS, net, at_once=2, similarity=watch, **asked)
    assert watch.seen == [0, 1] * 4
    assert [result.settings["stopped"] for result in results] == ["interrupted"] * 2
    assert [result.settings["steps"] for result in results] == [4, 4]
    for result in results:
        assert result.metrics["psnr"] == pytest.approx(result.history[-1]["psnr"], abs=1e-2)


def test_ctrl_c_in_between_reaches_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    go_round = many._Window._round

    def interrupted(self: many._Window) -> bool:
        nonlocal rounds
        rounds += 1
        if rounds == 6:
            raise KeyboardInterrupt
        return go_round(self)

    monkeypatch.setattr(many._Window, "_round", interrupted)
    results = invert_many(PHOTOS, tiny.network(), at_once=3, **options(mode="recon", steps=9))
    assert [result.settings["stopped"] for result in results] == ["interrupted"] * 3


def test_ctrl_c_with_nothing_to_show_is_raised() -> None:
    def photos() -> Iterator[Tensor]:
        yield PHOTOS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(invert_each(photos(), tiny.network(), at_once=2, **options(mode="recon")))


def test_what_is_given_up_halfway_leaves_the_network_as_it_was() -> None:
    net = tiny.network()
    net.generator.requires_grad_(True)
    results = invert_each(PHOTOS, net, at_once=3, **options(mode="recon"))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert all(p.requires_grad for p in net.generator.parameters())


# ---- memory ----------------------------------------------------------------------------------------------------------


class Small(Watch):
    """A memory for so many tweaks: an iteration beside more that are under way runs out of it."""

    def __init__(self, holds: int, after: int = 0) -> None:
        super().__init__(self.allocate)
        self.holds, self.after = holds, after
        self.under_way: set[int] = set()

    def allocate(self, photo: int, seen: list[int]) -> None:
        self.under_way.add(photo)
        if len(self.under_way) > self.holds and seen.count(photo) > self.after:
            self.under_way.discard(photo)
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("after", [0, 2])
def test_a_photo_that_does_not_fit_beside_others_waits(after: int) -> None:
    """In its first iteration, and when there is already something that could be kept."""
    net, asked = tiny.network(), options(mode="recon", steps=5)
    small = Small(holds=1, after=after)
    results: dict[int, Any] = {}

    def go() -> None:
        for index, result in invert_each(PHOTOS[:3], net, at_once=2, similarity=small, **asked):
            results[index] = result
            small.under_way.discard(index)

    with pytest.warns(RuntimeWarning, match=r"photo \d does not fit into the memory of cpu beside 1 more: it waits"):
        go()
    assert list(results) in ([0, 1, 2], [1, 0, 2])
    for index, result in results.items():
        assert_same(result, invert(PHOTOS[index], net, similarity=Watch(), **asked))


def test_a_photo_that_does_not_fit_alone_fails() -> None:
    net, asked = tiny.network(), options(mode="recon", steps=5)
    with pytest.warns(RuntimeWarning, match="it waits"):
        results = dict(invert_each(PHOTOS[:2], net, at_once=2, similarity=Small(holds=0), **asked))
    assert all(isinstance(result, MemoryLimitError) for result in results.values())
    with pytest.warns(RuntimeWarning, match="the weights of the last check are kept"):
        ((_, result),) = invert_each(PHOTOS[:1], net, at_once=2, similarity=Small(holds=0, after=2), **asked)
    assert isinstance(result, Inversion)
    assert result.settings["stopped"] == "memory"


def test_as_many_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, s, cpu = tiny.network(), tiny.settings(), torch.device("cpu")
    assert memory.photos_that_fit(net, s, cpu) == 1
    needed = memory.photo_bytes(net, s)
    assert memory.photo_bytes(net, tiny.settings(mode="recon")) < needed
    weights = sum(p.numel() for p in net.generator.parameters()) * 4
    assert needed > 6 * weights + memory.iteration_bytes(net.arch, s)
    for free, fit in ((needed, 1), (0, 1), (int(3.1 * needed / memory.SAFE), 3)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.photos_that_fit(net, s, cpu) == fit
    begun: list[int] = []
    begin = many._Window._begin

    def count(self: many._Window) -> bool:
        found = begin(self)
        begun.append(len(self.live))
        return found

    monkeypatch.setattr(many._Window, "_begin", count)
    for room, most in ((99, 4), (2.1, 2)):
        begun.clear()
        free = int(room * needed / memory.SAFE)
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        list(invert_each(PHOTOS, net, **options()))
        assert max(begun) == most


def test_the_precision_counts_in_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TweakSettings] = []

    def fit(net: Network, settings: TweakSettings, device: torch.device) -> int:
        asked.append(settings)
        return 1

    monkeypatch.setattr(many, "photos_that_fit", fit)
    invert_each(PHOTOS, tiny.network(), precision="bf16", **options())
    assert asked == [tiny.settings(precision="bf16")]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_many_on_a_gpu_are_one_after_the_other(mode: str) -> None:
    """Within what two runs of `invert` differ by: not all sums are taken in the same order each time.

    Results are read late by the caller's stream and then freed, while the next photos go on in that memory.
    """
    net = tiny.network().to(torch.device("cuda"))
    asked = options(mode=mode, steps=16, local_probability=0.7, r1_interval=4) | {"device": "cuda", "latent_steps": 8}
    once, twice = ([invert(photo, net, **asked) for photo in PHOTOS] for _ in range(2))
    images: dict[int, Tensor] = {}
    losses: dict[int, Tensor] = {}
    for index, result in invert_each(PHOTOS, net, at_once=3, **asked):
        assert isinstance(result, Inversion)
        torch.cuda._sleep(50_000_000)
        images[index] = result.image + 0
        losses[index] = curve(result)
        del result
    assert sorted(images) == list(range(5))
    for i, (one, other) in enumerate(zip(once, twice, strict=True)):
        apart = float(((curve(one) - curve(other)) / curve(one)).abs().max())
        torch.testing.assert_close(losses[i], curve(one), rtol=max(1e-3, 5 * apart), atol=0)
        allowed = max(2e-3, 5 * float((one.image - other.image).abs().max()))
        torch.testing.assert_close(images[i], one.image, rtol=0, atol=allowed)


def curve(result: Inversion) -> Tensor:
    return torch.tensor([row["loss"] for row in result.history])


@pytest.mark.gpu
def test_what_the_caller_launched_before_is_waited_for() -> None:
    """Weights and photos that are still being written when the photos begin."""
    net = tiny.network().to(torch.device("cuda"))
    asked = options(mode="recon", steps=4) | {"device": "cuda"}
    want = [invert(photo, net, **asked).photo for photo in PHOTOS]
    weight = net.generator.synthesis.get_parameter("b16.torgb.weight")
    known = weight.detach().clone()

    def photos() -> Iterator[Tensor]:
        for photo in PHOTOS:
            given = torch.zeros_like(photo, device="cuda")
            torch.cuda._sleep(200_000_000)
            given.copy_(photo)
            yield given

    with torch.cuda.stream(torch.cuda.Stream()):
        with torch.no_grad():
            weight.zero_()
            torch.cuda._sleep(200_000_000)
            weight.copy_(known)
        results = invert_many(photos(), net, at_once=2, **asked)
    for result, photo in zip(results, want, strict=True):
        assert torch.equal(result.photo, photo)
        assert float(result.metrics["drift_psnr"] or 0) > 20


@pytest.mark.gpu
def test_as_many_at_once_as_fit_on_a_gpu() -> None:
    net = tiny.network().to(torch.device("cuda"))
    assert memory.photos_that_fit(net, tiny.settings(), torch.device("cuda")) > many.MOST
