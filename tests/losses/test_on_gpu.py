"""The training loss on a GPU, as far as torch can be asked without one: what it copies, and what it waits for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation, DistillSettings
from kd_pipeline.losses.projectors import build_projector
from kd_pipeline.losses.resize import Resizer
from kd_pipeline.losses.standardize import NUM_BATCHES, Standardizer
from kd_pipeline.losses.teacher_queue import TeacherQueue
from tests.on_gpu import DEVICE, Copy, OnGpu

ROWS, CLASSES, SHAPE = 6, 5, (3, 16, 16)
TEACHER = {
    "logits": (CLASSES,),
    "pooled": (12,),
    "tokens": (16, 12),
    "map": (12, 4, 4),
    "large": (12, 8, 8),
}
PIXELS = {"logits": (CLASSES, 4, 4), "map": (12, 4, 4)}


class Student(nn.Module):
    """Returns logits, a further head, and features of all kinds; or logits of the pixels."""

    def __init__(self, of_pixels: bool = False) -> None:
        super().__init__()
        self.of_pixels = of_pixels
        self.layer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Any]:
        features = self.layer(images)
        logits = self.head(features)
        if self.of_pixels:
            return {"logits": logits, "aux": logits[:, :, ::2, ::2], "map": features}
        return {
            "logits": logits.mean((2, 3)),
            "aux": logits.amax((2, 3)),
            "pooled": features.mean((2, 3)),
            "tokens": features.flatten(2).transpose(1, 2)[:, :16],
            "map": features,
            "losses": {"balance": features.square().mean()},
        }


def term(loss: str, output: str, **options: Any) -> dict[str, Any]:
    return {"loss": loss, "student": output, "teacher": options.pop("teacher", output), **options}


LOSSES: dict[str, dict[str, Any]] = {
    "logits": {"loss": "soft_target", "label_smoothing": 0.1},
    "decoupled": {"loss": "dkd", "temperature": {"start": 4, "end": 1}},
    "heads": {"heads": {"aux": 0.5}, "features": [term("dist", "aux", teacher="logits")]},
    "vectors": {"features": [term("cosine", "pooled", standardize="global"), term("logit_mse", "pooled")]},
    "queue": {"features": [term("relational", "pooled", queue_size=9)]},
    "tokens": {"features": [term("am_radio", "tokens", standardize="channels")]},
    "maps": {"features": [term("feature_smooth_l1", "map", grid="smaller"), term("attention_transfer", "map")]},
    "enlarged": {"features": [term("feature_mse", "map", teacher="large", projector="mlp", standardize="phi_s")]},
    "tokens and maps": {"features": [term("feature_cosine", "map", teacher="tokens")]},
}
OF_PIXELS: dict[str, dict[str, Any]] = {
    "pixels": {"loss": "soft_target", "skip_ignored": True, "heads": {"aux": 0.4}},
    "decoupled pixels": {"loss": "dkd", "label_smoothing": 0.1},
    "channels": {
        "loss": None,
        "task_weight": 1.0,
        "features": [
            term("channel_wise", "logits", skip_ignored=True),
            term("feature_mse", "map", skip_ignored=True, standardize="channels"),
        ],
    },
}


def build(settings: dict[str, Any], *, of_pixels: bool = False, **options: Any) -> tuple[Student, Distillation]:
    shapes = PIXELS if of_pixels else TEACHER
    losses = {} if of_pixels else {"student_losses": {"balance": 0.1}}
    student = Student(of_pixels)
    return student, Distillation(
        DistillSettings.model_validate({**losses, **settings}),
        student=student,
        teacher_outputs={name: TensorSpec((None, *shape), torch.float32) for name, shape in shapes.items()},
        image_shape=SHAPE,
        num_classes=CLASSES,
        **options,
    )


def batch_on(gpu: OnGpu, *, of_pixels: bool = False, soft: bool = False) -> KDBatch:
    shapes = PIXELS if of_pixels else TEACHER
    labels = torch.zeros(ROWS, CLASSES) if soft else torch.zeros(ROWS, dtype=torch.int64)
    masks = torch.zeros(ROWS, *SHAPE[1:], dtype=torch.int64)
    batch = KDBatch(
        images=torch.zeros(ROWS, *SHAPE),
        labels=None if of_pixels else labels,
        masks=masks if of_pixels else None,
        index=torch.arange(ROWS),
        valid=torch.ones(ROWS, dtype=torch.bool),
        teacher={name: torch.zeros(ROWS, *shape) for name, shape in shapes.items()},
    )
    return KDBatch({name: _on(gpu, value) for name, value in batch.asdict().items()})


def _on(gpu: OnGpu, value: Any) -> Any:
    return {name: gpu.tensor(each) for name, each in value.items()} if isinstance(value, dict) else gpu.tensor(value)


def move(gpu: OnGpu, distillation: Distillation, *, num_batches: int) -> None:
    """To the GPU, but for the batches that standardizers have counted, which are on the host."""
    gpu.module(distillation)
    for standardizer in distillation.standardizers.values():
        standardizer.num_batches = torch.tensor(num_batches)


def copies_of_a_step(gpu: OnGpu, student: Student, distillation: Distillation, batch: KDBatch) -> list[Copy]:
    before = len(gpu.copies)
    with distillation.student_features(student) as features:
        outputs = student(batch.images)
    terms = distillation(outputs, features, batch, epoch=0.5, epochs=2)
    assert all(value.device == DEVICE for value in (terms.total, *terms.terms.values(), *terms.shares.values()))
    assert terms.total.requires_grad
    return gpu.copies[before:]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("settings", "of_pixels"),
    [*((each, False) for each in LOSSES.values()), *((each, True) for each in OF_PIXELS.values())],
    ids=[*LOSSES, *OF_PIXELS],
)
def test_step_copies_and_reads_nothing(settings: dict[str, Any], of_pixels: bool, is_first: bool) -> None:
    """But for the matrices that resize maps, once, and what standardizers compute from 1, 2, 4, ... 128 batches."""
    student, distillation = build(settings, of_pixels=of_pixels)
    with OnGpu() as gpu:
        gpu.module(student)
        move(gpu, distillation, num_batches=2 if is_first else NUM_BATCHES)
        batch = batch_on(gpu, of_pixels=of_pixels)
        first = copies_of_a_step(gpu, student, distillation, batch)
        assert all(len(copy.shape) == 2 and copy.shape[0] <= 16 for copy in first)  # the matrices
        assert copies_of_a_step(gpu, student, distillation.eval(), batch) == []


def test_soft_labels_are_not_read() -> None:
    student, distillation = build({"loss": "dist"}, labels_are_soft=True)
    with OnGpu() as gpu:
        gpu.module(student)
        gpu.module(distillation)
        assert copies_of_a_step(gpu, student, distillation, batch_on(gpu, soft=True)) == []


@pytest.mark.parametrize("kind", ["global", "channels", "phi_s"])
def test_statistics_are_applied_without_their_count(kind: Any) -> None:
    """It is read in each batch, and so is on the host."""
    standardizer = Standardizer(kind, 12)
    with OnGpu() as gpu:
        gpu.module(standardizer)
        features, valid = gpu.tensor(torch.zeros(ROWS, 12, 4, 4)), gpu.tensor(torch.ones(ROWS, dtype=torch.bool))
        with pytest.raises(DataDependentOutputException):
            standardizer(features, valid)
        standardizer.num_batches = torch.tensor(4)  # nothing is computed from the fifth one
        assert standardizer(features, valid).device == DEVICE
        assert not gpu.copies
        standardizer.num_batches = torch.tensor(7)
        standardizer(features, valid)
        assert [copy.shape for copy in gpu.copies] == ([(12, 12)] if kind == "phi_s" else [])


def test_queue_is_pushed_without_reading_it() -> None:
    queue = TeacherQueue(9, 12)
    with OnGpu() as gpu:
        gpu.module(queue)
        vectors, valid = queue(gpu.tensor(torch.zeros(ROWS, 12)), gpu.tensor(torch.ones(ROWS, dtype=torch.bool)))
        assert vectors.shape == (ROWS + 9, 12) and {vectors.device, valid.device} == {DEVICE}
        assert not gpu.copies


@pytest.mark.parametrize("how", ["auto", "bilinear", "area"])
def test_matrices_are_copied_once(how: Any) -> None:
    resize = Resizer(how)
    with OnGpu() as gpu:
        maps = gpu.tensor(torch.zeros(2, 3, 4, 6))
        assert resize(maps, (8, 3)).device == DEVICE
        assert [copy.shape for copy in gpu.copies] == [(3, 6), (8, 4)]
        resize(maps, (8, 3))
        assert len(gpu.copies) == 2


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", (8,)), ("linear", (4, 8)), ("mlp", (8, 2, 2)), ("conv", (8, 2, 2))]
)
def test_projector_is_where_the_features_are(kind: Any, shape: tuple[int, ...]) -> None:
    with OnGpu() as gpu:
        features = gpu.tensor(torch.zeros(2, *shape))
        projector = build_projector(kind, 8, 12, features)
        assert projector(features).device == DEVICE
        assert not gpu.copies
