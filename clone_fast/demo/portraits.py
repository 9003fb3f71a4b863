"""Endless synthetic portraits, drawn by a program: the images that the demo generator is trained on.

No photograph and no foreign data is involved. `sample` draws attributes, `render` turns a batch of them into
images; both are plain tensor operations on any device, without a loop over images and without a host read.

    attributes = sample(64, generator=torch.Generator().manual_seed(0))
    images = render(attributes, resolution=128)        # [64, 3, 128, 128] float32 in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from . import anatomy, paint, scene
from .shapes import Frame, Surface, per_image, pixel_grid, see, soft


@dataclass(frozen=True)
class Attribute:
    """A scalar attribute: its range, how it is drawn, and what it means at the top of its range.

    draw: "bell" (middle values likelier), "flat", "rare" and "seldom" (high in 26 and 16 % of the portraits,
    else low), or "full" (low in 8 %, else high).
    """

    low: float
    high: float
    draw: str
    meaning: str


TABLE: dict[str, Attribute] = {
    "yaw": Attribute(-1, 1, "bell", "face turned 38 degrees to the image's right"),
    "pitch": Attribute(-1, 1, "bell", "face lifted 18 degrees"),
    "roll": Attribute(-1, 1, "bell", "head tilted 12 degrees counter-clockwise"),
    "head_size": Attribute(-1, 1, "bell", "closer: 7 % larger"),
    "face_width": Attribute(-1, 1, "bell", "wide face"),
    "jaw": Attribute(-1, 1, "bell", "broad chin"),
    "skin_tone": Attribute(0, 1, "flat", "dark skin"),
    "skin_undertone": Attribute(-1, 1, "bell", "olive rather than pink"),
    "blush": Attribute(0, 1, "flat", "red cheeks"),
    "freckles": Attribute(0, 1, "seldom", "freckles"),
    "age": Attribute(0, 1, "seldom", "lines on the forehead and around eyes and mouth"),
    "eye_size": Attribute(-1, 1, "bell", "large eyes"),
    "eye_spacing": Attribute(-1, 1, "bell", "eyes far apart"),
    "eye_tilt": Attribute(-1, 1, "bell", "outer corners up"),
    "eye_openness": Attribute(0, 1, "flat", "wide open (0: closed)"),
    "gaze_x": Attribute(-1, 1, "bell", "looks to the image's right"),
    "gaze_y": Attribute(-1, 1, "bell", "looks up"),
    "eye_colour": Attribute(0, 1, "flat", "blue (0: brown, 0.5: green)"),
    "brow_height": Attribute(-1, 1, "bell", "raised brows"),
    "brow_tilt": Attribute(-1, 1, "bell", "inner ends up (worried; -1: angry)"),
    "brow_thickness": Attribute(-1, 1, "bell", "thick brows"),
    "nose_size": Attribute(-1, 1, "bell", "large nose"),
    "nose_width": Attribute(-1, 1, "bell", "broad nose"),
    "smile": Attribute(-1, 1, "bell", "smiles (-1: sad)"),
    "mouth_open": Attribute(0, 1, "rare", "mouth open, teeth visible"),
    "lip_fullness": Attribute(-1, 1, "bell", "full lips"),
    "lip_redness": Attribute(0, 1, "rare", "red lips"),
    "hair_amount": Attribute(0, 1, "full", "full hair (0: bald)"),
    "hair_length": Attribute(0, 1, "flat", "hair to the chest"),
    "hair_volume": Attribute(0, 1, "flat", "voluminous hair"),
    "fringe": Attribute(0, 1, "flat", "hair down to the brows"),
    "parting": Attribute(-1, 1, "flat", "hair line higher on the image's right"),
    "waviness": Attribute(0, 1, "flat", "wavy hair"),
    "bun": Attribute(0, 1, "rare", "a bun on top"),
    "hair_lightness": Attribute(0, 1, "flat", "blond (0: black)"),
    "hair_redness": Attribute(0, 1, "rare", "red hair"),
    "hair_grey": Attribute(0, 1, "seldom", "grey hair"),
    "beard": Attribute(0, 1, "rare", "full beard"),
    "glasses": Attribute(0, 1, "rare", "glasses"),
    "glasses_shape": Attribute(0, 1, "flat", "square glasses (0: round)"),
    "glasses_lightness": Attribute(0, 1, "flat", "golden frame (0: black)"),
    "light_azimuth": Attribute(-1, 1, "flat", "light from the image's right, 60 degrees"),
    "light_elevation": Attribute(-1, 1, "bell", "light from 47 degrees above (-1: level)"),
    "light_warmth": Attribute(-1, 1, "bell", "warm light (-1: cool)"),
    "light_contrast": Attribute(0, 1, "flat", "hard contrast between key light and shadow"),
    "background_hue": Attribute(0, 1, "flat", "colour wheel, 1 equals 0"),
    "background_saturation": Attribute(0, 1, "flat", "colourful background"),
    "background_lightness": Attribute(0, 1, "flat", "bright background"),
    "background_gradient": Attribute(-1, 1, "bell", "brighter to the image's right"),
    "bokeh": Attribute(0, 1, "rare", "discs of blurred lights"),
    "horizon": Attribute(0, 1, "rare", "blurred landscape instead of a wall"),
    "shoulder_width": Attribute(-1, 1, "bell", "broad shoulders"),
    "neckline": Attribute(0, 1, "flat", "low neckline"),
    "clothing_hue": Attribute(0, 1, "flat", "colour wheel, 1 equals 0"),
    "clothing_saturation": Attribute(0, 1, "flat", "colourful clothes"),
    "clothing_lightness": Attribute(0, 1, "flat", "bright clothes"),
    "stripes": Attribute(0, 1, "rare", "striped clothes"),
    "stripe_angle": Attribute(-1, 1, "bell", "stripes fall to the image's right, 69 degrees"),
    "collar": Attribute(0, 1, "flat", "wide collar of a second colour"),
}
ATTRIBUTES: tuple[str, ...] = tuple(TABLE)
# further entries of the dictionary, and their shape per image
LAYOUT: dict[str, tuple[int, ...]] = {"texture": (4,), "bokeh_layout": (7, 4)}


def sample(
    n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Draw the attributes of n portraits.

    Returns a dictionary: each of `ATTRIBUTES` [n] float32 within its range in `TABLE`; "texture" [n, 4]
    phases in [0, 2 pi) and "bokeh_layout" [n, 7, 4] in [-1, 1] place the fine texture and the discs of
    light. Numbers are drawn on the generator's device (so a CPU generator gives the same portraits
    everywhere), then moved to `device`. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"portraits.sample: n must be at least 1, got {n}")
    source = generator.device if generator is not None else torch.device("cpu")
    u, v = torch.rand(2, n, len(TABLE), generator=generator, device=source).unbind()
    texture = torch.rand(n, 4, generator=generator, device=source) * 6.2831853
    discs = torch.rand(n, 7, 4, generator=generator, device=source) * 2 - 1
    if device is not None:
        u, v, texture, discs = (t.to(device) for t in (u, v, texture, discs))
    a: dict[str, Tensor] = {}
    for i, (name, spec) in enumerate(TABLE.items()):
        first, second = u[:, i], v[:, i]
        if spec.draw == "bell":
            unit = 0.5 * (first + second)
        elif spec.draw in ("rare", "seldom"):
            high = soft(first - (0.74 if spec.draw == "rare" else 0.84), 0.04)
            unit = high * (0.45 + 0.55 * second) + 0.10 * second * (1 - first)
        elif spec.draw == "full":
            unit = soft(first - 0.08, 0.06) * (0.7 + 0.3 * second)
        else:
            unit = first
        a[name] = (spec.low + (spec.high - spec.low) * unit).clamp(spec.low, spec.high)
    a.update(_plausible(a), texture=texture, bokeh_layout=discs)
    return a


def _plausible(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some correlations: dark skin and dark hair, grey hair and age, beards and plain lips and short hair."""
    beard = a["beard"]
    lightness = a["hair_lightness"] * (1 - 0.65 * a["skin_tone"])
    grey = torch.maximum(a["hair_grey"] * 0.8, a["age"] * 0.8 - 0.1).clamp_min(0)
    return {
        "hair_lightness": lightness + 0.35 * grey * (1 - lightness),
        "hair_grey": grey,
        "eye_colour": a["eye_colour"] * (1 - 0.7 * a["skin_tone"]),
        "eye_openness": 0.55 + 0.45 * a["eye_openness"],
        "mouth_open": a["mouth_open"] * (0.8 + 0.2 * a["smile"]),
        "smile": (0.25 + 0.9 * a["smile"]).clamp(-1, 1),
        "lip_redness": a["lip_redness"] * (1 - beard),
        "hair_length": a["hair_length"] * (1 - 0.6 * beard),
        "bun": a["bun"] * (1 - 0.8 * beard),
        "jaw": (a["jaw"] + 0.3 * beard).clamp(-1, 1),
    }


def render(attributes: Mapping[str, Tensor], *, resolution: int = 128, supersample: int = 1) -> Tensor:
    """Draw portraits with attributes as from `sample`.

    Returns [N, 3, resolution, resolution] float32 in [-1, 1]. Edges are smooth at any resolution;
    `supersample` also averages that many samples per pixel and side, for fine strands at small
    resolutions. Raises ValueError for a missing attribute, resolution < 8 or supersample < 1.
    """
    missing = [name for name in (*ATTRIBUTES, *LAYOUT) if name not in attributes]
    if missing:
        raise ValueError(f"portraits.render: attributes must have {missing}, got only {sorted(attributes)}")
    if resolution < 8 or supersample < 1:
        got = f"{resolution} and {supersample}"
        raise ValueError(f"portraits.render: wanted resolution >= 8 and supersample >= 1, got {got}")
    image = _draw(attributes, resolution * supersample)
    if supersample > 1:
        image = functional.avg_pool2d(image, supersample)
    # a soft shoulder instead of clipped highlights, then the display's gamma
    image = image / (1 + image.pow(4)).pow(0.25)
    return image.clamp_min(1e-5).pow(1 / 2.2) * 2 - 1


def _draw(a: Mapping[str, Tensor], size: int) -> Tensor:
    """Linear light [N, 3, size, size]."""
    x, y = pixel_grid(size, a["yaw"])
    pixel = 2 / size
    frame, trunk = anatomy.head_frame(a), anatomy.body_frame(a)
    light = scene.studio(a)
    skin, body = see(frame, anatomy.head(a), x, y), see(trunk, anatomy.body(a), x, y)
    wave = per_image(0.030 * a["waviness"]) * soft(0.25 - y, 0.5)
    hair = see(frame, anatomy.hair(a), x + wave * torch.sin(11 * y + per_image(a["texture"][:, 0])), y)

    image = scene.paint_background(a, x, y).contiguous()
    image = paint.over(image, _body(a, light, trunk, frame, body, pixel), body.coverage)
    local = frame.to_local(x, y, skin.z)
    image = paint.over(image, _head(a, light, frame, skin, local, pixel), skin.coverage)

    # hair lies in front of what is farther away; where the ray misses head and body nothing hides it
    strand_local = frame.to_local(x, y, hair.z)
    strands = paint.hair_strands(a, strand_local)
    grows = soft(anatomy.hair_line(a, strand_local, strands), per_image(0.02 + 2.0 * pixel / frame.scale))
    over_head = 1 - skin.coverage * soft(skin.z - hair.z - 0.02, 0.03)
    over_body = 1 - body.coverage * (1 - skin.coverage) * soft(body.z - hair.z, 0.05)
    alpha = hair.coverage * grows * over_head * over_body * soft(per_image(a["hair_amount"]) - 0.15, 0.2)
    image = paint.over(image, _hair(a, light, frame, trunk, hair, strand_local, strands), alpha)
    return _glasses(
        a, light, frame, image, torch.maximum(skin.z, hair.z - 2 * (1 - alpha)), x, y, pixel
    ).clamp(0, 8)


def _body(
    a: Mapping[str, Tensor], light: scene.Light, trunk: Frame, frame: Frame, body: Surface, pixel: float
) -> Tensor:
    albedo, cloth, occlusion = scene.paint_body(a, trunk.to_local(body.x, body.y, body.z), pixel)
    shadow = anatomy.shadow_of_head(frame, light.direction, body)
    sky = occlusion * (0.45 + 0.55 * soft(-0.48 - body.y, 0.30))
    image = scene.shade(light, albedo, body.normal, shadow * occlusion, sky, 0.6)
    shine = 0.05 * (1 - cloth) * scene.gloss(light, body.normal, 14.0) * shadow
    shine = shine + 0.45 * scene.edge_light(light, body.normal)
    return image + light.rim * (shine * (0.35 + 0.2 * cloth))[:, None]


def _head(
    a: Mapping[str, Tensor],
    light: scene.Light,
    frame: Frame,
    skin: Surface,
    local: tuple[Tensor, Tensor, Tensor],
    pixel: float,
) -> Tensor:
    own = frame.direction_to_local(light.direction)
    face = paint.paint_face(a, frame, local, own, pixel)
    arms = paint.temples(a, local, per_image(1.5 * pixel / frame.scale))
    albedo = paint.over(face.albedo, paint.rgb((0.12, 0.11, 0.11), face.albedo), arms)
    shadow = paint.hair_shadow(a, local, own)
    # under the chin and in the ears little of the sky is seen
    sky = face.occlusion * (0.72 + 0.28 * shadow) * (0.80 + 0.20 * soft(local[1] + 0.75, 0.35))
    image = scene.shade(light, albedo, skin.normal, shadow * (0.4 + 0.6 * face.occlusion), sky, 1.0)
    ball = scene.dot(own, face.eyeball_normal) * 0.5
    eye = albedo * (light.key * (0.62 + 0.38 * ball).clamp_min(0.1)[:, None] + 0.75 * light.sky) * 0.82
    image = torch.lerp(image, eye * (0.5 + 0.5 * shadow)[:, None], face.eyeball[:, None])
    shine = (
        0.16 * scene.gloss(light, skin.normal, 22.0) + 0.05 * scene.gloss(light, skin.normal, 5.0)
    ) * face.shine
    shine = shine * shadow * (1 - face.eyeball)
    image = image + light.key * (shine + 0.95 * face.glow)[:, None]
    return image + light.rim * (0.55 * scene.edge_light(light, skin.normal))[:, None] * (0.10 + albedo)


def _hair(
    a: Mapping[str, Tensor],
    light: scene.Light,
    frame: Frame,
    trunk: Frame,
    hair: Surface,
    local: tuple[Tensor, Tensor, Tensor],
    strands: Tensor,
) -> Tensor:
    """Hair after Kajiya and Kay (1989): highlights from the angle between light and strand."""
    colour = paint.hair_colour(a)
    grain = 1 + 0.30 * strands
    nx, ny, nz = hair.normal
    axis = frame.rotation[:, :, 1] - 0.35 * frame.rotation[:, :, 2]
    along = scene.dot(axis, hair.normal)
    # strands also tilt the normal a little, which breaks the highlight up
    tx, ty, tz = (per_image(axis[:, i]) - along * n for i, n in enumerate((nx, ny, nz)))
    inverse = torch.rsqrt(tx.square() + ty.square() + tz.square() + 1e-4)
    cosine = scene.dot(light.half, (tx * inverse, ty * inverse, tz * inverse)) + 0.10 * strands
    band = (1 - (cosine - 0.10).square()).clamp_min(1e-3)
    below = soft(local[1] + 0.15, 1.2)
    open_to = (0.55 + 0.45 * below) * (0.75 + 0.25 * soft(local[2] + 0.35, 0.6))
    image = scene.shade(light, colour * grain[:, None], hair.normal, open_to, open_to, 0.1)
    facing = (scene.dot(light.direction, hair.normal) + 0.3).clamp(0, 1) * open_to
    tint = 0.10 + 0.75 * colour
    lobes = (0.42 * band.pow(28.0) + 0.14 * band.pow(7.0)) * (1 + 0.5 * strands)
    image = image + light.key * tint * (facing * lobes)[:, None]
    return image + light.rim * (0.2 + colour) * (0.8 * scene.edge_light(light, hair.normal) * grain)[:, None]


def _glasses(
    a: Mapping[str, Tensor],
    light: scene.Light,
    frame: Frame,
    image: Tensor,
    depth: Tensor,
    x: Tensor,
    y: Tensor,
    pixel: float,
) -> Tensor:
    rim, lens, glint, z = paint.glasses(a, frame, x, y, pixel)
    seen = soft(z - depth + 0.02, 0.04)
    metal = paint.blend([(0.07, 0.065, 0.07), (0.33, 0.17, 0.10), (0.82, 0.64, 0.36)], a["glasses_lightness"])
    image = image * (1 - 0.10 * lens * seen)[:, None] + light.key * (0.07 * glint * seen)[:, None]
    return paint.over(image, metal * light.key * (0.75 + 0.45 * y)[:, None], rim * seen)
