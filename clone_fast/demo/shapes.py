"""Soft 3-D shapes for the portraits: smooth unions of ellipsoids, seen along parallel rays.

A shape is the level set F = 0 of F(p) = log sum_i exp(k_i (1 - q_i(p))), where q_i is the quadratic form
of ellipsoid i (1 on its surface) and k_i its sharpness. Along a ray every q_i is a parabola in depth, so
the front surface follows from a few closed-form steps: replace F by the parabola below it that touches it
at the current depth (the minorisation of the EM algorithm) and take that parabola's front root, or its
apex where the ray misses. The steps have no data-dependent control flow, and normals come from the same
weights, exactly.

Coordinates: x to the right, y up, z towards the viewer; the image spans [-1, 1] in x and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 5
_FRONT = 1.5  # depth at which the search starts: in front of everything

Scalar = Tensor | float


@dataclass(frozen=True)
class Frame:
    """A rigid, scaled frame. rotation: [N, 3, 3], columns are axes; origin: [N, 3]; scale: [N]."""

    rotation: Tensor
    origin: Tensor
    scale: Tensor

    def to_local(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """View coordinates (each broadcastable to [N, R, R]) in units of this frame."""
        inverse = 1 / self.scale
        dx, dy, dz = (
            x - per_image(self.origin[:, 0]),
            y - per_image(self.origin[:, 1]),
            z - per_image(self.origin[:, 2]),
        )
        rows = [per_image(self.rotation[:, i, j] * inverse) for j in range(3) for i in range(3)]
        return (
            rows[0] * dx + rows[1] * dy + rows[2] * dz,
            rows[3] * dx + rows[4] * dy + rows[5] * dz,
            rows[6] * dx + rows[7] * dy + rows[8] * dz,
        )

    def direction_to_local(self, direction: Tensor) -> Tensor:
        """direction: [N, 3] in view coordinates; returns [N, 3] along this frame's axes."""
        return (self.rotation * direction[:, :, None]).sum(1)


@dataclass(frozen=True)
class Ellipsoid:
    """One ellipsoid in frame units. Every number is a float or a tensor [N]; tilts are in radians."""

    centre: tuple[Scalar, Scalar, Scalar]
    radii: tuple[Scalar, Scalar, Scalar]
    sharpness: float = 4.0
    tilt_x: Scalar = 0.0
    tilt_z: Scalar = 0.0


@dataclass(frozen=True)
class Surface:
    """What the rays see first of a shape: position, coverage, unit normal; maps [N, R, R]."""

    x: Tensor
    y: Tensor
    z: Tensor
    coverage: Tensor
    normal: tuple[Tensor, Tensor, Tensor]


def constant(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Numbers, or rows of them, on the device of `like`; no host copy, so a CUDA graph can hold it."""
    rows = [v if isinstance(v, Sequence) else (v,) for v in values]
    flat = torch.stack([like.new_full((), number) for row in rows for number in row])
    return flat if isinstance(values[0], float) else flat.view(len(rows), -1)


def per_image(value: Tensor) -> Tensor:
    """[N] -> [N, 1, 1]."""
    return value[:, None, None]


def soft(distance: Tensor, width: Scalar) -> Tensor:
    """A smooth step from 0 to 1 over about `width`, 0.5 at distance 0."""
    return torch.sigmoid(distance * (4 / width))


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Angles [N] in radians -> rotation matrices [N, 3, 3] = Rz(roll) Ry(yaw) Rx(pitch).

    Positive yaw turns the face to +x, positive pitch lifts it, positive roll turns it counter-clockwise.
    """
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    cy, sy, cp, sp, cr, sr = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin(), roll.cos(), roll.sin()
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).view(-1, 3, 3)
    about_x = torch.stack([one, zero, zero, zero, cp, sp, zero, -sp, cp], 1).view(-1, 3, 3)
    about_z = torch.stack([cr, -sr, zero, sr, cr, zero, zero, zero, one], 1).view(-1, 3, 3)
    return _product(about_z, _product(about_y, about_x))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Product of small matrices without a matmul: TF32 must not reach the geometry."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def see(frame: Frame, ellipsoids: Sequence[Ellipsoid], x: Tensor, y: Tensor) -> Surface:
    """The visible surface of the smooth union of `ellipsoids` given in `frame`.

    x: broadcastable to [N, R, R], y: likewise, the view coordinates of the rays.
    """
    centre, matrix, sharpness = _place(frame, ellipsoids)
    cx, cy, cz = (centre[:, :, i, None, None] for i in range(3))
    scaled = matrix * sharpness[None, :, None, None]
    mxx, mxy, mxz = (scaled[:, :, 0, i, None, None] for i in range(3))
    myy, myz, mzz = (
        scaled[:, :, 1, 1, None, None],
        scaled[:, :, 1, 2, None, None],
        scaled[:, :, 2, 2, None, None],
    )
    dx, dy = x[:, None] - cx, y[:, None] - cy
    # exponent(z) = level - (mzz z + slope) z, one parabola per ellipsoid and ray
    across = mxz * dx + myz * dy
    slope = 2 * (across - mzz * cz)
    inner = dx * torch.addcmul((2 * mxy) * dy, mxx, dx) + myy * dy.square()
    level = (sharpness[None, :, None, None] - mzz * cz.square()) + (2 * cz) * across - inner

    z = torch.full_like(level[:, :1], _FRONT)
    for _ in range(_STEPS):
        field, terms, total = _soft_union(level, slope, mzz, z)
        curvature = (terms * mzz).sum(1, keepdim=True) / total
        fall = 2 * curvature * z + (terms * slope).sum(1, keepdim=True) / total
        root = (fall.square() + 4 * curvature * field).clamp_min(0).sqrt()
        z = z + (root - fall) / (2 * curvature)

    field, terms, total = _soft_union(level, slope, mzz, z)
    weights = terms / total
    dz = z - cz
    nx = (weights * (mxx * dx + mxy * dy + mxz * dz)).sum(1)
    ny = (weights * (mxy * dx + myy * dy + myz * dz)).sum(1)
    nz = (weights * (across + mzz * dz)).sum(1)
    length = (nx.square() + ny.square() + nz.square() + 1e-8).sqrt()
    # F / |grad F| is the distance by which a ray misses; the gradient of F is twice (nx, ny, nz)
    pixel = 2 / level.shape[-1]
    coverage = (1 + field[:, 0] / (2.4 * pixel * length)).clamp(0, 1)
    inverse = 1 / length
    normal = (nx * inverse, ny * inverse, (nz * inverse).clamp_min(0))
    return Surface(x, y, z[:, 0], coverage, normal)


def _soft_union(level: Tensor, slope: Tensor, mzz: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F [N, 1, R, R] at depth z, the ellipsoids' terms in it [N, K, R, R] (up to a factor), and their sum."""
    exponents = torch.addcmul(level, torch.addcmul(slope, mzz, z), z, value=-1)
    top = exponents.amax(1, keepdim=True)
    terms = (exponents - top).exp()
    total = terms.sum(1, keepdim=True)
    return total.log() + top, terms, total


def _place(frame: Frame, ellipsoids: Sequence[Ellipsoid]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [N, K, 3] and quadratic forms [N, K, 3, 3] in view coordinates, and sharpnesses [K]."""
    like = frame.scale

    def stack(values: Sequence[Scalar]) -> Tensor:
        return torch.stack([v if isinstance(v, Tensor) else torch.full_like(like, v) for v in values], 1)

    count = len(ellipsoids)
    local = stack([v for e in ellipsoids for v in e.centre]).view(-1, count, 3)
    radii = stack([v for e in ellipsoids for v in e.radii]).view(-1, count, 3)
    tilt_x, tilt_z = stack([e.tilt_x for e in ellipsoids]), stack([e.tilt_z for e in ellipsoids])
    own = rotation(torch.zeros_like(tilt_x).flatten(), tilt_x.flatten(), tilt_z.flatten()).view(
        -1, count, 3, 3
    )
    axes = _product(frame.rotation[:, None], own)
    centre = frame.origin[:, None] + frame.scale[:, None, None] * (
        frame.rotation[:, None] * local[:, :, None]
    ).sum(-1)
    stretched = axes / (radii * frame.scale[:, None, None])[:, :, None, :]
    matrix = _product(stretched, stretched.transpose(-1, -2))
    sharpness = torch.stack([torch.full_like(like[0], e.sharpness) for e in ellipsoids])
    return centre, matrix, sharpness


def pixel_grid(resolution: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres: x [1, 1, R] and y [1, R, 1] (top row first), on the device of `like`."""
    half = 1 - 1 / resolution
    x = torch.linspace(-half, half, resolution, device=like.device, dtype=torch.float32)
    return x[None, None, :], -x[None, :, None]


def degrees(value: Tensor, angle: float) -> Tensor:
    """An attribute in [-1, 1] as radians, `angle` degrees at 1."""
    return value * math.radians(angle)
