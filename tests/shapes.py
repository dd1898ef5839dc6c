"""Shapes drawn over scikit-learn's photographs, with the class of each pixel."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor

CLASSES = ("background", "disk", "square", "triangle")
IGNORED = 255


def draw_shapes(num_images: int, size: int = 32, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images `[N, size, size, 3]` and masks `[N, size, size]`, whose outlines have no class.

    Each shape is filled with another piece of a photograph, in a random tint with more red in disks, green in squares
    and blue in triangles.
    """
    rng = np.random.default_rng(seed)
    photos = [np.asarray(Image.fromarray(photo).reduce(2)) for photo in load_sample_images().images]
    images, masks = np.empty((num_images, size, size, 3), np.uint8), np.zeros((num_images, size, size), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        image[:] = _piece(photos, size, rng)
        for label in rng.permutation(len(CLASSES) - 1)[: rng.integers(1, 4)] + 1:
            shape = _shape(label, size, rng)
            tint = rng.uniform(0.3, 0.9, 3)
            tint[label - 1] += 0.35
            image[shape == 1] = (_piece(photos, size, rng) * tint).clip(0, 255)[shape == 1]
            mask[shape == 1] = label
            mask[shape == 2] = IGNORED
    return images, masks


def shape_tensors(num_images: int, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same as normalized images `[N, 3, size, size]` and masks, int64."""
    images, masks = draw_shapes(num_images, size, seed)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return pixels.contiguous(), torch.from_numpy(masks).long()


def _piece(photos: list[NDArray[np.uint8]], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    photo = photos[rng.integers(len(photos))]
    top, left = (rng.integers(0, side - size) for side in photo.shape[:2])
    return photo[top : top + size, left : left + size]


def _shape(label: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """`[size, size]`, 1 within the shape and 2 on its outline."""
    radius = rng.integers(size // 6, size // 3)
    x, y = rng.integers(radius, size - radius, 2)
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    box = [int(x - radius), int(y - radius), int(x + radius), int(y + radius)]
    match CLASSES[label]:
        case "disk":
            draw.ellipse(box, fill=1, outline=2)
        case "square":
            draw.rectangle(box, fill=1, outline=2)
        case _:
            draw.polygon([(box[0], box[3]), (int(x), box[1]), (box[2], box[3])], fill=1, outline=2)
    return np.asarray(canvas)
