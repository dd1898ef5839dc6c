"""Settings are changed in the text of a config, and nothing else is."""

from pathlib import Path

import pytest

from kd_pipeline.config.config import load_config
from kd_pipeline.config.edit import edited_config
from kd_pipeline.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
VALUES = {"data.num_threads": 3, "data.prefetch": 4, "train.num_threads": 1, "train.precision": "bf16-mixed"}


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_keep_everything_else(path: Path, tmp_path: Path) -> None:
    text = edited_config(path, VALUES)
    (tmp_path / "tuned.yaml").write_text(text)
    overrides = [f"{key}={value}" for key, value in VALUES.items()]
    assert load_config(tmp_path / "tuned.yaml") == load_config(path, overrides)
    comments = [line for line in lines_of(path.read_text()) if line.startswith("#")]
    assert [line for line in lines_of(text) if line.startswith("#")] == comments


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data:\n  # few\n  batch_size: 4 # four\n", "data:\n  # few\n  num_threads: 3\n  batch_size: 4 # four\n"),
        ("data:\n  num_threads: 1 # one\n  batch_size: 4\n", "data:\n  num_threads: 3 # one\n  batch_size: 4\n"),
        ("data:\n  num_threads:\n  batch_size: 4\n", "data:\n  num_threads: 3\n  batch_size: 4\n"),
        ("data: {batch_size: 4}", "data: {num_threads: 3, batch_size: 4}"),
        ("data: {batch_size: 4, num_threads: 12}\n", "data: {batch_size: 4, num_threads: 3}\n"),
        ('{"data": {"batch_size": 4}}', '{"data": {num_threads: 3, "batch_size": 4}}'),
    ],
)
def test_each_way_to_write_a_section(before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(before)
    assert edited_config(tmp_path / "a.yaml", {"data.num_threads": 3}) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data: {batch_size: 4} # end\n\n", "data: {batch_size: 4} # end\n\ntrain:\n  num_threads: 1\n"),
        ("{data: {batch_size: 4}}", "{train: {num_threads: 1}, data: {batch_size: 4}}"),
        ("data: {batch_size: 4}\ntrain: {}\n", "data: {batch_size: 4}\ntrain: {num_threads: 1}\n"),
    ],
)
def test_missing_section_is_added(before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(before)
    assert edited_config(tmp_path / "a.yaml", {"train.num_threads": 1}) == after


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("data: {batch_size: 4}\n...\n# more\n", {"train.num_threads": 1}),  # a document that has ended
        ("data: {batch_size: 4}\nteacher: {path: here}\n", {"teacher.num_threads": 1, "teacher.backend": "openvino"}),
        ("data: {batch_size: 4}\n", {"data.prefetch": 0}),
    ],
)
def test_what_cannot_be_changed_is_left_to_the_user(text: str, values: dict[str, int | str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    key, value = next(iter(values.items()))
    with pytest.raises(ConfigError, match=rf"a\.yaml: .*write into it {key}: {value}"):
        edited_config(tmp_path / "a.yaml", values)
