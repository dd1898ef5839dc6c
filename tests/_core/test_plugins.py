"""Which objects of an allowed module a config may name."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_pipeline._core.plugins import import_function
from kd_pipeline.errors import ConfigError

CODE = """
import functools, os
from functools import partial
from os import system
from subprocess import check_call
from torch import load
from torch.hub import *

def own(): return 1
def _private(): return 1
class Network: pass
class Maker:
    def __call__(self): return 1
maker = Maker()
bound = maker.__call__
ready = partial(check_call)
alias = os.system
unnamed = lambda: 1
@functools.wraps(own)
def decorated(): return 2
cached = functools.lru_cache(own)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Any]]:
    """`plugin("own")`: the object of that name in a module of `CODE`; `listed` is what the module lists."""

    def find(name: str, listed: str = "") -> Any:
        (tmp_path / "my_plugin.py").write_text(CODE + listed)
        monkeypatch.delitem(sys.modules, "my_plugin", raising=False)
        return import_function("factory", f"my_plugin:{name}", ["my_plugin"])

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which would be that of a file of the same second and size
    return find


@pytest.mark.parametrize("name", ["own", "Network", "unnamed", "decorated"])
def test_what_a_module_defines_is_allowed(plugin: Callable[..., Any], name: str) -> None:
    assert plugin(name) is getattr(sys.modules["my_plugin"], name)


@pytest.mark.parametrize(
    "name",
    ["check_call", "load", "system", "alias", "partial", "ready", "maker", "bound", "cached", "download_url_to_file"],
)
def test_what_a_module_imports_or_makes_is_refused(plugin: Callable[..., Any], name: str) -> None:
    message = rf"factory: my_plugin:{name} is not defined in .*my_plugin\.py; define a function .* list '{name}' in its"
    with pytest.raises(ConfigError, match=message):
        plugin(name)
    with pytest.raises(ConfigError, match=message):  # text is no list
        plugin(name, f"__all__ = '{name}'")


def test_what_a_module_lists_is_allowed(plugin: Callable[..., Any]) -> None:
    assert plugin("check_call", "__all__ = ['check_call']") is subprocess.check_call
    assert plugin("alias", "__all__ = ('alias',)") is os.system
    assert callable(plugin("cached", "__all__ = ['cached']"))


def test_private_names_are_refused(plugin: Callable[..., Any]) -> None:
    for name in ("_private", "__loader__", "__builtins__"):
        with pytest.raises(ConfigError, match=f"factory: my_plugin:{name} is private to its module; name a function"):
            plugin(name, f"__all__ = ['{name}']")
