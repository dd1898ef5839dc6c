"""Distillation by one call: what is held out, what is refused, and that its config is the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kd_pipeline
from kd_pipeline import ImageFolder, load_config
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError, DataError, KDPipelineError, StateError
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.workflows._distill import distill

NETWORK = "builtin:small_resnet"
SETTINGS = [
    *("data.device=cpu", "data.train.transform.size=16", "teacher.model.kwargs.width=4", "student.kwargs.width=2"),
    *("train.loggers=[csv]", "train.num_threads=1", "train.export.onnx=false", "train.precision=32-true"),
]


def write_images(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(len(names))
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(18, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images at several depths, and a teacher's weights in `teacher.pt`."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", [f"a/b{number % 3}/{number}" for number in range(38)] + ["top", "a/odd, # name"])
    torch.manual_seed(0)
    torch.save(small_resnet(7, width=4).state_dict(), tmp_path / "teacher.pt")
    return tmp_path / "photos"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that would have been trained."""
    configs: list[Config] = []

    def record(config: Config, **arguments: Any) -> None:
        configs.append(config)

    monkeypatch.setattr("kd_pipeline.workflows._distill.train", record)
    return configs


def run(*overrides: str, **arguments: Any) -> Any:
    defaults = {"teacher": NETWORK, "student": NETWORK, "data": "photos", "teacher_weights": "teacher.pt"}
    return distill(**defaults | arguments, overrides=[*SETTINGS, *overrides])


def names_of(config: Config, split: str) -> set[str]:
    source = open_source(config.data.split(split).source)
    return {source.name(row) for row in range(len(source))}


def test_every_image_is_either_trained_on_or_held_out(data: Path, trained: list[Config]) -> None:
    run()
    train, val = names_of(trained[0], "train"), names_of(trained[0], "val")
    assert not train & val
    assert train | val == {str(path) for path in data.rglob("*.png")}
    assert len(val) == 2  # of 40


def test_held_out_images_are_the_same_every_time(data: Path, trained: list[Config]) -> None:
    run(out="one")
    run(out="two")
    assert names_of(trained[0], "val") == names_of(trained[1], "val")


def test_lists_follow_the_folder_until_a_run_has_begun(data: Path, trained: list[Config]) -> None:
    run(out="run")
    write_images(data, ["new"])
    run(out="run")
    assert str(data / "new.png") in names_of(trained[1], "train") | names_of(trained[1], "val")
    (Path("run") / "checkpoints").mkdir()
    (Path("run") / "checkpoints" / "last.ckpt").touch()
    run(out="run")  # nothing has changed
    write_images(data, ["newer"])
    with pytest.raises(StateError, match=r"kd-pipeline train -c run/config\.yaml.*--fresh"):
        run(out="run")
    run(out="run", fresh=True)
    assert len(trained) == 4


def test_labeled_folder_is_bank_and_queries(data: Path, trained: list[Config]) -> None:
    write_images(data.parent / "flowers", [f"{name}/{number}" for name in ("rose", "tulip") for number in range(3)])
    run(labeled="flowers")
    assert trained[0].data.split("bank").source.model_dump()["root"] == Path("flowers")
    assert trained[0].feature_probe is not None and trained[0].feature_probe.sets == ("bank",)


@pytest.mark.parametrize("half", ["val", "test"])
def test_halves_of_a_labeled_folder_share_their_labels(data: Path, trained: list[Config], half: str) -> None:
    flowers = data.parent / "flowers"
    write_images(flowers / "train", ["aster/0", "rose/0", "tulip/0"])
    write_images(flowers / half, ["aster/1", "tulip/1"])
    run(labeled="flowers")
    bank, queries = (open_source(trained[0].data.split(name).source) for name in ("bank", "labeled"))
    assert bank.labels is not None and queries.labels is not None
    assert (bank.labels.tolist(), queries.labels.tolist()) == ([0, 1, 2], [0, 2])


def test_standard_protocol_learns_from_the_bank(data: Path, trained: list[Config]) -> None:
    write_images(data.parent / "set" / "train", ["a/0", "a/1", "b/0"])
    write_images(data.parent / "set" / "val", ["a/2", "b/1"])
    run(data="set/train", labeled="set")
    assert trained


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"data": "nowhere"}, DataError, "nowhere: cannot be listed"),
        ({"data": "teacher.pt"}, DataError, "Not a directory"),
        ({"data": "empty"}, DataError, "empty: no images in or below this folder"),
        ({"data": "single"}, DataError, "the only image, and one is held out"),
        ({"labeled": "nowhere"}, DataError, "nowhere: cannot be listed"),
        ({"labeled": "flat"}, DataError, "flat: no class folders, 2 files"),
        ({"labeled": "photos"}, DataError, "say nothing about new ones"),
        ({"labeled": "photos/a"}, DataError, "say nothing about new ones"),
        ({"labeled": "foreign"}, DataError, "classes that foreign/train does not have: tulip"),
        ({"teacher_weights": "none.pt"}, ConfigError, r"none\.pt: there is no such file"),
        ({"teacher_weights": "teacher.pt", "out": "teacher.pt"}, ConfigError, "cannot write to the folder teacher.pt"),
        ({"student": "builtin:big_resnet"}, ConfigError, "student.builtin: should be .*small_resnet"),
        ({"epochs": 0}, ConfigError, "train.epochs"),
        ({"data": "https://a.b/photos"}, ConfigError, "is a URL"),
    ],
)
def test_bad_input_is_one_message(
    data: Path, arguments: dict[str, Any], error: type[KDPipelineError], words: str
) -> None:
    (data.parent / "empty").mkdir()
    for folder, names in {
        "single": ["one"],
        "flat": ["1", "2"],
        "foreign/train": ["rose/1"],
        "foreign/val": ["rose/2", "tulip/1"],
    }.items():
        write_images(data.parent / folder, names)
    with pytest.raises(error, match=words):
        run(**arguments)


def test_typo_is_found_before_the_images_are_listed(data: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        run("train.epoch=3", data="nowhere")


@pytest.mark.slow
def test_config_of_the_run_folder_resumes_it(data: Path) -> None:
    run("train.limit_train_batches=2", out="run", epochs=1)
    whole = load_config("run/config.yaml", ["train.epochs=2"])
    assert whole.distill.loss is None and whole.student is not None and whole.student.is_headless
    assert run("train.limit_train_batches=2", out="run", epochs=1).folder == Path("run")  # finished
    result = kd_pipeline.train(whole)
    events = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    starts = [event for event in events if event["event"] == "start"]
    assert [start["epochs_done"] for start in starts] == [0, 1]
    assert result.evaluations["val"].num_samples == 2
    with pytest.raises(StateError, match=r"train\.schedule\.warmup_epochs: 0\.1 → 0\.2"):
        run("train.limit_train_batches=2", out="run", epochs=2)


@pytest.mark.slow
def test_random_teacher_is_allowed_by_name_alone(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    timm = {"teacher": "timm:resnet10t", "student": "timm:resnet10t", "teacher_weights": None, "epochs": 1}
    small = [
        *("teacher.model.pretrained=false", "data.train.transform.size=32", "train.limit_train_batches=1"),
        *("data.device=cpu", "train.loggers=[csv]", "train.export.onnx=false", "teacher.backend=pytorch"),
    ]
    distill(**timm, data="photos", overrides=small)  # type: ignore[arg-type]
    assert "the teacher has random weights" in caplog.text
    assert load_config("runs/resnet10t_to_resnet10t/config.yaml").teacher is not None


@pytest.mark.slow
def test_labels_choose_the_best_student(data: Path) -> None:
    write_images(data.parent / "flowers", [f"{name}/{number}" for name in ("rose", "tulip") for number in range(10)])
    result = run("train.limit_train_batches=1", labeled="flowers", epochs=1, out="run")
    assert {"knn_top1", "teacher_knn_top1"} <= result.evaluations["bank"].metrics.keys()


def test_names_with_any_sign_are_listed(data: Path, trained: list[Config]) -> None:
    write_images(data, ["ü", "tab\there", '"quoted"', "{brace}"])
    run()
    everything = ImageFolder(data, labeled=False)
    assert len(names_of(trained[0], "train") | names_of(trained[0], "val")) == len(everything)


def test_name_that_no_list_can_hold_is_an_error(data: Path) -> None:
    (data / "a" / "bytes\udcff.png").touch()
    with pytest.raises(DataError, match=r"a/bytes.*\.png is not UTF-8; rename"):
        run()


def test_run_says_how_to_resume(data: Path, trained: list[Config]) -> None:
    lines: list[str] = []
    run(out="my run", report=lines.append)
    assert lines == ["run folder: my run; to resume, run the same again, or kd-pipeline train -c 'my run/config.yaml'"]
