"""Images and labels in NumPy arrays."""

import json
import logging
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.sources.containers import find_container, user_path
from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes, label_warnings
from kd_pipeline.errors import DataError

__all__ = ["Arrays"]

_logger = logging.getLogger("kd_pipeline")

ArrayLike = str | os.PathLike[str] | NDArray[Any]


class Arrays:
    """Images and labels from arrays or files. An `.npy` file is memory-mapped, an `.npz` file is loaded.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`, or a file. From an `.npz` the array `images` is
            taken, or the only one.
        labels: integers `[N]`, or a file. From an `.npz` the array `labels` is taken, or the only one. Defaults to the
            array `labels` in the `.npz` of the images, else to no labels.
        classes: names in label order, or a file with them.

    Raises:
        DataError: a file cannot be read (objects are never unpickled), or a shape, dtype or label is wrong.
    """

    stores: Literal["files", "pixels"] = "pixels"

    def __init__(self, images: ArrayLike, labels: ArrayLike | None = None, *, classes: Classes | None = None) -> None:
        self.classes = None if classes is None else class_names(classes)
        self._name, content = _open(images, "images")
        if isinstance(content, dict) and labels is None:
            labels = content.get("labels")
        self._images = _check_images(_select(content, "images", self._name), self._name)
        self.labels: NDArray[np.int64] | None = None
        if labels is not None:
            name, content = _open(labels, "labels")
            self.labels = _check_labels(_select(content, "labels", name), name, len(self), self.classes)
        self.num_classes = count_classes(self.labels, self.classes)
        found = () if self.labels is None else label_warnings(self.labels, self.classes, is_given=classes is not None)
        self.warnings: tuple[str, ...] = tuple(f"{self._name}: {warning}" for warning in found)
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images at `indices` `[n]`, `[n, H, W, 3]`."""
        images = np.ascontiguousarray(self._images[indices])
        images = images[..., None] if images.ndim == 3 else images
        return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)

    def name(self, index: int) -> str:
        """The file and the position in it, such as `images.npy[17]`."""
        return f"{self._name}[{index}]"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names, shape and evenly sampled images; see `Source.fingerprint`."""
        digest = label_digest(self.labels, self.classes)
        digest.update(json.dumps(self._images.shape).encode())
        digest.update(np.ascontiguousarray(self._images[:: sampling_step(self._images.nbytes)]).data)
        return digest.hexdigest()


def _open(source: ArrayLike, what: str) -> tuple[str, NDArray[Any] | dict[str, NDArray[Any]]]:
    """The name for messages, and the array or the arrays of an `.npz` file."""
    if isinstance(source, np.ndarray):
        return what, source
    path = user_path(source)
    if path.is_dir():
        raise DataError(f"{path} is a folder, and {what} is an .npy or .npz file; for files take kind: image_folder")
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # a ZIP archive, hence an .npz
                file.seek(0)
                return str(path), dict(np.load(file, allow_pickle=False))
        return str(path), np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as exc:
        # NumPy takes any unknown file for a pickle, and its message recommends loading it unsafely.
        reason = "not a NumPy file, or it contains Python objects" if "pickle" in str(exc) else exc
        container = find_container(path, _head(path))
        advice = "" if container is None else f"; it is {container.kind}: {container.advice}"
        raise DataError(f"{path}: cannot be read as an .npy or .npz file of plain arrays ({reason}){advice}") from exc


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError:
        return b""


def _select(content: NDArray[Any] | dict[str, NDArray[Any]], key: str, name: str) -> NDArray[Any]:
    if isinstance(content, np.ndarray):
        return content
    if key not in content and len(content) != 1:
        raise DataError(f"{name}: no array named {key!r} among {sorted(content)}; save it under that name")
    return content[key] if key in content else next(iter(content.values()))


def _check_images(images: NDArray[Any], name: str) -> NDArray[np.uint8]:
    shape = images.shape
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits or not images.size:
        raise DataError(
            f"{name}: expected uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N, H and W of at least 1, "
            f"found {images.dtype} {list(shape)}; {_image_advice(images)}"
        )
    return images


def _image_advice(images: NDArray[Any]) -> str:
    """How to convert `images`, for the kinds that are common."""
    shape = images.shape
    steps = []
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        steps.append("images.transpose(0, 2, 3, 1), because channels come last")
    if len(shape) == 4 and shape[3] == 4:
        steps.append("images[..., :3] for images without transparency")
    if len(shape) == 2 and round((shape[1] / 3) ** 0.5) ** 2 * 3 == shape[1]:
        side = round((shape[1] / 3) ** 0.5)
        steps.append(f"images.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) for rows such as those of CIFAR")
    if images.dtype.kind == "f":
        steps.append(
            "(255 * images).round().astype(np.uint8) for pixels from 0 to 1, images.astype(np.uint8) for 0 to 255"
        )
    elif images.dtype == np.uint16:
        steps.append("(images // 257).astype(np.uint8) for pixels of 16 bits")
    elif images.dtype.kind in "iu" and images.dtype != np.uint8:
        steps.append("images.astype(np.uint8) for pixels from 0 to 255")
    elif images.dtype == bool:
        steps.append("images.astype(np.uint8) * 255")
    return f"save {', then '.join(steps)}" if steps else "convert the array"


def _check_labels(
    labels: NDArray[Any], name: str, num_images: int, classes: tuple[str, ...] | None
) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{name}: expected integer labels [{num_images}], one for each image, "
            f"found {labels.dtype} {list(labels.shape)}{_label_advice(labels, num_images)}"
        )
    limit = len(classes) if classes else 2**31
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{name}[{wrong[0]}]: the label {labels[wrong[0]]} is not a class index from 0 to {limit - 1} "
            f"({len(wrong)} of {num_images} labels are not)"
        )
    return labels.astype(np.int64)


def _label_advice(labels: NDArray[Any], num_images: int) -> str:
    """The end of an error message: how to convert `labels`, for the kinds that are common."""
    if labels.shape == (num_images, 1):
        return "; save labels[:, 0]"
    if labels.ndim == 2 and len(labels) == num_images:
        return "; save labels.argmax(axis=1) if each row marks one class"
    if labels.shape != (num_images,):
        return "; save as many labels as images, in the same order"
    if labels.dtype.kind in "US":
        return "; save np.unique(labels, return_inverse=True)[1], and the names as classes"
    return "; save labels.astype(np.int64)" if labels.dtype.kind in "fb" else ""
