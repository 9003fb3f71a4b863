"""Our own files: exact, small where asked, never half-written; and the hash that recognises a network."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import SMALL, same_tensors, small_network

from clone_fast.checkpoints import load_generator, load_network, network_hash, save_network
from clone_fast.errors import CheckpointError, OutputError


def test_native_round_trip(tmp_path: Path) -> None:
    written = small_network(replace(SMALL, mbstd_group_size=None, conv_clamp=None))
    written.metadata = {"command": "train --seed 0", "images": "24 million, \u00e9"}
    written.directions = {"smile": torch.randn(SMALL.w_dim), "pose.yaw": torch.randn(SMALL.w_dim)}
    path = tmp_path / "new" / "folder" / "network.safetensors"
    save_network(written, path)
    read = load_network(path)
    assert (read.arch, read.discriminator.arch, read.metadata) == (
        written.arch,
        written.arch,
        written.metadata,
    )
    assert read.directions.keys() == written.directions.keys()
    assert all(torch.equal(read.directions[name], value) for name, value in written.directions.items())
    for name in ("generator", "discriminator", "generator_raw"):
        assert same_tensors(getattr(read, name), getattr(written, name))
    save_network(read, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # nothing is left aside


def test_native_keeps_two_architectures(tmp_path: Path) -> None:
    written = small_network()
    written.discriminator = small_network(replace(SMALL, conv_clamp=9.0, channel_max=20)).discriminator
    save_network(written, tmp_path / "network.safetensors")
    read = load_network(tmp_path / "network.safetensors")
    assert (read.arch, read.discriminator.arch) == (SMALL, written.discriminator.arch)
    assert same_tensors(read.discriminator, written.discriminator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_native_half_storage(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    written = small_network()
    path, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    save_network(written, path, dtype=dtype)
    save_network(written, full)
    assert path.stat().st_size < 0.65 * full.stat().st_size
    read = load_generator(path)
    for name, value in written.generator.state_dict().items():
        stored = read.state_dict()[name]
        assert stored.dtype == torch.float32
        torch.testing.assert_close(stored, value, rtol=tolerance if value.ndim >= 2 else 0, atol=1e-7)


def test_native_refuses_what_the_dtype_cannot_hold(tmp_path: Path) -> None:
    network = small_network(raw=False)
    network.generator.mapping.fc0.weight[0, 0] = 1e6
    with pytest.raises(
        CheckpointError, match=r"generator\.mapping\.fc0\.weight is not finite as torch\.float16"
    ):
        save_network(network, tmp_path / "network.safetensors", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype must be float32, float16 or bfloat16, got torch\.float64"):
        save_network(network, tmp_path / "network.safetensors", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.safetensors"
    save_network(small_network(raw=False), path)
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clone_fast.files.os.replace", full_disk)
    with pytest.raises(OutputError, match="cannot be written \\(No space left on device\\)"):
        save_network(small_network(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_network_hash_depends_on_the_generator_alone() -> None:
    network = small_network()
    value = network_hash(network)
    assert re.fullmatch("[0-9a-f]{64}", value)
    network.discriminator = network.generator_raw = None
    network.metadata["a"] = "b"
    assert network_hash(network) == value
    network.generator.synthesis.b16.conv0.noise_const[3, 5] += 1
    assert network_hash(network) != value


def test_network_hash_is_stable() -> None:
    """A value from the past: files written by an older version must still be recognised."""
    network = small_network(replace(SMALL, img_resolution=8), raw=False)
    for index, value in enumerate(network.generator.state_dict().values()):
        value.fill_(index / 64)
    assert network_hash(network) == "e4829545c802ba885546bec6e9b72bbd39b4d4d26dc95afacb915a5a241ce328"
