"""One contract for any pair of teacher and student by name: it trains, and what comes out is the student's trunk."""

import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows.exported import export_student, open_model_file
from tests.networks import random_images, unlabeled_batch

SIZE = 64
SHAPE = (3, SIZE, SIZE)
VIT = {"img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "ViT": {"timm": "vit_tiny_patch16_224", "kwargs": VIT},
    "ViT, small patches": {"timm": "vit_tiny_patch16_224", "kwargs": VIT | {"patch_size": 8}},
    "ViT, no class token": {"timm": "vit_base_patch16_siglip_224", "kwargs": VIT},
    "DINOv2": {"timm": "vit_small_patch14_reg4_dinov2", "kwargs": VIT | {"patch_size": 16, "embed_dim": 36}},
    "DINOv3": {"timm": "vit_small_patch16_dinov3", "kwargs": VIT},
    "Swin": {"timm": "swin_tiny_patch4_window7_224", "kwargs": {"img_size": SIZE, "window_size": 2, "embed_dim": 24}},
    "ConvNeXt": {"timm": "test_convnext"},
    "EfficientNet": {"timm": "test_efficientnet"},
    "MobileNetV3": {"timm": "mobilenetv3_small_050"},
    "ResNet": {"timm": "test_resnet"},
    "ResNet of torchvision": {"torchvision": "resnet18"},
    "MobileNetV3 of torchvision": {"torchvision": "mobilenet_v3_small"},
    "ShuffleNet of torchvision": {"torchvision": "shufflenet_v2_x0_5"},
    "ResNet of this package": {"builtin": "small_resnet", "kwargs": {"width": 8}},
}
FAST = [("ViT", "ResNet"), ("ResNet", "ViT, small patches")]
PAIRS = [
    ("DINOv3", "ResNet of torchvision"),
    ("DINOv2", "MobileNetV3 of torchvision"),
    ("ViT", "ViT, small patches"),
    ("ViT, small patches", "DINOv3"),
    ("ViT, no class token", "MobileNetV3"),
    ("ResNet of torchvision", "ViT"),
    ("ConvNeXt", "ViT, no class token"),
    ("Swin", "ResNet of this package"),
    ("DINOv2", "Swin"),
    ("ResNet of this package", "ShuffleNet of torchvision"),
    ("ConvNeXt", "EfficientNet"),
    ("MobileNetV3", "ConvNeXt"),
]


def load_in_its_library(settings: ModelSettings, weights: Path) -> None:
    """Load the file strictly into what the library builds without classes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if settings.timm is not None:
            network: nn.Module = timm.create_model(settings.timm, num_classes=0, **settings.kwargs)
        elif settings.torchvision is not None:
            network = torchvision.models.get_model(settings.torchvision, num_classes=0)
        else:
            network = trunk_of(open_model(settings))
    network.load_state_dict(load_file(weights), strict=True)


def check_pair(teacher_name: str, student_name: str, folder: Path) -> None:
    torch.manual_seed(0)
    teacher_model = ModelSettings.model_validate(NETWORKS[teacher_name] | {"num_classes": 0})
    torch.save(trunk_of(open_model(teacher_model)).state_dict(), folder / "teacher.pt")
    config = Config.model_validate(
        {
            "data": {"batch_size": 4},
            "teacher": {
                "backend": "pytorch",
                "precision": "fp32",
                "model": teacher_model.model_copy(update={"checkpoint": folder / "teacher.pt"}),
            },
            "student": NETWORKS[student_name] | {"num_classes": 0},
        }
    )
    assert config.student is not None and config.teacher is not None
    student = open_model(config.student)
    with closing(open_teacher(config.teacher, image_shape=SHAPE)) as teacher:
        distillation = Distillation(
            config.distill, student=student, teacher_outputs=teacher.outputs, image_shape=SHAPE, num_classes=None
        )
        images = random_images(4, shape=SHAPE)
        batch = unlabeled_batch(images, teacher(images))
    parameters = [*student.parameters(), *distillation.parameters()]
    trained = {name: each for name, each in student.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in parameters if each.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        with distillation.student_features(student) as features:
            outputs = student(images)
        found = distillation(outputs, features, batch, epoch=0, epochs=1)
        assert found.total.isfinite() and len(found.terms) == len(config.distill.features)
        optimizer.zero_grad()
        found.total.backward()
        assert not [name for name, each in trained.items() if each.grad is None]
        optimizer.step()
        losses.append(float(found.total.detach()))
    assert losses[-1] < losses[0]
    export_student(
        student.eval(),
        config.student,
        folder / "exported",
        classes=None,
        transform=EvalTransform(size=SIZE),
        calibration_set=lambda: 1 / 0,
        export=ExportSettings(onnx=False),
    )
    load_in_its_library(config.student, folder / "exported" / "model.safetensors")
    opened = open_model_file(folder, image_shape=(3, SIZE, SIZE), device=torch.device("cpu")).model
    with torch.no_grad():
        again, expected = opened(images), student(images)
    assert all(torch.equal(again[name], output) for name, output in expected.items())


@pytest.mark.parametrize(("teacher", "student"), FAST)
def test_pair_trains_and_exports(teacher: str, student: str, tmp_path: Path) -> None:
    check_pair(teacher, student, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_more_pairs_train_and_export(teacher: str, student: str, tmp_path: Path) -> None:
    check_pair(teacher, student, tmp_path)
