"""Captured iterations with graphs that are played: what is recorded and replayed when, and that it changes nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from played import PlayedGraphs, play
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import capture, draws
from clone_fast import tweak as tweak_module
from clone_fast.capture import EAGER_CALLS, Board, Captured, Table
from clone_fast.errors import BackendError
from clone_fast.latent import LatentSettings, optimise
from clone_fast.nn import Network
from clone_fast.progress import ramp
from clone_fast.tweak import Tweak, Tweaked

PHOTO = tiny.photo()
CPU = torch.device("cpu")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraphs]:
    """Every Captured that is made while it is in place gets played graphs."""
    return play(monkeypatch, capture)


def run(net: Network, s: Any, seed: int = 0, **more: Any) -> Tweaked:
    return tweak_module.tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, s, seed=seed, **more)


# ---- Captured --------------------------------------------------------------------------------------------------------


def test_each_variant_runs_eagerly_then_is_recorded_and_replayed(played: list[PlayedGraphs]) -> None:
    did: list[tuple[Any, ...]] = []
    function = Captured(lambda *variant: did.append(variant), CPU, None)
    order = [(True,), (True,), (False,), (True,), (True,), (False,), (False,), (True,)]
    for variant in order:
        function(*variant)
    assert did == order  # recording executes nothing, and every call counts once
    log = ["eager", "record 1", "replay 1", "eager", "replay 1", "replay 1", "record 2", "replay 2", "replay 2"]
    assert played[0].log == [*log, "replay 1"]
    assert EAGER_CALLS == 1


def test_what_is_known_from_before_is_recorded_at_once(played: list[PlayedGraphs]) -> None:
    did: list[tuple[Any, ...]] = []
    for kind, at_once in (("one", True), ("one", True), ("one", False), ("other", True)):
        function = Captured(lambda *variant: did.append(variant), CPU, kind, at_once=at_once)
        for _ in range(2):
            function(True)
    slowly = ["eager", "record 1", "replay 1"]
    assert [graphs.log for graphs in played] == [slowly, ["record 1", "replay 1", "replay 1"], slowly, slowly]
    assert did == [(True,)] * 8


def test_without_graphs_every_call_is_eager() -> None:
    did: list[tuple[Any, ...]] = []
    function = Captured(lambda *variant: did.append(variant), CPU, None)
    for _ in range(5):
        function(1)
    assert did == [(1,)] * 5
    assert function.graphs is None


@pytest.mark.parametrize("value", ["0", "1"])
def test_capture_can_be_forbidden(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "CudaGraphs", lambda device: "graphs")
    monkeypatch.setenv("CLONE_FAST_CAPTURE", value)
    assert capture.graphs_of(torch.device("cuda")) == ("graphs" if value == "1" else None)
    assert capture.graphs_of(CPU) is None


def test_a_capture_that_fails_leaves_all_eager_with_one_warning(played: list[PlayedGraphs]) -> None:
    did: list[tuple[Any, ...]] = []
    function = Captured(lambda *variant: did.append(variant), CPU, None)
    played[0].refuse = 2
    order = [("a",)] * 4 + [("b",)] * 3 + [("a",)] * 2 + [("b",), ("c",), ("c",), ("c",)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for variant in order:
            function(*variant)
    assert [(one.category, str(one.message)) for one in told] == [
        (
            RuntimeWarning,
            "capture: fell back to eager iterations (RuntimeError: operation not permitted when stream is capturing)",
        )
    ]
    assert did == order
    assert played[0].recorded == 2
    assert not function.replays


def test_a_strict_capture_raises(played: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLONE_FAST_STRICT", "1")
    function = Captured(lambda: None, CPU, None)
    played[0].refuse = 1
    function()
    with pytest.raises(BackendError, match="CLONE_FAST_STRICT=1"):
        function()


# ---- static memory ---------------------------------------------------------------------------------------------------


def test_a_table_is_read_by_its_counter_and_refilled_in_place() -> None:
    table = Table({"a": torch.arange(6.0).reshape(3, 2), "b": torch.tensor([7, 8, 9])}, CPU)
    where = table.rows["a"].data_ptr(), table.index.data_ptr()
    seen = []
    for _ in range(3):
        seen.append((table["a"].tolist(), int(table["b"])))
        table.advance()
    assert seen == [([0, 1], 7), ([2, 3], 8), ([4, 5], 9)]
    table.refill({"a": torch.ones(3, 2), "b": torch.tensor([1, 2, 3])})
    assert (table["a"].tolist(), int(table["b"])) == ([1, 1], 1)
    assert where == (table.rows["a"].data_ptr(), table.index.data_ptr())


def test_a_board_keeps_what_is_not_written_again() -> None:
    board = Board(("loss", "psnr"), CPU)
    assert all(bool(value.isnan()) for value in board.read(("loss", "psnr")).values())
    board.write({"psnr": torch.tensor(3.0, requires_grad=True), "loss": torch.tensor(1.0, dtype=torch.float64)})
    board.write({"loss": torch.tensor(2.0)})
    assert {name: float(value) for name, value in board.slots.items()} == {"loss": 2.0, "psnr": 3.0}
    assert not board.slots["psnr"].requires_grad


# ---- the two loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"mode": "recon"}, {"local_probability": 0.5, "r1_interval": 3}, {"tune_mapping": True}, {"one_pass": False}],
    ids=str,
)
def test_a_captured_tweak_is_the_eager_one(changes: dict[str, Any], played: list[PlayedGraphs]) -> None:
    net, s = tiny.network(), tiny.settings(steps=12, check_every=5, **changes)
    captured = run(net, s)
    assert played[0].recorded >= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "graphs_of", lambda device: None)
        eager = run(net, s)
    tiny.assert_state(captured.generator, tiny.state(eager.generator))
    assert repr(captured.rows) == repr(eager.rows)
    assert all(torch.equal(captured.latent.noise[name], value) for name, value in eager.latent.noise.items())
    assert all(p.grad is None for p in captured.generator.parameters())


@pytest.mark.parametrize("changes", [{}, {"mode": "recon", "noise_lr": 0.01}, {"one_pass": False}], ids=str)
def test_a_rehearsal_changes_nothing(
    changes: dict[str, Any], played: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the tweak nor of the search."""
    net, s = tiny.network(), tiny.settings(steps=8, r1_interval=3, **changes)
    search = LatentSettings(steps=5, start_samples=8, noise_maps=True)
    plain, found = run(net, s), optimise(net.generator, PHOTO, search)
    rehearsed = 0

    def compile_ahead(call: Callable[[], None], device: torch.device) -> int:
        nonlocal rehearsed
        rehearsed += 1
        call()
        return 1

    monkeypatch.setattr(capture, "compile_ahead", compile_ahead)
    monkeypatch.setattr(capture, "_rehearsed", set())
    again = run(net, s)
    tiny.assert_state(again.generator, tiny.state(plain.generator))
    assert repr(again.rows) == repr(plain.rows)
    assert torch.equal(optimise(net.generator, PHOTO, search).latent.ws, found.latent.ws)
    run(net, s)
    assert rehearsed == 2  # the tweak with R1 and without, and the search; not again for a second tweak


def test_the_variants_are_recorded_in_the_order_of_the_draws(played: list[PlayedGraphs]) -> None:
    net = tiny.network()
    s = tiny.settings(steps=12, r1_interval=3)
    variants: list[tuple[bool, bool]] = []
    iterate = Tweak._iterate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tweak, "_iterate", lambda self, *v: (variants.append(v), iterate(self, *v))[1])
        run(net, s)
    assert variants == [(True, i % 3 == 0) for i in range(12)]
    first = ["eager", "eager", "record 1", "replay 1", "record 2", "replay 2"]  # with R1, twice without, with
    assert played[0].log == first + ["replay 1", "replay 1", "replay 2"] * 2 + ["replay 1", "replay 1"]


def test_a_captured_search_is_the_eager_one(played: list[PlayedGraphs]) -> None:
    s = LatentSettings(steps=9, start_samples=8, noise_maps=True)
    captured = optimise(tiny.network().generator, PHOTO, s)
    assert played[0].log == ["eager", "record 1"] + ["replay 1"] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "graphs_of", lambda device: None)
        eager = optimise(tiny.network().generator, PHOTO, s)
    assert torch.equal(captured.latent.ws, eager.latent.ws)
    assert captured.rows == eager.rows


def test_a_similarity_that_cannot_be_captured_falls_back(played: list[PlayedGraphs]) -> None:
    """The iterations go on as if nothing had been tried."""
    net, s = tiny.network(), tiny.settings(steps=6)
    before = played  # the first tweak refuses its first recording

    def refusing(device: torch.device) -> PlayedGraphs:
        before.append(PlayedGraphs(refuse=1))
        return before[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "graphs_of", refusing)
        with pytest.warns(RuntimeWarning, match="fell back"):
            fallen = run(net, s, similarity=F.mse_loss)
        patch.setattr(capture, "graphs_of", lambda device: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            eager = run(net, s, similarity=F.mse_loss)
    tiny.assert_state(fallen.generator, tiny.state(eager.generator))


@pytest.mark.parametrize("one_pass", [False, True])
def test_no_iteration_reads_on_the_host(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two checks nothing asks a tensor for its value: a capture would fail, and a GPU would be waited for."""
    net = tiny.network()
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings(steps=4, one_pass=one_pass))

    def read(self: Tensor, *_: Any) -> Any:
        raise AssertionError("read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
            patch.setattr(Tensor, name, read)
        for _ in range(3):
            work.step()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"mode": "recon"}, {"local_probability": 0.6}, {"tune_mapping": True, "noise_lr": 0.0}, {"one_pass": False},
     {"precision": "fp16"}],
    ids=str,
)
def test_a_captured_tweak_on_a_gpu_is_the_eager_one(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With every variant recorded, the second time without an eager call before. Two eager runs differ too: not all
    sums are taken in the same order each time."""
    net, s = tiny.network().to(torch.device("cuda")), tiny.settings(steps=16, check_every=1, **changes)
    rows = []
    for allowed in ("1", "1", "0", "0"):
        monkeypatch.setenv("CLONE_FAST_CAPTURE", allowed)
        done = tweak_module.tweak(
            net.generator, net.discriminator, tiny.latent(tiny.network()).to("cuda"), PHOTO.cuda(), s
        )
        rows.append(torch.tensor([row["loss"] for row in done.rows]))
    *captured, eager, again = rows
    allowed_error = max(1e-3, 5 * float(((again - eager) / eager).abs().max()))
    for one in captured:
        torch.testing.assert_close(one, eager, rtol=allowed_error, atol=0)


@pytest.mark.gpu
def test_a_captured_search_on_a_gpu_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for allowed in ("1", "1", "0"):
        monkeypatch.setenv("CLONE_FAST_CAPTURE", allowed)
        generator = tiny.network().to(torch.device("cuda")).generator
        found = optimise(generator, PHOTO.cuda(), LatentSettings(steps=12, noise_maps=True, check_every=1))
        rows.append(torch.tensor([row["loss"] for row in found.rows]))
    torch.testing.assert_close(rows[0], rows[2], rtol=1e-2, atol=0)
    torch.testing.assert_close(rows[1], rows[2], rtol=1e-2, atol=0)


@pytest.mark.gpu
def test_garbage_waits_for_the_end_of_a_capture() -> None:
    """A graph that is destroyed then breaks the capture off, and one that refers to itself is destroyed whenever."""
    device, x, seen = torch.device("cuda", torch.cuda.current_device()), torch.zeros(8, device="cuda"), []
    graphs = capture.CudaGraphs(device)

    def run() -> None:
        seen.append(gc.isenabled())
        x.add_(1)

    graphs.aside(run)
    replay = graphs.record(run)
    assert seen == [True, False]
    assert gc.isenabled()
    replay()
    assert x.tolist() == [2.0] * 8


@pytest.mark.gpu
def test_a_similarity_that_reads_falls_back_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real capture that CUDA breaks off: the stream, the memory and the run are sound afterwards."""
    monkeypatch.setenv("CLONE_FAST_STRICT", "0")

    def reading(image: Tensor, photo: Tensor) -> Tensor:
        loss = F.mse_loss(image, photo)
        return loss * (1.0 if loss.item() > 0 else 0.0)

    net, s = tiny.network().to(torch.device("cuda")), tiny.settings(steps=8)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="fell back to eager"):
        done = tweak_module.tweak(
            net.generator,
            net.discriminator,
            tiny.latent(tiny.network()).to("cuda"),
            PHOTO.cuda(),
            s,
            similarity=reading,
        )
    assert done.stopped == "steps"
    assert torch.cuda.current_stream() == stream
    assert torch.randn(2, device="cuda").isfinite().all()


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "c_dim"),
    [({}, 0), ({"local_probability": 0.5}, 0), ({"local_probability": 0.5, "tune_mapping": True}, 3)],
    ids=str,
)
def test_the_tables_hold_what_drawing_step_by_step_gives(changes: dict[str, Any], c_dim: int) -> None:
    net = tiny.network(c_dim=c_dim)
    g, s = net.generator, tiny.settings(steps=5, **changes)
    real = None if c_dim else torch.cat([tiny.photo(seed=i) for i in range(5)])
    label = torch.eye(3)[:1] if c_dim else None
    work = Tweak(g, net.discriminator, tiny.latent(net), PHOTO, s, real_images=real, label=label, seed=6)
    source = torch.Generator().manual_seed(6)
    joined = []
    for step in range(8):  # beyond the steps that were drawn first
        local, picked = work.draws.next()
        joins = bool(torch.rand([], generator=source) < s.local_probability)
        assert local == joins
        joined.append(joins)
        z, c = g.sample(4 - joins, source)
        torch.testing.assert_close(work.draws.table["w"][: 4 - joins], g.mapping(z, c)[:, 0])
        if s.tune_mapping:
            assert torch.equal(work.draws.table["z"][: 4 - joins], z)
        if c is not None:
            assert torch.equal(work.draws.table["c"][: 4 - joins], c)
        if real is not None:
            assert picked is not None
            assert torch.equal(picked, torch.randint(5, [4 - joins], generator=source))
        if joins:
            z, c = g.sample(1, source)
            move = s.edit_reach * torch.rand([], generator=source) * (g.mapping(z, c)[0, 0] - g.mapping.w_avg)
            torch.testing.assert_close(work.draws.table["move"], move)
        if step < 5:
            want = ramp(step, 5, up=0.05, down=0.3)
            assert float(work.draws.table["rate"]) == pytest.approx(want, abs=1e-7)
        work.draws.table.advance()
    assert set(joined) == ({True, False} if "local_probability" in changes else {True})


def test_a_run_that_outlasts_its_table_goes_on_as_with_a_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net, s = tiny.network(), tiny.settings(steps=7, local_probability=0.5)
    whole = run(net, s, seed=2)
    monkeypatch.setattr(draws, "ROWS", 3)
    parts = run(net, s, seed=2)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, nan_ok=True)
