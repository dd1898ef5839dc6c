"""Training with loaders of this library as objects, their teachers, and teachers of several inputs."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.batch_loader import BatchLoader
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.workflows._record import record
from kd_pipeline.workflows._train import train
from tests.training import tiny_run
from tests.workflows.objects import EPOCHS, LR, ROWS, assert_same, batches, config, network, plain_loop, run, teacher

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def dali_loader(of_teacher: Any = None, *, start: int = 0, num_rows: int = 96) -> KDDataLoader:
    """The digits, shuffled by a seed."""
    digits = load_digits()
    chosen = slice(start, start + num_rows)
    images = (digits.images[chosen, ..., None] * 255 / 16).round().astype(np.uint8).repeat(3, axis=-1)
    source = Arrays(images, digits.target[chosen])
    return KDDataLoader(
        source, EvalTransform(size=8, resize=8), of_teacher, batch_size=ROWS, seed=3, num_threads=1, device="cpu"
    )


def pairs(loader: KDDataLoader) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Images and labels of each epoch."""

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            assert batch.labels is not None
            yield batch.images, batch.labels

    return epoch


@pytest.fixture(scope="module")
def expected() -> nn.Module:
    """The student of a plain loop over the same batches."""
    with dali_loader() as loader:
        return plain_loop(pairs(loader))


@pytest.mark.parametrize("where", ["argument", "loader"])
def test_loader_of_dali(tmp_path: Path, expected: nn.Module, where: str) -> None:
    student, of_teacher = network(), teacher()
    with dali_loader(of_teacher if where == "loader" else None) as loader, dali_loader(start=200) as validation:
        given = {"train_batches": loader, "validation": {"test": validation}, "teacher": of_teacher}
        if where == "loader":
            del given["teacher"]
        result = train(config(tmp_path / "run"), student=student, **given)
    assert_same(student, expected)
    assert result.evaluations["test"].num_samples == 96


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A config with augmented images, and the outputs of its teacher for them."""
    folder = tmp_path_factory.mktemp("recording")
    tiny_run.write_digits(folder)
    settings = tiny_run.settings(folder, "run")
    return settings, record(settings, plugins=["tests.training.networks"])


@pytest.mark.parametrize("where", ["argument", "loader"])
def test_recording_of_the_same_loader(tmp_path: Path, recording: tuple[Config, Path], where: str) -> None:
    settings, folder = recording
    live, student, own = network(), network(), config(tmp_path / "live")
    with KDDataLoader.from_config(settings, teacher=None) as loader:
        train(own, student=live, teacher=settings.teacher, train_batches=loader)
    with closing(Recording(folder)) as recorded:
        objects: dict[str, Any] = {"teacher": recorded} if where == "argument" else {}
        with KDDataLoader.from_config(settings, teacher=None if objects else recorded) as loader:
            train(config(tmp_path / "replayed"), student=student, train_batches=loader, **objects)
    assert_same(student, live)


def test_recording_for_batches_of_ones_own_is_refused(tmp_path: Path, recording: tuple[Config, Path]) -> None:
    with (
        closing(Recording(recording[1])) as recorded,
        pytest.raises(ConfigError, match="a recording has outputs for the images of a KDDataLoader"),
    ):
        run(tmp_path / "run", teacher=recorded)


def test_settings_of_a_file_for_batches_of_ones_own(tmp_path: Path) -> None:
    file = export_onnx(network(5), tmp_path / "teacher.onnx", image_shape=(3, 8, 8))
    student = network()
    run(tmp_path / "run", student=student, teacher=TeacherSettings(onnx=file, backend="onnxruntime"))
    assert distance(student, plain_loop(batches)) < 1e-5


def test_settings_of_a_file_for_a_loader_of_dali(tmp_path: Path, expected: nn.Module) -> None:
    file = export_onnx(network(5), tmp_path / "teacher.onnx", image_shape=(3, 8, 8))
    student, settings = network(), TeacherSettings(onnx=file, backend="onnxruntime")
    with dali_loader() as loader:
        train(config(tmp_path / "run"), student=student, teacher=settings, train_batches=loader)
    assert distance(student, expected) < 1e-5


@pytest.mark.parametrize("kind", ["teacher", "module"])
def test_batch_loader_with_a_teacher(tmp_path: Path, kind: str) -> None:
    student, of_teacher = network(), teacher() if kind == "teacher" else network(5)
    with BatchLoader(batches(), of_teacher) as loader:
        train(config(tmp_path / "run"), student=student, train_batches=loader)
    assert distance(student, plain_loop(batches)) < (1e-9 if kind == "teacher" else 1e-3)


def test_two_teachers_are_refused(tmp_path: Path) -> None:
    with (
        BatchLoader(batches(), teacher()) as loader,
        pytest.raises(ConfigError, match="two teachers: train_batches has one already"),
    ):
        run(tmp_path / "run", train_batches=loader)


def test_teacher_of_the_loader_stays_open(tmp_path: Path) -> None:
    of_teacher = teacher()
    with BatchLoader(batches(), of_teacher) as loader:
        train(config(tmp_path / "run"), student=network(), train_batches=loader)
    assert of_teacher(torch.zeros(1, 3, 8, 8))["logits"].shape == (1, 10)


# Several inputs


class Tagger(nn.Module):
    """The mean of the tokens that are there."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 5)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(values.dtype).unsqueeze(-1)
        return self.head((self.embed(values).relu() * weights).sum(1) / weights.sum(1))


def sequences(num_batches: int = 4, start: int = 0) -> list[dict[str, Tensor]]:
    """Padded sequences, each batch of a length of its own."""
    found = []
    for number in range(start, start + num_batches):
        generator = torch.Generator().manual_seed(number)
        length = 5 + number
        lengths = torch.randint(2, length + 1, (8,), generator=generator)
        mask = torch.arange(length)[None] < lengths[:, None]
        values = torch.randn(8, length, 4, generator=generator) * mask[..., None]
        found.append({"values": values, "mask": mask, "labels": torch.randint(5, (8,), generator=generator)})
    return found


def test_teacher_and_student_of_several_inputs(tmp_path: Path) -> None:
    student, inputs = Tagger(0, 8), ("values", "mask")
    with BatchLoader(sequences(), inputs=inputs) as loader, BatchLoader(sequences(2, 10), inputs=inputs) as validation:
        result = train(
            config(tmp_path / "run"),
            student=student,
            teacher=Tagger(5, 16),
            train_batches=loader,
            validation=validation,
        )
    assert_same(student, loop_of_sequences())
    assert result.evaluations["val"].num_samples == 16 and result.evaluations["val"].agreement is not None


def loop_of_sequences() -> nn.Module:
    from kd_pipeline.losses.distillation import Distillation
    from kd_pipeline.losses.settings import DistillSettings
    from kd_pipeline.teachers.open import open_teacher

    student, of_teacher = Tagger(0, 8), Tagger(5, 16).eval()
    example = {name: sequences()[0][name][:2] for name in ("values", "mask")}
    outputs = open_teacher(TeacherSettings(backend="pytorch"), module=of_teacher, example=example).outputs
    loss = Distillation(DistillSettings(), student=student, teacher_outputs=outputs, example=example, num_classes=5)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    for epoch in range(EPOCHS):
        for each in sequences():
            given = {name: each[name] for name in ("values", "mask")}
            with torch.no_grad():
                targets = {"logits": of_teacher(**given)}
            rows = {"index": torch.arange(8), "valid": torch.ones(8, dtype=torch.bool)}
            batch = KDBatch({**given, "labels": each["labels"], "teacher": targets, **rows})
            optimizer.zero_grad()
            loss(student(**given), {}, batch, epoch=epoch, epochs=EPOCHS).total.backward()
            optimizer.step()
    return student


def distance(first: nn.Module, second: nn.Module) -> float:
    """The largest difference of two weights."""
    with torch.no_grad():
        return max(
            float((ours - theirs).abs().max())
            for ours, theirs in zip(first.parameters(), second.parameters(), strict=True)
        )
