"""What runs on a push and before a commit is what runs here."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pre_commit.clientlib import load_config

from tests.packaging.metadata import REPOSITORY, python_versions
from tools import check_files


def load(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def test_workflow_runs_everything_on_every_python() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    test = jobs["test"]
    assert test["strategy"]["matrix"]["python"] == python_versions() == ["3.11", "3.12", "3.13"]
    assert test["container"].startswith("python:${{ matrix.python }}-")
    assert test["env"]["PYTHON"] == "python3"  # the Makefile's
    assert ".ci/run" in [step.get("run") for step in test["steps"]]
    assert "make image" in [step.get("run") for step in jobs["image"]["steps"]]


def test_workflow_can_only_read() -> None:
    workflow = load(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)


def test_ci_runs_targets_that_exist() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8").replace("--jobs 2 ", "")
    targets = [target for line in re.findall(r"^make ([a-z -]+)", text, re.MULTILINE) for target in line.split()]
    assert targets == ["test-all", "demo", "docs", "dist"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_hooks_fetch_nothing_and_run_what_make_test_runs() -> None:
    (repository,) = load_config(REPOSITORY / ".pre-commit-config.yaml")["repos"]  # which checks it
    assert repository["repo"] == "local"
    entries = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert entries == {f".venv/bin/{name}" for name in ("ruff", "python", "hadolint", "mypy")}
    for path in (word for hook in repository["hooks"] for word in hook["entry"].split() if word.endswith(".py")):
        assert (REPOSITORY / path).is_file()


FAULTS = {
    "space.py": (b"a = 1 \n", "space.py:1: space or carriage return at the end"),
    "windows.md": (b"text\r\n", "windows.md:1: space or carriage return at the end"),
    "cut.txt": (b"text", "cut.txt:1: ends in no newline, or in empty lines"),
    "long.txt": (b"text\n\n", "long.txt:3: ends in no newline, or in empty lines"),
    "merge.py": (b"<<<<<<< main\n", "merge.py:1: mark of a merge"),
    "open.yaml": (b"a: [1\n", "open.yaml: while parsing a flow sequence"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_file_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = FAULTS[name]
    Path(name).write_bytes(content)
    assert check_files.main([name]) == 1
    assert capsys.readouterr().out.startswith(message)


def test_good_files_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"a.yaml": b"a: 1\n---\nb: 2\n", "empty.txt": b"", "picture.png": b"\0 \n \n"}.items():
        (tmp_path / name).write_bytes(content)
    assert check_files.main([str(path) for path in tmp_path.iterdir()]) == 0
    assert capsys.readouterr().out == ""
