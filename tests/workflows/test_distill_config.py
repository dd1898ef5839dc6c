"""Two names and a folder become a whole config, whose defaults follow what is overridden."""

from dataclasses import replace
from pathlib import Path

import pytest

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows.distill_config import Images, distill_config, parse_student, parse_teacher, run_name

IMAGES = Images(
    train={"kind": "image_folder", "root": "photos", "labeled": False},
    val={"kind": "image_folder", "root": "held_out", "labeled": False},
)
LABELED = replace(
    IMAGES,
    bank={"kind": "image_folder", "root": "flowers/train"},
    queries={"kind": "image_folder", "root": "flowers/val"},
)


def config(
    *overrides: str, teacher: str = "timm:vit_small_patch16_dinov3", student: str = "timm:resnet18", **arguments: object
) -> Config:
    defaults = {
        "images": IMAGES,
        "run_dir": Path("runs/x"),
        "epochs": 100,
        "overrides": ["data.device=cpu", *overrides],
    }
    return distill_config(parse_teacher(teacher), parse_student(student), **defaults | arguments)  # type: ignore[arg-type]


def size(found: Config) -> int:
    return found.data.split("train").transform.size


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_teacher_of_a_library_has_its_pretrained_weights(library: str) -> None:
    found = TeacherSettings.model_validate(parse_teacher(f"{library}:resnet18"))
    assert found.model is not None and found.model.pretrained and found.model.is_headless
    assert found.input_adapter == ("auto" if library == "timm" else None)


def test_weights_replace_the_pretrained_ones(tmp_path: Path) -> None:
    weights = tmp_path / "dino.pt"
    weights.touch()
    found = TeacherSettings.model_validate(parse_teacher("builtin:small_resnet", weights))
    assert found.model is not None and found.model.checkpoint == weights and not found.model.pretrained


def test_factory_brings_its_weights() -> None:
    found = TeacherSettings.model_validate(parse_teacher("factory:mine.nets:wide"))
    assert found.model is not None and found.model.factory == "mine.nets:wide" and found.model.checkpoint is None


def test_onnx_teacher_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    found = TeacherSettings.model_validate(parse_teacher(f"onnx:{tmp_path / 'a.onnx'}"))
    assert found.onnx == tmp_path / "a.onnx" and found.model is None


def test_student_has_random_weights_and_no_head() -> None:
    found = ModelSettings.model_validate(parse_student("torchvision:resnet50"))
    assert found.torchvision == "resnet50" and found.is_headless and not found.pretrained and found.checkpoint is None


@pytest.mark.parametrize(
    ("role", "name", "words"),
    [
        ("teacher", "resnet18", "does not say where it is from; write timm:resnet18"),
        ("teacher", "tim:resnet18", "there is no 'tim' to take it from; did you mean 'timm'?"),
        ("teacher", "hub:resnet18", "there is no 'hub' to take it from; write one of timm:NAME"),
        ("teacher", "timm:", "lacks a name"),
        ("teacher", "onnx:nowhere.onnx", "there is no such file"),
        ("student", "onnx:some.onnx", "an ONNX file cannot be trained"),
        ("student", "resnet18", "write timm:resnet18"),
    ],
)
def test_wrong_name_says_what_to_write(role: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"the {role} .*{words}"):
        parse_teacher(name) if role == "teacher" else parse_student(name)


def test_random_teacher_is_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"builtin:small_resnet has no pretrained weights; .* teacher\.model\.pretrained"
    ):
        config(teacher="builtin:small_resnet")
    found = config("teacher.model.pretrained=false", teacher="builtin:small_resnet")
    assert isinstance(found.teacher, TeacherSettings) and found.teacher.model is not None
    assert found.teacher.model.builtin and found.teacher.model.checkpoint is None


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pt: there is no such file"):
        parse_teacher("timm:resnet18", tmp_path / "none.pt")
    (tmp_path / "a.pt").touch()
    with pytest.raises(ConfigError, match="has its own weights"):
        parse_teacher("onnx:teacher.onnx", tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], r"override 'train.epoch=3': .*did you mean 'epochs'"),
        (["teacher.model.timm=resnet19"], "no network called 'resnet19'; did you mean 'resnet18'"),
        (["student.timm=resnet8"], "no network called 'resnet8'"),
        (["student.num_classes=10"], "trains a backbone without a head"),
        (["epochs"], "should be key.path=value"),
    ],
)
def test_wrong_override_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(*overrides)


def test_images_have_the_size_of_the_teacher() -> None:
    found = config()
    assert size(found) == 256  # timm's DINOv3
    assert found.data.val is not None and found.data.val.transform.size == 256


def test_student_of_a_fixed_size_decides() -> None:
    assert size(config(student="timm:vit_tiny_patch16_224")) == 224
    assert size(config("student.kwargs.img_size=96", student="timm:vit_tiny_patch16_224")) == 96


def test_usual_size_where_nobody_knows() -> None:
    assert size(config(teacher="torchvision:resnet18")) == 224


def test_evaluation_follows_an_overridden_transform() -> None:
    found = config("data.train.transform.size=64", "data.train.transform.mean=[0.5,0.5,0.5]", images=LABELED)
    for split in found.data.splits.values():
        assert split.transform.size == 64 and split.transform.mean == (0.5, 0.5, 0.5)
    assert found.remarks == ()
    assert config("data.train.transform.size=64", "data.val.transform.resize=64").data.split("val").transform.size == 64


@pytest.mark.parametrize(("batch_size", "lr"), [(128, 1e-3), (512, 2e-3), (32, 5e-4)])
def test_learning_rate_grows_with_the_root_of_the_batch(batch_size: int, lr: float) -> None:
    assert config(f"data.batch_size={batch_size}").train.optimizer.lr == pytest.approx(lr)
    assert config(f"data.batch_size={batch_size // 2}", "train.accumulate=2").train.optimizer.lr == pytest.approx(lr)


def test_batch_is_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = config()
    assert found.data.batch_size == 32 and found.train.optimizer.lr == pytest.approx(1e-3)


@pytest.mark.parametrize(("num_train", "batch_size"), [(1, 1), (8, 2), (50, 8), (511, 64), (512, 128), (10**6, 128)])
def test_epoch_of_a_small_dataset_has_several_steps(num_train: int, batch_size: int) -> None:
    found = config(num_train=num_train)
    assert found.data.batch_size == batch_size and num_train // batch_size >= min(num_train, 4)
    assert found.train.optimizer.lr == pytest.approx(1e-3 * (batch_size / 128) ** 0.5, rel=0.01)


def test_override_comes_last() -> None:
    found = config("train.optimizer.lr=0.5", "train.epochs=7", "train.schedule.warmup_epochs=2", epochs=3)
    assert (found.train.optimizer.lr, found.train.epochs, found.train.schedule.warmup_epochs) == (0.5, 7, 2)


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 10), (100, 10), (20, 2), (1, 0.1)])
def test_short_runs_warm_up_for_a_tenth(epochs: int, warmup: float) -> None:
    assert config(epochs=epochs).train.schedule.warmup_epochs == pytest.approx(warmup)


def test_other_optimizers_and_schedules_have_no_foreign_defaults() -> None:
    assert config().train.optimizer.weight_decay == 0.04
    assert config("train.optimizer.name=sgd").train.optimizer.weight_decay is None
    assert config("train.schedule.kind=constant").train.schedule.kind == "constant"


def test_unlabeled_run_selects_by_its_loss() -> None:
    found = config()
    assert (found.train.select_by, found.train.select_mode) == ("val/loss", "min")
    assert found.feature_probe is None


@pytest.mark.parametrize(("images", "split"), [(LABELED, "labeled"), (replace(LABELED, queries=None), "bank")])
def test_labels_select_by_neighbors(images: Images, split: str) -> None:
    found = config(images=images)
    assert found.feature_probe is not None
    assert (found.feature_probe.bank, found.feature_probe.sets) == ("bank", (split,))
    assert (found.train.select_by, found.train.select_mode) == (f"{split}/knn_top1", "max")


@pytest.mark.parametrize(("epochs", "every"), [(100, 5), (10, 1)])
def test_labeled_images_are_classified_twenty_times_at_most(epochs: int, every: int) -> None:
    probe = config(images=LABELED, epochs=epochs).feature_probe
    assert probe is not None and probe.every == every


def test_run_is_named_after_its_networks() -> None:
    assert run_name("timm:vit_small_patch16_dinov3.lvd1689m", "timm:resnet18") == (
        "vit_small_patch16_dinov3.lvd1689m_to_resnet18"
    )
    assert run_name("onnx:/models/big one.onnx", "factory:mine.nets:tiny") == "big_one_to_mine.nets.tiny"
