import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from kd_pipeline.errors import EngineError
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.edit import edit_onnx
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import ADAPTER_KEY, CLASSES_KEY, read_onnx
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, LogitsOnly, random_images, vit_backbone
from tests.teachers.onnx_models import linear_model, write_external

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
ADAPTER = InputAdapter(mean=MEAN, std=STD)
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    onnx.checker.check_model(path, full_check=True)
    teacher = OnnxRuntimeTeacher(path)
    try:
        return teacher(images)
    finally:
        teacher.close()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def saved(tmp_path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, tmp_path / "source.onnx")
    return tmp_path / "source.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A `ConvNet` with class names and a `LogitsOnly`."""
    folder = tmp_path_factory.mktemp("exported")
    both = export_onnx(ConvNet(), folder / "both.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES)
    alone = export_onnx(LogitsOnly(), folder / "alone.onnx", image_shape=IMAGE_SHAPE)
    return {"both": both.read_bytes(), "alone": alone.read_bytes()}


@pytest.fixture
def source(tmp_path: Path, exported: dict[str, bytes]) -> Path:
    path = tmp_path / "source.onnx"
    path.write_bytes(exported["both"])
    return path


@pytest.fixture
def single_output(tmp_path: Path, exported: dict[str, bytes]) -> Path:
    path = tmp_path / "source.onnx"
    path.write_bytes(exported["alone"])
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, IMAGE_SHAPE),
        ({"from_mean": (0.1, 0.2, 0.3), "from_std": (1.0, 2.0, 3.0)}, IMAGE_SHAPE),
        ({"size": 32}, (3, 48, 40)),
        ({"size": 32}, (3, 20, 27)),
    ],
)
def test_adapter_equals_export_with_adapter(
    tmp_path: Path, source: Path, changes: dict[str, object], shape: tuple[int, int, int]
) -> None:
    adapter = InputAdapter(mean=MEAN, std=STD, **changes)
    expected = export_onnx(ConvNet(), tmp_path / "expected.onnx", image_shape=shape, input_adapter=adapter)
    edited = edit_onnx(source, tmp_path / "edited.onnx", input_adapter=adapter)
    for num_images in (1, 5):
        images = random_images(num_images, shape=shape)
        assert_equal(run(edited, images), run(expected, images))


@pytest.mark.parametrize("opset", [13, 18])
def test_resize_in_older_opsets(tmp_path: Path, opset: int) -> None:
    adapter = InputAdapter(mean=MEAN, std=STD, size=5)
    images = random_images(3, shape=(3, 9, 7))
    found = []
    for version in (opset, 20):
        model = linear_model(inputs=[("images", FLOAT, ["N", 3, "H", "W"])])
        model.opset_import[0].version = version
        found.append(run(edit_onnx(saved(tmp_path, model), tmp_path / "edited.onnx", input_adapter=adapter), images))
    assert_equal(*found)


def test_input_shape_with_adapter(tmp_path: Path, source: Path) -> None:
    kept = read_onnx(edit_onnx(source, tmp_path / "kept.onnx", input_adapter=ADAPTER))
    resized = InputAdapter(mean=MEAN, std=STD, size=32)
    opened = read_onnx(edit_onnx(source, tmp_path / "opened.onnx", input_adapter=resized))
    assert (kept.input_name, str(kept.images)) == ("images", "[any, 3, 32, 32] float32")
    assert (opened.input_name, str(opened.images)) == ("images", "[any, 3, any, any] float32")
    assert opened.outputs == read_onnx(source).outputs


@pytest.mark.parametrize("size", [(5, 5), (6, 4)])
def test_adapter_on_dynamic_image_size(tmp_path: Path, size: tuple[int, int]) -> None:
    sizes = ["N", 3, "H", "W"]
    path = saved(tmp_path, linear_model(inputs=[("pixels", FLOAT, sizes)]))
    adapter = InputAdapter(mean=MEAN, std=STD, size=size)
    images = random_images(4, shape=(3, 11, 9))
    (found,) = run(edit_onnx(path, tmp_path / "edited.onnx", input_adapter=adapter), images).values()
    scale, shift = (
        torch.tensor(values).view(3, 1, 1)
        for values in (
            np.divide(adapter.from_std, STD, dtype=np.float32),
            (np.subtract(adapter.from_mean, MEAN) / STD).astype(np.float32),
        )
    )
    resized = nn.functional.interpolate(images * scale + shift, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, run(path, resized)["logits"], atol=1e-5, rtol=1e-5)
    same = read_onnx(edit_onnx(path, tmp_path / "same.onnx", input_adapter=ADAPTER))
    assert (same.input_name, str(same.images)) == ("pixels", "[any, 3, any, any] float32")


def test_float16_images(tmp_path: Path) -> None:
    path = saved(tmp_path, linear_model(inputs=[("images", FLOAT16, ["N", 3, 8, 8])]))
    edited = edit_onnx(path, tmp_path / "edited.onnx", input_adapter=InputAdapter(mean=MEAN, std=STD, size=8))
    assert str(read_onnx(edited).images) == "[any, 3, any, any] float16"
    run(edited, random_images(2, shape=(3, 9, 9)).half())


def test_adapter_is_in_metadata(tmp_path: Path, source: Path) -> None:
    edited = edit_onnx(source, tmp_path / "edited.onnx", input_adapter=ADAPTER)
    metadata = {entry.key: entry.value for entry in onnx.load(edited).metadata_props}
    assert InputAdapter.model_validate_json(metadata[ADAPTER_KEY]) == ADAPTER
    assert read_onnx(edited).classes == CLASSES


def test_second_adapter(tmp_path: Path) -> None:
    first, second = (InputAdapter(mean=MEAN, std=STD, size=size) for size in (32, 33))
    path = export_onnx(ConvNet(), tmp_path / "source.onnx", image_shape=IMAGE_SHAPE, input_adapter=first)
    with pytest.raises(EngineError, match=r'source\.onnx already has an input adapter, .*"size":32.* got .*"size":33'):
        edit_onnx(path, tmp_path / "edited.onnx", input_adapter=second)


def test_mismatched_adapter_size(tmp_path: Path, source: Path) -> None:
    with pytest.raises(EngineError, match=r"takes images \[any, 3, 32, 32\] float32, .* resizes them to 33 x 33"):
        edit_onnx(source, tmp_path / "edited.onnx", input_adapter=InputAdapter(mean=MEAN, std=STD, size=33))
    assert list(tmp_path.iterdir()) == [source]


def test_opset_without_resize(tmp_path: Path) -> None:
    model = linear_model(inputs=[("images", FLOAT, ["N", 3, "H", "W"])])
    model.opset_import[0].version = 10
    path = saved(tmp_path, model)
    run(edit_onnx(path, tmp_path / "edited.onnx", input_adapter=ADAPTER), random_images(2))
    with pytest.raises(EngineError, match="has opset 10, and a resize needs 11"):
        edit_onnx(path, tmp_path / "edited.onnx", input_adapter=InputAdapter(mean=MEAN, std=STD, size=8))


def test_weights_among_inputs(tmp_path: Path) -> None:
    listed, plain = linear_model(), linear_model()
    listed.graph.input.insert(0, helper.make_tensor_value_info("weight", FLOAT, [3, 5]))
    images = random_images(2, shape=(3, 8, 8))
    found, expected = (
        run(
            edit_onnx(saved(tmp_path, model), tmp_path / "edited.onnx", input_adapter=ADAPTER, outputs=["flat"]), images
        )
        for model in (listed, plain)
    )
    assert_equal(found, expected)


def test_extra_outputs(tmp_path: Path, single_output: Path) -> None:
    path = single_output
    computed = {node.op_type: node.output[0] for node in onnx.load(path).graph.node if node.op_type != "Gemm"}
    names = {computed["ReduceMean"]: (32,), computed["Relu"]: (32, 8, 8)}
    edited = edit_onnx(path, tmp_path / "edited.onnx", outputs=list(names))
    assert {name: spec.shape[1:] for name, spec in read_onnx(edited).outputs.items()} == {"logits": (10,), **names}

    module, seen = LogitsOnly().eval(), []
    module.net.body.register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    images = random_images(3)
    logits = module(images).detach()
    expected = {"logits": logits, computed["ReduceMean"]: seen[0].mean((2, 3)), computed["Relu"]: seen[0]}
    assert_equal(run(edited, images), expected)


def test_extra_outputs_with_adapter(tmp_path: Path, single_output: Path) -> None:
    adapter = InputAdapter(mean=MEAN, std=STD, size=32)
    name = next(node.output[0] for node in onnx.load(single_output).graph.node if node.op_type == "ReduceMean")
    both = edit_onnx(single_output, tmp_path / "edited.onnx", input_adapter=adapter, outputs=[name])
    expected = export_onnx(ConvNet(), tmp_path / "expected.onnx", image_shape=(3, 40, 40), input_adapter=adapter)
    images = random_images(3, shape=(3, 40, 40))
    features = run(expected, images)["features"].mean((2, 3))
    assert_equal(run(both, images), {"logits": run(expected, images)["logits"], name: features})


def test_single_output_is_renamed(tmp_path: Path) -> None:
    path = saved(tmp_path, linear_model(outputs=[("scores", FLOAT, ["N", 5])]))
    alone = edit_onnx(path, tmp_path / "alone.onnx", classes=["a", "b", "c", "d", "e"])
    joined = edit_onnx(path, tmp_path / "joined.onnx", outputs=["flat"])
    assert read_onnx(alone).output_names == {"logits": "scores"}
    assert read_onnx(joined).output_names == {"logits": "logits", "flat": "flat"}
    images = random_images(2, shape=(3, 8, 8))
    assert torch.equal(run(joined, images)["logits"], run(path, images)["logits"])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "vit.onnx"
    return export_onnx(vit_backbone(), path, image_shape=IMAGE_SHAPE, max_batch=2)


def test_file_without_logits(tmp_path: Path, backbone: Path) -> None:
    inner = next(node.output[0] for node in onnx.load(backbone).graph.node if node.op_type == "LayerNormalization")
    edited = edit_onnx(backbone, tmp_path / "edited.onnx", input_adapter=ADAPTER, outputs=[inner])
    assert {name: (spec.shape[1:], spec.num_prefix_tokens) for name, spec in read_onnx(edited).outputs.items()} == {
        "pooled": ((32,), None),
        "spatial": ((19, 32), 3),
        inner: ((19, 32), None),
    }
    with pytest.raises(EngineError, match=r"vit\.onnx returns 'pooled', 'spatial' and no 'logits', which class names"):
        edit_onnx(backbone, tmp_path / "other.onnx", classes=CLASSES)


def test_single_map_keeps_its_name(tmp_path: Path) -> None:
    model = linear_model(outputs=[("spare", FLOAT, ["N", 5]), ("map", FLOAT, ["N", 3, 8, 8])])
    del model.graph.output[0]
    edited = edit_onnx(saved(tmp_path, model), tmp_path / "edited.onnx", outputs=["flat"])
    assert read_onnx(edited).output_names == {"map": "map", "flat": "flat"}


def test_inner_tensor_called_logits(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"]))
    model.graph.output[0].name = "scores"
    path = saved(tmp_path, model)
    images = random_images(2, shape=(3, 8, 8))
    found = run(edit_onnx(path, tmp_path / "edited.onnx", outputs=["logits"]), images)
    torch.testing.assert_close(found["logits"].softmax(1), found["scores"])
    with pytest.raises(EngineError, match="'logits'"):  # two tensors of that name
        edit_onnx(path, tmp_path / "edited.onnx", outputs=["flat"])


class Folds(LogitsOnly):
    """Has four rows per image inside, as window attention does."""

    def forward(self, images: Tensor) -> Tensor:
        rows = self.net(images)["features"].reshape(-1, 8, 8, 8).relu()
        return rows.mean((2, 3)).reshape(-1, 32)[:, :10]


def model_with_odd_tensors() -> onnx.ModelProto:
    model = linear_model()
    model.graph.node.append(helper.make_node("Shape", ["images"], ["sizes"]))
    model.graph.node.append(helper.make_node("Identity", ["weight"], ["copy"]))
    model.graph.node.append(helper.make_node("Cast", ["flat"], ["indices"], to=TensorProto.INT64))
    model.graph.node.append(helper.make_node("ReduceMean", ["flat"], ["scalar"], keepdims=0))
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flatt", "computes no tensor 'flatt'; did you mean 'flat'"),
        ("Pooled", "computes no tensor 'Pooled'; did you mean 'pooled'"),
        ("qqq", "computes no tensor 'qqq'; there are 'scalar', 'indices'"),
        ("weight", "'weight' is an input or a weight"),
        ("images", "'images' is an input or a weight"),
        ("logits", "'logits' is an output already"),
        ("indices", r"'indices' is INT64 \[.*\], and an output must be float32"),
        ("sizes", r"'sizes' is INT64 \[4\], and an output must be float32"),
        (
            "copy",
            r"'copy' is FLOAT \[3,5\], and an output must be float32 or float16 with the batch as its first dimension",
        ),
        ("scalar", r"'scalar' is FLOAT \[\], and an output must be"),
    ],
)
def test_invalid_output(tmp_path: Path, name: str, message: str) -> None:
    path = saved(tmp_path, model_with_odd_tensors())
    with pytest.raises(EngineError, match=rf"source\.onnx:? .*{message}"):
        edit_onnx(path, tmp_path / "edited.onnx", outputs=[name])
    assert list(tmp_path.iterdir()) == [path]


def test_duplicate_output(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'flat' is an output already"):
        edit_onnx(saved(tmp_path, linear_model()), tmp_path / "edited.onnx", outputs=["flat", "flat"])


def test_output_with_several_rows_per_image(tmp_path: Path) -> None:
    path = export_onnx(Folds(), tmp_path / "source.onnx", image_shape=IMAGE_SHAPE)
    rows = [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Relu"][-1]
    with pytest.raises(EngineError, match=rf"'{rows}' is FLOAT \[4\*batch,8,8,8\]"):
        edit_onnx(path, tmp_path / "edited.onnx", outputs=[rows])


def test_classes(tmp_path: Path, single_output: Path) -> None:
    edited = edit_onnx(single_output, tmp_path / "edited.onnx", classes=CLASSES)
    assert read_onnx(edited).classes == CLASSES
    with pytest.raises(EngineError, match=r"source\.onnx has 10 logits and got 9 class names"):
        edit_onnx(single_output, tmp_path / "other.onnx", classes=CLASSES[:9])
    assert not (tmp_path / "other.onnx").exists()


def test_classes_are_replaced(tmp_path: Path, source: Path) -> None:
    names = CLASSES[::-1]
    edited = edit_onnx(source, tmp_path / "edited.onnx", classes=names)
    (text,) = [entry.value for entry in onnx.load(edited).metadata_props if entry.key == CLASSES_KEY]
    assert json.loads(text) == list(names)


def test_in_place_and_new_folder(tmp_path: Path, source: Path) -> None:
    images = random_images(2)
    elsewhere = edit_onnx(source, tmp_path / "a" / "b" / "edited.onnx", input_adapter=ADAPTER)
    assert edit_onnx(source, source, input_adapter=ADAPTER) == source
    assert_equal(run(source, images), run(elsewhere, images))
    assert sorted(tmp_path.rglob("*.onnx")) == sorted([source, elsewhere])


def test_small_external_weights_move_inside(tmp_path: Path) -> None:
    path = write_external(tmp_path / "source")
    edited = edit_onnx(path, tmp_path / "target" / "edited.onnx", outputs=["flat"])
    assert list(edited.parent.iterdir()) == [edited]
    images = random_images(2, shape=(3, 8, 8))
    assert torch.equal(run(edited, images)["logits"], run(path, images)["logits"])


def test_large_weights_are_external(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline.onnx.edit._MAX_INLINE_BYTES", 100)
    edited = edit_onnx(source, tmp_path / "target" / "edited.onnx", input_adapter=ADAPTER)
    assert sorted(file.name for file in edited.parent.iterdir()) == ["edited.onnx", "edited.onnx.data"]
    again = edit_onnx(edited, edited, classes=CLASSES[::-1])  # reads the weights while replacing them
    assert sorted(file.name for file in edited.parent.iterdir()) == ["edited.onnx", "edited.onnx.data"]
    assert read_onnx(again).classes == CLASSES[::-1]
    inline = tmp_path / "inline.onnx"
    monkeypatch.undo()
    edit_onnx(source, inline, input_adapter=ADAPTER)
    assert_equal(run(again, random_images(2)), run(inline, random_images(2)))


def test_failure_keeps_old_file(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "target.onnx"
    target.write_bytes(b"the old one")
    with pytest.raises(EngineError):
        edit_onnx(source, target, outputs=["nothing"])
    assert target.read_bytes() == b"the old one"
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_no_output(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_onnx(source, tmp_path / "edited.onnx", input_adapter=ADAPTER, classes=CLASSES)
    assert capfd.readouterr() == ("", "")
