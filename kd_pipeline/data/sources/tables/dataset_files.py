"""The Parquet files of a dataset: those that a pattern matches, or those of a split in a folder as on Hugging Face."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline.data.sources.tables.hf_features import Features, read_card
from kd_pipeline.errors import DataError, NoSuchFileError, shown
from kd_pipeline.storage import Store, expand, scheme_of

__all__ = ["DatasetFiles", "find_dataset_files"]

_ENDINGS = (".parquet", ".parq", ".pq")
_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of splits in the names of files and folders, as `datasets` understands them."""
_NUMBERED = re.compile(r"([\w.-]+?)-[0-9]+-of-[0-9]+\.[a-z]+")
"""Such as `train-00000-of-00005.parquet`."""
_WORDS = re.compile(r"[/._ -]+")


class DatasetFiles(NamedTuple):
    """The files of a dataset, in order, and what its README.md says about their columns."""

    paths: list[str]
    features: Features


def find_dataset_files(paths: Sequence[str], store: Store, split: str | None) -> DatasetFiles:
    """The files that `paths` name: Parquet files, patterns of such, or one folder.

    Args:
        paths: local, or URLs.
        store: what reads them.
        split: takes only the files of this split, by the folder's README.md or else by their names.

    Raises:
        DataError: there are none, none of the split, or of several splits without `split`.
    """
    if len(paths) == 1 and _is_folder(paths[0]):
        return _files_in_folder(paths[0].rstrip("/"), store, split)
    found = expand(paths, store)
    if split is not None:
        found = _of_split(found, split, shown(paths[0]))
    return DatasetFiles(found, Features())


def _is_folder(path: str) -> bool:
    if scheme_of(path) is None:
        return os.path.isdir(path)
    name = path.rpartition("/")[2]
    return not name.lower().endswith(_ENDINGS) and not any(character in path for character in "*[{")


def _files_in_folder(folder: str, store: Store, split: str | None) -> DatasetFiles:
    try:
        card = read_card(store.read(f"{folder}/README.md").decode(errors="replace"))
    except NoSuchFileError:
        card = read_card("")
    if card.data_files:
        name = _chosen(list(card.data_files), split, shown(folder))
        return DatasetFiles(expand([f"{folder}/{pattern}" for pattern in card.data_files[name]], store), card.features)
    found = store.find(f"{folder}/**/*.parquet")
    found = [path for path in found if not any(part.startswith(".") for part in path[len(folder) :].split("/"))]
    if not found:
        raise DataError(
            f"{shown(folder)}: no .parquet files in or below this folder; set path to the files{_else(folder)}"
        )
    splits = {found_split for path in found if (found_split := _split_of(path[len(folder) :])) is not None}
    if split is not None or len(splits) > 1:
        found = _of_split(found, _chosen(sorted(splits), split, shown(folder)), shown(folder), start=len(folder))
    return DatasetFiles(found, card.features)


def _else(folder: str) -> str:
    if scheme_of(folder) is None and (Path(folder) / "dataset_info.json").exists():
        return f", or take kind: huggingface with path: {folder}, which Dataset.save_to_disk has written"
    return ""


def _of_split(paths: list[str], split: str, name: str, start: int = 0) -> list[str]:
    wanted = _ALIASES.get(split.lower(), split)
    found = [path for path in paths if _split_of(path[start:]) in (wanted, split)]
    if not found:
        raise DataError(
            f"{name}: none of the {len(paths)} files is of the split {split!r} by its name; leave out split"
        )
    return found


def _chosen(splits: list[str], split: str | None, name: str) -> str:
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{name}: has the splits {first_few(splits)}; set split to one of them")
        return splits[0]
    wanted = _ALIASES.get(split.lower(), split)
    found = next((each for each in splits if split == each or wanted == _ALIASES.get(each.lower(), each)), None)
    if found is None:
        raise DataError(f"{name}: has no split {split!r}{suggest(split, splits)}; it has {first_few(splits) or 'none'}")
    return found


def _split_of(path: str) -> str | None:
    """The split that the name of a file, or of a folder it is in, says."""
    if match := _NUMBERED.fullmatch(path.rpartition("/")[2]):
        return _ALIASES.get(match[1].lower(), match[1])
    words = reversed(_WORDS.split(path.lower()))
    return next((_ALIASES[word] for word in words if word in _ALIASES), None)
