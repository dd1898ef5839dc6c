"""Small images with masks for tests, and the values in them."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["png_of", "save_pair", "some_masks"]


def png_of(values: NDArray[np.integer], mode: str = "L") -> bytes:
    """A PNG with these values `[H, W]`; `mode` is Pillow's."""
    file = io.BytesIO()
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8)).convert("P")
        image.putdata(values.astype(np.uint8).ravel().tolist())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8)).convert(mode)
    image.save(file, "PNG")
    return file.getvalue()


def some_masks(num: int, num_classes: int = 4, ignore_index: int = 255) -> list[NDArray[np.uint8]]:
    """Masks of different sizes, with all classes and some ignored pixels in each."""
    rng = np.random.default_rng(num)
    values = np.array([*range(num_classes), ignore_index], np.uint8)
    return [rng.choice(values, size=(20 + 3 * number, 30 + 2 * number)) for number in range(num)]


def save_pair(images: Path, masks: Path, name: str, mask: NDArray[np.uint8], ending: str = ".png") -> None:
    """An image of noise, `images/NAME.jpg`, and its mask."""
    for folder in (images, masks):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)).save(images / f"{name}.jpg", quality=95)
    if ending == ".npy":
        np.save(masks / f"{name}.npy", mask)
    else:
        (masks / f"{name}{ending}").write_bytes(png_of(mask))
