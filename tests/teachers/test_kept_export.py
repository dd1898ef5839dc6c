"""What an export is kept by, and what becomes of one that fails or has outlived its module."""

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import ExportError
from kd_pipeline.teachers import kept_export as keeping
from kd_pipeline.teachers.kept_export import examine, export_key, kept_export
from tests.networks import IMAGE_SHAPE, ConvNet, LogitsOnly

pytestmark = pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
FACTOR = 1.0


class Scaled(nn.Module):
    """Depends on an attribute that no tensor has, and on a global variable."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.scale = LogitsOnly(), scale

    def forward(self, images: Tensor) -> Tensor:
        return FACTOR * self.scale * self.net(images)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def num_exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Where something was exported; the files are empty."""
    found: list[Path] = []

    def export_onnx(module: nn.Module, path: Path, **options: object) -> None:
        found.append(path)
        path.touch()

    monkeypatch.setattr(keeping, "export_onnx", export_onnx)
    yield found


def key(module: nn.Module, size: int = 32) -> str:
    return export_key(examine(module, (3, size, size)))


def test_examined_module_is_unchanged() -> None:
    module = ConvNet().train()
    found = examine(module, IMAGE_SHAPE)
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    # Two multiplications and additions each: 16x16x16x27 and 8x8x32x144 in the convolutions, 32x10 in the head.
    assert found.flops == 2 * (16 * 16 * 16 * 27 + 8 * 8 * 32 * 144 + 32 * 10)
    assert {name: output.dtype for name, output in found.outputs.items()} == dict.fromkeys(
        ("logits", "features"), torch.float32
    )


def test_module_that_fails_is_an_export_error() -> None:
    with pytest.raises(ExportError, match="LogitsOnly fails on a float32 image on the CPU"):
        examine(LogitsOnly(), (1, 32, 32))


def test_equal_modules_are_exported_once(num_exports: list[Path], cache: Path) -> None:
    paths = {kept_export(examine(ConvNet(), IMAGE_SHAPE)) for _ in range(2)}
    assert len(num_exports) == 1
    (path,) = paths
    assert path.is_file() and path.is_relative_to(cache / "kd_pipeline" / "exports")


def test_key_depends_on_weights_layers_attributes_and_shape() -> None:
    modules = [ConvNet(0), ConvNet(1), LogitsOnly(), Scaled(), Scaled(2.0)]
    keys = [*map(key, modules), key(ConvNet(0), 64)]
    assert len({*keys}) == len(keys)
    assert key(ConvNet(0)) == keys[0] and key(Scaled()) == keys[3]


def test_key_depends_on_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own_network.py"
    code = "from torch import nn\n\nclass Own(nn.Flatten):\n    def forward(self, images): return images.flatten(1){}\n"
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for change in ("", " * 2"):
        file.write_text(code.format(change))
        monkeypatch.delitem(sys.modules, "own_network", raising=False)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        keys.append(key(importlib.import_module("own_network").Own()))
    assert keys[0] != keys[1]


def test_export_of_a_module_that_has_changed_unseen_is_not_used(
    num_exports: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_export(examine(Scaled(), IMAGE_SHAPE))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(ExportError, match="the outputs of Scaled have changed since it was exported"):
        kept_export(examine(Scaled(), IMAGE_SHAPE))


@pytest.mark.parametrize(("cause", "tries"), [(None, 1), (OSError("the disk is full"), 2)])
def test_failure_is_kept_unless_the_disk_failed(
    cause: OSError | None, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def export_onnx(module: nn.Module, path: Path, **options: object) -> None:
        found.append(path)
        raise ExportError("it branches on its input") from cause

    monkeypatch.setattr(keeping, "export_onnx", export_onnx)
    for _ in range(2):
        with pytest.raises(ExportError, match="it branches on its input"):
            kept_export(examine(ConvNet(), IMAGE_SHAPE))
    assert len(found) == tries
