"""Runs with several teachers of different kinds: a vision transformer, a wider network and a classifier at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.config.config import Config, load_config
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.evaluation.probe import ProbeSettings, probe_teacher
from kd_pipeline.loader.config_teacher import open_config_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO
from kd_pipeline.workflows._check import check
from kd_pipeline.workflows._record import record
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.record_plan import RecordSettings
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.recordings import manifest_of
from tests.training import headless, tiny_run

PLUGINS = ["tests.training.networks", __name__]
FEATURES = [
    {"loss": "cosine", "student": "pooled", "teacher": "dino.pooled"},
    {"loss": "am_radio", "student": "spatial", "teacher": "dino.spatial", "standardize": "phi_s"},
    {"loss": "feature_smooth_l1", "student": "pooled", "teacher": "clip.pooled"},
]


class Wide(nn.Module):
    """A vector `[N, 40]` and a map `[N, 40, 4, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Conv2d(3, 40, 2, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        spatial = self.embed(images)
        return {"pooled": spatial.mean((2, 3)), "spatial": spatial}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_run.write_digits(tmp_path)
    return tmp_path


def settings(folder: Path, name: str, **changes: Any) -> Config:
    dino = headless.settings(folder, name).teacher
    assert dino is not None
    members = {
        "dino": dino.model_dump(mode="json", exclude_unset=True),
        "clip": {"model": {"factory": f"{__name__}:Wide"}, "precision": "bf16", "backend": "pytorch"},
        "classes": {"onnx": folder / "teacher.onnx", "backend": "onnxruntime"},
    }
    found = {"teacher": {"members": members}, "distill": {"features": FEATURES}}
    return headless.settings(folder, name, **(found | changes))


@pytest.mark.slow
def test_run_learns_from_all(folder: Path) -> None:
    with_head = {"factory": "tests.training.networks:plain"}
    logits = {"loss": "soft_target", "student": "logits", "teacher": "classes.logits"}
    terms = [
        logits,
        {"loss": "cosine", "student": "0", "teacher": "dino.pooled"},
        {"loss": "am_radio", "student": "1", "teacher": "clip.spatial"},
    ]
    distill = {"loss": None, "features": terms}
    config = settings(folder, "run", student=with_head, distill=distill, feature_probe=None)
    train(config, plugins=PLUGINS)
    row = tiny_run.logged(folder / "run")[0]
    assert {f"train/{name}" for name in ("soft_target", "cosine.0", "am_radio.1")} <= row.keys()
    # What the run wrote is the same run, which is resumed with the runtimes that it began with.
    saved = load_config(folder / "run" / "config.yaml")
    assert saved.teacher is not None and config.teacher is not None
    assert saved.teacher.model_dump() == config.teacher.model_dump()
    assert saved.distill.model_dump() == config.distill.model_dump()
    assert saved.teacher.model_dump() == config.teacher.model_dump()
    teacher = open_run_teacher(saved, plugins=PLUGINS, begun_with=["onnxruntime fp32", "pytorch bf16", "pytorch bf16"])
    assert teacher.runtimes == ("onnxruntime fp32", "pytorch bf16", "pytorch bf16")
    teacher.close()


def test_headless_run_with_defaults(folder: Path) -> None:
    config = settings(folder, "run", distill={})
    names = [(term.loss, term.teacher) for term in config.distill.features]
    assert ("cosine", "dino.pooled") in names and ("am_radio", "clip.spatial") in names


@pytest.mark.slow
def test_run_without_head(folder: Path) -> None:
    result = train(settings(folder, "run"), plugins=PLUGINS)
    metrics = result.evaluations["val"].metrics
    assert {"dino_knn_top1", "clip_knn_top1", "knn_top1"} <= metrics.keys()


@pytest.mark.slow
def test_recording_of_all_trains_as_they_do(folder: Path) -> None:
    terms = [*FEATURES[:2], {**FEATURES[2], "teacher": "classes.logits"}]
    distill, folder_of = {"features": terms}, {"out": folder / "recording"}
    recording = record(settings(folder, "live", distill=distill), RecordSettings(**folder_of), plugins=PLUGINS)
    assert [*manifest_of(recording).outputs] == ["dino.pooled", "dino.spatial", "classes.logits"]
    live = train(settings(folder, "live", distill=distill, feature_probe=None), plugins=PLUGINS)
    recorded = settings(folder, "recorded", distill=distill, feature_probe=None, teacher={"path": recording})
    found, wanted = (tiny_run.weights(run.folder) for run in (train(recorded, plugins=PLUGINS), live))
    assert tiny_run.distance(found, wanted) == 0


@pytest.mark.slow
def test_interrupted_run_resumes_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"train__save_every_steps": 1, "feature_probe": None}
    undisturbed = train(settings(folder, "undisturbed", **changes), plugins=PLUGINS)
    save = AtomicCheckpointIO.save_checkpoint

    def interrupt(self: Any, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        if checkpoint["global_step"] == 4:
            raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="pulled the plug"):
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", interrupt)
        train(settings(folder, "resumed", **changes), plugins=PLUGINS)
    resumed = train(settings(folder, "resumed", **changes), plugins=PLUGINS)
    wanted, found = (load_checkpoint(run.folder / "checkpoints" / "last.ckpt") for run in (undisturbed, resumed))
    assert wanted["state_dict"].keys() == found["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in wanted["state_dict"].items())
    assert resumed.evaluations == undisturbed.evaluations


class Reading(Teacher):
    """Another teacher that remembers where its images are."""

    def __init__(self, teacher: Teacher) -> None:
        vars(self).update(vars(teacher))
        self.teacher, self.pointers = teacher, list[int]()

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        self.pointers.append(images.data_ptr())
        return self.teacher(images)

    def _release(self) -> None:
        self.teacher.close()


def test_members_read_one_buffer(folder: Path) -> None:
    config = settings(folder, "run")
    opened = open_config_teacher(config, None, plugins=PLUGINS)
    assert isinstance(opened, TeacherGroup)
    members = {name: Reading(member) for name, member in opened.members.items()}
    with KDDataLoader.from_config(config, teacher=TeacherGroup(members)) as loader:
        held = list(loader)
    for member in members.values():
        assert member.pointers == [batch.images.data_ptr() for batch in held]
    for batch in held:
        for name, member in members.items():
            for output, wanted in member.teacher(batch.images).items():
                assert torch.equal(batch.teacher[f"{name}.{output}"], wanted)


def labeled(folder: Path, **changes: Any) -> Config:
    return settings(folder, "run", data__train=tiny_run.split(folder, "train", tiny_run.TRAIN), **changes)


def test_unused_foreign_logits_are_no_obstacle(folder: Path) -> None:
    classes = tuple("abcdefg")  # the classifier has ten logits
    config = settings(folder, "run")
    teacher = open_config_teacher(config, classes, plugins=PLUGINS)
    assert "classes.logits" not in teacher.outputs and {"dino.pooled", "clip.pooled"} <= teacher.outputs.keys()
    teacher.close()
    used = [*FEATURES, {"loss": "feature_mse", "student": "pooled", "teacher": "classes.logits"}]
    for config in (settings(folder, "run", distill={"features": used}), settings(folder, "run", student=None)):
        with pytest.raises(TeacherError, match=r"member classes: .*has 10 logits .* the data has 7 classes"):
            open_config_teacher(config, classes, plugins=PLUGINS)


def test_used_outputs(folder: Path) -> None:
    teacher = open_config_teacher(settings(folder, "run"), None, plugins=PLUGINS)
    outputs = teacher.outputs
    assert settings(folder, "run").used_outputs(outputs) == {"dino.pooled", "dino.spatial", "clip.pooled"}
    unweighted = [{**term, "weight": float(number == 0)} for number, term in enumerate(FEATURES)]
    assert settings(folder, "run", distill={"features": unweighted}).used_outputs(outputs) == {"dino.pooled"}
    alias = [{"loss": "cosine", "student": "pooled", "teacher": "classes.pooled"}]
    assert settings(folder, "run", distill={"features": alias}).used_outputs(outputs) == {"classes.logits"}
    unknown = [{"loss": "cosine", "student": "pooled", "teacher": "dinosaur"}]
    assert settings(folder, "run", distill={"features": unknown}).used_outputs(outputs) is None
    assert tiny_run.settings(folder, "run").used_outputs(outputs) == {"logits"}
    assert tiny_run.settings(folder, "run", student=None).used_outputs(outputs) is None
    own = tiny_run.settings(folder, "run", distill={"loss": "my.module:loss"})
    assert own.used_outputs(outputs) is None


def test_classifier_is_probed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = labeled(folder)
    teacher = open_config_teacher(config, None, plugins=PLUGINS)
    alone = open_teacher(config.teacher.members["classes"])  # type: ignore[union-attr]
    (found,) = probe_teacher(config, teacher, ProbeSettings()).items()
    assert found == ("classes.logits", probe_teacher(config, alone, ProbeSettings())["logits"])
    assert "teacher probe (classes.logits): " in caplog.text


def test_check_probes_the_classifier(folder: Path) -> None:
    found = check(labeled(folder, probe={}), plugins=PLUGINS)
    assert found.teacher is not None and [*found.teacher.probes] == ["classes.logits"]
    assert all("classes.logits: " in problem for problem in found.problems), found.problems  # it is not trained


def test_grid_shows_the_classifier(folder: Path) -> None:
    config = labeled(folder)
    with KDDataLoader.from_config(config, plugins=PLUGINS) as loader:
        batch = next(iter(loader))
        with_group = save_grid(batch, folder / "group.png", transform=loader.transform)
        logits = batch.replace(teacher={"logits": batch.teacher["classes.logits"]})
        with_one = save_grid(logits, folder / "one.png", transform=loader.transform)
        without = save_grid(batch.replace(teacher={}), folder / "none.png", transform=loader.transform)
    assert with_group.read_bytes() == with_one.read_bytes() != without.read_bytes()


def test_logit_loss_names_the_term(folder: Path) -> None:
    config = settings(folder, "run", student={"factory": "tests.training.networks:plain"}, distill={})
    with pytest.raises(ConfigError, match=r"\[{loss: soft_target, student: logits, teacher: classes\.logits}\]"):
        train(config.model_copy(update={"feature_probe": None}), plugins=PLUGINS)


def test_overrides(folder: Path) -> None:
    (folder / "c.yaml").write_text(
        "data: {batch_size: 8}\nteacher: {members: {dino: {onnx: a.onnx}, clip: {onnx: b.onnx}}}\n"
    )
    config = load_config(folder / "c.yaml", ["teacher.members.dino.precision=bf16"])
    assert [each.precision for each in config.teacher.members.values()] == ["bf16", "auto"]  # type: ignore[union-attr]
    for override, message in (
        ("teacher.members.dino.precison=bf16", r"teacher\.members\.dino\.precison: .*did you mean 'precision'"),
        (
            "teacher.members.dino={members: [{onnx: a.onnx}]}",
            r"dino\.members: .*list the members of several at one level",
        ),
        ("teacher.members.logits={onnx: c.onnx}", "a teacher cannot be called 'logits'"),
        ("teacher.weights=[1, 2]", r"teacher\.weights: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(folder / "c.yaml", [override])
