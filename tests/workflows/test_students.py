"""Several students of one run: each ends as in a run of its own, and what they share is read and computed once."""

import io
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from sklearn.datasets import load_digits

from kd_pipeline.cli import main
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.data.sources import BaseSource
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.run_lock import lock_folder
from kd_pipeline.training.signals import Signals
from kd_pipeline.workflows import students
from kd_pipeline.workflows._check import CheckSettings, check
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.train_result import TrainResult
from tests.training import networks, tiny_run
from tests.workflows.student_runs import FACTORY, PLAIN, STUDENTS, alone, assert_same_end, students_settings

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_student_ends_as_alone(
    trained_students: tuple[Config, TrainResult], student_alone: Callable[[str], Path], name: str
) -> None:
    assert_same_end(trained_students[1].folder / name, student_alone(name))


# What they share


class Counted(BaseSource):
    """Digits as PNG, with the number of readings of each."""

    readings: ClassVar[dict[int, int]] = {}

    def __init__(self, num_samples: int) -> None:
        digits = load_digits()
        self.stored = (digits.images * 255 / 16).round().astype(np.uint8)
        super().__init__(num_samples, digits.target[:num_samples])

    def content(self, index: int) -> bytes:
        self.readings[index] = self.readings.get(index, 0) + 1
        stream = io.BytesIO()
        Image.fromarray(self.stored[index]).save(stream, "png")
        return stream.getvalue()


def counted(num_samples: int) -> Counted:
    return Counted(num_samples)


def count_work(config: Config) -> tuple[dict[int, int], int]:
    """Readings of each sample, and calls of the teacher."""
    infer, calls = OnnxRuntimeTeacher._infer, []
    source = {"kind": "custom", "factory": f"{__name__}:counted", "kwargs": {"num_samples": 96}}
    transform = {**tiny_run.TRAIN}
    changed = config.model_dump()
    changed["data"]["train"] = {"source": source, "transform": transform}
    Counted.readings.clear()
    with (
        mock.patch.object(
            OnnxRuntimeTeacher, "_infer", lambda self, images: calls.append(len(images)) or infer(self, images)
        ),
        mock.patch("kd_pipeline.workflows.results._plot"),
    ):
        train(Config.model_validate(changed), plugins=[networks.__name__, __name__])
    return dict(Counted.readings), len(calls)


def test_images_and_teacher_are_shared(digits: Path) -> None:
    always = {"compare_with_teacher": True}
    students = {"one": {**PLAIN, "train": always}, "two": {"factory": f"{FACTORY}with_dropout", "train": always}}
    config = students_settings(digits, "counted", students)
    for_one = count_work(alone(config, "one", digits / "counted_alone"))
    assert count_work(config) == for_one
    assert {*for_one[0]} == {*range(96)}


@pytest.mark.slow
def test_student_that_changes_images_in_place(digits: Path) -> None:
    config = students_settings(digits, "in place", {"changing": {"factory": f"{FACTORY}in_place"}, "other": PLAIN})
    result = tiny_run.train_without_plots(config)
    assert not result.failures
    for name in config.students:
        tiny_run.train_without_plots(alone(config, name, digits / f"in place {name}"))
        assert_same_end(result.folder / name, digits / f"in place {name}")


# What they leave


@pytest.mark.slow
def test_run_folder_of_each_student_is_whole(digits: Path) -> None:
    students = {"one": {**PLAIN, "train": {"optimizer": {"lr": 0.01}}}, "two": PLAIN}
    config = students_settings(digits, "folders", students, train__epochs=1)
    result = tiny_run.train_without_plots(config)
    assert [*result.students] == ["one", "two"] and not result.evaluations
    networks_in_table = [line.split()[1] for line in result.lines]
    assert networks_in_table == ["network", "one", "two", "teacher"]
    for name in students:
        folder = result.folder / name
        assert result.students[name].folder == folder
        written = load_config(folder / "config.yaml")
        assert written.student == config.for_student(name).student and not written.students
        assert written.train.optimizer == config.for_student(name).train.optimizer
        log = (folder / "train.log").read_text()
        other = "two" if name == "one" else "one"
        assert "epoch 1/1" in log and "trained at" in log and f"folders/{other}" not in log
    log = (result.folder / "train.log").read_text()
    assert re.search(r"\[one\] \S+ \S+ INFO epoch 1/1", log) and "val    two" in log
    # The run of a student is one that the usual commands go on with.
    again = tiny_run.train_without_plots(load_config(result.folder / "one" / "config.yaml"))
    assert again.evaluations == result.students["one"].evaluations


def test_link_to_another_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    config = students_settings(digits, "linked", {"one": PLAIN})
    (digits / "linked").mkdir()
    (digits / "linked" / "one").symlink_to(tmp_path)
    with pytest.raises(StateError, match="is a link to"):
        tiny_run.train_without_plots(config)
    assert not [*tmp_path.iterdir()]


def test_second_run_of_the_students_is_refused(digits: Path) -> None:
    config = students_settings(digits, "in use", {"one": PLAIN})
    with lock_folder(digits / "in use", otherwise="wait"), pytest.raises(StateError, match="in use is in use by"):
        tiny_run.train_without_plots(config)


def test_objects_of_one_student_are_refused(digits: Path) -> None:
    config = students_settings(digits, "objects", {"one": PLAIN})
    with pytest.raises(ConfigError, match="student, callbacks: objects are of one student"):
        train(config, student=networks.plain(), callbacks=[Callback()])


# Stages and commands


@pytest.mark.slow
def test_stage_all_trains_the_teacher_first(digits: Path) -> None:
    model = {"factory": f"{FACTORY}plain", "kwargs": {"width": 12}}
    config = students_settings(
        digits, "stages", {"one": PLAIN, "two": PLAIN}, teacher={"model": model}, train__epochs=1
    )
    result = tiny_run.train_without_plots(config.model_copy(update={"stage": "all"}))
    assert [*result.students] == ["one", "two"]
    # The folder of a student says where its teacher is.
    written = load_config(result.folder / "one" / "config.yaml")
    again = tiny_run.train_without_plots(written.model_copy(update={"run_dir": digits / "stages alone"}))
    assert_same_end(again.folder, result.folder / "one")
    with pytest.raises(StateError, match="has begun to learn from the teacher as it was"):
        tiny_run.train_without_plots(
            config.model_copy(update={"stage": "all", "train": config.train.model_copy(update={"epochs": 2})})
        )


@pytest.mark.slow
def test_students_without_a_teacher(digits: Path) -> None:
    config = students_settings(digits, "baseline", {"one": PLAIN, "two": STUDENTS["small"]}, stage="baseline")
    result = tiny_run.train_without_plots(config)
    for name in config.students:
        tiny_run.train_without_plots(alone(config, name, digits / f"baseline {name}"))
        assert_same_end(result.folder / name / "baseline", digits / f"baseline {name}" / "baseline")


@pytest.mark.slow
def test_fresh_moves_the_run_of_each_student(digits: Path) -> None:
    config = students_settings(digits, "fresh", {"one": PLAIN, "two": PLAIN}, train__epochs=1)
    tiny_run.train_without_plots(config)
    with mock.patch("kd_pipeline.workflows.results._plot"):
        train(config, plugins=[networks.__name__], fresh=True)
    for folder in (digits / "fresh" / "one", digits / "fresh" / "two"):
        assert (folder / "earlier" / "1" / "checkpoints" / "last.ckpt").is_file()
        assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_recording_of_all_students(digits: Path, tmp_path: Path) -> None:
    always = {"features": [{"loss": "logit_mse", "weight": 0.1}]}
    students = {"one": PLAIN, "two": {**PLAIN, "distill": always}}
    config = students_settings(digits, "recorded", students)
    record(config, RecordSettings(out=tmp_path / "recording"))
    recorded = config.model_copy(update={"teacher": TeacherSettings(backend="recorded", path=tmp_path / "recording")})
    recorded = recorded.model_copy(update={"run_dir": digits / "from recording"})
    live, replayed = tiny_run.train_without_plots(config), tiny_run.train_without_plots(recorded)
    for name in students:
        one, other = (tiny_run.weights(each.folder / name) for each in (live, replayed))
        assert tiny_run.distance(one, other) == 0


def test_check_names_the_student(digits: Path, tmp_path: Path) -> None:
    bad = {**PLAIN, "distill": {"features": [{"loss": "cosine", "student": "nowhere"}]}}
    config = students_settings(digits, "checked", {"good": PLAIN, "bad": bad}, probe=None)
    report = check(config, CheckSettings(out=tmp_path, num_images=4), plugins=[networks.__name__])
    assert [finding.where for finding in report.findings if finding.severity == "error"] == ["students.bad"]
    assert "nowhere" in report.problems[0]


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.slow
def test_command_has_a_row_for_each_student(digits: Path, capfd: pytest.CaptureFixture[str], failing: bool) -> None:
    students = {"one": PLAIN, "two": {"factory": f"{FACTORY}failing"} if failing else PLAIN}
    config = students_settings(digits, f"command {failing}", students, train__epochs=1)
    file = digits / f"command {failing}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    with mock.patch("kd_pipeline.workflows.results._plot"):
        assert main(["train", "-c", str(file), "--plugin", networks.__name__]) == int(failing)
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[1:3]] == ["one", "teacher" if failing else "two"]
    assert ("student two failed: OSError: no more; " in "".join(printed)) == failing


def test_threads_have_the_gpu_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread of torch has a GPU of its own; the random state of the main thread's is taken from turn to turn."""
    device, current = torch.device("cuda", 1), {}

    def of_thread(found: torch.device) -> AbstractContextManager[None]:
        current[threading.current_thread().name] = found
        return nullcontext()

    def start(works: dict[str, Callable[[], object]], *others: object) -> dict[str, object]:
        for name, work in works.items():
            thread = threading.Thread(target=work, name=name)
            thread.start()
            thread.join()
        return {}

    monkeypatch.setattr(torch.cuda, "device", of_thread)
    monkeypatch.setattr(torch.cuda, "set_device", of_thread)
    monkeypatch.setattr(students, "_StudentRun", mock.MagicMock())
    run = mock.Mock(data=mock.Mock(device=device), turns=mock.Mock(run=start), signals=Signals())
    run._train = lambda *given: students._StudentsRun._train(run, *given)
    students._StudentsRun.run(run, {"one": mock.Mock(), "two": mock.Mock()})
    assert current == dict.fromkeys([threading.current_thread().name, "one", "two"], device)
