"""An engine is opened only where its manifest says that it runs, and after its parity was checked."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.tensorrt import load
from kd_pipeline.teachers.tensorrt.build import build_engine
from kd_pipeline.teachers.tensorrt.load import incompatibilities, open_engine, record_engine_parity
from kd_pipeline.teachers.tensorrt.manifest import (
    EngineFile,
    EngineManifest,
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
    """Make torch report an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


class FakeTeacher:
    """Replaces `TensorRTTeacher`: runs the ONNX file in ONNX Runtime, and adds noise times `shift` to the logits."""

    shift = 0.0
    opened: list["FakeTeacher"]

    def __init__(self, file: EngineFile, *, device: torch.device, **more: Any) -> None:
        assert file.manifest is not None
        self.teacher = OnnxRuntimeTeacher(Path(file.manifest.onnx))
        self.device, self.images = torch.device("cpu"), self.teacher.images
        self.sizes: list[int] = []
        self.closed = False
        FakeTeacher.opened.append(self)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(images))
        outputs = self.teacher(images)
        noise = torch.randn(outputs["logits"].shape, generator=torch.Generator().manual_seed(0))
        return outputs | {"logits": outputs["logits"] + self.shift * noise}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, gpu: None) -> Iterator[type[FakeTeacher]]:
    FakeTeacher.opened = []
    monkeypatch.setattr(load, "TensorRTTeacher", FakeTeacher)
    yield FakeTeacher


def rewrite(engine: Path, **changes: object) -> EngineManifest:
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
        ({"runtime_version": "9" * 4400, "version_compatible": True}, None),
        ({"runtime_version": "²", "version_compatible": True}, None),
        ({"gpu": "NVIDIA H200"}, None),
        ({"gpu": "NVIDIA H100"}, "gpu: found NVIDIA H100, here is NVIDIA H200"),
        ({"compute_capability": ("8.9", "9.0")}, None),
        ({"compute_capability": ("8.9", "12.0")}, "compute_capability: found 8.9, 12.0, here is 9.0"),
        ({"compute_capability": ("8.0+",)}, None),
        ({"compute_capability": ("10.0+",)}, "compute_capability: found 10.0+, here is 9.0"),
    ],
)
def test_incompatible_engine_is_refused(
    engine: Path, gpu: None, changes: dict[str, object], problem: str | None
) -> None:
    manifest = rewrite(engine, **changes)
    assert incompatibilities(manifest, GPU) == ([] if problem is None else [problem])
    if problem is not None:
        with pytest.raises(EngineError) as error:
            open_engine(engine, device=GPU)
        assert problem in str(error.value) and f"Build it again: {manifest.command}" in str(error.value)


def test_cpu_is_refused(engine: Path) -> None:
    with pytest.raises(EngineError, match="an engine runs on an NVIDIA GPU and the images are on cpu"):
        open_engine(engine, device=torch.device("cpu"))


def test_first_open_checks_parity_once(engine: Path, fake: type[FakeTeacher]) -> None:
    before = read_manifest(engine)
    assert (before.parity.measured_on, before.parity.batch_sizes) == ("onnx", (1, 4, 8))
    open_engine(engine, device=GPU)
    after = read_manifest(engine)
    assert after.parity.measured_on == "engine"
    assert set(fake.opened[0].sizes) == {1, 4, 8}
    assert after.model_copy(update={"parity": before.parity, "seal": before.seal}) == before
    open_engine(engine, device=GPU)
    assert fake.opened[1].sizes == []
    assert not any(each.closed for each in fake.opened)


@pytest.mark.parametrize("shift", [1.0, float("nan")])
def test_failed_parity_is_refused_every_time(
    engine: Path, fake: type[FakeTeacher], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    monkeypatch.setattr(fake, "shift", shift)
    for number in range(2):
        with pytest.raises(EngineError, match=r"too far from float32|NaN or inf"):
            open_engine(engine, device=GPU)
        assert fake.opened[number].closed
        assert read_manifest(engine).parity.measured_on == "onnx"


def test_missing_parity_file_is_refused(engine: Path, fake: type[FakeTeacher]) -> None:
    engine.with_name("teacher.engine.parity.npz").unlink()
    with pytest.raises(EngineError, match=r"teacher.engine.parity.npz cannot be read"):
        open_engine(engine, device=GPU)


def test_changed_engine_never_reaches_tensorrt(engine: Path, fake: type[FakeTeacher]) -> None:
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(EngineError, match="engine_sha256"):
        open_engine(engine, device=GPU)
    assert fake.opened == []


def test_unwritable_manifest_is_warning(
    engine: Path, fake: type[FakeTeacher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, manifest: EngineManifest) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(load, "write_manifest", full)
    open_engine(engine, device=GPU)
    assert "could not be written to its manifest: [Errno 28] No space left on device" in caplog.text


def test_trusted_engine_needs_no_manifest(
    engine: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    digest = read_manifest(engine).engine_sha256
    manifest_path(engine).unlink()
    seen: list[EngineFile] = []
    monkeypatch.setattr(load, "TensorRTTeacher", lambda file, **more: seen.append(file))
    open_engine(engine, device=GPU, trust_engines=[digest])
    assert seen[0].manifest is None and seen[0].content == engine.read_bytes()
    assert "is opened without a manifest, and its outputs were never compared" in caplog.text


def test_build_for_other_gpu_skips_parity(
    engine: Path, fake: type[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    rewrite(engine, compute_capability=("8.9",))
    record_engine_parity(engine, GPU, reports.append)
    assert reports == ["the engine is not for NVIDIA H200: compute_capability: found 8.9, here is 9.0"]

    def refuse(file: EngineFile, **more: Any) -> None:
        raise EngineError("unsupported cc")

    rewrite(engine, compute_capability=("any",))
    monkeypatch.setattr(load, "TensorRTTeacher", refuse)
    record_engine_parity(engine, GPU, reports.append)
    assert reports[1:] == ["the engine does not run on NVIDIA H200: unsupported cc"]
    assert read_manifest(engine).parity.measured_on == "onnx"


def test_build_on_gpu_checks_parity(
    engine: Path,
    exported: Callable[[int], Path],
    fake: type[FakeTeacher],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings = BuildSettings(onnx=exported(0), runtime="tensorrt_rtx", profiles=(Profile(min=1, opt=4, max=8),))
    other = build_engine(settings, save_engine=tmp_path / "other" / "teacher.engine")
    assert read_manifest(other).parity.measured_on == "engine"
    assert fake.opened[-1].closed
    monkeypatch.setattr(fake, "shift", 1.0)
    with pytest.raises(EngineError, match="too far from float32"):
        build_engine(settings, save_engine=tmp_path / "third" / "teacher.engine")
    assert not list((tmp_path / "third").glob("teacher*"))


def test_parity_is_logged(engine: Path, fake: type[FakeTeacher], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    open_engine(engine, device=GPU)
    assert f"{engine}: its outputs on cpu are close enough to float32" in caplog.text
