"""Which of several students the current thread trains, for what is logged, and drawn on the terminal."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["as_student", "current_student", "of_current_student", "with_student"]

_current: ContextVar[str | None] = ContextVar("student", default=None)


def current_student() -> str | None:
    """The name of the student; None in a run of one student, and outside of a run."""
    return _current.get()


@contextmanager
def as_student(name: str) -> Iterator[None]:
    """Say that this thread trains the student `name` while the block runs."""
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def with_student(text: str) -> str:
    """`text` after the name of the current student, if there are several: `[small] epoch 1/2`."""
    student = current_student()
    return text if student is None else f"[{student}] {text}"


def of_current_student() -> Callable[[logging.LogRecord], bool]:
    """A filter of log records for the file of the current student: its own, and those of no student in particular."""
    own = current_student()
    return lambda record: own is None or current_student() in (None, own)
