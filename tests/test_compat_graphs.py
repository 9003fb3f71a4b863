"""Other codebases' networks as graphs: what is recorded, what is not, and that nobody can tell but by the time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from foreign import Import, assert_close, built, code_of, codebase, run  # noqa: F401 (built: a fixture)
from played import PlayedGraphs, play
from torch import Tensor, nn

import clone_fast
from clone_fast.compat import graphs
from clone_fast.compat.graphs import PATIENCE, WARM
from clone_fast.compat.report import Replaced

CPU = torch.device("cpu")
FAMILIES = {"nvidia": "training.networks", "rosinality": "model"}
INPUTS = {"Generator": (2, 3), "Discriminator": (2, 3, 8, 6)}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraphs]:
    """On a CPU; the graphs that were made."""
    monkeypatch.setattr(graphs, "recordable", lambda device: True)
    return play(monkeypatch, graphs)


@pytest.fixture
def rosinality() -> Iterator[Import]:
    with codebase("rosinality") as module:
        yield module


def entry(network: nn.Module, **options: Any) -> Replaced:
    kind = code_of(network)
    report = clone_fast.accelerate(network, **options)
    return report.replaced[f"{kind.__module__}.{kind.__name__}"]


def trained(network: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """A step of gradient descent for each input: results, gradients and the parameters at the end."""
    network = copy.deepcopy(network)
    adam = torch.optim.SGD(network.parameters(), lr=1e-3)
    found = []
    for x in inputs:
        x = x.detach().clone().requires_grad_()
        y = network(x)
        adam.zero_grad()
        y.square().mean().backward()
        adam.step()
        found += [y.detach(), x.grad]
    return [*found, *(p.grad for p in network.parameters()), *(p.detach() for p in network.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INPUTS)
def test_a_loop_is_recorded_and_stays_the_same(family: str, name: str, played: list[PlayedGraphs]) -> None:
    with codebase(family) as module:
        network = getattr(module(FAMILIES[family]), name)()
        inputs = [torch.randn(INPUTS[name]) for _ in range(6)]
        theirs = trained(network, inputs)
        told = entry(network)
        assert_close(trained(network, inputs), theirs)
        assert (told.served, told.passed) == (6, {})
        (made,) = played
        assert made.log == ["eager", "record 1", "record 2", *["replay 1", "replay 2"] * (6 - WARM)]
        assert_close(run(network, inputs[0]), run(copy.deepcopy(network), inputs[0]))


@pytest.mark.parametrize("name", INPUTS)
def test_derivatives_of_derivatives_are_the_code_s_own(
    name: str, rosinality: Import, played: list[PlayedGraphs]
) -> None:
    network, x = getattr(rosinality("model"), name)().double(), torch.randn(INPUTS[name], dtype=torch.float64)
    theirs = run(network, x)
    told = entry(network)
    for _ in range(WARM + 2):
        assert_close(run(network, x), theirs, 1e-12)
    assert "replay 1" in played[0].log
    assert not told.passed


def test_without_gradients(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network = rosinality("model").Generator()
    entry(network)
    results = []
    with torch.no_grad():
        for i in range(5):
            x = torch.full((2, 3), float(i))
            results.append((network(x), copy.deepcopy(network)(x)))
    for one, other in results:  # none is overwritten by the next call
        assert not one.requires_grad
        torch.testing.assert_close(one, other)
    assert played[0].log[-2:] == ["replay 1", "replay 1"]


def test_calls_before_the_first_is_differentiated(rosinality: Import, played: list[PlayedGraphs]) -> None:
    """A backward that finds the tensors of another call, or those that it has used up, begins with the forward."""
    network = rosinality("model").Generator()
    x, other = torch.randn(2, 3), torch.randn(2, 3)
    twin = copy.deepcopy(network)
    told = entry(network)
    for _ in range(WARM):
        network(x).sum().backward()
    network.zero_grad()
    (network(x) - network(other)).square().sum().backward()
    assert told.passed == {}
    assert played[0].log[3:] == ["replay 1", "replay 1", "replay 2", "replay 1", "replay 2"]
    (twin(x) - twin(other)).square().sum().backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_backward_twice(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network, x = rosinality("model").Generator(), torch.randn(2, 3)
    entry(network)
    for _ in range(WARM):
        network(x).sum().backward()
    network.zero_grad()
    loss = network(x).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in network.parameters()]
    network(torch.randn(2, 3))
    loss.backward()
    for p, grad in zip(network.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_add_up(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network = rosinality("model").Generator()
    entry(network)
    for _ in range(WARM):
        network(torch.randn(2, 3)).sum().backward()
    network.zero_grad()
    x = torch.randn(2, 3)
    network(x).sum().backward()
    once = [p.grad.clone() for p in network.parameters()]
    network(x).sum().backward()
    for p, grad in zip(network.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_weight_changed_before_the_backward_is_an_error_as_ever(
    frozen: bool, rosinality: Import, played: list[PlayedGraphs]
) -> None:
    network, x = rosinality("model").Generator(), torch.randn(2, 3)
    network.input.requires_grad_(not frozen)
    entry(network)
    for _ in range(WARM):
        network(x).sum().backward()
    loss = network(x).sum()
    with torch.no_grad():
        network.input.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("draws", "it draws random numbers"),
        ("counts", "it changes its buffers"),
        ("returns", "it returns more than tensors"),
    ],
)
def test_what_does_more_than_compute_is_never_recorded(
    kind: str, reason: str, rosinality: Import, played: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "rehearse", lambda device, kind, run: run())  # as on a GPU: it leaves nothing behind
    network = rosinality("unsteady").Generator(kind)
    x, twin = torch.randn(2, 3), copy.deepcopy(network)
    torch.manual_seed(1)
    theirs = [twin(x) for _ in range(4)]
    told = entry(network)
    torch.manual_seed(1)
    ours = [network(x) for _ in range(4)]
    if kind != "returns":
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(network.mean, twin.mean)
    assert told.passed == {reason: 3}
    assert not played


def test_a_network_within_a_network_is_recorded_with_it(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network, x = rosinality("unsteady").Generator(""), torch.randn(2, 3)
    told = entry(network)
    within = clone_fast.install().replaced["model.Generator"]
    theirs = copy.deepcopy(network)(x)
    for _ in range(WARM + 2):
        torch.testing.assert_close(network(x), theirs)
    assert (told.served, told.passed) == (1 + WARM + 2, {})  # and the copy's
    assert within.served == 0
    assert set(within.passed) == {"what it is a part of is recorded"}
    assert len(played) == 1


def test_hooks_and_other_forwards_within_are_called(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network, x, calls = rosinality("model").Generator(), torch.randn(2, 3), []
    told = entry(network)
    around = network.register_forward_hook(lambda *_: calls.append("around"))
    for _ in range(WARM + 1):
        network(x)
    assert calls == ["around"] * 3
    assert "replay 1" in played[0].log
    handle = network.conv1.register_forward_hook(lambda *_: calls.append("within"))
    network(x)
    handle.remove()
    around.remove()
    assert calls[3:] == ["within", "around"]
    assert told.passed == {"a module in it has hooks": 1}
    network.conv1.forward = lambda *args: type(network.conv1).forward(network.conv1, *args) * 0
    assert network(x).std() == 0
    del network.conv1.forward
    handle = network.input.register_hook(lambda grad: calls.append("gradient"))
    network(x).sum().backward()
    assert calls[5:] == ["gradient"]
    assert told.passed["a parameter has hooks"] == 1


def test_what_the_code_reads_makes_another_kind(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network, x = rosinality("model").Generator(), torch.randn(2, 3)
    entry(network)
    changes = (
        lambda: setattr(network.to_rgb, "demodulate", True),
        lambda: network.conv1.requires_grad_(False),
        lambda: setattr(network, "input", nn.Parameter(torch.randn(1, 5, 4, 4))),
        lambda: network.double(),
    )
    for change in changes:
        for _ in range(WARM + 1):
            torch.testing.assert_close(network(x), copy.deepcopy(network)(x))
        change()
        x = x.to(network.input.dtype)
        torch.testing.assert_close(network(x), copy.deepcopy(network)(x))
        for p in network.parameters():
            p.data.mul_(1.1)  # in place: the same kind
        torch.testing.assert_close(network(x), copy.deepcopy(network)(x))


def test_a_network_of_too_many_kinds_is_given_up(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network = rosinality("model").Generator()
    told = entry(network)
    for i in range(PATIENCE + 3):
        x = torch.randn(1 + i % 5, 3)
        torch.testing.assert_close(network(x), copy.deepcopy(network)(x))
    assert told.passed == {"its calls are of too many kinds": 2}
    assert not played


def test_a_recording_that_fails_leaves_the_code(
    rosinality: Import, played: list[PlayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = rosinality("model").Generator(), torch.randn(2, 3)
    monkeypatch.setattr(graphs, "graphs_of", lambda device: PlayedGraphs(refuse=2))
    told = entry(network)
    theirs = copy.deepcopy(network)(x)
    for _ in range(WARM + 3):
        torch.testing.assert_close(network(x), theirs)
    (reason,) = told.passed
    assert reason.startswith("it cannot be recorded: RuntimeError: operation not permitted")
    assert told.passed[reason] == 3


def test_graphs_can_be_forbidden(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network = rosinality("model").Generator()
    told = entry(network, graphs=False)
    for _ in range(WARM + 1):
        network(torch.randn(2, 3))
    assert told.passed == {"graphs=False": 3}
    assert entry(network) is told  # which leaves it so
    network(torch.randn(2, 3))
    assert told.passed == {"graphs=False": 4}
    assert not played


def test_a_network_and_its_graphs_go_together(rosinality: Import, played: list[PlayedGraphs]) -> None:
    network = rosinality("model").Generator()
    entry(network)
    with torch.no_grad():
        for _ in range(WARM):
            network(torch.randn(2, 3))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_uninstall_gives_the_forward_back(rosinality: Import, played: list[PlayedGraphs]) -> None:
    kind = rosinality("model").Generator
    before = kind.forward
    network = kind()
    entry(network)
    assert kind.forward is not before
    clone_fast.uninstall()
    assert kind.forward is before


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INPUTS)
def test_on_a_gpu(family: str, name: str) -> None:
    """Real graphs: the same training, the same second derivatives, the memory given back with the network."""
    with codebase(family) as module:
        network = getattr(module(FAMILIES[family]), name)().cuda()
        inputs = [torch.randn(INPUTS[name], device="cuda") for _ in range(8)]
        theirs, second = trained(network, inputs), run(network, inputs[0])
        told = entry(network)
        assert_close(trained(network, inputs), theirs, 1e-4)
        for _ in range(WARM + 2):
            assert_close(run(network, inputs[0]), second, 1e-4)
        assert told.served == 8 + WARM + 2, told
        assert not told.passed, told
        network.zero_grad()
        loss, others = network(inputs[0]).sum(), network(inputs[1])
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in network.parameters()]
        loss.backward()
        for p, grad in zip(network.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, 2 * grad)
        torch.testing.assert_close(others, network(inputs[1]))


@pytest.mark.gpu
def test_random_numbers_on_a_gpu_stay_the_user_s() -> None:
    with codebase("rosinality") as module:
        network = module("unsteady").Generator("draws").cuda()
        x, twin = torch.randn(2, 3, device="cuda"), copy.deepcopy(network)
        torch.manual_seed(1)
        theirs = [twin(x).detach() for _ in range(4)]
        told = entry(network)
        torch.manual_seed(1)
        torch.testing.assert_close([network(x).detach() for _ in range(4)], theirs, rtol=1e-4, atol=1e-4)
        assert told.passed == {"it draws random numbers": 3}
