import torch
from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d  # the modules: ops are found as attributes


@misc.profiled_function
def modulated_conv2d(
    x,
    weight,
    styles,
    noise=None,
    up=1,
    down=1,
    padding=0,
    resample_filter=None,
    demodulate=True,
    flip_weight=True,
    fused_modconv=True,
):
    n, (o, i, k, _) = x.shape[0], weight.shape
    assert styles.shape == (n, i)
    if x.dtype == torch.float16 and demodulate:
        weight = weight / (i * k * k) ** 0.5 / weight.abs().amax([1, 2, 3], keepdim=True)
        styles = styles / styles.abs().amax(1, keepdim=True)
    w = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    w = w.to(x.dtype).reshape(n * o, i, k, k)
    y = conv2d_resample.conv2d_resample(
        x.reshape(1, n * i, *x.shape[2:]), w, f=resample_filter, up=up, down=down, padding=padding, groups=n,
        flip_weight=flip_weight,
    )  # fmt: skip
    y = y.reshape(n, o, *y.shape[2:])
    return y if noise is None else y + noise.to(y.dtype)


@persistence.persistent_class
class SynthesisLayer(torch.nn.Module):
    def __init__(self, in_channels, out_channels, w_dim, resolution, up=1):
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        self.affine = torch.nn.Linear(w_dim, in_channels)
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = torch.nn.Parameter(torch.tensor(0.1))
        self.bias = torch.nn.Parameter(torch.zeros(out_channels))
        self.act_gain = bias_act.activation_funcs["lrelu"].def_gain

    def forward(self, x, w):
        x = modulated_conv2d(
            x, self.weight, self.affine(w), noise=self.noise_const * self.noise_strength, up=self.up, padding=1,
            resample_filter=self.resample_filter, flip_weight=(self.up == 1),
        )  # fmt: skip
        return bias_act.bias_act(x, self.bias, act="lrelu", gain=self.act_gain, clamp=256)


@persistence.persistent_class
class Generator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.const = torch.nn.Parameter(torch.randn(5, 4, 4))
        self.conv0 = SynthesisLayer(5, 6, 3, 8, up=2)
        self.conv1 = SynthesisLayer(6, 4, 3, 8)

    def forward(self, w):
        x = self.const.expand(w.shape[0], -1, -1, -1)
        return upfirdn2d.upsample2d(self.conv1(self.conv0(x, w), w), self.conv0.resample_filter)


@persistence.persistent_class
class Conv2dLayer(torch.nn.Module):
    def __init__(self, in_channels, out_channels, activation="lrelu", down=1):
        super().__init__()
        self.activation, self.down = activation, down
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = torch.nn.Parameter(torch.zeros(out_channels))

    def forward(self, x, gain=1):
        x = conv2d_resample.conv2d_resample(x, self.weight, f=self.resample_filter, down=self.down, padding=1)
        return bias_act.bias_act(x, self.bias, act=self.activation, gain=gain)


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = Conv2dLayer(3, 4)
        self.conv1 = Conv2dLayer(4, 5, down=2)
        self.skip = Conv2dLayer(3, 5, activation="linear", down=2)

    def forward(self, img):
        y = self.skip(img, gain=0.5**0.5)
        return y.add_(self.conv1(self.conv0(img))).mean([2, 3])  # in place
