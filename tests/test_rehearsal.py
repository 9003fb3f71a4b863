"""The kernels of a whole inversion compiled in one go; here, where nothing is compiled, that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

from clone_fast import capture, invert
from clone_fast.adversary import Adversary
from clone_fast.errors import MemoryLimitError
from clone_fast.latent import LatentSettings, Search
from clone_fast.tweak import Tweak, TweakSettings

OPTIONS: dict[str, Any] = {"latent_steps": 3, "steps": 4, "device": "cpu"}


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each of them runs, in order."""
    found: list[list[str]] = []

    def compile_ahead(run: Callable[[], None], device: torch.device) -> int:
        found.append([])
        run()
        return 1

    def noted(owner: Any, name: str, what: Callable[..., str]) -> None:
        before = getattr(owner, name)

        def call(*args: Any) -> Any:
            if capture.rehearsing():
                found[-1].append(what(*args))
            return before(*args)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(capture, "compile_ahead", compile_ahead)
    monkeypatch.setattr(capture, "_rehearsed", set())
    noted(Search, "_iterate", lambda _: "search")
    noted(Tweak, "_iterate", lambda _, local, penalised: f"tweak{' with R1' * penalised}")
    return found


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_one_rehearsal_serves_all_stages_and_later_photos(mode: str, rehearsals: list[list[str]]) -> None:
    net = tiny.network()
    first: Any = invert(tiny.photo(), net, mode=mode, **OPTIONS)
    parts = ["tweak with R1", "tweak"] if mode == "clone" else ["tweak"]
    assert rehearsals == [["search", *parts]]
    again: Any = invert(tiny.photo(), net, mode=mode, **OPTIONS | {"steps": 3})
    assert len(rehearsals) == 1
    assert torch.equal(again.found.ws, first.found.ws)


def test_a_rehearsal_leaves_no_trace(rehearsals: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = invert(tiny.photo(), tiny.network(), **OPTIONS)
    monkeypatch.setattr(capture, "compile_ahead", lambda run, device: 0)
    capture._rehearsed.clear()
    plain = invert(tiny.photo(), tiny.network(), **OPTIONS)
    assert repr(rehearsed.history) == repr(plain.history)
    assert torch.equal(rehearsed.image, plain.image)


def test_a_full_memory_is_left_to_the_stage(rehearsals: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that were noted before it are compiled all the same."""
    turn = Adversary.turn

    def full(*args: Any) -> Any:
        if capture.rehearsing():
            raise torch.OutOfMemoryError("no room")
        return turn(*args)

    monkeypatch.setattr(Adversary, "turn", full)
    with pytest.raises(MemoryLimitError, match=r"^tweak: "):
        invert(tiny.photo(), tiny.network(), **OPTIONS)
    assert rehearsals == [["search", "tweak with R1"], ["tweak with R1"]]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [(True, True), (True, False)]),
        ({"mode": "recon"}, [(True, False)]),
        ({"r1_gamma": 0.0}, [(True, False)]),
        ({"local_probability": 0.5}, [(True, True), (True, False), (False, True), (False, False)]),
        ({"local_probability": 0.5, "cohesion_weight": 0.0}, [(True, True), (True, False), (False, False)]),
    ],
    ids=str,
)
def test_variants(changes: dict[str, Any], wanted: list[tuple[bool, bool]]) -> None:
    assert TweakSettings(**changes).variants == wanted


def test_what_does_not_change_the_kernels_does_not_count() -> None:
    assert capture.alike(TweakSettings(steps=3)) == capture.alike(TweakSettings(check_every=7))
    assert capture.alike(TweakSettings()) != capture.alike(TweakSettings(precision="bf16"))
    assert capture.alike(LatentSettings(steps=0)) != capture.alike(LatentSettings(steps=9))
