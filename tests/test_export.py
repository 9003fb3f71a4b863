"""Exports: what other codebases load, our readers read, and draws the clone; the pickle's opcodes are the base's."""

from __future__ import annotations

import pickle
import pickletools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from checkpoint_files import (
    SMALL,
    nvidia_dict,
    nvidia_modules,
    persistent,
    randomised,
    same_tensors,
    small_network,
    write_pickle,
    write_torch,
)
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from clone_fast.checkpoints import load_generator, load_network, save_nvidia, save_pti
from clone_fast.errors import CheckpointError, SettingsError
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent
from clone_fast.nn import Architecture, Discriminator, Generator, Network

LIVE = "import builtins; builtins.executed = True"  # the source text that a real pickle brings; harmless, and seen


@pytest.fixture(scope="module")
def done() -> Inversion:
    made = tiny.inverted(tiny.network())
    assert made.latent.noise
    return made


@pytest.fixture
def base(done: Inversion, tmp_path: Path) -> Path:
    assert done.original is not None
    network = Network(done.original, done.original_discriminator, generator_raw=tiny.network(seed=3).generator)
    return write_pickle(nvidia_dict(network, LIVE), tmp_path / "base.pkl")


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Any:
    yield
    assert not hasattr(sys.modules["builtins"], "executed")


def other_network() -> Network:
    generator, discriminator = randomised(Generator(SMALL), 11), randomised(Discriminator(SMALL), 13)
    assert isinstance(generator, Generator)
    assert isinstance(discriminator, Discriminator)
    return Network(generator, discriminator)


class StandIn(nn.Module):
    """What NVIDIA's persistence makes of an object: an instance with the pickled state."""


def reconstruct(meta: dict[str, Any]) -> StandIn:
    made = StandIn()
    made.__dict__.update(meta["state"])
    made.class_name = meta["class_name"]
    return made


@contextmanager
def stand_ins() -> Iterator[None]:
    """`torch_utils.persistence` can be imported within, with a stand-in that does not run the source text."""
    with nvidia_modules():
        module: Any = sys.modules["torch_utils.persistence"]
        module._reconstruct_persistent_obj = reconstruct
        yield


def drawn(module: nn.Module, ws: Tensor, arch: Architecture) -> Tensor:
    """The clone as a tool draws it that knows nothing of us: the module's state, constant noise."""
    generator = Generator(arch)
    generator.load_state_dict(module.state_dict())
    with torch.no_grad():
        image: Tensor = generator.synthesis(ws, noise_mode="const").clamp(-1, 1)
    return image


def opcodes(data: bytes) -> list[tuple[str, Any]]:
    """Without the bytes of storages."""
    found = []
    for code, arg, _ in pickletools.genops(data):
        found.append((code.name, len(arg) if isinstance(arg, bytes) and len(arg) > 16 else arg))
    return found


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_nvidia_pickle_has_the_new_tensors_and_the_old_opcodes(tmp_path: Path, protocol: int) -> None:
    written = other_network()
    base = write_pickle(nvidia_dict(small_network(), LIVE), tmp_path / "base.pkl", protocol)
    before = base.read_bytes()
    save_nvidia(written, tmp_path / "new.pkl", base)
    assert base.read_bytes() == before
    after = (tmp_path / "new.pkl").read_bytes()
    assert after != before
    assert opcodes(after) == opcodes(before)
    read = load_network(tmp_path / "new.pkl")
    assert read.arch == SMALL
    for module in (read.generator, read.generator_raw):
        assert same_tensors(module, written.generator)
    assert same_tensors(read.discriminator, written.discriminator)


def test_nvidia_pickle_draws_the_clone_elsewhere(
    done: Inversion, base: Path, tmp_path: Path
) -> None:
    beside = done.export(tmp_path / "clone.pkl", "nvidia", base=base)
    assert beside == tmp_path / "clone_w.npz"
    ws = torch.from_numpy(np.load(beside)["w"])
    assert ws.shape == (1, done.generator.num_ws, done.generator.w_dim)
    with stand_ins(), (tmp_path / "clone.pkl").open("rb") as file:
        content = pickle.load(file)
    assert {"G", "D", "G_ema"} <= set(content)
    assert all(isinstance(content[name], nn.Module) for name in ("G", "D", "G_ema"))
    for name in ("G", "G_ema"):
        assert torch.equal(drawn(content[name], ws, done.generator.arch), done.image)
    assert done.discriminator is not None
    tiny.assert_state(done.discriminator, {k: content["D"].state_dict()[k] for k in done.discriminator.state_dict()})


def test_without_a_discriminator_that_of_the_base_stays(done: Inversion, base: Path, tmp_path: Path) -> None:
    replace(done, discriminator=None).export(tmp_path / "clone.pkl", "nvidia", base=base)
    read = load_network(tmp_path / "clone.pkl")
    assert same_tensors(read.discriminator, done.original_discriminator)
    assert not same_tensors(read.discriminator, done.discriminator)


def test_dtype_and_strides_of_the_base_stay(tmp_path: Path) -> None:
    written = other_network()
    module = persistent(small_network().generator, dtype=torch.float16)
    shape = written.generator.synthesis.get_parameter("b8.conv0.weight").shape
    holder = torch.zeros(shape[1], shape[0] * 2, 3, 3)
    module.get_submodule("synthesis.b8.conv0").weight = nn.Parameter(holder[:, ::2].transpose(0, 1))
    base = write_pickle({"G_ema": module}, tmp_path / "base.pkl")
    for layer in written.generator.parameters():
        layer.clamp_(-60_000, 60_000)
    with pytest.warns(UserWarning, match="has no G, D, and so the copy has none"):
        save_nvidia(written, tmp_path / "new.pkl", base)
    read = load_generator(tmp_path / "new.pkl")
    for name, value in written.generator.named_parameters():
        want = value if name == "synthesis.b8.conv0.weight" else value.half().float()
        assert torch.equal(read.get_parameter(name), want), name
    written.generator.mapping.get_parameter("fc0.weight").fill_(1e9)
    with pytest.raises(CheckpointError, match=r"mapping\.fc0\.weight is not finite as torch\.float16"):
        save_nvidia(written, tmp_path / "new.pkl", base)


# ---- PTI -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pti_module_is_the_generator_alone(tmp_path: Path, protocol: int) -> None:
    written = other_network()
    base = write_pickle(nvidia_dict(small_network(), LIVE), tmp_path / "base.pkl", protocol)
    save_pti(written, tmp_path / "model.pt", base)
    assert (tmp_path / "model.pt").stat().st_size < 0.4 * base.stat().st_size
    assert same_tensors(load_generator(tmp_path / "model.pt"), written.generator)
    with stand_ins():
        module = torch.load(tmp_path / "model.pt", weights_only=False)
    assert module.class_name == "Generator"
    assert type(module._init_kwargs["synthesis_kwargs"]).__name__ == "EasyDict"
    for name, value in written.generator.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_pti_module_draws_the_clone_elsewhere(done: Inversion, base: Path, tmp_path: Path) -> None:
    beside = done.export(tmp_path / "model.pt", "pti", base=base)
    ws = torch.load(beside)
    with stand_ins():
        module = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(drawn(module, ws, done.generator.arch), done.image)


def test_what_modules_share_is_brought_along(tmp_path: Path) -> None:
    """Strings, names and dtypes that G made and G_ema only refers to; a list that both hold; one tensor in both."""
    network = small_network()
    content = nvidia_dict(network, LIVE)
    shared: list[Any] = [np.float64(2.5), {"deep": ("a", "a"), "size": torch.Size([2])}]
    content["G"].extra, content["G_ema"].extra, content["G_ema"].more = shared, shared, shared[1]
    base = write_pickle(content, tmp_path / "base.pkl")
    save_pti(network, tmp_path / "model.pt", base)
    with stand_ins():
        module = torch.load(tmp_path / "model.pt", weights_only=False)
    assert module.extra == shared
    assert module.extra[1] is module.more


def test_a_generator_that_is_only_referred_to_is_told(tmp_path: Path) -> None:
    content = nvidia_dict(small_network())
    content["G_ema"] = content["G"]
    base = write_pickle(content, tmp_path / "base.pkl")
    with pytest.raises(CheckpointError, match="cannot be rewritten: it has no G_ema of its own"):
        save_pti(small_network(), tmp_path / "model.pt", base)


# ---- rosinality ------------------------------------------------------------------------------------------------------


def test_rosinality_file_draws_the_clone(done: Inversion, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rosinality's StyleGAN2 has no such network"):
        done.export(tmp_path / "clone.pt", "rosinality")
    with pytest.warns(UserWarning, match="does not clamp"):
        beside = done.export(tmp_path / "clone.pt", "rosinality", strict=False)
    content = torch.load(tmp_path / "clone.pt", weights_only=True)
    assert set(content) == {"g_ema", "latent_avg", "d"}
    assert torch.equal(content["latent_avg"], done.generator.mapping.w_avg)
    read = load_generator(tmp_path / "clone.pt")
    picture = Latent(torch.load(beside, weights_only=True)).picture(read)
    torch.testing.assert_close(picture, done.image, rtol=0, atol=1e-5)


def test_exporting_leaves_the_inversion_alone(done: Inversion, base: Path, tmp_path: Path) -> None:
    before = tiny.state(done.generator)
    done.export(tmp_path / "clone.pkl", "nvidia", base=base)
    tiny.assert_state(done.generator, before)


# ---- what cannot be written ------------------------------------------------------------------------------------------


def test_settings_are_checked(done: Inversion, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must be one of rosinality, nvidia, pti"):
        done.export(tmp_path / "a", "tensorflow")
    with pytest.raises(SettingsError, match=r"nvidia needs base: the NVIDIA \.pkl"):
        done.export(tmp_path / "a", "nvidia")
    with pytest.raises(SettingsError, match="rosinality files need no base"):
        done.export(tmp_path / "a", "rosinality", base=base)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("save", [save_nvidia, save_pti])
def test_a_base_that_does_not_serve_is_told(tmp_path: Path, save: Any) -> None:
    network = small_network()

    def refuse(base: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            save(network, tmp_path / "new", base)
        assert not (tmp_path / "new").exists()

    refuse(tmp_path / "nothing.pkl", "no such file")
    refuse(write_pickle(nvidia_dict(network), tmp_path / "two.pkl", 2), "written as text, as pickle protocol 2 does")
    refuse(write_torch(persistent(network.generator), tmp_path / "model.pt"), r"not an NVIDIA \.pkl")
    refuse(write_pickle(persistent(network.generator), tmp_path / "module.pkl"), "not NVIDIA's dict of G, D and G_ema")
    refuse(write_pickle({"D": nvidia_dict(network)["D"]}, tmp_path / "d.pkl"), "holds no generator")
    clamped = small_network(replace(SMALL, conv_clamp=None))
    refuse(write_pickle(nvidia_dict(clamped), tmp_path / "c.pkl"), r"has conv_clamp None, the network 256")
    larger = small_network(replace(SMALL, img_resolution=32))
    refuse(write_pickle(nvidia_dict(larger), tmp_path / "32.pkl"), r"of another architecture .* synthesis\.b32")
    whole = write_pickle(nvidia_dict(network), tmp_path / "whole.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "cut.pkl", "damaged|truncated")


def test_a_harmful_base_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return exec, (LIVE,)

    base = write_pickle({**nvidia_dict(small_network()), "extra": Harm()}, tmp_path / "base.pkl")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        save_pti(small_network(), tmp_path / "new", base)


def test_the_files_of_these_tests_are_live(tmp_path: Path) -> None:
    """The stand-ins above leave the source text alone; the original runs it, so the files would show if we did."""
    base = write_pickle(nvidia_dict(small_network(), LIVE), tmp_path / "base.pkl")
    with nvidia_modules():
        pickle.loads(base.read_bytes())
    assert sys.modules["builtins"].__dict__.pop("executed")
