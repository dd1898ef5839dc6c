"""Samples for a report: what student and teacher say of validation images, which to show, and their pictures."""

import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.text import counted
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.data.plan import Shard
from kd_pipeline.errors import ConfigError, DataError, KDPipelineError
from kd_pipeline.evaluation._logits import logits_of, run_on_view
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.modules import eval_mode
from kd_pipeline.report.answers import Answer, read_answers
from kd_pipeline.report.data_uri import picture_uri, thumbnail_uri
from kd_pipeline.report.grid import save_grid
from kd_pipeline.storage.open import local_only
from kd_pipeline.teachers.settings import members_of
from kd_pipeline.workflows.check_images import key_of
from kd_pipeline.workflows.compared_models import open_logits_teacher
from kd_pipeline.workflows.exported import OpenedModel, open_model_file
from kd_pipeline.workflows.reporting.choice import Group, choose, count_answers
from kd_pipeline.workflows.reporting.run import RunRecord, inside
from kd_pipeline.workflows.stage import view_of

__all__ = [
    "PREDICTIONS",
    "Access",
    "Samples",
    "collect_samples",
    "draw_training_batch",
    "open_exported",
    "open_images",
    "sentence",
]

_logger = logging.getLogger("kd_pipeline")

PREDICTIONS = "predictions_val.csv"
"""The file in a run's folder with the answers of student and teacher to the images of `val`."""
_MAX_EVALUATED = 20_000
"""Images that a report evaluates itself."""
_ALLOW = "which --remote allows to read"
_BATCH_IMAGES = 24
"""Of the first training batch."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a report may open besides the folders of runs."""

    samples: bool = True
    """Read the images of the runs' data, and run the exported student where predictions are missing."""
    remote: bool = False
    """Also from URLs that a run's config names."""
    plugins: Collection[str] = ()
    trust_engines: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples to show of a run."""

    counts: Mapping[str, int]
    """How many samples both, one or none has right, by a sentence's subject; empty without labels or a teacher."""
    groups: Sequence[Group]
    pictures: Mapping[int, str]
    """`data:` URIs by the index of the sample."""
    notes: Sequence[str] = field(default=())
    """What is missing and why, and where the answers come from, a sentence each."""


def collect_samples(run: RunRecord, access: Access, *, number: int, report: Callable[[str], object]) -> Samples:
    """Choose the samples to show of a run, at most `number`, and draw them.

    The answers are those of `predictions_val.csv`, or else of the exported student, which is run now. Pictures are of
    the images of `data.val` at these positions: a path in the file opens nothing. What fails is one of the notes.
    """
    notes: list[str] = []
    with ExitStack() as stack:
        opened: tuple[Config, KDDataLoader] | None = None
        try:
            opened = open_images(run, access, stack)
        except (KDPipelineError, RuntimeError) as exc:
            notes.append(f"The validation images cannot be shown: {sentence(exc)}")
        rows: list[Answer] = []
        try:
            path = inside(run.path, PREDICTIONS)
            if path is not None:
                rows = [*_known(read_answers(path))]
            elif opened is not None:
                report(f"{run.name}: answers for {len(opened[1].source):,} validation images")
                rows = [*_evaluate(run, *opened, access, stack, notes)]
        except (KDPipelineError, IndexError, RuntimeError) as exc:  # of a student that does not fit the data
            notes.append(f"The answers to single images are not known: {sentence(exc)}")
        kept = run.evaluations.get("val")
        is_part = kept is not None and kept.num_samples > len(rows) > 0
        if is_part and kept is not None:
            notes.append(
                f"Of {kept.num_samples:,} images {len(rows):,} are known one by one; of large splits a run keeps the "
                "worst, the best and some by chance."
            )
        groups = choose(rows, number)
        pictures: dict[int, str] = {}
        if opened is not None and groups:
            wanted = {row.index: row for group in groups for row in group.rows}
            report(f"{run.name}: pictures of {counted(len(wanted), 'image')} of data.val")
            pictures = _pictures(opened[1], wanted, notes)
    return Samples({} if is_part else count_answers(rows), groups, pictures, notes)


def draw_training_batch(run: RunRecord, access: Access, *, report: Callable[[str], object]) -> tuple[str | None, str]:
    """The first batch of the training as the models see it, as a `data:` URI, and how to read it or why there is none.

    `kd-pipeline check` has drawn it with the teacher's answers; else it is loaded now.
    """
    try:
        if access.samples and (path := inside(run.path, "check/train_batch.png")) is not None:
            return picture_uri(path), "With each image its label and the teacher's answer, from kd-pipeline check."
        config = _config(run, access, "train")
        report(f"{run.name}: the first training batch")
        with tempfile.TemporaryDirectory(prefix="kd_pipeline-") as folder:
            skip = {"run_dir": None, "on_bad_sample": "substitute", "max_bad_fraction": 1.0}
            with _open_split(config, "train", access, **skip) as loader:
                batch = loader.peek()
                classes, transform = loader.classes, loader.transform
            file = Path(folder) / "batch.png"
            save_grid(batch, file, transform=transform, classes=classes, num_images=_BATCH_IMAGES)
            return picture_uri(file), "With each image its label, if it has one."
    except (KDPipelineError, RuntimeError) as exc:
        return None, f"There is no picture of it: {sentence(exc)}"


def _config(run: RunRecord, access: Access, split: str) -> Config:
    """The config of a run whose data may be opened.

    Raises:
        ConfigError: it may not, or the config is not that of a run of this release.
    """
    if not access.samples:
        raise ConfigError("samples were left out")
    path = inside(run.path, "config.yaml")
    if path is None:
        raise ConfigError("the run has no config.yaml")
    config = load_config(path)
    if split not in config.data.splits:
        raise ConfigError(f"its config has no data.{split}, and a report runs no code that makes batches")
    settings = config.data.split(split)
    needed = [settings.source, *([] if config.data.train is None else [config.data.train.source])]
    if not access.remote and (url := next(filter(None, map(_remote, needed)), None)):
        raise ConfigError(f"its data is not a local file ({url}), {_ALLOW}")
    folder = run.path if run.stage == "distill" else run.path.parent
    return config.model_copy(update={"run_dir": folder})


def _remote(source: Any) -> str | None:
    """What of a source may have to be downloaded."""
    values = source.model_dump(mode="json")
    if values.get("download"):
        return "download: true"
    if values["kind"] == "huggingface" and not Path(values["path"]).is_dir():
        return str(values["path"])
    texts = [text for value in values.values() for text in (value if isinstance(value, list) else [value])]
    return next((text for text in texts if isinstance(text, str) and "://" in text), None)


def open_images(run: RunRecord, access: Access, stack: ExitStack) -> tuple[Config, KDDataLoader]:
    """The config of a run, and every image of its `val` once, until `stack` closes.

    Raises:
        ConfigError, DataError: the images may not be read, or are not there.
    """
    config = _config(run, access, "val")
    shown = config.data.split("val").views.keys() & config.seen_views
    options = {"shown_views": shown, "shuffle": True, "on_bad_sample": "substitute", "max_bad_fraction": 1.0}
    return config, stack.enter_context(_open_split(config, "val", access, **EACH_IMAGE_ONCE | options))


def _open_split(config: Config, split: str, access: Access, **options: Any) -> KDDataLoader:
    """The loader of a split, without a teacher, which opens no connection unless `access` allows it."""
    allowed = nullcontext() if access.remote else local_only(_ALLOW)
    with allowed:
        loader = KDDataLoader.from_config(config, split, teacher=None, shard=Shard(), plugins=access.plugins, **options)
    # A list that is a local file may name URLs, which are opened when they are read.
    if not access.remote and config.data.split(split).source.kind == "file_list" and loader.source.stores != "files":
        loader.close()
        raise ConfigError(f"{key_of(split)}.source lists URLs, {_ALLOW}")
    return loader


def sentence(exc: BaseException) -> str:
    """What an error says, as a sentence."""
    text = str(exc).strip().rstrip(".")
    return f"{text}."


def _known(rows: Iterable[Answer]) -> Iterator[Answer]:
    """Those with an answer of the student."""
    return (row for row in rows if row.student)


@torch.no_grad()
def _evaluate(
    run: RunRecord, config: Config, loader: KDDataLoader, access: Access, stack: ExitStack, notes: list[str]
) -> Iterator[Answer]:
    """What the exported student, and the teacher if it can run here, say of the images."""
    student = open_exported(run, config, loader, access, stack)
    teacher = _open_teacher(run, config, loader, access, stack)
    who = "student" if teacher is None else "student and the teacher"
    notes.append(f"The run has no {PREDICTIONS}: the {who} answered for this report.")
    source, classes, num_done = loader.source, loader.classes, 0
    name = source.name if source.stores == "files" else None
    view = view_of(config, run.stage)
    with progress_bar("evaluation on val") as report_done, eval_mode(student.model):
        for batch in loader:
            output, rows = run_on_view(student.model, batch, view)
            logits = logits_of(output)
            if logits.ndim != 2 or len(rows) != len(batch):
                raise ConfigError("the student answers for pixels or for several views of an image")
            theirs = None if teacher is None else logits_of(run_on_view(teacher.model, batch)[0])
            yield from _rows(batch.index, rows.labels, logits, theirs, rows.valid, name, classes)
            num_done += len(batch)
            report_done(num_done, len(source))
            if num_done >= _MAX_EVALUATED:
                return


def open_exported(
    run: RunRecord, config: Config, loader: KDDataLoader, access: Access, stack: ExitStack
) -> OpenedModel:
    """The exported student of a run, for the images of `loader`, until `stack` closes.

    Raises:
        ConfigError: there is none, or its files are links out of the folder.
    """
    if inside(run.path, "exported/model.json") is None or inside(run.path, "exported/model.safetensors") is None:
        raise ConfigError("the run has no exported student")
    view = config.data.view("val", view_of(config, run.stage))
    opened = open_model_file(
        run.path,
        image_shape=view.image_shape,
        device=loader.device,
        dtype=getattr(torch, view.normalize.dtype),
        classes=loader.classes,
        plugins=access.plugins,
        trust_engines=access.trust_engines,
    )
    stack.callback(opened.close)
    return opened


def _open_teacher(
    run: RunRecord, config: Config, loader: KDDataLoader, access: Access, stack: ExitStack
) -> OpenedModel | None:
    """The teacher of the run; None if it has none for these images, or one that would have to be downloaded."""
    if run.stage != "distill" or config.teacher is None:
        return None
    downloads = [each.model.pretrained for each in members_of(config.teacher) if each.model is not None]
    if any(downloads) and not access.remote:
        return None
    opened = open_logits_teacher(config, "val", loader, access.plugins, access.trust_engines, is_required=False)
    if opened is not None:
        stack.callback(opened.close)
    return opened


def _rows(
    index: Tensor,
    labels: Tensor | None,
    logits: Tensor,
    theirs: Tensor | None,
    valid: Tensor,
    name: Callable[[int], str] | None,
    classes: Sequence[str] | None,
) -> Iterator[Answer]:
    """The rows of a batch: indices `[N]`, labels `[N]` or weights `[N, K]`, and logits `[N, K]`."""
    if labels is not None and labels.ndim == 2:
        labels = labels.argmax(1)
    probability_N, top_N = logits.softmax(1).max(1)
    losses_N = None if labels is None else cross_entropy(logits, labels, reduction="none").tolist()
    of_teacher = None if theirs is None else theirs.softmax(1).max(1)

    def called(label: int) -> str:
        return str(label) if classes is None else classes[label]

    for row, (position, is_valid) in enumerate(zip(index.tolist(), valid.tolist(), strict=True)):
        if is_valid:
            yield Answer(
                index=position,
                path="" if name is None else name(position),
                label="" if labels is None else called(int(labels[row])),
                student=called(int(top_N[row])),
                student_probability=float(probability_N[row]),
                teacher="" if of_teacher is None else called(int(of_teacher.indices[row])),
                teacher_probability=None if of_teacher is None else float(of_teacher.values[row]),
                loss=None if losses_N is None else losses_N[row],
            )


def _pictures(loader: KDDataLoader, wanted: Mapping[int, Answer], notes: list[str]) -> dict[int, str]:
    """Small pictures by index; of an image that is not the one that was predicted there is none."""
    found: dict[int, str] = {}
    source, num_changed = loader.source, 0
    with progress_bar("pictures") as report:
        for number, (index, row) in enumerate(wanted.items()):
            report(number, len(wanted))
            is_there = index < len(source) and Path(row.path).name in ("", Path(source.name(index)).name)
            if not is_there:
                num_changed += 1
                continue
            try:
                found[index] = thumbnail_uri(loader.pixels(index))
            except (DataError, RuntimeError) as exc:
                notes.append(f"{source.name(index)} cannot be shown: {sentence(exc)}")
    if num_changed:
        have = "1 image has" if num_changed == 1 else f"{num_changed} images have"
        notes.append(f"{have} no picture: the data is not what it was when the run ended.")
    return found
