"""Where the parts of a portrait are: the frames of head and body, and the ellipsoids of skin, hair and body.

Lengths in the head are in head units: the half height of a head, about 0.6 of the image's half height.
`a` is the dictionary of attributes, each [N].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .shapes import Ellipsoid, Frame, Surface, constant, degrees, per_image, rotation, soft

EYE_Y, MOUTH_Y, NOSE_Y = 0.0, -0.56, -0.27
_PIVOT = (0.0, -0.30, -0.15)  # of head turns, in head units


def head_frame(a: Mapping[str, Tensor]) -> Frame:
    turn = rotation(degrees(a["yaw"], 38), degrees(a["pitch"], 18), degrees(a["roll"], 12))
    scale = 0.60 * (1 + 0.07 * a["head_size"])
    pivot = constant(_PIVOT, scale)
    origin = pivot - (turn * pivot).sum(-1)
    origin = origin * scale[:, None] + constant((0.0, 0.09, 0.0), scale)
    return Frame(turn, origin, scale)


def body_frame(a: Mapping[str, Tensor]) -> Frame:
    turn = rotation(degrees(a["yaw"], 12), torch.zeros_like(a["yaw"]), degrees(a["roll"], 2))
    scale = 1 + 0.05 * a["head_size"]
    origin = constant((0.0, 0.17, -0.02), scale).expand(scale.shape[0], 3)
    return Frame(turn, origin, scale)


def eye_x(a: Mapping[str, Tensor]) -> Tensor:
    return 0.30 + 0.03 * a["eye_spacing"] + 0.015 * a["face_width"]


def head(a: Mapping[str, Tensor]) -> list[Ellipsoid]:
    wide = 1 + 0.08 * a["face_width"]
    jaw = 1 + 0.30 * a["jaw"]
    drop = 0.09 * a["mouth_open"] + 0.05 * a["beard"]
    smile = 0.05 * a["smile"]
    nose = 1 + 0.28 * a["nose_size"]
    nose_wide = nose * (1 + 0.25 * a["nose_width"])
    cheek_x, wing_x = 0.36 * wide, 0.075 * nose_wide
    return [
        Ellipsoid((0.0, 0.22, -0.12), (0.74 * wide, 0.74, 0.82)),
        Ellipsoid((0.0, -0.26, 0.06), (0.60 * wide + 0.035 * a["jaw"], 0.60, 0.62), 4.0),
        Ellipsoid((0.0, -0.70 - drop, 0.28), (0.28 * jaw, 0.19, 0.28), 2.2),
        Ellipsoid((cheek_x, -0.27 + smile, 0.38), (0.26, 0.22, 0.22), 1.8),
        Ellipsoid((-cheek_x, -0.27 + smile, 0.38), (0.26, 0.22, 0.22), 1.8),
        Ellipsoid((0.0, -0.11, 0.655), (0.095 * nose, 0.25, 0.12 * nose), 1.3, -0.25),
        Ellipsoid((0.0, NOSE_Y, 0.76), (0.125 * nose_wide, 0.115 * nose, 0.14 * nose), 2.2),
        Ellipsoid((0.0, MOUTH_Y - 0.5 * drop, 0.58), (0.24, 0.13, 0.12), 1.5),
        Ellipsoid((0.76 * wide, -0.10, -0.06), (0.085, 0.20, 0.14), 2.5, 0.2, -0.15),
        Ellipsoid((-0.76 * wide, -0.10, -0.06), (0.085, 0.20, 0.14), 2.5, 0.2, 0.15),
        Ellipsoid((wing_x, NOSE_Y - 0.05, 0.68), (0.075 * nose_wide, 0.07 * nose, 0.10), 2.2),
        Ellipsoid((-wing_x, NOSE_Y - 0.05, 0.68), (0.075 * nose_wide, 0.07 * nose, 0.10), 2.2),
    ]


def body(a: Mapping[str, Tensor]) -> list[Ellipsoid]:
    wide = 1 + 0.13 * a["shoulder_width"]
    neck = 0.185 + 0.02 * a["shoulder_width"] + 0.012 * a["jaw"]
    x = 0.44 * wide
    return [
        Ellipsoid((0.0, -0.58, -0.12), (neck, 0.50, 0.19), 3.5),
        Ellipsoid((0.0, -0.92, -0.16), (0.42 * wide, 0.19, 0.24), 2.2),
        Ellipsoid((x, -1.10, -0.12), (0.33, 0.28, 0.30), 3.0, 0.0, -0.35),
        Ellipsoid((-x, -1.10, -0.12), (0.33, 0.28, 0.30), 3.0, 0.0, 0.35),
        Ellipsoid((0.0, -1.28, -0.02), (0.58 * wide, 0.45, 0.36), 3.0),
    ]


def hair(a: Mapping[str, Tensor]) -> list[Ellipsoid]:
    """Cap, front puff, side locks (upper, lower), back curtain (upper, lower), bun.

    What an attribute takes away shrinks into the head, so that every style changes smoothly into every other.
    """
    wide = 1 + 0.08 * a["face_width"]
    amount, volume = a["hair_amount"], a["hair_volume"]
    thick = amount * (0.085 + 0.14 * volume) - 0.035
    upper = soft(a["hair_length"] - 0.30, 0.35) * amount
    lower = soft(a["hair_length"] - 0.62, 0.50) * amount
    bulk = 0.75 + 0.5 * volume
    upper_x = (0.42 + 0.27 * upper + 0.06 * volume * upper) * wide
    upper_y = 0.15 - 0.37 * upper
    lower_x = 0.40 + 0.27 * lower + 0.08 * volume
    part = 0.20 * a["parting"]
    bun = a["bun"] * amount
    upper_r = (0.05 + 0.20 * upper * bulk, 0.10 + 0.62 * upper, 0.10 + 0.32 * upper)
    lower_r = (0.05 + 0.23 * lower * bulk, 0.10 + 0.74 * lower, 0.08 + 0.24 * lower)
    puff = (0.05 + 0.44 * amount, 0.03 + (0.14 + 0.24 * volume) * amount, 0.05 + 0.34 * amount)
    curtain = (0.30 + 0.42 * upper * wide, 0.30 + 0.40 * upper, 0.35)
    tail = (0.25 + 0.42 * lower + 0.10 * volume * lower, 0.25 + 0.62 * lower, 0.12 + 0.14 * lower)
    return [
        Ellipsoid((0.0, 0.22, -0.14), (0.745 * wide + thick, 0.745 + 1.1 * thick, 0.82 + thick)),
        Ellipsoid((-part, 0.62 + 0.5 * thick, 0.26), puff, 2.5),
        Ellipsoid((upper_x, upper_y, -0.14), upper_r, 2.5, 0.0, 0.05),
        Ellipsoid((-upper_x, upper_y, -0.14), upper_r, 2.5, 0.0, -0.05),
        Ellipsoid((lower_x, -0.30 - 0.62 * lower, -0.10), lower_r, 2.5, 0.0, 0.04),
        Ellipsoid((-lower_x, -0.30 - 0.62 * lower, -0.10), lower_r, 2.5, 0.0, -0.04),
        Ellipsoid((0.0, -0.10 - 0.25 * upper, -0.45), curtain, 2.5),
        Ellipsoid((0.0, -0.25 - 0.70 * lower, -0.38), tail, 2.5),
        Ellipsoid(
            (0.0, 0.62 + 0.48 * bun + thick, -0.28),
            (0.04 + 0.30 * bun, 0.04 + 0.27 * bun, 0.04 + 0.28 * bun),
            4.0,
        ),
    ]


def face_window(a: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Distance [N, R, R], positive outside, to the outline around the face that hair leaves open."""
    short = 1 - soft(a["hair_length"] - 0.30, 0.35)
    half_width = per_image((0.60 + 0.12 * short - 0.05 * a["hair_volume"]) * (1 + 0.08 * a["face_width"]))
    top = per_image(0.60 - 0.36 * a["fringe"])
    bottom = -1.15
    half_height = 0.5 * (top - bottom)
    side = x / half_width
    lean = per_image(0.16 * a["parting"] * (0.5 + a["fringe"]))
    up = (y - lean * side - (bottom + half_height)) / half_height
    side2, up2 = side.square(), up.square()
    # a squarish oval: the fringe is a nearly straight line, the corners stay round
    radius = (side2 * side2 + up2 * up2 + 0.6 * side2 * up2 + 1e-6).sqrt().sqrt()
    return (radius - 1) * half_width


def hair_line(a: Mapping[str, Tensor], local: tuple[Tensor, Tensor, Tensor], strands: Tensor) -> Tensor:
    """Distance, positive where hair grows, of points on the hair's surface; strands: [N, R, R] in [-1, 1]."""
    x, y, z = local
    fringe = per_image(0.02 + 0.05 * a["fringe"])
    window = torch.maximum(face_window(a, x, y) + fringe * strands, 0.05 + 0.30 * soft(-0.1 - y, 0.5) - z)
    # short hair ends above the ears in front and in the nape behind
    short = 1 - soft(a["hair_length"] - 0.22, 0.30)
    end = per_image(-2.2 + 2.22 * short)
    nape = y - end + (0.28 - z).clamp_min(0) * 0.75
    return torch.minimum(window, nape + 0.02 * strands)


def shadow_of_head(frame: Frame, light: Tensor, surface: Surface) -> Tensor:
    """Light that the head lets through to `surface`, [N, R, R] in [0, 1]. light: [N, 3], unit."""
    lx, ly, lz = (per_image(light[:, i]) for i in range(3))
    ox, oy, oz = (per_image(frame.origin[:, i]) for i in range(3))
    dx, dy, dz = ox - surface.x, oy - surface.y, oz - surface.z
    along = dx * lx + dy * ly + dz * lz
    miss = (dx.square() + dy.square() + dz.square() - along.square()).clamp_min(1e-6).sqrt()
    return soft(miss - per_image(0.76 * frame.scale), 0.22)
