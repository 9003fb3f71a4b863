"""The main job: photo -> latent -> tweak -> Inversion."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clone_fast import metrics
from clone_fast.checkpoints import load_network, require_discriminator
from clone_fast.edit import pca_directions
from clone_fast.errors import SettingsError
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent, LatentSettings, Search, optimise
from clone_fast.losses import Similarity
from clone_fast.nn import Generator, Network, settled
from clone_fast.photo import load_photo
from clone_fast.photo import real_images as load_real_images
from clone_fast.progress import Progress
from clone_fast.rehearsal import rehearse_inversion
from clone_fast.stepwise import Steps, drain, stepwise
from clone_fast.stills import Stills
from clone_fast.tweak import Tweak, TweakSettings, tweak, usable

DRIFT_SAMPLES = 64

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Opened:
    """A network on its device, for one photo after another.

    Attributes:
        network: read and moved; its weights must stay as they are.
        name: what results call it.
        directions: named directions of W: the file's, or those of `pca_directions`.
        stills: draws what is drawn between the stages and after them.
        searches, tweaks: where the work of an ended photo waits for the next one with the same options; without these
            lists every photo begins with work, and graphs, of its own.
    """

    network: Network
    name: str
    directions: dict[str, Tensor]
    stills: Stills
    searches: list[Search] | None = None
    tweaks: list[Tweak] | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.stills.device


@stepwise
def invert(
    photo: Any,
    network: StrPath | Network | Generator | Opened | None = None,
    *,
    discriminator: StrPath | None = None,
    space: str | None = None,
    latent: Latent | Tensor | None = None,
    latent_steps: int | None = None,
    steps: int | None = None,
    mode: str | None = None,
    target_psnr: float | None = None,
    precision: str | None = None,
    recompute: bool | None = None,
    real_images: StrPath | Tensor | None = None,
    label: int | None = None,
    resize: str = "crop",
    crop: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    similarity: Similarity | None = None,
    latent_settings: LatentSettings | None = None,
    tweak_settings: TweakSettings | None = None,
    progress: Progress | None = None,
) -> Steps[Inversion]:
    """Find a latent for a photo, then tweak the generator locally until it draws that photo.

    Feng et al. 2022, "Near Perfect GAN Inversion" (arXiv 2202.11833). The network that is given stays as it is; the
    result holds tweaked copies. The same seed gives the same result on one machine.

    Args:
        photo: a path, a PIL image, an array [H, W, 3] (uint8, or float in [0, 1]) or a tensor [3, H, W] (uint8, or
            float in [-1, 1]); brought to the network's resolution, see `clone_fast.photo.load_photo`.
        network: a file (ours, NVIDIA's .pkl, rosinality's .pt), a loaded `Network` or a `Generator`; None for the demo
            network that comes with the package. With what `open_network` gives, the work and the graphs of one photo
            serve the next.
        discriminator: a file to take the discriminator from, where the network's has none.
        space: "w+" or "w", where the latent is searched.
        latent: start the search there, or with latent_steps=0 use it as it is.
        latent_steps, steps: of the search and of the tweak.
        mode: "clone", the method, or "recon", reconstruction alone.
        target_psnr: stop the tweak as soon as the clone is that near, in dB.
        precision: what the networks compute in, in both stages: "fp32", "tf32", "bf16" or "fp16"; by default bf16 on a
            GPU that has it, elsewhere tf32, which on a CPU is float32.
        recompute: save memory in both stages, see `TweakSettings`.
        real_images: a folder of photos, or a tensor [N, 3, R, R], for the global term; by default the frozen original
            generator draws them.
        label: class of the photo, for a class-conditional network.
        resize: "crop" the centre of a photo that is not square, or "pad" it.
        crop: (left, top, size) of a square in the photo's own pixels, instead.
        device: by default that of an opened network, or else the GPU if there is one.
        seed: of everything that is random.
        similarity: a loss (image, photo) -> scalar of one's own for the tweak.
        latent_settings, tweak_settings: everything else; the arguments above take precedence.
        progress: progress(stage, step, total, loss, psnr), called every few steps.

    Returns:
        An `Inversion`. Ctrl-C ends a stage with the best so far, and settings["interrupted"] says so.

    Raises:
        PhotoError, CheckpointError, SettingsError: the photo, the network or a setting cannot be used.
        DivergenceError: the loss was not finite from the first step on.
    """
    seconds: dict[str, float] = {}
    both = {"precision": precision, "recompute": recompute}
    search = override(latent_settings or LatentSettings(), space=space, steps=latent_steps, **both)
    settings = override(
        tweak_settings or TweakSettings(), steps=steps, mode=mode, target_psnr=target_psnr, **both
    )
    where = device_for(network, device)
    search, settings = settled(search, where), settled(settings, where)
    with _clock(seconds, "load", where):
        opened = open_network(network, discriminator, device=where, keep=False)
        generator, judge = opened.network.generator, opened.network.discriminator
        others, labels = read_real_images(real_images, generator), one_hot(label, generator, where)
        if settings.adversarial:  # what is missing is told before the search of the latent, not after it
            judge = usable(require_discriminator(opened.network, opened.name), generator, settings, labels, others)
        target = load_photo(photo, generator.img_resolution, resize=resize, crop=crop).to(where)
        start = None if latent is None else Latent.of(latent, generator)
        given: dict[str, Any] = {"real_images": others, "label": labels, "similarity": similarity}
        rehearse_inversion(generator, judge, target, search, settings, opened.stills, start=start, **given)
        _let_go(opened.searches, lambda work: work.serves(search, start))
        _let_go(opened.tweaks, lambda work: work.serves(settings, **given))
    draw = opened.stills.draw
    with _clock(seconds, "latent", where):
        found = yield from optimise.steps(
            generator, target, search, start=start, seed=seed, progress=progress, spare=opened.searches, draw=draw
        )
    with _clock(seconds, "tweak", where):
        tweaked = yield from tweak.steps(
            generator,
            judge,
            found.latent,
            target,
            settings,
            **given,
            seed=seed,
            progress=progress,
            interrupted=found.interrupted,
            spare=opened.tweaks,
        )
    inversion = Inversion(
        photo=target,
        image=tweaked.latent.picture(tweaked.generator, draw),
        latent_only=found.latent.picture(generator, draw),
        latent=tweaked.latent,
        found=found.latent,
        generator=tweaked.generator,
        discriminator=tweaked.discriminator,
        original=generator,
        original_discriminator=judge,
        directions=dict(opened.directions),
        history=[{"stage": float(i), **row} for i, rows in enumerate((found.rows, tweaked.rows)) for row in rows],
        seconds=seconds,
        settings={
            "network": opened.name,
            "mode": settings.mode,
            "steps": tweaked.steps,
            "stopped": tweaked.stopped,
            "slowed": tweaked.slowed,
            "interrupted": found.interrupted or tweaked.stopped == "interrupted",
            "seed": seed,
            "device": str(where),
            "latent": asdict(search),
            "tweak": asdict(settings),
        },
    )
    with _clock(seconds, "metrics", where):
        measured = None
        while measured is None:
            measuring = measure.steps(inversion, stills=opened.stills)
            try:  # without a pause after Ctrl-C, which others are to hear of at once
                measured = drain(measuring) if inversion.settings["interrupted"] else (yield from measuring)
            except torch.OutOfMemoryError:
                if not any([_let_go(opened.searches), _let_go(opened.tweaks)]):
                    raise
        inversion.metrics = measured
    return inversion


@stepwise
def measure(
    inversion: Inversion, *, drift_samples: int = DRIFT_SAMPLES, stills: Stills | None = None
) -> Steps[dict[str, float | None]]:
    """Fidelity, cohesion and editability of an inversion whose original generator is at hand.

    Args:
        drift_samples: random latents that drift is measured on.
        stills: of the original networks, to draw with.

    Returns:
        "psnr", "ssim", "ms_ssim" of the clone, "latent_psnr", "latent_ssim" of the latent alone; "drift_psnr",
        "drift_ssim" and with a discriminator "drift_frechet"; "editability". See `clone_fast.metrics`.
    """
    others: dict[str, float | None] = {}
    before, after, found = inversion.original, inversion.generator, inversion.found
    if before is not None and found is not None:
        stills = stills or Stills(before, inversion.original_discriminator)
        features = None if inversion.original_discriminator is None else stills.features
        others |= yield from metrics.drift.steps(before, after, n=drift_samples, features=features, draw=stills.draw)
        chosen = dict(list(inversion.directions.items())[:8])
        noise: dict[str, Any] = {"noise": inversion.latent.noise, "noise_before": found.noise}
        others["editability"] = yield from metrics.editability.steps(
            before, after, found.ws, chosen, **noise, draw=stills.draw
        )
    fidelity = {  # last, since it is read at once
        "psnr": metrics.psnr(inversion.image, inversion.photo),
        "ssim": metrics.ssim(inversion.image, inversion.photo),
        "ms_ssim": metrics.ms_ssim(inversion.image, inversion.photo),
        "latent_psnr": metrics.psnr(inversion.latent_only, inversion.photo),
        "latent_ssim": metrics.ssim(inversion.latent_only, inversion.photo),
    }
    return fidelity | others


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device of this name, checked to be there; None or "auto" for the GPU if there is one, else the CPU.

    Raises:
        SettingsError: it is unknown or not there.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {str(device)!r} cannot be used: {reason}; use auto, cpu or cuda") from error
    return chosen


def device_for(network: Any, device: torch.device | str | None) -> torch.device:
    """`choose_device`, but where an opened network is.

    Raises:
        SettingsError: likewise, or it is elsewhere.
    """
    if not isinstance(network, Opened):
        return choose_device(device)
    asked = network.device if device is None else choose_device(device)
    if asked.type != network.device.type or asked.index not in (None, network.device.index):
        raise SettingsError(f"device {str(device)!r}: the network was opened on {network.device}")
    return network.device


@contextmanager
def _clock(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # not the device, where other photos may be under way
    seconds[stage] = time.perf_counter() - began


def override(settings: Any, **values: Any) -> Any:
    """The settings with the values that are not None in place of theirs."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def _let_go(waiting: list[Any] | None, serves: Callable[[Any], bool] = lambda work: False) -> bool:
    """Give back the memory of the work that waits, but of what serves; whether there was any."""
    found = waiting or []
    kept = [work for work in found if serves(work)]
    gone = len(kept) < len(found)
    found[:] = kept
    return gone


def open_network(
    network: StrPath | Network | Generator | Opened | None = None,
    discriminator: StrPath | None = None,
    *,
    device: torch.device | str | None = None,
    keep: bool = True,
) -> Opened:
    """The network on the device, for one photo after another: `invert` takes it in place of a file.

        network = open_network("ffhq.pkl")
        for photo in photos:
            invert(photo, network).save(...)

    Args:
        network, discriminator, device: as of `invert`. One that is open stays as it is.
        keep: leave the work of a photo to the next one with the same options, which then begins at once: on a GPU that
            takes as much memory as an iteration of search and tweak, until this object is gone.

    Raises:
        CheckpointError, SettingsError: the network or the device cannot be used.
    """
    where = device_for(network, device)
    if isinstance(network, Opened):
        if discriminator is not None:
            raise SettingsError("discriminator: the network is open already; give both to open_network")
        return network
    if isinstance(network, Generator):
        network = Network(network)
    if network is None:
        from clone_fast.demo import DEMO_NETWORK  # imported here: the demo stands beside the main job, not below it

        path, name = DEMO_NETWORK, "demo"
    elif isinstance(network, Network):
        path, name = None, network.metadata.get("name", "network")
    else:
        path, name = Path(network), str(network)
    net = network if isinstance(network, Network) else load_network(path or name, discriminator=discriminator)
    if isinstance(network, Network) and discriminator is not None:
        raise SettingsError("discriminator: give it inside the Network, or give files for both")
    net = net.to(where)
    directions = net.directions or pca_directions(net.generator)
    opened = Opened(net, name, directions, Stills(net.generator, net.discriminator))
    return replace(opened, searches=[], tweaks=[]) if keep else opened


def read_real_images(given: StrPath | Tensor | None, generator: Generator) -> Tensor | None:
    """x of the global term, [N, C, R, R]: the photos of a folder, or a tensor that is checked; None for none."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        wanted = (generator.img_channels, generator.img_resolution, generator.img_resolution)
        if given.ndim != 4 or tuple(given.shape[1:]) != wanted or not len(given) or not given.is_floating_point():
            got = f"{given.dtype} {list(given.shape)}"
            raise SettingsError(f"real_images must be float [N, {wanted[0]}, {wanted[1]}, {wanted[2]}], got {got}")
        return given.float()
    return load_real_images(given, generator.img_resolution)


def one_hot(label: int | None, generator: Generator, device: torch.device) -> Tensor | None:
    """[1, c_dim] of a class of the generator; None for none.

    Raises:
        SettingsError: it has no such class.
    """
    if label is None:
        return None
    if not generator.c_dim:
        raise SettingsError("this network has no classes; leave the label out")
    if not 0 <= label < generator.c_dim:
        raise SettingsError(f"label must be in [0, {generator.c_dim}) for this network, got {label}")
    return torch.eye(generator.c_dim, device=device)[label : label + 1]
