"""Images and labels that are NumPy arrays."""

import json
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline.data.sources.fingerprint import sampling_step, started_digest
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes
from kd_pipeline.errors import DataError

__all__ = ["Arrays"]

ArrayLike = str | os.PathLike[str] | NDArray[Any]


class Arrays:
    """Images and labels in arrays or files: an `.npy` file stays on disk (memory-mapped), an `.npz` file is loaded.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`, or a file with it;
            of an `.npz` the array `images` or the only one.
        labels: integers `[N]`, or a file with them; of an `.npz` the array `labels` or the only one. Where None: the
            array `labels` beside the images in their `.npz`, or no labels.
        classes: names in label order, or a JSON file that lists them.

    Raises:
        DataError: a file cannot be read (objects are never unpickled), or a shape, dtype or label does not fit.
    """

    stores: Literal["files", "pixels"] = "pixels"

    def __init__(self, images: ArrayLike, labels: ArrayLike | None = None, *, classes: Classes | None = None) -> None:
        self.classes = None if classes is None else class_names(classes)
        self._name, found = _opened(images, "images")
        if isinstance(found, dict):
            labels = found.get("labels") if labels is None else labels
        self._images = _checked_images(_chosen(found, "images", self._name), self._name)
        self.labels: NDArray[np.int64] | None = None
        if labels is not None:
            name, found = _opened(labels, "labels")
            self.labels = _checked_labels(_chosen(found, "labels", name), name, len(self), self.classes)
        self.num_classes = count_classes(self.labels, self.classes)
        self.reports: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Source.read`."""
        images = np.ascontiguousarray(self._images[indices])
        images = images[..., None] if images.ndim == 3 else images
        return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return f"{self._name}[{index}]"

    @cached_property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = started_digest(self.labels, self.classes)
        digest.update(json.dumps(self._images.shape).encode())
        digest.update(np.ascontiguousarray(self._images[:: sampling_step(self._images.nbytes)]).data)
        return digest.hexdigest()


def _opened(source: ArrayLike, what: str) -> tuple[str, NDArray[Any] | dict[str, NDArray[Any]]]:
    """The name for messages, and the array or the arrays of an `.npz` file."""
    if isinstance(source, np.ndarray):
        return what, source
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # a ZIP archive, so an .npz
                file.seek(0)
                return str(path), dict(np.load(file, allow_pickle=False))
        return str(path), np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as exc:
        # NumPy takes whatever it does not know for a pickle and recommends loading it unsafely.
        reason = "it is no NumPy file, or holds Python objects" if "pickle" in str(exc) else exc
        raise DataError(f"{path}: cannot be read as an .npy or .npz file of plain arrays ({reason})") from exc


def _chosen(found: NDArray[Any] | dict[str, NDArray[Any]], key: str, name: str) -> NDArray[Any]:
    if isinstance(found, np.ndarray):
        return found
    if key not in found and len(found) != 1:
        raise DataError(f"{name}: no array named {key!r} among {sorted(found)}; save it under that name")
    return found[key] if key in found else next(iter(found.values()))


def _checked_images(images: NDArray[Any], name: str) -> NDArray[np.uint8]:
    shape = images.shape
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits or not images.size:
        raise DataError(
            f"{name}: expected uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N, H and W of at least 1, "
            f"found {images.dtype} {list(shape)}; convert the array"
        )
    return images


def _checked_labels(
    labels: NDArray[Any], name: str, num_images: int, classes: tuple[str, ...] | None
) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{name}: expected integer labels [{num_images}], one for each image, "
            f"found {labels.dtype} {list(labels.shape)}"
        )
    limit = len(classes) if classes else 2**31
    outside = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(outside):
        raise DataError(
            f"{name}[{outside[0]}]: the label {labels[outside[0]]} is not a class index from 0 to {limit - 1} "
            f"({len(outside)} labels are not)"
        )
    return labels.astype(np.int64)
