"""A validation's line below the bar of Lightning, which shows none: the validation sets are not the trainer's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kd_pipeline._core.progress import Report, no_report

__all__ = ["validation_bar"]


@contextmanager
def validation_bar(trainer: Any, title: str) -> Iterator[Report]:
    """A line in the live display of `trainer` while the block runs; none if it has no display, or not that of rich."""
    display = getattr(trainer.progress_bar_callback, "progress", None)
    if display is None:
        yield no_report
        return
    tasks: list[Any] = []

    def report(done: int, total: int) -> None:
        if not tasks:
            tasks.append(display.add_task(title, total=total))
        display.update(tasks[0], completed=done)
        trainer.progress_bar_callback.refresh()

    try:
        yield report
    finally:
        for task in tasks:
            display.remove_task(task)
