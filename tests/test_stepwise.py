"""Loops that pause: run whole or step by step they do the same, and Ctrl-C reaches them either way."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401 (a fixture)

from clone_fast import tweak as tweak_module
from clone_fast.invert import invert, measure
from clone_fast.stepwise import Pause, Steps, drain, stepwise

PHOTO = tiny.photo()


@stepwise
def count(to: int, *, took: list[int]) -> Steps[str]:
    """Counts."""
    try:
        for i in range(to):
            took.append(i)
            yield Pause.STEP
    except KeyboardInterrupt:
        return "interrupted"
    return "done"


def test_a_loop_runs_whole_or_step_by_step() -> None:
    took: list[int] = []
    assert count(3, took=took) == "done"
    assert took == [0, 1, 2]
    assert list(count.steps(3, took=took)) == [Pause.STEP] * 3
    assert count.__doc__ == "Counts."


def test_ctrl_c_between_two_steps_reaches_the_loop() -> None:
    took: list[int] = []

    class Interrupting:
        """Steps that are interrupted in the frame of who drives them."""

        def __init__(self) -> None:
            self.inner, self.calls = count.steps(9, took=took), 0

        def __next__(self) -> Pause:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return next(self.inner)

        def throw(self, error: BaseException) -> Pause:
            return self.inner.throw(error)

    driven: Any = Interrupting()
    assert drain(driven) == "interrupted"
    assert took == [0, 1]


def test_ctrl_c_that_nobody_takes_passes() -> None:
    def loop() -> Steps[None]:
        yield Pause.STEP
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(loop())


def test_a_tweak_pauses_once_after_every_iteration_and_before_its_values_are_read() -> None:
    net, s = tiny.network(), tiny.settings(steps=4, check_every=2)
    told: list[int] = []
    steps = tweak_module.tweak.steps(
        net.generator, net.discriminator, tiny.latent(net), PHOTO, s, progress=lambda *a: told.append(a[1])
    )
    seen = [list(told) for _ in steps]
    assert seen == [[], [1], [1, 2], [1, 2]]
    assert told == [1, 2, 4]


def test_ctrl_c_thrown_into_a_tweak_keeps_the_last_check() -> None:
    net, s = tiny.network(), tiny.settings(steps=9)
    steps = tweak_module.tweak.steps(net.generator, net.discriminator, tiny.latent(net), PHOTO, s)
    for _ in range(4):
        next(steps)
    with pytest.raises(StopIteration) as end:
        steps.throw(KeyboardInterrupt())
    done = end.value.value
    assert (done.stopped, done.steps, len(done.rows)) == ("interrupted", 4, 3)
    with torch.no_grad():
        got = tiny.psnr(done.latent.draw(done.generator), PHOTO)
    assert got == pytest.approx(done.rows[-1]["psnr"], abs=1e-3)


def test_measuring_pauses_without_gradients_leaking_out() -> None:
    made = tiny.inverted()
    steps = measure.steps(made, drift_samples=16)
    pauses = 0
    for pause in steps:
        assert pause is Pause.MEASURE
        assert torch.is_grad_enabled()
        pauses += 1
    assert pauses == 16 // 8 + 2  # batches of the drift, and of the editability's 16 moves
    assert measure(made, drift_samples=16) == measure(made, drift_samples=16)


def test_an_interrupted_inversion_ends_without_another_pause() -> None:
    s, search = tiny.settings(steps=4), tiny.LatentSettings(steps=2, start_samples=8)
    for pauses in (1, 3):  # in the search, in the tweak
        steps = invert.steps(PHOTO, tiny.network(), device="cpu", latent_settings=search, tweak_settings=s)
        for _ in range(pauses):
            assert next(steps) in (Pause.STEP, Pause.READ)
        with pytest.raises(StopIteration) as end:
            steps.throw(KeyboardInterrupt())
        assert end.value.value.settings["interrupted"] is True
        assert end.value.value.metrics["psnr"] is not None


@pytest.mark.parametrize("every", [1, 3])
def test_a_read_is_announced(every: int) -> None:
    """So that who goes round several loops knows which one would wait."""
    s = tiny.settings(steps=6, check_every=every)
    search = tiny.LatentSettings(steps=6, start_samples=8, check_every=every)
    steps = invert.steps(PHOTO, tiny.network(), device="cpu", latent_settings=search, tweak_settings=s)
    found = [pause for pause in steps if pause is not Pause.MEASURE]
    want = [Pause.READ] * 6 if every == 1 else [Pause.READ, Pause.STEP, Pause.READ, Pause.STEP, Pause.STEP, Pause.READ]
    assert found == want * 2
