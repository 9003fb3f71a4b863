"""The precisions that networks run in: what convolutions compute in, and whether float32 may be rounded to TF32.

Parameters are float32 whatever the precision (master weights, Micikevicius et al. 2018). So are the mapping network,
the styles, the sum of the RGB images, the minibatch standard deviation and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from clone_fast.errors import SettingsError

Settings = TypeVar("Settings", bound=Any)


@dataclass(frozen=True)
class Precision:
    """One of PRECISIONS.

    Attributes:
        name: "bf16", "fp16", "tf32" or "fp32".
        dtype: of activations, and of the weights that convolutions read.
        allow_tf32: whether products of float32 may be rounded to TF32 (10 bits of mantissa) on a GPU. Not in bf16 and
            fp16: what is left in float32 there is left so to be exact, and is small.
        loss_scale: what losses are multiplied by at first, so that gradients of activations stay within the range of
            the dtype (Micikevicius et al. 2018, section 3.2); 1 where that is wide enough.
    """

    name: str
    dtype: torch.dtype
    allow_tf32: bool
    loss_scale: float = 1.0

    @staticmethod
    def named(name: str | None) -> Precision:
        """The one of this name; of None, where `settled` has not decided yet, that of a CPU.

        Raises:
            SettingsError: there is none.
        """
        if name is None:
            name = "tf32"
        if name not in PRECISIONS:
            raise SettingsError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
        return PRECISIONS[name]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Allow or forbid TF32 inside the `with` block, in forwards and backwards alike; then as it was before."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = self.allow_tf32
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def preferred(device: torch.device) -> str:
    """The precision that a device is given where none is asked for: half the time of TF32 at a PSNR within 0.3 dB of
    float32's (the README's table of precisions), where the hardware has it.
    """
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "bf16" if bf16 else "tf32"


def settled(settings: Settings, device: torch.device) -> Settings:
    """The settings (a dataclass) with the name of the precision that None stands for on this device."""
    return settings if settings.precision is not None else replace(settings, precision=preferred(device))


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", torch.bfloat16, False),
        Precision("fp16", torch.float16, False, loss_scale=64.0),
        Precision("tf32", torch.float32, True),
        Precision("fp32", torch.float32, False),
    )
}
