"""Networks of other codebases that stand in memory as modules: read as their files are, compared with ours, written to.

The module keeps its class, its parameters and their order; only numbers are written, and those in one go. Names and
shapes do not tell what a variant makes of its tensors, so it draws an image, and judges it, before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from clone_fast.checkpoints import keymap, nvidia, rosinality
from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.tensors import HeldTensor
from clone_fast.checkpoints.vetted import PersistentObject
from clone_fast.checkpoints.weights import Weights, architectures, build, differences
from clone_fast.errors import CheckpointError
from clone_fast.nn import Architecture, Discriminator, Generator, Precision

ALIKE = 1e-3
"""How far a module's values may be from ours, as a share of the largest; float32 itself leaves some 1e-5."""

Network = TypeVar("Network", Generator, Discriminator)


@dataclass(frozen=True)
class Counterpart(Generic[Network]):
    """A module of another codebase, and the same network as ours.

    Attributes:
        theirs: the module itself.
        ours: with a copy of its numbers, on its device, frozen, in eval mode.
        dialect: of its family.
    """

    theirs: nn.Module
    ours: Network
    dialect: Dialect

    def updates(self, tweaked: Network) -> list[tuple[Tensor, Tensor]]:
        """(tensor of theirs, its new numbers in its shape) of all that the tweaked network has otherwise than ours."""
        before, held = self.ours.state_dict(), self.theirs.state_dict(keep_vars=True)
        names = self.dialect.names(self.ours)
        changed = {name: value for name, value in tweaked.state_dict().items() if not torch.equal(value, before[name])}
        targets = {name: held[names.get(name, name)] for name in changed}
        return [(target, changed[name].reshape(target.shape)) for name, target in targets.items()]


class Dialect(Protocol):
    """How the modules of a family are read and called. `source` is what messages name one."""

    def generator(self, module: nn.Module, source: str) -> Weights: ...

    def discriminator(self, module: nn.Module, source: str) -> Weights: ...

    def names(self, ours: Generator | Discriminator) -> dict[str, str]:
        """Their names by ours, where they differ."""

    def w(self, module: Any, z: Tensor, c: Tensor | None) -> Tensor:
        """[N, z_dim], [N, c_dim] -> [N, w_dim]."""

    def image(self, module: Any, ws: Tensor) -> Tensor:
        """[N, num_ws, w_dim] -> [N, C, R, R], with constant noise."""

    def logits(self, module: Any, images: Tensor, c: Tensor | None) -> Tensor:
        """[N, C, R, R], [N, c_dim] -> [N, 1]."""


class _Nvidia:
    """stylegan2-ada-pytorch, and stylegan3's StyleGAN2."""

    def generator(self, module: nn.Module, source: str) -> Weights:
        return nvidia.generator_weights(_as_in_a_pickle(module), source)

    def discriminator(self, module: nn.Module, source: str) -> Weights:
        return nvidia.discriminator_weights(_as_in_a_pickle(module), source)

    def names(self, ours: Generator | Discriminator) -> dict[str, str]:
        return {}

    def w(self, module: Any, z: Tensor, c: Tensor | None) -> Tensor:
        w: Tensor = module.mapping(z, c)[:, 0]
        return w

    def image(self, module: Any, ws: Tensor) -> Tensor:
        image: Tensor = module.synthesis(ws, noise_mode="const", force_fp32=True)
        return image

    def logits(self, module: Any, images: Tensor, c: Tensor | None) -> Tensor:
        logits: Tensor = module(images, c, force_fp32=True)
        return logits


class _Rosinality:
    """rosinality/stylegan2-pytorch, and the decoders of what is built on it."""

    def generator(self, module: nn.Module, source: str) -> Weights:
        weights, made_up = rosinality.generator_weights(_held(module), None, source)
        if "noise_const" in made_up:
            raise CheckpointError(f"{source}: has no constant noise (noises.noise_0, ...), so it draws no image twice")
        return weights

    def discriminator(self, module: nn.Module, source: str) -> Weights:
        return rosinality.discriminator_weights(_held(module), source)

    def names(self, ours: Generator | Discriminator) -> dict[str, str]:
        resolution, layers = ours.arch.img_resolution, ours.arch.mapping_layers
        generates = isinstance(ours, Generator)
        pairs = keymap.generator_pairs(resolution, layers) if generates else keymap.discriminator_pairs(resolution)
        return {pair.nvidia: pair.rosinality for pair in pairs}

    def w(self, module: Any, z: Tensor, c: Tensor | None) -> Tensor:
        w: Tensor = module.style(z)
        return w

    def image(self, module: Any, ws: Tensor) -> Tensor:
        image: Tensor = module([ws], input_is_latent=True, randomize_noise=False)[0]
        return image

    def logits(self, module: Any, images: Tensor, c: Tensor | None) -> Tensor:
        logits: Tensor = module(images)
        return logits


def counterparts(
    G: nn.Module, D: nn.Module | None
) -> tuple[Counterpart[Generator], Counterpart[Discriminator] | None]:
    """Both modules, each of either family, with the same networks as ours.

    Raises:
        CheckpointError: one is of no family that we read, is a variant that draws or judges otherwise, is not in
            float32 on one device, or the two do not belong together. Nothing was changed.
    """
    device = _check(G, "G")
    if D is not None and _check(D, "D") != device:
        raise CheckpointError(f"D: must be on the device of G, {device}")
    with torch.autocast(device.type, enabled=False):  # which the caller may be in
        drawn: Dialect = _Rosinality() if rosinality.is_generator(_held(G)) else _Nvidia()
        judged: Dialect = _Rosinality() if D is not None and "final_conv.0.weight" in _held(D) else _Nvidia()
        weights = drawn.generator(G, "G")
        critic = None if D is None else judged.discriminator(D, "D")
        arch, critic_arch = architectures(weights, critic)
        generator = Counterpart(G, _ours(Generator, arch, weights, device), drawn)
        discriminator = None
        if D is not None and critic is not None and critic_arch is not None:
            if found := differences(critic_arch, arch, channels_too=False):
                raise CheckpointError(f"D: does not belong to G: {', '.join(found)}")
            discriminator = Counterpart(D, _ours(Discriminator, critic_arch, critic, device), judged)
        _try_out(generator, discriminator)
    return generator, discriminator


def _ours(kind: type[Network], arch: Architecture, weights: Weights, device: torch.device) -> Network:
    return build(kind, arch, weights).to(device)


@torch.no_grad()
def write_back(updates: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give every tensor its new numbers: all of them in one call, which Ctrl-C cannot come between."""
    pairs = list(updates)
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


def _held(module: nn.Module) -> dict[str, HeldTensor]:
    state = module.state_dict(keep_vars=True)
    return {name: HeldTensor(value) for name, value in state.items() if isinstance(value, Tensor)}


def _as_in_a_pickle(module: nn.Module) -> PersistentObject:
    """The module as the reader of NVIDIA's pickles finds it there."""
    state: dict[str, Any] = dict(vars(module))
    for kind in ("_parameters", "_buffers"):
        tensors: dict[str, Tensor | None] = state[kind]
        state[kind] = {name: None if value is None else HeldTensor(value) for name, value in tensors.items()}
    state["_modules"] = {
        name: None if child is None else _as_in_a_pickle(child) for name, child in module._modules.items()
    }
    return PersistentObject(type(module).__name__, state)


def _check(module: nn.Module, source: str) -> torch.device:
    """The device of a module whose tensors we can tune in place."""
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{source}: must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, DataParallel | DistributedDataParallel):
        raise CheckpointError(f"{source}: give the module inside of the {type(module).__name__}, {source}.module")
    devices = set()
    for name, held in _held(module).items():
        if held.dtype.is_floating_point and held.dtype != torch.float32:
            raise CheckpointError(f"{source}: {shown(name)} is {held.dtype}; float32 is wanted: {source}.float()")
        if held.tensor.is_inference():
            raise CheckpointError(f"{source}: was made under torch.inference_mode, where nothing can be tuned")
        devices.add(held.tensor.device)
    if len(devices) != 1:
        raise CheckpointError(f"{source}: must be on one device, got {', '.join(sorted(map(str, devices))) or 'none'}")
    return devices.pop()


@torch.no_grad()
def _try_out(generator: Counterpart[Generator], discriminator: Counterpart[Discriminator] | None) -> None:
    """Raise unless theirs make of random inputs what ours make: a w for each layer, of these an image, then logits."""
    ours, theirs, dialect = generator.ours, generator.theirs, generator.dialect
    z, c = ours.sample(ours.num_ws, torch.Generator().manual_seed(0))
    with Precision.named("fp32").active():
        ws = ours.mapping(z, c)[:, 0]
        with _called(theirs, "G"):
            mapped = dialect.w(theirs, z, c)
        _alike("G", "maps z to other w", mapped, ws)
        image = ours.synthesis(ws[None])
        with _called(theirs, "G"):
            drawn = dialect.image(theirs, ws[None])
        _alike("G", "draws another image", drawn, image)
        if discriminator is None:
            return
        images, c = torch.cat([image, image.flip(3)]), None if c is None else c[:2]
        with _called(discriminator.theirs, "D"):
            judged = discriminator.dialect.logits(discriminator.theirs, images, c)
        _alike("D", "gives other logits", judged, discriminator.ours(images, c))


@contextmanager
def _called(module: nn.Module, source: str) -> Iterator[None]:
    """For a call as its family is called, in eval mode; then as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of code that is not ours
        kind, reason = shown(type(module).__name__), f"{type(error).__name__}: {shown(error)}"
        raise CheckpointError(f"{source}: a {kind} that cannot be called as others of its family ({reason})") from error
    finally:
        for part, mode in modes:
            part.training = mode


def _alike(source: str, otherwise: str, theirs: Any, ours: Tensor) -> None:
    got = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        raise CheckpointError(f"{source}: a variant that is not known: gives {got} instead of {tuple(ours.shape)}")
    far, size = float((theirs.float() - ours).abs().amax()), float(ours.abs().amax())
    if not far <= ALIKE * size:
        raise CheckpointError(
            f"{source}: a variant that is not known: has the tensors of a StyleGAN2 network, but {otherwise} "
            f"(by {far:.2g} of {size:.2g})"
        )
