"""The learning rate over a run: its ends and shape, the optimizer's groups, and an exact resume."""

import io
import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.training.schedules import ScheduleSettings, build_schedule, check_length, lr_factor

DECAYING = ["cosine", "linear", "poly"]
SETTINGS = {
    "cosine": {"warmup_epochs": 1.5, "cooldown_epochs": 1},
    "linear": {"warmup_epochs": 2, "final_factor": 0.1},
    "poly": {"power": 2.0},
    "step": {"milestones": (2, 4.5), "gamma": 0.3},
    "constant": {"warmup_epochs": 3},
}


def make_optimizer():
    layers = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    return torch.optim.SGD([{"params": layers[:1]}, {"params": layers[1:], "lr": 0.02}], lr=0.1)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def steps(optimizer, schedule, count):
    """The learning rates that each of the next `count` steps uses."""
    seen = []
    for _ in range(count):
        seen.append(rates(optimizer))
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("final", [0.0, 0.07])
def test_decay_from_one_to_final_factor(kind, final):
    settings = ScheduleSettings(kind=kind, final_factor=final)
    assert [lr_factor(settings, epoch, 7) for epoch in (0, 7, 7.1)] == [1.0, final, final]
    values = [lr_factor(settings, step / 10, 7) for step in range(71)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("kind", "at_quarter", "at_half"),
    [("linear", 0.75, 0.5), ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5), ("poly", 0.75**0.9, 0.5**0.9)],
)
def test_decay_shape(kind, at_quarter, at_half):
    settings = ScheduleSettings(kind=kind)
    assert lr_factor(settings, 2, 8) == pytest.approx(at_quarter)
    assert lr_factor(settings, 4, 8) == pytest.approx(at_half)
    raised = ScheduleSettings(kind=kind, final_factor=0.2)
    assert lr_factor(raised, 2, 8) == pytest.approx(0.2 + 0.8 * at_quarter)


def test_poly_power():
    assert lr_factor(ScheduleSettings(kind="poly", power=3.0), 5, 10) == pytest.approx(0.125)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_warmup_is_linear(kind):
    milestones = {"milestones": (8,)} if kind == "step" else {}
    settings = ScheduleSettings(kind=kind, warmup_epochs=4, warmup_start=0.2, **milestones)
    assert [lr_factor(settings, epoch, 10) for epoch in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr_factor(settings, 3.5, 10) == pytest.approx(0.9)


@pytest.mark.parametrize("kind", DECAYING)
def test_decay_fits_between_warmup_and_cooldown(kind):
    bare = ScheduleSettings(kind=kind, final_factor=0.1)
    settings = ScheduleSettings(kind=kind, final_factor=0.1, warmup_epochs=2, cooldown_epochs=3)
    for epoch in (0, 1.25, 4, 5):
        assert lr_factor(settings, 2 + epoch, 10) == pytest.approx(lr_factor(bare, epoch, 5))
    assert [lr_factor(settings, epoch, 10) for epoch in (7, 8.5, 10)] == [0.1, 0.1, 0.1]


def test_milestones_ignore_warmup():
    for warmup in (0, 2):
        settings = ScheduleSettings(kind="step", milestones=(4, 6), gamma=0.5, warmup_epochs=warmup)
        assert [lr_factor(settings, epoch, 10) for epoch in (2, 3.99, 4, 5.99, 6, 9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_constant():
    assert {lr_factor(ScheduleSettings(kind="constant"), epoch, 10) for epoch in (0, 3.3, 9.9, 10)} == {1.0}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_per_epoch_is_per_step_at_epoch_start(kind):
    per_step = ScheduleSettings(kind=kind, **SETTINGS[kind])
    per_epoch = ScheduleSettings(kind=kind, per="epoch", **SETTINGS[kind])
    for epoch, part in itertools.product(range(6), (0, 0.3, 0.999)):
        assert lr_factor(per_epoch, epoch + part, 6) == lr_factor(per_step, epoch, 6)


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize("per", ["step", "epoch"])
def test_groups_use_their_lr_times_factor(kind, per):
    settings = ScheduleSettings(kind=kind, per=per, **SETTINGS[kind])
    optimizer = make_optimizer()
    schedule = build_schedule(optimizer, settings, epochs=6, steps_per_epoch=5)
    seen = steps(optimizer, schedule, 30)
    factors = [lr_factor(settings, step / 5, 6) for step in range(30)]
    assert seen == [[0.1 * value, 0.02 * value] for value in factors]
    assert kind == "constant" or len(set(factors)) >= 3


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_resume_is_exact(kind):
    settings = ScheduleSettings(kind=kind, **SETTINGS[kind])
    optimizer = make_optimizer()
    schedule = build_schedule(optimizer, settings, epochs=6, steps_per_epoch=5)
    steps(optimizer, schedule, 7)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    wanted = steps(optimizer, schedule, 23)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer = make_optimizer()
    schedule = build_schedule(optimizer, settings, epochs=6, steps_per_epoch=5)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert schedule.last_epoch == 7
    assert steps(optimizer, schedule, 23) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 6, "cooldown_epochs": 4}, "warmup_epochs: 6 and cooldown_epochs: 4 take all 10 epochs"),
        ({"kind": "constant", "warmup_epochs": 12}, "warmup_epochs: 12 .* 10 epochs"),
        ({"kind": "step", "milestones": (5, 10, 15)}, "milestones: 10, 15 come after the 10 epochs"),
    ],
)
def test_schedule_longer_than_run_is_refused(settings, message):
    settings = ScheduleSettings(**settings)
    with pytest.raises(ConfigError, match=message):
        check_length(settings, 10)
    with pytest.raises(ConfigError, match=message):
        build_schedule(make_optimizer(), settings, epochs=10, steps_per_epoch=5)
    check_length(settings, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "step"}, "needs milestones"),
        ({"kind": "step", "milestones": (5, 3)}, r"milestones must increase, got \[5.0, 3.0\]"),
        ({"kind": "step", "milestones": (5, 5)}, "milestones must increase"),
        ({"milestones": (5,)}, "milestones: .* has no effect with kind: cosine"),
        ({"kind": "linear", "gamma": 0.5}, "gamma: 0.5 has no effect with kind: linear"),
        ({"power": 2.0}, "power: 2.0 has no effect with kind: cosine"),
        ({"kind": "step", "milestones": (5,), "final_factor": 0.1}, "final_factor: 0.1 has no effect with kind: step"),
        ({"kind": "constant", "cooldown_epochs": 1}, "cooldown_epochs: 1.0 has no effect with kind: constant"),
        ({"warmup_start": 1.5}, "less than or equal to 1"),
        ({"kind": "cosin"}, "'cosine', 'linear'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleSettings(**settings)


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_warmup_as_fraction_of_the_run(kind):
    milestones = {"milestones": (3,)} if kind == "step" else {}
    fraction = ScheduleSettings(kind=kind, warmup_fraction=0.25, **milestones)
    epochs = ScheduleSettings(kind=kind, warmup_epochs=2, **milestones)
    for epoch in (0, 1.3, 2, 5, 7.9):
        assert lr_factor(fraction, epoch, 8) == lr_factor(epochs, epoch, 8)


def test_two_warmups_are_refused():
    with pytest.raises(ValidationError, match="set one of them"):
        ScheduleSettings(warmup_epochs=1, warmup_fraction=0.1)
    with pytest.raises(ConfigError, match=r"warmup_fraction: 0\.75, epochs: 6 and cooldown_epochs: 2 take all 8"):
        check_length(ScheduleSettings(warmup_fraction=0.75, cooldown_epochs=2), 8)
