"""What check, eval, record, bench and tune say while they work: a bar on a terminal, and lines through a pipe."""

import itertools
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
SHORT = ["--batch-sizes", "8", "--precisions", "fp32", "--num-images", "8", "--repeats", "1", "--compile-at"]


def name(value: object) -> str:
    """Of a case: the words before its options."""
    return " ".join(itertools.takewhile(str.isalpha, value)) if isinstance(value, list) and value[0].isalpha() else ""


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
LONG = [
    (
        ["bench", "teacher", "--builtin", "small_resnet", "--num-classes", "3", "--root", "photos", *SHORT],
        "repeat 1 of 1",
        [rf"pytorch fp32: first output after {SECONDS}", r"8 at a time, repeat 1 of 1, images/s: pytorch fp32 \d+"],
    ),
    (
        ["bench", "step", "-c", "my.yaml", "--rows", "b", "c", "--num-steps", "1", "--repeats", "1"],
        "repeat 1 of 1: (c)",
        [
            r"left out 1 of 37 images, which cannot be decoded, such as .*/photos/",
            r"\(b\) skipped: .*\.png is not JPEG, and torchvision's decode_jpeg reads nothing else",
            rf"opening, 1 of 4; compiling, which can take a few minutes\s+\(c\) open after {SECONDS}",
            rf"repeat 1 of 1, {SECONDS}, images/s: \(c\) \d+",
        ],
    ),
    (
        ["tune", "-c", "my.yaml", "--seconds", "10"],
        "last comparison, seconds",
        ["opening the images, the teacher and the student", r"last comparison, images/s: as it is \d+"],
    ),
]


def check_terminal(folder: Path, arguments: list[str], bar: str, lines: list[str], *, expected: int = 0) -> None:
    """The bar is drawn, and what is left when it is erased has the lines."""
    status, shown = at_terminal(arguments, folder)
    assert status == expected, shown
    assert re.search(rf"\r\x1b\[K{re.escape(bar)}  ━*╌*  \d+/\d+  0:\d\d", shown)
    assert "[ERROR]" not in shown
    kept = re.sub(r"\r\x1b\[K[^\r\n]*(?=\r\x1b\[K)", "", shown).replace("\r\x1b[K", "")
    for line in lines:
        assert re.search(line, kept), (line, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "bar", "lines"), CASES, ids=name)
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
    check_terminal(folder, arguments, bar, lines, expected=expected)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "bar", "lines"), LONG, ids=name)
def test_bar_of_long_measurements(
    folder: Path, arguments: list[str], bar: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    check_terminal(folder, arguments, bar, lines)


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
