"""What processes that meet after their loaders were made read, each in a file of its own."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.loader.batch_loader import BatchLoader
from kd_pipeline.loader.loader import KDDataLoader

NUM_SAMPLES = 37
"""An uneven rest for two ranks with batches of 8."""


def open_loader(**options: Any) -> KDDataLoader:
    images = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 8, 8, 3), dtype=np.uint8)
    settings = {"batch_size": 8, "shuffle": True, "num_threads": 1, "device": "cpu", **options}
    return KDDataLoader(Arrays(images, np.arange(NUM_SAMPLES) % 7), EvalTransform(size=8), **settings)


def open_batch_loader() -> BatchLoader:
    """Five batches with a teacher."""
    torch.set_num_threads(1)  # torch's own threads hang in a child
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 7))
    return BatchLoader([torch.rand(2, 3, 4, 4) for _ in range(5)], teacher, device="cpu")


def write(folder: str, rank: int, found: Any) -> None:
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def meet_after_the_loader(rank: int, folder: str) -> None:
    """`torch.multiprocessing.spawn` without any environment variables."""
    torch.set_num_threads(1)
    with open_loader() as loader:
        store = distributed.FileStore(f"{folder}/store", 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        found = [batch.index[batch.valid].tolist() for batch in loader]
        write(folder, rank, {"batches": found, "length": len(loader)})
    distributed.destroy_process_group()


def gather(rank: int, folder: str) -> None:
    """`gather_for_metrics` of a split that does not divide."""
    import accelerate

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    store = distributed.FileStore(f"{folder}/store", 2)
    os.environ["MASTER_PORT"] = "0"  # not used: the process group is initialized here
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    accelerator = accelerate.Accelerator(cpu=True)
    with open_loader() as opened:
        loader = accelerator.prepare(opened)
        rows = []
        for batch in loader:
            rows.append(accelerator.gather_for_metrics((batch.index, batch.valid)))
            whole = accelerator.gather_for_metrics(batch)  # the batch itself, as a batch
            assert len(whole) == 2 * len(batch) and torch.equal(whole["index"], rows[-1][0])
    index, valid = (torch.cat(column) for column in zip(*rows, strict=True))
    write(folder, rank, index[valid].tolist())
    distributed.destroy_process_group()


def fit_with_lightning(folder: str) -> None:
    """The ordinary script: everything is made before `fit`, which starts the second process."""
    import lightning

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(192, 7)
            self.seen: list[int] = []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.seen += batch.index[batch.valid].tolist()
            return torch.nn.functional.cross_entropy(self.head(batch.images.flatten(1)), batch.labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def on_train_end(self) -> None:
            write(folder, self.global_rank, {"seen": self.seen, "length": len(loader)})

    module, loader = Module(), open_loader()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        strategy="ddp", devices=2, accelerator="cpu", max_epochs=1, default_root_dir=folder, **options
    )
    trainer.fit(module, loader)


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any, backward: Any) -> None:
    optimizer.zero_grad()
    backward(torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"]))
    optimizer.step()


def weights(model: torch.nn.Module) -> list[Any]:
    return [parameter.tolist() for parameter in model.parameters()]


def train_with_accelerate(folder: str) -> None:
    """Two epochs, the first from its second batch on; started by `torchrun` or `accelerate launch`."""
    import accelerate

    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(cpu=True)
    module = student()
    model, optimizer, loader = accelerator.prepare(
        module, torch.optim.SGD(module.parameters(), lr=0.1), open_loader(last_batch="drop")
    )
    for epoch in range(2):
        for batch in accelerator.skip_first_batches(loader, 1) if epoch == 0 else loader:
            step(model, optimizer, batch, accelerator.backward)
    write(folder, accelerator.process_index, {"weights": weights(model), "world_size": accelerator.num_processes})
    loader.close()


def train_with_ddp(folder: str) -> None:
    """As `train_with_accelerate`, without it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    module = torch.nn.parallel.DistributedDataParallel(student())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with open_loader(last_batch="drop") as loader:
        for _ in range(2):
            for batch in loader:
                if (loader.epoch, loader.num_returned) != (0, 1):
                    step(module, optimizer, batch, torch.Tensor.backward)
    found = {"weights": weights(module), "world_size": distributed.get_world_size()}
    write(folder, distributed.get_rank(), found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    import sys

    {"lightning": fit_with_lightning, "accelerate": train_with_accelerate, "ddp": train_with_ddp}[sys.argv[1]](
        sys.argv[2]
    )
