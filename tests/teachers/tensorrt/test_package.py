"""Importing and logging TensorRT, and whether the installed one has all that the sources use."""

import ast
import inspect
import logging
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_pipeline.errors import EngineError, MissingPackageError
from kd_pipeline.teachers.tensorrt import package as tensorrt_package
from kd_pipeline.teachers.tensorrt.package import open_tensorrt, why_unusable
from tests.teachers import fake_gpu, fake_tensorrt

PACKAGE = Path(tensorrt_package.__file__).parent
REAL_STREAM, REAL_EVENT, REAL_GRAPH = torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph


@pytest.fixture(scope="module")
def tensorrt_rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def messages(tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """A message of TensorRT at each severity, as Python's logging gets them."""
    logger = open_tensorrt("tensorrt_rtx").logger
    severities = tensorrt_rtx.ILogger
    open_tensorrt("tensorrt_rtx").take_errors()
    with caplog.at_level(logging.DEBUG, "kd_pipeline.tensorrt"):
        for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
            logger.log(getattr(severities, name), f"100% {name}")
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_messages_reach_python_logging(messages: list[tuple[int, str]]) -> None:
    assert messages == [
        (logging.DEBUG, "100% INFO"),
        (logging.WARNING, "100% WARNING"),
        (logging.ERROR, "100% ERROR"),
        (logging.ERROR, "100% INTERNAL_ERROR"),
    ]


def test_errors_are_kept_until_taken(messages: list[tuple[int, str]]) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    assert tensorrt.take_errors() == "100% ERROR; 100% INTERNAL_ERROR"
    assert tensorrt.take_errors() == ""


@pytest.mark.parametrize("result", [None, False])
def test_failed_call_raises_with_tensorrt_text(tensorrt_rtx: Any, result: object) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    tensorrt.take_errors()
    tensorrt.logger.log(tensorrt_rtx.ILogger.ERROR, "out of memory\n")
    with pytest.raises(EngineError, match=r"^the engine does not load: out of memory$"):
        tensorrt.check(result, "the engine does not load")
    with pytest.raises(EngineError, match=r"^the engine does not load: TensorRT gives no reason$"):
        tensorrt.check(result, "the engine does not load")


@pytest.mark.parametrize("result", [True, 0, (), b"", object()])
def test_other_results_pass_through(tensorrt_rtx: Any, result: object) -> None:
    assert open_tensorrt("tensorrt_rtx").check(result, "it failed") is result


def test_kept_errors_are_bounded_across_threads(tensorrt_rtx: Any) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    tensorrt.take_errors()
    log = tensorrt.logger.log
    threads = [
        threading.Thread(target=lambda: [log(tensorrt_rtx.ILogger.ERROR, "no") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tensorrt.take_errors() == "; ".join(["no"] * 8)


def test_real_builder_uses_logger(tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    tensorrt.take_errors()
    with caplog.at_level(logging.DEBUG, "kd_pipeline.tensorrt"):
        network = tensorrt.module.Builder(tensorrt.logger).create_network(0)
        tensorrt.module.OnnxParser(network, tensorrt.logger).parse(b"no ONNX file")
    assert {record.name for record in caplog.records} == {"kd_pipeline.tensorrt"}
    assert tensorrt.take_errors()


def test_one_logger_per_process(
    tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = open_tensorrt("tensorrt_rtx"), open_tensorrt("tensorrt_rtx")
    assert first is second
    for tensorrt in (first, second):
        assert tensorrt.module.Builder(tensorrt.logger) is not None
    assert "logger passed into" not in caplog.text + "".join(capfd.readouterr())


def test_opened_package_is_named(tensorrt_rtx: Any) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    assert (tensorrt.runtime, tensorrt.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    assert tensorrt.module is tensorrt_rtx


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`installed("tensorrt")`: pretend that only these packages are installed."""
    monkeypatch.setattr(tensorrt_package, "_open", tensorrt_package._open.__wrapped__)

    def install(*flavors: str) -> None:
        for flavor in ("tensorrt", "tensorrt_rtx"):
            library = fake_tensorrt.Library(fake_gpu.Gpu(), flavor, {})
            monkeypatch.setitem(sys.modules, flavor, library.module if flavor in flavors else None)

    return install


@pytest.mark.parametrize(
    ("flavors", "asked", "opened"),
    [
        (("tensorrt", "tensorrt_rtx"), "auto", "tensorrt"),
        (("tensorrt",), "auto", "tensorrt"),
        (("tensorrt_rtx",), "auto", "tensorrt_rtx"),
        (("tensorrt", "tensorrt_rtx"), "tensorrt_rtx", "tensorrt_rtx"),
    ],
)
def test_auto_prefers_tensorrt(installed: Any, flavors: tuple[str, ...], asked: Any, opened: str) -> None:
    installed(*flavors)
    tensorrt = open_tensorrt(asked)
    assert tensorrt.runtime == opened and tensorrt.module is sys.modules[opened]


def test_missing_package_says_what_to_install(installed: Any) -> None:
    installed()
    with pytest.raises(MissingPackageError, match=r"^tensorrt is needed .* pip install 'kd_pipeline\[trt\]'$"):
        open_tensorrt("tensorrt")
    with pytest.raises(MissingPackageError, match=r"^tensorrt_rtx is needed .* pip install 'kd_pipeline\[rtx\]'$"):
        open_tensorrt("tensorrt_rtx")
    with pytest.raises(MissingPackageError, match=r"kd_pipeline\[trt\]'.*, or else .*kd_pipeline\[rtx\]'"):
        open_tensorrt()


# The interfaces of the real packages


OBJECTS = {
    "teacher.py": {"context": "IExecutionContext", "self._context": "IExecutionContext"},
    "runtime.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "self.config": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
    },
    "builder_process.py": {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "error": "ParserError",
    },
}
"""The expressions in each file that are objects of TensorRT, and their classes."""
MODULES = ("tensorrt.module", "module", "base")


def uses(file: str) -> list[tuple[str, str, str, ast.Call | None]]:
    """Attributes of TensorRT objects in a file: expression, class, attribute, and the call if it is one."""
    tree = ast.parse((PACKAGE / file).read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        (expression, OBJECTS[file][expression], node.attr, calls.get(id(node)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (expression := ast.unparse(node.value)) in OBJECTS[file]
    ]


def signatures(method: Any) -> list[list[str]]:
    """Parameter names of each overload, from the docstring that pybind11 generates."""
    name = method.__name__
    lines = re.findall(rf"^(?:\d+\. )?{name}\(self: [\w.]+(.*?)\) ->", method.__doc__, re.MULTILINE)
    return [re.findall(r"(\w+): ", line) for line in lines]


def accepts(method: Any, num_positional: int, keywords: set[str]) -> bool:
    return any(
        num_positional + len(keywords) <= len(names) and keywords <= set(names[num_positional:])
        for names in signatures(method)
    )


@pytest.mark.parametrize("file", OBJECTS)
def test_installed_tensorrt_has_used_methods(tensorrt_rtx: Any, file: str) -> None:
    found = uses(file)
    assert {kind for _, kind, _, _ in found} == set(OBJECTS[file].values())
    for expression, kind, name, call in found:
        attribute = getattr(getattr(tensorrt_rtx, kind), name, None)
        assert attribute is not None, f"{file}: {expression}.{name}: {kind} has no such attribute"
        if call is not None and not any(isinstance(argument, ast.Starred) for argument in call.args):
            keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert accepts(attribute, len(call.args), keywords), f"{file}: {ast.unparse(call)}: {attribute.__doc__}"


@pytest.mark.parametrize("file", [*OBJECTS, "package.py"])
def test_installed_tensorrt_has_used_constants(tensorrt_rtx: Any, file: str) -> None:
    tree = ast.parse((PACKAGE / file).read_text())
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for chain in chains:
        module = next((module for module in MODULES if chain.startswith(f"{module}.")), None)
        if module is None:
            continue
        names = chain.removeprefix(f"{module}.").split(".")
        found = tensorrt_rtx.ILogger if module == "base" else tensorrt_rtx
        for name in names:
            if name in ("items", "__members__", "module"):
                break
            assert hasattr(found, name), f"{file}: {chain}"
            found = getattr(found, name)


FAKES = [each for each in vars(fake_tensorrt).values() if str(each.__doc__).startswith("`tensorrt")]


def public(fake: type) -> dict[str, Any]:
    return {name: value for name, value in vars(fake).items() if not name.startswith("_")}


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: fake.__name__)
def test_fake_tensorrt_has_real_signatures(tensorrt_rtx: Any, fake: type) -> None:
    real = getattr(tensorrt_rtx, fake.__doc__.split("`")[1].rpartition(".")[2])
    assert public(fake)
    for name, value in public(fake).items():
        assert hasattr(real, name), f"{real} has no {name}"
        if inspect.isfunction(value):
            parameters = list(inspect.signature(value).parameters)[1:]
            assert parameters in [names[: len(parameters)] for names in signatures(getattr(real, name))]


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_fake_objects_have_real_properties(tensorrt_rtx: Any, flavor: str) -> None:
    library = fake_tensorrt.Library(fake_gpu.Gpu(), flavor, {b"": fake_tensorrt.Plan()})
    runtime = library.module.Runtime(fake_tensorrt.ILogger())
    engine = runtime.deserialize_cuda_engine(b"")
    objects = {"Runtime": runtime, "ICudaEngine": engine}
    if flavor == "tensorrt_rtx":
        objects["IRuntimeConfig"] = engine.create_runtime_config()
    for kind, each in objects.items():
        names = [name for name in vars(each) if not name.startswith("_")]
        assert names and all(hasattr(getattr(tensorrt_rtx, kind), name) for name in names)


def test_rtx_only_methods_are_rtx_only() -> None:
    """Functions that TensorRT 10 and 11 lack are looked up first, or called for TensorRT-RTX only."""
    assert not hasattr(fake_tensorrt.Runtime, "get_engine_validity")
    assert not hasattr(fake_tensorrt.ICudaEngine, "create_runtime_config")


def test_fake_cuda_core_has_real_signatures() -> None:
    core, graph = pytest.importorskip("cuda.core"), pytest.importorskip("cuda.core.graph")
    pairs = {
        core.Device: fake_gpu.Device,
        core.Stream: fake_gpu.Stream,
        core.Event: fake_gpu.Event,
        graph.GraphBuilder: fake_gpu.GraphBuilder,
        graph.Graph: fake_gpu.Graph,
    }
    for real, fake in pairs.items():
        assert public(fake)
        for name, value in public(fake).items():
            if inspect.isfunction(value):
                parameters = list(inspect.signature(value).parameters)
                assert list(inspect.signature(getattr(real, name)).parameters)[: len(parameters)] == parameters
            else:
                assert inspect.isdatadescriptor(getattr(real, name))
    assert all(hasattr(kind, "handle") for kind in (core.Stream, core.Event))
    assert hasattr(graph.GraphBuilder, "stream")


def test_fake_torch_has_real_methods() -> None:
    pairs = {
        REAL_STREAM: fake_gpu.TorchStream,
        REAL_EVENT: fake_gpu.TorchEvent,
        REAL_GRAPH: fake_gpu.CUDAGraph,
    }
    for real, fake in pairs.items():
        assert public(fake) and all(callable(getattr(real, name)) for name in public(fake))
    parameters = list(inspect.signature(fake_gpu.Gpu.capture).parameters)[1:]
    assert set(parameters) <= set(inspect.signature(torch.cuda.graph).parameters)
    assert hasattr(REAL_STREAM, "__cuda_stream__") and hasattr(REAL_STREAM, "cuda_stream")


# GPUs


@pytest.mark.parametrize(
    ("flavors", "capability", "runtime", "reason"),
    [
        (("tensorrt",), (9, 0), "auto", None),
        (("tensorrt",), (7, 5), "auto", None),
        (("tensorrt",), (7, 0), "auto", "tensorrt does not support compute capability 7.0"),
        (("tensorrt", "tensorrt_rtx"), (9, 0), "auto", None),
        (("tensorrt_rtx",), (9, 0), "auto", "tensorrt_rtx does not support compute capability 9.0"),
        (("tensorrt", "tensorrt_rtx"), (9, 0), "tensorrt_rtx", "tensorrt_rtx does not support compute capability 9.0"),
        (("tensorrt_rtx",), (8, 9), "auto", None),
        (("tensorrt_rtx",), (12, 0), "auto", None),
    ],
)
def test_unsupported_gpu_has_reason(
    installed: Any, flavors: tuple[str, ...], capability: tuple[int, int], runtime: Any, reason: str | None
) -> None:
    installed(*flavors)
    if "tensorrt_rtx" in flavors:
        capabilities = SimpleNamespace(SM75=0, SM80=1, SM86=2, SM89=3, SM120=4)
        sys.modules["tensorrt_rtx"].ComputeCapability = capabilities
    assert why_unusable(capability, runtime) == reason


def test_missing_tensorrt_is_reason(installed: Any) -> None:
    installed()
    assert "kd_pipeline[trt]" in why_unusable((9, 0)) and "kd_pipeline[rtx]" in why_unusable((9, 0))


def test_real_rtx_lists_its_gpus(tensorrt_rtx: Any) -> None:
    assert why_unusable((8, 9), "tensorrt_rtx") is None
    assert why_unusable((9, 0), "tensorrt_rtx") == "tensorrt_rtx does not support compute capability 9.0"
