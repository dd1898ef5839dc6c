"""The batches of one epoch of a split, as all evaluations read them."""

from collections.abc import Iterator
from itertools import islice

import torch.distributed

from kd_pipeline._core.progress import Report
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.batch_loader import AnyLoader

__all__ = ["batches_of"]


def batches_of(loader: AnyLoader, max_batches: int | None, report: Report) -> Iterator[KDBatch]:
    """The first `max_batches` of an epoch of `loader`, or all; `report` gets how many are done, and how many there are.

    Raises:
        ConfigError: `max_batches` is below 1.
        StateError: `loader` reads one shard of several, and there is no process group to join what they give.
    """
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"max_batches is {max_batches}; it must be at least 1, or None for the whole split")
    _check_process_group(loader)
    total = _total(loader, max_batches)
    for number, batch in enumerate(islice(loader, max_batches)):
        report(number, max(total, number + 1))
        yield batch


def _total(loader: AnyLoader, max_batches: int | None) -> int:
    """How many batches there will be; 0 for a stream without an end, of which one more is always expected."""
    try:
        return min(len(loader), max_batches or len(loader))
    except TypeError:
        return max_batches or 0


def _check_process_group(loader: AnyLoader) -> None:
    if loader.shard.world_size > 1 and not torch.distributed.is_initialized():
        raise StateError(
            f"the loader reads one of {loader.shard.world_size} shards of the split, and without a process group the "
            "results of all cannot be added up; call torch.distributed.init_process_group first, or give the loader "
            "shard=Shard() to evaluate the whole split in this process"
        )
