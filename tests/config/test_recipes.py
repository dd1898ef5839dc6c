"""The configs of the repository are valid, and their parts fit together."""

from pathlib import Path

import pytest

from kd_pipeline.config.config import load_config
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.schedules import check_length

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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
