"""The average against its formula, what it leaves alone, and an exact resume."""

import io

import pytest
import torch
from torch import nn

from kd_pipeline.errors import StateError
from kd_pipeline.training.ema import EmaSettings, StudentEma
from tests.networks import ConvNet, random_images


def train_step(student, seed):
    """A step that changes all weights and the statistics of BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    student.train()(random_images(4, seed=seed))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def everything_in(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def constant(_):
    return 0.8


def warming_up(num_before):
    return min(0.4, (1 + num_before) / (10 + num_before))


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        (EmaSettings(decay=0.8, warmup=False), constant),
        (EmaSettings(decay=0.4), warming_up),
        (EmaSettings(decay=0.4, every_steps=3), warming_up),
    ],
    ids=["constant", "warm-up", "every third step"],
)
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(settings, decay):
    student = ConvNet()
    ema = StudentEma(student, settings)
    history = [everything_in(student)]
    for step in range(1, 14):
        train_step(student, step)
        ema.update(student)
        if step % settings.every_steps == 0:
            history.append(everything_in(student))
    shares = [1.0]  # of each of the weights in the average
    for num_before in range(len(history) - 1):
        shares = [share * decay(num_before) for share in shares] + [1 - decay(num_before)]
    assert sum(shares) == pytest.approx(1)
    for name, averaged in ema.student.named_parameters():
        wanted = sum(share * weights[name].double() for share, weights in zip(shares, history, strict=True))
        torch.testing.assert_close(averaged.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_a_long_run_reaches_the_decay_that_was_asked_for():
    student = nn.Linear(1, 1, bias=False)
    ema = StudentEma(student, EmaSettings(decay=0.5))
    with torch.no_grad():
        student.weight.fill_(0.0)
        for _ in range(50):
            ema.update(student)
        student.weight.fill_(1.0)
    ema.update(student)
    assert ema.student.weight.item() == pytest.approx(0.5)


def test_buffers_are_the_students_latest():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    for step in range(3):
        train_step(student, step)
        ema.update(student)
    buffers = dict(student.named_buffers())
    assert any("running_mean" in name for name in buffers) and any("num_batches" in name for name in buffers)
    assert same(dict(ema.student.named_buffers()), buffers)


def test_weights_that_stay_the_same_are_averaged_without_any_rounding():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    before = everything_in(student)
    for _ in range(200):
        ema.update(student)
    assert same(everything_in(ema.student), before)


def test_updates_leave_the_student_and_a_teacher_beside_it_untouched():
    student, teacher = ConvNet(), ConvNet(seed=1)
    student.teacher = (teacher,)  # not a submodule
    ema = StudentEma(student, EmaSettings(decay=0.1))
    train_step(student, 0)
    before, taught = everything_in(student), everything_in(teacher)
    ema.update(student)
    assert same(everything_in(student), before) and same(everything_in(teacher), taught)
    assert ema.state_dict()["student"].keys() == before.keys()
    assert not same(everything_in(ema.student), before)
    assert student.training


def test_the_average_needs_no_gradient_and_stays_in_eval_mode():
    student = ConvNet().train()
    ema = StudentEma(student, EmaSettings())
    student(random_images(2))["logits"].sum().backward()
    ema.update(student)
    assert not any(module.training for module in ema.student.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in ema.student.parameters())
    assert not ema.student(random_images(2))["logits"].requires_grad
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_buffer_is_copied_without_the_graph_behind_it():
    student = nn.Linear(2, 1)
    student.register_buffer("doubled", torch.zeros(1, 2))
    ema = StudentEma(student, EmaSettings())
    student.doubled = 2 * student.weight
    ema.update(student)
    assert student.doubled.requires_grad and not ema.student.doubled.requires_grad
    assert torch.equal(ema.student.doubled, student.doubled)


def test_a_half_precision_student_is_averaged_in_full_precision():
    student = nn.Linear(3, 2).to(torch.bfloat16)
    ema = StudentEma(student, EmaSettings(decay=0.999, warmup=False))
    before = ema.student.weight.clone()
    nn.init.constant_(student.weight, 2.0)
    ema.update(student)
    assert ema.student.weight.dtype == torch.float32
    torch.testing.assert_close(ema.student.weight, nn.Parameter(before + 0.001 * (2 - before), requires_grad=False))


@pytest.mark.parametrize("every_steps", [1, 3])
def test_a_state_loaded_without_code_goes_on_bit_for_bit(every_steps):
    settings = EmaSettings(decay=0.99, every_steps=every_steps)
    student = ConvNet()
    ema = StudentEma(student, settings)
    for step in range(7):
        train_step(student, step)
        ema.update(student)
    file = io.BytesIO()
    torch.save({"ema": ema.state_dict(), "student": student.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    restarted = ConvNet(seed=1)
    restarted.load_state_dict(saved["student"])
    other = StudentEma(restarted, settings)
    other.load_state_dict(saved["ema"])
    for step in range(7, 18):
        train_step(student, step)
        ema.update(student)
        train_step(restarted, step)
        other.update(restarted)
    assert same(everything_in(other.student), everything_in(ema.student))
    assert other.state_dict()["num_steps"] == 18


def test_the_state_of_another_network_is_refused():
    ema = StudentEma(ConvNet(), EmaSettings())
    with pytest.raises(StateError, match=r"that of another network(?s:.)*head"):
        ema.load_state_dict(StudentEma(nn.Linear(3, 2), EmaSettings()).state_dict())


def test_the_average_follows_the_student_to_its_device():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    ema.update(student.to("meta"))
    assert {value.device.type for value in ema.student.state_dict().values()} == {"meta"}
