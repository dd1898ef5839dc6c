"""Which fields of a batch from a loader of the user's own are inputs, labels, masks, index and valid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError, DataError

__all__ = ["BatchFields", "FieldNames", "InputNames", "read_fields"]

Key = str | int
"""The name of a field of a mapping, or the position of one in a tuple."""
InputNames = Key | Sequence[Key] | Mapping[str, Key]
"""The inputs: a field, several, or the keyword of the network for each."""

_LABELS = ("labels", "label")
_MASKS = ("masks", "mask")
_INPUTS = ("images", "pixel_values")
_IMAGE_DIMS = 4


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the user said about the fields; None leaves it to what they look like."""

    inputs: InputNames | None = None
    labels: Key | None = None
    masks: Key | None = None
    index: Key | None = None
    valid: Key | None = None


@dataclass(frozen=True, slots=True)
class BatchFields:
    """A batch as tensors in the dtypes that the loader gave, all with the same number of rows."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    masks: Tensor | None = None
    index: Tensor | None = None
    valid: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def read_fields(batch: object, names: FieldNames) -> BatchFields:
    """The fields of `batch`: a mapping, tuple, list, named tuple, dataclass or tensor.

    Raises:
        ConfigError: `names` does not fit the batch, or which fields are inputs cannot be told.
        DataError: a field is no tensor, or two have different numbers of rows.
    """
    found = _by_key(batch)
    inputs = _inputs(found, names)
    used = set(inputs.values())
    labels = _labels_key(found, names, used) if names.labels is None else names.labels
    masks = _masks_key(found, used) if names.masks is None else names.masks
    if names.masks is None and labels in found and _looks_like_masks(found[labels]):
        labels, masks = None, labels  # as data sets for segmentation call them
    special = {"labels": labels, "masks": masks, "index": names.index, "valid": names.valid}
    tensors = {name: _input(found, key) for name, key in inputs.items()}
    others = {name: _special(found, name, key) for name, key in special.items() if key is not None}
    used |= {key for key in special.values() if key is not None}
    extra = {key if isinstance(key, str) else f"field_{key}": each for key, each in found.items() if key not in used}
    are_named = names.inputs is not None or names.labels is not None or names.masks is not None
    if isinstance(next(iter(found)), int) and not are_named and extra:
        raise ConfigError(
            f"a batch has {len(found)} fields ({_shown(found)}), of which only the first two have a meaning: the input "
            'and the labels. Name them: inputs={"keyword": position, ...}, labels=position; the others become '
            "batch.extra"
        )
    _check_rows(tensors | others)
    tensors = {
        name if name else ("images" if tensor.ndim == _IMAGE_DIMS else "input"): tensor
        for name, tensor in tensors.items()
    }
    return BatchFields(tensors, **others, extra=extra)


def _by_key(batch: object) -> dict[Any, Any]:
    """The fields by name, or by position."""
    if isinstance(batch, Mapping):
        found: dict[Any, Any] = dict(batch)
    elif isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        found = dict(batch._asdict())
    elif is_dataclass(batch) and not isinstance(batch, type):
        found = {each.name: getattr(batch, each.name) for each in fields(batch)}
    elif isinstance(batch, tuple | list):
        found = dict(enumerate(batch))
    elif isinstance(batch, Tensor | np.ndarray):
        found = {0: batch}
    else:
        raise DataError(
            f"a batch is a mapping or a tuple of tensors, got {type(batch).__qualname__}; let the loader's collate_fn "
            "return one"
        )
    if not found:
        raise DataError("a batch has no fields; let the loader's collate_fn return at least an input")
    return found


def _inputs(found: Mapping[Any, Any], names: FieldNames) -> dict[str, Key]:
    """The key of each input, by the keyword of the network; an empty one for a name that depends on the tensor."""
    by_position = isinstance(next(iter(found)), int)
    given = names.inputs
    if given is None:
        return {"": 0} if by_position else _only_input(found, names)
    if isinstance(given, str | int):
        given = (given,)
    if isinstance(given, Mapping):
        chosen = dict(given)
    elif by_position and all(isinstance(each, int) for each in given):
        if len(given) > 1:
            raise ConfigError(
                f"networks take several inputs by keyword: name them, as inputs={{'first': {given[0]}, ...}}"
            )
        chosen = {"": given[0]}
    elif by_position:
        chosen = {str(name): position for position, name in enumerate(given)}
    else:
        chosen = {str(name): name for name in given}
    if not chosen:
        raise ConfigError("inputs names no field; name at least one, or leave it out")
    for key in chosen.values():
        _check_key(found, "inputs", key)
    return chosen


def _only_input(found: Mapping[str, Any], names: FieldNames) -> dict[str, Key]:
    """The input of a mapping, if only one field can be meant."""
    taken = {names.labels, names.masks, names.index, names.valid, *(_LABELS if names.labels is None else ())}
    taken |= {name for name in _MASKS if name in found and _looks_like_masks(found[name])}
    usual = [name for name in _INPUTS if name in found and name not in taken]
    tensors = [
        name for name, value in found.items() if name not in taken and isinstance(value, Tensor | np.ndarray) and name
    ]
    if len(usual) != 1 and len(tensors) != 1:
        listed = ", ".join(map(repr, tensors))
        raise ConfigError(
            f"which fields of a batch are inputs? It has {_shown(found)}; say "
            + (f"inputs=({listed}), or only those that networks take" if tensors else "inputs=(...)")
            + ("; other fields become batch.extra" if tensors else ", and let the loader give tensors")
        )
    name = usual[0] if len(usual) == 1 else tensors[0]
    return {name: name}


def _labels_key(found: Mapping[Any, Any], names: FieldNames, used: set[Key]) -> Key | None:
    """The field with the labels, if the user did not say which."""
    if not isinstance(next(iter(found)), int):
        return next((name for name in _LABELS if name in found and name not in used), None)
    position = len(used)
    if position not in found or used != set(range(position)) or position in (names.masks, names.index, names.valid):
        return None
    if _looks_like_labels(found[position]) or _looks_like_masks(found[position]):
        return position
    if names.inputs is None:
        raise ConfigError(
            f"the second field of a batch is {_shown_one(found[position])}, and labels are integers [N] or floats "
            f"[N, K], or masks [N, H, W]; say labels={position} if they are labels, or inputs={{'first': 0, 'second': "
            f"{position}}} if both are inputs"
        )
    return None


def _masks_key(found: Mapping[Any, Any], used: set[Key]) -> Key | None:
    """The field with the masks by its name, if the user did not say which; `mask` may also be one of tokens."""
    return next(
        (name for name in _MASKS if name in found and name not in used and _looks_like_masks(found[name])), None
    )


def _looks_like_masks(value: object) -> bool:
    value = _as_tensor(value)
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return value.ndim == 3 and not value.is_floating_point()


def _looks_like_labels(value: object) -> bool:
    value = _as_tensor(value)
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return value.ndim == (2 if value.is_floating_point() else 1)


def _input(found: Mapping[Any, Any], key: Key) -> Tensor:
    tensor = _as_tensor(found[key])
    if not isinstance(tensor, Tensor) or tensor.ndim == 0:
        raise DataError(
            f"the input {key!r} of a batch is {_shown_one(found[key])}, and networks take tensors [N, ...]; let the "
            'loader stack it (collate_fn), or for a data set of Hugging Face use dataset.with_format("torch")'
        )
    return tensor


def _special(found: Mapping[Any, Any], name: str, key: Key) -> Tensor:
    """Labels, masks, index or valid as a tensor."""
    _check_key(found, name, key)
    value = found[key]
    if isinstance(value, list | tuple) and value and all(isinstance(each, bool | int | float) for each in value):
        value = torch.tensor(value)
    tensor = _as_tensor(value)
    if name == "masks":
        if not isinstance(tensor, Tensor) or not _looks_like_masks(tensor):
            raise DataError(
                f"masks ({key!r}) of a batch are {_shown_one(value)}, not integers [N, H, W], the class of each pixel; "
                "let the loader (collate_fn) make them so"
            )
        return tensor
    if not isinstance(tensor, Tensor) or tensor.ndim == 0 or (name != "labels" and tensor.ndim != 1):
        wanted = "a tensor [N] or [N, K]" if name == "labels" else "a tensor [N]"
        raise DataError(f"{name} ({key!r}) of a batch is {_shown_one(value)}, not {wanted}")
    return tensor


def _as_tensor(value: object) -> object:
    """An array as a tensor; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    except TypeError:  # of text, or of objects
        return value


def _check_key(found: Mapping[Any, Any], what: str, key: object) -> None:
    if key in found and not isinstance(key, bool):
        return
    if isinstance(next(iter(found)), int):
        raise ConfigError(f"{what}: a batch has {len(found)} fields, and no position {key!r}: {_shown(found)}")
    raise ConfigError(
        f"{what}: a batch has no field {key!r}{suggest(str(key), map(str, found))}; it has {_shown(found)}"
    )


def _check_rows(tensors: Mapping[str, Tensor]) -> None:
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name or 'the input'} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(
            f"the fields of a batch have different numbers of rows: {shapes}; the first size of each is the number of "
            "samples, so let the loader put it first"
        )


def _shown(found: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key!r} {_shown_one(value)}" for key, value in found.items())


def _shown_one(value: object) -> str:
    value = _as_tensor(value)
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__qualname__}"
