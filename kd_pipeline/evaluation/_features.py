"""Evaluate a student by what it learns from: the distillation loss on a split, and how close its features are."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import Report, no_report
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import DataError, NonFiniteError
from kd_pipeline.evaluation._batches import batches_of
from kd_pipeline.evaluation._evaluate import Evaluation, only_metrics
from kd_pipeline.evaluation._logits import inputs_for
from kd_pipeline.evaluation._tally import QUANTUM
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.distillation import Distillation, student_outputs
from kd_pipeline.losses.ramp import max_value
from kd_pipeline.losses.settings import DistillSettings, TermSettings
from kd_pipeline.losses.terms import NEED_LABELS
from kd_pipeline.models.modules import call_network, eval_mode
from kd_pipeline.teachers.base import Teacher

__all__ = ["COSINE", "cosine_names", "evaluate_features", "label_free_terms"]

COSINE = "cosine_to_teacher"
"""First part of the names of the cosines among the metrics."""


@torch.no_grad()
def evaluate_features(
    student: nn.Module,
    distillation: Distillation,
    loader: AnyLoader,
    teacher: Teacher,
    *,
    epochs: int,
    max_batches: int | None = None,
    report: Report = no_report,
    view: str = IMAGES,
) -> Evaluation:
    """The distillation loss on one epoch of `loader` and its terms, and the mean cosine to the teacher.

    They are means over the valid rows. The loss has the weights and temperatures of the end of the run, so it is the
    same function after every epoch; terms that need labels are no part of it, as images for validation may have none.

    Sums are exact: results do not depend on their order, and every rank returns those of the whole split. The cosines
    are measured row by row and do not depend on the batches either. A term is a mean over a batch: different batches
    round it differently, and change the value of one that compares images with each other.

    Args:
        student: the network, which is in eval mode meanwhile.
        distillation: the loss, with the projectors that were trained with the student; in eval mode too.
        loader: the split, without a teacher.
        teacher: whose outputs are compared.
        epochs: length of the run.
        max_batches: stop after this many batches.
        report: called with the number of batches that are done, and that there are.
        view: of the images that the student sees.

    Returns:
        `loss`, and as `metrics` the terms by name, and the cosines by `cosine_names`.

    Raises:
        ConfigError: the student or the teacher lacks what the loss compares.
        DataError: no sample can be read.
        NonFiniteError: every row of the student's outputs holds NaN or inf.
        StateError: the loader reads one shard of several, and there is no process group.
        TeacherError: the teacher rejects the images or fails.
    """
    sums: dict[str, Tensor] = {}
    with eval_mode(student), eval_mode(distillation):
        for batch in batches_of(loader, max_batches, report):
            batch = _complete(batch, teacher).of_view(view)
            with distillation.student_features(student) as features:
                outputs = call_network(student, inputs_for(student, batch.input))
            for name, value in _sums(distillation, outputs, features, batch, epochs).items():
                sums[name] = sums[name] + value if name in sums else value
    if loader.shard.world_size > 1:
        for total in sums.values():
            torch.distributed.all_reduce(total)
    num_samples, num_bad_rows = int(sums.pop("samples")), int(sums.pop("bad rows"))
    if num_samples == 0:
        raise DataError("no sample of this split can be read, so there is nothing to evaluate")
    if num_bad_rows == num_samples:
        raise NonFiniteError(
            f"the student's outputs hold NaN or inf for all {num_samples} images; check its weights and the "
            "normalization of its images, and if it runs in float16, use bfloat16 or float32"
        )
    means = {name: float(total) * QUANTUM / num_samples for name, total in sums.items()}
    loss = means.pop("loss")
    return replace(only_metrics(means, num_samples=num_samples), loss=loss, num_bad_rows=num_bad_rows)


def label_free_terms(settings: DistillSettings) -> tuple[str, ...]:
    """Terms of the loss that are computed without labels; a loss of the user's own may need them."""
    extra = [name for name, term in _terms(settings).items() if term.loss not in NEED_LABELS]
    needs_labels = settings.loss in (None, *NEED_LABELS) or settings.has_custom_loss
    return (*(["distill"] if max_value(settings.weights[0]) and not needs_labels else []), *extra)


def cosine_names(settings: DistillSettings) -> dict[str, str]:
    """The metric of each term's cosine: `cosine_to_teacher.` and what is compared, such as `pooled`.

    Terms that compare the same have their whole names in it.
    """
    short = {name: name.partition(".")[2] or name for name in _terms(settings)}
    times = Counter(short.values())
    return {name: f"{COSINE}.{each if times[each] == 1 else name}" for name, each in short.items()}


def _terms(settings: DistillSettings) -> dict[str, TermSettings]:
    """The terms that are computed besides `task` and `distill`, by name."""
    named = zip(settings.term_names, settings.features, strict=True)
    return {name: term for name, term in named if max_value(term.weight)}


def _complete(batch: KDBatch, teacher: Teacher) -> KDBatch:
    """`batch` with the teacher's outputs, labels and masks: some terms, which are left out, would fail without."""
    zeros_N = batch.index.new_zeros(len(batch.index))
    return teacher.with_outputs(batch).replace(
        labels=zeros_N if batch.labels is None else batch.labels,
        masks=zeros_N[:, None, None] if batch.masks is None else batch.masks,
    )


def _sums(
    distillation: Distillation,
    outputs: Tensor | Mapping[str, Tensor],
    features: Mapping[str, Tensor],
    batch: KDBatch,
    epochs: int,
) -> dict[str, Tensor]:
    """Sums over the valid rows of a batch: counts, and values in units of the quantum, float64 scalars."""
    valid_N = batch.valid
    num_valid = valid_N.sum().double()
    found = distillation(outputs, features, batch, epoch=epochs, epochs=epochs)
    terms = {name: found.terms[name] for name in label_free_terms(distillation.settings) if name in found.terms}
    weighted = [found.weights[name] * value.double() for name, value in terms.items()]
    means = {"loss": torch.stack(weighted).sum(), **terms}
    # A rank's last batch may have no valid row, and then no mean.
    means = {name: torch.where(num_valid > 0, value.double(), 0.0) for name, value in means.items()}
    sums = {name: (value * num_valid / QUANTUM).round() for name, value in means.items()}
    names = cosine_names(distillation.settings)
    for name, cosine_N in distillation.cosines(outputs, features, batch).items():
        sums[names[name]] = (cosine_N.double() / QUANTUM).round().masked_fill(~valid_N, 0).sum()
    is_bad_N = torch.stack(
        [~output.isfinite().flatten(1).all(dim=1) for output in student_outputs(outputs).values()]
    ).any(dim=0)
    return {"samples": num_valid, "bad rows": (is_bad_N & valid_N).sum().double(), **sums}
