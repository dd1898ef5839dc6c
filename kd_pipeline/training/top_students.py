"""The students after the best validations, whose weights are averaged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline.errors import StateError
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.training.checkpoint import save_checkpoint

__all__ = ["TopStudents"]


class TopStudents:
    """Keeps the weights of so many students in a folder, and knows which they are; on all ranks alike."""

    def __init__(self, folder: Path, number: int) -> None:
        """Keep `number` of them in `folder`, which is created when the first one is written."""
        self._folder, self._number = folder, number
        self._entries: list[tuple[float, int]] = []
        """Rank, of which a higher one is better, and optimizer step; the best first."""

    def takes(self, rank: float) -> bool:
        """Whether a student of this rank is one of the best; of equal ones the earlier is. NaN never is."""
        is_better = [rank > other for other, _ in self._entries]
        return rank == rank and (len(self._entries) < self._number or any(is_better))

    def note(self, rank: float, step: int) -> None:
        """Count a student that `takes` has accepted, instead of the last one."""
        kept = [entry for entry in self._entries if entry[1] != step]  # a resumed run validates a step again
        self._entries = sorted([*kept, (rank, step)], key=lambda entry: (-entry[0], entry[1]))[: self._number]

    def forget(self) -> None:
        """Start over, as for another metric."""
        self._entries = []

    def write(self, step: int, student: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the weights after `step`, delete those that are no longer of the best, and return the mean of all.

        Call it on one rank. Numbers that are not floating are those of `student`.

        Raises:
            StateError: a file cannot be written, or one that was kept is of another network.
        """
        save_checkpoint(student, self._file(step))
        steps = {step for _, step in self._entries}
        for path in self._folder.glob("step_*.pt"):
            if path not in {self._file(each) for each in steps}:
                path.unlink()
        others = [self._file(each) for each in sorted(steps - {step})]
        states = [dict(student), *(read_checkpoint(path) for path in others if path.is_file())]
        if any(state.keys() != student.keys() for state in states):
            raise StateError(f"{self._folder} holds students of another run; start again with --fresh")
        return {name: _mean([state[name] for state in states]) for name in student}

    def state_dict(self) -> list[list[float | int]]:
        """For a checkpoint, in plain values."""
        return [[*entry] for entry in self._entries]

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""
        self._entries = [(float(rank), int(step)) for rank, step in state]

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step}.pt"


def _mean(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first
    return torch.stack([tensor.double().cpu() for tensor in tensors]).mean(0).to(first.dtype)
