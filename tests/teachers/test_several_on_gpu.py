"""Teachers around others, and recorded outputs, on what stands in for a GPU: no copy, no value read, one device."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import PermutedTeacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.once_per_batch import OncePerBatch
from kd_pipeline.teachers.recorded.encoding import decode, encode
from kd_pipeline.teachers.recorded.manifest import RecordedOutput
from kd_pipeline.teachers.sized import SizedTeacher
from tests.on_gpu import DEVICE, OnGpu

ROWS, COPIES, SIZE = 4, 2, 8


class OfMeans(Teacher):
    """Logits and a map of images on the GPU."""

    def __init__(self, name: str, *, view: str = "images", size: int | None = SIZE, grid: bool = False) -> None:
        sizes = (8, 8) if grid else ()
        super().__init__(
            backend=name,
            precision="fp32",
            device=DEVICE,
            images=TensorSpec((None, 3, size, size), torch.float32),
            outputs={
                "logits": TensorSpec((None, 3, *sizes), torch.float32),
                "features": TensorSpec((None, 3, SIZE, SIZE), torch.float32),
            },
            max_batch=64,
            classes=("a", "b", "c"),
            fingerprint=name,
        )
        self.view, self._grid = view, grid

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        found = {"logits": images * 1 if self._grid else images.mean((2, 3)), "features": images * 2}
        return {name: found[name] for name in self.outputs}

    def _release(self) -> None:
        pass


TEACHERS: dict[str, Callable[[], Teacher]] = {
    "ensemble": lambda: EnsembleTeacher([OfMeans("one"), OfMeans("two")], weights=[1, 3]),
    "ensemble of logits": lambda: EnsembleTeacher([OfMeans("one"), OfMeans("two")], average="logits"),
    "ensemble of pixels": lambda: EnsembleTeacher([OfMeans("one", grid=True), OfMeans("two", grid=True)]),
    "group": lambda: TeacherGroup({"one": OfMeans("one"), "two": OfMeans("two")}),
    "permuted": lambda: PermutedTeacher(OfMeans("one"), ("c", "a")),
    "permuted pixels": lambda: PermutedTeacher(OfMeans("one", grid=True), ("c", "a")),
    "sized": lambda: SizedTeacher({(SIZE, SIZE): OfMeans("one"), (4, 4): OfMeans("two", size=4)}),
    "once": lambda: OncePerBatch(OfMeans("one")),
    "all": lambda: OncePerBatch(
        TeacherGroup(
            {"a": EnsembleTeacher([OfMeans("one"), OfMeans("two")]), "b": PermutedTeacher(OfMeans("x"), "cab")}
        )
    ),
    "views": lambda: TeacherGroup({"one": OfMeans("one"), "two": OfMeans("two", view="local", size=4)}),
    "ensemble of views": lambda: EnsembleTeacher([OfMeans("one"), OfMeans("two", view="clean")]),
}


@pytest.fixture
def gpu() -> Iterator[OnGpu]:
    with OnGpu() as gpu:
        yield gpu


def batch_on(gpu: OnGpu) -> KDBatch:
    return KDBatch(
        images=gpu.tensor(torch.rand(ROWS, 3, SIZE, SIZE)),
        labels=gpu.tensor(torch.zeros(ROWS, dtype=torch.long)),
        index=gpu.tensor(torch.arange(ROWS)),
        valid=gpu.tensor(torch.ones(ROWS, dtype=torch.bool)),
        views={
            "clean": gpu.tensor(torch.rand(ROWS, 3, SIZE, SIZE)),
            "local": gpu.tensor(torch.rand(ROWS, COPIES, 3, 4, 4)),
        },
    )


@pytest.mark.parametrize("name", TEACHERS)
def test_a_call_stays_on_the_device(gpu: OnGpu, name: str) -> None:
    teacher, batch = TEACHERS[name](), batch_on(gpu)
    gpu.copies.clear()  # of a class order, once
    found = teacher.with_outputs(batch)
    assert found.teacher.keys() == teacher.outputs.keys()
    for output, tensor in found.teacher.items():
        assert tensor.device == DEVICE and tensor.dtype == torch.float32, output
        assert tensor.shape[:2] == (ROWS, COPIES) or len(tensor) == ROWS
    for view in ("images", "clean", "local"):
        assert all(each.device == DEVICE for each in found.of_view(view).tensors())
    assert not gpu.copies


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((ROWS, 5), {"shape": [5]}),
        ((ROWS, 5), {"shape": [5], "dtype": "float16"}),
        ((ROWS, 5), {"shape": [5], "top_k": 2}),
        ((ROWS, 5, 8, 8), {"shape": [5, 8, 8], "dtype": "int8"}),
        ((ROWS, 7, 5), {"shape": [7, 5], "dtype": "int8"}),
    ],
    ids=str,
)
def test_recorded_outputs_are_decoded_on_the_device(gpu: OnGpu, shape: tuple[int, ...], stored: dict) -> None:
    outputs = {"logits": RecordedOutput.model_validate(stored)}
    columns = {
        f"logits.{part}": gpu.tensor(torch.zeros(ROWS, *sizes, dtype=dtype))
        for part, sizes, dtype in columns_of(shape[1:], stored)
    }
    (found,) = decode(columns, outputs).values()
    assert found.device == DEVICE and found.shape == shape and found.dtype == torch.float32
    assert not gpu.copies


def columns_of(sizes: tuple[int, ...], stored: dict) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Part, sizes of a row and dtype of each column."""
    if (top_k := stored.get("top_k")) is not None:
        kept = [("values", (top_k,), torch.float32), ("classes", (top_k,), torch.int32)]
        return [*kept, ("rest", (), torch.float32)]
    if stored.get("dtype") == "int8":
        positions = sizes[1:] if len(sizes) == 3 else sizes[:-1]
        return [("values", sizes, torch.int8), ("scale", positions, torch.float32)]
    return [("values", sizes, torch.float16 if stored.get("dtype") else torch.float32)]


def test_columns_are_those_of_the_encoding() -> None:
    """The shapes and dtypes above are real ones."""

    stored = RecordedOutput.model_validate({"shape": [5, 8, 8], "dtype": "int8"})
    manifest: Any = SimpleNamespace(outputs={"logits": stored})
    found = encode({"logits": torch.rand(ROWS, 5, 8, 8)}, manifest)
    wanted = columns_of((5, 8, 8), {"dtype": "int8"})
    assert {name: (tuple(each.shape[1:]), each.dtype) for name, each in found.items()} == {
        f"logits.{part}": (sizes, dtype) for part, sizes, dtype in wanted
    }
