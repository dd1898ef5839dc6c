"""The contract in `Teacher`'s docstring, checked for every backend."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from torch import Tensor, nn

from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import why_no_cuda
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import IMAGE_SHAPE, NUM_CLASSES, ConvNet, cnn_backbone, random_images, vit_backbone

MAX_BATCH = 16
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NO_CUDA_PROVIDER = pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))


def openvino_precisions() -> set[str]:
    """The precisions of OpenVINO on this CPU; none if it is not installed."""
    if find_spec("openvino") is None:
        return set()
    import openvino

    return set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


PRECISIONS = openvino_precisions()
NO_OPENVINO = pytest.mark.skipif(not PRECISIONS, reason="OpenVINO is not installed")


@dataclass(frozen=True)
class Network:
    """What is run."""

    make: Callable[[int], nn.Module]
    outputs: dict[str, str]
    """Their specs as text."""
    num_prefix_tokens: dict[str, int] = field(default_factory=dict)


CLASSIFIER = Network(ConvNet, {"logits": f"[any, {NUM_CLASSES}] float32", "features": "[any, 32, 8, 8] float32"})
TRANSFORMER = Network(vit_backbone, {"pooled": "[any, 32] float32", "spatial": "[any, 19, 32] float32"}, {"spatial": 3})
TRUNK = Network(cnn_backbone, {"pooled": "[any, 96] float32", "spatial": "[any, 96, 2, 2] float32"})

Files = Callable[[Network, int], Path]
"""The ONNX file of a network with the weights of a seed."""


@dataclass(frozen=True)
class Case:
    """How to run a network."""

    backend: str
    precision: str = "fp32"
    device: str = "cpu"
    tolerance: float = 1e-5
    """Largest error of an output, relative to its largest value."""
    options: dict[str, object] = field(default_factory=dict)
    network: Network = CLASSIFIER

    def open(self, files: Files, *, seed: int = 0) -> Teacher:
        runs_module = self.backend == "pytorch"
        settings = TeacherSettings(
            backend=self.backend,
            precision=self.precision,
            max_batch=MAX_BATCH,
            onnx=None if runs_module else files(self.network, seed),
            **self.options,
        )
        module = self.network.make(seed) if runs_module else None
        return open_teacher(settings, module=module, image_shape=IMAGE_SHAPE, device=self.device, batch_size=MAX_BATCH)


CASES = [
    pytest.param(Case("pytorch"), id="pytorch-fp32"),
    pytest.param(Case("pytorch", "bf16", tolerance=0.03), id="pytorch-bf16"),
    pytest.param(Case("pytorch", options={"compile": True}), id="pytorch-compiled", marks=pytest.mark.slow),
    pytest.param(
        Case("pytorch", device="cuda", tolerance=5e-3, options={"compile": False}),  # convolutions in TF32
        id="pytorch-cuda",
        marks=GPU,
    ),
    pytest.param(
        Case("pytorch", "bf16", device="cuda", tolerance=0.03, options={"compile": True}),
        id="pytorch-cuda-compiled",
        marks=[*GPU, pytest.mark.slow],
    ),
    pytest.param(
        Case("pytorch", device="cuda", tolerance=5e-3, options={"compile": False, "cuda_graph": True}),
        id="pytorch-cuda-graph",
        marks=GPU,
    ),
    pytest.param(Case("openvino"), id="openvino-fp32", marks=NO_OPENVINO),
    pytest.param(
        Case("openvino", "bf16", tolerance=0.03),
        id="openvino-bf16",
        marks=pytest.mark.skipif("BF16" not in PRECISIONS, reason="OpenVINO has no bfloat16 on this CPU"),
    ),
    pytest.param(Case("onnxruntime"), id="onnxruntime"),
    pytest.param(
        Case("onnxruntime", device="cuda", tolerance=1e-4), id="onnxruntime-cuda", marks=[*GPU, NO_CUDA_PROVIDER]
    ),
    *(
        pytest.param(Case(backend, network=network, tolerance=1e-4), id=f"{backend}-{name}", marks=marks)
        for name, network in (("transformer", TRANSFORMER), ("trunk", TRUNK))
        for backend, marks in (("pytorch", ()), ("openvino", NO_OPENVINO), ("onnxruntime", ()))
    ),
    pytest.param(Case("pytorch", "bf16", tolerance=0.05, network=TRANSFORMER), id="pytorch-bf16-transformer"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def files(exported: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")

    @cache
    def export(make: Callable[[int], nn.Module], seed: int) -> Path:
        return export_onnx(make(seed), folder / f"{make.__name__}-{seed}.onnx", image_shape=IMAGE_SHAPE, max_batch=4)

    return lambda network, seed: exported(seed) if network is CLASSIFIER else export(network.make, seed)


@pytest.fixture(scope="module")
def teacher(case: Case, files: Files) -> Iterator[Teacher]:
    opened = case.open(files)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(case: Case) -> nn.Module:
    return case.network.make(0).eval().requires_grad_(False)


def images_for(teacher: Teacher, num_images: int, *, seed: int = 0) -> Tensor:
    return random_images(num_images, seed=seed).to(teacher.device)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.cpu() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("num_images", [1, 2, 7, MAX_BATCH])
def test_outputs_match_module_at_any_batch_size(
    case: Case, teacher: Teacher, reference: nn.Module, num_images: int
) -> None:
    images = random_images(num_images, seed=num_images)
    outputs, wanted = teacher(images.to(teacher.device)), reference(images)
    assert outputs.keys() == case.network.outputs.keys()
    for name in outputs:
        assert relative_error(outputs[name], wanted[name]) < case.tolerance


def test_outputs_match_specs(case: Case, teacher: Teacher) -> None:
    assert {name: str(spec) for name, spec in teacher.outputs.items()} == case.network.outputs
    prefixes = {name: spec.num_prefix_tokens for name, spec in teacher.outputs.items() if spec.num_prefix_tokens}
    assert prefixes == case.network.num_prefix_tokens
    outputs = teacher(images_for(teacher, 3))
    assert outputs.keys() == teacher.outputs.keys()
    assert all(teacher.outputs[name].accepts(tuple(output.shape), output.dtype) for name, output in outputs.items())
    assert all(output.is_contiguous() and output.device == teacher.device for output in outputs.values())


def test_precision_shows_in_outputs(case: Case, teacher: Teacher, reference: nn.Module) -> None:
    assert teacher.precision == case.precision
    images = random_images(8)
    outputs, wanted = teacher(images.to(teacher.device)), reference(images)
    has_tf32 = case.device == "cuda" and case.backend == "pytorch"
    for name in outputs:
        error = relative_error(outputs[name], wanted[name])
        assert (error > 1e-4) == (case.precision == "bf16" or has_tf32)


def test_autocast_does_not_change_outputs(teacher: Teacher) -> None:
    images = images_for(teacher, 4)
    wanted = teacher(images)
    with torch.autocast(teacher.device.type, dtype=torch.bfloat16):
        found = teacher(images)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_outputs_require_no_grad(teacher: Teacher) -> None:
    images = images_for(teacher, 2).requires_grad_()
    with torch.enable_grad():
        outputs = teacher(images)
    assert not any(output.requires_grad for output in outputs.values())


def test_later_call_keeps_earlier_outputs(teacher: Teacher) -> None:
    first = teacher(images_for(teacher, 4, seed=1))
    kept = {name: output.clone() for name, output in first.items()}
    second = teacher(images_for(teacher, 4, seed=2))
    for name in first:
        assert not torch.equal(first[name], second[name])
        assert torch.equal(first[name], kept[name])


def test_outputs_survive_close(case: Case, files: Files) -> None:
    if case.options.get("compile"):
        pytest.skip("would compile once more, and shares the code for outputs with pytorch-fp32")
    opened = case.open(files)
    images = images_for(opened, 4)
    outputs = opened(images)
    kept = {name: output.clone() for name, output in outputs.items()}
    for output in outputs.values():
        output.add_(1.0)
    again = opened(images)
    opened.close()
    del opened
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert all(torch.equal(outputs[name], kept[name] + 1.0) for name in kept)


def test_images_are_only_read(teacher: Teacher) -> None:
    images = images_for(teacher, 5)
    before, address = images.clone(), images.data_ptr()
    teacher(images)
    assert torch.equal(images.view(torch.uint8), before.view(torch.uint8))
    assert images.data_ptr() == address


@pytest.mark.parametrize("backend", [pytest.param("openvino", marks=NO_OPENVINO), "onnxruntime"])
def test_cpu_runtimes_read_images_in_place(backend: str, tmp_path: Path) -> None:
    shape, num_images = (3, 512, 512), 32
    averages = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    path = export_onnx(averages, tmp_path / "averages.onnx", image_shape=shape, max_batch=2)
    opened = open_teacher(TeacherSettings(backend=backend, onnx=path))
    images = torch.ones(num_images, *shape)
    opened(images[:1])
    before = peak_memory_bytes(reset=True)
    opened(images)
    assert peak_memory_bytes() - before < images.nbytes / 4


def peak_memory_bytes(*, reset: bool = False) -> int:
    """Largest resident size of this process, since the last reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as exc:
            pytest.skip(f"this system does not reset the peak of a process: {exc}")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def test_dali_memory_is_read(case: Case, teacher: Teacher, reference: nn.Module) -> None:
    source = random_images(6, seed=3).permute(0, 2, 3, 1).contiguous().numpy()
    pipeline = Pipeline(batch_size=6, num_threads=1, device_id=None)
    with pipeline:
        noise = fn.external_source(source=lambda: list(source), layout="HWC")
        pipeline.set_outputs(fn.transpose(noise, perm=[2, 0, 1]))
    pipeline.build()
    (output,) = pipeline.run()
    images = torch.from_dlpack(output.as_tensor())
    before = images.clone()
    found, wanted = teacher(images.to(teacher.device)), reference(before)
    for name in found:
        assert relative_error(found[name], wanted[name]) < case.tolerance
    assert np.array_equal(output.as_array(), before.numpy())


def test_outputs_in_inference_mode_are_normal_tensors(teacher: Teacher) -> None:
    with torch.inference_mode():
        outputs = teacher(images_for(teacher, 4))
    for output in outputs.values():
        assert not output.is_inference()
        student = torch.zeros(output.shape[1:], device=teacher.device, requires_grad=True)
        (student * output).square().sum().add(((student - output) ** 2).sum()).backward()
        assert torch.allclose(student.grad, -2 * output.sum(0))


def test_batch_above_max_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match=f"takes 1 to {MAX_BATCH} images at a time, got {MAX_BATCH + 1}"):
        teacher(images_for(teacher, MAX_BATCH + 1))


def test_empty_batch_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match=f"takes 1 to {MAX_BATCH} images at a time, got 0"):
        teacher(images_for(teacher, 0))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda images: images.half(), r"\[4, 3, 32, 32\] float16"),
        (lambda images: images[:, :, :16], r"\[4, 3, 16, 32\] float32"),
        (lambda images: images[:, :1], r"\[4, 1, 32, 32\] float32"),
        (lambda images: images[0], r"\[3, 32, 32\] float32"),
    ],
    ids=["dtype", "size", "channels", "no batch"],
)
def test_wrong_shape_or_dtype_is_refused(teacher: Teacher, change: Callable[[Tensor], Tensor], found: str) -> None:
    with pytest.raises(TeacherError, match=rf"takes images \[any, 3, 32, 32\] float32, got {found}"):
        teacher(change(images_for(teacher, 4)))


def test_wrong_device_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match=f"reads from {teacher.device}, the images are on meta"):
        teacher(images_for(teacher, 4).to("meta"))


def test_wrong_layout_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match=r"dense NCHW buffer, got strides \(3072, 1, 96, 3\)"):
        teacher(images_for(teacher, 4).to(memory_format=torch.channels_last))


def test_close_twice(case: Case, files: Files) -> None:
    opened = case.open(files)
    opened.close()
    opened.close()
    with pytest.raises(TeacherError, match=f"the {case.backend} teacher is closed"):
        opened(images_for(opened, 1))


def test_fingerprint_depends_on_content(case: Case, teacher: Teacher, files: Files) -> None:
    again, other = case.open(files), case.open(files, seed=1)
    assert again.fingerprint == teacher.fingerprint
    assert other.fingerprint != teacher.fingerprint
    images = images_for(teacher, 2)
    if not case.options.get("compile"):  # each opening compiles again
        found, wanted = other(images), teacher(images)
        assert not any(torch.equal(found[name], wanted[name]) for name in wanted)


def test_fingerprint_depends_on_backend_and_precision(files: Files) -> None:
    cases = [Case("pytorch"), Case("pytorch", "bf16"), Case("onnxruntime"), *([Case("openvino")] if PRECISIONS else [])]
    fingerprints = {(case.backend, case.precision): case.open(files).fingerprint for case in cases}
    assert len(set(fingerprints.values())) == len(fingerprints) >= 3


def test_teacher_is_no_module(teacher: Teacher) -> None:
    assert not isinstance(teacher, nn.Module)
