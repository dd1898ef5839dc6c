"""What a loader may be given as source, teacher and `prepare`, and what it says of itself."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.sources import Arrays, FileList, ImageFolder, Parquet
from kd_pipeline.data.sources.base import CustomSettings, ImageFolderSettings
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings, TeacherSettings
from tests.data.sources import custom_sources
from tests.data.sources.table_files import table_of, write_parquet
from tests.recordings import small_recording
from tests.training import networks, tiny_run

SMALL = EvalTransform(size=8, resize=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    tiny_run.write_digits(folder)
    return folder


@pytest.fixture
def open_loader(folder: Path) -> Iterator[Callable[..., KDDataLoader]]:
    opened: list[KDDataLoader] = []

    def make(source: Any = None, teacher: Any = None, **options: Any) -> KDDataLoader:
        source = folder / "train.npz" if source is None else source
        options = {"batch_size": 16, "device": "cpu", "num_threads": 1, **options}
        opened.append(KDDataLoader(source, SMALL, teacher, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


# Sources


def test_paths(open_loader, folder, photo_folder, tmp_path, monkeypatch):
    loader = open_loader(photo_folder)
    assert isinstance(loader.source, ImageFolder) and loader.classes == ("flower", "roof", "sky")
    assert isinstance(open_loader(str(photo_folder)).source, ImageFolder)
    assert isinstance(open_loader(str(folder / "train.npz")).source, Arrays)
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8), np.uint8))
    assert isinstance(open_loader(tmp_path / "images.npy").source, Arrays)
    write_parquet(table_of(loader.source), tmp_path)
    assert isinstance(open_loader(str(tmp_path / "*.parquet")).source, Parquet)
    first = loader.source.name(0)
    for name, text in {
        "a.csv": f"{first},sky",
        "b.TSV": f"{first}\tsky",
        "c.txt": first,
        "d.jsonl": f'{{"path": "{first}"}}',
    }.items():
        (tmp_path / name).write_text(text + "\n")
        assert isinstance(open_loader(tmp_path / name).source, FileList)
    monkeypatch.setenv("HOME", str(photo_folder.parent))
    assert isinstance(open_loader(f"~/{photo_folder.name}").source, ImageFolder)


def test_path_to_nothing(open_loader, photo_folder, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        open_loader(tmp_path / "nowhere")
    image = shutil.copy(sorted(photo_folder.rglob("*.jpg"))[0], tmp_path / "one.jpg")
    with pytest.raises(ConfigError, match=r"one\.jpg; a list ends in \.csv"):
        open_loader(image)


def test_settings(open_loader, photo_folder):
    assert len(open_loader(ImageFolderSettings(root=photo_folder)).source) == 37
    plugin = custom_sources.__name__
    settings = CustomSettings(factory=f"{plugin}:digits", kwargs={"first": 0, "count": 20})
    with pytest.raises(ConfigError, match=f"allow it with --plugin {plugin}"):
        open_loader(settings)
    assert len(open_loader(settings, plugins=[plugin]).dataset) == 20


def test_own_source_is_checked(open_loader):
    source = custom_sources.Digits()
    assert open_loader(source).source is source
    source.labels = source.labels.tolist()
    with pytest.raises(DataError, match="the source Digits: labels are an object of type list"):
        open_loader(source)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (3, "an object of type int"),
        (torch.utils.data.TensorDataset(torch.zeros(3, 1)), "of type TensorDataset"),
        (ImageFolder, "the class ImageFolder itself"),
        (np.zeros((3, 8, 8), np.uint8), "of type ndarray"),
    ],
)
def test_anything_else_is_no_source(open_loader, source, what):
    with pytest.raises(ConfigError, match=what) as info:
        open_loader(source)
    assert "BaseSource" in str(info.value) and "BatchLoader" in str(info.value)


@pytest.mark.parametrize("transform", ["eval", EvalTransform, None, lambda images: images])
def test_anything_else_is_no_transform(folder, transform):
    with pytest.raises(ConfigError, match=r"transform is .*; give TrainTransform\(size=224\)"):
        KDDataLoader(folder / "train.npz", transform, batch_size=16)


# Teachers


def logits_of(loader: KDDataLoader) -> Tensor:
    return torch.cat([batch.teacher["logits"] for batch in loader])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", True, "batch_size must be a whole number, got True"),
        ("batch_size", "16", "batch_size must be a whole number, got '16'"),
        ("batch_size", 16.0, "batch_size must be a whole number, got 16.0"),
        ("seed", 1.5, "seed must be a whole number, got 1.5"),
        ("seed", None, "seed must be a whole number, got None"),
        ("repeats", 1.5, "repeats must be a whole number, got 1.5"),
        ("shard", (0, 2), "shard is an object of type tuple; give Shard"),
        ("mix", 0.2, "mix is an object of type float; give MixSettings"),
        ("prepare", 3, "prepare is an object of type int; give a function"),
        ("views", 96, "views is an object of type int; give a mapping"),
    ],
)
def test_argument_of_another_type_is_named(open_loader, name, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_loader(teacher=nn.Flatten(), **{name: value})


def test_module_and_settings_equal_an_open_teacher(open_loader, folder):
    module = networks.plain()
    with closing(open_teacher(TeacherSettings(), module=module, image_shape=(3, 8, 8), batch_size=16)) as teacher:
        wanted = logits_of(open_loader(teacher=teacher))
    assert wanted.shape == (96, 10)
    torch.testing.assert_close(logits_of(open_loader(teacher=module)), wanted)
    settings = TeacherSettings(onnx=folder / "teacher.onnx", backend="onnxruntime")
    several = EnsembleSettings(members=(settings, settings))
    single = logits_of(open_loader(teacher=settings))
    torch.testing.assert_close(logits_of(open_loader(teacher=several)).softmax(1), single.softmax(1))
    group = next(iter(open_loader(teacher=TeacherGroupSettings(members={"a": settings, "b": settings}))))
    assert group.teacher.keys() == {"a.logits", "b.logits"}


def test_loader_closes_what_it_opened_and_nothing_else(open_loader, folder):
    loader = open_loader(teacher=networks.plain())
    opened = loader.teacher
    assert isinstance(opened, Teacher)
    loader.close()
    with pytest.raises(TeacherError, match="closed"):
        opened(torch.zeros(1, 3, 8, 8))
    with closing(open_teacher(TeacherSettings(), module=networks.plain(), image_shape=(3, 8, 8))) as given:
        open_loader(teacher=given).close()
        given(torch.zeros(1, 3, 8, 8))


def test_teacher_is_closed_if_the_loader_does_not_open(open_loader, monkeypatch):
    closed = []
    monkeypatch.setattr(Teacher, "close", lambda self: closed.append(self))
    with pytest.raises(DataError, match="do not fill a batch"):
        open_loader(teacher=networks.plain(), batch_size=1000, last_batch="drop")
    assert len(closed) == 1


def test_classes_of_a_module_must_fit(open_loader, photo_folder):
    with pytest.raises(TeacherError, match="10"):
        open_loader(photo_folder, networks.plain())


@pytest.mark.parametrize(
    ("teacher", "what"),
    [("teacher.onnx", "of type str"), (lambda images: images, "of type function"), (nn.Linear, "the class Linear")],
)
def test_anything_else_is_no_teacher(open_loader, teacher, what):
    with pytest.raises(ConfigError, match=f"teacher is .*{what}") as info:
        open_loader(teacher=teacher)
    assert 'TeacherSettings(onnx="teacher.onnx")' in str(info.value)


# prepare


def brighter(batch: KDBatch) -> KDBatch:
    assert not batch.teacher
    return batch.replace(images=batch.images + 1, twice=batch.index * 2)


def only_brighter(batch: KDBatch) -> KDBatch:
    return batch.replace(images=batch.images + 1)


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=1.0)], ids=["plain", "mixed"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_prepare_comes_before_the_teacher(open_loader, mix, ahead):
    module = networks.plain()
    options = {"ahead": ahead, "mix": mix, "last_batch": "drop"}
    plain, changed = (
        open_loader(teacher=module, **options),
        open_loader(teacher=module, prepare=only_brighter, **options),
    )
    for before, after in zip(plain, changed, strict=True):
        assert torch.equal(after.images, before.images + 1) and torch.equal(after.index, before.index)
        torch.testing.assert_close(after.teacher["logits"], plain.teacher(before.images + 1)["logits"])
    torch.testing.assert_close(changed.peek().images, next(iter(changed)).images)


def test_prepare_may_add_inputs(open_loader):
    batch = next(iter(open_loader(prepare=brighter)))
    assert (batch["twice"] == 2 * batch.index).all() and batch.input is batch.inputs


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda batch: None, "prepare returned an object of type NoneType"),
        (lambda batch: batch.replace(images=batch.images[1:]), r"images \[15, 3, 8, 8\] for a batch of 16"),
        (lambda batch: batch.replace(labels=batch.labels[:3]), r"labels \[3\]"),
    ],
)
def test_wrong_prepare_is_named(open_loader, prepare, message):
    with pytest.raises(ConfigError, match=message):
        next(iter(open_loader(prepare=prepare)))


def test_recording_has_outputs_of_unchanged_batches(open_loader, tmp_path):
    recording = Recording(small_recording(tmp_path / "recording"))
    with closing(recording), pytest.raises(ConfigError, match="prepare changes the batch before the teacher sees it"):
        open_loader(teacher=recording, prepare=only_brighter)


def test_position_belongs_to_prepare(open_loader):
    state = open_loader(prepare=only_brighter).state_dict()
    open_loader(prepare=only_brighter).load_state_dict(state)
    with pytest.raises(StateError, match="prepare: 'only_brighter' → None"):
        open_loader().load_state_dict(state)


# What it says of itself


def test_attributes_of_a_torch_loader(open_loader):
    loader = open_loader(last_batch="drop")
    assert (loader.batch_size, loader.drop_last, len(loader.dataset), len(loader)) == (16, True, 96, 6)
    assert not open_loader().drop_last and loader.dataset.source is loader.source
    pixels, label = loader.dataset[3]
    assert pixels.shape == (8, 8, 3) and label == 3
    with pytest.raises(IndexError):
        loader.dataset[96]
    assert [label for _, label in loader.dataset] == loader.source.labels.tolist()


def test_repr_has_numbers(open_loader, folder, photo_folder):
    assert repr(ImageFolder(photo_folder)) == "ImageFolder(37 files, 3 classes)"
    assert repr(Arrays(folder / "unlabeled.npz")) == "Arrays(96 images, unlabeled)"
    assert repr(custom_sources.Digits()) == "digits(96 images, 10 classes)"
    assert repr(open_loader()) == (
        "KDDataLoader(Arrays(96 images, 10 classes), 8 x 8, no teacher, 6 batches of 16 an epoch, cpu)"
    )
