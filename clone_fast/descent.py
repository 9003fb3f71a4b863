"""Gradient descent that can be captured: fused Adam with its learning rates on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clone_fast.capture import rehearsing
from clone_fast.ops.adam import adam_
from clone_fast.ops.streams import as_it_comes, aside, joined

ENOUGH = 2**20  # elements whose step is worth launches of its own, beside the rest of the backward


class FusedAdam:
    """`torch.optim.Adam(fused=True, capturable=True)` as far as it is needed here.

    Args:
        groups: of (parameters, learning rate [] on their device).
    """

    _step_supports_amp_scaling = True  # for GradScaler, which then gives a step the attributes grad_scale and found_inf

    def __init__(self, groups: list[tuple[list[Tensor], Tensor]], betas: tuple[float, float]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": tensors, "lr": rate} for tensors, rate in groups]
        self.betas = betas
        self.state = {p: self._fresh(p) for group in self.param_groups for p in group["params"]}

    @staticmethod
    def _fresh(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moments, and how many steps were taken."""
        return torch.zeros_like(tensor), torch.zeros_like(tensor), torch.zeros([], device=tensor.device)

    @torch.no_grad()
    def step(self, among: Sequence[Tensor] | None = None) -> None:
        """A step of what has a gradient, of all parameters or of these."""
        chosen = self.state if among is None else set(among)
        scaled = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for group in self.param_groups:
            moved: list[Any] = [p for p in group["params"] if p.grad is not None and p in chosen]
            means, squares, steps = ([self.state[p][i] for p in moved] for i in range(3))
            adam_(moved, [p.grad for p in moved], means, squares, steps, group["lr"], self.betas, **scaled)

    @torch.no_grad()
    def restart(self) -> None:
        """As before the first step, in the memory that is there."""
        for state in self.state.values():
            for value in state:
                value.zero_()


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
        self.optimizer = FusedAdam([(part, rate) for (part, _), rate in zip(groups, self.rates, strict=True)], betas)
        self.scaler: torch.amp.GradScaler | None = None
        if loss_scale != 1:  # with a fused optimiser a scaler reads nothing on the host
            self.scaler = torch.amp.GradScaler(device.type, init_scale=loss_scale, growth_interval=50)
            self.fresh = self.scaler.state_dict()
            self.scaler.scale(torch.zeros([], device=device))  # makes its tensors, which a capture would make anew

    def step(self, loss: Tensor, rate: Tensor) -> None:
        """Fresh gradients of the loss to all that takes part in it, and a step; in a rehearsal the gradients alone.

        rate: [], on the device; the factor of each group's peak.
        """
        for tensor in self.tensors:
            tensor.grad = None
        aside(loss.device, "descent", partial(self._set_rates, rate), reads=[rate])
        if self.scaler is None and not rehearsing():
            with as_it_comes(loss.device, "descent", self.tensors, self._move, ENOUGH):
                loss.backward()
            return
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        joined(loss.device, "descent")
        if self.scaler is not None and not rehearsing():  # it must have seen all gradients before any step is taken
            self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # it asks for no more than this one has
            self.scaler.update()

    @torch.no_grad()
    def _set_rates(self, rate: Tensor) -> None:
        for own, peak in zip(self.rates, self.peaks, strict=True):
            torch.mul(rate, peak, out=own)

    def _move(self, *tensors: Tensor) -> None:
        self.optimizer.step(tensors)

    @torch.no_grad()
    def restart(self) -> None:
        """As before the first step, in the memory that is there, since graphs hold where it lies."""
        self.optimizer.restart()
        if self.scaler is not None:
            self.scaler.load_state_dict(self.fresh)
