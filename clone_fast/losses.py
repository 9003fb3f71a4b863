"""The losses of Clone, as formulas, and the two regularisers of StyleGAN2 training.

Feng et al. 2022, "Near Perfect GAN Inversion" (arXiv 2202.11833). A logit l stands for D = sigmoid(l), so that
log D = -softplus(-l) and log(1 - D) = -softplus(l). Logits are [N, 1] or [N], images [N, C, H, W]; every loss is a
scalar, the mean over its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clone_fast.ops import fast_double_backward, laplacian_pyramid_loss

Similarity = Callable[[Tensor, Tensor], Tensor]

SOFT = 2 / 255  # one grey level: differences well below it count as squares


def pyramid_levels(resolution: int) -> int:
    """Levels of the Laplacian pyramid for this image size: down to a residual of 4 pixels, 6 at the most."""
    return max(1, min(6, resolution.bit_length() - 2))


def weighted(weight: float, value: Tensor) -> Tensor:
    """weight * value, which costs nothing where the weight is 1."""
    return value if weight == 1 else weight * value


def added(terms: Iterable[Tensor]) -> Tensor:
    """The sum of some terms; of a single one that itself, on the way back, too."""
    return reduce(torch.add, terms)


class Reconstruction:
    """L_recon: Laplacian pyramid loss of clone and photo, plus a mean square error.

    The pyramid weighs every level's mean absolute difference equally, which is what makes the picture sharp at all
    scales; the mean square error pulls at large errors, which is what PSNR counts.

    Args:
        photo: [1, C, R, R], the target.
        mse_weight: factor of the mean square error.
        similarity: a loss of one's own, (image, photo) -> scalar, in place of both.
        weight: factor of all.
    """

    def __init__(
        self, photo: Tensor, *, mse_weight: float = 1.0, similarity: Similarity | None = None, weight: float = 1.0
    ) -> None:
        self.photo = photo
        self.mse_weight = mse_weight
        self.similarity = similarity
        self.weight = weight

    def __call__(self, image: Tensor) -> Tensor:
        if self.similarity is not None:
            return weighted(self.weight, self.similarity(image, self.photo))
        return _pyramid_loss(image, self.photo, self.weight, mse=self.mse_weight)


class LaplacianPyramidLoss(nn.Module):
    """`laplacian_pyramid_loss` as a module without parameters or state, for a training loop of one's own.

    Args:
        levels, weights, charbonnier, mse: see `clone_fast.laplacian_pyramid_loss`.

    Raises:
        ValueError: one of these is not as it says there.
    """

    def __init__(
        self,
        levels: int = 6,
        weights: Sequence[float] | None = None,
        charbonnier: float | None = None,
        mse: float = 0.0,
    ) -> None:
        super().__init__()
        self.levels, self.charbonnier, self.mse = levels, charbonnier, mse
        self.weights = tuple(weights) if isinstance(weights, Sequence) else weights
        pixel = torch.zeros(1, 1, 1, 1)
        self.forward(pixel, pixel)  # wrong options are told by the op itself, and now

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, float32 (float64 of float64 images), of images [N, C, H, W] of one shape and device.

        Where autocast leaves one in half precision and the other in float32, both are taken as float32.

        Raises:
            TypeError, ValueError: x and y are no such images.
        """
        if x.dtype != y.dtype and x.is_floating_point() and y.is_floating_point():
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        return laplacian_pyramid_loss(
            x, y, levels=self.levels, weights=self.weights, charbonnier=self.charbonnier, mse=self.mse
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, weights={self.weights}, charbonnier={self.charbonnier}, mse={self.mse}"


def discriminator_adversarial(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-(log D(x) + log(1 - D(G))): what D minimises, as it maximises the adversarial term."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_adversarial(fake_logits: Tensor, *, saturating: bool = False) -> Tensor:
    """What G minimises: log(1 - D(G)) if saturating, as the formula stands, or -log D(G).

    Both pull the same way; the second (Goodfellow et al. 2014, section 3) keeps its gradient where D is sure that the
    image is fake, which is where a clone starts.
    """
    return -F.softplus(fake_logits).mean() if saturating else F.softplus(-fake_logits).mean()


def paired_cohesion(after: Tensor, before: Tensor, *, weight: float = 1.0) -> Tensor:
    """Distance over the pyramid of what the tweaked and the original G draw for the same latents.

    Sum over the levels of the mean of sqrt(d^2 + s^2) - s, the Charbonnier form of the absolute difference d: the two
    start equal, where the gradient of |d| would be the sign of rounding errors at full weight.

    Not part of the paper, whose cohesion ties the distributions of images, not the image of each latent.

    weight: factor of it.
    """
    levels = pyramid_levels(after.shape[-1])
    return _pyramid_loss(after, before, weight, charbonnier=SOFT) - weight * levels * SOFT


def _pyramid_loss(
    x: Tensor, y: Tensor, weight: float, *, charbonnier: float | None = None, mse: float = 0.0
) -> Tensor:
    """With this factor, which costs nothing as one of every level and of the mean square error."""
    levels = pyramid_levels(x.shape[-1])
    return laplacian_pyramid_loss(
        x, y, levels=levels, weights=[float(weight)] * levels, charbonnier=charbonnier, mse=weight * mse
    )


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, *, scale: float = 1.0) -> Tensor:
    """Mean over real images of |grad D(x)|^2 (Mescheder et al. 2018); multiply by gamma / 2.

    scale: what the logits are multiplied by on the way to that gradient, so that float16 can hold what is small.
    """
    images = real.detach().requires_grad_(True)
    with fast_double_backward():
        (gradient,) = torch.autograd.grad(discriminator(images).sum() * scale, images, create_graph=True)
    return (gradient / scale).square().sum(dim=[1, 2, 3]).mean()


def path_length_penalty(
    synthesis: Callable[[Tensor], Tensor], ws: Tensor, mean: Tensor, *, decay: float = 0.01
) -> Tensor:
    """StyleGAN2's path length regularisation (Karras et al. 2020, section 3.2): mean of (|J^T y| - a)^2.

    Args:
        synthesis: ws [N, num_ws, w_dim] -> images.
        ws: with a graph to the mapping network.
        mean: [] the running mean a of the lengths; updated in place.
        decay: of the running mean.
    """
    with fast_double_backward():
        images = synthesis(ws)
        noise = torch.randn_like(images) / (images.shape[2] * images.shape[3]) ** 0.5
        (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
    mean.lerp_(lengths.detach().mean(), decay)
    return (lengths - mean).square().mean()
