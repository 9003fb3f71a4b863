"""The networks in other precisions than their parameters', and how many launches they take."""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from launches import counted
from networks import CONDITIONAL, TINY, randomised
from spec_leaf import steps
from torch import Tensor, nn

from clone_fast.latent import LatentSettings
from clone_fast.nn import PRECISIONS, Architecture, Discriminator, Generator, Precision, settled
from clone_fast.nn.layers import Conv2dLayer, in_one_go
from clone_fast.nn.tables import bias_table
from clone_fast.ops import dispatch
from clone_fast.ops.dispatch import Leaf
from clone_fast.settings import TweakSettings

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "leaves"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the reference, and as on a GPU: on leaves, here those of tests/spec_leaf.py."""
    if request.param == "leaves":
        monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps(op)))
        for op in dispatch.OPS:
            monkeypatch.setattr(sys.modules[f"clone_fast.ops.{op}"], "resolve", lambda *args: "triton")
    return str(request.param)


# ---- the choice --------------------------------------------------------------------------------------------------


def test_precisions() -> None:
    assert {name: (p.name, p.dtype, p.allow_tf32) for name, p in PRECISIONS.items()} == {
        "bf16": ("bf16", torch.bfloat16, False),
        "fp16": ("fp16", torch.float16, False),
        "tf32": ("tf32", torch.float32, True),
        "fp32": ("fp32", torch.float32, False),
    }
    assert Precision.named("tf32") is PRECISIONS["tf32"]
    with pytest.raises(ValueError, match=r"^precision must be one of bf16, fp16, tf32, fp32, got 'fp8'$"):
        Precision.named("fp8")


# ---- recomputing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_recomputing_gives_the_same_for_less_memory(kind: Any, path: str) -> None:
    """Gradients, and gradients of gradients, which R1 wants; what waits for a backward is the inputs of the blocks."""
    network = randomised(kind(TINY))
    if kind is Generator:
        network = network.synthesis
        given = torch.randn(2, network.num_ws, TINY.w_dim)
    else:
        given = torch.randn(2, TINY.img_channels, TINY.img_resolution, TINY.img_resolution)
    found, kept = [], []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        network.zero_grad()
        kept.append(0)
        x = given.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = network(x, recompute=recompute)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([y.detach(), dx.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-9)
    assert kept[1] < 0.5 * kept[0]


def raise_if(true: bool) -> None:
    if true:
        raise ZeroDivisionError


@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", PRECISIONS)
def test_tf32_is_as_it_was_behind_the_block(name: str, before: tuple[bool, bool]) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        with pytest.raises(ZeroDivisionError), PRECISIONS[name].active():
            raise_if(matmul.allow_tf32 == cudnn.allow_tf32 == (name == "tf32"))
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    finally:
        matmul.allow_tf32 = cudnn.allow_tf32 = False


# ---- results -----------------------------------------------------------------------------------------------------


def outcome(module: Any, given: Tensor, image: Tensor, **options: Any) -> dict[str, Tensor]:
    """Result and gradients of the loss <result, image> to what is given and to every parameter."""
    given = given.clone().requires_grad_()
    y = module(given, **options)
    (y * image.to(y.dtype)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    # Each noise strength is one sum that may cancel out: together they are a vector like the others.
    strengths = torch.stack([grads.pop(name) for name in list(grads) if name.endswith("noise_strength")] or [y.sum()])
    return {"y": y.detach(), "given": given.grad, "strengths": strengths.detach(), **grads}  # type: ignore[dict-item]


def case(kind: str, arch: Architecture = TINY) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, what it is given and what its result is multiplied by; small numbers, for float16's gradients."""
    r = arch.img_resolution
    if kind == "synthesis":
        return randomised(Generator(arch)).synthesis, torch.randn(2, arch.num_ws, arch.w_dim), torch.randn(2, 3, r, r)
    return randomised(Discriminator(arch)), torch.randn(4, 3, r, r), torch.randn(4, 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["synthesis", "discriminator"])
def test_half_precision_from_float32_parameters(kind: str, dtype: torch.dtype, path: str) -> None:
    """The error of every result and gradient is at most twice that of a network of half precision altogether.

    The lower quartile over some networks is compared: in the others rounding carries an activation over the kink of
    its leaky ReLU, and that is a large error by chance, on either side.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(9):
        module, given, image = case(kind)
        rounded = given.to(dtype) if kind == "discriminator" else given
        exact = outcome(copy.deepcopy(module).double(), given.double(), image.double())
        plain = outcome(copy.deepcopy(module).to(dtype), rounded, image)
        mine = outcome(module, given, image, dtype=dtype)
        assert mine.keys() == exact.keys() == plain.keys()
        for name, want in exact.items():
            assert mine[name].dtype == torch.float32, name
            pair = [((found[name].double() - want).norm() / want.norm()).item() for found in (mine, plain)]
            errors.setdefault(name, []).append((pair[0], pair[1]))
    for name, pairs in errors.items():
        error, allowed = (statistics.quantiles(each)[0] for each in zip(*pairs, strict=True))
        assert error <= 2 * allowed + torch.finfo(dtype).eps, name
    assert statistics.median(error for error, _ in errors["y"]) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["synthesis", "discriminator"])
def test_own_dtype_by_name_changes_no_bit(kind: str) -> None:
    module, given, image = case(kind)
    for name, value in outcome(copy.deepcopy(module), given, image, dtype=torch.float32).items():
        assert torch.equal(value, outcome(copy.deepcopy(module), given, image)[name]), name


def watch_pairs(monkeypatch: pytest.MonkeyPatch, note: Callable[[str, Tensor, tuple[Tensor, ...]], None]) -> None:
    """Shows the input and the results of the ops that are a layer and more, which no layer's hooks see."""

    def watched(name: str, op: Any) -> Any:
        def run(x: Tensor, *args: Any, **options: Any) -> Any:
            found = op(x, *args, **options)
            note(name, x, found if isinstance(found, tuple) else (found,))
            return found

        return run

    ops = {"generator": ["modulated_conv2d_torgb"], "discriminator": ["conv2d_branch", "conv2d_down"]}
    for part, name in ((part, name) for part, names in ops.items() for name in names):
        module = sys.modules[f"clone_fast.nn.{part}"]
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))


@pytest.mark.parametrize("dtype", HALVES)
def test_convolutions_run_in_the_dtype_and_nothing_else_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, d = randomised(Generator(TINY)), randomised(Discriminator(TINY))
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for part in (g, d):
        for name, module in part.named_modules():
            if not list(module.children()) or name.endswith(("conv0", "conv1", "torgb")):
                module.register_forward_hook(
                    lambda module, args, y, name=name: seen.update({name: (args[0].dtype, y.dtype)})
                )
    watch_pairs(
        monkeypatch,
        lambda name, x, results: seen.update(
            {f"{name} {list(x.shape)} {i}": (x.dtype, y.dtype) for i, y in enumerate(results)}
        ),
    )
    image = g(torch.randn(4, 5), dtype=dtype)
    assert image.dtype == torch.float32
    assert d(image, dtype=dtype).dtype == torch.float32
    assert d.features(image, dtype=dtype).dtype == torch.float32
    convolutions = {name: found for name, found in seen.items() if "fc" not in name and "out" not in name}
    assert len(convolutions) == 7 + 2 * 2 + 2 + 1 + 1  # the result of a pair of convolutions is one
    assert set(convolutions.values()) == {(dtype, dtype)}
    assert {found for name, found in seen.items() if name not in convolutions} == {(torch.float32, torch.float32)}


def test_a_label_in_half_precision() -> None:
    g, d = randomised(Generator(CONDITIONAL)), randomised(Discriminator(CONDITIONAL))
    z, c = torch.randn(2, 5), torch.eye(3)[:2]
    want = d(g(z, c, noise_mode="const"), c)
    got = d(g(z, c, noise_mode="const", dtype=torch.bfloat16), c, dtype=torch.bfloat16)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("limit", [None, 2.0])
def test_float16_is_never_without_a_limit(limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations beyond float16 are cut at 256, or at what the architecture says; only in float16."""
    arch = Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_max=4, conv_clamp=limit)
    g, d = Generator(arch), Discriminator(arch)
    with torch.no_grad():
        for module in (g.synthesis, d):
            for name, parameter in module.named_parameters():
                if name.endswith(("conv0.bias", "conv1.bias", "fromrgb.bias")) and "affine" not in name:
                    parameter.fill_(1e5)
    ws, image = torch.randn(4, 4, 4), torch.rand(4, 3, 8, 8)
    high: list[float] = []
    watch_pairs(
        monkeypatch, lambda name, x, results: high.append(results[0].abs().max().item()) if x.shape[2] == 8 else None
    )
    assert g.synthesis(ws, dtype=torch.float16).isfinite().all()
    assert d(image, dtype=torch.float16).isfinite().all()
    assert high == pytest.approx([limit or 256, limit or 256, (limit or 256) * 0.5**0.5], rel=1e-3)
    high.clear()
    g.synthesis(ws, dtype=torch.bfloat16)
    d(image, dtype=torch.bfloat16)
    assert min(high) > 1e4 if limit is None else max(high) == limit


@pytest.mark.parametrize("dtype", [None, *HALVES])
def test_r1_reaches_every_weight(dtype: torch.dtype | None, path: str) -> None:
    """Differentiated twice in half precision: the gradient points where that of float64 points."""
    d, image, _ = case("discriminator")
    found = []
    for module, x, options in ((copy.deepcopy(d).double(), image.double(), {}), (d, image, {"dtype": dtype})):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(module(x, **options).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*found, dim=0) > (1 - 1e-6 if dtype is None else 0.99)


@pytest.mark.parametrize("kind", ["synthesis", "discriminator"])
def test_compiles_in_half_precision(kind: str) -> None:
    torch._dynamo.reset()
    module, given, _ = case(kind)
    graph = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    y = module(given, dtype=torch.bfloat16)
    torch.testing.assert_close(graph(given, dtype=torch.bfloat16), y, rtol=0.05, atol=0.05 * y.abs().max().item())


# ---- what is made for all layers at once -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [TINY, CONDITIONAL, Architecture(img_resolution=64, channel_base=1024)])
def test_tables_are_those_of_the_layers(arch: Architecture) -> None:
    with torch.device("meta"):
        d = Discriminator(arch)
    layers = [m for m in d.modules() if isinstance(m, Conv2dLayer) and m.bias is not None]
    assert bias_table(arch, torch.device("cpu")).tolist() == [m.fan_in for m in layers for _ in range(len(m.bias))]


def test_tables_outlive_inference_mode() -> None:
    arch = Architecture(img_resolution=8, z_dim=4, w_dim=4, channel_base=32, channel_max=3)
    g = Generator(arch)
    with torch.inference_mode():
        g(torch.randn(1, 4))
    g(torch.randn(1, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in g.synthesis.parameters())


def test_in_one_go() -> None:
    values = [torch.randn(3, requires_grad=True), torch.randn([], requires_grad=True), torch.randn(2)]
    factor = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert all(a is b for a, b in zip(in_one_go(values, torch.float32), values, strict=True))
    found = in_one_go(values, torch.bfloat16, factor)
    for value, got, by in zip(values, found, ([1.0, 2, 3], 4.0, [5.0, 6]), strict=True):
        assert torch.equal(got, (value * torch.tensor(by)).bfloat16())
    sum(got.float().sum() for got in found).backward()
    assert values[0].grad.tolist() == [1, 2, 3]
    assert values[1].grad.item() == 4


# ---- launches ----------------------------------------------------------------------------------------------------


def launches(run: Callable[[], Tensor], *, backward: bool) -> int:
    with counted() as found:
        y = run()
        if backward:
            y.backward(torch.empty_like(y))
    return found.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_config_f(dtype: torch.dtype) -> None:
    """An upper bound, and nothing in it reads the host: a tensor without memory cannot be read."""
    with torch.device("meta"):
        g, d = Generator(Architecture()), Discriminator(Architecture())
        ws, image = torch.empty(1, 18, 512), torch.empty(1, 3, 1024, 1024)
    found = {}
    for backward in (False, True):
        for name, module, run in (
            ("G", g, lambda: g.synthesis(ws, dtype=dtype)),
            ("D", d, lambda: d(image, dtype=dtype)),
        ):
            module.requires_grad_(backward)
            found[name, backward] = launches(run, backward=backward)
    half = dtype != torch.float32
    assert found["G", False] <= (83 if half else 63)  # 26 convolutions, 26 modulated weights
    assert found["G", True] <= (165 if half else 133)
    assert found["D", False] <= (73 if half else 54)  # with the filters that shrink for the other branch
    assert found["D", True] <= (146 if half else 107)  # float32's scaled weights among them, whose gradients are scaled


def test_the_last_image_is_written_as_it_is_returned() -> None:
    with torch.device("meta"):
        g, ws = Generator(Architecture()), torch.empty(1, 18, 512)
    with counted() as found:
        image = g.synthesis(ws, dtype=torch.bfloat16)
    assert image.is_contiguous()
    assert not found.found["aten::clone"]


@pytest.mark.parametrize(
    ("device", "capability", "want"), [("cpu", 9, "tf32"), ("cuda", 9, "bf16"), ("cuda", 7, "tf32")]
)
def test_a_device_s_own_precision(device: str, capability: int, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    for settings in (TweakSettings(), LatentSettings()):
        assert settled(settings, torch.device(device)).precision == want
        asked = replace(settings, precision="fp16")
        assert settled(asked, torch.device(device)) is asked
