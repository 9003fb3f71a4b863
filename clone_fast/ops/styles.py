"""styles: what every layer of a generator makes of the latent that it reads, for all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.checks import check_number, check_tensor, describe
from clone_fast.ops.dispatch import launch_step, resolve
from clone_fast.ops.registration import Recorded, composite_gradients, register, without_autocast
from clone_fast.reference import styles as spec

__all__ = ["styles"]


def _run(backend: str, *args: Any) -> list[Tensor]:
    found: list[Tensor] = spec.styles(*args) if backend == "reference" else launch_step("styles", "", backend, *args)
    return found


def _run_backward(backend: str, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    found: tuple[Tensor, list[Tensor], list[Tensor]] = launch_step("styles", "backward", backend, *args)
    return found


def _fake_backward(
    ws: Tensor, grads: list[Tensor], weights: list[Tensor], *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *_, want_ws, want_layers = args
    layers = weights if want_layers else []
    return (
        ws.new_empty(ws.shape if want_ws else [0]),
        [weight.new_empty(weight.shape) for weight in layers],
        [weight.new_empty(weight.shape[:1]) for weight in layers],
    )


def _composite(args: tuple[Any, ...], grads: list[Tensor | None], wanted: list[int]) -> list[Any]:
    """Of the reference, by PyTorch's own autograd."""
    ws, weights, biases, *options = args
    count = len(weights)
    used = [i for i, grad in enumerate(grads) if grad is not None]

    def function(ws: Tensor, *both: Tensor) -> list[Tensor]:
        found = spec.styles(ws, both[:count], both[count:], *options)
        return [found[i] for i in used]

    places = [range(1), range(1, count + 1), range(count + 1, 2 * count + 1)]
    flat = iter(
        composite_gradients(
            function,
            (ws, *weights, *biases),
            [place for i in wanted for place in places[i]],
            [grad for grad in grads if grad is not None],
        )
    )
    return [[next(flat) for _ in places[i]] if i else next(flat) for i in wanted]


def _gradients(recorded: Recorded, grads: list[Tensor | None], wanted: list[int]) -> list[Any]:
    """Differentiable again by PyTorch's own autograd, where that is asked for."""
    if recorded.backend == "reference" or torch.is_grad_enabled():
        return _composite(recorded.args, grads, wanted)
    ws, weights, _, reads, weight_gain, factors = recorded.args
    used = [i for i, grad in enumerate(grads) if grad is not None]  # layers of which no one used the styles get None
    dws, *layers = _backward_op(
        ws,
        [grad for grad in grads if grad is not None],
        [weights[i] for i in used],
        [reads[i] for i in used],
        weight_gain,
        [factors[i] for i in used],
        0 in wanted,
        1 in wanted or 2 in wanted,
        recorded.backend,
    )
    found: list[Any] = []
    for position in wanted:
        if position == 0:
            found.append(dws)
        else:
            made = dict(zip(used, layers[position - 1], strict=True))
            found.append([made.get(i) for i in range(len(weights))])
    return found


_OPTIONS = "int[] reads, float weight_gain, float[] factors"

_op = register(
    "styles",
    f"(Tensor ws, Tensor[] weights, Tensor[] biases, {_OPTIONS}) -> Tensor[]",
    run=_run,
    fake=lambda ws, weights, *_: [ws.new_empty([ws.shape[0], weight.shape[0]]) for weight in weights],
    gradients=_gradients,
    differentiable=[0, 1, 2],
)
_backward_op = register(
    "styles_backward",
    f"(Tensor ws, Tensor[] grads, Tensor[] weights, {_OPTIONS}, bool want_ws, bool want_layers) "
    "-> (Tensor, Tensor[], Tensor[])",
    run=_run_backward,
    fake=_fake_backward,
)
_exact = without_autocast(spec.styles)


def styles(
    ws: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    reads: Sequence[int],
    weight_gain: float = 1.0,
    factors: Sequence[float] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """The styles of all layers of a generator, each an affine map of one of its latents (Karras et al. 2020, StyleGAN2,
    section 2): factor * (weight_gain * ws[:, read] W^T + b).

    Args:
        ws: [N, L, w_dim], floating point: L latents for each of N images.
        weights: [C, w_dim] of every layer, C its own, in ws's dtype.
        biases: [C] of every layer, in ws's dtype.
        reads: of every layer, which of the L latents it reads.
        weight_gain: factor of all weights.
        factors: of every layer's result; None for 1 each.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, C] for every layer, new tensors in ws's dtype; differentiable to ws, weights and biases any number of times.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "styles"
    if not isinstance(ws, Tensor) or not ws.is_floating_point():
        raise TypeError(f"{op}: ws must be a floating-point tensor [N, L, w_dim], got {describe(ws)}")
    if ws.ndim != 3 or ws.numel() == 0:
        raise ValueError(f"{op}: ws must be [N, L, w_dim] and not empty, got {describe(ws)}")
    _, latents, w_dim = ws.shape
    weights, biases, reads = list(weights), list(biases), list(reads)
    factors = [1.0] * len(weights) if factors is None else list(factors)
    if not weights or not len(weights) == len(biases) == len(reads) == len(factors):
        raise ValueError(
            f"{op}: weights, biases, reads and factors must be as many, 1 at least, "
            f"got {len(weights)}, {len(biases)}, {len(reads)} and {len(factors)}"
        )
    for i, (weight, bias, read, factor) in enumerate(zip(weights, biases, reads, factors, strict=True)):
        check_tensor(op, f"weights[{i}]", weight, ws, ["C", w_dim], dtype=ws.dtype)
        if weight.shape[0] == 0:
            raise ValueError(f"{op}: weights[{i}] must have 1 row at least, got {describe(weight)}")
        check_tensor(op, f"biases[{i}]", bias, ws, [weight.shape[0]], dtype=ws.dtype)
        if not isinstance(read, int) or not 0 <= read < latents:
            raise ValueError(f"{op}: reads[{i}] must be one of the {latents} latents of ws, got {read!r}")
        check_number(op, f"factors[{i}]", factor)
    check_number(op, "weight_gain", weight_gain)
    args = (weights, biases, reads, float(weight_gain), [float(factor) for factor in factors])
    chosen = resolve(op, backend, ws, *args)
    found: list[Tensor] = _exact(ws, *args) if chosen == "reference" else _op(ws, *args, chosen)
    return found
