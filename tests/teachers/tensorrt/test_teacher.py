"""The TensorRT teacher on a fake GPU that runs late: calls, streams, graphs, errors; and the real library's errors."""

import logging
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import EngineError, TeacherError
from kd_pipeline.teachers.tensorrt import runtime
from kd_pipeline.teachers.tensorrt import teacher as teacher_module
from kd_pipeline.teachers.tensorrt.manifest import EngineFile, EngineManifest, Profile, TensorIO
from kd_pipeline.teachers.tensorrt.package import TensorRT, _make_logger
from kd_pipeline.teachers.tensorrt.teacher import TensorRTTeacher
from tests._core.test_files import give_away
from tests.teachers.fake_gpu import Gpu
from tests.teachers.fake_tensorrt import (
    CudaGraphStrategy,
    DataType,
    ILogger,
    Library,
    Plan,
    TensorFormat,
    engine_outputs,
)
from tests.teachers.tensorrt.special_files import SPECIAL_FILES

CPU = torch.device("cpu")
HALF, FLOAT = DataType.HALF, DataType.FLOAT
BOTH = {"logits": ((-1, 3), FLOAT), "features": ((-1, 3, 5, 5), FLOAT)}
HALF_IO = Plan(image=("images", (-1, 3, 5, 5), HALF), outputs={"logits": ((-1, 3), HALF)})
CONTENT = b"an engine"
MANIFEST = EngineManifest.model_construct(
    onnx_sha256="cafe",
    input_adapter=None,
    extra_outputs=(),
    classes=("cat", "dog", "owl"),
    precision="fp16",
    half_io=False,
    calibration_sha256=None,
    converter=1,
    profiles=(Profile(min=1, opt=4, max=8),),
    runtime="tensorrt",
    image=TensorIO(name="images", shape=(None, 3, 5, 5), dtype="float32"),
    outputs={"logits": TensorIO(name="logits", shape=(None, 3), dtype="float32")},
    arguments=("--onnx", "teacher.onnx"),
)
"""The fields of a manifest that the teacher reads."""


class Bench:
    """Opens teachers on the fake GPU."""

    def __init__(self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.gpu, self.path, self.library = gpu, folder / "teacher.engine", None
        self._monkeypatch = monkeypatch

    def open(
        self,
        plan: Plan | None = None,
        *,
        flavor: str = "tensorrt",
        manifest: EngineManifest | None = None,
        fails: set[str] | None = None,
        content: bytes = CONTENT,
        **options: Any,
    ) -> TensorRTTeacher:
        self.library = library = Library(self.gpu, flavor, {CONTENT: plan or Plan()})
        library.fails = fails or set()
        tensorrt = TensorRT(library.module, flavor, "12.3", _make_logger(ILogger))
        self._monkeypatch.setattr(runtime, "open_tensorrt", lambda runtime: tensorrt)
        return TensorRTTeacher(EngineFile(self.path, content, manifest), device=CPU, **options)


@pytest.fixture
def bench(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(gpu, monkeypatch, tmp_path)


def noise(num_images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_images, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def infer(gpu: Gpu, teacher: TensorRTTeacher, values: Tensor) -> dict[str, Tensor]:
    """Run the teacher on a buffer that nobody holds afterward."""
    return teacher(gpu.images(values))


def assert_outputs(outputs: dict[str, Tensor], values: Tensor, *, tolerance: float = 1e-6) -> None:
    wanted = engine_outputs(values)
    for name, output in outputs.items():
        assert output.dtype == torch.float32 and output.is_contiguous()
        torch.testing.assert_close(output, wanted[name], rtol=tolerance, atol=tolerance)


def is_released(gpu: Gpu, address: int) -> bool:
    return bool(gpu.address(address, (4,), torch.float32).tensor().isnan().all())


# One call


@pytest.mark.parametrize("num_images", [1, 3, 4, 8])
def test_any_batch_size_in_profile_works(bench: Bench, gpu: Gpu, num_images: int) -> None:
    teacher = bench.open(Plan(outputs=BOTH))
    outputs = infer(gpu, teacher, noise(num_images))
    gpu.run()
    assert list(outputs) == ["logits", "features"]
    assert_outputs(outputs, noise(num_images))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engine_without_logits(bench: Bench, gpu: Gpu, cuda_graph: bool) -> None:
    plan = Plan(outputs={"pooled": ((-1, 3), FLOAT), "features": ((-1, 3, 5, 5), HALF)})
    teacher = bench.open(plan, cuda_graph=cuda_graph)
    for num_images in (3, 4):
        outputs, wanted = infer(gpu, teacher, noise(num_images)), engine_outputs(noise(num_images))
        gpu.run()
        assert list(outputs) == list(teacher.outputs) == ["pooled", "features"]
        torch.testing.assert_close(outputs["pooled"], wanted["logits"])
        torch.testing.assert_close(outputs["features"], wanted["features"], atol=2e-3, rtol=2e-3)


def test_single_output_is_named_as_in_a_file(bench: Bench) -> None:
    names = {"pooled": (-1, 3), "scores": (-1, 3), "features": (-1, 3, 5, 5)}
    found = [list(bench.open(Plan(outputs={name: (shape, FLOAT)})).outputs) for name, shape in names.items()]
    assert found == [["pooled"], ["logits"], ["features"]]


def test_manifest_knows_prefix_tokens(bench: Bench) -> None:
    plan = Plan(outputs={"pooled": ((-1, 3), FLOAT), "tokens": ((-1, 19, 3), FLOAT)})
    wanted = {
        "pooled": TensorIO(name="pooled", shape=(None, 3), dtype="float32"),
        "spatial": TensorIO(name="tokens", shape=(None, 19, 3), dtype="float32", num_prefix_tokens=3),
    }
    teacher = bench.open(plan, manifest=MANIFEST.model_copy(update={"outputs": wanted, "classes": None}))
    assert {name: spec.num_prefix_tokens for name, spec in teacher.outputs.items()} == {"pooled": None, "spatial": 3}
    assert [spec.num_prefix_tokens for spec in bench.open(plan).outputs.values()] == [None, None]


def test_calls_are_in_order_on_callers_stream(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open()
    images = gpu.images(noise(4))
    logits = teacher(images)["logits"]
    calls = bench.library.calls
    assert calls == [
        ("profile", 0),
        ("shape", (4, 3, 5, 5)),
        ("address", "images", images.data_ptr()),
        ("address", "logits", logits.data_ptr()),
        ("event", calls[4][1]),
        ("execute", gpu._current.cuda_stream),
    ]
    calls.clear()
    teacher(images)
    assert [call[0] for call in calls] == ["address", "address", "event", "execute"]
    with gpu.on(gpu.other):
        teacher(gpu.images(noise(2)))
    assert calls[4] == ("shape", (2, 3, 5, 5)) and calls[-1] == ("execute", gpu.other.cuda_stream)


def test_only_close_waits_for_gpu(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open()
    for number in range(5):
        infer(gpu, teacher, noise(1 + number))
    assert gpu.host_waits == 0
    teacher.close()
    assert gpu.host_waits == 1


def test_dropped_images_are_held_until_read(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open()
    first = gpu.images(noise(4))
    address = first.data_ptr()
    outputs = teacher(first)
    del first
    infer(gpu, teacher, noise(4, seed=1))
    assert not is_released(gpu, address)
    gpu.run()
    assert_outputs(outputs, noise(4))
    infer(gpu, teacher, noise(4, seed=2))
    assert is_released(gpu, address)


def test_close_releases_images_after_read(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open()
    images = gpu.images(noise(4))
    address = images.data_ptr()
    outputs = teacher(images)
    del images
    teacher.close()
    assert_outputs(outputs, noise(4))
    assert is_released(gpu, address)


def test_unaligned_images_are_copied(bench: Bench, gpu: Gpu) -> None:
    assert teacher_module._ALIGNMENT == 256
    teacher = bench.open()
    batch = gpu.images(noise(5))
    images = batch[1:]
    address = images.data_ptr()
    assert address % 256 != 0
    outputs = teacher(images)
    del batch, images
    gpu.run()
    assert_outputs(outputs, noise(5)[1:])
    assert ("address", "images", address) not in bench.library.calls


@pytest.mark.parametrize("num_images", [1, 4])
def test_batch_below_profile_is_padded(bench: Bench, gpu: Gpu, num_images: int) -> None:
    teacher = bench.open(Plan(outputs=BOTH, profiles=((5, 6, 8),)))
    outputs = infer(gpu, teacher, noise(num_images))
    gpu.run()
    assert ("shape", (5, 3, 5, 5)) in bench.library.calls
    assert_outputs(outputs, noise(num_images))


def test_static_batch_engine_takes_smaller_batches(bench: Bench, gpu: Gpu) -> None:
    fixed = Plan(image=("images", (8, 3, 5, 5), FLOAT), outputs={"logits": ((8, 3), FLOAT)}, profiles=((8, 8, 8),))
    teacher = bench.open(fixed)
    assert teacher.max_batch == 8 and str(teacher.images) == "[any, 3, 5, 5] float32"
    outputs = infer(gpu, teacher, noise(3))
    gpu.run()
    assert_outputs(outputs, noise(3))


@pytest.mark.parametrize(
    ("num_images", "profile", "num_rows"), [(1, 0, 1), (2, 0, 2), (3, 1, 4), (4, 1, 4), (8, 1, 8), (9, 2, 9)]
)
def test_tightest_profile_without_padding_is_used(
    bench: Bench, gpu: Gpu, num_images: int, profile: int, num_rows: int
) -> None:
    teacher = bench.open(Plan(profiles=((1, 2, 2), (4, 8, 8), (8, 16, 16))))
    outputs = infer(gpu, teacher, noise(num_images))
    gpu.run()
    assert bench.library.calls[:2] == [("profile", profile), ("shape", (num_rows, 3, 5, 5))]
    assert_outputs(outputs, noise(num_images))
    assert teacher.max_batch == 16


def test_wide_profile_beats_padding(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(Plan(profiles=((4, 4, 4), (1, 8, 8))))
    infer(gpu, teacher, noise(3))
    assert bench.library.calls[:2] == [("profile", 1), ("shape", (3, 3, 5, 5))]


def test_one_context_per_profile_on_demand(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(Plan(profiles=((1, 2, 2), (3, 8, 8))))
    assert bench.library.contexts == []
    for num_images, num_contexts in ((1, 1), (2, 1), (8, 2), (1, 2), (3, 2)):
        infer(gpu, teacher, noise(num_images))
        assert len(bench.library.contexts) == num_contexts


def test_float16_images_give_float32_outputs(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(HALF_IO)
    assert str(teacher.images) == "[any, 3, 5, 5] float16" and str(teacher.outputs["logits"]) == "[any, 3] float32"
    values = noise(4, dtype=torch.float16)
    outputs = infer(gpu, teacher, values)
    gpu.run()
    assert_outputs(outputs, values, tolerance=1e-3)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_outputs_belong_to_caller(bench: Bench, gpu: Gpu, cuda_graph: bool) -> None:
    teacher = bench.open(cuda_graph=cuda_graph)
    first = infer(gpu, teacher, noise(4))["logits"]
    second = infer(gpu, teacher, noise(4, seed=1))["logits"]
    gpu.run()
    first.add_(1.0)
    third = infer(gpu, teacher, noise(4, seed=2))["logits"]
    teacher.close()
    torch.testing.assert_close(first, engine_outputs(noise(4))["logits"] + 1.0)
    assert_outputs({"logits": second}, noise(4, seed=1))
    assert_outputs({"logits": third}, noise(4, seed=2))


# Streams


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize("plan", [Plan(), HALF_IO, Plan(profiles=((6, 6, 8),))], ids=["plain", "half", "padded"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_default_stream_uses_ordered_side_stream(
    bench: Bench, gpu: Gpu, plan: Plan, latest_first: bool, cuda_graph: bool
) -> None:
    teacher = bench.open(plan, cuda_graph=cuda_graph)
    with gpu.on(gpu.default):
        values = [noise(4, seed=seed, dtype=plan.image[2].value) for seed in range(3)]
        outputs = [infer(gpu, teacher, each) for each in values]
        gpu.run(latest_first=latest_first)
    for found, wanted in zip(outputs, values, strict=True):
        assert_outputs(found, wanted, tolerance=1e-3)


@pytest.mark.parametrize("latest_first", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_calls_on_different_streams_are_ordered(bench: Bench, gpu: Gpu, latest_first: bool, cuda_graph: bool) -> None:
    teacher = bench.open(cuda_graph=cuda_graph)
    gpu.run()
    outputs = []
    for seed, stream in enumerate((gpu.other, gpu._current, gpu.default, gpu.other)):
        with gpu.on(stream):
            outputs.append(infer(gpu, teacher, noise(4, seed=seed)))
    gpu.run(latest_first=latest_first, most=1)
    for seed, found in enumerate(outputs):
        assert_outputs(found, noise(4, seed=seed))


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_random_sizes_and_streams_stay_correct(bench: Bench, gpu: Gpu, flavor: str, cuda_graph: bool) -> None:
    teacher = bench.open(Plan(outputs=BOTH, profiles=((2, 4, 4), (5, 8, 8))), flavor=flavor, cuda_graph=cuda_graph)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for seed in range(60):
        num_images, stream, rest = torch.randint(0, 24, (3,), generator=generator).tolist()
        with gpu.on((gpu._current, gpu.other, gpu.default)[stream % 3]):
            values = noise(1 + num_images % 8, seed=seed)
            kept.append((values, infer(gpu, teacher, values)))
            if seed % 3:
                kept.pop(rest % len(kept))
        for queue in gpu.queues.values():
            queue.advance(rest % 5)
    assert gpu.host_waits == 0 and len(kept) > 15
    teacher.close()
    for values, outputs in kept:
        assert_outputs(outputs, values)


# CUDA graphs


def test_best_batches_are_captured_on_open(bench: Bench, gpu: Gpu) -> None:
    bench.open(Plan(profiles=((1, 2, 2), (3, 5, 8))), cuda_graph=True)
    shapes = [call[1][0] for call in bench.library.calls if call[0] == "shape"]
    assert shapes == [2, 5] and len(gpu.builders) == 2


def test_new_batch_size_is_captured_on_first_call(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(Plan(outputs=BOTH), cuda_graph=True)
    for number, (num_images, num_captures) in enumerate([(4, 1), (4, 1), (3, 2), (3, 2), (4, 2)]):
        bench.library.calls.clear()
        outputs = infer(gpu, teacher, noise(num_images, seed=number))
        assert len(gpu.builders) == num_captures
        is_first = number == 2
        assert [call[0] for call in bench.library.calls].count("execute") == 2 * is_first  # plain, then in the capture
        gpu.run()
        assert_outputs(outputs, noise(num_images, seed=number))
    assert gpu.host_waits == 0


def test_each_captured_size_has_own_context(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(cuda_graph=True)
    infer(gpu, teacher, noise(2))
    assert len(bench.library.contexts) == 2
    assert [context._shape[0] for context in bench.library.contexts] == [4, 2]


def test_graph_holds_images_until_read(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(cuda_graph=True)
    images = gpu.images(noise(4))
    address = images.data_ptr()
    outputs = teacher(images)
    del images
    assert not is_released(gpu, address)
    gpu.run()
    infer(gpu, teacher, noise(4, seed=1))
    assert is_released(gpu, address)
    assert_outputs(outputs, noise(4))


def test_failed_capture_warns_and_retries(bench: Bench, gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.captures_to_break = 2
    with caplog.at_level(logging.WARNING):
        teacher = bench.open(cuda_graph=True)
        first = infer(gpu, teacher, noise(4))
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph for 4 images, which run without one; 2 more attempts: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        "no CUDA graph for 4 images, which run without one; 1 more attempts: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    ]
    second, third = infer(gpu, teacher, noise(4, seed=1)), infer(gpu, teacher, noise(4, seed=2))
    gpu.run()
    assert len(gpu.builders) == 3 and teacher._graphs[4]._graph.num_launches == 1
    for seed, outputs in enumerate((first, second, third)):
        assert_outputs(outputs, noise(4, seed=seed))


def test_third_failed_capture_gives_up(bench: Bench, gpu: Gpu) -> None:
    gpu.captures_to_break = 100
    teacher = bench.open(cuda_graph=True)
    outputs = [infer(gpu, teacher, noise(4, seed=seed)) for seed in range(5)]
    gpu.run()
    assert len(gpu.builders) == 3
    for seed, found in enumerate(outputs):
        assert_outputs(found, noise(4, seed=seed))


# TensorRT-RTX


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_rtx_uses_own_graphs(bench: Bench, gpu: Gpu, cuda_graph: bool) -> None:
    teacher = bench.open(flavor="tensorrt_rtx", cuda_graph=cuda_graph)
    outputs = infer(gpu, teacher, noise(4))
    gpu.run()
    assert_outputs(outputs, noise(4))
    (context,) = bench.library.contexts
    wanted = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graph else CudaGraphStrategy.DISABLED
    assert context._config.cuda_graph_strategy == wanted and gpu.builders == []


def test_rtx_kernels_are_cached(bench: Bench, gpu: Gpu) -> None:
    kernels = bench.path.with_name("teacher.engine.rtxcache")
    for number in (1, 2):
        teacher = bench.open(flavor="tensorrt_rtx")
        assert bench.library.caches[0].content == b"compiled;" * (number - 1)
        infer(gpu, teacher, noise(4))
        teacher.close()
        assert kernels.read_bytes() == b"compiled;" * number
        assert stat.S_IMODE(kernels.stat().st_mode) == 0o600
    assert [path.name for path in bench.path.parent.iterdir()] == [kernels.name]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_writable_kernel_cache_is_not_loaded(bench: Bench, caplog: pytest.LogCaptureFixture, mode: int) -> None:
    kernels = bench.path.with_name("teacher.engine.rtxcache")
    kernels.write_bytes(b"compiled;by others;")
    kernels.chmod(mode)
    with caplog.at_level(logging.WARNING):
        bench.open(flavor="tensorrt_rtx")
    assert bench.library.caches[0].content == b""
    assert f"may write to {kernels}; if nobody did, chmod" in caplog.text


def test_foreign_or_linked_kernel_cache_is_not_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, target = bench.path.with_name("teacher.engine.rtxcache"), bench.path.with_name("elsewhere")
    target.write_bytes(b"compiled;")
    target.chmod(0o600)
    kernels.symlink_to(target)
    with caplog.at_level(logging.WARNING):
        bench.open(flavor="tensorrt_rtx")
    assert bench.library.caches[0].content == b"" and "this is a link" in caplog.text
    kernels.unlink()
    target.rename(kernels)
    give_away(kernels, monkeypatch)
    bench.open(flavor="tensorrt_rtx")
    assert bench.library.caches[0].content == b"" and "belongs to user" in caplog.text


@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
def test_special_file_is_no_kernel_cache(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(bench.path.parent)  # the name of a socket has at most 108 bytes
    SPECIAL_FILES[kind](Path("teacher.engine.rtxcache"))
    with caplog.at_level(logging.WARNING):
        bench.open(flavor="tensorrt_rtx")
    assert bench.library.caches[0].content == b""
    (record,) = caplog.records
    assert "are not used, and are compiled again: " in record.getMessage()


def test_kernels_are_not_saved_where_they_would_not_be_read(
    bench: Bench, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = bench.open(flavor="tensorrt_rtx")
    infer(gpu, teacher, noise(4))
    bench.path.parent.chmod(0o775)
    teacher.close()
    assert f"could not be saved in {bench.path}.rtxcache: " in caplog.text and "group may write to" in caplog.text
    assert not list(bench.path.parent.iterdir())


def test_incompatible_kernel_cache_is_rebuilt(bench: Bench, gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    kernels = bench.path.with_name("teacher.engine.rtxcache")
    kernels.write_bytes(b"of a different driver")
    kernels.chmod(0o600)
    with caplog.at_level(logging.INFO):
        teacher = bench.open(flavor="tensorrt_rtx")
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == ["its kernels are compiled again"]
    infer(gpu, teacher, noise(4))
    teacher.close()
    assert kernels.read_bytes() == b"compiled;"


def test_unwritable_kernel_cache_only_warns(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.path = bench.path.parent / "no such folder" / "teacher.engine"
    teacher = bench.open(flavor="tensorrt_rtx")
    with caplog.at_level(logging.WARNING):
        teacher.close()
    assert "could not be saved" in caplog.text and not bench.path.parent.exists()


def test_failed_kernel_write_leaves_no_file(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    teacher = bench.open(flavor="tensorrt_rtx")
    bench.library.caches[0].content = None  # what TensorRT returns on failure
    with caplog.at_level(logging.WARNING):
        teacher.close()
    assert "could not be saved" in caplog.text and list(bench.path.parent.iterdir()) == []


# Errors


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("create_execution_context", "cannot make an execution context"),
        ("set_optimization_profile_async", "cannot use the profile 0"),
        ("set_input_shape", r"rejects images \[4, 3, 5, 5\]"),
        ("set_tensor_address", "rejects the address 0x[0-9a-f]+ for 'images'"),
        ("set_input_consumed_event", "rejects an event"),
        ("execute_async_v3", "cannot run the engine"),
    ],
)
def test_rejected_call_is_error_with_text(bench: Bench, gpu: Gpu, method: str, says: str) -> None:
    teacher = bench.open(fails={method})
    with pytest.raises(TeacherError, match=f"TensorRT {says}: {method}: failed") as caught:
        infer(gpu, teacher, noise(4))
    assert isinstance(caught.value, EngineError) or isinstance(caught.value.__cause__, EngineError)
    bench.library.fails.clear()
    outputs = infer(gpu, teacher, noise(4))
    gpu.run()
    assert_outputs(outputs, noise(4))


def test_rejected_shape_is_set_again(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open()
    infer(gpu, teacher, noise(2))
    bench.library.fails.add("set_input_shape")
    with pytest.raises(TeacherError):
        infer(gpu, teacher, noise(4))
    bench.library.fails.clear()
    outputs = infer(gpu, teacher, noise(2))
    gpu.run()
    assert_outputs(outputs, noise(2))


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_unknown_engine_is_error_with_reason(bench: Bench, flavor: str) -> None:
    reason = "magicTag is wrong" if flavor == "tensorrt" else "version mismatch"
    with pytest.raises(EngineError, match=rf"teacher.engine does not run on {flavor} 12\.3, build .*: .*{reason}"):
        bench.open(flavor=flavor, content=b"garbage")


def test_earlier_errors_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    tensorrt = runtime.open_tensorrt("tensorrt_rtx")
    tensorrt.logger.log(tensorrt.module.ILogger.ERROR, "an earlier error")
    with pytest.raises(EngineError) as caught:
        TensorRTTeacher(EngineFile(Path("teacher.engine"), b"garbage", None), device=CPU, runtime="tensorrt_rtx")
    assert "an earlier error" not in str(caught.value)


def test_rtx_lists_all_invalidity_reasons(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"build it again here: kd-pipeline .*: version mismatch, unsupported cc"):
        bench.open(Plan(invalidity=3), flavor="tensorrt_rtx")


def test_host_code_is_not_allowed(bench: Bench) -> None:
    bench.open()
    assert bench.library.runtimes[0].engine_host_code_allowed is False


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(more_inputs=("mask",)), r"takes 2 inputs \(images, mask\)"),
        (Plan(image=("images", (-1, 1, 5, 5), FLOAT)), r"teacher takes images \[N, 3, H, W\]"),
        (Plan(image=("images", (-1, 3), FLOAT)), r"teacher takes images \[N, 3, H, W\]"),
        (Plan(image=("images", (-1, 3, -1, -1), FLOAT)), r"\[-1, 3, -1, -1\] .* only the batch varies"),
        (Plan(layout=TensorFormat.CHW32), "CHW32; a teacher's inputs and outputs are dense"),
        (Plan(outputs={"logits": ((-1, 3), DataType.INT64)}), "'logits' is .*INT64"),
        (Plan(outputs={"logits": ((-1,), FLOAT)}), r"'logits' is \[-1\]"),
        (Plan(outputs={"logits": ((-1, 3, 5), FLOAT)}), r"the logits are .*, wanted \[N, K\]"),
        (Plan(outputs={}), "has no outputs"),
    ],
)
def test_non_teacher_engine_is_refused(bench: Bench, plan: Plan, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        bench.open(plan)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(image=("input", (-1, 3, 5, 5), FLOAT)), "image: found 'input' .* and 'images' "),
        (Plan(image=("images", (-1, 3, 5, 5), HALF)), "image: found .* float16 in the engine and .* float32 in its"),
        (Plan(image=("images", (-1, 3, 6, 6), FLOAT)), r"image: found .*3, 6, 6\] .* and .*3, 5, 5\]"),
        (Plan(outputs={"logits": ((-1, 4), FLOAT)}), r"outputs: found logits: 'logits' .*, 4\].* and .*, 3\]"),
        (Plan(outputs={"scores": ((-1, 3), FLOAT)}), "found the outputs scores, wanted logits"),
        (Plan(outputs=BOTH), "found the outputs logits, features, wanted logits"),
        (Plan(profiles=((1, 4, 9),)), "profiles: found .*max=9.* and .*max=8"),
        (Plan(profiles=((1, 4, 8), (1, 2, 8))), "profiles: found .*opt=2"),
    ],
)
def test_engine_must_match_manifest(bench: Bench, plan: Plan, says: str) -> None:
    bench.open(manifest=MANIFEST)
    with pytest.raises(EngineError, match=says):
        bench.open(plan, manifest=MANIFEST)


def test_runtime_comes_from_manifest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(manifest=MANIFEST, runtime="tensorrt")
    with pytest.raises(EngineError, match="was built by tensorrt, and the settings ask for tensorrt_rtx"):
        bench.open(manifest=MANIFEST, runtime="tensorrt_rtx")
    asked = []
    make = runtime.open_tensorrt
    monkeypatch.setattr(runtime, "open_tensorrt", lambda runtime: (asked.append(runtime), make(runtime))[1])
    engine = EngineFile(bench.path, CONTENT, MANIFEST)
    TensorRTTeacher(engine, device=CPU)
    TensorRTTeacher(EngineFile(bench.path, CONTENT, None), device=CPU)
    assert asked == ["tensorrt", "auto"]


# Attributes


def test_attributes_come_from_manifest(bench: Bench) -> None:
    teacher = bench.open(manifest=MANIFEST)
    assert (teacher.backend, teacher.precision, teacher.max_batch) == ("tensorrt", "fp16", 8)
    assert teacher.classes == ("cat", "dog", "owl")


def test_device_matches_images(bench: Bench) -> None:
    bench.open()
    teacher = TensorRTTeacher(EngineFile(bench.path, CONTENT, None), device=torch.device("cpu", 0))
    assert teacher.device == torch.zeros(1).device != torch.device("cpu", 0)


def test_single_output_is_logits_without_manifest(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(Plan(outputs={"output_0": ((-1, 3), FLOAT)}))
    assert (teacher.precision, teacher.classes, list(teacher.outputs)) == ("unknown", None, ["logits"])
    outputs = infer(gpu, teacher, noise(2))
    gpu.run()
    assert_outputs(outputs, noise(2))


def test_manifest_renames_outputs(bench: Bench, gpu: Gpu) -> None:
    outputs = {"logits": TensorIO(name="output_0", shape=(None, 3), dtype="float32")}
    teacher = bench.open(
        Plan(outputs={"output_0": ((-1, 3), FLOAT)}), manifest=MANIFEST.model_copy(update={"outputs": outputs})
    )
    found = infer(gpu, teacher, noise(2))
    gpu.run()
    assert list(found) == ["logits"]
    assert_outputs(found, noise(2))


def test_fingerprint_depends_on_model_only(bench: Bench) -> None:
    def fingerprint(**changes: Any) -> str:
        return bench.open(manifest=MANIFEST.model_copy(update=changes)).fingerprint

    same = [{}, {"gpu": "a different one"}, {"engine_sha256": "1"}, {"build_s": 2.0}, {"runtime_version": "13"}]
    other = [{"precision": "bf16"}, {"onnx_sha256": "beef"}, {"input_adapter": {"size": 5}}, {"converter": 2}]
    assert len({fingerprint(**changes) for changes in same}) == 1
    assert len({fingerprint(**changes) for changes in [{}, *other]}) == 1 + len(other)


def test_fingerprint_without_manifest_is_digest(bench: Bench) -> None:
    assert bench.open().fingerprint == bench.open().fingerprint != bench.open(manifest=MANIFEST).fingerprint
    other = EngineFile(bench.path, CONTENT + b"!", None)
    assert teacher_module._fingerprint(other) != bench.open().fingerprint


def test_close_twice(bench: Bench, gpu: Gpu) -> None:
    teacher = bench.open(cuda_graph=True)
    teacher.close()
    teacher.close()
    assert gpu.host_waits == 1
    with pytest.raises(TeacherError, match="the tensorrt teacher is closed"):
        infer(gpu, teacher, noise(1))


def test_opening_in_inference_mode_works(bench: Bench, gpu: Gpu) -> None:
    with torch.inference_mode():
        teacher = bench.open(cuda_graph=True)
    outputs = infer(gpu, teacher, noise(4))
    gpu.run()
    assert_outputs(outputs, noise(4))
    assert not outputs["logits"].is_inference()


# The real library, without a GPU


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, exported: Callable[[int], Path]) -> bytes:
    """A real TensorRT-RTX engine."""
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    logger = runtime.open_tensorrt("tensorrt_rtx").logger
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert tensorrt_rtx.OnnxParser(network, logger).parse_from_file(str(exported(0)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the engine may load")
@pytest.mark.parametrize("content", ["garbage", "nothing", "half an engine", "an engine"])
def test_real_tensorrt_rejects_with_its_text(monkeypatch: pytest.MonkeyPatch, built: bytes, content: str) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    contents = {"garbage": b"garbage" * 99, "nothing": b"", "half an engine": built[: len(built) // 2]}
    file = EngineFile(Path("teacher.engine"), contents.get(content, built), None)
    reason = "malformed engine" if content in ("garbage", "nothing") else "cudaError 35|CUDA|malformed"
    with pytest.raises(EngineError, match=f"teacher.engine does not run on tensorrt_rtx .*, build it .*(?:{reason})"):
        TensorRTTeacher(file, device=CPU, runtime="tensorrt_rtx")
