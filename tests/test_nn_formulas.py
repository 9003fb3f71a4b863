"""The numbers of the networks: every convention by hand, and both networks whole, in float64 numpy."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import torch
from grids import assert_same
from networks import CONDITIONAL, TINY, randomised
from torch import Tensor

from clone_fast.nn import Architecture, Discriminator, Generator
from clone_fast.nn.discriminator import minibatch_stddev
from clone_fast.nn.generator import Prepared
from clone_fast.nn.layers import Conv2dLayer, FullyConnectedLayer, normalize_2nd_moment

LABELS = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def generator(arch: Architecture = TINY) -> Any:
    g = randomised(Generator(arch)).double().requires_grad_(False)
    g.mapping.w_avg.normal_()
    return g


def discriminator(arch: Architecture = TINY) -> Any:
    return randomised(Discriminator(arch)).double().requires_grad_(False)


def state(module: torch.nn.Module) -> dict[str, naive.Array]:
    return {name: naive.array(value) for name, value in module.state_dict().items()}


# ---- whole networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [TINY, CONDITIONAL], ids=["unconditional", "conditional"])
def test_generator(arch: Architecture) -> None:
    g = generator(arch)
    z, c = double(2, 5), LABELS[:2] if arch.c_dim else None
    w = naive.mapping(naive.array(z), naive.array(c), state(g))
    ws = np.repeat(w[:, None], g.num_ws, axis=1)
    assert_same(g.mapping(z, c), ws)
    assert_same(g(z, c, noise_mode="const"), naive.synthesis(ws, state(g), arch.img_resolution))


@pytest.mark.parametrize("mapping_layers", [1, 2, 3])
def test_mapping_of_another_depth(mapping_layers: int) -> None:
    g = generator(Architecture(img_resolution=8, z_dim=4, w_dim=6, channel_max=4, mapping_layers=mapping_layers))
    z = double(3, 4)
    assert_same(g.mapping(z)[:, 0], naive.mapping(naive.array(z), None, state(g), layers=mapping_layers))


@pytest.mark.parametrize("arch", [TINY, CONDITIONAL], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_discriminator(arch: Architecture, n: int) -> None:
    d, r = discriminator(arch), arch.img_resolution
    image, c = double(n, 3, r, r), LABELS.repeat(2, 1)[:n] if arch.c_dim else None
    assert_same(d(image, c), naive.discriminator(naive.array(image), state(d), c=naive.array(c)))


def test_generator_with_latents_of_its_own_for_every_layer() -> None:
    g, ws = generator(), double(2, 6, 6)
    assert_same(g.synthesis(ws), naive.synthesis(naive.array(ws), state(g), 16))


def test_a_clamp_that_bites() -> None:
    """At clamp 0.5 most activations of G and D are cut; the skips of D are not clamped."""
    arch = Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_max=4, conv_clamp=0.5)
    g, d, ws, image = generator(arch), discriminator(arch), double(2, 4, 4), double(2, 3, 8, 8)
    assert_same(g.synthesis(ws), naive.synthesis(naive.array(ws), state(g), 8, clamp=0.5))
    assert_same(d(image), naive.discriminator(naive.array(image), state(d), clamp=0.5))
    free = Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_max=4, conv_clamp=None)
    unclamped = Generator(free).double()
    unclamped.load_state_dict(g.state_dict())
    assert_same(unclamped.synthesis(ws), naive.synthesis(naive.array(ws), state(g), 8, clamp=None))
    assert (unclamped.synthesis(ws) - g.synthesis(ws)).abs().max() > 0.1


# ---- mapping -----------------------------------------------------------------------------------------------------


def test_normalize() -> None:
    x = double(3, 7) * 5
    y = naive.array(normalize_2nd_moment(x))
    np.testing.assert_allclose((y**2).mean(axis=1), 1, rtol=1e-8)
    np.testing.assert_allclose(
        y, naive.array(x) / np.sqrt((naive.array(x) ** 2).mean(axis=1, keepdims=True)), rtol=1e-8
    )
    assert (normalize_2nd_moment(torch.zeros(1, 4)) == 0).all()


def test_the_length_of_z_does_not_matter() -> None:
    g, z = generator(), double(2, 5)
    torch.testing.assert_close(g.mapping(z), g.mapping(3 * z), rtol=1e-7, atol=1e-7)


def test_fully_connected() -> None:
    x = double(3, 4)
    layer = FullyConnectedLayer(4, 5, bias_init=2.0).double()
    want = naive.array(x) @ naive.array(layer.weight).T / 2 + 2
    assert_same(layer(x), want)
    layer = FullyConnectedLayer(4, 5, activation="lrelu", lr_multiplier=0.01).double()
    torch.nn.init.normal_(layer.bias, std=30)
    y = naive.array(x) @ naive.array(layer.weight).T * 0.01 / 2 + 0.01 * naive.array(layer.bias)
    assert_same(layer(x), np.where(y > 0, y, 0.2 * y) * 2**0.5)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.5)  # 1 / lr


def test_truncation() -> None:
    g, z = generator(), double(2, 5)
    w, average = naive.array(g.mapping(z)), naive.array(g.mapping.w_avg)
    half = average + 0.5 * (w - average)
    assert_same(g.mapping(z, truncation_psi=0.5), half)
    assert_same(g.mapping(z, truncation_psi=0), np.broadcast_to(average, w.shape))
    assert_same(g.mapping(z, truncation_psi=-1), 2 * average - w)
    cut = g.mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    assert_same(cut, np.concatenate([half[:, :2], w[:, 2:]], axis=1))
    assert_same(g.mapping(z, truncation_psi=0.5, truncation_cutoff=0), w)
    assert_same(g.mapping(z, truncation_cutoff=2), w)
    image = g.synthesis(torch.tensor(half), noise_mode="const")
    torch.testing.assert_close(g(z, truncation_psi=0.5, noise_mode="const"), image)


def test_update_of_the_mean_latent() -> None:
    g = generator()
    ws, before = g.mapping(double(5, 5)), naive.array(g.mapping.w_avg).copy()
    g.mapping.update_w_avg(ws)
    assert_same(g.mapping.w_avg, 0.998 * before + 0.002 * naive.array(ws)[:, 0].mean(axis=0))


# ---- synthesis ---------------------------------------------------------------------------------------------------


def test_torgb_scales_its_styles_and_does_not_demodulate() -> None:
    g = generator()
    before, layer = g.synthesis.b16.conv1, g.synthesis.b16.torgb
    torch.nn.init.normal_(layer.bias)
    x, ws = double(2, 4, 16, 16), double(2, 6, 6)
    given = g.synthesis.styles(ws)
    of_before = Prepared(given["b16.conv1"], before.bias)
    y, rgb = before.drawn(x, of_before, layer, Prepared(given["b16.torgb"], layer.bias))
    styles = naive.array(layer.affine(ws[:, 5])) / 4**0.5
    want = np.einsum("oi,ni,nihw->nohw", naive.array(layer.weight)[:, :, 0, 0], styles, naive.array(y))
    assert torch.equal(y, before(x, of_before))
    assert_same(given["b16.torgb"], styles)
    assert_same(rgb, want + naive.array(layer.bias)[:, None, None])


@pytest.mark.parametrize("index", range(6))
def test_which_layers_read_which_latent(index: int) -> None:
    """ws: 0 b4.conv1; 1 b4.torgb, b8.conv0; 2 b8.conv1; 3 b8.torgb, b16.conv0; 4 b16.conv1; 5 b16.torgb."""
    readers = [
        ["b4.conv1"],
        ["b4.torgb", "b8.conv0"],
        ["b8.conv1"],
        ["b8.torgb", "b16.conv0"],
        ["b16.conv1"],
        ["b16.torgb"],
    ]
    g, ws = generator(), double(1, 6, 6)
    moved = ws.clone()
    moved[:, index] += 1
    first, then = g.synthesis.styles(ws), g.synthesis.styles(moved)
    assert [name for name in first if not torch.equal(first[name], then[name])] == readers[index]
    assert not torch.equal(g.synthesis(ws), g.synthesis(moved))


def test_styles_are_those_of_every_affine_layer() -> None:
    """All made at once: each is what its layer says of its latent, that of torgb over the root of its channels."""
    g, ws = generator(), double(2, 6, 6)
    reads = dict(zip(g.synthesis.styles(ws), [0, 1, 1, 2, 3, 3, 4, 5], strict=True))
    assert list(reads)[:4] == ["b4.conv1", "b4.torgb", "b8.conv0", "b8.conv1"]
    for name, styles in g.synthesis.styles(ws).items():
        affine = g.synthesis.get_submodule(f"{name}.affine")
        want = naive.array(affine(ws[:, reads[name]])) / (styles.shape[1] if "torgb" in name else 1) ** 0.5
        assert_same(styles, want)


def test_one_latent_for_all_layers() -> None:
    g, w = generator(), double(2, 1, 6)
    assert_same(g.synthesis(w), naive.array(g.synthesis(w.expand(-1, 6, -1))))


def test_modes_of_noise() -> None:
    g, ws = generator(), double(2, 6, 6)
    const = g.synthesis(ws)
    assert torch.equal(const, g.synthesis(ws, noise_mode="const"))
    assert torch.equal(g.synthesis(ws, noise_mode="none"), g.synthesis(ws, noise_mode="none"))
    random = [g.synthesis(ws, noise_mode="random") for _ in range(2)]
    assert not torch.equal(*random)
    same = g.synthesis(ws[:1].expand(2, -1, -1), noise_mode="random")
    assert not torch.equal(same[0], same[1])  # drawn anew for every image
    same = g.synthesis(ws[:1].expand(2, -1, -1))
    torch.testing.assert_close(same[0], same[1])
    torch.manual_seed(3)
    one = g.synthesis(ws, noise_mode="random")
    torch.manual_seed(3)
    assert torch.equal(one, g.synthesis(ws, noise_mode="random"))
    zero = {
        name: torch.zeros(r, r).double() for name, r in zip(g.synthesis.noise_names(), [4, 8, 8, 16, 16], strict=True)
    }
    torch.testing.assert_close(g.synthesis(ws, noise=zero), g.synthesis(ws, noise_mode="none"))
    for parameter in g.synthesis.parameters():
        if parameter.ndim == 0:
            parameter.zero_()
    torch.testing.assert_close(g.synthesis(ws, noise_mode="random"), g.synthesis(ws, noise_mode="none"))


def test_generator_draws_noise_by_default_and_its_synthesis_does_not() -> None:
    g, z = generator(), double(1, 5)
    assert not torch.equal(g(z), g(z))
    ws = g.mapping(z)
    assert torch.equal(g.synthesis(ws), g.synthesis(ws))


def test_noise_maps_take_the_place_of_the_mode() -> None:
    g, ws = generator(), double(2, 6, 6)
    assert g.synthesis.noise_names() == ["b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1"]
    maps = {"b4.conv1": double(4, 4), "b8.conv1": double(2, 1, 8, 8), "b16.conv0": double(1, 1, 16, 16)}
    given = {name: naive.array(value) for name, value in maps.items()}
    assert_same(g.synthesis(ws, noise=maps), naive.synthesis(naive.array(ws), state(g), 16, noise=given))
    silent = {**{name: np.zeros([r, r]) for name, r in (("b8.conv0", 8), ("b16.conv1", 16))}, **given}
    assert_same(
        g.synthesis(ws, noise_mode="none", noise=maps), naive.synthesis(naive.array(ws), state(g), 16, noise=silent)
    )


def test_the_image_so_far_is_upsampled_keeping_its_brightness() -> None:
    """With every layer of 8x8 silent, the image is that of 4x4, interpolated."""
    g = generator(Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_max=4))
    small: list[Tensor] = []
    g.synthesis.b4.register_forward_hook(lambda module, args, out: small.append(out[1]))
    g.synthesis.b8.torgb.weight.zero_()
    g.synthesis.b8.torgb.bias.zero_()
    image = g.synthesis(double(1, 4, 4))
    want = naive.upfirdn2d(naive.array(small[0]), naive.BLUR, up=(2, 2), padding=(2, 1, 2, 1), gain=4)
    assert_same(image, want)
    inner = naive.array(image)[0, 0, 3, 3]
    s = naive.array(small[0])[0, 0]
    assert inner == pytest.approx((9 * s[1, 1] + 3 * s[1, 2] + 3 * s[2, 1] + s[2, 2]) / 16)


# ---- discriminator -----------------------------------------------------------------------------------------------


def test_convolution_layer() -> None:
    layer = Conv2dLayer(3, 4, 3, activation="lrelu", conv_clamp=1.0).double()
    torch.nn.init.normal_(layer.bias)
    x = double(2, 3, 5, 5)
    weight, bias = naive.array(layer.weight) / 27**0.5, naive.array(layer.bias)
    y = np.stack([naive.conv2d(sample, weight) for sample in naive.array(x)]) + bias[:, None, None]
    y = np.where(y > 0, y, 0.2 * y) * 2**0.5
    assert_same(layer(x), np.clip(y, -1, 1))
    assert_same(layer(x, gain=0.5), np.clip(y * 0.5, -0.5, 0.5))  # the clamp follows the gain


def test_residual_branches_have_half_the_power_each() -> None:
    block = discriminator().b8
    x = double(2, 6, 8, 8)
    shrunk = naive.upfirdn2d(naive.array(x), naive.BLUR, down=[2, 2], padding=[1, 1, 1, 1])
    long, short = naive.array(block.conv1(block.conv0(x))), naive.array(block.skip(torch.tensor(shrunk)))
    assert_same(block(x), (long + short) / 2**0.5)


@pytest.mark.parametrize("group", [1, 2, 4, 8, None])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 2])
def test_minibatch_standard_deviation(group: int | None, n: int, channels: int) -> None:
    x = double(n, 6, 4, 4)
    size = n if group is None else min(group, n)
    assert_same(minibatch_stddev(x, group, channels), naive.minibatch_stddev(naive.array(x), size, channels))


def test_minibatch_standard_deviation_by_hand() -> None:
    x = torch.tensor([1.0, 5.0, 3.0, 5.0]).double()[:, None, None, None].expand(4, 1, 1, 1)
    feature = minibatch_stddev(x, 2, 1)[:, 1, 0, 0]
    assert feature.tolist() == pytest.approx([1, 1e-4, 1, 1e-4])  # {1, 3} and {5, 5}
    assert minibatch_stddev(x[:1], 4, 1)[0, 1].item() == pytest.approx(1e-4)


@pytest.mark.parametrize(("group", "n"), [(4, 6), (2, 3), (8, 12)])
def test_minibatch_that_is_no_multiple(group: int, n: int) -> None:
    with pytest.raises(
        ValueError, match=f"^the batch must be a multiple of the discriminator's group size {group}, got {n}$"
    ):
        minibatch_stddev(double(n, 2, 4, 4), group, 1)


def test_group_size_comes_from_the_architecture() -> None:
    image = double(6, 3, 8, 8)
    arch = {"img_resolution": 8, "z_dim": 4, "w_dim": 4, "channel_max": 4}
    for group in (1, 2, 3, None):
        d = discriminator(Architecture(**arch, mbstd_group_size=group))
        assert_same(d(image), naive.discriminator(naive.array(image), state(d), group=group))


def test_without_minibatch_standard_deviation_images_are_judged_alone() -> None:
    d = discriminator(Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_max=4, mbstd_num_channels=0))
    image = double(5, 3, 8, 8)
    torch.testing.assert_close(d(image), torch.cat([d(one[None]) for one in image]))


def test_features_of_each_image_by_itself() -> None:
    d, image = discriminator(), double(6, 3, 16, 16)
    alone = torch.cat([d.features(one[None]) for one in image])
    torch.testing.assert_close(d.features(image, per_image=True), alone)
    torch.testing.assert_close(d.b4.out(alone[:1]), d(image[:1]))
    assert (d.features(image[:4]) - alone[:4]).abs().max() > 1e-3


def test_label_picks_the_logit() -> None:
    d, image = discriminator(CONDITIONAL), double(4, 3, 8, 8)
    label = naive.mapping(None, naive.array(LABELS), state(d))
    logits = naive.array(d.b4.out(d.features(image)))
    assert_same(d(image, LABELS), (logits * label).sum(axis=1, keepdims=True) / 6**0.5)
    assert not torch.equal(d(image, LABELS), d(image, LABELS.flip(0)))
