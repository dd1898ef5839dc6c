"""Which samples cannot be read, why, and which ones stand in for them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.dali import Probe
from kd_pipeline.data.sources.base import Source
from kd_pipeline.errors import BadSampleError, TooManyBadSamplesError

__all__ = ["BadSamplePolicy", "BadSamples"]


class BadSamplePolicy(Settings):
    """What happens when a sample cannot be read."""

    on_bad_sample: Literal["raise", "substitute"] = "raise"
    """Stop with the file's name, or put the next readable sample in its place with `valid=False`."""
    max_bad_fraction: float = 0.001
    """More unreadable samples than this part of the dataset are an error even when substituting."""
    max_pixels: int = 89_478_485
    """Larger images count as unreadable and are never decoded; Pillow's limit for decompression bombs."""
    record: Path | None = None
    """JSON lines file that gets one line for each unreadable sample; none where left out."""


class BadSamples:
    """The unreadable samples met so far.

    Whether a sample is readable depends on its file alone, never on its view or batch, and its stand-in on the
    dataset alone. So a run that meets a bad file midway goes on exactly like one that knew it from the start.
    """

    def __init__(self, source: Source, policy: BadSamplePolicy, probe: Probe) -> None:
        self._source = source
        self._policy = policy
        self._probe = probe
        self._bad: set[int] = set()
        self._recorded: set[int] = set()

    @property
    def known(self) -> list[int]:
        """Positions of the unreadable samples, in order."""
        return sorted(self._bad)

    def learn(self, known: Iterable[int]) -> None:
        """Take over the unreadable samples that an earlier run met."""
        self._bad = set(known)

    def replace(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """`index` `[N]` with stand-ins for the unreadable samples, and `[N]` False where one stands in."""
        bad = _members(index, self._bad)
        if bad.any():
            index = index.copy()
            index[bad] = [self._stand_in(int(position)) for position in index[bad]]
        return index, ~bad

    def examine(self, index: NDArray[np.int64]) -> bool:
        """Find out which of the samples at `index` made DALI fail; False if it was none of them.

        Raises:
            BadSampleError: there is one, and the policy is to raise.
            TooManyBadSamplesError: there are now more than the policy allows.
        """
        if self._source.stores == "pixels":
            return False
        before = len(self._bad)
        for position in dict.fromkeys(index.tolist()):
            (path,) = self._source.read(np.array([position]))
            try:
                self._probe.decode(path)
            except RuntimeError as exc:
                self._add(position, path, exc)
        return len(self._bad) > before

    def _add(self, position: int, path: NDArray[np.uint8], failure: RuntimeError) -> None:
        name = self._source.name(position)
        num_bytes, reason = self._diagnose(name, path, failure)
        error = BadSampleError(position, name, num_bytes, reason)
        if self._policy.on_bad_sample == "raise":
            raise error from failure
        self._record({"index": position, "path": name, "num_bytes": num_bytes, "reason": reason})
        num_bad, num_samples = len(self._bad) + 1, len(self._source)
        if num_bad / num_samples > self._policy.max_bad_fraction or num_bad == num_samples:
            raise TooManyBadSamplesError(
                f"{num_bad} of {num_samples} samples cannot be read, which is more than "
                f"max_bad_fraction={self._policy.max_bad_fraction:g} allows; the last one: {error}"
            ) from failure
        self._bad.add(position)

    def _record(self, line: dict[str, Any]) -> None:
        if self._policy.record is None or line["index"] in self._recorded:
            return
        self._recorded.add(line["index"])
        self._policy.record.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, so that the ranks of a run can share the file.
        with self._policy.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _stand_in(self, position: int) -> int:
        """The next readable sample in the dataset's order, which in a folder mostly has the same class."""
        num_samples = len(self._source)
        return next(
            candidate
            for candidate in ((position + step) % num_samples for step in range(1, num_samples))
            if candidate not in self._bad
        )

    def _diagnose(self, name: str, path: NDArray[np.uint8], failure: RuntimeError) -> tuple[int | None, str]:
        """Size of the file in bytes, and why it cannot be read."""
        file = Path(name)
        if not file.exists():
            return None, "the file does not exist"
        num_bytes = file.stat().st_size
        if file.is_dir():
            return num_bytes, "this is a directory"
        if num_bytes == 0:
            return num_bytes, "the file is empty"
        if not os.access(file, os.R_OK):
            return num_bytes, "no permission to read it"
        try:
            height, width = self._probe.size(path)
        except RuntimeError:
            return (
                num_bytes,
                f"DALI does not know this kind of file, or its header is broken; it starts with {_start(file, 8)!r}",
            )
        if height * width > self._policy.max_pixels:
            return (
                num_bytes,
                f"its header claims {width}x{height} pixels, more than max_pixels={self._policy.max_pixels}",
            )
        if _start(file, 2) == b"\xff\xd8" and not _ends_like_jpeg(file):
            return num_bytes, f"the file is cut off: {width}x{height} JPEG without an end"
        return num_bytes, f"{width}x{height} image that does not decode: {_last_words(failure)}"


def _members(index: NDArray[np.int64], members: set[int]) -> NDArray[np.bool_]:
    if not members:
        return np.zeros(len(index), dtype=np.bool_)
    return np.isin(index, np.fromiter(members, dtype=np.int64))


def _ends_like_jpeg(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-2, os.SEEK_END)
        return stream.read() == b"\xff\xd9"


def _start(file: Path, num_bytes: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(num_bytes)


def _last_words(failure: RuntimeError) -> str:
    """What DALI says it encountered, without the stack of the graph's definition."""
    _, _, words = str(failure).partition("encountered:")
    lines = [line.strip() for line in (words or str(failure)).splitlines() if line.strip()]
    return lines[0].rstrip(" :") if lines else "DALI gives no reason"
