"""A stand-in for NVIDIA's StyleGAN2: names, attributes and calls of its modules, on tests/plain.py; not their code."""

import math

import torch
from plain import LOW_PASS, fir, leaky, modulated, with_deviation
from torch import nn


class FullyConnectedLayer(nn.Module):
    def __init__(self, inputs, outputs, activation="linear", lr_multiplier=1, bias_init=0):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([outputs], float(bias_init)))
        self.weight_gain, self.bias_gain = lr_multiplier / math.sqrt(inputs), lr_multiplier

    def forward(self, x):
        y = x @ (self.weight * self.weight_gain).t() + self.bias * self.bias_gain
        return leaky(y) if self.activation == "lrelu" else y


class MappingNetwork(nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, num_ws, num_layers):
        super().__init__()
        self.c_dim, self.num_ws, self.num_layers, self.w_avg_beta = c_dim, num_ws, num_layers, 0.995
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, w_dim)
        for i in range(num_layers):
            inputs = z_dim + (w_dim if c_dim else 0) if i == 0 else w_dim
            setattr(self, f"fc{i}", FullyConnectedLayer(inputs, w_dim, "lrelu", 0.01))
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z, c, truncation_psi=1):
        parts = ([] if z is None else [z]) + ([self.embed(c)] if self.c_dim else [])
        x = torch.cat([part * (part.square().mean(1, keepdim=True) + 1e-8).rsqrt() for part in parts], 1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        if self.num_ws is None:
            return x
        if self.training:  # as stylegan2-ada-pytorch does, in every forward
            self.w_avg.copy_(x.detach().mean(0).lerp(self.w_avg, self.w_avg_beta))
        return self.w_avg.lerp(x, truncation_psi)[:, None].repeat(1, self.num_ws, 1)


class SynthesisLayer(nn.Module):
    def __init__(self, inputs, outputs, w_dim, resolution, up=1, conv_clamp=None):
        super().__init__()
        self.up, self.conv_clamp, self.activation, self.use_noise = up, conv_clamp, "lrelu", True
        self.register_buffer("resample_filter", LOW_PASS.clone())
        self.affine = FullyConnectedLayer(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, w, noise_mode):
        x = modulated(x, self.weight, self.affine(w), up=self.resample_filter * 4 if self.up == 2 else None)
        noise = self.noise_const if noise_mode == "const" else torch.randn(len(x), 1, *x.shape[2:])
        x = leaky(x + noise * self.noise_strength, self.bias)
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class ToRGBLayer(nn.Module):
    def __init__(self, inputs, outputs, w_dim, conv_clamp=None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, w):
        styles = self.affine(w) / math.sqrt(x.shape[1])
        return modulated(x, self.weight, styles, demodulate=False) + self.bias[:, None, None]


class SynthesisBlock(nn.Module):
    def __init__(self, inputs, outputs, w_dim, resolution, conv_clamp=None):
        super().__init__()
        self.architecture = "skip"
        self.register_buffer("resample_filter", LOW_PASS.clone())
        if inputs == 0:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(inputs, outputs, w_dim, resolution, 2, conv_clamp)
        self.conv1 = SynthesisLayer(outputs, outputs, w_dim, resolution, 1, conv_clamp)
        self.torgb = ToRGBLayer(outputs, 3, w_dim, conv_clamp)

    def forward(self, x, img, ws, noise_mode):
        ws = iter(ws.unbind(1))
        if img is None:
            x = self.const.expand(len(x), -1, -1, -1)  # of the first block x is ws
        else:
            x = self.conv0(x, next(ws), noise_mode)
        x = self.conv1(x, next(ws), noise_mode)
        rgb = self.torgb(x, next(ws))
        return x, rgb if img is None else rgb + fir(img, self.resample_filter * 4, up=2, pad=(2, 1))


class SynthesisNetwork(nn.Module):
    def __init__(self, w_dim, resolution, channels, conv_clamp=None):
        super().__init__()
        self.block_resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.num_ws = 2 * len(self.block_resolutions)
        inputs = 0
        for r in self.block_resolutions:
            setattr(self, f"b{r}", SynthesisBlock(inputs, channels(r), w_dim, r, conv_clamp))
            inputs = channels(r)

    def forward(self, ws, noise_mode="random", force_fp32=False):
        x, img, at = ws, None, 0
        for r in self.block_resolutions:
            block, count = getattr(self, f"b{r}"), 2 if r == 4 else 3
            x, img = block(x, img, ws[:, at : at + count], noise_mode)
            at += count - 1
        return img


class Generator(nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, resolution, channels, num_layers, conv_clamp=None):
        super().__init__()
        self._init_kwargs = {}
        self.synthesis = SynthesisNetwork(w_dim, resolution, channels, conv_clamp)
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.synthesis.num_ws, num_layers)

    def forward(self, z, c, truncation_psi=1, **kwargs):
        return self.synthesis(self.mapping(z, c, truncation_psi), **kwargs)


class Conv2dLayer(nn.Module):
    def __init__(self, inputs, outputs, kernel_size, bias=True, activation="linear", down=1, conv_clamp=None):
        super().__init__()
        self.activation, self.down, self.conv_clamp = activation, down, conv_clamp
        self.register_buffer("resample_filter", LOW_PASS.clone())
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.weight_gain = 1 / math.sqrt(inputs * kernel_size**2)

    def forward(self, x, gain=1):
        w, k = self.weight * self.weight_gain, self.weight.shape[2]
        if self.down == 2:
            x = nn.functional.conv2d(fir(x, self.resample_filter, pad=(k // 2 + 1, k // 2 + 1)), w, stride=2)
        else:
            x = nn.functional.conv2d(x, w, padding=k // 2)
        x = leaky(x, self.bias) * gain if self.activation == "lrelu" else x * gain
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp * gain, self.conv_clamp * gain)


class DiscriminatorBlock(nn.Module):
    def __init__(self, channels, below, first, conv_clamp=None):
        super().__init__()
        self.architecture = "resnet"
        self.register_buffer("resample_filter", LOW_PASS.clone())
        if first:
            self.fromrgb = Conv2dLayer(3, channels, 1, activation="lrelu", conv_clamp=conv_clamp)
        self.conv0 = Conv2dLayer(channels, channels, 3, activation="lrelu", conv_clamp=conv_clamp)
        self.conv1 = Conv2dLayer(channels, below, 3, activation="lrelu", down=2, conv_clamp=conv_clamp)
        self.skip = Conv2dLayer(channels, below, 1, bias=False, down=2)

    def forward(self, x):
        x = self.fromrgb(x) if hasattr(self, "fromrgb") else x
        return self.skip(x, gain=0.5**0.5) + self.conv1(self.conv0(x), gain=0.5**0.5)


class MinibatchStdLayer(nn.Module):
    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x):
        return with_deviation(x, self.group_size)


class DiscriminatorEpilogue(nn.Module):
    def __init__(self, channels, cmap_dim, conv_clamp=None):
        super().__init__()
        self.architecture = "resnet"
        self.mbstd = MinibatchStdLayer(4)
        self.conv = Conv2dLayer(channels + 1, channels, 3, activation="lrelu", conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(channels * 16, channels, "lrelu")
        self.out = FullyConnectedLayer(channels, cmap_dim or 1)

    def forward(self, x, cmap):
        x = self.out(self.fc(self.conv(self.mbstd(x)).flatten(1)))
        return x if cmap is None else (x * cmap).sum(1, keepdim=True) / math.sqrt(cmap.shape[1])


class Discriminator(nn.Module):
    def __init__(self, c_dim, resolution, channels, conv_clamp=None):
        super().__init__()
        self._init_kwargs = {}
        self.c_dim = c_dim
        self.block_resolutions = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]
        for r in self.block_resolutions:
            setattr(self, f"b{r}", DiscriminatorBlock(channels(r), channels(r // 2), r == resolution, conv_clamp))
        cmap_dim = channels(4) if c_dim else 0
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, None, 8)
        self.b4 = DiscriminatorEpilogue(channels(4), cmap_dim, conv_clamp)

    def forward(self, img, c, force_fp32=False):
        for r in self.block_resolutions:
            img = getattr(self, f"b{r}")(img)
        return self.b4(img, self.mapping(None, c) if self.c_dim else None)
