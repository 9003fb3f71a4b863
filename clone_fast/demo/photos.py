"""Real photographs to try the method on: those that ship inside the package scikit-image, cropped to a
square.

Nothing is downloaded and no pixel is stored here: only which file, and which square of it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from clone_fast.errors import PhotoError
from clone_fast.photo import open_photo

PHOTOS: dict[str, tuple[str, tuple[int, int, int], str]] = {
    # name: (file of skimage/data, (left, top, size) in its pixels, what it shows)
    "astronaut": (
        "astronaut.png",
        (127, 0, 194),
        "Eileen Collins, head and shoulders as in an aligned face data set",
    ),
    "spacesuit": (
        "astronaut.png",
        (0, 0, 512),
        "the whole portrait of Eileen Collins, with flag and shuttle",
    ),
    "cat": ("chelsea.png", (92, 0, 300), "Chelsea the cat, full face"),
    "cat-eye": ("chelsea.png", (110, 60, 110), "one eye of Chelsea the cat"),
    "coffee": ("coffee.png", (130, 0, 400), "a cup of espresso on a red saucer"),
    "photographer": ("camera.png", (60, 30, 300), "a man with a camera on a tripod, grey"),
    "rocket": ("rocket.jpg", (106, 0, 427), "a Falcon 9 on its pad at dusk"),
    "motorcycle": ("motorcycle_left.png", (100, 0, 500), "a red motorcycle in a garage"),
    "engine": ("motorcycle_left.png", (300, 140, 180), "the engine of the red motorcycle"),
    "coins": ("coins.png", (190, 0, 194), "Greek coins from Pompeii, grey"),
    "moon": ("moon.png", (40, 40, 300), "the surface of the moon, grey and of low contrast"),
    "galaxies": ("hubble_deep_field.jpg", (250, 250, 400), "the Hubble extreme deep field"),
}
"""The photographs by name. Their sources and licences stand in the documentation of `skimage.data`."""


def photo(name: str) -> Image.Image:
    """The photograph of that name in `PHOTOS`, cropped, RGB.

    Raises:
        PhotoError: no such name; or scikit-image is not installed, or lacks the file.
    """
    if name not in PHOTOS:
        raise PhotoError(f"no demo photo named {name!r}; there are {', '.join(PHOTOS)}")
    file, (left, top, size), _ = PHOTOS[name]
    image = open_photo(_data_folder() / file)
    return image.crop((left, top, left + size, top + size)).convert("RGB")


def _data_folder() -> Path:
    spec = find_spec("skimage")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise PhotoError('the demo photos are part of scikit-image: pip install "clone_fast[demo]"')
    return Path(spec.origin).parent / "data"
