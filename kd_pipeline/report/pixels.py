"""Draw the classes of pixels in colors: masks, and the predictions of models beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.constants import IGNORE_INDEX
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError

__all__ = ["class_colors", "save_image", "save_mask", "save_pixel_grid", "short_name"]

_TILE, _MARGIN, _TITLE_HEIGHT, _LEGEND_HEIGHT = 112, 4, 16, 18
_NAME_LENGTH = 14
"""Of a class in the legend."""
_MAX_LEGEND = 32
"""Classes that the legend names, those with the most pixels."""
_IGNORED = (224, 224, 192)
"""As in the pictures of PASCAL VOC."""
_BLACK = (20, 20, 20)


def class_colors(num_classes: int) -> NDArray[np.uint8]:
    """`[num_classes, 3]`, the color map of PASCAL VOC: black for class 0, and well apart for the next ones."""
    labels = np.arange(num_classes, dtype=np.int64)
    colors = np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> channel) & 1) << (7 - bit)
        labels >>= 3
    return colors.astype(np.uint8)


def save_mask(labels: Tensor, path: Path, *, num_classes: int) -> Path:
    """Write classes `[H, W]` as a PNG file: their numbers, with the colors of `class_colors` up to 256 classes.

    Raises:
        ConfigError: the file cannot be written.
    """
    if num_classes > 256:
        return save_image(Image.fromarray(labels.numpy().astype(np.uint16)), path)
    image = Image.fromarray(labels.numpy().astype(np.uint8)).convert("P")
    image.putpalette(class_colors(256).flatten().tolist())
    return save_image(image, path)


def save_pixel_grid(
    images: NDArray[np.uint8],
    labels: Mapping[str, Tensor],
    path: Path,
    *,
    num_classes: int,
    classes: Sequence[str] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Path:
    """Write a PNG file with a strip for each image: the image, then its pixels' classes in colors, with a legend.

    Args:
        images: `[N, H, W, 3]`.
        labels: `[N, h, w]` classes by the title of their column, such as `mask` and `student`.
        path: of the file. A link there is replaced, and not written through.
        num_classes: number of classes.
        classes: their names; None shows their numbers.
        ignore_index: class of pixels that have none.

    Raises:
        ConfigError: the file cannot be written.
    """
    titles = ["image", *labels]
    num_strips = 2 if len(images) > 4 and len(titles) < 4 else 1
    width, height = _tile_size(images.shape[1:3])
    strip = len(titles) * (width + _MARGIN) + 3 * _MARGIN
    num_rows = -(-len(images) // num_strips)
    colors = class_colors(num_classes)
    shown = _most_frequent(labels, num_classes)
    columns = max(1, num_strips * strip // 110)
    legend = -(-len(shown) // columns) * _LEGEND_HEIGHT + _MARGIN
    canvas_height = _TITLE_HEIGHT + num_rows * (height + _MARGIN) + legend
    canvas = Image.new("RGB", (num_strips * strip, canvas_height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for number in range(num_strips):
        for column, title in enumerate(titles):
            draw.text((number * strip + _MARGIN + column * (width + _MARGIN), 1), title, fill=_BLACK, font=font)
    for number, pixels in enumerate(images):
        row, which = divmod(number, num_strips)
        y = _TITLE_HEIGHT + row * (height + _MARGIN)
        tiles = [pixels, *(_colored(each[number], colors, ignore_index) for each in labels.values())]
        for column, tile in enumerate(tiles):
            x = which * strip + _MARGIN + column * (width + _MARGIN)
            canvas.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
    top = canvas_height - legend + _MARGIN
    for position, label in enumerate(shown):
        row, column = divmod(position, columns)
        x, y = _MARGIN + column * 110, top + row * _LEGEND_HEIGHT
        draw.rectangle([x, y, x + 12, y + 12], fill=tuple(colors[label].tolist()), outline=_BLACK)
        draw.text((x + 17, y), short_name(label, classes, _NAME_LENGTH), fill=_BLACK, font=font)
    return save_image(canvas, path)


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG file, whose folder is made if it is missing; a link at `path` is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            image.save(file, "PNG")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return path


def _colored(labels: Tensor, colors: NDArray[np.uint8], ignore_index: int) -> NDArray[np.uint8]:
    """`[h, w, 3]`; what is no class is drawn as ignored."""
    found = labels.cpu().numpy()
    is_class = (found >= 0) & (found < len(colors)) & (found != ignore_index)
    picture: NDArray[np.uint8] = colors[np.where(is_class, found, 0)]
    picture[~is_class] = _IGNORED
    return picture


def _tile_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Width and height of a tile, the longer one fixed."""
    height, width = size
    scale = _TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _most_frequent(labels: Mapping[str, Tensor], num_classes: int) -> list[int]:
    """The classes that occur, in their order."""
    found = torch.cat([each.flatten().cpu() for each in labels.values()]) if labels else torch.zeros(0).long()
    counts = found[(found >= 0) & (found < num_classes)].bincount(minlength=num_classes)
    top = counts.argsort(descending=True)[:_MAX_LEGEND]
    return sorted(int(label) for label in top if counts[label])


def short_name(label: int, classes: Sequence[str] | None, length: int) -> str:
    """The name of a class, or its number without names, in at most so many characters."""
    name = printable(classes[label]) if classes is not None and label < len(classes) else str(label)
    return name if len(name) <= length else f"{name[: length - 1]}…"
