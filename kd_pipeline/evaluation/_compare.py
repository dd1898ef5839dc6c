"""Models side by side: how good each is on a split, how long it takes for an image, and how large it is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from kd_pipeline.evaluation._evaluate import TEMPERATURE, Evaluation, images_for
from kd_pipeline.teachers.base import Teacher

__all__ = ["Compared", "Cost", "compare", "measure_cost"]

_NUM_WARM_UP = 3
_NUM_RUNS = 30
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_COLUMNS = (
    "",
    "samples",
    "top-1",
    "top-5",
    "macro F1",
    "loss",
    "agreement",
    "KL",
    "ms/image",
    "batch",
    "parameters",
    "bytes",
    "on",
)
_FOOTNOTE = (
    f"Agreement and KL (T = {TEMPERATURE:g}, in nats): with the teacher. ms/image: the time for a batch of that size "
    f"over its images, median of {_NUM_RUNS} runs."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model takes."""

    ms_per_image: float
    """Milliseconds of one batch over its images; the median of the runs."""
    batch_size: int
    device: str
    """Where it ran: `cpu`, or the name of the GPU."""
    num_parameters: int | None
    """Of a network; None for a teacher, whose runtime does not say."""
    num_bytes: int | None
    """Of the model's files; None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One model among others."""

    name: str
    evaluation: Evaluation
    cost: Cost


@torch.no_grad()
def measure_cost(model: nn.Module | Teacher, images: Tensor, *, files: Sequence[Path] = ()) -> Cost:
    """Time `model` on the batch `images` `[N, 3, H, W]`, on the device where both are, and weigh it.

    A network should be in eval mode. Each run is timed by itself, until the device has finished; a few that are not
    timed come first.

    Args:
        model: what to run.
        images: a batch such as a loader gives.
        files: the files that the model was opened from.

    Raises:
        TeacherError: a teacher refuses the images.
    """
    on_gpu = images.device.type == "cuda"
    wait: Callable[[], object] = (lambda: torch.cuda.synchronize(images.device)) if on_gpu else (lambda: None)
    images = images_for(model, images)
    times_s = []
    for _ in range(_NUM_WARM_UP + _NUM_RUNS):
        wait()
        start_s = time.perf_counter()
        model(images)
        wait()
        times_s.append(time.perf_counter() - start_s)
    num_parameters = sum(map(Tensor.numel, model.parameters())) if isinstance(model, nn.Module) else None
    return Cost(
        ms_per_image=1000 * median(times_s[_NUM_WARM_UP:]) / len(images),
        batch_size=len(images),
        device=torch.cuda.get_device_name(images.device) if on_gpu else str(images.device),
        num_parameters=num_parameters,
        num_bytes=sum(file.stat().st_size for file in files) if files else None,
    )


def compare(models: Sequence[Compared]) -> str:
    """A table as plain text, a line for each of `models`; `-` stands for what cannot be known."""
    table = [tuple(_COLUMNS), *(tuple(_cells(model)) for model in models)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(row))
        for row in (zip(cells, widths, strict=True) for cells in table)
    ]
    return "\n".join([*lines, _FOOTNOTE])


def _cells(model: Compared) -> list[str]:
    found, cost = model.evaluation, model.cost
    return [
        model.name,
        str(found.num_samples),
        *(_cell(share, "{:.2%}") for share in (found.top1, found.top5)),
        *(_cell(figure, "{:.4f}") for figure in (found.macro_f1, found.loss)),
        _cell(found.agreement, "{:.2%}"),
        _cell(found.kl, "{:.4f}"),
        f"{cost.ms_per_image:.3f}",
        str(cost.batch_size),
        _short(cost.num_parameters),
        _short(cost.num_bytes),
        cost.device,
    ]


def _cell(figure: float | None, form: str) -> str:
    return "-" if figure is None else form.format(figure)


def _short(number: int | None) -> str:
    """Three digits and a power of a thousand."""
    if number is None:
        return "-"
    for unit, size in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
