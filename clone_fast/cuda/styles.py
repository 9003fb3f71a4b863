"""styles on CUDA: all layers in one launch, and their gradients in one or two, by csrc/styles.cu.

Rows that are no multiple of 16 bytes are read from copies with zeros behind, which change no sum: such are small
networks alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import dtype_reason, on_16_bytes, pointer, stream

LAYERS: int = _C.STYLE_LAYERS


def supports(ws: Tensor, weights: list[Tensor], *_: object) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    if ws.dtype != torch.float32:
        return dtype_reason(ws) or "computes in float32 only"
    return f"takes up to {LAYERS} layers, got {len(weights)}" if len(weights) > LAYERS else None


def _padded(x: Tensor) -> Tensor:
    """x with rows of a multiple of 4 numbers."""
    return F.pad(x, (0, -x.shape[-1] % 4)) if x.shape[-1] % 4 else x


def _cut(x: Tensor, size: int) -> Tensor:
    """Rows of so many numbers, as before `_padded`."""
    return x if x.shape[-1] == size else x[..., :size].contiguous()


def _steps(ws: Tensor) -> list[int]:
    """Between samples and between latents, in elements; 0 where there is one, and any number may stand."""
    return [step if size > 1 else 0 for size, step in zip(ws.shape[:2], ws.stride(), strict=False)]


def _latents(ws: Tensor) -> Tensor:
    """ws as it is where vectors of 16 bytes can be read: an expanded one costs no copy."""
    ws = _padded(ws)
    readable = ws.stride(2) == 1 and not any(step % 4 for step in _steps(ws))
    return on_16_bytes(ws if readable else ws.contiguous())


def _dense(weights: list[Tensor]) -> list[Tensor]:
    return [on_16_bytes(_padded(weight).contiguous()) for weight in weights]


def _rows(grad: Tensor) -> Tensor:
    """grad [N, C] with the styles of a sample side by side."""
    return grad if grad.stride(1) == 1 else grad.contiguous()


def _op(ws: Tensor, weights: list[Tensor], reads: list[int], gain: float, factors: list[float]) -> _C.Styles:
    n, latents, width = ws.shape
    samples_apart, latents_apart = _steps(ws)
    return _C.Styles(
        n=n,
        latents=latents,
        width=width,
        ws=pointer(ws),
        sample_stride=samples_apart,
        latent_stride=latents_apart,
        gain=gain,
        rows=[len(weight) for weight in weights],
        reads=reads,
        factors=factors,
    )


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def launch(
    ws: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    reads: list[int],
    weight_gain: float,
    factors: list[float],
) -> list[Tensor]:
    """factor * (weight_gain * ws[:, read] W^T + b) of every layer, [N, C] each."""
    ws, weights = _latents(ws), _dense(weights)
    biases = [bias.contiguous() for bias in biases]
    found = [ws.new_empty([ws.shape[0], weight.shape[0]]) for weight in weights]
    op = _op(ws, weights, reads, weight_gain, factors)
    _C.styles(op, _pointers(weights), _pointers(biases), _pointers(found), stream(ws))
    return found


def launch_backward(
    ws: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    reads: list[int],
    weight_gain: float,
    factors: list[float],
    want_ws: bool,
    want_layers: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dws, dweights, dbiases), dense; the first without elements, the others empty, where they are not wanted."""
    w_dim = ws.shape[2]
    ws, weights, grads = _latents(ws), _dense(weights), [_rows(grad) for grad in grads]
    layers = weights if want_layers else []
    dws = ws.new_empty(ws.shape if want_ws else [0])
    dweights = [weight.new_empty(weight.shape) for weight in layers]
    dbiases = [weight.new_empty(weight.shape[:1]) for weight in layers]
    op = _op(ws, weights, reads, weight_gain, factors)
    partial = ws.new_empty([_C.styles_partials(op) if want_ws else 0])
    _C.styles_backward(
        op,
        _pointers(weights),
        _pointers(grads),
        [grad.stride(0) for grad in grads],
        _pointers(dweights),
        _pointers(dbiases),
        pointer(dws) if want_ws else 0,
        pointer(partial) if want_ws else 0,
        stream(ws),
    )
    dws = _cut(dws, w_dim) if want_ws else dws
    return dws, [_cut(dweight, w_dim) for dweight in dweights], dbiases
