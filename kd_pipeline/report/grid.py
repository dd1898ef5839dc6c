"""Draw a batch as the models see it: a grid of images with labels and teacher predictions."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.text import printable
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.base import is_logits

__all__ = ["save_grid"]

_TILE = 112
_MARGIN = 6
_TEXT_HEIGHT = 30
_BLACK, _GREEN, _RED, _GRAY = (20, 20, 20), (0, 110, 40), (190, 20, 20), (130, 130, 130)


def save_grid(
    batch: KDBatch,
    path: Path | str,
    *,
    transform: TrainTransform | EvalTransform,
    classes: Sequence[str] | None = None,
    num_images: int = 32,
) -> Path:
    """Write the first images of `batch` as a PNG file, with the normalization of `transform` undone.

    A link at `path` is replaced, and not written through.

    Below each image are its label and, if the batch has teacher logits, the teacher's top-1 class and probability:
    green if both agree, red if not, gray for rows that are not valid.

    Raises:
        ConfigError: the file cannot be written.
    """
    num_images = min(num_images, len(batch))
    num_columns = math.ceil(math.sqrt(num_images * 2))
    num_rows = math.ceil(num_images / num_columns)
    cell_width, cell_height = _TILE + _MARGIN, _TILE + _TEXT_HEIGHT + _MARGIN
    grid = Image.new("RGB", (num_columns * cell_width + _MARGIN, num_rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for position, pixels in enumerate(_denormalized(batch, transform, num_images)):
        row, column = divmod(position, num_columns)
        x, y = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        grid.paste(Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))
        for line, (text, color) in enumerate(_captions(batch, position, classes)):
            draw.text((x, y + _TILE + 1 + line * 14), text, fill=color, font=font)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            grid.save(file, "PNG")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return path


def _denormalized(batch: KDBatch, transform: TrainTransform | EvalTransform, num_images: int) -> np.ndarray:
    """The first images, `[num_images, H, W, 3]` uint8."""
    images = batch.images[:num_images].float().cpu()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
    pixels = (images * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _captions(batch: KDBatch, position: int, classes: Sequence[str] | None) -> list[tuple[str, tuple[int, int, int]]]:
    lines = []
    label = None if batch.labels is None else _class_of(batch.labels[position])
    is_valid = bool(batch.valid[position])
    if label is not None:
        lines.append((f"label {_name(label, classes)}", _BLACK if is_valid else _GRAY))
    logits = [output for name, output in batch.teacher.items() if is_logits(name)]
    if len(logits) == 1:  # of several classifiers, none is the teacher
        probability, top1 = logits[0][position].softmax(dim=0).max(dim=0)
        color = _GRAY if label is None or not is_valid else _GREEN if int(top1) == label else _RED
        lines.append((f"teacher {_name(int(top1), classes)} {float(probability):.0%}", color))
    return lines


def _class_of(label: Tensor) -> int:
    """The class itself, or the one with the largest share in a mixed image."""
    return int(label if label.ndim == 0 else label.argmax())


def _name(label: int, classes: Sequence[str] | None) -> str:
    name = printable(classes[label]) if classes is not None and label < len(classes) else str(label)
    return name if len(name) <= 10 else name[:9] + "…"
