import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_pipeline._core.child_process import _import_path, isolate_children, run_child
from tests.children import write_traps

ROOT = Path(__file__).parents[2]
STARTS = {
    "subprocess": {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {"fork", "forkpty", "popen", "posix_spawn", "posix_spawnp", "startfile", "system"},
    "multiprocessing": {"Pool", "Process", "get_context", "set_executable", "set_start_method"},
    "torch": {"compile"},
    "sys": {"executable"},
}
"""What starts a process, or is needed to start Python. `torch.compile` starts compilers and Python."""
ALLOWED = {
    ("kd_pipeline/_core/child_process.py", "subprocess.Popen"): "the helper",
    ("kd_pipeline/_core/child_process.py", "sys.executable"): "the helper",
    ("kd_pipeline/_core/torch_compile.py", "torch.compile"): "the helper for compilers",
    ("kd_pipeline/training/environment.py", "sys.executable"): "only recorded",
    ("benchmarks/checkouts.py", "sys.executable"): "the package of another checkout, with -P",
    ("benchmarks/checkouts.py", "subprocess.run"): "git",
    ("benchmarks/end.py", "subprocess.Popen"): "the package of another checkout, with -P",
    ("benchmarks/start.py", "subprocess.Popen"): "the package of another checkout, with -P",
    ("benchmarks/start.py", "subprocess.run"): "the package of another checkout, with -P",
    ("benchmarks/file_server.py", "subprocess.Popen"): "this checkout's web server, which must not share the GIL",
    ("benchmarks/file_server.py", "sys.executable"): "this checkout's web server, which must not share the GIL",
    ("benchmarks/peers_process.py", "subprocess.Popen"): "programs of others, as their users start them",
    ("benchmarks/peers_rows.py", "sys.executable"): "programs of others, as their users start them",
    ("tools/check_wheel.py", "subprocess.run"): "uv, git, and the commands of a wheel, as its users start them",
    ("tools/check_wheel.py", "sys.executable"): "the Python of the wheel's new environment",
    ("tools/gpu_check.py", "subprocess.Popen"): "pytest and this package, in the checkout that they are in",
    ("tools/gpu_check.py", "sys.executable"): "pytest and this package, in the checkout that they are in",
    ("tools/gpu_check.py", "subprocess.run"): "nvidia-smi and uname",
}
SPAWN = """
from concurrent.futures import ProcessPoolExecutor
from operator import mul
from torch.utils.data import DataLoader
from kd_pipeline._core.child_process import spawn_context

if __name__ == "__main__":
    context = spawn_context()
    with ProcessPoolExecutor(1, context) as pool:
        print(pool.submit(mul, 6, 7).result())
    queue = context.SimpleQueue()
    child = context.Process(target=queue.put, args=("hello",))
    child.start()
    print(queue.get())
    child.join()
    print([*DataLoader([1, 2], num_workers=1, batch_size=None, multiprocessing_context=context)])
"""


def test_nothing_else_starts_processes() -> None:
    found = set()
    for folder in ("kd_pipeline", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= {(str(path.relative_to(ROOT)), name) for name in _starts(ast.parse(path.read_text()))}
    assert found == set(ALLOWED)


def _starts(tree: ast.Module) -> set[str]:
    """What is called of `STARTS`, or named in the case of `sys`, and process pools without a context."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in STARTS:
            found |= {f"{node.module}.{each.name}" for each in node.names if each.name in STARTS[node.module]}
        called = node.func if isinstance(node, ast.Call) else node
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            module, name = called.value.id, called.attr
            is_start = name in STARTS.get(module, ()) or (module == "os" and name.startswith(("exec", "spawn")))
            if is_start and (called is not node or module == "sys"):
                found.add(f"{module}.{name}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ProcessPoolExecutor") and len(node.args) < 2:
            found.add("ProcessPoolExecutor")
        if isinstance(node, ast.keyword) and node.arg == "multiprocessing_context":
            found |= set() if ast.unparse(node.value) == "spawn_context()" else {"multiprocessing_context"}
    return found


@pytest.mark.slow
def test_spawned_processes_import_nothing_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    marker = write_traps(tmp_path / "here")
    (tmp_path / "script.py").write_text(SPAWN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=tmp_path / "here",
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "42\nhello\n[1, 2]\n", done.stderr
    assert not marker.exists(), marker.read_text()


@pytest.mark.slow
def test_report_is_separate_from_log() -> None:
    child = run_child("tests.children:echo", "one", "two three", timeout_s=30)
    assert (child.lines, child.failure) == (["one", "two three"], "")
    assert child.log == "not for the parent\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "timeout_s", "lines", "failure"),
    [
        ("crash", 30, ["so far so good"], "crashed with SIGSEGV"),
        ("hang", 5, ["started"], "timed out after 5 s"),
        ("fail", 30, [], "exited with status 3"),
        ("no_such_function", 30, [], "exited with status 1"),
    ],
)
def test_failure_has_reason(function: str, timeout_s: float, lines: list[str], failure: str) -> None:
    child = run_child(f"tests.children:{function}", timeout_s=timeout_s)
    assert (child.lines, child.failure) == (lines, failure)


@pytest.mark.slow
def test_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = write_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    child = run_child("tests.children:echo", "fine", timeout_s=30)
    assert (child.lines, child.failure) == (["fine"], ""), child.log
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "is_set"), [(["/elsewhere"], True), (["", "/elsewhere"], False), (["HERE", "/elsewhere"], False)]
)
def test_libraries_import_as_this_process(
    path: list[str], is_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if each == "HERE" else each for each in path])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    isolate_children()
    assert os.environ["PYTHONSAFEPATH"] == ("1" if is_set else "")


def test_path_with_a_separator_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/elsewhere", f"/elsewhere{os.pathsep}"])
    assert _import_path() == ["/elsewhere"]


@pytest.mark.slow
def test_interrupt_kills_child(tmp_path: Path) -> None:
    script = (
        "import signal, subprocess, sys\n"
        "communicate = subprocess.Popen.communicate\n"
        "def interrupted(self, timeout=None):\n"
        "    print(self.pid)\n"
        "    raise KeyboardInterrupt\n"
        "subprocess.Popen.communicate = interrupted\n"
        "from kd_pipeline._core.child_process import run_child\n"
        "try:\n"
        "    run_child('tests.children:hang', timeout_s=60)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
