"""Load a trusted engine file with TensorRT, and check its inputs, outputs and profiles."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.files import check_trusted_folder, read_trusted
from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.file import own_names
from kd_pipeline.teachers.tensorrt.manifest import EngineFile, Profile, TensorIO
from kd_pipeline.teachers.tensorrt.package import TensorRT, open_tensorrt

__all__ = ["LoadedEngine", "load_engine"]

_logger = logging.getLogger("kd_pipeline")

_MAX_KERNELS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that TensorRT accepted and that matches its manifest."""

    tensorrt: TensorRT
    image: TensorIO
    outputs: dict[str, TensorIO]
    """By the teacher's name for the output."""
    profiles: tuple[Profile, ...]
    _runtime: Any
    _engine: Any
    _rtx: "_RtxConfig | None"

    def create_context(self) -> Any:
        """Make a TensorRT execution context, without a profile yet.

        Raises:
            EngineError: TensorRT cannot make one.
        """
        arguments = [] if self._rtx is None else [self._rtx.config]
        context = self._engine.create_execution_context(*arguments)
        return self.tensorrt.check(context, "TensorRT cannot make an execution context")

    def save_kernels(self) -> None:
        """Write the kernels that TensorRT-RTX compiled for this GPU to `<engine>.rtxcache`, to load them next time."""
        if self._rtx is not None:
            self._rtx.save()


def load_engine(
    file: EngineFile, *, runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto", cuda_graph: bool = False
) -> LoadedEngine:
    """Load an engine on the current GPU.

    Args:
        file: the engine; without a manifest its outputs are named as those of an ONNX file.
        runtime: which TensorRT to use; `auto` is the manifest's.
        cuda_graph: let TensorRT-RTX run the engine as CUDA graphs.

    Raises:
        EngineError: TensorRT rejects the engine, it is no teacher, or it does not match its manifest.
        MissingPackageError: TensorRT is not installed.
    """
    tensorrt = _open_tensorrt(file, runtime)
    loader, engine = _deserialize(tensorrt, file)
    image, outputs, profiles = _read_io(tensorrt, engine, file)
    is_rtx = tensorrt.runtime == "tensorrt_rtx"
    rtx = _RtxConfig(tensorrt, engine, file.path, cuda_graph=cuda_graph) if is_rtx else None
    return LoadedEngine(tensorrt, image, outputs, profiles, loader, engine, rtx)


class _RtxConfig:
    """How TensorRT-RTX runs an engine, and its kernels for this GPU, which are cached in `<engine>.rtxcache`."""

    def __init__(self, tensorrt: TensorRT, engine: Any, path: Path, *, cuda_graph: bool) -> None:
        self.config = tensorrt.check(engine.create_runtime_config(), "TensorRT-RTX cannot make a runtime config")
        if cuda_graph:
            self.config.cuda_graph_strategy = tensorrt.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._path = path.with_name(f"{path.name}.rtxcache")
        self._cache = tensorrt.check(self.config.create_runtime_cache(), "TensorRT-RTX cannot make a runtime cache")
        content = _read_kernels(self._path)
        if content is not None and not self._cache.deserialize(content):
            _logger.info("%s is from a different TensorRT, GPU or driver; its kernels are compiled again", self._path)
        tensorrt.check(self.config.set_runtime_cache(self._cache), "TensorRT-RTX refuses its runtime cache")

    def save(self) -> None:
        """Write the compiled kernels beside the engine; if that fails, they are compiled again next time."""
        try:
            check_trusted_folder(self._path.parent)  # else they would not be read
            write_atomic(self._path, bytes(self._cache.serialize()), permissions=0o600)
        except (OSError, TypeError) as exc:
            _logger.warning("the kernels of TensorRT-RTX could not be saved in %s: %s", self._path, exc)


def _open_tensorrt(file: EngineFile, runtime: Literal["auto", "tensorrt", "tensorrt_rtx"]) -> TensorRT:
    manifest = file.manifest
    if manifest is None:
        return open_tensorrt(runtime)
    if runtime not in ("auto", manifest.runtime):
        raise EngineError(
            f"{file.path} was built by {manifest.runtime}, and the settings ask for {runtime}; set the teacher's "
            f"runtime to {manifest.runtime}, or build it again: {manifest.command}"
        )
    return open_tensorrt(manifest.runtime)


def _deserialize(tensorrt: TensorRT, file: EngineFile) -> tuple[Any, Any]:
    """TensorRT's runtime, and its engine for the content of the file."""
    tensorrt.take_errors()  # drop earlier ones
    command = "kd-pipeline build-engine" if file.manifest is None else file.manifest.command
    does_not_run = f"{file.path} does not run on {tensorrt.runtime} {tensorrt.version}, build it again here: {command}"
    runtime = tensorrt.module.Runtime(tensorrt.logger)
    runtime.engine_host_code_allowed = False
    if hasattr(runtime, "get_engine_validity"):  # only TensorRT-RTX can tell in advance
        validity, diagnostics = runtime.get_engine_validity(file.content)
        if validity == tensorrt.module.EngineValidity.INVALID:
            kinds = tensorrt.module.EngineInvalidityDiagnostics.__members__.items()
            found = [name.lower().replace("_", " ") for name, kind in kinds if diagnostics & int(kind)]
            reasons = [*found, *filter(None, [tensorrt.take_errors()])]
            raise EngineError(f"{does_not_run}: {', '.join(reasons) or 'it gives no reason'}")
    return runtime, tensorrt.check(runtime.deserialize_cuda_engine(file.content), does_not_run)


def _read_io(
    tensorrt: TensorRT, engine: Any, file: EngineFile
) -> tuple[TensorIO, dict[str, TensorIO], tuple[Profile, ...]]:
    """Read input, outputs and profiles of the engine, and check them against its manifest."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.module.TensorIOMode.INPUT]
    if len(inputs) != 1:
        found_names = printable(", ".join(inputs))
        raise EngineError(f"{file.path} takes {len(inputs)} inputs ({found_names}); a teacher takes images alone")
    image = _tensor_io(tensorrt, engine, file, inputs[0])
    if len(image.shape) != 4 or image.shape[1] != 3:
        raise EngineError(f"{file.path}: the input is {image}; a teacher takes images [N, 3, H, W]")
    outputs = _named(file, [_tensor_io(tensorrt, engine, file, name) for name in names if name != image.name])
    profiles = []
    for index in range(engine.num_optimization_profiles):
        least, best, most = (shape[0] for shape in engine.get_tensor_profile_shape(image.name, index))
        profiles.append(Profile(min=least, opt=best, max=most))
    found = {"image": image, "outputs": outputs, "profiles": tuple(profiles)}
    for name, value in found.items():
        if file.manifest is not None and value != getattr(file.manifest, name):
            raise EngineError(
                f"{file.path}: {name}: found {_shown(value)} in the engine and "
                f"{_shown(getattr(file.manifest, name))} in its manifest; build it again: {file.manifest.command}"
            )
    return image, outputs, tuple(profiles)


def _tensor_io(tensorrt: TensorRT, engine: Any, file: EngineFile, name: str) -> TensorIO:
    module = tensorrt.module
    dtypes: dict[Any, Literal["float32", "float16"]]
    dtypes = {module.DataType.FLOAT: "float32", module.DataType.HALF: "float16"}
    shape = tuple(engine.get_tensor_shape(name))
    dtype, layout = engine.get_tensor_dtype(name), engine.get_tensor_format(name)
    if dtype not in dtypes or layout != module.TensorFormat.LINEAR or len(shape) < 2 or min(shape[1:]) < 1:
        raise EngineError(
            f"{file.path}: {name!r} is {list(shape)} of {dtype} in {layout}; a teacher's inputs and outputs are dense "
            "float32 or float16 tensors of which only the batch varies: build the engine from such an ONNX file"
        )
    return TensorIO(name=name, shape=(None, *shape[1:]), dtype=dtypes[dtype])


def _named(file: EngineFile, outputs: list[TensorIO]) -> dict[str, TensorIO]:
    """The outputs by the teacher's names for them, with the prefix tokens that the manifest knows."""
    by_name = {output.name: output for output in outputs}
    if file.manifest is None:
        named = own_names({name: len(output.shape) for name, output in by_name.items()})
        found = {name: by_name[own] for name, own in named.items()}
    else:
        wanted = file.manifest.outputs
        if not by_name or sorted(each.name for each in wanted.values()) != sorted(by_name):
            found_names, wanted_names = ", ".join(by_name) or "none", ", ".join(each.name for each in wanted.values())
            raise EngineError(
                printable(f"{file.path}: found the outputs {found_names}, wanted {wanted_names}; build it again")
            )
        found = {name: _with_prefix(by_name[each.name], each) for name, each in wanted.items()}
    if not found:
        raise EngineError(f"{file.path} has no outputs; build it again")
    if "logits" in found and len(found["logits"].shape) not in (2, 4):
        raise EngineError(f"{file.path}: the logits are {found['logits']}, wanted [N, K] or [N, K, h, w]")
    return found


def _with_prefix(found: TensorIO, wanted: TensorIO) -> TensorIO:
    return found.model_copy(update={"num_prefix_tokens": wanted.num_prefix_tokens})


def _shown(value: object) -> str:
    match value:
        case TensorIO():
            return f"{value.name!r} {value}"
        case dict():
            return ", ".join(f"{printable(name)}: {_shown(each)}" for name, each in value.items())
    return str(value)


def _read_kernels(path: Path) -> bytes | None:
    """The kernels that were saved; None if there are none or somebody else could have written these programs."""
    try:
        return read_trusted(path, max_bytes=_MAX_KERNELS_BYTES)
    except FileNotFoundError:
        pass
    except OSError as exc:
        _logger.warning("the kernels in %s are not used, and are compiled again: %s", path, exc.strerror)
    return None
