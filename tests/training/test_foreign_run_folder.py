"""A run folder that somebody else has prepared: nothing is written out of it, and what it says ends in one message."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd_pipeline.cli import main
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.report.plots import save_figure
from kd_pipeline.training.metrics_csv import MetricsFile
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_lock import LOCK, lock_folder
from kd_pipeline.workflows.resume import SavedRun
from tests.training import tiny_run

FILES = (
    *("train.log", "history.jsonl", LOCK, "config.yaml", "environment.json", "metrics.csv", "result.json"),
    *("evidence.jsonl", "bad_samples.jsonl", "classes.json", "curves.png", "confusion_val.png", "mlflow.db"),
    *("checkpoints/last.ckpt", "exported/model.json", "exported/model.onnx", "tensorboard/hparams.yaml"),
)
FOLDERS = ("checkpoints", "exported", "tensorboard", "earlier", "wandb", "check", "exported/more")
MINE = "not yours\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text(MINE)
    return victim


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def untouched(victim: Path) -> bool:
    return [*victim.iterdir()] == [victim / "file"] and (victim / "file").read_text() == MINE


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_links_out_of_the_folder_are_refused_by_name(folder: RunFolder, victim: Path, name: str) -> None:
    link = folder.path / name
    link.parent.mkdir(exist_ok=True)
    for target in (
        victim / "file" if name in FILES else victim,
        victim / "nothing",
        Path(os.path.relpath(victim / "file", link.parent)),
    ):
        link.symlink_to(target)
        for use in (lambda: folder.session("train").__enter__(), folder.archive):
            with pytest.raises(StateError) as caught:
                use()
            assert f"{link} is a link to {target}, and a run writes nothing through links" in str(caught.value)
        assert untouched(victim)
        link.unlink()


def test_command_refuses_a_link_in_one_line(
    folder: RunFolder, victim: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run.settings(folder.path.parent, "run")
    (folder.path.parent / "my.yaml").write_text(config.model_dump_json(exclude_none=True))
    folder.log.symlink_to(victim / "file")
    monkeypatch.chdir(folder.path.parent)
    assert main(["train", "-c", "my.yaml", "--plugin", "tests.training.networks"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"kd-pipeline: {folder.log} is a link to {victim}/file")
    assert untouched(victim)


def test_folder_of_a_stage_may_not_be_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "teacher").symlink_to(victim)
    with (
        pytest.raises(StateError, match="teacher is a link to"),
        RunFolder(tmp_path / "teacher", is_named=False).session("train"),
    ):
        pass
    assert untouched(victim)


def test_named_folder_may_be_a_link_and_links_within_stay(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "run")
    folder.exported.mkdir()
    (folder.exported / "latest.onnx").symlink_to("model.onnx")
    (folder.path / "data").symlink_to("/tmp")  # nothing that a run writes
    with folder.session("train"):
        pass
    assert (tmp_path / "disk" / "train.log").is_file() and (folder.exported / "latest.onnx").is_symlink()


WRITERS: dict[str, Callable[[RunFolder], object]] = {
    "train.log": lambda folder: folder.write_log("text"),
    "history.jsonl": lambda folder: folder.record_start(lambda: 1),
    "result.json": lambda folder: folder.write_result({}),
    "config.yaml": lambda folder: folder.write_config(tiny_run.settings(folder.path, "run")),
    "environment.json": lambda folder: folder.write_config(tiny_run.settings(folder.path, "run")),
    "curves.png": lambda folder: save_figure(
        pytest.importorskip("matplotlib").figure.Figure(), folder.path / "curves.png"
    ),
    "metrics.csv": lambda folder: MetricsFile(folder.metrics).save(),
    LOCK: lambda folder: lock_folder(folder.path, otherwise="").__enter__(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_link_made_during_the_run_is_refused_or_replaced(folder: RunFolder, victim: Path, name: str) -> None:
    path = folder.path / name
    path.symlink_to(victim / "file")
    if name in ("train.log", "history.jsonl", LOCK):  # what is appended to
        with pytest.raises(StateError, match=f"{name} .*: this is a link, and nothing is written through links"):
            WRITERS[name](folder)
    else:
        WRITERS[name](folder)
        assert path.is_file() and not path.is_symlink()
    assert untouched(victim)


def test_row_is_appended_through_no_link(folder: RunFolder, victim: Path) -> None:
    metrics = MetricsFile(folder.metrics)
    metrics.log_metrics({"loss": 1.0}, 1)
    metrics.save()
    folder.metrics.unlink()
    folder.metrics.symlink_to(victim / "file")
    metrics.log_metrics({"loss": 1.0}, 2)
    with pytest.raises(StateError, match=r"metrics.csv cannot be written: this is a link"):
        metrics.save()
    assert untouched(victim)


@pytest.mark.parametrize("name", ["train.log", "history.jsonl", LOCK, "result.json", "config.yaml"])
def test_pipes_are_refused_without_waiting(folder: RunFolder, name: str) -> None:
    os.mkfifo(folder.path / name)
    with pytest.raises((StateError, ConfigError), match=f"{name}.*this is a pipe|cannot write to .* pipe"):
        WRITERS[name](folder)
    assert (folder.path / name).is_fifo()


# What it says


def holder_of(folder: RunFolder, text: str, mode: int = 0o600) -> str:
    """The message about a lock that somebody holds, in whose file is `text`."""
    with lock_folder(folder.path, otherwise=""):
        (folder.path / LOCK).write_text(text)
        (folder.path / LOCK).chmod(mode)
        with pytest.raises(StateError) as caught, lock_folder(folder.path, otherwise="go elsewhere"):
            pass
    return str(caught.value)


HOLDER = {"pid": 4711, "host": os.uname().nodename, "started": "2026", "command": "train"}


@pytest.mark.parametrize("changes", [{"pid": "$(reboot)"}, {"pid": []}, {"pid": 10**4000}, {"host": None, "pid": {}}])
def test_holder_of_wrong_types_is_not_shown(folder: RunFolder, changes: dict[str, object]) -> None:
    text = json.dumps({**HOLDER, **changes}) if changes["pid"] != 10**4000 else '{"pid": ' + "9" * 5000 + "}"
    assert "another process, which has just started or ended" in holder_of(folder, text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"pid": ' * 20_000, "\0" * 300_000, "[]", "null"])
def test_holder_of_no_process_is_not_shown(folder: RunFolder, text: str) -> None:
    assert "another process, which has just started or ended" in holder_of(folder, text)


def test_holder_is_shown_without_control_characters(folder: RunFolder) -> None:
    changes = {"command": "train\x1b]0;x\x07\nkd-pipeline: all is well", "host": "h\nh", "started": "x" * 10_000}
    message = holder_of(folder, json.dumps({**HOLDER, **changes}))
    assert "\x1b" not in message and "\\nkd-pipeline: all is well" in message and "h\\nh" in message
    assert len(message.splitlines()) == 2 and len(message) < 3000


def test_kill_is_advised_only_for_what_this_user_wrote(folder: RunFolder) -> None:
    assert "(kill 4711)" in holder_of(folder, json.dumps(HOLDER))
    (folder.path / LOCK).unlink()
    assert "stop it, or go elsewhere" in holder_of(folder, json.dumps(HOLDER), 0o666)
    (folder.path / LOCK).unlink()
    assert "(kill" not in holder_of(folder, json.dumps({**HOLDER, "pid": -1}))


HISTORIES = {
    "nested": b"[" * 1_000_000,
    "a huge number": b'{"event": ' + b"9" * 5000 + b"}",
    "no files": b'{"event": "results", "made_from": "ab", "files": [1]}',
    "files of wrong types": b'{"event": "results", "made_from": "ab", "files": {"result.json": {}}}',
    "bytes": b"\xff\xfe\0",
    "a list": b"[]\n7\nnull",
}


@pytest.mark.parametrize("name", HISTORIES)
def test_hostile_history_has_no_results(folder: RunFolder, name: str) -> None:
    folder.history.write_bytes(HISTORIES[name])
    assert not folder.has_results("ab")


def test_endless_history_is_refused_unread(folder: RunFolder) -> None:
    with folder.history.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StateError, match=r"history.jsonl cannot be read: it has 1099511627776 bytes"):
        folder.has_results("ab")


def test_log_is_text_for_terminals(folder: RunFolder) -> None:
    with folder.session("train"):
        folder.write_log("cat\x1b[2J\nsecond \udcff https://me:abc@host")
    text = folder.log.read_bytes().decode()
    assert "cat\\x1b[2J\nsecond \\udcff https://***@host\n" in text


GOOD = {
    "state_dict": {},
    "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 1, "ready": 1}}}},
    "run": {"config": {}},
    "global_step": 3,
    "callbacks": {},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"loops": 3},
        {"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": "1", "ready": 1}}}}},
        {"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 1, "ready": torch.ones(2)}}}}},
        {"run": "config"},
        {"global_step": -1},
        {"callbacks": []},
        {"callbacks": {"StopEarly": {"num_waited": None}}},
    ],
)
def test_checkpoint_of_wrong_types(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save(GOOD, path)
    SavedRun.load(path)
    torch.save({**GOOD, **changes}, path)
    with pytest.raises(StateError, match=r"last.ckpt does not hold what kd-pipeline train resumes from \(.*--fresh"):
        SavedRun.load(path)


@pytest.mark.parametrize(
    "config", [3, {}, {"data": 3}, {"data": {"val": torch.ones(2)}, "train": {}}, {"stage": torch.ones(2)}]
)
def test_config_of_wrong_types_in_a_checkpoint(tmp_path: Path, config: object) -> None:
    current = tiny_run.settings(tmp_path, "run")
    identity = {"config": current.model_dump(mode="json")}
    saved = SavedRun({"config": config}, step=3, epochs_done=1, is_within_epoch=False, early_stopping=None)
    with pytest.raises(StateError, match="--fresh") as caught:
        saved.check(identity, current, tmp_path)
    assert len(str(caught.value)) < 3000


@pytest.mark.slow
def test_checkpoint_of_other_weights_is_one_message(digits: Path) -> None:
    tiny_run.run(digits, "weights", train__epochs=1)
    path = digits / "weights" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for changes in ({"state_dict": {}}, {"optimizer_states": 3}, {"loops": {"fit_loop": GOOD["loops"]["fit_loop"]}}):
        torch.save({**checkpoint, **changes}, path)
        with pytest.raises(StateError, match=r"last.ckpt does not hold what kd-pipeline train resumes from \("):
            tiny_run.run(digits, "weights", train__epochs=2)
