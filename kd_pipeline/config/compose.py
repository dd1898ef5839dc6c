"""`extends` in a config file: the files and presets that it builds on, merged into one mapping with the place of every
value."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kd_pipeline._core.paths import local_path
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.text import printable
from kd_pipeline.config.yaml import Key, Place, Problem, config_error, parse
from kd_pipeline.errors import ConfigError

__all__ = ["EXTENDS", "PRESET", "Composed", "compose", "merged", "preset_names"]

EXTENDS = "extends"
PRESET = "preset:"
"""Start of an entry that is one of the package's own files, in `config/presets`."""
_PRESETS = Path(__file__).parent / "presets"
_MAX_DEPTH = 16
_MAX_FILES = 100
_ALTERNATIVES = {
    "distill": ("loss",),
    "model": ("timm", "torchvision", "builtin", "factory"),
    "optimizer": ("name", "factory"),
    "schedule": ("kind", "factory"),
    "student": ("timm", "torchvision", "builtin", "factory"),
    "teacher": ("onnx", "engine", "model", "path", "members"),
}
"""By section, the keys that say what it is of; other sections have `kind`."""
_NAMED: dict[str | int, str] = {"members": "teacher", "students": "student"}
"""Sections whose keys are names of the user's, and what each of them is."""
_SAME_WITH_OTHER_VALUES = frozenset({
    *("timm", "torchvision", "builtin"),
    *("onnx", "engine", "model", "path", "members"),
})  # fmt: skip
"""Of these, such as `timm`, only a different key changes what the section is of: a different network has its own name,
and the same settings."""
_FREE = frozenset({"kwargs", "options", "lr_scale", "student_from_teacher"})
"""Sections whose keys are the user's own."""


class Composed(NamedTuple):
    """The merged content of a config file and of all that it extends."""

    data: dict[str, Any]
    places: dict[Key, Place]


def compose(path: Path, text: str, read: Callable[[Path], str]) -> Composed | None:
    """Merge what the config `text` extends, in order, and then the config itself; None if it is no mapping.

    Mappings are merged, key by key. Anything else replaces what was there: lists, values, null, and a section that says
    that it is of a different kind, whose other keys belong to that kind.

    Args:
        path: the file of `text`; what it extends is relative to its folder.
        text: of the config file.
        read: reads a file.

    Raises:
        ConfigError: a file is no mapping or cannot be read, or extends itself; says in which line of which file.
    """
    return _Composer(read).file(path, text, ())


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def _replaces(key: Key, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the section `new` at `key` is of a different kind than `old`, and so replaces it as a whole."""
    if not key or _FREE & {*key}:
        return False
    section = _NAMED.get(key[-2], key[-1]) if len(key) > 1 else key[-1]
    names = _ALTERNATIVES.get(str(section), ("kind",))
    said = [name for name in names if new.get(name) is not None]
    before = [name for name in names if old.get(name) is not None]
    if not said or not before:
        return False
    if not {*said} & {*before}:
        return True
    return any(name not in _SAME_WITH_OTHER_VALUES and old.get(name, new[name]) != new[name] for name in said)


class _Composer:
    """Reads the files."""

    def __init__(self, read: Callable[[Path], str]) -> None:
        self._read = read
        self._num_files = 0

    def file(self, path: Path, text: str, chain: tuple[Path, ...]) -> Composed | None:
        """The content of one file, with what it extends below it; `chain` are the files that led to it."""
        data, places = parse(text, partial(_place, path))
        if not isinstance(data, dict):
            return None
        below = Composed({}, {(): places[()]})
        for key in _entries(data, places):
            below = self._merged_with(below, data, places, key, (*chain, path))
        own = {name: value for name, value in data.items() if name != EXTENDS}
        self._num_files += 1
        found = {key: _ranked(place, self._num_files) for key, place in places.items() if key[:1] != (EXTENDS,)}
        return _merge(below, Composed(own, found))

    def _merged_with(
        self, below: Composed, data: dict[str, Any], places: dict[Key, Place], key: Key, chain: tuple[Path, ...]
    ) -> Composed:
        """`below` with the file that the entry at `key` names on top."""
        entry = data[EXTENDS] if len(key) == 1 else data[EXTENDS][key[1]]
        try:
            path = _find(entry, chain[-1].parent)
            resolved = path.resolve()
            if resolved in [each.resolve() for each in chain]:
                names = " -> ".join(str(each) for each in (*chain, path))
                raise ValueError(f"the files extend each other in a circle: {names}; remove one of the lines")
            if len(chain) >= _MAX_DEPTH or self._num_files >= _MAX_FILES:
                raise ValueError(
                    f"more than {_MAX_DEPTH} files in a row, or {_MAX_FILES} in all; put them together into fewer"
                )
            text = self._read(path)
        except (ConfigError, OSError, ValueError) as exc:
            raise config_error([Problem(places[key], key, str(exc))]) from None
        found = self.file(path, text, chain)
        if found is None:
            raise config_error([Problem(_place(path, 1), (), "should be a mapping, as it is extended by a config")])
        return _merge(below, found)


def _entries(data: dict[str, Any], places: dict[Key, Place]) -> list[Key]:
    """The keys of all entries of `extends`."""
    entries = data.get(EXTENDS)
    if entries is None:
        return []
    keys: list[Key] = [(EXTENDS, number) for number in range(len(entries))] if isinstance(entries, list) else []
    keys = keys or [(EXTENDS,)]
    for key in keys:
        if not isinstance(entries if len(key) == 1 else entries[key[1]], str):
            text = "should be a file, such as base.yaml, or a list of files"
            raise config_error([Problem(places[key], key, text)])
    return keys


def _find(entry: str, folder: Path) -> Path:
    """The file that an entry names.

    Raises:
        ValueError: there is no such preset, or the path is none.
    """
    if not entry.startswith(PRESET):
        return folder / local_path(entry)
    name = entry.removeprefix(PRESET)
    if name not in (names := preset_names()):
        raise ValueError(f"there is no preset {printable(name)!r}{suggest(name, names)}")
    return _PRESETS / f"{name}.yaml"


def _place(path: Path, line: int) -> Place:
    return Place(line, f"{path}:{line}")


def _ranked(place: Place, number: int) -> Place:
    """`place` after those of the files before it."""
    return place._replace(order=place.order + number * 2**20)


def _merge(below: Composed, above: Composed) -> Composed:
    """`above` on top of `below`; neither is changed."""
    replaced: set[Key] = set()
    data = merged(below.data, above.data, replaced=replaced)
    kept = {
        key: place
        for key, place in below.places.items()
        if replaced.isdisjoint(key[:length] for length in range(1, len(key) + 1))
    }
    return Composed(data, kept | above.places)


def merged(
    old: dict[str, Any], new: dict[str, Any], key: Key = (), *, replaced: set[Key] | None = None
) -> dict[str, Any]:
    """`new` on top of `old`, both at `key`; the keys whose whole value is that of `new` are added to `replaced`."""
    data = dict(old)
    replaced = set() if replaced is None else replaced
    for name, value in new.items():
        child = (*key, name)
        before = data.get(name)
        if isinstance(before, dict) and isinstance(value, dict) and not _replaces(child, before, value):
            data[name] = merged(before, value, child, replaced=replaced)
            continue
        replaced.add(child)
        data[name] = value
    return data
