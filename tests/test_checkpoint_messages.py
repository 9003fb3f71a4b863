"""What a user reads when a file is not what was hoped for: what it is, and what to do."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    SMALL,
    Persistent,
    nvidia_dict,
    persistent,
    small_network,
    write_pickle,
    write_torch,
)
from safetensors.torch import save_file

from clone_fast.checkpoints import (
    load_generator,
    load_network,
    require_discriminator,
    save_network,
    save_rosinality,
)
from clone_fast.errors import CheckpointError, OutputError


def refusal(path: Path, **options: Any) -> str:
    """The message of the CheckpointError that loading raises; one line."""
    with pytest.raises(CheckpointError) as raised:
        load_network(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- files that are no checkpoint ---------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 363959\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file; copy or download it again"),
        (LFS, "Git LFS pointer, not the network itself; fetch it with 'git lfs pull'"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Quota", "a web page saved under this name"),
        (b"<html><head>", "open it in a browser and download the file itself"),
        (b"\x1f\x8b\x08\x00", "a gzip file; unpack it first"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image, not a network"),
        (b"hello, world", "neither a pickle nor a torch or safetensors file"),
        (b"\x80", "damaged, truncated or no pickle at all"),
        (b"\x80\x04", "damaged, truncated or no pickle at all"),
        (b"\x80\x04N.", "holds a NoneType, not a StyleGAN2 network"),
        (b"\x80\x09N.", "pickle protocol 9"),
        (b"PK\x03\x04 and no more", "a damaged or truncated torch file"),
        (struct.pack("<Q", 40) + b'{"a":', "a damaged or truncated safetensors file"),
    ],
)
def test_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(content)
    told = refusal(path)
    assert told.startswith("network.pkl: ")
    assert message in told


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pkl") == f"{tmp_path / 'none.pkl'}: no such file"
    assert refusal(tmp_path) == f"{tmp_path}: a directory; give the network file within"
    with pytest.raises(OutputError, match="a directory; give a file name"):
        save_network(small_network(raw=False), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        save_network(small_network(raw=False), tmp_path / "file" / "network.safetensors")


@pytest.mark.parametrize("container", ["pickle", "zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_truncated_file(tmp_path: Path, container: str, kept: float) -> None:
    network, path = small_network(raw=False), tmp_path / "network.pkl"
    if container == "pickle":
        write_pickle(nvidia_dict(network), path)
    elif container == "safetensors":
        save_network(network, path)
    else:
        write_torch(persistent(network.generator), path, zipped=container == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "truncated" in refusal(path)


def test_zip_that_is_no_torch_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.png", b"x")
    assert "a zip file, but not one of torch.save; unpack it" in refusal(tmp_path / "photos.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/code/__torch__.py", b"x")
    assert "a TorchScript archive, which is a program" in refusal(tmp_path / "script.pt")


# --- networks of another kind -------------------------------------------------------------------------------


def test_alias_free_generator(tmp_path: Path) -> None:
    generator = Persistent("Generator", "")
    synthesis = Persistent("SynthesisNetwork", "")
    layer = Persistent("SynthesisLayer", "")
    layer.register_buffer("up_filter", torch.ones(12))
    synthesis.add_module("L0_36_512", layer)
    generator.add_module("synthesis", synthesis)
    path = write_pickle({"G_ema": generator, "D": None, "G": generator}, tmp_path / "stylegan3-r.pkl")
    assert "a StyleGAN3 (alias-free) generator; clone_fast inverts with StyleGAN2 networks" in refusal(path)


def test_tensorflow_pickle(tmp_path: Path) -> None:
    path = tmp_path / "stylegan2-ffhq-config-f.pkl"
    path.write_bytes(b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81}X\x07\x00\x00\x00versionK\x04sb.")
    told = refusal(path)
    assert "a TensorFlow network of StyleGAN or StyleGAN2; convert it with legacy.py" in told
    assert "python legacy.py --source=this.pkl --dest=new.pkl" in told


def test_synthesis_network_alone(tmp_path: Path) -> None:
    path = write_torch(persistent(small_network().generator.synthesis), tmp_path / "mystyle_model.pt")
    assert "a synthesis network without its mapping network, as MyStyle saves" in refusal(path)


def test_another_module(tmp_path: Path) -> None:
    path = write_pickle({"G_ema": Persistent("TriPlaneGenerator", "")}, tmp_path / "eg3d.pkl")
    assert refusal(path) == "eg3d.pkl: G_ema: a TriPlaneGenerator, not a StyleGAN2 generator"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params_ema": {"style_mlp.1.weight": torch.ones(2)}}, "a BasicSR or GFPGAN file"),
        ({"state_dict": {"encoder.input_layer.0.weight": torch.ones(2)}}, "an encoder without a generator"),
        ({"GAN": {"G.blocks.0": torch.ones(2)}, "version": "1.5"}, "a lucidrains/stylegan2-pytorch file"),
        (
            {"state_dict": {"generator_ema.x": torch.ones(1)}},
            "a file of another toolbox, such as mmgeneration",
        ),
        ({"conv.weight": torch.ones(2), "fc.bias": torch.ones(1)}, "it holds conv.weight, fc.bias"),
        ([torch.ones(2)], "holds a list, not a StyleGAN2 network"),
        ({}, "it holds nothing"),
        ({"\x1b[31m\n": 1}, "it holds \\x1b[31m\\n"),
    ],
)
def test_foreign_dicts(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(write_torch(content, tmp_path / "network.pt"))


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    assert "a safetensors file without clone_fast's header" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "its header is no JSON"),
        ("[]", "lacks the format version or the metadata"),
        ({"format_version": 2}, "of format 2, newer than this clone_fast reads; update clone_fast"),
        ({"format_version": 1, "metadata": {"a": 1}}, "lacks the format version or the metadata"),
        ({"format_version": 1, "metadata": {}}, "its header has no architecture"),
        ({"format_version": 1, "metadata": {}, "architecture": {"img_resolution": 24}}, "power of two"),
        ({"format_version": 1, "metadata": {}, "architecture": {"depth": 1}}, "unknown fields"),
        ({"format_version": 1, "metadata": {}, "architecture": {}}, "unexpected tensor 'x'"),
    ],
)
def test_damaged_native_header(tmp_path: Path, header: Any, message: str) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"clone_fast": text})
    if "unexpected" not in message:
        save_file({"generator.x": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"clone_fast": text})
    assert message in refusal(tmp_path / "x.safetensors")


# --- StyleGAN2, but not as we draw it -----------------------------------------------------------------------


def attribute(path: str, name: str, value: Any) -> Callable[[Persistent], None]:
    return lambda module: setattr(module.get_submodule(path), name, value)


def no_torgb(module: Persistent) -> None:
    del module.get_submodule("synthesis.b4").torgb
    del module.get_submodule("synthesis.b4").architecture


def not_square(module: Persistent) -> None:
    module.get_submodule("synthesis.b4").const = torch.nn.Parameter(torch.ones(24, 4, 2))


def other_filter(module: Persistent) -> None:
    module.get_submodule("synthesis.b8.conv0").resample_filter = torch.ones(4, 4) / 16


def haar_filter(module: Persistent) -> None:
    module.get_submodule("synthesis.b8").resample_filter = torch.ones(2, 2) / 4


def renamed(module: Persistent) -> None:
    block = module.get_submodule("synthesis.b8")
    block.add_module("\u202econv9", block._modules.pop("conv1"))


def gap(module: Persistent) -> None:
    module.synthesis.add_module("b64", module.synthesis._modules.pop("b16"))


def integers(module: Persistent) -> None:
    module.mapping.register_buffer("w_avg", torch.ones(20, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            attribute("synthesis.b8", "architecture", "resnet"),
            "architecture 'resnet'; only 'skip' is supported",
        ),
        (no_torgb, "a generator of architecture 'orig', which is not supported; only 'skip' is"),
        (attribute("synthesis.b8.conv0", "activation", "relu"), "synthesis.b8.conv0 has activation 'relu'"),
        (attribute("synthesis.b8.conv1", "use_noise", False), "has use_noise False; only True is supported"),
        (attribute("mapping.fc1", "bias_gain", 0.1), "mapping.fc1 has lr_multiplier 0.1; only 0.01"),
        (attribute("synthesis.b8.conv1", "conv_clamp", 9), "layers with different conv_clamp"),
        (attribute("synthesis.b8.conv1", "conv_clamp", "x"), "damaged: conv_clamp"),
        (attribute("synthesis.b8.conv1", "conv_clamp", float("nan")), "damaged: conv_clamp"),
        (not_square, "draws images that are not square (4x2 at the start, as in StyleGAN-Human)"),
        (other_filter, "synthesis.b8.conv0.resample_filter: a low-pass filter other than [1, 3, 3, 1]"),
        (haar_filter, "synthesis.b8.resample_filter: a low-pass filter other than [1, 3, 3, 1]"),
        (gap, "blocks must be 4, 8, ... up to 8 to 1024 pixels, got 4, 8, 64"),
        (integers, "mapping.w_avg must be floating point, got torch.int64"),
        (attribute("", "synthesis", None), "a Generator, not a StyleGAN2 generator"),
        (attribute("", "mapping", None), "mapping.fc0.weight is missing"),
    ],
)
def test_generator_that_is_not_drawn(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    module = persistent(small_network().generator)
    change(module)
    told = refusal(write_pickle({"G_ema": module}, tmp_path / "network.pkl"))
    assert told.startswith("network.pkl: G_ema: ")
    assert message in told


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    module = persistent(small_network().generator)
    module.get_submodule("synthesis.b16.conv0").bias = torch.nn.Parameter(torch.ones(3))
    module.mapping.register_buffer("x_avg", torch.ones(3))
    del module.mapping.w_avg
    assert refusal(write_pickle({"G_ema": module}, tmp_path / "network.pkl")) == (
        "network.pkl: G_ema: does not fit a 16x16 StyleGAN2 generator; missing: mapping.w_avg; "
        "unexpected: mapping.x_avg; of another shape: synthesis.b16.conv0.bias [3] instead of [16]"
    )
    renamed(module)
    told = refusal(write_pickle({"G_ema": module}, tmp_path / "network.pkl"))
    assert told.isascii()
    assert "synthesis.b8.conv1.weight is missing" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attribute("b8", "architecture", "orig"), "b8 has architecture 'orig'; only 'resnet' is supported"),
        (lambda m: delattr(m.b16, "skip"), "a discriminator of architecture 'orig'"),
        (lambda m: m.b8.add_module("fromrgb", m.b16.fromrgb), "a discriminator of architecture 'skip'"),
        (attribute("b4.mbstd", "group_size", -1), "damaged: b4.mbstd.group_size"),
    ],
)
def test_discriminator_that_is_not_drawn(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    network = small_network()
    module = persistent(network.discriminator)
    change(module)
    path = write_pickle({"G_ema": persistent(network.generator), "D": module}, tmp_path / "network.pkl")
    assert message in refusal(path)
    load_generator(path)  # which does not need it


def test_rosinality_names_that_do_not_fit(tmp_path: Path) -> None:
    network = small_network(replace(SMALL, conv_clamp=None), raw=False)
    save_rosinality(network, tmp_path / "network.pt", strict=False)
    content = torch.load(tmp_path / "network.pt", weights_only=True)

    def told(name: str, value: Any) -> str:
        state = dict(content["g_ema"])
        if value is None:
            del state[name]
        else:
            state[name] = value
        return refusal(write_torch({**content, "g_ema": state}, tmp_path / "changed.pt"))

    start = "changed.pt: g_ema: "
    assert told("to_rgb1.bias", None) == f"{start}does not fit rosinality's StyleGAN2; missing: to_rgb1.bias"
    assert told("extra", torch.ones(1)) == f"{start}does not fit rosinality's StyleGAN2; unexpected: extra"
    assert "to_rgb1.bias has the unexpected shape [3]" in told("to_rgb1.bias", torch.ones(3))
    assert "synthesis.b4.conv1.bias [2] instead of [24]" in told("conv1.activate.bias", torch.ones(2))
    assert "convs.0.conv.blur.kernel: a low-pass filter" in told("convs.0.conv.blur.kernel", torch.ones(4, 4))
    assert told("conv1.noise.weight", 3.0) == f"{start}conv1.noise.weight is a float, not a tensor"
    assert told("to_rgbs.12.bias", torch.ones(3)).startswith(
        f"{start}14 resolutions; a generator has 2 (8 px)"
    )


# --- the discriminator --------------------------------------------------------------------------------------


def test_file_without_discriminator(tmp_path: Path) -> None:
    network = small_network()
    path = write_torch(persistent(network.generator), tmp_path / "model_xyz.pt")
    loaded = load_network(path)
    assert loaded.discriminator is None
    with pytest.raises(CheckpointError) as raised:
        require_discriminator(loaded, path)
    assert str(raised.value) == (
        "model_xyz.pt: holds no discriminator; give the network it was made from as --discriminator base.pkl, "
        "or use --mode recon, which needs none"
    )
    assert require_discriminator(network, path) is network.discriminator
    assert "model_xyz.pt: holds no discriminator either" in refusal(path, discriminator=path)


def test_discriminator_without_generator(tmp_path: Path) -> None:
    path = write_torch(persistent(small_network().discriminator), tmp_path / "d.pt")
    assert "holds no generator, only a discriminator" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_resolution": 32}, "img_resolution 32 instead of 16"),
        ({"c_dim": 3}, "c_dim 3 instead of 0"),
        ({"img_channels": 1}, "img_channels 1 instead of 3"),
        ({"channel_max": 20}, "channels [20, 20, 16] instead of [24, 24, 16]"),
    ],
)
def test_discriminator_of_another_architecture(tmp_path: Path, change: dict[str, int], message: str) -> None:
    path = write_torch(persistent(small_network().generator), tmp_path / "model.pt")
    other = small_network(replace(SMALL, **change), raw=False)
    save_network(other, tmp_path / "base.safetensors")
    told = refusal(path, discriminator=tmp_path / "base.safetensors")
    assert told == f"base.safetensors: its discriminator does not belong to model.pt: {message}"


def test_discriminator_in_the_file_that_does_not_fit(tmp_path: Path) -> None:
    network = small_network()
    network.discriminator = small_network(replace(SMALL, img_resolution=32)).discriminator
    told = refusal(write_pickle(nvidia_dict(network), tmp_path / "network.pkl"))
    assert "its discriminator does not belong to network.pkl: img_resolution 32 instead of 16" in told


def test_a_discriminator_file_that_asks_for_code_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_torch(persistent(small_network().generator), tmp_path / "model.pt")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(print))
    assert refusal(path, discriminator=tmp_path / "d.pkl").startswith(
        "d.pkl: refused: the pickle asks for builtins.print"
    )
