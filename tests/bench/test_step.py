import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.bench import step, step_result
from kd_pipeline.bench.step import BenchStepSettings, bench_step, step_settings
from kd_pipeline.bench.step_result import StepResult, StepRow
from kd_pipeline.bench.step_variants import PHASES, VARIANTS, PhaseTimer, StepTask, _Student
from kd_pipeline.bench.step_worker import StepSample
from kd_pipeline.config.config import Config
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError, DataError, ExportError, TeacherError
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from tests.bench.steps import HEADLESS, SMALL, short_step

LETTERS = list("abcdefg")


@pytest.fixture(scope="module")
def measured(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StepResult, list[str], Path]:
    """All rows with small networks, without compiling: the result, the lines of progress and the JSON file."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("step") / "made" / "step.json"
    transform = TrainTransform(size=32, hue=0.1)
    settings = short_step(photographs, transform=transform, teacher_precision="fp32", num_steps=2, repeats=2, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return bench_step(settings, report=lines.append), lines, out


@pytest.mark.slow
def test_each_variant_and_part_has_a_row(measured: tuple[StepResult, list[str], Path]) -> None:
    result, lines, _ = measured
    assert [row.letter for row in result.rows] == [*LETTERS, "loader", "teacher"]
    assert not [line for line in lines if "skipped:" in line]
    for row in result.rows:
        assert len(row.samples) == 2
        assert min(row.images_per_s) > 0 and min(sample.host_bytes for sample in row.samples) > 2**26


@pytest.mark.slow
def test_phases_add_up_to_the_step(measured: tuple[StepResult, list[str], Path]) -> None:
    for row in measured[0].rows:
        for sample in row.samples:
            assert sum(sample.phases_ms.values()) == pytest.approx(sample.ms_per_step, rel=0.02, abs=0.5)
            assert min(sample.phases_ms.values()) > -0.01
            assert sample.images_per_s == pytest.approx(8 / sample.ms_per_step * 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("letter", "phases"),
    [
        *((letter, set(PHASES)) for letter in "abcdeg"),
        ("f", {"student", "optimizer"}),
        ("loader", {"loader"}),
        ("teacher", {"teacher"}),
    ],
)
def test_each_variant_has_its_phases(
    measured: tuple[StepResult, list[str], Path], letter: str, phases: set[str]
) -> None:
    row = measured[0].row(letter)
    assert row is not None
    assert {phase for phase in PHASES if row.phases_ms[phase] > 0} == phases


@pytest.mark.slow
def test_other_augmentations_are_ignored_and_reported(measured: tuple[StepResult, list[str], Path]) -> None:
    assert "ignored in every row, as not all variants have it: transform.hue" in measured[1]


@pytest.mark.slow
def test_json_and_plot_are_saved(measured: tuple[StepResult, list[str], Path]) -> None:
    result, _, out = measured
    assert out.read_text() == result.to_json() + "\n"
    found = json.loads(out.read_text())
    assert [row["row"] for row in found["rows"]] == [*LETTERS, "loader", "teacher"]
    assert len(found["rows"][0]["images_per_s"]["repeats"]) == 2 and "cpu" in found["environment"]
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.format == "PNG" and plot.width > 1000
    (axes,) = result.plot().axes
    assert [bars.get_label() for bars in axes.containers] == list(PHASES)
    assert [label.get_text()[:3] for label in axes.get_yticklabels()] == [f"({letter})" for letter in LETTERS]


@pytest.mark.slow
def test_table_has_every_row_and_advice(measured: tuple[StepResult, list[str], Path]) -> None:
    lines = measured[0].table().splitlines()
    for line, letter in zip(lines[1:], LETTERS, strict=False):
        assert line.startswith(f"({letter}) {VARIANTS[letter].name}")
    assert "over the sum of its parts alone" in lines[-2]
    assert lines[-1].startswith("In (e) ")


@pytest.mark.slow
def test_lines_say_how_far_it_is(measured: tuple[StepResult, list[str], Path]) -> None:
    lines = measured[1]
    assert "(a) PIL, all eager: opening, 1 of 9" in lines
    assert "(b) decode_jpeg, all torch.compile: opening, 2 of 9; compiling, which can take a few minutes" in lines
    assert len([line for line in lines if re.match(r"\(\w+\) open after [\d.]+ s", line)]) == 9
    assert len([line for line in lines if line.endswith(" s, decode window, hw_decoder_load 0")]) == 5
    assert [line.partition(",")[0] for line in lines[-2:]] == ["repeat 1 of 2", "repeat 2 of 2"]


def sample(ms_per_step: float, batch_size: int = 10, **phases: float) -> StepSample:
    return StepSample(
        images_per_s=batch_size / ms_per_step * 1000,
        ms_per_step=ms_per_step,
        phases_ms={phase: (phases or {"student": ms_per_step}).get(phase, 0.0) for phase in PHASES},
        host_bytes=2**30,
        device_bytes=None,
        copied_bytes_per_image=None,
    )


def row(letter: str, *times_ms: float, **phases: float) -> StepRow:
    return StepRow(letter, VARIANTS[letter].name, tuple(sample(time_ms, **phases) for time_ms in times_ms))


def result(*rows: StepRow, device: str = "cpu", compared: str = "e") -> StepResult:
    settings: dict[str, Any] = {"device": device, "precision": "fp32", "teacher_precision": "bf16", "batch_size": 10}
    settings |= {"compared": compared, "distill": DistillSettings().model_dump(mode="json")}
    return StepResult(rows, settings, {"num_cores": 2})


PARTS = (row("f", 60, 66), row("loader", 10, 11), row("teacher", 30, 33))


def test_limit_on_a_cpu_is_the_sum_of_the_parts() -> None:
    assert result(row("e", 110, 121), *PARTS).overhead == pytest.approx(0.1)


def test_teacher_and_student_share_a_gpu() -> None:
    assert result(row("e", 99, 108.9), *PARTS, device="cuda:0").overhead == pytest.approx(0.1)


def test_limit_on_a_gpu_can_be_loading() -> None:
    parts = (PARTS[0], row("loader", 200, 220), PARTS[2])
    found = result(row("e", 220, 242), *parts, device="cuda:0")
    assert found.overhead == pytest.approx(0.1)
    assert "(e) takes +10.0% of time over the larger of loading alone and of teacher plus student" in found.table()


def test_row_with_the_teacher_of_the_parts_is_compared() -> None:
    found = result(row("c", 110, 121), row("e", 990, 990), *PARTS, compared="c")
    assert found.overhead == pytest.approx(0.1) and "(c) takes +10.0% of time over the sum" in found.table()
    assert json.loads(found.to_json())["compared"] == "c"


def test_copies_are_counted_in_the_last_repeat_only() -> None:
    first, last = sample(10), replace(sample(10), copied_bytes_per_image=3.0)
    found = StepRow("e", "ours", (first, last)).to_dict()
    assert found["copied_bytes_per_image"]["repeats"] == [3.0] and "device_bytes" not in found


def task(**changes: object) -> StepTask:
    values = {
        "root": Path("photos"),
        "transform": TrainTransform(size=224),
        "batch_size": 256,
        "teacher": SMALL,
        "onnx": None,
        "recording": Path("recording"),
        "outputs": {"logits": TensorSpec((None, 10), torch.float32)},
        "student": SMALL,
        "distill": DistillSettings(),
        "precision": "bf16",
        "teacher_precision": "bf16",
        "device": "cuda:0",
        "num_threads": 16,
    }
    return StepTask.model_validate(values | changes)


@pytest.mark.parametrize(
    ("onnx", "opened", "compared"),
    [("a.onnx", "abcde", "e"), ("a.onnx", "c", "c"), ("a.onnx", "ab", "e"), (None, "abc", "c"), (None, "a", "c")],
)
def test_teacher_alone_is_that_of_the_compared_row(onnx: str | None, opened: str, compared: str) -> None:
    workers: list[Any] = [SimpleNamespace(letter=letter) for letter in opened]
    assert step._compared(task(onnx=onnx), workers) == compared


@pytest.mark.parametrize(
    ("device", "batch_size", "letter", "steps"),
    [
        ("cpu", 256, "b", (6, 2)),
        ("cuda:0", 256, "b", (16, 42)),
        ("cuda:0", 256, "c", (6, 10)),
        ("cuda:0", 64, "c", (8, 20)),
        ("cuda:0", 64, "f", (6, 10)),
        ("cpu", 64, "loader", (24, 16)),
        ("cuda:0", 256, "loader", (24, 10)),
    ],
)
def test_prefetched_batches_are_used_up_before_the_timed_steps(
    device: str, batch_size: int, letter: str, steps: tuple[int, int]
) -> None:
    settings = BenchStepSettings(batch_size=batch_size)
    assert step._num_steps(letter, task(device=device, batch_size=batch_size), settings) == steps


@pytest.mark.parametrize("rows", ["abcf", "abce"])
def test_nothing_is_exported_if_no_row_runs_it(
    rows: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "export_onnx", None)
    monkeypatch.setattr(step, "why_no_onnx", lambda device: "no runtime")
    settings = short_step(photographs, rows=tuple(rows))
    lines: list[str] = []
    found = step._task(settings, tmp_path, lines.append)
    assert found.onnx is None and found.student.num_classes == 10
    assert ("(e) skipped: no runtime" in lines) == ("e" in rows)


@pytest.mark.slow
def test_networks_without_a_head_are_compared(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    lines: list[str] = []
    settings = short_step(photographs, teacher=HEADLESS, student=HEADLESS, rows=("e", "g"), teacher_precision="fp32")
    found = bench_step(settings, report=lines.append)
    assert [row.letter for row in found.rows] == ["e", "g", "f", "loader", "teacher"]
    assert not [line for line in lines if "skipped:" in line]
    assert "loss cosine on pooled + am_radio on spatial." in found.table()


def test_networks_without_a_head_learn_as_in_a_run(photographs: Path, tmp_path: Path) -> None:
    settings = short_step(photographs, teacher=HEADLESS, student=HEADLESS, rows=("c",))
    found = step._task(settings, tmp_path, print)
    config = Config.model_validate({"data": {"batch_size": 8}, "student": HEADLESS, "teacher": {"model": HEADLESS}})
    assert found.distill == config.distill and found.distill.loss is None
    assert {name: len(spec.shape) for name, spec in found.outputs.items()} == {"pooled": 2, "spatial": 4}


def test_projectors_are_trained(photographs: Path, tmp_path: Path) -> None:
    wide = HEADLESS.model_copy(update={"kwargs": {"width": 8}})
    settings = short_step(photographs, teacher=wide, student=HEADLESS, rows=("c",), precision="bf16")
    student = _Student(step._task(settings, tmp_path, print))
    batch = KDBatch(
        images=torch.randn(8, 3, 32, 32),
        labels=None,
        index=torch.arange(8),
        valid=torch.ones(8, dtype=torch.bool),
        teacher={"pooled": torch.randn(8, 32), "spatial": torch.randn(8, 32, 8, 8)},
    )
    projectors = [*student._distillation.parameters()]
    weights = projectors + [weight for weight in student._network.parameters() if weight.requires_grad]
    before = [weight.clone() for weight in weights]
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    with torch.compiler.set_stance("force_eager"):
        student.learn(batch, timer)
    changed = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    assert projectors and all(changed)


def test_student_with_a_head_needs_logits(photographs: Path) -> None:
    with pytest.raises(ConfigError, match="'pooled' and 'spatial' and no logits, which the student has"):
        bench_step(short_step(photographs, teacher=HEADLESS, student=SMALL))


def test_teacher_that_has_no_export_runs_in_pytorch(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Path:
        raise ExportError("an operation has no equivalent in ONNX")

    monkeypatch.setattr(step, "export_onnx", fail)
    lines: list[str] = []
    found = step._task(short_step(photographs, rows=tuple("acde")), tmp_path, lines.append)
    assert found.onnx is None
    assert lines[-1] == "(d) (e) skipped: an operation has no equivalent in ONNX"


def test_overhead_needs_all_parts() -> None:
    found = result(row("e", 110, 121), *PARTS[:2])
    assert found.overhead is None and "over" not in found.table().partition("\n")[2].replace("lower", "")


def test_ratios_are_within_repeats() -> None:
    assert result(row("a", 100, 300, 100), row("e", 50, 100, 20)).ratios == {"e/a": pytest.approx(3.0)}


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"loader": 70, "teacher": 20, "student": 10}, ("loader", "data.num_threads")),
        ({"loader": 10, "teacher": 70, "student": 20}, ("teacher", "kd-pipeline record")),
        ({"loader": 10, "teacher": 20, "student": 70}, ("student", "train.compile")),
    ],
)
def test_advice_is_on_the_largest_phase(phases: dict[str, float], words: tuple[str, str]) -> None:
    advice = result(row("a", 100, teacher=100), row("e", 100, **phases)).advice
    assert advice.startswith("In (e) 70% of the time")
    assert all(word in advice for word in words)


@pytest.mark.parametrize(
    ("device", "precision", "is_faster", "advised"),
    [
        ("cpu", "fp32", True, True),
        ("cpu", "fp32", False, False),
        ("cuda:0", "fp32", False, True),
        ("cpu", "bf16", True, False),
    ],
)
def test_half_precision_is_advised_where_it_is_faster(
    device: str, precision: str, is_faster: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_result, "trains_faster_in_bf16", lambda: is_faster)
    found = result(row("e", 100), device=device)
    assert ("bf16-mixed" in replace(found, settings={**found.settings, "precision": precision}).advice) == advised


def test_timer_moves_host_time_between_phases() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    timer.mark("loader")
    timer.move(2.0, origin="loader", to="teacher")
    totals_s = timer.totals_s()
    assert totals_s["teacher"] == 2.0 and totals_s["loader"] == pytest.approx(-2.0, abs=0.1)
    timer.start()
    assert sum(timer.totals_s().values()) == 0


class FakeWorker:
    """A variant that takes no time; (e) does not work here."""

    def __init__(self, letter: str, task: StepTask, *, wait: Callable[[], object]) -> None:
        if letter == "e":
            raise TeacherError("no runtime for it")
        self.letter, self.decode = letter, None

    def time(self, num_steps: int, **options: object) -> StepSample:
        return sample(10.0)

    def close(self) -> None:
        pass


def test_failing_variant_is_skipped_and_interrupted_ones_keep_complete_repeats(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "StepWorker", FakeWorker)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if line.startswith("repeat 2 of 9"):
            assert {len(row["images_per_s"]["repeats"]) for row in json.loads(out.read_text())["rows"]} == {2}
            raise KeyboardInterrupt

    out = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        bench_step(short_step(photographs, rows=("a", "e"), repeats=9, out=out), report=report)
    assert "(e) skipped: no runtime for it" in lines
    assert lines[-1] == f"stopped after 2 of 9 repeats, which are in {out}"
    rows = json.loads(out.read_text())["rows"]
    assert {len(row["images_per_s"]["repeats"]) for row in rows} == {2}
    assert [row["row"] for row in rows] == ["a", "f", "loader", "teacher"]


@pytest.mark.slow
def test_torch_compile_teacher_is_compared_without_onnx(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(step, "export_onnx", None)
    found = bench_step(short_step(photographs, teacher=HEADLESS, student=HEADLESS, rows=("c", "h")))
    assert [row.letter for row in found.rows] == ["c", "h", "f", "loader", "teacher"]
    assert found.compared == "c" and found.overhead is not None and "c/h" in found.ratios


@pytest.mark.slow
def test_onnx_teacher_in_int8_has_no_pytorch_rows(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    onnx = export_onnx(open_model(SMALL), tmp_path / "teacher.onnx", image_shape=(3, 32, 32))
    lines: list[str] = []
    settings = short_step(photographs, teacher=None, onnx=onnx, teacher_precision="int8", rows=("b", "d"))
    found = bench_step(settings, report=lines.append)
    assert [row.letter for row in found.rows] == ["d", "f", "loader", "teacher"]
    (skipped,) = [line for line in lines if "skipped:" in line]
    assert skipped.startswith("(b) skipped: the teacher is an ONNX file")
    assert "compiled teachers in int8" in found.table()
    assert len(list((tmp_path / "cache/kd_pipeline/int8").glob("*/manifest.json"))) == 1, "the rows share it"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rows": ("a", "z")}, ConfigError, "rows: there is no 'z'"),
        ({"batch_size": 1000}, DataError, "40 images, fewer than one batch of 1000"),
    ],
)
def test_impossible_settings_are_errors(
    photographs: Path, change: dict[str, object], error: type[Exception], words: str
) -> None:
    settings = BenchStepSettings(root=photographs, transform=TrainTransform(size=32), teacher=SMALL, student=SMALL)
    with pytest.raises(error, match=words):
        bench_step(settings.model_copy(update=change))


def test_folder_as_out_is_an_error(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        bench_step(BenchStepSettings(root=photographs, out=tmp_path))


CONFIG = {
    "data": {
        "batch_size": 48,
        "train": {"source": {"kind": "image_folder", "root": "photos"}, "transform": {"preset": "train", "size": 96}},
    },
    "teacher": {"model": {"torchvision": "resnet50", "pretrained": True}},
    "student": {"timm": "resnet18"},
}


def test_config_sets_images_teacher_and_student() -> None:
    found = step_settings(Config.model_validate(CONFIG), BenchStepSettings())
    assert (found.root, found.transform.size, found.batch_size) == (Path("photos"), 96, 48)
    assert found.teacher == ModelSettings(torchvision="resnet50", pretrained=True)
    assert found.student == ModelSettings(timm="resnet18")


def test_config_without_a_head_sets_the_loss() -> None:
    term = {"loss": "feature_mse", "student": "stage3", "teacher": "layer4", "projector": "conv"}
    teacher = {"model": {"torchvision": "resnet50", "num_classes": 0, "pretrained": True}, "features": ["layer4"]}
    config = {**CONFIG, "teacher": teacher, "student": {"timm": "resnet18", "num_classes": 0}}
    found = step_settings(Config.model_validate(config | {"distill": {"features": [term]}}), BenchStepSettings())
    assert found.features == ("layer4",) and found.distill is not None
    assert [each.student for each in found.distill.features] == ["stage3"] and found.distill.loss is None
    given = step_settings(Config.model_validate(config), BenchStepSettings(student=SMALL), {"student"})
    assert given.distill is None


def test_given_settings_override_the_config() -> None:
    given = BenchStepSettings(batch_size=4, student=SMALL)
    found = step_settings(Config.model_validate(CONFIG), given, {"batch_size", "student"})
    assert (found.batch_size, found.student, found.transform.size) == (4, SMALL, 96)


BY_URL = {
    "batch_size": 8,
    "train": {
        "source": {"kind": "image_folder", "root": "s3://bucket/x"},
        "transform": {"preset": "train", "size": 96},
    },
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher", None, "teacher.onnx or teacher.model"),
        ("student", None, "set student"),
        ("data", {"batch_size": 8}, "must be image_folder"),
        ("data", BY_URL, "reads a folder on a disk, and data.train.source.root is 's3://bucket/x'; download it"),
    ],
)
def test_incomplete_config_is_an_error(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        step_settings(Config.model_validate({**CONFIG, key: value}), BenchStepSettings())
