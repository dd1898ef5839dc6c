"""The promises of `kd_pipeline.losses`, held by every loss in every form."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kd_pipeline import losses
from kd_pipeline.errors import ConfigError


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor
    """The labels as `[N, K]` floats."""
    valid: Tensor | None = None
    temperature: float = 2.0

    def rows(self, keep: Tensor) -> "Batch":
        """The same batch with the rows `keep` alone, given as bools or as positions."""
        valid = None if self.valid is None else self.valid[keep]
        return Batch(
            self.student.detach()[keep].requires_grad_(),
            self.teacher[keep],
            self.labels[keep],
            self.weights[keep],
            valid,
            self.temperature,
        )


LOSSES = {
    "soft_target kl": lambda b: losses.soft_target(b.student, b.teacher, temperature=b.temperature, valid=b.valid),
    "soft_target cross_entropy": lambda b: losses.soft_target(
        b.student, b.teacher, temperature=b.temperature, form="cross_entropy", valid=b.valid
    ),
    "soft_target standardized": lambda b: losses.soft_target(
        b.student, b.teacher, temperature=b.temperature, standardize=True, valid=b.valid
    ),
    "dkd": lambda b: losses.dkd(b.student, b.teacher, b.labels, temperature=b.temperature, valid=b.valid),
    "dkd soft labels": lambda b: losses.dkd(b.student, b.teacher, b.weights, temperature=b.temperature, valid=b.valid),
    "dkd standardized": lambda b: losses.dkd(
        b.student, b.teacher, b.labels, temperature=b.temperature, standardize=True, valid=b.valid
    ),
    "dist": lambda b: losses.dist(b.student, b.teacher, temperature=b.temperature, valid=b.valid),
    "hard_label": lambda b: losses.hard_label(b.student, b.teacher, valid=b.valid),
    "hard_label smoothed": lambda b: losses.hard_label(b.student, b.teacher, label_smoothing=0.1, valid=b.valid),
    "task": lambda b: losses.task(b.student, b.labels, valid=b.valid),
    "task smoothed": lambda b: losses.task(b.student, b.labels, label_smoothing=0.1, valid=b.valid),
    "task soft labels": lambda b: losses.task(b.student, b.weights, valid=b.valid),
    "logit_mse": lambda b: losses.logit_mse(b.student, b.teacher, valid=b.valid),
    "cosine": lambda b: losses.cosine(b.student, b.teacher, valid=b.valid),
    "feature_mse": lambda b: losses.feature_mse(b.student, b.teacher, valid=b.valid),
    "feature_mse pooled": lambda b: losses.feature_mse(as_map(b.student), enlarged(b.teacher), valid=b.valid),
    "feature_cosine": lambda b: losses.feature_cosine(b.student, b.teacher, valid=b.valid),
    "feature_cosine of a map": lambda b: losses.feature_cosine(
        two_channels(b.student), two_channels(b.teacher), valid=b.valid
    ),
    "attention_transfer": lambda b: losses.attention_transfer(as_map(b.student), as_map(b.teacher), valid=b.valid),
    "channel_wise": lambda b: losses.channel_wise(
        as_map(b.student), as_map(b.teacher), temperature=b.temperature, valid=b.valid
    ),
}


shaping = torch.autocast("cpu", enabled=False)
"""What brings the batch to the shape of a map is no part of the loss."""


@shaping
def as_map(rows: Tensor) -> Tensor:
    """The K numbers of a row as the positions of a map with one channel, `[N, 1, K, 1]`."""
    return rows[:, None, :, None]


@shaping
def enlarged(rows: Tensor) -> Tensor:
    """The same map three times as large, `[N, 1, K * 3, 3]`; pooling gives `as_map` back."""
    return as_map(rows).repeat_interleave(3, dim=2).repeat(1, 1, 1, 3)


@shaping
def two_channels(rows: Tensor) -> Tensor:
    """A map whose second channel is the first upside down, `[N, 2, K, 1]`: its directions depend on the numbers."""
    return torch.stack([rows, rows.flip(1)], dim=1)[..., None]


every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def make_batch(
    num_rows: int = 6, num_classes: int = 5, *, dtype=torch.float32, valid=None, scale: float = 2.0
) -> Batch:
    generator = torch.Generator().manual_seed(3)
    student, teacher, weights = torch.randn(3, num_rows, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return Batch(
        (scale * student).to(dtype).requires_grad_(),
        (scale * teacher).to(dtype),
        labels,
        weights.softmax(1).to(dtype),
        None if valid is None else torch.tensor(valid),
    )


def value_and_gradient(loss, batch: Batch) -> tuple[Tensor, Tensor]:
    value = loss(batch)
    (gradient,) = torch.autograd.grad(value, batch.student)
    return value.detach(), gradient


def test_every_public_loss_is_held_to_these_laws():
    assert {name.split()[0] for name in LOSSES} == set(losses.__all__)
    assert losses.__all__ == sorted(losses.__all__)


@every_loss
@pytest.mark.parametrize("shape", [(1, 3), (4, 2), (5, 4)])
def test_the_gradient_is_the_derivative_of_the_value(loss, shape):
    batch = make_batch(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda student: loss(batch._replace(student=student)), batch.student)


@every_loss
def test_the_gradient_is_the_derivative_of_the_value_when_rows_are_left_out(loss):
    batch = make_batch(5, 4, dtype=torch.float64, valid=[True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda student: loss(batch._replace(student=student)), batch.student)


@every_loss
def test_the_gradient_reaches_the_student_and_nobody_else(loss):
    batch = make_batch(dtype=torch.float64)
    batch.teacher.requires_grad_()
    batch.weights.requires_grad_()
    loss(batch).backward()
    assert batch.student.grad.abs().sum() > 0
    assert batch.teacher.grad is None
    assert batch.weights.grad is None


@every_loss
def test_repeating_the_batch_changes_nothing(loss):
    """A sum over the rows would double."""
    batch = make_batch(dtype=torch.float64)
    torch.testing.assert_close(loss(batch.rows(torch.arange(6).repeat(2))), loss(batch))


@every_loss
def test_the_order_of_the_rows_changes_nothing(loss):
    batch = make_batch(dtype=torch.float64)
    torch.testing.assert_close(loss(batch.rows(torch.tensor([3, 1, 5, 0, 2, 4]))), loss(batch))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(loss, dtype):
    """Exactly as if the caller had upcast them; only the gradient is rounded, to the student's dtype."""
    half = make_batch(dtype=dtype)
    upcast = half._replace(
        student=half.student.detach().float().requires_grad_(),
        teacher=half.teacher.float(),
        weights=half.weights.float(),
    )
    value, gradient = value_and_gradient(loss, half)
    expected_value, expected_gradient = value_and_gradient(loss, upcast)
    assert value.dtype == torch.float32
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient.to(dtype))
    torch.testing.assert_close(value, value_and_gradient(loss, make_batch())[0], rtol=0.05, atol=0.05)


@every_loss
def test_a_half_precision_student_may_have_a_float32_teacher(loss):
    batch = make_batch()
    mixed = batch._replace(student=batch.student.detach().half().requires_grad_())
    torch.testing.assert_close(value_and_gradient(loss, mixed)[0], loss(batch).detach(), rtol=0.01, atol=0.01)


@every_loss
def test_the_student_alone_decides_between_float32_and_float64(loss):
    single, double = make_batch(), make_batch(dtype=torch.float64)
    assert loss(double).dtype == torch.float64
    assert loss(double._replace(teacher=single.teacher, weights=single.weights)).dtype == torch.float64
    assert loss(single._replace(teacher=double.teacher, weights=double.weights)).dtype == torch.float32


@every_loss
def test_autocast_is_off_while_a_loss_is_computed_and_changes_no_bit(loss):
    class SeesAutocast(TorchFunctionMode):
        seen: bool = False

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.seen |= torch.is_autocast_enabled("cpu")
            return result

    batch = make_batch(dtype=torch.bfloat16)
    expected_value, expected_gradient = value_and_gradient(loss, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), SeesAutocast() as mode:
        value = loss(batch)
    (gradient,) = torch.autograd.grad(value, batch.student)
    assert not mode.seen
    assert value.dtype == torch.float32
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient)


@every_loss
def test_leaving_rows_out_equals_never_having_had_them(loss):
    valid = torch.tensor([True, False, True, True, False, True])
    batch = make_batch(dtype=torch.float64)
    value, gradient = value_and_gradient(loss, batch._replace(valid=valid))
    expected_value, expected_gradient = value_and_gradient(loss, batch.rows(valid))
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient[valid], expected_gradient)
    assert (gradient[~valid] == 0).all()


@every_loss
def test_a_mask_that_leaves_nothing_out_is_no_mask(loss):
    batch = make_batch()
    assert loss(batch._replace(valid=torch.ones(6, dtype=torch.bool))) == loss(batch)


@every_loss
@pytest.mark.parametrize(("garbage", "label"), [(float("nan"), -100), (float("inf"), -1), (-float("inf"), 5)])
def test_rows_that_do_not_count_may_hold_anything(loss, garbage, label):
    valid = [True, False, True, True, False, True]
    clean, dirty = make_batch(valid=valid), make_batch(valid=valid)
    out = ~dirty.valid
    with torch.no_grad():
        for tensor in (dirty.student, dirty.teacher, dirty.weights):
            tensor[out] = garbage
        dirty.labels[out] = label
    with torch.autograd.set_detect_anomaly(True):  # No NaN on the way either.
        value, gradient = value_and_gradient(loss, dirty)
    expected_value, expected_gradient = value_and_gradient(loss, clean)
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient)


@every_loss
def test_float16_teacher_rows_that_overflowed_are_harmless_when_they_do_not_count(loss):
    batch = make_batch(dtype=torch.float16, valid=[True, True, False, True, True, True])
    batch.teacher[2] = torch.tensor([70000.0, -70000.0, 0.0, 1.0, 2.0]).half()
    assert batch.teacher[2].isinf().any()
    value, gradient = value_and_gradient(loss, batch)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("task")])
def test_a_teacher_that_answers_nan_in_a_row_that_counts_is_not_hidden(name):
    batch = make_batch(valid=[True, True, False, True, True, True])
    batch.teacher[1, 3] = float("nan")
    assert LOSSES[name](batch).isnan()


@every_loss
@pytest.mark.parametrize("content", [1.0, float("nan")])
def test_a_batch_in_which_no_row_counts_gives_exactly_zero_with_a_graph(loss, content):
    batch = make_batch(valid=[False] * 6)
    with torch.no_grad():
        batch.student.mul_(content)
        batch.teacher.mul_(content)
    value, gradient = value_and_gradient(loss, batch)
    assert value == 0
    assert (gradient == 0).all()


@every_loss
def test_an_empty_batch_gives_exactly_zero_with_a_graph(loss):
    value, gradient = value_and_gradient(loss, make_batch(0, 5))
    assert value == 0
    assert gradient.shape == (0, 5)


@every_loss
@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 70000.0])
def test_extreme_logits_and_temperatures_give_finite_values_and_gradients(loss, temperature, scale):
    signs = make_batch(8, 6)
    batch = signs._replace(
        student=(scale * signs.student.detach().sign()).requires_grad_(),
        teacher=scale * signs.teacher.sign(),
        temperature=temperature,
    )
    value, gradient = value_and_gradient(loss, batch)
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_loss
def test_no_value_of_a_tensor_is_ever_asked_for(loss):
    """Fake tensors have no values: `.item()`, a Python branch and a boolean index all raise here, and on a GPU wait."""
    with FakeTensorMode():
        for valid in (None, torch.ones(6, dtype=torch.bool)):
            value, gradient = value_and_gradient(loss, make_batch()._replace(valid=valid))
            assert value.shape == ()
            assert gradient.shape == (6, 5)


@every_loss
def test_torch_compile_takes_the_whole_loss_as_one_graph(loss):
    batch = make_batch(valid=[True, False, True, True, True, True])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    value, gradient = value_and_gradient(compiled, batch)
    expected_value, expected_gradient = value_and_gradient(loss, batch)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


S = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "loss",
    [losses.soft_target, losses.hard_label, losses.logit_mse, losses.cosine, losses.dist],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    ("student", "teacher", "valid", "both"),
    [
        (S, torch.zeros(4, 5), None, [r"\[4, 5\] float32", r"\[4, 3\] float32"]),
        (S, torch.zeros(3, 3), None, [r"\[3, 3\] float32", r"\[4, 3\] float32"]),
        (S, torch.zeros(4, 3, dtype=torch.int64), None, [r"\[4, 3\] int64", "floating"]),
        (torch.zeros(4, 3, dtype=torch.int64), S, None, [r"\[4, 3\] int64", "floating"]),
        (torch.zeros(3), torch.zeros(3), None, [r"\[3\] float32", r"\[N, [12] or more\]"]),
        (torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2), None, [r"\[4, 3, 2, 2\] float32", r"\[N, [12] or more\]"]),
        (torch.zeros(4, 0), torch.zeros(4, 0), None, [r"\[4, 0\] float32", r"\[N, [12] or more\]"]),
        (S, S, torch.ones(5, dtype=torch.bool), [r"\[5\] bool", r"\[4\] bool"]),
        (S, S, torch.ones(4), [r"\[4\] float32", r"\[4\] bool"]),
        (S, S, torch.ones(4, 1, dtype=torch.bool), [r"\[4, 1\] bool", r"\[4\] bool"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_what_came_and_what_fits(loss, student, teacher, valid, both):
    for text in both:
        with pytest.raises(ConfigError, match=text):
            loss(student, teacher, valid=valid)


@pytest.mark.parametrize("loss", [losses.task, lambda s, y: losses.dkd(s, s, y)], ids=["task", "dkd"])
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.zeros(5, dtype=torch.int64), r"\[5\] int64"),
        (torch.zeros(4, dtype=torch.int32), r"\[4\] int32"),
        (torch.zeros(4), r"\[4\] float32"),
        (torch.zeros(4, 1, dtype=torch.int64), r"\[4, 1\] int64"),
        (torch.zeros(4, 5), r"\[4, 5\] float32"),
        (torch.zeros(4, 3, dtype=torch.int64), r"\[4, 3\] int64"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_what_came_and_what_fits(loss, labels, found):
    with pytest.raises(ConfigError, match=rf"\[4\] int64 .* \[4, 3\] floating .* got {found}"):
        loss(S, labels)


@pytest.mark.parametrize("name", ["soft_target", "hard_label", "dist", "dkd", "task"])
def test_one_class_is_refused_because_its_probability_is_always_one(name):
    batch = make_batch(4, 1)
    with pytest.raises(ConfigError, match=r"\[N, 2 or more\] tensor, got \[4, 1\] float32"):
        LOSSES.get(name, LOSSES["soft_target kl"])(batch)


@pytest.mark.parametrize("name", ["soft_target kl", "dkd", "dist"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused_with_its_value(name, temperature):
    with pytest.raises(ConfigError, match=f"above 0, got {temperature}"):
        LOSSES[name](make_batch()._replace(temperature=temperature))


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'kl' or 'cross_entropy', got 'mse'"):
        losses.soft_target(S, S, form="mse")
