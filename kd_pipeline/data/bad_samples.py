"""Samples that cannot be read: which ones, why, and which samples replace them."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.files import describe_special, open_own
from kd_pipeline._core.text import printable
from kd_pipeline.data.dali import FileChecker
from kd_pipeline.data.file_reading import read_sample
from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import Source, masks_of
from kd_pipeline.errors import BadSampleError, StateError, TooManyBadSamplesError

__all__ = ["BadSample", "BadSamples", "fraction_for"]

_logger = logging.getLogger("kd_pipeline")

_MOST_NAMED = 3
"""Samples that a run names in its log; all of them are in its file."""

_MAX_COUNTING_S = 10.0
"""How long the other samples are read to count the unreadable ones, when there are too many."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be read."""

    index: int
    """Index in the dataset."""
    path: str
    num_bytes: int | None
    """Size of the file; None if it does not exist."""
    reason: str


class BadSamples:
    """The unreadable samples found so far.

    Whether a sample is readable depends on its file alone, never on its view or batch, and its substitute depends on
    the dataset alone. A run that finds a bad file midway therefore continues like one that knew it from the start.
    """

    def __init__(
        self, source: Source, settings: LoaderSettings, checker: FileChecker, record: Path | None = None
    ) -> None:
        """`record` is a JSON lines file, which gets one line for each unreadable sample."""
        self._source, self._settings, self._checker, self._record = source, settings, checker, record
        self._masks = masks_of(source)
        self._bad = np.zeros(0, np.int64)
        """Indices of the samples that are substituted, in order."""
        self._following: dict[int, int] = {}
        """For each sample that is substituted, a later one; those between them are substituted too."""
        self._found: dict[int, BadSample] = {}
        """Those that were diagnosed here, including the one that was one too many."""

    @property
    def indices(self) -> list[int]:
        """Indices of the samples that are substituted, in order."""
        indices: list[int] = self._bad.tolist()
        return indices

    @property
    def samples(self) -> tuple[BadSample, ...]:
        """All that are known, by index; the reason of those that an earlier run found is not."""
        return tuple(
            self._found[index] if index in self._found else self._found_earlier(index)
            for index in sorted(self._following.keys() | self._found.keys())
        )

    def at(self, index: int) -> BadSample | None:
        """What is known about the sample at `index`; None if it is not known as unreadable."""
        if index in self._found or index not in self._following:
            return self._found.get(index)
        return self._found_earlier(index)

    def restore(self, indices: Iterable[int]) -> None:
        """Substitute exactly these samples, which an earlier run found, until more are found."""
        bad = np.unique(np.fromiter(indices, np.int64))
        self._bad = bad
        self._following = dict(zip(bad.tolist(), ((bad + 1) % len(self._source)).tolist(), strict=True))

    def substitute(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """`index` `[N]` with the unreadable samples replaced, and `[N]`, False where one was."""
        if not len(self._bad):
            return index, np.ones(len(index), np.bool_)
        bad = self._bad[np.searchsorted(self._bad[:-1], index)] == index
        if bad.any():
            index = index.copy()
            index[bad] = [self._shown_for(sample) for sample in index[bad].tolist()]
        return index, ~bad

    def examine(self, index: NDArray[np.int64]) -> bool:
        """Find out which of the samples at `index`, and of those in their place, cannot be read; False if all can.

        When this returns, all that `substitute` gives for `index` can be read.

        Raises:
            BadSampleError: a sample is unreadable, and `on_bad_sample` is `raise`.
            TooManyBadSamplesError: more are now unreadable than `max_bad_fraction` allows.
        """
        if self._source.stores == "pixels" and self._masks is None:
            return False
        before, readable = len(self._following), set()
        for sample in dict.fromkeys(index.tolist()):
            while (shown := self._shown_for(sample)) not in readable:
                content = None
                try:
                    content = self._content(shown)
                    self._require_readable(shown, content)
                    readable.add(shown)
                except RuntimeError as exc:
                    self._add(self._diagnose(shown, content, exc), exc)
        return len(self._following) > before

    def _content(self, index: int) -> NDArray[np.uint8]:
        """The encoded image of a sample, `[L]`, or its pixels, `[H, W, 3]`."""
        if self._source.stores == "pixels":
            pixels: NDArray[np.uint8] = self._source.read(np.array([index]))[0]
            return pixels
        return read_sample(self._source, index, max_bytes=self._checker.max_bytes)

    def _require_readable(self, index: int, content: NDArray[np.uint8]) -> None:
        """Decode an image with the content `content`, and its mask.

        Raises:
            RuntimeError: one of them cannot be read, or they do not fit.
        """
        height, width = content.shape[:2] if content.ndim == 3 else self._checker.decode(content).shape()[0][:2]
        if self._masks is not None:
            (mask,) = self._masks.read(np.array([index]), max_pixels=self._settings.max_pixels)
            if isinstance(mask, UnreadableFileError):
                raise mask
            self._masks.require_size(index, mask.shape, (height, width))

    def _add(self, sample: BadSample, failure: RuntimeError) -> None:
        error = BadSampleError(*astuple(sample))
        if self._settings.on_bad_sample == "raise":
            raise error from failure
        if sample.index not in self._found:
            self._found[sample.index] = sample
            self._write(sample)
            self._log(sample)
        num_bad, num_samples = len(self._following) + 1, len(self._source)
        # One is always allowed, or a single bad file would stop any dataset of less than a thousand.
        is_too_many = num_bad > 1 and num_bad / num_samples > self._settings.max_bad_fraction
        if is_too_many or num_bad == num_samples:
            allowed = self._settings.max_bad_fraction if is_too_many else None
            raise TooManyBadSamplesError(num_bad, num_samples, allowed, error, self._advice()) from failure
        self._bad = np.insert(self._bad, np.searchsorted(self._bad, sample.index), sample.index)
        self._following[sample.index] = (sample.index + 1) % num_samples

    def _advice(self) -> str:
        """What to do about too many unreadable samples; reads the other ones to count these, for a limited time."""
        num_samples = len(self._source)
        bad = self._following.keys() | self._found.keys()
        end, num_read = time.monotonic() + _MAX_COUNTING_S, len(bad)
        for index in range(num_samples):
            if time.monotonic() > end:
                break
            if index not in bad:
                num_read += 1
                try:
                    self._require_readable(index, self._content(index))
                except RuntimeError:
                    bad.add(index)
        if len(bad) == num_samples:
            return "repair them, as no readable sample is left to take their place"
        fraction = fraction_for(len(bad), num_samples)
        if num_read == num_samples:
            return f"repair or remove them, or set max_bad_fraction: {fraction} for all {len(bad)} that cannot be read"
        return (
            f"repair or remove them, or set max_bad_fraction: {fraction} for the {len(bad)} found among {num_read} "
            "that were read; kd-pipeline check reads all and counts them"
        )

    def _write(self, sample: BadSample) -> None:
        if self._record is None:
            return
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode, so the ranks of a run can share the file.
            with open_own(self._record, "ab") as file:
                file.write(json.dumps(asdict(sample)).encode() + b"\n")
        except OSError as exc:
            raise StateError(f"{self._record} cannot be written: {exc.strerror}") from exc

    def _log(self, sample: BadSample) -> None:
        if self._record is None or len(self._found) > _MOST_NAMED:
            return
        more = f"; further ones are named in {self._record} only" if len(self._found) == _MOST_NAMED else ""
        path, reason = printable(sample.path), printable(sample.reason)
        _logger.warning("%s cannot be read, and a readable image takes its place: %s%s", path, reason, more)

    def _shown_for(self, index: int) -> int:
        """The sample at `index` or, if it cannot be read, the next one that can in the dataset's order.

        In a folder that mostly has the same class. Every way that was walked is remembered as one step, so a walk over
        many unreadable samples is done once. Whatever is added to them meanwhile, a step never skips a readable one.
        """
        following, passed = self._following, []
        while (step := following.get(index)) is not None:
            passed.append(index)
            index = step
        for sample in passed:
            following[sample] = index
        return index

    def _found_earlier(self, index: int) -> BadSample:
        content = None
        if self._source.stores != "files":
            with suppress(UnreadableFileError):
                content = self._content(index)
        return BadSample(
            index, self._source.name(index), self._num_bytes(index, content), "an earlier run could not read it"
        )

    def _num_bytes(self, index: int, content: NDArray[np.uint8] | None) -> int | None:
        """Size of the sample's file, or of its bytes or pixels `content`; None if there are none."""
        if self._source.stores != "files":
            return None if content is None else content.nbytes
        try:
            return os.stat(self._source.name(index)).st_size
        except OSError:
            return None

    def _diagnose(self, index: int, content: NDArray[np.uint8] | None, failure: RuntimeError) -> BadSample:
        """What is wrong with a sample whose `content` `[L]`, if any was read, did not decode."""
        name = self._source.name(index)
        reason = _fault_of_file(name) if self._source.stores == "files" else None
        return BadSample(index, name, self._num_bytes(index, content), reason or self._reason(content, failure))

    def _reason(self, content: NDArray[np.uint8] | None, failure: RuntimeError) -> str:
        if content is None or isinstance(failure, UnreadableFileError):
            return str(failure)
        try:
            height, width = self._checker.size(content)
        except RuntimeError:
            start = content[:8].tobytes()
            return f"DALI does not know this kind of file, or its header is broken; it starts with {start!r}"
        if content[:2].tobytes() == b"\xff\xd8" and content[-2:].tobytes() != b"\xff\xd9":
            return f"the file is cut off: {width}x{height} JPEG without an end"
        return f"{width}x{height} image that does not decode: {_dali_reason(failure)}"


def fraction_for(num_bad: int, num_samples: int) -> str:
    """The smallest `max_bad_fraction` of three digits or so that allows `num_bad` of `num_samples`."""
    digits = 2 - math.floor(math.log10(num_bad / num_samples))
    thousandths = math.ceil(num_bad / num_samples * 10**digits)
    thousandths += thousandths / 10**digits < num_bad / num_samples
    return f"{thousandths / 10**digits:.{digits}f}".rstrip("0").rstrip(".")


def _fault_of_file(file: str) -> str | None:
    """What is wrong with a file before anything of it is read; None if nothing is."""
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return "the file does not exist"
    except OSError as exc:
        return f"it cannot be opened: {exc.strerror}"
    if special := describe_special(status.st_mode):
        return f"this is {special} and no file"
    if status.st_size == 0:
        return "the file is empty"
    return None if os.access(file, os.R_OK) else "no permission to read it"


def _dali_reason(failure: RuntimeError) -> str:
    """The reason in DALI's message, without the stack of the graph's definition."""
    _, _, reason = str(failure).partition("encountered:")
    lines = [line.strip() for line in (reason or str(failure)).splitlines() if line.strip()]
    return lines[0].rstrip(" :") if lines else "DALI gives no reason"
