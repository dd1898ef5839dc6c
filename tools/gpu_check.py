"""Run everything that needs a GPU, most valuable first, and save each result immediately.

    python tools/gpu_check.py                          # what `make gpu` runs once the environment is set up
    python tools/gpu_check.py --limit-s 480 --out DIR  # within eight minutes; later stages get the remaining time
    python tools/gpu_check.py --stages tests doctor    # some stages; what the folder has of the others stays
    python tools/gpu_check.py --device cpu             # check the stages themselves on a machine without a GPU

Each stage is a separate process with a time limit; however it ends, the next one runs. `<stage>.log` has everything
that a stage prints, with its result next to it: benchmarks save it after each repeat. `summary.json` is the table of
all stages, and `targets.json` compares what was measured with what is wanted; both are written after each stage.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

# Only modules that need no package: `make gpu` looks for a GPU before it sets up the environment.
from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.child_process import kill_session
from kd_pipeline._core.files import open_own
from kd_pipeline._core.nvidia_driver import Driver, query_driver

ROOT = Path(__file__).resolve().parent.parent
MIN_S = 5.0
"""A stage with less time left than this is not started."""
TARGETS = "targets"
"""The name among the stages that runs nothing: `--stages targets` compares what the folder has."""


@dataclass(frozen=True)
class Stage:
    """One process, and how to summarize its result in a line."""

    name: str
    command: Sequence[str]
    limit_s: float
    summarize: Callable[[Path], str] = lambda out: ""
    """Reads what the stage wrote to the results folder, even if it was stopped."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    name: str
    status: str
    """`ok`, `exit 3`, `killed by SIGSEGV`, `stopped after 60 s` or `no time left`."""
    seconds: float
    summary: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--look", action="store_true", help="only look for a usable GPU")
    parser.add_argument("--out", type=Path, help="results folder; default: benchmarks/<name of the GPU>")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="seconds for all stages together")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="some of them; their order stays")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parsed = parser.parse_args(arguments)
    name = "cpu"
    if parsed.device == "cuda":
        driver, problem = find_gpu()
        if driver is None:
            print(f"make gpu needs an NVIDIA GPU with a driver for CUDA 13: {problem}", file=sys.stderr)
            return 1
        name = driver.gpus[0].name
        print(f"{name}, driver {driver.version}, CUDA {driver.cuda}")
    if parsed.look:
        return 0
    out = (parsed.out or Path("benchmarks") / re.sub(r"\W+", "_", name.lower()).strip("_")).absolute()
    stages = all_stages(parsed.device, out)
    names = [*(stage.name for stage in stages), TARGETS]
    if unknown := set(parsed.stages or ()) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    stages = [stage for stage in stages if not parsed.stages or stage.name in parsed.stages]
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_stages(stages, out, limit_s=parsed.limit_s, root=ROOT)
    print("\n".join(["", table(outcomes), "", *map(str, write_targets(out)), f"results in {out}"]))
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def find_gpu() -> tuple[Driver | None, str]:
    """The driver, or the reason why there is no GPU for this library's packages."""
    try:
        driver = query_driver()
    except OSError:
        return None, "no driver is installed"
    except RuntimeError as exc:
        return None, f"the driver reports {exc}"
    if not driver.gpus:
        return None, "the driver shows no GPU to this process (CUDA_VISIBLE_DEVICES?)"
    if int(driver.cuda.partition(".")[0]) < 13:
        return None, f"this driver supports CUDA {driver.cuda}"
    return driver, ""


def all_stages(device: str, out: Path) -> list[Stage]:
    """Most valuable first; short on a CPU, where only the stages themselves are checked."""
    python, on_gpu = [sys.executable, "-m"], device == "cuda"
    this = [sys.executable, str(Path(__file__).resolve()), "--run"]
    photographs = Path("data/photographs") if on_gpu else out / "photographs"

    def tests(name: str, marks: str, limit_s: float, *, timeout_s: int) -> Stage:
        pytest = [*python, "pytest", "-m", marks, "-q", "-ra", "--tb=short", "-p", "no:cacheprovider"]
        if find_spec("xdist"):
            pytest += ["-n", str(max(2, min(8, len(os.sched_getaffinity(0)) // 2)))]  # a crash costs only one test
        if find_spec("pytest_timeout"):
            pytest += ["--timeout", str(timeout_s)]
        return Stage(
            name, [*pytest, "--junitxml", str(out / f"{name}.xml"), *files_of_gpu_tests()], limit_s, last_line(name)
        )

    def bench(name: str, limit_s: float, options: str) -> Stage:
        where = ["--root", str(photographs), "--device", device, "--out", str(out / f"{name}.json")]
        # Compiling on a CPU takes minutes, and shows nothing of the stages.
        environment = [] if on_gpu else ["env", "TORCHDYNAMO_DISABLE=1"]
        return Stage(name, [*environment, *python, *options.split(), *where], limit_s, read_rates(name))

    # On the right, seconds on an H200 with 16 cores, estimated from what its first runs took.
    loader = "benchmarks.loader --decode window full"
    step = "kd_pipeline bench step --precision bf16 --rows"
    teacher = "kd_pipeline bench teacher --precisions bf16 --batch-sizes"
    views, students = "benchmarks.views", "benchmarks.students"
    if on_gpu:
        loader += " --batch-size 256 --num-batches 16 --repeats 5 --hw-decoder-load 0 0.65 1"  # 200
        step += " b c h f --batch 256 --num-steps 30 --repeats 3"  # 200 each
        steps = "--teacher resnet50 --student resnet18", "--teacher timm:vit_base_patch16_224 --student resnet50"
        teacher += " 256 --num-images 10240"  # 70 each
        teachers = "--torchvision resnet50", "--timm vit_base_patch16_224"
        views += " --batch-size 256 --num-batches 8 --repeats 5"  # 90
        students += (
            " --batch-size 256 --widths 32 48 64 --teacher-width 64 --num-batches 7 --epochs 8 --repeats 2"  # 150
        )
    else:
        loader += " --batch-size 8 --num-batches 2 --repeats 1"
        step += " c h f --batch 4 --num-steps 2 --repeats 1"
        steps = (
            "--teacher resnet18 --student resnet18 --size 64",
            "--teacher timm:test_vit --student resnet18 --size 160",
        )
        teacher += " 2 --repeats 1"
        teachers = "--torchvision resnet18 --size 64", "--timm test_vit"
        views += " --batch-size 4 --num-batches 1 --repeats 1 --size 48 --large-size 64 --local-size 32 --num-locals 2"
        students += " --batch-size 4 --size 16 --widths 4 8 --teacher-width 4 --num-batches 2 --epochs 1 --repeats 1"
    return [
        Stage("environment", [*this, "environment", str(out)], 60, last_line("environment")),
        Stage("photographs", [*this, "photographs", str(photographs), "2000" if on_gpu else "40"], 120),
        bench("bench_loader", 300, loader),
        bench("bench_step_resnet", 300, f"{step} {steps[0]}"),
        bench("bench_step_vit", 300, f"{step} {steps[1]}"),
        bench("bench_teacher_resnet", 150, f"{teacher} {teachers[0]}"),
        bench("bench_teacher_vit", 150, f"{teacher} {teachers[1]}"),
        tests("tests", "gpu and not slow", 300, timeout_s=90),
        Stage("decode", [*this, "decode", str(out), device], 120, read_decode),
        Stage("doctor", [*this, "doctor", str(out)], 240, read_doctor),
        bench("bench_views", 240, views),
        bench("bench_students", 300, students),
        tests("slow_tests", "gpu and slow", 600, timeout_s=240),
    ]


def files_of_gpu_tests() -> list[str]:
    """All that hold tests with the mark `gpu`, as it takes long to collect the others."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    return ["tests/gpu", *(str(path.relative_to(ROOT)) for path in files)]


def run_stages(stages: Sequence[Stage], out: Path, *, limit_s: float, root: Path) -> list[Outcome]:
    """Run one after the other, none longer than its own limit and what is left of `limit_s`."""
    outcomes: list[Outcome] = []
    summary_json = out / "summary.json"
    summaries: dict[str, dict[str, Any]] = {}
    if summary_json.is_file():  # of other stages, run before
        summaries = {each["name"]: each for each in json.loads(summary_json.read_text())}
    ends = time.monotonic() + limit_s
    for stage in stages:
        most_s = min(stage.limit_s, ends - time.monotonic())
        print(f"{stage.name}: at most {max(most_s, 0):.0f} s", flush=True)
        status, seconds = ("no time left", 0.0) if most_s < MIN_S else run_stage(stage, out, most_s, root)
        try:
            summary = stage.summarize(out)
        except Exception as exc:  # the result is incomplete or missing
            summary = f"no result ({type(exc).__name__}); see {stage.name}.log"
        outcomes.append(Outcome(stage.name, status, round(seconds, 1), summary))
        print(f"{stage.name}: {status}, {seconds:.0f} s; {summary}", flush=True)
        summaries[stage.name] = asdict(outcomes[-1])
        write_atomic(summary_json, json.dumps([*summaries.values()], indent=2) + "\n")
        write_targets(out)
    return outcomes


def run_stage(stage: Stage, out: Path, most_s: float, root: Path) -> tuple[str, float]:
    """Run a stage; return how it ended, and after how many seconds."""
    started = time.monotonic()
    with open_own(out / f"{stage.name}.log", "w+b") as log:
        log.write(f"$ {' '.join(stage.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            stage.command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,  # its children end with it
        )  # fmt: skip
        try:
            status = describe(process.wait(most_s))
        except subprocess.TimeoutExpired:
            status = f"stopped after {most_s:.0f} s"
        finally:
            kill_session(process)
    return status, time.monotonic() - started


def describe(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit {status}" if status else "ok"


def table(outcomes: Sequence[Outcome]) -> str:
    """Plain text, a line for each stage."""
    rows = [("stage", "status", "seconds", "result")]
    rows += [(each.name, each.status, f"{each.seconds:.0f}", each.summary) for each in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


# Stages that are not commands of the library, each in its own process


def run_environment(out: str) -> int:
    """Save the versions of the machine and of every installed package."""
    from importlib import metadata

    import torch

    smi = "name,driver_version,memory.total,clocks.sm,clocks.mem,persistence_mode"
    for command in (["nvidia-smi", f"--query-gpu={smi}", "--format=csv"], ["uname", "-a"], ["nproc"]):
        with suppress(OSError):
            print(subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip())
    packages = {each.name: each.version for each in metadata.distributions() if each.name}
    gpus = [
        {"name": torch.cuda.get_device_name(number), "capability": torch.cuda.get_device_capability(number)}
        for number in range(torch.cuda.device_count())
    ]
    about = {"python": sys.version, "gpus": gpus, "packages": dict(sorted(packages.items()))}
    write_atomic(Path(out, "environment.json"), json.dumps(about, indent=2) + "\n")
    print(f"torch {torch.__version__} on {', '.join(gpu['name'] for gpu in gpus) or 'no GPU'}")
    return 0


def run_decode(out: str, device: str) -> int:
    """Try every decode mode, all at once, each in its own process; write a line of JSON as soon as one is done."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from kd_pipeline.data.decode_trial import try_decoding

    gpu = 0 if device == "cuda" else None
    modes = [(load, mode) for load in ((0.0, 0.65, 1.0) if device == "cuda" else (0.0,)) for mode in ("window", "full")]
    with ThreadPoolExecutor(len(modes)) as pool, open_own(Path(out, "decode.jsonl"), "w+b") as file:
        trials = [
            pool.submit(try_decoding, mode, device_id=gpu, hw_decoder_load=load, timeout_s=90) for load, mode in modes
        ]
        found = []
        for trial in as_completed(trials):
            found.append(trial.result())
            file.write(f"{found[-1].model_dump_json()}\n".encode())
            file.flush()
            print(found[-1], flush=True)
    return 0 if any(trial.works and not trial.hw_decoder_load for trial in found) else 1


def run_doctor(out: str) -> int:
    """Save the doctor's report, as text in the log and as JSON in a file."""
    from kd_pipeline.workflows.doctor import diagnose

    report = diagnose()
    write_atomic(Path(out, "doctor.json"), report.model_dump_json(indent=2) + "\n")
    print(report.to_text())
    return 0 if report.is_usable else 1


def run_photographs(folder: str, num_files: str) -> int:
    """Make the JPEG files that the benchmarks read."""
    from kd_pipeline.bench.photographs import make_photographs

    make_photographs(Path(folder), num_files=int(num_files))
    return 0


RUN = {"environment": run_environment, "decode": run_decode, "doctor": run_doctor, "photographs": run_photographs}

# One line for each result


def last_line(name: str) -> Callable[[Path], str]:
    """The last line that the stage printed."""
    return lambda out: (out / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1][:200]


def read_decode(out: Path) -> str:
    """Which decode modes work."""
    trials = [json.loads(line) for line in (out / "decode.jsonl").read_text().splitlines()]
    modes = [f"{each['decode']} at load {each['hw_decoder_load']:g}" for each in trials if each["works"]]
    return f"{len(modes)} of {len(trials)} decode modes work: {', '.join(sorted(modes)) or 'none'}"


def read_doctor(out: Path) -> str:
    """What `auto` chooses."""
    found = json.loads((out / "doctor.json").read_text())["capabilities"]
    return "; ".join(f"{each['name']} {each['detail']}" for each in found if each["kind"] == "setting")[:200]


def read_rates(name: str) -> Callable[[Path], str]:
    """Median images per second of each row, or what it has instead."""

    def read(out: Path) -> str:
        rows = json.loads((out / f"{name}.json").read_text())["rows"]
        return ", ".join(f"{row['name']} {median_of(row.get('images_per_s', row.get('wall_s')))}" for row in rows)[:400]

    return read


def median_of(rates: object) -> str:
    """Of a benchmark's spread, or of its spreads by batch size."""
    if isinstance(rates, dict) and "median" in rates:
        return f"{rates['median']:,.4g}"
    return "/".join(median_of(each) for each in rates.values()) if isinstance(rates, dict) else "?"


# What is wanted of a GPU


@dataclass(frozen=True)
class Target:
    """A number that is wanted, and what was measured of it in each repeat."""

    name: str
    wanted: float
    is_most: bool
    """Whether `wanted` is the most that it may be, or the least."""
    measured: Sequence[float]

    @property
    def verdict(self) -> str:
        """`reached`, `missed` or `not measured`, by the median."""
        if not self.measured:
            return "not measured"
        found = median(self.measured)
        return "reached" if (found <= self.wanted if self.is_most else found >= self.wanted) else "missed"

    def __str__(self) -> str:
        found = self.measured
        shown = f" {median(found):.3f} ({min(found):.3f} to {max(found):.3f})," if found else ""
        return f"{self.verdict}: {self.name}:{shown} wanted at {'most' if self.is_most else 'least'} {self.wanted:g}"


def write_targets(out: Path) -> list[Target]:
    """Compare the benchmarks in `out` with the targets, and write `targets.json` there."""
    loader = rates_in(out / "bench_loader.json")
    found = [
        Target(f"images/s, KDDataLoader / {name}", wanted, False, ratios(loader, "KDDataLoader", name))
        for name, wanted in (("bare DALI graph", 0.95), ("torchvision, CUDA decode_jpeg", 1.2))
    ]
    for pair in ("resnet", "vit"):
        step, result = f"bench_step_{pair}", read_json(out / f"bench_step_{pair}.json")
        rows = rates_in(out / f"{step}.json", name="row")
        limits = [1 / (1 + overhead) for overhead in result.get("overheads", ())]
        costs = [ratio - 1 for ratio in ratios(rows, "h", "c")]
        found.append(Target(f"images/s, {step} / its limit", 0.95, False, limits))
        found.append(Target(f"time of {step} that a teacher ahead adds", 0.05, True, costs))
    write_atomic(
        out / "targets.json",
        json.dumps([asdict(each) | {"verdict": each.verdict} for each in found], indent=2) + "\n",
    )
    return found


def ratios(rows: dict[str, list[float]], one: str, other: str) -> list[float]:
    """How many times as fast a row is as another, in each repeat; empty if one of them was not measured."""
    return [mine / its for mine, its in zip(rows.get(one, ()), rows.get(other, ()), strict=False)]


def rates_in(path: Path, name: str = "name") -> dict[str, list[float]]:
    """Images per second of each row in each repeat; empty without the file of the benchmark."""
    return {row[name]: row["images_per_s"]["repeats"] for row in read_json(path).get("rows", ())}


def read_json(path: Path) -> dict[str, Any]:
    """The file of a benchmark; empty if it is missing."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(RUN[sys.argv[2]](*sys.argv[3:]))
    sys.exit(main())
