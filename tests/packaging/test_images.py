"""Images for docker and environments for conda, without a docker daemon as far as that goes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.packaging.metadata import REPOSITORY, extras, python_versions

DOCKERFILES = sorted((REPOSITORY / "docker").glob("Dockerfile.*"))


def test_there_is_an_image_for_each_kind_of_machine() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_runs_the_command_line_as_nobody_in_particular(path: Path) -> None:
    last = path.read_text(encoding="utf-8").split("\nFROM ")[-1]
    assert re.search(r"^USER \d{4,}$", last, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["kd-pipeline"\]$', last, re.MULTILINE)
    (names,) = re.findall(r"^ARG EXTRAS=(\S+)$", last, re.MULTILINE)
    assert set(names.split(",")) <= extras().keys()
    assert {"cpu": "cpu", "gpu": "cu13"}[path.suffix[1:]] in names.split(",")
    assert last.count("pip install") == last.count("--no-cache-dir")


def test_cpu_image_has_a_tested_python_and_pinned_packages() -> None:
    text = (REPOSITORY / "docker" / "Dockerfile.cpu").read_text(encoding="utf-8")
    assert re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)[0] in python_versions()
    assert "--constraint /tmp/constraints.txt" in text
    assert "https://download.pytorch.org/whl/cpu" in text


def test_images_get_what_the_wheel_is_built_from_alone() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    links = {path.resolve() for path in (REPOSITORY / "kd_pipeline").rglob("*") if path.is_symlink()}
    wanted = {"kd_pipeline", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert kept == wanted | {str(path.relative_to(REPOSITORY)) for path in links}


def test_conda_environment_has_extras_that_exist() -> None:
    content = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    assert content["channels"] == ["conda-forge"]
    python, pip, packages = content["dependencies"]
    assert python.removeprefix("python=") in python_versions()
    assert pip == "pip"  # or conda warns
    constraint, package = packages["pip"]
    assert (REPOSITORY / constraint.removeprefix("--constraint ")).is_file()
    names = re.fullmatch(r"--editable \.\[([\w,]+)\]", package)
    assert names is not None and set(names[1].split(",")) <= extras().keys()


@pytest.mark.slow
def test_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", *DOCKERFILES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cpu_image_runs() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no docker daemon answers")
    subprocess.run(["make", "image"], cwd=REPOSITORY, check=True)
    done = subprocess.run([docker, "run", "--rm", "kd_pipeline:cpu", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok +nvidia\.dali", done.stdout)
