"""The config for a folder of images fits what is in it, and trains."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.config.config import Config, load_config
from kd_pipeline.config.starter import starter_config
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import DataError
from kd_pipeline.workflows._check import CheckSettings, check
from kd_pipeline.workflows._train import train
from tests.tar_files import write_tar


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (40, 48)) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def written(folder: Path | None, tmp_path: Path) -> Config:
    path = tmp_path / "my.yaml"
    path.write_text(starter_config(folder, name="my"))
    return load_config(path, [f"run_dir={tmp_path / 'run'}", "data.device=cpu", "data.num_threads=1"])


def test_splits_of_class_folders(tmp_path: Path) -> None:
    for split in ("Train", "valid"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "photos" / split / name, 5, size=(200, 300))
    config = written(tmp_path / "photos", tmp_path)
    train_split, val = config.data.split("train"), config.data.split("val")
    assert train_split.source.model_dump()["root"] == tmp_path / "photos" / "Train"
    assert val.source.model_dump()["root"] == tmp_path / "photos" / "valid"
    assert (train_split.transform.size, val.transform.size, config.data.batch_size) == (160, 160, 2)
    assert config.stage == "all"
    assert "# 10 images of 2 classes" in (tmp_path / "my.yaml").read_text()


def test_class_folders_alone(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "my photos" / name, 3)
    config = written(tmp_path / "my photos", tmp_path)
    assert config.data.val is None and config.data.split("train").source.model_dump()["labeled"]
    assert config.data.split("train").transform.size == 32


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    config = written(tmp_path / "photos", tmp_path)
    assert not config.data.split("train").source.model_dump()["labeled"]
    assert config.student is not None and config.student.is_headless


@pytest.mark.parametrize("layout", ["train-0.tar val-0.tar", "train/0.tar val/0.tar", "0.tar", "one"])
def test_tar_shards(tmp_path: Path, layout: str) -> None:
    write_images(tmp_path / "images", 6)
    files = {}
    for number, path in enumerate(sorted((tmp_path / "images").iterdir())):
        files |= {path.name: path.read_bytes(), f"{path.stem}.cls": str(number % 2).encode()}
    names = ["0.tar"] if layout == "one" else layout.split()
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "data" / name, files)
    config = written(tmp_path / "data" / ("0.tar" if layout == "one" else ""), tmp_path)
    for split in ("train", "val")[: len(names)]:
        assert len(open_source(config.data.split(split).source)) == 6
        assert str(config.data.split(split).source.model_dump()["path"]).endswith(".tar")
    assert (config.data.val is None) == (len(names) == 1)
    assert config.stage == "all" and config.data.split("train").transform.size == 32
    assert "# 6 images of 2 classes" in (tmp_path / "my.yaml").read_text()


def test_images_beside_their_archive_are_taken(tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "cat", 3)
    write_tar(tmp_path / "photos" / "photos.tar", {"a.jpg": b""})
    assert written(tmp_path / "photos", tmp_path).data.split("train").source.kind == "image_folder"


def test_without_a_folder_it_is_an_example(tmp_path: Path) -> None:
    config = written(None, tmp_path)
    assert config.data.split("train").source.model_dump()["root"] == Path("images/train")


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_folder_without_images(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=name):
        starter_config(tmp_path / name, name="my")


def test_names_in_yaml_are_quoted(tmp_path: Path) -> None:
    for folder in ("a: b # c", "010", "null", 'it\'s "here"'):
        write_images(tmp_path / folder / "cat", 2)
        write_images(tmp_path / folder / "dog", 2)
        root = written(tmp_path / folder, tmp_path).data.split("train").source.model_dump()["root"]
        assert root == tmp_path / folder


@pytest.mark.parametrize("folder", ["null", "true", "1e5", ".5e3"])
def test_relative_names_that_yaml_reads_as_no_text_are_quoted(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path(folder), 2)
    assert written(Path(folder), tmp_path).data.split("train").source.model_dump()["root"].name == folder


@pytest.mark.slow
def test_written_config_checks_and_trains(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "photos" / split / name, 8)
    config = written(tmp_path / "photos", tmp_path)
    assert not check(config, CheckSettings(), report=lambda line: None).problems
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})
    result = train(config)
    assert (result.folder / "exported").is_dir()


@pytest.mark.slow
def test_written_config_for_unlabeled_images_checks(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 16)
    written(tmp_path / "photos", tmp_path)
    # Without a download.
    config = load_config(
        tmp_path / "my.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            "data.device=cpu",
            "teacher.model={timm: resnet18, num_classes: 0, pretrained: false}",
            "teacher.input_adapter=null",
        ],
    )
    assert not check(config, CheckSettings(), report=lambda line: None).problems
