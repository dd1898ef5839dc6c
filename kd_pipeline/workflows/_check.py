"""Check a config before training: unreadable files, the first batch, and the accuracy of the teacher."""

import json
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.settings import Settings
from kd_pipeline.config.config import Config
from kd_pipeline.data.bad_samples import BadSample
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import DataSettings
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.evaluation.probe import ProbeReport, run_probe
from kd_pipeline.loader.loader import EACH_IMAGE_ONCE, KDDataLoader
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import is_recording
from kd_pipeline.workflows.teacher import open_run_teacher, starts_without_teacher

__all__ = ["CheckReport", "CheckSettings", "SplitReport", "TeacherReport", "check"]

_REPORT_INTERVAL_S = 5.0
_SKIP_UNREADABLE = {"on_bad_sample": "substitute", "max_bad_fraction": 1.0}
"""Continue after every unreadable file, to find all of them."""


class CheckSettings(Settings):
    """How much to check, and where to write the report."""

    num_images: int | None = Field(default=None, ge=1)
    """How many random images of each split to decode; defaults to all."""
    out: Path | None = None
    """The folder; defaults to `check` in `run_dir`."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The result for one split."""

    split: str
    num_images: int
    """Images in the split."""
    num_decoded: int
    """Images that were checked."""
    class_sizes: tuple[int, ...] | None
    """`[K]`, number of images of each class; None without labels."""
    unreadable: tuple[BadSample, ...]
    """By index in the dataset."""
    remarks: tuple[str, ...]
    """Warnings of the source, one sentence each."""
    images_per_s: float
    """Decoded and augmented, including the start of DALI."""


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """The teacher at the start of training."""

    backend: str
    precision: str
    probe: ProbeReport | None
    """Its accuracy on labeled training images; None if there are none."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of all checks."""

    splits: tuple[SplitReport, ...]
    teacher: TeacherReport | None
    grid: Path | None
    """Image file of the first training batch, with the teacher's predictions; None without such a batch."""
    problems: tuple[str, ...]
    """What would stop or harm a training, one sentence each with a hint."""


def check(
    config: Config,
    settings: CheckSettings | None = None,
    *,
    plugins: Collection[str] = (),
    report: Callable[[str], object] = lambda line: None,
) -> CheckReport:
    """Decode the images of every split, draw the first training batch, and run the teacher on training images.

    It writes only `check.json` and `train_batch.png`, into the folder of the report.

    Args:
        config: the run to check.
        settings: how much to check; defaults to everything.
        plugins: modules that factories in the config may come from.
        report: called with lines of progress.

    Raises:
        ConfigError: there is no folder for the report, or no split.
        DataError: a source is not what the config says, or none of its images decodes.
    """
    settings = settings or CheckSettings()
    if not config.data.splits:
        raise ConfigError("there is nothing to check: set data.train, or another split")
    out = _folder(config, settings)
    training = None if config.data.train is None else open_source(config.data.train.source)
    results = {name: _decode(config, name, settings.num_images, training, report) for name in config.data.splits}
    splits = tuple(split for split, _ in results.values())
    problems = [problem for split in splits for problem in _unreadable_problems(split, config.data)]
    problems += _copies_of_training({name: fingerprint for name, (_, fingerprint) in results.items()})
    teacher, grid = None, None
    if training is not None:
        report("the first training batch, and the teacher")
        teacher, grid, more = _first_batch(config, training, out, plugins)
        problems += more
    checked = CheckReport(splits, teacher, grid, tuple(problems))
    write_atomic(out / "check.json", json.dumps(asdict(checked), indent=2, default=str) + "\n")
    return checked


def _folder(config: Config, settings: CheckSettings) -> Path:
    out = settings.out or (None if config.run_dir is None else config.run_dir / "check")
    if out is None:
        raise ConfigError("a check writes a report: set run_dir, such as run_dir: runs/mine, or pass --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"out: {out} cannot be made: {exc.strerror}; choose another with --out") from None
    return out


def _decode(
    config: Config, split: str, num_images: int | None, training: Source | None, report: Callable[[str], object]
) -> tuple[SplitReport, str]:
    """Load every image of a split, or the first `num_images` in random order; also returns its fingerprint."""
    changes = {**EACH_IMAGE_ONCE, **_SKIP_UNREADABLE}
    changes["shuffle"] = num_images is not None  # the first images of a folder are all of one class
    with KDDataLoader.from_config(config, split, teacher=None, shard=Shard(), training=training, **changes) as loader:
        source = loader.source
        num_wanted = min(len(source), num_images or len(source))
        num_decoded, images_per_s = _load(loader, split, num_wanted, report)
    class_sizes = None
    if source.labels is not None:
        class_sizes = tuple(np.bincount(source.labels, minlength=source.num_classes or 0).tolist())
    checked = SplitReport(
        split=split,
        num_images=len(source),
        num_decoded=num_decoded,
        class_sizes=class_sizes,
        unreadable=loader.bad_samples,
        remarks=source.warnings,
        images_per_s=images_per_s,
    )
    return checked, source.fingerprint


def _load(loader: KDDataLoader, split: str, num_wanted: int, report: Callable[[str], object]) -> tuple[int, float]:
    """Load batches with at least `num_wanted` images; returns their number and images per second."""
    num_images = 0
    started_s = reported_s = time.monotonic()
    for batch in loader:
        num_images += len(batch)
        now_s = time.monotonic()
        if now_s - reported_s > _REPORT_INTERVAL_S:
            reported_s = now_s
            rate = num_images / (now_s - started_s)
            report(f"{split}: {num_images / num_wanted:.1%} of {num_wanted:,} images decoded, {rate:,.0f} images/s")
        if num_images >= num_wanted:
            break
    return num_images, num_images / (time.monotonic() - started_s)


def _unreadable_problems(split: SplitReport, data: DataSettings) -> list[str]:
    num_unreadable = len(split.unreadable)
    if not num_unreadable:
        return []
    found = f"data.{split.split}: {num_unreadable} of {split.num_decoded} images cannot be read"
    if data.on_bad_sample == "raise":
        return [f"{found}, and the first one ends a run; replace them, or set data.on_bad_sample=substitute"]
    if num_unreadable / split.num_decoded > data.max_bad_fraction:
        return [f"{found}, more than data.max_bad_fraction={data.max_bad_fraction:g} allows; replace them, or raise it"]
    return []


def _copies_of_training(fingerprints: dict[str, str]) -> list[str]:
    return [
        f"data.{split} holds the same images as data.train: metrics on it say nothing about new images"
        for split, fingerprint in fingerprints.items()
        if split != "train" and fingerprint == fingerprints.get("train")
    ]


def _first_batch(
    config: Config, training: Source, out: Path, plugins: Collection[str]
) -> tuple[TeacherReport | None, Path | None, list[str]]:
    """The teacher, the image of the first training batch, and the problems with both."""
    lenient = config.model_copy(update={"data": config.data.model_copy(update=_SKIP_UNREADABLE)})
    problems: list[str] = []
    if config.teacher is not None and not starts_without_teacher(config):
        try:
            # A recording is of images that were read with the config's own settings.
            teacher, grid = _with_teacher(config if is_recording(config.teacher) else lenient, training, out, plugins)
        except KDPipelineError as exc:
            problems.append(str(exc))
        else:
            probe_problems = () if teacher.probe is None else teacher.probe.problems
            return teacher, grid, [f"teacher: {problem}" for problem in probe_problems]
    try:
        return None, _draw(lenient, training, out), problems
    except KDPipelineError as exc:
        # The same problem of the data may come with a teacher and without.
        return None, None, list(dict.fromkeys([*problems, str(exc)]))


def _with_teacher(config: Config, training: Source, out: Path, plugins: Collection[str]) -> tuple[TeacherReport, Path]:
    with closing(open_run_teacher(config, classes=training.classes, plugins=plugins)) as teacher:
        grid = _draw(config, training, out, teacher)
        probe = run_probe(config, teacher, config.probe, training=training)
        return TeacherReport(teacher.backend, teacher.precision, probe), grid


def _draw(config: Config, training: Source, out: Path, teacher: Teacher | Recording | None = None) -> Path:
    with KDDataLoader.from_config(config, teacher=teacher, training=training, run_dir=None) as loader:
        batch = next(iter(loader))
        return save_grid(batch, out / "train_batch.png", transform=loader.transform, classes=loader.classes)
