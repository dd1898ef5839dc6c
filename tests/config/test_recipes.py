"""The configs of the repository are valid, and their parts fit together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import load_config
from kd_pipeline.losses.distillation import Distillation, DistillSettings, LossTerms
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.schedules import check_length
from tests.losses.reference import kl_div, public_dist, public_dkd

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def test_expected_recipes_exist() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "digits",
        "cifar10_resnet50_to_resnet18",
        "cifar100_resnet32x4_to_resnet8x4",
        "imagenet_resnet34_to_resnet18",
        "imagenet_funmatch_resnet50",
        "imagenet_vit_to_mobilenet",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_round_trips(path: Path) -> None:
    config = load_config(path)
    assert config.model_validate(config.model_dump(mode="json")) == config
    assert config.data.train is not None and config.data.val is not None and config.run_dir is not None
    check_length(config.train.schedule, config.train.epochs)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_networks_build(path: Path) -> None:
    config = load_config(path)
    teacher = config.teacher.model if isinstance(config.teacher, TeacherSettings) else None
    for settings in (config.student, teacher):
        if settings is not None:
            plain = ModelSettings.model_validate(settings.model_dump() | {"pretrained": False, "num_classes": 7})
            assert sum(parameter.numel() for parameter in open_model(plain).parameters()) > 1000


def loss_of_recipe(name: str, logits: Tensor, teacher: Tensor, labels: Tensor, epoch: float) -> LossTerms:
    config = load_config(FOLDER / f"{name}.yaml")
    distillation = Distillation(
        config.distill,
        student=nn.Sequential(nn.Flatten(), nn.Linear(12, 10)),
        teacher_outputs={"logits": TensorSpec((None, 10), torch.float32)},
        image_shape=(3, 2, 2),
        num_classes=10,
    )
    everything = torch.ones(len(logits), dtype=torch.bool)
    batch = KDBatch(images=torch.zeros(0), labels=labels, index=labels, valid=everything, teacher={"logits": teacher})
    return distillation(logits, {}, batch, epoch=epoch, epochs=config.train.epochs)


@pytest.mark.parametrize("epoch", [0, 5, 12.5, 20, 239])
def test_recipe_has_the_loss_of_its_authors(epoch: float) -> None:
    """Their code, their weights, and the warm-up of DKD."""
    torch.manual_seed(0)
    logits, teacher, labels = 2 * torch.randn(32, 10), 3 * torch.randn(32, 10), torch.randint(10, (32,))
    task = cross_entropy(logits, labels)
    expected = {
        "imagenet_resnet34_to_resnet18": task + 2 * public_dist(logits, teacher),
        "cifar100_resnet32x4_to_resnet8x4": task + min(epoch / 20, 1.0) * public_dkd(logits, teacher, labels),
        "imagenet_funmatch_resnet50": kl_div(logits, teacher, 1.0),
    }
    for name, total in expected.items():
        found = loss_of_recipe(name, logits, teacher, labels, epoch)
        torch.testing.assert_close(found.total, total, msg=lambda text, name=name: f"{name}: {text}")


def test_cifar100_pixels_are_those_of_the_published_teachers() -> None:
    data = load_config(FOLDER / "cifar100_resnet32x4_to_resnet8x4.yaml").data
    for split in ("train", "val"):
        transform = data.split(split).transform
        assert transform.mean == (0.5071, 0.4867, 0.4408) and transform.std == (0.2675, 0.2565, 0.2761)


@pytest.mark.parametrize("name", ["digits", "digits_all_stages"])
def test_another_loss_for_the_digits_has_its_own_defaults(name: str) -> None:
    """Numbers of one loss, spelled out in the config, would stay when the loss is overridden."""
    for loss in ("soft_target", "dkd", "dist", "cosine", "hard_label"):
        assert load_config(FOLDER / f"{name}.yaml", [f"distill.loss={loss}"]).distill == DistillSettings(loss=loss)
