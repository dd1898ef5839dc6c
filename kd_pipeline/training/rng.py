"""Save and restore the random state of torch, NumPy and Python on all ranks, as plain data."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Self

import numpy as np
import torch
from torch import distributed

__all__ = ["RngState", "capture_rng", "restore_rng"]

_logger = getLogger(__name__)


def capture_rng() -> list[dict[str, Any]]:
    """The state of all generators, one entry per rank; call it on all ranks, each of which gets the same list.

    Of a rank's GPUs only the current one is read: a context on each of the others would cost memory there. A run
    on the CPU uses none, and makes no context either.
    """
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()  # checkpoints hold no arrays
    uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    local = {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if uses_cuda else None,
    }
    if not _is_distributed():
        return [local]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, local)
    return states


def restore_rng(states: Sequence[Mapping[str, Any]]) -> None:
    """Restore the generators of this rank from what `capture_rng` returned.

    With a different number of ranks they are left alone: the run then resumes with the same samples, but not
    bit for bit.
    """
    rank, num_ranks = (distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1)
    if len(states) != num_ranks:
        _logger.warning(
            "checkpoint saved on %d ranks, resumed on %d: random state not restored", len(states), num_ranks
        )
        return
    local = states[rank]
    random.setstate(local["python"])
    np.random.set_state(local["numpy"])
    torch.set_rng_state(local["torch"])
    if local["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(local["cuda"])


@dataclass(frozen=True, slots=True)
class RngState:
    """The state of all generators of this process, to go back to it later in the same process."""

    _python: Any
    _numpy: Any
    _torch: torch.Tensor
    _cuda: tuple[int, torch.Tensor] | None
    """Which GPU, and its state."""

    @classmethod
    def capture(cls) -> Self:
        """The current state; of several GPUs that of the current one."""
        uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = (torch.cuda.current_device(), torch.cuda.get_rng_state()) if uses_cuda else None
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Go back to this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            device, state = self._cuda
            torch.cuda.set_rng_state(state, device)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
