"""`kd-pipeline distill`: its arguments become those of the function, and its errors one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_pipeline import cli

DISTILL = ["distill", "--teacher", "timm:vit_small_patch16_dinov3", "--student", "timm:resnet18", "--data", "photos"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, report: Any, **options: Any) -> Any:
        found.append((arguments, options))
        report("distill on val")
        return SimpleNamespace(folder=Path("runs/x"))

    monkeypatch.setattr("kd_pipeline.workflows._distill.distill", record)
    return found


def test_arguments_are_those_of_the_function(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--labeled", "flowers", "--epochs", "3", "--out", "runs/x", "--teacher-weights", "dino.pt", "--fresh"]
    assert cli.main([*DISTILL, *options, "--plugin", "mine", "data.batch_size=8", "student.pretrained=true"]) == 0
    [(arguments, given)] = calls
    assert arguments == ("timm:vit_small_patch16_dinov3", "timm:resnet18", Path("photos"))
    assert given == {
        "labeled": Path("flowers"),
        "epochs": 3,
        "out": Path("runs/x"),
        "teacher_weights": Path("dino.pt"),
        "overrides": ["data.batch_size=8", "student.pretrained=true"],
        "plugins": ["mine"],
        "trust_engines": [],
        "fresh": True,
    }
    assert capsys.readouterr().out.splitlines() == ["distill on val", "run folder: runs/x"]


def test_what_is_left_out_has_its_default(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    assert cli.main(DISTILL) == 0
    [(_, given)] = calls
    assert given.pop("epochs") == 100
    assert not any(given.values())


@pytest.mark.parametrize("option", ["--teacher", "--student", "--data"])
def test_networks_and_data_are_required(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = DISTILL.index(option)
    with pytest.raises(SystemExit):
        cli.main(DISTILL[:place] + DISTILL[place + 2 :])
    assert f"required: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.epoch=3"], "override 'train.epoch=3': train.epoch: unknown key; did you mean 'epochs'"),
        (["--teacher-weights", "none.pt"], "none.pt: there is no such file"),
        ([], "photos: cannot be listed"),
    ],
)
def test_error_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*DISTILL, *arguments]) == 1
    _, error = capsys.readouterr().err.splitlines()
    assert error.startswith("kd-pipeline: ") and words in error


def test_read_only_run_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).touch()
    (tmp_path / "file").touch()  # root may write to any folder
    assert cli.main([*DISTILL, "--out", "file/run"]) == 1
    assert "cannot write to the folder file/run: Not a directory" in capsys.readouterr().err
