"""Each example runs as its docstring says, on real data, and ends with numbers that a broken run would miss."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

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

MODULES = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
"""The modules of programs that start Python several times."""


def command(example: str) -> list[str]:
    """The line of the docstring that runs an example."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{example}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    (line,) = re.findall(rf"`([^`]* examples/{example}\.py)`", docstring)
    return shlex.split(line)


def launch(program: str, arguments: list[str]) -> str:
    """What a program prints that starts the example in processes of its own."""
    done = subprocess.run(
        [sys.executable, "-m", MODULES[program], *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# Warnings are those of other libraries. What an example makes in `__main__` is gone when the next one runs.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("example", WANTED)
def test_ends_with_good_numbers(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("examples").symlink_to(FOLDER)
    program, *arguments = command(example)
    if program == "python":
        with mock.patch.dict(os.environ):  # some libraries keep their seed there
            runpy.run_path(*arguments, run_name="__main__")
        output = capfd.readouterr().out
    else:
        output = launch(program, arguments)
    last = output.strip().splitlines()[-1]
    found = {word: float(number) for word, number in re.findall(r"(\w+) (-?\d+(?:\.\d+)?)", last)}
    for name, wanted in WANTED[example].items():
        assert found[name] >= wanted, found


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*WANTED, "sweep_optuna"}  # tests/test_examples_sweep.py


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
