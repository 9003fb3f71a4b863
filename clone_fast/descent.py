"""Gradient descent that can be captured: fused Adam with its learning rates on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast.capture import rehearsing


class Descent:
    """Fused Adam, with the scale that float16 wants of a loss.

    Args:
        groups: of (parameters, peak of the learning rate).
        loss_scale: for float16: what losses are multiplied by at first, so that gradients of activations stay within
            its range. It is halved when a gradient overflows, in whose place no step is taken, and doubled after a
            while.

    Attributes:
        tensors: all that it moves.
        rates: learning rates [] of the last step, by group.
    """

    def __init__(
        self, groups: list[tuple[list[Tensor], float]], *, betas: tuple[float, float], loss_scale: float = 1.0
    ) -> None:
        self.tensors = [tensor for tensors, _ in groups for tensor in tensors]
        device = self.tensors[0].device
        self.peaks = [peak for _, peak in groups]
        self.rates = [torch.tensor(peak, device=device) for peak in self.peaks]
        self.optimizer = torch.optim.Adam(
            [{"params": tensors, "lr": rate} for (tensors, _), rate in zip(groups, self.rates, strict=True)],
            betas=betas,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.scaler: torch.amp.GradScaler | None = None
        if loss_scale != 1:  # with a fused optimiser a scaler reads nothing on the host
            self.scaler = torch.amp.GradScaler(device.type, init_scale=loss_scale, growth_interval=50)
            self.fresh = self.scaler.state_dict()

    def step(self, loss: Tensor, rate: Tensor) -> None:
        """Fresh gradients of the loss to all that takes part in it, and a step; in a rehearsal the gradients alone.

        rate: [], on the device; the factor of each group's peak.
        """
        self.optimizer.zero_grad(set_to_none=True)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if rehearsing():
            return
        with torch.no_grad():
            for own, peak in zip(self.rates, self.peaks, strict=True):
                torch.mul(rate, peak, out=own)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    @torch.no_grad()
    def restart(self) -> None:
        """As before the first step, in the memory that is there, since graphs hold where it lies."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        if self.scaler is not None:
            self.scaler.load_state_dict(self.fresh)
