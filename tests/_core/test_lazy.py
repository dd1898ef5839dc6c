"""A postponed module is imported when it is first used, and is then the module that it would have been."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kd_pipeline._core.lazy import postpone_import

_NAME = "postponed_parent.child"
_CODE = """
from postponed_parent.child.sub import function
def other(): return "other"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`postponed_parent.child`, a package with the submodule `sub`."""
    child = tmp_path / "postponed_parent" / "child"
    child.mkdir(parents=True)
    (child.parent / "__init__.py").touch()
    (child / "__init__.py").write_text(_CODE)
    (child / "sub.py").write_text("def function(): return 'function'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield child
    for name in [name for name in sys.modules if name.startswith("postponed_parent")]:
        del sys.modules[name]


def is_loaded() -> bool:
    return f"{_NAME}.sub" in sys.modules


def imported() -> ModuleType:
    return importlib.import_module(_NAME)


def test_import_alone_does_not_load(package: Path) -> None:
    with postpone_import(_NAME, attributes=["function"]):
        assert hasattr(imported(), "function") and not is_loaded()
    assert _NAME not in sys.modules and not hasattr(sys.modules["postponed_parent"], "child")
    module = imported()
    assert is_loaded() and type(module) is ModuleType and sys.modules["postponed_parent"].child is module


@pytest.mark.parametrize("name", ["function", "other"])
def test_use_loads(package: Path, name: str) -> None:
    with postpone_import(_NAME, attributes=["function"]):
        substitute = imported()
        assert getattr(substitute, name)() == name and is_loaded()
        module = imported()
    assert type(module) is ModuleType and imported() is module is sys.modules["postponed_parent"].child
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        substitute.missing  # noqa: B018


def test_substitute_works_after_context(package: Path) -> None:
    with postpone_import(_NAME, attributes=["function"]):
        substitute = imported()
    assert substitute.other() == "other" and substitute.function() == "function" and substitute.sub is imported().sub


def test_failed_import_is_tried_again(package: Path) -> None:
    (package / "sub.py").write_text("raise ImportError('broken')")
    with postpone_import(_NAME):
        for _ in range(2):
            with pytest.raises(ImportError, match="broken"):
                imported().other()


def test_imported_or_missing_module_stays(package: Path) -> None:
    before = imported()
    with postpone_import(_NAME):
        assert imported() is before
    assert imported() is before
    for missing in ("postponed_parent.nothing", "no_such_parent.nothing"):
        with postpone_import(missing):
            assert missing not in sys.modules


@pytest.mark.slow
def test_lightning_imports_neither_scipy_signal_nor_transformers() -> None:
    code = """
import sys
from kd_pipeline._core.optional import require
require("lightning.pytorch", extra="train")
assert "scipy.stats" not in sys.modules, "Lightning's import needs more of SciPy than it did"
assert not [name for name in sys.modules if name.startswith("transformers")], "Lightning's import needs transformers"
import scipy.signal
assert scipy.signal.convolve([1, 2], [1, 3]).tolist() == [1, 5, 6] and type(scipy.signal) is type(sys)
from torchmetrics.functional.text import bert
config = bert.AutoModel.from_config.__globals__  # of the class itself, which is imported for it
import transformers
assert config["__name__"].startswith("transformers.") and isinstance(transformers.AutoConfig, type)
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
assert type(bert.AutoModel.from_config(transformers.BertConfig(**sizes))) is transformers.BertModel
"""
    subprocess.run([sys.executable, "-c", code], check=True)
