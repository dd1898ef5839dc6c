"""The folder of a run: its config, environment, log, history, checkpoints and results."""

import hashlib
import json
import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.training.environment import command_line, describe_environment
from kd_pipeline.training.run_lock import lock_folder

__all__ = ["RunFolder"]

_logger = logging.getLogger("kd_pipeline")

_OWN_FILES = (
    *("checkpoints", "config.yaml", "environment.json", "history.jsonl", "metrics.csv", "train.log", "result.json"),
    *("exported", "tensorboard", "bad_samples.jsonl", "curves.png", "confusion_*.png"),
)
"""What a stage writes about a single run. Not class lists, the folders of other stages, nor the files of loggers that
keep several runs apart themselves. The checkpoints come first: a kill in between leaves nothing to resume from."""


class RunFolder:
    """Where a stage writes, and the names of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.exported = path / "exported"
        self.metrics = path / "metrics.csv"
        self.log = path / "train.log"
        self.result = path / "result.json"
        self.history = path / "history.jsonl"
        self._step: Callable[[], int] | None = None
        """The current step of a training whose end is not in the history yet."""

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if there is one."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    @contextmanager
    def session(self, name: str) -> Iterator[None]:
        """Lock the folder, and keep in `train.log` what is logged, the command and how it ended. Call it on one rank.

        Args:
            name: what is done, for the first line in `train.log`.

        Raises:
            StateError: another process uses the folder.
            ConfigError: the folder cannot be written to.
        """
        with self._locked(), self._logging():
            self.write_log(f"{f' {_now()} {name}, kd_pipeline {__version__} ':=^110}\n{command_line()}")
            try:
                yield
            except BaseException as exc:
                self.record_end(_outcome(exc))
                self.write_log(_error_text(exc))
                raise

    def archive(self) -> Path | None:
        """Move the files of the run in this folder to `earlier/1`, or the next free number. Call it on one rank.

        Returns:
            The new folder; None if there was no run.

        Raises:
            StateError: another process uses the folder.
            ConfigError: the folder cannot be written to.
        """
        with self._locked():
            target = self._move_away(self._own_files())
            if target is not None:
                self.write_log(f"the earlier run was moved to {target}")
        return target

    def set_aside_leftovers(self) -> None:
        """Move what is left of a run without a last checkpoint, before another one starts. Call it in `session`."""
        leftovers = [file for file in self._own_files() if file != self.log]
        if self.exported.exists() or self.result.exists() or any(self.checkpoints.glob("best*")):
            _logger.warning(
                "%s has no checkpoint to resume from, so training starts from the beginning; what was left of an "
                "earlier run was moved to %s",
                *(self.path, self._move_away(leftovers)),
            )

    def write_config(self, config: BaseModel) -> None:
        """Write the config and the versions of all installed packages, of a run that is about to train with them.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        settings = config.model_dump(mode="json", exclude_none=True)
        try:
            write_atomic(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
            write_atomic(self.path / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
        except OSError as exc:
            raise ConfigError(f"run_dir: cannot write to {self.path}: {exc.strerror}; choose a different one") from None

    def record_start(self, step: Callable[[], int], **fields: Any) -> None:
        """Add to the history that a training starts now, and `fields` about it; `session` adds how it ends.

        A start without an end was killed.
        """
        about = {"command": command_line(), "host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self._record("start", step=step(), **fields, **about)
        self._step = step

    def record_end(self, outcome: str) -> None:
        """Add to the history how the training that was started last has ended, if it has not been added yet."""
        if self._step is not None:
            self._record("end", step=self._step(), outcome=outcome)
            self._step = None

    def write_log(self, text: str) -> None:
        """Append `text` to `train.log` alone."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the final metrics to `result.json`."""
        write_atomic(self.result, json.dumps(result, indent=2) + "\n")

    def record_results(self, made_from: str, step: int, changes: Sequence[str]) -> None:
        """Add to the history that `result.json` and the files in `exported` are complete, and what they were made from.

        Args:
            made_from: a digest of all that they depend on.
            step: of the last checkpoint.
            changes: of the config since that checkpoint was saved.
        """
        self._record("results", step=step, changes=[*changes], made_from=made_from, files=self._result_digests())

    def has_results(self, made_from: str) -> bool:
        """Whether `result.json` and the files in `exported` were made from the same, and are all as they were."""
        recorded = [event for event in self.events() if event.get("event") == "results"]
        if not recorded or recorded[-1].get("made_from") != made_from:
            return False
        files: dict[str, str] = recorded[-1].get("files", {})
        return bool(files) and files.items() <= self._result_digests().items()

    def events(self) -> list[dict[str, Any]]:
        """The lines of `history.jsonl`; a line that a full disk or a crash has cut off is left out."""
        if not self.history.is_file():
            return []
        found = []
        for line in self.history.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [event for event in found if isinstance(event, dict)]

    def _own_files(self) -> list[Path]:
        return [file for pattern in _OWN_FILES for file in sorted(self.path.glob(pattern))]

    def _move_away(self, files: list[Path]) -> Path | None:
        """Move `files` to the next folder in `earlier`, which is returned; None for no files."""
        if not files:
            return None
        numbers = [int(path.name) for path in (self.path / "earlier").glob("*") if path.name.isdecimal()]
        target = self.path / "earlier" / str(max(numbers, default=0) + 1)
        try:
            target.mkdir(parents=True)
            for file in files:
                file.rename(target / file.name)
        except OSError as exc:
            raise ConfigError(f"run_dir: cannot move {exc.filename} to {target}: {exc.strerror}") from None
        return target

    def _record(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": _now(), "event": event, **fields}, ensure_ascii=False)
        with self.history.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def _result_digests(self) -> dict[str, str]:
        files = [self.result, *sorted(self.exported.glob("*"))]
        return {str(file.relative_to(self.path)): _sha256(file) for file in files if file.is_file()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with lock_folder(self.path, otherwise="set a different run_dir"):
            yield

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Copy everything that the library logs to `train.log`."""
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = _logger.level
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            _logger.removeHandler(handler)
            _logger.setLevel(level)
            handler.close()


def _outcome(exc: BaseException) -> str:
    if isinstance(exc, SystemExit):
        return f"stopped with exit status {exc.code}"
    return f"{type(exc).__name__}: {exc}".rstrip(": ")


def _error_text(exc: BaseException) -> str:
    """An error for `train.log`; with a traceback, unless its message is written for users."""
    if isinstance(exc, SystemExit):
        return f"{_now()} ended with exit status {exc.code}"
    text = _outcome(exc)
    if not isinstance(exc, KDPipelineError | KeyboardInterrupt):
        text += "\n" + "".join(traceback.format_exception(exc)).rstrip()
    return f"{_now()} ERROR {text}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
