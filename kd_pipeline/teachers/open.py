"""Open the teacher that settings describe."""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, EngineError, MissingPackageError, TeacherError
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.onnxruntime import why_no_cuda
from kd_pipeline.teachers.open_on_cpu import open_on_cpu
from kd_pipeline.teachers.outputs_check import NUM_IMAGES, check_outputs
from kd_pipeline.teachers.runner import Inputs, Runner, ViewImages
from kd_pipeline.teachers.settings import (
    AnyTeacherSettings,
    EnsembleSettings,
    Runtime,
    StudentPrecision,
    TeacherGroupSettings,
    TeacherSettings,
    is_recording,
    refuse_unused,
)
from kd_pipeline.teachers.tensorrt.package import why_unusable

__all__ = ["open_teacher", "why_no_onnx"]

_logger = logging.getLogger("kd_pipeline")

_USUAL_NUM_IMAGES = 10_000
"""Images that a teacher will get, if nobody knows how many."""


def open_teacher(
    settings: AnyTeacherSettings | Teacher,
    *,
    module: nn.Module | None = None,
    image_shape: tuple[int | None, ...] | None = None,
    example: Mapping[str, Tensor] | Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    student_precision: StudentPrecision | None = None,
    num_images: int | None = None,
    calibration_images: Callable[[], Tensor] | None = None,
    calibration_key: str | None = None,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    normalization: Normalization | None = None,
    strict: bool = False,
    views: Mapping[str, ViewImages] | None = None,
) -> Teacher:
    """Open the teacher that `settings` describe, for images `[N, *image_shape]` of `dtype` on `device`.

    An open teacher is checked against these images and returned. With an `example`, the teacher takes inputs of any
    kind: vectors, sequences with masks, indices of tokens. PyTorch runs them all; the others run one input of fixed
    sizes.

    With `backend: auto` and `precision: auto`, what runs the teacher is decided here, on a few images; what was decided
    is kept in the user's cache, as are exports, and one line says what runs and why.

    Every teacher, and each of several, is run on a few generated images. It has to return a row for each.
    Outputs that change when it runs again, or with the rest of a batch, that are probabilities instead of logits, hold
    NaN, or are the same for all images become its `problems`, and a warning each.

    Args:
        settings: what to open, or an open teacher.
        module: the model, if the settings do not name one.
        image_shape: `(3, H, W)`, or the sizes of a row of another only input, such as `(100,)` for vectors; None is a
            free size, which PyTorch has. A module needs it or an example.
        example: real inputs with at least two rows: a tensor, or tensors by the names that the module takes them by.
            The sizes of vectors and images are fixed by it, others are free. The checks run on its rows.
        device: device of the images.
        dtype: float32 or float16; with an example, it is the example's.
        batch_size: usual number of images in one call; an engine built from an ONNX file is tuned for it.
        student_precision: in which the student trains; with `precision: auto` the teacher follows it.
        num_images: how many images the teacher will get, which decides whether an export pays off; defaults to 10,000.
        calibration_images: returns images `[N, 3, H, W]` float32 on the CPU, normalized for the teacher. Precisions and
            runtimes are compared on them, an engine built from an ONNX file is checked on them, and int8 and fp8 take
            their ranges from them. By default they are generated.
        calibration_key: digest of what these images depend on, by which a comparison is kept without loading them.
        plugins: modules that a model's `factory` may come from.
        trust_engines: sha256 of engines to load although somebody else could have written them, or they have no
            manifest. A config file is data and cannot grant this itself: pass what the user typed.
        normalization: of the images, for an `input_adapter`; defaults to ImageNet's. A warning is logged if a
            pretrained model was trained with a different one and has no adapter.
        strict: raise an error for what would be a warning about its outputs.
        views: the images of each view by name, for settings with a `view`: they replace `image_shape`, `dtype`,
            `normalization` and the calibration images for the teacher, or each of several, that sees this view.

    Raises:
        ConfigError: settings, module and device do not go together, or the settings are of a recording.
        TeacherError: the model cannot be opened, takes different images, returns more or fewer rows than images, or,
            if `strict`, has problems.
        MissingPackageError: the package of the backend is not installed.
    """
    if isinstance(example, Tensor):
        example = {"input": example}
    if example is not None and (floats := [each.dtype for each in example.values() if each.is_floating_point()]):
        dtype = floats[0]
    inputs = Inputs(
        image_shape,
        torch.device(device),
        dtype,
        batch_size,
        student_precision,
        _USUAL_NUM_IMAGES if num_images is None else num_images,
        calibration_images,
        calibration_key,
        plugins,
        trust_engines,
        normalization or Normalization(),
        strict,
        example,
        views or {},
    )
    match settings:
        case Teacher() if module is not None:
            raise ConfigError("got an open teacher and a module; give one of them")
        case TeacherSettings() if is_recording(settings):
            raise ConfigError(
                "backend: recorded has the outputs for the images of one training and runs on no others; give "
                "KDDataLoader a kd_pipeline.Recording(path) as its teacher"
                + ("" if module is None else ", or use backend: pytorch for the module")
            )
        case Teacher():
            inputs = inputs.of_view(settings.view)
            _check_fits(settings, inputs)
            _examine(settings, inputs)
            return settings
        case EnsembleSettings() | TeacherGroupSettings():
            return _open_several(settings, module, inputs)
        case _:
            return _open_checked(settings, module, inputs)


def _check_fits(teacher: Teacher, inputs: Inputs) -> None:
    if inputs.example is not None:
        teacher.check_takes({name: each[:1].to(teacher.device) for name, each in inputs.example.items()})
    if inputs.example is not None or len(teacher.inputs) > 1:
        return
    sizes = inputs.sizes or tuple(size or 1 for size in teacher.images.shape[1:])
    has_no_index = inputs.device.index is None and inputs.device.type == teacher.device.type  # "cuda" is any GPU
    teacher.check_fits((1, *sizes), inputs.dtype, teacher.device if has_no_index else inputs.device)


def _open_checked(
    settings: TeacherSettings, module: nn.Module | None, inputs: Inputs, *, name: str = "teacher"
) -> Teacher:
    """Open a single teacher, called `name` in the log, and check it on a few images."""
    inputs = inputs.of_view(settings.view)
    with ExitStack() as opened:
        teacher = _open(settings, module, inputs, name)
        opened.callback(teacher.close)
        teacher.view = settings.view
        if settings.outputs:
            teacher.keep_outputs(settings.outputs)
        _check_fits(teacher, inputs)
        # Each size that a TensorRT engine replays as a CUDA graph takes memory of its own.
        one_size = settings.cuda_graph and teacher.backend == "tensorrt"
        _examine(teacher, inputs, one_size=one_size, name=name)
        opened.pop_all()
        return teacher


def _examine(teacher: Teacher, inputs: Inputs, *, one_size: bool = False, name: str = "teacher") -> None:
    """Run `teacher` on a few images, and log what is wrong with its outputs."""
    if inputs.example is None and len(teacher.inputs) > 1:
        _logger.info("%s: its outputs are not checked, for lack of an example of its inputs", name)
        return
    teacher.problems = check_outputs(
        teacher,
        image_shape=inputs.sizes,
        example=inputs.example,
        normalization=inputs.normalization,
        num_images=(inputs.batch_size or teacher.max_batch) if one_size else NUM_IMAGES,
        also_alone=not one_size,
    )
    if teacher.problems and inputs.strict:
        raise TeacherError(
            f"{'. '.join(teacher.problems)}. Correct it, or open it anyway with "
            "strict=False (in a config: probe.strict: false)"
        )
    for problem in teacher.problems:
        _logger.warning("%s%s", "" if name == "teacher" else f"{name}: ", problem)


def _open_several(
    settings: EnsembleSettings | TeacherGroupSettings, module: nn.Module | None, inputs: Inputs
) -> Teacher:
    if module is not None:
        raise ConfigError("several teachers are opened from their settings, and got a module; leave it out")
    named: Mapping[str, TeacherSettings]
    if isinstance(settings, TeacherGroupSettings):
        named = settings.members
    else:
        named = {str(number): member for number, member in enumerate(settings.members)}
    with ExitStack() as opened:
        members = {}
        for name, member in named.items():
            try:
                members[name] = _open_checked(member, None, inputs, name=f"member {name}")
            except (ConfigError, MissingPackageError, TeacherError) as exc:
                raise type(exc)(f"member {name}: {exc}") from exc
            opened.callback(members[name].close)
        several: Teacher
        if isinstance(settings, TeacherGroupSettings):
            several = TeacherGroup(members)
        else:
            several = EnsembleTeacher([*members.values()], weights=settings.weights, average=settings.average)
        opened.pop_all()
        return several


def _open(settings: TeacherSettings, module: nn.Module | None, inputs: Inputs, name: str) -> Teacher:
    backend, reason = _choose(settings, module, inputs.device)
    refuse_unused(settings, backend)
    if backend != "openvino" and inputs.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the {backend} backend needs {inputs.device}, and torch sees no GPU; see kd-pipeline doctor")
    runner = Runner(settings, module, inputs)
    if inputs.device.type == "cpu" and backend in ("pytorch", "openvino"):
        teacher, reason = open_on_cpu(runner, backend, reason)
    elif backend == "tensorrt" and settings.engine is None and settings.precision == "auto":
        teacher, reason = _open_engine_as_student(runner, reason)
    else:
        teacher = runner.open(Runtime(backend=backend, precision=_default_precision(settings, backend, inputs)))
    _logger.info("%s: %s in %s on %s, %s", name, teacher.backend, teacher.precision, teacher.device, reason)
    return teacher


def _default_precision(settings: TeacherSettings, backend: str, inputs: Inputs) -> str:
    """The precision of the settings, or where nothing is compared that of the file, and on a GPU half precision."""
    if settings.precision != "auto":
        return settings.precision
    if backend != "pytorch":
        return "own"
    return _half_precision(inputs.device) if inputs.device.type == "cuda" else "fp32"


def _half_precision(device: torch.device) -> Literal["bf16", "fp16"]:
    """The precision of the GPU's fastest units, with bfloat16's range if it has it."""
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _open_engine_as_student(runner: Runner, reason: str) -> tuple[Teacher, str]:
    """An engine in the student's precision, or in float32 if the GPU lacks it or the build finds it too far off."""
    student = runner.inputs.student_precision
    if student in (None, "fp32"):
        return runner.open(Runtime(backend="tensorrt", precision="fp32")), reason
    assert student is not None
    if student == "bf16" and _half_precision(runner.inputs.device) != "bf16":
        why = "as this GPU has no bf16, in which the student trains"
    else:
        try:
            runtime = Runtime(backend="tensorrt", precision=student)
            return runner.open(runtime), f"as the student trains in {student}; {reason}"
        except EngineError as exc:
            why = f"as {student}, in which the student trains, does not work: {exc}"
    return runner.open(Runtime(backend="tensorrt", precision="fp32")), why


def _choose(settings: TeacherSettings, module: nn.Module | None, device: torch.device) -> tuple[str, str]:
    """The backend, and the reason for it."""
    named = settings.onnx or settings.engine or settings.model
    if module is None and named is None:
        raise ConfigError(
            "no teacher to open: set onnx to an exported file, engine to a built one or model to a network, or pass a "
            "module"
        )
    if module is not None and named is not None:
        raise ConfigError(f"two teachers to open: a module and {named}; give one of them")
    if settings.backend != "auto":
        return settings.backend, "as the settings ask"
    if settings.precision == "int8" and device.type == "cpu" and (module is not None or settings.model is not None):
        return "openvino", "because PyTorch has no int8"
    for given, backend, kind in (
        (module, "pytorch", "a module"),
        (settings.model, "pytorch", "a model by name"),
        (settings.engine, "tensorrt", "an engine"),
    ):
        if given is not None:
            return backend, f"because the teacher is {kind}"
    if device.type == "cuda":
        return _choose_on_gpu(settings, device)
    return "openvino", "because the teacher is an ONNX file and the images are on the CPU"


def _choose_on_gpu(settings: TeacherSettings, device: torch.device) -> tuple[str, str]:
    """The backend of an ONNX file on a GPU, and the reason for it."""
    no_tensorrt = None
    if settings.runtime == "auto" and torch.cuda.is_available():
        no_tensorrt = why_unusable(torch.cuda.get_device_capability(device))
    if no_tensorrt is None:
        return "tensorrt", "because the teacher is an ONNX file and the images are on a GPU"
    if (no_onnxruntime := why_no_cuda()) is None:
        return "onnxruntime", f"because the teacher is an ONNX file and no TensorRT runs on this GPU ({no_tensorrt})"
    raise ConfigError(
        f"{_no_runtime(settings.onnx, device, no_tensorrt, no_onnxruntime)}. Install one of them, or give the teacher "
        "as a network (teacher.model) or a module, which PyTorch runs"
    )


def why_no_onnx(device: torch.device) -> str | None:
    """Why no installed runtime runs ONNX files on `device`, so an export is in vain; None if one may."""
    if device.type != "cuda":
        return None
    no_tensorrt = why_unusable(torch.cuda.get_device_capability(device))
    if no_tensorrt is None or (no_onnxruntime := why_no_cuda()) is None:
        return None
    return _no_runtime("ONNX files", device, no_tensorrt, no_onnxruntime)


def _no_runtime(what: object, device: torch.device, no_tensorrt: str, no_onnxruntime: str) -> str:
    return (
        f"no installed runtime runs {what} on {torch.cuda.get_device_name(device)}. TensorRT: {no_tensorrt}. "
        f"ONNX Runtime: {no_onnxruntime}"
    )
