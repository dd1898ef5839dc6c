"""The benchmarks on a GPU: every loader delivers there, and what only a GPU has is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loader import GPU_LOADERS, LOADERS, BenchLoaderSettings, DecodeTask, bench_loader
from benchmarks.students import BenchStudentsSettings, bench_students
from benchmarks.views import BenchViewsSettings, bench_views
from kd_pipeline.bench import teacher as bench_teacher_module
from kd_pipeline.bench.photographs import make_photographs
from kd_pipeline.bench.step import bench_step
from kd_pipeline.bench.teacher import BenchTeacherSettings, bench_teacher
from kd_pipeline.bench.torchvision_loaders import why_no_cuda_decoder
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.transforms import TrainTransform
from tests.bench.steps import SMALL, short_step

# From 0.29 on, torchvision advises TorchCodec instead.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("bench") / "photographs", num_files=40)


@pytest.mark.parametrize("name", [*LOADERS, *GPU_LOADERS])
def test_each_loader_delivers_full_batches(name: str, photographs: Path, device: torch.device) -> None:
    if name in GPU_LOADERS and (reason := why_no_cuda_decoder(device)):
        pytest.skip(reason)
    decoding = resolve_decode("auto", None, device_id=device.index)
    stream = (LOADERS | GPU_LOADERS)[name](DecodeTask(photographs, TrainTransform(size=32), 8, 2, device, *decoding))
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


def test_cuda_graphs_of_a_teacher_are_measured(
    photographs: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # which takes half a minute
    monkeypatch.setattr(bench_teacher_module, "why_no_onnx", lambda device: "builds take minutes")
    settings = BenchTeacherSettings(
        model=SMALL, root=photographs, batch_sizes=(8,), precisions=("bf16",), num_images=8, repeats=1
    )
    rows = bench_teacher(settings).rows
    graphs = ["pytorch graph bf16", "pytorch compiled graph bf16"]
    assert [row.name for row in rows] == ["pytorch fp32", "pytorch bf16", "pytorch compiled bf16", *graphs]
    assert all(row.cosine > 0.99 for row in rows)


def test_step_has_its_memory_copies_and_limit(
    photographs: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    rows = ("b", "c")
    result = bench_step(short_step(photographs, rows=rows, num_steps=2, repeats=2, num_threads=2, device="auto"))
    assert [row.letter for row in result.rows] == ["b", "c", "f", "loader", "teacher"]
    assert result.compared == "c" and result.overhead is not None
    for row in result.rows:
        first, last = row.samples
        assert first.device_bytes and first.copied_bytes_per_image is None
        assert last.copied_bytes_per_image is not None and min(row.images_per_s) > 0
        assert (first.decode is not None) == (row.letter in ("c", "loader"))


def test_views_are_measured(photographs: Path) -> None:
    sizes = {"size": 48, "large_size": 64, "local_size": 32, "num_locals": 1}
    result = bench_views(BenchViewsSettings(root=photographs, batch_size=8, num_batches=1, repeats=1, **sizes))
    assert result.settings["device"].startswith("cuda") and all(min(row.images_per_s) > 0 for row in result.rows)


@pytest.mark.slow
def test_several_students_are_measured(photographs: Path) -> None:
    few: dict[str, Any] = {"widths": (4, 8), "teacher_width": 4, "num_batches": 2, "epochs": 1, "repeats": 1}
    result = bench_students(BenchStudentsSettings(root=photographs, batch_size=8, size=32, **few))
    assert result.settings["device"].startswith("cuda") and len(result.wall_s["all students"]) == 1
