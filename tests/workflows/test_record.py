"""Recordings resume after any interruption, and train the same student as the live teacher."""

import errno
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from kd_pipeline import losses
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import is_logits
from kd_pipeline.teachers.recorded.join import join_recording
from kd_pipeline.teachers.recorded.manifest import RecordedDtype, RecordingManifest
from kd_pipeline.workflows import _record as workflow
from kd_pipeline.workflows._record import Progress, RecordSettings, plan_recording, record
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.record_plan import RecordingPlan, format_bytes, loss_outputs, stored_outputs
from kd_pipeline.workflows.record_share import Share, missing_lines
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.forks import Command, fork_context, torchrun_variables
from tests.recordings import (
    GOOD,
    NUM_EPOCHS,
    PLUGINS,
    assert_same_files,
    column,
    config,
    files_of,
    manifest_of,
    net,
    num_epochs_of,
    part_of,
    record_a_little,
    record_often,
    recorded,
    replayed,
    set_column,
)
from tests.streams import assert_same, rows
from tests.training import networks
from tests.training.tiny_run import Weights, distance, run, settings, weights, write_digits

RECORDING_PAGE = Path(__file__).parents[2] / "docs" / "recording.md"
SUMS = "SHA256SUMS"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a teacher; tests may add runs."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def whole(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted recording of two epochs of photographs; do not change it."""
    return recorded(photo_folder, tmp_path_factory.mktemp("whole") / "recording")


@pytest.fixture
def always_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit after every batch."""
    monkeypatch.setattr(workflow, "_COMMIT_INTERVAL_S", -1.0)


# Training


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"data__train__mix": {"mixup": 0.4}, "distill": {"task_weight": 0.0}}, {"data__train__last_batch": "keep"}],
    ids=["plain", "mixed", "keep"],
)
def test_train_ends_with_weights_of_live_teacher(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    source = {"kind": "arrays", "images": digits / "train.npz"}
    changes = {"data__train__source": source, "data__batch_size": 20 if "keep" in str(changes) else 16, **changes}
    live = run(digits, str(tmp_path / "live"), **changes)
    recording = record(settings(digits, str(tmp_path / "live"), **changes))
    replayed = run(digits, str(tmp_path / "replayed"), teacher={"path": recording}, probe={}, **changes)
    first, second = weights(live.folder), weights(replayed.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert live.evaluations["val"].top1 == replayed.evaluations["val"].top1
    # A recording has no outputs for validation images.
    assert live.evaluations["val"].agreement is not None and replayed.evaluations["val"].agreement is None


def test_plain_loop_ends_with_weights_of_live_teacher(photo_folder: Path, whole: Path) -> None:
    described = config(photo_folder)

    def train(loader: KDDataLoader) -> dict[str, torch.Tensor]:
        student = net()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(0)  # for the dropout
        with loader:
            for _ in range(NUM_EPOCHS):
                for batch in loader:
                    loss = losses.soft_target(student(batch.images)["logits"], batch.teacher["logits"], temperature=4.0)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return student.state_dict()

    teacher = open_run_teacher(described, plugins=PLUGINS)
    live = train(KDDataLoader.from_config(described, teacher=teacher))
    again = train(KDDataLoader.from_config(config(photo_folder, teacher={"path": whole})))
    assert all(torch.equal(live[name], again[name]) for name in live)
    assert not all(torch.equal(weight, net().state_dict()[name]) for name, weight in live.items())


def headless(digits: Path, name: str, **changes: Any) -> Config:
    """A run without labels: a small ViT with a grid of 4 x 4 teaches a CNN."""
    vit = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **vit)
    torch.save(teacher.state_dict(), digits / "vit.pt")
    model = {"timm": "vit_tiny_patch16_224", "num_classes": 0, "kwargs": vit, "checkpoint": digits / "vit.pt"}
    found = {
        "teacher": {"model": model, "backend": "pytorch"},
        "student": {"factory": f"{networks.__name__}:trunk", "num_classes": 0},
        "data__train__source": {"kind": "arrays", "images": digits / "unlabeled.npz"},
        "data__val": None,
    }
    return settings(digits, name, **found | changes)


def learned(config: Config) -> Weights:
    """Weights of the student and of its projectors after a run."""
    folder = train(config, plugins=[networks.__name__]).folder
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: weight for name, weight in state.items() if weight.is_floating_point()}


@pytest.fixture(scope="module")
def learned_live(digits: Path) -> Weights:
    """After `headless` with the teacher itself."""
    return learned(headless(digits, "headless"))


@pytest.mark.slow
def test_features_train_student_bit_for_bit(digits: Path, learned_live: Weights, tmp_path: Path) -> None:
    recording = record(headless(digits, "headless"), RecordSettings(out=tmp_path / "recording"))
    assert not any(map(is_logits, manifest_of(recording).outputs))
    found = learned(headless(digits, str(tmp_path / "run"), teacher={"path": recording}))
    assert found.keys() == learned_live.keys()
    assert all(torch.equal(found[name], learned_live[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("int8", 1 / 254)])
def test_rounded_features_train_student_within_bound(
    digits: Path, learned_live: Weights, tmp_path: Path, dtype: RecordedDtype, bound: float
) -> None:
    """The bound is of the distance to the weights of the live teacher, relative to that from the initial ones."""
    recording = record(headless(digits, "headless"), RecordSettings(out=tmp_path / "recording", dtype=dtype))
    found = learned(headless(digits, str(tmp_path / "run"), teacher={"path": recording}))
    # After steps that change nothing.
    initial = learned(headless(digits, str(tmp_path / "still"), train__optimizer={"name": "sgd", "lr": 1e-12}))
    assert 0 < distance(found, learned_live) < bound * distance(initial, learned_live)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["student", 2])
def test_grid_of_student_trains_as_live(digits: Path, tmp_path: Path, grid: Any) -> None:
    terms = [
        {"loss": "am_radio", "student": "spatial", "teacher": "spatial", "grid": "student"},
        {"loss": "cosine", "student": "pooled", "teacher": "pooled"},
    ]
    described = headless(digits, str(tmp_path / "live"), distill={"loss": None, "features": terms})
    kept = RecordSettings(out=tmp_path / "recording", grid=grid)
    recording = record(described, kept, plugins=[networks.__name__])
    stored = manifest_of(recording).outputs["spatial"]
    assert (stored.shape, stored.teacher_grid, stored.num_prefix_tokens) == ((24, 2, 2), (4, 4), None)
    live = learned(described)
    found = learned(
        headless(digits, str(tmp_path / "run"), distill={"loss": None, "features": terms}, teacher={"path": recording})
    )
    for name, weight in live.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_grid_of_student_is_that_of_what_each_output_meets(digits: Path, tmp_path: Path) -> None:
    def shape(term: dict[str, str]) -> tuple[int, ...]:
        terms = [{"loss": "feature_cosine", "teacher": "spatial", **term}]
        described = headless(digits, "headless", distill={"loss": None, "features": terms})
        kept = RecordSettings(out=tmp_path / "recording", grid="student")
        plan = plan_recording(described, kept, plugins=[networks.__name__])
        return plan.manifest.outputs["spatial"].shape

    assert shape({"student": "spatial"}) == (24, 2, 2)
    assert shape({"student": "first"}) == (24, 4, 4)
    assert shape({"student": "pooled"}) == (24, 1, 1)


@pytest.mark.parametrize(
    ("resize", "grid", "warns"), [("bilinear", 2, True), ("bilinear", 4, False), ("auto", 2, False)]
)
def test_interpolated_maps_are_no_means(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, resize: str, grid: int, warns: bool
) -> None:
    term = {"loss": "am_radio", "student": "spatial", "teacher": "spatial", "grid": 2, "resize": resize}
    described = headless(digits, "headless", distill={"loss": None, "features": [term]})
    plan_recording(described, RecordSettings(out=tmp_path / "recording", grid=grid), plugins=[networks.__name__])
    assert ("distill.features[0].resize is bilinear, and --grid stores means" in caplog.text) == warns


def test_grid_of_student_needs_a_student(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--grid student is that of the student's features: set student"):
        recorded(photo_folder, tmp_path / "recording", kept={"grid": "student"})


def test_recording_without_what_the_loss_compares_is_refused(digits: Path, tmp_path: Path) -> None:
    recording = record(headless(digits, "headless"), RecordSettings(out=tmp_path / "here", outputs=("pooled",)))
    with pytest.raises(ConfigError, match=r"no .* to compare as 'spatial'.*record again .* --outputs"):
        learned(headless(digits, str(tmp_path / "run"), teacher={"path": recording}))


@pytest.mark.slow
@pytest.mark.parametrize("begun_with", ["teacher", "recording"])
def test_run_resumes_with_recording(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, begun_with: str
) -> None:
    recording = record(settings(digits, str(tmp_path / "whole")))
    straight = run(digits, str(tmp_path / "whole"))
    first = {"teacher": {"path": recording}} if begun_with == "recording" else {}
    run(digits, str(tmp_path / "parts"), train__epochs=1, **first)
    caplog.set_level("INFO", "kd_pipeline")
    parts = run(digits, str(tmp_path / "parts"), teacher={"path": recording})
    assert f"no row of the teacher (onnxruntime, fp32): {recording} has its outputs for" in caplog.text
    ours, theirs = weights(straight.folder), weights(parts.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_too_few_epochs_fail_before_training(digits: Path, tmp_path: Path) -> None:
    recording = record(settings(digits, str(tmp_path / "run"), train__epochs=1))
    with pytest.raises(ConfigError, match=r"train\.epochs is 2 and the recording in .* has 1 complete epochs"):
        run(digits, str(tmp_path / "run"), teacher={"path": recording})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_compare_with_teacher_is_refused(digits: Path, tmp_path: Path) -> None:
    recording = record(settings(digits, str(tmp_path / "run")))
    with pytest.raises(ConfigError, match=r"train\.compare_with_teacher runs the teacher on validation images"):
        run(digits, str(tmp_path / "run"), teacher={"path": recording}, train__compare_with_teacher=True)


# Files


def test_file_sizes_are_those_of_manifest(photo_folder: Path, tmp_path: Path) -> None:
    # The last batch of an epoch is padded; padding is not written.
    folder = recorded(photo_folder, tmp_path / "small", kept={"top_k": 2, "dtype": "float16"}, last_batch="drop")
    manifest = manifest_of(folder)
    assert {name: column.row_bytes for name, column in manifest.columns.items()} == {
        "sample": 4, "checksum": 4, "logits.values": 2 * 2, "logits.classes": 2 * 2, "logits.rest": 2,
        "features.values": 2 * 32 * 8 * 8,
    }  # fmt: skip
    parts = [part_of(folder, epoch) for epoch in range(2)]
    assert [part.stat().st_size for part in parts] == [manifest.epoch_bytes] * 2 == [37 * manifest.row_bytes] * 2
    assert set(files_of(folder)) == {
        "manifest.json",
        "README.md",
        SUMS,
        *(str(part.relative_to(folder)) for part in parts),
    }


def test_parts_are_whole_batches_of_a_bounded_size() -> None:
    def rows(row_bytes: int, batch_size: int) -> int:
        outputs = {"pooled": {"shape": [(row_bytes - 8) // 4]}}
        found = RecordingManifest.model_validate(
            GOOD | {"teacher": {**GOOD["teacher"], "classes": None}, "outputs": outputs}
        )
        return workflow._part_rows(found, batch_size)

    assert rows(100, 64) == 8192 and rows(100, 100) == 8100 and rows(100, 10_000) == 10_000
    assert rows(2**20, 64) == 128 and rows(2**20, 100) == 100 and rows(2**20, 512) == 512


def test_sha256sum_knows_the_parts(whole: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=whole, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == 2, done.stderr


def test_top_k_float16_is_replayed_within_rounding(photo_folder: Path, tmp_path: Path) -> None:
    full = rows(replayed(photo_folder, recorded(photo_folder, tmp_path / "full")))
    folder = recorded(photo_folder, tmp_path / "small", kept={"top_k": 2, "dtype": "float16"})
    for ours, theirs in zip(rows(replayed(photo_folder, folder)), full, strict=True):
        # The remaining class gets the rest of the probability.
        torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(ours["features"], theirs["features"], rtol=2e-3, atol=2e-3)


def test_sizes_in_readme() -> None:
    """ImageNet for 100 epochs."""
    facts = {"fingerprint": "f", "backend": "tensorrt", "precision": "fp16", "classes": None}
    common = {"teacher": facts, "stream": {}, "num_rows": 1_281_167, "part_rows": 8192}
    logits = {"logits": TensorSpec((None, 1000), torch.float32)}
    vit = {
        "pooled": TensorSpec((None, 384), torch.float32),
        "spatial": TensorSpec((None, 197, 384), torch.float32, num_prefix_tokens=1),
    }
    rows = {
        "all logits, float32": (logits, {}, 100),
        "all logits, float16": (logits, {"dtype": "float16"}, 100),
        "the 16 largest, float16": (logits, {"dtype": "float16", "top_k": 16}, 100),
        "pooled vector, float32": (vit, {"outputs": ("pooled",)}, 1),
        "pooled vector, int8": (vit, {"outputs": ("pooled",), "dtype": "int8"}, 1),
        "pooled vector and tokens, float32": (vit, {}, 1),
        "pooled vector and tokens, float16": (vit, {"dtype": "float16"}, 1),
        "pooled vector and tokens, int8": (vit, {"dtype": "int8"}, 1),
        "pooled vector and tokens, float16, grid 7": (vit, {"dtype": "float16", "grid": 7}, 1),
        "pooled vector and tokens, int8, grid 7": (vit, {"dtype": "int8", "grid": 7}, 1),
    }
    for row, (outputs, options, epochs) in rows.items():
        stored = stored_outputs(outputs, RecordSettings(**options))
        found = RecordingManifest.model_validate({**common, "outputs": stored})
        line = f"| {row} | {found.row_bytes:,} | {format_bytes(found.epoch_bytes * epochs)} |"
        assert line in RECORDING_PAGE.read_text(encoding="utf-8"), line


# Resuming


class Killed(BaseException):
    """Like SIGKILL: no write succeeds from some point on."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """`kill_at(n)` lets n more files be written; None for all."""
    fsync, left = os.fsync, [0.0]

    def counted(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    yield lambda number: left.__setitem__(0, float("inf") if number is None else number)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two batches of eight."""
    monkeypatch.setattr(workflow, "_MAX_PART_ROWS", 16)


@pytest.fixture(scope="module")
def whole_in_parts(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `whole`, in `small_parts`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_MAX_PART_ROWS", 16)
        return recorded(photo_folder, tmp_path_factory.mktemp("parts") / "recording")


@pytest.mark.parametrize("num_writes", [0, 1, 2, 4, 6, 7, 9, 11])
def test_killed_recording_resumes_to_equal_files(
    photo_folder: Path,
    whole: Path,
    tmp_path: Path,
    kill_at: Callable[[int | None], None],
    always_committed: None,
    num_writes: int,
) -> None:
    folder = tmp_path / "recording"
    kill_at(num_writes)
    with pytest.raises(Killed):
        recorded(photo_folder, folder)
    kill_at(None)
    recorded(photo_folder, folder)
    assert_same_files(folder, whole)


INT8 = {"dtype": "int8", "grid": 4}


def test_killed_int8_recording_resumes_to_equal_files(
    photo_folder: Path, tmp_path: Path, kill_at: Callable[[int | None], None], always_committed: None
) -> None:
    kill_at(None)
    whole = recorded(photo_folder, tmp_path / "whole", kept=INT8)
    kill_at(9)
    with pytest.raises(Killed):
        recorded(photo_folder, tmp_path / "recording", kept=INT8)
    kill_at(None)
    recorded(photo_folder, tmp_path / "recording", kept=INT8)
    assert_same_files(tmp_path / "recording", whole)
    # All teacher outputs are compared as the numbers that they stand for.
    set_column(whole, "features.scale", column(whole, "features.scale") * 2)
    with pytest.raises(StateError, match=r"outputs have changed: in positions \d+-\d+ of epoch [12], its features"):
        recorded(photo_folder, whole, kept=INT8)


def test_uncommitted_rows_do_not_count(
    photo_folder: Path, tmp_path: Path, kill_at: Callable[[int | None], None]
) -> None:
    """The rows have been written, but within the interval between commits."""
    kill_at(1)  # the manifest
    with pytest.raises(Killed):
        recorded(photo_folder, tmp_path / "recording")
    assert set(files_of(tmp_path / "recording")) == {"manifest.json"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_rows_before_ctrl_c_or_error_are_kept(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    write, left = workflow.RecordingWriter.write, [2]

    def counted(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise failure
        write(*arguments)

    monkeypatch.setattr(workflow.RecordingWriter, "write", counted)
    with pytest.raises(failure):
        recorded(photo_folder, tmp_path / "recording")
    (piece,) = (tmp_path / "recording" / "working").iterdir()
    assert piece.name.startswith("0001-000000000-000000016-")


def test_partial_epoch_is_not_replayed(
    photo_folder: Path, tmp_path: Path, kill_at: Callable[[int | None], None], always_committed: None
) -> None:
    kill_at(9)
    with pytest.raises(Killed):
        recorded(photo_folder, tmp_path / "recording")
    assert len(replayed(photo_folder, tmp_path / "recording", num_epochs=1)) == 5
    with pytest.raises(StateError, match=r"epoch 2 \(in Python epoch=1\) was not recorded.* has 1 complete epochs"):
        replayed(photo_folder, tmp_path / "recording")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Epoch and first position of each batch that is recorded."""
    found: list[tuple[int, int]] = []
    write = workflow.RecordingWriter.write

    def noted(writer: Any, epoch: int, position: int, rows: Any) -> None:
        found.append((epoch, position))
        write(writer, epoch, position, rows)

    monkeypatch.setattr(workflow.RecordingWriter, "write", noted)
    return found


def test_only_missing_rows_are_recorded(
    photo_folder: Path,
    tmp_path: Path,
    kill_at: Callable[[int | None], None],
    always_committed: None,
    written: list[tuple[int, int]],
) -> None:
    kill_at(4)  # the manifest and three pieces of one batch each
    with pytest.raises(Killed):
        recorded(photo_folder, tmp_path / "recording")
    kill_at(None)
    written.clear()
    recorded(photo_folder, tmp_path / "recording")
    assert written == [(0, 24), (0, 32), *((1, position) for position in (0, 8, 16, 24, 32))]
    written.clear()
    recorded(photo_folder, tmp_path / "recording")
    assert not written


def test_damaged_piece_is_recorded_again(
    photo_folder: Path, whole: Path, tmp_path: Path, kill_at: Callable[[int | None], None], always_committed: None
) -> None:
    folder = tmp_path / "recording"
    kill_at(4)
    with pytest.raises(Killed):
        recorded(photo_folder, folder)
    _, second, _ = sorted((folder / "working").iterdir())
    second.write_bytes(bytes(second.stat().st_size))
    kill_at(None)
    recorded(photo_folder, folder)
    assert_same_files(folder, whole)


def test_more_epochs_are_appended(photo_folder: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    recorded(photo_folder, folder, kept={"epochs": 1})
    assert num_epochs_of(folder) == 1
    recorded(photo_folder, folder, kept={"epochs": 2})
    assert_same_files(folder, whole)
    recorded(photo_folder, folder, kept={"epochs": 1})
    assert_same_files(folder, whole)


def test_resume_with_other_batch_size(
    photo_folder: Path, whole: Path, tmp_path: Path, kill_at: Callable[[int | None], None], always_committed: None
) -> None:
    kill_at(4)
    with pytest.raises(Killed):
        recorded(photo_folder, tmp_path / "recording")
    kill_at(None)
    folder = recorded(photo_folder, tmp_path / "recording", batch_size=5)
    for name in ("sample", "checksum"):
        assert np.array_equal(column(folder, name), column(whole, name))
    ours, theirs = (column(each, "logits.values") for each in (folder, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# Sharing


@pytest.mark.parametrize("mix", [None, {"mixup": 0.4}], ids=["plain", "mixed"])
def test_parts_join_to_the_files_of_one_process(
    photo_folder: Path, tmp_path: Path, small_parts: None, written: list[tuple[int, int]], mix: Any
) -> None:
    whole = recorded(photo_folder, tmp_path / "whole", mix=mix)
    folder = tmp_path / "recording"
    batches: list[tuple[int, int]] = []
    for part in ("3/4", "1/4", "4/4", "2/4"):
        written.clear()
        recorded(photo_folder, folder, kept={"part": part}, mix=mix)
        batches += written
    assert_same_files(folder, whole)
    assert len(batches) == len(set(batches)) == 10
    assert_same(replayed(photo_folder, folder, mix=mix), replayed(photo_folder, whole, mix=mix))


def test_missing_parts_are_named(photo_folder: Path, tmp_path: Path, small_parts: None) -> None:
    folder = recorded(photo_folder, tmp_path / "recording", kept={"part": "1/3"})
    joined = join_recording(folder, NUM_EPOCHS)
    assert missing_lines(joined.manifest, joined.missing, 3) == [
        "epoch 1: positions 16-31, part 2/3 has them",
        "epoch 1: positions 32-36, part 3/3 has them",
        "epoch 2: positions 16-31, part 2/3 has them",
        "epoch 2: positions 32-36, part 3/3 has them",
        "run the same command with --part 2/3, and with --part 3/3",
    ]
    assert missing_lines(joined.manifest, joined.missing, 1) == [
        "epoch 1: positions 16-36",
        "epoch 2: positions 16-36",
        "run the same command again",
    ]
    assert not (folder / SUMS).exists()
    recorded(photo_folder, folder)
    assert not join_recording(folder, NUM_EPOCHS).missing and (folder / SUMS).exists()


def join_until(folder: Path, name: str) -> None:
    """Join, and die before the file called `name` gets its name."""
    replace = os.replace

    def replace_or_die(temporary: Path, path: Path) -> None:
        if path.name == name:
            os._exit(9)
        replace(temporary, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        join_recording(folder, NUM_EPOCHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SUMS, "README.md"])
def test_killed_while_joining_leaves_nothing(photo_folder: Path, whole: Path, tmp_path: Path, name: str) -> None:
    folder = recorded(photo_folder, tmp_path / "recording")
    process = fork_context().Process(target=join_until, args=(folder, name))
    process.start()
    process.join()
    assert process.exitcode == 9 and any(left.endswith(".tmp") for left in files_of(folder))
    join_recording(folder, NUM_EPOCHS)
    assert_same_files(folder, whole)


def test_long_list_of_missing_parts_is_cut() -> None:
    manifest = RecordingManifest.model_validate(GOOD | {"num_rows": 1000, "part_rows": 10})
    lines = missing_lines(manifest, [(0, start) for start in manifest.part_starts], 50)
    assert len(lines) == 10 and lines[-2] == "and 92 more spans of positions" and lines[-1].count("--part") == 8


SHARES = {
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (1, 1, 5, 8)),
    "srun": ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, (1, 1, 3, 4)),
    "array": ({"ID": "7", "MIN": "1", "MAX": "16", "COUNT": "16"}, (7, 16, 0, 1)),
    "array with steps": ({"ID": "8", "MIN": "0", "MAX": "12", "STEP": "4", "COUNT": "4"}, (3, 4, 0, 1)),
    "array of one": ({"ID": "3", "MIN": "3", "MAX": "3", "COUNT": "1"}, (1, 1, 0, 1)),
    "array of srun": (
        {"ID": "2", "MIN": "1", "MAX": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (2, 4, 1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARES)
def test_share_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables, share = SHARES[name]
    for key, value in variables.items():
        monkeypatch.setenv(key if "_" in key or key == "RANK" else f"SLURM_ARRAY_TASK_{key}", value)
    found = Share.of_process(None)
    assert (found.number, found.count, found.rank, found.world_size) == share
    assert bool(found.reason) == (not found.is_everything)
    found = Share.of_process("2/3")
    assert (found.number, found.count, found.rank, found.world_size) == (2, 3, *share[2:])


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("4/3", {}, "--part is 4/3, and the last of 3 is 3/3"),
        ("0/3", {}, "--part is '0/3'; write which one of how many"),
        ("half", {}, "--part is 'half'; write which one of how many"),
        (None, {"ID": "7", "MIN": "1", "MAX": "7", "COUNT": "3"}, "not evenly spaced .*give --part i/n"),
        (None, {"ID": "x", "MIN": "1", "MAX": "7"}, "not all numbers; give --part i/n"),
    ],
    ids=str,
)
def test_share_that_nobody_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, part: str | None, array: dict[str, str], message: str
) -> None:
    for key, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    with pytest.raises(ConfigError, match=message):
        Share.of_process(part)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4), (3, 2)], ids=str)
def test_every_part_has_one_process(sizes: tuple[int, int]) -> None:
    manifest = RecordingManifest.model_validate(GOOD | {"num_rows": 1000, "part_rows": 90})
    count, world_size = sizes
    shares = [Share(number + 1, count, rank, world_size) for number in range(count) for rank in range(world_size)]
    found = [part for share in shares for part in share.select(manifest, 3)]
    assert sorted(found) == [(epoch, start) for epoch in range(3) for start in manifest.part_starts]
    # A task has the same parts, however many processes it starts.
    alone = Share(count, count).select(manifest, 3)
    assert sorted(part for share in shares if share.number == count for part in share.select(manifest, 3)) == alone


def test_ranks_of_two_machines_write_the_files_of_one_process(
    photo_folder: Path, whole_in_parts: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not meet: each runs where the others are not even started."""
    for rank in range(4):
        for name, value in torchrun_variables(rank, 4, port=1).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("GROUP_RANK", str(rank // 2))
        recorded(photo_folder, tmp_path / "recording")
    assert_same_files(tmp_path / "recording", whole_in_parts)


def test_same_part_may_be_recorded_twice(
    photo_folder: Path, whole_in_parts: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process, started by mistake, records everything within the first batch of the first."""
    folder, write = tmp_path / "recording", workflow.RecordingWriter.write

    def begun(*arguments: Any) -> None:
        monkeypatch.setattr(workflow.RecordingWriter, "write", write)
        recorded(photo_folder, folder)
        write(*arguments)

    monkeypatch.setattr(workflow.RecordingWriter, "write", begun)
    recorded(photo_folder, folder)
    assert_same_files(folder, whole_in_parts)


def test_parts_of_another_recording_are_not_joined(photo_folder: Path, tmp_path: Path) -> None:
    folder = recorded(photo_folder, tmp_path / "recording", seed=8)
    (folder / "manifest.json").unlink()
    with pytest.raises(StateError, match=r"has parts of a recording and no manifest\.json.*delete the folder, or"):
        recorded(photo_folder, folder)


@pytest.mark.parametrize(
    ("kept", "changes", "line"),
    [
        ({"top_k": 2}, {}, "outputs.logits.top_k: None → 2"),
        ({"dtype": "float16"}, {}, "outputs.logits.dtype: 'float32' → 'float16'"),
        ({"dtype": "int8"}, {}, "outputs.features.dtype: 'float32' → 'int8'"),
        ({"grid": 4}, {}, "outputs.features.shape: [32, 8, 8] → [32, 4, 4]"),
        ({"outputs": ("logits",)}, {}, "outputs.features.shape: [32, 8, 8] → None"),
        ({}, {"seed": 6}, "stream.seed: 5 → 6"),
        ({}, {"teacher": {"model": {"factory": "tests.recordings:other_net"}}}, "teacher.fingerprint: "),
    ],
    ids=str,
)
def test_other_recording_is_not_resumed(
    photo_folder: Path, whole: Path, kept: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(StateError, match="choose a different folder with --out") as caught:
        recorded(photo_folder, whole, kept=kept, **changes)
    assert f"  {line}" in str(caught.value)


def test_changed_outputs_are_not_resumed(
    photo_folder: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = recorded(photo_folder, tmp_path / "recording")
    values = column(folder, "logits.values")
    set_column(folder, "logits.values", values + np.float32(0.5))
    with pytest.raises(StateError, match=r"outputs have changed: in positions \d+-\d+ of epoch [12], its logits"):
        recorded(photo_folder, folder)
    set_column(folder, "logits.values", values * np.float32(1 + 1e-5))
    recorded(photo_folder, folder)
    assert "rounds differently from before" in caplog.text
    caplog.clear()
    set_column(folder, "logits.values", values)
    recorded(photo_folder, folder)
    assert not caplog.text


def test_changed_images_are_not_resumed(photo_folder: Path, tmp_path: Path) -> None:
    folder = recorded(photo_folder, tmp_path / "recording", kept={"epochs": 1})
    set_column(folder, "checksum", column(folder, "checksum") + np.uint32(1))
    with pytest.raises(StateError, match="the checksum in row 0 was"):
        recorded(photo_folder, folder)


def test_recording_leaves_class_list_of_training(digits: Path, tmp_path: Path) -> None:
    source = {"kind": "arrays", "images": digits / "train.npz", "classes": list("abcdefghij")}
    described = settings(digits, "classes", data__train__source=source, run_dir=tmp_path)
    for name in ("config.yaml", "classes.json"):
        (tmp_path / name).write_text("of a training")
    record(described, RecordSettings(epochs=1))
    assert (tmp_path / "classes.json").read_text() == "of a training"
    (tmp_path / "config.yaml").unlink()
    record(described, RecordSettings(epochs=1))
    assert (tmp_path / "classes.json").read_text() != "of a training"


@pytest.mark.slow
def test_processes_killed_repeatedly_write_the_files_of_one(digits: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "digits.yaml"
    described = settings(digits, str(tmp_path / "run"), train__epochs=60, train__num_threads=1, data__num_threads=1)
    config_file.write_text(described.model_dump_json(exclude_none=True), encoding="utf-8")

    def start(out: str, *options: str, prepare: Callable[[], object] = record_a_little) -> Command:
        return Command(["record", "-c", str(config_file), "--out", out, *options], tmp_path, prepare=prepare)

    undisturbed = start("undisturbed", prepare=record_often)
    numbers = random.Random(1)
    running = {number: start("killed", "--part", f"{number}/4") for number in range(1, 5)}
    for _ in range(20):
        number = numbers.choice(sorted(running))
        process = running[number]
        while process.poll() is None and "recording" not in process.stderr.read():
            time.sleep(0.01)
        time.sleep(numbers.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        running[number] = start("killed", "--part", f"{number}/4")
    (tmp_path / "go").touch()
    for process in (*running.values(), undisturbed):
        process.communicate()
        assert process.returncode == 0
    assert_same_files(tmp_path / "killed", tmp_path / "undisturbed")


# Disk space and other errors


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`disk(n)` leaves n bytes free."""
    return lambda free: monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))


def test_small_disk_is_refused_with_what_fits(photo_folder: Path, tmp_path: Path, disk: Callable[[int], None]) -> None:
    disk(310_000)
    with pytest.raises(ConfigError) as caught:
        recorded(photo_folder, tmp_path / "recording")
    message = str(caught.value)
    assert "needs 608 kB more" in message and "37 images x 2 epochs x 8212 bytes" in message
    assert "310 kB are free" in message and not (tmp_path / "recording").exists()
    assert (
        "what fits: --dtype float16 (304 kB), --dtype int8 (172 kB), --grid 4 (153 kB), --outputs logits (1.48 kB)."
    ) in message
    for number, options in enumerate(({"dtype": "float16"}, {"grid": 4})):
        recorded(photo_folder, tmp_path / str(number), kept=options)


def test_advice_combines_options_where_one_is_not_enough(
    photo_folder: Path, tmp_path: Path, disk: Callable[[int], None]
) -> None:
    disk(50_000)
    with pytest.raises(ConfigError) as caught:
        recorded(photo_folder, tmp_path / "recording", kept={"outputs": ("features",)})
    assert "what fits: --dtype int8 --grid 4 (43.2 kB). Or use" in str(caught.value)
    recorded(photo_folder, tmp_path / "recording", kept={"outputs": ("features",), "dtype": "int8", "grid": 4})
    disk(10)
    with pytest.raises(ConfigError, match=r"nothing smaller fits, and even --dtype int8 --grid 4 takes 43\.2 kB"):
        recorded(photo_folder, tmp_path / "none", kept={"outputs": ("features",)})


def test_fewer_epochs_are_suggested(photo_folder: Path, tmp_path: Path, disk: Callable[[int], None]) -> None:
    disk(2_000)
    with pytest.raises(ConfigError, match=r"what fits: .*--epochs 2 \(1\.48 kB\)\. Or use"):
        recorded(photo_folder, tmp_path / "recording", kept={"outputs": ("logits",), "epochs": 20})


def test_resumed_recording_needs_only_the_rest(photo_folder: Path, tmp_path: Path, disk: Callable[[int], None]) -> None:
    folder = recorded(photo_folder, tmp_path / "recording", kept={"epochs": 1})
    disk(320_000)  # for one of two epochs
    plan = plan_recording(config(photo_folder), RecordSettings(out=folder), plugins=PLUGINS)
    assert plan.num_epochs_done == 1 and plan.num_bytes == 2 * 37 * 8212
    assert plan.existing_bytes == 37 * 8212
    assert plan.missing_bytes == plan.num_bytes - plan.existing_bytes
    assert "of it exists" in plan.lines[0]
    recorded(photo_folder, folder)
    disk(400_000)
    with pytest.raises(ConfigError, match=r"what fits: --epochs 3 \(912 kB\)\. Or use"):
        recorded(photo_folder, folder, kept={"epochs": 4})


def planned(specs: dict[str, TensorSpec], free: int, **options: Any) -> RecordingPlan:
    """A plan for a billion images and a hundred epochs."""
    facts = {"fingerprint": "f", "backend": "tensorrt", "precision": "fp16", "classes": None}
    settings = RecordSettings(**options)
    stored = stored_outputs(specs, settings)
    manifest = RecordingManifest.model_validate(
        {"teacher": facts, "outputs": stored, "stream": {}, "num_rows": 10**9, "part_rows": 8192}
    )
    return RecordingPlan(
        folder=Path("/nowhere/recording"),
        settings=settings,
        teacher_outputs=specs,
        student_grids={},
        manifest=manifest,
        epochs=100,
        share=Share(),
        existing=None,
        free_bytes=free,
    )


@pytest.mark.parametrize(
    ("specs", "free", "message"),
    [
        (
            {"logits": TensorSpec((None, 1000), torch.float32)},
            7_500 * 10**9,
            "needs 401 TB more .* what fits: --dtype float16 --top-k 16 (7.4 TB), --epochs 1 (4.01 TB). Or",
        ),
        (
            {"tokens": TensorSpec((None, 18, 64), torch.float32, 1)},  # of no grid
            200_000 * 10**9,
            "needs 462 TB more .* what fits: --dtype int8 (123 TB), --epochs 43 (198 TB). Or",
        ),
        (
            {"tokens": TensorSpec((None, 17, 64), torch.float32, 1)},
            200_000 * 10**9,
            "needs 436 TB more .* what fits: --dtype int8 (116 TB), --grid 2 (103 TB), --dtype float16 --grid 2",
        ),
    ],
    ids=["logits", "tokens", "tokens of a grid"],
)
def test_only_what_has_an_effect_is_suggested(specs: dict[str, TensorSpec], free: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message).replace(r"\.\*", ".*")):
        planned(specs, free).require_space()


@pytest.mark.parametrize(
    ("spec", "grid", "shape", "teacher_grid"),
    [
        (TensorSpec((None, 17, 24), torch.float32, 1), 2, (24, 2, 2), (4, 4)),
        (TensorSpec((None, 17, 24), torch.float32, 1), 4, (24, 4, 4), (4, 4)),
        (TensorSpec((None, 17, 24), torch.float32, 1), 9, (24, 4, 4), (4, 4)),
        (TensorSpec((None, 21, 24), torch.float32), 2, (24, 2, 2), (4, 4)),
        (TensorSpec((None, 24, 8, 6), torch.float32), 7, (24, 7, 6), (8, 6)),
        (TensorSpec((None, 24, 8, 8), torch.float32), 8, (24, 8, 8), None),
        (TensorSpec((None, 8, 8, 24), torch.float32), 4, (24, 4, 4), (8, 8)),
        (TensorSpec((None, 8, 8, 24), torch.float32), 8, (24, 8, 8), (8, 8)),
        (TensorSpec((None, 24), torch.float32), 2, (24,), None),
    ],
    ids=str,
)
def test_grid_is_at_most_that_of_the_teacher(spec: TensorSpec, grid: int, shape: Any, teacher_grid: Any) -> None:
    stored = stored_outputs({"x": spec}, RecordSettings(grid=grid))["x"]
    assert (stored.shape, stored.teacher_grid, stored.num_prefix_tokens) == (shape, teacher_grid, None)


def test_int8_map_with_channels_last_has_a_scale_for_each_position() -> None:
    spec = TensorSpec((None, 8, 8, 24), torch.float32)
    stored = stored_outputs({"x": spec}, RecordSettings(dtype="int8"))["x"]
    assert (stored.shape, stored.teacher_grid, stored.row_shape) == ((24, 8, 8), (8, 8), (8, 8))
    assert stored_outputs({"x": spec}, RecordSettings())["x"].spec == spec


def test_tokens_without_grid_are_refused() -> None:
    tokens = TensorSpec((None, 18, 24), torch.float32, 1)
    with pytest.raises(ConfigError, match=r"--grid: .*'x' are \[any, 18, 24\] .* no square grid after 1 prefix tokens"):
        stored_outputs({"x": tokens}, RecordSettings(grid=2))
    assert stored_outputs({"x": tokens}, RecordSettings())["x"].spec == tokens


# The plan


def test_plan_is_announced_before_anything_is_written(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    settings, seen = RecordSettings(out=folder, dtype="int8", grid=4), list[RecordingPlan]()

    def announce(plan: RecordingPlan) -> None:
        assert not folder.exists()
        seen.append(plan)

    record(config(photo_folder), settings, plugins=PLUGINS, announce=announce)
    (plan,) = seen
    files = sum(path.stat().st_size for path in folder.glob("*/*.bin"))
    assert plan.num_bytes == plan.missing_bytes == files == 2 * 37 * (8 + 2 * 3 + 16 * (32 + 4))
    assert plan.bytes_per_s == 1000 * 590
    assert plan.lines[0].startswith(f"recording 37 images x 2 epochs in {folder}: 43.7 kB in all (21.8 kB per epoch); ")
    assert plan.lines[1:] == (
        "logits [3] float16: 6 bytes per image",
        "features [32, 4, 4] int8, from 8 x 8: 576 bytes per image",
        "training reads 590 kB/s at 1,000 images/s",
    )


def test_plan_alone_writes_nothing(photo_folder: Path, tmp_path: Path, disk: Callable[[int], None]) -> None:
    disk(10)
    settings = RecordSettings(out=tmp_path / "recording", outputs=("features",))
    plan = plan_recording(config(photo_folder), settings, plugins=PLUGINS)
    assert not (tmp_path / "recording").exists()
    assert list(plan.manifest.outputs) == ["features"] and "not recorded: logits" in plan.lines
    with pytest.raises(ConfigError, match="10 bytes are free"):
        plan.require_space()


# Outputs


def test_named_outputs_are_replayed_bit_for_bit(photo_folder: Path, whole: Path, tmp_path: Path) -> None:
    folder = recorded(photo_folder, tmp_path / "recording", kept={"outputs": ("features",)})
    assert [*manifest_of(folder).columns] == ["sample", "checksum", "features.values"]
    for ours, theirs in zip(replayed(photo_folder, folder), replayed(photo_folder, whole), strict=True):
        assert torch.equal(ours["features"], theirs["features"]) and "logits" not in ours


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        ({}, None),
        ({"student": {"builtin": "small_resnet"}}, ("logits",)),
        ({"student": {"builtin": "small_resnet", "num_classes": 0}}, ("pooled", "spatial")),
        ({"distill": {"features": [{"loss": "feature_mse", "student": "a", "teacher": "b"}]}}, ("logits", "b")),
        ({"distill": {"loss": None, "features": [{"loss": "cosine", "student": "a", "teacher": "b"}]}}, ("b",)),
        ({"distill": {"loss": "my.losses:own"}}, None),
    ],
    ids=str,
)
def test_outputs_that_the_loss_compares_are_known(
    photo_folder: Path, changes: dict[str, Any], outputs: tuple[str, ...] | None
) -> None:
    assert loss_outputs(config(photo_folder, **changes)) == outputs


def test_outputs_default_to_those_of_the_loss(photo_folder: Path, tmp_path: Path, caplog: Any) -> None:
    student = {"student": {"builtin": "small_resnet"}}
    folder = recorded(photo_folder, tmp_path / "recording", kept={"epochs": 1}, **student)
    assert list(manifest_of(folder).outputs) == ["logits"]
    assert not caplog.text
    recorded(photo_folder, tmp_path / "other", kept={"epochs": 1, "outputs": ("spatial",)}, **student)
    assert list(manifest_of(tmp_path / "other").outputs) == ["features"]  # the only map
    assert "the loss of this config compares logits too, which --outputs leaves out" in caplog.text


def test_full_disk_can_be_resumed(
    photo_folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always_committed: None
) -> None:
    fsync, left = os.fsync, [4]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StateError, match=r"\.piece cannot be written: No space left on device.*run the same command again to resume"
    ):
        recorded(photo_folder, tmp_path / "recording")
    monkeypatch.undo()
    recorded(photo_folder, tmp_path / "recording")
    assert_same_files(tmp_path / "recording", whole)


@pytest.mark.parametrize(
    ("kept", "changes", "message"),
    [
        ({"top_k": 3}, {}, "--top-k must be below the number of classes, got 3 of 3"),
        (
            {"outputs": ("feature",)},
            {},
            "--outputs: the teacher .* 'feature'.*did you mean 'features'",
        ),
        ({"outputs": ("features",), "top_k": 2}, {}, "--top-k keeps the largest logits, and features are none"),
        ({}, {"teacher": None}, "there is no teacher to record"),
        (
            {},
            {"hw_decoder_load": 0.5},
            "data.hw_decoder_load is 0.5, with which .* depend on its batch.*set it to 0 or 1",
        ),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(
    photo_folder: Path, tmp_path: Path, kept: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recorded(photo_folder, tmp_path / "recording", kept=kept, **changes)


def test_recording_is_not_recorded(photo_folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the teacher is a recording already"):
        recorded(photo_folder, tmp_path / "recording", teacher={"path": whole})


def test_recording_needs_a_folder(photo_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set run_dir.*or pass --out"):
        record(config(photo_folder), plugins=PLUGINS)


def test_default_folder_is_in_run_dir(digits: Path, tmp_path: Path) -> None:
    described: Config = settings(digits, str(tmp_path / "run"), train__epochs=1)
    assert record(described) == tmp_path / "run" / "recording"
    assert record(described, RecordSettings(out=tmp_path / "here")) == tmp_path / "here"


def test_progress_reports_speed_and_time(photo_folder: Path, tmp_path: Path, always_committed: None) -> None:
    reports: list[Progress] = []
    record(config(photo_folder), RecordSettings(out=tmp_path / "recording"), plugins=PLUGINS, report=reports.append)
    done = [each.done for each in reports]
    assert done == sorted(done) and done[-1] == 1 and len(reports) == 2 * 5
    assert all(each.images_per_s > 0 and each.left_s >= 0 for each in reports) and reports[-1].left_s == 0
