"""The differences between two configs, or two values of what identifies a run, as lines for people."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError

__all__ = ["MAX_LISTED", "Change", "changed_settings", "changes_of", "reason_of", "with_defaults"]

_MAX_SHOWN = 150
"""Characters of a value in a message."""
MAX_LISTED = 10
"""Changes that a message lists; there may be one for each of a thousand class names."""

_NOTES = {
    "train.epochs": "learning rate and ramps now follow a run of the new length",
    "train.select_by": "the best score starts over",
    "train.select_mode": "the best score starts over",
    "classes": "class names of the data, in label order",
    "data": "the training images, labels or classes are different ones",
    "num_classes": "number of logits",
    "objects": "objects that train was called with",
    "stream.dali": "version of nvidia-dali",
    "stream.decode": "how this GPU decodes images",
    "stream.device": "kind of device that decodes images",
    "stream.global_batch_size": "data.batch_size x processes",
    "stream.shards": "shards of the training data with different numbers of samples",
    "teacher": "a teacher with different weights, precision or runtime",
    "teacher_runtimes": "backend and precision of the teacher",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between the run in a checkpoint and the run that would resume from it."""

    key: str
    """Dotted, as on the command line."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{printable(self.key.removeprefix('stream.'))}: {_show(self.old)} → {_show(self.new)}"

    @property
    def line(self) -> str:
        """What was changed, and what that means."""
        note = _NOTES.get(self.key)
        return f"{self}" if note is None else f"{self} ({note})"


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The settings that two configs, in plain values, do not have in common; both may be of an earlier release.

    Raises:
        StateError: `saved` is no config.
    """
    try:
        return [*changes_of(with_defaults(saved), with_defaults(current))]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise StateError(f"the run does not say which config made it ({reason_of(exc)})") from exc


def reason_of(exc: Exception) -> str:
    """What was wrong with plain data of any shape, in a line."""
    return printable(f"{type(exc).__name__}: {exc}".partition("\n")[0])[:_MAX_SHOWN]


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a checkpoint; settings that are newer than it have their defaults, with which it ran."""
    config: dict[str, Any] = dict(saved)
    try:
        return Config.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def changes_of(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    """The differences of two plain values below a key; those of a long list one by one, of a short one together."""
    match old, new:
        case Mapping(), Mapping():
            for name in {**old, **new}:
                yield from changes_of(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
        case ((list() | tuple()), (list() | tuple())) if len(old) == len(new) and not _is_short([*old, *new]):
            for position, entries in enumerate(zip(old, new, strict=True)):
                yield from changes_of(*entries, f"{key}[{position}]")
        case ((list() | tuple()), (list() | tuple())) if max(len(old), len(new)) > MAX_LISTED:
            yield Change(key, f"{len(old)} entries", f"{len(new)} entries")
        case _ if old != new:
            yield Change(key, old, new)


def _is_short(values: list[Any]) -> bool:
    """Whether a list is shown as a whole, such as the mean of three channels."""
    return len(values) <= MAX_LISTED and not any(isinstance(value, Mapping | list | tuple) for value in values)


def _show(value: Any) -> str:
    """A value as in a config file, on one line; a fingerprint by its first digits."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"fingerprint {value[:12]}"
    try:
        text = yaml.safe_dump(_without_none(value), default_flow_style=True, sort_keys=False, width=math.inf)
    except (yaml.YAMLError, RecursionError):  # no config has such a value
        text = f"a {type(value).__name__}"
    text = printable(text.removesuffix("...\n").strip())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [*value] if isinstance(value, tuple) else value
