"""The program that draws the demo generator's training images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clone_fast.demo.portraits import ATTRIBUTES, LAYOUT, TABLE, render, sample

RESOLUTION = 48


def draw(n: int, seed: int = 0) -> dict[str, Tensor]:
    return sample(n, generator=torch.Generator().manual_seed(seed))


def plain() -> dict[str, Tensor]:
    """One portrait on which every attribute can be seen: hair, glasses and stripes, nothing extreme."""
    a = draw(1)
    a.update({name: torch.full((1,), 0.5 * (s.low + s.high)) for name, s in TABLE.items()})
    a.update(
        {
            name: torch.full((1,), 0.8)
            for name in ("hair_amount", "glasses", "stripes", "bokeh", "eye_openness")
        }
    )
    a.update(fringe=torch.tensor([0.3]), smile=torch.tensor([0.3]))
    return a


def with_each_changed(base: dict[str, Tensor], values: list[float]) -> dict[str, Tensor]:
    """A batch: `base` once per attribute, with that attribute replaced; values in the order of ATTRIBUTES."""
    batch = {k: v.repeat(len(ATTRIBUTES), *[1] * (v.ndim - 1)) for k, v in base.items()}
    for i, name in enumerate(ATTRIBUTES):
        batch[name][i] = values[i]
    return batch


def test_attributes_have_the_documented_shapes_and_ranges() -> None:
    a = draw(300)
    assert set(a) == {*ATTRIBUTES, *LAYOUT}
    for name, spec in TABLE.items():
        value = a[name]
        assert value.shape == (300,), name
        assert value.dtype == torch.float32, name
        assert value.min() >= spec.low, name
        assert value.max() <= spec.high, name
        assert value.max() - value.min() > 0.4 * (spec.high - spec.low), name
    for name, shape in LAYOUT.items():
        assert a[name].shape == (300, *shape), name


@pytest.mark.parametrize(("resolution", "supersample"), [(32, 1), (24, 2), (128, 1)])
def test_images_are_contiguous_float32_in_range(resolution: int, supersample: int) -> None:
    image = render(draw(2), resolution=resolution, supersample=supersample)
    assert image.shape == (2, 3, resolution, resolution)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert -1 <= image.min() < -0.3
    assert 0.3 < image.max() <= 1


def test_the_seed_decides_everything() -> None:
    first, again, other = (render(draw(2, seed), resolution=RESOLUTION) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05
    assert (first[0] - first[1]).abs().mean() > 0.05


def test_a_portrait_does_not_depend_on_its_batch() -> None:
    a = draw(5)
    batch = render(a, resolution=RESOLUTION)
    alone = torch.cat(
        [render({k: v[i : i + 1] for k, v in a.items()}, resolution=RESOLUTION) for i in range(5)]
    )
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-4)


def test_every_attribute_changes_the_image() -> None:
    base = plain()
    images = [
        render(with_each_changed(base, [getattr(s, end) for s in TABLE.values()]), resolution=RESOLUTION)
        for end in ("low", "high")
    ]
    middle = render(base, resolution=RESOLUTION)
    # hues are a wheel, their ends are the same colour: compare with the middle too
    change = torch.maximum((images[0] - images[1]).abs(), (images[0] - middle).abs()).flatten(1).amax(1)
    too_small = {name: c for name, c in zip(ATTRIBUTES, change.tolist(), strict=True) if c < 0.08}
    assert not too_small


def test_the_image_is_continuous_in_every_attribute() -> None:
    base = plain()
    start = render(base, resolution=RESOLUTION)

    def change(step: float) -> Tensor:
        values = [float(base[name]) + step * (s.high - s.low) for name, s in TABLE.items()]
        return (
            (render(with_each_changed(base, values), resolution=RESOLUTION) - start).abs().flatten(1).amax(1)
        )

    far, near = change(4e-3), change(1e-3)
    changes = zip(ATTRIBUTES, far.tolist(), near.tolist(), strict=True)
    popping = {name: (f, n) for name, f, n in changes if n > 0.4 * f + 2e-3}
    assert not popping
    assert near.max() < 0.1


@pytest.mark.parametrize("name", ["background_hue", "clothing_hue"])
def test_hue_is_a_wheel(name: str) -> None:
    zero, one = ({**plain(), name: torch.full((1,), value)} for value in (0.0, 1.0))
    torch.testing.assert_close(
        render(zero, resolution=RESOLUTION), render(one, resolution=RESOLUTION), rtol=0, atol=1e-4
    )


def test_extremes_are_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    a = draw(12)
    corners = torch.randint(0, 2, (len(TABLE), 12), generator=generator).float()
    for i, (name, spec) in enumerate(TABLE.items()):
        a[name] = spec.low + (spec.high - spec.low) * corners[i]
    image = render(a, resolution=RESOLUTION)
    assert image.isfinite().all()
    assert image.abs().max() <= 1


def test_turning_the_head_moves_the_face_and_little_of_the_wall() -> None:
    left, right = ({**plain(), "yaw": torch.full((1,), value)} for value in (-0.6, 0.6))
    change = (render(left, resolution=RESOLUTION) - render(right, resolution=RESOLUTION)).abs().mean(1)[0]
    assert change[16:28, 16:32].mean() > 0.08
    assert change[:8, :8].max() < 0.01


def test_one_step_for_the_whole_batch_differentiates() -> None:
    a = draw(2)
    a["yaw"] = a["yaw"].clone().requires_grad_()
    render(a, resolution=16).sum().backward()
    assert a["yaw"].grad is not None
    assert a["yaw"].grad.isfinite().all()
    assert (a["yaw"].grad != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"resolution": 4}, "resolution >= 8"), ({"supersample": 0}, "supersample >= 1")],
)
def test_bad_sizes_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(draw(1), **arguments)


def test_missing_attributes_and_empty_batches_are_named() -> None:
    a = draw(1)
    del a["yaw"]
    with pytest.raises(ValueError, match="yaw"):
        render(a)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        sample(0)
