"""What a training shows through a pseudo-terminal and through a pipe, and what of it is in `train.log`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training import networks, tiny_run

EPOCH = r"epoch {}/2  loss \S+  val/top1 \S+% \(best \S+%, epoch \d\)  lr 0.05  \S+ images/s  \S+ s"
LEFT = (r"  \d+:\d\d left(?=\s)", r"(?=\s)")
"""After the line of each epoch: what is left of the run, if it does not end with this one."""


def command(folder: Path, run: str, *overrides: str) -> list[str]:
    file = folder / f"{run}.yaml"
    config = tiny_run.settings(folder, run, **tiny_run.WITH_ONNX).model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    module = [sys.executable, "-m", "kd_pipeline", "train", "-c", str(file), "--plugin", networks.__name__]
    return [*module, *overrides]


def check_told(text: str, first: int = 1) -> None:
    """The header, a line for each epoch from `first`, the work after them with its time, and the table, in order."""
    header = [
        r"stage +distill",
        r"teacher +teacher\.onnx, 1,514 parameters, onnxruntime fp32",
        r"student +\S+, [\d,]+ parameters",
    ]
    header += [
        r"images +train 96, val 40, 10 classes",
        r"epochs +2 \(6 steps each\), batch size 16",
        r"device +cpu, 32-true",
    ]
    epochs = [EPOCH.format(number) + LEFT[number - 1] for number in range(first, 3)]
    after = [
        r"export to ONNX: \S+ s",
        r"split +network +samples +top-1 +top-5",
        r"val +student +40",
        r"val +teacher +40",
    ]
    position = 0
    for pattern in (*header, *epochs, *after):
        found = re.compile(pattern).search(text, position)
        assert found is not None, (pattern, text)
        position = found.end()
    assert "epoch 0" not in text


@pytest.mark.slow
def test_pipe_gets_lines_without_a_bar(digits: Path) -> None:
    found = subprocess.run(command(digits, "pipe"), capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    lines = (found.stderr + found.stdout).splitlines()
    assert lines[0].startswith("kd-pipeline ") and ": train -c " in lines[0]
    assert "\x1b" not in found.stderr + found.stdout and "\r" not in found.stderr + found.stdout
    assert "━" not in found.stderr and "Warning" not in found.stderr and "lightning" not in found.stderr.lower()
    check_told(found.stderr + found.stdout)
    check_told((digits / "pipe" / "train.log").read_text(encoding="utf-8"))
    assert found.stdout.splitlines()[-1] == f"run folder: {digits / 'pipe'}"
    again = subprocess.run(command(digits, "pipe", "train.epochs=3"), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "epoch 3/3" in again.stderr and "epoch 1/3" not in again.stderr
    place = f"resumed  from {digits / 'pipe' / 'checkpoints' / 'last.ckpt'} at epoch 3 of 3, step 12"
    assert again.stderr.splitlines().count(place) == 1


_SCRIPT = """
from pathlib import Path

import kd_pipeline
from tests.training import networks, tiny_run

kd_pipeline.train(tiny_run.settings(Path({folder!r}), "script", **tiny_run.WITH_ONNX), plugins=[networks.__name__])
"""


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["", "import logging; logging.basicConfig(format='%(message)s')"])
def test_script_shows_what_the_command_shows(setup: str, digits: Path, tmp_path: Path) -> None:
    for name in ("train.npz", "val.npz", "teacher.onnx"):
        (tmp_path / name).symlink_to(digits / name)
    program = [sys.executable, "-c", setup + _SCRIPT.format(folder=str(tmp_path))]
    found = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0 and found.stdout == "", found.stderr
    check_told(found.stderr)
    lines = found.stderr.splitlines()
    assert len([line for line in lines if line.startswith(("stage ", "epoch ", "split ", "val ", "export "))]) == 7
    check_told((tmp_path / "script" / "train.log").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_tell_it_once(digits: Path) -> None:
    arguments = command(digits, "ranks", "data.batch_size=8")[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    lines = (found.stderr + found.stdout).splitlines()
    told = [
        r"kd-pipeline .*: train -c",
        r"stage +distill",
        r"student +tests.*:plain, 1,514 parameters$",
        r"epochs +2 \(6 steps each\), batch size 8 on each of 2 processes",
        r"folder +",
        r"epoch 1/2  loss ",
        r"epoch 2/2  loss ",
        r"trained at .* images/s per process; ",
        r"export to ONNX: ",
        r"split +network ",
        r"val +student +40 ",
        r"val +teacher +40 ",
        r"run folder: ",
    ]
    for pattern in told:
        assert len([line for line in lines if re.match(pattern, line)]) == 1, (pattern, lines)


@pytest.mark.slow
def test_terminal_gets_a_bar_and_lines_that_stay(digits: Path) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command(digits, "terminal"), stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        output = b""
        try:
            while part := os.read(ours, 65536):
                output += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    text = output.decode()
    assert child.returncode == 0, text
    drawn = re.findall(r"\r\x1b\[K([^\r\n]*)", text)
    bars = [line for line in drawn if re.match(r"epoch \d/2  .*\d/6  loss \S+  lr 0.05  .*\d:\d\d left", line)]
    assert {line[:9] for line in bars} == {"epoch 1/2", "epoch 2/2"}
    assert any("best " in line for line in bars) and any("images/s" in line for line in bars)
    check_told(re.sub(r"\x1b\[K", "", text))
