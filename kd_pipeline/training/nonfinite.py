"""Keep NaN and inf out of the student: check every step before it is taken, and say where they come from."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.finite import first_nonfinite, has_softmax
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import NonFiniteError
from kd_pipeline.losses.distillation import LossTerms
from kd_pipeline.training.sharding import full_tensor

__all__ = ["StepGuard", "TrainedBatch", "check_weights", "gradient_norm"]

_logger = logging.getLogger("kd_pipeline")

_TEACHER_LOGITS, _STUDENT_LOGITS = "the teacher's 'logits'", "the student's 'logits'"
_MAX_LISTED = 10
"""Samples of a batch that a message lists."""
_SMALLER_STEPS = (
    "lower train.optimizer.lr, lower or set train.clip, or lengthen train.schedule.warmup_epochs; with train.precision "
    "in float16, use bf16-mixed or 32-true"
)
_ADVICE = {
    "images": "the images themselves hold NaN or inf: check mean, std and dtype of data.train.transform",
    "inputs": "the inputs themselves hold NaN or inf: check what your loader gives",
    "teacher": "the teacher returns NaN or inf for these images: check its weights and the normalization of its "
    "images, and if it runs in fp16, set teacher.precision to bf16 or fp32",
    "rows": "no row of the batch is valid: a loss of your own should return 0 there",
    "student": _SMALLER_STEPS,
    "diverged": _SMALLER_STEPS,
}
"""What to do, by where NaN or inf came from, most telling first."""


@dataclass(frozen=True, slots=True)
class TrainedBatch:
    """A batch and what the loss made of it."""

    number: int
    """Its number in the epoch."""
    batch: KDBatch
    outputs: Mapping[str, Tensor]
    """The student's."""
    terms: LossTerms
    temperatures: Mapping[str, float]
    """Current temperature of each term that has one."""


class _Report(NamedTuple):
    """What one rank found in a step."""

    text: str
    causes: tuple[str, ...]
    """Keys of `_ADVICE`."""
    bad_weight: str | None
    """The first weight that was not finite before the step."""


class StepGuard:
    """Lets an optimizer step be taken only if its losses and its gradient are finite, with one decision for all ranks.

    A step that is not taken leaves weights, optimizer state, EMA and BatchNorm statistics as they were before it. After
    more than `max_in_a_row` of them the run ends.

    On a GPU the host waits for the device once per batch: an optimizer step that is queued cannot be taken back, and
    few optimizers can make it depend on a value on the device. It waits when forward and backward pass are queued, so
    only the launch of the optimizer step is not hidden behind them.
    """

    def __init__(self, max_in_a_row: int, *, sample_name: Callable[[int], str]) -> None:
        """Watch the steps of a run.

        Args:
            max_in_a_row: steps in a row that may be skipped; 0 ends the run at the first.
            sample_name: the file of a sample, by index.
        """
        self._max_in_a_row, self._sample_name = max_in_a_row, sample_name
        self.num_skipped = 0
        """Steps of the run that were not taken."""
        self.took_step = True
        """Whether the last step was taken."""
        self.loss = float("nan")
        """Of the last batch of the last step on this rank; NaN before the first one."""
        self._num_in_a_row = 0
        self._buffers: list[Tensor] = []
        self._last: TrainedBatch | None = None
        self._reports: list[_Report] = []

    def start_step(self, buffers: Iterable[Tensor]) -> None:
        """Start with the first batch of an optimizer step; call it before the forward pass, which changes `buffers`."""
        self._reports = []
        self._buffers = [buffer.clone() for buffer in buffers] if self._max_in_a_row else []

    def watch(self, trained: TrainedBatch) -> None:
        """Remember the batch until it is checked; its tensors are not kept longer."""
        self._last = trained

    def check_batch(self) -> None:
        """Check a batch that no optimizer step follows, while its samples are at hand."""
        assert self._last is not None
        if not bool(self._last.terms.total.isfinite()):
            self._reports.append(_describe(self._last, self._sample_name))
        self._last = None

    def num_bad(self) -> Tensor:
        """Batches of this rank and step whose loss is not finite, as a float on the device."""
        assert self._last is not None
        is_bad = ~self._last.terms.total.detach().isfinite()
        return is_bad.float() + len(self._reports)

    def decide(self, network: nn.Module, place: str, *, num_bad: Tensor, gradient_norm: Tensor | None) -> bool:
        """Whether to take the step. If not, the buffers of `network` are restored.

        Args:
            network: what is trained.
            place: the step, for messages.
            num_bad: `num_bad()` of all ranks together.
            gradient_norm: norm of the gradient, the same on all ranks; None if something else looks after it.

        Raises:
            NonFiniteError: this is one step too many, or the weights were not finite before it.
        """
        trained, self._last = self._last, None
        assert trained is not None
        norm = num_bad.new_zeros(()) if gradient_norm is None else gradient_norm.to(num_bad)
        loss = trained.terms.total.detach().to(num_bad)
        num_bad_batches, norm_value, self.loss = torch.stack([num_bad, norm, loss]).tolist()  # the one wait
        is_finite_norm = abs(norm_value) < float("inf")  # False for NaN too
        self.took_step = num_bad_batches == 0 and is_finite_norm
        if self.took_step:
            self._num_in_a_row = 0
            return True
        if num_bad_batches == 0 or not bool(trained.terms.total.isfinite()):
            self._reports.append(_describe(trained, self._sample_name))
        what = f"the gradient has norm {norm_value:g}" if num_bad_batches == 0 else "the loss is not finite"
        self._skip(network, f"{what} in {place}")
        return False

    def state_dict(self) -> dict[str, int]:
        """The counts, to resume."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self._num_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume from what `state_dict` returned."""
        self.num_skipped, self._num_in_a_row = state["num_skipped"], state["num_in_a_row"]

    def _skip(self, network: nn.Module, headline: str) -> None:
        # The forward pass may have put NaN into the buffers.
        bad_weight = first_nonfinite(network, parameters_only=True)
        own = [report._replace(bad_weight=bad_weight) for report in self._reports]
        reports = _of_all_ranks(own or [_Report("", (), bad_weight)])
        self._num_in_a_row += 1
        is_over = self._num_in_a_row > self._max_in_a_row
        if is_over or any(report.bad_weight for report in reports):
            raise NonFiniteError(_message(headline, reports, self._max_in_a_row))
        self.num_skipped += 1
        for buffer, saved in zip(network.buffers(), self._buffers, strict=True):
            buffer.copy_(saved)
        _logger.warning(
            "step skipped, %d in a row of at most %d: %s",
            self._num_in_a_row,
            self._max_in_a_row,
            "\n".join([headline, *(report.text for report in reports if report.text)]),
        )


def check_weights(network: nn.Module, trainer: Any, *, before: str) -> None:
    """Check the weights of `network` on all ranks, `before` they are used.

    Raises:
        NonFiniteError: one of them is NaN or inf.
    """
    name = first_nonfinite(network)
    if trainer.strategy.reduce_boolean_decision(name is None, all=True):
        return
    found = "on another rank" if name is None else f"first in {name!r}"
    raise NonFiniteError(
        f"after {trainer.global_step} steps the weights hold NaN or inf, {found}; the run stopped before {before}, and "
        f"earlier checkpoints are intact. {_capital(_SMALLER_STEPS)}. {_restart()}"
    )


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, in float32; call it on all ranks if they are sharded."""
    # In float16 the norm would overflow although no gradient does.
    return full_tensor(torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients]))


def _describe(trained: TrainedBatch, sample_name: Callable[[int], str]) -> _Report:
    """The terms of the loss, and the samples of the batch: first those for which a model has no finite outputs."""
    batch, terms = trained.batch, trained.terms
    floats = {name: each for name, each in batch.inputs.items() if each.is_floating_point()}
    outputs = {
        **{f"the {name}": ("images" if name == "images" else "inputs", each) for name, each in floats.items()},
        **{f"the teacher's {name!r}": ("teacher", output) for name, output in batch.teacher.items()},
        **{f"the student's {name!r}": ("student", output) for name, output in trained.outputs.items()},
    }
    bad_N = {name: (_is_bad(name, output) & batch.valid).tolist() for name, (_, output) in outputs.items()}
    causes = {outputs[name][0] for name, is_bad in bad_N.items() if any(is_bad)}
    valid_N = batch.valid.tolist()
    if not any(valid_N):
        causes.add("rows")
    rows = [row for row, is_valid in enumerate(valid_N) if is_valid]
    rows.sort(key=lambda row: not any(is_bad[row] for is_bad in bad_N.values()))  # keeps the order otherwise
    lines = [f"batch {trained.number} of the epoch: loss {terms.total.item():.6g} of {_terms(trained)}"]
    for row in rows[:_MAX_LISTED]:
        index = int(batch.index[row])
        found = " and ".join(name for name, is_bad in bad_N.items() if is_bad[row])
        lines.append(f"  sample {index}, {sample_name(index)}" + (f": NaN or inf in {found}" if found else ""))
    if len(rows) > _MAX_LISTED:
        num_bad = sum(any(is_bad[row] for is_bad in bad_N.values()) for row in rows[_MAX_LISTED:])
        also = f", {num_bad} with NaN or inf" if num_bad else ""
        lines.append(f"  and {len(rows) - _MAX_LISTED} more samples{also}")
    # What goes in explains what comes out.
    given = causes & {"images", "inputs", "teacher", "rows"}
    bad_students = [is_bad for name, is_bad in bad_N.items() if outputs[name][0] == "student"]
    is_diverged = all(any(is_bad[row] for is_bad in bad_students) for row in rows)
    return _Report("\n".join(lines), tuple(given or {"diverged" if is_diverged else "student"}), None)


def _is_bad(name: str, output: Tensor) -> Tensor:
    """`[N]`, whether a row holds NaN or inf. Logits of -inf are excluded classes."""
    return ~has_softmax(output) if name in (_TEACHER_LOGITS, _STUDENT_LOGITS) else ~output.flatten(1).isfinite().all(1)


def _terms(trained: TrainedBatch) -> str:
    terms, texts = trained.terms, []
    for name, value in terms.terms.items():
        temperature = trained.temperatures.get(name)
        with_temperature = "" if temperature is None else f", temperature {temperature:g}"
        texts.append(f"{name} {value.item():.6g} (weight {terms.weights[name]:g}{with_temperature})")
    return " + ".join(texts)


def _message(headline: str, reports: list[_Report], max_in_a_row: int) -> str:
    bad_weight = next((report.bad_weight for report in reports if report.bad_weight is not None), None)
    causes = {cause for report in reports for cause in report.causes} | ({"diverged"} if bad_weight else set())
    if max_in_a_row:
        headline += f", and train.max_nonfinite_steps={max_in_a_row} allows no more in a row"
    lines = [f"{headline}. The run stopped before this step; checkpoints written before are intact"]
    lines += [report.text for report in reports if report.text]
    if bad_weight is not None:
        lines.append(
            f"The weights held NaN or inf before this step, first in {bad_weight!r}: an earlier one broke them"
        )
    lines += dict.fromkeys(_capital(advice) for cause, advice in _ADVICE.items() if cause in causes)
    # Skipping does not mend a student that has no outputs for any image, nor a loss that has none without images.
    can_skip = not causes & {"diverged", "rows"}
    skip = f", or skip such steps with train.max_nonfinite_steps={max_in_a_row + 3}" if can_skip else ""
    lines.append(_restart() + skip)
    return "\n".join(lines)


def _restart() -> str:
    return (
        "A run that resumes meets the same batch again and ends the same way: start over with other settings, with "
        "--fresh or in another run_dir"
    )


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _of_all_ranks(reports: list[_Report]) -> list[_Report]:
    """The reports of all ranks, on every rank, so each of them ends with the whole message."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return reports
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, [tuple(report) for report in reports])
    if len(gathered) == 1:
        return reports
    found = []
    for rank, of_rank in enumerate(gathered):
        for text, causes, bad_weight in of_rank:
            found.append(_Report(f"rank {rank}, {text}" if text else "", tuple(causes), bad_weight))
    return found
