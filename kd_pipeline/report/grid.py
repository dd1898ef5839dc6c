"""Draw a batch as the models see it: a grid of images with labels or masks, and predictions."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kd_pipeline._core.constants import IGNORE_INDEX
from kd_pipeline._core.text import printable
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.losses.pixels import predicted_classes
from kd_pipeline.report.pixels import save_image, save_pixel_grid, short_name
from kd_pipeline.teachers.base import is_logits

__all__ = ["save_grid", "save_samples"]

_TILE = 112
_NUM_MASKS = 8
"""Images in a picture with masks, each of which has several tiles."""
_MARGIN = 6
_NAME_LENGTH = 10
"""Of a class in a caption."""
_TEXT_HEIGHT, _LINE_HEIGHT = 30, 14
_BLACK, _GREEN, _RED, _GRAY = (20, 20, 20), (0, 110, 40), (190, 20, 20), (130, 130, 130)


def save_grid(
    batch: KDBatch,
    path: Path | str,
    *,
    transform: TrainTransform | EvalTransform | None,
    classes: Sequence[str] | None = None,
    num_images: int = 32,
    student: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Path:
    """Write the first images of `batch` as a PNG file, with the normalization of `transform` undone.

    A link at `path` is replaced, and not written through.

    Below each image are its label and, if the batch has teacher logits, the teacher's top-1 class and probability:
    green if both agree, red if not, gray for rows that are not valid. Beside an image with a mask are its mask and the
    teacher's top class of each pixel, in colors.

    Args:
        batch: with images.
        path: of the file.
        transform: of the images; without one, each is stretched to the whole range of colors.
        classes: names in label order.
        num_images: how many to draw; at most 8 with masks.
        student: logits `[N, K, h, w]` of a student, to draw too.
        ignore_index: class of pixels in masks that have none.

    Raises:
        ConfigError: the file cannot be written.
    """
    if student is not None or batch.masks is not None or _pixel_logits(batch) is not None:
        return _save_pixels(batch, Path(path), transform, classes, min(num_images, _NUM_MASKS), student, ignore_index)
    pixels = _denormalized(batch.images[:num_images], transform)
    captions = [_captions(batch, position, classes) for position in range(len(pixels))]
    return save_image(_draw(pixels, captions), Path(path))


def save_samples(
    images: Tensor,
    captions: Sequence[Sequence[tuple[str, bool | None]]],
    path: Path,
    *,
    transform: TrainTransform | EvalTransform | None,
) -> Path:
    """Write `images` `[N, 3, H, W]` as a PNG file, each above its lines of text.

    Args:
        images: to draw, at least one.
        captions: for each image its lines, at most three, and whether what they say is right, if they say it.
        path: of the file; a link there is replaced.
        transform: of the images, as in `save_grid`.

    Raises:
        ConfigError: the file cannot be written.
    """
    colors = {None: _BLACK, True: _GREEN, False: _RED}
    colored = [[(printable(text), colors[is_right]) for text, is_right in lines] for lines in captions]
    return save_image(_draw(_denormalized(images, transform), colored), path)


def _draw(pixels: np.ndarray, captions: Sequence[Sequence[tuple[str, tuple[int, int, int]]]]) -> Image.Image:
    """A grid, twice as wide as high, of images `[N, H, W, 3]` and the lines below them."""
    num_columns = math.ceil(math.sqrt(len(pixels) * 2))
    num_rows = math.ceil(len(pixels) / num_columns)
    text_height = max(_TEXT_HEIGHT, 2 + _LINE_HEIGHT * max(map(len, captions)))
    cell_width, cell_height = _TILE + _MARGIN, _TILE + text_height + _MARGIN
    grid = Image.new("RGB", (num_columns * cell_width + _MARGIN, num_rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for position, (image, lines) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(position, num_columns)
        x, y = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        grid.paste(Image.fromarray(image).resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))
        for line, (text, color) in enumerate(lines):
            draw.text((x, y + _TILE + 1 + line * _LINE_HEIGHT), text, fill=color, font=font)
    return grid


def _save_pixels(
    batch: KDBatch,
    path: Path,
    transform: TrainTransform | EvalTransform | None,
    classes: Sequence[str] | None,
    num_images: int,
    student: Tensor | None,
    ignore_index: int,
) -> Path:
    """Draw masks and predictions of the pixels."""
    logits = {"teacher": _pixel_logits(batch), "student": student}
    known = {name: each[:num_images] for name, each in logits.items() if each is not None}
    size = (batch.images.shape[2], batch.images.shape[3])
    labels = {} if batch.masks is None else {"mask": batch.masks[:num_images]}
    labels |= {name: predicted_classes(each, size) for name, each in known.items()}
    numbers = [each.shape[1] for each in known.values()] or [len(classes or ())]
    if batch.masks is not None:
        is_class = batch.masks != ignore_index
        numbers.append(int(batch.masks.where(is_class, 0).max()) + 1)
    images = _denormalized(batch.images[:num_images], transform)
    return save_pixel_grid(images, labels, path, num_classes=max(numbers), classes=classes, ignore_index=ignore_index)


def _pixel_logits(batch: KDBatch) -> Tensor | None:
    """The logits of the pixels by the only teacher that has some."""
    found = [output for name, output in batch.teacher.items() if is_logits(name) and output.ndim == 4]
    return found[0] if len(found) == 1 else None


def _denormalized(images: Tensor, transform: TrainTransform | EvalTransform | None) -> np.ndarray:
    """The pixels of images `[N, 3, H, W]`, `[N, H, W, 3]` uint8."""
    images = images.float().cpu()
    if transform is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        pixels = ((images - low) / (high - low).clamp(min=1e-6)).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
    pixels = (images * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _captions(batch: KDBatch, position: int, classes: Sequence[str] | None) -> list[tuple[str, tuple[int, int, int]]]:
    lines = []
    label = None if batch.labels is None else _class_of(batch.labels[position])
    is_valid = bool(batch.valid[position])
    if label is not None:
        lines.append((f"label {short_name(label, classes, _NAME_LENGTH)}", _BLACK if is_valid else _GRAY))
    logits = [output for name, output in batch.teacher.items() if is_logits(name) and output.ndim == 2]
    if len(logits) == 1:  # of several classifiers, none is the teacher
        probability, top1 = logits[0][position].softmax(dim=0).max(dim=0)
        color = _GRAY if label is None or not is_valid else _GREEN if int(top1) == label else _RED
        lines.append((f"teacher {short_name(int(top1), classes, _NAME_LENGTH)} {float(probability):.0%}", color))
    return lines


def _class_of(label: Tensor) -> int:
    """The class itself, or the one with the largest share in a mixed image."""
    return int(label if label.ndim == 0 else label.argmax())
