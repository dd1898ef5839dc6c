"""Several ranks on gloo that share a folder, and what each of them does."""

import io
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import DataError, NonFiniteError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.training.module import DistillModule
from tests.forks import fork_ranks, torchrun_variables
from tests.training import networks, tiny_run

SIZES = (1, 19, 101)
BATCH_SIZE = 4
LAST_BATCH = ("keep", "pad", "drop")


def run_ranks(num_ranks: int, folder: Path, do: Callable[[Path, int], Any]) -> list[Any]:
    """What `do(folder, rank)` returns in each of `num_ranks` processes, set up as by torchrun."""
    found = folder / f"{do.__name__}_{num_ranks}"
    found.mkdir()
    fork_ranks(_rank, (num_ranks, str(folder), str(found), do), num_ranks)
    return [torch.load(found / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, folder: str, found: str, do: Callable[[Path, int], Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= torchrun_variables(rank, num_ranks, port=0)  # not used: the process group is initialized below
    store = distributed.FileStore(f"{found}/store", num_ranks)
    # If ranks disagree on the number of batches they fail instead of hanging.
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    with redirect_stdout(io.StringIO()):  # the progress bar
        torch.save(do(Path(folder), rank), f"{found}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def read_all(folder: Path, rank: int) -> dict[str, Any]:
    """The valid indices of each batch, by dataset size and `last_batch`, with one collective per batch."""
    images = np.random.default_rng(0).integers(0, 256, (max(SIZES), 8, 8, 3), dtype=np.uint8)
    found: dict[str, Any] = {}
    for size in SIZES:
        for last_batch in LAST_BATCH:
            source = Arrays(images[:size], np.arange(size) % 7)
            options: Any = {"batch_size": BATCH_SIZE, "last_batch": last_batch, "seed": 11, "num_threads": 1}
            batches: list[list[int]] | str = []
            try:
                with KDDataLoader(source, TrainTransform(size=8), device="cpu", **options) as loader:
                    for batch in loader:
                        one = torch.ones(())
                        distributed.all_reduce(one)
                        assert one == distributed.get_world_size()
                        batches.append(batch.index[batch.valid].tolist())
            except DataError as error:
                batches = str(error)
            found[f"{size} {last_batch}"] = batches
    return found


def final_state(folder: Path, name: str, split: str, **changes: Any) -> dict[str, Any]:
    """Of this rank's module, at the end of a run on all images of `split`."""
    states: list[dict[str, Any]] = []
    changes["data__train"] = tiny_run.split(folder, split, tiny_run.TRAIN) | {"last_batch": "keep"}
    DistillModule.on_train_end = lambda self: states.append({k: v.clone() for k, v in self.state_dict().items()})
    tiny_run.run(folder, name, **changes)
    del DistillModule.on_train_end
    return states[0]


def train_small(folder: Path, rank: int) -> dict[str, Any]:
    """The state after one epoch of 19 images with BatchNorm."""
    student = {"factory": "tests.training.networks:with_batchnorm"}
    return final_state(folder, "small", "odd19", data__batch_size=4, student=student, train__epochs=1)


def train_halves(folder: Path, rank: int) -> dict[str, Any]:
    """The state after two epochs of 67 images by 32; of the last 3, one rank gets 2 and the other 1."""
    return final_state(folder, "halves", "odd67", data__batch_size=32)


def train_accumulated(folder: Path, rank: int) -> dict[str, Any]:
    """As `train_halves`, each batch of 32 in two."""
    return final_state(folder, "quarters", "odd67", data__batch_size=16, train__accumulate=2)


RELATIONS = {"features": [{"loss": "relational", "queue_size": 100, "standardize": "channels"}]}
"""A loss that compares with images of all ranks and of earlier batches."""


def train_relations(folder: Path, rank: int) -> dict[str, Any]:
    """As `train_halves`, with a queue and statistics."""
    return final_state(folder, "relations", "odd67", data__batch_size=32, distill=RELATIONS)


FEATURES_ONLY: dict[str, Any] = {
    "distill": {
        "loss": None,
        "features": [{"loss": "cosine", "student": "2", "teacher": "logits", "projector": "linear"}],
    },
    "train__optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.1},
}
"""A loss that does not reach the head of the student, which does not decay then."""


def train_features(folder: Path, rank: int) -> dict[str, Any]:
    """As `train_halves`, without the head; and the same sharded."""
    final_state(folder, "sharded", "odd67", data__batch_size=32, **FEATURES_ONLY, train__strategy="fsdp")
    return final_state(folder, "features", "odd67", data__batch_size=32, **FEATURES_ONLY)


def spoil_rank_one(folder: Path, rank: int) -> dict[str, Any]:
    """The errors of runs whose student returns NaN on rank one only, in the third pass."""
    student = {"factory": "tests.training.networks:spoiled"}
    networks.SPOILED.update({2} if rank == 1 else set())
    found: dict[str, Any] = {}
    for name, changes in {
        "ddp": {},
        "accumulated": {"train__accumulate": 2},
        "fsdp": {"train__strategy": "fsdp"},
        "skipped": {"train__max_nonfinite_steps": 1},
    }.items():
        try:
            tiny_run.run(folder, f"spoiled {name}", student=student, data__batch_size=8, **changes)
        except NonFiniteError as error:
            found[name] = str(error)
    distributed.barrier()
    skipped = tiny_run.logged(folder / "spoiled skipped")[-1]["train/skipped_steps"]
    return found | {"skipped": [found.get("skipped", ""), int(skipped)]}


def do_all(folder: Path, rank: int) -> dict[str, Any]:
    """All of it with one start of the processes."""
    found = {"read": read_all(folder, rank)}
    train_one = {2: train_halves, 4: train_small}[distributed.get_world_size()]
    if distributed.get_world_size() == 2:
        found["accumulated"] = train_accumulated(folder, rank)
        found["relations"] = train_relations(folder, rank)
        found["features"] = train_features(folder, rank)
    return found | {"state": train_one(folder, rank)}
