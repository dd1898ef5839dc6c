"""Start an optimizer with the state of an earlier run, such as Adam's moments, and not with its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.checkpoint import load_checkpoint

__all__ = ["load_optimizer_state"]

_KEY = "train.optimizer.state_from"


def load_optimizer_state(optimizer: Optimizer, path: Path) -> None:
    """Give `optimizer` the state of the one in a checkpoint; learning rates and other settings stay its own.

    The parameters of a group of the same name have the same order, those of the student before the projectors of the
    loss. Parameters that the file does not have, such as projectors, start without state.

    Args:
        optimizer: new, of a run.
        path: a checkpoint of a run, such as `last.ckpt`.

    Raises:
        ConfigError: it cannot be read, or is of another optimizer or student.
    """
    try:
        saved = load_checkpoint(path)
    except StateError as exc:
        raise ConfigError(f"{_KEY}: {exc}") from exc
    try:
        (found,) = saved["optimizer_states"]
        state = _by_own_numbers(found, optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"{_KEY}: {path} does not hold the optimizer of a run with this student ({exc}); use the last.ckpt of a "
            "run with the same student and optimizer, or remove it"
        ) from exc


def _by_own_numbers(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The saved state of each parameter of `optimizer`, by its number there."""
    groups = {group["name"]: group for group in saved["param_groups"]}
    own = optimizer.state_dict()["param_groups"]
    found: dict[int, dict[str, Any]] = {}
    for numbered, group in zip(own, optimizer.param_groups, strict=True):
        if (other := groups.get(group["name"])) is None:
            raise ValueError(f"it has no group {group['name']!r}")
        if other.keys() - {"initial_lr"} != numbered.keys() - {"initial_lr"}:
            raise ValueError("it is another kind of optimizer")
        pairs = zip(numbered["params"], group["params"], other["params"], strict=False)
        for number, parameter, saved_number in pairs:
            if saved_number not in saved["state"]:
                continue
            values = dict(saved["state"][saved_number])
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    shapes = f"{list(value.shape)} and {list(parameter.shape)}"
                    raise ValueError(f"{name} of parameter {number} has another shape, {shapes}")
            found[number] = values
    if not found:
        raise ValueError("it has no state, as SGD without momentum has none")
    return found
