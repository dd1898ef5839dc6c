"""Whether steps of a finished run come out the same when they are trained again, and so do its student and metrics."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import nn

from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import counted, plural
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.modules import call_network, named_outputs
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.training.evidence import Evidence
from kd_pipeline.workflows.exported import ONNX, WEIGHTS
from kd_pipeline.workflows.results import read_evaluations
from kd_pipeline.workflows.verification.facts import (
    ASPECTS,
    Comparison,
    Facts,
    Tolerance,
    compare_batch,
    compare_weights,
)
from kd_pipeline.workflows.verification.files import RunFiles, read_weights
from kd_pipeline.workflows.verification.replay_run import ReplayRun

__all__ = ["check_results", "compare_replay"]

_MAX_STEPS = 2
"""Steps that differ of which a fact tells: those after them follow from them."""
_MAX_IMAGES = 16
"""For which the ONNX file is compared with the module."""
_ONNX_TOLERANCE = 1e-3
"""Of the largest output."""
_METRIC_TOLERANCE = 1e-6


def compare_replay(
    name: str, evidence: Evidence, replayed: Evidence, facts: Facts, tolerance: Tolerance, *, first_step: int
) -> int:
    """Add whether what was replayed after `first_step` is what was recorded; returns the last step that is, or 0."""
    results: list[tuple[Comparison, str]] = []
    batches = [key for key in sorted(replayed.batches) if key in evidence.batches]
    for key in batches:
        compared = compare_batch(evidence.batches[key], replayed.batches[key], tolerance)
        results += [compared[aspect] for aspect in ASPECTS if aspect in compared]
    steps = [step for step in sorted(replayed.weights) if step in evidence.weights]
    weights = [compare_weights(evidence.weights[step], replayed.weights[step], tolerance) for step in steps]
    last = max([first_step, *(replayed.batches[key].step for key in batches), *steps])
    wrong = [text for comparison, text in results + weights if comparison == "differs"]
    if not batches and not steps:
        facts.unknown(name, f"no evidence was kept of the steps after step {first_step}")
    elif wrong:
        cause = f"Not within rounding, although {tolerance.why}" if tolerance.why else _cause(results)
        facts.differs(name, wrong, cause=cause, most=_MAX_STEPS)
    else:
        span = f"step {last}" if last == first_step + 1 else f"steps {first_step + 1} to {last}"
        what = f"{span}: {counted(len(batches), 'loss')}"
        if steps:
            what += f" and the weights after {plural(len(steps), 'step')} {first_few(list(map(str, steps)))}"
        is_exact = all(comparison == "equal" for comparison, _ in results + weights)
        facts.holds(
            name, f"{what}, {'bit for bit' if is_exact else f'within rounding ({tolerance.why})'}", is_exact=is_exact
        )
        return last
    return 0


def check_results(files: RunFiles, run: ReplayRun, facts: Facts, tolerance: Tolerance) -> None:
    """Compare the exported student, loaded again, with its ONNX file, and its metrics with those of `result.json`."""
    names = ("ONNX file", "result.json")
    if not (files.folder.exported / WEIGHTS).is_file():
        for name in names:
            facts.unknown(name, "the run has exported none yet: it is not finished")
        return
    with facts.part(*names):
        weights = read_weights(files.folder.exported / WEIGHTS)
        student, distillation = run.exported_student(weights)
        with facts.part("ONNX file"):
            _check_onnx(files, run, student, facts)
        with facts.part("result.json"):
            _check_metrics(files, run, student, distillation, facts, tolerance)


def _check_onnx(files: RunFiles, run: ReplayRun, student: nn.Module, facts: Facts) -> None:
    path = files.folder.exported / ONNX
    if not path.is_file():
        facts.unknown("ONNX file", "the run has exported none")
        return
    images = run.loader.peek().of_view(run.view).images[:_MAX_IMAGES].float().cpu()
    module = student.float().cpu().eval()
    with torch.no_grad():
        wanted = named_outputs(call_network(module, images))
    with closing(OnnxRuntimeTeacher(path, precision=None)) as session:
        found = session(images)
    wrong, largest = [], 0.0
    for name, output in wanted.items():
        if name not in found or found[name].shape != output.shape:
            wrong.append(f"output {name}: it has none of the shape {[*output.shape]}")
            continue
        difference = float((found[name] - output).abs().max()) / max(float(output.abs().max()), 1e-6)
        largest = max(largest, difference)
        if not difference <= _ONNX_TOLERANCE:
            wrong.append(f"output {name}: it differs by {difference:.2g} of the largest value")
    if wrong:
        facts.differs("ONNX file", wrong, cause=f"{ONNX} holds other weights than {WEIGHTS}")
    else:
        facts.holds(
            "ONNX file",
            f"returns what the exported module does for {counted(len(images), 'image')}, within {largest:.1e}",
        )


def _check_metrics(
    files: RunFiles, run: ReplayRun, student: nn.Module, distillation: Distillation, facts: Facts, tolerance: Tolerance
) -> None:
    recorded = read_evaluations(files.folder.result)
    found = run.evaluate(student.to(run.loader.device), distillation)
    changed, is_exact = [], True
    for split in {**recorded, **found}:
        if split not in recorded or split not in found:
            changed.append(f"{split}: only in {'result.json' if split in recorded else 'the evaluation'}")
            continue
        for name, old, new, comparison in _compared(recorded[split], found[split], tolerance):
            if comparison == "differs":
                changed.append(f"{split}/{name}: {old} → {new}")
            is_exact = is_exact and comparison == "equal"
    if changed:
        facts.differs("result.json", changed, cause="Old is result.json, new the exported student on the same images")
        return
    shown = ", ".join(f"{split}: {_shown(each)}" for split, each in found.items())
    how = "" if is_exact else ", within rounding"
    facts.holds("result.json", f"the exported student has these metrics ({shown}){how}")


def _compared(old: Evaluation, new: Evaluation, tolerance: Tolerance) -> Iterable[tuple[str, Any, Any, Comparison]]:
    """Each number of two evaluations, and of those of the teacher in them."""
    allowed = _METRIC_TOLERANCE if tolerance.is_exact else max(tolerance.relative, 2 / max(old.num_samples, 1))
    ours, theirs = _flat(old.to_dict()), _flat(new.to_dict())
    for name in {**ours, **theirs}:
        before, after = ours.get(name), theirs.get(name)
        comparison: Comparison = "equal" if before == after else "differs"
        if comparison == "differs" and _is_number(before) and _is_number(after):
            assert before is not None and after is not None
            is_count = name.startswith(("confusion", "num_", "teacher.confusion"))
            limit = (0 if tolerance.is_exact else 2) if is_count else allowed * max(1.0, abs(before))
            comparison = "close" if abs(before - after) <= limit else "differs"
        yield name, before, after, comparison


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            key: each for part, item in value.items() for key, each in _flat(item, f"{name}.{part}".lstrip(".")).items()
        }
    if isinstance(value, list | tuple):
        return {key: each for place, item in enumerate(value) for key, each in _flat(item, f"{name}[{place}]").items()}
    return {name: value}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(evaluation: Evaluation) -> str:
    scalars = evaluation.scalars()
    names = [name for name in ("top1", "miou", "knn_top1", "loss") if name in scalars][:2]
    return " ".join(f"{name} {scalars[name]:.4g}" for name in names)


def _cause(results: list[tuple[Comparison, str]]) -> str:
    """What the first difference says about where it comes from."""
    first = next((text for comparison, text in results if comparison == "differs"), "")
    if "samples" in first or "labels" in first or "pixels" in first:
        return "The data is different"
    if "teacher" in first:
        return "The teacher is different"
    return "Settings, start or code of the training are different, or what is recorded is that of another run"
