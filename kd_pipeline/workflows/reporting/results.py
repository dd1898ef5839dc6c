"""The sections of a report on what was learned: results, differences, curves and classes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._features import COSINE
from kd_pipeline.report.data_uri import confusion_uri
from kd_pipeline.report.document import Block, Chart, Charts, Fold, Heading, Matrix, Picture, Series, Table, Text
from kd_pipeline.workflows.reporting.run import RunRecord
from kd_pipeline.workflows.result_table import result_rows

__all__ = ["Primary", "class_blocks", "curve_blocks", "difference_blocks", "primary", "result_blocks"]

_PRIMARY = (
    ("top1", "top-1 accuracy"),
    ("miou", "mIoU"),
    ("knn_top1", "k-NN accuracy of its features"),
    ("agreement", "agreement with the teacher"),
)
"""Metrics for the head of a report, the first that was measured."""
_PANELS = {
    "loss": "Loss",
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "macro_f1": "F1, mean over classes",
    "miou": "mIoU",
    "pixel_accuracy": "Pixel accuracy",
    "agreement": "Agreement with the teacher",
    "knn_top1": "k-NN accuracy of features",
    "linear_top1": "Linear probe of features",
    "kl": "KL divergence from the teacher",
    "cosine": "Cosine to the teacher's features",
    "terms": "Terms of the loss",
    "shares": "Shares of the loss terms",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "waiting": "Share of the time for loader and teacher",
    "gradient_norm": "Norm of the gradient",
    "cpu_cores": "CPU cores in use",
    "host_memory_gib": "Memory of the process, GiB",
    "device_memory_gib": "Memory in use on the GPU, GiB",
    "memory_gib": "GPU memory of torch, GiB",
    "device_use": "Share of the time in which the GPU had work",
    "disk_mib_per_s": "Read from disks, MiB/s",
}
"""Titles of the charts in their order."""
_FRACTIONS = ("top1", "top5", "macro_f1", "miou", "pixel_accuracy", "agreement", "knn_top1", "linear_top1")
_IN_PERCENT = {*_FRACTIONS, "shares", "waiting", "device_use"}
_WAITING = {"loader_share": "loader and teacher", "teacher_share": "teacher"}
_MAX_CHARTS, _MAX_SERIES = 24, 24
_MAX_COUNTED = 20
"""Classes up to which a confusion matrix shows its counts."""
_MAX_CLASSES, _MAX_PICTURED = 2000, 5000
_WORST = 15
_MAX_PAIRS = 15
_MAX_CHANGED = 300
"""Rows of a table of differences."""
_MAX_COLUMNS = 40
"""Of the table of results."""
_MAX_VALUE = 500
"""Characters of a list."""


@dataclass(frozen=True, slots=True)
class Primary:
    """The metric that tells most about a network."""

    name: str
    value: float
    teacher: float | None
    """The teacher's; None if it is not known."""
    is_fraction: bool = True

    def shown(self, value: float) -> str:
        """A value of this metric as people read it."""
        return f"{value:.1%}" if self.is_fraction else f"{value:.3f}"

    @property
    def gap(self) -> float | None:
        """Points that the network is ahead of its teacher; None if they cannot be compared."""
        return None if self.teacher is None or not self.is_fraction else 100 * (self.value - self.teacher)


def primary(evaluation: Evaluation) -> Primary | None:
    """The most telling metric; None if nothing was measured."""
    for name, text in _PRIMARY:
        if (value := _metric(evaluation, name)) is not None:
            theirs = None if evaluation.teacher is None else _metric(evaluation.teacher, name)
            return Primary(text, value, theirs if theirs is not None else _metric(evaluation, f"teacher_{name}"))
    for name in evaluation.metrics:
        if name.startswith(f"{COSINE}.") and (value := _metric(evaluation, name)) is not None:
            return Primary(f"cosine to the teacher's {name.removeprefix(f'{COSINE}.')}", value, None, is_fraction=False)
    return None


def result_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """A table of every network."""
    rows: list[dict[str, str]] = []
    for run in runs:
        for split, found in run.evaluations.items():
            rows += [{"run": run.name, **row} for row in result_rows(split, found, run.title)]
    if not rows:
        yield Text("No metrics are known: the run has not reached its end, or measured nothing.", "note")
        return
    if len(runs) == 1:
        rows = [{name: value for name, value in row.items() if name != "run"} for row in rows]
    rows = [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]
    columns = [*dict.fromkeys(name for row in rows for name in row)][:_MAX_COLUMNS]
    yield Text(
        "Each row is a network on a split of the data. Higher is better, except for the loss. Agreement is the share "
        "of images for which student and teacher have the same top class."
    )
    num_text = columns.index("network") + 1
    yield Table([*map(_capital, columns)], [[row.get(name, "") for name in columns] for row in rows], num_text)
    if any("linear" in row or "k-NN" in row for row in rows):
        yield Text(
            "k-NN and linear judge features without a head: by the labels of the nearest images, and by a linear "
            "classifier on the features.",
            "note",
        )


def difference_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """What differs between runs: settings, versions, data and results."""
    names = [run.name for run in runs]
    settings = [_flat(run.config) for run in runs]
    tables = {
        "Settings": _different(settings, ignored=("run_dir",)),
        "Data": _different([dict(run.fingerprints) for run in runs]),
        "Versions": _different([_versions(run) for run in runs]),
    }
    results = []
    for run in runs:
        values: dict[str, str] = {}
        for split, found in run.evaluations.items():
            values |= {f"{split}/{name}": _number(value) for name, value in sorted(_scalars(found).items())}
        results.append(values)
    tables["Results"] = _different(results)
    for title, rows in tables.items():
        if not rows:
            is_unknown = title == "Data" and not all(run.fingerprints for run in runs)
            nothing = "not every run has recorded the fingerprints of its data" if is_unknown else "no difference"
            yield Text(f"{title}: {nothing}.", "note")
            continue
        table = Table([title[:-1] if title != "Data" else "Split", *names], rows[:_MAX_CHANGED], 1 + len(names))
        more = len(rows) - _MAX_CHANGED
        note = [] if more <= 0 else [Text(f"and {more:,} more", "note")]
        if title == "Versions":
            yield Fold(f"{len(rows)} versions differ", [table, *note])
        else:
            yield Heading(title)
            yield table
            yield from note


def curve_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """A chart for each metric that was logged while training."""
    measured = [run for run in runs if run.metrics]
    if not measured:
        yield Text("Nothing was logged while training.", "note")
        return
    is_one = len(measured) == 1
    charts: dict[str, list[Series]] = {}
    for number, run in enumerate(measured):
        for name, points in run.metrics.items():
            panel = _panel(name, run.metrics, is_one=is_one)
            if panel is not None and len(charts.setdefault(panel, [])) < _MAX_SERIES:
                charts[panel].append(_series(panel, name, points, None if is_one else run, number))
    several = "" if is_one else " Each run has its color."
    yield Text(
        "Over the steps of the optimizer. Where a chart has both, dashed lines are measured on the training images, "
        f"which augmentation makes harder, and solid lines on validation images.{several}"
    )
    order = [name for name in (*_PANELS, *sorted(charts.keys() - _PANELS.keys())) if name in charts]
    drawn = [name for name in order if name in _PANELS or _changes(charts[name])]
    yield Charts(
        [
            Chart(_PANELS.get(panel, panel), _styled(charts[panel], is_one=is_one), in_percent=_is_percent(panel))
            for panel in drawn[:_MAX_CHARTS]
        ]
    )


def class_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """The classes of each run, the worst first, and what they are taken for."""
    for run in runs:
        shown = {split: blocks for split, found in run.evaluations.items() if (blocks := [*_classes(found)])}
        for number, (split, blocks) in enumerate(shown.items()):
            title = split if len(runs) == 1 else f"{run.name}, {split}"
            yield from [Heading(title), *blocks] if number == 0 else [Fold(f"The same on {title}", blocks)]


def _classes(found: Evaluation) -> Iterator[Block]:
    values = _of_classes(found)
    if values is None or not 0 < len(values) <= _MAX_PICTURED:
        return
    names = [*found.classes] if found.classes is not None else [str(label) for label in range(len(values))]
    if len(names) != len(values):
        return
    theirs = None if found.teacher is None else _of_classes(found.teacher)
    theirs = theirs if theirs is not None and len(theirs) == len(values) else None
    counts = _counts(found)
    unit, unit_of_counts = ("accuracy", "Samples") if found.class_iou is None else ("IoU", "Pixels")
    order = sorted(range(len(values)), key=lambda label: (values[label] is None, values[label] or 0.0))
    columns = ["Class", *(["Most often taken for"] if counts is not None else [])]
    num_text = len(columns)
    columns += [*([unit_of_counts] if counts is not None else []), f"Student {unit}"]
    columns += [] if theirs is None else [f"Teacher {unit}", "Difference"]
    rows = [[*_confused(label, names, counts), *_compared(label, values, theirs)] for label in order[:_MAX_CLASSES]]
    yield Text(
        f"The worst classes first{'; a difference below zero is what the teacher knows better' if theirs else ''}."
    )
    yield Table(columns, rows[:_WORST], num_text)
    if len(order) > _WORST:
        title = f"All {len(order):,} classes" if len(rows) == len(order) else f"The worst {len(rows):,} classes"
        yield Fold(title, [Table(columns, rows, num_text)])
    if counts is not None:
        yield from _confusion(names, counts, is_of_pixels=found.class_iou is not None)


def _of_classes(found: Evaluation) -> Sequence[float | None] | None:
    """The accuracy of each class, or its IoU for pixels."""
    return found.class_accuracy if found.class_iou is None else found.class_iou


def _confused(label: int, names: Sequence[str], counts: "np.ndarray[Any, np.dtype[np.int64]] | None") -> list[str]:
    """The name of a class, and if counts are known what it is taken for most often, and its samples."""
    if counts is None:
        return [names[label]]
    others = counts[label].copy()
    others[label] = 0
    top = int(others.argmax())
    share = others[top] / max(1, counts[label].sum())
    return [
        names[label],
        f"{names[top]} ({share:.0%})" if others[top] else "",
        f"{int(counts[label].sum()):,}",
    ]


def _compared(label: int, values: Sequence[float | None], theirs: Sequence[float | None] | None) -> list[str]:
    """The value of a class, and with a teacher its value and the difference."""
    own = values[label]
    cells = ["" if own is None else f"{own:.1%}"]
    if theirs is not None:
        other = theirs[label]
        cells.append("" if other is None else f"{other:.1%}")
        cells.append("" if own is None or other is None else f"{100 * (own - other):+.1f}")
    return cells


def _confusion(
    names: Sequence[str], counts: np.ndarray[Any, np.dtype[np.int64]], *, is_of_pixels: bool
) -> Iterator[Block]:
    if len(names) <= _MAX_COUNTED:
        yield Text(
            "Rows are labels, columns the student's answers. What is off the diagonal is wrong, and darker where it is "
            "a larger share of its row."
        )
        yield Matrix("Confusion matrix", names, counts.tolist(), in_percent=is_of_pixels)
        return
    pairs = counts.copy()
    np.fill_diagonal(pairs, 0)
    order = np.argsort(pairs, axis=None)[::-1][:_MAX_PAIRS]
    rows = []
    for position in order.tolist():
        label, answer = divmod(position, len(names))
        if pairs[label, answer]:
            share = pairs[label, answer] / max(1, counts[label].sum())
            rows.append([names[label], names[answer], f"{pairs[label, answer]:,}", f"{share:.1%}"])
    if rows:
        unit = "Pixels" if is_of_pixels else "Images"
        yield Table(["Label", "Taken for", unit, "Of the label"], rows, 2, title="Most confused")
    yield Picture(
        confusion_uri(counts),
        "Confusion matrix: rows are labels and columns answers, in the order of the classes. Blue is right and orange "
        "wrong; what is darker is a larger share of its row. A pale column attracts what belongs elsewhere.",
    )


def _counts(found: Evaluation) -> "np.ndarray[Any, np.dtype[np.int64]] | None":
    """The confusion matrix, if it is one."""
    rows = found.confusion
    if rows is None or not rows or len(rows) > _MAX_PICTURED or any(len(row) != len(rows) for row in rows):
        return None
    try:
        counts = np.array(rows, dtype=np.int64)
    except OverflowError:
        return None
    return counts if counts.min() >= 0 and counts.max() < 2**40 else None


def _metric(evaluation: Evaluation, name: str) -> float | None:
    value = getattr(evaluation, name, None)
    value = evaluation.metrics.get(name) if value is None else value
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        return None
    return float(value)


def _scalars(found: Evaluation) -> dict[str, float]:
    return {name: value for name, value in found.scalars().items() if math.isfinite(value)}


def _number(value: float) -> str:
    return f"{value:.5g}"


def _panel(name: str, columns: Mapping[str, Any], *, is_one: bool) -> str | None:
    """The chart that a column of the metrics belongs to; None if it is not drawn.

    Of several runs, each term of the loss has a chart, in which each run has a line.
    """
    last = name.rpartition("/")[2]
    if last in ("epoch", "step", "skipped_steps") or last.endswith("_weight"):
        return None
    if last in ("loader_share", "teacher_share"):
        return "waiting" if is_one else f"Share of the time: {_WAITING[last]}"
    if last in ("loss", "epoch_loss"):
        both = {f"{name.rpartition('/')[0]}/epoch_loss", "train/loss"} <= columns.keys()
        return None if last == "loss" and both and name == "train/loss" and not is_one else "loss"
    if f"{name}_weight" in columns:
        return "terms" if is_one else f"Term of the loss: {last}"
    if last.endswith("_share"):
        return "shares" if is_one else f"Share of the loss: {last.removesuffix('_share')}"
    if last.startswith("cosine_to_teacher"):
        return "cosine" if is_one else f"Cosine to the teacher: {last.partition('.')[2] or last}"
    ends = (*_FRACTIONS[::-1], *_PANELS)
    return next((end for end in ends if last == end or last.endswith(f"_{end}")), last)


def _series(panel: str, name: str, points: Sequence[tuple[float, float]], run: RunRecord | None, number: int) -> Series:
    value = points[-1][1]
    split, _, last = name.rpartition("/")
    shown = name if run is None else run.name
    if run is not None and panel in _PANELS and split:
        shown += f", {split}" if last in (panel, "epoch_loss") else f", {name}"
    text = f"{value:.1%}" if _is_percent(panel) else f"{value:.4g}"
    return Series(shown, points, number, dashed=split == "train", last=text)


def _styled(series: Sequence[Series], *, is_one: bool) -> list[Series]:
    """Lines of one run in colors of their own; dashes only where they tell two kinds apart."""
    has_both = len({each.dashed for each in series}) > 1
    return [
        replace(each, color=number if is_one else each.color, dashed=each.dashed and has_both)
        for number, each in enumerate(series)
    ]


def _changes(series: Sequence[Series]) -> bool:
    return any(len({y for _, y in each.points}) > 1 for each in series)


def _is_percent(panel: str) -> bool:
    return panel in _IN_PERCENT or panel.startswith("Share of")


def _different(columns: Sequence[Mapping[str, str]], ignored: Sequence[str] = ()) -> list[list[str]]:
    """A row for each name whose values are not all equal."""
    names = [name for name in dict.fromkeys(name for column in columns for name in column) if name not in ignored]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return [row for row in rows if len({*row[1:]}) > 1]


def _flat(values: Any, key: str = "") -> dict[str, str]:
    """Every value by its dotted key, as text."""
    match values:
        case Mapping() if values:
            found: dict[str, str] = {}
            for name, value in values.items():
                found |= _flat(value, f"{key}.{name}".lstrip("."))
            return found
        case list() | tuple() if values and all(isinstance(each, Mapping) for each in values):
            found = {}
            for position, value in enumerate(values):
                found |= _flat(value, f"{key}.{position}")
            return found
        case list() | tuple():
            return {key: f"[{', '.join(map(str, values))}]"[:_MAX_VALUE]}
        case bool():
            return {key: str(values).lower()}
        case None:
            return {key: "null"}
    return {key: str(values) if values != {} else "{}"}


def _versions(run: RunRecord) -> dict[str, str]:
    packages = run.environment.get("packages")
    found = {name: _text(run.environment.get(name)) for name in ("python", "platform")}
    if run.trainings:
        found["kd_pipeline"] = run.trainings[-1].version
    if isinstance(packages, Mapping):
        found |= {str(name): _text(version) for name, version in packages.items()}
    return {name: version for name, version in found.items() if version}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
