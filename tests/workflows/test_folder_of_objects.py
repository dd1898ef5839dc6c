"""The folder of a run whose network is the user's own: what commands say of it, and that their advice works."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import kd_pipeline
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.loader.batch_loader import BatchLoader
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.settings import ExportSettings
from kd_pipeline.workflows._compare import compare_files
from kd_pipeline.workflows._export import network_of_run
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.exported import open_model_file
from tests.training import tiny_run
from tests.workflows.objects import assert_same, batches, config, network

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]


class Mean(nn.Module):
    """For rows of any rank, of which the last dimension counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows if rows.ndim == 2 else rows.mean(1))


def exporting(folder: Path, **changes: Any) -> Config:
    found = config(folder)
    return found.model_copy(
        update={"train": found.train.model_copy(update={"export": ExportSettings(), **changes}), "stage": "baseline"}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The folder of a baseline, and its student; do not change them."""
    folder, student = tmp_path_factory.mktemp("finished"), network()
    result = train(exporting(folder), student=student, train_batches=batches(), validation=batches(32, 200))
    assert result.folder == folder / "baseline"
    return result.folder, student


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], tuple[Path, nn.Module]]:
    """The same of students of vectors and of sequences, by the shape of a row."""
    found = {}
    for shape in ((6,), (5, 6)):
        folder, student = tmp_path_factory.mktemp("rows"), Mean(6)
        given = [(torch.randn(8, *shape), torch.randint(4, (8,))) for _ in range(2)]
        result = train(exporting(folder), student=student, train_batches=given, validation=given)
        found[shape] = result.folder, student
    return found


def test_own_network_is_not_opened_and_the_advice_works(finished: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, trained = finished
    with pytest.raises(ConfigError) as caught:
        open_model_file(folder, image_shape=(3, 8, 8), device=torch.device("cpu"))
    weights, file = folder / "exported" / "model.safetensors", folder / "exported" / "model.onnx"
    assert f"load_file({str(weights)!r})" in str(caught.value)
    assert f"name its ONNX file {file} with a config" in str(caught.value)

    student = network(9)
    student.load_state_dict(safetensors.torch.load_file(weights))
    assert_same(student, trained)
    with BatchLoader(batches(32, 200)) as loader:
        found = kd_pipeline.evaluate(student, loader)
    assert found.top1 == tiny_run.result(folder)["val"]["top1"]

    tiny_run.write_digits(tmp_path)
    compared = compare_files(tiny_run.settings(tmp_path, "run"), [file], teacher=None)
    assert [row.evaluation.num_samples for row in compared.rows] == [tiny_run.NUM_VAL]


def test_own_network_is_exported_already(finished: tuple[Path, nn.Module]) -> None:
    folder, _ = finished
    with pytest.raises(ConfigError, match=r"has an ONNX file already.*exported/model\.onnx$"):
        network_of_run(folder)


def test_config_of_the_run_has_no_images_to_evaluate_on(finished: tuple[Path, nn.Module]) -> None:
    folder, _ = finished
    with pytest.raises(ConfigError, match=r"no split 'val'.*kd_pipeline\.evaluate\(student, loader\)"):
        compare_files(kd_pipeline.load_config(folder / "config.yaml"), [folder])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(6,), (5, 6)])
def test_file_of_a_student_of_rows_is_a_teacher(
    rows: dict[tuple[int, ...], tuple[Path, nn.Module]], shape: tuple[int, ...], backend: Any
) -> None:
    folder, student = rows[shape]
    given = torch.randn(3, *shape)
    settings = TeacherSettings(onnx=folder / "exported" / "model.onnx", backend=backend, precision="fp32")
    teacher = open_teacher(settings, image_shape=shape)
    with torch.no_grad():
        assert torch.allclose(teacher(given)["logits"], student.eval()(given), atol=1e-5)
    teacher.close()


def test_file_of_a_student_of_rows_takes_no_images(rows: dict[tuple[int, ...], tuple[Path, nn.Module]]) -> None:
    folder, _ = rows[(6,)]
    with pytest.raises(ConfigError) as caught:
        open_model_file(folder, image_shape=(3, 8, 8), device=torch.device("cpu"))
    assert "ONNX" not in str(caught.value) and "kd_pipeline.evaluate" in str(caught.value)
    with pytest.raises(TeacherError, match=r"\[any, 6\] float32"):
        open_model_file(folder / "exported" / "model.onnx", image_shape=(3, 8, 8), device=torch.device("cpu"))
