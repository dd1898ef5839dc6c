"""What the folder of a run says about it, for a report: read with bounds, as somebody else may have written it."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from kd_pipeline._core.files import open_regular, read_regular
from kd_pipeline._core.secret_values import hide_in_settings, hide_in_text
from kd_pipeline._core.text import printable
from kd_pipeline.config.reader import read_text
from kd_pipeline.config.yaml import Place, parse
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.report.metrics_rows import read_columns
from kd_pipeline.report.points import Point
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.results import read_evaluations
from kd_pipeline.workflows.stage import Stage

__all__ = ["LogLine", "RunRecord", "Training", "find_runs", "inside", "read_json", "read_run"]

_MARKS = ("history.jsonl", "config.yaml", "result.json", "metrics.csv")
"""A folder with one of these is that of a run."""
_NO_RUNS = {"checkpoints", "earlier", "exported", "check", "lists", "tensorboard", "wandb", "mlruns"}
"""Folders in that of a run which are none themselves."""
_MAX_RUNS = 24
_MAX_LOG, _MAX_LINES, _MAX_LINE = 2**25, 20_000, 2000
_MAX_JSON = 2**22
_MAX_SPLITS = 12
_MAX_POINTS = 1_000_000
"""Numbers of `metrics.csv` that are kept."""
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) (.*)")
_TITLED = re.compile(r"(stage|teacher|student|images|rows|samples|epochs|device|resumed) {2,}(\S.*)")
_TIMED = re.compile(r"([^:]{1,80}(?::[^:]{1,40})?): (\d{1,9}\.\d) s")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of `train.log`."""

    level: str
    """Such as `INFO`."""
    text: str


@dataclass(frozen=True, slots=True)
class Training:
    """One start of a training, from the history."""

    began: datetime | None
    ended: datetime | None
    """None if it was killed, or is running."""
    first_step: int
    last_step: int | None
    outcome: str
    """`trained`, or how else it has ended; empty if it has no end."""
    command: str
    host: str
    processes: int
    version: str
    changes: tuple[str, ...]
    """Of the config since the start before."""

    @property
    def duration(self) -> timedelta | None:
        """From start to end, validations included."""
        return None if self.began is None or self.ended is None else max(self.ended - self.began, timedelta())


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run, or one stage or student of it; what its folder lacks is empty."""

    name: str
    path: Path
    part_of: str
    """Name of the run whose stage or student this is; empty for a run that was named."""
    config: Mapping[str, Any]
    """Plain values without secrets."""
    environment: Mapping[str, Any]
    trainings: Sequence[Training]
    results_at: datetime | None
    """When its results were complete."""
    results_step: int | None
    metrics: Mapping[str, Sequence[Point]]
    """Steps and finite values of each column."""
    evaluations: Mapping[str, Evaluation]
    log: Sequence[LogLine]
    fingerprints: Mapping[str, str]
    """Of the data, by split."""
    problems: Sequence[str] = field(default=())
    """What could not be read, a sentence each."""

    @property
    def stage(self) -> Stage:
        """Which stage it is."""
        stage = self.setting("stage")
        return "teacher" if stage == "teacher" else "baseline" if stage == "baseline" else "distill"

    @property
    def title(self) -> str:
        """What the network is called that it has trained."""
        return {"teacher": "teacher", "baseline": "student alone"}.get(self.stage, "student")

    def setting(self, key: str) -> Any:
        """The value under a dotted key of the config; None if there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def told(self, title: str) -> str:
        """What the last start has logged under a title, such as `device`; empty if nothing."""
        found = [match[2] for line in self.log if (match := _TITLED.fullmatch(line.text)) and match[1] == title]
        return found[-1] if found else ""

    def seconds(self) -> dict[str, float]:
        """Seconds of what was timed after the last training, by its title."""
        found: dict[str, float] = {}
        for line in self.log:
            if _TITLED.fullmatch(line.text):
                found = {}
            elif line.level == "INFO" and (match := _TIMED.fullmatch(line.text)):
                found[match[1]] = float(match[2])
        return found


def find_runs(path: Path) -> list[tuple[str, Path]]:
    """A run with its stages and students, by the name of their folder in that of the run, which has none.

    Raises:
        ConfigError: `path` is not the folder of a run.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not the folder of a run; name the folder that run_dir says")
    found = [("", path)] if _is_run(path) else []
    try:
        names = sorted(os.listdir(path))
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be listed: {exc.strerror}; name the folder of a run that you may read"
        ) from None
    for name in names:
        if name not in _NO_RUNS and not (path / name).is_symlink() and _is_run(path / name):
            found.append((name, path / name))
    if not found:
        raise ConfigError(
            f"{path} is not the folder of a run: it has no {', '.join(_MARKS[:-1])} or {_MARKS[-1]}; name the folder "
            "that run_dir says"
        )
    return found[:_MAX_RUNS]


def read_run(path: Path, name: str, part_of: str = "") -> RunRecord:
    """Read the folder of a run; what cannot be read is one of its `problems`."""
    problems: list[str] = []

    def attempt(read: Callable[[], Value], default: Value) -> Value:
        try:
            return read()
        except (KDPipelineError, OSError) as exc:
            problems.append(hide_in_text(printable(exc.strerror if isinstance(exc, OSError) else exc)))
            return default

    folder = RunFolder(path)
    no_events: list[dict[str, Any]] = []
    events = attempt(lambda: no_events if inside(path, "history.jsonl") is None else folder.events(), no_events)
    trainings, results_at, results_step, fingerprints = _history(events)
    return RunRecord(
        name=name,
        path=path,
        part_of=part_of,
        config=attempt(lambda: _config(path), {}),
        environment=attempt(lambda: read_json(path, "environment.json"), {}),
        trainings=trainings,
        results_at=results_at,
        results_step=results_step,
        metrics=attempt(lambda: _metrics(path), {}),
        evaluations=attempt(lambda: _evaluations(path), {}),
        log=attempt(lambda: [*_log(path)], []),
        fingerprints=fingerprints,
        problems=problems,
    )


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of a run's folder; None if it is not there.

    Raises:
        StateError: it is a link that leads out of the folder, whose owner could have any file shown.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    # Not `Path.resolve`, which fails on a link to itself.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise StateError(f"{path} is a link that leads out of the folder of its run, and is left out")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a run's folder, without secrets; empty if there is no such file.

    Raises:
        StateError: it cannot be read, or is no object.
    """
    if (path := inside(folder, name)) is None:
        return {}
    try:
        content = json.loads(read_regular(path, max_bytes=_MAX_JSON))
    except OSError as exc:
        raise StateError(f"{path} cannot be read: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:
        raise StateError(f"{path} is not JSON ({printable(exc)[:200]})") from None
    if not isinstance(content, dict):
        raise StateError(f"{path} should hold an object of JSON")
    try:
        found: dict[str, Any] = hide_in_settings(content)
    except RecursionError:
        raise StateError(f"{path} is nested too deeply") from None
    return found


def _is_run(path: Path) -> bool:
    return path.is_dir() and any(os.path.lexists(path / name) for name in _MARKS)


def _config(path: Path) -> dict[str, Any]:
    if (file := inside(path, "config.yaml")) is None:
        return {}
    found, _ = parse(read_text(file), lambda line: Place(line, f"{file}:{line}"))
    if not isinstance(found, dict):
        raise ConfigError(f"{file} should hold a mapping")
    hidden: dict[str, Any] = hide_in_settings(found)
    return hidden


def _metrics(path: Path) -> dict[str, list[Point]]:
    file = inside(path, "metrics.csv")
    return {} if file is None else read_columns(file, max_numbers=_MAX_POINTS)


def _evaluations(path: Path) -> dict[str, Evaluation]:
    if (file := inside(path, "result.json")) is None:
        return {}
    return dict(islice(read_evaluations(file).items(), _MAX_SPLITS))


def _log(path: Path) -> Iterator[LogLine]:
    """The last lines of `train.log`."""
    if (file := inside(path, "train.log")) is None:
        return
    with open_regular(file) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _MAX_LOG))
        text = stream.read(_MAX_LOG).decode(errors="replace")
    for line in text.splitlines()[-_MAX_LINES:]:
        if match := _LOG_LINE.fullmatch(line[:_MAX_LINE]):
            yield LogLine(match[1], hide_in_text(match[2]))


def _history(
    events: Sequence[Mapping[str, Any]],
) -> tuple[list[Training], datetime | None, int | None, dict[str, str]]:
    """Every training, when the results were complete and at which step, and the fingerprints of the data."""
    found: list[Training] = []
    results_at, results_step, fingerprints = None, None, {}
    for event in events:
        at = _time(event.get("time"))
        match event.get("event"):
            case "start":
                results_at = results_step = None
                found.append(_started(event, at))
                if isinstance(data := event.get("data"), Mapping):
                    fingerprints = {split: _words(digest) for split, digest in data.items()}
            case "end" if found:
                step = _whole(event.get("step"))
                found[-1] = replace(found[-1], ended=at, last_step=step, outcome=_words(event.get("outcome")))
            case "results":
                results_at, results_step = at, _whole(event.get("step"))
    return found, results_at, results_step, fingerprints


def _started(event: Mapping[str, Any], at: datetime | None) -> Training:
    changes = event.get("changes")
    return Training(
        began=at,
        ended=None,
        first_step=_whole(event.get("step")) or 0,
        last_step=None,
        outcome="",
        command=_words(event.get("command")),
        host=_words(event.get("host")),
        processes=max(1, _whole(event.get("processes")) or 1),
        version=_words(event.get("version")),
        changes=tuple(map(_words, changes)) if isinstance(changes, list) else (),
    )


def _time(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if found is None or found.tzinfo is not None else found.astimezone()


def _words(value: object) -> str:
    return hide_in_text(value[:_MAX_LINE]) if isinstance(value, str) else ""


def _whole(value: object) -> int | None:
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if is_step else None  # type: ignore[return-value]
