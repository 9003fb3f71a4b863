"""The named directions of the demo network: the reader of attributes, and the linear fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from clone_fast.demo import directions
from clone_fast.demo.directions import EDITABLE, AttributeReader, fit_directions, train_reader
from clone_fast.demo.portraits import TABLE
from clone_fast.nn import Generator

CPU = torch.device("cpu")


class Linear:
    """A generator whose "image" is w, correlated, and whose mapping network is a matrix."""

    z_dim, w_dim, num_ws = 24, 24, 3

    def __init__(self) -> None:
        matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) / 3 + torch.eye(24)

        def mapping(z: Tensor) -> Tensor:
            return (z @ matrix + 0.5)[:, None].expand(-1, 3, -1)

        mapping.w_avg = torch.zeros(24)  # type: ignore[attr-defined]
        self.mapping: Any = mapping
        self.synthesis = lambda ws: ws[:, 0]


def test_a_direction_moves_its_attribute_alone_where_all_is_linear() -> None:
    reads = torch.randn(len(EDITABLE), 24, generator=torch.Generator().manual_seed(1))
    generator: Any = Linear()
    reader: Any = lambda w: w @ reads.t() + 2.0  # noqa: E731
    found, explained = fit_directions(generator, reader, samples=4096)
    assert list(found) == list(explained) == list(EDITABLE)
    assert min(explained.values()) > 0.99
    w = generator.mapping(torch.randn(4096, 24, generator=torch.Generator().manual_seed(0)))[:, 0]
    covariance = w.t().cov().double()
    for i, name in enumerate(EDITABLE):
        direction = found[name]
        assert (direction.shape, direction.dtype) == ((24,), torch.float32)
        change = reads @ direction
        others = torch.cat([change[:i], change[i + 1 :]])
        assert change[i] > 0
        assert others.abs().max() < 0.05 * change[i], name
        # one standard deviation of w long: d^T S^-1 d = 1
        length = direction.double() @ torch.linalg.solve(covariance, direction.double())
        assert float(length) == pytest.approx(1, rel=1e-2)


def test_an_attribute_that_w_does_not_decide_is_reported_as_not_explained() -> None:
    reads = torch.randn(len(EDITABLE), 24, generator=torch.Generator().manual_seed(1))

    def read(w: Tensor) -> Tensor:
        values = w @ reads.t()
        values[:, 3] = torch.randn(len(w))
        return values

    generator: Any = Linear()
    reader: Any = read
    _, explained = fit_directions(generator, reader, samples=4096)
    assert explained[EDITABLE[3]] < 0.1
    assert min(value for name, value in explained.items() if name != EDITABLE[3]) > 0.99


def test_the_directions_of_a_generator_are_decided_by_the_seed() -> None:
    torch.manual_seed(0)
    generator, reader = Generator(replace(tiny.arch(16), w_dim=32)), AttributeReader(width=2).eval()
    a, b, c = (fit_directions(generator, reader, samples=64, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in EDITABLE)
    assert not torch.equal(a["yaw"], c["yaw"])
    assert all(value.shape == (32,) and value.isfinite().all() for value in a.values())
    with pytest.raises(ValueError, match=r"w_dim must be >= 17, .* got 16"):
        fit_directions(tiny.network().generator, reader, samples=64)


def test_what_can_be_edited_is_what_the_portraits_have() -> None:
    assert set(EDITABLE) <= set(TABLE)
    assert len(set(EDITABLE)) == len(EDITABLE)


def test_the_reader_learns_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From images that show each attribute as a grey level: it must explain nearly all of their variance."""

    def render(attributes: dict[str, Tensor], resolution: int) -> Tensor:
        values = torch.stack([attributes[name] for name in EDITABLE], dim=1)
        return nn.functional.interpolate(values[:, None, :, None].expand(-1, 3, -1, 8), size=(32, 32))

    monkeypatch.setattr(directions.portraits, "render", render)
    monkeypatch.setattr(directions, "AttributeReader", lambda: AttributeReader(width=8))
    clock = iter(range(10_000))
    monkeypatch.setattr(directions.time, "monotonic", lambda: next(clock))  # a second is an iteration
    reader, explained = train_reader(seconds=60, seed=0, device=CPU, batch=32)
    assert not reader.training
    assert list(explained) == list(EDITABLE)
    assert max(explained.values()) <= 1
    assert sum(explained.values()) / len(explained) > 0.5


def test_the_reader_takes_images_of_any_size() -> None:
    reader = AttributeReader(width=2).eval()
    for size in (64, 128, 32):
        assert reader(torch.zeros(2, 3, size, size)).shape == (2, len(EDITABLE))
