"""The teacher of a run keeps the backend and the precision that the run began with."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers import automatic, open_on_cpu
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.workflows import _compare as comparing
from kd_pipeline.workflows import compare_files, compared_models, record
from kd_pipeline.workflows.resume import SavedRun
from kd_pipeline.workflows.teacher import open_run_teacher, saved_runtimes
from tests.recordings import manifest_of, num_epochs_of
from tests.training import networks
from tests.training.tiny_run import result, run, settings, weights, write_digits

PLUGINS = [networks.__name__]
# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and the weights of a teacher; tests add runs."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`cpu("bf16")`: a CPU with this precision besides float32, on which OpenVINO is the faster runtime if told so."""

    def make(*precisions: str, openvino: bool = False) -> None:
        has = frozenset({"fp32", *precisions})
        monkeypatch.setattr(open_on_cpu, "cpu_precisions", lambda: has)
        monkeypatch.setattr(open_on_cpu, "_EXPORT_FROM_FLOPS", 0 if openvino else 1e30)
        speeds = {"openvino": 2.0, "pytorch": 1.0}
        monkeypatch.setattr(automatic._Timed, "s_per_image", property(lambda each: 1 / speeds[each._teacher.backend]))

    return make


def changes(digits: Path, **more: Any) -> dict[str, Any]:
    model = {"factory": "tests.training.networks:plain", "checkpoint": digits / "teacher.pt"}
    return {"teacher": {"model": model}, "train__precision": "bf16-mixed", **more}


def test_run_goes_on_with_the_runtime_it_began_with(digits: Path, cpu: Callable[..., None]) -> None:
    cpu("bf16")
    folder = run(digits, "resumed", **changes(digits, train__epochs=1)).folder
    cpu()  # on which a new run has a float32 teacher
    run(digits, "resumed", **changes(digits))
    saved = SavedRun.load(folder / "checkpoints" / "last.ckpt")
    assert (saved_runtimes(saved.run), saved.epochs_done) == (["pytorch bf16"], 2)


def test_eval_runs_the_teacher_as_the_run_did(
    digits: Path, cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu("bf16")
    config = settings(digits, "evaluated", **changes(digits))
    found: list[Any] = []

    def compare(models: dict[str, Any], *arguments: object, **options: object) -> None:
        found.extend(model.runtimes for model in models.values())

    monkeypatch.setattr(comparing, "compare", compare)
    monkeypatch.setattr(compared_models, "_runtimes_of", lambda config: ["pytorch fp32"])
    compare_files(config, plugins=PLUGINS)
    monkeypatch.setattr(compared_models, "_runtimes_of", lambda config: None)
    compare_files(config, plugins=PLUGINS)
    assert found == [("pytorch fp32",), ("pytorch bf16",)]


def test_recording_goes_on_with_the_runtime_it_began_with(digits: Path, cpu: Callable[..., None]) -> None:
    cpu("bf16")
    config = settings(digits, "recorded", **changes(digits, train__epochs=1))
    folder = record(config, plugins=PLUGINS)
    cpu()
    assert record(settings(digits, "recorded", **changes(digits)), plugins=PLUGINS) == folder
    assert (manifest_of(folder).teacher.runtimes, num_epochs_of(folder)) == (("pytorch bf16",), 2)


def test_runtime_that_this_machine_lacks_is_an_error(digits: Path, cpu: Callable[..., None]) -> None:
    cpu()
    config = settings(digits, "new", **changes(digits, teacher={"onnx": digits / "teacher.onnx"}))
    with pytest.raises(ConfigError, match=r"It began with tensorrt fp32 for the teacher, and resumes so"):
        open_run_teacher(config, plugins=PLUGINS, begun_with=["tensorrt fp32"])


def test_images_are_listed_once(digits: Path, cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu("bf16")
    config = settings(digits, "new", **changes(digits))
    source = open_source(config.data.split("train").source)
    monkeypatch.setattr(
        "kd_pipeline.loader.config_split.open_source", lambda *arguments, **options: pytest.fail("listed again")
    )
    teacher = open_run_teacher(config, plugins=PLUGINS, training=source)
    assert isinstance(teacher, Teacher) and teacher.precision == "bf16"


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openvino", "onnxscript")), reason="OpenVINO or onnxscript is missing"
)
def test_kept_choice_gives_the_same_bits(digits: Path, cpu: Callable[..., None]) -> None:
    cpu("bf16", openvino=True)
    cold, warm = (run(digits, name, **changes(digits, train__precision="32-true")).folder for name in ("cold", "warm"))
    assert saved_runtimes(SavedRun.load(warm / "checkpoints" / "last.ckpt").run) == ["openvino fp32"]
    first, second = weights(cold), weights(warm)
    assert all(torch.equal(first[name], second[name]) for name in first) and result(cold) == result(warm)
