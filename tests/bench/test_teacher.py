import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from kd_pipeline.bench import teacher as bench_teacher_module
from kd_pipeline.bench import teacher_backends
from kd_pipeline.bench.teacher import BenchTeacherSettings, TeacherResult, bench_teacher
from kd_pipeline.bench.teacher_backends import BackendComparison, ExportedModel, TeacherRow
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.registry import ModelSettings
from tests.networks import LogitsOnly, random_images

MODEL = ModelSettings(builtin="small_resnet", kwargs={"width": 4})
ON_A_CPU = ["pytorch fp32", "onnxruntime fp32", "openvino fp32", "pytorch bf16"]
"""Rows on any CPU, in the order of opening; OpenVINO also has bf16 if the CPU has it."""
RUN_FILES = ("onnxruntime", "openvino", "tensorrt")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute, and changes no result."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


@pytest.fixture(scope="module")
def measured(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherResult, list[str], Path]:
    """A short run of a model by name with its lines of progress and its JSON file."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("here") / "a/b.json"
    settings = BenchTeacherSettings(
        model=MODEL,
        root=photographs,
        batch_sizes=(4, 1),
        compile_at=(4,),
        num_images=5,
        repeats=2,
        num_threads=1,
        device="cpu",
        out=out,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **options: module)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return bench_teacher(settings, report=lines.append), lines, out


@pytest.mark.slow
def test_each_backend_is_measured_or_has_a_reason(
    measured: tuple[TeacherResult, Any, Any],
) -> None:
    result, _, _ = measured
    names = [row.name for row in result.rows]
    assert [name for name in names if name in ON_A_CPU] == ON_A_CPU
    assert {"pytorch compiled fp32", "pytorch compiled bf16"} <= set(names)
    tried = {f"{backend} {precision}" for precision, all_ in teacher_backends._BACKENDS.items() for backend in all_}
    tried |= {f"pytorch compiled {precision}" for precision in teacher_backends._COMPILED_PRECISIONS}
    assert set(names) | result.left_out.keys() == tried and not set(names) & result.left_out.keys()
    assert result.left_out["tensorrt fp16"] == "it needs an NVIDIA GPU, and the device is the CPU"
    assert result.left_out["onnxruntime bf16"] == "ONNX Runtime runs a file as it is, and this one has fp32 weights"
    assert "float16" in result.left_out["pytorch fp16"]
    assert {"openvino int8", "onnxruntime int8"} <= set(names)
    assert result.left_out["tensorrt int8"] == "it needs an NVIDIA GPU, and the device is the CPU"
    assert "openvino fp16" in names or "wanted fp16" in result.left_out["openvino fp16"]  # newer CPUs have it


@pytest.mark.slow
def test_each_row_has_every_repeat_by_batch_size(
    measured: tuple[TeacherResult, Any, Any],
) -> None:
    for row in measured[0].rows:
        assert list(row.images_per_s) == ([4] if "compiled" in row.name else [1, 4])
        assert all(len(rates) == 2 and min(rates) > 0 for rates in row.images_per_s.values())
        assert row.open_s > 0 and row.first_batch == 4


@pytest.mark.slow
def test_logits_are_compared_with_float32_pytorch(measured: tuple[TeacherResult, Any, Any]) -> None:
    assert measured[0].reference == "pytorch fp32"
    for row in measured[0].rows:
        assert row.top1_agreement >= 0.9
        assert row.cosine > {"fp32": 1 - 1e-6, "int8": 0.99}.get(row.name.split()[-1], 0.999)
    bf16 = next(row for row in measured[0].rows if row.name == "pytorch bf16")
    assert bf16.cosine < 1, "it is not compared with itself"


@pytest.mark.slow
def test_network_without_logits_is_compared_by_cosine(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = BenchTeacherSettings(
        model=ModelSettings(timm="test_resnet", num_classes=0),
        size=64,
        root=photographs,
        batch_sizes=(2,),
        compile_at=(),
        num_images=2,
        repeats=1,
        num_threads=1,
        device="cpu",
    )
    result = bench_teacher(settings)
    rows = {row.name: row for row in result.rows}
    assert {"pytorch fp32", "openvino fp32", "openvino int8", "onnxruntime fp32"} <= rows.keys()
    assert all(row.top1_agreement is None and row.cosine > 0.99 for row in rows.values())
    assert f"{rows['openvino int8'].cosine:.5f}" in result.table() and "%" not in result.table().splitlines()[1]


@pytest.mark.slow
def test_result_has_the_settings(measured: tuple[TeacherResult, Any, Any]) -> None:
    result = measured[0]
    assert result.has_random_weights and result.export_s is not None and result.export_s > 0
    about = {"name": "small_resnet", "size": 32, "num_threads": 1, "device_name": "the CPU"}
    assert result.settings.items() >= (about | {"repeats": 2, "batch_sizes": [4, 1]}).items()


@pytest.mark.slow
def test_json_and_plot_are_saved(measured: tuple[TeacherResult, Any, Path]) -> None:
    result, _, out = measured
    assert out.read_text() == result.to_json() + "\n"
    row = json.loads(out.read_text())["rows"][0]
    assert row["name"] == "pytorch fp32" and row["images_per_s"]["4"]["repeats"] == list(result.rows[0].images_per_s[4])
    assert row["ms_per_image"]["1"] == pytest.approx(1000 / median(result.rows[0].images_per_s[1]))
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.format == "PNG" and plot.width > 1000
    assert [line.get_label() for line in result.plot().axes[0].lines] == [row.name for row in result.rows]


@pytest.mark.slow
def test_progress_is_reported(measured: tuple[TeacherResult, list[str], Any]) -> None:
    lines = measured[1]
    assert lines[0] == "exporting small_resnet for images of 32 x 32"
    assert lines[1].startswith("pytorch fp32: first output after ")
    assert lines[-1].startswith("4 at a time, repeat 2 of 2, images/s: pytorch fp32 ")


@pytest.mark.slow
def test_number_of_torch_threads_is_restored(photographs: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    settings = BenchTeacherSettings(
        model=MODEL, root=photographs, batch_sizes=(1,), compile_at=(), num_images=1, repeats=1, num_threads=before + 1
    )
    bench_teacher(settings, report=lambda line: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_onnx_file_is_compared_with_onnx_runtime(exported: Callable[[int], Path], photographs: Path) -> None:
    settings = BenchTeacherSettings(
        onnx=exported(0), root=photographs, batch_sizes=(2,), num_images=2, repeats=1, num_threads=1, device="cpu"
    )
    result = bench_teacher(settings)
    assert (result.reference, result.export_s, result.has_random_weights) == ("onnxruntime fp32", None, False)
    assert not [row for row in result.rows if row.name.startswith("pytorch")]
    for name in ("pytorch fp32", "pytorch bf16", "pytorch compiled fp32"):
        assert result.left_out[name].startswith("an ONNX file is no module; give the model by name")
    assert result.settings["size"] == 32


@pytest.mark.slow
def test_missing_backend_names_the_extra(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    settings = BenchTeacherSettings(
        model=MODEL, root=photographs, batch_sizes=(1,), compile_at=(), num_images=1, repeats=1, device="cpu"
    )
    assert "pip install 'kd_pipeline[cpu]'" in bench_teacher(settings).left_out["openvino fp32"]


def test_failing_export_measures_pytorch_only(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    settings = BenchTeacherSettings(
        model=MODEL, root=photographs, batch_sizes=(1,), compile_at=(), num_images=1, repeats=1, device="cpu"
    )
    result = bench_teacher(settings)
    assert [row.name for row in result.rows] == ["pytorch fp32", "pytorch bf16"] and result.export_s is None
    assert result.left_out["openvino fp32"].startswith("no ONNX file: onnxscript is needed here")


def comparison_of(module: nn.Module | None, lines: list[str] | None = None, **changes: Any) -> BackendComparison:
    about = {"batch_sizes": (1, 4), "num_threads": 1, "report": (lines or []).append} | changes
    return BackendComparison(ExportedModel("net", module, None, "not exported"), random_images(64), **about)


def test_failing_batch_size_is_left_out() -> None:
    class Picky(LogitsOnly):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == 5:
                raise ValueError("five is a crowd")
            return super().forward(images)

    found = comparison_of(Picky(), batch_sizes=(5, 8))
    found.run(compile_at=(), num_images=8, repeats=1)
    assert list(found.rows["pytorch fp32"].images_per_s) == [8]
    assert "five is a crowd" in found.left_out["pytorch fp32, 5 at a time"]


def test_nan_logits_are_left_out() -> None:
    class Overflowing(LogitsOnly):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            return logits / 0 if logits.dtype == torch.bfloat16 else logits

    found = comparison_of(Overflowing())
    found.run(compile_at=(), num_images=1, repeats=1)
    assert list(found.rows) == ["pytorch fp32"] and "NaN or inf" in found.left_out["pytorch bf16"]


def test_compiled_is_opened_for_each_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resets: list[int] = []
    lines: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(lines)))
    found = comparison_of(LogitsOnly(), batch_sizes=(4, 1, 2), report=lines.append)
    found.run(compile_at=(1, 4), num_images=1, repeats=1)
    assert list(found.rows["pytorch compiled bf16"].images_per_s) == [1, 4]
    assert list(found.rows["pytorch bf16"].images_per_s) == [1, 2, 4]
    assert len(resets) == 2 and found.rows["pytorch compiled fp32"].first_batch == 1
    assert not [name for name in found.left_out if "at a time" in name]
    found = comparison_of(LogitsOnly())
    found.run(compile_at=None, num_images=1, repeats=1)
    assert list(found.rows["pytorch compiled fp32"].images_per_s) == [4], "defaults to the largest"


def test_each_repeat_is_saved() -> None:
    known: list[dict[int, int]] = []

    def save() -> None:
        known.append({size: len(rates) for size, rates in found.rows["pytorch fp32"].images_per_s.items()})

    found = comparison_of(LogitsOnly(), save=save)
    found.run(compile_at=(), num_images=1, repeats=2, precisions=("fp32",))
    assert known == [{1: 1}, {1: 2}, {1: 2, 4: 1}, {1: 2, 4: 2}]


def test_only_the_wanted_precisions_are_measured_beside_the_reference() -> None:
    found = comparison_of(LogitsOnly())
    found.run(compile_at=(4,), num_images=1, repeats=1, precisions=("bf16",))
    assert list(found.rows) == ["pytorch fp32", "pytorch bf16", "pytorch compiled bf16"]
    assert found.reference == "pytorch fp32" and found.left_out.keys() == {f"{name} bf16" for name in RUN_FILES}


def test_reference_of_a_file_is_the_first_that_runs_it(exported: Callable[[int], Path], photographs: Path) -> None:
    settings = BenchTeacherSettings(
        onnx=exported(0),
        root=photographs,
        batch_sizes=(2,),
        precisions=("bf16",),
        num_images=2,
        repeats=1,
        device="cpu",
    )
    result = bench_teacher(settings)
    assert result.reference == result.rows[0].name == "onnxruntime fp32"
    assert "openvino fp32" not in {row.name for row in result.rows} | result.left_out.keys()


@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("cpu", ["pytorch compiled fp32", "pytorch compiled bf16"]),
        (
            "cuda",
            [
                "pytorch compiled fp32",
                "pytorch compiled bf16",
                "pytorch graph bf16",
                "pytorch compiled graph bf16",
                "tensorrt bf16, fixed profile",
            ],
        ),
    ],
)
def test_graphs_and_fixed_profiles_are_measured_on_a_gpu(device: str, names: list[str]) -> None:
    found = comparison_of(LogitsOnly())
    found._images = SimpleNamespace(device=torch.device(device))  # type: ignore[assignment]
    opened: Any = {"pytorch bf16": None, "tensorrt bf16": None}
    assert [kind.name for kind in found._kinds_of_one_size(("bf16", "fp32"), opened)] == names


def test_engine_with_a_fixed_profile_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setattr(teacher_backends, "build_engine", lambda *args, **more: got.append((args, more)) or tmp_path)
    monkeypatch.setattr(teacher_backends, "open_teacher", lambda *args, **more: got.append((args, more)))
    monkeypatch.setattr(BackendComparison, "_obstacle", lambda *args: "")
    found = BackendComparison(
        ExportedModel("net", None, tmp_path / "net.onnx"),
        random_images(64),
        batch_sizes=(8,),
        num_threads=1,
        report=print,
    )
    found._open_teacher(teacher_backends._Kind("tensorrt", "bf16", fixed_profile=True), 8)
    (build,), more = got[0]
    assert [(each.min, each.opt, each.max) for each in build.profiles] == [(8, 8, 8)]
    assert build.precision == "bf16" and len(more["calibration_set"]().images) == 64
    ((opened,), _) = got[1]
    assert (opened.engine, opened.onnx, opened.backend) == (tmp_path, None, "tensorrt")


def test_nothing_is_exported_where_nothing_runs_it(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_teacher_module, "why_no_onnx", lambda device: "no runtime for it")
    monkeypatch.setattr(bench_teacher_module, "export_onnx", None)
    settings = BenchTeacherSettings(
        model=MODEL, root=photographs, batch_sizes=(1,), compile_at=(), num_images=1, repeats=1, device="cpu"
    )
    result = bench_teacher(settings)
    assert result.export_s is None and result.left_out["openvino fp32"] == "no runtime for it"


def test_error_names_every_reason_if_nothing_runs() -> None:
    with pytest.raises(TeacherError, match=r"nothing here runs net: pytorch fp32: .*; openvino fp32: not exported"):
        comparison_of(None).run(compile_at=None, num_images=1, repeats=1)


def test_table_has_medians_and_joins_equal_reasons() -> None:
    rows = (
        TeacherRow("ours", 2.5, 4, 0.99991, 0.985, {4: (30.0, 10.0, 20.0), 1: (5.0, 4.0, 2.0)}),
        TeacherRow("theirs, compiled", 31.0, 4, 1.0, 1.0, {4: (8.0, 8.0, 8.0)}),
    )
    left_out = {"a": "no GPU", "b": "not installed", "c": "no GPU"}
    settings = {"repeats": 3, "num_threads": 2, "device_name": "the CPU"}
    table = TeacherResult(rows, left_out, "ours", 3.0, True, settings, {}).table().splitlines()
    assert table[1].split() == ["ours", "1", "4.0", "2.0", "5.0", "250.00", "2.5", "98.5%", "0.99991"]
    assert table[2].split() == ["4", "20.0", "10.0", "30.0", "50.00"]
    assert table[3].split()[2:] == ["4", "8.0", "8.0", "8.0", "125.00", "31.0", "100.0%", "1.00000"]
    assert len(table[0]) == len(table[1]) == len(table[3])
    assert table[4:6] == ["not measured: a, c: no GPU", "not measured: b: not installed"]
    assert table[6].startswith("The ONNX file took 3.0 s") and table[7].startswith("The weights are random")
    assert table[8].startswith("Medians of 3 interleaved repeats with 2 thread(s) on the CPU.")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "got neither"),
        ({"onnx": "a.onnx", "model": MODEL}, "got both"),
        (
            {"onnx": "a.onnx", "batch_sizes": (1, 2), "compile_at": (3,)},
            r"\[3\] are not among the batch_sizes \[1, 2\]",
        ),
        ({"onnx": "a.onnx", "batch_sizes": ()}, "batch_sizes"),
        ({"onnx": "a.onnx", "batch_sizes": (0,)}, "batch_sizes"),
        ({"onnx": "a.onnx", "precisions": ("fp64",)}, "precisions"),
        ({"onnx": "a.onnx", "precisions": ()}, "precisions"),
    ],
)
def test_impossible_settings_are_errors(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BenchTeacherSettings(**values)


def test_folder_as_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_teacher(BenchTeacherSettings(model=MODEL, out=tmp_path))


@pytest.mark.slow
def test_few_photographs_are_repeated(photo_folder: Path) -> None:
    settings = BenchTeacherSettings(
        model=MODEL, root=photo_folder, batch_sizes=(48,), compile_at=(), num_images=1, repeats=1, device="cpu"
    )
    result = bench_teacher(settings)
    assert list(result.rows[0].images_per_s) == [48]
