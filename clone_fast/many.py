"""Many photos with one network, results as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from clone_fast.errors import CloneFastError, MemoryLimitError
from clone_fast.inversion import Inversion
from clone_fast.invert import StrPath, _open, choose_device, invert
from clone_fast.nn import Generator, Network


def invert_each(
    photos: Iterable[Any],
    network: StrPath | Network | Generator | None = None,
    *,
    at_once: int | None = None,
    **options: Any,
) -> Iterator[tuple[int, Inversion | CloneFastError]]:
    """Invert each photo, with the network opened once.

    Args:
        photos: each as `invert` takes it; the next one is asked for when there is room for it, not before.
        network: as `invert` takes it.
        at_once: photos to have in hand at a time; so far they go one by one, whatever is asked for.
        options: those of `invert`.

    Yields:
        (index of the photo, its `Inversion` or the error that ended it), as photos finish.

    Raises:
        CheckpointError, SettingsError: the network or the device cannot be used.
    """
    where = choose_device(options.pop("device", None))
    net, source = _open(network, options.pop("discriminator", None), where)
    if not isinstance(network, Network):  # not the caller's: it may bear the name of its file
        net.metadata["name"] = source
    for index, photo in enumerate(photos):
        outcome: Inversion | CloneFastError
        try:
            outcome = invert(photo, net, device=where, **options)
        except CloneFastError as error:
            outcome = error
        except torch.OutOfMemoryError as error:
            outcome = MemoryLimitError(f"the memory of {where} is full: {str(error).splitlines()[0]}")
        yield index, outcome
        del outcome  # before the next photo needs the memory
