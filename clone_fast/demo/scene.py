"""Around the face of a portrait: clothes, background, and the light that shades everything (linear light)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .paint import Attributes, Local, blend, bump, hue_colour, over, ripple, skin_colour
from .shapes import constant, per_image, soft


@dataclass(frozen=True)
class Light:
    """direction, half: [N, 3], unit, towards the light and between light and viewer; colours [N, 3, 1, 1]."""

    direction: Tensor
    half: Tensor
    key: Tensor
    sky: Tensor
    ground: Tensor
    rim: Tensor


def studio(a: Attributes) -> Light:
    """One soft key light in front, an ambient sky and ground, a rim light behind."""
    azimuth, elevation = 1.05 * a["light_azimuth"], 0.40 + 0.42 * a["light_elevation"]
    flat = elevation.cos()
    direction = torch.stack([azimuth.sin() * flat, elevation.sin(), azimuth.cos() * flat], 1)
    half = direction + constant((0.0, 0.0, 1.0), direction)
    half = half / half.square().sum(1, keepdim=True).sqrt()
    warmth = (0.5 + 0.5 * a["light_warmth"])[:, None]
    cool, warm = (constant(c, direction) for c in ((0.84, 0.97, 1.18), (1.20, 0.97, 0.74)))
    key = torch.lerp(cool, warm, warmth)
    opposite = torch.lerp(warm, cool, warmth)
    contrast = a["light_contrast"][:, None]
    room = hue_colour(
        a["background_hue"], a["background_saturation"] * 0.5, torch.ones_like(a["background_hue"])
    )
    room = room.flatten(1)
    return Light(
        direction,
        half,
        *(
            c[:, :, None, None]
            for c in (
                key * (0.62 + 0.40 * contrast),
                (0.62 * opposite.sqrt() + 0.38 * room) * (0.62 - 0.34 * contrast),
                (0.5 * key + 0.5 * room) * (0.34 - 0.20 * contrast),
                opposite * (0.30 + 0.25 * contrast),
            )
        ),
    )


def dot(direction: Tensor, normal: Local) -> Tensor:
    """direction: [N, 3]; normal: three maps; returns [N, R, R]."""
    x, y, z = (per_image(direction[:, i]) for i in range(3))
    return x * normal[0] + y * normal[1] + z * normal[2]


def shade(
    light: Light, albedo: Tensor, normal: Local, open_to_key: Tensor, open_to_sky: Tensor, bleed: float
) -> Tensor:
    """Diffuse shading [N, 3, R, R]. `bleed`: how far red light wraps around into the shadow (skin), 0..1."""
    facing = dot(light.direction, normal)
    wraps = [0.15 + 0.45 * bleed, 0.15 + 0.15 * bleed, 0.15 + 0.05 * bleed]
    lit = torch.stack([((facing + w) * (1 / (1 + w))).clamp_min(0) for w in wraps], 1)
    sky = torch.lerp(light.ground, light.sky, (0.5 + 0.5 * normal[1])[:, None])
    return albedo * (light.key * (lit * lit.sqrt() * open_to_key[:, None]) + sky * open_to_sky[:, None])


def gloss(light: Light, normal: Local, power: float) -> Tensor:
    """Specular lobe of the key light, [N, R, R]."""
    return dot(light.half, normal).clamp_min(1e-4).pow(power)


def edge_light(light: Light, normal: Local) -> Tensor:
    """Light from behind that catches the outline on the side away from the key, [N, R, R]."""
    away = 0.35 - 0.9 * per_image(light.direction[:, 0]) * normal[0] + 0.45 * normal[1]
    return (1 - normal[2]).square() * away.clamp(0, 1)


def paint_body(a: Attributes, local: Local, pixel: float) -> tuple[Tensor, Tensor, Tensor]:
    """Neck and clothes: albedo [N, 3, R, R], where cloth is, and its occlusion (both [N, R, R])."""
    x, y, _ = local
    skin = skin_colour(a)
    albedo = skin.expand(x.shape[0], 3, *x.shape[1:]) * (1 + 0.03 * ripple(x, y, a["texture"], 6.0))[:, None]
    deep = per_image(a["neckline"])
    line = -0.72 - 0.20 * deep + (0.10 + 0.16 * deep) * (x * (1 / 0.24)).square().clamp_max(4)
    d = (line - y) * (1 - 0.3 * deep)
    cloth = soft(d, 1.5 * pixel)
    saturation, lightness = 0.85 * a["clothing_saturation"], 0.14 + 0.78 * a["clothing_lightness"]
    base = hue_colour(a["clothing_hue"], saturation, lightness)
    other = hue_colour(a["clothing_hue"] + 0.42, saturation * 0.8, 1.02 - 0.75 * lightness)
    fabric = base * (1 + 0.10 * ripple(x, y, a["texture"], 8.0))[:, None]
    angle = 1.2 * a["stripe_angle"]
    stripes = soft(
        torch.sin(26 * (per_image(angle.cos()) * y + per_image(angle.sin()) * x) + 5 * x.square()), 0.7
    )
    fabric = over(fabric, other, stripes * per_image(a["stripes"]) * 0.85)
    collar = per_image(0.085 * a["collar"])
    band = soft(collar - d, 1.5 * pixel) * soft(per_image(a["collar"]) - 0.15, 0.2)
    fabric = over(fabric, other * 0.5 + base * 0.5, band)
    seam = 1 - 0.35 * bump(d - collar, d * 0, 0.02, 1.0)
    folds = 1 - 0.10 * ripple(x * 0.8, y + 0.5 * x.abs(), a["texture"], 5.0)
    albedo = over(albedo, fabric * (seam * folds)[:, None], cloth)
    # the cloth's edge lies on the skin and darkens it
    contact = 1 - 0.40 * torch.exp(-(d.clamp_max(0) * 18).square()) * (1 - cloth)
    return albedo, cloth, contact * (1 - 0.30 * bump(x, y + 0.50, 0.6, 0.16))


def paint_background(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    """A gradient wall or a blurred landscape, with discs of blurred lights, [N, 3, R, R].

    x, y: view coordinates of the pixels.
    """
    hue, saturation, lightness = (
        a["background_hue"],
        0.55 * a["background_saturation"],
        a["background_lightness"],
    )
    base = hue_colour(hue, saturation, 0.16 + 0.66 * lightness)
    second = hue_colour(hue + 0.14 * a["background_gradient"], saturation, 0.10 + 0.74 * lightness)
    gradient = per_image(a["background_gradient"])
    t = 0.5 + 0.42 * y + 0.38 * gradient * x
    wall = torch.lerp(
        second * (0.45 + 0.2 * lightness[:, None, None, None]), base * 1.15, t.clamp(0, 1)[:, None]
    )
    # out-of-focus landscape: a horizon below the eyes, ground of another hue
    ground = hue_colour(hue + 0.38, saturation, 0.12 + 0.42 * lightness)
    height = 0.12 * torch.sin(2.1 * x + per_image(a["texture"][:, 0])) + 0.05 * torch.sin(
        5.3 * x + per_image(a["texture"][:, 1])
    )
    below = soft(height - 0.05 - y, 0.30)
    wall = over(wall, ground * (0.8 + 0.3 * y)[:, None], below * per_image(a["horizon"]) * 0.9)
    glow = torch.exp(-0.9 * (x.square() + (y - 0.1).square()))
    wall = wall * (0.72 + 0.42 * glow)[:, None]
    grain = 0.03 * ripple(x, y, a["texture"], 4.0) + 0.012 * ripple(y, x, a["texture"], 23.0)
    wall = wall * (1 + grain)[:, None]
    # [N, D, R, R] discs: place, size and brightness come from the layout
    place = a["bokeh_layout"]
    dx, dy = (
        x[:, None] - 1.15 * place[:, :, 0, None, None],
        y[:, None] - 0.55 - 0.75 * place[:, :, 1, None, None],
    )
    size = (0.12 + 0.07 * place[:, :, 2])[:, :, None, None]
    disc = torch.sigmoid((size - (dx.square() + dy.square() + 1e-5).sqrt()) * 45)
    strength = (0.5 + 0.5 * place[:, :, 3])[:, :, None, None]
    warm = (disc * strength).sum(1)
    tint = blend([(1.0, 0.86, 0.62), (1.0, 0.96, 0.90), (0.75, 0.88, 1.0)], 0.5 - 0.5 * a["light_warmth"])
    return wall + tint * (0.24 * warm * per_image(a["bokeh"] * (0.35 + 0.65 * lightness)))[:, None]
