"""What is found out about a finished run: facts that hold, differ, or cannot be checked, and how numbers compare."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from kd_pipeline._core.text import printable
from kd_pipeline.errors import KDPipelineError, StateError
from kd_pipeline.training.evidence import BatchLine, Measured, WeightsLine

__all__ = [
    "ASPECTS",
    "Comparison",
    "Fact",
    "FactState",
    "Facts",
    "Tolerance",
    "compare_batch",
    "compare_weights",
    "reading",
]

FactState = Literal["holds", "differs", "cannot be checked"]

ASPECTS = ("samples", "labels", "images", "teacher", "loss", "weights")
"""What is compared of a step, each of which the ones after it depend on."""
_MAX_SHOWN = 5
"""Differences that a fact lists."""
_MAX_REASON = 200
"""Characters of what Python says, in a message."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was looked at."""

    name: str
    """Such as `first steps`."""
    state: FactState
    text: str
    """What was compared; or the differences, old → new; or why it cannot be checked."""
    is_exact: bool = True
    """Whether what holds does so bit for bit, and not only within rounding."""


class Facts:
    """Collects facts, in their order."""

    def __init__(self) -> None:
        self.found: list[Fact] = []

    def holds(self, name: str, text: str, *, is_exact: bool = True) -> None:
        """Add that something is as it was recorded."""
        self.found.append(Fact(name, "holds", text, is_exact))

    def differs(self, name: str, differences: Iterable[str], *, cause: str = "", most: int = _MAX_SHOWN) -> None:
        """Add that something is not, with the first differences, at `most` so many, and their likely cause."""
        lines = [*differences]
        more = len(lines) - most
        text = "; ".join(lines[:most]) + (f"; and {more} more" if more > 0 else "")
        self.found.append(Fact(name, "differs", text + (f". {cause}" if cause else "")))

    def unknown(self, name: str, why: str) -> None:
        """Add that something cannot be checked."""
        self.found.append(Fact(name, "cannot be checked", printable(why, keep="\n")))

    @contextmanager
    def part(self, *names: str) -> Iterator[None]:
        """Where the library raises an error inside the `with`, which it ends: `names` cannot be checked."""
        try:
            yield
        except KDPipelineError as exc:
            known = {fact.name for fact in self.found}
            for name in names:
                if name not in known:
                    self.unknown(name, str(exc))


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Where plain values or tensors that anybody may have written are not what they should be: an error about `what`.

    Raises:
        StateError: so it is.
    """
    try:
        yield
    except KDPipelineError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        reason = printable(f"{type(exc).__name__}: {exc}".partition("\n")[0])[:_MAX_REASON]
        raise StateError(f"{what} is damaged, or not of a run ({reason})") from exc


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How close numbers have to be: bit for bit on a machine like that of the run, else within rounding."""

    is_exact: bool
    why: str
    """Why the last bits may differ, such as `torch 2.12.0 → 2.13.0`; empty if they may not."""
    relative: float
    """Of numbers that are computed in the precision of the training."""

    def compare(self, old: Measured, new: Measured, *, relative: float | None = None) -> "Comparison":
        """Compare two tensors by their digests, or if the last bits may differ by their size."""
        if old.digest == new.digest:
            return "equal"
        return "differs" if self.is_exact else self.compare_numbers(old.value, new.value, relative=relative)

    def compare_numbers(self, old: str, new: str, *, relative: float | None = None) -> "Comparison":
        """Compare two numbers, written by `float.hex`."""
        if old == new:
            return "equal"
        if self.is_exact:
            return "differs"
        is_close = math.isclose(float.fromhex(old), float.fromhex(new), rel_tol=relative or self.relative, abs_tol=1e-6)
        return "close" if is_close else "differs"


Comparison = Literal["equal", "close", "differs"]

_PIXEL_TOLERANCE = 1e-3
"""Relative, of the root mean square of the pixels of a few images, decoded elsewhere."""


def compare_batch(
    old: BatchLine, new: BatchLine, tolerance: Tolerance, *, names: Sequence[str] = ()
) -> dict[str, tuple[Comparison, str]]:
    """How each aspect of a batch compares, with the difference in words.

    Args:
        old: as it was recorded.
        new: as it is now.
        tolerance: of numbers.
        names: of the first samples now.
    """
    place = f"epoch {old.epoch + 1}, batch {old.batch + 1}"
    found: dict[str, tuple[Comparison, str]] = {}
    is_same = (old.samples, old.order) == (new.samples, new.order)
    found["samples"] = (
        ("equal", "") if is_same else ("differs", f"{place}: samples {_shown(old.samples)} → {_shown(new.samples)}")
    )
    if not is_same:
        return found
    found["labels"] = ("equal", "") if old.labels == new.labels else ("differs", f"labels of {place}")
    pixels = _compare_all(old.pixels, new.pixels, tolerance, relative=_PIXEL_TOLERANCE)
    found["images"] = pixels, f"pixels of {place}{_of(_differing(old, new, names))}"
    teacher = _compare_all(old.teacher, new.teacher, tolerance)
    found["teacher"] = teacher, f"the teacher's outputs for {place}: {_changes(old.teacher, new.teacher)}"
    found["loss"] = _compare_terms(old, new, tolerance)
    return found


def compare_weights(old: WeightsLine, new: WeightsLine, tolerance: Tolerance) -> tuple[Comparison, str]:
    """How the weights after a step compare, with the difference in words."""
    found = _compare_all(old.weights, new.weights, tolerance)
    return found, f"weights after step {old.step}: {_changes(old.weights, new.weights)}"


def _compare_all(
    old: Mapping[str, Measured], new: Mapping[str, Measured], tolerance: Tolerance, *, relative: float | None = None
) -> Comparison:
    if old.keys() != new.keys():
        return "differs"
    return _worst(tolerance.compare(old[name], new[name], relative=relative) for name in old)


def _compare_terms(old: BatchLine, new: BatchLine, tolerance: Tolerance) -> tuple[Comparison, str]:
    place = f"epoch {old.epoch + 1}, batch {old.batch + 1} (step {old.step})"
    if old.terms.keys() != new.terms.keys():
        return "differs", f"terms of {place}: {', '.join(old.terms)} → {', '.join(new.terms)}"
    each = {name: tolerance.compare_numbers(old.terms[name], new.terms[name]) for name in old.terms}
    changed = [
        f"{name} {_number(old.terms[name], new.terms[name])}" for name, found in each.items() if found == "differs"
    ]
    return _worst(each.values()), f"{place}: {', '.join(changed)}"


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    found = {*comparisons}
    return "differs" if "differs" in found else "close" if "close" in found else "equal"


def _changes(old: Mapping[str, Measured], new: Mapping[str, Measured]) -> str:
    """The names whose digests differ, with the first digits of these."""
    changed = []
    for name in {**old, **new}:
        before, after = (each[name].digest[:8] if name in each else "none" for each in (old, new))
        if before != after:
            changed.append(f"{printable(name)} {before} → {after}")
    return ", ".join(changed[:_MAX_SHOWN])


def _number(old: str, new: str) -> str:
    """Two numbers, with as many digits as tell them apart."""
    before, after = float.fromhex(old), float.fromhex(new)
    digits = next((digits for digits in range(4, 17) if f"{before:.{digits}g}" != f"{after:.{digits}g}"), 17)
    return f"{before:.{digits}g} → {after:.{digits}g}"


def _of(names: Sequence[str]) -> str:
    return f" ({', '.join(map(printable, names))})" if names else ""


def _differing(old: BatchLine, new: BatchLine, names: Sequence[str]) -> list[str]:
    """The samples whose pixels differ, in any view; each has a checksum of 8 digits."""
    wrong = set()
    for view, measured in old.pixels.items():
        before, after = measured.digest, new.pixels[view].digest if view in new.pixels else ""
        if len(before) == len(after) == 8 * len(names):
            wrong |= {row for row in range(len(names)) if before[8 * row : 8 * row + 8] != after[8 * row : 8 * row + 8]}
    return [names[row] for row in sorted(wrong)]


def _shown(samples: Sequence[int]) -> str:
    return ", ".join(map(str, samples)) or "none"
