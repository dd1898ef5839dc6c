"""A student may return anything that has names, and losses of its own; a plain loop ends with the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline.batch import KDBatch
from kd_pipeline.cli import main
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._logits import logits_of
from kd_pipeline.evaluation._predict import predict
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import IMAGENET_MEAN, IMAGENET_STD, AdaptedNetwork
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.workflows import check, train
from kd_pipeline.workflows._train import TrainResult
from kd_pipeline.workflows.exported import open_model_file
from tests.training import any_student, tiny_run

PLUGINS = [any_student.__name__]
EPOCHS = 2


def config_of(folder: Path, run: str, kind: str, **changes: Any) -> Config:
    return tiny_run.settings(folder, run, **{"student": {"factory": f"{PLUGINS[0]}:{kind}"}} | changes)


def run(config: Config) -> TrainResult:
    return train(config, plugins=PLUGINS)


def plain_loop(
    config: Config,
    make: Callable[[], nn.Module],
    loss_of: Callable[[Any, KDBatch], Tensor],
) -> nn.Module:
    """Train without any of `kd_pipeline.training`."""
    with KDDataLoader.from_config(config, plugins=PLUGINS) as loader:
        torch.manual_seed(config.seed)
        student = make()
        optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=0.05)
        for _ in range(EPOCHS):
            for batch in loader:
                optimizer.zero_grad()
                loss_of(student(batch.images), batch).backward()
                optimizer.step()
    return student


def distilled(output: Any, batch: KDBatch) -> Tensor:
    logits = logits_of(output)
    soft = losses.soft_target(logits, batch.teacher["logits"], temperature=4.0, valid=batch.valid)
    assert batch.labels is not None
    return 0.1 * losses.task(logits, batch.labels, valid=batch.valid) + 0.9 * soft


def assert_same(folder: Path, wanted: nn.Module) -> None:
    found = tiny_run.weights(folder)
    state = wanted.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].equal(tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a_tensor", "a_tuple", "a_mapping", "a_model_output", "vit"])
def test_what_it_returns_makes_no_difference(digits: Path, kind: str) -> None:
    config = config_of(digits, kind, kind)
    result = run(config)
    assert_same(result.folder, plain_loop(config, getattr(any_student, kind), distilled))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["with_losses", "with_training_losses"])
def test_own_losses(digits: Path, kind: str) -> None:
    config = config_of(digits, kind, kind, distill={"student_losses": {"size": 0.25, "unused": 0.0}})
    result = run(config)

    def loss_of(output: Any, batch: KDBatch) -> Tensor:
        return distilled(output, batch) + 0.25 * output["losses"]["size"]

    assert_same(result.folder, plain_loop(config, getattr(any_student, kind), loss_of))
    row = tiny_run.logged(result.folder)[0]
    assert row["train/size"] > 0 and row["train/size_weight"] == 0.25
    assert row["train/loss"] == pytest.approx(
        0.1 * row["train/task"] + 0.9 * row["train/distill"] + 0.25 * row["train/size"], rel=1e-5
    )
    assert row["train/size_share"] == pytest.approx(0.25 * row["train/size"] / row["train/loss"], rel=1e-5)
    assert "train/unused" not in row


@pytest.mark.slow
def test_hidden_states_by_name(digits: Path) -> None:
    term = {"loss": "feature_mse", "student": "hidden_states.1", "teacher": "hidden_states.0", "weight": 0.5}
    teacher = {"model": {"factory": f"{PLUGINS[0]}:teacher_vit", "pretrained": False}, "backend": "pytorch"}
    config = config_of(digits, "hidden", "vit", teacher=teacher, distill={"features": [term]})
    result = run(config)

    def loss_of(output: Any, batch: KDBatch) -> Tensor:
        hidden, wanted = output.hidden_states[1], batch.teacher["hidden_states.0"]
        extra = losses.feature_mse(hidden[:, 1:], wanted[:, 1:], valid=batch.valid)
        return distilled(output, batch) + 0.5 * extra

    found = plain_loop(config, any_student.vit, loss_of).state_dict()
    weights = tiny_run.weights(result.folder)
    for name, tensor in found.items():
        torch.testing.assert_close(weights[name], tensor, msg=name)


@pytest.mark.slow
def test_hugging_face_by_config(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {"model": {"factory": f"{PLUGINS[0]}:resnet", "pretrained": False}, "backend": "pytorch"}
    changes = {"train__compare_with_teacher": True, **tiny_run.WITH_ONNX}
    config = config_of(digits, "hugging face", "vit", teacher=teacher, **changes)
    result = run(config)
    assert result.evaluations["val"].agreement is not None
    assert (result.folder / "exported" / "model.onnx").is_file()
    images = torch.rand(3, 3, 8, 8)
    opened = [
        open_model_file(path, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=PLUGINS)
        for path in (result.folder, result.folder / "exported" / "model.onnx")
    ]
    with torch.no_grad():
        first, second = (logits_of(each.model(images)) for each in opened)
    for each in opened:
        each.close()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    files = [result.folder / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (60 * number, 90, 30)).save(file)
    transform = config.data.split("val").transform
    network = open_model_file(result.folder, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=PLUGINS).model
    predictions = list(predict(network, list(map(str, files)), transform, device="cpu"))
    assert [each.problem for each in predictions] == [None] * 3
    allowed, folder = ["--plugin", PLUGINS[0]], str(result.folder)
    assert main(["eval", "-c", f"{folder}/config.yaml", folder, *allowed]) == 0
    assert main(["predict", folder, *map(str, files), *allowed]) == 0
    printed = capsys.readouterr().out
    assert "teacher of the config" in printed and folder in printed
    for prediction, line in zip(predictions, printed.splitlines()[-3:], strict=True):
        assert line.startswith(f"{prediction.image}: ") and f"{100 * prediction.top(1)[0][1]:.1f}%" in line


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"size": 0.25, "unused": 0.0}, None),
        ({"size": 0.25}, "student: the student returns the loss 'unused', which has no weight"),
        ({"size": 0.25, "unused": 0.0, "other": 1.0}, "other is not among the losses that the student returns"),
    ],
)
def test_check_knows_the_losses(digits: Path, weights: dict[str, float], problem: str | None) -> None:
    config = config_of(digits, f"checked {len(weights)}", "with_losses", distill={"student_losses": weights})
    found = [each for each in check(config, plugins=PLUGINS).problems if "student" in each]
    assert not found if problem is None else problem in found[0]


@pytest.mark.slow
def test_timm_student_gets_the_images_of_its_training(digits: Path) -> None:
    model = {"timm": "test_vit", "input_adapter": "auto"}
    config = config_of(digits, "timm", "a_tensor", student=model, train__epochs=1)
    exported = open_model_file(run(config).folder, image_shape=(3, 8, 8), device=torch.device("cpu"))
    student, images = exported.model, torch.rand(2, 3, 8, 8)
    assert isinstance(student, AdaptedNetwork)
    own = student.network.pretrained_cfg
    pixels = images * per_channel(IMAGENET_STD) + per_channel(IMAGENET_MEAN)
    adapted = (pixels - per_channel(own["mean"])) / per_channel(own["std"])
    resized = nn.functional.interpolate(adapted, size=own["input_size"][1:], mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(student(images), student.network(resized), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        (
            "with_losses",
            {},
            r"the loss 'size', which has no weight: set distill.student_losses: \{size: 1.0, unused: 1",
        ),
        ("with_losses", {"sise": 1.0, "unused": 1.0}, "did you mean 'sise'"),
        (
            "with_losses",
            {"size": 1.0, "unused": 1.0, "more": 1.0},
            "student_losses: more is not among .* 'size', 'unused'",
        ),
        ("with_training_losses", {"size": 1.0}, "the loss 'unused', which has no weight"),
        ("a_tensor", {"size": 1.0}, "student_losses: size is not among the losses that the student returns, none"),
    ],
)
def test_names_of_losses(digits: Path, kind: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config_of(digits, f"names {kind} {len(weights)}", kind, distill={"student_losses": weights}))


@pytest.mark.parametrize("name", ["task", "loss", "lr", "feature_mse.first", "a_weight", "a b"])
def test_taken_names(digits: Path, name: str) -> None:
    term = {"loss": "feature_mse", "student": "first", "teacher": "logits"}
    with pytest.raises(ValueError, match=f"student_losses: {name!r} is taken or no name; rename it"):
        config_of(digits, "taken", "a_tensor", distill={"features": [term], "student_losses": {name: 1.0}})


@pytest.mark.slow
def test_both_networks_in_one_module(digits: Path) -> None:
    config = config_of(
        digits,
        "both",
        "both",
        stage="baseline",
        distill={"loss": None, "task_weight": 0.5, "student_losses": {"match": 2.0}},
        train__ema={"decay": 0.5},
    )
    result = run(config)

    def make() -> nn.Module:
        module = any_student.both()
        module.teacher.requires_grad_(False).eval()  # type: ignore[union-attr,operator]
        return module

    def loss_of(output: Any, batch: KDBatch) -> Tensor:
        assert batch.labels is not None
        task = losses.task(output["logits"], batch.labels, valid=batch.valid)
        return 0.5 * task + 2.0 * output["losses"]["match"]

    wanted = plain_loop(config, make, loss_of)
    found = tiny_run.weights(result.folder)
    assert not any(name.startswith("teacher.") for name in found)
    for name, tensor in found.items():
        assert tensor.equal(wanted.state_dict()[name]), name
    exported = open_model_file(result.folder, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=PLUGINS)
    assert isinstance(exported.model, any_student.Returns)
    best = torch.load(result.folder / "checkpoints" / "best_student.pt", weights_only=True)
    assert best.keys() == exported.model.state_dict().keys()


@pytest.mark.slow
def test_both_networks_resume(digits: Path) -> None:
    changes: dict[str, Any] = {
        "stage": "baseline",
        "distill": {"loss": None, "task_weight": 0.5, "student_losses": {"match": 2.0}},
    }
    whole = run(config_of(digits, "both whole", "both", **changes))
    run(config_of(digits, "both parts", "both", **changes, train__epochs=1))
    parts = run(config_of(digits, "both parts", "both", **changes))
    first, second = tiny_run.weights(whole.folder), tiny_run.weights(parts.folder)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_adapted_images_are_those_of_another_transform(digits: Path) -> None:
    normalization = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    student = {"factory": f"{PLUGINS[0]}:a_tensor"}
    adapted = config_of(
        digits,
        "adapted",
        "a_tensor",
        stage="baseline",
        student=student | {"input_adapter": normalization},
        **tiny_run.WITH_ONNX,
    )
    plain = config_of(
        digits,
        "normalized",
        "a_tensor",
        stage="baseline",
        data__train__transform=tiny_run.TRAIN | normalization,
        data__val__transform=tiny_run.EVAL | normalization,
        **tiny_run.WITH_ONNX,
    )
    first, second = run(adapted).folder, run(plain).folder
    weights = tiny_run.weights(second)
    for name, tensor in tiny_run.weights(first).items():
        torch.testing.assert_close(tensor, weights[name.removeprefix("network.")], rtol=1e-3, atol=1e-5)
    pixels = torch.rand(3, 3, 8, 8)
    transforms = adapted.data.split("val").transform, plain.data.split("val").transform
    logits = []
    for folder, transform in zip((first, second), transforms, strict=True):
        images = (pixels - per_channel(transform.mean)) / per_channel(transform.std)
        for path in (folder, folder / "exported" / "model.onnx"):
            opened = open_model_file(path, image_shape=(3, 8, 8), device=torch.device("cpu"), plugins=PLUGINS)
            with torch.no_grad():
                logits.append(logits_of(opened.model(images)))
            opened.close()
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_teacher_and_student_of_one_channel(digits: Path) -> None:
    """Both get gray images of the loader's three channels, and so does what is exported."""
    gray = {"mean": [0.3], "std": [0.35]}
    network = {"builtin": "small_resnet", "kwargs": {"in_channels": 1, "width": 4}}
    torch.save(small_resnet(10, width=4, in_channels=1).state_dict(), digits / "gray.pt")
    teacher = {"model": network | {"checkpoint": digits / "gray.pt"}, "input_adapter": gray, "backend": "pytorch"}
    student = network | {"input_adapter": gray}
    config = config_of(digits, "gray", "a_tensor", teacher=teacher, student=student, **tiny_run.WITH_ONNX)
    folder = run(config).folder
    weights = load_file(folder / "exported" / "model.safetensors")
    student_alone = small_resnet(10, width=4, in_channels=1)
    student_alone.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
    pixels, transform = torch.rand(3, 1, 8, 8).expand(3, 3, 8, 8), config.data.split("val").transform
    images = (pixels - per_channel(transform.mean)) / per_channel(transform.std)
    opened = open_model_file(folder / "exported" / "model.onnx", image_shape=(3, 8, 8), device=torch.device("cpu"))
    with torch.no_grad():
        expected = student_alone.eval()((pixels[:, :1] - 0.3) / 0.35)
        torch.testing.assert_close(logits_of(opened.model(images)), expected, rtol=1e-3, atol=1e-4)
    opened.close()


@pytest.mark.slow
def test_adapted_size(digits: Path) -> None:
    student = {
        "factory": f"{PLUGINS[0]}:a_tensor",
        "input_adapter": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 8},
    }
    config = config_of(
        digits,
        "resized",
        "a_tensor",
        stage="baseline",
        student=student,
        data__train__transform=tiny_run.TRAIN | {"size": 12},
        data__val__transform=tiny_run.EVAL | {"size": 12, "resize": 12},
        train__optimizer={"name": "sgd", "lr": 0.05, "lr_scale": {"head": 0.0001}},
        **tiny_run.WITH_ONNX,
    )
    folder = run(config).folder
    images = torch.rand(2, 3, 12, 12)
    opened = [
        open_model_file(path, image_shape=(3, 12, 12), device=torch.device("cpu"), plugins=PLUGINS)
        for path in (folder, folder / "exported" / "model.onnx")
    ]
    with torch.no_grad():
        first, second = (logits_of(each.model(images)) for each in opened)
    for each in opened:
        each.close()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"factory": f"{PLUGINS[0]}:a_tensor", "input_adapter": "auto"}, "Returns does not say what it was trained on"),
        (
            {"factory": f"{PLUGINS[0]}:both", "input_adapter": {"mean": [0.5] * 3, "std": [0.5] * 3}},
            "adapt images there",
        ),
    ],
)
def test_adapters_that_cannot_be(digits: Path, student: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config_of(digits, f"no adapter {message[:7]}", "a_tensor", student=student))


def test_the_teacher_has_its_own_adapter(digits: Path) -> None:
    model = {"factory": f"{PLUGINS[0]}:a_tensor", "input_adapter": "auto"}
    with pytest.raises(ValueError, match="set the input_adapter of the teacher beside its model"):
        config_of(digits, "teacher", "a_tensor", teacher={"model": model})
