"""Real networks of different families as student and teacher, by the terms that a student without a head gets."""

import pytest
import timm
import torch

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.config import default_terms
from kd_pipeline.losses.distillation import Distillation, DistillSettings, TermSettings
from kd_pipeline.models.backbone import Backbone
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import random_images, unlabeled_batch

SHAPE = (3, 64, 64)
NETWORKS = {
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "vit": ("test_vit", {"img_size": 64}),
    "vit with registers": ("test_vit3", {"img_size": 64}),
    "vit with small patches": ("test_vit", {"img_size": 64, "patch_size": 8}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    ),
}


def backbone(name: str, seed: int) -> Backbone:
    network, options = NETWORKS[name]
    torch.manual_seed(seed)
    return Backbone(timm.create_model(network, num_classes=0, **options))


DEFAULT_TERMS = default_terms(None)


def distill(student, teacher_outputs, features=DEFAULT_TERMS) -> Distillation:
    return Distillation(
        DistillSettings(loss=None, features=features),
        student=student,
        teacher_outputs=teacher_outputs,
        image_shape=SHAPE,
        num_classes=None,
    )


@pytest.mark.parametrize("teacher_name", NETWORKS)
@pytest.mark.parametrize("student_name", NETWORKS)
def test_pairs(student_name, teacher_name):
    student = backbone(student_name, seed=0)
    teacher = PyTorchTeacher(backbone(teacher_name, seed=1), image_shape=SHAPE)
    distillation = distill(student, teacher.outputs)
    images = random_images(2, shape=SHAPE)
    batch = unlabeled_batch(images, teacher(images))
    outputs = student(images)
    found = distillation(outputs, {}, batch, epoch=0, epochs=1)
    assert list(found.terms) == ["cosine.pooled", "am_radio.spatial"]
    assert all(value.isfinite() and value > 0 for value in found.terms.values())
    found.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in distillation.parameters())
    cosines = distillation.cosines(outputs, {}, batch)
    for name, cosine_N in cosines.items():
        assert cosine_N.shape == (2,) and cosine_N.abs().max() <= 1 + 1e-6, name


@pytest.mark.parametrize("name", NETWORKS)
def test_same_network_is_close(name):
    """A student with the teacher's weights has nothing to learn: no projector, no resizing, the same positions."""
    student, teacher = backbone(name, seed=0).eval(), PyTorchTeacher(backbone(name, seed=0), image_shape=SHAPE)
    distillation = distill(student, teacher.outputs)
    assert not list(distillation.parameters())
    images = random_images(2, shape=SHAPE)
    batch = unlabeled_batch(images, teacher(images))
    assert distillation(student(images), {}, batch, epoch=0, epochs=1).total.item() < 1e-5


@pytest.mark.parametrize(("layer", "grid"), [("stage:0", [4, 4]), ("spatial", [4, 4])])
def test_layer_before_the_class_token(layer, grid):
    """CaiT has its class token in the last layers only."""
    student = Backbone(timm.create_model("cait_xxs24_224", num_classes=0, img_size=64, depth=1))
    term = TermSettings(loss="feature_mse", student=layer, teacher="spatial", grid="student")
    distillation = distill(student, {"spatial": TensorSpec((None, 8, *grid), torch.float32)}, (term,))
    images = random_images(2, shape=SHAPE)
    batch = unlabeled_batch(images, {"spatial": torch.randn(2, 8, *grid)})
    with distillation.student_features(student) as features:
        outputs = student(images)
    assert distillation(outputs, features, batch, epoch=0, epochs=1).total > 0
