"""clone_fast: near perfect GAN inversion, fast.

    from clone_fast import invert
    inversion = invert("photo.jpg")
    inversion.save("out")
"""

from __future__ import annotations

from clone_fast._layout import mount_kernels
from clone_fast.checkpoints import load_generator, load_network, save_network
from clone_fast.compat import accelerate, install, installed, uninstall
from clone_fast.errors import CloneFastError
from clone_fast.inversion import Inversion
from clone_fast.invert import invert, open_network
from clone_fast.latent import Latent, LatentSettings
from clone_fast.many import invert_each, invert_many
from clone_fast.nn import Architecture, Discriminator, Generator, Network
from clone_fast.ops import (
    backend,
    bias_act,
    explain,
    laplacian_pyramid,
    laplacian_pyramid_loss,
    modulated_conv2d,
    setup_filter,
    upfirdn2d,
)
from clone_fast.tune import Tuned, tune
from clone_fast.tweak import TweakSettings

mount_kernels()

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "CloneFastError",
    "Discriminator",
    "Generator",
    "Inversion",
    "Latent",
    "LatentSettings",
    "Network",
    "Tuned",
    "TweakSettings",
    "accelerate",
    "backend",
    "bias_act",
    "explain",
    "install",
    "installed",
    "invert",
    "invert_each",
    "invert_many",
    "laplacian_pyramid",
    "laplacian_pyramid_loss",
    "load_generator",
    "load_network",
    "modulated_conv2d",
    "open_network",
    "save_network",
    "setup_filter",
    "tune",
    "uninstall",
    "upfirdn2d",
]
