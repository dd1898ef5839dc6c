"""The distillation loss and the cosines of a student on a split, with networks whose outputs are the pixels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays
from kd_pipeline.errors import NonFiniteError, StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._features import cosine_names, evaluate_features, label_free_terms
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.evaluation.ranks import process_group
from tests.evaluation.test_evaluate import NUM_LOGITS, SIDE, Pixels, open_loader, pixel_arrays
from tests.evaluation.test_frozen import Pooled
from tests.forks import fork_ranks

TERMS = DistillSettings(
    loss=None,
    features=(
        {"loss": "cosine", "student": "pooled", "teacher": "pooled"},
        {"loss": "feature_mse", "student": "spatial", "teacher": "spatial", "weight": 0.5},
    ),
)


def pooled_teacher() -> Teacher:
    module = Pooled(lambda x: x.flip(1) + x)
    return open_teacher(TeacherSettings(), module=module, image_shape=(3, SIDE, SIDE))


def distillation_of(settings: DistillSettings, student: nn.Module, teacher: Teacher) -> Distillation:
    return Distillation(
        settings, student=student, teacher_outputs=teacher.outputs, image_shape=(3, SIDE, SIDE), num_classes=NUM_LOGITS
    )


class Shifted(Pooled):
    """Features that differ from the teacher's in both outputs."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooled": images.flatten(1), "spatial": images + 1}


def measured(source, settings: DistillSettings = TERMS, student: nn.Module | None = None, **options) -> Evaluation:
    student, teacher = student or Shifted(), pooled_teacher()
    distillation = distillation_of(settings, student, teacher)
    with open_loader(source, **options) as loader:
        return evaluate_features(student, distillation, loader, teacher, epochs=2)


def all_images(source) -> Tensor:
    with open_loader(source, batch_size=len(source)) as loader:
        (batch,) = loader
        return batch.images.double()


def test_means_match_their_definitions(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    found, images = measured(source), all_images(source)
    cosine = cosine_similarity(images.flatten(1), images.flatten(1).flip(1) + images.flatten(1))
    assert found.num_samples == 101 and found.num_bad_rows == 0 and found.top1 is None
    assert found.metrics["cosine_to_teacher.pooled"] == pytest.approx(float(cosine.mean()), rel=1e-6)
    assert found.metrics["cosine.pooled"] == pytest.approx(1 - float(cosine.mean()), rel=1e-5)
    assert found.metrics["feature_mse.spatial"] == pytest.approx(1, rel=1e-5)
    assert found.loss == pytest.approx(found.metrics["cosine.pooled"] + 0.5, rel=1e-5)
    assert "cosine_to_teacher.spatial" in found.metrics and found.scalars().keys() == {"loss", *found.metrics}


@pytest.mark.parametrize("num_samples", [1, 19, 101])
def test_result_independent_of_batches_and_order(tmp_path, num_samples) -> None:
    source = pixel_arrays(tmp_path, num_samples)
    wanted = measured(source, batch_size=num_samples)
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"shuffle": True, "seed": 9}):
        found = measured(source, **options)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-6)
        for name in ("pooled", "spatial"):
            key = f"cosine_to_teacher.{name}"
            assert found.metrics[key] == wanted.metrics[key]  # to the last bit
    padded = measured(source, batch_size=12, last_batch="pad")
    assert padded.num_samples == num_samples and padded.loss == pytest.approx(wanted.loss, rel=1e-6)


SIZES = (1, 19, 101)


def _rank(rank: int, world_size: int, folder: str) -> None:
    with process_group(rank, world_size, folder):
        found = []
        for size in SIZES:
            source = Arrays(f"{folder}/{size}/images.npy", f"{folder}/{size}/labels.npy")
            sharded = measured(source, batch_size=4, last_batch="pad")
            found.append([each.to_dict() for each in (sharded, measured(source, batch_size=4, shard=Shard()))])
        Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_ranks_match_one_process(tmp_path) -> None:
    wanted = []
    for size in SIZES:
        (tmp_path / str(size)).mkdir()
        wanted.append(measured(pixel_arrays(tmp_path / str(size), size), batch_size=4).to_dict())
    fork_ranks(_rank, (2, str(tmp_path)))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for (sharded, alone), one_process in zip(ranks[0], wanted, strict=True):
        assert alone == one_process
        assert sharded["num_samples"] == one_process["num_samples"]
        assert sharded["loss"] == pytest.approx(one_process["loss"], rel=1e-6)
        for name in ("pooled", "spatial"):
            key = f"cosine_to_teacher.{name}"
            assert sharded["metrics"][key] == one_process["metrics"][key]


def test_without_labels_terms_that_need_them_are_left_out(tmp_path) -> None:
    pixel_arrays(tmp_path)
    images = np.load(tmp_path / "images.npy")
    settings = DistillSettings(
        loss="soft_target", distill_weight=0.9, task_weight=0.1, features=({"loss": "dkd", "weight": 2.0},)
    )
    student, teacher = (
        Pixels(),
        open_teacher(TeacherSettings(), module=Pixels(lambda x: x * 0.5), image_shape=(3, SIDE, SIDE)),
    )
    distillation = distillation_of(settings, student, teacher)
    with open_loader(Arrays(images)) as loader:
        found = evaluate_features(student, distillation, loader, teacher, epochs=2)
    assert label_free_terms(settings) == ("distill",)
    assert found.metrics.keys() == {"distill", "cosine_to_teacher.dkd"}
    log_p, log_q = ((all_images(Arrays(images)).flatten(1) * each / 4).log_softmax(1) for each in (0.5, 1.0))
    kl = 16 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert found.metrics["distill"] == pytest.approx(float(kl), rel=1e-4)
    assert found.loss == pytest.approx(0.9 * float(kl), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ("distill",)),
        ({"loss": "dkd"}, ()),
        ({"loss": "my.module:loss"}, ()),
        ({"distill_weight": 0.0}, ()),
        ({"features": [{"loss": "cosine", "weight": 0.0}, {"loss": "logit_mse"}]}, ("distill", "logit_mse")),
    ],
)
def test_label_free_terms(settings, terms) -> None:
    assert label_free_terms(DistillSettings(**settings)) == terms


def test_cosines_of_the_same_features_have_whole_names() -> None:
    compared = (("cosine", "a"), ("feature_mse", "a"), ("dist", "b"))
    settings = DistillSettings(loss=None, features=[{"loss": loss, "student": name} for loss, name in compared])
    assert cosine_names(settings) == {
        "cosine.a": "cosine_to_teacher.cosine.a",
        "feature_mse.a": "cosine_to_teacher.feature_mse.a",
        "dist.b": "cosine_to_teacher.b",
    }


def test_student_and_loss_are_left_as_they_were(tmp_path) -> None:
    source, teacher = pixel_arrays(tmp_path, 19), pooled_teacher()
    settings = DistillSettings(
        loss=None,
        features=({"loss": "relational", "student": "pooled", "teacher": "pooled", "standardize": "phi_s"},),
    )
    student = nn.Sequential(nn.BatchNorm2d(3), Shifted())
    distillation = distillation_of(settings, student, teacher)
    student.train(), distillation.train()
    before = {**student.state_dict(), **distillation.state_dict()}
    before = {name: value.clone() for name, value in before.items()}
    with open_loader(source) as loader:
        evaluate_features(student, distillation, loader, teacher, epochs=2)
    after = {**student.state_dict(), **distillation.state_dict()}
    assert after.keys() == before.keys() and len(before) > 5
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert student.training and distillation.training


def test_student_without_a_finite_row_is_refused(tmp_path) -> None:
    source = pixel_arrays(tmp_path, 19)
    found = measured(source, student=Pooled(lambda x: x.masked_fill(x[:, :1] > 25, math.nan)))
    assert 0 < found.num_bad_rows < 19 and math.isnan(found.loss) and found.to_dict()["loss"] is None
    with pytest.raises(NonFiniteError, match="outputs hold NaN or inf for all 19 images; check its weights"):
        measured(source, student=Pooled(lambda x: x * math.nan))


def test_shard_without_process_group_is_refused(tmp_path) -> None:
    source = pixel_arrays(tmp_path, 19)
    with pytest.raises(StateError, match="give the loader shard=Shard"):
        measured(source, shard=Shard(0, 2))
