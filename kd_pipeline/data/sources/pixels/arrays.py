"""Images, and labels or masks, in NumPy arrays."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.containers import user_path
from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step
from kd_pipeline.data.sources.labels import Classes, class_names, count_classes, label_warnings, shown_samples
from kd_pipeline.data.sources.masks.masks import Masks, fingerprint_with
from kd_pipeline.data.sources.masks.settings import ArrayMasks
from kd_pipeline.data.sources.pixels.stored_arrays import NpyFile, NpzFile, StoredArray, check_fits, open_stored
from kd_pipeline.errors import DataError

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["MAX_PIXELS", "Arrays", "MaskArray"]

_logger = logging.getLogger("kd_pipeline")

ArrayLike = str | os.PathLike[str] | NDArray[Any]
_Array = NDArray[Any] | StoredArray
MAX_PIXELS = 2**27
"""Of one image; one and a half times what the loader decodes from a file by default."""
_MAX_ROWS = 2**18
"""Images that are sampled for a fingerprint, each of which is read by itself."""
_BLOCK_BYTES = 2**24
"""So much is read at once for a fingerprint."""


class Arrays:
    """Images and labels from arrays or files. Images stay in an `.npy` file until they are read, an `.npz` is loaded.

    Args:
        images: uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`, or a file. From an `.npz` the array `images` is
            taken, or the only one.
        labels: integers `[N]`, or a file. From an `.npz` the array `labels` is taken, or the only one. Defaults to the
            array `labels` in the `.npz` of the images, else to no labels.
        classes: names in label order, or a file with them.
        masks: the array of the masks; there are no labels then, and `classes` are those of the pixels.

    Raises:
        DataError: a file cannot be read (objects are never unpickled) or is too large to load, or a shape, dtype or
            label is wrong. Also raised by `read`, if an `.npy` file was cut off since.
    """

    stores: Literal["files", "bytes", "pixels"] = "pixels"

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        classes: Classes | None = None,
        masks: ArrayMasks | None = None,
    ) -> None:
        self.classes = None if classes is None else class_names(classes)
        self._name, content = _open(images, "images")
        given: ArrayLike | StoredArray | None = labels
        if labels is None and masks is None and isinstance(content, NpzFile) and "labels" in content:
            given = content["labels"]
        self._images = _check_images(_select(content, "images", self._name), self._name)
        self.labels: NDArray[np.int64] | None = None
        if labels is not None and masks is not None:
            raise DataError(f"{self._name}: labels and masks exclude each other; leave out one of them")
        if given is not None:
            name, content = _open(given, "labels")
            self.labels = _check_labels(_select(content, "labels", name), name, len(self), self.classes)
        self.masks = (
            None if masks is None else Masks(MaskArray(masks.path, self._images.shape), masks, classes=self.classes)
        )
        self.num_classes = count_classes(self.labels, self.classes) if self.masks is None else self.masks.num_classes
        found = () if self.labels is None else label_warnings(self.labels, self.classes, is_given=classes is not None)
        self.warnings: tuple[str, ...] = tuple(printable(f"{self._name}: {warning}") for warning in found)
        for warning in self.warnings:
            _logger.warning("%s", warning)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images at `indices` `[n]`, `[n, H, W, 3]`."""
        images = _rows(self._images, indices)
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
        _add_rows(digest, self._images)
        return fingerprint_with(digest.hexdigest(), self.masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_samples('images', self)})"


class MaskArray:
    """Masks in an array or a file, as a source of them.

    Args:
        masks: integers `[N, H, W]`, or a file. From an `.npz` the array `masks` is taken, or the only one.
        shape: that of the images, `[N, H, W, ...]`.

    Raises:
        DataError: a file cannot be read or is too large to load, or the masks are not one of each image.
    """

    stores: Literal["files", "bytes", "pixels"] = "pixels"
    labels = classes = num_classes = masks = None
    warnings: tuple[str, ...] = ()

    def __init__(self, masks: ArrayLike, shape: Sequence[int]) -> None:
        self._name, content = _open(masks, "masks")
        found = _select(content, "masks", self._name)
        if found.dtype.kind not in "bui" or found.shape != tuple(shape[:3]):
            raise DataError(
                f"{self._name}: expected masks {list(shape[:3])} of integers, one of the size of each image, found "
                f"{_kind(found)}; save the class of each pixel as uint8"
            )
        self._masks = found if isinstance(found, NpyFile) and found.has_rows else _load(found)

    def __len__(self) -> int:
        return len(self._masks)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Masks at `indices` `[n]`, `[n, H, W]`."""
        masks = _rows(self._masks, indices)
        return masks.astype(np.uint8) if masks.dtype == np.bool_ else masks

    def name(self, index: int) -> str:
        """The file and the position in it, such as `masks.npy[17]`."""
        return f"{self._name}[{index}]"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of shape, data type and evenly sampled masks."""
        digest = hashlib.sha256(json.dumps([self._masks.shape, self._masks.dtype.str]).encode())
        _add_rows(digest, self._masks)
        return digest.hexdigest()


def _rows(array: NDArray[Any] | NpyFile, indices: NDArray[np.int64]) -> NDArray[Any]:
    """The rows at `indices` `[n]`, in a new array."""
    return array.rows(indices) if isinstance(array, NpyFile) else np.ascontiguousarray(array[indices])


def _add_rows(digest: "_Hash", array: NDArray[Any] | NpyFile) -> None:
    """Update `digest` with evenly sampled rows."""
    step = sampling_step(array.nbytes)
    if step > 1:
        step = max(step, -(-len(array) // _MAX_ROWS))
    stride = step * max(1, _BLOCK_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), stride):
        digest.update(_rows(array, np.arange(start, min(start + stride, len(array)), step)).data)


def _open(source: ArrayLike | StoredArray, what: str) -> tuple[str, _Array | NpzFile]:
    """The name for messages, and the array or the arrays of an `.npz` file."""
    if isinstance(source, np.ndarray):
        return what, source
    if isinstance(source, StoredArray):
        return source.name, source
    path = user_path(source)
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder, and {what} is an .npy or .npz file; for files take kind: image_folder")
    return str(path), open_stored(path)


def _select(content: _Array | NpzFile, key: str, name: str) -> _Array:
    if not isinstance(content, NpzFile):
        return content
    if key not in content and len(content) != 1:
        among = first_few(list(map(repr, sorted(content))))
        raise DataError(f"{name}: no array named {key!r} among [{among}]; save it under that name")
    return content[key if key in content else next(iter(content))]


def _load(array: _Array) -> NDArray[Any]:
    return array if isinstance(array, np.ndarray) else array.load()


def _check_images(images: _Array, name: str) -> NDArray[np.uint8] | NpyFile:
    """The images; those in an `.npy` file stay there."""
    shape = images.shape
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits or not images.size:
        raise DataError(
            f"{name}: expected uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N, H and W of at least 1, "
            f"found {_kind(images)}; {_image_advice(images)}"
        )
    if shape[1] * shape[2] > MAX_PIXELS:
        raise DataError(f"{name}: images of {shape[1]} x {shape[2]} are larger than {MAX_PIXELS} pixels; resize them")
    if isinstance(images, NpyFile) and images.has_rows:
        check_fits(name, 8 * len(images), "split the file")  # for as many labels, which the loader holds
        return images
    return _load(images)


def _kind(array: _Array) -> str:
    """Data type and shape for messages; a header may have a type of thousands of fields."""
    return f"{array.dtype!s:.60} {list(array.shape)}"


def _image_advice(images: _Array) -> str:
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


def _check_labels(labels: _Array, name: str, num_images: int, classes: tuple[str, ...] | None) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{name}: expected integer labels [{num_images}], one for each image, "
            f"found {_kind(labels)}{_label_advice(labels, num_images)}"
        )
    labels = _load(labels)
    limit = len(classes) if classes else 2**31
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{name}[{wrong[0]}]: the label {labels[wrong[0]]} is not a class index from 0 to {limit - 1} "
            f"({len(wrong)} of {num_images} labels are not)"
        )
    return labels.astype(np.int64)


def _label_advice(labels: _Array, num_images: int) -> str:
    """The end of an error message: how to convert `labels`, for the kinds that are common."""
    if labels.shape == (num_images, 1):
        return "; save labels[:, 0]"
    if len(labels.shape) == 2 and labels.shape[0] == num_images:
        return "; save labels.argmax(axis=1) if each row marks one class"
    if labels.shape != (num_images,):
        return "; save as many labels as images, in the same order"
    if labels.dtype.kind in "US":
        return "; save np.unique(labels, return_inverse=True)[1], and the names as classes"
    return "; save labels.astype(np.int64)" if labels.dtype.kind in "fb" else ""
