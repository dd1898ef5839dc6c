"""What check, eval and record say while they work: a bar on a terminal, and lines through a pipe."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from kd_pipeline.models.registry import ModelSettings, open_model
from tests.terminals import at_terminal, piped

NETWORK = "{builtin: small_resnet, num_classes: 3, kwargs: {width: 4}"
CONFIG = f"""
run_dir: runs/mine
data:
  batch_size: 8
  on_bad_sample: substitute
  max_bad_fraction: 0.1
  num_threads: 1
  train: {{source: {{kind: image_folder, root: photos}}, transform: {{preset: train, size: 32}}}}
  val: {{source: {{kind: image_folder, root: photos}}, transform: {{preset: eval, size: 32}}}}
teacher: {{backend: pytorch, precision: fp32, model: {NETWORK}, checkpoint: teacher.pt}}}}
student: {NETWORK}}}
train: {{epochs: 2, num_threads: 1}}
"""
SECONDS = r"\d+\.\d s"


@pytest.fixture
def folder(photo_folder: Path, tmp_path: Path) -> Path:
    """With a config, its teacher, and photos of which one is cut off, so that decoders print something."""
    shutil.copytree(photo_folder, tmp_path / "photos")
    damaged = sorted((tmp_path / "photos").rglob("*.jpg"))[0]
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    (tmp_path / "my.yaml").write_text(CONFIG)
    settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    torch.manual_seed(0)
    torch.save(open_model(settings).state_dict(), tmp_path / "teacher.pt")
    return tmp_path


CASES = [
    (["check", "-c", "my.yaml"], "train: decoding", [rf"val: \d+ of 37 images decoded in {SECONDS}", "checked in"]),
    (
        ["eval", "-c", "my.yaml"],
        "teacher of the config",
        [rf"teacher of the config: \d+ images in {SECONDS}, and {SECONDS} to time a batch", f"evaluated in {SECONDS}"],
    ),
    (
        ["record", "-c", "my.yaml"],
        "epoch 1 of 2",
        ["epoch 1 of 2: 50.0% recorded", "epoch 2 of 2: 100.0% recorded", f"recorded in {SECONDS}"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "bar", "lines"), CASES, ids=lambda each: each[0] if isinstance(each, list) else ""
)
def test_bar_on_a_terminal_and_lines_through_a_pipe(
    folder: Path, arguments: list[str], bar: str, lines: list[str]
) -> None:
    expected = int(arguments[0] == "check")  # which finds that both splits have the same images
    status, output, error = piped(arguments, folder)
    assert status == expected, error
    for line in lines:
        assert re.search(line, output + error), (line, output, error)
    assert "\x1b" not in output + error and "[ERROR]" not in error
    shutil.rmtree(folder / "runs", ignore_errors=True)
    status, shown = at_terminal(arguments, folder)
    assert status == expected, shown
    assert re.search(rf"\r\x1b\[K{re.escape(bar)}  ━*╌*  \d+/\d+  0:\d\d", shown)
    assert "[ERROR]" not in shown
    # What is left when the bars are erased are the same lines.
    kept = re.sub(r"\r\x1b\[K[^\r\n]*(?=\r\x1b\[K)", "", shown).replace("\r\x1b[K", "")
    for line in lines:
        assert re.search(line, kept), (line, kept)


@pytest.mark.slow
def test_predictions_end_with_the_time(folder: Path) -> None:
    """Of an ONNX file, with the transform of a config."""
    export = ["export", "-c", "my.yaml", "-o", "teacher.onnx"]
    status, output, error = piped(export, folder)
    assert status == 0, error
    assert re.search(f"written in {SECONDS}", error) and "\x1b" not in output + error
    status, output, error = piped(["predict", "teacher.onnx", "-c", "my.yaml", "photos"], folder)
    assert status == 1 and len(output.splitlines()) == 36
    assert re.search(f"37 images in {SECONDS}", error) and "1 of 37 images cannot be read" in error
    assert "[ERROR]" not in error
