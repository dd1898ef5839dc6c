"""An engine is opened only where its manifest says that it runs, and is compared before it teaches."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.tensorrt import load as room
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.load import complete_parity, open_engine, unfit
from kd_pipeline.teachers.tensorrt.manifest import (
    EngineFile,
    Manifest,
    Profile,
    manifest_path,
    read_manifest,
    write_manifest,
)
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.teachers.tensorrt.settings import BuildSettings

pytest.importorskip("tensorrt_rtx")
GPU = torch.device("cuda", 0)
HERE = open_tensorrt("tensorrt_rtx").version


@pytest.fixture
def engine(exported: Callable[[int], Path], tmp_path: Path) -> Path:
    settings = BuildSettings(onnx=exported(0), runtime="tensorrt_rtx", profiles=(Profile(min=1, opt=4, max=8),))
    return build_engine(settings, save_engine=tmp_path / "teacher.engine")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tells of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


class Double:
    """What `TensorRTTeacher` would be, run by ONNX Runtime; `shift` is added to its logits."""

    shift = 0.0
    opened: list["Double"]

    def __init__(self, file: EngineFile, *, device: torch.device, **more: Any) -> None:
        assert file.manifest is not None
        self.teacher = OnnxRuntimeTeacher(Path(file.manifest.onnx))
        self.device, self.images = torch.device("cpu"), self.teacher.images
        self.sizes: list[int] = []
        self.closed = False
        Double.opened.append(self)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(images))
        answers = self.teacher(images)
        noise = torch.randn(answers["logits"].shape, generator=torch.Generator().manual_seed(0))
        return answers | {"logits": answers["logits"] + self.shift * noise}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, gpu: None) -> Iterator[type[Double]]:
    Double.opened = []
    monkeypatch.setattr(room, "TensorRTTeacher", Double)
    yield Double


def rewrite(engine: Path, **changes: object) -> Manifest:
    manifest = read_manifest(engine).model_copy(update=changes)
    write_manifest(engine, manifest)
    return read_manifest(engine)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"runtime_version": "1.0.0"}, f"runtime_version: found 1.0.0, here is {HERE}"),
        ({"runtime_version": "1.0.0", "version_compatible": True}, None),
        ({"runtime_version": "99.0.0", "version_compatible": True}, f"runtime_version: found 99.0.0, here is {HERE}"),
        ({"gpu": "NVIDIA H200"}, None),
        ({"gpu": "NVIDIA H100"}, "gpu: found NVIDIA H100, here is NVIDIA H200"),
        ({"compute_capability": ("8.9", "9.0")}, None),
        ({"compute_capability": ("8.9", "12.0")}, "compute_capability: found 8.9, 12.0, here is 9.0"),
        ({"compute_capability": ("8.0+",)}, None),
        ({"compute_capability": ("10.0+",)}, "compute_capability: found 10.0+, here is 9.0"),
    ],
)
def test_an_engine_for_something_else_says_what_it_is_for_and_what_is_here(
    engine: Path, gpu: None, changes: dict[str, object], problem: str | None
) -> None:
    manifest = rewrite(engine, **changes)
    assert unfit(manifest, GPU) == ([] if problem is None else [problem])
    if problem is not None:
        with pytest.raises(EngineError) as error:
            open_engine(engine, device=GPU)
        assert problem in str(error.value) and f"Build it again: {manifest.command}" in str(error.value)


def test_an_engine_for_a_cpu_is_refused(engine: Path) -> None:
    with pytest.raises(EngineError, match="an engine runs on an NVIDIA GPU and the images are on cpu"):
        open_engine(engine, device=torch.device("cpu"))


def test_the_first_opening_compares_the_engine_in_every_batch_size_and_later_ones_do_not(
    engine: Path, double: type[Double]
) -> None:
    before = read_manifest(engine)
    assert (before.parity.measured_on, before.parity.batch_sizes) == ("onnx", (1, 4, 8))
    open_engine(engine, device=GPU)
    after = read_manifest(engine)
    assert after.parity.measured_on == "engine"
    assert set(double.opened[0].sizes) == {1, 4, 8}
    assert after.model_copy(update={"parity": before.parity, "seal": before.seal}) == before
    open_engine(engine, device=GPU)
    assert double.opened[1].sizes == []
    assert not any(each.closed for each in double.opened)


@pytest.mark.parametrize("shift", [1.0, float("nan")])
def test_an_engine_with_other_answers_is_refused_closed_and_compared_again_next_time(
    engine: Path, double: type[Double], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    monkeypatch.setattr(double, "shift", shift)
    for number in range(2):
        with pytest.raises(EngineError, match=r"too far from float32|NaN or inf"):
            open_engine(engine, device=GPU)
        assert double.opened[number].closed
        assert read_manifest(engine).parity.measured_on == "onnx"


def test_an_engine_without_its_exam_is_refused(engine: Path, double: type[Double]) -> None:
    engine.with_name("teacher.engine.parity.npz").unlink()
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz cannot be read"):
        open_engine(engine, device=GPU)


def test_an_engine_that_is_changed_is_refused_before_tensorrt_hears_of_it(engine: Path, double: type[Double]) -> None:
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(EngineError, match="engine_sha256"):
        open_engine(engine, device=GPU)
    assert double.opened == []


def test_figures_that_cannot_be_written_are_a_warning(
    engine: Path, double: type[Double], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, manifest: Manifest) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_manifest", full)
    open_engine(engine, device=GPU)
    assert "could not be written beside it: [Errno 28] No space left on device" in caplog.text


def test_an_engine_that_the_user_vouches_for_needs_no_manifest(
    engine: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    digest = read_manifest(engine).engine_sha256
    manifest_path(engine).unlink()
    seen: list[EngineFile] = []
    monkeypatch.setattr(room, "TensorRTTeacher", lambda file, **more: seen.append(file))
    open_engine(engine, device=GPU, trust_engine=digest)
    assert seen[0].manifest is None and seen[0].content == engine.read_bytes()
    assert "has no manifest: nobody has compared its answers" in caplog.text


def test_a_build_on_a_gpu_that_cannot_run_the_engine_says_so_and_keeps_it(
    engine: Path, double: type[Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    rewrite(engine, compute_capability=("8.9",))
    complete_parity(engine, GPU, reports.append)
    assert reports == ["the engine is not for NVIDIA H200: compute_capability: found 8.9, here is 9.0"]

    def refuse(file: EngineFile, **more: Any) -> None:
        raise EngineError("unsupported cc")

    rewrite(engine, compute_capability=("any",))
    monkeypatch.setattr(room, "TensorRTTeacher", refuse)
    complete_parity(engine, GPU, reports.append)
    assert reports[1:] == ["the engine does not run on NVIDIA H200: unsupported cc"]
    assert read_manifest(engine).parity.measured_on == "onnx"


def test_a_build_on_a_gpu_refuses_an_engine_with_other_answers(
    engine: Path, exported: Callable[[int], Path], double: type[Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings = BuildSettings(onnx=exported(0), runtime="tensorrt_rtx", profiles=(Profile(min=1, opt=4, max=8),))
    other = build_engine(settings, save_engine=tmp_path / "other" / "teacher.engine")
    assert read_manifest(other).parity.measured_on == "engine"
    assert double.opened[-1].closed
    monkeypatch.setattr(double, "shift", 1.0)
    with pytest.raises(EngineError, match="too far from float32"):
        build_engine(settings, save_engine=tmp_path / "third" / "teacher.engine")
    assert not list((tmp_path / "third").glob("teacher*"))


def test_the_log_says_how_close_the_engine_is(
    engine: Path, double: type[Double], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    open_engine(engine, device=GPU)
    assert f"{engine}: its answers on cpu are as close to float32 as they should be" in caplog.text
