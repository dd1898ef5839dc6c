"""Real loaders over arrays of pixels, and a network whose logits are the pixels, so every metric is known."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score
from torch import Tensor, nn

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, DataError, NonFiniteError, StateError, TeacherError
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate
from kd_pipeline.evaluation._logits import inputs_for
from kd_pipeline.evaluation._metrics import MetricSettings
from kd_pipeline.evaluation.predictions import Predictions, to_csv
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.evaluation.ranks import process_group
from tests.forks import fork_ranks
from tests.networks import CLASSES, IMAGE_SHAPE, NUM_CLASSES, ConvNet, LogitsOnly
from tests.streams import EVAL

SIDE = 2
NUM_LOGITS = 3 * SIDE * SIDE
PIXELS = EvalTransform(size=SIDE, resize=None, mean=(0.0, 0.0, 0.0), std=(0.02, 0.02, 0.02))


class Pixels(nn.Module):
    """The logits are the twelve values of a 2x2 image, changed by `change`."""

    def __init__(self, change=lambda logits: logits) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images.flatten(1))


class LogitsAndLabels:
    """A custom metric that keeps its arguments."""

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        self.logits, self.labels = logits, labels
        return {"mean_margin": float(logits.gather(1, labels[:, None]).mean())}


def pixel_arrays(folder: Path, num_samples: int = 101) -> Arrays:
    """Random images and labels; about half of the labels are the largest pixel."""
    rng = np.random.default_rng(num_samples)
    images = rng.integers(0, 256, size=(num_samples, SIDE, SIDE, 3), dtype=np.uint8)
    images[:, 1, 1, 1] = 0  # the pixel of class 7, which is never predicted
    labels = rng.integers(0, NUM_LOGITS, size=num_samples)
    is_right = rng.random(num_samples) < 0.5
    labels[is_right] = images.transpose(0, 3, 1, 2).reshape(num_samples, -1).argmax(1)[is_right]
    labels[np.isin(labels, (5, 7))] = 4  # two classes that no sample has
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return Arrays(folder / "images.npy", folder / "labels.npy")


def open_loader(source, transform=PIXELS, teacher: Teacher | None = None, **options) -> KDDataLoader:
    options = {"batch_size": 16, "shuffle": False, "device": "cpu", "num_threads": 1, **options}
    return KDDataLoader(source, transform, teacher, **options)


def pixel_teacher(change) -> Teacher:
    return open_teacher(TeacherSettings(), module=Pixels(change), image_shape=(3, SIDE, SIDE))


def all_rows(source) -> tuple[Tensor, Tensor]:
    """Logits and labels in one batch."""
    with open_loader(source, batch_size=len(source)) as loader:
        (batch,) = loader
        return batch.images.flatten(1), batch.labels


def test_metrics_match_their_definitions(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    logits, labels = all_rows(source)
    with open_loader(source) as loader:
        found = evaluate(Pixels(), loader)
    choice = logits.argmax(1)
    assert found.num_samples == 101 and found.num_bad_rows == 0
    assert found.top1 == float((choice == labels).double().mean()) and 0.4 < found.top1 < 0.8
    assert found.top5 == float((logits.topk(5).indices == labels[:, None]).any(1).double().mean()) > found.top1
    assert 7 not in choice and 5 in choice  # of the two, one counts in F1
    assert found.macro_f1 == pytest.approx(f1_score(labels, choice, average="macro"))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert np.array_equal(found.confusion, confusion_matrix(labels, choice, labels=range(NUM_LOGITS)))
    for label, accuracy in enumerate(found.class_accuracy):
        rows = labels == label
        assert accuracy == (float((choice == labels)[rows].double().mean()) if rows.any() else None)
    assert found.class_accuracy[5] is None
    assert found.agreement is None and found.kl is None and found.metrics == {}


def test_agreement_with_own_or_different_teacher(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    logits, _ = all_rows(source)
    scaled, other = pixel_teacher(lambda x: x * 0.5), pixel_teacher(lambda x: x.roll(1, dims=0) + x)

    def kl(theirs: Tensor) -> float:
        log_ours, log_theirs = (logits.double() / 4).log_softmax(1), (theirs.double() / 4).log_softmax(1)
        return float(nn.functional.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True))

    with open_loader(source, teacher=scaled) as loader:
        with_own = evaluate(Pixels(), loader)
        itself = evaluate(pixel_teacher(lambda x: x * 1.0), loader, reference=pixel_teacher(lambda x: x * 1.0))
    assert with_own.agreement == 1.0
    assert with_own.kl == pytest.approx(kl(logits * 0.5), rel=1e-5)
    assert (itself.agreement, itself.kl) == (1.0, 0.0)
    with open_loader(source, teacher=scaled, batch_size=101) as loader:
        with_other = evaluate(Pixels(), loader, reference=other)
    theirs = other(logits.reshape(-1, 3, SIDE, SIDE))["logits"]
    assert with_other.agreement == float((theirs.argmax(1) == logits.argmax(1)).double().mean()) < 1
    assert with_other.kl == pytest.approx(kl(theirs), rel=1e-5)
    assert with_other.logit_mse == pytest.approx(float(nn.functional.mse_loss(logits, theirs)), rel=1e-5)
    l1 = (logits.double().softmax(1) - theirs.double().softmax(1)).abs().sum(1).mean()
    assert with_other.probability_l1 == pytest.approx(float(l1), rel=1e-5)
    assert itself.logit_mse == itself.probability_l1 == 0


def test_teacher_may_exclude_classes(tmp_path) -> None:
    """A logit of -inf is a probability of 0, and no bad row."""
    source = pixel_arrays(tmp_path)
    logits, _ = all_rows(source)
    excluding = pixel_teacher(lambda x: x.masked_fill(torch.arange(NUM_LOGITS) == 3, -math.inf))
    metric = MetricSettings(name="Accuracy", kwargs={"average": "micro"})
    with open_loader(source, teacher=excluding) as loader:
        found = evaluate(Pixels(), loader)
        itself = evaluate(excluding, loader, metrics=[metric])
    possible = [k for k in range(NUM_LOGITS) if k != 3]
    q, p = (logits.double() / 4).log_softmax(1), (logits[:, possible].double() / 4).softmax(1)
    assert found.agreement == float((logits.argmax(1) != 3).double().mean()) < 1
    assert found.kl == pytest.approx(float(nn.functional.kl_div(q[:, possible], p, reduction="batchmean")), rel=1e-5)
    assert (itself.num_bad_rows, itself.agreement, itself.kl) == (0, 1.0, 0.0)
    assert found.logit_mse == itself.logit_mse == itself.probability_l1 == 0 < found.probability_l1 <= 2
    assert itself.metrics["Accuracy"] == pytest.approx(itself.top1)


def everything(source, predictions: Predictions | None = None, **options) -> Evaluation:
    metrics = [MetricSettings(name="CohenKappa"), MetricSettings(name="MulticlassCalibrationError"), LogitsAndLabels()]
    teacher = pixel_teacher(lambda x: x.flip(1) + x)
    with open_loader(source, teacher=teacher, **options) as loader:
        # In float64 the losses have so many digits that the order of a plain sum would change the last ones.
        return evaluate(Pixels(Tensor.double), loader, metrics=metrics, predictions=predictions)


@pytest.mark.parametrize("num_samples", [1, 19, 101])
def test_result_independent_of_batches_and_order(tmp_path, num_samples) -> None:
    source = pixel_arrays(tmp_path, num_samples)
    wanted = everything(source)
    assert wanted.loss > 0 and wanted.kl > 0
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 128}, {"shuffle": True, "seed": 9}):
        assert everything(source, **options) == wanted
    assert everything(source, batch_size=12, last_batch="pad") == wanted


SIZES = (1, 19, 101)


def _rank(rank: int, world_size: int, folder: str) -> None:
    with process_group(rank, world_size, folder):
        found = []
        for size in SIZES:
            source = Arrays(f"{folder}/{size}/images.npy", f"{folder}/{size}/labels.npy")
            predictions = Predictions()
            sharded = everything(source, predictions, batch_size=4, last_batch="pad")
            alone = everything(source, batch_size=4, shard=Shard())
            predictions.gather()
            found.append([sharded.to_dict(), alone.to_dict(), to_csv(predictions.rows(), None)])
        Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_ranks_match_one_process(tmp_path) -> None:
    wanted = []
    for size in SIZES:
        (tmp_path / str(size)).mkdir()
        predictions = Predictions()
        alone = everything(pixel_arrays(tmp_path / str(size), size), predictions)
        wanted.append((alone.to_dict(), to_csv(predictions.rows(), None)))
        assert wanted[-1][1].count("\n") == size + 1
    fork_ranks(_rank, (2, str(tmp_path)))
    for rank in range(2):
        for (sharded, alone, table), (one_process, whole_table) in zip(
            json.loads((tmp_path / f"{rank}.json").read_text()), wanted, strict=True
        ):
            assert sharded == one_process
            assert alone == one_process  # a loader that reads everything is not counted twice
            assert table == whole_table


def test_invalid_rows_are_ignored(photo_folder, tmp_path) -> None:
    images = [path for path in sorted(photo_folder.rglob("*.*"))][:8]
    for number, path in enumerate(images):
        target = tmp_path / ("even" if number % 2 else "odd") / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"" if number == 3 else path.read_bytes())
    with open_loader(ImageFolder(tmp_path), EVAL, on_bad_sample="substitute", max_bad_fraction=0.5) as loader:
        found = evaluate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), loader, metrics=[LogitsAndLabels()])
    assert found.num_samples == 7 and sum(map(sum, found.confusion)) == 7
    assert found.classes == ("even", "odd")


def test_non_finite_rows_count_as_wrong(tmp_path, caplog) -> None:
    source = pixel_arrays(tmp_path)
    logits, labels = all_rows(source)

    def spoil(logits: Tensor) -> Tensor:
        is_choice = nn.functional.one_hot(logits.argmax(1), NUM_LOGITS).bool()
        return logits.masked_fill(is_choice & (torch.arange(NUM_LOGITS) == 2), math.nan)

    bad = logits.argmax(1) == 2
    right = (logits.argmax(1) == labels) & ~bad
    with open_loader(source, teacher=pixel_teacher(lambda x: x * 1.0)) as loader:
        found = evaluate(Pixels(spoil), loader, metrics=[MetricSettings(name="Accuracy", kwargs={"average": "micro"})])
        against_bad = evaluate(Pixels(), loader, reference=pixel_teacher(spoil))
    assert found.num_bad_rows == int(bad.sum()) > 0 and found.num_samples == 101
    assert found.top1 == float(right.double().mean()) == pytest.approx(found.metrics["Accuracy"])
    for owner in ("model", "teacher"):
        wanted = f"the {owner}'s logits hold NaN or inf for {found.num_bad_rows} of 101 images, which count as wrong"
        assert wanted in caplog.text
    assert found.class_accuracy[2] == 0.0
    for label in labels.unique().tolist():
        assert found.class_accuracy[label] == float(right[labels == label].double().mean())
    named = sorted({*labels.tolist(), *logits.argmax(1)[~bad].tolist()})
    choice = logits.argmax(1).masked_fill(bad, NUM_LOGITS)
    assert found.macro_f1 == pytest.approx(f1_score(labels, choice, labels=named, average="macro"))
    assert sum(map(sum, found.confusion)) == 101 - found.num_bad_rows
    assert found.agreement == against_bad.agreement == float((~bad).double().mean())
    assert math.isnan(found.loss) and found.to_dict()["loss"] is None
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1) & ~bad
    assert found.top5 == float(in_top5.double().mean())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_model_without_a_finite_row_is_refused(tmp_path, value) -> None:
    with (
        open_loader(pixel_arrays(tmp_path)) as loader,
        pytest.raises(NonFiniteError, match="the model's logits hold NaN or inf for all 101 images; check its weights"),
    ):
        evaluate(Pixels(lambda x: x * 0 + value), loader)


def test_images_for_a_network(tmp_path) -> None:
    images = torch.rand(2, 3, 4, 4)
    usual = nn.Conv2d(3, 4, 3)
    assert inputs_for(usual, images) is images and inputs_for(pixel_teacher(Tensor.float), images) is images
    found = inputs_for(copy.deepcopy(usual).bfloat16().to(memory_format=torch.channels_last), images)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous()
    pointwise = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)  # whose weights have both orders
    assert inputs_for(pointwise, images) is images


def test_to_dict_and_scalars(tmp_path) -> None:
    found = everything(pixel_arrays(tmp_path))
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["confusion"] == [list(row) for row in found.confusion] and again["metrics"] == found.metrics
    scalars = found.scalars()
    assert set(scalars) == {
        *("top1", "top5", "macro_f1", "loss", "agreement", "kl", "logit_mse", "probability_l1"),
        *("CohenKappa", "MulticlassCalibrationError", "mean_margin"),
    }
    assert all(type(value) is float for value in scalars.values())


def test_max_batches(tmp_path) -> None:
    with open_loader(pixel_arrays(tmp_path)) as loader:
        assert evaluate(Pixels(), loader, max_batches=2).num_samples == 32


@pytest.mark.parametrize("max_batches", [0, -1])
def test_no_batch_is_refused(tmp_path, max_batches) -> None:
    with (
        open_loader(pixel_arrays(tmp_path)) as loader,
        pytest.raises(ConfigError, match=f"max_batches is {max_batches}; it must be at least 1"),
    ):
        evaluate(Pixels(), loader, max_batches=max_batches)


def test_progress_counts_batches(tmp_path) -> None:
    steps: list[tuple[int, int]] = []
    with open_loader(pixel_arrays(tmp_path)) as loader:
        evaluate(Pixels(), loader, max_batches=3, report=lambda *step: steps.append(step))
        assert steps == [(0, 3), (1, 3), (2, 3)]
        evaluate(Pixels(), loader, max_batches=9, report=lambda *step: steps.append(step))
        assert steps[-1] == (6, 7)


def test_top5_is_1_with_few_classes(tmp_path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, SIDE, SIDE, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 2, 1]))
    with open_loader(Arrays(tmp_path / "images.npy", tmp_path / "labels.npy")) as loader:
        found = evaluate(Pixels(lambda x: x[:, :3] - torch.arange(3)), loader)
    assert (found.top1, found.top5) == (0.25, 1.0)


def test_without_labels_only_agreement(tmp_path) -> None:
    pixel_arrays(tmp_path)
    source = Arrays(tmp_path / "images.npy")
    with open_loader(source, teacher=pixel_teacher(lambda x: x * 2)) as loader:
        found = evaluate(Pixels(), loader)
        with pytest.raises(DataError, match="this split has no labels"):
            evaluate(Pixels(), loader, metrics=[LogitsAndLabels()])
    assert (found.num_samples, found.agreement) == (101, 1.0)
    assert {found.top1, found.top5, found.macro_f1, found.loss, found.confusion, found.class_accuracy} == {None}


# Models


@pytest.mark.parametrize("backend", ["pytorch", "openvino", "onnxruntime"])
def test_teacher_runtimes_match_network(photo_folder, exported, backend) -> None:
    module = ConvNet() if backend == "pytorch" else None
    settings = TeacherSettings(backend=backend, onnx=None if module else exported(0))
    teacher = open_teacher(settings, module=module, image_shape=IMAGE_SHAPE)
    with open_loader(ImageFolder(photo_folder), EVAL) as loader:
        of_network, of_teacher = evaluate(ConvNet(), loader), evaluate(teacher, loader)
        assert evaluate(LogitsOnly(), loader) == of_network
    assert of_teacher.confusion == of_network.confusion and of_teacher.num_samples == 37
    assert of_teacher.loss == pytest.approx(of_network.loss, rel=1e-4)
    assert len(of_network.confusion) == NUM_CLASSES == len(CLASSES)


def test_restores_train_mode(photo_folder) -> None:
    net = ConvNet().train()
    net.body[1].eval()  # a frozen norm, as people have them
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with open_loader(ImageFolder(photo_folder), EVAL) as loader:
        found = evaluate(net, loader)
        assert found == evaluate(ConvNet().eval(), loader)
        with pytest.raises(TeacherError):
            evaluate(net, loader, reference=pixel_teacher(lambda x: x * 1.0))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_half_logits_are_compared_in_float32(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    with open_loader(source) as loader:
        found = evaluate(Pixels(lambda x: x.round().bfloat16()), loader)
        assert found == evaluate(Pixels(lambda x: x.round().bfloat16().float()), loader)


def test_mismatch_names_both_shapes(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    seven = pixel_teacher(lambda x: x[:, :7])
    with open_loader(source) as loader:
        with pytest.raises(ConfigError, match=r"returns logits \[16, 12\], the teacher \[16, 7\]"):
            evaluate(Pixels(), loader, reference=seven)
        with pytest.raises(DataError, match=r"of 101 labels are not from 0 to 6, and the model has 7 logits"):
            evaluate(Pixels(lambda x: x[:, :7]), loader)
        with pytest.raises(
            ConfigError,
            match=r"returns logits \[N, K\], alone, first in a tuple, or as 'logits' of a mapping .*, got \[16\]",
        ):
            evaluate(Pixels(lambda x: x.sum(1)), loader)
        with pytest.raises(ConfigError, match="got dict"):
            evaluate(Pixels(lambda x: {"pooled": x}), loader)


# Metrics


def test_torchmetrics_metrics(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    logits, labels = all_rows(source)
    metrics = [
        MetricSettings(name="CohenKappa"),
        MetricSettings(name="MulticlassF1Score", kwargs={"average": "none"}),
        MetricSettings(name="Accuracy", kwargs={"top_k": 3, "average": "micro"}),
    ]
    with open_loader(source, batch_size=10) as loader:
        found = evaluate(Pixels(), loader, metrics=metrics).metrics
    assert found["CohenKappa"] == pytest.approx(cohen_kappa_score(labels, logits.argmax(1)), rel=1e-5)
    wanted = f1_score(labels, logits.argmax(1), average=None, labels=range(NUM_LOGITS), zero_division=0)
    assert found["MulticlassF1Score"] == pytest.approx(wanted.tolist(), rel=1e-5)
    in_top3 = (logits.topk(3).indices == labels[:, None]).any(1)
    assert found["Accuracy"] == pytest.approx(float(in_top3.double().mean()), rel=1e-5)


def test_torchmetrics_get_probabilities(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    logits, labels = all_rows(source)
    probabilities = (logits / 100).softmax(1)
    with open_loader(source) as loader:
        metric = MetricSettings(name="MulticlassCalibrationError", kwargs={"n_bins": 1})
        found = evaluate(Pixels(lambda x: x / 100), loader, metrics=[metric]).metrics
    is_right = (logits.argmax(1) == labels).float()
    wanted = abs(float(probabilities.amax(1).mean() - is_right.mean()))
    assert found["MulticlassCalibrationError"] == pytest.approx(wanted, rel=1e-4)


def test_custom_metric_gets_rows_in_dataset_order(tmp_path) -> None:
    source, metric = pixel_arrays(tmp_path), LogitsAndLabels()
    logits, labels = all_rows(source)
    with open_loader(source, shuffle=True, batch_size=12, last_batch="pad") as loader:
        found = evaluate(Pixels(), loader, metrics=[metric])
    assert torch.equal(metric.logits, logits) and torch.equal(metric.labels, labels)
    assert found.metrics == {"mean_margin": float(logits.gather(1, labels[:, None]).mean())}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            [MetricSettings(name="CohenKapa")],
            r"torchmetrics\.classification has no 'CohenKapa'; did you mean 'CohenKappa'",
        ),
        ([MetricSettings(name="Accuracy", kwargs={"top_q": 1})], r"Accuracy fails: .*top_q.*check its kwargs"),
        ([MetricSettings(name="BinaryAccuracy")], "the metric BinaryAccuracy fails"),
        ([LogitsAndLabels(), LogitsAndLabels()], "two metrics are called 'mean_margin'"),
        ([lambda logits, labels: 0.5], "should return values by name, got float"),
    ],
)
def test_invalid_metric_is_refused(tmp_path, metrics: Sequence, message: str) -> None:
    with open_loader(pixel_arrays(tmp_path)) as loader, pytest.raises(ConfigError, match=message):
        evaluate(Pixels(), loader, metrics=metrics)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_matches_cpu_without_sync(tmp_path, monkeypatch) -> None:
    from kd_pipeline.evaluation import _evaluate as evaluation

    source = pixel_arrays(tmp_path)
    add = evaluation._Tally.add

    def add_without_waiting(*arguments, **options) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            add(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(evaluation._Tally, "add", add_without_waiting)
    with open_loader(source, device="cuda") as loader, open_loader(source) as on_cpu:
        found, wanted = (evaluate(Pixels(), of, metrics=[LogitsAndLabels()]) for of in (loader, on_cpu))
    assert found.confusion == wanted.confusion and found.top5 == wanted.top5
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_one_shard_without_process_group_is_refused(tmp_path, monkeypatch) -> None:
    source = pixel_arrays(tmp_path, 19)
    with pytest.raises(StateError, match=r"one of 2 shards .* shard=Shard\(\)"):
        everything(source, shard=Shard(1, 2))
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(StateError, match=r"call torch\.distributed\.init_process_group first"):
        everything(source)
    assert everything(source, shard=Shard()).num_samples == 19
