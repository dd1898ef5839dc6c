"""`students` of a config: each is the config of a run of its own, and a bad one says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_pipeline.config.config import Config, load_config
from kd_pipeline.errors import ConfigError

PLAIN = {"builtin": "small_resnet"}


def students_config(students: dict[str, Any], **changes: Any) -> Config:
    return Config.model_validate({"run_dir": "runs/mine", "students": students, **changes})


def test_student_is_a_run_of_its_own() -> None:
    train = {"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "clip": 1.0}
    students = {"small": {**PLAIN, "train": {"optimizer": {"lr": 0.1}}}, "wide": {**PLAIN, "kwargs": {"width": 64}}}
    config = students_config(students, train=train, seed=7)
    assert config.for_student("small") == Config.model_validate(
        {
            "run_dir": "runs/mine/small",
            "seed": 7,
            "student": PLAIN,
            "train": {**train, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
        }
    )
    assert config.for_student("wide").train == config.train
    with pytest.raises(ConfigError, match="there is no student 'smal'"):
        config.for_student("smal")


def test_section_of_another_kind_replaces_that_of_all() -> None:
    other = {"distill": {"loss": "soft_target"}, "train": {"optimizer": {"name": "adamw"}}}
    config = students_config(
        {"other": {**PLAIN, **other}},
        distill={"loss": "dkd", "options": {"beta": 2.0}},
        train={"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.9}},
    )
    found = config.for_student("other")
    assert found.distill.loss == "soft_target" and not found.distill.options
    assert found.train.optimizer.name == "adamw" and not found.train.optimizer.nesterov


def test_student_without_a_head_learns_features() -> None:
    config = students_config({"backbone": {**PLAIN, "num_classes": 0}, "classifier": PLAIN})
    assert config.for_student("backbone").distill.loss is None and config.for_student("backbone").distill.features
    assert config.for_student("classifier").distill.loss == "soft_target"


def test_config_is_the_same_after_it_was_written() -> None:
    students = {"small": {**PLAIN, "train": {"ema": {"decay": 0.9}}}, "wide": {**PLAIN, "distill": {"loss": "dist"}}}
    config = students_config(students)
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config and again.for_student("wide") == config.for_student("wide")


def test_student_of_another_library_replaces_that_of_the_extended_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"students": {"a": {**PLAIN, "kwargs": {"width": 4}}}}))
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"extends": "base.yaml", "students": {"a": {"timm": "resnet18"}}})
    )
    student = load_config(tmp_path / "mine.yaml").for_student("a").student
    assert student is not None and student.timm == "resnet18" and not student.kwargs


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ({"a b": PLAIN}, "'a b' names a student and its folder: use letters, digits, - and _"),
        ({"teacher": PLAIN}, "'teacher' is a folder that a run has anyway; give the student another name"),
        ({"a": PLAIN, "A": {**PLAIN}}, "'A' and another name differ in upper and lower case only"),
        ({"a": {**PLAIN, "train": {"epochs": 3}}}, "train.epochs is the same for all students of a run, as they end"),
        ({"a": {**PLAIN, "data": {}}}, "students of one run share the images; set data for all of them"),
        ({"a": {**PLAIN, "run_dir": "x"}}, "each student has the folder of its name"),
        ({"a": {**PLAIN, "train": {"optimizer": {"lr": "high"}}}}, "students.a.train.optimizer.lr: should be a number"),
        ({"a": {"train": {}}}, "students.a: set one of timm, torchvision, builtin, factory, got none of them"),
        ({"a": {**PLAIN, "train": {"clip": 1.0, "nothing": 1}}}, "students.a.train.nothing: unknown key"),
    ],
    ids=["name", "reserved", "case", "shared", "section", "folder", "type", "network", "unknown"],
)
def test_bad_entry_says_what_to_do(tmp_path: Path, students: dict[str, Any], message: str) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"students": students}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "bad.yaml")


def test_student_and_students_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"students": {"a": PLAIN}, "student": {**PLAIN}}))
    with pytest.raises(ConfigError, match="student and students are both set; set student: null, or remove students"):
        load_config(tmp_path / "both.yaml")
