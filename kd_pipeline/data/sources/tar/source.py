"""Images in tar shards, read in place: WebDataset's layout, and tar archives of class folders."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise, repeat
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.containers import user_location
from kd_pipeline.data.sources.encoded import Encoded
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS
from kd_pipeline.data.sources.fingerprint import sampling_step
from kd_pipeline.data.sources.labels import Classes, class_names, name_warnings, shown_samples, used_label_warnings
from kd_pipeline.data.sources.masks.masks import Masks, fingerprint_with
from kd_pipeline.data.sources.masks.settings import TarMasks
from kd_pipeline.data.sources.tar.members import BLOCK, is_header_of
from kd_pipeline.data.sources.tar.samples import label_rule
from kd_pipeline.data.sources.tar.shard_list import find_shards
from kd_pipeline.data.sources.tar.table import TarTable, open_table
from kd_pipeline.errors import DataError, StorageError, shown
from kd_pipeline.storage import ByteRange, Store, StoreSettings, open_store, read_ranges, scheme_of

__all__ = ["Tar"]

_logger = logging.getLogger("kd_pipeline")

_MAX_IMAGE_BYTES = 2**30
"""Of one image; what is larger is no image that anybody decodes."""
_GAP, _RUN = 2**13, 2**20
"""Bytes between two images that are read along, as of a label, and bytes that are read at once."""
_REMOTE_GAP, _REMOTE_RUN = 2**18, 2**23
"""The same for URLs, where a request takes as long as to transfer a megabyte or two."""
_BLOCK = 64
"""Images that are read at once for a fingerprint."""


class Tar:
    """The images in tar archives, in the order of the archives and of the files in each.

    As in WebDataset, a sample is files in a row whose names are the same up to the first dot of the file name:
    `n01.jpg` and `n01.cls`. Those without an image or a label are skipped with a warning.

    Where the images are is found out once and kept in `~/.cache/kd_pipeline/index`; later only shards that are new or
    have changed are looked through. Index files of DALI (`wds2idx`) beside the shards are used if they are right.

    Args:
        path: a shard, a glob, a range such as `train-{0000..0146}.tar`, WebDataset's list of shards in JSON, or several
            of these; local paths or URLs.
        image: extension or extensions of images, of which the first is taken that a sample has; defaults to all that
            are known, if no sample has several.
        label: where the labels are: `cls`, `txt` or another extension for the text in that file, `json:KEY` for a key
            of the object in it, `folder` for the name of the image's folder, or `none`. `auto` is `cls` if there are
            such files, `none` if there is nothing that might be a label, and else an error with the choices. Whole
            numbers are class indices and other texts are class names; folders are names.
        classes: names in label order, or a file with them; defaults to the sorted names, if labels are names.
        masks: which extension the masks have, each with the name of its image; labels are not read then, and `classes`
            are those of the pixels.
        index: `cache`, or `beside` to also write DALI's index files beside the shards.
        storage: how URLs are read.

    Raises:
        DataError: a shard is no tar archive or is damaged, no sample has an image and a label, a sample has several
            images, a label is none, or an image has no mask; names the shard and the file in it.
        StorageError: a shard is not there or cannot be read.
    """

    stores: Literal["files", "bytes", "pixels"] = "bytes"

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        image: str | Sequence[str] | None = None,
        label: str = "auto",
        classes: Classes | None = None,
        masks: TarMasks | None = None,
        index: Literal["cache", "beside"] = "cache",
        storage: StoreSettings | None = None,
    ) -> None:
        patterns = _patterns(path)
        self._store: Store = open_store(patterns[0], storage)
        shards = find_shards(patterns, self._store)
        self._shards = shards.paths
        images = (image,) if isinstance(image, str) else None if image is None else tuple(image)
        self._table = open_table(
            self._shards,
            self._store,
            label=label_rule(label if masks is None else "none"),
            images=images if masks is None else images or _images_beside(masks.extension),
            key=patterns,
            write_index=index == "beside",
        )
        self._where = shown(patterns[0]) + (f" and {len(patterns) - 1} more" if len(patterns) > 1 else "")
        self._num_bytes = np.array([stat.num_bytes for stat in self._table.stats], dtype=np.int64)
        is_remote = scheme_of(patterns[0]) is not None
        self._gap, self._run = (_REMOTE_GAP, _REMOTE_RUN) if is_remote else (_GAP, _RUN)
        if not len(self._table):
            raise DataError(f"{self._where}: {self._why_empty()}")
        names = None if classes is None else class_names(classes)
        self.labels, self.classes = _labels(self._table, names, self._where)
        used = self._table.used
        self.num_classes = len(self.classes) if self.classes is not None else int(used[-1]) + 1 if len(used) else None
        self.masks: Masks | None = None
        if masks is not None:
            own = _MaskTar(path, image=masks.extension, label="none", storage=storage)
            order = _order_of(self._table, own._table, self._where, masks.extension)
            self.masks = Masks(own, masks, classes=self.classes, order=order)
            self.num_classes = self.masks.num_classes
        found = [*self._table.remarks(), *shards.remarks(np.diff(self._table.shard_ends))]
        if self.labels is not None and self._table.classes is None:
            found += used_label_warnings(used, len(self), self.classes, is_given=names is not None)
        elif self.labels is not None and names is None:
            found += used_label_warnings(used, len(self), self.classes, is_given=False)
            found += name_warnings(self._table.classes or ())
        elif missing := sorted(set(names or ()) - set(self._table.classes or ())) if self.labels is not None else []:
            found.append(f"no samples for {len(missing)} of the {len(names or ())} classes: {first_few(missing)}")
        self.warnings = self._warn(tuple(printable(f"{self._where}: {warning}") for warning in found))

    def _why_empty(self) -> str:
        remarks = "; ".join(self._table.remarks())
        if not remarks:
            return "there are no files in the shard(s)"
        return (
            f"no sample has all it needs: {remarks}. The files of a sample must follow each other; if they do not, "
            "make the archive again with tar --sort=name"
        )

    def _warn(self, warnings: tuple[str, ...]) -> tuple[str, ...]:
        for warning in warnings:
            _logger.warning("%s", warning)
        return warnings

    def __len__(self) -> int:
        return len(self._table)

    @property
    def shard_ends(self) -> NDArray[np.int64]:
        """`[S + 1]`, 0 and the end of each shard's samples."""
        return self._table.shard_ends

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """The images at `indices` `[n]`, as `Source.read` says; those that are near each other in one read."""
        table = self._table
        shard = self._shard_of(indices)
        start, length = table.starts[indices], table.lengths[indices]
        images: Encoded = [np.zeros(0, np.uint8)] * len(indices)
        is_whole = (start + length <= self._num_bytes[shard]) & (length <= _MAX_IMAGE_BYTES)
        for row in np.flatnonzero(~is_whole).tolist():
            images[row] = UnreadableFileError(self._why_unreadable(int(shard[row]), int(start[row]), int(length[row])))
        rows = np.lexsort((start, shard))
        rows = rows[is_whole[rows]]
        runs = _runs(shard[rows], start[rows] - BLOCK, start[rows] + length[rows], self._gap, self._run)
        ranges = [ByteRange(self._shards[at], first, end - first, table.stats[at]) for at, first, end, _ in runs]
        numbers = iter(zip(rows.tolist(), start[rows].tolist(), length[rows].tolist(), strict=True))
        for (at, first, _, count), content in zip(runs, read_ranges(self._store, ranges), strict=True):
            for row, place, num_bytes in (next(numbers) for _ in repeat(None, count)):
                if isinstance(content, StorageError):
                    raise type(content)(content.path, content.reason, key=self._key(indices[row]), offset=place)
                head = place - first
                if not is_header_of(content[head - BLOCK : head], num_bytes):
                    raise StorageError(self._shards[at], _LIES, key=self._key(indices[row]), offset=place)
                if num_bytes:
                    images[row] = np.frombuffer(content, np.uint8, num_bytes, head)
        return images

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Let the store fetch the shards of `indices` `[n]`, in the order in which they come."""
        shard, first = np.unique(self._shard_of(indices), return_index=True)
        self._store.prefetch([self._shards[at] for at in shard[np.argsort(first)].tolist()])

    def name(self, index: int) -> str:
        """The shard and the image in it, such as `train-0001.tar::n01.jpg`."""
        (shard,) = self._shard_of(np.array([index])).tolist()
        return f"{os.path.basename(shown(self._shards[shard]))}::{self._key(index)}"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, class names, names and sizes of all images, and of evenly sampled ones.

        It does not depend on where the shards are, nor on which shard a sample is in. See `Source.fingerprint`.
        """
        table = self._table
        # Which label a code in the table stands for is known from both lists of classes.
        digest = hashlib.sha256(json.dumps(["tar 1", self.classes, table.classes, table.digest]).encode())
        sampled = np.arange(0, len(self), sampling_step(table.num_bytes))
        for first in range(0, len(sampled), _BLOCK):
            for image in self.read(sampled[first : first + _BLOCK]):
                digest.update(b"unreadable" if isinstance(image, UnreadableFileError) else image.data)
        return fingerprint_with(digest.hexdigest(), self.masks)

    def __repr__(self) -> str:
        return f"Tar({shown_samples('images', self)})"

    def _shard_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._table.shard_ends, indices, side="right") - 1

    def _key(self, index: int) -> str:
        """The name of an image in its shard, safe to print."""
        start, end = self._table.ends[index : index + 2].tolist()
        return printable(os.fsdecode(bytes(self._table.names[start:end])))

    def _why_unreadable(self, shard: int, start: int, num_bytes: int) -> str:
        left = self._table.stats[shard].num_bytes - start
        if num_bytes <= left:
            return f"it has {num_bytes} bytes in the archive, more than any image"
        return f"the archive is cut off: {num_bytes} bytes should be at byte {start}, and {max(left, 0)} are left"


class _MaskTar(Tar):
    """The masks in shards; what is odd about these is said about the images."""

    def _warn(self, warnings: tuple[str, ...]) -> tuple[str, ...]:
        return ()

    def _why_empty(self) -> str:
        return "no sample has a mask, a file of the extension that masks have; set masks.extension to theirs"


_LIES = (
    "by the index of the shard the image is here, and it is not; delete the index file beside the shard, if there is "
    "one, and ~/.cache/kd_pipeline/index, and start again"
)


def _images_beside(mask: str) -> tuple[str, ...]:
    """The extensions of images but for that of masks."""
    return tuple(ending[1:] for ending in EXTENSIONS if ending[1:] != mask.lstrip(".").lower())


def _order_of(images: TarTable, masks: TarTable, where: str, extension: str) -> NDArray[np.int64]:
    """The position of the mask of each image, `[N]`."""
    place_of = {key: place for place, key in enumerate(_keys_of(masks))}
    order = np.fromiter((place_of.get(key, -1) for key in _keys_of(images)), np.int64, len(images))
    (missing,) = (order < 0).nonzero()
    if len(missing):
        keys = [key for at, key in enumerate(_keys_of(images)) if order[at] < 0]
        names = [printable(os.fsdecode(key)) for _, key, _ in keys]
        raise DataError(
            f"{where}: no masks (.{extension.lstrip('.')}) for {len(missing)} of {len(images)} images: "
            f"{first_few(names)}; add them, or leave out the images"
        )
    return order


def _keys_of(table: TarTable) -> Iterator[tuple[int, bytes, int]]:
    """The shard of each sample, its name up to the first dot, and how often this was there before."""
    for shard, (first, last) in enumerate(pairwise(table.shard_ends.tolist())):
        seen: Counter[bytes] = Counter()
        for start, end in pairwise(table.ends[first : last + 1].tolist()):
            name = bytes(table.names[start:end])
            key = name[: name.index(b".", name.rfind(b"/") + 1)]
            yield shard, key, seen[key]
            seen[key] += 1


def _patterns(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """What the user wrote, local paths from / on."""
    given = [path] if isinstance(path, str | os.PathLike) else path
    patterns = [each if scheme_of(each) else os.path.abspath(each) for each in map(str, map(user_location, given))]
    if not patterns:
        raise DataError("path is an empty list; name a shard, or a pattern such as train-{0000..0146}.tar")
    if len({scheme_of(each) for each in patterns}) > 1:
        raise DataError(f"{first_few(list(map(shown, patterns)))}: all shards must be in the same kind of place")
    return patterns


def _runs(
    shard: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64], gap: int, longest: int
) -> list[tuple[int, int, int, int]]:
    """What to read at once: shard, start, end and number of images, of images `[n]` sorted by shard and start."""
    runs: list[tuple[int, int, int, int]] = []
    at, first, last, count = -1, 0, 0, 0
    for own, own_first, own_last in zip(shard.tolist(), start.tolist(), end.tolist(), strict=True):
        if count and own == at and own_first <= last + gap and own_last - first <= longest:
            last, count = max(last, own_last), count + 1
            continue
        if count:
            runs.append((at, first, last, count))
        at, first, last, count = own, own_first, own_last, 1
    return [*runs, (at, first, last, count)] if count else runs


def _labels(
    table: TarTable, names: tuple[str, ...] | None, where: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels `[N]` and names of classes."""
    if table.codes is None or names is None or table.classes == names:
        return table.codes, table.classes if names is None else names
    if table.classes is None:
        if table.used[-1] >= len(names):
            raise DataError(
                f"{where}: the label {table.used[-1]} is not a class index from 0 to {len(names) - 1}, as there are "
                f"{len(names)} classes; correct it, or list all classes in `classes`"
            )
        return table.codes, names
    label_of = {name: label for label, name in enumerate(names)}
    if unknown := [name for name in table.classes if name not in label_of]:
        raise DataError(
            f"{where}: label(s) that are not among the {len(names)} classes: {first_few(unknown)}; add them to "
            f"`classes`, or leave their samples out{suggest(unknown[0], names)}"
        )
    return np.array([label_of[name] for name in table.classes], dtype=np.int64)[table.codes], names
