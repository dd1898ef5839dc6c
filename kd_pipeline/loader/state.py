"""Checks of a saved loader state: whether it is one, and whether it fits the loader that loads it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kd_pipeline.errors import StateError

__all__ = ["changed_fields", "check_fingerprint", "check_position", "of_common_views", "read_position"]

_LAST_EPOCH = 2**63 - 1


def read_position(state: Any, *, version: int) -> tuple[int, int, list[int], Mapping[str, Any]]:
    """Epoch, batch, unreadable samples and fingerprint of a saved state.

    Raises:
        StateError: this is no such state.
    """
    found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if type(found) is not int or found != version:
        raise StateError(f"this is no loader state of version {version}, found {found!r}; pass what state_dict() gave")
    types = {"epoch": int, "batch": int, "bad_samples": list, "fingerprint": Mapping}
    for name, kind in types.items():
        if name not in state:
            raise StateError(f"the loader state is damaged: it has no {name!r}; pass what state_dict() gave")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise StateError(
                f"the loader state is damaged: {name} is {state[name]!r:.60}, not {kind.__name__}; "
                "pass what state_dict() gave"
            )
    return state["epoch"], state["batch"], state["bad_samples"], state["fingerprint"]


def check_position(epoch: int, batch: int, bad_samples: list[int], *, num_batches: int, num_samples: int) -> None:
    """Check a position against the size of the loader that loads it.

    Raises:
        StateError: its numbers are not possible for this loader.
    """
    limits = [("epoch", epoch, _LAST_EPOCH), ("batch", batch, num_batches)]
    limits += [("bad_samples", position, num_samples - 1) for position in bad_samples]
    for name, number, limit in limits:
        if type(number) is not int or not 0 <= number <= limit:
            raise StateError(f"the loader state is damaged: {name} is {number!r}, the largest possible is {limit}")
    if len(set(bad_samples)) == num_samples:
        raise StateError(f"the loader state is damaged: bad_samples lists all {num_samples} samples")


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: Iterable[str] = (), might_grow: bool = False
) -> None:
    """Compare field by field, nested ones under dotted names; the fields or groups in `allow` may differ.

    `might_grow` says that more processes may join the current one, and is only for the advice.

    Raises:
        StateError: one line for each field that differs, old → new.
    """
    accepted = tuple(allow)
    changed = {
        name: line
        for name, line in changed_fields(saved, current).items()
        if name not in accepted and name.split(".")[0] not in accepted
    }
    if changed:
        lines = "\n".join(f"  {line}" for line in changed.values())
        first = ""
        if might_grow and "global_batch_size" in changed:
            first = "if several processes share the data, load it after torch.distributed.init_process_group; or else "
        raise StateError(
            f"the saved position belongs to a different stream of batches:\n{lines}\n"
            f"{first}resume with the old values, start over, or accept it: load_state_dict(state, allow={[*changed]})"
        )


def of_common_views(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The fingerprints without views that only one of them has: which views there are changes no other one."""
    ours, theirs = ({} if fields.get("views") is None else fields["views"] for fields in (saved, current))
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return saved, current  # damaged, which the comparison says
    names = ours.keys() & theirs.keys()
    return (
        {**saved, "views": {name: ours[name] for name in names}},
        {**current, "views": {name: theirs[name] for name in names}},
    )


def changed_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """The fields that differ, nested ones under dotted names, each with a line `name: old → new`."""
    old, new = dict(_flatten(saved)), dict(_flatten(current))
    return {
        name: f"{name}: {old.get(name)!r} → {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
