"""Runs in which teacher and student see different views of one decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.tune_steps import Part, RunSteps, Trial
from kd_pipeline.config.config import Config
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.data.views import FollowingView
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.evaluation.probe import probe_teacher
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows._check import check
from kd_pipeline.workflows._compare import compare_files
from kd_pipeline.workflows._export import network_of_config
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.results import repeatable_transform
from tests.recordings import column, set_column
from tests.runs import write_data
from tests.training.tiny_run import weights

SIZE, LARGE = 16, 24
LARGER = {"teacher": {"follow": "images", "size": LARGE}}
LOCAL = {"local": {"preset": "train", "size": 12, "area": [0.1, 0.5], "count": 2, "flip": 0.0}}
EVALUATED = {"local": {"preset": "eval", "size": 12, "resize": 12}}


class SeesOneSize(nn.Module):
    """Ten logits of images of one size, and of no other."""

    def __init__(self, size: int, num_classes: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(size)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, num_classes))
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (self.size, self.size)
        return self.body(images)


PLUGINS = [__name__]


def network(size: int) -> dict[str, Any]:
    return {"factory": f"{__name__}:SeesOneSize", "kwargs": {"size": size}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def config(folder: Path, name: str = "run", *, views: Any = LARGER, val_views: Any = None, **changes: Any) -> Config:
    train_source, val_source = ({"kind": "arrays", "images": folder / f"{split}.npz"} for split in ("train", "val"))
    return Config.model_validate(
        {
            "seed": 3,
            "run_dir": folder / name,
            "data": {
                "batch_size": 32,
                "device": "cpu",
                "train": {
                    "source": train_source,
                    "transform": {"preset": "train", "size": SIZE, "area": [0.5, 1.0], "flip": 0.0},
                    "views": views,
                },
                "val": {
                    "source": val_source,
                    "transform": {"preset": "eval", "size": SIZE, "resize": SIZE},
                    "views": LARGER if val_views is None else val_views,
                },
            },
            "teacher": {"model": {**network(LARGE), "pretrained": False}, "view": "teacher", "backend": "pytorch"},
            "student": network(SIZE),
            "probe": None,
            "train": {"epochs": 2, "loggers": [], "save_every_steps": 3, "export": {"onnx": False}},
            **changes,
        }
    )


def test_teacher_and_student_see_their_sizes(folder):
    result = train(config(folder), plugins=PLUGINS)
    assert result.evaluations["val"].agreement is not None


@pytest.mark.slow
def test_large_teacher_teaches_small_student_end_to_end(folder):
    """Trained at 24 pixels by `stage: teacher`, it teaches a student at 16, both cut from the same window."""
    teacher = {"model": {"builtin": "small_resnet", "kwargs": {"width": 8}}, "view": "teacher"}
    found = train(
        config(
            folder,
            teacher=teacher,
            student={"builtin": "small_resnet", "kwargs": {"width": 4}},
            stage="all",
            train={"epochs": 8, "loggers": [], "optimizer": {"lr": 1e-2}},
        )
    )
    assert read_onnx(folder / "run" / "teacher" / "exported" / "model.onnx").images.shape == (None, 3, LARGE, LARGE)
    assert read_onnx(folder / "run" / "exported" / "model.onnx").images.shape == (None, 3, SIZE, SIZE)
    evaluation = found.evaluations["val"]
    assert evaluation.top1 > 0.6
    assert evaluation.agreement > 0.6


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[KDBatch]:
    """The batches of the training that follows."""
    found: list[KDBatch] = []
    step = DistillModule.training_step

    def training_step(self: DistillModule, batch: KDBatch, number: int) -> Tensor:
        found.append(batch)
        return step(self, batch, number)

    monkeypatch.setattr(DistillModule, "training_step", training_step)
    return found


def test_defaults_are_the_run_without_views(folder):
    """A view that nobody sees changes no weight, and is not rendered."""
    same = {"teacher": {"model": {**network(SIZE), "pretrained": False}, "backend": "pytorch"}, "val_views": {}}
    train(config(folder, "without", views={}, **same), plugins=PLUGINS)
    train(config(folder, "with", views={**LARGER, **LOCAL}, **same), plugins=PLUGINS)
    ours, theirs = weights(folder / "with"), weights(folder / "without")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_runs_render_what_is_seen(folder, monkeypatch):
    found = batches_of(monkeypatch)
    train(config(folder, views={**LARGER, **LOCAL}), plugins=PLUGINS)
    assert {name for batch in found for name in batch.views} == {"teacher"}


def test_unseen_views_are_a_remark(folder):
    found = config(folder, views={**LARGER, **LOCAL})
    (remark,) = found.remarks
    assert remark.startswith("data.train.views.local: neither the student nor the teacher sees it")
    student = {**network(12), "view": "local"}
    assert not config(folder, views={**LARGER, **LOCAL}, val_views={**LARGER, **EVALUATED}, student=student).remarks
    followed = {**LOCAL, "teacher": {"follow": "local", "size": LARGE}}
    assert not config(folder, views=followed, val_views=LARGER, student={**student, "view": "teacher"}).remarks


@pytest.mark.parametrize("teacher_view", ["teacher", "local", "follows"])
def test_student_sees_copies_as_rows(folder, monkeypatch, teacher_view):
    found = batches_of(monkeypatch)
    size = 12 if teacher_view == "local" else LARGE
    views = {**LARGER, **LOCAL, "follows": {"follow": "local", "size": LARGE}}
    val_views = {**LARGER, **EVALUATED, "follows": {"follow": "local", "size": LARGE}}
    run = config(
        folder,
        views=views,
        val_views=val_views,
        student={**network(12), "view": "local"},
        teacher={"model": {**network(size), "pretrained": False}, "view": teacher_view, "backend": "pytorch"},
    )
    result = train(run, plugins=PLUGINS)
    first = found[0]
    copies = [32] if teacher_view == "teacher" else [32, 2]
    assert first.teacher["logits"].shape == (*copies, 10) and len(first) == 32
    assert first.of_view("local").images.shape == (64, 3, 12, 12)
    assert result.evaluations["val"].num_samples == 70
    exported = json.loads((folder / "run" / "exported" / "model.json").read_text())
    assert exported["transform"]["size"] == 12


def test_rows_of_copies_are_learned_from(folder, monkeypatch):
    """The loss of a step is that of the flattened batch."""
    losses: list[float] = []
    found = batches_of(monkeypatch)
    step = DistillModule.training_step

    def training_step(self: DistillModule, batch: KDBatch, number: int) -> Tensor:
        rows = batch.of_view("local")
        logits, teacher = self.student(rows.images), rows.teacher["logits"]
        soft, wanted = (each.div(4).log_softmax(1) for each in (logits, teacher))
        expected = 16 * (wanted.exp() * (wanted - soft)).sum(1).mean() + nn.functional.cross_entropy(
            logits, rows.labels
        )
        loss = step(self, batch, number)
        losses.append(float((loss - expected).detach()))
        return loss

    monkeypatch.setattr(DistillModule, "training_step", training_step)
    run = config(
        folder,
        views={**LARGER, **LOCAL},
        val_views={**LARGER, **EVALUATED},
        student={**network(12), "view": "local"},
        distill={"loss": "soft_target", "temperature": 4.0, "distill_weight": 1.0, "task_weight": 1.0},
    )
    train(run, plugins=PLUGINS)
    assert found and max(map(abs, losses)) < 1e-4


def test_group_of_two_views_teaches(folder):
    members = {
        name: {"model": {**network(size), "pretrained": False}, "view": view, "backend": "pytorch"}
        for name, size, view in (("big", LARGE, "teacher"), ("small", SIZE, "images"))
    }
    terms = [{"loss": "soft_target", "student": "logits", "teacher": f"{name}.logits"} for name in members]
    run = config(folder, teacher={"members": members}, distill={"loss": None, "features": terms})
    train(run, plugins=PLUGINS)
    with pytest.raises(ConfigError, match="the members of the teacher see teacher and images; give them one view"):
        record(run, plugins=PLUGINS)


def test_recording_knows_its_view(folder, monkeypatch):
    live = config(folder)
    recorded = record(live, RecordSettings(out=folder / "recording"), plugins=PLUGINS)
    manifest = json.loads((folder / "recording" / "manifest.json").read_text())
    assert manifest["stream"]["view"]["name"] == "teacher" and manifest["stream"]["view"]["size"] == LARGE
    train(live, plugins=PLUGINS)
    found = batches_of(monkeypatch)
    # What else there is does not matter, nor whether the view is said again.
    for name, more in (("replayed", {}), ("with_more", LOCAL)):
        teacher = {"path": recorded, **({} if more else {"view": "teacher"})}
        train(config(folder, name, teacher=teacher, views={**LARGER, **more}), plugins=PLUGINS)
        ours, theirs = weights(folder / name), weights(folder / "run")
        assert all(torch.equal(ours[each], theirs[each]) for each in theirs)
    assert not any(batch.views for batch in found)


def test_run_resumes_with_a_recording_of_its_view(folder):
    live = config(folder)
    recorded = record(live, RecordSettings(out=folder / "recording"), plugins=PLUGINS)
    settings = {"epochs": 2, "loggers": [], "export": {"onnx": False}, "schedule": {"kind": "constant"}}
    train(config(folder, train=settings | {"epochs": 1}), plugins=PLUGINS)
    train(config(folder, teacher={"path": recorded}, train=settings), plugins=PLUGINS)
    train(config(folder, "live", train=settings), plugins=PLUGINS)
    ours, theirs = weights(folder / "run"), weights(folder / "live")
    assert all(torch.equal(ours[each], theirs[each]) for each in theirs)


@pytest.mark.parametrize(
    ("teacher", "views", "line"),
    [
        ({"view": "images"}, LARGER, f"view.size: {LARGE} → None"),
        ({"view": "teacher"}, {"teacher": {"follow": "images", "size": SIZE}}, f"view.size: {LARGE} → {SIZE}"),
        ({}, {"teacher": {"follow": "images", "size": LARGE, "color": "none"}}, "view.color: 'shared' → 'none'"),
    ],
    ids=["images", "size", "color"],
)
def test_recording_of_another_view_is_refused(folder, teacher, views, line):
    recorded = record(config(folder), RecordSettings(out=folder / "recording"), plugins=PLUGINS)
    run = config(folder, "other", teacher={"path": recorded, **teacher}, views=views)
    with pytest.raises(StateError, match=line):
        train(run, plugins=PLUGINS)


def test_recording_of_images_is_none_of_another_view(folder):
    small = {"model": {**network(SIZE), "pretrained": False}, "backend": "pytorch"}
    recorded = record(config(folder, teacher=small), RecordSettings(out=folder / "recording"), plugins=PLUGINS)
    run = config(folder, "other", teacher={"path": recorded, "view": "teacher"})
    with pytest.raises(StateError, match=f"view.size: None → {LARGE}"):
        train(run, plugins=PLUGINS)


def test_recording_resumes_with_its_view_alone(folder):
    settings = RecordSettings(out=folder / "recording", epochs=1)
    record(config(folder), settings, plugins=PLUGINS)
    longer = settings.model_copy(update={"epochs": 2})
    record(config(folder, views={**LARGER, **LOCAL}), longer, plugins=PLUGINS)
    with pytest.raises(StateError, match=f"stream.view.size: {LARGE} → {SIZE}"):
        record(
            config(
                folder,
                views={"teacher": {"follow": "images", "size": SIZE}},
                teacher={"model": {**network(SIZE), "pretrained": False}, "view": "teacher", "backend": "pytorch"},
            ),
            longer,
            plugins=PLUGINS,
        )


def test_changed_pixels_of_the_view_are_noticed(folder):
    run = config(folder)
    recorded = record(run, RecordSettings(out=folder / "recording"), plugins=PLUGINS)
    replay = config(folder, teacher={"path": recorded})
    with KDDataLoader.from_config(replay) as loader:
        assert next(iter(loader)).teacher_views == {"logits": "teacher"}
    set_column(folder / "recording", "checksum", column(folder / "recording", "checksum") + 1)
    with pytest.raises(StateError, match="32 of 32 checked images differ from the recorded ones"):
        KDDataLoader.from_config(replay)


def test_copies_are_not_recorded(folder):
    run = config(
        folder,
        views={**LARGER, **LOCAL},
        val_views={**LARGER, **EVALUATED},
        student={**network(12), "view": "local"},
        teacher={"model": {**network(12), "pretrained": False}, "view": "local", "backend": "pytorch"},
    )
    with pytest.raises(ConfigError, match="the teacher's view local has 2 copies; give it a view without count"):
        record(run, plugins=PLUGINS)


def test_check_opens_all_for_their_views(folder):
    run = config(
        folder,
        views={**LARGER, **LOCAL},
        val_views={**LARGER, **EVALUATED},
        student={**network(12), "view": "local"},
    )
    for changed in (run, run.model_copy(update={"stage": "all"}), run.model_copy(update={"stage": "baseline"})):
        found = check(changed, plugins=PLUGINS)
        assert not [each for each in found.findings if each.severity == "error"], found.findings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {**network(12), "view": "techer"}}, "student.view: data.train has no view 'techer'; did you mean"),
        (
            {"teacher": {"onnx": "a.onnx", "view": "big"}},
            "teacher.view: data.train has no view 'big'; add data.train.v",
        ),
        (
            {"teacher": {"members": {"a": {"onnx": "a.onnx", "view": "big"}}}},
            "teacher.members.a.view: data.train has no view 'big'",
        ),
        (
            {"teacher": {"model": {**network(12), "view": "teacher"}}},
            "model.view is a student's; set the view of the teacher beside its model",
        ),
        (
            {"views": LOCAL, "teacher": {"onnx": "a.onnx", "view": "local"}},
            "teacher.view has 2 copies of each image, and student.view 1: their outputs cannot be compared",
        ),
    ],
    ids=["student", "teacher", "member", "model", "copies"],
)
def test_impossible_views_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **changes)


def test_split_without_the_view_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data.val has no view 'teacher'; add data.val.views.teacher, such as"):
        train(config(folder, val_views={}), plugins=PLUGINS)
    wrong = {"teacher": {"follow": "images", "size": SIZE}}
    with pytest.raises(
        TeacherError, match=r"data.val.views.teacher makes images .* give data.val.views.teacher the size"
    ):
        train(config(folder, "wrong", val_views=wrong), plugins=PLUGINS)


def test_resume_depends_on_the_views_that_are_seen(folder):
    longer = {"epochs": 3, "loggers": [], "export": {"onnx": False}}
    train(config(folder), plugins=PLUGINS)
    train(config(folder, views={**LARGER, **LOCAL}, train=longer), plugins=PLUGINS)
    longest, changed = {**longer, "epochs": 4}, {"teacher": {"follow": "images", "size": LARGE, "color": "none"}}
    with pytest.raises(StateError, match=r"views.teacher.color: shared → none"):
        train(config(folder, views=changed, train=longest), plugins=PLUGINS)


@pytest.mark.slow
def test_students_of_different_views_end_as_alone(folder, caplog):
    views, val_views = {**LARGER, **LOCAL}, {**LARGER, **EVALUATED}
    students = {"plain": network(SIZE), "crops": {**network(12), "view": "local"}}
    with caplog.at_level("WARNING", "kd_pipeline"):
        train(config(folder, views=views, val_views=val_views, student=None, students=students), plugins=PLUGINS)
    assert "neither the student" not in caplog.text
    for name, student in students.items():
        train(config(folder, f"alone/{name}", views=views, val_views=val_views, student=student), plugins=PLUGINS)
        ours, theirs = weights(folder / "run" / name), weights(folder / "alone" / name)
        assert all(torch.equal(ours[each], theirs[each]) for each in theirs)
    # A student resumes alone, with the views that it sees.
    longer = {"epochs": 3, "loggers": [], "export": {"onnx": False}}
    train(config(folder, "run/plain", views=LARGER, val_views=val_views, train=longer), plugins=PLUGINS)


def test_models_are_compared_on_their_views(folder, monkeypatch):
    """The student and the teacher of a config are evaluated as during the run; other files on images that they take."""
    run = config(
        folder,
        views={**LARGER, **LOCAL},
        val_views={**LARGER, **EVALUATED},
        student={**network(12), "view": "local"},
        train={"epochs": 1, "loggers": []},
    )
    wanted = train(run, plugins=PLUGINS).evaluations["val"]
    onnx = folder / "run" / "exported" / "model.onnx"
    other = export_onnx(SeesOneSize(LARGE).eval(), folder / "other.onnx", image_shape=(3, LARGE, LARGE))
    found = compare_files(run, [folder / "run", onnx, other], split="val", plugins=PLUGINS)
    rows = {row.name: row.evaluation for row in found.rows}
    for name in (str(folder / "run"), str(onnx)):
        assert rows[name].top1 == wanted.top1 and rows[name].agreement == wanted.agreement
    assert rows[str(other)].agreement == 1.0  # the network of the teacher
    with pytest.raises(TeacherError, match=r"takes images"):
        compare_files(run, [export_onnx(SeesOneSize(20), folder / "20.onnx", image_shape=(3, 20, 20))], split="val")


def test_own_loader_says_the_view_of_its_teacher(folder):
    run = config(folder, teacher=None, val_views=None)
    with KDDataLoader.from_config(run, teacher=None) as plain:
        source, transform = plain.source, plain.transform
    views = {"teacher": FollowingView(follow="images", size=LARGE)}
    options = {"views": views, "batch_size": 32, "seed": 3, "device": "cpu"}
    alone = Config.model_validate({"run_dir": folder / "own", "train": {"epochs": 1, "loggers": []}, "probe": None})
    with (
        KDDataLoader(
            source, transform, SeesOneSize(LARGE), teacher_view="teacher", last_batch="drop", **options
        ) as loader,
        KDDataLoader(source, EvalTransform(size=SIZE), shuffle=False, **options) as validation,
    ):
        found = train(alone, student=SeesOneSize(SIZE), train_batches=loader, validation=validation)
    assert found.evaluations["val"].agreement is not None


def test_teacher_settings_are_opened_for_the_view_of_an_own_loader(folder):
    run = config(folder)
    with KDDataLoader.from_config(run, teacher=None) as loader:
        alone = run.model_copy(update={"data": Config().data, "run_dir": folder / "own"})
        found = train(alone, train_batches=loader, plugins=PLUGINS)
    assert found.evaluations == {}
    assert (folder / "own" / "exported").is_dir()


def test_export_is_of_the_size_of_the_view(folder):
    run = config(folder, teacher={"model": {**network(LARGE), "checkpoint": folder / "teacher.pt"}, "view": "teacher"})
    torch.save(SeesOneSize(LARGE).state_dict(), folder / "teacher.pt")
    network_found = network_of_config(run, plugins=PLUGINS)
    assert network_found.image_shape == (3, LARGE, LARGE) and network_found.view == "teacher"
    images = sample_images(run, view="teacher", num_images=3)
    assert images.shape == (3, 3, LARGE, LARGE)


def local_run(folder: Path, name: str = "run", **changes: Any) -> Config:
    """A student of two crops of each image."""
    views, val_views = {**LARGER, **LOCAL}, {**LARGER, **EVALUATED}
    return config(
        folder, name, views=views, val_views=val_views, **{"student": {**network(12), "view": "local"}, **changes}
    )


def test_probe_counts_each_copy(folder):
    teacher = {"model": {**network(12), "pretrained": False}, "view": "local", "backend": "pytorch"}
    run = local_run(folder, teacher=teacher, probe={"strict": False, "num_samples": 64})
    with KDDataLoader.from_config(run, plugins=PLUGINS) as loader:
        (report,) = probe_teacher(run, loader.teacher, run.probe).values()
    assert report.num_samples == 64


def test_accumulated_steps_are_those_of_whole_batches(folder):
    """The mean of a step is over its samples, however many copies each has."""
    settings = {"epochs": 1, "loggers": [], "export": {"onnx": False}, "optimizer": {"name": "sgd", "lr": 0.01}}
    whole = local_run(folder, "whole", train=settings)
    data = {**whole.data.model_dump(mode="json"), "batch_size": 16}
    parts = Config.model_validate(
        {
            **whole.model_dump(mode="json"),
            "run_dir": folder / "parts",
            "data": data,
            "train": settings | {"accumulate": 2},
        }
    )
    train(whole, plugins=PLUGINS)
    train(parts, plugins=PLUGINS)
    ours, theirs = weights(folder / "parts"), weights(folder / "whole")
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted)


@pytest.mark.slow
def test_tune_measures_what_a_run_sees(folder):
    parts: tuple[Part, ...] = ("all", "no loader", "no teacher", "student")
    with RunSteps(local_run(folder), "distill", plugins=PLUGINS) as steps:
        assert all(steps.rate(Trial((), part), seconds=0.02) > 0 for part in parts)
        steps.check_agreement((("teacher.precision", "bf16"),))


def test_prediction_is_for_the_view_of_the_student(folder):
    data = local_run(folder).data
    assert repeatable_transform(data, "val", "local") == EvalTransform(size=12, resize=12)
    assert repeatable_transform(data, "val", "teacher") == EvalTransform(size=LARGE, resize=LARGE)
    assert repeatable_transform(data, "train", "local") is None
