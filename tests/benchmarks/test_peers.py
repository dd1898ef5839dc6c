"""The comparison with other programs, with small programs in their place."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers, peers_backbone, peers_process, peers_rows, peers_teacher
from benchmarks.peers import BenchPeersSettings, bench_peers, main
from benchmarks.peers_process import ProgramRun, run_program
from benchmarks.peers_result import COMPARISONS, PeersResult, PeersRow
from benchmarks.peers_rows import (
    NAMES,
    Materials,
    Row,
    environment_of,
    make_materials,
    make_rows,
    versions,
    why_missing,
)
from kd_pipeline import TeacherSettings, load_config, open_teacher
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.models import small_resnet
from kd_pipeline.teachers.base import Teacher
from tests.processes import ends

TORCH = """
hooks = []
def register_optimizer_step_post_hook(hook):
    hooks.append(hook)
class Optimizer:
    def step(self):
        for hook in hooks:
            hook(self, (), {})
"""
"""What the runner needs of torch, which takes seconds to import."""
TRAINS = """
import sys, time
print("\\nteacher: none", flush=True)
from torch.optim.optimizer import Optimizer
time.sleep(0.1)
for step in range(5):
    time.sleep(0.02)
    Optimizer().step()
    print("step", step, flush=True)
time.sleep(0.2)
"""
WITH_TORCH = """
import torch
weight = torch.zeros(2, requires_grad=True)
for optimizer in (torch.optim.SGD([weight]), torch.optim.AdamW([weight])):
    for _ in range(2):
        weight.sum().backward()
        optimizer.step()
"""


def run(program: str, tmp_path: Path, *arguments: str, num_steps: int = 5, timeout_s: float = 60.0) -> ProgramRun:
    """Run the text of a script beside a substitute of torch."""
    (tmp_path / "torch" / "optim").mkdir(parents=True)
    (tmp_path / "torch" / "optim" / "optimizer.py").write_text(TORCH)
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "optim" / "__init__.py").touch()
    (tmp_path / "script.py").write_text(program)
    (tmp_path / "here").mkdir()
    command = [sys.executable, *(arguments or (str(tmp_path / "script.py"),))]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    return run_program(
        command, folder=tmp_path / "here", environment=environment, num_steps=num_steps, timeout_s=timeout_s
    )


@pytest.mark.slow
def test_program_is_measured_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_process, "_MEMORY_EVERY_S", 0.02)  # it runs for half a second only
    found = run(TRAINS, tmp_path)
    assert 0 < found.first_line_s < found.first_step_s
    assert len(found.intervals_s) == 4 and min(found.intervals_s) > 0.01
    assert found.end_s > 0.1 and found.peak_memory_bytes > 2**20
    assert found.lines[0] == "teacher: none" and len(found.lines) <= 2


@pytest.mark.slow
def test_program_is_started_as_python_would(tmp_path: Path) -> None:
    shows = TRAINS + "assert (__name__, sys.argv[1:]) == ('__main__', ['-c', 'a b']), sys.argv\n"
    shows += "assert not [path for path in sys.path if path.endswith('benchmarks')], sys.path\n"
    run(shows, tmp_path / "a", str(tmp_path / "a" / "script.py"), "-c", "a b")
    run(shows, tmp_path / "b", "-m", "script", "-c", "a b")


@pytest.mark.slow
def test_steps_of_all_torch_optimizers_count(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(WITH_TORCH)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = run_program(
        [sys.executable, str(tmp_path / "own.py")], folder=tmp_path, environment=environment, num_steps=4, timeout_s=120
    )
    assert len(found.intervals_s) == 3 and found.lines == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('no such teacher')\nraise SystemExit(3)", "it ended with status 3: no such teacher"),
        (TRAINS.replace("range(5)", "range(4)"), "it took 4 optimizer steps instead of 5: teacher: none | step 0"),
        ("", "it took 0 optimizer steps instead of 5: it printed nothing"),
    ],
)
def test_failing_program_is_an_error_with_its_last_lines(program: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KDPipelineError) as caught:
        run(program, tmp_path)
    assert words in str(caught.value)


@pytest.mark.slow
def test_slow_program_is_killed_with_its_children(tmp_path: Path) -> None:
    hangs = "import os, subprocess, sys\nchild = subprocess.Popen(['sleep', '600'])\nprint(child.pid, flush=True)\n"
    with pytest.raises(KDPipelineError, match=r"it ran for more than 3 s: \d+") as caught:
        run(hangs + "child.wait()", tmp_path, timeout_s=3)
    assert ends(int(str(caught.value).split()[-1]))


def ran(step_s: float, *, first_step_s: float = 10.0, end_s: float = 2.0, gib: float = 1.0) -> ProgramRun:
    """A run whose first and last interval are not typical."""
    return ProgramRun(1.0, first_step_s, (5 * step_s, step_s, step_s, step_s / 2), end_s, int(gib * 2**30), ("said",))


def test_first_and_last_interval_are_left_out() -> None:
    found = ProgramRun(1.0, 2.0, (9.0, 1.0, 4.0, 2.0, 0.5), 1.0, 1, ())
    assert (found.step_s, found.mean_step_s) == (2.0, 4.0)


def result(**runs: list[ProgramRun]) -> PeersResult:
    rows = [
        PeersRow(name.replace("_", "-"), "program", "--flag a|b", ran(100.0, first_step_s=50.0), tuple(own))
        for name, own in runs.items()
    ]
    environment = {"cpu": "a CPU", "num_cores": 2, "versions": {"torch": "2.0"}, "programs": {"lightly-train": "1.0"}}
    return PeersResult(tuple(rows), {"timm": "give it"}, {"batch_size": 32, "steps": 5}, environment)


RESULT = result(
    timm_fp32=[ran(4.0), ran(8.0, first_step_s=5.0), ran(2.0, end_s=7.5, gib=0.5)],
    ours_fp32=[ran(2.0), ran(2.0), ran(2.0)],
    student_fp32=[ran(1.0)] * 3,
    teacher_fp32=[ran(0.9)] * 3,
)


def test_ratios_are_taken_within_repeats() -> None:
    found = {comparison.title: values for comparison, values in RESULT.compared().items()}
    assert found == {
        "images/s, default, fp32: ours / timm": [2.0, 4.0, 1.0],
        "images/s, fp32: a step / student alone after teacher alone": [0.95] * 3,
        "first step, default, fp32: ours / timm": [1.0, 2.0, 1.0],
        "end, default, fp32: ours - timm, s": [0.0, 0.0, -5.5],
        "peak memory, default, fp32: ours - timm, GiB": [0.0, 0.0, 0.5],
    }


def test_comparisons_are_of_known_rows() -> None:
    assert {name for comparison in COMPARISONS for name in comparison.rows} == set(NAMES)
    assert len({comparison.title for comparison in COMPARISONS}) == len(COMPARISONS)


def test_tables_have_medians_and_extremes() -> None:
    timm = ["timm-fp32", "program --flag a|b", "8.0 (4.0-16.0)", "3.4", "1.00", "10.00 (5.00-10.00)", "50.00"]
    timm += ["2.00 (2.00-7.50)", "2.00", "1.00 (0.50-1.00)"]
    text, markdown = RESULT.table().splitlines(), RESULT.markdown().splitlines()
    assert text[1].split() == " ".join(timm).split() and len(text[0]) == len(text[1])
    assert markdown[2] == "| " + " | ".join(timm).replace("a|b", "a\\|b") + " |"
    assert "| images/s, default, fp32: ours / timm | 2.00 (1.00-4.00) | ≥ 1.5 |" in markdown
    assert markdown[-1] == "- Left out, timm's train.py: give it." and text[-1] == markdown[-1][2:]


def test_json_has_every_run() -> None:
    found = json.loads(RESULT.to_json())
    timm = found["rows"][0]
    assert timm["images_per_s"] == {"median": 8.0, "min": 4.0, "max": 16.0, "repeats": [8.0, 4.0, 16.0]}
    assert timm["cold"]["first_step_s"] == 50.0 and timm["warm"][2]["end_s"] == 7.5
    assert found["comparisons"][0]["repeats"] == [2.0, 4.0, 1.0] and found["left_out"] == {"timm": "give it"}


# What is run


@pytest.fixture
def materials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Materials:
    """Few photographs and a config, without the teacher."""
    monkeypatch.setattr(peers_rows, "_NUM_VAL", 20)
    monkeypatch.setattr(peers_rows, "_write_teacher", lambda materials: None)
    monkeypatch.setattr(peers_rows, "_write_backbone", lambda materials: None)
    return make_materials(tmp_path, batch_size=5, num_steps=4)


def test_configs_of_own_rows_are_valid(materials: Materials) -> None:
    rows = make_rows(materials, NAMES, timm=None, lightly=None)
    seen = {}
    for row in rows:
        if "-c" in row.command:
            path, *overrides = row.command[row.command.index("-c") + 1 :]
            seen[row.name] = load_config(path, overrides)
    assert seen["ours-best-bf16"].train.precision == "bf16-mixed" and seen["student-fp32"].stage == "baseline"
    backbone = seen["loop-bf16"]
    assert backbone == seen["distill-bf16"] and backbone.student is not None and backbone.student.is_headless
    assert isinstance(backbone.teacher, TeacherSettings) and backbone.teacher.precision == "bf16"
    recorded = seen["recorded-fp32"].teacher
    assert isinstance(recorded, TeacherSettings) and recorded.path == materials.recording
    assert [row.name for row in rows if row.needs_recording] == ["recorded-fp32", "recorded-bf16"]
    assert all(row.variables["PYTHONPATH"] == str(Path(peers.__file__).parents[1]) for row in rows)


def test_programs_of_others_run_in_their_own_environment(materials: Materials, tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    names = ("lightly-bf16", "timm-best-fp32", "timm-fp32")
    timm, best, lightly = make_rows(materials, names, timm=tmp_path / "train.py", lightly=python)
    assert best.command[: len(timm.command)] == timm.command and best.options == "--torchcompile --channels-last"
    assert timm.command[:2] == (sys.executable, str(tmp_path / "train.py"))
    assert lightly.command[:3] == (str(python), str(python.parent / "lightly-train"), "pretrain")
    assert "PYTHONPATH" not in environment_of(timm, tmp_path) | environment_of(lightly, tmp_path)
    assert environment_of(lightly, tmp_path)["LIGHTLY_TRAIN_EVENTS_DISABLED"] == "1"


def test_each_row_has_its_own_cache(materials: Materials, tmp_path: Path) -> None:
    (row,) = make_rows(materials, ["ours-fp32"], timm=None, lightly=None)
    own = environment_of(row, tmp_path / "cache")
    assert {Path(own[name]).parent for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")} == {
        tmp_path / "cache"
    }
    assert Path(own["TMPDIR"]).is_dir() and own["CUDA_VISIBLE_DEVICES"] == ""


def test_missing_programs_say_what_to_do(tmp_path: Path) -> None:
    none, wrong = tmp_path / "none.py", tmp_path / "bin" / "python"
    assert why_missing(["ours-fp32"], timm=None, lightly=None) == {}
    asked = why_missing(NAMES, timm=None, lightly=None)
    assert "--timm-script" in asked["timm"] and "pip install lightly-train timm" in asked["lightly-train"]
    found = why_missing(NAMES, timm=none, lightly=wrong)
    assert f"there is no file {none}" in found["timm"] and f"beside {wrong}" in found["lightly-train"]
    none.touch()
    wrong.parent.mkdir()
    (wrong.parent / "lightly-train").touch()
    assert why_missing(NAMES, timm=none, lightly=wrong) == {}


def test_versions_of_others_are_read_without_running_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit")
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "lightly_train-9.8.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lightly-train\nVersion: 9.8\n")
    found = versions(timm=tmp_path / "train.py", lightly=tmp_path / "bin" / "python")
    assert found["lightly-train"] == "9.8" and len(found["timm train.py, sha256"]) == 64
    assert versions(timm=None, lightly=None) == {}


@pytest.mark.slow
def test_both_programs_read_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = pytest.importorskip("timm")
    monkeypatch.setattr(peers_rows, "SIZE", 48)
    monkeypatch.setattr(peers_rows, "_NUM_VAL", 20)
    materials = make_materials(tmp_path, batch_size=5, num_steps=4)
    theirs = timm.create_model(f"local-dir:{materials.teacher}", pretrained=True, num_classes=10).eval()
    config = load_config(materials.config)
    assert isinstance(config.teacher, TeacherSettings)
    images, is_second = peers_rows._two_photographs(materials.images / "val")
    ours = open_teacher(config.teacher.model_copy(update={"backend": "pytorch"}), image_shape=(3, 48, 48))
    logits = ours(images)["logits"]
    ours.close()
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(images), rtol=0.05, atol=0.5)
    assert (logits.argmax(1) == is_second).float().mean() > 0.9


def test_classifier_tells_groups_apart() -> None:
    features, is_second = torch.randn(40, 8), torch.arange(40) % 2 == 1
    features[is_second] += 20
    classifier = nn.Linear(8, 10)
    with torch.no_grad():
        peers_rows._fit_classifier(classifier, features, is_second)
        logits = classifier(features)
    assert (logits.argmax(1) == is_second).all() and logits.abs().max() < 15


def options_of_small_teacher(materials: Materials) -> list[str]:
    checkpoint = materials.images / "teacher.pt"
    torch.save(small_resnet(10, width=8).state_dict(), checkpoint)
    builtin = f"teacher={{model: {{builtin: small_resnet, kwargs: {{width: 8}}, checkpoint: {checkpoint}}}}}"
    return ["-c", str(materials.config), builtin, "data.train.transform.size=32"]


@pytest.mark.slow
def test_teacher_alone_runs_once_for_each_batch(
    materials: Materials, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    monkeypatch.chdir(materials.images)  # where run_dir is
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(1))
    assert peers_teacher.main(options_of_small_teacher(materials)) == 0
    assert len(steps) == 4 and capsys.readouterr().out.startswith("teacher: ")


@pytest.mark.slow
def test_teacher_alone_follows_the_student_of_the_run(materials: Materials, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[str] = []

    def remember(settings: TeacherSettings, **options: Any) -> Teacher:
        followed.append(options["student_precision"])
        return open_teacher(settings, **options)

    monkeypatch.chdir(materials.images)
    monkeypatch.setattr("kd_pipeline.loader.config_teacher.open_teacher", remember)
    assert peers_teacher.main([*options_of_small_teacher(materials), "train.precision=bf16-mixed"]) == 0
    assert followed == ["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_backbone_is_distilled_and_saved(
    precision: str, materials: Materials, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm: Any = pytest.importorskip("timm")
    monkeypatch.chdir(materials.images)
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 1}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    torch.save(network.state_dict(), materials.backbone)
    model = {"timm": "vit_tiny_patch16_224", "num_classes": 0, "checkpoint": str(materials.backbone), "kwargs": kwargs}
    overrides = [f"teacher.model={json.dumps(model)}", "data.train.transform.size=32", f"train.precision={precision}"]
    assert peers_backbone.main(["-c", str(materials.backbone_config), *overrides, "teacher.backend=pytorch"]) == 0
    assert "loss of the last batch: " in capsys.readouterr().out
    weights = torch.load("student.pt", weights_only=True)
    timm.create_model("resnet18", num_classes=0).load_state_dict(weights)


# The benchmark


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Rows are not run: what would have been started, the last argument and the cache of each."""
    started: list[tuple[str, Path]] = []

    def start(command: tuple[str, ...], *, folder: Path, environment: Mapping[str, str], **_: Any) -> ProgramRun:
        assert folder.is_dir() and not list(folder.iterdir())
        started.append((command[-1], Path(environment["XDG_CACHE_HOME"]).parent))
        if command[-1] == "teacher.precision=int8" or command[-1].endswith("/broken"):
            raise KDPipelineError("it ended with status 1: int8 is for tensorrt")
        return ran(float(len(started)))

    def materials(folder: Path, **_: int) -> Materials:
        files = {name: folder / name for name in ("config", "backbone", "backbone_config", "recording")}
        return Materials(images=folder, teacher=folder, batch_size=32, **files)

    monkeypatch.setattr(peers, "run_program", start)
    monkeypatch.setattr(peers, "run_untimed", start)
    monkeypatch.setattr(peers, "make_materials", materials)
    return started


def test_rows_take_turns_and_the_first_repeat_is_cold(started: list[tuple[str, Path]], tmp_path: Path) -> None:
    names = ("student-fp32", "loop-bf16", "timm-fp32", "lightly-fp32")
    lines: list[str] = []
    settings = BenchPeersSettings(rows=names, repeats=2, out=tmp_path / "a" / "b.json")
    found = bench_peers(settings, report=lines.append)
    first, second = "stage=baseline", "teacher.precision=bf16"
    assert [last for last, _ in started] == [first, second, second, first, first, second]
    student, loop = found.rows
    assert (student.cold.step_s, [each.step_s for each in student.warm]) == (1.0, [4.0, 5.0])
    assert len(loop.warm) == 2 and len({cache for _, cache in started}) == 2
    assert [line[:24] for line in lines[:2]] == ["no rows of timm: give --", "no rows of lightly-train"]
    assert (tmp_path / "a" / "b.json").read_text() == found.to_json() + "\n"
    assert (tmp_path / "a" / "b.md").read_text() == found.markdown()


def test_recording_is_made_first(started: list[tuple[str, Path]]) -> None:
    bench_peers(BenchPeersSettings(rows=("recorded-fp32",), repeats=1))
    assert started[0][0].endswith("/recording") and len(started) == 3


def test_rows_without_their_recording_are_left_out(
    started: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "record_row", lambda materials: Row("record", "", "", ("/broken",), {}))
    found = bench_peers(BenchPeersSettings(rows=("recorded-fp32", "student-fp32"), repeats=1))
    assert found.left_out["recorded-fp32"].startswith("the teacher was not recorded: it ended with status 1")
    assert [row.name for row in found.rows] == ["student-fp32"]


def test_failing_row_is_left_out(started: list[tuple[str, Path]]) -> None:
    found = bench_peers(BenchPeersSettings(rows=("ours-int8", "student-fp32"), repeats=1))
    assert found.left_out == {"ours-int8": "it ended with status 1: int8 is for tensorrt"}
    assert [row.name for row in found.rows] == ["student-fp32"] and len(started) == 3
    with pytest.raises(KDPipelineError, match="no row was measured: ours-int8: it ended"):
        bench_peers(BenchPeersSettings(rows=("ours-int8",)))


def test_no_program_at_all_is_an_error(started: list[tuple[str, Path]]) -> None:
    with pytest.raises(KDPipelineError, match="no row was measured: timm: give --timm-script"):
        bench_peers(BenchPeersSettings(rows=("timm-fp32",)))
    assert started == []


def test_folder_as_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_peers(BenchPeersSettings(out=tmp_path))


def test_command_prints_the_tables(
    started: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    assert main(["--rows", "student-fp32", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("row ") and printed[1].startswith("student-fp32 ")
    assert printed[-1] == f"all repeats: {out}"
    assert main(["--rows", "ours-fp23"]) == 1
    assert "--rows: there is no ours-fp23; did you mean 'ours-fp32'" in capsys.readouterr().err
