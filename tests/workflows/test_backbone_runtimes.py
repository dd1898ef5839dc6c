"""A student's loss is the same, whichever runtime runs its teacher."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from kd_pipeline.config.config import default_terms
from kd_pipeline.losses.distillation import Distillation, DistillSettings
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import random_images, unlabeled_batch

SHAPE = (3, 64, 64)
VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
NETWORKS = {
    "vit": ModelSettings(timm="vit_tiny_patch16_224", kwargs=VIT, num_classes=0),
    "vit with small patches": ModelSettings(timm="vit_tiny_patch16_224", kwargs=VIT | {"patch_size": 8}, num_classes=0),
    "cnn": ModelSettings(timm="test_resnet", num_classes=0),
    "wide cnn": ModelSettings(torchvision="resnet18", num_classes=0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [("vit", "cnn"), ("cnn", "vit"), ("vit", "vit with small patches"), ("wide cnn", "cnn")],
)
def test_loss_is_the_same_in_every_runtime(
    teacher_name: str, student_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # for the exports
    torch.manual_seed(0)
    network, student = open_model(NETWORKS[teacher_name]), open_model(NETWORKS[student_name]).eval()
    images = random_images(3, shape=SHAPE)
    losses: dict[str, torch.Tensor] = {}
    distillation: Distillation | None = None
    for backend in ("pytorch", "onnxruntime", "openvino"):
        settings = TeacherSettings(backend=backend, precision="fp32")
        with closing(open_teacher(settings, module=network, image_shape=SHAPE)) as teacher:
            if distillation is None:  # with one projector for all
                distillation = Distillation(
                    DistillSettings(loss=None, features=default_terms(None)),
                    student=student,
                    teacher_outputs=teacher.outputs,
                    image_shape=SHAPE,
                    num_classes=None,
                ).eval()
            batch = unlabeled_batch(images, teacher(images))
        terms = distillation(student(images), {}, batch, epoch=0, epochs=1).terms
        losses[backend] = torch.stack([*terms.values()]).detach()
    assert (losses["pytorch"] > 0.01).all() and len(losses["pytorch"]) == 2
    for backend in ("onnxruntime", "openvino"):
        torch.testing.assert_close(losses[backend], losses["pytorch"], rtol=1e-4, atol=1e-5)
