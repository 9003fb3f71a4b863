"""Writes checkpoint files as other codebases do, for the tests of the readers.

NVIDIA's persistent objects are imitated with modules of the same names, registered while pickling, so that
the streams ask for the same globals as real files. `_reconstruct_persistent_obj` runs the source text in the
file, as the original does: a test that loads such a file with `pickle` shows that its payload is live.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clone_fast.nn import Architecture, Discriminator, Generator, Network

# small, and every size different, so that a mixed-up axis shows
SMALL = Architecture(
    img_resolution=16, z_dim=12, w_dim=20, channel_base=256, channel_max=24, mapping_layers=3
)


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same module with every parameter and buffer random, but for the low-pass filters."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not name.endswith("resample_filter"):
            spread = 0.2 if name.endswith(("bias", "noise_strength", "w_avg")) else 1.0
            mean = 1.0 if name.endswith("affine.bias") else 0.0
            scale = 100.0 if name.startswith("mapping.fc") and name.endswith("weight") else 1.0
            value.copy_((torch.randn(value.shape, generator=generator) * spread + mean) * scale)
    return module.eval().requires_grad_(False)


def small_network(arch: Architecture = SMALL, *, raw: bool = True) -> Network:
    """A network of this architecture whose G, D and G_ema all differ."""
    generator, other = randomised(Generator(arch), 1), randomised(Generator(arch), 2)
    discriminator = randomised(Discriminator(arch), 3)
    assert isinstance(generator, Generator)
    assert isinstance(other, Generator)
    assert isinstance(discriminator, Discriminator)
    return Network(generator, discriminator, generator_raw=other if raw else None)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> dict[str, Any]:
    exec(meta["module_src"], {})
    return meta


class EasyDict(dict):  # type: ignore[type-arg]
    """dnnlib's dict; only its name matters."""


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


@contextmanager
def nvidia_modules() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util` can be imported within."""
    made = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    made["dnnlib.util"].EasyDict = EasyDict  # type: ignore[attr-defined]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


class Persistent(torch.nn.Module):
    """A module that pickles as one of `persistence.persistent_class` does."""

    def __init__(self, class_name: str, module_src: str, **attributes: Any) -> None:
        super().__init__()
        object.__setattr__(self, "meta", (class_name, module_src))
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        class_name, module_src = self.meta
        state = {name: value for name, value in self.__dict__.items() if name != "meta"}
        meta = {
            "type": "class",
            "version": 6,
            "module_src": module_src,
            "class_name": class_name,
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,), None


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The plain attributes that NVIDIA's class of this name has and the reader may look at; gains are numpy's."""
    kind = type(module).__name__
    found: dict[str, Any] = {}
    for name in ("conv_clamp", "activation", "bias_gain", "resolution", "up", "down"):
        if hasattr(module, name):
            found[name] = getattr(module, name)
    for name in ("weight_gain", "act_gain"):
        if hasattr(module, name):
            found[name] = np.float64(getattr(module, name))
    if kind == "SynthesisLayer":
        found |= {"use_noise": True, "activation": "lrelu"}
    if kind in ("SynthesisBlock", "DiscriminatorBlock", "DiscriminatorEpilogue"):
        found |= {"architecture": "skip" if kind == "SynthesisBlock" else "resnet", "use_fp16": True}
    return found


def persistent(module: torch.nn.Module, module_src: str = "", dtype: torch.dtype | None = None) -> Persistent:
    """One of our modules as the persistent object that NVIDIA's code would have made, with the same tensors."""
    made = Persistent(type(module).__name__, module_src, _init_args=(), **_attributes(module))
    for name, value in module._parameters.items():
        cast = value if value is None or dtype is None else torch.nn.Parameter(value.to(dtype))
        made.register_parameter(name, cast)
    for name, buffer in module._buffers.items():
        made.register_buffer(name, buffer)
    for name, child in module._modules.items():
        if child is not None:
            made.add_module(name, persistent(child, module_src, dtype))
    if isinstance(module, (Generator, Discriminator)):
        sizes = {"channel_base": module.arch.channel_base, "channel_max": module.arch.channel_max}
        made._init_kwargs = {"c_dim": module.arch.c_dim, "synthesis_kwargs": EasyDict(sizes), **sizes}
    if isinstance(module, Discriminator):
        mbstd = Persistent(
            "MinibatchStdLayer", module_src, group_size=module.arch.mbstd_group_size, num_channels=1
        )
        made.get_submodule("b4").add_module("mbstd", mbstd)
    return made


def nvidia_dict(network: Network, module_src: str = "") -> dict[str, Any]:
    """What NVIDIA's training loop pickles."""
    content: dict[str, Any] = {"training_set_kwargs": EasyDict(class_name="training.dataset", xflip=False)}
    modules = {"G": network.generator_raw, "D": network.discriminator, "G_ema": network.generator}
    content |= {
        name: persistent(module, module_src) for name, module in modules.items() if module is not None
    }
    content["augment_pipe"] = Persistent("AugmentPipe", module_src, p=0.5, seed=np.int64(7))
    return content


def write_pickle(content: Any, path: Path, protocol: int = 4) -> Path:
    """As NVIDIA's training loop does: storages go through torch.storage._load_from_bytes."""
    with nvidia_modules():
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_torch(content: Any, path: Path, *, zipped: bool = True) -> Path:
    """As PTI does with a module, rosinality with a dict: torch.save, in either container."""
    with nvidia_modules():
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def load_unsafely(path: Path) -> Any:
    """What the original codebases do with a pickle; runs what it asks for."""
    with nvidia_modules(), path.open("rb") as file:
        return pickle.load(file)


def same_tensors(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules have the same names and bit-equal tensors."""
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def draw(generator: Generator, c: Tensor | None = None) -> Tensor:
    """Three images, truncated and with constant noise, so that every tensor of the network takes part."""
    z = torch.randn(3, generator.z_dim, generator=torch.Generator().manual_seed(4))
    image: Tensor = generator(z, c, truncation_psi=0.7, noise_mode="const")
    return image
