"""What each logger gets of a run, read back from what it wrote: metrics, settings, pictures, confusions, tables."""

import csv
import json
import logging
import os
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.errors import MissingPackageError
from tests.training import tiny_run
from tests.training.logger_run import LOGGERS
from tests.training.tiny_run import logged, run

# Lightning has advice on workers, loggers and the trainer's options; the loggers' packages bring warnings of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "COMET_START_ONLINE": "false"}
METADATA = "169.254.169.254"
"""Where a cloud tells its machines about themselves."""
SECRET = "s3cr3t-of-the-student"
STAGES = ("", "teacher")
PICTURES = {"first_batch", "curves", "confusion_val", "samples_val"}


def python(*arguments: str, **environment: str) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr


class Asked(NamedTuple):
    """Who was asked while the run had all loggers."""

    folder: Path
    num_proxied: int
    """Connections to the proxy that the environment names, also from processes that a package starts."""
    hosts: set[str]
    """Asked directly, in the process of the run; they were refused."""


@pytest.fixture(scope="module")
def asked(digits: Path) -> Asked:
    """A run of both stages with all loggers, offline."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = {name: url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        environment = {**proxies, "NO_PROXY": METADATA, "no_proxy": METADATA, "TEST_SECRET": SECRET}
        python("-m", "tests.training.logger_run", str(digits), **environment)
        proxy.setblocking(False)
        num_proxied = 0
        with suppress(BlockingIOError):
            while True:
                proxy.accept()[0].close()
                num_proxied += 1
    return Asked(digits / "all", num_proxied, {*(digits / "asked.txt").read_text().split()})


@pytest.fixture
def folder(asked: Asked) -> Path:
    return asked.folder


@pytest.mark.slow
def test_nothing_leaves_the_machine(asked: Asked) -> None:
    """Comet asks the machine's own cloud, if it is in one, which kind of machine it is."""
    assert asked.num_proxied == 0 and asked.hosts <= {METADATA}


def rows_of(stage: Path) -> list[dict[str, str]]:
    """The table of predictions as the run folder has it, the largest loss first."""
    with (stage / "predictions_val.csv").open(newline="", encoding="utf-8") as stream:
        return sorted(csv.DictReader(stream), key=lambda row: -float(row["loss"]))


def confusion_of(stage: Path) -> list[list[int]]:
    found: list[list[int]] = tiny_run.result(stage)["val"]["confusion"]
    return found


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard(folder: Path, stage: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage_folder = folder / stage
    found: Any = EventAccumulator(str(stage_folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})  # type: ignore[no-untyped-call]
    found.Reload()
    for name in ("train/loss", "train/lr", "val/top1"):
        wanted = {int(row["step"]): row[name] for row in logged(stage_folder) if name in row}
        assert {event.step: event.value for event in found.Scalars(name)} == pytest.approx(wanted)
    (event,) = found.Scalars("final/val/loss")
    assert (event.step, event.value) == (12, pytest.approx(tiny_run.result(stage_folder)["val"]["loss"]))
    assert not any(name.startswith("hp_metric") for name in found.Tags()["scalars"])
    (text,) = found.Tensors("config/text_summary")
    assert b"train.optimizer.lr: 0.05" in text.tensor_proto.string_val[0]
    hparams = b"".join(path.read_bytes() for path in (stage_folder / "tensorboard").iterdir())
    assert b"_hparams_/session_start_info" in hparams and b"train.optimizer.lr" in hparams
    assert set(found.Tags()["images"]) == PICTURES
    for name in PICTURES:
        (image,) = found.Images(name)
        height, width, _ = pixels(stage_folder / f"{name}.png").shape
        assert (image.step, image.height, image.width) == (12, height, width)
    (table,) = found.Tensors("predictions_val/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    wanted_lines = [f"| {' | '.join(row.values())} |" for row in rows_of(stage_folder)]
    assert lines[2:] == wanted_lines and lines[0].startswith("| index | path | label | student |")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_wandb(folder: Path, stage: str) -> None:
    (file,) = (folder / stage / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"train.optimizer.lr", b"val/top1", b"final/val/top1", b"train/loss", b"predictions_val"):
        assert name in content, name
    media = file.parent / "files" / "media"
    images = {path.name.rsplit("_", 2)[0]: path for path in (media / "images").iterdir()}
    assert images.keys() == PICTURES
    for name, path in images.items():
        assert np.array_equal(pixels(path), pixels(folder / stage / f"{name}.png"))
    tables = {path.name.rsplit("_", 2)[0]: json.loads(path.read_text()) for path in (media / "table").iterdir()}
    cells = [
        [str(label), str(top), count]
        for label, row in enumerate(confusion_of(folder / stage))
        for top, count in enumerate(row)
    ]
    assert tables["confusion_val_chart_table"]["data"] == cells
    assert [[*map(str, row)] for row in tables["predictions_val"]["data"]] == [
        [*row.values()] for row in rows_of(folder / stage)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_comet(folder: Path, stage: str) -> None:
    (file,) = (folder / stage).glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        uploads = {
            (payload["upload_type"], params.get("fileName") or params.get("figName")): archive.read(
                payload["file_path"]
            )
            for payload in (
                message["payload"] for message in messages if message["type"] in ("file_upload", "confusion-matrix")
            )
            if (params := payload.get("additional_params"))
        }
    metrics = {message["payload"]["metric"]["metricName"] for message in messages if message["type"] == "metric_msg"}
    assert {"train/loss", "val/top1", "final/val/top1"} <= metrics
    content = json.dumps([message for message in messages if message["type"] == "parameter_msg"])
    assert "train.optimizer.lr" in content
    for name in PICTURES:
        assert uploads["visualization", name].startswith(b"\x89PNG")
    matrix = json.loads(uploads["confusion-matrix", "confusion_val.json"])
    assert (matrix["matrix"], matrix["labels"]) == (confusion_of(folder / stage), [*map(str, range(10))])
    rows = [*csv.DictReader(uploads["asset", "predictions_val.csv"].decode().splitlines())]
    assert rows == rows_of(folder / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_mlflow(folder: Path, stage: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.tracking.MlflowClient(f"sqlite:///{folder / stage / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == (stage or "all") and found.info.status == "FINISHED"
    assert found.data.params["train.optimizer.lr"] == "0.05"
    assert found.data.metrics["final/val/loss"] == pytest.approx(tiny_run.result(folder / stage)["val"]["loss"])
    wanted = {int(row["step"]): row["train/loss"] for row in logged(folder / stage) if "train/loss" in row}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {each.step: each.value for each in history} == pytest.approx(wanted)
    artifacts = Path(found.info.artifact_uri)
    assert {path.stem for path in (artifacts / "pictures").iterdir()} == PICTURES
    for name in PICTURES:
        assert np.array_equal(pixels(artifacts / "pictures" / f"{name}.png"), pixels(folder / stage / f"{name}.png"))
    assert json.loads((artifacts / "confusion_val.json").read_text())["counts"] == confusion_of(folder / stage)
    table = json.loads((artifacts / "predictions_val.json").read_text())
    assert table["columns"] == [*rows_of(folder / stage)[0]]
    assert [[*map(str, row)] for row in table["data"]] == [[*row.values()] for row in rows_of(folder / stage)]


@pytest.mark.slow
def test_no_logger_gets_a_secret(folder: Path) -> None:
    num_read = 0
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        contents = [path.read_bytes()]
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for content in contents:
            num_read += b"api_key" in content
            assert SECRET.encode() not in content, path
    assert num_read > len(LOGGERS)


@pytest.mark.slow
def test_wandb_has_a_run_for_each_student(tmp_path: Path) -> None:
    tiny_run.write_digits(tmp_path)
    students = "students={name: {'factory': 'tests.training.networks:plain'} for name in ('one', 'two')}"
    python(
        "-c",
        "from pathlib import Path; from tests.training.tiny_run import run\n"
        f"run(Path({str(tmp_path)!r}), 'wandb', train__loggers=['csv', 'wandb'], student=None, {students})",
    )
    for student in ("one", "two"):
        (file,) = (tmp_path / "wandb" / student / "wandb").glob("offline-run-*/*.wandb")
        content = file.read_bytes()
        for name in (f"wandb/{student}".encode(), b"final/val/top1", b"train/loss"):
            assert name in content, name


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet", "comet_ml"), ("mlflow", "mlflow")])
def test_missing_logger_package(digits: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package} is needed here.*kd_pipeline\[loggers\]"):
        run(digits, f"no {name}", train__loggers=[name])


@pytest.mark.parametrize("method", ["log_metrics", "add_image"])
def test_logger_that_fails_does_not_end_the_run(
    digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """While training, and at its end: one warning, which holds no secret, and all of the results."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError(f"https://user:{SECRET}@host/?api_key={SECRET} is gone")

    monkeypatch.setattr({"log_metrics": TensorBoardLogger, "add_image": SummaryWriter}[method], method, fail)
    caplog.set_level(logging.INFO, "kd_pipeline")
    outcome = run(digits, f"failing {method}", train__loggers=["csv", "tensorboard"])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    what = "the run goes on without it" if method == "log_metrics" else "its results are not complete there"
    assert warning.startswith(f"the logger TensorBoard failed, and {what}; metrics.csv has all metrics: ConnectionE")
    assert SECRET not in warning
    assert len(logged(outcome.folder)) == 12 and tiny_run.result(outcome.folder)["val"]["num_samples"] == 40
