"""The folder of a run: its config, environment, log, checkpoints and results."""

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline.errors import ConfigError

__all__ = ["RunFolder"]

_logger = logging.getLogger("kd_pipeline")


class RunFolder:
    """Where a stage writes, and the names of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.exported = path / "exported"
        self.metrics = path / "metrics.csv"
        self.log = path / "train.log"
        self.result = path / "result.json"

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if there is one."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    def prepare(self, config: BaseModel) -> None:
        """Create the folder, and write the config and the versions of all installed packages into it.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        settings = config.model_dump(mode="json", exclude_none=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
            write_atomic(self.path / "environment.json", json.dumps(_environment(), indent=2) + "\n")
        except OSError as exc:
            raise ConfigError(f"run_dir: cannot write to {self.path}: {exc.strerror}; choose a different one") from None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Copy everything that the library logs to `train.log`."""
        handler = logging.FileHandler(self.log, encoding="utf-8", delay=True)
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

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the final metrics to `result.json`."""
        write_atomic(self.result, json.dumps(result, indent=2) + "\n")


def _environment() -> dict[str, Any]:
    packages = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
    return {
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda each: each[0].lower())),
    }
