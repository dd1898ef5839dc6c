"""The example of a sweep finds the best of its trials."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "sweep_optuna.py"


@pytest.mark.slow
def test_sweep_reports_its_best_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path, "2"],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"trial_{number}" / "result.json").read_text()) for number in range(2)]
    best = max(result["val"]["top1"] for result in found)
    shown = re.search(r"best: ([\d.]+)% with .*'lr': .*'temperature': ", done.stdout)
    assert shown is not None and float(shown[1]) == pytest.approx(100 * best, abs=0.06)


def test_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
