"""Which of several students the current thread trains, for what is logged, and drawn on the terminal."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["add_wait", "as_student", "current_student", "of_current_student", "waited_s", "with_student"]

_thread = threading.local()
"""`waited_s`: what the current thread has waited for the turns of other students."""
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


def waited_s() -> float:
    """Seconds that the current thread has waited while other students trained."""
    found: float = getattr(_thread, "waited_s", 0.0)
    return found


def add_wait(seconds: float) -> None:
    """Count that the current thread has waited."""
    _thread.waited_s = waited_s() + seconds


def of_current_student() -> Callable[[logging.LogRecord], bool]:
    """A filter of log records for the file of the current student: its own, and those of no student in particular."""
    own = current_student()
    return lambda record: own is None or current_student() in (None, own)
