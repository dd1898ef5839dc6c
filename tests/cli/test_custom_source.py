"""Every command reads a source of the user's own, if its module is allowed."""

from pathlib import Path

import pytest
import yaml

from kd_pipeline.cli import main
from tests.data.sources import custom_sources
from tests.training import networks, tiny_run

pytestmark = pytest.mark.slow

SOURCES = custom_sources.__name__
ALLOWED = ["--plugin", SOURCES, "--plugin", networks.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `run.yaml`, whose training and validation images are those of `tiny_run`, from sources of the user's."""
    folder = tmp_path_factory.mktemp("custom")
    tiny_run.write_digits(folder)
    config = tiny_run.settings(folder, "run", train__epochs=1).model_dump(mode="json", exclude_unset=True)
    sizes = {"train": (0, tiny_run.NUM_TRAIN), "val": (tiny_run.NUM_TRAIN, tiny_run.NUM_VAL)}
    for name, (first, count) in sizes.items():
        kwargs = {"first": first, "count": count}
        config["data"][name]["source"] = {"kind": "custom", "factory": f"{SOURCES}:named_digits", "kwargs": kwargs}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_train_equals_arrays(folder: Path) -> None:
    assert main(["train", "-c", str(folder / "run.yaml"), *ALLOWED]) == 0
    tiny_run.run(folder, "arrays", train__epochs=1)
    assert tiny_run.distance(tiny_run.weights(folder / "run"), tiny_run.weights(folder / "arrays")) == 0
    assert "zero" in (folder / "run" / "classes.json").read_text()


@pytest.mark.parametrize(
    "command",
    [["check"], ["record", "--epochs", "1"], ["eval"], ["tune", "--seconds", "1"]],
    ids=lambda command: command[0],
)
def test_commands(folder: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [] if command[0] in ("eval", "tune") else ["--out", str(tmp_path / "out")]
    arguments = [*command, "-c", str(folder / "run.yaml"), *out]
    assert main(arguments) == 1
    assert f"allow it with --plugin {SOURCES}" in "".join(capsys.readouterr())
    assert main([*arguments, *ALLOWED]) == 0


def test_engine_is_calibrated_on_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "teacher.engine"
    arguments = ["--onnx", str(folder / "teacher.onnx"), "--precision", "int8", "--save-engine", str(engine)]
    arguments = ["build-engine", *arguments, "--calibrate", str(folder / "run.yaml")]
    assert main(arguments) == 1 and f"allow it with --plugin {SOURCES}" in "".join(capsys.readouterr())
    assert main([*arguments, "--plugin", SOURCES]) == 0 and engine.is_file()
    assert f"64 images (the training split of {folder / 'run.yaml'})" in capsys.readouterr().out
