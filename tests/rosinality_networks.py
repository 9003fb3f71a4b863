"""A stand-in for rosinality's StyleGAN2: names and calls of its modules, on tests/plain.py; not their code."""

import math

import torch
from plain import LOW_PASS, fir, leaky, modulated, with_deviation
from torch import nn


class PixelNorm(nn.Module):
    def forward(self, input):
        return input * torch.rsqrt(input.square().mean(dim=1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    def __init__(self, in_dim, out_dim, bias_init=0, lr_mul=1, activation=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full([out_dim], float(bias_init)))
        self.scale, self.lr_mul, self.activation = lr_mul / math.sqrt(in_dim), lr_mul, activation

    def forward(self, input):
        y = nn.functional.linear(input, self.weight * self.scale, self.bias * self.lr_mul)
        return leaky(y) if self.activation else y


class FusedLeakyReLU(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel))

    def forward(self, input):
        return leaky(input, self.bias)


class Blur(nn.Module):
    def __init__(self, pad, factor=1, up=1):
        super().__init__()
        self.register_buffer("kernel", LOW_PASS * factor**2)
        self.pad, self.up = pad, up

    def forward(self, input):
        return fir(input, self.kernel, up=self.up, pad=self.pad)


class ModulatedConv2d(nn.Module):
    eps = 1e-8

    def __init__(self, in_channel, out_channel, kernel_size, style_dim, demodulate=True, upsample=False):
        super().__init__()
        self.demodulate = demodulate
        self.blur = Blur((1, 1), 2) if upsample else None
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel, bias_init=1)

    def forward(self, input, style):
        up = None if self.blur is None else self.blur.kernel
        weight, style = self.weight[0] * self.scale, self.modulation(style)
        return modulated(input, weight, style, demodulate=self.demodulate, up=up, eps=self.eps)


class NoiseInjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image, noise=None):
        return image + self.weight * (torch.randn_like(image[:, :1]) if noise is None else noise)


class StyledConv(nn.Module):
    def __init__(self, in_channel, out_channel, style_dim, upsample=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, out_channel, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, input, style, noise=None):
        return self.activate(self.noise(self.conv(input, style), noise))


class ToRGB(nn.Module):
    def __init__(self, in_channel, style_dim, upsample=True):
        super().__init__()
        self.upsample = Blur((2, 1), 2, up=2) if upsample else None
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, input, style, skip=None):
        out = self.conv(input, style) + self.bias
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channel, 4, 4))

    def forward(self, input):
        return self.input.repeat(len(input), 1, 1, 1)


class Generator(nn.Module):
    def __init__(self, size, style_dim, n_mlp, channels):
        super().__init__()
        layers = [EqualLinear(style_dim, style_dim, lr_mul=0.01, activation="fused_lrelu") for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        self.input = ConstantInput(channels(4))
        self.conv1 = StyledConv(channels(4), channels(4), style_dim)
        self.to_rgb1 = ToRGB(channels(4), style_dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.num_layers = 1
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for r in [2**i for i in range(3, size.bit_length())]:
            self.convs.append(StyledConv(channels(r // 2), channels(r), style_dim, upsample=True))
            self.convs.append(StyledConv(channels(r), channels(r), style_dim))
            self.to_rgbs.append(ToRGB(channels(r), style_dim))
            for _ in range(2):
                self.noises.register_buffer(f"noise_{self.num_layers}", torch.randn(1, 1, r, r))
                self.num_layers += 1
        self.n_latent = self.num_layers + 1

    def forward(self, styles, return_latents=False, input_is_latent=False, randomize_noise=True):
        styles = styles if input_is_latent else [self.style(s) for s in styles]
        latent = styles[0] if styles[0].ndim == 3 else styles[0][:, None].repeat(1, self.n_latent, 1)
        noise = [None if randomize_noise else getattr(self.noises, f"noise_{i}") for i in range(self.num_layers)]
        out = self.conv1(self.input(latent), latent[:, 0], noise[0])
        skip = self.to_rgb1(out, latent[:, 1])
        for j, to_rgb in enumerate(self.to_rgbs):
            i = 2 * j + 1
            out = self.convs[2 * j](out, latent[:, i], noise[i])
            out = self.convs[2 * j + 1](out, latent[:, i + 1], noise[i + 1])
            skip = to_rgb(out, latent[:, i + 2], skip)
        return skip, latent if return_latents else None


class EqualConv2d(nn.Module):
    def __init__(self, in_channel, out_channel, kernel_size, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channel, in_channel, kernel_size, kernel_size))
        self.scale, self.stride, self.padding = 1 / math.sqrt(in_channel * kernel_size**2), stride, padding

    def forward(self, input):
        return nn.functional.conv2d(input, self.weight * self.scale, stride=self.stride, padding=self.padding)


class ConvLayer(nn.Sequential):
    def __init__(self, in_channel, out_channel, kernel_size, downsample=False, activate=True):
        pad = kernel_size // 2
        layers = [Blur((pad + 1, pad + 1))] if downsample else []
        stride, padding = (2, 0) if downsample else (1, pad)
        layers.append(EqualConv2d(in_channel, out_channel, kernel_size, stride, padding))
        super().__init__(*layers, *([FusedLeakyReLU(out_channel)] if activate else []))


class ResBlock(nn.Module):
    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv1 = ConvLayer(in_channel, in_channel, 3)
        self.conv2 = ConvLayer(in_channel, out_channel, 3, downsample=True)
        self.skip = ConvLayer(in_channel, out_channel, 1, downsample=True, activate=False)

    def forward(self, input):
        return (self.conv2(self.conv1(input)) + self.skip(input)) / math.sqrt(2)


class Discriminator(nn.Module):
    def __init__(self, size, channels):
        super().__init__()
        sizes = [2**i for i in range(size.bit_length() - 1, 2, -1)]
        blocks = [ResBlock(channels(r), channels(r // 2)) for r in sizes]
        self.convs = nn.Sequential(ConvLayer(3, channels(size), 1), *blocks)
        self.final_conv = ConvLayer(channels(4) + 1, channels(4), 3)
        hidden = EqualLinear(channels(4) * 16, channels(4), activation="fused_lrelu")
        self.final_linear = nn.Sequential(hidden, EqualLinear(channels(4), 1))

    def forward(self, input):
        out = self.final_conv(with_deviation(self.convs(input), 4))
        return self.final_linear(out.flatten(1))
