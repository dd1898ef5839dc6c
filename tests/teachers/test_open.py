import logging
import subprocess
import sys
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers import open as opening
from kd_pipeline.teachers import runner
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher, why_no_onnx
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, cnn_backbone, random_images, vit_backbone
from tests.teachers.onnx_models import LOGITS, linear_model

NO_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
ONNX, ENGINE = Path("teacher.onnx"), Path("teacher.engine")
DIGEST = "a" * 64


def test_auto_runs_module_with_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    teacher = open_teacher(TeacherSettings(precision="bf16"), module=ConvNet(), image_shape=IMAGE_SHAPE)
    assert teacher.backend == "pytorch"
    assert caplog.messages == ["teacher: pytorch in bf16 on cpu, because the teacher is a module"]


@NO_OPENVINO
def test_auto_runs_onnx_with_openvino(exported: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    teacher = open_teacher(TeacherSettings(onnx=exported(0)))
    assert teacher.backend == "openvino"
    assert teacher.classes == CLASSES
    assert caplog.messages == [
        "teacher: openvino in fp32 on cpu, because the teacher is an ONNX file and the images are on the CPU"
    ]


def test_classes_of_the_checkpoint(tmp_path: Path) -> None:
    """A teacher by name has as many classes as its checkpoint, and its averaged weights."""
    raw, ema = (timm.create_model("test_resnet", num_classes=5).eval() for _ in range(2))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "a.pth.tar")
    images = random_images(2)
    for key, network in ((None, ema), ("state_dict", raw)):
        model = ModelSettings(timm="test_resnet", checkpoint=tmp_path / "a.pth.tar", checkpoint_key=key)
        teacher = open_teacher(TeacherSettings(model=model, channels_last=False), image_shape=IMAGE_SHAPE)
        torch.testing.assert_close(teacher(images)["logits"], network(images).detach())


def test_no_layer_is_random(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pt")
    model = ModelSettings(timm="test_resnet", checkpoint=tmp_path / "a.pt", reset=("fc",))
    with pytest.raises(ConfigError, match=r"teacher\.model\.reset leaves random weights in fc; remove it, or train"):
        open_teacher(TeacherSettings(model=model), image_shape=IMAGE_SHAPE)


def test_random_weights_are_asked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    def open_random(**pretrained: bool) -> None:
        model = ModelSettings(timm="test_resnet", num_classes=0, **pretrained)
        open_teacher(TeacherSettings(model=model, backend="pytorch"), image_shape=IMAGE_SHAPE).close()

    with pytest.raises(ConfigError, match=r"teacher\.model has random weights; set its checkpoint or pretrained"):
        open_random()
    open_random(pretrained=False)
    assert "the teacher has random weights" in caplog.text


def test_named_backend_is_used(exported: Callable[[int], Path]) -> None:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0), max_batch=5))
    assert (teacher.backend, teacher.max_batch) == ("onnxruntime", 5)


def prefixes(teacher: Teacher) -> dict[str, int | None]:
    return {name: spec.num_prefix_tokens for name, spec in teacher.outputs.items()}


def test_prefix_tokens_of_the_settings_come_first(tmp_path: Path) -> None:
    tokens = ("tokens", TensorProto.FLOAT, ["N", 3, 8])
    path = tmp_path / "net.onnx"
    model = linear_model(outputs=[LOGITS, tokens])
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("ReduceMean", ["images"], ["tokens"], axes=[3], keepdims=0))
    model.opset_import[0].version = 13
    onnx.save(model, path)
    settings = TeacherSettings(backend="onnxruntime", onnx=path)
    assert prefixes(open_teacher(settings)) == {"logits": None, "tokens": None}
    told = settings.model_copy(update={"num_prefix_tokens": 2})
    assert prefixes(open_teacher(told)) == {"logits": None, "tokens": 2}
    with pytest.raises(
        ConfigError, match=r"num_prefix_tokens: 3, and 'tokens' has no more tokens than that; .*'logits'"
    ):
        open_teacher(settings.model_copy(update={"num_prefix_tokens": 3}))
    module = vit_backbone()
    for number in (None, 0, 5):
        teacher = open_teacher(TeacherSettings(num_prefix_tokens=number), module=module, image_shape=IMAGE_SHAPE)
        assert prefixes(teacher) == {"pooled": None, "spatial": 3 if number is None else number}
    with pytest.raises(
        ConfigError, match=r"num_prefix_tokens: 1, and it returns no tokens \[N, L, D\]; .*'spatial' \["
    ):
        open_teacher(TeacherSettings(num_prefix_tokens=1), module=cnn_backbone(), image_shape=IMAGE_SHAPE)


def test_features_join_the_outputs_of_a_backbone(tmp_path: Path) -> None:
    torch.save(cnn_backbone().trunk.state_dict(), tmp_path / "a.pt")
    model = ModelSettings(timm="test_resnet", num_classes=0, kwargs={"output_stride": 16}, checkpoint=tmp_path / "a.pt")
    settings = TeacherSettings(model=model, features=("layer2",), channels_last=False)
    teacher, images = open_teacher(settings, image_shape=IMAGE_SHAPE), random_images(2)
    outputs, wanted = teacher(images), cnn_backbone().eval()(images)
    assert list(outputs) == ["pooled", "spatial", "layer2"] and outputs["layer2"].shape == (2, 48, 4, 4)
    torch.testing.assert_close(outputs["spatial"], wanted["spatial"].detach())


def test_pytorch_settings_are_passed_on() -> None:
    teacher = open_teacher(
        TeacherSettings(channels_last=False, compile=True),
        module=ConvNet(),
        image_shape=IMAGE_SHAPE,
        dtype=torch.float16,
    )
    assert isinstance(teacher._model, torch._dynamo.OptimizedModule)
    assert teacher._memory_format == torch.contiguous_format
    assert str(teacher.images) == "[any, 3, 32, 32] float16"


@NO_OPENVINO
def test_num_threads_is_passed_on(exported: Callable[[int], Path]) -> None:
    openvino = open_teacher(TeacherSettings(backend="openvino", onnx=exported(0), num_threads=1))
    assert openvino._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1
    onnxruntime = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0), num_threads=1))
    assert onnxruntime._session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, "no teacher to open: set onnx to an exported file, engine to a built one or model to a network"),
        ({"backend": "openvino"}, {}, "no teacher to open"),
        ({"onnx": ONNX}, {"module": ConvNet()}, "a module and teacher.onnx; give one of them"),
        ({}, {"module": ConvNet(), "image_shape": None}, r"pass image_shape=\(3, H, W\)"),
        ({"engine": ENGINE}, {"module": ConvNet()}, "a module and teacher.engine; give one of them"),
        ({"engine": ENGINE}, {}, "in the memory of an NVIDIA GPU and they are on cpu; put the loader on a GPU"),
        ({"onnx": ONNX, "backend": "tensorrt"}, {}, "in the memory of an NVIDIA GPU and they are on cpu"),
        ({"onnx": ONNX, "precision": "fp8"}, {}, "precision: fp8 is for tensorrt, and the backend is openvino"),
        ({"onnx": ONNX, "cuda_graph": True}, {}, "cuda_graph: True means nothing to the openvino backend"),
        ({"onnx": ONNX, "backend": "openvino"}, {"device": "cuda:1"}, "in CPU memory and they are on cuda:1"),
        ({"num_threads": 2}, {"module": ConvNet()}, "num_threads: 2 means nothing to the pytorch backend"),
        ({"onnx": ONNX, "compile": True}, {}, "compile: True means nothing to the openvino backend"),
        ({"onnx": ONNX, "channels_last": False}, {}, "channels_last: False means nothing to the openvino backend"),
    ],
)
def test_invalid_combinations_are_config_errors(
    settings: dict[str, object], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_teacher(TeacherSettings(**settings), **{"image_shape": IMAGE_SHAPE, **arguments})


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "pytorch", "onnx": ONNX},
        {"backend": "pytorch", "num_threads": 2},
        {"backend": "openvino", "onnx": ONNX, "compile": True},
        {"backend": "onnxruntime", "onnx": ONNX, "channels_last": False},
        {"backend": "openvino", "engine": ENGINE},
        {"backend": "tensorrt", "onnx": ONNX, "num_threads": 2},
    ],
)
def test_unused_settings_are_refused(
    settings: dict[str, object],
) -> None:
    with pytest.raises(ValidationError, match=f"means nothing to the {settings['backend']} backend"):
        TeacherSettings(**settings)


def test_two_teacher_files_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"two teachers: onnx: teacher.onnx and engine: teacher.engine"):
        TeacherSettings(onnx=ONNX, engine=ENGINE)


@pytest.mark.parametrize("key", ["trust_engine", "trust_engines"])
def test_settings_trust_no_engine(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?s){key}\n.*not permitted"):
        TeacherSettings.model_validate({"engine": ENGINE, key: DIGEST})


@pytest.mark.parametrize(
    "settings",
    [
        TeacherSettings(engine=ENGINE),
        TeacherSettings(engine=ENGINE, backend="tensorrt"),
        EnsembleSettings(members=(TeacherSettings(engine=ENGINE),)),
    ],
)
def test_an_engine_is_trusted_by_the_caller(
    settings: TeacherSettings | EnsembleSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_engine(path: Path, *, trust_engines: Collection[str], **_settings: object) -> None:
        raise Opened(path, trust_engines)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "open_engine", open_engine)
    for arguments, trusted in (({}, ()), ({"trust_engines": [DIGEST]}, [DIGEST])):
        with pytest.raises(Opened) as caught:
            open_teacher(settings, device="cuda:0", **arguments)
        assert caught.value.args == (ENGINE, trusted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_config_error() -> None:
    for settings in (TeacherSettings(onnx=ONNX), TeacherSettings(engine=ENGINE)):
        with pytest.raises(ConfigError, match="the tensorrt backend needs cuda, and torch sees no GPU"):
            open_teacher(settings, device="cuda")
    with pytest.raises(ConfigError, match="the pytorch backend needs cuda:0, and torch sees no GPU"):
        open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE, device="cuda:0")


# On a GPU, which is only pretended here


class Opened(Exception):
    """The runtime that was opened, and how."""


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`pretend_gpu((9, 0), tensorrt=..., onnxruntime=...)`: a GPU, and why each runtime cannot be used there."""

    def make(capability: tuple[int, int], *, tensorrt: str | None = None, onnxruntime: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(opening, "why_unusable", lambda found: tensorrt)
        for module in (opening, runner):
            monkeypatch.setattr(module, "why_no_cuda", lambda: onnxruntime)

        def opened(name: str) -> Callable[..., None]:
            def runtime(*arguments: object, **settings: object) -> None:
                raise Opened(name, arguments, settings)

            return runtime

        monkeypatch.setattr(runner, "build_engine", opened("tensorrt"))
        monkeypatch.setattr(runner, "OnnxRuntimeTeacher", opened("onnxruntime"))

    return make


@pytest.mark.parametrize(
    ("tensorrt", "onnxruntime", "reason"),
    [
        (None, None, None),
        (None, "not installed", None),
        ("no support", None, None),
        ("no support", "for CPUs", "words"),
    ],
)
def test_exports_are_in_vain_where_no_runtime_runs_them(
    tensorrt: str | None, onnxruntime: str | None, reason: str | None, pretend_gpu: Callable[..., None]
) -> None:
    pretend_gpu((9, 0), tensorrt=tensorrt, onnxruntime=onnxruntime)
    found = why_no_onnx(torch.device("cuda", 0))
    assert (found is None) == (reason is None)
    if found is not None:
        assert "ONNX files on NVIDIA H100. TensorRT: no support. ONNX Runtime: for CPUs" in found
    assert why_no_onnx(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("tensorrt", "onnxruntime", "settings", "taken"),
    [
        (None, None, {}, "tensorrt"),
        (None, "not installed", {}, "tensorrt"),
        ("no support for 9.0", None, {}, "onnxruntime"),
        ("no support for 9.0", None, {"runtime": "tensorrt_rtx"}, "tensorrt"),
        (None, None, {"backend": "onnxruntime"}, "onnxruntime"),
    ],
)
def test_onnx_on_gpu_prefers_tensorrt(
    pretend_gpu: Callable[..., None],
    tensorrt: str | None,
    onnxruntime: str | None,
    settings: dict[str, object],
    taken: str,
) -> None:
    pretend_gpu((9, 0), tensorrt=tensorrt, onnxruntime=onnxruntime)
    with pytest.raises(Opened) as info:
        open_teacher(TeacherSettings(onnx=ONNX, **settings), device="cuda:0")
    assert info.value.args[0] == taken
    if taken == "onnxruntime":
        assert info.value.args[1:] == (
            (ONNX,),
            {"device": torch.device("cuda:0"), "precision": None, "max_batch": 1024, "num_threads": None},
        )


def test_onnx_on_gpu_without_runtime_lists_remedies(pretend_gpu: Callable[..., None]) -> None:
    pretend_gpu((9, 0), tensorrt="no support for 9.0", onnxruntime="pip install 'onnxruntime-gpu>=1.27'")
    with pytest.raises(ConfigError) as info:
        open_teacher(TeacherSettings(onnx=ONNX), device="cuda:0")
    assert str(info.value) == (
        f"no installed runtime runs {ONNX} on NVIDIA H100. TensorRT: no support for 9.0. ONNX Runtime: pip install "
        "'onnxruntime-gpu>=1.27'. Install one of them, or give the teacher as a network (teacher.model) or a module, "
        "which PyTorch runs"
    )
    with pytest.raises(ConfigError, match="the onnxruntime backend cannot use cuda:0: pip install"):
        open_teacher(TeacherSettings(onnx=ONNX, backend="onnxruntime"), device="cuda:0")


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_module_on_gpu_is_compiled_in_half_precision(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    pretend_gpu(capability)
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(
        runner, "PyTorchTeacher", lambda module, **settings: (asked.append(settings), open_module(module))[1]
    )

    def open_module(module: nn.Module) -> Teacher:
        return PyTorchTeacher(module, image_shape=IMAGE_SHAPE)

    options = {"module": ConvNet(), "image_shape": IMAGE_SHAPE, "device": "cuda:0"}
    wanted = {"precision": precision, "compile": True, "channels_last": True, "cuda_graph": False, "batch_size": 8}
    for settings, more, changes in [
        (TeacherSettings(), {"batch_size": 8}, {}),
        (TeacherSettings(), {}, {"batch_size": 2}),
        (TeacherSettings(precision="fp32", compile=False), {"batch_size": 8}, {"precision": "fp32", "compile": False}),
        (TeacherSettings(cuda_graph=True), {"batch_size": 8}, {"cuda_graph": True}),
    ]:
        with pytest.raises(TeacherError, match="reads from cpu"):  # the substitute is on the CPU
            open_teacher(settings, **options, **more)
        assert {name: asked[-1][name] for name in wanted} == {**wanted, **changes}


def test_failed_compile_falls_back_unless_requested(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu((9, 0))
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: lambda images: (_ for _ in ()).throw(RuntimeError("no C compiler"))
    )
    real = PyTorchTeacher
    monkeypatch.setattr(
        runner, "PyTorchTeacher", lambda module, **settings: real(module, **{**settings, "device": "cpu"})
    )
    options = {"module": ConvNet(), "image_shape": IMAGE_SHAPE, "device": "cuda:0", "batch_size": 4}
    with caplog.at_level(logging.WARNING, "kd_pipeline"), pytest.raises(TeacherError, match="reads from cpu"):
        open_teacher(TeacherSettings(), **options)
    (line,) = caplog.messages
    assert "torch.compile fails on the teacher, which runs without it" in line and "no C compiler" in line
    with pytest.raises(TeacherError, match="no C compiler"):
        open_teacher(TeacherSettings(compile=True), **options)


@pytest.mark.parametrize(("device", "batch_size"), [("cpu", 8), ("cuda:0", None)])
def test_cuda_graph_needs_gpu_and_batch_size(
    pretend_gpu: Callable[..., None], device: str, batch_size: int | None
) -> None:
    pretend_gpu((9, 0))
    with pytest.raises(ConfigError, match="cuda_graph needs a GPU and a fixed number of images"):
        open_teacher(
            TeacherSettings(cuda_graph=True),
            module=ConvNet(),
            image_shape=IMAGE_SHAPE,
            device=device,
            batch_size=batch_size,
        )


def test_ensemble_settings_open_ensemble(exported: Callable[[int], Path]) -> None:
    members = [TeacherSettings(backend="onnxruntime", onnx=exported(seed)) for seed in (0, 1)]
    with_weights = EnsembleSettings(members=members, weights=(3, 1), average="logits")
    images = random_images(4)
    found = open_teacher(with_weights, image_shape=IMAGE_SHAPE)(images)["logits"]
    first, second = (open_teacher(member)(images)["logits"] for member in members)
    torch.testing.assert_close(found, 0.75 * first + 0.25 * second)


def test_invalid_ensemble_is_refused(exported: Callable[[int], Path]) -> None:
    with pytest.raises(ValidationError, match="1 members and 2 weights"):
        EnsembleSettings(members=[TeacherSettings(onnx=ONNX)], weights=(1, 1))
    with pytest.raises(ConfigError, match="several teachers are opened from their settings, and got a module"):
        open_teacher(EnsembleSettings(members=[TeacherSettings(onnx=ONNX)]), module=ConvNet())
    with pytest.raises(TeacherError, match=r"teacher.onnx: there is no such file"):
        onnx = [exported(0), ONNX]
        open_teacher(EnsembleSettings(members=[TeacherSettings(backend="onnxruntime", onnx=each) for each in onnx]))


def test_settings_json_round_trip(exported: Callable[[int], Path]) -> None:
    for settings in (TeacherSettings(), TeacherSettings(backend="openvino", onnx=exported(0), num_threads=2)):
        assert TeacherSettings.model_validate_json(settings.model_dump_json()) == settings


def test_open_teacher_is_returned() -> None:
    teacher = open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE)
    assert open_teacher(teacher, image_shape=IMAGE_SHAPE) is teacher
    with pytest.raises(ConfigError, match="an open teacher and a module"):
        open_teacher(teacher, module=ConvNet())


def open_as_module(exported: Callable[[int], Path]) -> Teacher:
    return open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE)


def open_from_file(exported: Callable[[int], Path]) -> Teacher:
    return open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0)))


@pytest.mark.parametrize("opened", [open_as_module, open_from_file])
def test_wrong_images_are_refused_on_open(
    opened: Callable[[Callable[[int], Path]], Teacher], exported: Callable[[int], Path]
) -> None:
    teacher = opened(exported)
    with pytest.raises(TeacherError, match=r"takes images \[any, 3, 32, 32\] float32, got \[1, 3, 48, 48\]"):
        open_teacher(teacher, image_shape=(3, 48, 48))
    with pytest.raises(TeacherError, match=r"float32, got \[1, 3, 32, 32\] float16"):
        open_teacher(teacher, dtype=torch.float16)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(TeacherError, match=f"reads from cpu, the images are on {device}; "):
            open_teacher(teacher, device=device)


def test_file_for_other_images_is_refused(exported: Callable[[int], Path]) -> None:
    with pytest.raises(TeacherError, match=r"takes images \[any, 3, 32, 32\] float32, got \[1, 3, 48, 48\]"):
        open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0)), image_shape=(3, 48, 48))


@pytest.mark.slow
def test_missing_runtime_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "for name in ('openvino', 'onnxruntime', 'onnx', 'onnxscript', 'nvidia.dali'): sys.modules[name] = None\n"
        "import kd_pipeline\n"
        "from pathlib import Path\n"
        "from kd_pipeline.errors import MissingPackageError\n"
        "for backend in ('openvino', 'onnxruntime'):\n"
        "    try:\n"
        "        settings = kd_pipeline.TeacherSettings(backend=backend, onnx=Path('teacher.onnx'))\n"
        "        kd_pipeline.open_teacher(settings)\n"
        "    except MissingPackageError as exc:\n"
        "        assert backend in str(exc) and \"pip install 'kd_pipeline[cpu]'\" in str(exc), exc\n"
        "    else:\n"
        "        raise SystemExit(f'{backend} opened')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
