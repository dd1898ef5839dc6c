"""The graphs of a GPU, as they are defined, which takes none: where each operator runs, and what is copied.

They are not built here: what DALI checks only then, and what a GPU computes, is a matter of `tests/gpu`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from nvidia.dali import Pipeline, ops

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.affine import AffineSettings
from kd_pipeline.data.auto_augment import RandAugment, TrivialAugment
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.own_ops_trial import try_own_ops
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, FollowingView, TrainView, Views
from kd_pipeline.errors import ConfigError
from tests.views import graph_settings

OWN = [
    {"factory": "tests.own_ops:shift", "num_draws": 1, "probability": 0.5},
    {"factory": "tests.own_ops:mirror", "num_draws": 1, "changes": "positions"},
    {"factory": "tests.own_ops:zoom", "changes": "positions"},
]
EVERY_OP: dict[str, Any] = {
    **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2, "blur": 0.5, "erase": 0.5},
    "affine": AffineSettings(rotate=10),
    "interpolation": "random",
}
CHANGING = TrainTransform.model_validate({"size": {"choices": [16, [24, 32]]}, "order": OWN})
TRANSFORMS = {
    "eval": EvalTransform(size=32),
    "eval bicubic float16": EvalTransform(size=32, interpolation="bicubic", dtype="float16"),
    "train": TrainTransform(size=32),
    "every op": TrainTransform(size=32, **EVERY_OP),
    "every op float16": TrainTransform(size=32, **EVERY_OP, dtype="float16"),
    "randaugment": TrainTransform(size=32, auto_augment=RandAugment(), **EVERY_OP),
    "trivialaugment": TrainTransform(size=(16, 32), auto_augment=TrivialAugment(), erase=0.5),
    "own ops, and sizes that change": CHANGING,
}
MORE_VIEWS = {
    "teacher": FollowingView(follow=IMAGES, size=40),
    "clean": FollowingView(follow=IMAGES, size=32, color="none", erase="own", interpolation="bicubic"),
    "local": TrainView(size=16, count=3, hue=0.1, blur=0.5, auto_augment=TrivialAugment()),
    "single": TrainView(size=16, count=1, interpolation="random"),
    "whole": EvalView(size=24),
    "changing": TrainView.model_validate({"size": {"start": 32, "end": 64, "epochs": 3}, "order": OWN}),
    "shared": FollowingView(follow="changing", size=32),
}
STORES = [("files", "window"), ("files", "full"), ("bytes", "window"), ("bytes", "full"), ("pixels", "window")]
OPS_ON = {"cpu": ops.cpu_ops(), "gpu": ops.gpu_ops(), "mixed": ops.mixed_ops()}

Define = Callable[[Callable[[], object]], Pipeline]


class Defined(Exception):
    """A pipeline would be built."""


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Define:
    """`define(make)` is the first pipeline that `make()` would build, with its operators in `_ops`."""

    def build(pipeline: Pipeline) -> None:
        raise Defined(pipeline)

    def defined(make: Callable[[], object]) -> Pipeline:
        with pytest.raises(Defined) as caught:
            make()
        (pipeline,) = caught.value.args
        pipeline._build_graph()  # which checks the arguments of each operator
        return pipeline

    monkeypatch.setattr(Pipeline, "build", build)
    return defined


def graph_of(views: Views, stores: Any, decode: Any = "window") -> Graph:
    settings = replace(graph_settings(2, decode=decode), device_id=0)
    return Graph(iter(()), stores, views.opened(["tests.own_ops"]), settings, FileChecker(settings))


def edges(op: Any) -> Iterator[tuple[int, Any]]:
    """The positional inputs of an operator, by their number."""
    return enumerate(op.inputs[: op.spec.NumRegularInput()])


def made_on(edge: Any) -> str:
    device: str = edge.source.outputs[edge.index].device
    return device


def faults(pipeline: Pipeline) -> list[str]:
    """What DALI refuses when it builds a pipeline for a GPU, or is slow: a copy back to the host."""
    found = []
    for op in pipeline._ops:
        name, device = op._op.schema.Name(), op._op.device
        if name not in OPS_ON[device]:
            found.append(f"{name} does not run on {device}")
        for number, edge in edges(op):
            wanted = op._op.schema.GetInputDevice(number, edge.device, device)
            if edge.device != ("cpu" if wanted == "mixed" else wanted):
                found.append(f"input {number} of {name} on {device} is on {edge.device}")
            if (edge.device, made_on(edge)) == ("cpu", "gpu"):
                found.append(f"input {number} of {name} is copied to the host")
        named = op.inputs[op.spec.NumRegularInput() :]
        found += [f"a named argument of {name} is on {edge.device}" for edge in named if edge.device != "cpu"]
    return found


def comes_of_images(op: Any) -> bool:
    """Whether an operator is the source of images or reads what comes of it; that of parameters has many outputs."""
    if isinstance(op._op, ops.ExternalSource):
        return op._output_index is None
    return any(comes_of_images(edge.source) for edge in op.inputs)


def copied_images(pipeline: Pipeline) -> set[str]:
    """Names of what comes of the images and is copied to the GPU, each of them once."""
    pairs = [(op, edge) for op in pipeline._ops for _, edge in edges(op)]
    moved = {edge.name: edge for _, edge in pairs if (edge.device, made_on(edge)) == ("gpu", "cpu")}
    return {name for name, edge in moved.items() if comes_of_images(edge.source)}


def decoders_of(pipeline: Pipeline) -> list[str]:
    return [op._op.schema.Name() for op in pipeline._ops if op._op.device == "mixed"]


@pytest.mark.parametrize(("stores", "decode"), STORES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_operators_run_where_their_inputs_are(define: Define, stores: str, decode: str, transform: Any) -> None:
    pipeline = define(lambda: graph_of(Views.of(transform), stores, decode))
    assert faults(pipeline) == []
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"]


@pytest.mark.parametrize(("stores", "decode"), STORES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_images_are_decoded_and_moved_once_for_all_views(
    define: Define, stores: str, decode: str, transform: Any
) -> None:
    pipeline = define(lambda: graph_of(Views.of(transform, MORE_VIEWS), stores, decode))
    assert faults(pipeline) == []
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"] * (1 + len(MORE_VIEWS))
    if stores == "pixels":
        assert len(copied_images(pipeline)) == 1 and decoders_of(pipeline) == []
    else:
        decoder = {"window": "decoders__ImageSlice", "full": "decoders__Image"}[decode]
        assert copied_images(pipeline) == set() and decoders_of(pipeline) == [decoder]


@pytest.mark.parametrize("part", ["header", "pixels"])
@pytest.mark.parametrize("decode", ["window", "full"])
def test_checker_decodes_as_the_graph_does(define: Define, part: Any, decode: Any) -> None:
    settings = replace(graph_settings(2, decode=decode), device_id=0)
    pipeline = define(FileChecker(settings)._build(part).build)
    assert faults(pipeline) == []
    kinds = {"window": "decoders__ImageSlice", "full": "decoders__Image"}
    assert decoders_of(pipeline) == ([] if part == "header" else [kinds[decode]])


def test_own_ops_are_tried_on_the_gpu(define: Define) -> None:
    views = Views.of(CHANGING).opened(["tests.own_ops"])
    pipeline = define(lambda: try_own_ops(views, device_id=0))
    assert faults(pipeline) == [] and [output.device for output in pipeline._graph_outputs] == ["gpu"]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("on_the_cpu", "on_the_cpu returned images on the cpu; leave them where they are"),
        ("named_on_the_gpu", r"named_on_the_gpu failed .*Named arguments must be on CPU"),
    ],
)
def test_own_op_with_nodes_in_the_wrong_place_is_refused(factory: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        try_own_ops(views_with(factory), device_id=0)


@pytest.mark.parametrize(
    ("factory", "fault"),
    [
        ("blank", "ZerosLike does not run on gpu"),
        ("by_way_of_the_cpu", "input 0 of Flip is copied to the host"),
    ],
)
def test_faults_are_found(define: Define, factory: str, fault: str) -> None:
    assert fault in faults(define(lambda: graph_of(views_with(factory), "pixels")))


def views_with(factory: str) -> Views:
    op = {"factory": f"tests.own_ops:{factory}", "num_draws": int(factory == "named_on_the_gpu")}
    return Views.of(TrainTransform.model_validate({"size": 16, "order": [op]})).opened(["tests.own_ops"])
