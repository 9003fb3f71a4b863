"""The networks as modules: architecture, state-dict layout, sizes, copies, gradients, graphs, messages.

That they compute the right numbers is tested in test_nn_formulas.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CONDITIONAL, TINY, randomised
from torch import Tensor, nn
from torch.autograd import gradcheck

from clone_fast.nn import Architecture, Discriminator, Generator, Network

# ---- architecture ------------------------------------------------------------------------------------------------


def test_architecture_of_config_f() -> None:
    arch = Architecture()
    assert arch.num_ws == 18
    assert arch.block_resolutions == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert [arch.channels(r) for r in arch.block_resolutions] == [512, 512, 512, 512, 512, 256, 128, 64, 32]


@pytest.mark.parametrize(("resolution", "num_ws"), [(8, 4), (16, 6), (64, 10), (256, 14), (512, 16), (1024, 18)])
def test_num_ws(resolution: int, num_ws: int) -> None:
    assert Architecture(img_resolution=resolution).num_ws == num_ws


def test_architecture_survives_json() -> None:
    for arch in (Architecture(), CONDITIONAL, Architecture(conv_clamp=None, mbstd_group_size=None)):
        assert Architecture.from_json(arch.to_json()) == arch
        assert Architecture.from_dict(arch.to_dict()) == arch
    with pytest.raises(ValueError, match="unknown fields of an Architecture: colour, depth"):
        Architecture.from_dict({"depth": 3, "colour": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"img_resolution": 4}, "img_resolution must be a power of two from 8 to 1024, got 4"),
        ({"img_resolution": 100}, "img_resolution must be a power of two from 8 to 1024, got 100"),
        ({"img_resolution": 2048}, "img_resolution must be a power of two from 8 to 1024, got 2048"),
        ({"img_channels": 0}, "img_channels must be an integer >= 1, got 0"),
        ({"z_dim": 0}, "z_dim must be an integer >= 1, got 0"),
        ({"w_dim": 1.5}, "w_dim must be an integer >= 1, got 1.5"),
        ({"c_dim": -1}, "c_dim must be an integer >= 0, got -1"),
        ({"channel_base": 512}, "channel_base must be an integer >= 1024, got 512"),
        ({"channel_max": 0}, "channel_max must be an integer >= 1, got 0"),
        ({"mapping_layers": 0}, "mapping_layers must be an integer >= 1, got 0"),
        ({"conv_clamp": 0}, "conv_clamp must be None or > 0, got 0"),
        ({"mbstd_group_size": 0}, "mbstd_group_size must be None or an integer >= 1, got 0"),
        ({"mbstd_group_size": 4.0}, "mbstd_group_size must be None or an integer >= 1, got 4.0"),
        ({"mbstd_num_channels": 3}, "mbstd_num_channels must divide the 512 channels at 4x4, got 3"),
    ],
)
def test_architecture_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Architecture(**values)


# ---- layout ------------------------------------------------------------------------------------------------------


def listing(section: str) -> list[str]:
    text = (Path(__file__).parent / "data" / "keys_64px.txt").read_text()
    _, _, rest = text.partition(f"# {section}\n")
    return rest.partition("\n# ")[0].strip().splitlines()


@pytest.mark.parametrize(("section", "kind"), [("NV G", Generator), ("NV D", Discriminator)])
def test_state_dict_is_in_nvidias_layout(section: str, kind: type[nn.Module]) -> None:
    """Names, shapes and order as recorded from the published code at 64 px."""
    with torch.device("meta"):
        module = kind(Architecture(img_resolution=64, channel_base=16384))
    assert [f"{name} {list(value.shape)}" for name, value in module.state_dict().items()] == listing(section)


def test_conditional_networks_have_an_embedding() -> None:
    g, d = Generator(CONDITIONAL).state_dict(), Discriminator(CONDITIONAL).state_dict()
    assert list(g["mapping.embed.weight"].shape) == [6, 3]
    assert list(g["mapping.fc0.weight"].shape) == [6, 5 + 6]
    assert list(d["mapping.embed.weight"].shape) == [6, 3]
    assert list(d["mapping.fc0.weight"].shape) == [6, 6]
    assert "mapping.w_avg" not in d
    assert [name for name in d if name.startswith("mapping.fc") and name.endswith("weight")] == [
        f"mapping.fc{i}.weight" for i in range(8)
    ]
    assert list(d["b4.out.weight"].shape) == [6, 6]  # as many features as the label has


def test_depth_of_the_mapping() -> None:
    g = Generator(Architecture(img_resolution=8, z_dim=3, w_dim=7, channel_max=4, mapping_layers=2))
    shapes = {name: list(p.shape) for name, p in g.mapping.named_parameters()}
    assert shapes == {"fc0.weight": [7, 3], "fc0.bias": [7], "fc1.weight": [7, 7], "fc1.bias": [7]}
    assert list(g(torch.randn(1, 3)).shape) == [1, 3, 8, 8]


def test_initial_values() -> None:
    g = Generator(Architecture(img_resolution=64, channel_max=64))
    state = g.state_dict()
    for name, value in state.items():
        if name.endswith("affine.bias"):
            assert (value == 1).all(), name
        elif name.endswith(("bias", "noise_strength", "w_avg")):
            assert (value == 0).all(), name
        elif name.endswith("resample_filter"):
            taps = torch.tensor([1.0, 3, 3, 1])
            torch.testing.assert_close(value, taps.outer(taps) / 64)
        else:
            assert value.std().item() == pytest.approx(100 if ".fc" in name else 1, rel=0.25), name


def test_parameters_of_config_f() -> None:
    with torch.device("meta"):
        g, d = Generator(Architecture()), Discriminator(Architecture())

    def millions(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert millions(g) == pytest.approx(30.37, abs=0.005)
    assert millions(g.synthesis) == pytest.approx(28.27, abs=0.005)
    assert millions(g.mapping) == pytest.approx(2.10, abs=0.005)
    assert len(list(g.parameters())) == 138
    assert millions(d) == pytest.approx(29.0, abs=0.05)


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_every_resolution(resolution: int) -> None:
    """All of them on tensors without memory; the small ones with it."""
    arch = Architecture(img_resolution=resolution, z_dim=8, w_dim=8, channel_base=1024, channel_max=8)
    with torch.device("meta"):
        g, d = Generator(arch), Discriminator(arch)
        image = g(torch.empty(2, 8))
        assert list(image.shape) == [2, 3, resolution, resolution]
        assert list(d(image).shape) == [2, 1]
    assert list(g.synthesis.noise_names()) == [
        name.removesuffix(".noise_const") for name, _ in g.synthesis.named_buffers() if name.endswith("noise_const")
    ]
    if resolution <= 64:
        g, d = Generator(arch), Discriminator(arch)
        image = g(torch.randn(2, 8))
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert image.isfinite().all()
        assert list(d(image).shape) == [2, 1]
        assert list(d.features(image).shape) == [2, 8]


def test_one_channel_images() -> None:
    arch = Architecture(img_resolution=8, img_channels=1, z_dim=4, w_dim=4, channel_max=4)
    image = Generator(arch)(torch.randn(3, 4))
    assert list(image.shape) == [3, 1, 8, 8]
    assert list(Discriminator(arch)(image).shape) == [3, 1]


def test_attributes_that_other_code_reads() -> None:
    g = Generator(CONDITIONAL)
    assert (g.z_dim, g.c_dim, g.w_dim, g.img_resolution, g.img_channels, g.num_ws) == (5, 3, 6, 8, 3, 4)
    assert g.mapping.num_ws == g.synthesis.num_ws == 4
    assert g.synthesis.block_resolutions == [4, 8]
    assert list(g.mapping.w_avg.shape) == [6]


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_copies_compute_the_same(how: str, kind: type[nn.Module]) -> None:
    module = randomised(kind(TINY)).requires_grad_(False)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    given: Any = torch.randn(4, 5) if kind is Generator else torch.randn(4, 3, 16, 16)
    kwargs = {"noise_mode": "const"} if kind is Generator else {}
    assert torch.equal(twin(given, **kwargs), module(given, **kwargs))
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(given, **kwargs), module(given, **kwargs))


def test_network_moves_as_one() -> None:
    g, d = Generator(TINY), Discriminator(TINY)
    network = Network(g, d, directions={"smile": torch.zeros(6)}, generator_raw=copy.deepcopy(g))
    assert network.arch is g.arch
    moved = network.to("meta")
    assert moved is network
    devices = {
        p.device.type for m in (network.generator, network.discriminator, network.generator_raw) for p in m.parameters()
    }
    assert devices | {network.directions["smile"].device.type} == {"meta"}
    assert Network(g).to("meta").discriminator is None


def test_nothing_in_a_forward_changes_the_state() -> None:
    """NVIDIA's mapping moves w_avg in train mode; ours never does, so that sampling is harmless."""
    g, d = randomised(Generator(TINY)).train(), randomised(Discriminator(TINY)).train()
    g.mapping.w_avg.normal_()
    before = copy.deepcopy([g.state_dict(), d.state_dict()])
    for _ in range(3):
        d(g(torch.randn(4, 5), truncation_psi=0.5)).mean().backward()
    for old, module in zip(before, (g, d), strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, old[name]), name


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [TINY, CONDITIONAL], ids=["unconditional", "conditional"])
def test_gradients_reach_every_parameter(arch: Architecture) -> None:
    g, d = randomised(Generator(arch)), randomised(Discriminator(arch))
    c = torch.eye(3)[[0, 1, 2, 1]] if arch.c_dim else None
    d(g(torch.randn(4, 5), c), c).square().sum().backward()
    for module in (g, d):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_gradients_reach_latents_and_noise_maps() -> None:
    g = randomised(Generator(TINY))
    ws = torch.randn(1, g.num_ws, 6, requires_grad=True)
    noise = {
        name: torch.randn(2 ** (2 + (i + 1) // 2), 2 ** (2 + (i + 1) // 2), requires_grad=True)
        for i, name in enumerate(g.synthesis.noise_names())
    }
    g.synthesis(ws, noise=noise).square().sum().backward()
    assert (ws.grad.abs().amax(dim=(0, 2)) > 0).all()
    for name, value in noise.items():
        assert value.grad.abs().max() > 0, name


def smooth(arch: Architecture = TINY) -> tuple[Any, Any]:
    """Networks in float64 whose clamp is out of the way; leaky ReLU is smooth where no input is near zero."""
    return randomised(Generator(arch)).double(), randomised(Discriminator(arch)).double()


def test_r1_equals_finite_differences() -> None:
    """The gradient of |dD/dx|^2 to x and to weights, which differentiates every op of D twice."""
    _, d = smooth()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(d(image).sum(), image, create_graph=True)
        return slope.square().sum()

    parameters = [image, d.b16.fromrgb.weight, d.b16.conv1.weight, d.b8.skip.weight, d.b4.conv.weight, d.b4.out.weight]
    grads = torch.autograd.grad(penalty(), parameters)
    assert_finite_differences(penalty, parameters, grads)


def test_path_length_equals_finite_differences() -> None:
    """The gradient of |d(image . y)/dw|^2 to weights, which differentiates every op of G twice."""
    g, _ = smooth()
    ws = torch.randn(2, g.num_ws, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def penalty() -> Tensor:
        image = g.synthesis(ws, noise_mode="const")
        (slope,) = torch.autograd.grad((image * direction).sum(), ws, create_graph=True)
        return slope.square().sum()

    s = g.synthesis
    parameters = [ws, s.b4.const, s.b4.conv1.weight, s.b8.conv0.affine.weight, s.b16.conv0.weight, s.b16.torgb.weight]
    grads = torch.autograd.grad(penalty(), parameters)
    assert_finite_differences(penalty, parameters, grads)


def assert_finite_differences(function: Any, parameters: list[Tensor], grads: Any, step: float = 1e-6) -> None:
    """Along one random direction per tensor."""
    for parameter, grad in zip(parameters, grads, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(function().item())
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        measured = (values[0] - values[1]) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(measured, rel=1e-5, abs=1e-6)


def test_gradcheck_of_a_tiny_generator() -> None:
    g = randomised(Generator(Architecture(img_resolution=8, z_dim=2, w_dim=2, channel_max=2))).double()
    ws = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda ws: g.synthesis(ws, noise_mode="const"), ws)


# ---- graphs and precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_compiles_without_a_graph_break(kind: type[nn.Module]) -> None:
    torch._dynamo.reset()
    module = randomised(kind(TINY))
    given: Any = torch.randn(2, 5) if kind is Generator else torch.randn(2, 3, 16, 16)
    kwargs = {"noise_mode": "const", "truncation_psi": 0.7} if kind is Generator else {}
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for run in (module, fast):
        y = run(given, **kwargs)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    g, d = randomised(Generator(TINY)).double(), randomised(Discriminator(TINY)).double()
    z = torch.randn(4, 5, dtype=torch.float64)
    image, logits = g(z, noise_mode="const"), None
    logits = d(image)
    low_image = copy.deepcopy(g).to(dtype)(z.to(dtype), noise_mode="const")
    low_logits = copy.deepcopy(d).to(dtype)(image.to(dtype))
    assert low_image.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert low_logits.dtype == low_image.dtype
    for low, high in ((low_image, image), (low_logits, logits)):
        error = (low.double() - high).abs().max() / high.abs().max()
        assert error <= 20 * torch.finfo(dtype).eps


def test_runs_under_autocast() -> None:
    g, d = randomised(Generator(TINY)), randomised(Discriminator(TINY))
    z = torch.randn(4, 5)
    want = g(z, noise_mode="const")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = g(z, noise_mode="const")
        logits = d(image)
    assert image.dtype == torch.float32
    assert (image - want).abs().max() < 0.05 * want.abs().max()
    assert logits.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_image_does_not_matter(layout: torch.memory_format) -> None:
    d = randomised(Discriminator(TINY)).double()
    image = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(d(image.contiguous(memory_format=layout)), d(image))


# ---- messages ----------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    g, gc = Generator(TINY), Generator(CONDITIONAL)
    d, dc = Discriminator(TINY), Discriminator(CONDITIONAL)
    z, image = torch.randn(2, 5), torch.randn(2, 3, 8, 8)
    cases: list[tuple[Any, str]] = [
        (lambda: g(torch.randn(2, 6)), r"z must be \[N, 5\], got \[2, 6\]"),
        (lambda: g(torch.randn(5)), r"z must be \[N, 5\], got \[5\]"),
        (lambda: g.mapping(None), r"z must be \[N, 5\], got None"),
        (lambda: gc(z), r"c must be \[N, 3\], got None"),
        (lambda: gc(z, torch.zeros(2, 4)), r"c must be \[N, 3\], got \[2, 4\]"),
        (lambda: g.synthesis(torch.randn(1, 5, 6)), r"ws must be \[N, 6 or 1, 6\], got \[1, 5, 6\]"),
        (lambda: g.synthesis(torch.randn(6, 6)), r"ws must be \[N, 6 or 1, 6\], got \[6, 6\]"),
        (lambda: g(z, noise_mode="fixed"), "noise_mode must be one of const, random, none, got 'fixed'"),
        (
            lambda: g.synthesis(
                torch.randn(1, 6, 6), noise={"b4.conv0": torch.zeros(4, 4), "b32.conv1": torch.zeros(1)}
            ),
            "noise for layers that are not there: b32.conv1, b4.conv0",
        ),
        (
            lambda: g.synthesis(torch.randn(1, 6, 6), noise={"b8.conv0": torch.zeros(4, 4)}),
            r"modulated_conv2d: noise must be \[8, 8\] or .*, got float32 \[4, 4\]",
        ),
        (lambda: d(image), r"img must be \[N, 3, 16, 16\], got \[2, 3, 8, 8\]"),
        (lambda: d(image[0]), r"img must be \[N, 3, 16, 16\], got \[3, 8, 8\]"),
        (lambda: dc(image), r"c must be \[N, 3\], got None"),
        (
            lambda: d(torch.randn(6, 3, 16, 16)),
            "the batch must be a multiple of the discriminator's group size 4, got 6",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()
