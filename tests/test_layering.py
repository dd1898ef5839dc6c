"""PACKAGES, read from top to bottom, is the map of the library: a package imports only from those above it."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kd_pipeline"

PACKAGES = [
    "errors",
    "_core",
    "batch",
    "storage",
    "data",
    "models",
    "onnx",
    "losses",
    "teachers",
    "loader",
    "evaluation",
    "report",
    "training",
    "config",
    "workflows",
    "bench",
    "cli",
    "__main__",
]

EVERYWHERE = {"PIL", "jinja2", "numpy", "pydantic", "pydantic_core", "torch", "yaml"}
"""What the library cannot do without, from setup.cfg."""
WRAPPED_IN = {
    "aiohttp": {"storage.http", "storage.hubs"},
    "comet_ml": {"training.loggers"},
    "cuda": {"teachers.tensorrt.teacher", "training.hardware_counters", "workflows.package_checks"},
    "fsspec": {"storage.connections", "storage.http", "storage.hubs", "storage.s3"},
    "gcsfs": {"storage.hubs"},
    "huggingface_hub": {"storage.hubs"},
    "datasets": {"data.sources.tables.huggingface"},
    "lightning": {
        "training.checkpoint_callback",
        "training.early_stopping",
        "training.first_batch",
        "training.keep_evidence",
        "training.loggers",
        "training.metrics_csv",
        "training.module",
        "training.result_media",
        "training.run_story",
        "training.signals",
        "training.stop_after",
        "training.teacher_probe",
        "training.trainer",
        "workflows.package_checks",
    },
    "matplotlib": {"report.plots"},
    "mlflow": {"training.loggers"},
    "nvidia": {
        "data.auto_augment",
        "data.dali",
        "data.decode",
        "data.ops",
        "data.own_ops",
        "data.own_ops_trial",
        "data.rendering",
        "loader.stream_facts",
        "workflows.package_checks",
    },
    "onnx": {
        *("onnx.edit", "onnx.export", "onnx.file", "onnx.half_precision", "onnx.outline", "onnx.weights"),
        "workflows.package_checks",
    },
    "onnx_ir": {"onnx.edit", "onnx.half_precision", "onnx.quantize", "onnx.ranges"},
    "onnxruntime": {"onnx.export", "onnx.session", "teachers.onnxruntime", "workflows.package_checks"},
    "onnxscript": {"onnx.export", "workflows.package_checks"},
    "openvino": {"teachers.openvino", "workflows.package_checks"},
    "s3fs": {"storage.s3"},
    "pyarrow": {
        "data.sources.tables.binary_column",
        "data.sources.tables.parquet_files",
        "data.sources.tables.table_columns",
    },
    "safetensors": {"models.checkpoints", "workflows.exported"},
    "sklearn": {"bench.photographs", "workflows.demo"},
    "tensorrt": {"teachers.tensorrt.package", "workflows.package_checks"},
    "tensorrt_rtx": {"teachers.tensorrt.package", "workflows.package_checks"},
    "timm": {"models.registry", "training.optimizers", "workflows.package_checks"},
    "torchmetrics": {"evaluation._metrics"},
    "torchvision": {"bench.step", "bench.torchvision_loaders", "models.registry", "workflows.package_checks"},
    "wandb": {"training.loggers", "training.result_media"},
}
"""Optional packages, and the modules that may ask for them through `require`."""


def module_of(path: Path) -> str:
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py") if module_of(path)}
"""Every module but the package itself, which looks its names up when they are first used."""


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes_that_run(child)


def imported_by(path: Path) -> Iterator[str]:
    """The full names that import statements name, inside functions too; a relative import keeps its dots."""
    for node in nodes_that_run(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)


def modules_imported_by(path: Path) -> Iterator[str]:
    for name in imported_by(path):
        package, _, rest = name.partition(".")
        if package == "kd_pipeline":
            # A module itself, as in `from kd_pipeline import losses`, or something that is in one.
            module = rest if rest in MODULES else rest.rpartition(".")[0]
            if module:
                yield module


def required_by(path: Path) -> Iterator[str]:
    """Packages that a module asks `require` for, by name or in a loop over names."""
    tree = ast.parse(path.read_text())
    loops = {
        loop.target.id: [item.value for item in loop.iter.elts if isinstance(item, ast.Constant)]
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and isinstance(loop.iter, ast.Tuple)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            (argument,) = node.args
            names = loops[argument.id] if isinstance(argument, ast.Name) else [ast.literal_eval(argument)]
            yield from (name.partition(".")[0] for name in names)


def test_map_is_complete():
    assert {module.partition(".")[0] for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_up_the_map(package):
    above = PACKAGES[: PACKAGES.index(package) + 1]
    for module, path in MODULES.items():
        if module.partition(".")[0] == package:
            wrong = [other for other in modules_imported_by(path) if other.partition(".")[0] not in above]
            assert not wrong, f"{module} imports {wrong}, which are not above it"


def test_no_import_cycle():
    graphlib.TopologicalSorter({module: set(modules_imported_by(path)) for module, path in MODULES.items()}).prepare()


def test_import_statements_name_only_what_is_always_installed():
    allowed = EVERYWHERE | sys.stdlib_module_names | {"kd_pipeline"}
    for module, path in MODULES.items():
        packages = {name.partition(".")[0] for name in imported_by(path)}
        assert packages <= allowed, f"{module} imports {packages - allowed}"


def test_optional_packages_are_required_only_where_they_are_wrapped():
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for package in required_by(path):
            found.setdefault(package, set()).add(module)
    assert found == WRAPPED_IN
