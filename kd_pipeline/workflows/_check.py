"""What a training would meet, before it does: files that do not decode, what the models see, what the teacher knows."""

import json
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from kd_pipeline._core.atomic_write import write_whole
from kd_pipeline._core.settings import Settings
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import DataSettings, Untaught
from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.evaluation.probe import ProbeReport, ask_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.workflows.teacher import begins_without_teacher, open_run_teacher

__all__ = ["CheckReport", "CheckSettings", "SplitReport", "TeacherReport", "Unreadable", "check"]

_TELL_S = 5.0
"""How often progress is told."""


class CheckSettings(Settings):
    """How much is looked at, and where the findings go."""

    num_images: int | None = Field(default=None, ge=1)
    """Images of each split that are decoded, drawn at random; all of them where left out."""
    out: Path | None = None
    """The folder; `check` in `run_dir` where left out."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sample that does not decode."""

    index: int
    """Its position in the dataset."""
    path: str
    num_bytes: int | None
    """Size of the file; None where there is none."""
    reason: str


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What was found in one split."""

    split: str
    num_images: int
    """All that there are."""
    num_decoded: int
    """Those that were tried."""
    class_sizes: tuple[int, ...] | None
    """`[K]`, how many images there are of each class; None without labels."""
    unreadable: tuple[Unreadable, ...]
    """In the order of the dataset."""
    remarks: tuple[str, ...]
    """What the source skipped or found odd, a sentence each."""
    images_per_s: float
    """Decoded and augmented, the start of DALI included."""


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """The teacher as a training would begin with it."""

    backend: str
    precision: str
    probe: ProbeReport | None
    """How it did on labeled training images; None where there are none."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All that was found."""

    splits: tuple[SplitReport, ...]
    teacher: TeacherReport | None
    grid: Path | None
    """Picture of the first training batch, with the teacher's answers; None where there is no such batch."""
    problems: tuple[str, ...]
    """What would stop a training or spoil it, a sentence each with a hint; empty where nothing would."""

    def save(self, folder: Path) -> Path:
        """Write everything as JSON, and return the path."""
        path = folder / "check.json"
        write_whole(path, json.dumps(asdict(self), indent=2, default=str) + "\n")
        return path


def check(
    config: Config,
    settings: CheckSettings | None = None,
    *,
    plugins: Collection[str] = (),
    report: Callable[[str], object] = lambda line: None,
) -> CheckReport:
    """Decode the images of every split, draw the first training batch, and ask the teacher about training images.

    Nothing in `run_dir` but the folder of the findings is touched: `check.json` and `train_batch.png`.

    Args:
        config: the run that is planned.
        settings: how much to look at; everything where left out.
        plugins: modules that factories in the config may come from.
        report: gets lines of progress.

    Raises:
        ConfigError: there is no folder for the findings, or no split.
        DataError: a source is not what the config says, or none of its images decodes.
    """
    settings = settings or CheckSettings()
    if not config.data.splits:
        raise ConfigError("there is nothing to check: set data.train, or another split")
    out = _folder(config, settings)
    training = None if config.data.train is None else open_source(config.data.train.source)
    found = {name: _decode(config, name, settings.num_images, training, report) for name in config.data.splits}
    problems = [problem for split, _ in found.values() for problem in _problems_of(split, config.data)]
    problems += _shown_in_training({name: fingerprint for name, (_, fingerprint) in found.items()})
    teacher, grid = None, None
    if training is not None:
        report("the first training batch, and the teacher")
        teacher, grid, more = _first_batch(config, training, out, plugins)
        problems += more
    checked = CheckReport(tuple(split for split, _ in found.values()), teacher, grid, tuple(problems))
    checked.save(out)
    return checked


def _folder(config: Config, settings: CheckSettings) -> Path:
    out = settings.out or (None if config.run_dir is None else config.run_dir / "check")
    if out is None:
        raise ConfigError("a check writes what it finds: set run_dir, such as run_dir: runs/mine, or pass --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"out: {out} cannot be made: {exc.strerror}; choose another with --out") from None
    return out


def _decode(
    config: Config, split: str, num_images: int | None, training: Source | None, report: Callable[[str], object]
) -> tuple[SplitReport, str]:
    """Every image of a split, or so many of them, once through the graph of its loader; with its fingerprint."""
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-check-") as folder:
        shuffle = num_images is not None  # the first ones of a folder are all of one class
        plain = Untaught.of(config.seed, _lenient(config.data), split, shuffle=shuffle, run_dir=Path(folder))
        with KDDataLoader.from_config(plain, split, shard=Shard(), training=training) as loader:
            source = loader.source
            wanted = min(len(source), num_images or len(source))
            num_decoded, images_per_s = _run_through(loader, split, wanted, report)
        record = Path(folder) / "bad_samples.jsonl"
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    unreadable = sorted((Unreadable(**json.loads(line)) for line in lines), key=lambda sample: sample.index)
    class_sizes = None
    if source.labels is not None:
        class_sizes = tuple(np.bincount(source.labels, minlength=source.num_classes or 0).tolist())
    checked = SplitReport(
        split=split,
        num_images=len(source),
        num_decoded=num_decoded,
        class_sizes=class_sizes,
        unreadable=tuple(unreadable),
        remarks=source.reports,
        images_per_s=images_per_s,
    )
    return checked, source.fingerprint


def _run_through(loader: KDDataLoader, split: str, wanted: int, report: Callable[[str], object]) -> tuple[int, float]:
    """Take batches until there are as many images as wanted: how many there were, and how many in a second."""
    num_images = 0
    started_s = told_s = time.monotonic()
    for batch in loader:
        num_images += len(batch)
        now_s = time.monotonic()
        if now_s - told_s > _TELL_S:
            told_s = now_s
            rate = num_images / (now_s - started_s)
            report(f"{split}: {num_images / wanted:.1%} of {wanted:,} images decoded, {rate:,.0f} images/s")
        if num_images >= wanted:
            break
    return num_images, num_images / (time.monotonic() - started_s)


def _problems_of(found: SplitReport, data: DataSettings) -> list[str]:
    num_unreadable = len(found.unreadable)
    if not num_unreadable:
        return []
    facts = f"data.{found.split}: {num_unreadable} of {found.num_decoded} images cannot be read"
    if data.on_bad_sample == "raise":
        return [f"{facts}, and the first one ends a run; replace them, or set data.on_bad_sample=substitute"]
    if num_unreadable / found.num_decoded > data.max_bad_fraction:
        return [f"{facts}, more than data.max_bad_fraction={data.max_bad_fraction:g} allows; replace them, or raise it"]
    return []


def _shown_in_training(fingerprints: dict[str, str]) -> list[str]:
    """A sentence for each split that holds what the training data holds."""
    return [
        f"data.{split} holds the very images of data.train: figures on it say nothing about new images"
        for split, fingerprint in fingerprints.items()
        if split != "train" and fingerprint == fingerprints.get("train")
    ]


def _first_batch(
    config: Config, training: Source, out: Path, plugins: Collection[str]
) -> tuple[TeacherReport | None, Path | None, list[str]]:
    """The teacher, the picture of the first training batch, and what is wrong with either."""
    problems: list[str] = []
    if config.teacher is not None and not begins_without_teacher(config):
        try:
            teacher, grid = _teach(config, training, out, plugins)
        except KDPipelineError as exc:
            problems.append(str(exc))
        else:
            found = () if teacher.probe is None else teacher.probe.problems
            return teacher, grid, [f"teacher: {problem}" for problem in found]
    try:
        return None, _draw(config, training, out), problems
    except KDPipelineError as exc:
        # What is wrong with the data is so with a teacher and without one.
        return None, None, list(dict.fromkeys([*problems, str(exc)]))


def _teach(config: Config, training: Source, out: Path, plugins: Collection[str]) -> tuple[TeacherReport, Path]:
    with closing(open_run_teacher(config, plugins=plugins)) as opened:
        teacher = matched(opened, training.classes)
        grid = _draw(config, training, out, teacher)
        probe = ask_teacher(_untaught(config, teacher), teacher, config.probe, training=training)
        return TeacherReport(teacher.backend, teacher.precision, probe), grid


def _draw(config: Config, training: Source, out: Path, teacher: Teacher | None = None) -> Path:
    with KDDataLoader.from_config(_untaught(config, teacher), teacher=teacher, training=training) as loader:
        batch = next(iter(loader))
        return save_grid(batch, out / "train_batch.png", transform=loader.transform, classes=loader.classes)


def _untaught(config: Config, teacher: Teacher | None) -> Untaught:
    """For a loader with `teacher`, without a folder, so that nothing of the run's is written."""
    # A recording is of images that were read as the run reads them.
    data = config.data if isinstance(teacher, RecordedTeacher) else _lenient(config.data)
    return Untaught(config.seed, data)


def _lenient(data: DataSettings) -> DataSettings:
    """Go on past whatever is unreadable, as all of it is to be found."""
    return data.model_copy(update={"on_bad_sample": "substitute", "max_bad_fraction": 1.0})
