"""Sources of the user's own: a base class that needs the samples only, and what is checked of every other one."""

import inspect
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.containers import user_path
from kd_pipeline.data.sources.encoded import Encoded, as_encoded, fingerprint_of_bytes
from kd_pipeline.data.sources.files.paths import PathTable, fingerprint_of_files
from kd_pipeline.data.sources.fingerprint import label_digest, sampling_step
from kd_pipeline.data.sources.labels import (
    Classes,
    class_names,
    count_classes,
    label_warnings,
    name_warnings,
    shown_samples,
)
from kd_pipeline.data.sources.masks.masks import Masks, check_masks, fingerprint_with, masks_of
from kd_pipeline.errors import DataError, KDPipelineError
from kd_pipeline.storage import call_each

if TYPE_CHECKING:
    from kd_pipeline.data.sources.base import Source

__all__ = ["BaseSource", "check_source", "open_custom"]

_logger = logging.getLogger("kd_pipeline")

_BLOCK = 64
"""Images that are read at once for a fingerprint."""
_MAX_LABEL = 2**31 - 1


class BaseSource:
    """Samples of your own: files that you list, or encoded images or pixels from anywhere.

        source = BaseSource(paths, labels, classes=("cat", "dog"))

        class Slides(BaseSource):
            def __init__(self, store):
                super().__init__(len(store), store.labels)
                self.store = store

            def content(self, index):
                return self.store[index]  # the bytes of a JPEG

    Args:
        samples: the N files, absolute or relative to `root`; or N alone, for a subclass with `content` or `pixels`.
        labels: `[N]`, integers from 0 or class names; None for unlabeled samples.
        classes: names in label order, or a file with them; defaults to the sorted names in `labels`, if any.
        masks: those of the samples, such as `Masks(BaseSource(mask_paths), MaskSettings(num_classes=19))`, in place of
            labels.
        root: the folder of relative files. The fingerprint does not depend on where it is; it defaults to the folder
            that all files have in common.
        name: the source's name in messages; defaults to that of the class.

    Raises:
        DataError: there are no samples, a path is relative to nothing, or a label is none.
    """

    content_threads = 8
    """Threads that call `content` at the same time; 1 if what it reads from allows no more."""

    def __init__(
        self,
        samples: Sequence[str | os.PathLike[str]] | int,
        labels: Sequence[int] | Sequence[str] | NDArray[Any] | None = None,
        *,
        classes: Classes | None = None,
        masks: Masks | None = None,
        root: str | os.PathLike[str] | None = None,
        name: str = "",
    ) -> None:
        self._name = name or type(self).__name__
        self._num_samples = samples if isinstance(samples, int) else len(samples)
        if self._num_samples < 1:
            raise DataError(f"{self._name}: there are no samples; give at least one")
        self._paths = None if isinstance(samples, int) else _path_table(samples, root, self._name)
        self._content_lock = Lock()
        self.stores: Literal["files", "bytes", "pixels"] = "files"
        if self._paths is None:
            self.stores = "pixels" if type(self).content is BaseSource.content else "bytes"
        names = None if classes is None else class_names(classes)
        self.labels, self.classes = _read_labels(labels, names, self._num_samples, self._name)
        check_masks(masks, self._num_samples, self._name)
        if masks is not None and self.labels is not None:
            raise DataError(f"{self._name}: labels and masks exclude each other; leave out one of them")
        self.masks = masks
        self.num_classes = count_classes(self.labels, self.classes) if masks is None else masks.num_classes
        found: list[str] = []
        if self.labels is not None:
            found += label_warnings(self.labels, self.classes, is_given=classes is not None)
        if self.classes is not None and classes is None:
            found += name_warnings(self.classes)
        self.warnings: tuple[str, ...] = tuple(printable(f"{self._name}: {warning}") for warning in found)
        for warning in self.warnings:
            _logger.warning("%s", warning)
        self._shape: tuple[int, ...] | None = None
        """That of every image, known from the first one."""

    def __len__(self) -> int:
        return self._num_samples

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The image at `index`: uint8 `[H, W, 3]`, or `[H, W]` if it is gray, with the same H and W for all.

        It is called in a thread of the loader, one call at a time, ahead of the batch that the sample is for.
        """
        raise NotImplementedError(
            f"{type(self).__name__} was given a number of samples and no files; define content(self, index) to return "
            "the encoded image at an index as bytes, or pixels(self, index) for uint8 [H, W, 3]"
        )

    def content(self, index: int) -> bytes | bytearray | memoryview | None:
        """The encoded image at `index`, as it would be in a file: JPEG, PNG and the other kinds that files may have.

        None says that this sample has no image, which is treated as an unreadable file is (`on_bad_sample`); an
        exception ends the loop. `content_threads` threads call it at the same time, ahead of the batch that the sample
        is for.
        """
        raise NotImplementedError

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8] | Encoded:
        """The samples at `indices` `[n]`, see `Source.read`; override it to read several images at once."""
        if self._paths is not None:
            return self._paths.rows(indices)
        if self.stores == "bytes":
            if self.content_threads > 1:
                return call_each(self._encoded, indices.tolist(), self.content_threads)
            with self._content_lock:
                return [self._encoded(index) for index in indices.tolist()]
        return np.stack([self._image(index) for index in indices.tolist()])

    def name(self, index: int) -> str:
        """The file, or the source's name and the position in it."""
        return f"{self._name}[{index}]" if self._paths is None else os.fsdecode(self._paths.absolute(index))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content, see `Source.fingerprint`, for which evenly sampled images are read.

        Where that takes too long, set it to a string that changes with the data, such as the version of a database.
        """
        return fingerprint_with(self._fingerprint_of_images(), self.masks)

    def _fingerprint_of_images(self) -> str:
        if self._paths is not None:
            return fingerprint_of_files(self._paths, self.labels, self.classes)
        if self.stores == "bytes":
            return fingerprint_of_bytes(self)
        first = np.asarray(self.read(np.zeros(1, dtype=np.int64)))
        digest = label_digest(self.labels, self.classes)
        digest.update(json.dumps([len(self), *first.shape[1:]]).encode())
        sampled = np.arange(0, len(self), sampling_step(first.nbytes * len(self)))
        for start in range(0, len(sampled), _BLOCK):
            digest.update(np.ascontiguousarray(self.read(sampled[start : start + _BLOCK])).data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{self._name}({shown_samples('files' if self._paths else 'images', self)})"

    def _encoded(self, index: int) -> NDArray[np.uint8] | UnreadableFileError:
        """The bytes at `index`, `[L]`, or why there are none."""
        try:
            content: object = self.content(index)
        except Exception as exc:
            exc.add_note(f"while {self.name(index)} was read")
            raise
        if content is None:
            return UnreadableFileError("content() returned None")
        if not isinstance(content, bytes | bytearray | memoryview):
            raise DataError(
                f"{self.name(index)}: content() returned {_kind(content)}; return the bytes of the encoded image, or "
                "None if there is none"
            )
        return as_encoded(content)

    def _image(self, index: int) -> NDArray[np.uint8]:
        """The pixels at `index`, `[H, W, 3]`."""
        try:
            image: object = self.pixels(index)
        except Exception as exc:
            exc.add_note(f"while {self.name(index)} was read")
            raise
        fits = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
        if not fits or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):  # type: ignore[attr-defined]
            raise DataError(
                f"{self.name(index)}: pixels() returned {_kind(image)}; return a NumPy array of uint8, [H, W, 3] or "
                "[H, W] for gray"
            )
        assert isinstance(image, np.ndarray)
        if self._shape is None:
            self._shape = image.shape[:2]
        if image.shape[:2] != self._shape:
            raise DataError(
                f"{self.name(index)}: the image is {image.shape[0]} x {image.shape[1]}, and others are "
                f"{self._shape[0]} x {self._shape[1]}; bring all pixels to one size, or write images as files"
            )
        image = image if image.ndim == 3 else image[..., None]
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def open_custom(
    factory: str, kwargs: Mapping[str, object], *, classes: Sequence[str] | None, plugins: Collection[str]
) -> "Source":
    """The source that a function of the user's returns, checked.

    Args:
        factory: the function, as `package.module:function`.
        kwargs: its arguments. One that is called `classes` is added if the function has it: those of the training
            data, or None for the training data itself.
        classes: class names of the training data in label order.
        plugins: names of the modules that the function may come from.

    Raises:
        ConfigError: the module is not allowed, or has no such function.
        DataError: the function failed, or what it returned is no source.
    """
    build = import_function("source.factory", factory, plugins)
    arguments = dict(kwargs)
    if "classes" not in arguments and "classes" in inspect.signature(build).parameters:
        arguments["classes"] = None if classes is None else tuple(classes)
    try:
        source = build(**arguments)
    except KDPipelineError:
        raise
    except Exception as exc:  # the user's code can raise anything
        raise DataError(
            f"the source {factory} failed ({type(exc).__name__}: {exc}); correct it, or its kwargs"
        ) from exc
    return check_source(source, factory)


def check_source(source: Any, name: str) -> "Source":
    """`source`, if it is one as far as its fields and its first sample can tell.

    Args:
        source: what the user gave.
        name: where it is from, for messages.

    Raises:
        DataError: it lacks something, or its labels, classes or first sample are not what the protocol says.
    """
    needed = ("labels", "classes", "num_classes", "stores", "warnings", "read", "name", "fingerprint", "__len__")
    # The class is asked first: to ask an object for a fingerprint computes it.
    if missing := [each for each in needed if not hasattr(type(source), each) and not hasattr(source, each)]:
        raise DataError(
            f"{name}: {_kind(source)} is no source, as it has no {', '.join(missing)}; derive it from "
            "kd_pipeline.BaseSource, or return one: BaseSource(paths, labels)"
        )
    if len(source) < 1:
        raise DataError(f"{name}: there are no samples; give at least one")
    if source.classes is not None and (
        not isinstance(source.classes, tuple) or source.num_classes != len(class_names(source.classes))
    ):
        raise DataError(
            f"{name}: classes is {source.classes!r:.60} and num_classes {source.num_classes}; give a tuple of names "
            "and its length"
        )
    if source.labels is not None:
        _check_indices(source.labels, source.num_classes, len(source), name)
    check_masks(masks_of(source), len(source), name)
    _check_first_sample(source, name)
    return source  # type: ignore[no-any-return]


def _check_indices(labels: object, num_classes: int | None, num_samples: int, name: str) -> None:
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (num_samples,):
        raise DataError(
            f"{name}: labels are {_kind(labels)}, and should be an int64 array [{num_samples}], one for each sample"
        )
    if num_classes is None:
        raise DataError(f"{name}: num_classes is None, and there are labels; set it to the largest label + 1")
    _check_range(labels, num_classes - 1, name)


def _check_range(labels: NDArray[np.int64], largest: int, name: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels > largest))
    if len(wrong):
        raise DataError(
            f"{name}: the label {labels[wrong[0]]} of sample {wrong[0]} is not a class index from 0 to {largest} "
            f"({len(wrong)} of {len(labels)} labels are not); correct it, or list all classes in `classes`"
        )


def _check_first_sample(source: "Source", name: str) -> None:
    if source.stores not in ("files", "bytes", "pixels"):
        raise DataError(f"{name}: stores is {source.stores!r}; set it to 'files', 'bytes' or 'pixels'")
    rows: object = source.read(np.zeros(1, dtype=np.int64))
    if source.stores == "bytes":
        if not isinstance(rows, list) or len(rows) != 1 or not _is_encoded(rows[0]):
            raise DataError(
                f"{name}: read() of one index returned {_kind(rows)}; it stores bytes, so return a list with an array "
                "of uint8 [L] for each sample, the encoded image"
            )
        return
    is_bytes = isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.size > 0 and len(rows) == 1
    if source.stores == "pixels":
        if not is_bytes or rows.ndim != 4 or rows.shape[3] != 3:  # type: ignore[attr-defined]
            raise DataError(
                f"{name}: read() of one index returned {_kind(rows)}; it stores pixels, so return a NumPy array of "
                "uint8 [n, H, W, 3]"
            )
        return
    if not is_bytes or rows.ndim != 2:  # type: ignore[attr-defined]
        raise DataError(
            f"{name}: read() of one index returned {_kind(rows)}; it stores files, so return uint8 [n, L], paths in "
            "bytes with zeros after them"
        )
    assert isinstance(rows, np.ndarray)
    path = os.fsdecode(rows[0].tobytes().rstrip(b"\0"))
    if not os.path.isabs(path):
        raise DataError(f"{name}: the path of sample 0 is relative: {path!r:.100}; return absolute paths")


def _is_encoded(sample: object) -> bool:
    is_array = isinstance(sample, np.ndarray) and sample.dtype == np.uint8 and sample.ndim == 1
    return is_array or isinstance(sample, UnreadableFileError)


def _path_table(samples: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None, name: str) -> PathTable:
    if isinstance(samples, str | bytes):
        raise DataError(f"{name}: samples is the text {samples!r:.60}; give a sequence of paths, or a number")
    try:
        files = [os.fspath(sample) for sample in samples]
    except TypeError as exc:
        raise DataError(f"{name}: a sample is no path ({exc}); give paths, or a number and define pixels()") from exc
    if root is None:
        relative = next((row for row, file in enumerate(files) if not os.path.isabs(file)), None)
        if relative is not None:
            raise DataError(
                f"{name}: the path of sample {relative} is relative: {files[relative]!r:.100}; give absolute paths, or "
                "the folder that they are relative to as root"
            )
        # The first and last in order have the fewest parts in common.
        root = os.path.commonpath([os.path.dirname(min(files)), os.path.dirname(max(files))])
    table = PathTable(os.path.abspath(user_path(root)))
    table.extend(files)
    return table


def _read_labels(
    labels: Any, classes: tuple[str, ...] | None, num_samples: int, name: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels as indices, and the names of the classes."""
    if labels is None:
        return None, classes
    given = np.asarray(labels)
    if given.shape != (num_samples,) or given.dtype.kind not in "iuU":
        raise DataError(
            f"{name}: labels are {_kind(given)}, and should be [{num_samples}] integers or class names, one for each "
            "sample; leave them out for unlabeled samples"
        )
    if given.dtype.kind != "U":
        found = given.astype(np.int64)
        _check_range(found, len(classes) - 1 if classes else _MAX_LABEL, name)
        return found, classes
    if classes is None:
        names, found = np.unique(given, return_inverse=True)
        return found.astype(np.int64).reshape(-1), class_names(names.tolist())
    known = {each: label for label, each in enumerate(classes)}
    unknown = next((row for row, each in enumerate(given.tolist()) if each not in known), None)
    if unknown is not None:
        label = str(given[unknown])
        raise DataError(f"{name}: the label {label!r:.60} of sample {unknown} is no class{suggest(label, classes)}")
    return np.array([known[each] for each in given.tolist()], dtype=np.int64), classes


def _kind(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype!s:.60} {list(value.shape)}"
    return f"an object of type {type(value).__name__}"
