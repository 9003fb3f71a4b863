"""Read NVIDIA's networks: pickles of stylegan2-ada-pytorch and stylegan3, and modules saved whole.

A pickle holds a dict with G, D and G_ema; tuning codes such as PTI save one module with `torch.save`. Either
way a module is a `PersistentObject`, whose state has the parameters, buffers and submodules of a torch
module, and plain attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.tensors import LazyTensor
from clone_fast.checkpoints.vetted import TENSORS, PersistentObject
from clone_fast.checkpoints.weights import Contents, Weights
from clone_fast.errors import CheckpointError

_MAX_DEPTH = 16
_MAX_MODULES = 10_000
_TRAINED_CLAMP = 256.0  # of all of NVIDIA's trained networks; a bare state dict does not tell
_LINEAR = ("affine", "embed", "skip", "out")  # layers without an activation
_NAMES = ("G", "D", "G_ema")
Attributes = dict[str, dict[str, Any]]


def is_nvidia(value: Any) -> bool:
    """Whether an unpickled value is one of this family."""
    if _is_module(value):
        return True
    return isinstance(value, dict) and any(_is_module(value.get(name)) for name in _NAMES)


def _is_module(value: Any) -> bool:
    return isinstance(value, PersistentObject) or (
        isinstance(value, dict) and ("synthesis.b4.const" in value or is_alias_free(value))
    )


def is_alias_free(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of StyleGAN3's generator."""
    return any(
        isinstance(name, str) and name.startswith(("synthesis.input.", "synthesis.L0_")) for name in tensors
    )


def read(value: Any, source: str) -> Contents:
    """Contents of a value of which `is_nvidia` holds."""
    if isinstance(value, PersistentObject):
        if value.class_name == "Discriminator":
            return Contents(
                None, partial(discriminator_weights, value, source), metadata=_metadata("module", source)
            )
        return Contents(generator_weights(value, source), metadata=_metadata("module", source))
    if _is_module(value):
        return Contents(generator_weights(value, source), metadata=_metadata("state dict", source))
    found = {name: value[name] for name in _NAMES if value.get(name) is not None}
    best = "G_ema" if "G_ema" in found else "G"
    contents = Contents(None, metadata=_metadata("pickle", source))
    if best in found:
        contents.generator = generator_weights(found[best], f"{source}: {best}")
    if best == "G_ema" and "G" in found:
        contents.generator_raw = partial(generator_weights, found["G"], f"{source}: G")
    if "D" in found:
        contents.discriminator = partial(discriminator_weights, found["D"], f"{source}: D")
    return contents


def _metadata(kind: str, source: str) -> dict[str, str]:
    return {"source_format": f"NVIDIA {kind}", "source_file": source}


def generator_weights(module: Any, source: str) -> Weights:
    """Tensors and attributes of a pickled generator, of which what we do not draw is refused."""
    tensors, attributes, class_name = flatten(module, source)
    if is_alias_free(tensors):
        raise CheckpointError(
            f"{source}: a StyleGAN3 (alias-free) generator; clone_fast inverts with StyleGAN2 networks, "
            "those of stylegan2-ada-pytorch, or of stylegan3 trained with --cfg=stylegan2"
        )
    if "synthesis.b4.const" not in tensors:
        if "b4.const" in tensors:
            raise CheckpointError(
                f"{source}: a synthesis network without its mapping network, as MyStyle saves; give the "
                "generator that it was tuned from"
            )
        raise CheckpointError(f"{source}: a {shown(class_name)}, not a StyleGAN2 generator")
    _check_layers(attributes, "skip", source)
    kwargs = attributes.get("", {}).get("_init_kwargs")
    sizes = (
        kwargs.get("synthesis_kwargs", kwargs) if isinstance(kwargs, dict) else None
    )  # stylegan3 has them flat
    return _weights(tensors, attributes, sizes, source)


def discriminator_weights(module: Any, source: str) -> Weights:
    """Likewise, of a pickled discriminator."""
    tensors, attributes, class_name = flatten(module, source)
    if "b4.out.weight" not in tensors:
        raise CheckpointError(f"{source}: a {shown(class_name)}, not a StyleGAN2 discriminator")
    _check_layers(attributes, "resnet", source)
    weights = _weights(tensors, attributes, attributes.get("", {}).get("_init_kwargs"), source)
    if "b4.mbstd" in attributes:
        group = attributes["b4.mbstd"].get("group_size")
        if group is not None and not (type(group) is int and 1 <= group <= 1 << 16):
            raise CheckpointError(f"{source}: damaged: b4.mbstd.group_size")
        weights.mbstd_group_size = group
    return weights


def _weights(tensors: dict[str, LazyTensor], attributes: Attributes, sizes: Any, source: str) -> Weights:
    weights = Weights(source, tensors, conv_clamp=_conv_clamp(attributes, source))
    for name in ("channel_base", "channel_max"):
        size = sizes.get(name) if isinstance(sizes, dict) else None
        if type(size) is int:
            setattr(weights, name, size)
    return weights


def flatten(module: Any, source: str) -> tuple[dict[str, LazyTensor], Attributes, str]:
    """(tensors by name, attributes by module path, class name) of a persistent object or a state dict."""
    tensors: dict[str, LazyTensor] = {}
    attributes: Attributes = {}
    if isinstance(module, dict):
        for name, value in module.items():
            _add(tensors, name, value, source)
        return tensors, attributes, "state dict"
    if not isinstance(module, PersistentObject):
        raise CheckpointError(f"{source}: a {shown(type(module).__name__)} where a network belongs")
    _walk(module, "", tensors, attributes, source)
    return tensors, attributes, module.class_name


def _add(tensors: dict[str, LazyTensor], name: Any, value: Any, source: str) -> None:
    if value is None:  # a layer without a bias
        return
    if not isinstance(name, str) or not isinstance(value, TENSORS):
        raise CheckpointError(f"{source}: {shown(name)} is a {shown(type(value).__name__)}, not a tensor")
    tensors[name] = value


def _walk(
    module: PersistentObject, path: str, tensors: dict[str, LazyTensor], attributes: Attributes, source: str
) -> None:
    # bounded both ways: a pickle can make a module its own child, or share children at every level
    if path.count(".") >= _MAX_DEPTH or len(attributes) >= _MAX_MODULES:
        raise CheckpointError(f"{source}: refused: modules nested without end")
    prefix = f"{path}." if path else ""
    attributes[path] = {name: value for name, value in module.state.items() if isinstance(name, str)}
    for kind in ("_parameters", "_buffers"):
        for name, value in _named(module, kind, source):
            _add(tensors, prefix + name, value, source)
    for name, child in _named(module, "_modules", source):
        if isinstance(child, PersistentObject):
            _walk(child, prefix + name, tensors, attributes, source)
        elif child is not None:
            raise CheckpointError(f"{source}: {shown(prefix + name)} is no module of StyleGAN2")


def _named(module: PersistentObject, kind: str, source: str) -> list[tuple[str, Any]]:
    values = module.state.get(kind, {})
    if not isinstance(values, dict) or not all(isinstance(name, str) and "." not in name for name in values):
        raise CheckpointError(f"{source}: damaged: a module without names for its {kind[1:]}")
    return list(values.items())


def _check_layers(attributes: Attributes, architecture: str, source: str) -> None:
    """Refuse what has the right shapes but would draw something else."""
    for path, values in attributes.items():
        layer = path.rpartition(".")[2]
        mapping_layer = path.startswith("mapping.fc")
        wanted: dict[str, Any] = {
            "architecture": architecture,
            "activation": "linear" if layer in _LINEAR else "lrelu",
            "use_noise": True,
            "bias_gain": 0.01 if mapping_layer else 1,
        }
        for name, value in wanted.items():
            got = values.get(name, value)
            same = _close(got, value) if name == "bias_gain" else got == value
            if not same:
                told = repr(shown(got)) if isinstance(got, str) else shown(got)
                label = "lr_multiplier" if name == "bias_gain" else name
                raise CheckpointError(
                    f"{source}: {shown(path)} has {label} {told}; only {value!r} is "
                    "supported, that of the published StyleGAN2 networks"
                )


def _close(got: Any, wanted: float) -> bool:
    return isinstance(got, (int, float)) and math.isclose(got, wanted, rel_tol=1e-6)


def _conv_clamp(attributes: Attributes, source: str) -> float | None:
    if not attributes:
        return _TRAINED_CLAMP
    layers = {p: v for p, v in attributes.items() if "conv_clamp" in v and p.rpartition(".")[2] != "skip"}
    found: set[float | None] = set()
    for values in layers.values():
        clamp = values["conv_clamp"]
        if clamp is not None and not (type(clamp) in (int, float) and 0 < clamp < math.inf):
            raise CheckpointError(f"{source}: damaged: conv_clamp")
        found.add(None if clamp is None else float(clamp))
    if len(found) > 1:
        raise CheckpointError(f"{source}: layers with different conv_clamp, which is not supported")
    return found.pop() if found else None
