"""Build the packages of this checkout into dist/, and run the wheel in a new environment, far from the checkout.

    python tools/check_wheel.py         # what `make dist` runs; needs uv, and the network or uv's cache
    python tools/check_wheel.py --only-build

Every command runs in an empty folder, with nothing of the checkout on its path.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "cpu,demo,train"
PLUGIN = """
from kd_pipeline.models import small_resnet

def tiny():
    return small_resnet(10, width=4)
"""
PRESET = "extends: [runs/demo/digits.yaml, preset:hubert]\nrun_dir: runs/preset\n"


def build(uv: str, folder: Path) -> Path:
    """Build the source distribution, and the wheel from it; any warning is an error."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [uv, "build", "--out-dir", str(folder), str(ROOT)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Where nothing was compiled yet, MANIFEST.in has nothing to leave out.
    warnings = [
        line for line in done.stdout.splitlines() if re.search(r"(?i)warning(?!: no previously-included)", line)
    ]
    if done.returncode or warnings:
        raise SystemExit(
            f"{' '.join(command)} failed, or warned:\n" + (done.stdout if done.returncode else "\n".join(warnings))
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds what git tracks in kd_pipeline/, all of it and nothing else, and the long description."""
    listed = subprocess.run(["git", "ls-files", "kd_pipeline"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        description = message_from_bytes(archive.read(metadata))
    found = {name for name in names if ".dist-info/" not in name}
    if found != (wanted := set(listed.stdout.split())):
        raise SystemExit(f"{wheel.name} lacks {sorted(wanted - found)} and has {sorted(found - wanted)} in addition")
    if description["Description-Content-Type"] != "text/markdown" or len(description.get_payload()) < 1000:
        raise SystemExit(f"{wheel.name} has no long description in Markdown")


def install(uv: str, wheel: Path, folder: Path) -> Path:
    """Make an environment with the wheel, and return the folder of its commands."""
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    packages = f"kd_pipeline[{EXTRAS}] @ {wheel.resolve().as_uri()}"
    command = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), packages], check=True)
    return folder / "bin"


def run_commands(bin_folder: Path, folder: Path) -> None:
    """Run what a user of the wheel runs first: the demo, the loop that it leaves, a check, and whole runs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["OMP_NUM_THREADS"] = "1"  # for networks so small
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "preset.yaml").write_text(PRESET)

    def run(*command: str, **variables: str) -> str:
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
        print(f"  {time.perf_counter() - began:5.1f} s  {' '.join(command)}", flush=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nexit status {done.returncode}")
        return done.stdout

    place = run("python", "-c", "import kd_pipeline; print(kd_pipeline.__file__)").strip()
    if not Path(place).is_relative_to(bin_folder.parent):
        raise SystemExit(f"{place} was imported instead of the wheel")
    run("kd-pipeline", "--version")
    run("kd-pipeline", "doctor")
    shown = run("kd-pipeline", "demo", "train.epochs=2")
    check_summary(json.loads((folder / "runs/demo/summary.json").read_text()))
    loop = next(line.split() for line in shown.splitlines() if line.startswith("  python "))
    run(*loop, "train.epochs=1")
    run("kd-pipeline", "check", "-c", "runs/demo/digits.yaml")
    run("kd-pipeline", "config", "-c", "preset.yaml")
    own = ("student.factory=mine:tiny", "train.epochs=1", "train.num_threads=1", "run_dir=runs/own")
    run("kd-pipeline", "train", "-c", "runs/demo/digits.yaml", "--plugin", "mine", *own, PYTHONPATH=".")
    networks = ("--teacher", "builtin:small_resnet", "--student", "builtin:small_resnet", "--data", "data/digits/val/0")
    few = ("--epochs", "1", "teacher.model.pretrained=false", "data.batch_size=8", "train.export.onnx=false")
    run("kd-pipeline", "distill", *networks, *few)
    stages = str(ROOT / "configs" / "digits_all_stages.yaml")
    run("kd-pipeline", "train", "-c", stages, "stage=all", "train.epochs=2", "run_dir=runs/all")
    run("kd-pipeline", "eval", "-c", stages, "runs/all", "--teacher", "runs/all/teacher")
    run("kd-pipeline", "report", "runs/all", "--no-samples")


def check_summary(summary: dict[str, object]) -> None:
    """The demo's numbers are there, and its networks have learned something."""
    wanted = {"teacher_top1", "student_alone_top1", "student_distilled_top1", "agreement", "images_per_s"}
    wanted |= {"teacher_backend", "teacher_precision", "device", "seed"}
    if missing := wanted - summary.keys():
        raise SystemExit(f"summary.json lacks {sorted(missing)}")
    if not summary["teacher_top1"] > 0.5:
        raise SystemExit(f"after two epochs the teacher should know most digits: {summary}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, look into the wheel, install it, and run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-build", action="store_true", help="install and run nothing")
    parsed = parser.parse_args(arguments)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        raise SystemExit("uv is needed: pip install uv")
    wheel = build(uv, ROOT / "dist")
    check_contents(wheel)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size:,} bytes")
    if not parsed.only_build:
        with tempfile.TemporaryDirectory() as scratch:
            (folder := Path(scratch) / "work").mkdir()
            run_commands(install(uv, wheel, Path(scratch) / "environment"), folder)


if __name__ == "__main__":
    main()
