"""Real networks and teachers; times are only required to be positive."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import DataError, NonFiniteError
from kd_pipeline.evaluation import compare, evaluate
from kd_pipeline.evaluation._compare import Comparison, ComparisonRow, Cost, measure_cost
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._metrics import MetricSettings
from kd_pipeline.evaluation.frozen import extract_features, knn_top1, linear_top1, split_bank
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import ConvNet, LogitsOnly, random_images
from tests.streams import EVAL

UNKNOWN = dict.fromkeys(
    ("top1", "top5", "macro_f1", "loss", "agreement", "kl", "class_accuracy", "confusion", "classes")
)


def evaluation(**known) -> Evaluation:
    return Evaluation(**{**UNKNOWN, "num_samples": 360, "num_bad_rows": 0, "metrics": {}, **known})


def cost(**known) -> Cost:
    unknown = {"num_parameters": None, "num_bytes": None}
    return Cost(**{**unknown, "ms_per_image": 1.5, "batch_size": 8, "device": "cpu", **known})


class Counter(nn.Module):
    """Counts its calls, and records whether autograd was on or it was in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 3))
        self.num_calls, self.had_grad, self.was_training = 0, False, False

    def forward(self, images):
        self.num_calls += 1
        self.had_grad |= torch.is_grad_enabled()
        self.was_training |= self.training
        return images.mean((2, 3)) @ self.weight.T


def test_network_cost() -> None:
    net = Counter()
    found = measure_cost(net, random_images(8))
    assert found.num_parameters == 21 and found.num_bytes is None
    assert (found.batch_size, found.device) == (8, "cpu") and found.ms_per_image > 0
    assert net.num_calls == 33 and not net.had_grad and not net.was_training and net.training


def test_images_are_cast_to_network_dtype() -> None:
    assert measure_cost(ConvNet().eval(), random_images(4).half()).ms_per_image > 0


def test_teacher_size_is_that_of_its_files(exported, tmp_path: Path) -> None:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0)))
    extra = tmp_path / "weights.bin"
    extra.write_bytes(b"x" * 1000)
    found = measure_cost(teacher, random_images(4), files=[exported(0), extra])
    assert found.num_bytes == exported(0).stat().st_size + 1000 and found.num_parameters is None
    assert measure_cost(ConvNet().eval(), random_images(4)).num_parameters == sum(
        parameter.numel() for parameter in ConvNet().parameters()
    )


def test_table_has_line_per_model() -> None:
    known = evaluation(top1=0.91666, top5=0.99, macro_f1=0.9, loss=0.3, agreement=0.95, kl=0.0213)
    big = cost(num_parameters=25_557_032, num_bytes=102_400, batch_size=64, device="NVIDIA X")
    rows = (
        ComparisonRow(name="student", evaluation=known, cost=cost(num_parameters=999, num_bytes=7_654)),
        ComparisonRow(name="a longer teacher", evaluation=evaluation(num_samples=12, metrics={"F": 0.51239}), cost=big),
    )
    header, student, teacher, footnote, metric = Comparison(rows).table().splitlines()
    found = [" ".join(line.split()) for line in (header, student, teacher)]
    assert found == [
        "samples top-1 top-5 macro F1 loss agreement KL ms/image batch parameters bytes on",
        "student 360 91.67% 99.00% 0.9000 0.3000 95.00% 0.0213 1.500 8 999 7.65 k cpu",
        "a longer teacher 12 - - - - - - 1.500 64 25.6 M 102 k NVIDIA X",
    ]
    assert header.index("top-1") + len("top-1") == student.index("91.67%") + len("91.67%")
    assert len(header) == len(student) == len(teacher)
    assert "median of 30 runs" in footnote and metric == "a longer teacher: F 0.5124"


def test_columns_of_what_was_measured() -> None:
    row = ComparisonRow(name="net", evaluation=evaluation(top1=0.5, top5=1.0, macro_f1=0.4, loss=1.0), cost=cost())
    header, _, footnote = Comparison((row,)).table().splitlines()
    assert header.split() == ["samples", "top-1", "top-5", "macro", "F1", "loss", "ms/image", "batch", "on"]
    assert "Agreement" not in footnote and "k-NN" not in footnote


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("Accuracy", 0.4625000059604645, "46.25%"),
        ("CohenKappa", 0.4625000059604645, "0.4625"),
        ("Recall", [0.5, 0.25], "[50.00%, 25.00%]"),
        ("images", 37, "37"),
    ],
)
def test_numbers_of_metrics_are_short(name: str, value: object, text: str) -> None:
    row = ComparisonRow(name="net", evaluation=evaluation(metrics={name: value}), cost=cost())
    assert Comparison((row,)).table().splitlines()[-1] == f"net: {name} {text}"


def test_compare_evaluates_and_times_every_model(photo_folder: Path, exported) -> None:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0)))
    models, files = {"network": ConvNet(), "teacher": teacher}, {"teacher": [exported(0)]}
    metrics = [MetricSettings(name="CohenKappa")]
    lines: list[str] = []
    with KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=8, shuffle=False, device="cpu") as loader:
        found = compare(models, loader, reference=ConvNet(), metrics=metrics, files=files, report=lines.append)
        wanted = evaluate(ConvNet(), loader, reference=ConvNet(), metrics=metrics)
    network, of_teacher = found.rows
    assert [line.partition(" in ")[0] for line in lines] == [
        *("evaluating network", "network: 37 images", "evaluating teacher", "teacher: 37 images")
    ]
    assert [row.name for row in found.rows] == list(models)
    assert network.evaluation == wanted and (wanted.agreement, wanted.num_samples) == (1.0, 37)
    assert of_teacher.evaluation.confusion == wanted.confusion and "CohenKappa" in wanted.metrics
    assert network.cost.num_parameters and network.cost.num_bytes is None and network.cost.batch_size == 8
    assert of_teacher.cost.num_bytes == exported(0).stat().st_size
    assert len(found.table().splitlines()) == 6


def test_reference_is_not_compared_with_itself(photo_folder: Path) -> None:
    teacher = ConvNet()
    models = {"teacher": teacher, "student": ConvNet(1)}
    with KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=8, shuffle=False, device="cpu") as loader:
        of_teacher, of_student = compare(models, loader, reference=teacher).rows
    assert of_teacher.evaluation.agreement is None and of_teacher.evaluation.kl is None
    assert of_student.evaluation.agreement is not None


def test_model_with_nan_is_named(photo_folder: Path) -> None:
    broken = ConvNet()
    torch.nn.init.constant_(next(broken.parameters()), torch.nan)
    with (
        KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=8, shuffle=False, device="cpu") as loader,
        pytest.raises(NonFiniteError, match="broken: the model's logits hold NaN or inf for all 37 images"),
    ):
        compare({"good": ConvNet(), "broken": broken}, loader)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return open_model(ModelSettings(timm="test_resnet", num_classes=0)).eval()


def test_models_with_and_without_logits(photo_folder: Path) -> None:
    with KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=8, shuffle=False, device="cpu") as loader:
        trunk, classifier = backbone(), LogitsOnly(3).eval()
        found = compare({"trunk": trunk, "classifier": classifier}, loader, reference=trunk)
        features = split_bank(extract_features(trunk, loader))
        expected = evaluate(classifier, loader)
        (alone,) = compare({"trunk": trunk}, loader, bank=loader).rows
        whole = extract_features(trunk, loader)
    first, second = found.rows
    assert first.evaluation.metrics == {"knn_top1": knn_top1(*features), "linear_top1": linear_top1(*features)}
    assert first.evaluation.num_samples == len(features[1]) and first.evaluation.top1 is None
    assert second.evaluation.top1 == expected.top1 and second.evaluation.agreement is None
    assert alone.evaluation.metrics["knn_top1"] == knn_top1(whole, whole)
    header, *_ = found.table().splitlines()
    assert {"top-1", "loss", "k-NN", "linear", "ms/image"} <= set(header.replace(" F1", "-F1").split())
    header, row, footnote = Comparison((first,)).table().splitlines()
    assert "k-NN" in header and "top-1" not in header
    assert "k-NN and linear: " in footnote and "ms/image" in footnote and "KL" not in footnote
    assert f"{first.evaluation.metrics['linear_top1']:.2%}" in row
    assert "k-NN" not in Comparison((second,)).table()


def test_features_need_labels(photo_folder: Path) -> None:
    source = ImageFolder(photo_folder, labeled=False)
    with (
        KDDataLoader(source, EVAL, batch_size=8, shuffle=False, device="cpu") as loader,
        pytest.raises(DataError, match="it has no labels; use a split with labels"),
    ):
        compare({"trunk": backbone()}, loader)


class TwoTrunks(nn.Module):
    """Returns what two teachers of different kinds do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = backbone(), nn.AdaptiveAvgPool2d(2)

    def forward(self, images):
        outputs = {f"dino.{name}": output for name, output in self.first(images).items()}
        return {**outputs, "small.pooled": self.second(images).flatten(1)}


def test_several_teachers_are_judged_by_name(photo_folder: Path) -> None:
    with KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=8, shuffle=False, device="cpu") as loader:
        teacher = PyTorchTeacher(TwoTrunks().eval(), image_shape=(3, EVAL.size, EVAL.size))
        found = compare({"teachers": teacher, "trunk": backbone()}, loader)
    several, alone = (row.evaluation.metrics for row in found.rows)
    assert list(several) == ["dino.knn_top1", "dino.linear_top1", "small.knn_top1", "small.linear_top1"]
    assert several["dino.knn_top1"] == alone["knn_top1"]
    assert f"teachers: small.knn_top1 {several['small.knn_top1']}" in found.table()
