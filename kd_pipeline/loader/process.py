"""What a loader cannot do with other processes: be copied to them, or be used after a fork."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakSet

from kd_pipeline.errors import StateError

__all__ = ["NotCopiedError", "OwnProcess"]


class NotCopiedError(StateError, TypeError):
    """A loader was pickled or copied; a TypeError, as for all that cannot be."""

    def __init__(self) -> None:
        super().__init__(
            "a loader cannot be pickled or copied, because DALI's threads and buffers belong to this process. Make it "
            "in the process that uses it (with Lightning, in train_dataloader, or use strategy='ddp' instead of "
            "'ddp_spawn'), and continue there with load_state_dict(state), state being its state_dict()"
        )


class OwnProcess:
    """The process that a loader works in, and what must not be freed in its forked children.

    The threads of DALI, and of a teacher's runtime, do not exist in a child, so to free their owners there would crash
    or hang. They are left in its memory, as the operating system will free them.
    """

    def __init__(self, works_with: Callable[[], list[Any]]) -> None:
        """`works_with` returns the objects that have threads."""
        self._works_with = works_with
        self._is_in_use = False
        self._parent: int | None = None
        _all.add(self)

    def use(self) -> None:
        """Note that there are threads from now on.

        Raises:
            StateError: this is a forked child of the process that has them.
        """
        self.check()
        self._is_in_use = True

    @property
    def is_foreign(self) -> bool:
        """Whether the threads are those of the parent."""
        return self._parent is not None

    def check(self) -> None:
        """Refuse to be used in a forked child.

        Raises:
            StateError: this is one.
        """
        if self._parent is not None:
            raise StateError(
                f"this loader belongs to process {self._parent}, of which this one ({os.getpid()}) is a fork; the "
                "threads of DALI and of a teacher are not forked with it. Make the loader in the child, and to "
                "continue at a position call load_state_dict(state) there, state being its state_dict()"
            )

    def _leave(self, parent: int) -> None:
        """In a child: keep what the parent's threads use as it is."""
        if self._is_in_use and self._parent is None:
            self._parent = parent
            for each in self._works_with():
                _never_free(each)


_all: WeakSet[OwnProcess] = WeakSet()


def _leave_all() -> None:
    for process in list(_all):
        process._leave(os.getppid())
    # DALI shuts all of its pipelines down when the interpreter exits.
    pipelines: set[Any] = getattr(getattr(sys.modules.get("nvidia.dali.pipeline"), "Pipeline", None), "_pipes", set())
    for reference in list(pipelines):
        if (pipeline := reference()) is not None:
            _never_free(pipeline._pipe)
            pipeline._pipe = None
    pipelines.clear()


def _never_free(owner: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_leave_all)


def refuse_copy(self: object, protocol: object = None) -> NoReturn:
    """As a class's `__reduce_ex__`: it cannot be pickled, nor copied."""
    raise NotCopiedError
