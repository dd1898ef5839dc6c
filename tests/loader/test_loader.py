"""Content of batches, lifetime of a loader, and `from_config`."""

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
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kd_pipeline.config.config import Config
from kd_pipeline.data import uniform
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.reader import INDEX
from kd_pipeline.data.settings import LoaderOptions, LoaderSettings
from kd_pipeline.data.sources import Arrays, FileList, ImageFolder, load_classes
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.loader import config_teacher
from kd_pipeline.loader.config_teacher import sample_images
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.streams import StreamSync
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
"""Classes of the photographs."""
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
    """`photo_net` as an ONNX file with class names."""
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
    """A teacher that records the addresses of its images."""

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


# Batches


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_teacher_reads_returned_buffer(open_loader, recorder, ahead):
    held = list(open_loader(teacher=recorder, ahead=ahead))
    assert [batch.images.data_ptr() for batch in held] == recorder.pointers
    assert len(set(recorder.pointers)) == 5


def test_rows_match_across_fields(open_loader, source, recorder):
    for batch in open_loader(teacher=recorder):
        assert batch.images.shape == (len(batch), *IMAGE_SHAPE) and batch.images.is_contiguous()
        assert batch.labels.tolist() == source.labels[batch.index.numpy()].tolist()
        for row in range(len(batch)):
            alone = recorder.teacher(batch.images[row : row + 1].clone())["logits"][0]
            torch.testing.assert_close(batch.teacher["logits"][row], alone, rtol=1e-4, atol=1e-5)


def test_rows_and_logits_differ(open_loader):
    batch = next(iter(open_loader(teacher=conv_teacher())))
    for field in (batch.images, batch.teacher["logits"]):
        assert len({row.numpy().tobytes() for row in field}) == 8


def test_shapes_and_dtypes(open_loader):
    for batch in open_loader(teacher=conv_teacher()):
        assert batch.images.dtype == torch.float32 and batch.teacher["logits"].dtype == torch.float32
        assert batch.labels.dtype == batch.index.dtype == torch.int64 and batch.valid.dtype == torch.bool
        assert batch.labels.shape == batch.index.shape == batch.valid.shape == (len(batch),)
        assert batch.teacher["logits"].shape == (len(batch), 10) and batch.teacher.keys() == {"logits", "features"}
        assert not any(tensor.requires_grad for tensor in fields(batch).values())


def test_held_batches_do_not_change(open_loader):
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


def test_batches_share_no_memory(open_loader):
    batches = [batch for _ in range(2) for batch in open_loader(teacher=conv_teacher(), ahead=2)]
    pointers = [tensor.data_ptr() for batch in batches for tensor in fields(batch).values()]
    assert len(set(pointers)) == len(pointers)


def test_batch_of_one_has_separate_fields(open_loader, source):
    for batch in open_loader(batch_size=1):
        batch.labels.add_(100)
        assert batch.index.item() in range(37) and batch.valid.item() is True
        assert batch.labels.item() == source.labels[batch.index.item()] + 100


def one_color_of(num_uniform: int, num_images: int) -> Arrays:
    """Images of which the first have a single color."""
    images = np.random.default_rng(0).integers(0, 256, (num_images, 40, 40, 3), dtype=np.uint8)
    images[:num_uniform] = 7
    return Arrays(images)


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=1.0)])
def test_images_of_one_color_are_counted(open_loader, mix):
    """Before they are mixed, and without padding."""
    loader = open_loader(EVAL, of=one_color_of(5, 20), last_batch="pad", shuffle=False, mix=mix)
    for _ in range(2):
        run(loader, 1)
        assert loader.num_uniform == 5
    next(iter(loader))  # an epoch that is left
    run(loader, 1)
    assert loader.num_uniform == 5


@pytest.mark.parametrize(("num_uniform", "is_reported"), [(0, False), (1, False), (2, True), (100, True)])
def test_many_images_of_one_color_are_reported_once(open_loader, caplog, num_uniform, is_reported):
    loader = open_loader(EVAL, of=one_color_of(num_uniform, 100))
    run(loader, 3)
    found = [record.message for record in caplog.records if "single color" in record.message]
    assert len(found) == is_reported
    if is_reported:
        assert found[0].startswith(f"{num_uniform} of 100 images of epoch 1 had a single color")


def test_images_of_one_color_are_reported_by_close(open_loader, caplog, monkeypatch):
    """If a GPU has not counted them by the end of the last epoch."""

    class Event:
        query = staticmethod(lambda: False)
        synchronize = staticmethod(lambda: None)

    monkeypatch.setattr(uniform, "_copy_to_host", lambda counts: (counts, Event()))
    loader = open_loader(EVAL, of=one_color_of(100, 100))
    run(loader, 1)
    assert "single color" not in caplog.text
    loader.close()
    assert "100 of 100 images of epoch 1 had a single color" in caplog.text


def test_teacher_changes_no_pixels(open_loader, recorder):
    with_teacher = [batch.images for batch in open_loader(teacher=recorder)]
    without = [batch.images for batch in open_loader()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_teacher, without, strict=True))


def test_half_precision_is_rounded_single_precision(open_loader):
    net = photo_net()
    teacher = PyTorchTeacher(net, image_shape=IMAGE_SHAPE, dtype=torch.float16)
    half = list(open_loader(TrainTransform(size=SIZE, dtype="float16"), teacher))
    single = list(open_loader(TrainTransform(size=SIZE)))
    for ours, theirs in zip(half, single, strict=True):
        assert ours.images.dtype == torch.float16 and ours.teacher["logits"].dtype == torch.float32
        torch.testing.assert_close(ours.images, theirs.images.half(), rtol=2e-3, atol=1e-6)


# Sources


def test_unlabeled_data_has_no_labels(open_loader, photo_folder):
    unlabeled = ImageFolder(photo_folder, labeled=False)
    loader = open_loader(of=unlabeled, teacher=conv_teacher())
    assert loader.classes is None
    for batch in loader:
        assert batch.labels is None and batch.teacher["logits"].shape == (len(batch), 10)


def test_file_list_equals_image_folder(open_loader, source, tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [{"path": source.name(n), "label": CLASSES[label]} for n, label in enumerate(source.labels)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loader = open_loader(of=FileList(path))
    assert loader.classes == CLASSES
    assert_same(run(loader, 1), run(open_loader(), 1))


def test_arrays_keep_pixels_and_labels(open_loader, photos):
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


# Properties and arguments


def test_length_classes_and_epoch(open_loader):
    loader = open_loader(last_batch="drop")
    assert (len(loader), loader.batch_size, loader.classes, loader.bad_samples) == (4, 8, CLASSES, ())
    for epoch in range(3):
        assert loader.epoch == epoch
        assert [loader.epoch for _ in loader] == [epoch] * len(loader)
    assert loader.epoch == 3
    assert len(open_loader(last_batch="keep")) == len(open_loader(last_batch="pad")) == 5


def test_device_names(open_loader):
    assert open_loader(device="cpu").device == open_loader(device=torch.device("cpu")).device == torch.device("cpu")
    has_gpu = torch.cuda.is_available()
    assert open_loader(device="auto").device == torch.device("cuda:0" if has_gpu else "cpu")
    for word in ("gpu", "", "cuda:x"):
        with pytest.raises(ConfigError, match=f"got '{word}'"):
            open_loader(device=word)
    with pytest.raises(ConfigError, match="cuda:99"):
        open_loader(device="cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_gpu_is_refused(open_loader):
    with pytest.raises(ConfigError, match="device 'cuda' is not available"):
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
def test_out_of_range_value_names_the_option(open_loader, name, value):
    with pytest.raises(ConfigError) as info:
        open_loader(**{name: value})
    assert name in str(info.value) and str(value) in str(info.value)


@pytest.mark.parametrize(
    ("option", "guess"), [("prefech", "prefetch"), ("shufle", "shuffle"), ("on_bad_samples", "on_bad_sample")]
)
def test_unknown_option_suggests_a_known_one(open_loader, option, guess):
    with pytest.raises(ConfigError, match=f"no option '{option}'; did you mean '{guess}'"):
        open_loader(**{option: 1})


def test_wrong_values_are_described(open_loader):
    for options, message in [
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load must be at most 1, got 1.5"),
        ({"on_bad_sample": "skip"}, "on_bad_sample must be 'raise' or 'substitute', got 'skip'"),
    ]:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            open_loader(**options)


def test_loader_options_are_loader_settings():
    options = get_type_hints(LoaderOptions)
    assert options.pop("device") == torch.device | str
    assert options == {
        name: field.annotation for name, field in LoaderSettings.model_fields.items() if name != "device"
    }
    assert LoaderOptions.__total__ is False and LoaderSettings.model_fields["device"].annotation is str


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=0.5)], ids=["plain", "mixed"])
def test_metadata_reaches_device_once_per_group(open_loader, monkeypatch, mix):
    copies = []
    to_device = StreamSync.to_device
    monkeypatch.setattr(StreamSync, "to_device", lambda sync, array: (copies.append(array), to_device(sync, array))[1])
    index = []
    for batch in open_loader(SMALL, mix=mix, ahead=0):
        assert batch.valid.dtype == torch.bool and batch.index.dtype == torch.int64
        index.append(batch.index)
    assert len(copies) < len(index)
    np.testing.assert_array_equal(np.concatenate([copy[INDEX] for copy in copies]), np.concatenate(index))


def test_batches_made_in_inference_mode_can_be_trained_on(open_loader):
    loader = open_loader(SMALL, ahead=0)
    weight = torch.ones((), requires_grad=True)
    with torch.inference_mode():
        iterator = iter(loader)
        next(iterator), next(iterator)  # the second is in a group with the third
    (weight * next(iterator).images).sum().backward()
    assert weight.grad is not None


# Teachers


def test_teacher_of_other_size_or_dtype_is_refused(open_loader):
    for transform in (TrainTransform(size=48), TrainTransform(size=SIZE, dtype="float16")):
        with pytest.raises(TeacherError, match="takes images"):
            open_loader(transform, conv_teacher())


def test_batch_above_teacher_maximum_is_refused(open_loader):
    teacher = PyTorchTeacher(photo_net(), image_shape=IMAGE_SHAPE, max_batch=7)
    with pytest.raises(TeacherError, match="takes 1 to 7 images at a time, got 8"):
        open_loader(teacher=teacher)


def test_classes_in_other_order_are_refused(open_loader, photo_folder, onnx):
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
def test_batches_before_failing_teacher_are_returned(open_loader, ahead):
    loader = open_loader(teacher=Failing(conv_teacher()), ahead=ahead)
    seen = 0
    with pytest.raises(TeacherError, match="out of memory"):
        for _ in loader:
            seen += 1
    assert seen == 2


# Lifetime


def test_close_twice_and_before_first_batch(open_loader):
    loader = open_loader()
    loader.close()
    loader.close()


def test_closed_loader_refuses_use(open_loader):
    loader = open_loader()
    state = loader.state_dict()
    loader.close()
    for use in (lambda: iter(loader), lambda: list(loader), lambda: loader.load_state_dict(state)):
        with pytest.raises(StateError, match="the loader is closed"):
            use()


def test_iterator_made_before_close_refuses_to_start(open_loader):
    loader = open_loader()
    iterator = iter(loader)
    loader.close()
    with pytest.raises(StateError):
        next(iterator)


def test_closing_within_loop_is_an_error(open_loader):
    loader = open_loader()
    with pytest.raises(StateError, match="the loader was closed"):
        for _ in loader:
            loader.close()


def test_state_dict_after_close(open_loader):
    loader = open_loader()
    list(islice(loader, 2))
    state = loader.state_dict()
    loader.close()
    assert loader.state_dict() == state


def test_only_newest_loop_continues(open_loader):
    loader = open_loader()
    old, new = iter(loader), iter(loader)
    next(old)
    next(new)
    with pytest.raises(StateError, match="in another loop"):
        next(old)
    assert sum(1 for _ in new) == len(loader) - 1


def test_two_loaders_side_by_side(open_loader):
    train, val = open_loader(TRAIN), open_loader(EVAL, batch_size=4, shuffle=False)
    both = list(zip(train, val, strict=False))
    assert_same([fields(ours) for ours, _ in both], run(open_loader(TRAIN), 1))
    assert_same([fields(theirs) for _, theirs in both], run(open_loader(EVAL, batch_size=4, shuffle=False), 1)[:5])


def test_with_closes_after_break_and_error(source):
    with KDDataLoader(source, SMALL, batch_size=8) as left_early:
        for _ in left_early:
            break
    with pytest.raises(ZeroDivisionError), KDDataLoader(source, SMALL, batch_size=8) as failed:
        for _ in failed:
            raise ZeroDivisionError
    for loader in (left_early, failed):
        with pytest.raises(StateError, match="closed"):
            iter(loader)


def test_loader_usable_after_error_in_loop(open_loader):
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


def test_closed_loaders_keep_no_threads_or_files(source):
    teacher = conv_teacher()
    closed = [use_and_close(source, teacher=teacher) for _ in range(2)]
    before = threads_and_files()
    closed += [use_and_close(source, teacher=teacher) for _ in range(20)]
    assert threads_and_files() == before and len(closed) == 22


def test_closed_loaders_with_bad_file_keep_no_threads_or_files(photo_folder, tmp_path):
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    path = Path(ImageFolder(root).name(2))
    path.write_bytes(path.read_bytes()[:1000])
    options = {"shuffle": False, "on_bad_sample": "substitute", "max_bad_fraction": 0.1}
    closed = [use_and_close(ImageFolder(root), **options) for _ in range(2)]
    before = threads_and_files()
    closed += [use_and_close(ImageFolder(root), **options) for _ in range(5)]
    assert all([sample.index for sample in loader.bad_samples] == [2] for loader in closed)
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


@pytest.mark.slow
def test_process_exit_without_close(photo_folder):
    process = start(photo_folder, LEFT_OPEN)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "end\n", "")


@pytest.mark.slow
def test_interrupted_process_closes_loader(photo_folder):
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
    """`config(...)` has the photographs as training data, two of them as validation data, and the teacher."""
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


def test_from_config_equals_constructor(config, source, onnx):
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=onnx), image_shape=IMAGE_SHAPE)
    plain = KDDataLoader(source, SMALL, teacher, batch_size=8, seed=3, shuffle=True, last_batch="drop")
    with KDDataLoader.from_config(config()) as loader, plain:
        assert_same(run(loader), run(plain))


def test_defaults_of_training_and_validation(config):
    with KDDataLoader.from_config(config(), "train") as train, KDDataLoader.from_config(config(), "val") as val:
        assert {len(batch) for batch in train} == {8} and len(train) == 4
        assert [batch.index.tolist() for _ in range(2) for batch in val] == [[0, 1]] * 2


def test_split_overrides_defaults(config):
    settings = config(train={"shuffle": False, "last_batch": "pad"})
    with KDDataLoader.from_config(settings) as loader:
        batches = list(loader)
    assert [int(index) for batch in batches for index in batch.index] == [*range(37), 0, 1, 2]


def test_validation_has_class_order_of_training(config):
    with KDDataLoader.from_config(config(), "val") as loader:
        (batch,) = loader
        assert loader.classes == CLASSES and batch.labels.tolist() == [1, 2]


def test_classes_are_saved_by_training(config, tmp_path):
    with KDDataLoader.from_config(config(), "val"):
        assert not (tmp_path / "run").exists()
    with KDDataLoader.from_config(config()):
        assert load_classes(tmp_path / "run" / "classes.json") == CLASSES


def test_nothing_written_without_run_dir(config, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with KDDataLoader.from_config(config(without=("run_dir",))) as loader:
        run(loader, 1)
    assert list(folder.iterdir()) == [] and not (tmp_path / "run").exists()


def test_config_teacher_runs_on_training_split_only(config):
    with KDDataLoader.from_config(config(), "val") as loader:
        assert loader.teacher is None and next(iter(loader)).teacher == {}
    with KDDataLoader.from_config(config()) as loader:
        batch = next(iter(loader))
        assert batch.teacher["logits"].shape == (8, 3)
    with pytest.raises(TeacherError, match="closed"):
        loader.teacher(batch.images)


def test_given_teacher_stays_open(config):
    given = conv_teacher()
    for split, num_images in [("train", 8), ("val", 2)]:
        with KDDataLoader.from_config(config(), split, teacher=given) as loader:
            batch = next(iter(loader))
            assert loader.teacher is given and batch.teacher["logits"].shape == (num_images, 10)
        given(batch.images)


def test_config_without_teacher(config):
    with KDDataLoader.from_config(config(without=("teacher",))) as loader:
        assert next(iter(loader)).teacher == {}


def test_no_teacher_instead_of_the_configs(config):
    with KDDataLoader.from_config(config(), teacher=None) as loader:
        assert loader.teacher is None and next(iter(loader)).teacher == {}


def test_arguments_replace_those_of_the_config(config, tmp_path):
    changes = {"batch_size": 4, "seed": 8, "shuffle": False, "last_batch": "pad", "run_dir": None}
    described = config(batch_size=4, train={"shuffle": False, "last_batch": "pad"}).model_copy(update={"seed": 8})
    with KDDataLoader.from_config(config(), **changes) as loader:
        assert not (tmp_path / "run").exists()
        found = run(loader, 1)
    with KDDataLoader.from_config(described) as loader:
        assert_same(found, run(loader, 1))


def test_config_teacher_closed_if_loader_fails(config, monkeypatch):
    opened = []

    def open_and_remember(*args: Any, **options: Any) -> Teacher:
        opened.append(open_teacher(*args, **options))
        return opened[0]

    monkeypatch.setattr(config_teacher, "open_teacher", open_and_remember)
    with pytest.raises(DataError, match="do not fill a batch of 64"):
        KDDataLoader.from_config(config(batch_size=64))
    with pytest.raises(TeacherError, match="closed"):
        opened[0](torch.zeros(1, *IMAGE_SHAPE))


@pytest.mark.parametrize(
    ("split", "key"), [("test", "data.test"), ("tset", "data.more.tset"), ("batch_size", "data.more.batch_size")]
)
def test_unknown_split_lists_existing_ones(config, split, key):
    more = {"sketches": config().data.val.model_dump()}
    with pytest.raises(ConfigError, match=f"no split '{split}'; add {key} .* existing one: train, val, sketches$"):
        KDDataLoader.from_config(config(more=more), split)


def test_further_splits_by_name(config):
    sketches = config().data.val.model_dump()
    settings = config(more={"sketches": sketches, "reversed": {**sketches, "last_batch": "drop"}})
    with (
        KDDataLoader.from_config(settings, "sketches") as loader,
        KDDataLoader.from_config(config(), "val") as val,
    ):
        assert loader.classes == CLASSES and loader.teacher is None
        assert_same(run(loader, 1), run(val, 1))
    with pytest.raises(DataError, match="do not fill a batch"):
        KDDataLoader.from_config(settings, "reversed")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_further_split_cannot_be_called_train(config, name):
    with pytest.raises(ValidationError, match=f"more must not have a split '{name}'"):
        config(more={name: config().data.val.model_dump()})


def test_config_with_mix_augment_and_repeats(config, source):
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
def test_sample_images_are_unmixed_and_not_repeated(config, split):
    changed = {"mix": {"mixup": 0.2}, "repeats": 2, "shuffle": True}
    plain, mixed = ({**config().data.val.model_dump(), **more} for more in ({"shuffle": True}, changed))
    wanted = sample_images(config(more={"sketches": plain}), split, num_images=2)
    found = sample_images(config(more={"sketches": mixed}, train=changed), split, num_images=2)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch_size", [1, 5, 30])
def test_sample_images_count_for_any_batch_size(config, photo_folder, tmp_path, batch_size):
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
    found = sample_images(
        described.model_copy(update={"data": data}), num_images=7
    )  # and reads none of the missing files
    with KDDataLoader.from_config(described) as loader:
        assert torch.equal(found, next(iter(loader)).images[:7])


def test_unknown_validation_class_is_refused(config, tmp_path):
    settings = config()
    shutil.copytree(tmp_path / "val" / "sky", tmp_path / "val" / "sun")
    with pytest.raises(DataError, match="not among the 3 classes: sun"):
        KDDataLoader.from_config(settings, "val")


def test_config_with_unlabeled_half_precision(config, photo_folder):
    train = {
        "source": {"kind": "image_folder", "root": photo_folder, "labeled": False},
        "transform": {"preset": "train", "size": SIZE, "dtype": "float16"},
    }
    with KDDataLoader.from_config(config(train=train, without=("teacher",))) as loader:
        batch = next(iter(loader))
        assert batch.labels is None and batch.images.dtype == torch.float16


def test_run_dir_is_read_like_a_setting(photo_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(photo_folder, tmp_path / "photos")
    next((tmp_path / "photos").rglob("*.jpg")).write_bytes(b"broken")
    options = {"batch_size": 64, "device": "cpu", "on_bad_sample": "substitute"}
    source = ImageFolder("~/photos")
    with KDDataLoader(source, EVAL, run_dir="~/run", **options) as loader:
        list(loader)
    assert (tmp_path / "run" / "bad_samples.jsonl").is_file()
    with pytest.raises(ConfigError, match=r"has the variable \$HOME"):
        KDDataLoader(source, EVAL, run_dir="$HOME/run", **options)
