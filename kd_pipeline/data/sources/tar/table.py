"""All samples of a list of tar shards as arrays, kept in the user's cache; only shards that changed are read again."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.atomic_write import locked
from kd_pipeline._core.progress import timed
from kd_pipeline._core.version import __version__
from kd_pipeline.data.sources.index_file import index_file, load_index_file, save_index_file
from kd_pipeline.data.sources.tar.index import Shard
from kd_pipeline.data.sources.tar.samples import Count, LabelRule, ShardSamples
from kd_pipeline.errors import DataError, shown
from kd_pipeline.storage import FileStat, Store, scheme_of, stat_all

__all__ = ["TarTable", "open_table"]

_FORMAT_VERSION = 2
"""To be raised whenever the reading of shards or the format of the table changes."""
_REMOTE_THREADS = 4
"""Remote shards that are read at once, each by several requests, and held in memory."""
_PARTS = ("shard_ends", "ends", "starts", "lengths", "codes", "used", "names")


@dataclass(frozen=True, slots=True)
class TarTable:
    """Where the N samples of S shards are; arrays may be views of a file."""

    shards: tuple[str, ...]
    """Absolute paths, or URLs with a digest in place of what may be a credential."""
    stats: tuple[FileStat, ...]
    """What the shards were when they were read."""
    rule: LabelRule
    """Where the labels are."""
    classes: tuple[str, ...] | None
    """Sorted names of the classes, if labels are names."""
    counts: dict[str, dict[str, Count]]
    """By shard and then by what it is: what was skipped or is odd."""
    shard_ends: NDArray[np.int64]
    """`[S + 1]`, 0 and the end of the samples of each shard."""
    ends: NDArray[np.int64]
    """`[N + 1]`, 0 and the end of the name of each image in `names`."""
    starts: NDArray[np.int64]
    """`[N]`, byte of its shard at which an image starts."""
    lengths: NDArray[np.int64]
    """`[N]`, bytes of an image."""
    codes: NDArray[np.int64] | None
    """`[N]` labels, class indices or places in `classes`; None without labels."""
    used: NDArray[np.int64]
    """The labels that occur, sorted."""
    names: memoryview | bytes
    """Names of the images in the shards, one after the other."""
    num_bytes: int
    """Of all images."""
    digest: str
    """Of names, lengths and labels, in any distribution over shards; kept, as the arrays may have gigabytes."""

    def __len__(self) -> int:
        return len(self.starts)

    def remarks(self) -> Iterator[str]:
        """What was skipped or is odd, a sentence each."""
        totals: dict[str, list[tuple[str, Count]]] = {}
        for shard, counts in self.counts.items():
            for what, count in counts.items():
                totals.setdefault(what, []).append((shard, count))
        for what, found in totals.items():
            shard, first = found[0]
            example = f"{shown(shard)}::{first.example}" if first.example else shown(shard)
            yield f"{sum(count.number for _, count in found)} {what}; such as {example}"

    def shard(self, number: int) -> ShardSamples:
        """The samples of one shard, with its own counts."""
        first, last = self.shard_ends[number : number + 2].tolist()
        start, end = self.ends[first].item(), self.ends[last].item()
        return ShardSamples(
            names=bytes(self.names[start:end]),
            ends=self.ends[first + 1 : last + 1] - start,
            starts=self.starts[first:last],
            lengths=self.lengths[first:last],
            codes=None if self.codes is None else self.codes[first:last],
            classes=self.classes,
            counts=self.counts.get(self.shards[number], {}),
        )


def open_table(
    shards: Sequence[str],
    store: Store,
    *,
    label: LabelRule | None,
    images: tuple[str, ...] | None,
    key: Sequence[str],
    write_index: bool,
) -> TarTable:
    """The samples of `shards`, from the cache as far as the shards are as they were.

    One process of a machine reads the shards, while others wait for what it finds.

    Args:
        shards: absolute paths or URLs.
        store: reads them.
        label: where the labels are; None to find out from the first shard.
        images: extensions of images; None for any.
        key: what the user calls these shards, under which they are cached.
        write_index: write indexes of DALI's beside the shards too.

    Raises:
        DataError: a shard is no tar archive, or labels or images are not what they should be.
        StorageError: a shard cannot be read.
    """
    stats, names = stat_all(store, shards), tuple(map(_name_of, shards))
    inputs = [__version__, _FORMAT_VERSION, sys.byteorder, list(key), label, images]
    digest = hashlib.sha256(json.dumps(inputs, default=os.fsdecode).encode()).hexdigest()
    with ExitStack() as stack:
        known = _load(digest)
        if known is None or not _is_of(known, names, stats):
            with suppress(OSError, RuntimeError):  # without a cache each process reads for itself
                stack.enter_context(locked(index_file(digest), lambda: None))
                known = _load(digest) or known
        if known is not None and _is_of(known, names, stats):
            return known
        opened = [Shard(path, store, stat) for path, stat in zip(shards, stats, strict=True)]
        num_threads = store.num_threads if scheme_of(shards[0]) is None else _REMOTE_THREADS
        table = _build(names, stats, opened, num_threads, known, label, images, write_index=write_index)
        _save(digest, table)
    return table


def _is_of(table: TarTable, shards: Sequence[str], stats: Sequence[FileStat]) -> bool:
    return table.shards == tuple(shards) and table.stats == tuple(stats)


def _name_of(shard: str) -> str:
    """What a shard is called in the cache, where no credential is written."""
    visible = shown(shard)
    return visible if visible == shard else f"{visible}#{hashlib.sha256(shard.encode()).hexdigest()}"


def _build(
    shards: tuple[str, ...],
    stats: Sequence[FileStat],
    opened: Sequence[Shard],
    num_threads: int,
    known: TarTable | None,
    label: LabelRule | None,
    images: tuple[str, ...] | None,
    *,
    write_index: bool,
) -> TarTable:
    place_of = (
        {} if known is None else {pair: at for at, pair in enumerate(zip(known.shards, known.stats, strict=True))}
    )
    is_first_known = known is not None and (shards[0], stats[0]) in place_of
    if label is None:
        label = known.rule if known is not None and is_first_known else _find_label_rule(opened)
    if known is None or known.rule != label:
        place_of = {}
    kept = {at: place_of[pair] for at, pair in enumerate(zip(shards, stats, strict=True)) if pair in place_of}
    new = [at for at in range(len(shards)) if at not in kept]

    def read(at: int) -> ShardSamples:
        return opened[at].samples(label, images, write_index=write_index)

    found: dict[int, ShardSamples] = {}
    with (
        timed(f"index of {len(new)} tar shard(s)") as report,
        ThreadPoolExecutor(min(num_threads, max(1, len(new))), "kd_pipeline-index") as threads,
    ):
        try:
            for at, samples in zip(new, threads.map(read, new), strict=True):
                found[at] = samples
                report(len(found), len(new))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    parts = [known.shard(kept[at]) if known and at in kept else found[at] for at in range(len(shards))]
    return _join(shards, tuple(stats), label, parts)


def _find_label_rule(shards: Sequence[Shard]) -> LabelRule:
    """Where the labels are in the first shard that has images."""
    found = (shard.find_label_rule() for shard in shards)
    return next((rule for rule in found if rule is not None), LabelRule())


def _join(shards: tuple[str, ...], stats: tuple[FileStat, ...], rule: LabelRule, parts: list[ShardSamples]) -> TarTable:
    codes, classes = _join_labels(shards, parts)
    num_names = np.cumsum([0, *(len(part.names) for part in parts)])
    moved = [part.ends + start for part, start in zip(parts, num_names, strict=False)]
    ends = np.concatenate([np.zeros(1, np.int64), *moved])
    lengths = np.concatenate([part.lengths for part in parts])
    names = b"".join(part.names for part in parts)
    return TarTable(
        shards=shards,
        stats=stats,
        rule=rule,
        classes=classes,
        counts={shard: part.counts for shard, part in zip(shards, parts, strict=True) if part.counts},
        shard_ends=np.cumsum([0, *map(len, parts)]).astype(np.int64),
        ends=ends,
        starts=np.concatenate([part.starts for part in parts]),
        lengths=lengths,
        codes=codes,
        used=np.zeros(0, np.int64) if codes is None else np.unique(codes),
        names=names,
        num_bytes=int(lengths.sum()),
        digest=_digest(ends, names, lengths, codes),
    )


def _digest(ends: NDArray[np.int64], names: bytes, lengths: NDArray[np.int64], codes: NDArray[np.int64] | None) -> str:
    digest = hashlib.sha256()
    for column in (ends, lengths, codes):
        digest.update(b"none" if column is None else column.astype("<i8", copy=False).data)
    digest.update(names)
    return digest.hexdigest()


def _join_labels(
    shards: tuple[str, ...], parts: list[ShardSamples]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels of all samples, and the sorted names that occur."""
    labeled = [(shard, part) for shard, part in zip(shards, parts, strict=True) if part.codes is not None and len(part)]
    if not labeled:
        return None, None
    (first, one), *others = labeled
    for shard, part in others:
        if (part.classes is None) is not (one.classes is None):
            kinds = [
                f"{shown(path)} are {'indices' if p.classes is None else 'names'}"
                for path, p in ((first, one), (shard, part))
            ]
            raise DataError(f"labels in {kinds[0]} and in {kinds[1]} of classes; all must be the same")
    columns = [part.codes for _, part in labeled if part.codes is not None]
    if one.classes is None:
        return np.concatenate(columns), None
    used = [
        {(part.classes or ())[code] for code in np.unique(column).tolist()}
        for (_, part), column in zip(labeled, columns, strict=True)
    ]
    names = tuple(sorted(set().union(*used)))
    place_of = {name: place for place, name in enumerate(names)}
    mapped = [
        np.array([place_of.get(name, -1) for name in part.classes or ()], dtype=np.int64)[column]
        for (_, part), column in zip(labeled, columns, strict=True)
    ]
    return np.concatenate(mapped), names


def _save(key: str, table: TarTable) -> None:
    header = {
        "shards": [[path, *stat] for path, stat in zip(table.shards, table.stats, strict=True)],
        "rule": [os.fsdecode(table.rule.extension), table.rule.key, table.rule.is_folder],
        "classes": table.classes,
        "is_labeled": table.codes is not None,
        "num_bytes": table.num_bytes,
        "digest": table.digest,
        "counts": {
            shard: {what: [count.number, count.example] for what, count in counts.items()}
            for shard, counts in table.counts.items()
        },
    }
    parts = {name: b"" if (part := getattr(table, name)) is None else memoryview(part).cast("B") for name in _PARTS}
    save_index_file(key, header, parts, is_hashed=False)


def _load(key: str) -> TarTable | None:
    """The table cached under `key`, mapped and not read: a checksum covers its header alone."""
    return load_index_file(key, _PARTS, _parse, what="tar shards are indexed again", is_hashed=False)


def _parse(header: dict[str, Any], parts: list[memoryview]) -> TarTable:
    """Raises: ValueError, KeyError, TypeError: it is damaged."""
    shard_ends, ends, starts, lengths, codes, used = (np.frombuffer(part, np.int64) for part in parts[:-1])
    extension, rule_key, is_folder = header["rule"]
    table = TarTable(
        shards=tuple(path for path, _, _ in header["shards"]),
        stats=tuple(FileStat(num_bytes, version) for _, num_bytes, version in header["shards"]),
        rule=LabelRule(os.fsencode(extension), rule_key, is_folder),
        classes=None if header["classes"] is None else tuple(header["classes"]),
        counts={
            shard: {what: Count(*count) for what, count in counts.items()} for shard, counts in header["counts"].items()
        },
        shard_ends=shard_ends,
        ends=ends,
        starts=starts,
        lengths=lengths,
        codes=codes if header["is_labeled"] else None,
        used=used,
        names=parts[-1],
        num_bytes=int(header["num_bytes"]),
        digest=str(header["digest"]),
    )
    num = len(starts)
    if not (
        len(shard_ends) == len(table.shards) + 1 == len(table.stats) + 1
        and len(ends) == num + 1
        and len(lengths) == num
        and (table.codes is None or len(codes) == num)
        and shard_ends[0] == ends[0] == 0
        and (np.diff(shard_ends) >= 0).all()
        and shard_ends[-1] == num
        and ends[-1] == len(table.names)
    ):
        raise ValueError("the parts do not fit together")
    return table
