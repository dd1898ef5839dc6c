"""Whether the data and the teacher of a finished run are those that it was trained with, and give the same batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_pipeline._core.text import counted, printable
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import StateError
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import changed_fields, of_common_views
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.training.evidence import BatchLine, describe_batch, is_kept
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.sample_digests import changed_samples
from kd_pipeline.workflows.verification.facts import Comparison, Facts, Tolerance, compare_batch
from kd_pipeline.workflows.verification.files import RunFiles
from kd_pipeline.workflows.verification.replay_run import ReplayRun

__all__ = ["check_batches", "check_data", "check_evidence_is_whole", "check_stream", "check_teacher"]

_BY_MACHINE = ("device", "decode", "hw_decoder_load", "dali", "on_bad_sample")
"""Fields of a stream that say how images are decoded, and not which."""


def check_data(files: RunFiles, data: RunData, facts: Facts) -> bool:
    """Compare the fingerprints of all splits; returns whether that of the training is the same."""
    old, new = files.says.get("data"), data.training.fingerprint
    if old is None:
        facts.unknown("training data", "the run does not say what its data was")
    elif old == new:
        count = "" if data.source is None else f"{len(data.source):,} samples, "
        facts.holds("training data", f"{count}fingerprint {new[:12]}")
    else:
        starts = [] if files.evidence is None else files.evidence.starts
        kept = next((start.samples for start in starts if start.samples is not None), None)
        lines = [] if kept is None or data.source is None else changed_samples(kept, data.source)
        lines = [printable(line) for line in lines]
        facts.differs("training data", [f"fingerprint {printable(old)[:12]} → {new[:12]}", *lines])
    validation = files.says.get("validation")
    with facts.part("validation data"):
        found = data.fingerprints
        if not isinstance(validation, Mapping) or not found:
            facts.unknown("validation data", "there is none" if not found else "the run does not say what it was")
        elif changed := [name for name in found if validation.get(name, found[name]) != found[name]]:
            facts.differs(
                "validation data",
                [f"{name}: fingerprint {printable(validation[name])[:12]} → {found[name][:12]}" for name in changed],
            )
        else:
            facts.holds("validation data", f"fingerprints of {', '.join(found)}")
    return bool(old == new)


def check_stream(files: RunFiles, run: ReplayRun, facts: Facts) -> bool:
    """Compare what the order and the augmentation of images depend on; returns whether the batches are the same."""
    old, new = files.says.get("stream"), run.identity["stream"]
    if not isinstance(old, Mapping):
        facts.unknown("stream", "the run does not say what its batches depend on")
        return False
    changed = changed_fields(*of_common_views(old, new))
    wrong = {name: line for name, line in changed.items() if name not in _BY_MACHINE}
    elsewhere = [line for name, line in changed.items() if name in _BY_MACHINE and name != "on_bad_sample"]
    if wrong:
        facts.differs("stream", map(printable, wrong.values()))
    elif elsewhere:
        facts.holds(
            "stream", f"the same order and views, decoded by others: {printable('; '.join(elsewhere))}", is_exact=False
        )
    else:
        facts.holds("stream", "seed, order, transform and views are those of the run")
    return not wrong


def check_teacher(files: RunFiles, run: ReplayRun, facts: Facts) -> bool:
    """Compare weights, precision and runtime of the teacher; returns whether they are the same."""
    if run.teacher is None:
        return True
    old, new = files.says.get("teacher"), run.teacher.fingerprint
    runtimes = files.says.get("teacher_runtimes"), list(run.teacher.runtimes)
    if old == new:
        kind = "recorded outputs" if not isinstance(run.teacher, Teacher) else "weights, precision and runtime"
        facts.holds("teacher", f"{kind}: {printable(' and '.join(runtimes[1]))}, fingerprint {_short(new)}")
        return True
    lines = [f"fingerprint {_short(old)} → {_short(new)}"]
    if runtimes[0] != runtimes[1]:
        lines.append(f"{printable(runtimes[0])[:100]} → {printable(runtimes[1])[:100]}")
    cause = (
        "Another runtime or precision"
        if runtimes[0] != runtimes[1]
        else "Its file was replaced, or other software runs it"
    )
    facts.differs("teacher", lines, cause=cause)
    return False


def check_evidence_is_whole(files: RunFiles, loader: AnyLoader, facts: Facts) -> None:
    """Check that all batches of which evidence is kept are there: whoever made it up cannot have left some out."""
    if files.evidence is None or files.last is None:
        return
    limit = files.config.train.limit_train_batches
    num_batches = min(len(loader), limit or len(loader))
    seed, epochs = files.config.seed, files.last.epochs_done
    missing = [
        f"epoch {epoch + 1}, batch {number + 1}"
        for epoch in range(min(epochs, 100_000))
        for number in _kept(seed, epoch, num_batches)
        if (epoch, number) not in files.evidence.batches
    ]
    if missing:
        facts.differs(
            "evidence", [f"missing: {each}" for each in missing], cause="Lines of evidence.jsonl were removed"
        )


def check_batches(
    files: RunFiles, run: ReplayRun, facts: Facts, tolerance: Tolerance, *, num_batches: int, is_same_teacher: bool
) -> None:
    """Render `num_batches` recorded batches again, of random epochs, and compare them with the evidence."""
    names = ["images", "labels", *(["teacher outputs"] if run.teacher is not None else [])]
    evidence, loader = files.evidence, run.loader
    if evidence is None or not evidence.batches:
        for name in names:
            facts.unknown(name, "there is no evidence to compare them with")
        return
    if not isinstance(loader, KDDataLoader):
        for name in names:
            facts.unknown(name, "the batches were made by a loader of the user's own")
        return
    rng = np.random.default_rng()  # unseeded: every time others
    keys = sorted(evidence.batches)
    drawn = sorted(rng.choice(len(keys), min(num_batches, len(keys)), replace=False).tolist())
    results = [_rendered(evidence.batches[keys[number]], loader, tolerance) for number in drawn]
    epochs = len({keys[number][0] for number in drawn})
    what = f"{counted(len(results), 'batch')} of {counted(epochs, 'epoch')}"
    _add(
        facts,
        "images",
        [each[name] for each in results for name in ("samples", "images") if name in each],
        what,
        tolerance,
    )
    _add(facts, "labels", [each["labels"] for each in results if "labels" in each], what, tolerance)
    if run.teacher is None:
        return
    if not is_same_teacher:
        facts.unknown("teacher outputs", "the teacher differs")
        return
    _add(facts, "teacher outputs", [each["teacher"] for each in results if "teacher" in each], what, tolerance)


def _rendered(line: BatchLine, loader: KDDataLoader, tolerance: Tolerance) -> dict[str, tuple[Comparison, str]]:
    state = {**loader.state_dict(), "epoch": line.epoch, "batch": line.batch}
    try:
        loader.load_state_dict(state)
    except StateError:
        return {"samples": ("differs", f"epoch {line.epoch + 1}, batch {line.batch + 1}: there is no such batch")}
    batch = loader.peek()
    found = describe_batch(batch, epoch=line.epoch, number=line.batch, step=line.step, terms={})
    result = compare_batch(line, found, tolerance, names=_names(loader, batch, len(line.samples)))
    result.pop("loss", None)
    return result


def _names(loader: KDDataLoader, batch: KDBatch, count: int) -> Sequence[str]:
    return [loader.sample_name(index).rpartition("/")[2] for index in batch.index[:count].tolist()]


def _add(facts: Facts, name: str, results: Sequence[tuple[Comparison, str]], what: str, tolerance: Tolerance) -> None:
    """Add a fact about several comparisons."""
    wrong = [text for comparison, text in results if comparison == "differs"]
    if wrong:
        facts.differs(name, wrong, cause=tolerance.why and f"Not within rounding, although {tolerance.why}")
    elif not results:
        facts.unknown(name, "the samples differ")
    elif any(comparison == "close" for comparison, _ in results):
        facts.holds(name, f"{what}, within rounding ({tolerance.why})", is_exact=False)
    else:
        facts.holds(name, f"{what}, bit for bit")


def _kept(seed: int, epoch: int, num_batches: int) -> list[int]:
    return [number for number in range(num_batches) if is_kept(seed, epoch, number, num_batches)]


def _short(fingerprint: Any) -> str:
    """The start of a fingerprint, which of several teachers is a list."""
    return printable(fingerprint if isinstance(fingerprint, str) else str(fingerprint))[:12]
