"""edit.py: principal directions, their unit, files of directions, and the move itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clone_fast import edit
from clone_fast.errors import SettingsError
from clone_fast.nn import Architecture, Generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    arch = Architecture(img_resolution=16, z_dim=12, w_dim=10, mapping_layers=2, channel_base=128, channel_max=8)
    return Generator(arch).eval().requires_grad_(False)


def w_of(generator: Generator, samples: int, seed: int) -> np.ndarray:
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return generator.mapping(z)[:, 0].double().numpy()


# principal directions


def test_pca_is_that_of_the_singular_values(generator: Generator) -> None:
    w = w_of(generator, 500, seed=3)
    _, singular, rows = np.linalg.svd(w - w.mean(0), full_matrices=False)
    found = edit.pca_directions(generator, n=4, samples=500, seed=3)
    assert list(found) == ["pca1", "pca2", "pca3", "pca4"]
    for i, direction in enumerate(found.values()):
        expected = rows[i] * singular[i] / np.sqrt(499)
        expected = expected * np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(direction.numpy(), expected, rtol=0, atol=1e-5)
        assert direction.dtype == torch.float32
        assert direction.abs().max() == direction.max()  # the sign that was promised


def test_pca_is_one_standard_deviation_long(generator: Generator) -> None:
    w = w_of(generator, 2000, seed=0)
    directions = edit.pca_directions(generator, n=10, samples=2000)
    lengths = [float(d.norm()) for d in directions.values()]
    assert lengths == sorted(lengths, reverse=True)
    for direction in directions.values():
        unit = (direction / direction.norm()).double().numpy()
        assert float(direction.norm()) == pytest.approx((w @ unit).std(ddof=1), rel=1e-3)


def test_pca_repeats_and_depends_on_the_seed(generator: Generator) -> None:
    one, two, other = (edit.pca_directions(generator, 2, 64, seed)["pca1"] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_pca_of_a_class_conditional_generator() -> None:
    arch = Architecture(img_resolution=8, z_dim=6, w_dim=6, c_dim=3, mapping_layers=2, channel_base=64, channel_max=8)
    directions = edit.pca_directions(Generator(arch), n=2, samples=50)
    assert all(bool(torch.isfinite(d).all()) for d in directions.values())


@pytest.mark.parametrize(("n", "samples"), [(0, 100), (11, 100), (2, 1)])
def test_pca_refuses(generator: Generator, n: int, samples: int) -> None:
    with pytest.raises(SettingsError, match=r"must be in 1\.\.10|at least 2"):
        edit.pca_directions(generator, n, samples)


# the unit


def test_standardise_keeps_what_has_the_unit(generator: Generator) -> None:
    directions = edit.pca_directions(generator, n=3, samples=800)
    again = edit.standardise({k: -7 * v for k, v in directions.items()}, generator, samples=800)
    for name, direction in directions.items():
        torch.testing.assert_close(again[name], -direction, rtol=1e-4, atol=1e-6)


def test_standardise_of_one_row_per_layer(generator: Generator) -> None:
    """The same row in every layer moves w as the row alone does."""
    row = torch.randn(10)
    rows = row.expand(generator.num_ws, 10)
    found = edit.standardise({"row": row, "rows": rows}, generator, samples=100)
    torch.testing.assert_close(found["rows"], found["row"].expand_as(rows), rtol=1e-5, atol=0)


def test_standardise_refuses(generator: Generator) -> None:
    with pytest.raises(SettingsError, match=r"'bad'.*\[10\] or \[6, 10\], got \[9\]"):
        edit.standardise({"bad": torch.ones(9)}, generator)
    with pytest.raises(SettingsError, match="does not vary"):
        edit.standardise({"zero": torch.zeros(10)}, generator, samples=20)


# files


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.clone() for k, v in content.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in content.items()})
    elif path.suffix == ".npy":
        np.save(path, content.numpy())
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth"])
def test_files_with_names(tmp_path: Path, suffix: str) -> None:
    content = {"smile": torch.arange(10.0), "age": torch.randn(6, 10), "old": torch.randn(1, 10).double()}
    found = edit.load_directions(saved(tmp_path / f"d{suffix}", content))
    assert set(found) == {"smile", "age", "old"}
    for name, direction in found.items():
        torch.testing.assert_close(direction, content[name].float().squeeze(0), rtol=0, atol=0)
        assert direction.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("shape", [(10,), (1, 10), (6, 10), (1, 6, 10)])
def test_files_with_one_direction(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    content = torch.randn(shape)
    found = edit.load_directions(str(saved(tmp_path / f"smile{suffix}", content)))
    assert list(found) == ["smile"]
    assert torch.equal(found["smile"], content[0] if shape[0] == 1 else content)


def test_whole_numbers_become_floats(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.arange(5))
    assert edit.load_directions(tmp_path / "d.npy")["d"].tolist() == [0, 1, 2, 3, 4]


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (open, ("executed.txt", "w"))  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_nothing_is_executed(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"evil{suffix}"
    array = np.array([Evil()], dtype=object)
    {".npy": np.save, ".npz": np.savez, ".pt": lambda p, _: torch.save(Evil(), p)}[suffix](path, array)
    with pytest.raises(SettingsError, match="evil"):
        edit.load_directions(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SettingsError, match="evil"):
        edit.load_directions(path)
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize("suffix", edit.SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY", b"PK\x03\x04"])
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        edit.load_directions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no directions"),
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.zeros(0), r"got \[0\]"),
        (torch.full((4,), float("nan")), "NaN"),
        (torch.zeros(4, dtype=torch.complex64), "real numbers"),
        ({"a": "text"}, "'a'.*got str"),
        ([torch.zeros(4)], "got list"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        edit.load_directions(saved(tmp_path / "d.pt", content))


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        edit.load_directions(tmp_path / "d.npy")
    with pytest.raises(SettingsError, match=r"\.safetensors, \.npy"):
        edit.load_directions(tmp_path / "d.pkl")


# the move


@pytest.mark.parametrize("shape", [(10,), (1, 10), (6, 10), (1, 6, 10)])
def test_apply(shape: tuple[int, ...]) -> None:
    ws, direction = torch.randn(2, 6, 10), torch.randn(shape)
    kept = ws.clone()
    found = edit.apply(ws, direction, -1.5)
    torch.testing.assert_close(found, kept - 1.5 * direction.reshape(-1, 10), rtol=0, atol=1e-6)
    assert torch.equal(ws, kept)


def test_apply_to_some_layers() -> None:
    ws, direction = torch.randn(1, 6, 10), torch.ones(10)
    moved = edit.apply(ws, direction, 2.0, layers=range(2, 4)) - ws
    assert moved[0, :, 0].round().tolist() == [0, 0, 2, 2, 0, 0]


def test_apply_nothing_is_exact() -> None:
    ws = torch.randn(1, 6, 10)
    assert torch.equal(edit.apply(ws, torch.randn(10), 0.0), ws)
    assert torch.equal(edit.apply(ws, torch.randn(10), 3.0, layers=[]), ws)


@pytest.mark.parametrize(
    ("ws", "direction", "strength", "layers", "message"),
    [
        (torch.zeros(6, 10), torch.zeros(10), 1.0, None, "ws must be"),
        (torch.zeros(1, 6, 10), torch.zeros(9), 1.0, None, r"\[10\] or \[6, 10\], got \[9\]"),
        (torch.zeros(1, 6, 10), torch.zeros(5, 10), 1.0, None, r"got \[5, 10\]"),
        (torch.zeros(1, 6, 10), torch.zeros(10), float("nan"), None, "finite"),
        (torch.zeros(1, 6, 10), torch.zeros(10), 1.0, [6], r"0\.\.5, got 6"),
        (torch.zeros(1, 6, 10), torch.zeros(10), 1.0, [-1], r"0\.\.5, got -1"),
    ],
)
def test_apply_refuses(ws: Tensor, direction: Tensor, strength: float, layers: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        edit.apply(ws, direction, strength, layers)


def test_resolve_direction() -> None:
    directions = {"smile": torch.ones(3), "age": torch.zeros(3)}
    assert edit.resolve_direction("smile", directions) is directions["smile"]
    own = torch.randn(3)
    assert edit.resolve_direction(own, {}) is own
    with pytest.raises(SettingsError, match=r"'simle'; known: age, smile"):
        edit.resolve_direction("simle", directions)
    with pytest.raises(SettingsError, match="known: none"):
        edit.resolve_direction("smile", {})
    with pytest.raises(TypeError, match="got int"):
        edit.resolve_direction(3, directions)  # type: ignore[arg-type]
