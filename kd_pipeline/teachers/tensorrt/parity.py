"""The file with the reference of an engine: the images it is compared on, and the outputs of float32 for them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kd_pipeline._core.files import open_trusted
from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.parity import ParityReference, read_reference
from kd_pipeline.teachers.tensorrt.manifest import Parity, read_if_digest, why_unreadable

__all__ = ["load_reference", "parity_path"]

_MAX_BYTES = 4 << 30


def parity_path(engine: Path) -> Path:
    """The file with the reference of an engine: `<engine>.parity.npz`."""
    return engine.with_name(f"{engine.name}.parity.npz")


def load_reference(engine: Path, parity: Parity) -> ParityReference:
    """Read the reference beside `engine`.

    Raises:
        EngineError: it cannot be read, somebody else could have written it, its digest is not the one in `parity`, or
            it holds no reference.
    """
    path, advice = parity_path(engine), "; delete it, and build the engine again"
    try:
        with open_trusted(path, max_bytes=_MAX_BYTES) as file:
            found, content = read_if_digest(file, [parity.tensors_sha256])
    except OSError as exc:
        raise EngineError(why_unreadable(path, exc, advice)) from None
    if content is None:
        raise EngineError(
            printable(f"{path} has the sha256 {found}, wanted {parity.tensors_sha256}; build the engine again")
        )
    try:
        images, outputs = read_reference(content)
        _check_numbers(images, outputs, parity)
    except Exception as exc:  # zipfile and NumPy raise of many kinds
        raise EngineError(printable(f"{path} holds no images and outputs: {exc!r}{advice}")) from None
    return ParityReference(images, outputs, printable(parity.images))


def _check_numbers(images: Tensor, outputs: Mapping[str, Tensor], parity: Parity) -> None:
    lengths = {len(images), *map(len, outputs.values())}
    if outputs.keys() != parity.outputs.keys() or lengths != {parity.num_images}:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in {"images": images, **outputs}.items())
        wanted = ", ".join(parity.outputs)
        raise ValueError(f"found {found}, wanted images and {wanted}, {parity.num_images} of each")
