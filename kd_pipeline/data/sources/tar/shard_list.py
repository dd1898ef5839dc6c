"""The shards that a user means: patterns, and WebDataset's lists of shards in JSON."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.text import printable
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import Store, expand, scheme_of

__all__ = ["ShardList", "find_shards"]

_MAX_BYTES = 2**26
"""Of a list of shards."""


class ShardList(NamedTuple):
    """Shards, and how many samples a list says that they have."""

    paths: list[str]
    """Local paths from / on, or URLs."""
    counts: dict[str, int]
    """Numbers of samples by path, of those that are in a list."""

    def remarks(self, found: NDArray[np.int64]) -> Iterator[str]:
        """A warning if shards have other numbers of samples than a list says, `found` being `[S]`."""
        wrong = [
            (path, self.counts[path], num)
            for path, num in zip(self.paths, found.tolist(), strict=True)
            if self.counts.get(path, num) != num
        ]
        if wrong:
            path, listed, num = wrong[0]
            yield (
                f"{len(wrong)} shard(s) do not have as many samples as the list of shards says; such as {shown(path)}: "
                f"{listed} by the list, and {num} found"
            )


def find_shards(patterns: Sequence[str], store: Store) -> ShardList:
    """The shards of `patterns`, of which those that end in `.json` are lists of shards.

    Raises:
        DataError: nothing matches, or a list is none.
        StorageError: the store cannot read or list files.
    """
    paths: list[str] = []
    counts: dict[str, int] = {}
    for pattern in patterns:
        if scheme_of(pattern) is None and os.path.isdir(pattern):
            raise DataError(f"{pattern} is a folder; for the shards in it set path: {os.path.join(pattern, '*.tar')}")
        if pattern.partition("?")[0].lower().endswith(".json"):
            listed = _read_list(pattern, store)
            counts |= {path: count for path, count in listed.items() if count is not None}
            paths += listed
        else:
            paths.append(pattern)
    return ShardList(expand(paths, store), counts)


def _read_list(path: str, store: Store) -> dict[str, int | None]:
    """Paths of shards, and the numbers of their samples, in a list of WebDataset's: `sizes.json`, or that of `wids`."""
    stat = store.stat(path)
    if stat.num_bytes > _MAX_BYTES:
        raise DataError(f"{shown(path)}: a list of shards of {stat.num_bytes} bytes; at most {_MAX_BYTES} are read")
    try:
        content = json.loads(store.read(path, 0, stat.num_bytes))
        if isinstance(content, dict) and "shardlist" in content:
            entries = [(entry["url"], entry.get("nsamples")) for entry in content["shardlist"]]
        else:
            entries = list(content.items())
        folder = path.rpartition("/")[0]
        found: dict[str, int | None] = {}
        for name, count in entries:
            if not (isinstance(name, str) and name and isinstance(count, int | None)):
                raise TypeError(f"{name!r:.60}: {count!r:.30} is no name of a shard and number of samples")
            shard = name if scheme_of(name) or name.startswith("/") else f"{folder}/{name}"
            if scheme_of(shard) != scheme_of(path):
                raise ValueError(f"{printable(shown(shard)):.60} is in a different kind of place")
            found[shard] = count
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise DataError(
            f'{shown(path)}: this is no list of shards such as {{"train-0000.tar": 1000}} ({printable(exc):.100}); '
            "name the shards themselves, as in train-{0000..0146}.tar"
        ) from None
    if not found:
        raise DataError(f"{shown(path)}: the list of shards is empty")
    return found
