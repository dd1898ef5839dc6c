"""Samples of a tar shard as in WebDataset: files in a row whose names are the same up to the first dot."""

import json
import os
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import printable
from kd_pipeline.data.sources.files.folder_scan import EXTENSIONS
from kd_pipeline.data.sources.labels import MAX_NAME
from kd_pipeline.data.sources.tar.members import Member, TarError

__all__ = ["Count", "LabelRule", "ShardSamples", "collect_samples", "find_label_rule", "folder_of", "label_rule"]

Content = Callable[[Member], bytes | None]
"""All bytes of a file in the shard; None if it is cut off."""

_IMAGE_ENDINGS = frozenset(extension[1:].encode() for extension in EXTENSIONS)
_NUM_LOOKED_AT = 200
"""Files that say where the labels are."""
_MAX_LABEL_BYTES, _MAX_JSON_BYTES = 4096, 2**22
_MAX_REMEMBERED = 100_000
"""Contents of label files whose label is remembered."""
_INTEGER = re.compile(r"[-+]?[0-9]{1,20}")
_FRACTION = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class LabelRule(NamedTuple):
    """Where the label of a sample is."""

    extension: bytes = b""
    """Of the file with it; empty for none, or for the folder."""
    key: str | None = None
    """In the object of JSON that the file holds; None if the file is the label."""
    is_folder: bool = False
    """The name of the folder that the image is in."""

    @property
    def is_file(self) -> bool:
        """Whether a file of each sample has the label."""
        return bool(self.extension)

    def __str__(self) -> str:
        if self.is_folder or not self.extension:
            return "folder" if self.is_folder else "none"
        return printable(os.fsdecode(self.extension)) + ("" if self.key is None else f":{self.key}")


@dataclass(slots=True)
class Count:
    """How often something was found, and the first place."""

    number: int = 0
    example: str = ""

    def add(self, name: bytes) -> None:
        """Count the file `name`."""
        if not self.number:
            self.example = printable(os.fsdecode(name))
        self.number += 1


@dataclass(slots=True)
class ShardSamples:
    """The samples of a shard, in its order."""

    names: bytes
    """Names of the image files, one after the other."""
    ends: NDArray[np.int64]
    """`[n]`, end of each name in `names`."""
    starts: NDArray[np.int64]
    """`[n]`, byte of the shard at which the image starts."""
    lengths: NDArray[np.int64]
    """`[n]`, bytes of the image, which the shard may not have in full."""
    codes: NDArray[np.int64] | None
    """`[n]`, class indices, or places in `classes`; None without labels."""
    classes: tuple[str, ...] | None
    """Labels that are names, in the order of their first sample."""
    counts: dict[str, Count] = field(default_factory=dict)
    """What was skipped or is odd, by what it is."""

    def __len__(self) -> int:
        return len(self.starts)


def label_rule(text: str) -> LabelRule | None:
    """`none`, `folder`, `EXTENSION` or `json:KEY`; None for `auto`."""
    if text in ("none", "auto"):
        return LabelRule() if text == "none" else None
    if text == "folder":
        return LabelRule(is_folder=True)
    extension, colon, key = text.partition(":")
    return LabelRule(os.fsencode(extension.lstrip(".").lower()), key if colon else None)


def find_label_rule(members: Iterable[Member], content: Content) -> LabelRule | None:
    """Where the labels are by the first files of a shard: in `.cls` if there are such files; None without images.

    Raises:
        TarError: they might be in several other places, or be captions.
    """
    choices: dict[str, str] = {}
    has_images = False
    for member, _ in zip(members, range(_NUM_LOOKED_AT), strict=False):
        key, extension = _split(member.name)
        if extension == b"cls":
            return LabelRule(b"cls")
        if extension == b"txt":
            choices["txt"] = "label: txt for the text in .txt"
        elif extension == b"json" and "json" not in choices:
            choices["json"] = f"label: json:KEY{_keys_in(content(member))}"
        elif key and _is_image(extension):
            has_images = True
            if folder := folder_of(member.name):
                choices["folder"] = f"label: folder for folders such as {printable(folder)}"
    if not choices:
        return LabelRule() if has_images else None
    raise TarError(
        f"there are no .cls files, so it is not clear which labels the images have; set {', '.join(choices.values())}, "
        "or label: none for images without labels"
    )


def collect_samples(
    members: Iterable[Member], content: Content, rule: LabelRule, images: tuple[str, ...] | None
) -> ShardSamples:
    """The samples of a shard.

    A sample without an image or without a label is skipped and counted.

    Args:
        members: the files of the shard, in its order.
        content: reads one of them.
        rule: where the labels are.
        images: extensions of images, of which the first is taken that a sample has; None for any image, if each sample
            has one.

    Raises:
        TarError: a sample has several images, or a label that is none.
    """
    collected = _Collected(content, rule, images)
    current, rank, image, label, text = None, -1, None, None, None
    rank_of, label_extension = collected.rank_of, rule.extension
    for member in members:
        name = member[0]
        slash = name.rfind(b"/") + 1
        dot = name.find(b".", slash)
        if dot <= slash:
            collected.count("file(s) that are hidden or have no extension, which are skipped", name)
            continue
        key, extension = name[:dot], name[dot + 1 :].lower()
        if key != current:
            if current is not None:
                collected.add(current, image, label, text)
            current, rank, image, label, text = key, -1, None, None, None
        if extension == label_extension:
            if label is not None:
                raise TarError(f"{_shown(name)} is there twice in a row; make the archive again with one of them")
            label, text = name, collected.read_label(member)
        elif (found := rank_of(extension)) >= 0:
            if image is not None and (found == rank or images is None):
                raise TarError(_several_images(image.name, name, extension))
            if image is None or found < rank:
                rank, image = found, member
    if current is not None:
        collected.add(current, image, label, text)
    return collected.finish()


def folder_of(name: bytes) -> str:
    """The folder that the file `name` is in, without those above it; empty if it is in none."""
    folder = os.fsdecode(name.rpartition(b"/")[0].rpartition(b"/")[2])
    return "" if folder in (".", "..") else folder


class _Collected:
    """Samples as they are found."""

    def __init__(self, content: Content, rule: LabelRule, images: tuple[str, ...] | None) -> None:
        self._content, self._rule = content, rule
        self._images = None if images is None else [os.fsencode(each.lstrip(".").lower()) for each in images]
        self._ranks: dict[bytes, int] = {}
        self._names, self._ends = bytearray(), array("q")
        self._starts, self._lengths = array("q"), array("q")
        self._labels = _Labels(rule)
        self._keys: set[int] = set()
        self._counts: dict[str, Count] = {}

    def rank_of(self, extension: bytes) -> int:
        """The place of an extension among those of images, -1 if it is none of them."""
        rank = self._ranks.get(extension)
        if rank is None:
            if self._images is None:
                rank = 0 if _is_image(extension) else -1
            else:
                rank = self._images.index(extension) if extension in self._images else -1
            self._ranks[extension] = rank
        return rank

    def count(self, what: str, name: bytes) -> None:
        self._counts.setdefault(what, Count()).add(name)

    def read_label(self, label: Member) -> bytes | None:
        """The content of a file with a label, while it is near what was read last; None if it is cut off."""
        limit = _MAX_LABEL_BYTES if self._rule.key is None else _MAX_JSON_BYTES
        if label.num_bytes > limit:
            raise TarError(f"{_shown(label.name)}: a label of {label.num_bytes} bytes; at most {limit} are read")
        return self._content(label)

    def add(self, key: bytes, image: Member | None, label: bytes | None, content: bytes | None) -> None:
        """Add a sample if it has all it needs; `label` is the name of the file with `content`."""
        if image is None:
            self.count("sample(s) without an image, which are skipped", key)
            return
        name, start, length = image
        if not self._add_label(name, label, content):
            self.count(f"image(s) without a label ({self._rule}), which are skipped", name)
            return
        hashed = hash(key)
        if hashed in self._keys:
            self.count("key(s) that are there again, each as a sample of its own", key)
        self._keys.add(hashed)
        self._names += name
        self._ends.append(len(self._names))
        self._starts.append(start)
        self._lengths.append(length)

    def _add_label(self, name: bytes, label: bytes | None, content: bytes | None) -> bool:
        """Add the label of an image; False if it has none."""
        if self._rule.is_folder:
            folder = folder_of(name)
            return bool(folder) and self._labels.add(folder, name)
        if not self._rule.is_file:
            return True
        return label is not None and content is not None and self._labels.add_content(content, label)

    def finish(self) -> ShardSamples:
        codes, classes = self._labels.finish()
        return ShardSamples(
            names=bytes(self._names),
            ends=np.array(self._ends, dtype=np.int64),
            starts=np.array(self._starts, dtype=np.int64),
            lengths=np.array(self._lengths, dtype=np.int64),
            codes=codes,
            classes=classes,
            counts=self._counts,
        )


class _Labels:
    """Labels as codes: class indices, or places in the list of names that were found; never both."""

    def __init__(self, rule: LabelRule) -> None:
        self._rule = rule
        self._kind: type | None = None
        self._codes = array("q")
        self._code_of: dict[str, int] = {}
        self._remembered: dict[bytes, int] = {}

    def add_content(self, content: bytes, name: bytes) -> bool:
        """Add the label in the file `name`; False if there is none in it."""
        code = self._remembered.get(content)
        if code is not None:
            self._codes.append(code)
            return True
        value = _value_in(content, self._rule.key, name)
        if value is None or not self.add(value, name):
            return False
        if self._rule.key is None and len(self._remembered) < _MAX_REMEMBERED:
            self._remembered[content] = self._codes[-1]
        return True

    def add(self, value: int | str, name: bytes) -> bool:
        """Add a class index or name; False if it is an empty name."""
        if value == "":
            return False
        self._kind = self._kind or type(value)
        if type(value) is not self._kind:
            kinds = "a class index" if isinstance(value, int) else "a class name"
            raise TarError(
                f"{_shown(name)}: found {kinds}, {printable(value)!r:.60}, where the samples before it have the other; "
                "all must have the same"
            )
        if isinstance(value, int):
            if not 0 <= value < 2**31:
                raise TarError(f"{_shown(name)}: the label {value!r:.30} is no class index; classes count from 0")
            self._codes.append(value)
        else:
            if len(value) > MAX_NAME:
                raise TarError(f"{_shown(name)}: a class name of {len(value)} characters; is this a caption?")
            self._codes.append(self._code_of.setdefault(value, len(self._code_of)))
        return True

    def finish(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        if not self._rule.is_file and not self._rule.is_folder:
            return None, None
        names = tuple(self._code_of) if self._kind is str else None
        return np.array(self._codes, dtype=np.int64), names


def _value_in(content: bytes, key: str | None, name: bytes) -> int | str | None:
    """The class index or name that the file `name` holds; None if it holds none."""
    try:
        text = content.decode("utf-8-sig")
        found = text.strip() if key is None else json.loads(text)
    except (ValueError, RecursionError) as exc:
        reason = "it is no UTF-8" if isinstance(exc, UnicodeError) else f"it is no JSON ({printable(exc):.80})"
        raise TarError(f"{_shown(name)}: the label cannot be read, as {reason}") from None
    if key is None:
        if _FRACTION.fullmatch(found):
            raise TarError(f"{_shown(name)}: the label {found!r:.30} is neither a class index nor a name")
        return int(found) if _INTEGER.fullmatch(found) else found
    if not isinstance(found, dict):
        raise TarError(f"{_shown(name)}: this is no object of JSON, so it has no key {key!r}")
    value: object = found.get(key)
    if isinstance(value, str) and not _is_text(value):
        raise TarError(f"{_shown(name)}: {key!r} is {printable(value):.60}, which is half a character and no text")
    if value is not None and type(value) not in (int, str):
        raise TarError(
            f"{_shown(name)}: {key!r} is {printable(json.dumps(value)):.60}, and a label is a whole number or a text; "
            f"take another key{_keys_in(content)}"
        )
    return value  # type: ignore[return-value]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Key and extension of a file; no key if it has no extension."""
    slash = name.rfind(b"/") + 1
    dot = name.find(b".", slash)
    return (b"", b"") if dot <= slash else (name[:dot], name[dot + 1 :].lower())


def _is_image(extension: bytes) -> bool:
    return extension.rpartition(b".")[2] in _IMAGE_ENDINGS


def _keys_in(content: bytes | None) -> str:
    """The keys of an object of JSON, for messages; empty if it is none."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return ""
    return f" with one of the keys {first_few(list(found))}" if isinstance(found, dict) and found else ""


def _several_images(first: bytes, second: bytes, extension: bytes) -> str:
    own = _split(first)[1]
    if own == extension:
        return f"{_shown(second)} is there twice in a row; make the archive again with one of them"
    names = " and ".join(map(_shown, (first, second)))
    choices = " or ".join(f"image: {_shown(each)}" for each in (own, extension))
    return (
        f"{names} are both images of one sample, as a sample is what has the same name up to the first dot; set "
        f"{choices} for one of them, or rename the files if each is a sample"
    )


def _shown(name: bytes) -> str:
    return printable(os.fsdecode(name))
