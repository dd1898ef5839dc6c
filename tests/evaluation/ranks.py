"""The process group of a test's ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed


@contextmanager
def process_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """A gloo group by a file in `folder`, with one thread for each rank."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield
    torch.distributed.destroy_process_group()
