"""Whole runs of students without a head, and of classifiers without labels: what they measure, select and resume."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._features import evaluate_features
from kd_pipeline.evaluation.frozen import extract_features, knn_top1, linear_top1, split_bank
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.registry import open_model
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO
from kd_pipeline.workflows._check import check
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.training import headless, tiny_run
from tests.training.rank_worker import run_ranks
from tests.training.tiny_run import logged, result

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

STEPS = tiny_run.NUM_TRAIN // 16
"""Steps of an epoch."""
PROBED = {"val/knn_top1", "val/linear_top1", "val/teacher_knn_top1", "val/teacher_linear_top1"}
MEASURED = {
    *("val/loss", "val/cosine.pooled", "val/am_radio.spatial"),
    *("val/cosine_to_teacher.pooled", "val/cosine_to_teacher.spatial"),
}


def best_parts(folder: Path, config: Any) -> tuple[torch.nn.Module, Distillation, Any]:
    """The best student, the loss with the projectors of its checkpoint, and the teacher, put together by hand."""
    teacher = open_run_teacher(config, classes=None)
    student = open_model(config.student, num_classes=None)
    student.load_state_dict(torch.load(folder / "checkpoints" / "best_student.pt", weights_only=True))
    distillation = Distillation(
        config.distill, student=student, teacher_outputs=teacher.outputs, image_shape=(3, 8, 8), num_classes=None
    )
    state = load_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    distillation.load_state_dict({name: state[f"distillation.{name}"] for name in distillation.state_dict()})
    return student, distillation, teacher


@pytest.mark.slow
def test_run_from_end_to_end(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    changes = {"train__epochs": 3, "distill": {"features": headless.WITH_STATE[:2]}, "train__optimizer__lr": 0.3}
    found = headless.run(digits, "whole", **changes)
    rows = [row for row in logged(found.folder) if "val/loss" in row]
    assert [row["step"] for row in rows] == [STEPS - 1, 2 * STEPS - 1, 3 * STEPS - 1]
    assert all(row.keys() >= MEASURED | PROBED for row in rows)
    assert len({row["val/teacher_knn_top1"] for row in rows}) == 1
    assert caplog.messages.count("the best student is selected by val/knn_top1 (higher is better)") == 1
    # The result is that of the best student with the projectors and statistics that it was trained with.
    config = headless.settings(digits, "whole", **changes)
    student, distillation, teacher = best_parts(found.folder, config)
    with KDDataLoader.from_config(config, "val", teacher=None) as loader:
        evaluation = evaluate_features(student, distillation, loader, teacher, epochs=3)
        bank, queries = split_bank(extract_features(student, loader))
        others = split_bank(extract_features(teacher, loader))
    final = found.evaluations["val"]
    assert final.loss == evaluation.loss
    assert final.metrics == evaluation.metrics | {
        "knn_top1": knn_top1(bank, queries),
        "linear_top1": linear_top1(bank, queries),
        "teacher_knn_top1": knn_top1(*others),
        "teacher_linear_top1": linear_top1(*others),
    }
    assert final.metrics["knn_top1"] == pytest.approx(max(row["val/knn_top1"] for row in rows))
    assert result(found.folder)["val"]["metrics"] == final.metrics
    titles, student, teacher = found.lines
    assert {"loss", "pooled", "k-NN", "linear"} < {*titles.split()}
    assert student.split()[:4] == ["val", "student", "40", f"{final.loss:.4g}"]
    for line, prefix in ((student, ""), (teacher, "teacher_")):
        knn, linear = (final.metrics[f"{prefix}{name}_top1"] for name in ("knn", "linear"))
        assert line.split()[-2:] == [f"{knn:.1%}", f"{linear:.1%}"]
    assert teacher.split()[:3] == ["val", "teacher", "40"]
    # A finished run measures again what the folder lacks, with the same projectors.
    (found.folder / "result.json").unlink()
    shutil.rmtree(found.folder / "exported")
    again = headless.run(digits, "whole", **changes)
    assert again.evaluations == found.evaluations


@pytest.mark.slow
@pytest.mark.parametrize("features", ["default", "with state"])
def test_resume_from_every_step_is_exact(digits: Path, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"train__save_every_steps": 1, "train__ema": {"decay": 0.5}}
    if features != "default":
        changes["distill"] = {"features": headless.WITH_STATE}
    copies = digits / f"copies {features}"
    save = AtomicCheckpointIO.save_checkpoint

    def copy(self: Any, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path)
        if Path(path).name == "last.ckpt":
            shutil.copytree(Path(path).parents[1], copies / str(checkpoint["global_step"]), dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", copy)
        undisturbed = headless.run(digits, f"undisturbed {features}", **changes)
    wanted = load_checkpoint(undisturbed.folder / "checkpoints" / "last.ckpt")
    for step in range(1, 2 * STEPS + 1):
        folder = copies / str(step)
        assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == step
        found = headless.run(digits, str(folder), **changes)
        resumed = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        for name, value in wanted["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], value), (step, name)
        for name, value in wanted["ema"]["student"].items():
            assert torch.equal(resumed["ema"]["student"][name], value), (step, name)
        assert found.evaluations == undisturbed.evaluations, step
        # The file may lack the row of the step that was saved last.
        later = [[row for row in logged(each) if row["step"] >= step] for each in (folder, undisturbed.folder)]
        for ours, theirs in zip(*later, strict=True):
            timeless = [
                name
                for name in theirs
                if not name.endswith(("_per_s", "loader_share", "teacher_share", "_cores", "_gib"))
            ]
            assert [ours[name] for name in timeless] == [theirs[name] for name in timeless], step


@pytest.mark.slow
def test_metric_of_some_epochs_selects_and_stops(digits: Path) -> None:
    changes = {
        "train__epochs": 5,
        "feature_probe": {"bank": "val", "every": 2, "linear": False},
        "train__select_by": "val/knn_top1",
        "train__early_stopping": {"patience": 9},
        "train__validate_every_steps": 4,
    }
    found = headless.run(digits, "sparse", **changes)
    rows = [row for row in logged(found.folder) if "val/knn_top1" in row]
    assert [row["step"] for row in rows] == [epoch * STEPS - 1 for epoch in (2, 4, 5)]
    best = load_checkpoint(found.folder / "checkpoints" / "best.ckpt")
    values = [row["val/knn_top1"] for row in rows]
    assert best["global_step"] == rows[values.index(max(values))]["step"] + 1
    assert found.evaluations["val"].metrics["knn_top1"] == pytest.approx(max(values))
    state = load_checkpoint(found.folder / "checkpoints" / "last.ckpt")["callbacks"]["StopEarly"]
    assert state["metric"] == "val/knn_top1" and state["num_waited"] == 2 - values.index(max(values))


@pytest.mark.slow
def test_without_labels_the_loss_selects(digits: Path) -> None:
    val = tiny_run.split(digits, "unlabeled", tiny_run.EVAL)
    found = headless.run(digits, "without labels", data__val=val, feature_probe=None)
    rows = [row for row in logged(found.folder) if "val/loss" in row]
    assert len(rows) == 2 and all(row.keys() >= MEASURED and not row.keys() & PROBED for row in rows)
    assert found.evaluations["val"].loss == pytest.approx(min(row["val/loss"] for row in rows))


@pytest.mark.slow
def test_nothing_to_validate_keeps_the_last(digits: Path) -> None:
    found = headless.run(digits, "no validation", data__val=None, feature_probe=None)
    assert not found.evaluations and found.lines == ()
    assert not (found.folder / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_classifier_with_unlabeled_validation(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    val = tiny_run.split(digits, "unlabeled", tiny_run.EVAL)
    found = tiny_run.run(digits, "unlabeled", data__val=val)
    rows = [row for row in logged(found.folder) if "val/loss" in row]
    assert len(rows) == 2 and all("val/distill" in row and "val/top1" not in row for row in rows)
    assert "the best student is selected by val/loss (lower is better)" in caplog.text
    final = found.evaluations["val"]
    assert final.loss == pytest.approx(min(row["val/loss"] for row in rows))
    assert final.loss == pytest.approx(0.9 * final.metrics["distill"])
    assert final.agreement is not None and final.top1 is None
    assert found.lines[1].split()[:4] == ["val", "student", "96", f"{final.agreement:.1%}"]
    baseline = tiny_run.run(digits, "unlabeled baseline", data__val=val, stage="baseline")
    assert "nothing is measured on validation images every epoch, so the last student is the result" in caplog.text
    assert baseline.evaluations["val"].loss is None and baseline.lines == ()
    assert not (baseline.folder / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_classifier_learns_from_teacher_without_logits(digits: Path) -> None:
    found = headless.run(
        digits,
        "classifier of features",
        data__train=tiny_run.split(digits, "train", tiny_run.TRAIN),
        student={"factory": "tests.training.networks:plain"},
        distill={
            "loss": None,
            "task_weight": 1.0,
            "features": [{"loss": "cosine", "student": "1", "teacher": "pooled"}],
        },
        feature_probe=None,
    )
    assert found.evaluations["val"].top1 is not None and found.evaluations["val"].agreement is None


@pytest.mark.slow
def test_bank_of_its_own_and_test_split(digits: Path) -> None:
    test = tiny_run.split(digits, "odd19", tiny_run.EVAL)
    changes = {
        "data__train": tiny_run.split(digits, "train", tiny_run.TRAIN),
        "data__test": test,
        "feature_probe": {"bank": "train", "k": 3, "linear": False},
    }
    found = headless.run(digits, "bank", **changes)
    assert found.evaluations.keys() == {"val", "test"}
    config = headless.settings(digits, "bank", **changes)
    student, _, _ = best_parts(found.folder, config)
    bank = config.model_copy(update={"data": config.data.model_copy(update={"val": config.data.test})})
    plain = tiny_run.settings(digits, "plain", data__val=tiny_run.split(digits, "train", tiny_run.EVAL))
    loaders = {"bank": (plain, "val"), "val": (config, "val"), "test": (bank, "test")}
    features = {}
    for name, (each, split) in loaders.items():
        with KDDataLoader.from_config(each, split, teacher=None) as loader:
            features[name] = extract_features(student, loader)
    for split in ("val", "test"):
        assert found.evaluations[split].metrics["knn_top1"] == knn_top1(features["bank"], features[split], k=3)
    assert not any("test/knn_top1" in row for row in logged(found.folder))


@pytest.mark.slow
def test_short_run_logs_its_losses(digits: Path) -> None:
    changes = {"train__log_every_steps": 50, "train__limit_train_batches": 4, "feature_probe": None}
    found = headless.run(digits, "short", **changes)
    rows = [row for row in logged(found.folder) if "train/loss" in row]
    assert [row["step"] for row in rows] == [3, 7]
    assert all({"train/cosine.pooled", "train/am_radio.spatial", "train/lr", "val/loss"} <= row.keys() for row in rows)


def test_classifier_has_no_features_to_judge(digits: Path) -> None:
    with pytest.raises(ConfigError, match="feature_probe judges a student's vector 'pooled', and the student returns"):
        tiny_run.run(digits, "classifier", feature_probe={"bank": "val"})


def test_probe_without_labels_fails_early(digits: Path) -> None:
    val = tiny_run.split(digits, "unlabeled", tiny_run.EVAL)
    with pytest.raises(ConfigError, match=r"feature_probe.bank: the split 'val' has no labels"):
        headless.run(digits, "no labels", data__val=val)


@pytest.mark.slow
def test_check_of_a_headless_config(digits: Path) -> None:
    found = check(headless.settings(digits, "checked"))
    assert found.problems == () and found.teacher is not None and not found.teacher.probes
    baseline = check(headless.settings(digits, "checked", stage="baseline"))
    assert any("stage: baseline trains on labels" in problem for problem in baseline.problems)
    unlabeled = headless.settings(digits, "checked", data__val=tiny_run.split(digits, "unlabeled", tiny_run.EVAL))
    assert any("feature_probe.bank: the split 'val' has no labels" in problem for problem in check(unlabeled).problems)


def train_headless(folder: Path, rank: int) -> dict[str, Any]:
    """The probe of a run whose global batch is 16, with as many samples in each of its batches on every rank."""
    num_ranks = torch.distributed.get_world_size()
    # Without BatchNorm, whose statistics are those of a rank's own batch.
    student = {"timm": headless.TIMM, "num_classes": 0, "kwargs": headless.KWARGS | {"embed_dim": 8}}
    found = headless.run(folder, f"ranks {num_ranks}", data__batch_size=16 // num_ranks, student=student)
    return {split: each.to_dict() for split, each in found.evaluations.items()}


@pytest.mark.slow
def test_two_ranks_match_one(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    headless.settings(tmp_path, "x")  # writes the teacher
    one, two = run_ranks(1, tmp_path, train_headless), run_ranks(2, tmp_path, train_headless)
    assert two[0] == two[1]
    for name, value in one[0]["val"]["metrics"].items():
        assert two[0]["val"]["metrics"][name] == pytest.approx(value, abs=1e-4), name
