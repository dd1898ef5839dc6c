"""Small ONNX models built node by node, with what no exporter would write."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NUM_CLASSES = 5
IMAGES = ("images", TensorProto.FLOAT, ["N", 3, 8, 8])
LOGITS = ("logits", TensorProto.FLOAT, ["N", NUM_CLASSES])

Value = tuple[str, int, Sequence[str | int] | None]


def linear_model(
    *,
    inputs: Sequence[Value] = (IMAGES,),
    outputs: Sequence[Value] = (LOGITS,),
    weights: int = TensorProto.FLOAT,
    seed: int = 0,
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """Global average pooling and a linear layer with weights of the given type; further outputs copy the input."""
    array = np.random.default_rng(seed).normal(size=(3, NUM_CLASSES)).astype(np.float32)
    weight = numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(weights)), "weight")
    nodes = [
        helper.make_node("GlobalAveragePool", [inputs[0][0]], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["cast"], to=weights),
        helper.make_node("MatMul", ["cast", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], [outputs[0][0]], to=outputs[0][1]),
        *(helper.make_node("Identity", [inputs[0][0]], [name]) for name, _, _ in outputs[1:]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    return model


def training_mode_model() -> onnx.ModelProto:
    """BatchNorm as `torch.onnx.export(training=TrainingMode.TRAINING)` writes it."""
    arrays = {name: np.full(3, value, np.float32) for name, value in {"g": 1, "b": 0, "m": 0, "v": 1}.items()}
    normalize = helper.make_node("BatchNormalization", ["images", *arrays], ["y", "m2", "v2"], training_mode=1)
    return _starting_with([normalize, helper.make_node("Flatten", ["y"], ["flat"])], arrays)


def active_dropout_model() -> onnx.ModelProto:
    """Dropout in training mode."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["whole"]),
        helper.make_node("Dropout", ["whole", "ratio", "trains"], ["flat"]),
    ]
    return _starting_with(nodes, {"ratio": np.array(0.5, np.float32), "trains": np.array(True)})


def noise_model() -> onnx.ModelProto:
    """Noise on the images, which is different in every call."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["whole"]),
        helper.make_node("RandomNormalLike", ["whole"], ["noise"], scale=0.1),
        helper.make_node("Add", ["whole", "noise"], ["flat"]),
    ]
    return _starting_with(nodes, {})


def fixed_batch_model(num_images: int) -> onnx.ModelProto:
    """A Reshape to a fixed number of rows, in a model whose inputs and outputs have a dynamic one."""
    reshape = helper.make_node("Reshape", ["images", "sizes"], ["flat"])
    return _starting_with([reshape], {"sizes": np.array([num_images, 192])})


def softmax_model() -> onnx.ModelProto:
    """A linear model with a softmax at its end."""
    model = linear_model()
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("Softmax", ["scores"], ["logits"], axis=1))
    return model


def _starting_with(nodes: Sequence[onnx.NodeProto], arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A linear model after `nodes`, which turn `images` into `flat` `[N, 192]`."""
    arrays = {**arrays, "weight": np.random.default_rng(0).normal(size=(192, NUM_CLASSES)).astype(np.float32)}
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["flat", "weight"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info(*IMAGES)],
        [helper.make_tensor_value_info(*LOGITS)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_external(
    folder: Path, change: Callable[[TensorProto], None] | None = None, *, seed: int = 0, name: str = "weights.bin"
) -> Path:
    """Write a linear model with its weights in a separate file; `change` may edit the reference to that file."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(linear_model(seed=seed), path, save_as_external_data=True, location=name, size_threshold=0)
    if change is not None:
        model = onnx.load(path, load_external_data=False)
        change(model.graph.initializer[0])
        path.write_bytes(model.SerializeToString())
    return path


def point_at(location: str) -> Callable[[TensorProto], None]:
    """A change for `write_external`: refer to the weights at `location`."""

    def change(tensor: TensorProto) -> None:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    return change
