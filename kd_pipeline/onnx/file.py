"""The interface of an image classifier in ONNX: reads and validates a file before any runtime parses it."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError

__all__ = ["ADAPTER_KEY", "CLASSES_KEY", "OnnxFile", "read_onnx", "replace_onnx"]

CLASSES_KEY = "kd_pipeline.classes"
"""Metadata key of the class names, a JSON list in logit order."""
ADAPTER_KEY = "kd_pipeline.input_adapter"
"""Metadata key of the input adapter that is part of the graph, as JSON."""

_TORCH_DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16}
_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """An image classifier in ONNX: a dynamic batch of images in, logits and possibly features out."""

    path: Path
    """The file with symlinks resolved, so a runtime reads the external weights that were validated."""
    input_name: str
    images: TensorSpec
    """`[N, 3, H, W]`, float32 or float16; H and W are None if dynamic."""
    outputs: Mapping[str, TensorSpec]
    """Shape and dtype, float32 or float16, by the teacher's name of the output."""
    output_names: Mapping[str, str]
    """Name in the file by the teacher's name; they differ if a single output counts as `"logits"`."""
    precision: str
    """`"fp32"`, `"fp16"`, `"bf16"` or `"fp64"`: the dtype of most floating weights."""
    classes: tuple[str, ...] | None
    """Class names in logit order, if the file has them."""
    sha256: str
    """Hex digest of the file and all external weight files."""

    def fingerprint(self, backend: str, precision: str) -> str:
        """Digest of the content, the backend and its precision, which together determine the outputs."""
        return hashlib.sha256(f"{backend} {precision} {self.sha256}".encode()).hexdigest()


def read_onnx(path: Path) -> OnnxFile:
    """Read the inputs, outputs, precision, class names and digest of an ONNX file, without loading external weights.

    Raises:
        TeacherError: the file does not exist, is not ONNX, has weights outside its folder, or is not an image
            classifier with a dynamic batch; the message names the file.
        MissingPackageError: `onnx` is not installed.
    """
    if not path.is_file():
        raise TeacherError(f"{path}: there is no such file; give the path of an exported teacher")
    path = path.resolve()
    content = path.read_bytes()
    model = _parse(path, content)
    tensors = list(_tensors(model))
    digest = hashlib.sha256(content)
    for external in _external_files(path, tensors):
        with external.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())

    input_name, images = _read_input(path, model.graph)
    output_names, outputs = _read_outputs(path, model.graph)
    return OnnxFile(
        path=path,
        input_name=input_name,
        images=images,
        outputs=outputs,
        output_names=output_names,
        precision=_precision(tensors),
        classes=_read_classes(path, model, outputs["logits"].shape[1]),
        sha256=digest.hexdigest(),
    )


@contextmanager
def replace_onnx(target: Path) -> Iterator[Path]:
    """A temporary path to write an ONNX file to, which replaces `target` at the end of the `with`, unless it raises.

    External weights in the same folder are moved along, before the file. Missing folders are created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=target.parent) as folder:
        path = Path(folder, target.name)
        yield path
        for written in sorted(Path(folder).iterdir(), key=lambda written: written == path):
            os.replace(written, target.parent / written.name)


def _parse(path: Path, content: bytes) -> Any:
    onnx = require("onnx", extra="cpu")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as exc:  # protobuf's DecodeError, or what onnx converts it to
        raise TeacherError(
            f"{path} ({len(content)} bytes) is not a readable ONNX file: {exc}; export the teacher again"
        ) from exc
    if not model.graph.node:
        raise TeacherError(f"{path} ({len(content)} bytes) holds no ONNX graph; export the teacher again")
    return model


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors in a protobuf message: initializers, constants, those in subgraphs and functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if isinstance(value, Sequence) else (value,):
                yield from _tensors(child)


def _external_files(path: Path, tensors: Sequence[Any]) -> list[Path]:
    """The files with external weights, sorted, after checking that each exists and is in the model's folder."""
    files = set()
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (path.parent / location).resolve()
        if Path(location).is_absolute() or ".." in Path(location).parts or not file.is_relative_to(path.parent):
            raise TeacherError(
                f"{path}: the weights of {tensor.name!r} are in {location!r}; absolute paths, '..' and symlinks out of "
                "the model's folder are not allowed, keep external data next to the file"
            )
        if not file.is_file():
            raise TeacherError(
                f"{path}: the weights of {tensor.name!r} are in {location!r}, and there is no such file; copy the "
                "external data together with the model"
            )
        files.add(file)
    return sorted(files)


def _read_input(path: Path, graph: Any) -> tuple[str, TensorSpec]:
    weights = {tensor.name for tensor in graph.initializer}  # old files list weights among the inputs
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs)
        raise TeacherError(f"{path} takes {len(inputs)} inputs ({names}); a teacher takes only images")
    images = _spec(path, inputs[0])
    if len(images.shape) != 4 or images.shape[1] != 3:
        raise TeacherError(f"{path}: the input {inputs[0].name!r} is {images}; a teacher takes images [N, 3, H, W]")
    return inputs[0].name, images


def _read_outputs(path: Path, graph: Any) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    names = [value.name for value in graph.output]
    output_names = {"logits": names[0]} if len(names) == 1 else {name: name for name in names}
    if "logits" not in output_names:
        raise TeacherError(f"{path} returns {', '.join(map(repr, names))}; one of them must be named 'logits'")
    outputs = dict(zip(output_names, (_spec(path, value) for value in graph.output), strict=True))
    if len(outputs["logits"].shape) != 2:
        raise TeacherError(f"{path}: the logits {output_names['logits']!r} are {outputs['logits']}, expected [N, K]")
    return output_names, outputs


def _spec(path: Path, value: Any) -> TensorSpec:
    """Shape and dtype of an input or output; its first dimension must be a dynamic batch."""
    onnx = require("onnx", extra="cpu")
    tensor = value.type.tensor_type
    dtype_name = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if dtype_name not in _TORCH_DTYPES:
        raise TeacherError(
            f"{path}: {value.name!r} is a tensor of {dtype_name}; export the teacher with float32 or float16 "
            "inputs and outputs"
        )
    if not tensor.shape.dim:
        raise TeacherError(f"{path}: {value.name!r} has no shape; run onnx.shape_inference.infer_shapes on the file")
    # Exporters write a dynamic size as a name, as nothing or as -1.
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    spec = TensorSpec(shape, _TORCH_DTYPES[dtype_name])
    if shape[0] is not None:
        raise TeacherError(
            f"{path}: {value.name!r} is {spec}, a static batch of {shape[0]}; export the teacher with a dynamic batch, "
            "such as dynamic_shapes=({0: 'batch'},) in torch.onnx.export"
        )
    return spec


def _read_classes(path: Path, model: Any, num_classes: int | None) -> tuple[str, ...] | None:
    text = next((entry.value for entry in model.metadata_props if entry.key == CLASSES_KEY), None)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except json.JSONDecodeError as exc:
        raise TeacherError(f"{path}: the metadata {CLASSES_KEY} is not JSON ({exc}); export the teacher again") from exc
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TeacherError(f"{path}: the metadata {CLASSES_KEY} is not a list of names; export the teacher again")
    if num_classes not in (None, len(names)):
        raise TeacherError(f"{path} has {num_classes} logits and {len(names)} class names in {CLASSES_KEY}")
    return tuple(names)


def _precision(tensors: Sequence[Any]) -> str:
    """Precision of most floating weights by number of elements; some constants are always float32."""
    num_elements = dict.fromkeys(_PRECISIONS, 0)
    for tensor in tensors:
        dtype_name = tensor.DataType.Name(tensor.data_type)
        if dtype_name in num_elements:
            num_elements[dtype_name] += math.prod(tensor.dims)
    return _PRECISIONS[max(num_elements, key=lambda name: num_elements[name])]
