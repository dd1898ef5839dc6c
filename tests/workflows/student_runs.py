"""Runs of several students, and what makes two runs equal."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kd_pipeline.config.config import Config
from kd_pipeline.training.checkpoint import load_checkpoint
from tests.training import tiny_run

FACTORY = "tests.training.networks:"
PLAIN = {"factory": f"{FACTORY}plain"}
STUDENTS: dict[str, Any] = {
    "small": {
        "factory": f"{FACTORY}with_dropout",
        "train": {"ema": {"decay": 0.5}, "optimizer": {"momentum": 0.9, "name": "sgd"}, "save_every_steps": 2},
    },
    "wide": {
        "factory": f"{FACTORY}with_batchnorm",
        "kwargs": {"width": 16},
        "train": {"optimizer": {"name": "adamw", "lr": 0.01}, "accumulate": 2, "clip": 0.5, "validate_every_steps": 2},
        "distill": {"loss": "dkd", "features": [{"loss": "cosine", "student": "2", "projector": "linear"}]},
    },
    "plain": {
        **PLAIN,
        "train": {"schedule": {"kind": "cosine"}, "compare_with_teacher": True, "loggers": ["csv", "tensorboard"]},
    },
}


def students_settings(folder: Path, name: str, students: Mapping[str, Any], **changes: Any) -> Config:
    return tiny_run.settings(folder, name, student=None, students={**students}, **changes)


def alone(config: Config, name: str, folder: Path) -> Config:
    """The run of one of the students, elsewhere."""
    return config.for_student(name).model_copy(update={"run_dir": folder})


def assert_same(one: Any, other: Any, name: str) -> None:
    """The same values, tensors bit for bit."""
    match one, other:
        case dict(), dict():
            assert one.keys() == other.keys(), name
            for key in one:
                if key not in ("python", "numpy"):  # random states, of which only torch's begins with the seed
                    assert_same(one[key], other[key], f"{name}.{key}")
        case ((list() | tuple()), (list() | tuple())):
            assert len(one) == len(other), name
            for number, pair in enumerate(zip(one, other, strict=True)):
                assert_same(*pair, f"{name}.{number}")
        case torch.Tensor(), torch.Tensor():
            assert torch.equal(one, other), name
        case _:
            assert one == other, name


_MEASURED = "images_per_s|_share$|cpu_cores|_gib$|_mib_per_s$|_energy_kj$|device_use"
"""Ends of the names of metrics that differ from run to run."""


def assert_same_end(one: Path, other: Path, *, is_resumed: bool = False) -> None:
    """Weights, EMA, optimizer, random state, metrics and results, bit for bit.

    The accuracy of an epoch that was interrupted is that of its rest.
    """
    first, second = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, other))
    for name in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "callbacks", "epoch_loss", "global_step"):
        assert_same(first.get(name), second.get(name), name)
    best = [torch.load(folder / "checkpoints" / "best_student.pt", weights_only=True) for folder in (one, other)]
    assert_same(*best, "best_student")
    assert tiny_run.result(one) == tiny_run.result(other)
    left_out = re.compile(f"{_MEASURED}|train/top1" if is_resumed else _MEASURED)
    rows = [
        [{name: value for name, value in row.items() if not left_out.search(name)} for row in tiny_run.logged(folder)]
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]
