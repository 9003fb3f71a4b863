"""Work that begins anew for the next photo: the same as new work, and nothing of the photo before."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from played import PlayedGraphs
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import capture, invert_each, invert_many
from clone_fast import tweak as tweak_module
from clone_fast.latent import Latent, LatentSettings, Outcome, Search, optimise
from clone_fast.nn import Network
from clone_fast.tweak import Tweak, Tweaked, TweakSettings

optimise_module = importlib.import_module("clone_fast.latent.optimise")  # the name is the function's
PHOTOS = [tiny.photo(seed=i) for i in range(3)]


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraphs]:
    """The graphs of every Captured, if there are to be any."""
    graphs: list[PlayedGraphs] = []

    def graphs_of(device: torch.device) -> PlayedGraphs | None:
        graphs.append(PlayedGraphs())
        return graphs[-1] if request.param else None

    monkeypatch.setattr(capture, "graphs_of", graphs_of)
    return graphs


def assert_same_tweak(one: Tweaked, other: Tweaked) -> None:
    tiny.assert_state(one.generator, tiny.state(other.generator))
    assert one.discriminator is not None
    assert other.discriminator is not None
    tiny.assert_state(one.discriminator, tiny.state(other.discriminator))
    assert repr(one.rows) == repr(other.rows)
    assert (one.stopped, one.steps) == (other.stopped, other.steps)
    assert torch.equal(one.latent.ws, other.latent.ws)
    for name, value in other.latent.noise.items():
        assert torch.equal(one.latent.noise[name], value)


def tweaked(net: Network, i: int, s: TweakSettings, **more: Any) -> Tweaked:
    """Of the i-th photo, latent and seed."""
    latent = tiny.latent(net, seed=i, noise=s.noise_lr == 0)
    label = torch.eye(3)[:1] if net.generator.c_dim else None
    return tweak_module.tweak(
        net.generator, net.discriminator, latent, PHOTOS[i], s, seed=i, **{"label": label, **more}
    )


@pytest.mark.parametrize(
    ("changes", "c_dim", "real"),
    [
        ({}, 0, False),
        ({"mode": "recon"}, 0, False),
        ({"local_probability": 0.5, "r1_interval": 3, "tune_mapping": True}, 3, False),
        ({"local_probability": 0.5, "noise_lr": 0.0}, 0, True),
    ],
    ids=str,
)
def test_a_restarted_tweak_is_a_new_one(
    changes: dict[str, Any], c_dim: int, real: bool, made: list[PlayedGraphs]
) -> None:
    net, s = tiny.network(c_dim=c_dim), tiny.settings(steps=5, check_every=2, **changes)
    more = {"real_images": torch.cat([tiny.photo(seed=9 + i) for i in range(5)])} if real else {}
    before = tiny.state(net.generator), tiny.state(tiny.judge(net))
    spare: list[Tweak] = []
    again = [tweaked(net, i, s, spare=spare, **more) for i in range(3)]
    assert len(spare) == len(made) == 1
    recorded, variants = made[0].recorded, set(spare[0].iterate.replays)
    assert recorded == len(variants)  # each once, whatever the number of photos
    for i, one in enumerate(again):  # all of them ended before the first is looked at
        assert_same_tweak(one, tweaked(net, i, s, **more))
        assert not any(p.requires_grad for p in one.generator.parameters())
    tiny.assert_state(net.generator, before[0])
    tiny.assert_state(tiny.judge(net), before[1])


def test_a_tweak_restarts_after_any_end(made: list[PlayedGraphs]) -> None:
    """After Ctrl-C, and after a loss that is not finite has reached the weights and Adam's moments."""
    net, s = tiny.network(), tiny.settings(steps=12, check_every=1)
    fresh = tweaked(net, 1, s, similarity=F.mse_loss)

    def failing(step: int, error: type[BaseException] | None) -> Any:
        calls = 0

        def similarity(image: Tensor, photo: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == step and error is not None:
                raise error
            return F.mse_loss(image, photo) * (torch.nan if error is None and step <= calls < 10 else 1.0)

        return similarity

    for error, stopped in ((KeyboardInterrupt, "interrupted"), (None, "diverged")):
        spare: list[Tweak] = []
        ended = tweaked(net, 0, s, spare=spare, similarity=failing(3, error))
        assert ended.stopped == stopped
        assert_same_tweak(tweaked(net, 1, s, spare=spare), fresh)


def test_a_tweak_that_filled_the_memory_is_not_kept(made: list[PlayedGraphs]) -> None:
    calls = 0

    def similarity(image: Tensor, photo: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.mse_loss(image, photo)

    spare: list[Tweak] = []
    with pytest.warns(RuntimeWarning, match="the weights of the last check are kept"):
        assert tweaked(tiny.network(), 0, tiny.settings(steps=6), spare=spare, similarity=similarity).steps == 4
    assert spare == []


@pytest.mark.parametrize("changes", [{}, {"space": "w", "noise_maps": True}, {"steps": 0}], ids=str)
@pytest.mark.parametrize("with_start", [False, True])
def test_a_restarted_search_is_a_new_one(
    changes: dict[str, Any], with_start: bool, made: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimise_module, "ROWS", 4)  # rows are drawn anew in between
    net, s = tiny.network(), LatentSettings(**{"steps": 6, "start_samples": 8, "check_every": 2} | changes)

    def found(i: int, **more: Any) -> Outcome:
        start: Latent | None = tiny.latent(net, seed=i, noise=True) if with_start else None
        return optimise(net.generator, PHOTOS[i], s, start=start, seed=i, **more)

    spare: list[Search] = []
    again = [found(i, spare=spare) for i in range(3)]
    assert len(spare) == len(made) == 1
    assert made[0].recorded <= 1
    for i, one in enumerate(again):
        new = found(i)
        assert torch.equal(one.latent.ws, new.latent.ws)
        assert one.latent.noise.keys() == new.latent.noise.keys()
        assert all(torch.equal(value, one.latent.noise[name]) for name, value in new.latent.noise.items())
        assert repr(one.rows) == repr(new.rows)


def test_photos_of_a_place_share_its_graphs(made: list[PlayedGraphs]) -> None:
    options: dict[str, Any] = {"device": "cpu", "latent_settings": LatentSettings(steps=3, start_samples=8)}
    s = tiny.settings(mode="recon", steps=3)
    invert_many(PHOTOS * 2, tiny.network(), at_once=2, tweak_settings=s, **options)
    stills, *made = made  # all draw with the same
    assert len(made) == 4  # two places, each with a search and a tweak
    if stills.log:
        assert stills.recorded == 5
        assert [one.recorded for one in made] == [1] * 4
        assert sum(one.log.count("eager") for one in made) == 4  # the very first iterations
        assert sum(one.log.count("replay 1") for one in made) == 6 * (3 + 3) - 4


def test_one_photo_alone_keeps_nothing(made: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Tweak] = []
    release = Tweak.release
    monkeypatch.setattr(Tweak, "release", lambda self: (works.append(self), release(self))[1])
    tiny.inverted()
    assert len(works) == 1
    assert works[0].iterate.graphs is None
    next(invert_each(PHOTOS[:1], tiny.network(), device="cpu", steps=1, latent_steps=0, mode="recon"))
    assert len(works) == 1
