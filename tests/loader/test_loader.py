"""What a batch holds, how a loader lives and ends, and what `from_config` makes of a config."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import kd_pipeline.loader.loader
from kd_pipeline.config.config import Config
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.sources.base import Arrays, FileList, ImageFolder, load_classes
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader, sample_images
from kd_pipeline.loader.streams import CpuLane
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import IMAGE_SHAPE
from tests.streams import (
    EVAL,
    SIZE,
    TRAIN,
    assert_same,
    conv_teacher,
    fields,
    run,
)

CLASSES = ("flower", "roof", "sky")
"""Those of the photographs."""
SMALL = TrainTransform(size=SIZE)
ROOT = Path(__file__).parents[2]


def photo_net() -> nn.Module:
    """A convolution and a linear head for the three classes of the photographs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory) -> Path:
    """`photo_net` as a file that knows its classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    return export_onnx(photo_net(), path, image_shape=IMAGE_SHAPE, classes=CLASSES, max_batch=8)


@pytest.fixture(scope="module")
def source(photo_folder) -> ImageFolder:
    return ImageFolder(photo_folder)


@pytest.fixture
def open_loader(source) -> Iterator[Callable[..., KDDataLoader]]:
    """Opens loaders over the photographs, and closes them after the test."""
    opened = []

    def make(transform=SMALL, teacher=None, *, of=source, **options: Any) -> KDDataLoader:
        opened.append(KDDataLoader(of, transform, teacher, **{"batch_size": 8, "seed": 5, **options}))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


class Recorder(Teacher):
    """Another teacher that remembers where the images were that it was given."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(
            backend=teacher.backend,
            precision=teacher.precision,
            device=teacher.device,
            images=teacher.images,
            outputs=teacher.outputs,
            max_batch=teacher.max_batch,
            classes=teacher.classes,
            fingerprint=teacher.fingerprint,
        )
        self.teacher = teacher
        self.pointers: list[int] = []

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        self.pointers.append(images.data_ptr())
        return self.teacher(images)

    def _release(self) -> None:
        self.teacher.close()


@pytest.fixture(params=["pytorch", "openvino", "onnxruntime"])
def recorder(request, onnx) -> Iterator[Recorder]:
    """The same teacher in every runtime."""
    runs_module = request.param == "pytorch"
    if request.param == "openvino":
        pytest.importorskip("openvino")
    settings = TeacherSettings(backend=request.param, onnx=None if runs_module else onnx, max_batch=16)
    module = photo_net() if runs_module else None
    teacher = Recorder(open_teacher(settings, module=module, image_shape=IMAGE_SHAPE))
    yield teacher
    teacher.close()


# What a batch holds


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_teacher_reads_the_very_buffer_that_is_handed_out(open_loader, recorder, ahead):
    held = list(open_loader(teacher=recorder, ahead=ahead))
    assert [batch.images.data_ptr() for batch in held] == recorder.pointers
    assert len(set(recorder.pointers)) == 5


def test_every_row_is_one_sample_in_all_fields(open_loader, source, recorder):
    for batch in open_loader(teacher=recorder):
        assert batch.images.shape == (len(batch), *IMAGE_SHAPE) and batch.images.is_contiguous()
        assert batch.labels.tolist() == source.labels[batch.index.numpy()].tolist()
        for row in range(len(batch)):
            alone = recorder.teacher(batch.images[row : row + 1].clone())["logits"][0]
            torch.testing.assert_close(batch.teacher["logits"][row], alone, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_batch_are_different_and_so_are_their_logits(open_loader):
    batch = next(iter(open_loader(teacher=conv_teacher())))
    for field in (batch.images, batch.teacher["logits"]):
        assert len({row.numpy().tobytes() for row in field}) == 8


def test_shapes_and_types_are_as_promised(open_loader):
    for batch in open_loader(teacher=conv_teacher()):
        assert batch.images.dtype == torch.float32 and batch.teacher["logits"].dtype == torch.float32
        assert batch.labels.dtype == batch.index.dtype == torch.int64 and batch.valid.dtype == torch.bool
        assert batch.labels.shape == batch.index.shape == batch.valid.shape == (len(batch),)
        assert batch.teacher["logits"].shape == (len(batch), 10) and batch.teacher.keys() == {"logits", "features"}
        assert not any(tensor.requires_grad for tensor in fields(batch).values())


def test_batches_that_are_held_do_not_change(open_loader):
    held, copies = [], []
    loader = open_loader(TRAIN, conv_teacher(), ahead=2)
    for batch in islice((batch for _ in range(6) for batch in loader), 25):
        held.append(fields(batch))
        copies.append({name: tensor.clone() for name, tensor in fields(batch).items()})
    assert len(held) == 25
    assert_same(held, copies)
    loader.close()
    gc.collect()
    assert_same(held, copies)


def test_one_batch_is_never_a_part_of_another(open_loader):
    batches = [batch for _ in range(2) for batch in open_loader(teacher=conv_teacher(), ahead=2)]
    pointers = [tensor.data_ptr() for batch in batches for tensor in fields(batch).values()]
    assert len(set(pointers)) == len(pointers)


def test_a_batch_of_one_keeps_its_fields_apart(open_loader, source):
    for batch in open_loader(batch_size=1):
        batch.labels.add_(100)
        assert batch.index.item() in range(37) and batch.valid.item() is True
        assert batch.labels.item() == source.labels[batch.index.item()] + 100


def test_a_teacher_changes_no_pixels(open_loader, recorder):
    with_teacher = [batch.images for batch in open_loader(teacher=recorder)]
    without = [batch.images for batch in open_loader()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_teacher, without, strict=True))


def test_half_precision_images_are_those_of_single_precision_rounded(open_loader):
    net = photo_net()
    teacher = PyTorchTeacher(net, image_shape=IMAGE_SHAPE, dtype=torch.float16)
    half = list(open_loader(TrainTransform(size=SIZE, dtype="float16"), teacher))
    single = list(open_loader(TrainTransform(size=SIZE)))
    for ours, theirs in zip(half, single, strict=True):
        assert ours.images.dtype == torch.float16 and ours.teacher["logits"].dtype == torch.float32
        torch.testing.assert_close(ours.images, theirs.images.half(), rtol=2e-3, atol=1e-6)


# Sources


def test_unlabeled_data_gives_no_labels(open_loader, photo_folder):
    unlabeled = ImageFolder(photo_folder, labeled=False)
    loader = open_loader(of=unlabeled, teacher=conv_teacher())
    assert loader.classes is None
    for batch in loader:
        assert batch.labels is None and batch.teacher["logits"].shape == (len(batch), 10)


def test_a_list_of_the_same_files_gives_the_same_batches(open_loader, source, tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [{"path": source.name(n), "label": CLASSES[label]} for n, label in enumerate(source.labels)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loader = open_loader(of=FileList(path))
    assert loader.classes == CLASSES
    assert_same(run(loader, 1), run(open_loader(), 1))


def test_arrays_give_their_own_pixels_and_labels(open_loader, photos):
    pixels = np.stack([photo[:SIZE, start : start + SIZE] for start in range(0, 300, 25) for photo in photos])
    labels = np.arange(len(pixels)) % 5
    plain = EvalTransform(size=SIZE, resize=SIZE, mean=(0, 0, 0), std=(1, 1, 1))
    loader = open_loader(plain, of=Arrays(pixels, labels), shuffle=True)
    assert loader.classes is None
    for batch in loader:
        index = batch.index.numpy()
        wanted = torch.from_numpy(pixels[index]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(batch.images, wanted, rtol=0, atol=1e-5)
        assert batch.labels.tolist() == labels[index].tolist()


# What a loader says about itself


def test_length_classes_and_epoch_are_those_of_the_loops(open_loader):
    loader = open_loader(last_batch="drop")
    assert (len(loader), loader.batch_size, loader.classes, loader.bad_samples) == (4, 8, CLASSES, [])
    for epoch in range(3):
        assert loader.epoch == epoch
        assert [loader.epoch for _ in loader] == [epoch] * len(loader)
    assert loader.epoch == 3
    assert len(open_loader(last_batch="keep")) == len(open_loader(last_batch="pad")) == 5


def test_the_device_is_a_word_that_is_understood_or_refused(open_loader):
    assert open_loader(device="cpu").device == open_loader(device=torch.device("cpu")).device == torch.device("cpu")
    has_gpu = torch.cuda.is_available()
    assert open_loader(device="auto").device == torch.device("cuda:0" if has_gpu else "cpu")
    for word in ("gpu", "", "cuda:x"):
        with pytest.raises(ConfigError, match=f"got '{word}'"):
            open_loader(device=word)
    with pytest.raises(ConfigError, match="cuda:99"):
        open_loader(device="cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(open_loader):
    with pytest.raises(ConfigError, match="device 'cuda' is not there"):
        open_loader(device="cuda")


OUT_OF_RANGE = {
    "batch_size": [0, -1],
    "seed": [-1, 2**64],
    "prefetch": [0, -1],
    "ahead": [-1],
    "num_threads": [0, -1],
    "last_batch": ["leave"],
    "on_bad_sample": ["skip"],
    "decode": ["half", "FULL"],
    "max_bad_fraction": [-0.1, 1.1],
    "max_pixels": [0, -1],
    "hw_decoder_load": [-0.1, 1.1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values], ids=str
)
def test_a_value_out_of_range_is_refused_at_once_by_name(open_loader, name, value):
    with pytest.raises(ConfigError) as info:
        open_loader(**{name: value})
    assert name in str(info.value) and str(value) in str(info.value)


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=0.5)], ids=["plain", "mixed"])
def test_everything_that_is_said_of_a_batch_goes_to_the_device_in_one_copy(open_loader, monkeypatch, mix):
    uploads = []
    upload = CpuLane.upload
    monkeypatch.setattr(CpuLane, "upload", lambda lane, numbers: (uploads.append(numbers), upload(lane, numbers))[1])
    for number, batch in enumerate(open_loader(SMALL, mix=mix, ahead=0), start=1):
        assert len(uploads) == number
        assert batch.valid.dtype == torch.bool and batch.index.dtype == torch.int64


# Teachers that do not fit


def test_a_teacher_for_another_size_or_type_is_refused_at_once(open_loader):
    for transform in (TrainTransform(size=48), TrainTransform(size=SIZE, dtype="float16")):
        with pytest.raises(TeacherError, match="takes images"):
            open_loader(transform, conv_teacher())


def test_a_batch_above_the_teachers_maximum_is_refused_at_once(open_loader):
    teacher = PyTorchTeacher(photo_net(), image_shape=IMAGE_SHAPE, max_batch=7)
    with pytest.raises(TeacherError, match="takes 1 to 7 images at a time, got 8"):
        open_loader(teacher=teacher)


def test_a_teacher_with_the_classes_in_another_order_is_refused_with_the_first_difference(
    open_loader, photo_folder, onnx
):
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=onnx), image_shape=IMAGE_SHAPE)
    open_loader(teacher=teacher)
    other = ImageFolder(photo_folder, classes=("flower", "sky", "roof"))
    with pytest.raises(TeacherError, match="where the data has 'sky' the teacher has 'roof'"):
        open_loader(of=other, teacher=teacher)
    more = ImageFolder(photo_folder, classes=(*CLASSES, "water"))
    with pytest.raises(TeacherError, match="3 classes are not the data's 4"):
        open_loader(of=more, teacher=teacher)


class Failing(Recorder):
    """Fails at its third batch."""

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        if len(self.pointers) == 2:
            raise RuntimeError("out of memory")
        return super()._infer(images)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_before_one_at_which_the_teacher_fails_are_handed_out_first(open_loader, ahead):
    loader = open_loader(teacher=Failing(conv_teacher()), ahead=ahead)
    seen = 0
    with pytest.raises(TeacherError, match="out of memory"):
        for _ in loader:
            seen += 1
    assert seen == 2


# How a loader lives and ends


def test_a_loader_may_be_closed_twice_and_before_its_first_batch(open_loader):
    loader = open_loader()
    loader.close()
    loader.close()


def test_a_closed_loader_is_not_iterated_loaded_or_moved(open_loader):
    loader = open_loader()
    state = loader.state_dict()
    loader.close()
    for use in (lambda: iter(loader), lambda: list(loader), lambda: loader.load_state_dict(state)):
        with pytest.raises(StateError, match="the loader is closed"):
            use()


def test_a_loop_that_was_prepared_before_close_does_not_begin_after_it(open_loader):
    loader = open_loader()
    iterator = iter(loader)
    loader.close()
    with pytest.raises(StateError):
        next(iterator)


def test_a_loop_whose_loader_is_closed_says_so(open_loader):
    loader = open_loader()
    with pytest.raises(StateError, match="the loader was closed"):
        for _ in loader:
            loader.close()


def test_the_position_can_be_saved_after_close(open_loader):
    loader = open_loader()
    list(islice(loader, 2))
    state = loader.state_dict()
    loader.close()
    assert loader.state_dict() == state


def test_only_the_newest_of_two_loops_goes_on(open_loader):
    loader = open_loader()
    old, new = iter(loader), iter(loader)
    next(old)
    next(new)
    with pytest.raises(StateError, match="in another loop"):
        next(old)
    assert sum(1 for _ in new) == len(loader) - 1


def test_two_loaders_live_side_by_side(open_loader):
    train, val = open_loader(TRAIN), open_loader(EVAL, batch_size=4, shuffle=False)
    both = list(zip(train, val, strict=False))
    assert_same([fields(ours) for ours, _ in both], run(open_loader(TRAIN), 1))
    assert_same([fields(theirs) for _, theirs in both], run(open_loader(EVAL, batch_size=4, shuffle=False), 1)[:5])


def test_with_closes_the_loader_after_break_and_after_an_error(source):
    with KDDataLoader(source, SMALL, batch_size=8) as left_early:
        for _ in left_early:
            break
    with pytest.raises(ZeroDivisionError), KDDataLoader(source, SMALL, batch_size=8) as failed:
        for _ in failed:
            raise ZeroDivisionError
    for loader in (left_early, failed):
        with pytest.raises(StateError, match="closed"):
            iter(loader)


def test_an_error_in_the_loop_leaves_the_loader_usable(open_loader):
    loader = open_loader()
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError
    loader.load_state_dict(loader.state_dict())
    assert sum(1 for _ in loader) == 4


def use_and_close(source, **options: Any) -> KDDataLoader:
    with KDDataLoader(source, SMALL, batch_size=8, **options) as loader:
        list(islice(loader, 3))
    return loader


def threads_and_files() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_closed_loaders_keep_no_threads_and_no_files(source):
    teacher = conv_teacher()
    closed = [use_and_close(source, teacher=teacher) for _ in range(2)]
    before = threads_and_files()
    closed += [use_and_close(source, teacher=teacher) for _ in range(20)]
    assert threads_and_files() == before and len(closed) == 22


def test_closed_loaders_that_met_a_bad_file_keep_no_threads_and_no_files(photo_folder, tmp_path):
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    path = Path(ImageFolder(root).name(2))
    path.write_bytes(path.read_bytes()[:1000])
    options = {"shuffle": False, "on_bad_sample": "substitute", "max_bad_fraction": 0.1}
    closed = [use_and_close(ImageFolder(root), **options) for _ in range(2)]
    before = threads_and_files()
    closed += [use_and_close(ImageFolder(root), **options) for _ in range(5)]
    assert all(loader.bad_samples == [2] for loader in closed)
    assert threads_and_files() == before


SCRIPT = """
import signal, sys
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader import KDDataLoader
from tests.streams import conv_teacher

signal.signal(signal.SIGINT, signal.default_int_handler)
loader = KDDataLoader(ImageFolder(sys.argv[1]), TrainTransform(size=32), conv_teacher(), batch_size=8)
"""
LEFT_OPEN = "next(iter(loader)); iterator = iter(loader); next(iterator); print('end', flush=True)"
ENDLESS = """
try:
    with loader:
        while True:
            for batch in loader: print('batch', flush=True)
except KeyboardInterrupt:
    try: iter(loader)
    except Exception as error: print(type(error).__name__, error)
"""


def start(photo_folder, script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT + script, str(photo_folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_process_that_ends_in_mid_loop_without_close_ends_well(photo_folder):
    process = start(photo_folder, LEFT_OPEN)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "end\n", "")


def test_a_process_that_is_interrupted_in_mid_loop_closes_its_loader_and_ends_well(photo_folder):
    process = start(photo_folder, ENDLESS)
    assert process.stdout is not None
    for _ in range(7):
        assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("StateError the loader is closed; make a new one\n")


# From a config


@pytest.fixture
def config(photo_folder, onnx, tmp_path) -> Callable[..., Config]:
    """`config(...)` describes the photographs as training data, a tenth of them as validation data, and the teacher."""
    val = tmp_path / "val"
    for number, name in enumerate(CLASSES[1:]):  # without the first class
        (val / name).mkdir(parents=True)
        shutil.copy(sorted((photo_folder / name).iterdir())[number], val / name)

    def make(*, without: tuple[str, ...] = (), train: dict[str, Any] | None = None, **data: Any) -> Config:
        folder = {"kind": "image_folder", "root": photo_folder}
        settings: dict[str, Any] = {
            "seed": 3,
            "run_dir": tmp_path / "run",
            "data": {
                "batch_size": 8,
                "device": "cpu",
                "train": {"source": folder, "transform": {"preset": "train", "size": SIZE}, **(train or {})},
                "val": {
                    "source": {"kind": "image_folder", "root": val},
                    "transform": {"preset": "eval", "size": SIZE},
                },
                **data,
            },
            "teacher": {"backend": "onnxruntime", "onnx": onnx},
        }
        for name in without:
            settings.pop(name, None)
            settings["data"].pop(name, None)
        return Config.model_validate(settings)

    return make


def test_a_config_makes_the_loader_that_it_describes(config, source, onnx):
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=onnx), image_shape=IMAGE_SHAPE)
    plain = KDDataLoader(source, SMALL, teacher, batch_size=8, seed=3, shuffle=True, last_batch="drop")
    with KDDataLoader.from_config(config()) as loader, plain:
        assert_same(run(loader), run(plain))


def test_training_shuffles_and_drops_and_validation_does_neither(config):
    with KDDataLoader.from_config(config(), "train") as train, KDDataLoader.from_config(config(), "val") as val:
        assert {len(batch) for batch in train} == {8} and len(train) == 4
        assert [batch.index.tolist() for _ in range(2) for batch in val] == [[0, 1]] * 2


def test_a_split_may_say_otherwise(config):
    settings = config(train={"shuffle": False, "last_batch": "pad"})
    with KDDataLoader.from_config(settings) as loader:
        batches = list(loader)
    assert [int(index) for batch in batches for index in batch.index] == [*range(37), 0, 1, 2]


def test_validation_takes_the_class_order_of_training(config):
    with KDDataLoader.from_config(config(), "val") as loader:
        (batch,) = loader
        assert loader.classes == CLASSES and batch.labels.tolist() == [1, 2]


def test_the_classes_of_training_are_saved(config, tmp_path):
    with KDDataLoader.from_config(config(), "val"):
        assert not (tmp_path / "run").exists()
    with KDDataLoader.from_config(config()):
        assert load_classes(tmp_path / "run" / "classes.json") == CLASSES


def test_nothing_is_written_without_a_run_dir(config, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with KDDataLoader.from_config(config(without=("run_dir",))) as loader:
        run(loader, 1)
    assert list(folder.iterdir()) == [] and not (tmp_path / "run").exists()


def test_the_configs_teacher_teaches_the_training_data_only_and_ends_with_the_loader(config):
    with KDDataLoader.from_config(config(), "val") as loader:
        assert loader.teacher is None and next(iter(loader)).teacher == {}
    with KDDataLoader.from_config(config()) as loader:
        batch = next(iter(loader))
        assert batch.teacher["logits"].shape == (8, 3)
    with pytest.raises(TeacherError, match="closed"):
        loader.teacher(batch.images)


def test_a_given_teacher_replaces_the_configs_and_stays_open(config):
    given = conv_teacher()
    for split, num_images in [("train", 8), ("val", 2)]:
        with KDDataLoader.from_config(config(), split, teacher=given) as loader:
            batch = next(iter(loader))
            assert loader.teacher is given and batch.teacher["logits"].shape == (num_images, 10)
        given(batch.images)


def test_a_config_without_a_teacher_makes_a_loader_without_one(config):
    with KDDataLoader.from_config(config(without=("teacher",))) as loader:
        assert next(iter(loader)).teacher == {}


def test_the_configs_teacher_is_closed_when_the_loader_cannot_be_made(config, monkeypatch):
    opened = []

    def open_and_remember(*args: Any, **options: Any) -> Teacher:
        opened.append(open_teacher(*args, **options))
        return opened[0]

    monkeypatch.setattr(kd_pipeline.loader.loader, "open_teacher", open_and_remember)
    with pytest.raises(DataError, match="no whole batch of 64"):
        KDDataLoader.from_config(config(batch_size=64))
    with pytest.raises(TeacherError, match="closed"):
        opened[0](torch.zeros(1, *IMAGE_SHAPE))


@pytest.mark.parametrize(
    ("split", "key"), [("test", "data.test"), ("tset", "data.more.tset"), ("batch_size", "data.more.batch_size")]
)
def test_a_split_that_is_not_there_is_refused_by_name_with_those_that_are(config, split, key):
    more = {"sketches": config().data.val.model_dump()}
    with pytest.raises(ConfigError, match=f"no split '{split}'; add {key} .* there: train, val, sketches$"):
        KDDataLoader.from_config(config(more=more), split)


def test_a_config_may_have_more_splits_by_names_of_their_own(config):
    sketches = config().data.val.model_dump()
    settings = config(more={"sketches": sketches, "reversed": {**sketches, "last_batch": "drop"}})
    with (
        KDDataLoader.from_config(settings, "sketches") as loader,
        KDDataLoader.from_config(config(), "val") as val,
    ):
        assert loader.classes == CLASSES and loader.teacher is None
        assert_same(run(loader, 1), run(val, 1))
    with pytest.raises(DataError, match="no whole batch"):
        KDDataLoader.from_config(settings, "reversed")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_further_split_may_not_take_the_name_of_a_known_one(config, name):
    with pytest.raises(ValidationError, match=f"more must not have a split '{name}'"):
        config(more={name: config().data.val.model_dump()})


def test_a_config_can_ask_for_mixing_automatic_augmentation_and_repeats(config, source):
    transform = {"preset": "train", "size": SIZE, "auto_augment": {"kind": "trivialaugment"}}
    mix = {"mixup": 0.4, "switch": 0.3}
    plain = KDDataLoader(
        source,
        TrainTransform.model_validate(transform),
        mix=MixSettings.model_validate(mix),
        repeats=2,
        batch_size=8,
        seed=3,
        last_batch="drop",
    )
    settings = config(train={"transform": transform, "mix": mix, "repeats": 2}, without=("teacher",))
    with KDDataLoader.from_config(settings) as loader, plain:
        assert_same(run(loader), run(plain))
        assert loader.state_dict() == plain.state_dict()


@pytest.mark.parametrize("split", ["train", "sketches"])
def test_the_samples_for_a_teacher_are_neither_mixed_nor_repeated(config, split):
    changed = {"mix": {"mixup": 0.2}, "repeats": 2, "shuffle": True}
    plain, mixed = ({**config().data.val.model_dump(), **more} for more in ({"shuffle": True}, changed))
    wanted = sample_images(config(more={"sketches": plain}), split, num_images=2)
    found = sample_images(config(more={"sketches": mixed}, train=changed), split, num_images=2)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch_size", [1, 5, 30])
def test_the_samples_for_a_teacher_are_as_many_as_asked_whatever_the_runs_batches_are(
    config, photo_folder, tmp_path, batch_size
):
    names = sorted(str(path) for path in photo_folder.rglob("*.jpg"))[:10] + [str(tmp_path / "missing.jpg")] * 20
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    train = {
        "source": {"kind": "file_list", "path": tmp_path / "list.csv"},
        "transform": {"preset": "train", "size": SIZE},
        "shuffle": False,
        "last_batch": "drop",
    }
    described = config(train=train, without=("teacher",))
    data = described.data.model_copy(update={"batch_size": batch_size})
    found = sample_images(described.model_copy(update={"data": data}), num_images=7)  # and none that is missing is met
    with KDDataLoader.from_config(described) as loader:
        assert torch.equal(found, next(iter(loader)).images[:7])


def test_a_validation_class_that_training_does_not_know_is_refused(config, tmp_path):
    settings = config()
    shutil.copytree(tmp_path / "val" / "sky", tmp_path / "val" / "sun")
    with pytest.raises(DataError, match="not among the 3 classes: sun"):
        KDDataLoader.from_config(settings, "val")


def test_a_config_can_ask_for_unlabeled_half_precision_data(config, photo_folder):
    train = {
        "source": {"kind": "image_folder", "root": photo_folder, "labeled": False},
        "transform": {"preset": "train", "size": SIZE, "dtype": "float16"},
    }
    with KDDataLoader.from_config(config(train=train, without=("teacher",))) as loader:
        batch = next(iter(loader))
        assert batch.labels is None and batch.images.dtype == torch.float16
