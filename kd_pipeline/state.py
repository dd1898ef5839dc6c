"""What a saved loader position says, and whether it fits the loader that loads it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kd_pipeline.errors import StateError

__all__ = ["check_fingerprint", "read_position"]


def read_position(state: Any, *, version: int, num_batches: int, num_samples: int) -> tuple[int, int, list[int]]:
    """Epoch, batch and unreadable samples out of a loader's state.

    Raises:
        StateError: this is no such state, or its numbers cannot be right for this loader.
    """
    found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if found != version:
        raise StateError(f"this is no loader state of version {version}, found {found!r}; pass what state_dict() gave")
    try:
        epoch, batch, bad_samples = state["epoch"], state["batch"], list(state["bad_samples"])
    except (KeyError, TypeError) as exc:
        raise StateError(f"the loader state is damaged: {exc!r}; pass what state_dict() gave") from exc
    for name, number, limit in [("epoch", epoch, None), ("batch", batch, num_batches)] + [
        ("bad_samples", position, num_samples - 1) for position in bad_samples
    ]:
        if type(number) is not int or number < 0 or (limit is not None and number > limit):
            raise StateError(f"the loader state is damaged: {name} is {number!r}, the largest possible is {limit}")
    return epoch, batch, bad_samples


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
    """Compare field by field, nested ones under dotted names; fields named in `allow` may differ.

    Raises:
        StateError: one line for each field that differs, old → new.
    """
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    accepted = tuple(allow)
    different = [
        name
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name not in accepted and name.split(".")[0] not in accepted
    ]
    if different:
        lines = "\n".join(f"  {name}: {old.get(name)!r} → {new.get(name)!r}" for name in different)
        raise StateError(
            f"the saved position belongs to another stream of batches:\n{lines}\n"
            f"resume with the old values, start anew, or accept it: load_state_dict(state, allow={different})"
        )


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
