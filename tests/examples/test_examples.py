"""Each example runs as its docstring says, on real data, and ends with numbers that a broken run would miss."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "examples"

WANTED: dict[str, dict[str, float]] = {
    "accelerate_loop": {"student": 85},
    "both_networks": {"student": 75},
    "ddp": {"student": 85},
    "features_by_layer": {"teacher": 90, "student": 85},
    "hf_trainer": {"teacher": 85, "student": 80},
    "lightning_module": {"student": 80},
    "own_loop": {"teacher": 90, "student": 80},
    "own_loss": {"student": 85, "agreement": 85},
    "own_source": {"student": 85, "agreement": 85},
    "own_validation": {"mean": 85, "digit": 0, "worst": 60},
    "sequences": {"explains": 70},  # to repeat the last sample explains 66 %
    "student_losses": {"student": 80},
    "vectors": {"teacher": 85, "student": 70, "agreement": 70},
}
"""Numbers that the last line has at least, most of them in percent; guessing gets 10 % of the digits right."""

MODULES = {
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
}
"""The modules of programs that stand beside Python."""


def command(example: str) -> list[str]:
    """The line of the docstring that runs an example."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{example}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    (line,) = re.findall(rf"`([^`]* examples/{example}\.py)`", docstring)
    return shlex.split(line)


def run(example: str, folder: Path) -> dict[str, float]:
    """Run it in `folder`; the numbers of its last line by the word before each."""
    program, *arguments = command(example)
    (folder / "examples").symlink_to(FOLDER)
    done = subprocess.run(
        [sys.executable, *MODULES[program], *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.strip().splitlines()[-1]
    return {word: float(number) for word, number in re.findall(r"(\w+) (-?\d+(?:\.\d+)?)", last)}


@pytest.mark.slow
@pytest.mark.parametrize("example", WANTED)
def test_ends_with_good_numbers(example: str, tmp_path: Path) -> None:
    found = run(example, tmp_path)
    for name, wanted in WANTED[example].items():
        assert found[name] >= wanted, found


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*WANTED, "sweep_optuna"}  # tests/test_examples_sweep.py


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
