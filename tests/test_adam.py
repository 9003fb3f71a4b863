"""Adam in place: the reference against PyTorch's class, csrc's kernel against the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import emulated as emulation
import pytest
import torch
from torch import Tensor

from clone_fast import backend
from clone_fast.ops.adam import adam_

BETAS = [(0.9, 0.99), (0.0, 0.99)]
SIZES: list[tuple[int, ...]] = [(1,), (), (3, 5), (4, 2, 3, 3), (2049,), (2048,), (4099,)]


class Lists:
    """What a step takes, after so many steps of each tensor."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.means = [torch.randn_like(p) * 0.1 for p in parameters]
        self.squares = [torch.rand_like(p) * 0.1 for p in parameters]
        self.steps = [torch.full([], float(i % 3), device=device) for i in range(len(self.parameters))]
        for steps, mean, square in zip(self.steps, self.means, self.squares, strict=True):
            if steps == 0:
                mean.zero_(), square.zero_()
        self.rate = torch.full([], 0.01, device=device)

    def step(self, take: Any, gradients: Sequence[Tensor], betas: tuple[float, float], *rest: Any) -> Any:
        """One step by this function."""
        lists = (self.parameters, list(gradients), self.means, self.squares, self.steps)
        return take(*lists, self.rate, betas, *rest)

    def values(self) -> list[Tensor]:
        return [value.clone() for part in (self.parameters, self.means, self.squares, self.steps) for value in part]

    def exact(self, gradients: Sequence[Tensor], betas: tuple[float, float]) -> list[Tensor]:
        """These values after a step, in float64: algorithm 1 of Kingma and Ba 2015."""
        after: list[list[Tensor]] = [[], [], [], []]
        wide = [[t.double() for t in part] for part in (self.parameters, gradients, self.means, self.squares)]
        for p, g, mean, square, steps in zip(*wide, self.steps, strict=True):
            t = float(steps) + 1
            m, v = betas[0] * mean + (1 - betas[0]) * g, betas[1] * square + (1 - betas[1]) * g * g
            unbiased = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
            made = p - float(self.rate) * unbiased[0] / (unbiased[1].sqrt() + 1e-8), m, v, steps.double() + 1
            for part, value in zip(after, made, strict=True):
                part.append(value)
        return [value for part in after for value in part]


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("betas", BETAS)
def test_the_reference_is_the_formula(betas: tuple[float, float]) -> None:
    lists = Lists([torch.randn(size) for size in SIZES])
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in lists.parameters]
        want = lists.exact(gradients, betas)
        lists.step(adam_, gradients, betas)
        assert_near(lists.values(), want)


def test_nothing_to_move_is_no_step() -> None:
    adam_([], [], [], [], [], torch.ones([]), (0.9, 0.99))


# ---- csrc/adam.cu, on the CPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return emulation.extension("adam", tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def leaf(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    return emulation.leaf("adam", emulated, monkeypatch)


def misaligned(size: int) -> Tensor:
    return torch.randn(size + 1)[1:]


@pytest.mark.parametrize("betas", BETAS)
def test_the_kernel_is_the_formula(leaf: Any, betas: tuple[float, float]) -> None:
    last = torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    lists = Lists([*(torch.randn(size) for size in SIZES), misaligned(2050), last])
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in lists.parameters]
        want, versions = lists.exact(gradients, betas), [p._version for p in lists.parameters]
        assert lists.step(leaf.supports, gradients, betas, 1e-8) is None
        assert lists.step(leaf.launch, gradients, betas, 1e-8)
        assert_near(lists.values(), want)
        assert all(p._version > before for p, before in zip(lists.parameters, versions, strict=True))


def test_more_tensors_than_a_launch_takes(leaf: Any) -> None:
    lists = Lists([torch.randn(1 + i % 5) for i in range(131)])
    gradients = [torch.randn_like(p) for p in lists.parameters]
    want = lists.exact(gradients, BETAS[0])
    lists.step(leaf.launch, gradients, BETAS[0], 1e-8)
    assert_near(lists.values(), want)


def test_what_the_leaf_refuses(leaf: Any) -> None:
    for parameter, gradient in (
        (torch.randn(3).half(), torch.randn(3).half()),
        (torch.randn(3, 4), torch.randn(4, 3).t()),
        (torch.randn(3, 8)[:, :4], torch.randn(3, 8)[:, :4]),
        (torch.randn(0), torch.randn(0)),
    ):
        one = [[gradient.clone() if i == 1 else parameter] for i in range(4)]
        one[1] = [gradient]
        reason = leaf.supports(*one, [torch.ones([])], torch.ones([]), BETAS[0], 1e-8)
        assert reason == "wants float32, and all of a parameter in the same order without gaps"


def test_what_the_launcher_refuses(emulated: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="adam: takes tensors of 1 to"):
        emulated.adam([(0, 0, 0, 0, 0, 0)], 0, 0.9, 0.99, 1e-8, 0)
    with pytest.raises(RuntimeError, match=r"adam: wants betas in \[0, 1\)"):
        emulated.adam([], 0, 0.9, 1.0, 1e-8, 0)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_on_a_gpu(name: str, betas: tuple[float, float]) -> None:
    """Among many, among them of the sizes of a generator's weights."""
    sizes = [*SIZES, (512, 512, 3, 3), (1 << 20,), *((i,) for i in range(1, 99))]
    lists = Lists([torch.randn(size, device="cuda") for size in sizes])
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in lists.parameters]
        want = lists.exact(gradients, betas)
        with backend(name):
            lists.step(adam_, gradients, betas)
        assert_near(lists.values(), want)


@pytest.mark.gpu
def test_replayed_with_changed_gradients() -> None:
    lists = Lists([torch.randn(size, device="cuda") for size in (5000, 3)])
    gradients = [torch.randn_like(p) for p in lists.parameters]
    start = lists.values()
    with torch.cuda.stream(torch.cuda.Stream()):
        lists.step(adam_, gradients, BETAS[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lists.step(adam_, gradients, BETAS[0])
    torch.cuda.synchronize()
    for value, before in zip([*lists.parameters, *lists.means, *lists.squares, *lists.steps], start, strict=True):
        value.copy_(before)
    for _ in range(3):
        for gradient in gradients:
            gradient.normal_()
        want = lists.exact(gradients, BETAS[0])
        graph.replay()
        assert_near(lists.values(), want)
