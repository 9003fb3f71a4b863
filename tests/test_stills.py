"""Pictures as graphs: what they show is what is drawn without, whoever asks, whenever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from played import PlayedGraphs, play
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import capture, invert, metrics, open_network
from clone_fast.errors import SettingsError
from clone_fast.invert import Opened
from clone_fast.latent import LatentSettings, Search
from clone_fast.nn import Generator, Network, drawn
from clone_fast.stills import Stills
from clone_fast.tweak import Tweak

PHOTOS = [tiny.photo(seed=i) for i in range(3)]
QUICK: dict[str, Any] = {"latent_settings": LatentSettings(steps=2, start_samples=8, check_every=1), "device": "cpu"}


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraphs]:
    """The graphs of every Captured, if there are to be any."""
    monkeypatch.setattr(capture, "_recorded", set())
    return play(monkeypatch, capture) if request.param else []


def latents(n: int, seed: int, net: Network) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, net.generator.num_ws, net.generator.w_dim, generator=source).to(
        net.generator.mapping.w_avg.device
    )


def check(stills: Stills, others: list[Generator], maps: list[dict[str, Tensor]], equal: Callable[..., Any]) -> None:
    """One after the other in turns, in batches of two sizes; what was given away stays what it is."""
    own = stills.generator
    asked = [(g, noise) for g in (own, *others) for noise in (None, *maps)]
    found, wanted = [], []
    for turn in range(4):
        for i, (g, noise) in enumerate(asked):
            ws = latents(2 - turn % 2, 10 * turn + i, Network(own))
            found.append(stills.draw(g, ws if i % 2 else ws[:, :1], noise))
            with torch.no_grad():
                wanted.append(drawn(g, ws if i % 2 else ws[:, :1], noise))
        found.append(stills.features(found[-1]))
        assert stills.discriminator is not None
        with torch.no_grad():
            wanted.append(stills.discriminator.features(wanted[-1], per_image=True))
    for one, other in zip(found, wanted, strict=True):
        equal(one, other)


def several(net: Network, device: str = "cpu") -> tuple[list[Generator], list[dict[str, Tensor]]]:
    """Generators with other weights, and noise maps."""
    others = [tiny.network(seed).generator.to(device) for seed in (1, 2)]
    whole = {name: torch.randn_like(value) for name, value in net.generator.synthesis.noise_consts().items()}
    return others, [whole, {"b8.conv1": whole["b8.conv1"] + 1}]


def test_they_show_what_is_drawn_without(made: list[PlayedGraphs]) -> None:
    net = tiny.network()
    stills, before = Stills(net.generator, net.discriminator), tiny.state(net.generator)
    check(stills, *several(net), lambda one, other: torch.testing.assert_close(one, other, rtol=0, atol=0))
    tiny.assert_state(net.generator, before)
    if made:
        assert made[0].recorded == 6  # of three kinds, in two sizes
        assert made[0].log.count("eager") == 6


def test_flags_of_precision_are_those_of_the_call(
    made: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny.network()
    stills = Stills(net.generator)
    for allowed in (True, False, True, False, True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        stills.draw(net.generator, latents(2, 0, net))
    if made:
        assert made[0].log == ["eager", "eager", "record 1", "replay 1", "record 2", "replay 2", "replay 1", "replay 2"]


def test_a_memory_that_is_full_of_graphs_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoom(PlayedGraphs):
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            if self.recorded == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().record(run)

    monkeypatch.setattr(capture, "graphs_of", lambda device: NoRoom())
    net = tiny.network()
    stills = Stills(net.generator, net.discriminator)
    check(stills, *several(net), lambda one, other: torch.testing.assert_close(one, other, rtol=0, atol=0))
    assert stills.captured.graphs is None
    assert not stills.captured.replays


def test_rehearsals_change_nothing(made: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the like that was rehearsed, or recorded, before, too."""
    monkeypatch.setattr(capture, "_rehearsed", set())
    monkeypatch.setattr(capture, "compile_ahead", lambda run, device: run() is None)
    net = tiny.network()

    def look(stills: Stills, ws: Tensor) -> None:
        stills.features(stills.draw(net.generator, ws))

    for i in range(3):
        stills, ws = Stills(net.generator, net.discriminator), latents(2, i, net)
        for again in range(3):
            capture.rehearse(torch.device("cpu"), (i, again), partial(look, stills, ws))
            assert torch.equal(stills.draw(net.generator, ws + again), drawn(net.generator, ws + again))


@pytest.mark.gpu
def test_on_a_gpu_streams_take_turns() -> None:
    net = tiny.network().to("cuda")
    stills, others = Stills(net.generator, net.discriminator), several(net, "cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(6):
        streams[turn % 2].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[turn % 2]):
            check(stills, *others, lambda one, other: torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4))
    torch.cuda.synchronize()
    assert len(stills.captured.replays) == 6


def test_what_holds_graphs_goes_when_nobody_holds_it() -> None:
    """At once, and not when garbage is looked for: it is most of a GPU's memory."""
    net, photo = tiny.network(), tiny.photo()
    stills = Stills(net.generator, net.discriminator)
    search = Search(net.generator, photo, LatentSettings(steps=2), start=None, seed=0, draw=stills.draw)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), photo, tiny.settings())
    for _ in range(2):
        search.step()
        work.step()
    known = [weakref.ref(one) for one in (stills, search, work, work.generator)]
    gc.disable()
    try:
        del stills, search, work
        assert [one() for one in known] == [None] * 4
    finally:
        gc.enable()


# ---- one photo after another -----------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return {**QUICK, "tweak_settings": tiny.settings(mode="recon", **changes)}


def assert_same(one: Any, other: Any) -> None:
    for name in ("image", "latent_only"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    tiny.assert_state(one.generator, tiny.state(other.generator))
    assert repr(one.history) == repr(other.history)
    assert one.metrics == other.metrics


def test_an_opened_network_leaves_the_work_to_the_next_photo(made: list[PlayedGraphs]) -> None:
    net = tiny.network()
    alone = [invert(photo, net, **settings()) for photo in PHOTOS]
    made.clear()
    opened = open_network(net, device="cpu")
    kept = [invert(photo, opened, **settings()) for photo in PHOTOS]
    for one, other in zip(kept, alone, strict=True):
        assert_same(one, other)
    assert len(opened.searches or []) == len(opened.tweaks or []) == 1
    if made:
        assert len(made) == 3  # stills, search and tweak
        assert [one.recorded for one in made] == [5, 1, 1]  # images of one and eight latents, features of eight
    assert len({id(one.generator) for one in kept}) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"tweak_settings": tiny.settings(mode="recon", generator_lr=0.01)},
        {"latent_settings": LatentSettings(steps=3, start_samples=8)},
        {"similarity": lambda image, photo: (image - photo).abs().mean()},
        {"latent_settings": LatentSettings(steps=2, start_samples=8, noise_maps=True)},
        {"label": 2},
    ],
    ids=["tweak", "search", "similarity", "noise maps", "label"],
)
def test_other_options_get_work_of_their_own(changed: dict[str, Any]) -> None:
    net = tiny.network(c_dim=3)
    asked = settings() | {"label": 1}
    opened = open_network(net, device="cpu")
    first = invert(PHOTOS[0], opened, **asked)
    assert opened.searches
    assert opened.tweaks
    works = [weakref.ref(opened.searches[0]), weakref.ref(opened.tweaks[0])]
    assert_same(invert(PHOTOS[1], opened, **asked | changed), invert(PHOTOS[1], net, **asked | changed))
    assert [work() is None for work in works] == ([True, False] if "latent_settings" in changed else [False, True])
    assert len(opened.searches) == len(opened.tweaks) == 1
    assert_same(invert(PHOTOS[0], opened, **asked), first)


def test_real_images_of_another_call_are_others() -> None:
    net, asked = tiny.network(), {**QUICK, "tweak_settings": tiny.settings(steps=2)}
    opened = open_network(net, device="cpu")
    pools = [torch.cat([tiny.photo(seed=i + j) for i in range(4)]) for j in (5, 9)]
    for pool in pools:
        given = invert(PHOTOS[0], opened, real_images=pool, **asked)
        assert_same(given, invert(PHOTOS[0], net, real_images=pool, **asked))


def test_an_opened_network_is_where_it_is() -> None:
    opened = open_network(tiny.network(), device="cpu")
    assert open_network(opened) is opened
    with pytest.raises(SettingsError, match="the network was opened on meta"):
        invert(PHOTOS[0], replace(opened, stills=_elsewhere(opened)), device="cpu")
    with pytest.raises(SettingsError, match="open already"):
        invert(PHOTOS[0], opened, discriminator="d.pkl", device="cpu")


def _elsewhere(opened: Opened) -> Stills:
    stills = Stills(opened.network.generator)
    stills.device = torch.device("meta")
    return stills


def test_work_that_waits_makes_room_for_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked = open_network(tiny.network(), device="cpu"), settings()
    want, features, calls = invert(PHOTOS[0], opened, **asked), metrics.frechet_distance, 0

    def full(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 1 or always:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return features(*args)

    monkeypatch.setattr(metrics, "frechet_distance", full)
    always = False
    assert_same(invert(PHOTOS[0], opened, **asked), want)
    assert calls == 2
    assert not opened.searches
    assert not opened.tweaks
    always = True
    with pytest.raises(torch.OutOfMemoryError):
        invert(PHOTOS[0], open_network(tiny.network(), device="cpu", keep=False), **asked)
