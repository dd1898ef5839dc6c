"""The EMA follows its formula, leaves the student alone and resumes exactly."""

import io
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.ema import EmaSettings, StudentEma
from tests.networks import ConvNet, random_images


def train_step(student, seed):
    """Change all weights and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    student.train()(random_images(4, seed=seed))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def constant(_):
    return 0.8


def warming_up(num_updates):
    return min(0.4, (1 + num_updates) / (10 + num_updates))


def exponential(num_updates):
    return 0.9 * (1 - math.exp(-num_updates / 5))


def power(num_updates):
    return min(0.7, 1 - (1 + num_updates) ** (-2 / 3))


def slow_power(num_updates):
    return 1 - (1 + num_updates / 4) ** -0.5


def halving(num_updates):
    return 1 - 0.5 / (1 + num_updates)


def too_large(num_updates):
    return 1.5


OWN = {"decay": f"{__name__}:halving"}


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        (EmaSettings(decay=0.8, warmup=False), constant),
        (EmaSettings(decay=0.4), warming_up),
        (EmaSettings(decay=0.4, every_steps=3), warming_up),
        (EmaSettings(decay=0.9, warmup="exponential", warmup_updates=5), exponential),
        (EmaSettings(decay=0.7, warmup="power"), power),
        (EmaSettings(warmup="power", warmup_updates=4, power=0.5), slow_power),
        (EmaSettings(**OWN), halving),
    ],
    ids=["constant", "warmup", "every third step", "exponential", "power", "slow power", "own function"],
)
def test_average_matches_formula(settings, decay):
    student = ConvNet()
    ema = StudentEma(student, settings, plugins=[__name__])
    history = [state_of(student)]
    for step in range(1, 14):
        train_step(student, step)
        ema.update(student)
        if step % settings.every_steps == 0:
            history.append(state_of(student))
    shares = [1.0]  # of each entry of the history in the average
    for update in range(len(history) - 1):
        shares = [share * decay(update) for share in shares] + [1 - decay(update)]
    assert sum(shares) == pytest.approx(1)
    for name, averaged in ema.student.named_parameters():
        wanted = sum(share * weights[name].double() for share, weights in zip(shares, history, strict=True))
        torch.testing.assert_close(averaged.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_own_function_is_checked():
    with pytest.raises(ConfigError, match=f"--plugin {__name__}"):
        StudentEma(nn.Linear(1, 1), EmaSettings(**OWN))
    ema = StudentEma(nn.Linear(1, 1), EmaSettings(decay=f"{__name__}:too_large"), plugins=[__name__])
    with pytest.raises(ConfigError, match=r"returned 1\.5 for update 0; return a number from 0 to 1"):
        ema.update(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**OWN, "warmup": True}, "warmup has no effect on tests"),
        ({"warmup_updates": 10}, "warmup_updates is of warmup: exponential"),
        ({"warmup": "exponential", "power": 0.5}, "power is of warmup: power"),
        ({"decay": 1.0}, "decay"),
        ({"decay": "fast"}, "decay"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        EmaSettings(**settings)


def test_settings_of_own_function_round_trip():
    settings = EmaSettings(**OWN)
    assert EmaSettings(**settings.model_dump()) == settings and settings.warmup is False


def test_warmup_reaches_decay():
    student = nn.Linear(1, 1, bias=False)
    ema = StudentEma(student, EmaSettings(decay=0.5))
    with torch.no_grad():
        student.weight.fill_(0.0)
        for _ in range(50):
            ema.update(student)
        student.weight.fill_(1.0)
    ema.update(student)
    assert ema.student.weight.item() == pytest.approx(0.5)


def test_buffers_are_copied():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    for step in range(3):
        train_step(student, step)
        ema.update(student)
    buffers = dict(student.named_buffers())
    assert any("running_mean" in name for name in buffers) and any("num_batches" in name for name in buffers)
    assert same(dict(ema.student.named_buffers()), buffers)


def test_constant_weights_are_averaged_exactly():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    before = state_of(student)
    for _ in range(200):
        ema.update(student)
    assert same(state_of(ema.student), before)


def test_update_leaves_student_and_teacher_alone():
    student, teacher = ConvNet(), ConvNet(seed=1)
    student.teacher = (teacher,)  # not a submodule
    ema = StudentEma(student, EmaSettings(decay=0.1))
    train_step(student, 0)
    before, teacher_before = state_of(student), state_of(teacher)
    ema.update(student)
    assert same(state_of(student), before) and same(state_of(teacher), teacher_before)
    assert ema.state_dict()["student"].keys() == before.keys()
    assert not same(state_of(ema.student), before)
    assert student.training


def test_average_has_no_gradient_and_stays_in_eval():
    student = ConvNet().train()
    ema = StudentEma(student, EmaSettings())
    student(random_images(2))["logits"].sum().backward()
    ema.update(student)
    assert not any(module.training for module in ema.student.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in ema.student.parameters())
    assert not ema.student(random_images(2))["logits"].requires_grad
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_buffer_is_copied_without_graph():
    student = nn.Linear(2, 1)
    student.register_buffer("doubled", torch.zeros(1, 2))
    ema = StudentEma(student, EmaSettings())
    student.doubled = 2 * student.weight
    ema.update(student)
    assert student.doubled.requires_grad and not ema.student.doubled.requires_grad
    assert torch.equal(ema.student.doubled, student.doubled)


def test_half_precision_student_is_averaged_in_float32():
    student = nn.Linear(3, 2).to(torch.bfloat16)
    ema = StudentEma(student, EmaSettings(decay=0.999, warmup=False))
    before = ema.student.weight.clone()
    nn.init.constant_(student.weight, 2.0)
    ema.update(student)
    assert ema.student.weight.dtype == torch.float32
    torch.testing.assert_close(ema.student.weight, nn.Parameter(before + 0.001 * (2 - before), requires_grad=False))


@pytest.mark.parametrize("every_steps", [1, 3])
def test_resume_is_exact(every_steps):
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
    resumed = StudentEma(restarted, settings)
    resumed.load_state_dict(saved["ema"])
    for step in range(7, 18):
        train_step(student, step)
        ema.update(student)
        train_step(restarted, step)
        resumed.update(restarted)
    assert same(state_of(resumed.student), state_of(ema.student))
    assert resumed.state_dict()["num_steps"] == 18


def test_state_of_different_network_is_refused():
    ema = StudentEma(ConvNet(), EmaSettings())
    with pytest.raises(StateError, match=r"belongs to a different student(?s:.)*head"):
        ema.load_state_dict(StudentEma(nn.Linear(3, 2), EmaSettings()).state_dict())


def test_average_follows_device():
    student = ConvNet()
    ema = StudentEma(student, EmaSettings())
    ema.update(student.to("meta"))
    assert {value.device.type for value in ema.student.state_dict().values()} == {"meta"}
