"""An optimizer starts with the state of an earlier run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from kd_pipeline.errors import ConfigError
from kd_pipeline.training import module
from kd_pipeline.training.checkpoint import save_checkpoint
from kd_pipeline.training.optimizer_state import load_optimizer_state
from kd_pipeline.training.optimizers import OptimizerSettings, build_optimizer
from kd_pipeline.training.settings import TrainSettings
from tests.training import tiny_run


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def step(student: nn.Module, optimizer: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    student(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


def saved(optimizer: Optimizer, path: Path) -> Path:
    save_checkpoint({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]}, path)
    return path


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_goes_on_as_the_earlier_one(tmp_path: Path, name: str) -> None:
    """With the projector of the earlier run in the file, and another one in the new run."""
    settings = OptimizerSettings(name=name, lr=0.01)
    student = network()
    earlier = build_optimizer(student, settings, extra=nn.Linear(2, 2).parameters())
    step(student, earlier, 1)
    again = network()
    again.load_state_dict(student.state_dict())
    projector = nn.Linear(7, 7)
    optimizer = build_optimizer(again, settings.model_copy(update={"lr": 0.5}), extra=projector.parameters())
    load_optimizer_state(optimizer, saved(earlier, tmp_path / "last.ckpt"))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert not any(parameter in optimizer.state for parameter in projector.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for seed in (2, 3):
        step(student, earlier, seed)
        step(again, optimizer, seed)
    for first, second in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        (network(), {"name": "sgd", "momentum": 0.9}, "it is another kind of optimizer"),
        (nn.Linear(3, 5), {}, r"has another shape, \[5, 3\] and \[4, 3\]"),
        (network(), {"lr_scale": {"0": 0.1}}, "it has no group 'student/no_decay'|it is another|has another shape"),
    ],
)
def test_state_of_another_optimizer_is_refused(
    tmp_path: Path, other: nn.Module, settings: dict[str, Any], message: str
) -> None:
    earlier = build_optimizer(other, OptimizerSettings(**settings))
    inputs = torch.randn(2, 3)
    other(inputs).sum().backward()
    earlier.step()
    optimizer = build_optimizer(network(), OptimizerSettings())
    with pytest.raises(ConfigError, match=rf"train\.optimizer\.state_from: .*({message})"):
        load_optimizer_state(optimizer, saved(earlier, tmp_path / "last.ckpt"))


def test_file_that_is_none_or_has_no_state_is_refused(tmp_path: Path) -> None:
    plain = build_optimizer(network(), OptimizerSettings(name="sgd"))
    with pytest.raises(ConfigError, match="it has no state, as SGD without momentum has none"):
        load_optimizer_state(plain, saved(plain, tmp_path / "last.ckpt"))
    save_checkpoint({"state_dict": {}, "optimizer_states": [{"param_groups": [3]}]}, tmp_path / "strange.ckpt")
    for name in ("strange.ckpt", "missing.ckpt"):
        with pytest.raises(ConfigError, match=rf"train\.optimizer\.state_from: .*{name}"):
            load_optimizer_state(plain, tmp_path / name)


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="state_from has no effect with a factory"):
        OptimizerSettings(factory="a:b", state_from=tmp_path)
    with pytest.raises(ValidationError, match=r"optimizer\.state_from needs strategy: ddp"):
        TrainSettings(strategy="fsdp", optimizer=OptimizerSettings(state_from=tmp_path))


@pytest.mark.slow
def test_run_takes_the_state_once(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it starts, and not when it resumes, whose own state is later."""
    taken: list[Path] = []

    def load(optimizer: Optimizer, path: Path) -> None:
        taken.append(path)
        load_optimizer_state(optimizer, path)

    monkeypatch.setattr(module, "load_optimizer_state", load)
    momentum = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
    first = tiny_run.run(digits, "first", train__optimizer=momentum, train__epochs=1).folder
    changes = {"train__optimizer": momentum | {"state_from": first / "checkpoints" / "last.ckpt"}}
    tiny_run.run(digits, "second", **changes, train__epochs=1)
    tiny_run.run(digits, "second", **changes, train__epochs=2)
    assert taken == [first / "checkpoints" / "last.ckpt"]
