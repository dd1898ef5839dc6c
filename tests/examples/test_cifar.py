"""The commands for CIFAR that docs/training.md gives run, on a few random images in the authors' format."""

import shlex
import shutil
from pathlib import Path

import pytest

from kd_pipeline import cli
from kd_pipeline.data.sources.pixels import cifar
from tests.cifar_files import ARCHIVES, FOLDERS, NUM_IMAGES, pack, write

REPOSITORY = Path(__file__).parents[2]
SMALL = ["data.train.transform.size=32", "data.val.transform.size=32", "data.val.transform.resize=32"]
"""Images as they are stored, as the test has no time for larger ones."""
SHORT = [
    "data.batch_size=10",
    "data.device=cpu",
    "train.epochs=2",
    "train.limit_train_batches=1",
    "train.export.onnx=false",
]


def commands() -> list[list[str]]:
    section = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").split("## CIFAR-10 in two commands")[1]
    block = section.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in block.splitlines()]


# Lightning warns about workers and short epochs.
@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.slow
def test_two_commands_train_teacher_and_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_NUM_IMAGES", NUM_IMAGES)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "configs", "configs")
    Path("data/cifar10").mkdir(parents=True)
    key = ("cifar10", "binary")
    pack(write(*key, tmp_path / FOLDERS[key]), Path("data/cifar10") / ARCHIVES[key])
    assert len(commands()) == 2
    for arguments in commands():
        assert cli.main([*arguments, *SMALL, *SHORT]) == 0
    for stage in ("teacher", "."):
        assert Path("runs/cifar10_resnet18", stage, "exported", "model.safetensors").exists()
