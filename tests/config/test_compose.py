"""`extends`: files and presets merged in order, with the place of every value in messages."""

from pathlib import Path

import pytest
import yaml

from kd_pipeline._core.settings import Settings
from kd_pipeline.config.compose import preset_names
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.config.edit import edited_config
from kd_pipeline.config.reader import read_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.schedules import check_length, lr_factor


class Values(Settings):
    a: int = 0
    b: int = 0
    c: int = 0
    items: tuple[int, ...] = ()
    section: dict[str, int] | None = None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another one than the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x" / "sub").mkdir(parents=True)
    return tmp_path / "x"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_win_and_mappings_merge(folder: Path) -> None:
    write(folder / "one.yaml", "a: 1\nb: 1\nitems: [1, 2, 3]\nsection: {left: 1, right: 1}\n")
    write(folder / "two.yaml", "b: 2\nc: 2\nsection: {right: 2, up: 2}\n")
    path = write(folder / "own.yaml", "extends: [one.yaml, two.yaml]\nc: 3\nitems: [9]\nsection: {up: 3}\n")
    found = read_config(Values, path)
    assert found == Values(a=1, b=2, c=3, items=(9,), section={"left": 1, "right": 2, "up": 3})


def test_overrides_come_last(folder: Path) -> None:
    write(folder / "one.yaml", "a: 1\nsection: {left: 1}\n")
    path = write(folder / "own.yaml", "extends: one.yaml\n")
    found = read_config(Values, path, ["a=5", "section.left=7"])
    assert found == Values(a=5, section={"left": 7})


def test_null_replaces_a_section(folder: Path) -> None:
    write(folder / "one.yaml", "section: {left: 1}\n")
    assert read_config(Values, write(folder / "own.yaml", "extends: one.yaml\nsection: null\n")).section is None


def test_paths_of_extends_are_relative_to_their_file(folder: Path) -> None:
    write(folder / "sub" / "base.yaml", "extends: deepest.yaml\nb: 2\n")
    write(folder / "sub" / "deepest.yaml", "a: 1\n")
    assert read_config(Values, write(folder / "own.yaml", "extends: sub/base.yaml\nc: 3\n")) == Values(a=1, b=2, c=3)


def test_a_file_may_be_extended_twice(folder: Path) -> None:
    write(folder / "base.yaml", "a: 1\nb: 1\n")
    write(folder / "one.yaml", "extends: base.yaml\nb: 2\n")
    write(folder / "two.yaml", "extends: base.yaml\nc: 3\n")
    # As if each were written out: the second file has b: 1 of the base.
    path = write(folder / "own.yaml", "extends: [one.yaml, two.yaml]\n")
    assert read_config(Values, path) == Values(a=1, b=1, c=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nextends: nowhere.yaml\n", r"own\.yaml:2: extends: .*nowhere\.yaml: cannot be read \(No such file"),
        ("extends:\n  - base.yaml\n  - nowhere.yaml\n", r"own\.yaml:3: extends\.1: .*cannot be read"),
        ("extends: own.yaml\n", r"own\.yaml:1: extends: .*circle: .*own\.yaml -> .*own\.yaml; remove"),
        ("extends: [round.yaml]\n", r"round\.yaml:2: extends: .*circle: .*own\.yaml -> .*round\.yaml -> .*own\.yaml"),
        ("extends: {a: 1}\n", r"own\.yaml:1: extends: should be a file, such as base\.yaml, or a list of files"),
        ("extends: [base.yaml, 1]\n", r"own\.yaml:1: extends\.1: should be a file"),
        ("extends: $HOME/base.yaml\n", r"extends: the path '\$HOME/base\.yaml' has the variable"),
        ("extends: list.yaml\n", r"list\.yaml:1: should be a mapping"),
        ("extends: sub\n", r"own\.yaml:1: extends: .*sub: cannot be read"),
        ("extends: preset:distillbert\n", r"extends: there is no preset 'distillbert'; did you mean 'distilbert'"),
    ],
)
def test_what_cannot_be_extended(text: str, message: str, folder: Path) -> None:
    write(folder / "base.yaml", "a: 1\n")
    write(folder / "round.yaml", "b: 1\nextends: own.yaml\n")
    write(folder / "list.yaml", "[1]\n")
    with pytest.raises(ConfigError, match=message):
        read_config(Values, write(folder / "own.yaml", text))


def test_depth_has_a_limit(folder: Path) -> None:
    for number in range(20):
        write(folder / f"{number}.yaml", f"extends: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"15\.yaml:1: extends: more than 16 files in a row"):
        read_config(Values, folder / "0.yaml")


def test_number_of_files_has_a_limit(folder: Path) -> None:
    write(folder / "base.yaml", "a: 1\n")
    names = ", ".join(["base.yaml"] * 101)
    with pytest.raises(ConfigError, match=r"own\.yaml:1: extends\.100: .*100 in all"):
        read_config(Values, write(folder / "own.yaml", f"extends: [{names}]\n"))


def test_override_cannot_extend(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'extends=base\.yaml': extends: .*write it into the config file"):
        read_config(Values, write(folder / "own.yaml", "a: 1\n"), ["extends=base.yaml"])


def test_messages_name_the_file_of_the_value(folder: Path) -> None:
    write(folder / "base.yaml", "a: 1\nb: text\nsection:\n  left: 1\n  right: no\n")
    path = write(folder / "own.yaml", "extends: base.yaml\nc: text\nsection: {left: text}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(Values, path, ["a=text"])
    lines = str(caught.value).splitlines()
    places = ["x/base.yaml:2: b", "x/base.yaml:5: section.right", "x/own.yaml:2: c", "x/own.yaml:3: section.left"]
    assert [line.partition(": should")[0].removeprefix(f"{folder.parent}/") for line in lines] == [
        *places,
        "override 'a=text': a",
    ]


def test_stale_places_go_with_their_values(folder: Path) -> None:
    write(folder / "base.yaml", "items:\n  - 1\n  - 2\n  - 3\n")
    path = write(folder / "own.yaml", "extends: base.yaml\n\nitems: [1, x]\n")
    with pytest.raises(ConfigError, match=r"own\.yaml:3: items\.1: should be a whole number"):
        read_config(Values, path)


BASE = """
data:
  batch_size: 8
  train:
    source: {kind: image_folder, root: images, labeled: false}
    transform: {preset: train, size: 32}
teacher: {backend: auto, onnx: teacher.onnx, precision: fp32}
student: {timm: resnet18, kwargs: {drop_rate: 0.1}}
distill: {loss: dkd, options: {beta: 8.0}, task_weight: 0.5}
train:
  epochs: 240
  optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
  schedule: {kind: step, milestones: [150]}
"""


@pytest.mark.parametrize(
    ("text", "section", "wanted"),
    [
        ("data: {train: {source: {kind: cifar10, root: c, split: train}}}", "data.train.source",
         {"kind": "cifar10", "root": "c", "split": "train"}),
        ("data: {train: {source: {root: other}}}", "data.train.source",
         {"kind": "image_folder", "root": "other", "labeled": False}),
        ("teacher: {model: {timm: resnet50}}", "teacher", {"model": {"timm": "resnet50"}}),
        ("teacher: {onnx: other.onnx}", "teacher", {"backend": "auto", "onnx": "other.onnx", "precision": "fp32"}),
        ("teacher: null", "teacher", None),
        ("student: {builtin: resnet8x4}", "student", {"builtin": "resnet8x4"}),
        ("student: {timm: resnet34}", "student", {"timm": "resnet34", "kwargs": {"drop_rate": 0.1}}),
        ("distill: {loss: dist}", "distill", {"loss": "dist"}),
        ("distill: {task_weight: 1.0}", "distill", {"loss": "dkd", "options": {"beta": 8.0}, "task_weight": 1.0}),
        ("train: {optimizer: {name: adamw}}", "train.optimizer", {"name": "adamw"}),
        ("train: {optimizer: {factory: 'a:b'}}", "train.optimizer", {"factory": "a:b"}),
        ("train: {optimizer: {name: sgd, lr: 1.0}}", "train.optimizer", {"name": "sgd", "lr": 1.0, "momentum": 0.9}),
        ("train: {schedule: {kind: cosine}}", "train.schedule", {"kind": "cosine"}),
        ("train: {schedule: {factory: 'a:b'}}", "train.schedule", {"factory": "a:b"}),
    ],
)  # fmt: skip
def test_section_of_another_kind_starts_over(text: str, section: str, wanted: object, folder: Path) -> None:
    write(folder / "base.yaml", BASE)
    found = load_config(write(folder / "own.yaml", f"extends: base.yaml\n{text}\n"))
    by_hand = yaml.safe_load(BASE)
    *above, name = section.split(".")
    node = by_hand
    for key in above:
        node = node[key]
    node[name] = wanted
    assert found == load_config(write(folder / "by_hand.yaml", yaml.safe_dump(by_hand)))


def test_members_of_other_kinds_start_over(folder: Path) -> None:
    write(folder / "base.yaml", "teacher: {members: {one: {onnx: a.onnx, precision: fp32}, two: {onnx: b.onnx}}}\n")
    text = "extends: base.yaml\nteacher: {members: {one: {model: {timm: resnet18}}}}\n"
    found = load_config(write(folder / "own.yaml", text))
    assert found == load_config(
        write(folder / "by_hand.yaml", "teacher: {members: {one: {model: {timm: resnet18}}, two: {onnx: b.onnx}}}\n")
    )


def test_writer_overrides_what_is_extended(folder: Path) -> None:
    base = write(folder / "base.yaml", "data: {batch_size: 8, num_threads: 9}\n")
    path = write(folder / "own.yaml", "# mine\nextends: base.yaml\n")
    before = base.read_text()
    path.write_text(edited_config(path, {"data.num_threads": 3, "train.num_threads": 1}))
    assert path.read_text().startswith("# mine\nextends: base.yaml\n") and base.read_text() == before
    assert load_config(path) == Config.model_validate(
        {"data": {"batch_size": 8, "num_threads": 3}, "train": {"num_threads": 1}}
    )


def test_writer_refuses_what_does_not_fit_the_extended(folder: Path) -> None:
    write(folder / "base.yaml", "train: {strategy: fsdp}\n")
    path = write(folder / "own.yaml", "extends: base.yaml\n")
    with pytest.raises(ConfigError, match=r"write into it train\.compile: true"):
        edited_config(path, {"train.compile": True})


PUBLISHED = {
    "wav2vec2": (5e-4, 0.01, 0.08, None),
    "hubert": (5e-4, 0.01, 0.08, 10.0),
    "distilbert": (5e-4, 0.0, 0.05, 5.0),
    "distilhubert": (2e-4, 1e-6, 0.07, 5.0),
}
"""Learning rate, weight decay, share of warm-up and clipping."""


def test_every_preset_is_checked() -> None:
    assert preset_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_numbers(name: str, folder: Path) -> None:
    train = load_config(write(folder / "own.yaml", f"extends: preset:{name}\ntrain: {{epochs: 20}}\n")).train
    optimizer, schedule = train.optimizer, train.schedule
    assert (optimizer.lr, optimizer.weight_decay, schedule.warmup_fraction, train.clip) == PUBLISHED[name]
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("adamw", (0.9, 0.98), 1e-6)
    check_length(schedule, 20)
    warmup = 20 * schedule.warmup_fraction
    factors = [lr_factor(schedule, epoch, 20) for epoch in (0, warmup / 2, warmup, (20 + warmup) / 2, 20)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])
