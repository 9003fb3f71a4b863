"""The formulas of the method, each against its definition written out in float64 or against finite differences."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import grids
import naive
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from launches import counted
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.losses import (
    SOFT,
    LaplacianPyramidLoss,
    Reconstruction,
    added,
    discriminator_adversarial,
    generator_adversarial,
    paired_cohesion,
    path_length_penalty,
    pyramid_levels,
    r1_penalty,
    weighted,
)
from clone_fast.ops import laplacian_pyramid
from clone_fast.reference import convolution
from clone_fast.reference import laplacian_pyramid as spec
from clone_fast.reference.convolution import _Convolution, _TransposedConvolution, fast_double_backward


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_d(logits: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(logits))


def log_not_d(logits: Tensor) -> Tensor:
    return torch.log(1 - torch.sigmoid(logits))


# ---- L_recon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "levels"), [(2, 1), (4, 1), (8, 2), (16, 3), (32, 4), (64, 5), (128, 6), (256, 6), (1024, 6)]
)
def test_the_pyramid_ends_at_a_residual_of_four_pixels_or_after_six_levels(resolution: int, levels: int) -> None:
    assert pyramid_levels(resolution) == levels


@pytest.mark.parametrize("resolution", [8, 16, 32])
@pytest.mark.parametrize("mse_weight", [0.0, 1.0, 3.0])
def test_reconstruction_is_the_mean_difference_of_each_level_and_the_mean_square(
    resolution: int, mse_weight: float
) -> None:
    photo, image = rand(1, 3, resolution, resolution, seed=1), rand(1, 3, resolution, resolution, seed=2)
    levels = {8: 2, 16: 3, 32: 4}[resolution]
    bands = [
        naive.laplacian_pyramid(naive.array(x), levels) for x in (image, photo)
    ]  # of each alone: the package takes that of the difference
    want = sum(np.abs(a - b).mean() for a, b in zip(*bands, strict=True))
    want += mse_weight * np.square(naive.array(image - photo)).mean()
    got = Reconstruction(photo, mse_weight=mse_weight)(image)
    assert got.shape == ()
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_reconstruction_is_lap1_of_bojanowski_per_element() -> None:
    """sum_j 2^(2j) |L_j(x) - L_j(y)|_1, divided by the number of elements of x."""
    photo, image = rand(1, 3, 16, 16, seed=1), rand(1, 3, 16, 16, seed=2)
    bands = naive.laplacian_pyramid(naive.array(image - photo), 3)
    lap1 = sum(2 ** (2 * j) * np.abs(band).sum() for j, band in enumerate(bands))
    assert Reconstruction(photo, mse_weight=0)(image).item() == pytest.approx(lap1 / photo.numel(), rel=1e-12)


def test_a_similarity_of_ones_own_takes_the_place_of_both_terms() -> None:
    photo, image = rand(1, 3, 8, 8, seed=1), rand(1, 3, 8, 8, seed=2)
    seen: list[tuple[Tensor, Tensor]] = []

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x, y))
        return x.new_tensor(7.0)

    assert Reconstruction(photo, similarity=similarity)(image).item() == 7
    assert seen[0][0] is image
    assert seen[0][1] is photo


def test_the_same_image_costs_nothing() -> None:
    photo = rand(1, 3, 16, 16)
    assert Reconstruction(photo)(photo.clone()).item() == 0
    assert paired_cohesion(photo, photo.clone()).item() == 0


def test_paired_cohesion_is_the_pyramid_distance_over_the_batch() -> None:
    before, after = rand(3, 3, 16, 16, seed=1), rand(3, 3, 16, 16, seed=2)
    grey = 2 / 255
    bands = naive.laplacian_pyramid(naive.array(after - before), 3)
    want = sum((np.sqrt(band**2 + grey**2) - grey).mean() for band in bands)
    assert paired_cohesion(after, before).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0])
def test_paired_cohesion_is_its_formula_band_by_band(scale: float, dtype: torch.dtype) -> None:
    """Value and gradient of the fused loss less its constant, where the images are nearly the same as well."""
    before, change = rand(2, 3, 32, 32, seed=1), rand(2, 3, 32, 32, seed=2)
    after = (before + scale * change).to(dtype).requires_grad_(True)
    before = before.to(dtype)
    exact = after.detach().double().requires_grad_(True)
    bands = laplacian_pyramid(exact - before.double(), levels=4)
    want = torch.stack([((b.square() + SOFT**2).sqrt() - SOFT).mean() for b in bands]).sum()
    got = paired_cohesion(after, before)
    rounding = torch.finfo(dtype).eps
    assert got.item() == pytest.approx(want.item(), rel=30 * rounding, abs=4 * SOFT * 2 * rounding)
    (slope,), (exact_slope,) = torch.autograd.grad(got, after), torch.autograd.grad(want, exact)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=0, atol=40 * rounding * float(exact_slope.abs().max()))


# ---- weights and sums ------------------------------------------------------------------------------------------------


def test_a_weight_of_one_and_a_sum_of_one_are_what_there_was() -> None:
    value, other = rand(1)[0], rand(1, seed=1)[0]
    assert weighted(1, value) is weighted(1.0, value) is added([value]) is value
    assert weighted(0.5, value).item() == 0.5 * value.item()
    assert weighted(0, value).item() == 0
    assert added(iter([value, other, value])).item() == pytest.approx(2 * value.item() + other.item(), rel=1e-15)


@pytest.mark.parametrize("weight", [0, 0.3, 1, 400.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda image, photo, **weight: Reconstruction(photo, **weight)(image),
        lambda image, photo, **weight: Reconstruction(photo, mse_weight=3.0, **weight)(image),
        lambda image, photo, **weight: Reconstruction(photo, similarity=F.l1_loss, **weight)(image),
        paired_cohesion,
    ],
    ids=["reconstruction", "with another mean square", "similarity", "paired"],
)
def test_the_weight_of_a_loss_is_a_factor(loss: Callable[..., Tensor], weight: float) -> None:
    photo, image = rand(1, 3, 16, 16, seed=1), rand(1, 3, 16, 16, seed=2).requires_grad_()
    got, want = loss(image, photo, weight=weight), weight * loss(image, photo)
    assert got.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12)
    for one, other in zip(torch.autograd.grad(got, image), torch.autograd.grad(want, image), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight", [1.0, 400.0])
def test_nothing_but_the_loss_stands_between_an_image_and_its_gradient(weight: float) -> None:
    with torch.device("meta"):
        photo, image = torch.empty(1, 3, 64, 64), torch.empty(1, 3, 64, 64, requires_grad=True)
    with counted() as launches:
        added([Reconstruction(photo, weight=weight)(image)]).backward()
    pyramid = {"clone_fast::laplacian_pyramid": 1, "clone_fast::laplacian_pyramid_backward": 1}
    assert dict(launches.found) == pyramid | {"aten::ones_like": 1}


# ---- the pyramid loss as a module --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": 2},
        {"levels": 3, "weights": [4, 0.0, 1]},
        {"levels": 3, "charbonnier": 0.01},
        {"levels": 3, "mse": 2.0},
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_the_module_is_the_specification(options: dict[str, Any], size: tuple[int, int]) -> None:
    x, y = rand(2, 3, *size, seed=1).requires_grad_(), rand(2, 3, *size, seed=2)
    want = spec.laplacian_pyramid_loss(x, y, **options)
    got = LaplacianPyramidLoss(**options)(x, y)
    assert got.shape == ()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_module_has_no_state_and_survives_copies_and_files() -> None:
    loss = LaplacianPyramidLoss(3, [1.0, 2.0, 3.0], charbonnier=0.1, mse=0.5)
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    x, y = rand(1, 3, 16, 16, seed=1), rand(1, 3, 16, 16, seed=2)
    for other in (copy.deepcopy(loss), torch.load(file, weights_only=False), nn.Sequential(loss)[0].half()):
        assert torch.equal(other(x, y), loss(x, y))
    assert "levels=3, weights=(1.0, 2.0, 3.0), charbonnier=0.1, mse=0.5" in repr(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_module_takes_what_autocast_makes(dtype: torch.dtype) -> None:
    """A generator in half precision and a target in float32, and no sum in half precision inside of it."""
    x, y = rand(1, 3, 16, 16, seed=1).to(dtype).requires_grad_(), rand(1, 3, 16, 16, seed=2).float()
    with torch.autocast("cpu", dtype=dtype):
        loss = LaplacianPyramidLoss(3)(x, y)
    assert loss.dtype == torch.float32
    want = spec.laplacian_pyramid_loss(x.detach().double(), y.double(), levels=3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.dtype == dtype


def test_the_module_compiles_as_one_graph() -> None:
    y = rand(2, 3, 16, 16, seed=2).float()
    loss = LaplacianPyramidLoss(3, charbonnier=0.01)
    grids.compiled(lambda x: loss(x, y), rand(2, 3, 16, 16, seed=1).float())


@pytest.mark.parametrize(
    "options", [{"levels": 0}, {"levels": 2, "weights": [1.0]}, {"weights": 3.0}, {"charbonnier": 0}, {"mse": -1}]
)
def test_the_module_refuses_wrong_options_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="laplacian_pyramid: "):
        LaplacianPyramidLoss(**options)


def test_the_module_refuses_what_is_no_image() -> None:
    x = rand(1, 3, 16, 16)
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        LaplacianPyramidLoss()(x, x.to(torch.uint8))
    with pytest.raises(ValueError, match="y must be"):
        LaplacianPyramidLoss()(x, x[:, :, :8])


# ---- adversarial terms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 1), (5,), (1, 1)])
def test_adversarial_losses_are_the_logarithms_of_the_formula(shape: tuple[int, ...]) -> None:
    real, fake = 3 * rand(*shape, seed=1), 3 * rand(*shape, seed=2)
    torch.testing.assert_close(
        discriminator_adversarial(real, fake), -(log_d(real) + log_not_d(fake)).mean(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(generator_adversarial(fake), -log_d(fake).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(generator_adversarial(fake, saturating=True), log_not_d(fake).mean(), rtol=1e-12, atol=0)


def test_d_and_the_saturating_g_play_the_same_game() -> None:
    """max over D and min over G of one and the same log D(x) + log(1 - D(G))."""
    real, fake = rand(4, 1, seed=1), rand(4, 1, seed=2).requires_grad_(True)
    (of_d,) = torch.autograd.grad(discriminator_adversarial(real, fake), fake)
    (of_g,) = torch.autograd.grad(generator_adversarial(fake, saturating=True), fake)
    torch.testing.assert_close(of_g, -of_d)
    (other,) = torch.autograd.grad(generator_adversarial(fake), fake)
    assert bool((other * of_g > 0).all()), "the non-saturating form pulls another way"


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_adversarial_losses_stay_finite_where_d_is_sure(logit: float) -> None:
    value = torch.full([2, 1], logit, requires_grad=True)
    for loss in (generator_adversarial(value), generator_adversarial(value, saturating=True)):
        (gradient,) = torch.autograd.grad(loss, value)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
    assert generator_adversarial(torch.tensor([[-200.0]])).item() == pytest.approx(200)


# ---- regularisers --------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """A smooth discriminator of 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, dtype=torch.float64)
        self.out = nn.Linear(8, 1, dtype=torch.float64)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(rand(*parameter.shape, seed=i))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.conv(x)).flatten(1))
        return logits


def finite_difference(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of the scalar function(x) by central differences, an entry of x at a time."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        move = torch.zeros_like(x)
        move.view(-1)[i] = step
        gradient.view(-1)[i] = (function(x + move) - function(x - move)) / (2 * step)
    return gradient


@torch.no_grad()
def jacobian_by_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """[*x.shape, *y.shape] of one sample x, whose moves in every entry are put through a batched function at once."""
    moves = step * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    columns = (function(x + moves) - function(x - moves)) / (2 * step)
    return columns.reshape(*x.shape, *columns.shape[1:])


def test_r1_is_the_mean_squared_norm_of_ds_gradient_by_finite_differences() -> None:
    judge, real = Judge(), rand(3, 3, 4, 4)
    want = torch.stack([jacobian_by_differences(judge, x).square().sum() for x in real]).mean()
    torch.testing.assert_close(r1_penalty(judge, real), want, rtol=1e-8, atol=0)
    torch.testing.assert_close(r1_penalty(judge, real, scale=64.0), want, rtol=1e-8, atol=0)


def test_the_gradient_of_r1_agrees_with_finite_differences() -> None:
    judge, real = Judge(), rand(2, 3, 4, 4)
    r1_penalty(judge, real).backward()
    for parameter in judge.parameters():
        value = parameter.detach().clone()

        def penalty(x: Tensor, parameter: Tensor = parameter) -> Tensor:
            parameter.data.copy_(x)
            with torch.enable_grad():
                return r1_penalty(judge, real).detach()

        want = finite_difference(penalty, value)
        parameter.data.copy_(value)
        got = torch.zeros_like(value) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_r1_of_the_discriminator_is_that_of_its_jacobian() -> None:
    judge = tiny.judge(tiny.network(resolution=8)).double()
    real = rand(2, 3, 8, 8)
    # the minibatch standard deviation lets each logit see every image: the gradient is that of the logits' sum
    jacobian = torch.autograd.functional.jacobian(judge, real).sum(dim=[0, 1])
    torch.testing.assert_close(r1_penalty(judge, real), jacobian.square().sum(dim=[1, 2, 3]).mean(), rtol=1e-10, atol=0)


def test_r1_leaves_the_images_alone() -> None:
    judge, real = Judge(), rand(2, 3, 4, 4)
    r1_penalty(judge, real).backward()
    assert not real.requires_grad
    assert real.grad is None


def lengths_by_jacobian(synthesis: Callable[[Tensor], Tensor], ws: Tensor, seed: int) -> Tensor:
    """|J^T y| of every sample, with y as the penalty draws it from this seed; mean over the layers inside the root."""
    lengths = []
    torch.manual_seed(seed)
    images = synthesis(ws)
    y = torch.randn_like(images) / images[0, 0].numel() ** 0.5
    for i in range(ws.shape[0]):
        pulled = torch.einsum("ldchw,chw->ld", jacobian_by_differences(synthesis, ws[i]), y[i])
        lengths.append((pulled.square().sum() / pulled.shape[0]).sqrt())
    return torch.stack(lengths)


@pytest.mark.parametrize("decay", [0.01, 1.0])
def test_path_length_penalty_is_that_of_the_jacobian(decay: float) -> None:
    synthesis = tiny.network(resolution=8).generator.double().synthesis
    ws = rand(2, synthesis.num_ws, 16)
    lengths = lengths_by_jacobian(synthesis, ws, seed=5)
    mean = torch.tensor(0.3, dtype=torch.float64)
    want_mean = 0.3 + decay * (lengths.mean() - 0.3)
    torch.manual_seed(5)
    got = path_length_penalty(synthesis, ws.requires_grad_(True), mean, decay=decay)
    torch.testing.assert_close(mean, want_mean.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(got, (lengths - want_mean).square().mean(), rtol=1e-6, atol=0)


def test_the_gradient_of_the_path_length_penalty_agrees_with_finite_differences() -> None:
    weight = rand(12, 4, seed=1)

    def penalty(weight: Tensor) -> Tensor:
        torch.manual_seed(3)
        ws = rand(2, 2, 4, seed=2).requires_grad_(True)
        mean = torch.tensor(0.2, dtype=torch.float64)  # decay 0: the running mean is a constant of the gradient
        draw = lambda ws: torch.tanh(ws.sum(dim=1) @ weight.t()).reshape(2, 3, 2, 2)  # noqa: E731
        return path_length_penalty(draw, ws, mean, decay=0)

    def detached(weight: Tensor) -> Tensor:
        with torch.enable_grad():
            return penalty(weight).detach()

    moved = weight.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(penalty(moved), moved)
    torch.testing.assert_close(got, finite_difference(detached, weight), rtol=1e-6, atol=1e-8)


# ---- convolutions that are differentiated twice ----------------------------------------------------------------------

SHAPES = [  # height, width, kernel, stride, padding
    (5, 6, 3, 1, 1),
    (5, 5, 3, 1, 0),
    (7, 8, 3, 2, 0),  # the last column is read by nobody
    (8, 7, 3, 2, 1),
    (6, 6, 1, 2, 0),
    (9, 9, 3, 3, 1),
    (4, 5, 1, 1, 0),
]


def conv_case(height: int, width: int, kernel: int) -> tuple[Tensor, Tensor]:
    return rand(2, 2, height, width, seed=1), rand(3, 2, kernel, kernel, seed=2)


@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding"), SHAPES)
def test_convolution_passes_gradcheck_of_both_orders(
    height: int, width: int, kernel: int, stride: int, padding: int
) -> None:
    inputs = tuple(t.requires_grad_(True) for t in conv_case(height, width, kernel))
    function = lambda x, w: _Convolution.apply(x, w, stride, padding)  # noqa: E731
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2), (2, 2)])
def test_transposed_convolution_passes_gradcheck_of_both_orders(kernel: int, stride: int) -> None:
    x, w = conv_case(4, 3, kernel)
    inputs = (x.requires_grad_(True), w.transpose(0, 1).contiguous().requires_grad_(True))
    function = lambda x, w: _TransposedConvolution.apply(x, w, stride)  # noqa: E731
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def derivatives(function: Callable[..., Tensor], x: Tensor, w: Tensor) -> list[Tensor]:
    """The value, both gradients, and the gradients of their squared norms: R1's kind of second derivative."""
    x, w = x.clone().requires_grad_(True), w.clone().requires_grad_(True)
    y = function(x, w)
    first = torch.autograd.grad(y.pow(3).sum(), (x, w), create_graph=True)
    second = [torch.autograd.grad(g.square().sum(), (x, w), retain_graph=True) for g in first]
    return [y, *first, *second[0], *second[1]]


@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding"), SHAPES)
def test_derivatives_of_convolution_equal_the_native_ones(
    height: int, width: int, kernel: int, stride: int, padding: int
) -> None:
    case = conv_case(height, width, kernel)
    got = derivatives(lambda x, w: _Convolution.apply(x, w, stride, padding), *case)
    want = derivatives(lambda x, w: F.conv2d(x, w, stride=stride, padding=padding), *case)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_derivatives_of_transposed_convolution_equal_the_native_ones(kernel: int, stride: int) -> None:
    x, w = rand(2, 3, 4, 3, seed=1), rand(3, 2, kernel, kernel, seed=2)
    got = derivatives(lambda x, w: _TransposedConvolution.apply(x, w, stride), x, w)
    want = derivatives(lambda x, w: F.conv_transpose2d(x, w, stride=stride), x, w)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needed", [0, 1])
def test_convolutions_compute_only_the_gradient_that_is_wanted(needed: int) -> None:
    inputs = list(conv_case(6, 6, 3))
    inputs[needed].requires_grad_(True)
    x, w = inputs
    for y, native in (
        (_Convolution.apply(x, w, 1, 1), F.conv2d(x, w, padding=1)),
        (_TransposedConvolution.apply(x, w.transpose(0, 1), 2), F.conv_transpose2d(x, w.transpose(0, 1), stride=2)),
    ):
        (got,), (want,) = (torch.autograd.grad(out.square().sum(), inputs[needed]) for out in (y, native))
        torch.testing.assert_close(got, want)


def test_the_fast_second_derivative_is_asked_for_by_block_and_ends_with_it() -> None:
    assert not convolution._enabled.get()
    with fast_double_backward():
        assert convolution._enabled.get()
        with contextlib.suppress(KeyError), fast_double_backward():
            raise KeyError
        assert convolution._enabled.get()
    assert not convolution._enabled.get()


def test_on_a_cpu_convolutions_are_native_everywhere() -> None:
    x, w = conv_case(6, 6, 3)
    with fast_double_backward():
        y = convolution.conv2d(x.requires_grad_(True), w, padding=1)
        z = convolution.conv_transpose2d(x, w.transpose(0, 1), stride=2)
    assert "_Convolution" not in type(y.grad_fn).__name__
    assert "_TransposedConvolution" not in type(z.grad_fn).__name__
