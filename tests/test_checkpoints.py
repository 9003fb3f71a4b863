"""Every family of files gives the network that was written, and round trips are exact."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    SMALL,
    draw,
    nvidia_dict,
    persistent,
    same_tensors,
    small_network,
    write_pickle,
    write_torch,
)

from clone_fast.checkpoints import (
    keymap,
    load_generator,
    load_network,
    network_hash,
    save_network,
    save_rosinality,
)
from clone_fast.errors import CheckpointError
from clone_fast.nn import Discriminator, Generator, Network

FULL = replace(
    SMALL, img_resolution=64, z_dim=32, w_dim=32, channel_base=16384, channel_max=512, conv_clamp=None
)


def write_rosinality(network: Network, path: Path, *, keep: tuple[str, ...] = (), **extra: Any) -> Path:
    """A rosinality file of a small network; `keep` names the entries to keep, `extra` are more of them."""
    save_rosinality(replace_clamp(network), path, strict=False)
    content = torch.load(path, weights_only=True)
    content = {name: value for name, value in content.items() if not keep or name in keep}
    return write_torch(content | extra, path)


def replace_clamp(network: Network) -> Network:
    """The same network without a clamp, which rosinality's files cannot state."""

    def unclamped(module: Any) -> Any:
        made = type(module)(replace(module.arch, conv_clamp=None))
        made.load_state_dict(module.state_dict())
        return made.eval()

    raw = None if network.generator_raw is None else unclamped(network.generator_raw)
    discriminator = None if network.discriminator is None else unclamped(network.discriminator)
    return Network(unclamped(network.generator), discriminator, generator_raw=raw)


# --- NVIDIA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nvidia_pickle_gives_each_of_its_networks(tmp_path: Path, protocol: int) -> None:
    written = small_network()
    path = write_pickle(nvidia_dict(written), tmp_path / "network.pkl", protocol)
    read = load_network(path)
    assert read.arch == SMALL
    assert read.discriminator is not None
    assert read.generator_raw is not None
    assert same_tensors(read.generator, written.generator)  # G_ema, not G
    assert same_tensors(read.generator_raw, written.generator_raw)
    assert same_tensors(read.discriminator, written.discriminator)
    assert not same_tensors(read.generator, read.generator_raw)
    assert read.metadata == {"source_format": "NVIDIA pickle", "source_file": "network.pkl"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
def test_module_saved_whole(tmp_path: Path, zipped: bool, dtype: torch.dtype | None) -> None:
    written = small_network().generator
    path = write_torch(persistent(written, dtype=dtype), tmp_path / "model.pt", zipped=zipped)
    read = load_generator(path)
    assert {value.dtype for value in read.state_dict().values()} == {torch.float32}
    for name, value in written.named_parameters():
        expected = value if dtype is None else value.to(dtype).to(torch.float32)
        assert torch.equal(read.get_parameter(name), expected)


def test_the_name_of_the_file_does_not_matter(tmp_path: Path) -> None:
    written = small_network()
    pickled = write_pickle(nvidia_dict(written), tmp_path / "a.safetensors")
    ours = tmp_path / "b.pkl"
    save_network(written, ours)
    assert same_tensors(load_generator(pickled), load_generator(ours))


def test_strided_tensors(tmp_path: Path) -> None:
    written = small_network().generator
    module = persistent(written)
    for name, value in list(written.named_parameters()):
        if value.ndim == 4:
            last = value.contiguous(memory_format=torch.channels_last)
            module.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(last)
        elif value.ndim == 2:
            holder = torch.zeros(value.shape[1] + 2, 2 * value.shape[0])
            holder[2:, ::2] = value.detach().t()
            module.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(holder[2:, ::2].t())
    path = write_pickle({"G_ema": module}, tmp_path / "network.pkl")
    assert same_tensors(load_generator(path), written)


def test_conditional_network(tmp_path: Path) -> None:
    written = small_network(replace(SMALL, c_dim=5))
    read = load_network(write_pickle(nvidia_dict(written), tmp_path / "network.pkl"))
    assert read.arch.c_dim == 5
    assert same_tensors(read.generator, written.generator)
    assert same_tensors(read.discriminator, written.discriminator)
    label = torch.eye(5)[:3]
    image = draw(written.generator, label)
    assert torch.equal(draw(read.generator, label), image)
    assert torch.equal(read.discriminator(image, label), written.discriminator(image, label))


@pytest.mark.parametrize(
    "change",
    [
        {"conv_clamp": None},
        {"conv_clamp": 100.0},
        {"mbstd_group_size": None},
        {"mbstd_group_size": 32},
        {"mapping_layers": 1},
        {"channel_base": 128, "channel_max": 512},
        {"channel_max": 16},
        {"img_resolution": 8},
        {"img_channels": 1},
    ],
)
def test_architecture_is_read(tmp_path: Path, change: dict[str, Any]) -> None:
    arch = replace(SMALL, **change)
    written = small_network(arch, raw=False)
    read = load_network(write_pickle(nvidia_dict(written), tmp_path / "network.pkl"))
    assert read.arch == arch
    assert read.discriminator.arch == arch
    assert torch.equal(draw(read.generator), draw(written.generator))


def test_networks_are_frozen_in_eval_mode_and_own_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(small_network(), path)
    network, again = load_network(path), load_network(path)
    state = torch.get_rng_state()
    load_network(path)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    for module in (network.generator, network.discriminator):
        assert not module.training
        assert not any(value.requires_grad for value in module.parameters())
    network.generator.mapping.w_avg.zero_()
    network.generator.synthesis.b4.resample_filter.zero_()
    assert not again.generator.mapping.w_avg.eq(0).all()
    assert again.generator.synthesis.b4.resample_filter.sum() == 1
    assert same_tensors(load_generator(path), again.generator)


# --- rosinality ---------------------------------------------------------------------------------------------


def test_rosinality_file_draws_the_same_image(tmp_path: Path) -> None:
    written = replace_clamp(small_network())
    pickled = load_network(write_pickle(nvidia_dict(written), tmp_path / "network.pkl"))
    read = load_network(write_rosinality(written, tmp_path / "network.pt"))
    image, other = draw(pickled.generator), draw(read.generator)
    torch.testing.assert_close(other, image, rtol=0, atol=1e-4 * float(image.max() - image.min()))
    torch.testing.assert_close(read.discriminator(image), pickled.discriminator(image), rtol=0, atol=1e-4)
    assert not torch.equal(draw(read.generator_raw), image)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    """Ours -> NVIDIA pickle -> rosinality -> ours."""
    written = replace_clamp(small_network())
    written.generator_raw.mapping.w_avg.copy_(written.generator.mapping.w_avg)  # rosinality keeps one
    first = load_network(write_pickle(nvidia_dict(written), tmp_path / "network.pkl"))
    save_rosinality(first, tmp_path / "network.pt", strict=False)
    second = load_network(tmp_path / "network.pt")
    save_network(second, tmp_path / "network.safetensors")
    third = load_network(tmp_path / "network.safetensors")
    for name in ("generator", "discriminator", "generator_raw"):
        assert same_tensors(getattr(third, name), getattr(written, name))
        assert getattr(third, name).arch == getattr(written, name).arch
    assert network_hash(third) == network_hash(written)


def test_rosinality_names_and_shapes(tmp_path: Path) -> None:
    """Against the lists of rosinality's own state dicts; with 512-wide latents, as there."""
    listed: dict[str, dict[str, list[int]]] = {}
    for line in (Path(__file__).parent / "data" / "rosinality_64px_keys.txt").read_text().splitlines()[1:]:
        if line.startswith("# "):
            current = listed.setdefault(line[2:], {})
        else:
            name, _, shape = line.partition(" ")
            current[name] = [int(size) for size in re.findall(r"\d+", shape)]
    arch = replace(FULL, z_dim=512, w_dim=512, mapping_layers=8)
    with torch.device("meta"):
        modules = {"generator": Generator(arch), "discriminator": Discriminator(arch)}
    pairs = {"generator": keymap.generator_pairs(64, 8), "discriminator": keymap.discriminator_pairs(64)}
    kernels = {"generator": keymap.generator_kernels(64), "discriminator": keymap.discriminator_kernels(64)}
    for name, module in modules.items():
        ours = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        mapped = {pair.rosinality: list(pair.to_rosinality(ours[pair.nvidia])) for pair in pairs[name]}
        mapped |= {key: [4, 4] for key in kernels[name]}
        assert mapped == listed[name]
        left = set(ours) - {pair.nvidia for pair in pairs[name]}
        assert all(key.endswith("resample_filter") or key == "mapping.w_avg" for key in left)


def test_rosinality_low_pass_sums(tmp_path: Path) -> None:
    save_rosinality(replace_clamp(small_network()), tmp_path / "network.pt", strict=False)
    content = torch.load(tmp_path / "network.pt", weights_only=True)
    sums = {
        part: {float(v.sum()) for k, v in content[part].items() if k.endswith("kernel")}
        for part in ("g_ema", "d")
    }
    assert sums == {"g_ema": {4.0}, "d": {1.0}}


@pytest.mark.parametrize("zipped", [True, False])
def test_trainer_file(tmp_path: Path, zipped: bool) -> None:
    """g, d, g_ema, optimisers, an argparse.Namespace; no latent_avg."""
    written = replace_clamp(small_network())
    content = torch.load(write_rosinality(written, tmp_path / "network.pt"), weights_only=True)
    del content["latent_avg"]
    adam = torch.optim.Adam(written.generator.parameters())
    content |= {"g_optim": adam.state_dict(), "d_optim": {"state": {0: {"step": 1}}, "param_groups": []}}
    content |= {"args": argparse.Namespace(size=16, device=torch.device("cuda", 0), ratio=np.float32(0.5))}
    path = write_torch(content | {"ada_aug_p": 0.0}, tmp_path / "010000.pt", zipped=zipped)
    read = load_network(path)
    assert same_tensors(read.discriminator, written.discriminator)
    assert same_tensors(read.generator_raw.synthesis, written.generator_raw.synthesis)
    z = torch.randn(20_000, SMALL.z_dim)
    mean = written.generator.mapping(z)[:, 0].mean(dim=0).detach()
    torch.testing.assert_close(
        read.generator.mapping.w_avg, mean, rtol=0, atol=0.05 * float(mean.abs().max() + 1)
    )
    assert "10000 samples" in read.metadata["w_avg"]


def test_converter_file_without_discriminator_and_older_noise(tmp_path: Path) -> None:
    written = replace_clamp(small_network())
    content = torch.load(write_rosinality(written, tmp_path / "network.pt", keep=("g_ema", "latent_avg")))
    content["g_ema"] = {f"module.{k}": v for k, v in content["g_ema"].items() if not k.startswith("noises.")}
    read = load_network(write_torch(content, tmp_path / "network.pt"))
    assert read.discriminator is None
    assert read.generator_raw is None
    assert torch.equal(read.generator.mapping.w_avg, written.generator.mapping.w_avg)
    assert torch.equal(
        read.generator.synthesis.b16.conv1.weight, written.generator.synthesis.b16.conv1.weight
    )
    assert read.generator.synthesis.b16.conv1.noise_const.std() > 0.8
    assert "no noises" in read.metadata["noise_const"]


@pytest.mark.parametrize("rows", [1, 6])
def test_decoder_of_an_encoder(tmp_path: Path, rows: int) -> None:
    """pSp, e4e, ReStyle, HyperStyle: state_dict with encoder.* and decoder.*, latent_avg [rows, w_dim], opts."""
    written = replace_clamp(small_network())
    content = torch.load(write_rosinality(written, tmp_path / "network.pt"), weights_only=True)
    state = {f"decoder.{name}": value for name, value in content["g_ema"].items()}
    state |= {"encoder.input_layer.0.weight": torch.randn(4, 3, 3, 3)}
    latent_avg = content["latent_avg"].repeat(rows, 1)
    opts = {"output_size": 16, "exp_dir": Path("x/y"), "start_from_latent_avg": True}
    content = {"state_dict": state, "latent_avg": latent_avg, "opts": opts}
    read = load_network(write_torch(content, tmp_path / "e4e.pt"))
    assert same_tensors(read.generator, written.generator)
    assert read.discriminator is None


def test_bare_state_dict(tmp_path: Path) -> None:
    written = small_network().generator
    path = write_torch(written.state_dict(), tmp_path / "state.pt")
    assert same_tensors(load_generator(path), written)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (replace(SMALL, c_dim=2), "class labels (c_dim 2)"),
        (SMALL, "z_dim 12 other than w_dim 20, 24 channels at 4 px instead of 512"),
        (replace(FULL, img_channels=1), "1 image channels instead of 3"),
        (replace(FULL, channel_base=8192), "256 channels at 32 px instead of 512"),
        (replace(FULL, mbstd_num_channels=2), "2 minibatch features instead of 1"),
    ],
)
def test_what_rosinality_cannot_build_is_refused(tmp_path: Path, arch: Any, message: str) -> None:
    with torch.device("meta"):  # refused before a number is read
        network = Network(Generator(arch), Discriminator(arch))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save_rosinality(network, tmp_path / "network.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channel_base", [16384, 32768])
def test_what_rosinality_can_build_is_written(tmp_path: Path, channel_base: int) -> None:
    network = Network(Generator(replace(FULL, channel_base=channel_base)))
    save_rosinality(network, tmp_path / "network.pt")
    assert load_generator(tmp_path / "network.pt").arch == network.arch


def test_what_rosinality_drops_is_told(tmp_path: Path) -> None:
    network = small_network(replace(SMALL, mbstd_group_size=8))
    with pytest.warns(UserWarning, match="is dropped") as told:
        save_rosinality(network, tmp_path / "network.pt", strict=False)
    assert [str(one.message).partition(": ")[2] for one in told] == [
        "rosinality does not clamp; conv_clamp 256 is dropped",
        "rosinality's minibatch group is 4; 8 is dropped",
    ]


# --- the discriminator of another file ----------------------------------------------------------------------


def test_discriminator_of_another_file(tmp_path: Path) -> None:
    base = small_network()
    tuned = write_torch(persistent(small_network(raw=False).generator), tmp_path / "model.pt")
    read = load_network(tuned, discriminator=write_pickle(nvidia_dict(base), tmp_path / "base.pkl"))
    assert same_tensors(read.discriminator, base.discriminator)
    assert read.discriminator.arch == read.arch
    assert read.metadata["discriminator_file"] == "base.pkl"
    only = write_torch(persistent(base.discriminator), tmp_path / "d.pt")
    assert same_tensors(load_network(tuned, discriminator=only).discriminator, base.discriminator)
