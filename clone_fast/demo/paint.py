"""The paint of a portrait: albedos of skin, face, hair, clothes and background, in linear light.

Features are painted in head coordinates on the surface point that a pixel sees, so they turn with the head.
Maps are [N, R, R], colours [N, 3, R, R] or [N, 3, 1, 1]; `a` is the dictionary of attributes, each [N].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .anatomy import EYE_Y, MOUTH_Y, NOSE_Y, eye_x, face_window
from .shapes import Frame, constant, per_image, soft

Attributes = Mapping[str, Tensor]
Local = tuple[Tensor, Tensor, Tensor]


def rgb(colour: Sequence[float], like: Tensor) -> Tensor:
    """An sRGB colour as linear light, [1, 3, 1, 1]."""
    return constant(colour, like).pow(2.2)[None, :, None, None]


def blend(stops: Sequence[Sequence[float]], t: Tensor) -> Tensor:
    """A smooth ramp through sRGB colours: t [N] in [0, 1] -> linear light [N, 3, 1, 1]."""
    table = constant(stops, t)
    place = t.clamp(0, 1)[:, None] * (len(stops) - 1)
    weights = (1 - (place - torch.arange(len(stops), device=t.device)).abs()).clamp_min(0)
    weights = weights * weights * (3 - 2 * weights)
    return (weights[:, :, None] * table).sum(1).pow(2.2)[:, :, None, None]


def hue_colour(hue: Tensor, saturation: Tensor, lightness: Tensor) -> Tensor:
    """A smooth colour wheel: hue, saturation, lightness [N] in [0, 1] -> linear light [N, 3, 1, 1]."""
    shift = constant((0.0, 1 / 3, 2 / 3), hue)
    wave = torch.cos(2 * math.pi * (hue[:, None] - shift))
    colour = lightness[:, None] * (1 + 0.65 * saturation[:, None] * wave) * (1 - 0.12 * saturation[:, None])
    return colour.clamp(0.01, 0.98).pow(2.2)[:, :, None, None]


def over(base: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    """colour over base, alpha [N, R, R]."""
    return torch.lerp(base, colour.expand_as(base), alpha[:, None].expand_as(base))


def bump(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """A Gaussian bump, 1 at (0, 0)."""
    return torch.exp(-(x * (1 / width)).square() - (y * (1 / height)).square())


def ripple(x: Tensor, y: Tensor, phase: Tensor, frequency: float) -> Tensor:
    """Smooth aperiodic-looking texture in about [-1, 1]. phase: [N, >= 4]."""
    p = [per_image(phase[:, i]) for i in range(4)]
    first = torch.sin(frequency * x + p[0] + 1.5 * torch.sin(0.61 * frequency * y + p[1]))
    return first * torch.sin(1.13 * frequency * y + p[2] + 1.5 * torch.sin(0.53 * frequency * x + p[3]))


def skin_colour(a: Attributes) -> Tensor:
    stops = [
        (0.99, 0.85, 0.77),
        (0.94, 0.74, 0.61),
        (0.80, 0.57, 0.43),
        (0.60, 0.40, 0.29),
        (0.41, 0.26, 0.19),
    ]
    tint = constant((0.10, -0.04, -0.02), a["skin_tone"])
    return blend(stops, a["skin_tone"]) * (1 - tint * a["skin_undertone"][:, None])[:, :, None, None]


def hair_colour(a: Attributes) -> Tensor:
    stops = [
        (0.10, 0.075, 0.07),
        (0.24, 0.15, 0.11),
        (0.45, 0.29, 0.18),
        (0.73, 0.54, 0.32),
        (0.93, 0.81, 0.58),
    ]
    colour = blend(stops, a["hair_lightness"])
    redness = a["hair_redness"] * (1 - 0.7 * a["hair_grey"])
    red = rgb((0.62, 0.24, 0.10), colour) * (0.45 + 0.9 * a["hair_lightness"])[:, None, None, None]
    colour = torch.lerp(colour, red, (0.85 * redness)[:, None, None, None])
    grey = rgb((0.76, 0.79, 0.79), colour) * (0.35 + 0.65 * a["hair_lightness"])[:, None, None, None]
    return torch.lerp(colour, grey, (0.9 * a["hair_grey"])[:, None, None, None])


@dataclass(frozen=True)
class Face:
    """The painted head. albedo: [N, 3, R, R]; shine, occlusion: [N, R, R]; glow [N, R, R] is added white."""

    albedo: Tensor
    shine: Tensor
    occlusion: Tensor
    glow: Tensor
    eyeball: Tensor
    eyeball_normal: Local


def paint_face(a: Attributes, frame: Frame, local: Local, light: Tensor, pixel: float) -> Face:
    """local: head coordinates of what each pixel sees; light: [N, 3] in head coordinates; pixel: its side."""
    x, y, z = local
    edge = per_image(1.5 * pixel / frame.scale)
    front = soft(z - 0.05, 0.3)
    ax = x.abs()
    skin = skin_colour(a)
    albedo = skin.expand(x.shape[0], 3, *x.shape[1:]).contiguous()
    grain = 0.035 * ripple(x, y, a["texture"], 9.0) + 0.02 * ripple(y, x, a["texture"], 31.0)
    albedo = albedo * (1 + grain)[:, None]

    # blood under the skin: cheeks, nose, ears
    warm = skin * rgb((1.0, 0.72, 0.70), skin)
    cheek = bump(ax - 0.40, y + 0.26, 0.20, 0.17) * per_image(0.15 + 0.75 * a["blush"])
    nose = bump(x, y - NOSE_Y, 0.14, 0.13) * (0.35 + 0.25 * per_image(a["blush"]))
    ears = soft(ax - 0.74, 0.12) * 0.45
    albedo = over(albedo, warm, torch.maximum(torch.maximum(cheek, nose) * front, ears))
    wobble = 2.2 * torch.sin(7.3 * y + 1.9 * torch.sin(11 * x))
    spots = soft(torch.sin(46 * x + wobble) * torch.sin(43 * y + 2.0 * torch.sin(9.1 * x)) - 0.62, 0.5)
    spots = spots * bump(ax - 0.27, y + 0.24, 0.30, 0.17) * front * per_image(0.75 * a["freckles"])
    albedo = over(albedo, skin * rgb((0.80, 0.60, 0.48), skin), spots)

    occlusion = _occlusion(a, x, y, ax, front)
    albedo, shine = _mouth(a, albedo, x, y, front, edge)
    albedo = _beard(a, albedo, x, y, ax, z, shine)
    albedo, glow, eyeball, normal = _eyes(a, albedo, x, y, ax, front, light, edge)
    albedo = _brows(a, albedo, y, ax, x, front, edge)
    skin_shine = 0.5 + 0.5 * torch.maximum(bump(x, y - NOSE_Y - 0.1, 0.12, 0.3), bump(x, y - 0.45, 0.5, 0.2))
    return Face(albedo, torch.maximum(skin_shine, 1.3 * shine), occlusion, glow, eyeball, normal)


def _occlusion(a: Attributes, x: Tensor, y: Tensor, ax: Tensor, front: Tensor) -> Tensor:
    """Creases: sockets, sides of the nose, nostrils, below the lip, and lines of age."""
    ex = per_image(eye_x(a))
    dark = 0.22 * bump(ax - ex + 0.06, y - EYE_Y - 0.08, 0.19, 0.13)
    size = per_image(1 + 0.28 * a["nose_size"])
    wide = size * per_image(1 + 0.25 * a["nose_width"])
    dark = dark + 0.25 * bump(ax / wide - 0.17, (y - NOSE_Y) / size + 0.02, 0.045, 0.09)
    dark = dark + 0.75 * bump(ax / wide - 0.065, (y - NOSE_Y) / size + 0.10, 0.036, 0.024)
    dark = dark + 0.22 * bump(x, (y - NOSE_Y) / size + 0.16, 0.11, 0.035)
    dark = dark + 0.20 * bump(x, y - MOUTH_Y + 0.17 + 0.1 * per_image(a["mouth_open"]), 0.14, 0.04)
    # the folds from nose to mouth deepen with a smile and with age
    fold = ax - 0.20 - 0.24 * (NOSE_Y - 0.06 - y).clamp_min(0)
    depth = per_image(0.10 + 0.16 * a["smile"].clamp_min(0) + 0.35 * a["age"])
    dark = dark + depth * bump(fold, y + 0.44, 0.03, 0.15)
    wave = torch.sin(34 * (y - 0.035 * torch.cos(6 * x))) * bump(x, y - 0.38, 0.34, 0.15)
    under = bump(ax - ex, y - EYE_Y + 0.21 - 0.35 * (ax - ex).square(), 0.15, 0.025)
    crow = torch.sin(45 * y + 12 * (ax - ex)) * bump(ax - ex - 0.27, y - EYE_Y, 0.06, 0.10)
    dark = dark + per_image(a["age"]) * (0.26 * wave.clamp_min(0) + 0.32 * under + 0.24 * crow.clamp_min(0))
    ear = bump(ax - 0.80 - 0.06 * per_image(a["face_width"]), y + 0.08, 0.035, 0.11)
    return 1 - torch.lerp(0.35 * ear, dark.clamp(0, 0.9), front)


def _mouth(
    a: Attributes, albedo: Tensor, x: Tensor, y: Tensor, front: Tensor, edge: Tensor
) -> tuple[Tensor, Tensor]:
    opened, smile = per_image(a["mouth_open"]), per_image(a["smile"])
    u2 = (x / (0.24 + 0.045 * smile - 0.03 * opened * (1 - smile))).square()
    arch = (1 - u2).clamp_min(-1)
    v = y - MOUTH_Y - (smile + 0.2) * 0.085 * (u2.clamp_max(1.6) - 0.45)
    full = per_image(1 + 0.45 * a["lip_fullness"])
    gap_up = (0.006 + 0.035 * opened) * arch
    gap_down = (0.006 + 0.165 * opened) * arch
    bow = 1 - 0.32 * torch.exp(-(x * 18).square()) + 0.10 * torch.exp(-((x.abs() - 0.07) * 16).square())
    upper = full * 0.050 * arch * bow
    lower = full * 0.075 * arch
    within = soft(arch - 0.04, 0.16) * front  # outside, both outlines run together: no line may remain there
    lips = soft(torch.minimum(gap_up + upper - v, v + gap_down + lower), edge) * within
    skin = skin_colour(a)
    natural = skin * rgb((0.90, 0.60, 0.58), skin)
    red = torch.lerp(natural, rgb((0.72, 0.13, 0.17), skin), (0.8 * a["lip_redness"])[:, None, None, None])
    # the lower lip catches light, the upper lies in shade
    shape = 0.92 + 0.16 * torch.tanh(-(v + gap_down) * 40)
    albedo = over(albedo, red, lips * 0.92) * torch.lerp(torch.ones_like(shape), shape, lips)[:, None]
    inside = soft(torch.minimum(gap_up - v, v + gap_down), edge) * within
    albedo = over(albedo, rgb((0.30, 0.07, 0.08), skin), inside * 0.9)
    tongue = soft(-0.085 - v + 0.3 * x.square(), 0.05) * inside * opened
    albedo = over(albedo, rgb((0.78, 0.34, 0.34), skin), tongue)
    teeth = soft(v - gap_up + 0.062 * arch.clamp_min(0), edge) * inside * soft(opened - 0.24, 0.16)
    albedo = over(albedo, rgb((0.96, 0.95, 0.92), skin), teeth)
    wet = lips * (1 - inside) * bump(x, v + gap_down + 0.5 * lower, 0.12, 0.03)
    return albedo, wet


def _beard(a: Attributes, albedo: Tensor, x: Tensor, y: Tensor, ax: Tensor, z: Tensor, wet: Tensor) -> Tensor:
    amount = per_image(a["beard"])
    opened = per_image(a["mouth_open"])
    line = -0.38 - 0.15 * torch.exp(-((ax - 0.33) * 5).square()) + 0.70 * (ax - 0.42).clamp_min(0)
    jaw = soft(line - y, 0.14)
    moustache = bump(ax - 0.11, y - MOUTH_Y - 0.14 + 0.35 * ax, 0.15, 0.055)
    lips = bump(x, y - MOUTH_Y + 0.03 + 0.06 * opened, 0.23, 0.115)
    cover = torch.maximum(jaw * (1 - 0.97 * soft(lips - 0.42, 0.35)), 0.95 * soft(moustache - 0.4, 0.4))
    cover = cover * soft(z + 0.10, 0.25)
    strands = torch.sin(75 * x + 4 * torch.sin(13 * y)) * torch.sin(29 * y + 5 * torch.sin(11 * x))
    strands = 0.8 + 0.2 * strands
    alpha = cover * amount * (0.45 + 0.5 * amount) * (1 - (1 - strands) * (1 - 0.5 * amount))
    return over(albedo, hair_colour(a) * (0.55 + 0.45 * strands[:, None]), (alpha - wet).clamp_min(0))


def _eyes(
    a: Attributes,
    albedo: Tensor,
    x: Tensor,
    y: Tensor,
    ax: Tensor,
    front: Tensor,
    light: Tensor,
    edge: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Local]:
    ex, size = per_image(eye_x(a)), per_image(1.16 + 0.16 * a["eye_size"])
    opened = per_image(a["eye_openness"])
    side = torch.sign(x)
    out = (ax - ex) / size  # away from the nose
    v = (y - EYE_Y) / size - (0.16 * per_image(a["eye_tilt"]) + 0.03) * out
    t2 = (out * (1 / 0.195)).square()
    arch = (1 - t2).clamp_min(-0.6)
    upper = (-0.065 + 0.225 * opened) * arch * (1 - 0.9 * out)
    lower = (-0.068 - 0.025 * opened) * arch * (1 + 0.6 * out)
    width = edge / size
    lid = upper - v
    ball = soft(torch.minimum(lid, v - lower), width) * front

    # the white, an iris with a dark ring and a lighter lower half, a pupil, two highlights
    dx = side * out - 0.062 * per_image(a["gaze_x"])
    dy = v - 0.025 - 0.040 * per_image(a["gaze_y"])
    r = (dx.square() + dy.square() + 1e-6).sqrt()
    white = rgb((0.95, 0.94, 0.93), albedo) * (1 - 0.30 * bump(out.abs() - 0.19, v, 0.07, 0.2))[:, None]
    stops = [
        (0.20, 0.11, 0.06),
        (0.42, 0.25, 0.11),
        (0.42, 0.44, 0.20),
        (0.30, 0.50, 0.46),
        (0.30, 0.52, 0.78),
    ]
    colour = blend(stops, a["eye_colour"])
    rays = 1 + 0.10 * torch.sin(9 * torch.atan2(dy, dx + 1e-6)) * soft(r - 0.05, 0.02)
    depth = (0.80 - 4.5 * dy) * rays * (1 - 0.70 * soft(r - 0.100, 0.035))
    eye = over(white, colour * depth[:, None].clamp_min(0.05), soft(0.117 - r, width))
    eye = over(eye, rgb((0.03, 0.025, 0.03), albedo), soft(0.054 - r, width))
    eye = eye * (1 - 0.55 * torch.exp(-(lid * 17).clamp_min(0)))[:, None]

    # above: the lid's own skin, its crease, the lashes
    crease = torch.exp(-((v - upper - 0.055 * (1 - 0.25 * t2)) * 38).square()) * (arch + 0.25).clamp(0, 1)
    fold = torch.exp(-((v - lower + 0.035) * 32).square()) * (arch + 0.1).clamp(0, 1)
    albedo = albedo * (1 - front * (0.30 * crease + 0.14 * fold))[:, None]
    albedo = over(albedo, eye, ball)
    reach = soft(0.205 - out.abs() + 0.02 * out, 0.05)
    thick = 0.020 + 0.05 * (out + 0.1).clamp_min(0)
    lashes = soft(thick - (v - upper * 0.98 - 0.004).abs(), 1.3 * width) * reach * front
    albedo = over(albedo, rgb((0.09, 0.06, 0.055), albedo), 0.92 * lashes)
    lashes = soft(0.009 - (v - lower).abs(), 1.3 * width) * reach * front
    albedo = over(albedo, rgb((0.20, 0.12, 0.11), albedo), 0.55 * lashes)

    lx, ly = per_image(light[:, 0]), per_image(light[:, 1])
    hx, hy = dx - 0.055 * lx - 0.01, dy - 0.045 * ly - 0.015
    glow = soft(0.030 - (hx.square() + hy.square() + 1e-6).sqrt(), width)
    hx, hy = dx + 0.055 * lx, dy + 0.055
    glow = (glow + 0.30 * bump(hx, hy, 0.03, 0.022)) * ball * soft(lid - 0.01, 0.03)
    bx, by = (side * out * 3.4).clamp(-0.8, 0.8), (v * 3.4).clamp(-0.8, 0.8)
    return albedo, glow, ball, (bx, by, (1.6 - bx.square() - by.square()).clamp_min(0.1).sqrt())


def _brows(
    a: Attributes, albedo: Tensor, y: Tensor, ax: Tensor, x: Tensor, front: Tensor, edge: Tensor
) -> Tensor:
    out = ax - per_image(eye_x(a))
    tilt = per_image(0.22 * a["brow_tilt"])
    middle = 0.275 + 0.06 * per_image(a["brow_height"]) - tilt * out - 1.0 * (out + 0.03).square()
    taper = (1 - ((out + 0.01) * (1 / 0.25)).square()).clamp_min(-0.5)
    thick = per_image(0.030 + 0.018 * a["brow_thickness"]) * taper * (1 - 1.2 * out)
    strands = 0.006 * torch.sin(64 * out - 40 * (y - middle) + 2 * torch.sin(31 * out))
    brow = soft(thick - (y - middle).abs() + strands, 1.6 * edge) * soft(taper, 0.3) * front
    colour = hair_colour(a) * 0.5 + rgb((0.16, 0.10, 0.08), albedo) * 0.6
    return over(albedo, colour, 0.88 * brow)


def hair_strands(a: Attributes, local: Local) -> Tensor:
    """Light and dark strands, [N, R, R] in [-1, 1]: they run from the crown down, waving."""
    x, y, z = local
    # strands leave a parting: the pole of the flow, behind the top of the head
    px = x + per_image(0.22 * a["parting"]) * soft(y - 0.25, 0.6)
    wave = per_image(a["waviness"])
    phi = torch.atan2(px, 0.35 + 0.55 * z - 0.5 * (y - 0.45).clamp(-0.4, 0.4))
    phi = phi + 0.16 * wave * torch.sin(9 * y + 2 * x) + 0.05 * wave * torch.sin(17 * y - 5 * x)
    p = [per_image(a["texture"][:, i]) for i in range(4)]
    coarse = torch.sin(11 * phi + p[0] + 0.6 * torch.sin(3 * y + p[1]))
    middle = torch.sin(23 * phi + p[1] + 0.7 * torch.sin(4 * y + p[2]))
    fine = torch.sin(47 * phi + p[2] + 0.8 * torch.sin(5 * y + p[3]))
    return 0.42 * coarse + 0.34 * middle + 0.24 * fine


def hair_shadow(a: Attributes, local: Local, light: Tensor) -> Tensor:
    """Light that hair lets through to the face below it, [N, R, R]. light: [N, 3], head coordinates."""
    x, y, z = local
    lx, ly = per_image(0.10 * light[:, 0]), per_image(0.10 * light[:, 1] + 0.03)
    amount = per_image(a["hair_amount"] * (0.55 + 0.25 * a["fringe"]))
    covered = soft(face_window(a, x + lx, y + ly) + 0.02, 0.22) * soft(y + 0.35, 0.5) * soft(z, 0.4)
    return 1 - amount * covered


def glasses(
    a: Attributes, frame: Frame, x: Tensor, y: Tensor, pixel: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rings on a curved sheet before the face; x, y: view coordinates of the pixels.

    Returns the alphas of rim, lens and glint and the sheet's depth, each [N, R, R].
    """
    r = frame.rotation
    inverse = 1 / frame.scale
    ox, oy = x - per_image(frame.origin[:, 0]), y - per_image(frame.origin[:, 1])
    flat = [per_image(r[:, i, j] * inverse) for j in range(3) for i in range(2)]
    deep = [per_image(r[:, 2, j] * inverse) for j in range(3)]
    bx, by, bz = flat[0] * ox + flat[1] * oy, flat[2] * ox + flat[3] * oy, flat[4] * ox + flat[5] * oy
    sheet: Tensor | float = 0.74
    for _ in range(3):
        z = (sheet - bz) / deep[2]
        lx, ly = bx + deep[0] * z, by + deep[1] * z
        sheet = 0.80 - 0.45 * lx.square().clamp_max(0.8)
    ex = per_image(eye_x(a))
    square = per_image(a["glasses_shape"])
    u, v = (lx.abs() - ex - 0.015) * (1 - 0.10 * square), (ly - EYE_Y + 0.03) * (1 + 0.10 * square)
    u2, v2 = u.square(), v.square()
    # |u|^4 + |v|^4 + c u^2 v^2: a circle for c = 2, nearly a square for c = 0
    radius = (u2 * u2 + v2 * v2 + (2 - 1.9 * square) * u2 * v2 + 1e-8).sqrt().sqrt()
    edge = per_image(1.5 * pixel / frame.scale)
    d = (radius - 0.235).abs()
    on = per_image(a["glasses"])
    thick = 0.022 * on + 0.004
    rim = soft(thick - d, edge)
    bridge = soft(thick * 0.9 - (ly - EYE_Y - 0.04 + 0.9 * lx.square()).abs(), edge)
    bridge = bridge * soft(ex - 0.215 - lx.abs(), edge)
    lens = soft(0.235 - radius, edge)
    slant = u + 0.6 * v
    streak = torch.exp(-((slant - 0.07) * 16).square()) + 0.5 * torch.exp(-((slant + 0.04) * 30).square())
    visible = soft(on - 0.25, 0.4)
    depth = per_image(frame.origin[:, 2]) + z
    return torch.maximum(rim, bridge) * visible, lens * visible, streak * lens * visible, depth


def temples(a: Attributes, local: Local, edge: Tensor) -> Tensor:
    """The glasses' arms, painted along the sides of the head, [N, R, R]."""
    x, y, z = local
    arm = soft(0.022 - (y - EYE_Y - 0.03).abs(), edge) * soft(x.abs() - 0.53, 0.05) * soft(z + 0.05, 0.1)
    return arm * soft(per_image(a["glasses"]) - 0.25, 0.4)
