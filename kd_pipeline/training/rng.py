"""The random generators of torch, numpy and Python on all ranks, as plain data and back."""

import random
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import distributed

__all__ = ["capture_rng", "restore_rng"]

_logger = getLogger(__name__)


def capture_rng() -> list[dict[str, Any]]:
    """Where all generators stand, one entry per rank; to be called on all ranks, each of which gets the same list.

    Of a rank's GPUs only the current one is asked: a context on each of the others would cost memory there.
    """
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()  # a checkpoint holds no arrays
    here = {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    if not _is_distributed():
        return [here]
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, here)
    return everywhere


def restore_rng(states: Sequence[Mapping[str, Any]]) -> None:
    """Put the generators of this rank where `capture_rng` found them.

    On another number of ranks they are left alone: there a run goes on with the same samples, not with the same bits.
    """
    rank, num_ranks = (distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1)
    if len(states) != num_ranks:
        _logger.warning("saved on %d ranks, resumed on %d: random numbers start anew", len(states), num_ranks)
        return
    here = states[rank]
    random.setstate(here["python"])
    np.random.set_state(here["numpy"])
    torch.set_rng_state(here["torch"])
    if here["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(here["cuda"])


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
