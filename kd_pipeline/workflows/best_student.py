"""The best student of a stage: whether a network is it, and its weights from the checkpoints."""

from pathlib import Path

import torch
from torch import nn

from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows.resume import unusable_checkpoint

__all__ = ["has_weights", "load_student"]


def has_weights(model: nn.Module, path: Path) -> bool:
    """Whether a network has the weights in a file bit by bit; also if there is none, as then the last ones count."""
    if not path.is_file():
        return True
    weights, best = model.state_dict(), read_checkpoint(path)
    return weights.keys() == best.keys() and all(torch.equal(weights[name].cpu(), best[name]) for name in weights)


def load_student(
    student: nn.Module, distillation: Distillation, module: DistillModule, checkpoints: Path, *, best: Path | None
) -> None:
    """Load weights and the projectors that belong to them, in place.

    Args:
        student: gets the weights.
        distillation: gets the projectors.
        module: what was trained.
        checkpoints: the folder.
        best: the file with the weights of the best student; None takes those of the last checkpoint.

    Raises:
        StateError: the checkpoint is damaged, or of another student.
    """
    path = checkpoints / ("last.ckpt" if best is None else "best.ckpt")
    try:
        saved = load_checkpoint(path)
        state = saved["state_dict"]
        if best is not None:
            weights = read_checkpoint(best)
        else:
            weights = saved["ema"]["student"] if module.ema else module.network_state(state)
        student.load_state_dict(weights)
        distillation.load_state_dict({name: state[f"distillation.{name}"] for name in distillation.state_dict()})
    except (AttributeError, LookupError, RuntimeError, TypeError) as exc:
        raise unusable_checkpoint(path, exc) from exc
