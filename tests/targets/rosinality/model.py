import torch
from layers import Blur, FusedLeakyReLU, Modulated, upfirdn2d
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


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Sequential(
            Blur((1, 3, 3, 1), pad=(2, 2)), nn.Conv2d(3, 4, 3, stride=2, bias=False), FusedLeakyReLU(4, 0.2)
        )
        self.conv1 = nn.Conv2d(4, 5, 1)

    def forward(self, img):
        return self.conv1(self.conv0(img)).mean([2, 3])
