"""The sections of a report on what a run took: time, images, checks, files, settings and versions."""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from kd_pipeline._core.cpu_features import trains_faster_in_bf16
from kd_pipeline._core.text import counted
from kd_pipeline.errors import KDPipelineError
from kd_pipeline.report.advice import advice_for
from kd_pipeline.report.document import Bar, Block, Code, Facts, Fold, Heading, Shares, Table, Text
from kd_pipeline.workflows.reporting.run import RunRecord, read_json

__all__ = [
    "check_blocks",
    "config_blocks",
    "environment_blocks",
    "history_blocks",
    "shown_duration",
    "shown_time",
    "time_blocks",
]

_MAX_WARNINGS = 40
_MAX_FACTS = 60
_MAX_STARTS = 100
_MAX_TEXT = 1000
_MAX_PACKAGES = 2000
_MAX_FILES = 40
_RECORDING = "manifest.json"


def shown_time(at: datetime | None) -> str:
    """A time with its offset from UTC; empty if it is not known."""
    return "" if at is None else at.isoformat(sep=" ", timespec="minutes")


def shown_duration(duration: timedelta) -> str:
    """A duration as people say it."""
    seconds = duration.total_seconds()
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def time_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """Where the time went, what would change it, and what it all cost."""
    steps, whole, advice, costs = [], [], [], []
    for run in runs:
        shares = _step_shares(run)
        if shares:
            steps.append(Bar(run.name, [(name, shares.get(name, 0.0)) for name in ("loader", "teacher", "student")]))
            if not run.part_of:
                advice.append(_advice(run, shares, names_run=sum(not each.part_of for each in runs) > 1))
        if parts := _parts(run):
            whole.append(Bar(run.name, parts))
        costs.append(_cost(run))
    if steps:
        yield Heading("A training step")
        yield Text(
            "What the training waited for, on average over the steps that were logged. On a GPU the student's share is "
            "the time to queue its work, and what the GPU takes longer is waited for by the others."
        )
        yield Shares(steps)
        yield from (Text(sentence, "note") for sentence in advice)
    if whole:
        yield Heading("The whole run")
        yield Text(
            "From the first start to the results. Training is reckoned from the speed that was logged; the rest of it "
            "is validation, checkpoints and the start."
        )
        yield Shares(whole)
    yield Heading("Cost")
    columns = ["Run", "Steps", "Images seen", "Images/s", "Time", "Energy"]
    if any(costs):
        yield Table(columns, [[run.name, *cost] for run, cost in zip(runs, costs, strict=True) if cost])
    yield Text("Images seen are steps times batch size; views that are made of one image count once.", "note")
    yield Text(
        "Energy is that of the training, by the counters of all CPUs of the machine and of the first process's GPU, "
        "whoever used them. It is left out where they cannot be read.",
        "note",
    )


def history_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """Every start and end of the trainings."""
    rows = []
    for run in runs:
        for training in run.trainings[-_MAX_STARTS:]:
            end = training.outcome or "no end is recorded: it was killed, or still runs"
            step = "" if training.last_step is None else f"{training.last_step:,}"
            took = "" if training.duration is None else shown_duration(training.duration)
            changes = "; ".join(training.changes)[:_MAX_TEXT] or "none"
            rows.append([run.name, shown_time(training.began), end, changes, f"{training.first_step:,}", step, took])
    if rows:
        columns = ["Run", "Started", "End", "Settings changed", "From step", "To step", "Time"]
        yield Table(columns, rows, num_text=4)
    else:
        yield Text("The run has no history.", "note")
    commands = {run.name: run.trainings[-1].command for run in runs if run.trainings and run.trainings[-1].command}
    if commands:
        yield Text("The command of the last start:")
        yield Code("\n".join(dict.fromkeys(commands.values())))


def check_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """The teacher probe, findings of `kd-pipeline check`, warnings, and the files that the run has left."""
    for run in runs:
        blocks = [*_checks(run)]
        if blocks:
            if len(runs) > 1:
                yield Heading(run.name)
            yield from blocks


def config_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """The whole config of each run."""
    yield Text("Every setting of the run, defaults included. What looks like a secret by its name is shown as ***.")
    for run in runs:
        if run.config:
            text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
            yield Fold(f"config.yaml of {run.name}", [Code(text)])
        else:
            yield Text(f"{run.name} has no config.yaml.", "note")


def environment_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """Machine, Python and packages."""
    for run in runs:
        told = {"host": _host(run), "device": run.told("device")}
        known = {name: run.environment.get(name) for name in ("python", "platform", "folder")}
        rows = [(name, value) for name, value in (told | known).items() if isinstance(value, str) and value]
        packages = run.environment.get("packages")
        if not rows and not isinstance(packages, Mapping):
            continue
        if len(runs) > 1:
            yield Heading(run.name)
        if run.trainings and run.trainings[-1].version:
            rows.insert(0, ("kd_pipeline", run.trainings[-1].version))
        yield Facts(rows)
        if isinstance(packages, Mapping):
            names = [f"{name}=={version}" for name, version in packages.items() if isinstance(version, str)]
            names = [name[:_MAX_TEXT] for name in names[:_MAX_PACKAGES]]
            yield Fold(f"{counted(len(names), 'package')}", [Code("\n".join(names))])


def _host(run: RunRecord) -> str:
    found = run.environment.get("host")
    return found if isinstance(found, str) else run.trainings[-1].host if run.trainings else ""


def _mean(run: RunRecord, name: str) -> float | None:
    points = run.metrics.get(name)
    return fmean(value for _, value in points) if points else None


def _step_shares(run: RunRecord) -> dict[str, float]:
    """The shares of a step, from 0 to 1; empty if they were not logged."""
    both, teacher = _mean(run, "train/loader_share"), _mean(run, "train/teacher_share") or 0.0
    if both is None or not 0 <= teacher <= both <= 1:
        return {}
    return {"loader": both - teacher, "teacher": teacher, "student": 1 - both}


def _advice(run: RunRecord, shares: Mapping[str, float], *, names_run: bool) -> str:
    part = max(shares, key=lambda name: shares[name])
    on_gpu = run.told("device").startswith("cuda")
    is_here = _host(run) == socket.gethostname()
    gains = run.setting("train.precision") == "32-true" and (on_gpu or (is_here and trains_faster_in_bf16()))
    which = f" of {run.name}" if names_run else ""
    share = f"{shares[part]:.0%} of the time of a step{which} goes into"
    return advice_for(part, share, gains_from_bf16=gains, is_compiled=run.setting("train.compile") is True) + "."


def _images_seen(run: RunRecord) -> int | None:
    steps = _last_step(run)
    batch, accumulate = run.setting("data.batch_size"), run.setting("train.accumulate")
    if steps is None or not isinstance(batch, int):
        return None
    processes = run.trainings[-1].processes if run.trainings else 1
    return steps * batch * processes * (accumulate if isinstance(accumulate, int) else 1)


def _last_step(run: RunRecord) -> int | None:
    steps = [training.last_step for training in run.trainings if training.last_step is not None]
    if steps:
        return steps[-1]
    logged = [points[-1][0] for points in run.metrics.values()]
    return int(max(logged)) + 1 if logged else None  # rows count steps from 0


def _rate(run: RunRecord) -> float | None:
    """Images per second of all processes."""
    rate = _mean(run, "train/images_per_s")
    return None if rate is None or rate <= 0 else rate * (run.trainings[-1].processes if run.trainings else 1)


def _parts(run: RunRecord) -> list[tuple[str, float]]:
    """Training, the rest of it, and the end, as shares; empty if times are missing."""
    fit = sum((each.duration for each in run.trainings if each.duration is not None), timedelta()).total_seconds()
    images, rate = _images_seen(run), _rate(run)
    if images is None or rate is None or fit < 1:
        return []
    training = min(images / rate, fit)
    ended = run.trainings[-1].ended
    end = 0.0
    if run.results_at is not None and ended is not None:
        end = max(0.0, (run.results_at - ended).total_seconds())
    whole = fit + end
    parts = {"training": training, "validation and the rest": fit - training}
    timed = {"evaluation": 0.0, "export": 0.0, "plots": 0.0}
    for title, seconds in run.seconds().items():
        kind = next((name for name in ("evaluation", "export", "plots") if title.startswith(name)), None)
        if kind is not None:
            timed[kind] += seconds
    timed_s = sum(timed.values())
    scale = min(1.0, end / timed_s) if timed_s else 0.0
    parts |= {f"{name} at the end": seconds * scale for name, seconds in timed.items()}
    parts["other work at the end"] = max(0.0, end - timed_s * scale)
    return [(name, seconds / whole) for name, seconds in parts.items()]


def _cost(run: RunRecord) -> list[str]:
    """Steps, images, their rate, the time and the energy; empty if nothing is known."""
    steps, images, rate = _last_step(run), _images_seen(run), _rate(run)
    durations = [each.duration for each in run.trainings if each.duration is not None]
    took = sum(durations, timedelta())
    if run.results_at is not None and run.trainings and run.trainings[-1].ended is not None:
        took += max(run.results_at - run.trainings[-1].ended, timedelta())
    if steps is None and not durations:
        return []
    return [
        "" if steps is None else f"{steps:,}",
        "" if images is None else f"{images:,}",
        "" if rate is None else f"{rate:,.0f}",
        shown_duration(took) if durations else "",
        ", ".join(f"{name} {_shown_energy(value)}" for name, value in _energy(run).items()),
    ]


def _energy(run: RunRecord) -> dict[str, float]:
    """Kilojoules of CPUs and GPU, as far as they were counted."""
    found = {}
    for name, column in {"CPU": "train/cpu_energy_kj", "GPU": "train/gpu_energy_kj"}.items():
        total = before = 0.0
        for _, value in run.metrics.get(column, ()):
            total += value - before if value >= before else value  # each start counts from zero
            before = value
        if total > 0:
            found[name] = total
    return found


def _shown_energy(kilojoules: float) -> str:
    """As people pay for it, or in kilojoules if that is little."""
    return f"{kilojoules:.1f} kJ" if kilojoules < 360 else f"{kilojoules / 3600:.2f} kWh"


def _checks(run: RunRecord) -> Iterator[Block]:
    lines = dict.fromkeys(line.text for line in run.log if line.text.startswith(("teacher probe:", "teacher: ")))
    if lines:
        yield Text("The teacher as it was opened, and how it did on training images before the first step:")
        yield Facts([(name, text) for name, _, text in (line.partition(": ") for line in [*lines][-6:])])
    for problem in run.problems:
        yield Text(problem, "warning")
    yield from _findings(run)
    warnings = [*dict.fromkeys(line.text for line in run.log if line.level in ("WARNING", "ERROR", "CRITICAL"))]
    if warnings:
        shown = warnings[-_MAX_WARNINGS:]
        yield Fold(f"{counted(len(warnings), 'warning')} in the log", [Code("\n".join(shown))])
    files = [] if run.part_of else [*_files(run)]
    if files:
        yield Table(["File", "Size"], files, title="What to use")
    yield from _engine(run)
    yield from _recording(run)


def _findings(run: RunRecord) -> Iterator[Block]:
    """What `kd-pipeline check` has found."""
    try:
        found = read_json(run.path, "check/check.json").get("findings")
    except KDPipelineError as exc:
        yield Text(str(exc), "warning")
        return
    if not isinstance(found, list):
        return
    rows = [
        [str(each.get(name, ""))[:_MAX_TEXT] for name in ("severity", "where", "message")]
        for each in found[:_MAX_WARNINGS]
        if isinstance(each, dict)
    ]
    if rows:
        yield Table(["Severity", "Where", "What kd-pipeline check found"], rows, num_text=3)
    else:
        yield Text("kd-pipeline check found nothing to remark about the data and the models.")


def _files(run: RunRecord) -> Iterator[list[str]]:
    """The exported files with their sizes."""
    folder = run.path / "exported"
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in sorted(os.listdir(folder))[:_MAX_FILES]:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            yield [f"exported/{name}", _size(path.stat().st_size)]


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"


def _engine(run: RunRecord) -> Iterator[Block]:
    """What is known about an exported engine."""
    try:
        manifest = read_json(run.path, "exported/model.engine.json")
    except KDPipelineError as exc:
        yield Text(str(exc), "warning")
        return
    if not manifest:
        return
    names = ("precision", "runtime", "runtime_version", "gpu", "compute_capability", "engine_bytes", "build_s")
    rows = [(name, _plain(manifest[name])) for name in names if name in manifest]
    parity = manifest.get("parity")
    outputs = parity.get("outputs") if isinstance(parity, dict) else None
    if isinstance(outputs, dict):
        rows += [(f"parity of {name}", _plain(each)) for name, each in outputs.items()]
    yield Heading("Engine")
    yield Text("Parity compares its outputs with those of the float32 ONNX file: a cosine of 1 is the same direction.")
    yield Facts(rows[:_MAX_FACTS])


def _recording(run: RunRecord) -> Iterator[Block]:
    """The size of the recording that the student learned from."""
    path = run.setting("teacher.path")
    if not isinstance(path, str) or not (Path(path) / _RECORDING).is_file():
        return
    sizes = [
        entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)
    ]
    text = (
        f"The teacher's outputs are from a recording of {_size(sum(sizes))} in {counted(len(sizes), 'file')}, {path}."
    )
    yield Text(text)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items() if each is not None)[:_MAX_TEXT]
    if isinstance(value, float):
        return f"{value:.6g}"
    return value[:_MAX_TEXT] if isinstance(value, str) else json.dumps(value)[:_MAX_TEXT]
