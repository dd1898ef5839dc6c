"""Finding TensorRT, hearing it, and whether the installed one has all that the sources call."""

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
from tests.teachers import fake_tensorrt

PACKAGE = Path(tensorrt_package.__file__).parent
REAL_STREAM, REAL_EVENT, REAL_GRAPH = torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph


@pytest.fixture(scope="module")
def tensorrt_rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def messages(tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """What TensorRT has to say at each severity, as Python's logging gets it."""
    logger = open_tensorrt("tensorrt_rtx").logger
    severities = tensorrt_rtx.ILogger
    open_tensorrt("tensorrt_rtx").take_errors()
    with caplog.at_level(logging.DEBUG, "kd_pipeline.tensorrt"):
        for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
            logger.log(getattr(severities, name), f"100% {name}")
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_tensorrts_voice_is_python_logging_at_fitting_levels(messages: list[tuple[int, str]]) -> None:
    assert messages == [
        (logging.DEBUG, "100% INFO"),
        (logging.WARNING, "100% WARNING"),
        (logging.ERROR, "100% ERROR"),
        (logging.ERROR, "100% INTERNAL_ERROR"),
    ]


def test_errors_are_remembered_until_they_are_taken(messages: list[tuple[int, str]]) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    assert tensorrt.take_errors() == "100% ERROR; 100% INTERNAL_ERROR"
    assert tensorrt.take_errors() == ""


@pytest.mark.parametrize("result", [None, False])
def test_a_failed_call_is_an_error_with_tensorrts_text(tensorrt_rtx: Any, result: object) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    tensorrt.take_errors()
    tensorrt.logger.log(tensorrt_rtx.ILogger.ERROR, "out of memory\n")
    with pytest.raises(EngineError, match=r"^the engine does not load: out of memory$"):
        tensorrt.check(result, "the engine does not load")
    with pytest.raises(EngineError, match=r"^the engine does not load: TensorRT does not say why$"):
        tensorrt.check(result, "the engine does not load")


@pytest.mark.parametrize("result", [True, 0, (), b"", object()])
def test_any_other_result_of_a_call_is_handed_back(tensorrt_rtx: Any, result: object) -> None:
    assert open_tensorrt("tensorrt_rtx").check(result, "it failed") is result


def test_a_flood_of_errors_from_many_threads_is_bounded(tensorrt_rtx: Any) -> None:
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


def test_the_real_builder_speaks_through_the_logger(tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    tensorrt.take_errors()
    with caplog.at_level(logging.DEBUG, "kd_pipeline.tensorrt"):
        network = tensorrt.module.Builder(tensorrt.logger).create_network(0)
        tensorrt.module.OnnxParser(network, tensorrt.logger).parse(b"no ONNX file")
    assert {record.name for record in caplog.records} == {"kd_pipeline.tensorrt"}
    assert tensorrt.take_errors()


def test_one_logger_serves_the_whole_process_and_tensorrt_does_not_complain(
    tensorrt_rtx: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = open_tensorrt("tensorrt_rtx"), open_tensorrt("tensorrt_rtx")
    assert first is second
    for tensorrt in (first, second):
        assert tensorrt.module.Builder(tensorrt.logger) is not None
    assert "logger passed into" not in caplog.text + "".join(capfd.readouterr())


def test_what_was_opened_is_named(tensorrt_rtx: Any) -> None:
    tensorrt = open_tensorrt("tensorrt_rtx")
    assert (tensorrt.runtime, tensorrt.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    assert tensorrt.module is tensorrt_rtx


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make believe that these flavors are installed, and no others."""
    monkeypatch.setattr(tensorrt_package, "_open", tensorrt_package._open.__wrapped__)

    def install(*flavors: str) -> None:
        for flavor in ("tensorrt", "tensorrt_rtx"):
            library = fake_tensorrt.Library(fake_tensorrt.Gpu(), flavor, {})
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
def test_auto_takes_tensorrt_before_rtx(installed: Any, flavors: tuple[str, ...], asked: Any, opened: str) -> None:
    installed(*flavors)
    tensorrt = open_tensorrt(asked)
    assert tensorrt.runtime == opened and tensorrt.module is sys.modules[opened]


def test_what_is_not_installed_is_said_with_what_to_type(installed: Any) -> None:
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
"""Which expressions are TensorRT's objects, in each file that has some."""
MODULES = ("tensorrt.module", "module", "trt", "base")


def uses(file: str) -> list[tuple[str, str, str, ast.Call | None]]:
    """Attributes of TensorRT's objects in a file: expression, class, attribute, and the call if it is one."""
    tree = ast.parse((PACKAGE / file).read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        (expression, OBJECTS[file][expression], node.attr, calls.get(id(node)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (expression := ast.unparse(node.value)) in OBJECTS[file]
    ]


def signatures(method: Any) -> list[list[str]]:
    """The names of the parameters of each overload, from the docstring that pybind11 writes."""
    name = method.__name__
    lines = re.findall(rf"^(?:\d+\. )?{name}\(self: [\w.]+(.*?)\) ->", method.__doc__, re.MULTILINE)
    return [re.findall(r"(\w+): ", line) for line in lines]


def accepts(method: Any, num_positional: int, keywords: set[str]) -> bool:
    return any(
        num_positional + len(keywords) <= len(names) and keywords <= set(names[num_positional:])
        for names in signatures(method)
    )


@pytest.mark.parametrize("file", OBJECTS)
def test_the_installed_tensorrt_has_all_that_a_file_uses_with_as_many_arguments(tensorrt_rtx: Any, file: str) -> None:
    found = uses(file)
    assert {kind for _, kind, _, _ in found} == set(OBJECTS[file].values())
    for expression, kind, name, call in found:
        attribute = getattr(getattr(tensorrt_rtx, kind), name, None)
        assert attribute is not None, f"{file}: {expression}.{name}: {kind} has no such thing"
        if call is not None and not any(isinstance(argument, ast.Starred) for argument in call.args):
            keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert accepts(attribute, len(call.args), keywords), f"{file}: {ast.unparse(call)}: {attribute.__doc__}"


@pytest.mark.parametrize("file", [*OBJECTS, "package.py"])
def test_the_installed_tensorrt_has_all_classes_and_constants_that_a_file_names(tensorrt_rtx: Any, file: str) -> None:
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


FAKES = [
    fake_tensorrt.ILogger,
    fake_tensorrt.Runtime,
    fake_tensorrt.RtxRuntime,
    fake_tensorrt.ICudaEngine,
    fake_tensorrt.RtxEngine,
    fake_tensorrt.IRuntimeConfig,
    fake_tensorrt.IRuntimeCache,
    fake_tensorrt.IExecutionContext,
    fake_tensorrt.DataType,
    fake_tensorrt.TensorFormat,
    fake_tensorrt.TensorIOMode,
    fake_tensorrt.EngineValidity,
    fake_tensorrt.EngineInvalidityDiagnostics,
    fake_tensorrt.CudaGraphStrategy,
]


def public(fake: type) -> dict[str, Any]:
    return {name: value for name, value in vars(fake).items() if not name.startswith("_")}


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: fake.__name__)
def test_the_fake_tensorrt_has_the_real_methods_with_the_real_parameters(tensorrt_rtx: Any, fake: type) -> None:
    real = getattr(tensorrt_rtx, fake.__doc__.split("`")[1].rpartition(".")[2])
    assert public(fake)
    for name, value in public(fake).items():
        assert hasattr(real, name), f"{real} has no {name}"
        if inspect.isfunction(value):
            parameters = list(inspect.signature(value).parameters)[1:]
            assert parameters in [names[: len(parameters)] for names in signatures(getattr(real, name))]


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_the_fake_objects_have_only_the_properties_of_the_real_ones(tensorrt_rtx: Any, flavor: str) -> None:
    library = fake_tensorrt.Library(fake_tensorrt.Gpu(), flavor, {b"": fake_tensorrt.Plan()})
    runtime = library.module.Runtime(fake_tensorrt.ILogger())
    engine = runtime.deserialize_cuda_engine(b"")
    objects = {"Runtime": runtime, "ICudaEngine": engine}
    if flavor == "tensorrt_rtx":
        objects["IRuntimeConfig"] = engine.create_runtime_config()
    for kind, each in objects.items():
        names = [name for name in vars(each) if not name.startswith("_")]
        assert names and all(hasattr(getattr(tensorrt_rtx, kind), name) for name in names)


def test_only_rtx_has_what_only_rtx_has() -> None:
    """The functions that TensorRT 10 and 11 lack are looked for, or called for the other flavor alone."""
    assert not hasattr(fake_tensorrt.Runtime, "get_engine_validity")
    assert not hasattr(fake_tensorrt.ICudaEngine, "create_runtime_config")


def test_the_fake_cuda_has_the_real_methods_with_the_real_parameters() -> None:
    core, graph = pytest.importorskip("cuda.core"), pytest.importorskip("cuda.core.graph")
    pairs = {
        core.Device: fake_tensorrt.Device,
        core.Stream: fake_tensorrt.Stream,
        core.Event: fake_tensorrt.Event,
        graph.GraphBuilder: fake_tensorrt.GraphBuilder,
        graph.Graph: fake_tensorrt.Graph,
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


def test_the_fake_torch_has_the_real_methods() -> None:
    pairs = {
        REAL_STREAM: fake_tensorrt.TorchStream,
        REAL_EVENT: fake_tensorrt.TorchEvent,
        REAL_GRAPH: fake_tensorrt.CUDAGraph,
    }
    for real, fake in pairs.items():
        assert public(fake) and all(callable(getattr(real, name)) for name in public(fake))
    parameters = list(inspect.signature(fake_tensorrt.Gpu.capture).parameters)[1:]
    assert set(parameters) <= set(inspect.signature(torch.cuda.graph).parameters)
    assert hasattr(REAL_STREAM, "__cuda_stream__") and hasattr(REAL_STREAM, "cuda_stream")


# GPUs


@pytest.mark.parametrize(
    ("flavors", "capability", "runtime", "reason"),
    [
        (("tensorrt",), (9, 0), "auto", None),
        (("tensorrt",), (7, 5), "auto", None),
        (("tensorrt",), (7, 0), "auto", "tensorrt is not made for 7.0"),
        (("tensorrt", "tensorrt_rtx"), (9, 0), "auto", None),
        (("tensorrt_rtx",), (9, 0), "auto", "tensorrt_rtx is not made for 9.0"),
        (("tensorrt", "tensorrt_rtx"), (9, 0), "tensorrt_rtx", "tensorrt_rtx is not made for 9.0"),
        (("tensorrt_rtx",), (8, 9), "auto", None),
        (("tensorrt_rtx",), (12, 0), "auto", None),
    ],
)
def test_a_gpu_that_tensorrt_is_not_made_for_is_known(
    installed: Any, flavors: tuple[str, ...], capability: tuple[int, int], runtime: Any, reason: str | None
) -> None:
    installed(*flavors)
    if "tensorrt_rtx" in flavors:
        capabilities = SimpleNamespace(SM75=0, SM80=1, SM86=2, SM89=3, SM120=4)
        sys.modules["tensorrt_rtx"].ComputeCapability = capabilities
    assert why_unusable(capability, runtime) == reason


def test_without_tensorrt_the_reason_is_what_to_install(installed: Any) -> None:
    installed()
    assert "kd_pipeline[trt]" in why_unusable((9, 0)) and "kd_pipeline[rtx]" in why_unusable((9, 0))


def test_the_real_rtx_names_its_gpus(tensorrt_rtx: Any) -> None:
    assert why_unusable((8, 9), "tensorrt_rtx") is None
    assert why_unusable((9, 0), "tensorrt_rtx") == "tensorrt_rtx is not made for 9.0"
