"""Which checkpoints a training writes, and that it resumes from each of them exactly."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO
from tests.training.toy_training import NUM_BATCHES, NUM_EPOCHS, max_file_size, train

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


class Recorder(AtomicCheckpointIO):
    """Also records what is saved at which step, and copies each file to `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.saved: list[tuple[str, int]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        self.saved.append((Path(path).name, checkpoint["global_step"]))
        super().save_checkpoint(checkpoint, path)
        if self.folder is not None:
            copy = self.folder / f"{Path(path).stem}-{checkpoint['global_step']}.ckpt"
            super().save_checkpoint(checkpoint, copy)


def same_weights(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_last_is_saved_per_steps_and_epoch(tmp_path):
    io = Recorder()
    train(tmp_path, io=io, every_n_steps=3)
    assert io.saved == [("last.ckpt", step) for step in (3, 6, 9, 12, 15, 18)]
    assert len(io.saved) == NUM_EPOCHS * NUM_BATCHES // 3  # the end of an epoch is saved once


def test_no_save_within_accumulation(tmp_path):
    io = Recorder()
    train(tmp_path, io=io, every_n_steps=1, accumulate_grad_batches=4)
    assert io.saved == [("last.ckpt", step) for step in range(1, 7)]  # after batches 4 and 6 of each epoch


@pytest.mark.parametrize(("mode", "best"), [("max", [6, 12]), ("min", [6, 18])])
def test_best_is_saved_with_its_student(tmp_path, mode, best):
    io, scores = Recorder(), [0.2, 0.5, 0.1]
    _, saver = train(tmp_path, io=io, scores=scores, mode=mode)
    assert [step for name, step in io.saved if name == "best.ckpt"] == best
    assert saver.best_score == pytest.approx(max(scores) if mode == "max" else min(scores))
    best_checkpoint = load_checkpoint(tmp_path / "best.ckpt")
    assert best_checkpoint["global_step"] == best[-1]
    student = torch.load(tmp_path / "best_student.pt", weights_only=True)
    assert same_weights({f"student.{name}": weight for name, weight in student.items()}, best_checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("mode", "scores", "averaged"),
    [
        ("max", [0.2, 0.5, 0.1], [6, 12]),
        ("min", [0.2, 0.5, 0.1], [6, 18]),
        ("max", [0.2, math.nan, 0.2], [6, 18]),
        ("max", [0.2, 0.2, 0.2], [6, 12]),
    ],
)
def test_best_students_are_averaged(tmp_path, mode, scores, averaged):
    io = Recorder(tmp_path / "all")
    train(tmp_path, io=io, scores=scores, mode=mode, average_best=2)
    students = [
        {name.removeprefix("student."): tensor for name, tensor in state.items()}
        for state in (load_checkpoint(tmp_path / "all" / f"last-{step}.ckpt")["state_dict"] for step in averaged)
    ]
    found = torch.load(tmp_path / "best_student.pt", weights_only=True)
    assert found.keys() == students[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (students[0][name] + students[1][name]) / 2)
    assert sorted(path.name for path in (tmp_path / "top").iterdir()) == sorted(f"step_{step}.pt" for step in averaged)


def test_average_resumes(tmp_path):
    copies, scores = tmp_path / "all", [0.2, 0.5, 0.3]
    train(tmp_path / "whole", io=Recorder(copies), scores=scores, average_best=2)
    train(tmp_path / "part", io=Recorder(), scores=scores, average_best=2, max_steps=2 * NUM_BATCHES)
    train(tmp_path / "part", io=Recorder(), resume=copies / "last-12.ckpt", scores=scores, average_best=2)
    whole, part = (torch.load(tmp_path / name / "best_student.pt", weights_only=True) for name in ("whole", "part"))
    assert same_weights(whole, part)


def test_nan_is_never_best(tmp_path):
    io = Recorder()
    _, saver = train(tmp_path, io=io, scores=[math.nan, 0.1, math.nan])
    assert [step for name, step in io.saved if name == "best.ckpt"] == [2 * NUM_BATCHES]
    assert saver.best_score == pytest.approx(0.1)


def test_epoch_that_did_not_measure_is_never_best(tmp_path):
    io, measured = Recorder(), iter([False, True, False])
    _, saver = train(tmp_path, io=io, scores=[0.9, 0.1, 0.5], is_measured=lambda metric: next(measured))
    assert [step for name, step in io.saved if name == "best.ckpt"] == [2 * NUM_BATCHES]
    assert saver.best_score == pytest.approx(0.1)
    assert [step for name, step in io.saved if name == "last.ckpt"] == [6, 12, 18]


def test_resume_in_moved_folder_keeps_best_score(tmp_path):
    copies, io = tmp_path / "all", Recorder()
    train(tmp_path / "first", io=Recorder(copies), scores=[0.5, 0.4, 0.6])
    train(tmp_path / "second", io=io, resume=copies / "last-6.ckpt", scores=[0.5, 0.4, 0.6])
    assert io.saved == [("last.ckpt", 12), ("best.ckpt", 18), ("last.ckpt", 18)]


def test_different_metric_resets_best_score(tmp_path):
    copies, io = tmp_path / "all", Recorder()
    train(tmp_path / "first", io=Recorder(copies), scores=[0.1, 0.4, 0.3])
    train(tmp_path / "second", io=io, resume=copies / "last-6.ckpt", scores=[0.1, 0.4, 0.3], mode="min")
    assert [step for name, step in io.saved if name == "best.ckpt"] == [12, 18]


def test_unlogged_metric_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no metric 'val/top5' to select the best by; there are val/top1"):
        train(tmp_path, scores=[0.1, 0.2, 0.3], monitor="val/top5")


@pytest.mark.slow
def test_resume_from_any_step_is_exact(tmp_path):
    copies = tmp_path / "all"
    undisturbed, _ = train(tmp_path / "first", io=Recorder(copies), every_n_steps=1)
    for step in range(1, NUM_EPOCHS * NUM_BATCHES):
        module, _ = train(tmp_path / "second", resume=copies / f"last-{step}.ckpt")
        assert same_weights(module.state_dict(), undisturbed.state_dict()), f"from step {step}"


def test_resume_with_accumulation_is_exact(tmp_path):
    copies = tmp_path / "all"
    undisturbed, _ = train(tmp_path / "first", io=Recorder(copies), every_n_steps=1, accumulate_grad_batches=4)
    for step in range(1, 6):
        module, _ = train(tmp_path / "second", resume=copies / f"last-{step}.ckpt", accumulate_grad_batches=4)
        assert same_weights(module.state_dict(), undisturbed.state_dict()), f"from step {step}"


def test_failed_save_ends_run(tmp_path):
    path = tmp_path / "last.ckpt"
    train(tmp_path, every_n_steps=3)
    with max_file_size(2000), pytest.raises(StateError, match=r"last\.ckpt cannot be written"):
        train(tmp_path, every_n_steps=3)
    assert load_checkpoint(path)["global_step"] == NUM_EPOCHS * NUM_BATCHES


def test_remove_checkpoint_twice(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint({"state_dict": {}}, path)
    for _ in range(2):
        AtomicCheckpointIO().remove_checkpoint(path)
        assert not path.exists()
