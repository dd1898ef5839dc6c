"""A new user with a page of docs/journeys gets through: each does in an empty folder what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs import possessions
from tests.docs.pages import missing_lines, run_page

FOLDER = Path(__file__).parents[2] / "docs" / "journeys"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))


def _broken(folder: Path) -> None:
    possessions.photos(folder / "photos")
    possessions.cut_off(folder / "photos" / "train" / "flower" / "007.jpg")


def _photos_and_timm(folder: Path) -> None:
    possessions.photos(folder / "photos")
    possessions.timm_checkpoint(folder / "model_best.pth.tar")


def _photos_and_onnx(folder: Path) -> None:
    possessions.photos(folder / "photos")
    possessions.onnx_file(folder)


def _unlabeled(folder: Path) -> None:
    possessions.photos_without_classes(folder / "photos")
    possessions.backbone_weights(folder / "dino.safetensors")


POSSESSIONS: dict[str, Callable[[Path], None]] = {
    "01": _broken,
    "02": _photos_and_timm,
    "03": _unlabeled,
    "04": _photos_and_timm,
    "05": _photos_and_timm,
    "06": _photos_and_timm,
    "07": possessions.csv_files,
    "08": lambda folder: possessions.shards(folder / "shards"),
    "09": lambda folder: possessions.parquet_files(folder / "flowers"),
    "10": _photos_and_onnx,
    "11": _photos_and_onnx,
    "12": _photos_and_onnx,
}
"""What each page presupposes."""


# Warnings are those of other libraries.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_journey_ends_well(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "home"
    folder.mkdir()
    POSSESSIONS[page.stem[:2]](folder)
    run_page(page, folder)


def test_every_journey_is_listed() -> None:
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert len(PAGES) == len(POSSESSIONS) and all(f"({page.name})" in index for page in PAGES)


def test_shown_lines_are_looked_for() -> None:
    written = "epoch 2/2  loss 0.7128  val/top1 50.0%\n  run folder:\n    runs/my"
    assert missing_lines("epoch 2/2 loss 0.1 ...\nrun folder: runs/my\n", written) == []
    assert missing_lines("epoch 1/2 loss 0.1 ...\nfolder: runs\n", written) == [
        "epoch 1/2 loss 0.1 ...",
        "folder: runs",
    ]
