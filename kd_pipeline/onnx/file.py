"""The interface of a teacher in ONNX: reads and validates a file before any runtime parses it."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.text import printable
from kd_pipeline.errors import TeacherError
from kd_pipeline.models.backbone import POOLED
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.outline import CHUNK, MAX_BYTES, Outline, OutlineError, read_outline
from kd_pipeline.onnx.weights import (
    MAX_DIMS,
    Ranges,
    all_tensors,
    dtype_name,
    external_ranges,
    open_external,
    quoted,
    read_ranges,
)

__all__ = [
    "ADAPTER_KEY",
    "CLASSES_KEY",
    "OUTPUTS_KEY",
    "OnnxFile",
    "outputs_metadata",
    "own_names",
    "read_onnx",
    "replace_onnx",
]

CLASSES_KEY = "kd_pipeline.classes"
"""Metadata key of the class names, a JSON list in logit order."""
OUTPUTS_KEY = "kd_pipeline.outputs"
"""Metadata key of the outputs that have the teacher's names: a JSON object with the number of prefix tokens of each, or
null."""
ADAPTER_KEY = "kd_pipeline.input_adapter"
"""Metadata key of the input adapter that is part of the graph, as JSON."""

_MAX_METADATA = 2**23
"""Characters of JSON in the metadata; a list of them takes up to 20 times as much memory."""
_MAX_VALUES = 2**28
"""Values of an image or an output, 1 GiB in float32."""
_MAX_VERSION = 1000
"""Of operators that are not ONNX's own, such as com.microsoft's."""
_MAX_NAME = 200
_MAX_SHOWN = 10
"""Names in a message."""
_TORCH_DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16}
_QUANTIZED = ("INT8", "UINT8", "INT4", "UINT4")
_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A teacher in ONNX: a dynamic batch of images in, vectors, maps and tokens by name out."""

    path: Path
    """The file with symlinks resolved. A runtime gets a `private_copy`, as others may change the file."""
    input_name: str
    images: TensorSpec
    """`[N, 3, H, W]`, float32 or float16; H and W are None if dynamic."""
    outputs: Mapping[str, TensorSpec]
    """Shape, dtype (float32 or float16) and prefix tokens, by the teacher's name of the output."""
    output_names: Mapping[str, str]
    """Name in the file by the teacher's name; they differ if a single vector counts as `"logits"`."""
    precision: str
    """`"fp32"`, `"fp16"`, `"bf16"` or `"fp64"`: the dtype of most floating weights."""
    num_parameters: int
    """Elements of the initializers with weights, in floating point or of up to 8 bits, without running statistics."""
    opset: int
    classes: tuple[str, ...] | None
    """Class names in logit order, if the file has them; never without logits."""
    input_adapter: InputAdapter | None
    """The adapter that is part of the graph, if the file names one."""
    external: Mapping[str, Ranges]
    """The parts of other files that hold weights, by location in the model's folder."""
    sha256: str
    """Hex digest of the file and of all external weights."""

    def fingerprint(self, backend: str, precision: str) -> str:
        """Digest of the content, the backend and its precision, which together determine the outputs."""
        return hashlib.sha256(f"{backend} {precision} {self.sha256}".encode()).hexdigest()

    @contextmanager
    def private_copy(self) -> Iterator[Path]:
        """A copy of the file and of its external weights that only this user can change, for a runtime to read.

        It has the content of `sha256`, even if somebody writes to the file meanwhile.

        Raises:
            TeacherError: the file is another one by now, or cannot be read or copied.
        """
        with tempfile.TemporaryDirectory(prefix="kd-pipeline-") as folder:
            copy = Path(folder, self.path.name)
            try:
                digest = _copy_model(self.path, copy)
                _add_external(digest, self.path, self.external, copy.parent)
            except OSError as exc:
                raise TeacherError(
                    f"{self.path} cannot be copied to {folder}, where a runtime reads it: {exc.strerror or exc}; free "
                    "disk space there, or set TMPDIR to another folder"
                ) from exc
            if digest.hexdigest() != self.sha256:
                raise TeacherError(
                    f"{self.path} was changed while it was opened; open it again when it no longer changes"
                )
            yield copy


def read_onnx(path: Path) -> OnnxFile:
    """Read the inputs, outputs, precision, class names and digest of an ONNX file, with its weights only hashed.

    External weights are in the model's folder or below, and no link leads to them; a hard link is a file like others.

    Raises:
        TeacherError: the file does not exist, is not ONNX, has weights outside its folder or other ones than its
            tensors need, or is no network for a dynamic batch of images; the message names the file.
        MissingPackageError: `onnx` is not installed.
    """
    path, outline = _read_outline(path)
    model = outline.model
    _check_opsets(path, model)
    tensors = list(all_tensors(path, model))
    external = external_ranges(path, outline, tensors)
    _add_external(outline.sha256, path, external)
    input_name, images = _read_input(path, model.graph)
    output_names, outputs = _read_outputs(path, model)
    return OnnxFile(
        path=path,
        input_name=input_name,
        images=images,
        outputs=outputs,
        output_names=output_names,
        precision=_precision(tensors),
        num_parameters=_num_parameters(model.graph),
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        classes=_read_classes(path, model, outputs.get("logits")),
        input_adapter=_read_adapter(path, model),
        external=external,
        sha256=outline.sha256.hexdigest(),
    )


def own_names(ranks: Mapping[str, int]) -> dict[str, str]:
    """The names of a network's outputs by the teacher's names for them.

    They are the same, but for a single vector, which counts as `"logits"` unless it is called `"pooled"`.

    Args:
        ranks: number of dimensions by the network's own name.
    """
    if len(ranks) == 1:
        ((name, rank),) = ranks.items()
        if rank == 2 and name != POOLED:
            return {"logits": name}
    return {name: name for name in ranks}


def outputs_metadata(num_prefix_tokens: Mapping[str, int | None]) -> str:
    """The metadata `OUTPUTS_KEY` for outputs whose names are the teacher's."""
    return json.dumps(dict(num_prefix_tokens))


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


def _read_outline(path: Path) -> tuple[Path, Outline]:
    """The path with links resolved, and the file without its weights."""
    num_bytes = 0
    try:
        path = path.resolve()
        with open_regular(path, max_bytes=MAX_BYTES) as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            outline = read_outline(stream, num_bytes)
    except FileNotFoundError as exc:
        raise TeacherError(f"{path}: there is no such file; give the path of an exported teacher") from exc
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of links
        reason = getattr(exc, "strerror", None) or exc
        raise TeacherError(f"{path} cannot be read: {reason}; give the path of an exported teacher") from exc
    except OutlineError as exc:
        raise TeacherError(
            f"{path} ({num_bytes} bytes) is not a readable ONNX file: {exc}; export the teacher again"
        ) from exc
    if not outline.model.graph.node:
        raise TeacherError(f"{path} ({num_bytes} bytes) holds no ONNX graph; export the teacher again")
    return path, outline


def _copy_model(path: Path, copy: Path) -> Any:
    """Copy the model alone: the digest object of what was copied."""
    digest = hashlib.sha256()
    with open_regular(path, max_bytes=MAX_BYTES) as stream, copy.open("wb") as target:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest


def _add_external(digest: Any, path: Path, external: Mapping[str, Ranges], folder: Path | None = None) -> None:
    """Add the external weights of the model `path` to `digest`, and copy them to `folder` if one is given."""
    for location, ranges in external.items():
        part = hashlib.sha256()
        with nullcontext() if folder is None else _create(folder / location) as copy:
            for position, chunk in _external_chunks(path, location, ranges):
                part.update(chunk)
                if copy is not None:
                    copy.seek(position)
                    copy.write(chunk)
        digest.update(part.digest())


def _create(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _external_chunks(path: Path, location: str, ranges: Ranges) -> Iterator[tuple[int, bytes]]:
    try:
        with open_external(path, location) as stream:
            yield from read_ranges(stream, ranges)
    except FileNotFoundError as exc:
        raise TeacherError(
            f"{path} has weights in {quoted(location)}, and there is no such file; copy the external data together "
            "with the model"
        ) from exc
    except OSError as exc:
        raise TeacherError(
            f"{path} has weights in {quoted(location)}, which cannot be read: {exc.strerror or exc}; copy the external "
            "data together with the model"
        ) from exc


def _check_opsets(path: Path, model: Any) -> None:
    """Refuse versions of operators that nobody has; OpenVINO counts from the newest that it knows to the named one."""
    if len([entry for entry in model.opset_import if entry.domain == ""]) != 1:
        raise TeacherError(f"{path} does not say once which version of ONNX's operators it uses; export it again")
    known = require("onnx", extra="cpu").defs.onnx_opset_version()
    for entry in (*model.opset_import, *(entry for function in model.functions for entry in function.opset_import)):
        if not 1 <= entry.version <= (known if entry.domain in ("", "ai.onnx") else _MAX_VERSION):
            raise TeacherError(
                f"{path} uses opset {entry.version} of {printable(entry.domain)[:_MAX_NAME] or 'ai.onnx'}, and the "
                f"installed onnx knows opset {known}; install a newer onnx, or export the teacher with an earlier opset"
            )


def _read_input(path: Path, graph: Any) -> tuple[str, TensorSpec]:
    weights = {tensor.name for tensor in graph.initializer}  # old files list weights among the inputs
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise TeacherError(
            f"{path} takes {len(inputs)} inputs ({_names(value.name for value in inputs)}), and a file has one; "
            "open the module itself for several (backend: pytorch)"
        )
    images = _spec(path, inputs[0])
    is_nhwc = len(images.shape) == 4 and images.shape[1] != 3 and images.shape[3] == 3
    if len(images.shape) < 2 or is_nhwc:
        raise TeacherError(
            f"{path}: the input {quoted(inputs[0].name)} is {images}; a teacher takes images [N, 3, H, W], or rows of "
            "another shape [N, ...]"
        )
    return inputs[0].name, images


def _read_outputs(path: Path, model: Any) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    values = {value.name: value for value in model.graph.output}
    if not values or len(values) != len(model.graph.output):
        names = _names(value.name for value in model.graph.output)
        raise TeacherError(
            f"{path} returns {names or 'nothing'}; export the teacher with at least one output, each with a name of "
            "its own"
        )
    specs = {name: _spec(path, value) for name, value in values.items()}
    known = _read_num_prefix_tokens(path, model, specs)
    by_name = own_names({name: len(spec.shape) for name, spec in specs.items()})
    if not known.keys().isdisjoint(by_name.values()):  # what has the teacher's name keeps it
        by_name = {name: name for name in specs}
    outputs = {name: replace(specs[own], num_prefix_tokens=known.get(own)) for name, own in by_name.items()}
    if "logits" in outputs and len(outputs["logits"].shape) not in (2, 4):
        raise TeacherError(
            f"{path}: the logits {quoted(by_name['logits'])} are {outputs['logits']}, expected [N, K] or [N, K, h, w]; "
            "export them as such, or give this output another name"
        )
    return by_name, outputs


def _read_num_prefix_tokens(path: Path, model: Any, specs: Mapping[str, TensorSpec]) -> dict[str, int | None]:
    """The number of prefix tokens of each output that the metadata lists."""
    text = _metadata(path, model, OUTPUTS_KEY)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:  # ValueError: not JSON, or a number of thousands of digits
        raise TeacherError(f"{path}: the metadata {OUTPUTS_KEY} is not JSON ({exc}); export the teacher again") from exc
    if not isinstance(found, dict):
        raise TeacherError(
            f"{path}: the metadata {OUTPUTS_KEY} is no object with a number for each output; export the teacher again"
        )
    for name, number in found.items():
        spec = specs.get(name)
        if spec is None:
            raise TeacherError(
                f"{path}: the metadata {OUTPUTS_KEY} has {quoted(name)}, and the outputs are {_names(specs)}; export "
                "the teacher again"
            )
        if number is not None and (reason := _why_no_prefix(number, spec)):
            raise TeacherError(
                f"{path}: {quoted(name)} is {spec} and has, by the metadata {OUTPUTS_KEY}, {reason}; export the "
                "teacher again"
            )
    return found


def _why_no_prefix(number: object, spec: TensorSpec) -> str:
    """What is wrong with `number` prefix tokens of an output; empty if they fit."""
    if type(number) is not int:  # a bool is an int
        return f"a number of prefix tokens that is {type(number).__name__}"
    if not 0 <= number <= _MAX_VALUES:
        return f"a number of prefix tokens that is {'negative' if number < 0 else 'too large'}"
    if len(spec.shape) != 3:
        return f"{number} prefix tokens, which only tokens [N, L, D] have"
    length = spec.shape[1]
    return f"{number} prefix tokens" if length is not None and number >= length else ""


def _spec(path: Path, value: Any) -> TensorSpec:
    """Shape and dtype of an input or output; its first dimension must be a dynamic batch."""
    tensor, name = value.type.tensor_type, quoted(value.name)
    if not value.name.isprintable() or len(value.name) > _MAX_NAME:
        raise TeacherError(f"{path}: {name} is no name to print, or too long; export the teacher with others")
    dtype = dtype_name(tensor.elem_type)
    if dtype not in _TORCH_DTYPES:
        raise TeacherError(
            f"{path}: {name} is a tensor of {dtype}; export the teacher with float32 or float16 inputs and outputs"
        )
    if not 0 < len(tensor.shape.dim) <= MAX_DIMS:
        reason = f"{len(tensor.shape.dim)} dimensions" if tensor.shape.dim else "no shape"
        raise TeacherError(f"{path}: {name} has {reason}; run onnx.shape_inference.infer_shapes on the file")
    # Exporters write a dynamic size as a name, as nothing or as -1.
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    spec = TensorSpec(shape, _TORCH_DTYPES[dtype])
    if shape[0] is not None:
        raise TeacherError(
            f"{path}: {name} is {spec}, a static batch of {shape[0]}; export the teacher with a dynamic batch, "
            "such as dynamic_shapes=({0: 'batch'},) in torch.onnx.export"
        )
    if math.prod(size or 1 for size in shape) > _MAX_VALUES:
        raise TeacherError(f"{path}: {name} is {spec}, more than {_MAX_VALUES} values for an image; export it again")
    return spec


def _names(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(map(quoted, names[:_MAX_SHOWN]))
    return shown if len(names) <= _MAX_SHOWN else f"{shown} and {len(names) - _MAX_SHOWN} more"


def _read_classes(path: Path, model: Any, logits: TensorSpec | None) -> tuple[str, ...] | None:
    text = _metadata(path, model, CLASSES_KEY)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as exc:  # ValueError: not JSON, or a number of thousands of digits
        raise TeacherError(
            f"{path}: the metadata {CLASSES_KEY} is not JSON of names ({exc}); export the teacher again"
        ) from exc
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_text(name) for name in names):
        raise TeacherError(f"{path}: the metadata {CLASSES_KEY} is not a list of names; export the teacher again")
    if logits is None:
        raise TeacherError(
            f"{path} has class names in {CLASSES_KEY} and no output 'logits' [N, K]; export the teacher again, without "
            "classes or with its logits"
        )
    num_classes = logits.shape[1]
    if num_classes not in (None, len(names)):
        raise TeacherError(f"{path} has {num_classes} logits and {len(names)} class names in {CLASSES_KEY}")
    return tuple(names)


def _read_adapter(path: Path, model: Any) -> InputAdapter | None:
    text = _metadata(path, model, ADAPTER_KEY)
    try:
        return None if text is None else InputAdapter.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{quoted(str(part))}: " for part in first["loc"])
        raise TeacherError(
            f"{path}: the metadata {ADAPTER_KEY} is no input adapter: {where}{first['msg']}; export the teacher again"
        ) from exc


def _metadata(path: Path, model: Any, key: str) -> str | None:
    """The value of `key`, if there is one."""
    texts = [entry.value for entry in model.metadata_props if entry.key == key]
    if len(texts) > 1 or any(len(text) > _MAX_METADATA for text in texts):
        reason = "twice" if len(texts) > 1 else f"with more than {_MAX_METADATA} characters"
        raise TeacherError(f"{path} has the metadata {key} {reason}; export the teacher again")
    return texts[0] if texts else None


def _is_text(name: str) -> bool:
    """Whether the name is UTF-8; an escape in JSON can be half of a character."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _precision(tensors: Sequence[Any]) -> str:
    """Precision of most floating weights by number of elements; some constants are always float32."""
    num_elements = dict.fromkeys(_PRECISIONS, 0)
    for tensor in tensors:
        name = dtype_name(tensor.data_type)
        if name in num_elements:
            num_elements[name] += math.prod(tensor.dims)
    return _PRECISIONS[max(num_elements, key=lambda name: num_elements[name])]


def _num_parameters(graph: Any) -> int:
    """Elements of the weights, without running statistics."""
    statistics = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    return sum(
        math.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in statistics and dtype_name(tensor.data_type) in {*_PRECISIONS, *_QUANTIZED}
    )
