"""Compile the student of a run in a process that can be killed: nobody knows how long it takes."""

import json
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.child_process import open_report, run_child
from kd_pipeline.bench.tune_steps import RunSteps, Trial
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.workflows.stage import Stage

__all__ = ["compile_in_child"]


def compile_in_child(
    config: Config,
    stage: Stage,
    *,
    plugins: Collection[str],
    trust_engines: Collection[str],
    timeout_s: float,
) -> float:
    """Take a step of a run with `train.compile`, so that what torch compiles is in its cache; returns the seconds.

    Raises:
        ConfigError: it takes longer than `timeout_s`, or does not compile.
    """
    if timeout_s <= 0:
        raise ConfigError("there was no time left to compile the student")
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tune-") as folder:
        path = Path(folder) / "config.json"
        write_atomic(path, config.model_dump_json(), permissions=0o600)
        granted = json.dumps({"plugins": [*plugins], "trust_engines": [*trust_engines]})
        child = run_child(f"{__name__}:_compile", str(path), stage, granted, timeout_s=timeout_s)
    if child.failure.startswith("timed out"):
        raise ConfigError(
            f"the student did not compile in the {timeout_s:.0f} s that were left; allow more (--seconds)"
        )
    if child.failure:
        reason = child.lines[-1] if child.lines else child.log.strip().rpartition("\n")[2]
        raise ConfigError(f"the student does not compile: {reason or child.failure}")
    return time.perf_counter() - started_s


def _compile(path: str, stage: Stage, granted: str) -> int:
    """In the child: take one step; the exit status."""
    report = open_report()
    config = Config.model_validate_json(Path(path).read_text())
    try:
        with RunSteps(config, stage, **json.loads(granted)) as steps:
            steps.rate(Trial((), "student"), seconds=0.0)
    except KDPipelineError as exc:
        report.write(f"{exc}\n")
        return 1
    return 0
