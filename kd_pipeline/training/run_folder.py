"""The folder of a run: what it was made from, what it said, and what came of it."""

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

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline.errors import ConfigError

__all__ = ["RunFolder"]

_logger = logging.getLogger("kd_pipeline")


class RunFolder:
    """Where a stage writes, and the names of the files there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.exported = path / "exported"
        self.metrics = path / "metrics.csv"
        self.log = path / "train.log"
        self.result = path / "result.json"

    @property
    def last(self) -> Path | None:
        """The checkpoint to go on from, where there is one."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    def prepare(self, config: BaseModel) -> None:
        """Make the folder, and write into it the whole config and the versions of everything that is installed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))
            write_whole(self.path / "environment.json", json.dumps(_environment(), indent=2) + "\n")
        except OSError as exc:
            raise ConfigError(f"run_dir: {self.path} cannot be written to: {exc.strerror}; choose another") from None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Everything that the library says meanwhile goes into `train.log` too."""
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
        """What came of the run, as JSON."""
        write_whole(self.result, json.dumps(result, indent=2) + "\n")


def _plain(config: BaseModel) -> dict[str, Any]:
    """What was set, as YAML can spell it; what was left out stays out."""
    return config.model_dump(mode="json", exclude_none=True)


def _environment() -> dict[str, Any]:
    packages = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
    return {
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda each: each[0].lower())),
    }
