"""How each of several students has ended, agreed upon by all ranks, which would else wait for each other forever."""

from datetime import timedelta
from typing import Any

import torch.distributed

from kd_pipeline._core.ranks import world_size
from kd_pipeline.errors import StateError

__all__ = ["StudentOutcomes"]

_OUTCOMES = ("done", "failed", "stopped")
_PATIENCE = timedelta(minutes=2)
"""For the other ranks, where a student failed on this one: they may not know, and wait for it."""
_FOREVER = timedelta(days=7)
"""For rank zero, which exports a student while the others wait."""


class StudentOutcomes:
    """Compares the ends of a student on all ranks, by messages that meet no others; make it on all ranks."""

    def __init__(self) -> None:
        self._group: Any = None
        if world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_FOREVER)

    def agree(self, name: str, error: BaseException | None) -> None:
        """Check that a student ended alike on all ranks; call it on all ranks when it has ended.

        Args:
            name: of the student.
            error: what it raised on this rank; None if it has reached its end.

        Raises:
            StateError: it failed on some ranks only, so all students have to stop.
        """
        if self._group is None:
            return
        outcome = "done" if error is None else "failed" if isinstance(error, Exception) else "stopped"
        own = torch.tensor([_OUTCOMES.index(outcome)])
        found = [torch.empty_like(own) for _ in range(world_size())]
        try:
            work: Any = torch.distributed.all_gather(found, own, group=self._group, async_op=True)
            work.wait(_PATIENCE if outcome == "failed" else _FOREVER)
        except RuntimeError:
            found = []
        if [each.item() for each in found] != [own.item()] * world_size():
            why = "" if error is None else f". It raised {type(error).__name__}: {error}"
            raise StateError(
                f"student {name} {outcome} on this rank and not on all, which cannot go on together; what was saved is "
                f"intact, and the same command resumes all students{why}"
            ) from error
