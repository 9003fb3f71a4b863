"""Files of other codebases that we cannot load: say what they are, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.errors import CheckpointError

_SHOWN_NAMES = 5


def refuse_foreign(value: Any, source: str) -> NoReturn:
    """Raise the CheckpointError that fits an unpickled value of no family we read."""
    raise CheckpointError(f"{source}: {_what(value)}")


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, dict) else []


def _any_starts(names: Iterable[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _what(value: Any) -> str:
    if not isinstance(value, dict):
        return f"holds a {shown(type(value).__name__)}, not a StyleGAN2 network"
    names = _names(value)
    state = _names(value.get("state_dict"))
    if "params_ema" in value or "params" in value or _any_starts(names, "style_mlp.", "stylegan_decoder."):
        return (
            "a BasicSR or GFPGAN file, whose layer names differ; give the rosinality or NVIDIA file "
            "that it was converted from"
        )
    if _any_starts(state, "encoder.", "module.encoder.") or _any_starts(
        names, "encoder.", "map2style", "input_layer."
    ):
        return (
            "an encoder without a generator; give the StyleGAN2 network that it encodes for, or the "
            "encoder's full checkpoint, which has the generator as its decoder"
        )
    if _any_starts(state, "generator.", "generator_ema.") or _any_starts(names, "generator_ema."):
        return (
            "a file of another toolbox, such as mmgeneration, with other names; give the NVIDIA .pkl instead"
        )
    if "GAN" in value or _any_starts(names, "GAN."):
        return "a lucidrains/stylegan2-pytorch file, a different network that cannot be converted"
    listed = ", ".join(shown(name, 40) for name in names[:_SHOWN_NAMES]) or "nothing"
    return f"not a StyleGAN2 network of a known kind; it holds {listed}"
