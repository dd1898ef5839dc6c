"""What Hugging Face's metadata says about the columns of a table: which are images, and the names of classes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import yaml

__all__ = ["DatasetCard", "Features", "features_of_schema", "read_card"]

_MAX_CARD = 2**22
"""Characters of the front matter of a README.md, which the names of twenty thousand classes have."""


class Features(NamedTuple):
    """Columns that `datasets` gives a meaning."""

    images: tuple[str, ...] = ()
    """Columns of type `Image`."""
    class_names: Mapping[str, tuple[str, ...]] = {}
    """Columns of type `ClassLabel`, with their names in label order."""


class DatasetCard(NamedTuple):
    """The front matter of the README.md of a dataset repository."""

    features: Features
    data_files: Mapping[str, tuple[str, ...]]
    """Patterns of the files of each split, relative to the repository; empty where the names of the files say it."""


def features_of_schema(metadata: Mapping[bytes, bytes] | None) -> Features:
    """What the metadata of an Arrow schema says, from its key `huggingface`; nothing if there is none."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = content.get("info", {}).get("features", {})
        return _features((name, _kind_of_json(feature)) for name, feature in features.items())
    return Features()


def read_card(text: str) -> DatasetCard:
    """What a README.md says in its front matter; nothing if it has none, or describes several configurations."""
    empty = DatasetCard(Features(), {})
    parts = text.split("---", 2)
    if not text.lstrip().startswith("---") or len(parts) < 3 or len(parts[1]) > _MAX_CARD:
        return empty
    with suppress(yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        content = yaml.safe_load(parts[1])
        infos, configs = content.get("dataset_info", {}), content.get("configs", [])
        info = infos[0] if isinstance(infos, list) and len(infos) == 1 else infos
        columns = info.get("features", []) if isinstance(info, dict) else []
        features = _features((column["name"], _kind_of_yaml(column)) for column in columns)
        return DatasetCard(features, _data_files(configs[0]) if len(configs) == 1 else {})
    return empty


def _data_files(config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    files = {}
    for entry in config.get("data_files", []):
        paths = entry["path"]
        files[str(entry["split"])] = (paths,) if isinstance(paths, str) else tuple(map(str, paths))
    return files


def _features(kinds: Iterator[tuple[str, object]]) -> Features:
    images, class_names = [], {}
    for name, kind in kinds:
        if kind == "image":
            images.append(name)
        elif isinstance(kind, tuple):
            class_names[name] = kind
    return Features(tuple(images), class_names)


def _kind_of_json(feature: Any) -> object:
    """`"image"`, the names of classes, or None."""
    match feature:
        case {"_type": "Image"}:
            return "image"
        case {"_type": "ClassLabel", "names": [*names]}:
            return tuple(map(str, names))
    return None


def _kind_of_yaml(column: Any) -> object:
    """`"image"`, the names of classes, or None."""
    match column:
        case {"dtype": "image"}:
            return "image"
        case {"dtype": {"class_label": {"names": dict(names)}}}:
            return tuple(str(names[label]) for label in sorted(names, key=int))
        case {"dtype": {"class_label": {"names": [*names]}}}:
            return tuple(map(str, names))
    return None
