"""What a command may run comes from what is typed, and from no file."""

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from kd_pipeline.cli import main
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import TeacherError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.runner import Runner
from kd_pipeline.teachers.settings import Runtime
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows.exported import export_student

DIGEST = hashlib.sha256(b"an engine").hexdigest()
CONFIG = """
data:
  batch_size: 8
  device: cpu
  train: {{source: {{kind: image_folder, root: {root}}}, transform: {{preset: train, size: 32}}}}
  val: {{source: {{kind: image_folder, root: {root}}}, transform: {{preset: eval, size: 32}}}}
run_dir: {run_dir}
{more}
"""


@pytest.fixture
def config(photo_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(*more: str) -> Path:
        path = tmp_path / "run.yaml"
        text = CONFIG.format(root=photo_folder, run_dir=tmp_path / "run", more="\n".join(more))
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    export_student(
        open_model(settings).eval(),
        settings,
        tmp_path / "given" / "exported",
        classes=("flower", "roof", "sky"),
        transform=EvalTransform(size=32),
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=False),
    )
    return tmp_path / "given"


class Marks:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, without those that say what is done."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kd-pipeline: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_folder_names_no_other_weights(
    run: Path, tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, weights = tmp_path / "marker", tmp_path / "weights.pt"
    weights.write_bytes(pickle.dumps(Marks(marker)))
    description = run / "exported" / "model.json"
    content = json.loads(description.read_bytes())
    images = str(next((photo_folder / "sky").iterdir()))
    for model in (
        {"timm": "test_resnet", "kwargs": {"checkpoint_path": str(weights)}},
        {"timm": "test_resnet", "kwargs": {"pretrained": True}},
        {"timm": f"local-dir:{tmp_path}"},
    ):
        description.write_text(json.dumps(content | {"model": model}))
        assert main(["predict", str(run), images, "--device", "cpu"]) == 1
        assert "does not describe a model that this release opens: model: " in one_line(capsys)
    assert not marker.exists()
    pickle.loads(weights.read_bytes())
    assert marker.exists()


def test_a_run_folder_downloads_nothing(
    run: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(name: str, **arguments: object) -> nn.Module:
        assert arguments in ({}, {"num_classes": 0})  # and no weights
        return nn.Linear(1, 3)

    monkeypatch.setattr(timm, "create_model", create_model)
    description = run / "exported" / "model.json"
    model = {"timm": "resnet18", "pretrained": True}
    description.write_text(json.dumps(json.loads(description.read_bytes()) | {"model": model}))
    assert main(["predict", str(run), str(next((photo_folder / "sky").iterdir())), "--device", "cpu"]) == 1
    assert "does not fit Linear" in one_line(capsys)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_run_folder_of_large_files_is_one_message(
    run: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.truncate(run / "exported" / name, 2**42)
    assert main(["predict", str(run), str(next((photo_folder / "sky").iterdir())), "--device", "cpu"]) == 1
    assert f"{name} cannot be read: it has 4398046511104 bytes, and at most" in one_line(capsys)


def test_a_run_folder_calls_nothing_that_a_plugin_imports(
    run: Path, tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "my_models.py").write_text("from subprocess import check_call\n")
    monkeypatch.syspath_prepend(tmp_path)
    description = run / "exported" / "model.json"
    model = {"factory": "my_models:check_call", "kwargs": {"args": f"mkdir {marker}", "shell": True}}
    description.write_text(json.dumps(json.loads(description.read_bytes()) | {"model": model}))
    images = str(next((photo_folder / "sky").iterdir()))
    assert main(["predict", str(run), images, "--device", "cpu", "--plugin", "my_models"]) == 1
    assert "factory: my_models:check_call is not defined in" in one_line(capsys)
    assert not marker.exists() and "my_models" in sys.modules


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("student: {timm: test_resnet, kwargs: {pretrained: true}}", "kwargs: pretrained is refused"),
        ("student: {torchvision: resnet18, kwargs: {weights: DEFAULT}}", "kwargs: weights is refused"),
        ("student: {timm: 'hf-hub:timm/resnet18'}", "timm: 'hf-hub:timm/resnet18' is not the name of a network"),
        (f"teacher: {{engine: a.engine, trust_engine: {DIGEST}}}", "type --trust-engine SHA256 on the command line"),
        (f"teacher: {{members: [{{engine: a.engine, trust_engine: {DIGEST}}}]}}", "type --trust-engine SHA256"),
    ],
)
def test_a_config_gives_no_permissions(
    config: Callable[..., Path], more: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(more)
    for command in ("check", "train", "record", "eval"):
        assert main([command, "-c", str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error and f"{path}:8: " in error and "Traceback" not in error


def test_an_override_is_no_option(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = config("teacher: {engine: a.engine}")
    assert main(["check", "-c", str(path), f"teacher.trust_engine={DIGEST}"]) == 1
    assert "type --trust-engine SHA256" in capsys.readouterr().err


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> list[Collection[str]]:
    """The digests that were trusted each time an engine was to be opened."""
    found: list[Collection[str]] = []

    def open_tensorrt(runner: Runner, runtime: Runtime) -> None:
        found.append(runner.inputs.trust_engines)
        raise TeacherError("there is no GPU")

    monkeypatch.setattr(Runner, "open", open_tensorrt)
    return found


SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("check", "train")]


@pytest.mark.parametrize("command", [*SLOW, "record", "eval"])
def test_a_typed_digest_reaches_the_teacher(
    command: str, config: Callable[..., Path], trusted: list[Collection[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config("teacher: {engine: a.engine}", "student: {builtin: small_resnet}")
    other = "0" * 64
    assert main([command, "-c", str(path), "--trust-engine", DIGEST.upper(), "--trust-engine", other]) == 1
    printed = capsys.readouterr()
    assert "there is no GPU" in printed.out + printed.err
    assert trusted == [[DIGEST, other]]


def test_a_typed_digest_reaches_the_compared_files(
    config: Callable[..., Path], trusted: list[Collection[str]], photo_folder: Path, tmp_path: Path
) -> None:
    path, engine = config(), tmp_path / "a.engine"
    engine.touch()
    digest = ["--trust-engine", DIGEST]
    assert main(["eval", "-c", str(path), str(engine), *digest]) == 1
    assert main(["eval", "-c", str(path), "--teacher", str(engine), *digest]) == 1
    assert main(["predict", str(engine), "-c", str(path), str(photo_folder), *digest]) == 1
    assert trusted == [[DIGEST], [DIGEST], [DIGEST]]


def test_a_digest_has_64_digits(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "-c", str(config()), "--trust-engine", "mine"])
    assert "--trust-engine: a sha256 has 64 hexadecimal digits, got 'mine'" in capsys.readouterr().err
