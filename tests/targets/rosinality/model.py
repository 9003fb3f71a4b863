import torch
from layers import FusedLeakyReLU, Modulated, upfirdn2d
from torch import nn


class ModulatedConv2d(Modulated):
    def forward(self, input, style):
        style = self.modulation(style).view(input.shape[0], 1, input.shape[1], 1, 1)
        return self.convolve(input, style, self.weight)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, 5, 4, 4))
        self.conv1 = ModulatedConv2d(5, 6, 3, 3, upsample=True)
        self.activate = FusedLeakyReLU(6, 0.2)  # the slope comes second in this version
        self.to_rgb = ModulatedConv2d(6, 3, 1, 3, demodulate=False)

    def forward(self, style):
        x = self.activate(self.conv1(self.input.expand(len(style), -1, -1, -1), style))
        return upfirdn2d(self.to_rgb(x, style), self.conv1.blur.kernel, up=2, pad=(2, 1))
