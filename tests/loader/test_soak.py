"""No leaks over thousands of batches."""

import gc
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd_pipeline.data.sources import FileList
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import ConvNet

SIZE = 16
NUM_BATCHES = 5000
NUM_WARMUP = 1000
"""Batches after which caches and pools have their final size."""


def resources() -> tuple[float, int, int]:
    """Resident memory in MB, threads, and open files of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return memory, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_memory_threads_and_files_stay_flat(photos, tmp_path):
    for number in range(16):
        Image.fromarray(photos[number % 2][number * 20 :, number * 20 :][:24, :24]).save(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text("".join(f"{number}.png,{number % 4}\n" for number in range(16)))
    teacher = PyTorchTeacher(ConvNet(), image_shape=(3, SIZE, SIZE))
    transform, source = TrainTransform(size=SIZE), FileList(tmp_path / "list.csv")
    seen = 0
    with KDDataLoader(source, transform, teacher, batch_size=4, num_threads=1, ahead=1) as loader:
        for _ in range(NUM_BATCHES // len(loader)):
            for batch in loader:
                assert torch.isfinite(batch.teacher["logits"]).all()
                seen += 1
                if seen == NUM_WARMUP:
                    early = resources()
        late = resources()
    assert seen == NUM_BATCHES
    assert late[0] - early[0] < 20
    assert late[1:] == early[1:]
