"""`kd-pipeline eval`."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline.cli import main
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.evaluation.frozen import extract_features, knn_top1, linear_top1, split_bank
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows._compare import TEACHER
from kd_pipeline.workflows.exported import export_student, open_model_file

CONFIG = """
data:
  batch_size: 8
  val:
    source: {{kind: image_folder, root: {root}}}
    transform: {{preset: eval, size: 32}}
"""


@pytest.fixture
def config(photo_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "photos.yaml"
    path.write_text(CONFIG.format(root=photo_folder), encoding="utf-8")
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; read only."""
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    folder = tmp_path_factory.mktemp("finished")
    export_student(
        open_model(settings).eval(),
        settings,
        folder / "exported",
        classes=("flower", "roof", "sky"),
        transform=EvalTransform(size=32),
        calibration_set=None,
        export=ExportSettings(),
    )
    return folder


def test_run_and_its_onnx_file_agree(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metrics.json"
    file = run / "exported" / "model.onnx"
    arguments = ["eval", "-c", str(config), str(run), str(file), "--teacher", str(file), "--metric", "CohenKappa"]
    assert main([*arguments, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    metrics = json.loads(out.read_text())
    assert metrics[str(run)]["num_samples"] == 37
    assert metrics[str(run)]["top1"] == metrics[str(file)]["top1"]
    assert metrics[str(run)]["agreement"] == metrics[str(file)]["agreement"] == 1
    assert str(run) in table and "ms/image" in table and "CohenKappa" in table


def test_teacher_can_be_a_run(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-c", str(config), str(run), "--teacher", str(run)]) == 0
    assert "100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "model.pt is neither the folder of a run nor an .onnx or .engine file"),
        (".", "is not the folder of a finished run: it has no exported/model.json"),
        ("nowhere.onnx", "nowhere.onnx: there is no such file"),
        ("runs/mien", "runs/mien is neither the folder of a run nor an .onnx or .engine file; nothing is at this path"),
    ],
)
def test_invalid_model_is_one_message(
    config: Path, model: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    assert main(["eval", "-c", str(config), model]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_out_that_is_a_link_is_refused_before_the_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, victim = tmp_path / "metrics.json", tmp_path / "victim"
    victim.write_text("mine")
    out.symlink_to(victim)
    assert main(["eval", "-c", str(config), "no such run", "--out", str(out)]) == 1
    assert f"kd-pipeline: out: {out} is a link; give the name of a JSON file" in capsys.readouterr().err
    assert victim.read_text() == "mine"


def test_checkpoint_is_told_what_to_do(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And following it works."""
    monkeypatch.chdir(tmp_path)
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    torch.save(open_model(settings).state_dict(), "teacher.pt")
    assert main(["eval", "-c", str(config), "teacher.pt"]) == 1
    error = capsys.readouterr().err
    assert "but a checkpoint, which holds weights without the network" in error
    (advised,) = re.findall(r"teacher: \{model: \{timm: resnet50, (checkpoint: \S+)\}\}, and run", error)
    with config.open("a", encoding="utf-8") as file:
        network = "builtin: small_resnet, num_classes: 3, kwargs: {width: 4}"
        file.write(f"teacher: {{model: {{{network}, {advised}}}}}\n")
    assert main(["eval", "-c", str(config)]) == 0
    assert TEACHER in capsys.readouterr().out


@pytest.fixture
def networks(config: Path) -> Path:
    """The config, with a wide teacher and a narrow student. Their weights are in files of their names."""
    networks = {"teacher": 8, "student": 4}
    with config.open("a", encoding="utf-8") as file:
        for number, (name, width) in enumerate(networks.items()):
            about = f"{{builtin: small_resnet, num_classes: 3, kwargs: {{width: {width}}}}}"
            file.write(f"{name}: {about if name == 'student' else f'{{model: {about}}}'}\n")
            torch.manual_seed(number)
            settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": width})
            network = open_model(settings)
            torch.save(network.state_dict(), config.parent / f"{name}.pt")
    return config


def test_checkpoint_is_a_teacher(networks: Path, tmp_path: Path) -> None:
    teacher, student = str(networks.parent / "teacher.pt"), str(networks.parent / "student.pt")
    set_in_config = ["--set", f"teacher.model.checkpoint={teacher}"]
    found = []
    for number, arguments in enumerate((["--teacher", teacher], set_in_config, [teacher, "--no-teacher"])):
        out = tmp_path / f"{number}.json"
        assert main(["eval", "-c", str(networks), *arguments, "--out", str(out)]) == 0
        ((name, metrics),) = json.loads(out.read_text()).items()
        assert name == (TEACHER if number == 1 else teacher)
        found.append(metrics)
    assert found[0]["confusion"] == found[1]["confusion"] == found[2]["confusion"] and found[0]["num_samples"] == 37
    out = tmp_path / "both.json"
    assert main(["eval", "-c", str(networks), student, "--teacher", teacher, "--out", str(out)]) == 0
    both = json.loads(out.read_text())
    assert list(both) == [teacher, student] and both[teacher]["confusion"] == found[0]["confusion"]
    assert both[student]["agreement"] is not None and both[student]["confusion"] != both[teacher]["confusion"]


def test_checkpoint_that_fits_nothing_is_one_message(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pt"
    torch.save(open_model(ModelSettings(timm="test_resnet")).state_dict(), other)
    assert main(["eval", "-c", str(networks), "--teacher", str(other)]) == 1
    error = capsys.readouterr().err
    assert f"{other} fits neither network of the config. teacher.model: {other} does not fit" in error
    assert f". student: {other} does not fit" in error and "Traceback" not in error
    assert main(["eval", "-c", str(networks), "--set", "student=null", "--teacher", str(other)]) == 1
    assert f"teacher.model: {other} does not fit" in capsys.readouterr().err


@pytest.fixture
def taught(config: Path, run: Path) -> Path:
    """The config, with an exported network as its teacher."""
    with config.open("a", encoding="utf-8") as file:
        file.write(f"teacher: {{backend: onnxruntime, onnx: {run / 'exported' / 'model.onnx'}}}\n")
    return config


def test_teacher_of_config_is_evaluated(taught: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    assert main(["eval", "-c", str(taught), "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())
    assert list(metrics) == [TEACHER] and metrics[TEACHER]["num_samples"] == 37


def test_teacher_of_config_is_the_reference(taught: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    assert main(["eval", "-c", str(taught), str(run), "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())
    assert list(metrics) == [TEACHER, str(run)]
    assert metrics[str(run)]["agreement"] == 1 and metrics[TEACHER]["agreement"] is None
    assert metrics[TEACHER]["confusion"] == metrics[str(run)]["confusion"]


@pytest.mark.parametrize("option", [["--no-teacher"], ["--teacher", "RUN"]])
def test_teacher_of_config_can_be_left_out(taught: Path, run: Path, tmp_path: Path, option: list[str]) -> None:
    out = tmp_path / "metrics.json"
    option = [str(run) if each == "RUN" else each for each in option]
    assert main(["eval", "-c", str(taught), str(run), "--out", str(out), *option]) == 0
    metrics = json.loads(out.read_text())
    assert list(metrics) == [str(run)] and (metrics[str(run)]["agreement"] is None) == (len(option) == 1)


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("{onnx: gone.onnx}", "gone.onnx: there is no such file"),
        ("{path: recording}", "which has outputs for training images only"),
        ("{model: {builtin: small_resnet}}", "teacher.model has random weights"),
    ],
)
def test_teacher_that_cannot_run_is_left_out(
    config: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    teacher: str,
    reason: str,
) -> None:
    arguments = ["eval", "-c", str(config), "--set", f"teacher={teacher}"]
    assert main([*arguments, str(run)]) == 0
    (message,) = [each for each in caplog.messages if "compared without the config's teacher" in each]
    assert reason in message and TEACHER not in capsys.readouterr().out
    assert main(arguments) == 1  # nothing else to evaluate
    assert reason in capsys.readouterr().err


def test_nothing_to_evaluate_is_one_message(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ([], ["--no-teacher"]):
        assert main(["eval", "-c", str(config), *option]) == 1
        assert "there is nothing to compare: name a run" in capsys.readouterr().err


@pytest.mark.slow
def test_mismatched_model_is_refused(
    config: Path, exported: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = open_model(ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4}))
    file = export_onnx(net, tmp_path / "large.onnx", image_shape=(3, 48, 48))
    assert main(["eval", "-c", str(config), str(file)]) == 1
    assert "48" in capsys.readouterr().err
    assert main(["eval", "-c", str(config), str(exported(0))]) == 1
    assert "class" in capsys.readouterr().err


def spread(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """A custom metric."""
    return {"spread": float(logits.max() - logits.min()), "images": len(labels)}


def test_custom_metric_needs_plugin(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "-c", str(config), str(run), "--metric", f"{__name__}:spread"]
    assert main(arguments) == 1
    assert f"allow it with --plugin {__name__}" in capsys.readouterr().err
    out = tmp_path / "metrics.json"
    assert main([*arguments, "--plugin", __name__, "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())[str(run)]["metrics"]
    assert metrics["images"] == 37 and metrics["spread"] > 0
    assert "spread" in capsys.readouterr().out


def test_invalid_metric_names_option(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-c", str(config), str(run), "--metric", "a metric"]) == 1
    assert "--metric: " in capsys.readouterr().err


def test_reorders_classes_of_a_run(config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = run / "exported" / "model.json"
    metrics = {}
    for classes in (["flower", "roof", "sky"], ["sky", "flower", "roof"]):
        about.write_text(json.dumps(json.loads(about.read_text()) | {"classes": classes}))
        out = tmp_path / "metrics.json"
        assert main(["eval", "-c", str(config), str(run), "--out", str(out)]) == 0
        metrics[classes[0]] = json.loads(out.read_text())[str(run)]["confusion"]
    # The second logit is now for flowers, the first class of the data.
    moved = [[row[1], row[2], row[0]] for row in metrics["flower"]]
    assert metrics["sky"] == moved != metrics["flower"]


def test_evaluates_any_split(config: Path, run: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "five.npz", images=images, labels=np.arange(5) % 3)
    five = f"{{source: {{kind: arrays, images: {tmp_path / 'five.npz'}}}, transform: {{preset: eval, size: 32}}}}"
    for split, key in (("test", "data.test"), ("other", "data.more.other")):
        out = tmp_path / f"{split}.json"
        arguments = ["eval", "-c", str(config), str(run), "--split", split, "--set", f"{key}={five}"]
        assert main([*arguments, "--out", str(out)]) == 0
        assert json.loads(out.read_text())[str(run)]["num_samples"] == 5


@pytest.fixture(scope="module")
def backbone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a student without a head; read only."""
    settings = ModelSettings(timm="test_resnet", num_classes=0)
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(1)
    export_student(
        open_model(settings).eval(),
        settings,
        folder / "exported",
        classes=None,
        transform=EvalTransform(size=32),
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=False),
    )
    return folder


def evaluated(out: Path, *arguments: str) -> dict[str, dict[str, float]]:
    assert main(["eval", *arguments, "--out", str(out)]) == 0
    return {name: found["metrics"] for name, found in json.loads(out.read_text()).items()}


def test_backbones_of_runs_and_by_name(
    config: Path, backbone_run: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = f"timm:test_resnet={backbone_run / 'exported' / 'model.safetensors'}"
    models = [str(backbone_run), by_name, "torchvision:shufflenet_v2_x0_5", str(run)]
    found = evaluated(tmp_path / "out.json", "-c", str(config), *models, "--random")
    assert list(found) == models
    assert found[str(backbone_run)] == found[by_name] and found[str(run)] == {}
    assert all(0 <= found[name][metric] <= 1 for name in models[:3] for metric in ("knn_top1", "linear_top1"))
    table = capsys.readouterr().out
    assert "k-NN" in table and "top-1" in table


def test_bank_is_another_split(config: Path, backbone_run: Path, photo_folder: Path, tmp_path: Path) -> None:
    training = f"{{source: {{kind: image_folder, root: {photo_folder}}}, transform: {{preset: train, size: 32}}}}"
    arguments = ["-c", str(config), str(backbone_run), "--set", f"data.train={training}", "--bank"]
    found = evaluated(tmp_path / "out.json", *arguments, "train")[str(backbone_run)]
    model = open_model_file(backbone_run, image_shape=(3, 32, 32), device=torch.device("cpu")).model
    # Images of a bank are not augmented.
    source, transform = ImageFolder(photo_folder), EvalTransform(size=32)
    with KDDataLoader(source, transform, batch_size=8, shuffle=False, device="cpu") as loader:
        features = extract_features(model, loader)
    expected = {"knn_top1": knn_top1(features, features), "linear_top1": linear_top1(features, features)}
    assert found == expected
    held_out = evaluated(tmp_path / "out.json", *arguments, "val")[str(backbone_run)]
    bank = split_bank(features)
    assert held_out == {"knn_top1": knn_top1(*bank), "linear_top1": linear_top1(*bank)} != expected


@pytest.mark.slow
def test_onnx_file_of_a_backbone(config: Path, backbone_run: Path, tmp_path: Path) -> None:
    net = open_model_file(backbone_run, image_shape=(3, 32, 32), device=torch.device("cpu")).model
    file = export_onnx(net, tmp_path / "trunk.onnx", image_shape=(3, 32, 32))
    found = evaluated(tmp_path / "out.json", "-c", str(config), str(backbone_run), str(file))
    assert found[str(file)] == found[str(backbone_run)]


def test_pretrained_backbone_gets_the_images_of_its_training(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_vit` of timm is normalized with 0.5, and the data with ImageNet's mean."""
    asked: list[ModelSettings] = []

    def without_download(settings: ModelSettings) -> torch.nn.Module:
        asked.append(settings)
        return open_model(settings.model_copy(update={"pretrained": False}))

    monkeypatch.setattr("kd_pipeline.workflows.compared_models.open_model", without_download)
    model = "timm:test_vit2"
    size = ["--set", "data.val.transform.size=160", "--set", "data.batch_size=8"]
    assert pretrained_input(open_model(ModelSettings(timm="test_vit2"))).mean == (0.5, 0.5, 0.5)
    adapted = evaluated(tmp_path / "out.json", "-c", str(config), model, *size)
    halves = ["--set", "data.val.transform.mean=[0.5,0.5,0.5]", "--set", "data.val.transform.std=[0.5,0.5,0.5]"]
    own = evaluated(tmp_path / "out.json", "-c", str(config), model, *size, *halves)
    assert [each.pretrained for each in asked] == [True, True]
    assert adapted[model] == own[model]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnet81", "timm has no network called 'resnet81'; did you mean"),
        ("torchvision:squeezenet1_1", "no linear layer at its end to leave out"),
        ("timm:resnet18=gone.pt", "gone.pt: there is no such file"),
    ],
)
def test_invalid_backbone_is_one_message(
    config: Path, model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "-c", str(config), model, "--random"]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_sizes_and_crops_have_rows(config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "metrics.json"
    arguments = ["eval", "-c", str(config), str(run)]
    assert main([*arguments, "--sizes", "32", "40x48", "--crops", "0.875", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    labels = ["at 32, crop 0.875", "at 32, crop 1", "at 40x48, crop 0.875", "at 40x48, crop 1"]
    assert list(found) == [*(f"{run} {label}" for label in labels), f"{run}, averaged"]
    assert f"{run} at 40x48, crop 1" in capsys.readouterr().out
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text())[str(run)] == found[f"{run} at 32, crop 0.875"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--sizes", "huge"], "argument --sizes: a size is 224, or 384x640"),
        (["--crops", "2"], "crops: 2 is no fraction"),
    ],
)
def test_bad_sizes_are_one_message(
    config: Path, run: Path, typed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["eval", "-c", str(config), str(run), *typed]) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err
