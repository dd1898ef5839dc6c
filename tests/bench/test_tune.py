"""`tune`: what it tries, what it chooses, and that it measures the real steps of a run without leaving a trace."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline._core.child_process import ChildResult
from kd_pipeline.bench import tune as module
from kd_pipeline.bench import tune_compile
from kd_pipeline.bench.tune import TuneSettings, tune
from kd_pipeline.bench.tune_compile import compile_in_child
from kd_pipeline.bench.tune_knobs import KNOBS, Place
from kd_pipeline.bench.tune_steps import RunSteps, Runtime, Trial, Values, with_values
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, EngineError
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.workflows._record import RecordSettings, record
from tests.training import networks
from tests.training.tiny_run import TRAIN, settings, split, write_digits

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
NETWORKS = [networks.__name__]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_digits(folder)
    return folder


class FakeSteps(RunSteps):
    """Steps whose rate is a function of the settings, with noise."""

    images_per_s: Callable[[dict[str, Any], str], float]
    doubtful = "none"
    """The precision whose outputs are too far from float32."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._random = random.Random(0)

    def rate(self, trial: Trial, *, seconds: float) -> float:
        return type(self).images_per_s(dict(trial.values), trial.part) * self._random.lognormvariate(0, 0.01)

    def runtime(self, values: Values) -> Runtime:
        found = dict(values)
        backend, precision = found.get("teacher.backend", "onnxruntime"), found.get("teacher.precision", "fp32")
        return Runtime(backend, precision, backend + precision)

    def check_agreement(self, values: Values) -> None:
        if dict(values)["teacher.precision"] == self.doubtful:
            raise EngineError("too far from float32")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> type[FakeSteps]:
    monkeypatch.setattr(module, "RunSteps", FakeSteps)
    monkeypatch.setattr(module, "compile_in_child", lambda *arguments, **options: 30.0)
    monkeypatch.setenv("KD_PIPELINE_NUM_CORES", "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return FakeSteps


def step_ms(values: dict[str, Any], part: str) -> float:
    """Few threads suit the student, and those of the loader take time from the teacher."""
    student = {1: 3.0, 2: 2.6, 3: 3.2, 4: 4.0}[values.get("train.num_threads") or 4]
    teacher = 12.0 / (values.get("teacher.num_threads") or 4) + (values.get("data.num_threads") or 1) * 0.5
    teacher /= {"fp32": 1, "bf16": 1.5, "int8": 2.5}[values.get("teacher.precision", "fp32")]
    teacher *= 0.8 if values.get("teacher.backend") == "openvino" else 1
    student /= 1.2 if values.get("train.precision") == "bf16-mixed" else 1
    loader = 2.0 / (values.get("data.num_threads") or 1)
    return (0 if part == "student" else teacher * (part != "no teacher") + loader * (part != "no loader")) + student


def test_choice_is_within_3_percent_of_the_grid(digits: Path, rates: type[FakeSteps]) -> None:
    rates.images_per_s = lambda values, part: 1000 / step_ms(values, part)
    found = tune(settings(digits, "run"), TuneSettings(seconds=60), plugins=NETWORKS)
    grid = [
        step_ms(
            {"train.num_threads": student, "data.num_threads": data, "teacher.num_threads": teacher, **runtime}, "all"
        )
        for student in (1, 2, 3, 4)
        for data in (1, 2, 3, 4)
        for teacher in (1, 2, 3, 4)
        for runtime in ({"teacher.backend": "openvino", "teacher.precision": "bf16"}, {})
    ]
    assert step_ms(found.values, "all") <= 1.03 * min(grid)
    assert found.gain.is_certain and found.gain.ratio > 1.3
    assert "data.prefetch" not in found.values


def test_nothing_is_changed_where_nothing_is_faster(digits: Path, rates: type[FakeSteps]) -> None:
    rates.images_per_s = lambda values, part: 100.0
    found = tune(settings(digits, "run"), TuneSettings(seconds=60), plugins=NETWORKS)
    assert found.values == {} and "No other settings are faster by 2%" in found.table()


def test_what_changes_the_outputs_is_offered_only(digits: Path, rates: type[FakeSteps]) -> None:
    rates.images_per_s = lambda values, part: 1000 / step_ms(values, part)
    found = tune(settings(digits, "run"), TuneSettings(seconds=60), plugins=NETWORKS)
    assert "train.precision" not in found.values and found.values["teacher.precision"] == "bf16"
    assert "to choose from it too: --allow train.precision" in found.table()
    allowed = TuneSettings(seconds=60, allow=("train.precision",))
    assert tune(settings(digits, "run"), allowed, plugins=NETWORKS).values["train.precision"] == "bf16-mixed"


def test_teacher_has_to_agree(digits: Path, rates: type[FakeSteps], monkeypatch: pytest.MonkeyPatch) -> None:
    rates.images_per_s = lambda values, part: 1000 / step_ms(values, part)
    monkeypatch.setattr(rates, "doubtful", "bf16")
    found = tune(settings(digits, "run"), TuneSettings(seconds=60), plugins=NETWORKS)
    assert found.values.get("teacher.precision", "fp32") == "fp32"
    assert found.left_out["teacher.backend=openvino teacher.precision=bf16"] == "too far from float32"


@pytest.mark.parametrize(("epochs", "pays_off"), [(2, False), (1_000_000, True)])
def test_compiling_has_to_pay_off(digits: Path, rates: type[FakeSteps], epochs: int, pays_off: bool) -> None:
    rates.images_per_s = lambda values, part: 200.0 if values.get("train.compile") else 100.0
    found = tune(settings(digits, "run", train__epochs=epochs), TuneSettings(seconds=120), plugins=NETWORKS)
    assert found.values == ({"train.compile": True} if pays_off else {})
    assert pays_off or "compiling takes 30 s" in found.left_out["train.compile=true"]


def test_compiling_in_no_time_is_left_out(digits: Path) -> None:
    with pytest.raises(ConfigError, match="no time left"):
        compile_in_child(settings(digits, "run"), "distill", plugins=NETWORKS, trust_engines=[], timeout_s=-1.0)


@pytest.fixture
def child_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what the child runs in this process, and without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)

    def run(function: str, *arguments: str, timeout_s: float) -> ChildResult:
        report = io.StringIO()
        monkeypatch.setattr(tune_compile, "open_report", lambda: report)
        status = getattr(tune_compile, function.partition(":")[2])(*arguments)
        return ChildResult(report.getvalue().splitlines(), f"exited with status {status}" if status else "", "")

    monkeypatch.setattr(tune_compile, "run_child", run)


def test_child_compiles_or_says_why_not(digits: Path, child_here: None) -> None:
    granted: dict[str, Any] = {"plugins": NETWORKS, "trust_engines": [], "timeout_s": 60.0}
    config = settings(digits, "run", train__compile=True)
    assert compile_in_child(config, "distill", **granted) > 0
    config = settings(digits, "run", student={"factory": "no_such_module:network"})
    with pytest.raises(ConfigError, match=r"does not compile: .*no_such_module"):
        compile_in_child(config, "distill", **granted)


def test_slow_compiler_is_stopped(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = ChildResult([], "timed out after 40 s", "")
    monkeypatch.setattr(tune_compile, "run_child", lambda *arguments, timeout_s: late)
    with pytest.raises(ConfigError, match="did not compile in the 40 s that were left"):
        compile_in_child(settings(digits, "run"), "distill", plugins=[], trust_engines=[], timeout_s=40.0)


def test_shares_and_limit(digits: Path, rates: type[FakeSteps]) -> None:
    milliseconds = {"all": 10.0, "no loader": 8.0, "no teacher": 4.0, "student": 2.0}
    rates.images_per_s = lambda values, part: 1000 / milliseconds[part]
    found = tune(settings(digits, "run"), TuneSettings(seconds=60), plugins=NETWORKS)
    assert found.shares == pytest.approx({"loader": 0.2, "teacher": 0.6, "student": 0.2}, abs=0.03)
    assert "The teacher limits it: loader 2" in found.table()
    result = json.loads(found.to_json())
    assert {row["part"] for row in result["final"]["images_per_s"]} == {*milliseconds}
    assert result["environment"]["num_cores"] > 0 and result["values"] == {}


def test_every_choice_is_a_setting(digits: Path) -> None:
    for on_gpu in (False, True):
        place = Place(settings(digits, "run", teacher={"onnx": digits / "teacher.onnx"}), "distill", 4, 4, on_gpu)
        for knob in KNOBS:
            for choice in knob.choices(place):
                if choice.needs != "teacher.int8":
                    with_values(place.config, choice.values)


def test_same_settings_are_known(digits: Path) -> None:
    place = Place(settings(digits, "run"), "distill", num_cores=4, default_threads=3, on_gpu=False)
    assert place.is_same((("train.num_threads", 3), ("teacher.num_threads", 4)), ())
    assert not place.is_same((("train.num_threads", 4),), ())


def test_several_processes_are_refused(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="single process"):
        tune(settings(digits, "run"))


def rate_of_each_part(config: Config, stage: Any = "distill") -> list[float]:
    with RunSteps(config, stage, plugins=NETWORKS) as steps:
        parts: list[Any] = ["all", "no loader", "no teacher", "student"]
        rates = [steps.rate(Trial((), part), seconds=0.02) for part in parts]
        values = (("data.num_threads", 2), ("train.precision", "bf16-mixed"), ("train.num_threads", 1))
        return [*rates, steps.rate(Trial(values), seconds=0.02)]


def test_steps_of_each_kind_of_run(digits: Path) -> None:
    assert min(rate_of_each_part(settings(digits, "run"))) > 0
    assert min(rate_of_each_part(settings(digits, "run", teacher=None), "baseline")) > 0
    assert min(rate_of_each_part(settings(digits, "run", student=None))) > 0  # for a loop of one's own
    assert not (digits / "run").exists()


def test_recording_is_replayed(digits: Path) -> None:
    record(settings(digits, "run"), RecordSettings(epochs=1, out=digits / "recording"))
    assert min(rate_of_each_part(settings(digits, "run", teacher={"path": digits / "recording"}))) > 0


def test_untrained_teacher_is_measured(digits: Path) -> None:
    model = {"factory": "tests.training.networks:plain"}
    config = settings(digits, "run", teacher={"model": model})
    with RunSteps(config, "distill", plugins=NETWORKS) as steps:
        assert steps.has_random_teacher and steps.rate(Trial(), seconds=0.02) > 0
    assert not (digits / "run").exists()


def without_heads(folder: Path, **changes: Any) -> Config:
    """A run on images without labels, in which the student learns features."""
    model = {"builtin": "small_resnet", "num_classes": 0, "kwargs": {"width": 8}, "checkpoint": folder / "backbone.pt"}
    torch.save(
        trunk_of(open_model(ModelSettings(**{**model, "checkpoint": None}))).state_dict(), folder / "backbone.pt"
    )
    student = {"builtin": "small_resnet", "num_classes": 0, "kwargs": {"width": 4}}
    images = split(folder, "unlabeled", TRAIN)
    teacher = {"model": model, "backend": "pytorch"}
    return settings(folder, "run", teacher=teacher, student=student, data__train=images, data__val=None, **changes)


def test_steps_without_heads(digits: Path) -> None:
    assert min(rate_of_each_part(without_heads(digits))) > 0
    assert not (digits / "run").exists()


def test_settings_without_heads_are_found(digits: Path, rates: type[FakeSteps]) -> None:
    rates.images_per_s = lambda values, part: 1000 / step_ms(values, part)
    config = without_heads(digits)
    found = tune(config, TuneSettings(seconds=60))
    assert found.values["train.num_threads"] == 2 and found.gain.is_certain
    tuned = with_values(config, tuple(found.values.items()))
    assert tuned.distill == config.distill and tuned.distill.loss is None


def test_agreement_with_float32_without_heads(digits: Path) -> None:
    config = without_heads(digits)
    with RunSteps(config, "distill") as steps:
        steps.check_agreement((("teacher.precision", "bf16"),))
        assert steps._reference is not None and {*steps._reference.outputs} == {"pooled", "spatial"}
        opposite = {name: -output for name, output in steps._reference.outputs.items()}
        steps._reference = replace(steps._reference, outputs=opposite)
        with pytest.raises(EngineError, match="'pooled' cosine -1"):
            steps.check_agreement((("teacher.precision", "bf16"),))


def test_agreement_with_float32(digits: Path) -> None:
    config = settings(digits, "run", teacher={"onnx": digits / "teacher.onnx"})
    with RunSteps(config, "distill", plugins=NETWORKS) as steps:
        steps.check_agreement((("teacher.backend", "onnxruntime"),))


def test_ctrl_c_is_no_exit_of_lightning(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_pipeline.bench.tune_steps._Clock.tick", interrupted)
    with RunSteps(settings(digits, "run"), "distill", plugins=NETWORKS) as steps, pytest.raises(KeyboardInterrupt):
        steps.rate(Trial(), seconds=0.02)
