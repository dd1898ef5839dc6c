"""Several students that train in turn: each in a thread of its own, of which exactly one runs at any time."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from kd_pipeline._core.current_student import add_wait, as_student
from kd_pipeline.training.rng import RngState

__all__ = ["Abandoned", "Served", "Turns"]

Request = TypeVar("Request")
Reply = TypeVar("Reply")


def _closed_lock() -> threading.Lock:
    """A lock that one thread waits for, and another opens; faster than a semaphore, which is made of two."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Abandoned(BaseException):
    """Ends the thread of a student because the run of all ends; no handler of `Exception` keeps it."""


class Served(NamedTuple, Generic[Reply]):
    """What some of the waiting students get."""

    names: Iterable[str]
    reply: Callable[[], Reply]
    """Called for each of them, in the thread of `run`; what it raises is raised where they wait."""


class Work(Protocol):
    """What a student does from its first turn to its end."""

    def __call__(self) -> object:
        """Do it."""


class Turns(Generic[Request, Reply]):
    """Gives each student the turn until it asks for something that is shared, such as the next batch.

    When all wait, the thread that called `run` answers some of them, and these have their turns one after the other, in
    the order of their names. So whatever is shared is used by one thread, and by one student at a time. The random
    state of the process is each student's own, and changes with the turn.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._students = {name: _Student(name) for name in names}
        self._came_back = _closed_lock()
        self._holder: _Student | None = None
        """Whose random state is that of the process; None for that of the calling thread."""
        self._rng: RngState | None = None
        """That of the calling thread, while it is not that of the process."""
        self._served_s = 0.0
        """Spent on answers, for which all wait."""

    def take(self, name: str, request: Request) -> Reply:
        """Give the turn away, and wait for the answer to `request`; call it in the thread of the student `name`.

        Raises:
            Exception: what the answer raised.
            Abandoned: the run of all ends.
        """
        student = self._students[name]
        student.request = request
        started, served_s = time.perf_counter(), self._served_s
        self._came_back.release()
        student.turn.acquire()
        add_wait(time.perf_counter() - started - (self._served_s - served_s))
        reply, student.reply = student.reply, None
        if isinstance(reply, BaseException):
            raise reply
        return reply  # type: ignore[no-any-return]

    @property
    def living(self) -> list[str]:
        """Names of the students that have not ended."""
        return [name for name, student in self._students.items() if not student.has_ended]

    def run(
        self,
        works: Mapping[str, Work],
        serve: Callable[[Mapping[str, Request]], Served[Reply]],
        ended: Callable[[str, BaseException | None], None] = lambda name, error: None,
    ) -> dict[str, Any]:
        """Do the work of all students, and return what each returned or raised.

        Args:
            works: by name; what is done in the thread of the student.
            serve: is given the requests of all students that have not ended, and answers some of them.
            ended: is called when a student has ended, with what it raised.
        """
        initial = RngState.capture()
        try:
            for name, student in self._students.items():
                student.start(works[name], initial, self._came_back)
                self._give_turn(student, ended)
            while waiting := {name: each.request for name, each in self._students.items() if each.is_waiting}:
                names, reply = serve(waiting)
                self._take_rng(None)  # for what the first of them waits for; the others get the same
                for name in names:
                    self._answer(self._students[name], reply)
                    self._give_turn(self._students[name], ended)
        finally:
            self._abandon()
            self._take_rng(None)
        return {name: student.outcome for name, student in self._students.items()}

    def _answer(self, student: "_Student", reply: Callable[[], Reply]) -> None:
        """Have the reply made, in the time of all."""
        started = time.perf_counter()
        try:
            student.reply = reply()
        except Exception as exc:
            student.reply = exc
        self._served_s += time.perf_counter() - started

    def _give_turn(self, student: "_Student", ended: Callable[[str, BaseException | None], None]) -> None:
        self._take_rng(student)
        student.turn.release()
        try:
            self._came_back.acquire()
        except BaseException:  # a signal's handler raised here, and the student still has its turn
            self._came_back.acquire()
            raise
        if student.has_ended:
            student.join()
            error = student.outcome if student.has_failed else None
            ended(student.name, error)

    def _take_rng(self, holder: "_Student | None") -> None:
        """Let the process have the random state of `holder`, and keep that of the one before."""
        if holder is self._holder:
            return
        current = RngState.capture()
        if self._holder is None:
            self._rng = current
        else:
            self._holder.rng = current
        wanted = self._rng if holder is None else holder.rng
        assert wanted is not None
        wanted.restore()
        self._holder = holder

    def _abandon(self) -> None:
        """End the threads that are left, which is none unless something failed."""
        for student in self._students.values():
            while student.is_waiting:
                student.reply = Abandoned("the run of all students has ended")
                self._take_rng(student)
                student.turn.release()
                self._came_back.acquire()
            student.join()


class _Student:
    """The thread of a student, and what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = _closed_lock()
        self.request: Any = None
        self.reply: Any = None
        self.rng: RngState | None = None
        self.outcome: Any = None
        """What its work returned or raised."""
        self.has_failed = self.has_ended = False
        self._thread: threading.Thread | None = None

    def start(self, work: Work, rng: RngState, came_back: threading.Lock) -> None:
        """Start the thread, which waits for its first turn."""
        self.rng = rng
        self._thread = threading.Thread(target=self._run, args=(work, came_back), name=f"student {self.name}")
        self._thread.daemon = True  # a second Ctrl-C ends the process, whatever it does
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread is not None:
            self._thread.join()

    @property
    def is_waiting(self) -> bool:
        """Whether the thread runs, which then waits: it is not its turn."""
        return self._thread is not None and not self.has_ended

    def _run(self, work: Work, came_back: threading.Lock) -> None:
        self.turn.acquire()
        try:
            with as_student(self.name):
                self.outcome = work() if not isinstance(self.reply, Abandoned) else self.reply
        except BaseException as exc:
            self.outcome, self.has_failed = exc, True
            traceback.clear_frames(exc.__traceback__)  # which hold its network and its optimizer
        finally:
            self.has_ended = True
            came_back.release()
