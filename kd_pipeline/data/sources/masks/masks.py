"""The masks of a source: the class of each pixel of each of its images."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.files import read_regular
from kd_pipeline.data.headers import UnreadableFileError, max_file_bytes
from kd_pipeline.data.sources.masks.decode import decode_mask
from kd_pipeline.data.sources.masks.settings import MaskSettings
from kd_pipeline.data.sources.masks.values import MaskValues
from kd_pipeline.errors import DataError
from kd_pipeline.storage import call_each

__all__ = ["Masks", "check_masks", "fingerprint_with", "masks_of"]

_MAX_PIXELS = 89_478_485
"""As in `LoaderSettings`."""
_MAX_THREADS = 8


class MaskSamples(Protocol):
    """What holds N masks: a `Source` of files or of bytes, or one whose pixels are integers `[n, H, W]`."""

    def __len__(self) -> int: ...

    @property
    def stores(self) -> Literal["files", "bytes", "pixels"]: ...

    def read(self, indices: NDArray[np.int64]) -> Any: ...

    def name(self, index: int) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class Masks:
    """The masks of N images, in their order, read by position.

    Args:
        samples: where they are: such as a `BaseSource` of the paths of PNG or `.npy` files.
        settings: what their values stand for.
        classes: names of the classes, if there are any.
        order: `[N]`, positions in `samples`; None for its own order.
        name: where they are, for messages; defaults to the name of the first one.

    Raises:
        DataError: the number of classes is not known, or a class is not among them.
    """

    def __init__(
        self,
        samples: MaskSamples,
        settings: MaskSettings,
        *,
        classes: Sequence[str] | None = None,
        order: NDArray[np.int64] | None = None,
        name: str = "",
    ) -> None:
        self._samples, self._order = samples, order
        self._values = MaskValues(settings, classes, name or samples.name(0))
        self.num_classes, self.ignore_index = self._values.num_classes, self._values.ignore_index
        self.dtype = self._values.dtype
        """Of what `read` returns: uint8 if it holds all classes and the ignore index, else int16."""

    def __len__(self) -> int:
        return len(self._samples) if self._order is None else len(self._order)

    def read(
        self, index: NDArray[np.int64], *, max_pixels: int = _MAX_PIXELS
    ) -> list[NDArray[Any] | UnreadableFileError]:
        """The masks at `index` `[n]`, each `[H, W]` of `dtype`: classes, or the ignore index.

        A mask that cannot be read has an error in its place, which names it and says why. Threads decode them.

        Args:
            index: positions from 0 to N - 1.
            max_pixels: larger masks count as unreadable.

        Raises:
            StorageError: a store did not give a file, so the mask is not to blame.
        """
        places = self._places(index)
        found = zip(places.tolist(), self._samples.read(places), strict=True)
        return call_each(partial(self._load, max_pixels), list(found), min(num_cores(), _MAX_THREADS))

    def require_size(self, index: int, own: Iterable[float], size: Iterable[float]) -> None:
        """Check that the mask at `index`, of height and width `own`, has the `size` of its image.

        Raises:
            UnreadableFileError: it has another; names the mask.
        """
        (height, width), (own_height, own_width) = map(int, size), map(int, own)
        if (own_height, own_width) != (height, width):
            raise UnreadableFileError(
                f"its mask {self.name(index)} has {own_width}x{own_height} pixels, and the image {width}x{height}; "
                "save both in one size, the mask upright if the image's EXIF turns it"
            )

    def expect(self, index: NDArray[np.int64]) -> None:
        """Let what stores the masks fetch those at `index` `[n]`, in this order."""
        expect = getattr(self._samples, "expect", None)
        if expect is not None:
            expect(self._places(index))

    def subset(self, index: NDArray[np.int64]) -> Self:
        """The masks at `index` `[n]` alone, in this order."""
        chosen = copy(self)
        chosen._order = self._places(index)
        return chosen

    def name(self, index: int) -> str:
        """The mask's name in messages: its path, or such as `masks.npy[17]`."""
        return self._samples.name(index if self._order is None else int(self._order[index]))

    @property
    def fingerprint(self) -> str:
        """Hex digest of the masks and of what their values stand for."""
        digest = hashlib.sha256(self._values.digest())
        digest.update(self._samples.fingerprint.encode())
        digest.update(b"" if self._order is None else self._order.astype("<i8").data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Masks({len(self)} masks, {self.num_classes} classes)"

    def _places(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return index if self._order is None else self._order[index]

    def _load(
        self, max_pixels: int, sample: tuple[int, NDArray[Any] | UnreadableFileError]
    ) -> NDArray[Any] | UnreadableFileError:
        place, content = sample
        try:
            return self._values.classes_of(self._decoded(content, max_pixels))
        except UnreadableFileError as exc:
            return UnreadableFileError(f"its mask {self._samples.name(place)}: {exc}")

    def _decoded(self, content: NDArray[Any] | UnreadableFileError, max_pixels: int) -> NDArray[Any]:
        """The values in a mask as the source of masks gives it."""
        if isinstance(content, UnreadableFileError):
            raise content
        max_bytes = max_file_bytes(max_pixels)
        match self._samples.stores:
            case "pixels":
                return content
            case "files":
                path = os.fsdecode(content.tobytes().rstrip(b"\0"))
                try:
                    content = np.frombuffer(read_regular(path, max_bytes=max_bytes), np.uint8)
                except OSError as exc:
                    raise UnreadableFileError(f"it cannot be read: {exc.strerror}") from exc
        if len(content) > max_bytes:
            raise UnreadableFileError(f"it has more than {max_bytes} bytes, which no mask of max_pixels has")
        return decode_mask(content, max_pixels=max_pixels)


def masks_of(source: object) -> Masks | None:
    """The masks of a source; None if it has none, or is one of the user's own that does not know of masks."""
    masks: Masks | None = getattr(source, "masks", None)
    return masks


def check_masks(masks: object, num_samples: int, name: str) -> None:
    """Check what a source of the user's own has as `masks`.

    Raises:
        DataError: it is something else, or there are not as many as samples.
    """
    if masks is None:
        return
    if not isinstance(masks, Masks):
        raise DataError(
            f"{name}: masks is an object of type {type(masks).__name__}; give None, or kd_pipeline.data.sources.Masks "
            "of a source of their files: Masks(BaseSource(paths), MaskSettings(num_classes=19))"
        )
    if len(masks) != num_samples:
        raise DataError(f"{name}: there are {len(masks)} masks for {num_samples} samples; give one for each")


def fingerprint_with(own: str, masks: Masks | None) -> str:
    """The fingerprint of a source whose images and classes have the fingerprint `own`."""
    return own if masks is None else hashlib.sha256(json.dumps([own, masks.fingerprint]).encode()).hexdigest()
