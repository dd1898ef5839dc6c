"""The head of a report: what was trained from what, the result in one sentence, when, where and how it ended."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kd_pipeline.report.document import Card
from kd_pipeline.workflows.reporting.cost import shown_time
from kd_pipeline.workflows.reporting.results import Primary, primary
from kd_pipeline.workflows.reporting.run import RunRecord

__all__ = ["Head", "head_of", "status_of"]

Tone = Literal["good", "open", "bad"]
_LIBRARIES = ("timm", "torchvision", "builtin", "factory")


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above the sections."""

    title: str
    summary: Sequence[str]
    status: str
    tone: Tone
    cards: Sequence[Card]
    facts: Sequence[tuple[str, str]]


def head_of(title: str, main: Sequence[RunRecord], records: Sequence[RunRecord]) -> Head:
    """The head of a report on the runs `main`, of which `records` has the stages, too."""
    if len(main) > 1:
        return _of_several(title, main)
    run = main[0]
    others = [record for record in records if record is not run]
    status, tone = status_of(run)
    return Head(title, [*_sentences(run, others)], status, tone, [*_cards(run)], [*_facts(run)])


def status_of(run: RunRecord) -> tuple[str, Tone]:
    """How a run has ended, from its history."""
    if run.results_at is not None:
        return "Finished", "good"
    if not run.trainings:
        return ("Finished", "good") if run.evaluations else ("No training is recorded", "open")
    last = run.trainings[-1]
    step = last.last_step
    if step is None:
        logged = [points[-1][0] for points in run.metrics.values()]
        step = int(max(logged)) + 1 if logged else last.first_step
    match last.outcome:
        case "":
            return f"Not ended: killed after step {step:,}, or still running", "open"
        case "trained":
            return "Trained; results are missing", "open"
        case outcome if outcome.startswith(("stopped", "KeyboardInterrupt")):
            return f"Stopped at step {step:,} ({outcome})", "open"
        case outcome:
            return f"Failed at step {step:,}: {outcome}", "bad"


def _of_several(title: str, runs: Sequence[RunRecord]) -> Head:
    found = [(run, *result) for run in runs if (result := _result(run)) is not None]
    sentences = [f"{len(runs)} runs side by side: {', '.join(run.name for run in runs)}."]
    if len(found) > 1 and len({(split, metric.name) for _, split, metric in found}) == 1:
        (winner, split, top), (runner_up, _, second) = sorted(found, key=lambda each: -each[2].value)[:2]
        lead = f"{top.shown(top.value)}, before {runner_up.name} with {top.shown(second.value)}"
        if top.value == second.value:
            lead = f"{top.shown(top.value)}, as has {runner_up.name}"
        sentences.append(f"{winner.name} has the highest {top.name} on {split}, {lead}.")
    unfinished = [f"{run.name}: {status_of(run)[0].lower()}" for run in runs if status_of(run)[1] != "good"]
    if unfinished:
        sentences.append(f"Not all have finished. {'; '.join(unfinished)}.")
    cards = [
        Card(metric.shown(metric.value), f"{run.name}: {metric.name} on {split}") for run, split, metric in found[:8]
    ]
    return Head(title, sentences, "", "good", cards, [])


def _result(run: RunRecord) -> tuple[str, Primary] | None:
    """The split and the metric to judge a run by; None if nothing was measured."""
    for split in sorted(run.evaluations, key=lambda split: split != "val"):
        if (found := primary(run.evaluations[split])) is not None:
            return split, found
    return None


def _sentences(run: RunRecord, others: Sequence[RunRecord]) -> Iterator[str]:
    student, teacher = (_with_parameters(name) for name in _networks(run))
    data = _data(run)
    match run.stage:
        case "teacher":
            yield f"{teacher or student or 'A teacher'} was trained on the labels{data}."
        case "baseline":
            yield f"{student or 'A student'} was trained on the labels{data} alone, without a teacher."
        case _:
            yield f"{student or 'A student'} learned from {teacher or 'its teacher'}{' on' if data else ''}{data[3:]}."
    if (found := _result(run)) is None:
        yield "No result was measured."
        return
    split, metric = found
    text = f"Its {metric.name} on {split} is {metric.shown(metric.value)}"
    if metric.teacher is not None and metric.gap is not None:
        where = f"{abs(metric.gap):.1f} points {'below' if metric.gap < 0 else 'above'}"
        where = "as good as" if abs(metric.gap) < 0.05 else where
        text += f", {where} its teacher ({metric.shown(metric.teacher)})"
    yield f"{text}."
    for other in others:
        alone = _result(other) if other.stage == "baseline" else None
        if alone is not None and (alone[0], alone[1].name) == (split, metric.name):
            gained = 100 * (metric.value - alone[1].value)
            yield (
                f"The same student without a teacher reaches {metric.shown(alone[1].value)}: distillation brought "
                f"{abs(gained):.1f} points {'more' if gained >= 0 else 'less'}."
            )


def _with_parameters(name: str) -> str:
    """`name (20,034 parameters)` of a name with more about it after commas."""
    match = re.fullmatch(r"(?:(.*?), )?(\d[\d,]* parameters)(, .*)?", name)
    return name if match is None else f"{match[1] or 'a network of its own'} ({match[2]})"


def _data(run: RunRecord) -> str:
    """` of 1,433 images in 10 classes`; empty if it is not known."""
    for rows in ("images", "samples", "rows"):
        if match := re.search(r"train (\d[\d,]*\d|\d)", told := run.told(rows)):
            classes = re.search(r"(\d[\d,]*) (class(?:es)?(?: of pixels)?)", told)
            return f" of {match[1]} {rows}" + (f" in {classes[1]} {classes[2]}" if classes else "")
    return ""


def _networks(run: RunRecord) -> tuple[str, str]:
    """What student and teacher are called."""
    student, teacher = run.told("student"), run.told("teacher")
    if run.stage == "teacher":
        return "", teacher or _network(run.setting("teacher.model"))
    settings = run.setting("teacher")
    return student or _network(run.setting("student")), teacher or _teacher(settings)


def _network(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return ""
    return next((str(settings[name]) for name in _LIBRARIES if isinstance(settings.get(name), str)), "")


def _teacher(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return ""
    for key in ("onnx", "engine", "path"):
        if isinstance(settings.get(key), str):
            return str(settings[key])
    if isinstance(members := settings.get("members"), list | Mapping):
        return f"{len(members)} teachers"
    return _network(settings.get("model"))


def _cards(run: RunRecord) -> Iterator[Card]:
    if (found := _result(run)) is not None:
        split, metric = found
        yield Card(metric.shown(metric.value), f"{run.title}, {metric.name} on {split}")
        if metric.teacher is not None and metric.gap is not None:
            yield Card(metric.shown(metric.teacher), "teacher, the same")
            yield Card(f"{metric.gap:+.1f}", "points from teacher to student")
        agreement = run.evaluations[split].agreement
        if agreement is not None and metric.value != agreement:
            yield Card(metric.shown(agreement), "agreement with the teacher")


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    first, last = (run.trainings[0], run.trainings[-1]) if run.trainings else (None, None)
    facts = {
        "Started": "" if first is None else shown_time(first.began),
        "Ended": shown_time(run.results_at or (None if last is None else last.ended)),
        "Host": "" if last is None else last.host,
        "Device": run.told("device"),
        "Epochs": run.told("epochs") or str(run.setting("train.epochs") or ""),
        "Loss": str(run.setting("distill.loss") or "") if run.stage == "distill" else "",
        "Folder": str(run.path),
    }
    yield from ((name, value) for name, value in facts.items() if value)
