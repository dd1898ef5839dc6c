"""The contract of `kd_pipeline.losses`, tested on every loss."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kd_pipeline import losses
from kd_pipeline.errors import ConfigError
from tests.on_gpu import DEVICE, OnGpu


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor
    """The labels as `[N, K]` floats."""
    valid: Tensor | None = None
    temperature: float = 2.0

    def rows(self, keep: Tensor) -> "Batch":
        """The batch reduced to the rows `keep`, given as bools or indices."""
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
    "soft_target of maps": lambda b: losses.soft_target(
        as_pixels(b.student), as_pixels(b.teacher), temperature=b.temperature, valid=b.valid
    ),
    "soft_target masked": lambda b: losses.soft_target(
        as_pixels(b.student),
        as_pixels(b.teacher),
        temperature=b.temperature,
        standardize=True,
        mask=second_pixel(b.student),
        valid=b.valid,
    ),
    "dkd of maps": lambda b: losses.dkd(
        as_pixels(b.student), as_pixels(b.teacher), pixel_labels(b), temperature=b.temperature, valid=b.valid
    ),
    "dist of maps": lambda b: losses.dist(
        as_pixels(b.student), as_pixels(b.teacher), temperature=b.temperature, valid=b.valid
    ),
    "dist masked": lambda b: losses.dist(
        as_pixels(b.student),
        as_pixels(b.teacher),
        temperature=b.temperature,
        mask=second_pixel(b.student),
        valid=b.valid,
    ),
    "hard_label of maps": lambda b: losses.hard_label(as_pixels(b.student), as_pixels(b.teacher), valid=b.valid),
    "task of maps": lambda b: losses.task(as_pixels(b.student), pixel_labels(b), valid=b.valid),
    "task masked": lambda b: losses.task(
        as_pixels(b.student), pixel_labels(b), label_smoothing=0.1, mask=second_pixel(b.student), valid=b.valid
    ),
    "logit_mse of maps": lambda b: losses.logit_mse(as_pixels(b.student), as_pixels(b.teacher), valid=b.valid),
    "cosine masked": lambda b: losses.cosine(
        as_pixels(b.student), as_pixels(b.teacher), mask=second_pixel(b.student), valid=b.valid
    ),
    "feature_mse": lambda b: losses.feature_mse(b.student, b.teacher, valid=b.valid),
    "feature_mse pooled": lambda b: losses.feature_mse(as_map(b.student), enlarged(b.teacher), valid=b.valid),
    "feature_cosine": lambda b: losses.feature_cosine(b.student, b.teacher, valid=b.valid),
    "feature_cosine of a map": lambda b: losses.feature_cosine(
        two_channels(b.student), two_channels(b.teacher), valid=b.valid
    ),
    "feature_mse masked": lambda b: losses.feature_mse(
        as_map(b.student), as_map(b.teacher), mask=all_but_first(b.student, 3), valid=b.valid
    ),
    "feature_cosine masked": lambda b: losses.feature_cosine(
        as_tokens(b.student), as_tokens(b.teacher), mask=all_but_first(b.student), valid=b.valid
    ),
    "feature_smooth_l1": lambda b: losses.feature_smooth_l1(b.student, b.teacher, beta=2.0, valid=b.valid),
    "feature_smooth_l1 masked": lambda b: losses.feature_smooth_l1(
        as_tokens(b.student), as_tokens(b.teacher), mask=all_but_first(b.student), valid=b.valid
    ),
    "am_radio": lambda b: losses.am_radio(b.student, b.teacher, valid=b.valid),
    "am_radio of a map": lambda b: losses.am_radio(two_channels(b.student), two_channels(b.teacher), valid=b.valid),
    "am_radio masked": lambda b: losses.am_radio(
        two_channels(b.student), two_channels(b.teacher), mask=all_but_first(b.student, 3), valid=b.valid
    ),
    "relational in the batch": lambda b: losses.relational(
        b.student, b.teacher, student_temperature=b.temperature, teacher_temperature=0.5, form="kl", valid=b.valid
    ),
    "relational": lambda b: losses.relational(
        b.student,
        b.teacher,
        references_MD=fixed_references(b.student),
        teacher_temperature=0.5,
        valid=b.valid,
    ),
    "attention_transfer masked": lambda b: losses.attention_transfer(
        as_map(b.student), as_map(b.teacher), mask=all_but_first(b.student, 3), valid=b.valid
    ),
    "channel_wise masked": lambda b: losses.channel_wise(
        as_map(b.student),
        as_map(b.teacher),
        temperature=b.temperature,
        mask=all_but_first(b.student, 3),
        valid=b.valid,
    ),
    "channel_wise over channels": lambda b: losses.channel_wise(
        as_pixels(b.student),
        as_pixels(b.teacher),
        temperature=b.temperature,
        over="channels",
        mask=second_pixel(b.student),
        valid=b.valid,
    ),
    "attention_transfer": lambda b: losses.attention_transfer(as_map(b.student), as_map(b.teacher), valid=b.valid),
    "channel_wise": lambda b: losses.channel_wise(
        as_map(b.student), as_map(b.teacher), temperature=b.temperature, valid=b.valid
    ),
}


no_autocast = torch.autocast("cpu", enabled=False)
"""For the helpers that make maps of rows, which are not part of a loss."""


@no_autocast
def as_map(rows: Tensor) -> Tensor:
    """Rows `[N, K]` as maps with one channel, `[N, 1, K, 1]`."""
    return rows[:, None, :, None]


@no_autocast
def as_tokens(rows: Tensor) -> Tensor:
    """Rows `[N, K]` as K tokens with one channel, `[N, K, 1]`."""
    return rows[..., None]


@no_autocast
def all_but_first(rows: Tensor, ndim: int = 2) -> Tensor:
    """A mask without the first position, `[N, K]`, or `[N, K, 1]` for the rows as a map."""
    mask = (torch.arange(rows.shape[1], device=rows.device) > 0).expand(rows.shape)
    return mask if ndim == 2 else mask[..., None]


@no_autocast
def fixed_references(rows: Tensor) -> Tensor:
    """`[7, K]` float32, the same for any rows."""
    device = rows.device
    return torch.cos(torch.arange(7.0, device=device)[:, None] * torch.arange(1.0, rows.shape[1] + 1, device=device))


@no_autocast
def enlarged(rows: Tensor) -> Tensor:
    """Three times the size, `[N, 1, K * 3, 3]`; pooling restores `as_map`."""
    return as_map(rows).repeat_interleave(3, dim=2).repeat(1, 1, 1, 3)


@no_autocast
def two_channels(rows: Tensor) -> Tensor:
    """Maps whose second channel is the first one flipped, `[N, 2, K, 1]`."""
    return torch.stack([rows, rows.flip(1)], dim=1)[..., None]


@no_autocast
def as_pixels(rows: Tensor) -> Tensor:
    """Maps of logits with two pixels, the second with the classes in reverse, `[N, K, 1, 2]`."""
    return torch.stack([rows, rows.flip(1)], dim=2)[:, :, None]


@no_autocast
def pixel_labels(batch: Batch) -> Tensor:
    """The labels of `as_pixels`, `[N, 1, 2]`."""
    return torch.stack([batch.labels, batch.student.shape[1] - 1 - batch.labels], dim=1)[:, None]


@no_autocast
def second_pixel(rows: Tensor) -> Tensor:
    """A mask with the second pixel only, `[N, 1, 2]`."""
    return (torch.arange(2, device=rows.device) == 1).expand(len(rows), 1, 2)


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


def test_every_public_loss_is_listed():
    assert {name.split()[0] for name in LOSSES} == set(losses.__all__)
    assert losses.__all__ == sorted(losses.__all__)


@every_loss
@pytest.mark.parametrize(
    ("shape", "valid"), [((1, 3), None), ((4, 2), None), ((5, 4), None), ((5, 4), [True, False, True, True, False])]
)
def test_gradcheck(loss, shape, valid):
    batch = make_batch(*shape, dtype=torch.float64, valid=valid)
    assert torch.autograd.gradcheck(lambda student: loss(batch._replace(student=student)), batch.student)


@every_loss
def test_gradient_reaches_student_only(loss):
    batch = make_batch(dtype=torch.float64)
    batch.teacher.requires_grad_()
    batch.weights.requires_grad_()
    loss(batch).backward()
    assert batch.student.grad.abs().sum() > 0
    assert batch.teacher.grad is None
    assert batch.weights.grad is None


@every_loss
def test_loss_is_mean_over_rows(loss):
    """A sum over rows would double with the batch."""
    batch = make_batch(dtype=torch.float64)
    torch.testing.assert_close(loss(batch.rows(torch.arange(6).repeat(2))), loss(batch))


@every_loss
def test_row_order_does_not_matter(loss):
    batch = make_batch(dtype=torch.float64)
    torch.testing.assert_close(loss(batch.rows(torch.tensor([3, 1, 5, 0, 2, 4]))), loss(batch))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(loss, dtype):
    """The value equals that of upcast inputs; the gradient is rounded to the student's dtype."""
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
def test_half_student_with_float32_teacher(loss):
    batch = make_batch()
    mixed = batch._replace(student=batch.student.detach().half().requires_grad_())
    torch.testing.assert_close(value_and_gradient(loss, mixed)[0], loss(batch).detach(), rtol=0.01, atol=0.01)


@every_loss
def test_student_determines_dtype(loss):
    single, double = make_batch(), make_batch(dtype=torch.float64)
    assert loss(double).dtype == torch.float64
    assert loss(double._replace(teacher=single.teacher, weights=single.weights)).dtype == torch.float64
    assert loss(single._replace(teacher=double.teacher, weights=double.weights)).dtype == torch.float32


@every_loss
def test_autocast_is_off(loss):
    class AutocastDetector(TorchFunctionMode):
        seen: bool = False

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.seen |= torch.is_autocast_enabled("cpu")
            return result

    batch = make_batch(dtype=torch.bfloat16)
    expected_value, expected_gradient = value_and_gradient(loss, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastDetector() as mode:
        value = loss(batch)
    (gradient,) = torch.autograd.grad(value, batch.student)
    assert not mode.seen
    assert value.dtype == torch.float32
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient)


@every_loss
def test_invalid_rows_equal_removed_rows(loss):
    valid = torch.tensor([True, False, True, True, False, True])
    batch = make_batch(dtype=torch.float64)
    value, gradient = value_and_gradient(loss, batch._replace(valid=valid))
    expected_value, expected_gradient = value_and_gradient(loss, batch.rows(valid))
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient[valid], expected_gradient)
    assert (gradient[~valid] == 0).all()


@every_loss
def test_all_rows_valid(loss):
    batch = make_batch()
    assert loss(batch._replace(valid=torch.ones(6, dtype=torch.bool))) == loss(batch)


@every_loss
@pytest.mark.parametrize(("garbage", "label"), [(float("nan"), -100), (float("inf"), -1), (-float("inf"), 5)])
def test_invalid_rows_are_ignored(loss, garbage, label):
    valid = [True, False, True, True, False, True]
    clean, dirty = make_batch(valid=valid), make_batch(valid=valid)
    out = ~dirty.valid
    with torch.no_grad():
        for tensor in (dirty.student, dirty.teacher, dirty.weights):
            tensor[out] = garbage
        dirty.labels[out] = label
    with torch.autograd.set_detect_anomaly(True):  # no NaN in the backward pass either
        value, gradient = value_and_gradient(loss, dirty)
    expected_value, expected_gradient = value_and_gradient(loss, clean)
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient)


@every_loss
def test_float16_overflow_in_invalid_row(loss):
    batch = make_batch(dtype=torch.float16, valid=[True, True, False, True, True, True])
    batch.teacher[2] = torch.tensor([70000.0, -70000.0, 0.0, 1.0, 2.0]).half()
    assert batch.teacher[2].isinf().any()
    value, gradient = value_and_gradient(loss, batch)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("task")])
def test_teacher_nan_is_not_hidden(name):
    batch = make_batch(valid=[True, True, False, True, True, True])
    batch.teacher[1, 3] = float("nan")
    assert LOSSES[name](batch).isnan()


@every_loss
@pytest.mark.parametrize("content", [1.0, float("nan")])
def test_no_valid_row(loss, content):
    batch = make_batch(valid=[False] * 6)
    with torch.no_grad():
        batch.student.mul_(content)
        batch.teacher.mul_(content)
    value, gradient = value_and_gradient(loss, batch)
    assert value == 0
    assert (gradient == 0).all()


@every_loss
def test_empty_batch(loss):
    value, gradient = value_and_gradient(loss, make_batch(0, 5))
    assert value == 0
    assert gradient.shape == (0, 5)


@every_loss
@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 70000.0])
def test_extreme_inputs_are_finite(loss, temperature, scale):
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
def test_no_gpu_sync(loss):
    """Fake tensors have no values: `.item()`, branches and boolean indexing raise. On a GPU they would synchronize."""
    with FakeTensorMode():
        for valid in (None, torch.ones(6, dtype=torch.bool)):
            value, gradient = value_and_gradient(loss, make_batch()._replace(valid=valid))
            assert value.shape == ()
            assert gradient.shape == (6, 5)


@every_loss
def test_all_of_it_is_on_the_gpu(loss):
    """Nothing is made on the host, copied from there or to it."""
    batch = make_batch(valid=[True, False, True, True, True, True])
    with OnGpu() as gpu:
        names = ("student", "teacher", "labels", "weights", "valid")
        value = loss(batch._replace(**{name: gpu.tensor(getattr(batch, name)) for name in names}))
    assert value.device == DEVICE
    assert not gpu.copies


@every_loss
def test_compiles_to_one_graph(loss):
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
    [losses.soft_target, losses.hard_label, losses.logit_mse, losses.cosine, losses.dist, losses.relational],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    ("student", "teacher", "valid", "parts"),
    [
        (S, torch.zeros(4, 5), None, [r"\[4, 5\] float32", r"\[4, 3\] float32"]),
        (S, torch.zeros(3, 3), None, [r"\[3, 3\] float32", r"\[4, 3\] float32"]),
        (S, torch.zeros(4, 3, dtype=torch.int64), None, [r"\[4, 3\] int64", "floating"]),
        (torch.zeros(4, 3, dtype=torch.int64), S, None, [r"\[4, 3\] int64", "floating"]),
        (torch.zeros(3), torch.zeros(3), None, [r"\[3\] float32", r"\[N, [12] or more\]"]),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), None, [r"\[4, 3, 2\] float32", r"\[N, [12] or more\]"]),
        (torch.zeros(4, 0), torch.zeros(4, 0), None, [r"\[4, 0\] float32", r"\[N, [12] or more\]"]),
        (S, S, torch.ones(5, dtype=torch.bool), [r"\[5\] bool", r"\[4\] bool"]),
        (S, S, torch.ones(4), [r"\[4\] float32", r"\[4\] bool"]),
        (S, S, torch.ones(4, 1, dtype=torch.bool), [r"\[4, 1\] bool", r"\[4\] bool"]),
    ],
)
def test_invalid_tensors(loss, student, teacher, valid, parts):
    for text in parts:
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
def test_invalid_labels(loss, labels, found):
    with pytest.raises(ConfigError, match=rf"\[4\] int64 .* \[4, 3\] floating .* got {found}"):
        loss(S, labels)


@pytest.mark.parametrize("name", ["soft_target", "hard_label", "dist", "dkd", "task"])
def test_one_class_is_rejected(name):
    batch = make_batch(4, 1)
    with pytest.raises(ConfigError, match=r"\[N, 2 or more\] tensor, got \[4, 1\] float32; a single class"):
        LOSSES.get(name, LOSSES["soft_target kl"])(batch)


@pytest.mark.parametrize("name", ["soft_target kl", "dkd", "dist", "channel_wise"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_invalid_temperature(name, temperature):
    with pytest.raises(ConfigError, match=f"above 0, got {temperature}"):
        LOSSES[name](make_batch()._replace(temperature=temperature))


def test_invalid_form():
    with pytest.raises(ConfigError, match="'kl' or 'cross_entropy', got 'mse'"):
        losses.soft_target(S, S, form="mse")
