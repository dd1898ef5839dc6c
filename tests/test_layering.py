"""FLOORS, read from top to bottom, is the map of the library: a room imports only from the floors above its own."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kd_pipeline"

FLOORS = [
    "errors",
    "child_process known_names optional settings threads user_cache whole_file",
    "nvidia_driver plugins ramp tensorrt_package",
    "batch data",
    "data.fingerprint data.index_cache data.labels",
    "data.arrays data.files data.plain_pickle",
    "data.cifar",
    "data.file_list data.image_folder",
    "data.source",
    "data.plan",
    "data.auto_augment",
    "data.transform",
    "input_adapter data.mix",
    "data.graph",
    "data.decode_trial",
    "data.decode",
    "data_settings",
    "data.bad_samples",
    "data.reader",
    "models",
    "teachers.base teachers.engine_file",
    "teachers.recording",
    "teachers.recorded",
    "teachers.ensemble teachers.onnx_file teachers.permuted teachers.pytorch",
    "taps",
    "teachers.trt_engine",
    "teachers.ort teachers.ov teachers.trt",
    "engine.cache engine.compile engine.export engine.parity",
    "engine.build_settings engine.edit engine.load",
    "engine.precision engine.quantize",
    "engine.build",
    "engine",
    "teachers",
    "losses._rows",
    "losses.hard losses.similarity losses.soft",
    "losses.features",
    "losses",
    "state stream",
    "replay",
    "loader",
    "distill_settings",
    "distillation evaluation probe model_files",
    "comparison prediction",
    "report.canvas",
    "report report.curves report.grid report.scaling bench.measure bench.photographs",
    "bench.loaders bench.starts bench.teacher_race",
    "bench.scale bench.teachers",
    "bench",
    "report.bars",
    "plain_yaml",
    "config_file",
    "training training.optimizers training.processes training.schedules training.rng training.sharding",
    "training.ema",
    "training.checkpoint training.train_settings",
    "training.early_stopping training.signals",
    "config",
    "training.export training.folder training.metrics training.module",
    "training.loggers training.teacher",
    "check record training.run",
    "bench.ways",
    "bench.isolated",
    "bench.step_result",
    "bench.step",
    "demo doctor",
    "cli.arguments",
    "cli.bench cli.build_engine cli.check cli.demo cli.doctor cli.eval cli.predict cli.record cli.train",
    "cli",
    "__main__",
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}

EVERYWHERE = {"PIL", "numpy", "pydantic", "pydantic_core", "torch", "yaml"}
"""What the library cannot do without, from setup.cfg."""
WRAPPED_IN = {
    "comet_ml": {"training.loggers"},
    "cuda": {"doctor", "teachers.trt"},
    "lightning": {"doctor"} | {f"training.{room}" for room in ("checkpoint", "loggers", "metrics", "module", "run")},
    "mlflow": {"training.loggers"},
    "nvidia": {"bench.loaders", "data.auto_augment", "data.decode", "data.graph", "data.transform", "doctor", "loader"},
    "onnx": {"doctor", "engine.edit", "engine.export", "engine.precision", "teachers.onnx_file"},
    "onnx_ir": {"engine.edit", "engine.precision", "engine.quantize"},
    "onnxruntime": {"doctor", "engine.export", "engine.precision", "engine.quantize", "teachers.ort"},
    "onnxscript": {"doctor", "engine.export"},
    "openvino": {"doctor", "teachers.ov"},
    "rich": {"demo"},
    "safetensors": {"models", "training.export"},
    "sklearn": {"bench.photographs", "demo"},
    "tensorrt": {"doctor", "tensorrt_package"},
    "tensorrt_rtx": {"doctor", "tensorrt_package"},
    "timm": {"doctor", "models", "training.optimizers"},
    "torchmetrics": {"evaluation"},
    "torchvision": {"bench.loaders", "bench.step", "doctor", "models"},
    "wandb": {"training.loggers"},
}
"""Optional packages, and the rooms that may ask for them through `require`."""


def room_of(path: Path) -> str:
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


ROOMS = {room_of(path): path for path in PACKAGE.rglob("*.py") if room_of(path)}
"""Every module but the package itself, which looks its names up when they are first used."""


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes_that_run(child)


def imported_by(path: Path) -> Iterator[str]:
    """The full names that import statements name, wherever they stand; a relative import keeps its dots."""
    for node in nodes_that_run(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)


def rooms_imported_by(path: Path) -> Iterator[str]:
    for name in imported_by(path):
        package, _, rest = name.partition(".")
        if package == "kd_pipeline":
            # A room itself, as in `from kd_pipeline import losses`, or something that is in one.
            room = rest if rest in ROOMS else rest.rpartition(".")[0]
            if room:
                yield room


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


def test_every_module_is_on_the_map_and_the_map_shows_nothing_else():
    assert sorted(ROOMS) == sorted(FLOOR_OF)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_from_the_floors_above_it(room):
    below = [other for other in rooms_imported_by(ROOMS[room]) if FLOOR_OF[other] >= FLOOR_OF[room]]
    assert not below, f"{room} imports {below}, which are not above it"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_import_statements_name_only_what_is_always_installed(room):
    packages = {name.partition(".")[0] for name in imported_by(ROOMS[room])}
    assert packages <= EVERYWHERE | sys.stdlib_module_names | {"kd_pipeline"}


def test_optional_packages_are_asked_for_only_in_the_rooms_that_wrap_them():
    found: dict[str, set[str]] = {}
    for room, path in ROOMS.items():
        for package in required_by(path):
            found.setdefault(package, set()).add(room)
    assert found == WRAPPED_IN
