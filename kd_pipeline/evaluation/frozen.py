"""How good features are, without training: k nearest neighbors and a linear classifier on the frozen network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Self

import torch
import torch.distributed
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.progress import Report, no_report
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import counted
from kd_pipeline.errors import ConfigError, DataError, NonFiniteError
from kd_pipeline.evaluation._batches import batches_of
from kd_pipeline.evaluation._gather import of_all_ranks
from kd_pipeline.evaluation._logits import run_on_view
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.backbone import POOLED
from kd_pipeline.models.modules import eval_mode, named_outputs
from kd_pipeline.teachers.base import Teacher

__all__ = [
    "FeatureProbeSettings",
    "Features",
    "extract_features",
    "extract_outputs",
    "feature_name",
    "knn_top1",
    "linear_top1",
    "split_bank",
]

_logger = getLogger("kd_pipeline")

_QUERY_OF = 5
"""If bank and queries are the same split, one of so many samples is a query."""
_MAX_SIMILARITIES = 2**26
"""Similarities that are in memory at once."""
_MAX_ITERATIONS = 500
_TOLERANCE = 1e-6
"""The linear classifier is fitted once no gradient is larger."""


class FeatureProbeSettings(Settings):
    """How the student's features are judged by labeled images, which nothing is learned from.

    Metrics of a set: `knn_top1` and `linear_top1`, and `teacher_knn_top1` and `teacher_linear_top1` of the teacher.
    """

    bank: str
    """Split with labels whose images are the neighbors, and what the linear classifier is fitted to. Its images are
    transformed as for evaluation, also those of `train`."""
    sets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Splits with labels whose images are classified. They default to the other splits for validation, and to `bank`
    itself if there is none: then every fifth of its images is classified by the rest. `test` is measured at the end."""
    every: int = Field(default=1, ge=1)
    """Epochs between measurements; there is one after the last epoch in any case."""
    k: int = Field(default=20, ge=1)
    """Neighbors that vote."""
    temperature: PositiveFloat = 0.07
    """Of the votes: a neighbor has the weight exp(cosine / temperature)."""
    linear: bool = True
    """Also fit the linear classifier, which takes longer than the neighbors."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a frozen network returns for the readable images of a split, in the order of the dataset."""

    features: Tensor
    """`[N, D]` float32."""
    labels: Tensor
    """`[N]` int64, from 0."""
    index: Tensor
    """`[N]` int64, positions in the dataset, ascending."""

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: Tensor) -> Self:
        """The rows of a mask `[N]` bool."""
        return type(self)(self.features[rows], self.labels[rows], self.index[rows])

    @property
    def is_finite(self) -> Tensor:
        """`[N]` bool: rows without NaN and inf."""
        return self.features.isfinite().all(dim=1)


def extract_features(
    model: nn.Module | Teacher, loader: AnyLoader, *, output: str = POOLED, report: Report = no_report
) -> Features:
    """Run `model` on one epoch of `loader`, and keep a vector for each image; see `extract_outputs`."""
    return extract_outputs(model, loader, [output], report=report)[output]


@torch.no_grad()
def extract_outputs(
    model: nn.Module | Teacher,
    loader: AnyLoader,
    names: Sequence[str],
    *,
    max_batches: int | None = None,
    report: Report = no_report,
    view: str = IMAGES,
) -> dict[str, Features]:
    """Run `model` on one epoch of `loader`, and keep vectors for each image, on the device of the model.

    If the loader reads one shard of several, every rank gets the features of the whole split. They are the same for
    every batch size and number of ranks, as far as the model's own outputs are.

    Args:
        model: a network, which is in eval mode meanwhile, or a teacher.
        loader: a split with labels, whose images are not mixed.
        names: outputs of the model, each a vector `[N, D]`; see `feature_name`.
        max_batches: stop after this many batches.
        report: called with the number of batches that are done, and that there are.
        view: of the images that a network sees; a teacher sees its own.

    Returns:
        By the names as given.

    Raises:
        ConfigError: the model has no such vector.
        DataError: the split has no labels, a label is negative, or no image can be read.
        NonFiniteError: every row of the features holds NaN or inf. If only some do, that is logged.
        TeacherError: the teacher rejects the images or fails.
        StateError: the loader reads one shard of several, and there is no process group.
    """
    if not loader.has_labels or loader.labels_are_soft:
        what = "its labels are soft, as those of mixed images" if loader.has_labels else "it has no labels"
        raise DataError(
            f"features are judged by the label of each image, and {what}; use a split with labels, such as `distill` "
            "adds for --labeled"
        )
    columns: list[tuple[Tensor, ...]] = []
    with eval_mode(model):
        for batch in batches_of(loader, max_batches, report):
            output, rows = run_on_view(model, batch, view)
            outputs = named_outputs(output, vector=POOLED, owner="the model")
            assert rows.labels is not None
            # Copied: a vector may be a view of all tokens, which would be kept with it.
            vectors = [_vector(outputs, name).to(torch.float32, copy=True) for name in names]
            columns.append((rows.valid, rows.index, rows.labels, *vectors))
    # Rows are selected once: on a GPU, each selection waits for it.
    valid, *joined = [torch.cat(column) for column in zip(*columns, strict=True)]
    joined = [column[valid] for column in joined]
    index, labels, *vectors = [of_all_ranks(column) for column in joined] if loader.shard.world_size > 1 else joined
    if not len(index):
        raise DataError("no sample of this split can be read, so there are no features")
    if int(labels.min()) < 0:
        raise DataError(f"a label is {int(labels.min())}; labels count from 0")
    order = index.argsort()
    found = {
        name: Features(vector[order], labels[order], index[order]) for name, vector in zip(names, vectors, strict=True)
    }
    _check_finite(found)
    return found


def feature_name(num_dims: Mapping[str, int], name: str) -> str | None:
    """The vector among the outputs of a model that `name` means; None if there is none, or more than one.

    `pooled` means the only vector that is not the logits, if no output has this name; `dino.pooled` that of the
    outputs of the teacher `dino` among several.

    Args:
        num_dims: dimensions of each output, with that of the batch.
        name: what is wanted.
    """
    if name in num_dims:
        return name if num_dims[name] == 2 else None
    prefix, dot, last = name.rpartition(".")
    if last != POOLED:
        return None
    vectors = [
        each
        for each, dims in num_dims.items()
        if dims == 2 and each.startswith(f"{prefix}{dot}") and each.rpartition(".")[2] != LOGITS
    ]
    return vectors[0] if len(vectors) == 1 else None


def split_bank(features: Features) -> tuple[Features, Features]:
    """Bank and queries of the same split: every fifth image of the dataset is a query.

    Raises:
        DataError: one of them is empty.
    """
    is_query = features.index % _QUERY_OF == 0
    bank, queries = features.select(~is_query), features.select(is_query)
    if not len(bank) or not len(queries):
        are = "is" if len(features) == 1 else "are"
        raise DataError(f"{counted(len(features), 'image')} {are} too few to classify every fifth by the rest")
    return bank, queries


@torch.no_grad()
def knn_top1(bank: Features, queries: Features, *, k: int = 20, temperature: float = 0.07) -> float:
    """The fraction of `queries` that their nearest neighbors in `bank` classify right.

    The protocol of DINO (Caron et al., arXiv 2104.14294) and of Wu et al. (arXiv 1805.01978): the `k` nearest by the
    cosine vote for their label with the weight exp(cosine / temperature). The result does not depend on how the
    computation is split. Of labels with the same sum, the lowest is the prediction; a query whose features hold NaN or
    inf is wrong.

    Args:
        bank: labeled features of the neighbors; rows with NaN or inf are left out.
        queries: those to classify.
        k: neighbors; all of the bank if it has fewer.
        temperature: of the votes.

    Raises:
        NonFiniteError: every row of the bank holds NaN or inf.
    """
    bank = _finite_bank(bank)
    bank_MD, k = normalize(bank.features, dim=1), min(k, len(bank))
    is_finite_N = queries.is_finite
    queries_ND = normalize(queries.features, dim=1)
    num_right = torch.zeros((), dtype=torch.int64, device=bank_MD.device)
    # The size of a chunk depends on the bank alone: that of a product may change its last digits.
    chunk = max(1, _MAX_SIMILARITIES // len(bank))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        cosine_NK, nearest_NK = (queries_ND[part] @ bank_MD.T).topk(k, dim=1)
        # DINO's weights divided by the largest of a query, which changes no vote and does not overflow.
        weight_NK = ((cosine_NK - cosine_NK[:, :1]) / temperature).exp()
        predicted_N = _elect(bank.labels[nearest_NK], weight_NK)
        num_right += (predicted_N.eq(queries.labels[part]) & is_finite_N[part]).sum()
    return int(num_right) / len(queries)


def linear_top1(bank: Features, queries: Features) -> float:
    """The fraction of `queries` that a linear classifier classifies right, which is fitted to `bank`.

    Multinomial logistic regression by L-BFGS, as of Kornblith et al. (arXiv 1805.08974) and CLIP (arXiv 2103.00020), on
    features standardized with mean and standard deviation of the bank. The penalty on the weights is not searched for:
    it is that of scikit-learn's default, C = 1, so values of different epochs and networks compare. There is nothing
    random in it. A query whose features hold NaN or inf is wrong.

    Args:
        bank: labeled features to fit to; rows with NaN or inf are left out.
        queries: those to classify.

    Raises:
        NonFiniteError: every row of the bank holds NaN or inf.
    """
    bank = _finite_bank(bank)
    std_D, mean_D = torch.std_mean(bank.features, dim=0, correction=0)
    scale_D = torch.where(std_D > 0, std_D, 1.0)
    classes, target_M = bank.labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    weight_CD, bias_C = _fit_linear((bank.features - mean_D) / scale_D, target_M, num_classes=len(classes))
    logits_NC = (queries.features - mean_D) / scale_D @ weight_CD.T + bias_C
    is_right_N = classes[logits_NC.argmax(dim=1)].eq(queries.labels) & queries.is_finite
    return int(is_right_N.sum()) / len(queries)


def _finite_bank(bank: Features) -> Features:
    found = bank.select(bank.is_finite)
    if not len(found):
        raise NonFiniteError(
            f"the features hold NaN or inf for all {len(bank)} images of the bank, so nothing can be classified by "
            "them; check the model's weights, and if it runs in float16, use bfloat16"
        )
    return found


def _fit_linear(features_ND: Tensor, target_N: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weights `[C, D]` and biases `[C]` that minimize the summed cross-entropy + ‖weights‖² / 2."""
    num_samples, num_features = features_ND.shape
    with torch.inference_mode(False), torch.enable_grad():
        if features_ND.is_inference():  # autograd refuses what was made in inference mode
            features_ND, target_N = features_ND.clone(), target_N.clone()
        weight_CD = features_ND.new_zeros(num_classes, num_features, requires_grad=True)
        bias_C = features_ND.new_zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight_CD, bias_C],
            max_iter=_MAX_ITERATIONS,
            max_eval=2 * _MAX_ITERATIONS,
            tolerance_grad=_TOLERANCE,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            optimizer.zero_grad()
            value = cross_entropy(features_ND @ weight_CD.T + bias_C, target_N)
            value = value + weight_CD.square().sum() / (2 * num_samples)
            value.backward()  # type: ignore[no-untyped-call]
            return float(value.detach())

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight_CD.detach(), bias_C.detach()


def _elect(label_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """The label `[N]` with the largest sum of weights, the lowest if there are several."""
    # Sums of K x K instead of a table of all classes, whose parallel additions have no fixed order on a GPU.
    votes_NK = (label_NK[:, :, None].eq(label_NK[:, None, :]) * weight_NK[:, None, :]).sum(dim=2)
    is_elected_NK = votes_NK == votes_NK.amax(dim=1, keepdim=True)
    return label_NK.masked_fill(~is_elected_NK, torch.iinfo(torch.int64).max).amin(dim=1)


def _vector(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    found = feature_name({each: output.ndim for each, output in outputs.items()}, name)
    if found is None:
        shapes = ", ".join(f"{each!r} {list(output.shape)}" for each, output in outputs.items())
        raise ConfigError(
            f"features are judged by a vector for each image, and the model returns no vector {name!r} but {shapes}; "
            "give it num_classes: 0, which leaves out the head of a classifier, or name an output [N, D]"
        )
    return outputs[found]


def _check_finite(found: Mapping[str, Features]) -> None:
    for name, features in found.items():
        num_bad = int((~features.is_finite).sum())
        hint = "check its weights and the normalization of its images, and if it runs in float16, use bfloat16"
        if num_bad == len(features):
            raise NonFiniteError(f"the model's output {name!r} holds NaN or inf for all {num_bad} images; {hint}")
        if num_bad:
            _logger.warning(
                "the model's output %r holds NaN or inf for %d of %d images, which count as wrong; %s",
                *(name, num_bad, len(features), hint),
            )
