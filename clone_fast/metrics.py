"""What "near perfect" is measured by: fidelity, cohesion (drift) and editability, always the three together.

Images are [N, 3, R, R] in [-1, 1]. Everything here clamps them to that range first, so that a number speaks
of what a viewer sees, and takes the data range as 2. All functions run without gradients, on the device of
their input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytorch_msssim
import torch
from torch import Tensor
from torch.nn.functional import pad

from clone_fast.nn import Draw, drawn
from clone_fast.stepwise import Pause, Steps, stepwise

if TYPE_CHECKING:
    from clone_fast.nn.generator import Generator

DRIFT_SEED = 220_211_833
"""Seed of the latents that drift is measured on; nothing else in the package uses it."""

_WINDOW = 11  # pixels of SSIM's
_ROUNDING = 1e-5  # what one image may differ by in root mean square, drawn alone or within a batch

MS_SSIM_MIN_SIDE = 176
"""Smallest side that MS-SSIM is defined for here: 11 pixels, its window, are left of it after four halvings."""


@torch.no_grad()
def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal to noise ratio in dB, 10 log10(2^2 / MSE), mean over the images; infinite for equal ones.

    Args:
        image, target: [N, 3, R, R] in [-1, 1].
    """
    return _mean(_psnr(image, target))


@torch.no_grad()
def ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity, mean over the images.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004:
    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03; per channel, borders reflected.

    Args:
        image, target: [N, 3, R, R] in [-1, 1], R at least 6.
    """
    return _mean(_ssim(image, target))


@torch.no_grad()
def ms_ssim(image: Tensor, target: Tensor) -> float | None:
    """Multi-scale SSIM over five scales, mean over the images; None if a side is below `MS_SSIM_MIN_SIDE`.

    Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment", Asilomar 2003; at every
    scale where the window lies inside of the image.

    Args:
        image, target: [N, 3, R, R] in [-1, 1].
    """
    image, target = _pair(image, target)
    if min(image.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    with _full_precision():
        window = _window(image.shape[1], image.device)
        return _mean(pytorch_msssim.ms_ssim(image, target, data_range=2.0, win=window, size_average=False))


@stepwise
@torch.no_grad()
def drift(
    before: Generator,
    after: Generator,
    n: int = 256,
    seed: int = DRIFT_SEED,
    batch: int = 8,
    device: torch.device | str | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    draw: Draw = drawn,
) -> Steps[dict[str, float]]:
    """How far the manifold moved: the same random latents, drawn by the generators before and after the
    tweak.

    z ~ N(0, I) comes from a `torch.Generator` of its own, so these latents take no part in the tweak; a
    class-conditional generator gets uniformly random classes. No truncation, noise_mode "const". No more than
    2 * `batch` images exist at once.

    Args:
        before, after: the generators, with the same z_dim and resolution, both on `device`.
        device: where the latents are put; by default the device of `after`.
        features: maps [B, 3, R, R] to [B, F], usually the discriminator's features; then the Frechet distance
            of the two sets is measured, too. Its scale is that of the features: compare numbers of one
            network only. `functools.partial(discriminator.features, per_image=True)` makes them independent
            of `batch`.
        draw: how the generators draw.

    Returns:
        "drift_psnr" (dB) and "drift_ssim": means over the pairs, higher is less drift; and "drift_frechet"
        (see `frechet_distance`, lower is less) if `features` is given.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"drift: n and batch must be at least 1, got {n} and {batch}")
    where = next(after.parameters()).device if device is None else torch.device(device)
    source = torch.Generator().manual_seed(seed)
    latents, labels = before.sample(n, source)  # all at once: the same ones for any batch
    sums = torch.zeros(2, dtype=torch.float64, device=where)
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, n, batch):
        z = latents[start : start + batch].to(where)
        c = None if labels is None else labels[start : start + batch].to(where)
        pair = [draw(g, g.mapping(z, c)[:, :1], None).float().clamp(-1, 1) for g in (before, after)]
        sums += torch.stack([_psnr(*pair).double().sum(), _ssim(*pair).double().sum()])
        if features is not None:
            for rows, images in zip(seen, pair, strict=True):
                rows.append(features(images).double())
        yield Pause.MEASURE  # nothing is read, which would wait for what was launched, before all of it is
    psnr_sum, ssim_sum = sums.tolist()
    result = {"drift_psnr": psnr_sum / n, "drift_ssim": ssim_sum / n}
    if features is not None:
        result["drift_frechet"] = frechet_distance(*(torch.cat(rows).cpu() for rows in seen))
    return result


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of feature vectors, as in FID.

        d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    The trace of the root is the sum of the roots of the eigenvalues of C_a C_b. With X the centred rows over
    sqrt(n - 1), so that C = X^T X, these eigenvalues are the squares of the singular values of X_a X_b^T. So
    no root of an ill-conditioned matrix is taken, and fewer rows than features are no problem. In float64.
    (Dowson, Landau, "The Frechet distance between multivariate normal distributions", 1982; Heusel et al.,
    2017.)

    Args:
        a, b: [n_a, F] and [n_b, F], at least two rows each.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance: wants [n >= 2, F] twice, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    x_a, x_b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    # R of X = Q R has the singular values of X and at most F rows: the product is small however many images.
    r_a, r_b = (torch.linalg.qr(x, mode="r").R for x in (x_a, x_b))
    root = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + x_a.square().sum() + x_b.square().sum() - 2 * root
    return max(0.0, float(distance))


@stepwise
@torch.no_grad()
def editability(
    before: Generator,
    after: Generator,
    ws: Tensor,
    directions: Mapping[str, Tensor] | Iterable[Tensor],
    strengths: Sequence[float] = (-2.0, 2.0),
    noise: Mapping[str, Tensor] | None = None,
    noise_before: Mapping[str, Tensor] | None = None,
    batch: int = 8,
    draw: Draw = drawn,
) -> Steps[float]:
    """Whether the clone can be edited as the latent-only inversion can: the mean correlation of the changes.

    For each direction d and strength s, with G' = `after` and G = `before`,

        a = G'(ws + s d) - G'(ws)     the edit of the clone, minus the clone
        b = G(ws + s d) - G(ws)       the edit of the latent-only inversion, minus that inversion

    and the result is the mean over all (d, s) of Pearson's correlation of a and b over pixels and channels: 1
    if the clone changes in exactly the same way, 0 if it has nothing to do with it. A change too small to see
    counts as 0.

    Args:
        before, after: the generators; `after` made the clone.
        ws: [1, num_ws, w_dim], the latent of the inversion.
        directions: moves of w, each [w_dim] or [num_ws, w_dim], by name or not.
        strengths: factors of the directions.
        noise: the noise maps of the clone, as `synthesis` takes them.
        noise_before: those of the latent-only inversion.
        batch: images that are drawn at once.
        draw: how the generators draw.
    """
    moves = list(directions.values()) if isinstance(directions, Mapping) else list(directions)
    if not moves or not strengths:
        raise ValueError("editability: wants at least one direction and one strength")

    sides = ((after, noise), (before, noise_before))

    def images(latent: Tensor) -> list[Tensor]:
        return [draw(g, latent, maps).float().clamp(-1, 1) for g, maps in sides]

    moved = torch.cat([ws + strength * move.to(ws) for move in moves for strength in strengths])
    start = images(ws)
    values = []
    for part in moved.split(batch):
        changes = [edited - image for edited, image in zip(images(part), start, strict=True)]
        for pair in zip(*changes, strict=True):
            seen = torch.stack([change.square().mean().sqrt() for change in pair]).min() > _ROUNDING
            values.append(torch.where(seen, _correlation(*pair), 0.0))
        yield Pause.MEASURE
    return math.fsum(torch.stack(values).tolist()) / len(values)


@torch.no_grad()
def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of all values of two tensors of one shape, in float64; 0 if one is constant."""
    return float(_correlation(a, b))


# ------------------------------------------------------------------------------------------------------------


def _pair(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if image.ndim != 4 or image.shape != target.shape:
        got = f"{tuple(image.shape)} and {tuple(target.shape)}"
        raise ValueError(f"metrics: wants two [N, 3, R, R] of one shape, got {got}")
    return image.detach().float().clamp(-1, 1), target.detach().to(image.device).float().clamp(-1, 1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    x, y = (t.double().flatten() - t.double().mean() for t in (a, b))
    norm = x.norm() * y.norm()
    return torch.where(norm > 0, x @ y / norm, 0.0)


def _psnr(image: Tensor, target: Tensor) -> Tensor:
    """[N] values in dB."""
    image, target = _pair(image, target)
    return 10 * torch.log10(4 / (image - target).square().mean([1, 2, 3]))


def _ssim(image: Tensor, target: Tensor) -> Tensor:
    """[N] values."""
    reflected = [pad(one, [_WINDOW // 2] * 4, mode="reflect") for one in _pair(image, target)]
    window = _window(image.shape[1], image.device)
    with _full_precision():
        return pytorch_msssim.ssim(*reflected, data_range=2.0, win=window, size_average=False)


@functools.cache
def _window(channels: int, device: torch.device) -> Tensor:
    """[channels, 1, 1, 11], SSIM's Gaussian of sigma 1.5. It goes to the device once: every copy from the host would
    wait for what was launched there."""
    away = torch.arange(_WINDOW, dtype=torch.float32) - _WINDOW // 2
    weights = torch.exp(-away.square() / (2 * 1.5**2))
    return (weights / weights.sum()).repeat(channels, 1, 1, 1).to(device)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TensorFloat-32, the default of convolutions: E[x^2] - E[x]^2 needs all bits of a float32."""
    with torch.backends.cudnn.flags(enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
