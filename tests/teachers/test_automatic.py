"""Which backend and precision a teacher gets where the settings leave them open."""

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import EngineError, MissingPackageError, TeacherError
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers import automatic, open_on_cpu
from kd_pipeline.teachers.automatic import Comparison, Contest, Measured
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.openvino import openvino_precisions
from kd_pipeline.teachers.pytorch import PyTorchTeacher, module_digest, runtime_fingerprint
from kd_pipeline.teachers.settings import EnsembleSettings, Runtime, TeacherSettings, with_runtimes
from tests.networks import IMAGE_SHAPE, VIT_SIZES, ConvNet, random_images, vit_backbone

NO_OPENVINO = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openvino", "onnxscript")), reason="OpenVINO or onnxscript is missing"
)
NO_BF16 = pytest.mark.skipif(
    find_spec("openvino") is not None and "bf16" not in openvino_precisions(), reason="OpenVINO has no bf16 on this CPU"
)
OPENVINO, PYTORCH = "openvino", "pytorch"


def runtime(text: str) -> Runtime:
    backend, precision = text.split()
    return Runtime(backend=backend, precision=precision)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all tests here, so one export is enough."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> Callable[..., None]:
    """`exporting(openvino=2.0)`: any network is worth an export, and OpenVINO is found to be twice as fast."""

    def make(*, openvino: float = 2.0, bf16: bool = True) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "kd_pipeline").mkdir(mode=0o700)
        (cache / "exports").mkdir(mode=0o700, exist_ok=True)
        (tmp_path / "kd_pipeline" / "exports").symlink_to(cache / "exports")
        monkeypatch.setattr(open_on_cpu, "_EXPORT_FROM_FLOPS", 0)
        has = {"fp32", "bf16"} if bf16 else {"fp32"}
        monkeypatch.setattr(open_on_cpu, "cpu_precisions", lambda: frozenset(has))
        speeds = {OPENVINO: openvino, PYTORCH: 1.0}
        monkeypatch.setattr(automatic._Timed, "s_per_image", property(lambda timed: 1 / speeds[timed._teacher.backend]))

    return make


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    yield caplog


def open_module(settings: TeacherSettings | None = None, **options: object) -> Teacher:
    return open_teacher(settings or TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE, **options)


@NO_OPENVINO
def test_network_runs_in_openvino_where_that_is_faster(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting()
    cold = open_module(student_precision="fp32")
    assert cold.runtimes == ("openvino fp32",)
    assert log.messages[-1] == (
        "teacher: openvino in fp32 on cpu, as the student trains in fp32; 2.0 times as fast as PyTorch here, top-1 as "
        "in float32 on 100.0 % of 64 images (cosine 1.00000)"
    )
    line = log.messages[-1]
    # The next start finds both, and its outputs are the same bits.
    monkeypatch.setattr(automatic._Race, "_compare", lambda race, images: pytest.fail("compared again"))
    log.clear()
    warm = open_module(student_precision="fp32")
    assert log.messages == [line] and warm.fingerprint == cold.fingerprint
    images = random_images(5)
    outputs = cold(images)
    for name, output in warm(images).items():
        assert torch.equal(output, outputs[name])
    assert cold.fingerprint == runtime_fingerprint(OPENVINO, "fp32", module_digest(ConvNet()))


@NO_OPENVINO
def test_network_stays_in_pytorch_where_openvino_is_slower(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    exporting(openvino=0.5)
    assert open_module(student_precision="fp32").backend == PYTORCH
    assert "as the student trains in fp32; 2.0 times as fast as OpenVINO here" in log.messages[-1]


@NO_OPENVINO
def test_network_stays_in_pytorch_where_openvino_disagrees(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting()

    def check_parity(*arguments: object, **options: object) -> None:
        raise EngineError("cosine 0.5")

    monkeypatch.setattr(automatic, "check_parity", check_parity)
    assert open_module(student_precision="fp32").backend == PYTORCH
    assert "not in OpenVINO: cosine 0.5" in log.messages[-1]


def test_network_stays_in_pytorch_without_openvino(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting()

    def missing() -> None:
        raise MissingPackageError("openvino is needed here")

    monkeypatch.setattr(open_on_cpu, "openvino_precisions", missing)
    assert open_module(student_precision="fp32").backend == PYTORCH
    assert "not exported to ONNX, which OpenVINO would run: openvino is needed here" in log.messages[-1]


def test_little_work_is_not_exported(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, exporting: Callable[..., None]
) -> None:
    exporting()
    monkeypatch.setattr(open_on_cpu, "_EXPORT_FROM_FLOPS", 1e12)
    log.set_level(logging.DEBUG, logger="kd_pipeline")
    assert open_module(num_images=1000).backend == PYTORCH
    assert "operations for 1000 images are less than 1e+12, from which an export pays off" in log.messages[0]
    assert log.messages[1:] == ["teacher: pytorch in fp32 on cpu, because the teacher is a module"]


@pytest.mark.parametrize("settings", [{"compile": False}, {"channels_last": False}, {"backend": PYTORCH}])
def test_settings_of_pytorch_keep_the_network_there(
    settings: dict[str, object], exporting: Callable[..., None]
) -> None:
    exporting()
    assert open_module(TeacherSettings(**settings)).backend == PYTORCH


def test_precision_follows_the_student(exporting: Callable[..., None], log: pytest.LogCaptureFixture) -> None:
    exporting()
    settings = TeacherSettings(backend=PYTORCH)
    assert open_module(settings, student_precision="bf16").precision == "bf16"
    assert "pytorch in bf16 on cpu, as the student trains in bf16; top-1 as in float32 on 100.0 %" in log.messages[-1]
    assert open_module(settings).precision == "fp32"
    assert open_module(TeacherSettings(backend=PYTORCH, precision="fp32"), student_precision="bf16").precision == "fp32"


def test_precision_that_the_cpu_lacks_is_not_taken(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    exporting(bf16=False)
    settings = TeacherSettings(backend=PYTORCH)
    assert open_module(settings, student_precision="bf16").precision == "fp32"
    assert log.messages[-1] == (
        "teacher: pytorch in fp32 on cpu, as this CPU has no instructions for bf16, in which the student trains"
    )
    assert open_module(TeacherSettings(backend=PYTORCH, precision="bf16")).precision == "bf16"  # what is said is done


def test_slow_precision_of_the_student_is_not_taken(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting()
    seconds = {"fp32": 1.0, "bf16": 3.0}
    monkeypatch.setattr(automatic._Timed, "s_per_image", property(lambda timed: seconds[timed._teacher.precision]))
    teacher = open_module(TeacherSettings(backend=PYTORCH), student_precision="bf16")
    assert teacher.precision == "fp32"
    assert "pytorch in fp32 on cpu, as that is faster here than bf16, in which the student trains" in log.messages[-1]


class Sensitive(nn.Module):
    """Logits that bfloat16 cannot tell apart."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return torch.cat([1 + 1e-3 * means, 1 - 1e-3 * means], 1) - 1


def test_precision_that_changes_the_outputs_is_not_taken(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    exporting()
    teacher = open_teacher(
        TeacherSettings(backend=PYTORCH), module=Sensitive(), image_shape=IMAGE_SHAPE, student_precision="bf16"
    )
    assert teacher.precision == "fp32"
    line = next(line for line in log.messages if line.startswith("teacher: "))
    assert "as bf16, in which the student trains, changes its outputs too much (the bf16 teacher's outputs" in line


@NO_OPENVINO
def test_onnx_file_follows_the_student(
    exporting: Callable[..., None], exported: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting()
    asked: list[Runtime] = []
    monkeypatch.setattr(open_on_cpu, "openvino_precisions", lambda: frozenset({"fp32", "bf16"}))
    monkeypatch.setattr(open_on_cpu, "choose", lambda contest: (asked.extend(contest.candidates), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        open_teacher(TeacherSettings(onnx=exported(0)), student_precision="bf16")
    assert asked == [runtime("openvino bf16")]
    monkeypatch.setattr(open_on_cpu, "openvino_precisions", lambda: frozenset({"fp32"}))
    teacher = open_teacher(TeacherSettings(onnx=exported(0)), student_precision="bf16")
    assert teacher.runtimes == ("openvino fp32",)


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(vit_backbone().trunk.state_dict(), path)
    return path


def open_vit(weights: Path, *, backend: str = "auto", precision: str = "auto", **options: object) -> Teacher:
    """A network by name, without a head."""
    model = ModelSettings(timm="vit_tiny_patch16_224", num_classes=0, kwargs=VIT_SIZES, checkpoint=weights)
    settings = TeacherSettings(model=model, backend=backend, precision=precision)
    return open_teacher(settings, image_shape=IMAGE_SHAPE, calibration_images=lambda: random_images(64), **options)


@NO_OPENVINO
@pytest.mark.parametrize(
    ("backend", "precision", "runtime"),
    [
        ("auto", "auto", "openvino fp32"),
        (PYTORCH, "bf16", "pytorch bf16"),
        (OPENVINO, "fp32", "openvino fp32"),
        pytest.param(OPENVINO, "bf16", "openvino bf16", marks=NO_BF16),
        (OPENVINO, "int8", "openvino int8"),
        ("auto", "int8", "openvino int8"),
        ("onnxruntime", "fp32", "onnxruntime fp32"),
        ("onnxruntime", "int8", "onnxruntime int8"),
    ],
)
def test_network_without_a_head_runs_everywhere(
    backend: str, precision: str, runtime: str, exporting: Callable[..., None], vit_weights: Path
) -> None:
    exporting()
    teacher, images = open_vit(vit_weights, backend=backend, precision=precision), random_images(3)
    assert teacher.runtimes == (runtime,) and teacher.problems == ()
    assert {name: spec.num_prefix_tokens for name, spec in teacher.outputs.items()} == {"pooled": None, "spatial": 3}
    tolerance = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.2}[teacher.precision]
    outputs, wanted = teacher(images), vit_backbone().eval()(images)
    for name, output in outputs.items():
        assert (output - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max()


@NO_OPENVINO
def test_agreement_without_logits_is_a_cosine(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture, vit_weights: Path
) -> None:
    exporting()
    open_vit(vit_weights, student_precision="fp32")
    assert log.messages[-1] == (
        "teacher: openvino in fp32 on cpu, as the student trains in fp32; 2.0 times as fast as PyTorch here, cosine "
        "1.00000 to float32 on 64 images"
    )


class Blurred(nn.Module):
    """A backbone whose tokens, and only these, bfloat16 cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vit_backbone()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.trunk(images)
        return outputs | {"spatial": (1000 + outputs["spatial"]) - 1000}


def test_precision_that_changes_tokens_is_not_taken(
    exporting: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    exporting()
    teacher = open_teacher(
        TeacherSettings(backend=PYTORCH), module=Blurred(), image_shape=IMAGE_SHAPE, student_precision="bf16"
    )
    assert teacher.precision == "fp32"
    line = next(line for line in log.messages if line.startswith("teacher: "))
    assert "changes its outputs too much" in line and "worst first: 'spatial' cosine" in line and "'pooled'" not in line


@NO_OPENVINO
@pytest.mark.parametrize("backend", [OPENVINO, "onnxruntime"])
def test_named_backend_runs_a_network(backend: str, exporting: Callable[..., None]) -> None:
    exporting()
    teacher, images = open_module(TeacherSettings(backend=backend, num_threads=1)), random_images(3)
    assert teacher.runtimes == (f"{backend} fp32",)
    torch.testing.assert_close(dict(teacher(images)), ConvNet().eval()(images), atol=1e-4, rtol=1e-3)


def test_network_that_cannot_be_exported_is_an_error_for_a_named_backend(exporting: Callable[..., None]) -> None:
    exporting()

    class Branches(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * (1 if images.sum() > 0 else 2)

    with pytest.raises(
        TeacherError, match=r"(?s)the onnxruntime backend runs ONNX files, and .*; use backend: pytorch"
    ):
        open_teacher(TeacherSettings(backend="onnxruntime"), module=Branches(), image_shape=(1, 2, 2))


# What is measured decides


def contest(*candidates: str, obeys: bool = False) -> Contest:
    return Contest(
        reference=runtime("pytorch fp32"),
        candidates=tuple(map(runtime, candidates)),
        open=lambda runtime: PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE),
        key="",
        images=lambda: random_images(8),
        images_key="",
        obeys=obeys,
    )


def comparison(**measured: float) -> Comparison:
    """`openvino_bf16=2.0`: seconds for an image; negative ones are of outputs that are too far from float32."""
    return Comparison(
        num_images=8,
        measured=[
            Measured(
                runtime=runtime(name.replace("_", " ")),
                s_per_image=abs(seconds),
                problem="too far" if seconds < 0 else "",
            )
            for name, seconds in measured.items()
        ],
    )


BOTH = ("openvino bf16", "pytorch bf16")


@pytest.mark.parametrize(
    ("found", "measured", "wanted"),
    [
        (contest(*BOTH), {"pytorch_fp32": 3.0, "openvino_bf16": 1.0, "pytorch_bf16": 2.0}, "openvino bf16"),
        (contest(*BOTH), {"pytorch_fp32": 3.0, "openvino_bf16": 2.0, "pytorch_bf16": 1.0}, "pytorch bf16"),
        # Nearly as fast is no reason to leave the preferred one.
        (contest(*BOTH), {"pytorch_fp32": 3.0, "openvino_bf16": 1.05, "pytorch_bf16": 1.0}, "openvino bf16"),
        (
            contest(*BOTH),
            {"pytorch_fp32": 3.0, "openvino_bf16": -1.0, "pytorch_bf16": -1.0, "openvino_fp32": 2.0},
            "openvino fp32",
        ),
        (contest(*BOTH), {"pytorch_fp32": 3.0, "openvino_bf16": -1.0, "pytorch_bf16": 2.0}, "pytorch bf16"),
        (contest(*BOTH), {"pytorch_fp32": 3.0}, "pytorch fp32"),
        (
            contest(*BOTH, obeys=True),
            {"pytorch_fp32": 3.0, "openvino_bf16": -1.0, "pytorch_bf16": -2.0},
            "pytorch bf16",
        ),
        (contest("pytorch bf16"), {"pytorch_fp32": 3.0, "pytorch_bf16": -1.0}, "pytorch fp32"),
    ],
)
def test_fastest_runtime_that_agrees_is_taken(found: Contest, measured: dict[str, float], wanted: str) -> None:
    assert automatic._fastest(found, comparison(**measured)) == runtime(wanted)


def test_runtime_that_cannot_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tries: list[Runtime] = []

    def open_one(each: Runtime) -> Teacher:
        tries.append(each)
        if each.backend == OPENVINO:
            raise TeacherError("the disk is full")
        return PyTorchTeacher(ConvNet(), image_shape=IMAGE_SHAPE)

    found = Contest(
        reference=runtime("pytorch fp32"),
        candidates=(runtime("openvino fp32"), runtime("pytorch fp32")),
        open=open_one,
        key="",
        images=lambda: random_images(8),
        images_key=None,
    )
    for _ in range(2):
        choice = automatic.choose(found)
        assert choice.runtime == runtime("pytorch fp32") and "the disk is full" in choice.problems.values()
    assert len(tries) == 4


# What a run began with


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"backend": "openvino", "precision": "bf16"}),
        ({"precision": "fp32"}, {"backend": "openvino", "precision": "fp32"}),
        ({"backend": "openvino"}, {"backend": "openvino", "precision": "bf16"}),
        ({"backend": "pytorch"}, {"backend": "pytorch", "precision": "auto"}),
    ],
)
def test_runtimes_fill_in_what_is_open(settings: dict[str, str], wanted: dict[str, str]) -> None:
    found = with_runtimes(TeacherSettings(**settings), ["openvino bf16"])
    assert found.model_dump(include={"backend", "precision"}) == wanted


def test_runtimes_of_an_ensemble_are_its_members() -> None:
    ensemble = EnsembleSettings(members=(TeacherSettings(), TeacherSettings(precision="fp32")))
    found = with_runtimes(ensemble, ["openvino bf16", "pytorch fp32"])
    assert isinstance(found, EnsembleSettings)
    assert [(each.backend, each.precision) for each in found.members] == [("openvino", "bf16"), ("pytorch", "fp32")]
    assert with_runtimes(ensemble, ["openvino bf16"]) == ensemble
