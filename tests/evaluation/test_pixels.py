"""Evaluation of networks for segmentation: counts of pixels, by hand and by other libraries, on one process and two."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from kd_pipeline import BatchLoader
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, DataError, NonFiniteError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate
from kd_pipeline.evaluation._metrics import MetricSettings
from tests.evaluation.ranks import process_group
from tests.forks import fork_ranks

NUM_CLASSES, SIZE, IGNORED = 4, (6, 8), 255


class Pixels(nn.Module):
    """The logits are the channels of the images, changed by `change`."""

    def __init__(self, change=lambda logits: logits) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.change(images)}


class Smaller(Pixels):
    """At half the size."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": functional.avg_pool2d(images, 2)}


def data(num_samples: int = 7, *, size=SIZE) -> tuple[Tensor, Tensor]:
    """Images of four channels, and masks that half of their pixels agree with; a fifth is ignored, class 2 is rare."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, NUM_CLASSES, *size, generator=generator)
    masks = torch.randint(NUM_CLASSES, (num_samples, *size), generator=generator)
    is_right = torch.rand(masks.shape, generator=generator) < 0.5
    masks = images.argmax(1).where(is_right, masks)
    masks[masks == 2] = 1
    return images, masks.masked_fill(torch.rand(masks.shape, generator=generator) < 0.2, IGNORED)


def batches(
    images: Tensor, masks: Tensor | None, batch_size: int = 3, *, teacher=None, valid: Tensor | None = None
) -> list[KDBatch]:
    found = []
    for rows in torch.arange(len(images)).split(batch_size):
        own = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid[rows]
        outputs = {} if teacher is None else {"logits": teacher(images[rows])}
        chosen = None if masks is None else masks[rows]
        found.append(KDBatch(images=images[rows], masks=chosen, index=rows, valid=own, teacher=outputs))
    return found


def counted_by_hand(images: Tensor, masks: Tensor) -> dict[str, float]:
    """With loops over the pixels."""
    inter, union, right, total = [0] * NUM_CLASSES, [0] * NUM_CLASSES, 0, 0
    for image, mask in zip(images, masks, strict=True):
        for row in range(mask.shape[0]):
            for column in range(mask.shape[1]):
                label, predicted = int(mask[row, column]), int(image[:, row, column].argmax())
                if label == IGNORED:
                    continue
                total, right = total + 1, right + (label == predicted)
                for each in {label, predicted}:
                    union[each] += 1
                    inter[each] += label == predicted
    shares = [part / whole for part, whole in zip(inter, union, strict=True) if whole]
    return {"miou": sum(shares) / len(shares), "pixel_accuracy": right / total}


def test_metrics_by_hand_and_by_torchmetrics():
    images, masks = data()
    found = evaluate(Pixels(), BatchLoader(batches(images, masks), classes=["a", "b", "c", "d"]))
    expected = counted_by_hand(images, masks)
    assert found.miou == pytest.approx(expected["miou"]) and 0.2 < found.miou < 0.8
    assert found.pixel_accuracy == pytest.approx(expected["pixel_accuracy"])
    jaccard = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORED)
    assert found.miou == pytest.approx(float(jaccard(images, masks)))
    each = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORED, average="none")(images, masks)
    assert found.class_iou == pytest.approx(each.tolist())
    accuracy = MulticlassAccuracy(NUM_CLASSES, ignore_index=IGNORED, average="micro")
    assert found.pixel_accuracy == pytest.approx(float(accuracy(images, masks)))
    loss = functional.cross_entropy(images.double(), masks, ignore_index=IGNORED)
    assert found.loss == pytest.approx(float(loss), abs=1e-5)
    assert found.num_samples == 7 and found.num_bad_rows == 0 and found.classes == ("a", "b", "c", "d")
    assert sum(map(sum, found.confusion)) == int((masks != IGNORED).sum())
    assert found.class_accuracy[2] is None and found.class_iou[2] == 0
    assert {found.top1, found.top5, found.macro_f1, found.agreement, found.kl} == {None}
    assert found.scalars() == {
        "miou": found.miou, "pixel_accuracy": found.pixel_accuracy, "loss": found.loss
    }  # fmt: skip
    assert found.to_dict()["miou"] == found.miou


def test_miou_of_torchmetrics_for_segmentation():
    """Which counts per image, so of one image, and has no ignored pixels."""
    images, masks = data(1)
    masks = masks.where(masks != IGNORED, 0)
    found = evaluate(Pixels(), BatchLoader(batches(images, masks)))
    metric = MeanIoU(NUM_CLASSES, per_class=True, input_format="index")
    assert found.class_iou == pytest.approx(metric(images.argmax(1), masks).tolist())


def test_class_that_is_nowhere():
    images, masks = data()
    images[:, 3] = -9
    masks = masks.where(masks != 3, 0)
    found = evaluate(Pixels(), BatchLoader(batches(images, masks)))
    assert found.class_iou[3] is None
    assert found.miou == pytest.approx(sum(found.class_iou[:3]) / 3)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_do_not_matter(batch_size):
    images, masks = data()
    teacher = Pixels(lambda logits: logits.roll(1, 3))

    def run(size: int) -> Evaluation:
        return evaluate(Pixels(), BatchLoader(batches(images, masks, size)), reference=teacher)

    assert run(batch_size) == run(3)


def test_rows_that_are_not_valid_are_left_out():
    images, masks = data()
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    expected = evaluate(Pixels(), BatchLoader(batches(images[valid], masks[valid])))
    images[~valid], masks[~valid] = math.nan, 99
    assert evaluate(Pixels(), BatchLoader(batches(images, masks, valid=valid))) == expected


def test_agreement_with_the_teacher():
    images, masks = data()
    teacher = Pixels(lambda logits: logits + logits.roll(1, 3))
    found = evaluate(Pixels(), BatchLoader(batches(images, masks)), reference=teacher)
    keep = masks != IGNORED
    own, theirs = (each.permute(0, 2, 3, 1)[keep].double() for each in (images, teacher(images)["logits"]))
    assert found.agreement == float((own.argmax(1) == theirs.argmax(1)).double().mean()) < 1
    kl = functional.kl_div((own / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean")
    assert found.kl == pytest.approx(float(kl), abs=1e-5)
    assert found.logit_mse == pytest.approx(float(functional.mse_loss(own, theirs)), rel=1e-5)
    assert found.probability_l1 == pytest.approx(float((own.softmax(1) - theirs.softmax(1)).abs().sum(1).mean()))
    assert found.teacher.miou == evaluate(teacher, BatchLoader(batches(images, masks))).miou
    with_own = evaluate(Pixels(), BatchLoader(batches(images, masks, teacher=lambda each: teacher(each)["logits"])))
    assert with_own == found


def test_teacher_without_masks():
    images, _ = data()
    found = evaluate(Pixels(), BatchLoader(batches(images, None)), reference=Smaller())
    enlarged = functional.interpolate(functional.avg_pool2d(images, 2), SIZE, mode="bilinear")
    assert found.agreement == pytest.approx(float((enlarged.argmax(1) == images.argmax(1)).float().mean()))
    assert found.miou is None and found.confusion is None and found.teacher.kl is None


def test_logits_are_enlarged_to_the_masks():
    images, masks = data()
    enlarged = functional.interpolate(functional.avg_pool2d(images, 2), SIZE, mode="bilinear")
    found = evaluate(Smaller(), BatchLoader(batches(images, masks)))
    assert found.miou == pytest.approx(counted_by_hand(enlarged, masks)["miou"])


def test_pixels_that_are_not_finite_are_wrong():
    images, masks = data()
    images[2, :, 1, 1], masks[2, 1, 1] = math.nan, 0
    images[3, :, 1, 1], masks[3, 1, 1] = math.nan, IGNORED
    found = evaluate(Pixels(), BatchLoader(batches(images, masks)))
    wrong = images.clone()
    wrong[2, :, 1, 1] = torch.tensor([0.0, 9, 0, 0])
    assert found.num_bad_rows == 1
    assert found.pixel_accuracy == pytest.approx(counted_by_hand(wrong, masks)["pixel_accuracy"])
    with pytest.raises(NonFiniteError, match="for all 7 images"):
        evaluate(Pixels(lambda logits: logits * math.nan), BatchLoader(batches(images, masks)))


def test_further_metrics_of_torchmetrics():
    images, masks = data()
    metrics = [MetricSettings(name="CohenKappa"), MetricSettings(name="JaccardIndex", kwargs={"average": "none"})]
    found = evaluate(Pixels(), BatchLoader(batches(images, masks)), metrics=metrics)
    assert found.metrics["JaccardIndex"] == pytest.approx(found.class_iou)
    assert 0 < found.metrics["CohenKappa"] < 1


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"masks": None, "labels": torch.zeros(7).long()}, {}, ConfigError, "labels of images and no masks"),
        ({"masks": torch.full((7, *SIZE), IGNORED)}, {}, DataError, "all have the ignore index 255"),
        ({"masks": torch.full((7, *SIZE), 9)}, {}, DataError, "nor the ignore index 255, and the model has 4 logits"),
        ({}, {"metrics": [lambda logits, labels: {}]}, ConfigError, "name a class of torchmetrics"),
        ({"masks": None}, {"metrics": [MetricSettings(name="CohenKappa")]}, DataError, "no masks; remove the metrics"),
        ({}, {"reference": Pixels(lambda logits: logits[:, :3])}, ConfigError, "both for pixels"),
    ],
)
def test_what_cannot_be_measured(change, options, error, message):
    images, masks = data()
    (batch,) = batches(images, masks, 7)
    with pytest.raises(error, match=message):
        evaluate(Pixels(), BatchLoader([batch.replace(**change)]), **options)


def test_classifier_on_masks_is_refused():
    class Classifier(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    images, masks = data()
    with pytest.raises(ConfigError, match="evaluate a network for segmentation"):
        evaluate(Classifier(), BatchLoader(batches(images, masks)))


def everything(loader: BatchLoader) -> Evaluation:
    teacher, metrics = Pixels(lambda logits: logits.roll(1, 3)), [MetricSettings(name="CohenKappa")]
    return evaluate(Pixels(), loader, reference=teacher, metrics=metrics)


def _rank(rank: int, world_size: int, folder: str) -> None:
    """Every second row, of which the last is padding."""
    with process_group(rank, world_size, folder):
        images, masks = data()
        rows = torch.arange(rank, 8, world_size)
        valid, rows = rows < 7, rows.clamp(max=6)
        found = everything(BatchLoader(batches(images[rows], masks[rows], valid=valid)))
        Path(folder, f"{rank}.json").write_text(json.dumps(found.to_dict()))


@pytest.mark.slow
def test_ranks_match_one_process(tmp_path):
    expected = everything(BatchLoader(batches(*data()))).to_dict()
    fork_ranks(_rank, (2, str(tmp_path)))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == json.loads(json.dumps(expected))
