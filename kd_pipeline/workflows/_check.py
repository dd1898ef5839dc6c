"""Check a config before training: its settings, lists, images, teacher and student, with what to do in one table."""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.settings import Settings, require_config
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.check_images import SplitReport, check_split, key_of
from kd_pipeline.workflows.check_models import TeacherReport, check_models
from kd_pipeline.workflows.findings import Finding, Findings

__all__ = ["CheckReport", "CheckSettings", "Finding", "SplitReport", "TeacherReport", "check"]


class CheckSettings(Settings):
    """How much to check, and where to write the report."""

    num_images: int | None = Field(default=None, ge=1)
    """How many random images of each split to decode; defaults to all."""
    out: Path | None = None
    """The folder; defaults to `check` in `run_dir`."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of all checks."""

    splits: tuple[SplitReport, ...]
    """The splits whose source opens."""
    teacher: TeacherReport | None
    """None without a teacher that fits the images."""
    grid: Path | None
    """Image file of the first training batch, with the teacher's predictions; None without such a batch."""
    findings: tuple[Finding, ...]
    """What was found, errors first."""
    file: Path
    """All of this as JSON."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What would stop or harm a training, one sentence each with the part of the config and what to do."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        return tuple(
            each.message if each.message.startswith(each.where) else f"{each.where}: {each.message}" for each in errors
        )

    def to_dict(self) -> dict[str, object]:
        """All fields, and the problems, for JSON."""
        return {**asdict(self), "problems": self.problems}


@log_to_terminal()
def check(
    config: Config,
    settings: CheckSettings | None = None,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[str], object] = log_line,
) -> CheckReport:
    """Open everything that a training needs, decode the images of every split, and run teacher and student.

    What is wrong with one part does not end the check of the others. It writes only `check.json` and
    `train_batch.png`, into the folder of the report.

    Args:
        config: the run to check.
        settings: how much to check; defaults to everything.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: called with lines of progress; without it they are logged, and shown as those of `train`.

    Raises:
        ConfigError: there is no folder for the report, or no split.
    """
    require_config(config)
    settings = settings or CheckSettings()
    if not config.data.splits:
        raise ConfigError("there is nothing to check: set data.train, or another split")
    out = _folder(config, settings)
    findings = Findings()
    findings.add("error", "config", config.remarks)
    training: Source | None = None
    if config.data.train is not None:
        with findings.part("data.train"):
            training = open_source(config.data.train.source, plugins=plugins)
    splits = _check_splits(config, settings, training, findings, plugins, report)
    teacher, grid = None, None
    if config.data.train is not None:
        unlabeled = {split.split for split in splits if split.class_sizes is None}
        teacher, grid = check_models(
            config,
            training,
            out,
            plugins=plugins,
            trust_engines=trust_engines,
            labeled=[name for name in config.data.splits if name not in unlabeled],
            findings=findings,
            report=report,
        )
    checked = CheckReport(tuple(splits), teacher, grid, findings.sorted(), out / "check.json")
    try:
        write_atomic(checked.file, json.dumps(checked.to_dict(), indent=2, default=str) + "\n")
    except OSError as exc:
        raise ConfigError(f"out: cannot write to {out}: {exc.strerror}; choose another with --out") from None
    return checked


def _check_splits(
    config: Config,
    settings: CheckSettings,
    training: Source | None,
    findings: Findings,
    plugins: Collection[str],
    report: Callable[[str], object],
) -> list[SplitReport]:
    """The splits that open; what is wrong with their images is added to `findings`."""
    splits: list[SplitReport] = []
    fingerprints: dict[str, str] = {}
    for name in config.data.splits:
        if name == "train" and training is None:
            continue
        with findings.part(key_of(name)):
            split, fingerprints[name] = check_split(
                config if training is not None else _without_training(config),
                name,
                num_images=settings.num_images,
                training=training,
                plugins=plugins,
                findings=findings,
                report=report,
            )
            splits.append(split)
    _add_copies_of_training(findings, config, fingerprints)
    return splits


def _without_training(config: Config) -> Config:
    """`config` for its other splits, if the training data does not open."""
    return config.model_copy(update={"data": config.data.model_copy(update={"train": None})})


def _folder(config: Config, settings: CheckSettings) -> Path:
    out = settings.out or (None if config.run_dir is None else config.run_dir / "check")
    if out is None:
        raise ConfigError("a check writes a report: set run_dir, such as run_dir: runs/mine, or pass --out")
    if settings.out is None and out.is_symlink():  # it came with the run's folder
        raise ConfigError(
            f"out: {out} is a link, and a run's folder is not left through links; delete it, or pass --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"out: {out} cannot be made: {exc.strerror}; choose another with --out") from None
    return out


def _add_copies_of_training(findings: Findings, config: Config, fingerprints: dict[str, str]) -> None:
    for split, fingerprint in fingerprints.items():
        is_known = any(remark.startswith(f"{key_of(split)}.source ") for remark in config.remarks)
        if split != "train" and fingerprint == fingerprints.get("train") and not is_known:
            message = f"{key_of(split)} holds the same images as data.train: metrics on it say nothing about new images"
            findings.add("error", key_of(split), [f"{message}; use other images, or remove it"])
