"""A run's folder: one process at a time, every start in its log and history, and nothing lost by starting again."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_lock import LOCK, lock_folder

HOLD = """
import sys
from pathlib import Path
from kd_pipeline.training.run_lock import lock_folder
with lock_folder(Path(sys.argv[1]), otherwise=""):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_lock_names_holder_and_ends_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(StateError) as caught, lock_folder(tmp_path, otherwise="go elsewhere"):
            pass
        holder.kill()
    message = str(caught.value)
    assert f"{tmp_path} is in use by process {holder.pid} on {os.uname().nodename} since 20" in message
    assert f"stop it (kill {holder.pid}), or go elsewhere" in message
    with lock_folder(tmp_path, otherwise=""):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_lock_of_unreadable_holder(tmp_path: Path) -> None:
    with lock_folder(tmp_path, otherwise=""):
        (tmp_path / LOCK).write_text("{")
        with (
            pytest.raises(StateError, match="another process, which has just started"),
            lock_folder(tmp_path, otherwise="go elsewhere"),
        ):
            pass


def test_lock_is_released_after_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_folder(tmp_path, otherwise=""):
        raise RuntimeError
    with lock_folder(tmp_path, otherwise=""):
        pass


def test_filesystem_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path, otherwise=""):
        assert "has no file locks (Function not implemented): make sure that no other process" in caplog.text


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ConfigError, match=r"cannot write to the folder .*file/run: Not a directory; set a different run_dir"
        ),
        RunFolder(tmp_path / "file" / "run").session("train"),
    ):
        pass


# The log and the history


def test_log_keeps_every_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = logging.getLogger("kd_pipeline")
    for error in (None, StateError("not this"), ValueError("a bug"), SystemExit(143), KeyboardInterrupt()):
        try:
            with folder.session("train"):
                logger.info("begun")
                if error is not None:
                    raise error
        except BaseException as exc:
            assert exc is error
    log = folder.log.read_text()
    assert log.count("= 20") == log.count("INFO begun") == 5
    assert "ERROR StateError: not this\n" in log and "ended with exit status 143" in log
    assert "ERROR KeyboardInterrupt\n" in log
    assert log.count("Traceback") == 1 and "ValueError: a bug" in log  # the other messages are for users
    assert logger.handlers == []


def test_history_has_starts_and_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.session("train"):
        folder.record_start(lambda: 7, changes=["a: 1 → 2"])
        folder.record_end("trained")
    with pytest.raises(SystemExit), folder.session("train"):
        folder.record_start(lambda: 9)
        raise SystemExit(130)
    with pytest.raises(StateError), folder.session("train"):
        raise StateError  # before a start
    events = [(event["event"], event["step"], event.get("outcome")) for event in folder.events()]
    assert events == [
        *(("start", 7, None), ("end", 7, "trained"), ("start", 9, None)),
        ("end", 9, "stopped with exit status 130"),
    ]
    assert folder.events()[0]["changes"] == ["a: 1 → 2"]


def test_results_are_known_until_a_file_changes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.has_results("ab")
    folder.exported.mkdir()
    model = folder.exported / "model.onnx"
    model.write_bytes(b"1")
    folder.write_result({})
    folder.record_results("ab", 3, [])
    with folder.history.open("a") as file:
        file.write('{"event": "resu')  # a full disk
    assert folder.has_results("ab") and not folder.has_results("cd")
    model.write_bytes(b"2")
    assert not folder.has_results("ab")
    model.unlink()
    assert not folder.has_results("ab")


# Starting again


def test_archive_moves_the_own_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.archive() is None
    own = ["config.yaml", "train.log", "checkpoints/last.ckpt", "exported/model.onnx", "confusion_val.png"]
    kept = ["classes.json", "teacher/config.yaml", "recording/manifest.json", "baseline/train.log", "mine.csv"]
    for number in (1, 2):
        for name in [*own, *kept]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(str(number))
        assert folder.archive() == tmp_path / "earlier" / str(number)
        assert all((tmp_path / "earlier" / str(number) / name).read_text() == str(number) for name in own)
        assert all((tmp_path / name).is_file() for name in kept)
        assert [name for name in own if (tmp_path / name).exists()] == ["train.log"]
        assert "was moved to" in folder.log.read_text()


def test_leftovers_of_other_run_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "best_student.pt").touch()
    with folder.session("train"):
        folder.set_aside_leftovers()
        folder.set_aside_leftovers()
    assert "has no checkpoint to resume from, so training starts from the beginning" in caplog.text
    assert (tmp_path / "earlier" / "1" / "checkpoints" / "best_student.pt").is_file()
    assert not (tmp_path / "earlier" / "2").exists() and folder.log.is_file()
