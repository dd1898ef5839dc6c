import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kd_pipeline._core.optional import require, switch_off_reports
from kd_pipeline.errors import MissingPackageError

REPORTS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
    "COMET_ERROR_TRACKING_ENABLE": "false",
}


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(MissingPackageError, match=r"no_such_package is needed .* pip install 'kd_pipeline\[cpu\]'"):
        require("no_such_package", extra="cpu")


def test_reports_are_off_before_a_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in REPORTS:
        monkeypatch.delenv(name, raising=False)
    require("json", extra="cpu")
    assert {name: os.environ[name] for name in REPORTS} == REPORTS


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    used = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    monkeypatch.setitem(sys.modules, "openvino_telemetry", used)
    switch_off_reports()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert sys.modules["openvino_telemetry"] is used


CHILD = """
import sys, time
from pathlib import Path
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
import torch
for open_teacher in (OpenVINOTeacher, OnnxRuntimeTeacher):
    open_teacher(Path(sys.argv[1]))(torch.zeros(1, 3, 32, 32))
import openvino.tools.ovc.main
time.sleep(1)  # a report is sent from a process or thread of its own
"""
UNGUARDED = """
import time
import openvino, onnxruntime
time.sleep(1)
"""


def connections_and_files(home: Path, script: str, *arguments: str) -> tuple[list[bytes], list[str]]:
    """What `script` sends, also from native code and other processes, and what it writes to the home folder.

    All of them respect the variables that name a proxy, which here is this process.
    """
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in {*REPORTS, "CI", "XDG_CACHE_HOME"}}
    kept = {name: value for name, value in kept.items() if name.lower() != "no_proxy"}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = {f"{kind}_proxy": address for kind in ("http", "https", "all")}
        proxies |= {name.upper(): value for name, value in proxies.items()}
        command = [sys.executable, "-c", script, *arguments]
        subprocess.run(command, env={**kept, **proxies, "HOME": str(home)}, check=True, timeout=120)
        requests = []
        try:
            while True:
                connection, _ = proxy.accept()
                with connection:
                    requests.append(connection.recv(1000))
        except TimeoutError:
            pass
    return requests, [str(path.relative_to(home)) for path in home.rglob("*")]


@pytest.mark.slow
def test_teachers_send_nothing_and_write_nothing_to_the_home_folder(
    exported: Callable[[int], Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    assert connections_and_files(tmp_path / "home", CHILD, str(exported(0))) == ([], [])
    requests, files = connections_and_files(tmp_path / "other", UNGUARDED)
    if not requests and not files:
        pytest.skip("these versions of OpenVINO and ONNX Runtime report nothing")
