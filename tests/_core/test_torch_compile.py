import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from torch import nn

from kd_pipeline._core import user_cache
from kd_pipeline._core.torch_compile import cache_folder, torch_compile
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.children import write_traps
from tests.networks import IMAGE_SHAPE, LogitsOnly, random_images

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what compiling changes in the whole process, and keep to the test's own folders."""
    monkeypatch.setenv("PYTHONSAFEPATH", os.environ.get("PYTHONSAFEPATH", ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with torch._inductor.config.patch(cpp_cache_precompile_headers=True):
        yield


def test_results_go_to_the_users_cache(tmp_path: Path) -> None:
    torch_compile(nn.Identity())
    folder = Path(os.environ[VARIABLE])
    assert folder == cache_folder() == tmp_path / "cache" / "kd_pipeline" / "inductor"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not torch._inductor.config.cpp_cache_precompile_headers


def test_torchs_own_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "torchinductor_somebody"))  # as torch itself sets it
    torch_compile(nn.Identity())
    assert os.environ[VARIABLE] == str(tmp_path / "cache" / "kd_pipeline" / "inductor")


def test_folder_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    torch_compile(nn.Identity())
    assert os.environ[VARIABLE] == str(tmp_path / "mine")


class Backend:
    """Of `torch.compile`; runs what it gets as it is, and notes what was compiled and what ran, by number."""

    def __init__(self) -> None:
        self.num_compiled = 0
        self.ran: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        number = self.num_compiled
        self.num_compiled += 1

        def run(*values: torch.Tensor) -> Any:
            self.ran.append(number)
            return graph.forward(*values)

        return run


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=made))
    return made


def test_other_batch_sizes_leave_the_code_of_the_first(backend: Backend) -> None:
    compiled = torch_compile(nn.Linear(3, 4))
    for size in (8, 5, 8, 3, 5, 8):
        assert compiled(torch.zeros(size, 3)).shape == (size, 4)
    assert backend.ran == [0, 1, 0, 2, 1, 0]


@pytest.fixture(params=[True, False], ids=["own limits", "torch's limit"])
def has_limits(request: pytest.FixtureRequest, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the arguments of `torch.compile` that set its limits, and without them, as in older versions of torch."""
    compile_now = torch.compile
    if not request.param:
        monkeypatch.setattr(torch, "compile", lambda module, dynamic: compile_now(module, dynamic=dynamic))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.usefixtures("has_limits")
def test_every_network_of_one_class_is_compiled(backend: Backend) -> None:
    networks = [torch_compile(nn.Linear(3, width)) for width in range(1, 13)]
    for _ in range(2):
        for network in networks:
            network(torch.zeros(8, 3))
    assert backend.ran == [*range(12), *range(12)]


@pytest.mark.usefixtures("has_limits")
def test_every_shape_is_compiled(backend: Backend) -> None:
    compiled = torch_compile(nn.Linear(3, 4))
    for _ in range(2):
        for size in range(2, 14):
            compiled(torch.zeros(size, 3))
    assert backend.ran == [*range(12), *range(12)]


def test_teacher_is_compiled_once_and_checked_without_its_code(backend: Backend) -> None:
    teacher = PyTorchTeacher(LogitsOnly(), image_shape=IMAGE_SHAPE, compile=True, batch_size=8)
    assert backend.ran == [0]
    assert open_teacher(teacher, image_shape=IMAGE_SHAPE).problems == ()
    assert backend.ran == [0] and backend.num_compiled == 1
    teacher(random_images(8))
    with torch.autocast("cpu"):  # as in a training step
        teacher(random_images(8))
    assert backend.ran == [0, 0, 0] and backend.num_compiled == 1


def test_without_a_cache_results_are_kept_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    removed: list[tuple[Path, int]] = []
    monkeypatch.setattr(user_cache.atexit, "register", lambda function, *arguments: removed.append(arguments))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        torch_compile(nn.Identity())
        torch_compile(nn.Identity())
    folder = Path(os.environ[VARIABLE])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    (message,) = caplog.messages
    assert f"group and others may write to {tmp_path / 'cache'}" in message
    ((of_exit, owner),) = removed
    assert of_exit == folder
    user_cache._remove(folder, owner + 1)  # a process that was forked
    assert folder.is_dir()
    user_cache._remove(folder, owner)
    assert not folder.exists()


SCRIPT = """
import torch
from torch import nn
from kd_pipeline.teachers.pytorch import PyTorchTeacher

class Mean(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)).relu()

PyTorchTeacher(Mean(), image_shape=(3, 8, 8), compile=True, batch_size=4)
print("compiled")
"""


@pytest.mark.slow
def test_compiling_leaves_nothing_to_others(tmp_path: Path) -> None:
    """Neither the shared folder, prepared by somebody, nor the working directory takes part."""
    shared, cache, scripts, here = (tmp_path / name for name in ("tmp", "cache", "scripts", "here"))
    for folder in (shared, scripts, here):
        folder.mkdir()
    marker = write_traps(here)
    (scripts / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "PYTHONSAFEPATH")}
    environment |= {"TMPDIR": str(shared), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(scripts / "script.py")], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "compiled\n", done.stderr
    assert not marker.exists(), marker.read_text()
    assert [*shared.iterdir()] == []
    assert any((cache / "kd_pipeline" / "inductor").rglob("*.so"))
