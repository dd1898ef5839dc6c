"""Optimizer and schedule by import path: what they are called with, what is refused, and runs that resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.optimizers import OptimizerSettings, build_optimizer
from kd_pipeline.training.schedules import ScheduleSettings, build_schedule
from kd_pipeline.workflows._train import train
from tests.networks import ConvNet
from tests.training import networks, tiny_run

HERE = __name__
PLUGINS = [networks.__name__, HERE]


class Halving(torch.optim.SGD):
    """A class of the user's own, here SGD with half the learning rate."""

    def __init__(self, groups: Any, lr: float, **arguments: Any) -> None:
        super().__init__([{**group, "lr": group["lr"] / 2} for group in groups], lr=lr / 2, **arguments)


def momentum_sgd(
    groups: list[dict[str, Any]], lr: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)


def first_group(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    return torch.optim.SGD(groups[:1], lr=lr)


def not_an_optimizer(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    return groups


def one_cycle(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, peak: float = 0.1) -> LRScheduler:
    assert total_steps == 2 * steps_per_epoch
    return OneCycleLR(optimizer, max_lr=peak, total_steps=total_steps, cycle_momentum=False)


def plateau(optimizer: Optimizer, total_steps: int, steps_per_epoch: int) -> LRScheduler:
    return ReduceLROnPlateau(optimizer)


def of_another(optimizer: Optimizer, total_steps: int, steps_per_epoch: int) -> LRScheduler:
    return LinearLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


def sgd() -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def schedule(name: str, **kwargs: Any) -> LRScheduler:
    settings = ScheduleSettings(factory=f"{HERE}:{name}", kwargs=kwargs)
    return build_schedule(sgd(), settings, epochs=2, steps_per_epoch=5, plugins=PLUGINS)


def test_optimizer_gets_the_groups_and_arguments() -> None:
    settings = OptimizerSettings(
        factory=f"{HERE}:momentum_sgd", lr=0.5, weight_decay=0.25, kwargs={"momentum": 0.5}, lr_scale={"head": 0.1}
    )
    optimizer = build_optimizer(ConvNet(), settings, plugins=PLUGINS)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["student"]["lr"] == 0.5 and groups["student.head"]["lr"] == pytest.approx(0.05)
    assert groups["student"]["weight_decay"] == 0.25 and groups["student/no_decay"]["weight_decay"] == 0
    assert {group["momentum"] for group in groups.values()} == {0.5}


def test_factory_may_be_a_class() -> None:
    optimizer = build_optimizer(ConvNet(), OptimizerSettings(factory=f"{HERE}:Halving", lr=0.5), plugins=PLUGINS)
    assert isinstance(optimizer, Halving) and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("momentum_sgd", {"beta": 0.9}, r"momentum_sgd failed \(TypeError: .*'beta'\); it is called with"),
        ("first_group", {}, r"first_group left out \d+ of \d+ parameters, which would not be trained"),
        ("not_an_optimizer", {}, r"returned a list; return a torch\.optim\.Optimizer"),
        ("nowhere", {}, r"has no function called 'nowhere'"),
    ],
)
def test_wrong_optimizers_are_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(ConvNet(), OptimizerSettings(factory=f"{HERE}:{name}", kwargs=kwargs), plugins=PLUGINS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plateau", "returned a ReduceLROnPlateau, which is stepped with a metric; return an LRScheduler"),
        ("not_an_optimizer", r"not_an_optimizer failed \(TypeError: .*it is called with the optimizer, total_steps=10"),
        ("sgd", r"sgd failed \(TypeError"),
        ("of_another", "returned a schedule of another optimizer"),
    ],
)
def test_wrong_schedules_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.schedule\.factory: .*{message}"):
        schedule(name)


def test_schedule_gets_its_arguments() -> None:
    found = schedule("one_cycle", peak=0.7)
    assert isinstance(found, OneCycleLR) and found.total_steps == 10
    assert max(found.state_dict()["base_lrs"][0], 0.7 / 25) == pytest.approx(0.7 / 25)


def test_factories_must_be_allowed() -> None:
    with pytest.raises(ConfigError, match=rf"train\.optimizer\.factory: .*allow it with --plugin {HERE}"):
        build_optimizer(ConvNet(), OptimizerSettings(factory=f"{HERE}:momentum_sgd"))
    with pytest.raises(ConfigError, match=rf"train\.schedule\.factory: .*allow it with --plugin {HERE}"):
        build_schedule(sgd(), ScheduleSettings(factory=f"{HERE}:one_cycle"), epochs=2, steps_per_epoch=5)


@pytest.mark.parametrize(
    "settings", [{"name": "sgd"}, {"momentum": 0.9}, {"betas": (0.9, 0.98)}, {"factory": "no path"}]
)
def test_settings_that_a_factory_does_not_have(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimizerSettings(**{"factory": "a:b"} | settings)


@pytest.mark.parametrize("settings", [{"kind": "linear"}, {"warmup_epochs": 1.0}, {"per": "epoch"}])
def test_settings_that_a_schedule_factory_does_not_have(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="has no effect with a factory"):
        ScheduleSettings(factory="a:b", **settings)


def test_kwargs_of_a_schedule_need_a_factory() -> None:
    with pytest.raises(ValidationError, match="kwargs are arguments of a factory"):
        ScheduleSettings(kwargs={"peak": 1.0})


OWN = {"factory": f"{HERE}:momentum_sgd", "lr": 0.05}
CYCLE = {"factory": f"{HERE}:one_cycle", "kwargs": {"peak": 0.05}}


def run(folder: Path, name: str, **changes: Any) -> Path:
    return train(tiny_run.settings(folder, name, **changes), plugins=PLUGINS).folder


@pytest.mark.slow
def test_run_with_own_optimizer_is_that_of_the_named_one(digits: Path) -> None:
    own = run(digits, "own", train__optimizer=OWN)
    named = run(digits, "named", train__optimizer={"name": "sgd", "momentum": 0.9, "lr": 0.05})
    assert tiny_run.distance(tiny_run.weights(own), tiny_run.weights(named)) == 0


@pytest.mark.slow
def test_run_with_own_schedule_resumes_exactly(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"train__optimizer": OWN, "train__schedule": CYCLE}
    whole = run(digits, "whole", **changes)
    rates = [row["train/lr"] for row in tiny_run.logged(whole) if "train/lr" in row]
    assert max(rates) > 5 * rates[0]
    start = DistillModule.on_train_batch_start

    def fail(module: DistillModule, data: Any, number: int) -> None:
        if module.current_epoch == 1:
            raise RuntimeError("the power is gone")
        start(module, data, number)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(DistillModule, "on_train_batch_start", fail)
        run(digits, "stopped", **changes)
    with pytest.raises(StateError, match=r"train\.epochs \(the scheduler of train\.schedule\.factory keeps its length"):
        run(digits, "stopped", **changes, train__epochs=3)
    resumed = run(digits, "stopped", **changes)
    assert tiny_run.distance(tiny_run.weights(resumed), tiny_run.weights(whole)) == 0
