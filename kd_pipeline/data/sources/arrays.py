"""Images and labels in NumPy arrays."""

import json
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes
from kd_pipeline.errors import DataError

__all__ = ["Arrays"]

ArrayLike = str | os.PathLike[str] | NDArray[Any]


class Arrays:
    """Images and labels from arrays or files. An `.npy` file is memory-mapped, an `.npz` file is loaded.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`, or a file. From an `.npz` the array `images` is
            taken, or the only one.
        labels: integers `[N]`, or a file. From an `.npz` the array `labels` is taken, or the only one. Defaults to the
            array `labels` in the `.npz` of the images, else to no labels.
        classes: names in label order, or a JSON file with them.

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
        self.warnings: tuple[str, ...] = ()

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
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # a ZIP archive, hence an .npz
                file.seek(0)
                return str(path), dict(np.load(file, allow_pickle=False))
        return str(path), np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as exc:
        # NumPy takes any unknown file for a pickle, and its message recommends loading it unsafely.
        reason = "not a NumPy file, or it contains Python objects" if "pickle" in str(exc) else exc
        raise DataError(f"{path}: cannot be read as an .npy or .npz file of plain arrays ({reason})") from exc


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
            f"found {images.dtype} {list(shape)}; convert the array"
        )
    return images


def _check_labels(
    labels: NDArray[Any], name: str, num_images: int, classes: tuple[str, ...] | None
) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{name}: expected integer labels [{num_images}], one for each image, "
            f"found {labels.dtype} {list(labels.shape)}"
        )
    limit = len(classes) if classes else 2**31
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{name}[{wrong[0]}]: the label {labels[wrong[0]]} is not a class index from 0 to {limit - 1} "
            f"({len(wrong)} of {num_images} labels are not)"
        )
    return labels.astype(np.int64)
