import torch
from model import Generator as Steady
from model import ModulatedConv2d  # noqa: F401


class Generator(Steady):
    """What it does is not all in its arguments and parameters, in the way that `kind` names."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, style):
        if self.kind == "draws":
            style = style + torch.randn_like(style)
        if self.kind == "counts":
            self.mean.lerp_(style.detach().mean(0), 0.5)
        y = super().forward(style)
        return {"result": y, "kind": object()} if self.kind == "returns" else y
