"""The folder of a run: its config, environment, log, history, checkpoints and results."""

import hashlib
import io
import json
import logging
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from pydantic import BaseModel

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.current_student import current_student, of_current_student, with_student
from kd_pipeline._core.files import open_own, open_regular
from kd_pipeline._core.library_output import LIBRARIES
from kd_pipeline._core.secret_values import hide_in_text
from kd_pipeline._core.text import printable
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ConfigError, KDPipelineError, StateError
from kd_pipeline.training.environment import command_line, describe_environment, shown_settings
from kd_pipeline.training.run_lock import LOCK, lock_folder

__all__ = ["RunFolder"]

_logger = logging.getLogger("kd_pipeline")

_OWN_FILES = (
    *("checkpoints", "config.yaml", "environment.json", "history.jsonl", "metrics.csv", "train.log", "result.json"),
    *("evidence.jsonl", "exported", "tensorboard", "bad_samples.jsonl", "curves.png", "confusion_*.png"),
    *("first_batch.png", "predictions_*", "samples_*.png"),
)
"""What a stage writes about a single run. Not class lists, the folders of other stages, nor the files of loggers that
keep several runs apart themselves. The checkpoints come first: a kill in between leaves nothing to resume from."""
_ALSO_WRITTEN = ("classes.json", "check", "comet*", "earlier", "lists", "mlflow.db*", "mlruns", LOCK, "wandb")
"""What else a stage and its loggers write, none of which may lead out of the folder."""
_FILLED_BY_LIBRARIES = ("checkpoints", "exported", "tensorboard")
"""Folders in which files are opened that may be there already. Not that of wandb, which makes links itself, and files
with names of their own."""
_PRIVATE = 0o600
"""Permissions of what holds the command and the config: it may have secrets in it that nothing marks as such. Weights,
metrics and results, which are for others, follow the umask."""
_ID = re.compile("[0-9a-f]{8}")
_MAX_HISTORY = 8 * 2**20
"""Bytes of `history.jsonl`; a start takes about 500."""


class RunFolder:
    """Where a stage writes, and the names of its files."""

    def __init__(self, path: Path, *, is_named: bool = True) -> None:
        """The folder at `path`, which may be a link only if the user named it; `is_named` says so."""
        self.path = path
        self._is_named = is_named
        self.checkpoints = path / "checkpoints"
        self.exported = path / "exported"
        self.metrics = path / "metrics.csv"
        self.log = path / "train.log"
        self.result = path / "result.json"
        self.history = path / "history.jsonl"
        self.evidence = path / "evidence.jsonl"
        self.lists = path / "lists"
        self._id: str | None = None
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
            StateError: another process uses the folder, or something in it is a link that leads out of it.
            ConfigError: the folder cannot be written to.
        """
        with self._locked(), self._logging():
            self.write_log(f"{f' {_now()} {name}, kd_pipeline {__version__} ':=^110}\n{command_line()}")
            try:
                yield
            except BaseException as exc:
                with suppress(StateError):  # on a full disk, say what filled it
                    self.record_end(_outcome(exc))
                    self.write_log(_error_text(exc))
                raise

    def archive(self) -> Path | None:
        """Move the files of the run in this folder to `earlier/1`, or the next free number. Call it on one rank.

        Returns:
            The new folder; None if there was no run.

        Raises:
            StateError: another process uses the folder, or something in it is a link that leads out of it.
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

    def write_lists(self, lists: Mapping[str, str], *, fresh: bool = False) -> None:
        """Write the lists of images, by the name of the file, that a run of this folder will read. Call it on one rank.

        Args:
            lists: the text of each list.
            fresh: whether an earlier run in the folder is to start from the beginning.

        Raises:
            StateError: the run in this folder has begun with other images, another process uses the folder, or
                something in it is a link that leads out of it.
            ConfigError: the folder cannot be written to.
        """
        with self._locked():
            changed = {name: text for name, text in lists.items() if not _has_text(self.lists / name, text)}
            if changed and self.last_checkpoint is not None and not fresh:
                raise StateError(
                    f"the run in {self.path} has begun with other images than there are now; to resume it with those "
                    f"of {self.lists}: kd-pipeline train -c {self.path / 'config.yaml'}, else start again with --fresh "
                    "(in Python fresh=True), or choose a different run folder"
                )
            try:
                self.lists.mkdir(exist_ok=True)
                for name, text in changed.items():
                    write_atomic(self.lists / name, text)
            except OSError as exc:
                raise ConfigError(f"cannot write to {self.lists}: {exc.strerror}; choose a different folder") from None

    def write_config(self, config: BaseModel) -> None:
        """Write the config and the versions of all installed packages, of a run that is about to train with them.

        Only this user can read the files, and what looks like a secret by its name is not in them.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        settings = yaml.safe_dump(shown_settings(config, exclude_none=True), sort_keys=False, allow_unicode=True)
        environment = json.dumps(describe_environment(), indent=2) + "\n"
        try:
            write_atomic(self.path / "config.yaml", settings, permissions=_PRIVATE)
            write_atomic(self.path / "environment.json", environment, permissions=_PRIVATE)
        except OSError as exc:
            raise ConfigError(f"run_dir: cannot write to {self.path}: {exc.strerror}; choose a different one") from None

    @property
    def run_id(self) -> str:
        """Tells this run from all others, whatever its folder is called; it stays when the run resumes.

        Raises:
            StateError: the history cannot be read.
        """
        if self._id is None:
            self._id = self.known_id(self.events()) or uuid4().hex[:8]
        return self._id

    @staticmethod
    def known_id(events: Sequence[Mapping[str, Any]]) -> str | None:
        """The id that the history of a run has; None before its first start."""
        ids = (event.get("run") for event in events if event.get("event") == "start")
        return next((each for each in ids if isinstance(each, str) and _ID.fullmatch(each)), None)

    def record_start(self, step: Callable[[], int], **fields: Any) -> None:
        """Add to the history that a training starts now, and `fields` about it; `session` adds how it ends.

        A start without an end was killed.
        """
        about = {"command": command_line(), "host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self._record("start", run=self.run_id, step=step(), **fields, **about)
        self._step = step

    def record_end(self, outcome: str) -> None:
        """Add to the history how the training that was started last has ended, if it has not been added yet."""
        if self._step is not None:
            self._record("end", step=self._step(), outcome=outcome)
            self._step = None

    def write_log(self, text: str) -> None:
        """Append `text` to `train.log` alone.

        Raises:
            StateError: it cannot be written to.
        """
        self._append(self.log, f"{_plain(text)}\n")

    def start_evidence(self) -> None:
        """Begin a new line of `evidence.jsonl`, the last of which a crash may have cut off.

        Raises:
            StateError: it cannot be written to.
        """
        if self.evidence.exists():
            self._append(self.evidence, "\n")

    def add_evidence(self, line: str) -> None:
        """Append `line` to `evidence.jsonl`, in one write.

        Raises:
            StateError: it cannot be written to.
        """
        self._append(self.evidence, f"{line}\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the final metrics to `result.json`.

        Raises:
            StateError: it cannot be written.
        """
        with _written(self.result):
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
        files = recorded[-1].get("files")
        if not isinstance(files, dict) or not files:
            return False
        digests = self._result_digests()
        return all(digests.get(name) == digest for name, digest in files.items())

    def events(self) -> list[dict[str, Any]]:
        """The lines of `history.jsonl`; a line that a full disk or a crash has cut off is left out.

        Raises:
            StateError: it cannot be read, or is too large for a history.
        """
        found = []
        try:
            with open_regular(self.history, max_bytes=_MAX_HISTORY) as file:
                for line in file:
                    try:
                        found.append(json.loads(line))
                    except (ValueError, RecursionError):
                        continue
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise StateError(
                f"{self.history} cannot be read: {exc.strerror}; move it away, and the results are made again"
            ) from None
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
        self._append(self.history, json.dumps({"time": _now(), "event": event, **fields}, ensure_ascii=False) + "\n")

    @staticmethod
    def _append(path: Path, text: str) -> None:
        with _written(path), open_own(path, "ab", permissions=_PRIVATE) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))

    def _result_digests(self) -> dict[str, str]:
        files = [self.result, *sorted(self.exported.glob("*"))]
        return {str(file.relative_to(self.path)): _sha256(file) for file in files if file.is_file()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.refuse_links()
        with lock_folder(self.path, otherwise="set a different run_dir"):
            yield

    def refuse_links(self) -> None:
        """Check that nothing of what a stage writes is a link that leads out of the folder.

        Only the folder that the user has named may be elsewhere: the others come with it, from whoever made it.

        Raises:
            StateError: something is.
        """
        inside = self.path.resolve() if self._is_named else self.path.parent.resolve() / self.path.name
        for file in self._written_files():
            if file.is_symlink() and not file.resolve().is_relative_to(inside):
                raise StateError(
                    f"{file} is a link to {printable(os.readlink(file))}, and a run writes nothing through links that "
                    "lead out of its folder; delete the link, or set run_dir to the folder where the run should be"
                )

    def _written_files(self) -> Iterator[Path]:
        """What a stage writes or opens to write, as far as it is there, and the folder itself unless it was named."""
        if not self._is_named:
            yield self.path
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        for name in names:  # not glob, which leaves out links to nothing
            if any(fnmatch(name, pattern) for pattern in (*_OWN_FILES, *_ALSO_WRITTEN)):
                yield self.path / name
        for name in _FILLED_BY_LIBRARIES:
            for folder, folders, files in os.walk(self.path / name):
                yield from (Path(folder, each) for each in (*folders, *files))

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Copy everything that the library logs to `train.log`."""
        with _written(self.log):
            file = open_own(self.log, "ab", permissions=_PRIVATE)
        stream = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        handler.addFilter(of_current_student())
        libraries = logging.getLogger(LIBRARIES)
        levels = _logger.level, libraries.level
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)
        libraries.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            _logger.removeHandler(handler)
            _logger.setLevel(levels[0])
            libraries.setLevel(levels[1])
            handler.close()
            stream.close()


class _PlainFormatter(logging.Formatter):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._student = current_student()

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return _plain(text if self._student is not None else with_student(text))


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StateError(f"{path} cannot be written: {exc.strerror}") from None


def _has_text(path: Path, text: str) -> bool:
    """Whether the file at `path` has this text."""
    try:
        with open_regular(path) as file:
            return file.read() == text.encode()
    except OSError:
        return False


def _plain(text: str) -> str:
    """Text for `train.log`, which is read in terminals and by others."""
    return printable(hide_in_text(text), keep="\n\t")


def _outcome(exc: BaseException) -> str:
    if isinstance(exc, SystemExit):
        return f"stopped with exit status {exc.code}"
    return hide_in_text(f"{type(exc).__name__}: {exc}".rstrip(": "))


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
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
