"""Imports print nothing, are fast, and need no optional package."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kd_pipeline
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import MissingPackageError
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from tests.networks import IMAGE_SHAPE, LogitsOnly
from tests.views import render

MODULES = [
    "kd_pipeline",
    *(
        module.name
        for module in pkgutil.walk_packages(kd_pipeline.__path__, "kd_pipeline.")
        if not module.name.endswith("__main__")
    ),
]
NEEDS_LIGHTNING = {
    *(name for name in MODULES if name.startswith("kd_pipeline.bench.tune")),
    *(
        f"kd_pipeline.workflows.{name}"
        for name in (
            "_distill",
            "_train",
            "best_student",
            "demo_backbone",
            "distill_module",
            "prediction_tables",
            "resume",
            "stage_evaluations",
            "stage_fit",
            "stage_run",
            "stage_teacher",
            "story",
            "students",
            "verification.files",
            "verification.replay",
            "verification.replay_run",
            "verification.replays",
            "verification.stream",
            "verification.verify",
        )
    ),
    *(
        f"kd_pipeline.training.{name}"
        for name in (
            *("checkpoint_callback", "early_stopping", "first_batch", "keep_evidence", "loggers", "metrics_csv"),
            *("module", "result_media", "run_story", "signals", "stop_after", "teacher_probe", "trainer"),
        )
    ),
}
"""Modules with subclasses of Lightning's classes, and those that need them."""
OPTIONAL = {
    "comet_ml",
    "cuda",
    "lightning",
    "matplotlib",
    "mlflow",
    "nvidia",
    "onnx",
    "onnxruntime",
    "onnx_ir",
    "onnxscript",
    "openvino",
    "safetensors",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torchmetrics",
    "torchvision",
    "wandb",
}

WITHOUT = """
import importlib
import sys


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Without())
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


def run_python(code: str, *arguments: str) -> str:
    """Everything that a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=Path(kd_pipeline.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def loaded_after(statement: str, modules: set[str]) -> str:
    """Which of `modules` a statement loads, and anything that it prints."""
    return run_python(f"{statement}\nimport sys\nprint(*sorted({modules} & set(sys.modules)))").strip()


def test_import_is_light():
    assert loaded_after("import kd_pipeline", OPTIONAL | {"torch", "numpy", "pydantic", "PIL", "yaml"}) == ""


@pytest.mark.slow
def test_public_names_load_nothing_optional():
    """`nvidia` and `cuda` do not count: torch installs its own libraries there."""
    names = sorted(set(kd_pipeline.__all__) - {"distill", "train", "verify"})  # need Lightning
    statement = f"import kd_pipeline\nfor name in {names}: getattr(kd_pipeline, name)"
    assert loaded_after(statement, OPTIONAL - {"nvidia", "cuda"} | {"nvidia.dali", "torch"}) == "torch"


@pytest.mark.slow
def test_every_module_imports_without_optional_packages():
    assert len(MODULES) > 20
    modules = [name for name in MODULES if name not in NEEDS_LIGHTNING]
    assert run_python(WITHOUT, ",".join(OPTIONAL), ",".join(modules)) == ""


EACH_WITHOUT = WITHOUT.replace(
    "    importlib.import_module(name)",
    """
    try:
        importlib.import_module(name)
    except Exception as exc:
        print(type(exc).__name__, exc)
    else:
        print(name)
""",
)


@pytest.mark.slow
def test_missing_lightning():
    found = run_python(EACH_WITHOUT, "lightning", ",".join(NEEDS_LIGHTNING)).splitlines()
    assert len(found) == len(NEEDS_LIGHTNING)
    for line in found:
        assert re.fullmatch(r"MissingPackageError lightning\S* is needed .* pip install 'kd_pipeline\[train\]'", line)


def test_public_names_resolve():
    for name in set(kd_pipeline.__all__) - {"__version__"}:
        assert getattr(kd_pipeline, name).__name__.rpartition(".")[2] == name
    assert set(kd_pipeline.__all__) <= set(dir(kd_pipeline))
    with pytest.raises(AttributeError, match=r"'kd_pipeline' has no attribute 'KDLoader'"):
        kd_pipeline.KDLoader  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_exports_exist_and_are_sorted(name):
    """In the order of ruff's RUF022: constants, classes, functions."""
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))

    def place(word: str) -> tuple[int, list[str | int]]:
        parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", word)]
        return 0 if word.isupper() else 1 if word[:1].isupper() else 2, parts

    assert exported == sorted(exported, key=place) and len(set(exported)) == len(exported)
    assert all(hasattr(module, word) for word in exported)


def dali():
    render(EvalTransform(size=8), np.zeros((1, 8, 8, 3), dtype=np.uint8))


MISSING = {
    "nvidia.dali": dali,
    "openvino": lambda: OpenVINOTeacher(Path("teacher.onnx")),
    "onnxruntime": lambda: OnnxRuntimeTeacher(Path("teacher.onnx")),
    "onnxscript": lambda: export_onnx(LogitsOnly(), Path("teacher.onnx"), image_shape=IMAGE_SHAPE),
    "onnx": lambda: export_onnx(LogitsOnly(), Path("teacher.onnx"), image_shape=IMAGE_SHAPE),
}


@pytest.mark.parametrize("package", MISSING)
def test_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"^{package} is needed .* pip install 'kd_pipeline\[cpu\]'$"):
        MISSING[package]()
