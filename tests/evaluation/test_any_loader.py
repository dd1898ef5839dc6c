"""Evaluation over loaders of the user's own, beside what is computed by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kd_pipeline import BatchLoader, compare, evaluate
from kd_pipeline.errors import DataError
from kd_pipeline.evaluation._features import evaluate_features
from kd_pipeline.evaluation.frozen import extract_outputs
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings

ROWS, SIZE, CLASSES = 23, 6, 3


class Sequences(nn.Module):
    """Mean over what is not padding, to logits and a vector."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.project, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, CLASSES)

    def forward(self, sequence: Tensor, mask: Tensor) -> dict[str, Tensor]:
        pooled = self.project((sequence * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return {"logits": self.head(pooled), "pooled": pooled}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(ROWS, SIZE, generator=generator),
        torch.randint(0, CLASSES, (ROWS,), generator=generator),
    )


def batches_of(rows: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*rows), batch_size=5)


def padded() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (4, 9, 6):
        mask = torch.arange(length) < torch.randint(1, length + 1, (4, 1), generator=generator)
        sequence = torch.randn(4, length, SIZE, generator=generator)
        labels = torch.randint(0, CLASSES, (4,), generator=generator)
        found.append({"sequence": sequence, "mask": mask, "labels": labels})
    return found


def test_of_vectors(rows: tuple[Tensor, Tensor]) -> None:
    model, teacher = network(1), network(2)
    found = evaluate(model, BatchLoader(batches_of(rows), teacher))
    assert model.training
    vectors, labels = rows
    logits, theirs = (each.eval()(vectors).detach() for each in (model, teacher))
    log_p, log_q = (each.double().div(4).log_softmax(1) for each in (logits, theirs))
    assert found.num_samples == ROWS
    assert found.top1 == float((logits.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-6)
    assert found.agreement == float((logits.argmax(1) == theirs.argmax(1)).double().mean())
    assert found.kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(1).mean()), rel=1e-5)
    assert found.teacher is not None
    assert found.teacher.top1 == float((theirs.argmax(1) == labels).double().mean())


def test_of_padded_sequences_leaves_invalid_rows_out() -> None:
    model, batches = Sequences(), [{**each, "ok": torch.tensor([1, 1, 0, 1])} for each in padded()]
    found = evaluate(model, BatchLoader(batches, inputs=("sequence", "mask"), valid="ok"))
    is_right = torch.cat([
        model(each["sequence"], each["mask"])["logits"].argmax(1).eq(each["labels"])[each["ok"].bool()]
        for each in batches
    ])  # fmt: skip
    assert found.num_samples == 9 and found.top1 == float(is_right.double().mean())


def test_of_a_stream_counts_as_it_goes(rows: tuple[Tensor, Tensor]) -> None:
    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self):
            return iter(zip(*rows, strict=True))

    loader, told = BatchLoader(DataLoader(Stream(), batch_size=5)), []
    found = evaluate(network(1), loader, report=lambda done, total: told.append((done, total)))
    assert found.top1 == evaluate(network(1), BatchLoader(batches_of(rows))).top1
    assert told == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    part = evaluate(network(1), loader, max_batches=2, report=lambda done, total: told.append((done, total)))
    assert part.num_samples == 10 and told[5:] == [(0, 2), (1, 2)]


def test_vectors_of_a_frozen_network() -> None:
    batches = padded()
    found = extract_outputs(Sequences(), BatchLoader(batches, inputs=("sequence", "mask")), ["pooled"])["pooled"]
    wanted = torch.cat([Sequences()(each["sequence"], each["mask"])["pooled"] for each in batches])
    assert torch.equal(found.features, wanted) and found.index.tolist() == [*range(12)]
    assert torch.equal(found.labels, torch.cat([each["labels"] for each in batches]))
    soft = [{**each, "labels": torch.rand(4, CLASSES)} for each in batches]
    with pytest.raises(DataError, match="its labels are soft"):
        extract_outputs(Sequences(), BatchLoader(soft, inputs=("sequence", "mask")), ["pooled"])
    unlabeled = [{"sequence": each["sequence"], "mask": each["mask"]} for each in batches]
    with pytest.raises(DataError, match="it has no labels"):
        extract_outputs(Sequences(), BatchLoader(unlabeled, inputs=("sequence", "mask")), ["pooled"])


def test_the_loss_and_cosines_of_features() -> None:
    batches, student, network = padded(), Sequences(1), Sequences(2)
    loader = BatchLoader(batches, inputs=("sequence", "mask"))
    settings = DistillSettings(
        loss=None, task_weight=0, features=({"loss": "cosine", "student": "pooled", "teacher": "pooled"},)
    )
    teacher = open_teacher(TeacherSettings(), module=network, example=loader.example())
    distillation = Distillation(
        settings, student=student, teacher_outputs=teacher.outputs, num_classes=CLASSES, example=loader.example()
    )
    found = evaluate_features(student, distillation, loader, teacher, epochs=1)
    pairs = [[each(batch["sequence"], batch["mask"])["pooled"] for each in (student, network)] for batch in batches]
    cosine = torch.cat([torch.cosine_similarity(*pair) for pair in pairs]).mean().detach()
    (name,) = [name for name in found.metrics if name.startswith("cosine_to_teacher")]
    assert found.metrics[name] == pytest.approx(float(cosine), abs=1e-5) and found.metrics[name] < 0.9


def test_networks_of_several_inputs_are_compared() -> None:
    loader = BatchLoader(padded(), Sequences(2), inputs=("sequence", "mask"))
    found = compare({"ours": Sequences(1), "same": Sequences(2)}, loader)
    assert found.rows[1].evaluation.agreement == 1.0
    assert found.rows[0].cost.ms_per_image > 0 and found.rows[0].cost.batch_size == 4
