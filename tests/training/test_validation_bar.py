"""Validation shows in Lightning's own display, while it runs."""

from io import StringIO
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kd_pipeline.training.validation_bar import validation_bar


def trainer_with(display: Progress | None) -> Any:
    return SimpleNamespace(progress_bar_callback=SimpleNamespace(progress=display, refresh=lambda: None))


def test_line_is_there_while_it_validates() -> None:
    display = Progress(console=Console(file=StringIO()))
    with validation_bar(trainer_with(display), "val") as report:
        assert display.tasks == []
        report(2, 5)
        (task,) = display.tasks
        assert (task.description, task.completed, task.total) == ("val", 2, 5)
    assert display.tasks == []


def test_no_display_is_fine() -> None:
    for trainer in (trainer_with(None), SimpleNamespace(progress_bar_callback=None)):
        with validation_bar(trainer, "val") as report:
            report(1, 2)
