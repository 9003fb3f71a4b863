"""metrics.py: every number against an independent computation in float64, and the limits of each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from torch import Tensor

from clone_fast import metrics
from clone_fast.nn import Architecture, Discriminator, Generator

TINY = Architecture(
    img_resolution=16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8, mbstd_group_size=2
)


def generator(seed: int = 0, **changes: Any) -> Generator:
    torch.manual_seed(seed)
    return Generator(Architecture(**{**TINY.to_dict(), **changes})).eval().requires_grad_(False)


def moved(original: Generator, amount: float = 0.3) -> Generator:
    """A copy with other biases of its RGB layers: it draws a different picture."""
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.synthesis.get_submodule("b16.torgb").bias.add_(amount)
        other.synthesis.get_submodule("b8.conv1").bias.sub_(amount)
    return other


def pair(side: int, noise: float = 0.2, n: int = 2) -> tuple[Tensor, Tensor]:
    """Smooth images in [-1, 1], and the same with noise."""
    smooth = torch.nn.functional.interpolate(torch.rand(n, 3, 7, 7) * 2 - 1, (side, side), mode="bicubic")
    image = smooth.clamp(-1, 1)
    return image, (image + noise * torch.randn_like(image)).clamp(-1, 1)


# references in float64


def psnr64(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))


def ssim_maps64(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its contrast-structure factor at every pixel of one channel; equations 12 and 13 of Wang et al. 2004."""
    blur = partial(ndimage.gaussian_filter, sigma=1.5, radius=5, mode="mirror")
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    contrast = (2 * cov + c2) / (var_a + var_b + c2)
    return (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1) * contrast, contrast


def ssim64(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([ssim_maps64(x, y)[0] for x, y in zip(a, b, strict=True)]))


def ms_ssim64(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2003, equation 7, where the window lies inside of the image."""
    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        maps = [ssim_maps64(x, y) for x, y in zip(a, b, strict=True)]
        value = np.mean([(full if scale == 4 else contrast)[5:-5, 5:-5] for full, contrast in maps])
        product *= max(value, 0) ** weight
        halved = [(x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4 for x in (a, b)]
        a, b = halved[0], halved[1]
    return float(product)


def mean_over_images(formula: Callable[..., float], a: Tensor, b: Tensor) -> float:
    return float(np.mean([formula(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]))


# fidelity


@pytest.mark.parametrize("noise", [0.001, 0.2, 1.0])
def test_psnr(noise: float) -> None:
    a, b = pair(24, noise)
    assert metrics.psnr(a, b) == pytest.approx(mean_over_images(psnr64, a, b), abs=1e-3)


@pytest.mark.parametrize("side", [8, 33, 64])
@pytest.mark.parametrize("noise", [0.01, 0.2, 1.0])
def test_ssim(side: int, noise: float) -> None:
    a, b = pair(side, noise)
    assert metrics.ssim(a, b) == pytest.approx(mean_over_images(ssim64, a, b), abs=2e-5)


@pytest.mark.parametrize("noise", [0.05, 0.6])
def test_ms_ssim(noise: float) -> None:
    a, b = pair(192, noise, n=1)
    assert metrics.ms_ssim(a, b) == pytest.approx(mean_over_images(ms_ssim64, a, b), abs=2e-5)


def test_ms_ssim_needs_a_minimum_side() -> None:
    a, b = pair(metrics.MS_SSIM_MIN_SIDE - 1, n=1)
    assert metrics.ms_ssim(a, b) is None
    a, b = pair(metrics.MS_SSIM_MIN_SIDE, n=1)
    assert metrics.ms_ssim(a, b) is not None


def test_ssim_of_a_large_offset_keeps_its_digits() -> None:
    """Nearly constant bright images: the variances are small differences of large numbers."""
    a = torch.full((1, 3, 32, 32), 0.98) + 1e-3 * torch.randn(1, 3, 32, 32)
    b = a + 1e-3 * torch.randn_like(a)
    assert metrics.ssim(a, b) == pytest.approx(mean_over_images(ssim64, a.clamp(-1, 1), b.clamp(-1, 1)), abs=2e-4)


def test_equal_images() -> None:
    a, _ = pair(192, n=1)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert metrics.ms_ssim(a, a) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_values_are_those_that_a_viewer_sees(measure: Callable[[Tensor, Tensor], float]) -> None:
    a, b = pair(24)
    beyond = torch.where(b == 1, 1.7, b)
    assert measure(a, beyond) == measure(a, b)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim, metrics.ms_ssim])
@pytest.mark.parametrize("shapes", [((1, 3, 16, 16), (1, 3, 8, 8)), ((3, 16, 16), (3, 16, 16))])
def test_shapes_must_agree(measure: Callable[[Tensor, Tensor], float], shapes: Any) -> None:
    with pytest.raises(ValueError, match="wants two"):
        measure(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# the Frechet distance


def frechet64(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, with the root of the matrix itself."""
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


@pytest.mark.parametrize(("n_a", "n_b"), [(40, 40), (300, 25)])
def test_frechet_distance(n_a: int, n_b: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n_a, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(n_b, 6)) + 0.5
    found = metrics.frechet_distance(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(frechet64(a, b), rel=1e-9)


def test_frechet_distance_of_fewer_rows_than_features() -> None:
    """Covariances without full rank. In one plane for both, the distance is that of the plane."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.normal(size=(50, 3)))[0].T  # three orthonormal rows of 50 features
    a, b = rng.normal(size=(10, 3)), 2 * rng.normal(size=(12, 3))
    found = metrics.frechet_distance(torch.tensor(a @ frame), torch.tensor(b @ frame))
    assert found == pytest.approx(frechet64(a, b), rel=1e-9)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    a = torch.randn(30, 9, dtype=torch.float64)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(4 * 9, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 5), (5,), (5, 4)])
def test_frechet_distance_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frechet_distance"):
        metrics.frechet_distance(torch.zeros(shape), torch.zeros(6, 5))


# drift


def test_drift_by_hand() -> None:
    before = generator()
    after = moved(before)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    images = [g(z, noise_mode="const").clamp(-1, 1) for g in (before, after)]
    found = metrics.drift(before, after, n=5, seed=7, batch=2)
    assert found["drift_psnr"] == pytest.approx(mean_over_images(psnr64, *images), abs=1e-3)
    assert found["drift_ssim"] == pytest.approx(mean_over_images(ssim64, *images), abs=1e-4)
    assert set(found) == {"drift_psnr", "drift_ssim"}


def test_drift_of_nothing() -> None:
    same = generator()
    found = metrics.drift(same, copy.deepcopy(same), n=4, batch=4, features=lambda x: x.flatten(1))
    assert found["drift_psnr"] == math.inf
    assert found["drift_ssim"] == pytest.approx(1, abs=1e-6)
    assert found["drift_frechet"] == pytest.approx(0, abs=1e-6)


def test_drift_grows_with_the_change() -> None:
    before = generator()
    small, large = (metrics.drift(before, moved(before, amount), n=4) for amount in (0.05, 0.5))
    assert small["drift_psnr"] > large["drift_psnr"] + 10
    assert small["drift_ssim"] > large["drift_ssim"]


def test_drift_does_not_depend_on_the_batch_but_on_the_seed() -> None:
    before = generator()
    after = moved(before)
    features = partial(Discriminator(TINY).requires_grad_(False).features, per_image=True)
    one, three = (metrics.drift(before, after, n=7, batch=b, features=features) for b in (1, 3))
    for name, value in one.items():
        assert three[name] == pytest.approx(value, rel=1e-4), name
    assert metrics.drift(before, after, n=7, seed=1)["drift_psnr"] != one["drift_psnr"]


def test_drift_keeps_to_its_batch_and_to_its_own_randomness() -> None:
    before = generator()
    sizes: list[int] = []

    def watched(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.flatten(1)

    state = torch.random.get_rng_state()
    metrics.drift(before, before, n=7, batch=3, features=watched)
    assert sizes == [3, 3, 3, 3, 1, 1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_drift_of_a_class_conditional_generator() -> None:
    before = generator(c_dim=3)
    after = moved(before)
    found = metrics.drift(before, after, n=6)
    assert found == metrics.drift(before, after, n=6)
    assert math.isfinite(found["drift_psnr"])


@pytest.mark.parametrize("options", [{"n": 0}, {"batch": 0}])
def test_drift_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        metrics.drift(generator(), generator(), **options)


# editability


def test_editability_by_hand() -> None:
    before, after = generator(), moved(generator(1))
    ws = before.mapping(torch.randn(1, 8))
    directions = {"a": torch.randn(8), "b": torch.randn(before.num_ws, 8)}
    values = []
    for direction in directions.values():
        for strength in (-1.0, 3.0):
            changes = []
            for g in (after, before):
                edited, plain = (g.synthesis(w).clamp(-1, 1) for w in (ws + strength * direction, ws))
                changes.append((edited - plain).double().flatten().numpy())
            values.append(np.corrcoef(*changes)[0, 1])
    found = metrics.editability(before, after, ws, directions, (-1.0, 3.0), batch=3)
    assert found == pytest.approx(np.mean(values), abs=1e-6)
    assert found == pytest.approx(metrics.editability(before, after, ws, list(directions.values()), (-1.0, 3.0)))


def drawing(picture: Callable[[Tensor], Tensor]) -> Any:
    """A generator whose image is a function of ws [1, L, 8]."""
    return SimpleNamespace(synthesis=lambda ws, noise_mode, noise: picture(ws[:, 0]))


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (0.1, 1.0), (-0.5, -1.0)])
def test_editability_is_the_direction_of_the_change_not_its_size(factor: float, expected: float) -> None:
    basis = torch.randn(8, 3 * 6 * 6) * 0.02

    def before(w: Tensor) -> Tensor:
        return (w @ basis).reshape(-1, 3, 6, 6)

    found = metrics.editability(
        drawing(before), drawing(lambda w: factor * before(w) + 0.1), torch.zeros(1, 2, 8), [torch.randn(8)]
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_editability_of_no_change_is_zero() -> None:
    same = generator()
    ws = same.mapping(torch.randn(1, 8))
    assert metrics.editability(same, same, ws, [torch.zeros(8)]) == 0
    assert metrics.editability(same, same, ws, [torch.randn(8)]) == pytest.approx(1)


def test_editability_uses_the_noise_maps() -> None:
    before = generator()
    with torch.no_grad():
        before.synthesis.get_submodule("b16.conv1").noise_strength.fill_(1)
    after = moved(before)
    ws, direction = before.mapping(torch.randn(1, 8)), [torch.randn(8)]
    noise = {"b16.conv1": 5 * torch.randn(16, 16)}
    pairs = [(None, None), (noise, None), (None, noise), (noise, noise)]  # of the clone, of the latent-only inversion
    found = [metrics.editability(before, after, ws, direction, noise=n, noise_before=m) for n, m in pairs]
    assert len(set(found)) == 4


def test_editability_refuses_nothing_to_do() -> None:
    same = generator()
    for directions, strengths in (([], (1.0,)), ([torch.zeros(8)], ())):
        with pytest.raises(ValueError, match="at least one"):
            metrics.editability(same, same, torch.zeros(1, same.num_ws, 8), directions, strengths)


@pytest.mark.gpu
def test_tensor_float_32_does_not_reach_ssim() -> None:
    torch.backends.cudnn.allow_tf32 = True
    try:
        a, b = pair(64, 0.02)
        assert metrics.ssim(a.cuda(), b.cuda()) == pytest.approx(metrics.ssim(a, b), abs=1e-5)
    finally:
        torch.backends.cudnn.allow_tf32 = False
