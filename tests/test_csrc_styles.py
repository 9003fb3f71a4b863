"""csrc/styles.cu without a GPU: the same source compiled for the CPU, below its leaf, on small networks."""

from __future__ import annotations

from random import Random
from types import ModuleType
from typing import Any

import emulated as emulation
import pytest
import torch
from spec_leaf import styles_backward
from torch import Tensor

from clone_fast.reference.styles import styles

GAIN = 0.37


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return emulation.extension("styles", tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def leaf(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, nan_empty: None) -> Any:
    """clone_fast/cuda/styles.py on it."""
    return emulation.leaf("styles", emulated, monkeypatch)


def check(leaf: Any, ws: Tensor, rows: list[int], reads: list[int]) -> None:
    """Forward and every choice of gradients, against float64."""
    pick = Random(str((ws.shape, rows)))
    n, _, w_dim = ws.shape
    weights, biases = [torch.randn(c, w_dim) for c in rows], [torch.randn(c) for c in rows]
    factors = [pick.choice([1.0, 0.3, -2.0]) for _ in rows]
    options = (reads, GAIN, factors)
    grads = [pick.choice([torch.randn(n, c), torch.randn(n, c + 3)[:, 3:], torch.randn(c, n).t()]) for c in rows]

    def exact(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.double() for tensor in tensors]

    assert leaf.supports(ws, weights, biases, *options) is None
    pairs = [(leaf.launch(ws, weights, biases, *options), styles(ws.double(), exact(weights), exact(biases), *options))]
    for flags in (True, False), (False, True), (True, True):
        got = leaf.launch_backward(ws, grads, weights, *options, *flags)
        want = styles_backward(ws.double(), exact(grads), exact(weights), *options, *flags)
        pairs += [([got[0]], [want[0]]), (got[1], want[1]), (got[2], want[2])]
    for got, want in pairs:
        for one, other in zip(got, want, strict=True):
            assert one.is_contiguous()
            largest = other.abs().max().item() if other.numel() else 0
            torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-6 * largest)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9])
def test_batches(leaf: Any, n: int) -> None:
    check(leaf, torch.randn(n, 4, 20), [5, 33, 16, 1], [0, 1, 1, 3])


@pytest.mark.parametrize("w_dim", [6, 132, 516, 1028])
def test_sizes(leaf: Any, w_dim: int) -> None:
    check(leaf, torch.randn(2, 3, w_dim), [40, 3, 17], [2, 0, 2])


def test_latents_that_lie_otherwise(leaf: Any) -> None:
    for ws in (
        torch.randn(2, 1, 16).expand(-1, 3, -1),
        torch.randn(16, 3, 2).permute(2, 1, 0),
        torch.randn(2, 3, 20)[:, :, 4:],
        torch.randn(2, 3, 17)[:, :, 1:],
        torch.randn(16).as_strided((1, 1, 16), (5, 3, 1)),
    ):
        check(leaf, ws, [9, 2], [0, ws.shape[1] - 1])


def test_many_layers(leaf: Any) -> None:
    pick = Random(0)
    check(leaf, torch.randn(1, 5, 8), [2] * 48, [pick.randrange(5) for _ in range(48)])
    weights = [torch.zeros(1, 8)] * 49
    assert leaf.supports(torch.zeros(1, 1, 8), weights, weights, [0] * 49, 1.0, [1.0] * 49) == (
        "takes up to 48 layers, got 49"
    )


def test_what_the_launchers_refuse(leaf: Any, emulated: ModuleType) -> None:
    """What would read or write elsewhere."""
    given = {"n": 1, "latents": 2, "width": 8, "ws": 0, "sample_stride": 16, "latent_stride": 8, "gain": 1.0}
    given |= {"rows": [3], "reads": [1], "factors": [1.0]}
    for changed, message in (
        ({"reads": [2]}, "styles: a layer reads no latent"),
        ({"rows": [3] * 49, "reads": [0] * 49, "factors": [1.0] * 49}, "styles: takes 1 to 48 layers"),
        ({"latent_stride": 9}, "styles: wants latents on 16 bytes"),
        ({"width": 7}, "styles: wants latents on 16 bytes"),
        ({}, "styles: wants a pointer for every layer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.styles(emulated.Styles(**given | changed), [], [], [], 0)
    with pytest.raises(RuntimeError, match="styles: wants a place for its gradients"):
        emulated.styles_backward(emulated.Styles(**given), [0], [0], [3], [], [], 0, 0, 0)
