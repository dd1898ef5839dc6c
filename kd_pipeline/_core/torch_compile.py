"""`torch.compile` with a cache that is this user's alone."""

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.child_process import isolate_children
from kd_pipeline._core.user_cache import temporary_without_cache

__all__ = ["cache_folder", "is_compile_error", "torch_compile"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps what it compiled: code, pickles, and below it what Triton compiled."""
_MAX_SHAPES = 64
"""Shapes of inputs that something is compiled for; torch would run the ninth as it is, and say so in a log alone."""
_HEADERS_VARIABLE = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
"""Whether compiled C++ headers are kept; torch keeps them in the temporary directory, whatever `_VARIABLE` says."""


def torch_compile(module: nn.Module | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` of a network or a function, kept in the user's cache, unless `TORCHINDUCTOR_CACHE_DIR` is set.

    Torch would keep them in a folder of the temporary directory whose name everybody knows, and would run what
    somebody else put there.

    Each batch size has its own code. By default torch would compile the second one for any size, and from then on run
    that for the first one too, whose outputs could change. Networks of one class do not count as shapes of each other.
    """
    if not os.environ.get(_VARIABLE) or _is_torchs_own(os.environ[_VARIABLE]):
        # Read at each compilation, also by torch's worker processes.
        os.environ[_VARIABLE] = str(temporary_without_cache("inductor"))
    if _HEADERS_VARIABLE not in os.environ:
        from torch._inductor import config  # takes a second, and makes torch's own folder if no other is set

        config.cpp_cache_precompile_headers = False
    isolate_children()
    compiled: Callable[..., Tensor] = torch.compile(module, dynamic=False, **_limits())
    return compiled


def cache_folder() -> Path:
    """Where the results of `torch_compile`, which was called before, are kept."""
    return Path(os.environ[_VARIABLE])


def is_compile_error(exc: BaseException) -> bool:
    """Whether compiling failed, such as for lack of a C++ compiler, and not what was compiled."""
    return any(kind.__module__.startswith(("torch._dynamo.", "torch._inductor.")) for kind in type(exc).__mro__)


def _limits() -> dict[str, Any]:
    """The arguments of `torch.compile` that set its limits for each thing that is compiled.

    Older versions of torch have one limit for all that has the same code, such as networks of one class.
    """
    limits = {"recompile_limit": _MAX_SHAPES, "isolate_recompiles": True}
    if limits.keys() <= inspect.signature(torch.compile).parameters.keys():
        return limits
    from torch._dynamo import config  # takes a second

    config.recompile_limit = max(config.recompile_limit, _MAX_SHAPES)
    return {}


def _is_torchs_own(folder: str) -> bool:
    """Whether it is torch's default, to which torch sets the variable when it compiles for the first time."""
    path = Path(os.path.abspath(folder))
    return path.parent == Path(os.path.abspath(tempfile.gettempdir())) and path.name.startswith("torchinductor_")
