"""`check` on photographs with unreadable files, and on colors that a teacher classifies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._check import CheckReport, CheckSettings, check
from tests.corpus import BROKEN, photo_of
from tests.evaluation.test_probe import CLASSES, SIZE, ColorNet, colors
from tests.recordings import config as recorded_config
from tests.recordings import recorded
from tests.streams import EVAL, TRAIN


def photographs(tmp_path: Path, root: Path, **data: Any) -> Config:
    """A run on the images in `root`."""
    train = {"source": {"root": root, "kind": "image_folder"}, "transform": TRAIN}
    return Config(run_dir=tmp_path / "run", data={"batch_size": 8, "device": "cpu", "train": train, **data})


@pytest.fixture(scope="module")
def spoilt(photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty good photographs of two classes, and all kinds of unreadable files; do not change it."""
    root, photo = tmp_path_factory.mktemp("spoilt"), photo_of(photos)
    for number in range(30):
        path = root / ("flower" if number < 20 else "roof") / f"good_{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo[number:]).save(path)
    for broken in BROKEN:
        broken.put(root / "flower" / broken.name, photo)
    return root


@pytest.fixture
def known(tmp_path: Path) -> Callable[..., Config]:
    """`known(...)` returns a run on colors with a teacher that classifies them."""
    onnx = export_onnx(ColorNet(), tmp_path / "teacher.onnx", image_shape=(3, SIZE, SIZE), classes=CLASSES)

    def make(**options: Any) -> Config:
        run = colors(tmp_path, **options)
        return Config(seed=run.seed, run_dir=tmp_path / "run", data=run.data, teacher=TeacherSettings(onnx=onnx))

    return make


def unreadable(found: CheckReport, split: str = "train") -> dict[str, str]:
    """Reasons of unreadable files by name."""
    (report,) = (report for report in found.splits if report.split == split)
    return {Path(sample.path).name: sample.reason for sample in report.unreadable}


@pytest.mark.parametrize("policy", ["raise", "substitute"])
def test_finds_every_unreadable_file(spoilt: Path, tmp_path: Path, policy: str) -> None:
    found = check(photographs(tmp_path, spoilt, on_bad_sample=policy))
    # A folder does not list missing files and folders.
    wanted = {broken.name: broken.reason for broken in BROKEN if (spoilt / "flower" / broken.name).is_file()}
    reasons = unreadable(found)
    assert reasons.keys() == wanted.keys()
    assert all(reason in reasons[name] for name, reason in wanted.items())
    (problem,) = found.problems
    assert found.grid is not None  # with substitutes
    assert f"data.train: {len(wanted)} of {30 + len(wanted)} images cannot be read" in problem
    assert ("data.on_bad_sample=substitute" if policy == "raise" else "data.max_bad_fraction=0.001") in problem


def test_substitutable_files_are_no_problem(spoilt: Path, tmp_path: Path) -> None:
    found = check(photographs(tmp_path, spoilt, on_bad_sample="substitute", max_bad_fraction=0.6))
    assert len(unreadable(found)) > 15 and found.problems == ()


def test_decodes_every_image_of_every_split_once(photo_folder: Path, tmp_path: Path) -> None:
    source = {"kind": "image_folder", "root": photo_folder}
    train = {"source": source, "transform": TRAIN, "repeats": 2, "last_batch": "drop", "mix": {"cutmix": 1.0}}
    other = {"source": {**source, "labeled": False}, "transform": EVAL, "last_batch": "pad"}
    found = check(photographs(tmp_path, photo_folder, train=train, more={"other": other}))
    facts = {report.split: (report.num_images, report.num_decoded, report.class_sizes) for report in found.splits}
    assert facts == {"train": (37, 37, (13, 12, 12)), "other": (37, 37, None)}
    assert found.problems == ()


def test_random_images_cover_all_classes(photo_folder: Path, tmp_path: Path) -> None:
    (report,) = check(photographs(tmp_path, photo_folder), CheckSettings(num_images=10)).splits
    assert report.num_images == 37 and report.num_decoded == 16  # whole batches
    assert report.class_sizes == (13, 12, 12)


def test_validation_on_training_images_is_a_problem(photo_folder: Path, tmp_path: Path) -> None:
    val = {"source": {"kind": "image_folder", "root": photo_folder}, "transform": EVAL}
    (problem,) = check(photographs(tmp_path, photo_folder, val=val)).problems
    assert problem.startswith("data.val holds the same images as data.train")


def test_good_teacher_is_no_problem(known: Callable[..., Config]) -> None:
    found = check(known())
    assert found.problems == () and found.teacher is not None and found.teacher.probe is not None
    assert found.teacher.backend == "openvino" and found.teacher.probe.top1 > 0.95


def test_bad_teacher_is_a_problem_despite_strict_probe(
    known: Callable[..., Config],
) -> None:
    config = known(label_of=lambda k: max(k - 1, 0))
    assert config.probe is not None
    strict = config.model_copy(update={"probe": config.probe.model_copy(update={"strict": True})})
    (problem,) = check(strict).problems
    assert problem.startswith("teacher: ") and "shifted by +1" in problem


def test_teacher_that_does_not_open_is_a_problem(known: Callable[..., Config], tmp_path: Path) -> None:
    config = known().model_copy(update={"teacher": TeacherSettings(onnx=tmp_path / "nowhere.onnx")})
    found = check(config)
    assert found.splits[0].num_decoded == 400 and found.teacher is None and found.grid is not None
    (problem,) = found.problems
    assert "nowhere.onnx" in problem


def test_recording_is_verified_and_probed(photo_folder: Path, tmp_path: Path) -> None:
    recording = recorded(photo_folder, tmp_path / "recording")
    run = {"run_dir": tmp_path / "run", "teacher": {"path": recording}}
    found = check(recorded_config(photo_folder, **run))
    assert found.teacher is not None and found.teacher.backend == "recorded" and found.grid is not None
    (problem,) = found.problems  # the network was never trained
    assert problem.startswith("teacher: top-1")
    (problem,) = check(recorded_config(photo_folder, max_pixels=10**6, **run)).problems
    assert "is of different images" in problem and "max_pixels" in problem


@pytest.mark.parametrize("stage", ["all", "teacher", "baseline"])
def test_stage_without_teacher_is_checked_without_one(photo_folder: Path, tmp_path: Path, stage: str) -> None:
    config = photographs(tmp_path, photo_folder).model_copy(
        update={"stage": stage, "teacher": TeacherSettings(model={"builtin": "small_resnet"})}
    )
    found = check(config)
    assert found.teacher is None and found.problems == () and found.grid is not None


def test_writes_only_the_report(known: Callable[..., Config], tmp_path: Path) -> None:
    config = known()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    found = check(config, CheckSettings(out=tmp_path / "findings"))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).as_posix() for path in after.keys() - before.keys()} == {
        "findings/check.json",
        "findings/train_batch.png",
    }
    assert before.items() <= after.items()
    written = json.loads((tmp_path / "findings" / "check.json").read_text())
    assert written["splits"][0]["class_sizes"] == [40] * 10 and written["problems"] == []
    assert written["teacher"]["probe"]["top1"] == found.teacher.probe.top1  # type: ignore[union-attr]


def test_grid_shows_first_training_batch(known: Callable[..., Config], tmp_path: Path) -> None:
    config = known(batch_size=8)
    found = check(config)
    assert found.grid is not None
    with KDDataLoader.from_config(config) as loader:
        shown = {"transform": loader.transform, "classes": loader.classes}
        wanted = save_grid(next(iter(loader)), tmp_path / "wanted.png", **shown)
    assert found.grid.read_bytes() == wanted.read_bytes()
    with Image.open(found.grid) as image:
        colors_shown = {tuple(color) for color in np.asarray(image).reshape(-1, 3).tolist()}
    assert len(colors_shown) > 1000  # noise; an empty grid has only a few


def test_progress_reports_split_and_share(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline.workflows._check._REPORT_INTERVAL_S", 0.0)
    lines: list[str] = []
    check(photographs(tmp_path, photo_folder), report=lines.append)
    assert lines[0].startswith("train: 21.6% of 37 images decoded, ")
    assert any(line.startswith("train: 100.0% of 37") for line in lines)


def test_config_without_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        check(Config(run_dir=tmp_path, data={"batch_size": 8}))


def test_folder_is_required(photo_folder: Path, tmp_path: Path) -> None:
    config = photographs(tmp_path, photo_folder).model_copy(update={"run_dir": None})
    with pytest.raises(ConfigError, match="--out"):
        check(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another"):
        check(config, CheckSettings(out=tmp_path / "file" / "check"))
