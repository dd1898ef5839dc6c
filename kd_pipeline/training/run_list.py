"""The runs in a folder: what ran when, how far it came, how it ended, and how good its network is."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_pipeline._core.files import read_regular
from kd_pipeline._core.text import printable
from kd_pipeline.errors import DataError, StateError
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_lock import is_locked

__all__ = ["RunSummary", "list_runs", "runs_table"]

_MAX_DEPTH = 3
"""Folders between the one that is listed and a run: `runs/sweep/mine/teacher`."""
_MAX_BYTES = 2**25
_METRICS = ("top1", "miou", "knn_top1", "loss")
"""Of which the first that was measured is shown."""
_PERCENT = ("top1", "miou", "knn_top1")
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run, as its folder tells it."""

    path: Path
    run_id: str
    """Empty for a run of a release that gave none."""
    stage: str
    started: str
    """When it was started last."""
    status: str
    """`running`, `finished`, `killed`, or how it ended."""
    metric: str
    """Such as `val/top1 91.3%`; empty before there are results."""

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows."""
        return self.run_id, str(self.path), self.stage, self.started[:16], self.status, self.metric


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs at `folder` and up to three folders below it, the one that was started last first.

    Links are not followed, and runs that were moved to `earlier` are left out.

    Raises:
        DataError: there is no such folder, or it cannot be listed.
    """
    try:
        os.listdir(folder)
    except OSError as exc:
        raise DataError(f"{folder} cannot be listed: {exc.strerror}; name a folder with runs in it") from None
    found = (_summary(path) for path in _run_folders(folder, _MAX_DEPTH))
    return sorted((each for each in found if each is not None), key=lambda each: each.started, reverse=True)


def runs_table(runs: list[RunSummary]) -> str:
    """A line for each run, after the titles."""
    lines = [("id", "folder", "stage", "started", "status", "result"), *(each.cells for each in runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "history.jsonl").is_file():
        yield folder
    if depth == 0:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        names = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
        for name in sorted(names):
            if not name.startswith(".") and name != "earlier":
                yield from _run_folders(folder / name, depth - 1)


def _summary(path: Path) -> RunSummary | None:
    """None for a folder whose history is of nothing that was started."""
    folder = RunFolder(path)
    try:
        events = folder.events()
    except StateError:
        return None
    starts = [event for event in events if event.get("event") == "start"]
    if not starts:
        return None
    stage, started = (_text(starts[-1].get(name)) for name in ("stage", "time"))
    return RunSummary(
        path, folder.known_id(events) or "", stage, started, _status(path, events), _metric(folder.result)
    )


def _status(path: Path, events: list[dict[str, Any]]) -> str:
    if is_locked(path):
        return "running"
    last = events[-1]
    match last.get("event"):
        case "results":
            return "finished"
        case "end":
            return _text(last.get("outcome"))
    return "killed"


def _metric(result: Path) -> str:
    """What a result says of the split `val`, or else of its first split."""
    try:
        found = json.loads(read_regular(result, max_bytes=_MAX_BYTES))
        split = "val" if "val" in found else next(iter(found))
        measured = {**found[split]["metrics"], **found[split]}
        name = next(name for name in _METRICS if isinstance(measured.get(name), float | int))
        value = float(measured[name])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
        return ""
    return f"{_text(split)}/{name} {value:.1%}" if name in _PERCENT else f"{_text(split)}/{name} {value:.4g}"


def _text(value: object) -> str:
    text = printable(value if isinstance(value, str) else "")
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
