"""Compare models on one split: how good each is, how long it takes per image, and how large it is."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import Report, no_report, progress_bar
from kd_pipeline._core.text import counted, printable
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, NonFiniteError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate, only_metrics
from kd_pipeline.evaluation._logits import AVERAGED, inputs_for
from kd_pipeline.evaluation._metrics import TEMPERATURE, Metric, MetricSettings
from kd_pipeline.evaluation.frozen import extract_outputs, feature_name, knn_top1, linear_top1, split_bank
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.backbone import POOLED
from kd_pipeline.models.modules import call_network, eval_mode, named_outputs
from kd_pipeline.teachers.base import Teacher

__all__ = ["Comparison", "ComparisonRow", "Cost", "compare", "has_logits", "measure_cost"]

_UNKNOWN = "-"
_NUM_WARMUP = 3
_NUM_RUNS = 30
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_COLUMNS = (
    "", "samples", "top-1", "top-5", "macro F1", "mIoU", "pixels", "loss", "agreement", "KL", "k-NN", "linear",
    "ms/image", "batch", "parameters", "bytes", "on",
)  # fmt: skip
_KNN, _LINEAR = "knn_top1", "linear_top1"
"""Metrics of a model without logits, which have columns of their own."""
_MEAN = f", {AVERAGED}"
"""Appended to the name of a model, for the mean of all sizes."""
_PERCENTAGES = {"Accuracy", "F1Score", "Precision", "Recall", "Specificity"}
"""Metrics of torchmetrics that are shares."""
_LOGITS_FOOTNOTE = f"Agreement and KL (T = {TEMPERATURE:g}, in nats): with the teacher."
_FEATURES_FOOTNOTE = (
    "k-NN and linear: accuracy of the nearest neighbors (cosine, k = 20, T = 0.07, as of DINO) and of a linear "
    "classifier on the frozen features."
)
_COST_FOOTNOTE = f"ms/image: time of one batch of that size divided by its images, median of {_NUM_RUNS} runs."


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Latency and size of a model."""

    ms_per_image: float
    """Milliseconds per batch divided by its images; median of the runs."""
    batch_size: int
    device: str
    """`cpu`, or the name of the GPU."""
    num_parameters: int | None
    """Of a network; None for a teacher, whose runtime does not report it."""
    num_bytes: int | None
    """Size of the model's files; None without files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One of the compared models."""

    name: str
    evaluation: Evaluation
    cost: Cost


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models evaluated on one split, in the order given."""

    rows: tuple[ComparisonRow, ...]

    def table(self) -> str:
        """Plain text: a line per model, `-` for what is not known of it, and then a line per further metric.

        Columns of what is known of no model are left out.
        """
        cells = [_cells(row) for row in self.rows]
        is_shown = [column == 0 or any(row[column] != _UNKNOWN for row in cells) for column in range(len(_COLUMNS))]
        table = [[*compress(row, is_shown)] for row in (_COLUMNS, *cells)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        metrics = [
            f"{row.name}: {name} {_metric(name, value)}"
            for row in self.rows
            for name, value in row.evaluation.metrics.items()
            if name not in (_KNN, _LINEAR)
        ]
        notes = {_LOGITS_FOOTNOTE: "agreement", _FEATURES_FOOTNOTE: "k-NN", _COST_FOOTNOTE: "ms/image"}
        has_features = any(name.endswith(_KNN) for row in self.rows for name in row.evaluation.metrics)
        known = {*table[0], *(["k-NN"] if has_features else [])}
        footnote = " ".join(note for note, column in notes.items() if column in known)
        return "\n".join([*lines, footnote, *map(printable, metrics)])


def compare(
    models: Mapping[str, nn.Module | Teacher],
    loader: AnyLoader,
    *,
    reference: nn.Module | Teacher | None = None,
    metrics: Sequence[MetricSettings | Metric] = (),
    files: Mapping[str, Sequence[Path]] | None = None,
    bank: AnyLoader | None = None,
    views: Mapping[str, str] | None = None,
    sizes: Mapping[str, str] | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Evaluate every model on one epoch of `loader`, and time it on one of its batches.

    A model without logits is judged by its vector `"pooled"`: by its nearest neighbors and by a linear classifier, in
    the metrics `knn_top1` and `linear_top1` of its evaluation, or `dino.knn_top1` for the teacher `dino` of several.

    Args:
        models: networks and teachers by name, on the loader's device.
        loader: the split; see `evaluate`. For a model without logits it has labels.
        reference: the network or teacher for `agreement` and `kl`, which its own row does not have; defaults to the
            loader's teacher, if any. One without logits is not compared with.
        metrics: see `evaluate`; they are of models with logits.
        files: the files that a model was opened from, by its name, for its size.
        bank: the labeled split with the neighbors of models without logits, transformed as `loader`'s. Defaults to the
            split itself, every fifth of whose images is then classified by the rest.
        views: the views of the images that networks see, by their names; a teacher sees its own.
        sizes: evaluate each model on each of these views of the loader instead, in one pass, by what is appended to its
            name: `{"at 224": "images", "at 288": "large"}`. Of several, a further row is that of their mean.
        report: called with two lines of progress for each model.

    Raises:
        ConfigError: a model without logits was to be evaluated at several sizes.
        ConfigError, DataError, NonFiniteError, TeacherError: as `evaluate` and `extract_features`.
    """
    views, batch = views or {}, loader.peek()
    reference_view = next((views.get(name, IMAGES) for name, model in models.items() if model is reference), None)
    if reference is not None and not has_logits(reference, _inputs_of(reference, batch, reference_view or IMAGES)):
        reference = None
    split = _Split(loader, bank, reference, reference_view, metrics, sizes)
    rows: list[ComparisonRow] = []
    for name, model in models.items():
        view = views.get(name, IMAGES)
        inputs = _inputs_of(model, batch, view)
        report(f"evaluating {name}")
        started = time.monotonic()
        try:
            with progress_bar(name) as report_done:
                found = split.evaluate(model, view, inputs, report_done)
        except (ConfigError, NonFiniteError) as exc:
            raise type(exc)(f"{name}: {exc}") from exc
        evaluated = time.monotonic()
        timed = {"": inputs} if sizes is None else {f" {label}": batch.view(size) for label, size in sizes.items()}
        with progress_bar(f"{name}: timing") as report_runs:
            costs = _measure_costs(model, timed, (files or {}).get(name, ()), report_runs)
        num_samples = next(iter(found.values())).num_samples
        report(
            f"{name}: {counted(num_samples, 'image')} in {evaluated - started:.1f} s, and "
            f"{time.monotonic() - evaluated:.1f} s to time a batch"
        )
        rows += [
            ComparisonRow(name=f"{name}{suffix}", evaluation=each, cost=costs[suffix]) for suffix, each in found.items()
        ]
    return Comparison(tuple(rows))


@dataclass(frozen=True, slots=True)
class _Split:
    """What all models are evaluated on and with; the fields are arguments of `compare`."""

    loader: AnyLoader
    bank: AnyLoader | None
    reference: nn.Module | Teacher | None
    reference_view: str | None
    metrics: Sequence[MetricSettings | Metric]
    sizes: Mapping[str, str] | None

    def evaluate(
        self, model: nn.Module | Teacher, view: str, inputs: Tensor | Mapping[str, Tensor], report: Report
    ) -> dict[str, Evaluation]:
        """The evaluations of a model by what is appended to its name; `inputs` are those of a batch, for `view`."""
        if not has_logits(model, inputs):
            if self.sizes is not None:
                raise ConfigError("a model without logits is judged at one size; leave out sizes and crops")
            return {"": _evaluate_features(model, self.loader, self.bank, view, report)}
        reference = None if model is self.reference else self.reference
        if self.sizes is not None:
            return self._evaluate_at(self.sizes, model, reference, report)
        found = evaluate(
            model,
            self.loader,
            reference=reference,
            metrics=self.metrics,
            report=report,
            view=view,
            reference_view=self.reference_view,
        )
        return {"": found}

    def _evaluate_at(
        self,
        sizes: Mapping[str, str],
        model: nn.Module | Teacher,
        reference: nn.Module | Teacher | None,
        report: Report,
    ) -> dict[str, Evaluation]:
        """The evaluations of each of the views `sizes` and of their mean."""
        names = list(dict.fromkeys(sizes.values()))
        found = evaluate(model, self.loader, reference=reference, metrics=self.metrics, report=report, views=names)
        evaluations = {f" {label}": found[name] for label, name in sizes.items()}
        return evaluations | ({_MEAN: found[AVERAGED]} if AVERAGED in found else {})


def _measure_costs(
    model: nn.Module | Teacher,
    inputs: Mapping[str, Tensor | Mapping[str, Tensor]],
    files: Sequence[Path],
    report: Report,
) -> dict[str, Cost]:
    """The cost for each of `inputs`, and for the mean of all of them."""
    costs = {suffix: measure_cost(model, each, files=files, report=report) for suffix, each in inputs.items()}
    total = sum(cost.ms_per_image for cost in costs.values())
    return costs | {_MEAN: replace(next(iter(costs.values())), ms_per_image=total)}


@torch.no_grad()
def has_logits(model: nn.Module | Teacher, inputs: Tensor | Mapping[str, Tensor]) -> bool:
    """Whether `model` returns logits, and not only features by name, for the only input of a batch or for several."""
    if isinstance(model, Teacher):
        return LOGITS in model.outputs
    first = inputs[:1] if isinstance(inputs, Tensor) else {name: each[:1] for name, each in inputs.items()}
    with eval_mode(model):
        return LOGITS in named_outputs(call_network(model, inputs_for(model, first)), owner="a model")


@torch.no_grad()
def measure_cost(
    model: nn.Module | Teacher,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    files: Sequence[Path] = (),
    report: Report = no_report,
) -> Cost:
    """Time `model`, in eval mode, on a batch on its device, and determine its size.

    Each run is timed on its own, until the device has finished, after a few warm-up runs.

    Args:
        model: a network or teacher.
        inputs: the only input of a batch of a loader, such as images `[N, 3, H, W]`, or several by name.
        files: the files that the model was opened from.
        report: called with the number of runs that are done, and that there are.

    Raises:
        TeacherError: a teacher rejects the inputs.
    """
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    on_gpu = first.device.type == "cuda"
    inputs = inputs_for(model, inputs)
    times_s = []
    with eval_mode(model):
        for number in range(_NUM_WARMUP + _NUM_RUNS):
            report(number, _NUM_WARMUP + _NUM_RUNS)
            start_s = time.perf_counter()
            call_network(model, inputs)
            if on_gpu:
                torch.cuda.synchronize(first.device)
            times_s.append(time.perf_counter() - start_s)
    num_parameters = sum(map(Tensor.numel, model.parameters())) if isinstance(model, nn.Module) else None
    return Cost(
        ms_per_image=1000 * median(times_s[_NUM_WARMUP:]) / len(first),
        batch_size=len(first),
        device=torch.cuda.get_device_name(first.device) if on_gpu else str(first.device),
        num_parameters=num_parameters,
        num_bytes=sum(file.stat().st_size for file in files) if files else None,
    )


def _evaluate_features(
    model: nn.Module | Teacher, loader: AnyLoader, bank: AnyLoader | None, view: str, report: Report
) -> Evaluation:
    """The accuracy of nearest neighbors and of a linear classifier on the features of `model`, or of its members."""
    outputs = _vectors(model)
    queries = extract_outputs(model, loader, [*outputs.values()], report=report, view=view)
    banks = None if bank is None else extract_outputs(model, bank, [*outputs.values()], view=view)
    metrics: dict[str, float] = {}
    for prefix, output in outputs.items():
        pair = split_bank(queries[output]) if banks is None else (banks[output], queries[output])
        metrics |= {f"{prefix}{_KNN}": knn_top1(*pair), f"{prefix}{_LINEAR}": linear_top1(*pair)}
    num_bad_rows = int((~pair[1].is_finite).sum())
    return replace(only_metrics(metrics, num_samples=len(pair[1])), num_bad_rows=num_bad_rows)


def _inputs_of(model: nn.Module | Teacher, batch: KDBatch, view: str) -> Tensor | Mapping[str, Tensor]:
    """What `model` is called with for a batch."""
    return model.inputs_of(batch) if isinstance(model, Teacher) else batch.of_view(view).input


def _vectors(model: nn.Module | Teacher) -> dict[str, str]:
    """The outputs to judge, by the start of their metrics' names: `dino.pooled` for `dino.` of several teachers."""
    if isinstance(model, Teacher):
        num_dims = {name: len(spec.shape) for name, spec in model.outputs.items()}
        members = dict.fromkeys(name.partition(".")[0] for name in num_dims if "." in name)
        found = {f"{member}.": f"{member}.{POOLED}" for member in members}
        found = {prefix: name for prefix, name in found.items() if feature_name(num_dims, name) is not None}
        if feature_name(num_dims, POOLED) is None and found:
            return found
    return {"": POOLED}


def _cells(row: ComparisonRow) -> tuple[str, ...]:
    evaluation, cost = row.evaluation, row.cost
    return (
        printable(row.name),
        str(evaluation.num_samples),
        _cell(evaluation.top1, ".2%"),
        _cell(evaluation.top5, ".2%"),
        _cell(evaluation.macro_f1, ".4f"),
        _cell(evaluation.miou, ".2%"),
        _cell(evaluation.pixel_accuracy, ".2%"),
        _cell(evaluation.loss, ".4f"),
        _cell(evaluation.agreement, ".2%"),
        _cell(evaluation.kl, ".4f"),
        _cell(evaluation.metrics.get(_KNN), ".2%"),
        _cell(evaluation.metrics.get(_LINEAR), ".2%"),
        f"{cost.ms_per_image:.3f}",
        str(cost.batch_size),
        _with_unit(cost.num_parameters),
        _with_unit(cost.num_bytes),
        cost.device,
    )


def _metric(name: str, value: Any) -> str:
    """A further metric with four digits, or as a percentage if it is a share."""
    match value:
        case list() | tuple():
            return f"[{', '.join(_metric(name, each) for each in value)}]"
        case float():
            return format(value, ".2%" if name in _PERCENTAGES else ".4g")
    return str(value)


def _cell(value: float | None, spec: str) -> str:
    return _UNKNOWN if value is None else format(value, spec)


def _with_unit(number: int | None) -> str:
    """Three digits and a power of a thousand."""
    if number is None:
        return _UNKNOWN
    for unit, size in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
