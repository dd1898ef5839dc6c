"""The loader benchmark on a GPU: every loader delivers there, and the hardware decoder's load can be swept."""

from pathlib import Path

import pytest
import torch

from benchmarks.loader import LOADERS, BenchLoaderSettings, DecodeTask, bench_loader
from kd_pipeline.bench.photographs import make_photographs
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.transforms import TrainTransform


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("bench") / "photographs", num_files=40)


@pytest.mark.parametrize("name", LOADERS)
def test_each_loader_delivers_full_batches(name: str, photographs: Path, device: torch.device) -> None:
    mode = resolve_decode("auto", device_id=device.index, hw_decoder_load=0.0)
    stream = LOADERS[name](DecodeTask(photographs, TrainTransform(size=32), 8, 2, device, mode))
    for _ in range(6):
        images = next(stream)
        assert images.shape == (8, 3, 32, 32) and images.device == device and images.isfinite().all()
    stream.close()


def test_hw_decoder_loads_can_be_swept(photographs: Path) -> None:
    settings = BenchLoaderSettings(
        root=photographs, batch_size=8, size=32, num_batches=2, repeats=2, hw_decoder_loads=(0, 1)
    )
    result = bench_loader(settings)
    assert len(result.rows) >= len(LOADERS) + 2  # none for a load at which the GPU decodes wrongly
    assert all(min(row.images_per_s) > 0 for row in result.rows)
    assert result.environment["gpus"]
