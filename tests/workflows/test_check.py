"""`check` on photographs with unreadable files, and on colors that a teacher classifies."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.data.settings import SplitSettings
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation.probe import ProbeSettings
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._check import CheckReport, CheckSettings, check
from tests.corpus import BROKEN, photo_of
from tests.evaluation.test_probe import CLASSES, SIZE, ColorNet, colors
from tests.mask_files import png_of, save_pair, some_masks
from tests.recordings import config as recorded_config
from tests.recordings import recorded
from tests.streams import EVAL, TRAIN
from tests.teachers.onnx_models import fixed_batch_model, softmax_model, training_mode_model


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


@pytest.fixture(scope="module")
def color_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported teacher of colors; read only."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    return export_onnx(ColorNet(), path, image_shape=(3, SIZE, SIZE), classes=CLASSES)


@pytest.fixture
def known(color_teacher: Path, tmp_path: Path) -> Callable[..., Config]:
    """`known(...)` returns a run on colors with a teacher that classifies them."""

    def make(**options: Any) -> Config:
        run = colors(tmp_path, **options)
        teacher = TeacherSettings(onnx=color_teacher)
        return Config(seed=run.seed, run_dir=tmp_path / "run", data=run.data, teacher=teacher)

    return make


def unreadable(found: CheckReport, split: str = "train") -> dict[str, str]:
    """Reasons of unreadable files by name."""
    (report,) = (report for report in found.splits if report.split == split)
    return {Path(sample.path).name: sample.reason for sample in report.unreadable}


def rows(found: CheckReport, where: str) -> list[tuple[str, str]]:
    """Severity and message of the findings about a part."""
    return [(finding.severity, finding.message) for finding in found.findings if finding.where == where]


def test_checkpoint_of_the_student(photo_folder: Path, tmp_path: Path) -> None:
    pretrained = timm.create_model("test_resnet", num_classes=9).state_dict()
    torch.save(pretrained, tmp_path / "a.pt")
    config = photographs(tmp_path, photo_folder).model_copy(update={"stage": "baseline"})
    for reset, problems in (((), 1), (("fc",), 0)):
        student = ModelSettings(timm="test_resnet", checkpoint=tmp_path / "a.pt", reset=reset)
        found = check(config.model_copy(update={"student": student}), CheckSettings(num_images=8))
        assert len(found.problems) == problems
        assert all("student: " in problem and "set reset: [fc]" in problem for problem in found.problems)


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
    # A folder also notes the pipes and devices that it skipped.
    assert rows(found, "data.train")[0] == ("error", problem.removeprefix("data.train: "))


def test_finds_every_unreadable_mask(tmp_path: Path) -> None:
    for number, mask in enumerate(some_masks(10)):
        save_pair(tmp_path / "images", tmp_path / "masks", f"{number}", mask)
    (tmp_path / "masks/2.png").write_bytes(png_of(np.zeros((4, 5))))
    (tmp_path / "masks/7.png").write_bytes(png_of(np.zeros((41, 44)), "RGB"))
    masks = {"root": str(tmp_path / "masks"), "num_classes": 4}
    source = {"kind": "image_folder", "root": str(tmp_path / "images"), "masks": masks}
    train = {"source": source, "transform": TRAIN}
    found = check(Config(run_dir=tmp_path / "run", data={"batch_size": 4, "device": "cpu", "train": train}))
    reasons = unreadable(found)
    assert reasons.keys() == {"2.jpg", "7.jpg"}
    assert "masks/2.png has 5x4 pixels, and the image 34x26" in reasons["2.jpg"]
    assert "masks/7.png: it has colors (RGB)" in reasons["7.jpg"]
    assert any("2 of 10 images cannot be read" in problem for problem in found.problems)


def test_substitutable_files_are_a_note(spoilt: Path, tmp_path: Path) -> None:
    found = check(photographs(tmp_path, spoilt, on_bad_sample="substitute", max_bad_fraction=0.6))
    assert len(unreadable(found)) > 15 and found.problems == ()
    assert rows(found, "data.train")[-1][0] == "note" and "others take their place" in rows(found, "data.train")[-1][1]


def test_advice_about_unreadable_files_works(spoilt: Path, tmp_path: Path) -> None:
    (problem,) = check(photographs(tmp_path, spoilt)).problems
    (policy, fraction) = re.findall(r"data\.on_bad_sample=(\w+) and data\.max_bad_fraction=([\d.]+)", problem)[0]
    changes: dict[str, Any] = {"on_bad_sample": policy, "max_bad_fraction": float(fraction)}
    config = photographs(tmp_path, spoilt, **changes)
    assert check(config).problems == ()
    with KDDataLoader.from_config(config, last_batch="keep", run_dir=None) as loader:
        assert sum(len(batch) for batch in loader) == len(loader.source)


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
    copy = shutil.copytree(photo_folder, tmp_path / "copy")
    val = {"source": {"kind": "image_folder", "root": copy}, "transform": EVAL}
    (problem,) = check(photographs(tmp_path, photo_folder, val=val)).problems
    assert problem.startswith("data.val holds the same images as data.train")


def test_good_teacher_is_no_problem(known: Callable[..., Config]) -> None:
    found = check(known())
    assert found.problems == () and found.teacher is not None
    assert found.teacher.backend == "openvino" and found.teacher.probes["logits"].top1 > 0.95


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


def make_images(folder: Path, photos: Any, *, num_good: int) -> Path:
    """Photographs of two classes."""
    photo = photo_of(photos)
    for number in range(num_good):
        path = folder / ("flower" if number % 2 else "roof") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[number % 40 :, : 60 + number % 7]).save(path)
    return folder


HARSH = {**TRAIN.model_dump(), "erase": 1.0, "blur": 1.0, "auto_augment": {"kind": "randaugment"}, "area": (0.01, 0.02)}
"""Draws into an image of a single color, and cuts windows of a single color from others."""


def test_images_of_one_color_are_named(photos: Any, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", photos, num_good=8)
    Image.new("RGB", (90, 70)).save(root / "flower" / "zz_black.png")
    Image.new("L", (90, 70), 37).save(root / "roof" / "zz_gray.jpg")
    product = Image.new("RGB", (90, 70), "white")
    product.putpixel((89, 69), (0, 0, 0))
    product.save(root / "roof" / "zz_product.png")
    train = {"source": {"kind": "image_folder", "root": root}, "transform": HARSH}
    copy = shutil.copytree(root, tmp_path / "copy")
    val = {"source": {"kind": "image_folder", "root": copy}, "transform": EVAL}
    found = check(photographs(tmp_path, root, train=train, val=val))
    for split in found.splits:
        named = [(Path(image.path).name, image.color) for image in split.uniform]
        assert named == [("zz_black.png", (0, 0, 0)), ("zz_gray.jpg", (37, 37, 37))]
        assert [Path(ImageFolder(root).name(image.index)).name for image in split.uniform] == [
            name for name, _ in named
        ]
    (_, message) = next(row for row in rows(found, "data.train") if "single color" in row[1])
    assert f"a single color in 2 of 11 images: sample 4 ({root}/flower/zz_black.png) is black" in message
    assert "is gray 37" in message


def test_images_of_one_color_in_arrays(tmp_path: Path) -> None:
    config = colors(tmp_path)
    images = np.load(tmp_path / "images.npy")
    images[7] = (3, 200, 5)
    np.save(tmp_path / "images.npy", images)
    found = check(Config(run_dir=tmp_path / "run", data=config.data))
    ((severity, message),) = rows(found, "data.train")
    assert severity == "note"  # one of 400
    assert f"sample 7 ({found.splits[0].uniform[0].path}) is RGB (3, 200, 5)" in message


def test_one_split_that_does_not_open_leaves_the_others(known: Callable[..., Config], tmp_path: Path) -> None:
    config = known()
    assert config.data.train is not None
    source = {"kind": "image_folder", "root": tmp_path / "gone"}
    gone = SplitSettings(source=source, transform=config.data.train.transform)
    found = check(config.model_copy(update={"data": config.data.model_copy(update={"val": gone})}))
    assert [split.split for split in found.splits] == ["train"] and found.teacher is not None
    assert {finding.where for finding in found.findings} - {"config"} == {"data.val"}
    assert any("gone" in problem for problem in found.problems)
    found = check(config.model_copy(update={"data": config.data.model_copy(update={"train": gone, "val": gone})}))
    assert found.splits == () and found.grid is None
    assert found.teacher is not None and not found.teacher.probes
    data = config.data.model_copy(update={"train": gone, "val": config.data.train})
    found = check(config.model_copy(update={"data": data}))
    assert [split.split for split in found.splits] == ["val"]
    assert {finding.where for finding in found.findings} - {"config"} == {"data.train"}


def test_list_that_is_wrong_is_a_row(tmp_path: Path, photo_folder: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\nnowhere.jpg\n", encoding="utf-8")
    val = {"source": {"kind": "file_list", "path": tmp_path / "list.csv"}, "transform": EVAL}
    found = check(photographs(tmp_path, photo_folder, more={"odd": val}))
    ((severity, message),) = rows(found, "data.more.odd")
    assert severity == "error" and "list.csv" in message and found.grid is not None


def test_warnings_of_a_source_are_notes(photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    shutil.copytree(photo_folder, root)
    (root / "flower" / "notes.xyz").write_text("not an image")
    found = check(photographs(tmp_path, root))
    (split,) = found.splits
    assert split.remarks and rows(found, "data.train") == [("note", remark) for remark in split.remarks]
    assert found.problems == ()


def test_settings_that_are_probably_wrong_are_problems(photo_folder: Path, tmp_path: Path) -> None:
    other = EVAL.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    val = {"source": {"kind": "image_folder", "root": photo_folder, "labeled": False}, "transform": other}
    config = photographs(tmp_path, photo_folder, val=val)
    assert rows(check(config), "config") == [("error", remark) for remark in config.remarks] != []


def softmax_of(net: ColorNet) -> nn.Module:
    return nn.Sequential(net, nn.Softmax(dim=1))


def test_teacher_with_softmax_is_a_problem(tmp_path: Path) -> None:
    onnx = export_onnx(softmax_of(ColorNet()), tmp_path / "net.onnx", image_shape=(3, SIZE, SIZE), classes=CLASSES)
    run = colors(tmp_path)
    config = Config(run_dir=tmp_path / "run", data=run.data, teacher=TeacherSettings(onnx=onnx))
    for probe in (None, ProbeSettings(), ProbeSettings(strict=True)):
        found = check(config.model_copy(update={"probe": probe}))
        ((severity, message),) = rows(found, "teacher")  # once, though asked twice
        assert severity == "error" and "without the softmax at its end" in message
        assert found.teacher is not None and (not found.teacher.probes) == (probe is None)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (training_mode_model(), "BatchNorm is in training mode"),
        (softmax_model(), "without the softmax"),
        (fixed_batch_model(1), "a batch size is fixed"),
    ],
)
def test_broken_teacher_is_a_row(tmp_path: Path, model: onnx.ModelProto, cause: str, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    data = colors(tmp_path, classes=None, label_of=lambda k: k % 5).data
    assert data.train is not None
    small = data.train.model_copy(update={"transform": data.train.transform.model_copy(update={"size": 8})})
    onnx.save(model, tmp_path / "broken.onnx")
    config = Config(
        run_dir=tmp_path / "run",
        data=data.model_copy(update={"train": small}),
        teacher=TeacherSettings(backend=backend, onnx=tmp_path / "broken.onnx"),
        probe=None,
    )
    ((severity, message),) = rows(check(config), "teacher")
    assert severity == "error" and cause in message


STUDENT = {"builtin": "small_resnet", "kwargs": {"width": 4}}


def with_student(config: Config, **student: Any) -> Config:
    return config.model_copy(update={"student": ModelSettings.model_validate({**STUDENT, **student})})


def test_sound_student_is_no_problem(known: Callable[..., Config]) -> None:
    assert check(with_student(known())).findings == ()


@pytest.mark.parametrize("num_classes", [None, 7])
def test_checkpoint_that_does_not_fit_is_a_row(
    known: Callable[..., Config], tmp_path: Path, num_classes: int | None
) -> None:
    torch.save(open_model(ModelSettings(**STUDENT, num_classes=3)).state_dict(), tmp_path / "student.pt")
    found = check(with_student(known(), checkpoint=tmp_path / "student.pt", num_classes=num_classes))
    ((severity, message),) = rows(found, "student")
    assert severity == "error" and "student.pt" in message and found.teacher is not None


def test_student_of_other_classes_is_a_row(known: Callable[..., Config]) -> None:
    ((_, message),) = rows(check(with_student(known(), num_classes=7)), "student")
    assert "should return logits [2, 10]" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"features": [{"student": "nowhere", "teacher": "logits", "loss": "logit_mse"}]}}, "nowhere"),
        ({"train": {"select_by": "val/top2"}}, "train.select_by: 'val/top2' is not measured"),
        ({"train": {"metrics": [{"name": "NoMetric"}]}}, "NoMetric"),
    ],
)
def test_what_train_would_refuse_is_a_row(known: Callable[..., Config], changes: dict[str, Any], message: str) -> None:
    config = with_student(known())
    assert config.data.train is not None
    val = config.data.train.model_copy(update={"transform": EvalTransform(size=SIZE)})
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": val})})
    config = Config.model_validate({**config.model_dump(), **changes})
    found = [text for severity, text in rows(check(config), "student") if severity == "error"]
    assert len(found) == 1 and message in found[0]


def test_distillation_without_teacher_is_a_row(known: Callable[..., Config]) -> None:
    config = with_student(known()).model_copy(update={"teacher": None})
    (problem,) = check(config).problems
    assert problem == "teacher: stage: distill needs a teacher: set teacher, or use stage: baseline"
    assert check(config.model_copy(update={"stage": "baseline"})).problems == ()


def test_unlabeled_images_without_teacher_are_a_row(known: Callable[..., Config]) -> None:
    config = with_student(known(labeled=False)).model_copy(update={"stage": "baseline"})
    ((_, message),) = rows(check(config), "student")
    assert "labels" in message


def test_recording_of_too_few_epochs_is_a_row(photo_folder: Path, tmp_path: Path) -> None:
    recording = recorded(photo_folder, tmp_path / "recording")
    run = {"run_dir": tmp_path / "run", "teacher": {"path": recording}, "probe": None}
    config = recorded_config(photo_folder, **run, train={"epochs": 3, "compare_with_teacher": False})
    ((_, message),) = rows(check(config), "teacher")
    assert "train.epochs is 3" in message and "2 complete epochs" in message


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
    assert written["splits"][0]["class_sizes"] == [40] * 10 and written["problems"] == written["findings"] == []
    assert written["teacher"]["probes"]["logits"]["top1"] == found.teacher.probes["logits"].top1  # type: ignore[union-attr]


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
    monkeypatch.setattr("kd_pipeline.workflows.check_images._REPORT_INTERVAL_S", 0.0)
    lines: list[str] = []
    check(photographs(tmp_path, photo_folder), report=lines.append)
    assert lines[0].startswith("train: 8 of 37 images decoded, ")
    assert any(line.startswith("train: 37 of 37 images decoded in ") for line in lines)


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


def test_report_follows_no_link_out_of_the_run(photo_folder: Path, tmp_path: Path) -> None:
    config, victim = photographs(tmp_path, photo_folder), tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "check").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"out: .*check is a link, .* delete it, or pass --out"):
        check(config)
    assert not [*victim.iterdir()]
