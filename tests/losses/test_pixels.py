"""Losses of networks for segmentation: each pixel is a row, and those without a class count nowhere."""

import math

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kd_pipeline import losses
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.losses.distillation import Distillation, DistillSettings
from kd_pipeline.losses.pixels import PixelLabels, at_grid
from tests.losses.reference import kl_div, public_dist, public_dkd, softmax, two_models, two_models_torch

IGNORED = 255


def rows(maps: Tensor, keep: Tensor) -> Tensor:
    """The pixels `keep` `[N, h, w]` of maps, one below the other `[R, K]`."""
    return maps.permute(0, 2, 3, 1)[keep]


def masks_of(shape=(3, 4, 5), num_classes=6, seed=1) -> Tensor:
    """Random classes, about a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(num_classes, shape, generator=generator)
    return masks.masked_fill(torch.rand(shape, generator=generator) < 0.3, IGNORED)


PAIRS = {
    "soft_target": (losses.soft_target, lambda s, t: kl_div(s, t, 4.0)),
    "logit_mse": (losses.logit_mse, functional.mse_loss),
    "hard_label": (losses.hard_label, lambda s, t: functional.cross_entropy(s, t.argmax(1))),
    "cosine": (losses.cosine, lambda s, t: 1 - functional.cosine_similarity(s, t).mean()),
    "dist": (losses.dist, public_dist),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pixels_that_count_are_rows(name):
    loss, formula = PAIRS[name]
    student, teacher = two_models_torch((3, 6, 4, 5))
    mask = masks_of() != IGNORED
    torch.testing.assert_close(loss(student, teacher, mask=mask), formula(rows(student, mask), rows(teacher, mask)))
    everything = torch.ones_like(mask)
    torch.testing.assert_close(loss(student, teacher), formula(rows(student, everything), rows(teacher, everything)))


@pytest.mark.parametrize("name", [*PAIRS, "dkd", "task", "channel_wise"])
def test_masked_pixels_may_hold_anything(name):
    """They change neither the loss nor its gradient, which is 0 for them."""
    masks = masks_of()
    mask = masks != IGNORED
    labels = {"labels": masks} if name in ("dkd", "task") else {}

    def run(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student.requires_grad_()
        tensors = {"student_logits_NK": student} if name == "task" else {}
        positional = () if name == "task" else (student, teacher)
        value = getattr(losses, name)(*positional, **tensors, **labels, mask=mask)
        return value, torch.autograd.grad(value, student)[0]

    student, teacher = two_models_torch((3, 6, 4, 5))
    expected, expected_gradient = run(student.clone(), teacher)
    out = ~mask[:, None].expand_as(student)
    with torch.autograd.set_detect_anomaly(True):
        value, gradient = run(student.masked_fill(out, math.nan), teacher.masked_fill(out, math.inf))
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert (gradient[out] == 0).all()
    assert gradient[~out].abs().sum() > 0


def test_dkd_of_pixels():
    student, teacher = two_models_torch((3, 6, 4, 5))
    masks = masks_of()
    keep = masks != IGNORED
    expected = public_dkd(rows(student, keep), rows(teacher, keep), masks[keep])
    torch.testing.assert_close(losses.dkd(student, teacher, masks, mask=keep), expected)


def test_soft_target_pixel_by_pixel():
    """With loops over the pixels."""
    student, teacher = two_models((2, 3, 2, 2))
    total = 0.0
    for image, row, column in numpy.ndindex(2, 2, 2):
        p, q = (softmax(list(each[image, :, row, column] / 2)) for each in (teacher, student))
        total += 4 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    found = losses.soft_target(torch.tensor(student), torch.tensor(teacher), temperature=2.0)
    assert found.item() == pytest.approx(total / 8, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_task_is_cross_entropy_of_torch(smoothing):
    student = two_models_torch((3, 6, 4, 5))[0].requires_grad_()
    masks = masks_of()
    found = losses.task(student, masks, label_smoothing=smoothing, mask=masks != IGNORED)
    expected = functional.cross_entropy(student, masks, ignore_index=IGNORED, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_masks_at_another_size():
    masks = masks_of((2, 6, 9))
    for size in ((6, 9), (3, 3), (2, 9), (12, 18), (5, 7)):
        expected = functional.interpolate(masks[:, None].double(), size, mode="nearest-exact")[:, 0].long()
        assert torch.equal(at_grid(masks, size), expected)
    labels, counts = PixelLabels(masks, IGNORED).at((3, 3))
    assert torch.equal(counts, labels != IGNORED)
    assert 0 < counts.sum() < counts.numel()


class Pixels(nn.Module):
    """Logits of pixels from two layers, at a third of the images' size."""

    def __init__(self, num_classes: int = 4, *, stride: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1, stride=stride)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.trunk(images).relu())}


NUM_CLASSES, SIZE = 4, (12, 15)
TEACHER = {
    "logits": TensorSpec((None, NUM_CLASSES, 12, 15), torch.float32),
    "map": TensorSpec((None, 8, 4, 5), torch.float32),
}


def batch_of(num_rows: int = 2, **changes) -> KDBatch:
    generator = torch.Generator().manual_seed(5)
    fields = {
        "images": torch.randn(num_rows, 3, *SIZE, generator=generator),
        "index": torch.arange(num_rows),
        "valid": torch.ones(num_rows, dtype=torch.bool),
        "masks": masks_of((num_rows, *SIZE), NUM_CLASSES),
        "teacher": {
            name: torch.randn(num_rows, *spec.shape[1:], generator=generator) for name, spec in TEACHER.items()
        },
    }
    return KDBatch(fields | changes)


def loss_of(student: nn.Module, batch: KDBatch, settings: dict, **options):
    arguments = {"image_shape": (3, *SIZE), "num_classes": NUM_CLASSES, "teacher_outputs": TEACHER} | options
    distillation = Distillation(DistillSettings(**settings), student=student, **arguments)
    with distillation.student_features(student) as features:
        outputs = student(batch.images)
    return distillation(outputs, features, batch, epoch=0, epochs=1)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Pixels()


def test_terms_meet_at_their_sizes(student):
    """The labels at the size of the masks, the teacher at the smaller of both."""
    batch = batch_of()
    terms = loss_of(student, batch, {"temperature": 1.0}).terms
    logits, teacher = student(batch.images)["logits"], batch.teacher["logits"]
    enlarged = functional.interpolate(logits, SIZE, mode="bilinear")
    torch.testing.assert_close(terms["task"], functional.cross_entropy(enlarged, batch.masks, ignore_index=IGNORED))
    shrunk, everything = functional.adaptive_avg_pool2d(teacher, (4, 5)), torch.ones(2, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(terms["distill"], kl_div(rows(logits, everything), rows(shrunk, everything), 1.0))


class TwoHeads(nn.Module):
    """As torchvision's networks with `aux_loss`: both heads at the size of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = Pixels(stride=1), Pixels(stride=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.main(images)["logits"], "aux": self.auxiliary(images)["logits"]}


def test_weighted_heads_are_those_of_torchvision():
    """`criterion` of its reference for segmentation, where the auxiliary head is also distilled here."""
    student, batch = TwoHeads(), batch_of()
    aux = {"loss": "channel_wise", "student": "aux", "weight": 0.3, "options": {"over": "channels"}}
    settings = {"task_weight": 1.0, "distill_weight": 0.0, "heads": {"aux": 0.5}, "features": [aux]}
    found = loss_of(student, batch, settings)
    heads = student(batch.images)
    each = {name: functional.cross_entropy(x, batch.masks, ignore_index=255) for name, x in heads.items()}
    everything = torch.ones(2, *SIZE, dtype=torch.bool)
    soft = kl_div(rows(heads["aux"], everything), rows(batch.teacher["logits"], everything), 4.0)
    torch.testing.assert_close(found.total, each["out"] + 0.5 * each["aux"] + 0.3 * soft)
    assert found.terms.keys() == {"task", "task.aux", "channel_wise.aux"}


@pytest.mark.parametrize(
    "settings",
    [
        {"skip_ignored": True},
        {"loss": "dkd"},
        {"loss": "dist", "skip_ignored": True},
        {"distill_weight": 0, "features": [{"loss": "channel_wise", "skip_ignored": True}]},
        {
            "distill_weight": 0,
            "features": [{"loss": "channel_wise", "student": "trunk", "teacher": "map", "skip_ignored": True}],
        },
        {"distill_weight": 0, "features": [{"loss": "soft_target", "grid": "student", "skip_ignored": True}]},
    ],
    ids=lambda settings: str(settings.get("features") or settings)[:60],
)
def test_ignored_pixels_change_nothing(student, settings):
    """Neither the loss nor the gradient; whole images are ignored here, as resizing mixes neighbors."""
    masks = masks_of((3, *SIZE), NUM_CLASSES)
    masks[1] = IGNORED

    def run(batch: KDBatch) -> tuple[Tensor, list[Tensor]]:
        found = loss_of(student, batch, {"distill_weight": 1} | settings)
        return found.total, torch.autograd.grad(found.total, list(student.parameters()), allow_unused=True)

    first = batch_of(3, masks=masks)
    images, teacher = first.images.clone(), {name: each.clone() for name, each in first.teacher.items()}
    images[1] += 5
    for each in teacher.values():
        each[1] -= 3
    value, gradient = run(first)
    other_value, other_gradient = run(first.replace(images=images, teacher=teacher))
    assert torch.equal(value, other_value)
    assert all(torch.equal(*pair) for pair in zip(gradient, other_gradient, strict=True))
    assert all(each.isfinite().all() and each.abs().sum() > 0 for each in gradient)


def test_without_skip_ignored_pixels_count(student):
    batch = batch_of()
    settings = {"task_weight": 0, "distill_weight": 1}
    found = [loss_of(student, batch, settings | {"skip_ignored": skip}).total for skip in (False, True)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_pixels_ignored(student, dtype):
    """The loss and its gradients are 0, and no NaN."""
    batch = batch_of(masks=torch.full((2, *SIZE), IGNORED))
    term = {"loss": "channel_wise", "skip_ignored": True}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.autograd.set_detect_anomaly(True):
        found = loss_of(student, batch, {"skip_ignored": True, "features": [term]})
        assert found.total == 0
        assert found.total.dtype == torch.float32
        found.total.backward()
    assert all((each.grad == 0).all() for each in student.parameters())


def test_rows_that_are_not_valid(student):
    batch = batch_of(3, valid=torch.tensor([True, False, True]))
    kept = KDBatch({
        name: {key: each[batch.valid] for key, each in value.items()} if name == "teacher" else value[batch.valid]
        for name, value in batch.items()
    })  # fmt: skip
    for settings in ({}, {"loss": "dkd"}, {"features": [{"loss": "channel_wise", "skip_ignored": True}]}):
        torch.testing.assert_close(loss_of(student, batch, settings).total, loss_of(student, kept, settings).total)


def test_other_ignore_index(student):
    batch = batch_of()
    renamed = batch.replace(masks=batch.masks.masked_fill(batch.masks == IGNORED, -1))
    found = loss_of(student, renamed, {}, ignore_index=-1)
    torch.testing.assert_close(found.total, loss_of(student, batch, {}).total)


def test_channels_last_gives_the_same(student):
    batch = batch_of()
    expected = loss_of(student, batch, {"features": [{"loss": "channel_wise"}]}).total
    found = loss_of(student.to(memory_format=torch.channels_last), batch, {"features": [{"loss": "channel_wise"}]})
    torch.testing.assert_close(found.total, expected)


def test_as_many_classes_as_rows():
    """Logits `[N, 6, 6, 9]` are no map `[N, h, w, C]`."""
    torch.manual_seed(0)
    student = Pixels(6, stride=1)
    teacher = {"logits": TensorSpec((None, 6, 6, 9), torch.float32)}
    outputs = {"logits": torch.randn(2, 6, 6, 9)}
    batch = batch_of(images=torch.randn(2, 3, 6, 9), masks=masks_of((2, 6, 9), 6), teacher=outputs)
    settings = {"temperature": 1.0, "features": [{"loss": "soft_target", "temperature": 1.0}]}
    options = {"image_shape": (3, 6, 9), "num_classes": 6, "teacher_outputs": teacher}
    terms = loss_of(student, batch, settings, **options).terms
    everything = torch.ones(2, 6, 9, dtype=torch.bool)
    expected = kl_div(rows(student(batch.images)["logits"], everything), rows(outputs["logits"], everything), 1.0)
    torch.testing.assert_close(terms["distill"], expected)
    torch.testing.assert_close(terms["soft_target"], expected)


def test_class_that_is_none(student):
    batch = batch_of()
    batch.masks[1, 0, 0] = 77
    with pytest.raises(DataError, match=r"the mask of row 1 has the class 77, and the student has 4 logits.*ignore"):
        loss_of(student, batch, {})


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean((2, 3)))


class Spatial(Pixels):
    """Returns the map alone, which may be any."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)["logits"]


@pytest.mark.parametrize(
    ("make", "changes", "settings", "parts"),
    [
        (Pixels, {"masks": None}, {}, ["[2, 4, 4, 5]", "no masks", "task_weight: 0"]),
        (Pixels, {"masks": None}, {"task_weight": 0, "skip_ignored": True}, ["skip_ignored", "no masks"]),
        (Classifier, {}, {"distill_weight": 0}, ["[2, 4]", "masks", "network for segmentation"]),
        (Classifier, {}, {}, ["[2, 4]", "[any, 4, 12, 15]", "each pixel"]),
        (Spatial, {}, {}, ["'spatial' [2, 4, 4, 5]", "{'logits': it}"]),
        (lambda: Pixels(7), {}, {}, ["[2, 4, 4, 5]", "[2, 7, 4, 5]", "num_classes"]),
        (
            Pixels,
            {},
            {"features": [{"loss": "soft_target", "student": "trunk", "teacher": "map"}]},
            ["soft_target compares vectors", "feature_cosine"],
        ),
    ],
)
def test_what_does_not_fit(make, changes, settings, parts):
    with pytest.raises(ConfigError) as caught:
        loss_of(make(), batch_of(**changes), settings)
    for part in parts:
        assert part in str(caught.value)


def test_teacher_of_other_classes(student):
    outputs = {"logits": TensorSpec((None, 9, None, None), torch.float32)}
    with pytest.raises(ConfigError, match="the teacher has 9 classes and the data has 4"):
        loss_of(student, batch_of(), {}, teacher_outputs=outputs)
