"""A `BatchLoader` in Lightning and accelerate trains as a plain loop over the user's own loader does."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline import BatchLoader, KDBatch, TeacherSettings, export_onnx

SIZE, CLASSES = 6, 3


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(SIZE, CLASSES)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, SIZE, generator=generator)
    return DataLoader(
        TensorDataset(vectors, torch.randint(0, CLASSES, (20,), generator=generator)), batch_size=8, shuffle=True
    )


def loss_of(student: nn.Module, vectors: Tensor, labels: Tensor, theirs: Tensor) -> Tensor:
    logits = student(vectors)
    return cross_entropy(logits, labels) + mse_loss(logits, theirs)


def plain_weights() -> Tensor:
    student, teacher, loader = network(1), network(2), batches()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    torch.manual_seed(7)
    for _ in range(2):
        for vectors, labels in loader:
            optimizer.zero_grad()
            loss_of(student, vectors, labels, teacher(vectors).detach()).backward()
            optimizer.step()
    return student.weight.detach()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    student, loader = network(1), BatchLoader(batches(), network(2))
    student, optimizer, loader = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1), loader)
    torch.manual_seed(7)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_of(student, batch.input, batch.labels, batch.teacher["logits"]))
            optimizer.step()
    assert torch.equal(student.weight, plain_weights())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = network(1)
            self.epochs: list[int] = []

        def training_step(self, batch: KDBatch, number: int) -> Tensor:
            self.epochs.append(loader.epoch)
            return loss_of(self.student, batch.input, batch.labels, batch.teacher["logits"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.student.parameters(), lr=0.1)

    loader, module = BatchLoader(batches(), network(2), device="cpu"), Module()
    torch.manual_seed(7)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader)
    assert module.epochs == [0, 0, 0, 1, 1, 1]
    assert torch.equal(module.student.weight, plain_weights())


def test_the_teacher_of_settings_is_opened_for_the_batches(tmp_path: Path) -> None:
    file = export_onnx(network(2), tmp_path / "teacher.onnx", image_shape=(SIZE,), classes=[*"abc"])
    with BatchLoader(batches(), TeacherSettings(onnx=file), classes=[*"cab"]) as loader:
        assert loader.teacher is not None and loader.teacher.classes == (*"cab",)
        for batch in loader:
            wanted = network(2)(batch.input)[:, [2, 0, 1]]
            torch.testing.assert_close(batch.teacher["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_each_process_reading_all_samples_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    plain, loader = BatchLoader(batches()), BatchLoader(batches())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        list(plain)
    finally:
        torch.distributed.destroy_process_group()
    assert "DistributedSampler" not in caplog.text  # of one process
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        first = next(iter(loader))
        assert loader.shard.world_size == 2 and first.index.tolist() == [*range(1, 17, 2)]
    finally:
        torch.distributed.destroy_process_group()
    assert "each of 2 processes reads all samples" in caplog.text
