"""An exported model opens as it was, or the error says what is wrong."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, ExportError, TeacherError
from kd_pipeline.models.backbone import Backbone, num_prefix_tokens
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows.exported import export_student, open_model_file, read_exported
from tests.networks import CLASSES, random_images

CPU = torch.device("cpu")
NET = ModelSettings(builtin="small_resnet", num_classes=10, kwargs={"width": 4})
EVAL = EvalTransform(size=32, resize=40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def export(
    folder: Path,
    *,
    classes: tuple[str, ...] | None = CLASSES,
    onnx: bool = False,
    spoil: Callable[[torch.nn.Module], object] = lambda student: None,
) -> torch.nn.Module:
    student = open_model(NET).eval()
    spoil(student)
    export_student(
        student,
        NET,
        folder / "exported",
        classes=classes,
        transform=EVAL,
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=onnx),
    )
    return student


@pytest.fixture
def run(tmp_path: Path) -> Path:
    export(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_export_opens_after_move(tmp_path: Path) -> None:
    student, images = export(tmp_path / "run", onnx=True), random_images(5)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for place in ("moved", "moved/exported", "moved/exported/model.onnx"):
        opened = open_model_file(tmp_path / place, image_shape=(3, 32, 32), device=CPU)
        output = opened.model(images)
        logits = output if isinstance(output, torch.Tensor) else output["logits"]
        torch.testing.assert_close(logits, student(images), rtol=1e-4, atol=1e-4)
        assert opened.classes == CLASSES
        found = read_exported(tmp_path / place)
        assert found is not None and found[1].transform == EVAL
        opened.close()


@pytest.mark.parametrize(("name", "value"), [("0.weight", torch.nan), ("1.running_var", torch.inf)])
def test_weights_with_nan_are_not_exported(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ExportError, match=rf"weights hold NaN or inf, first in '{name}', so it is not exported"):
        export(tmp_path / "run", spoil=lambda student: student.state_dict()[name].view(-1)[:1].fill_(value))
    assert not (tmp_path / "run").exists()


def test_exported_weights_with_nan_are_refused(run: Path) -> None:
    weights = run / "exported" / "model.safetensors"
    tensors = load_file(weights)
    tensors["0.weight"][0] = torch.nan
    save_file(tensors, weights)
    description = run / "exported" / "model.json"
    found = json.loads(description.read_text())
    description.write_text(json.dumps(found | {"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    with pytest.raises(ConfigError, match=r"of a training that diverged: 0\.weight is not a number"):
        open_model_file(run, image_shape=(3, 32, 32), device=CPU)


def test_logits_follow_requested_class_order(run: Path) -> None:
    wanted = (CLASSES[7], CLASSES[2])
    images = random_images(4)
    own = open_model_file(run, image_shape=(3, 32, 32), device=CPU).model(images)
    opened = open_model_file(run, image_shape=(3, 32, 32), device=CPU, classes=wanted)
    assert opened.classes == wanted
    assert torch.equal(opened.model(images), own[:, [7, 2]])
    with pytest.raises(ConfigError, match="has 10 classes, but not 'cat'"):
        open_model_file(run, image_shape=(3, 32, 32), device=CPU, classes=("cat", *CLASSES))


def test_onnx_logits_follow_requested_class_order(exported: Callable[[int], Path]) -> None:
    opened = open_model_file(exported(0), image_shape=(3, 32, 32), device=CPU, classes=CLASSES[::-1])
    images = random_images(4)
    own = open_model_file(exported(0), image_shape=(3, 32, 32), device=CPU).model(images)["logits"]
    assert torch.equal(opened.model(images)["logits"], own.flip(1)) and opened.classes == CLASSES[::-1]
    with pytest.raises(TeacherError, match="lacks 'cat'"):
        open_model_file(exported(0), image_shape=(3, 32, 32), device=CPU, classes=("cat",))


def test_file_of_other_classes_is_closed_again(
    exported: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Teacher] = []

    def spy(*arguments: Any, **options: Any) -> Teacher:
        opened.append(open_teacher(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr("kd_pipeline.workflows.exported.open_teacher", spy)
    with pytest.raises(TeacherError, match="lacks 'cat'"):
        open_model_file(exported(0), image_shape=(3, 32, 32), device=CPU, classes=("cat",))
    (teacher,) = opened
    with pytest.raises(TeacherError, match="teacher is closed"):
        teacher(random_images(1))


def test_lone_file_has_no_description(exported: Callable[[int], Path]) -> None:
    assert read_exported(exported(0)) is None


def _change(description: Path, **changes: object) -> None:
    description.write_text(json.dumps(json.loads(description.read_text()) | changes))


DAMAGE = {
    "weights of a different network": (
        lambda folder: (
            export(folder.parent.parent / "other")
            and shutil.copy(folder.parent.parent / "other" / "exported" / "model.safetensors", folder)
        ),
        r"model\.safetensors does not match model\.json beside it \(sha256 ",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"exported has no model\.safetensors"),
    "a later format": (lambda folder: _change(folder / "model.json", format=2), "format: Input should be 1"),
    "an unknown key": (lambda folder: _change(folder / "model.json", color="red"), "color: Extra inputs"),
    "no transform": (lambda folder: _change(folder / "model.json", transform={}), "transform.size: Field required"),
    "no JSON": (lambda folder: (folder / "model.json").write_text("{"), "the file: Invalid JSON"),
    "no description": (lambda folder: (folder / "model.json").unlink(), r"it has no exported/model\.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_export_is_refused(run: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(run / "exported")
    with pytest.raises(ConfigError, match=message):
        open_model_file(run, image_shape=(3, 32, 32), device=CPU)


def test_changed_weight_is_detected(run: Path) -> None:
    file = run / "exported" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="does not match"):
        open_model_file(run, image_shape=(3, 32, 32), device=CPU)


def test_factory_needs_plugin(tmp_path: Path) -> None:
    settings = ModelSettings(factory="tests.training.networks:plain", num_classes=10)
    folder = tmp_path / "run" / "exported"
    net = open_model(settings, plugins=["tests.training.networks"]).eval()
    transform = EvalTransform(size=8, resize=8)
    export = ExportSettings(onnx=False)
    export_student(
        net, settings, folder, classes=None, transform=transform, calibration_set=lambda: 1 / 0, export=export
    )
    with pytest.raises(ConfigError, match=r"--plugin tests\.training\.networks"):
        open_model_file(tmp_path / "run", image_shape=(3, 8, 8), device=CPU)
    opened = open_model_file(tmp_path / "run", image_shape=(3, 8, 8), device=CPU, plugins=["tests.training.networks"])
    assert opened.model(torch.zeros(2, 3, 8, 8)).shape == (2, 10) and opened.classes is None


HOSTILE_DESCRIPTIONS = {
    "nested": b"[" * 1_000_000,
    "a huge number": b'{"format": ' + b"9" * 5000 + b"}",
    "a key with control characters": b'{"format": 1, "x\\u001b]0;y\\u0007\\nall is well": 1}',
    "bytes": b"\xff\xfe{",
    "too large": b" " * (2**24 + 1),
}


@pytest.mark.parametrize("name", HOSTILE_DESCRIPTIONS)
def test_hostile_description_is_one_message(tmp_path: Path, name: str) -> None:
    export(tmp_path)
    (tmp_path / "exported" / "model.json").write_bytes(HOSTILE_DESCRIPTIONS[name])
    with pytest.raises(ConfigError, match="run the command of the run again") as caught:
        read_exported(tmp_path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_pipes_are_refused_without_waiting(tmp_path: Path, name: str) -> None:
    export(tmp_path)
    (tmp_path / "exported" / name).unlink()
    os.mkfifo(tmp_path / "exported" / name)
    with pytest.raises(ConfigError, match=r"has no exported/model.json|cannot be read: this is a pipe and no file"):
        open_model_file(tmp_path, image_shape=(3, 32, 32), device=CPU)


def test_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "exported").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "exported" / name).symlink_to(victim)
    export(tmp_path)
    open_model_file(tmp_path, image_shape=(3, 32, 32), device=CPU).close()
    assert victim.read_text() == "mine"


HEADLESS = {
    "timm": ModelSettings(timm="test_resnet", num_classes=0),
    "timm, ViT": ModelSettings(timm="test_vit", num_classes=0, kwargs={"img_size": 32}),
    "torchvision": ModelSettings(torchvision="shufflenet_v2_x0_5", num_classes=0),
}


def export_headless(settings: ModelSettings, folder: Path, *, onnx: bool = False) -> Backbone:
    student = open_model(settings).eval()
    assert isinstance(student, Backbone)
    export_student(
        student,
        settings,
        folder / "exported",
        classes=CLASSES,
        transform=EVAL,
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=onnx),
    )
    return student


@pytest.mark.parametrize("name", HEADLESS)
def test_headless_export_is_the_trunk(tmp_path: Path, name: str) -> None:
    settings = HEADLESS[name]
    student = export_headless(settings, tmp_path)
    state = load_file(tmp_path / "exported" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if settings.timm is not None:
            again = timm.create_model(settings.timm, num_classes=0, **settings.kwargs)
        else:
            again = torchvision.models.get_model(settings.torchvision, num_classes=0)
    again.load_state_dict(state, strict=True)
    images = random_images(2)
    assert torch.equal(Backbone(again).eval()(images)["pooled"], student(images)["pooled"])
    found = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert found["classes"] is None and found["model"]["num_classes"] == 0
    opened = open_model_file(tmp_path, image_shape=(3, 32, 32), device=CPU, classes=CLASSES)
    outputs, expected = opened.model(images), student(images)
    assert opened.classes is None and list(outputs) == ["pooled", "spatial"]
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADLESS)
def test_headless_onnx_file_returns_features(tmp_path: Path, name: str) -> None:
    student, images = export_headless(HEADLESS[name], tmp_path, onnx=True), random_images(3)
    opened = open_model_file(tmp_path / "exported" / "model.onnx", image_shape=(3, 32, 32), device=CPU, classes=CLASSES)
    assert isinstance(opened.model, Teacher) and opened.classes is None
    outputs, expected = opened.model(images), student(images)
    assert list(outputs) == list(opened.model.outputs) == ["pooled", "spatial"]
    for key, output in outputs.items():
        torch.testing.assert_close(output, expected[key], rtol=1e-3, atol=1e-3)
    prefix = num_prefix_tokens(student) if expected["spatial"].ndim == 3 else None
    assert opened.model.outputs["spatial"].num_prefix_tokens == prefix
    opened.close()


def test_folder_of_stages_names_them(tmp_path: Path) -> None:
    description = tmp_path / "run" / "baseline" / "exported" / "model.json"
    description.parent.mkdir(parents=True)
    description.write_text("{}")
    with pytest.raises(ConfigError, match=r"run is not the folder .*; of its stages, these are: .*baseline$"):
        read_exported(tmp_path / "run")
