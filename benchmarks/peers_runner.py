"""Run a Python program, and write a stamp of time after every step of an optimizer in it.

    python peers_runner.py STAMPS SCRIPT [argument ...]
    python peers_runner.py STAMPS -m MODULE [argument ...]

Only the standard library is imported here, so it works in the environment of any program; torch is left to the program,
whose start is measured too. Each line of the file STAMPS is a time of `time.monotonic_ns`, which all processes of a
machine share.
"""

import os
import runpy
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_OPTIMIZERS = "torch.optim.optimizer"


def main(arguments: Sequence[str]) -> None:
    """Run the program as `__main__`, as Python itself would."""
    stamps, *program = arguments
    sys.meta_path.insert(0, _OptimizerHook(stamps))
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, whose modules are none of the program's
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, os.path.dirname(os.path.abspath(program[0])))
        runpy.run_path(program[0], run_name="__main__")


class _OptimizerHook:
    """Finder of torch's module of optimizers, which gets a hook for the steps of them all as soon as it is imported."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of that one module, as Python finds it, with the hook."""
        spec = PathFinder.find_spec(name, path, target) if name == _OPTIMIZERS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_hook(module: ModuleType) -> None:
            execute(module)
            module.register_optimizer_step_post_hook(self._stamp)

        spec.loader.exec_module = execute_and_hook  # type: ignore[method-assign]
        return spec

    def _stamp(self, *_: Any) -> None:
        os.write(self._file, b"%d\n" % time.monotonic_ns())


if __name__ == "__main__":
    main(sys.argv[1:])
