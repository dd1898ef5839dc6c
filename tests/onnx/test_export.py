import copy
import json
import logging
import warnings
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_pipeline.errors import ExportError
from kd_pipeline.models.input_adapter import InputAdapter, InputAdapterLayer
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import (
    CLASSES,
    IMAGE_SHAPE,
    ConvNet,
    HuggingFaceLike,
    LogitsOnly,
    ModelOutput,
    random_images,
    vit_backbone,
)

ADAPTER = InputAdapter(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))
    return teacher(images)


def test_outputs_equal_module(tmp_path: Path) -> None:
    path = export_onnx(ConvNet().train(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    for num_images in (1, 3, 65):
        images = random_images(num_images)
        found, expected = run(path, images), ConvNet().eval()(images)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_names_and_dynamic_batch(tmp_path: Path) -> None:
    model = onnx.load(export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE))
    (images,) = model.graph.input
    assert images.name == "images"
    assert [value.name for value in model.graph.output] == ["logits", "features"]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    batch, *sizes = images.type.tensor_type.shape.dim
    assert batch.dim_param
    assert tuple(size.dim_value for size in sizes) == IMAGE_SHAPE


def test_tensor_becomes_logits(tmp_path: Path) -> None:
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert run(path, random_images(2)).keys() == {"logits"}


def test_backbone_keeps_names_and_prefix_tokens(tmp_path: Path) -> None:
    path = export_onnx(vit_backbone(), tmp_path / "vit.onnx", image_shape=IMAGE_SHAPE, input_adapter=ADAPTER)
    outputs = read_onnx(path).outputs
    assert {name: spec.num_prefix_tokens for name, spec in outputs.items()} == {"pooled": None, "spatial": 3}
    images = random_images(3)
    expected = nn.Sequential(InputAdapterLayer(ADAPTER), vit_backbone()).eval()(images)
    torch.testing.assert_close(run(path, images), expected, atol=1e-4, rtol=1e-4)


def test_mapping_of_hugging_face(tmp_path: Path) -> None:
    """With attributes, and values that are None."""
    path = export_onnx(HuggingFaceLike(), tmp_path / "hf.onnx", image_shape=IMAGE_SHAPE)
    assert {name: spec.num_prefix_tokens for name, spec in read_onnx(path).outputs.items()} == {
        "last_hidden_state": 3,
        "pooler_output": None,
    }
    images = random_images(3)
    torch.testing.assert_close(run(path, images), named(HuggingFaceLike().eval()(images)), atol=1e-4, rtol=1e-4)


def named(outputs: ModelOutput) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in outputs.items() if value is not None}


class Embeds(LogitsOnly):
    """Returns one vector that is no logits, under a name of its own."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": super().forward(images)}


def test_single_output_keeps_its_name(tmp_path: Path) -> None:
    path = export_onnx(Embeds(), tmp_path / "embeds.onnx", image_shape=IMAGE_SHAPE)
    assert run(path, random_images(2)).keys() == {"embedding"}


@pytest.mark.slow
def test_headless_classifier_of_torchvision(tmp_path: Path) -> None:
    """Whose last layer has no outputs, and whose map is caught by a hook."""
    module = open_model(ModelSettings(torchvision="resnet18", num_classes=0))
    path = export_onnx(module, tmp_path / "resnet.onnx", image_shape=IMAGE_SHAPE, max_batch=2)
    images = random_images(2)
    found, expected = run(path, images), module.eval()(images)
    assert found.keys() == {"pooled", "spatial"}
    for name, output in found.items():
        torch.testing.assert_close(output, expected[name].detach(), atol=1e-3, rtol=1e-3)


def test_classes_without_logits_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="returns 'pooled', 'spatial' and no 'logits', which class names are for"):
        export_onnx(vit_backbone(), tmp_path / "vit.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES)
    assert not list(tmp_path.iterdir())


def test_one_file_in_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "teacher.onnx"
    assert export_onnx(LogitsOnly(), path, image_shape=IMAGE_SHAPE) == path
    assert list(path.parent.iterdir()) == [path]


def test_large_weights_are_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["teacher.onnx", "teacher.onnx.data"]
    images = random_images(2)
    torch.testing.assert_close(run(path, images)["logits"], LogitsOnly().eval()(images))


def test_classes_and_adapter_in_metadata(tmp_path: Path) -> None:
    adapter = InputAdapter(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=16)
    path = export_onnx(
        ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES, input_adapter=adapter
    )
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["kd_pipeline.classes"]) == list(CLASSES)
    assert InputAdapter.model_validate_json(metadata["kd_pipeline.input_adapter"]) == adapter
    assert open_teacher(TeacherSettings(onnx=path)).classes == CLASSES


def test_input_adapter(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    from_mean, from_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    path = export_onnx(
        ConvNet(),
        tmp_path / "teacher.onnx",
        image_shape=IMAGE_SHAPE,
        input_adapter=InputAdapter(mean=mean, std=std, size=20),
    )
    pixels = torch.rand(5, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(pixels, size=(20, 20), mode="bilinear", align_corners=False)
    expected = ConvNet().eval()(normalize(resized, mean, std))
    found = run(path, normalize(pixels, from_mean, from_std))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_input_adapter_from_normalization(tmp_path: Path) -> None:
    same = InputAdapter(mean=(0.1, 0.2, 0.3), std=(1, 2, 3), from_mean=(0.1, 0.2, 0.3), from_std=(1, 2, 3))
    path = export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, input_adapter=same)
    images = random_images(3)
    torch.testing.assert_close(run(path, images)["logits"], ConvNet().eval()(images)["logits"])


def test_module_is_unchanged(tmp_path: Path) -> None:
    module = ConvNet().train()
    module.head.eval().requires_grad_(False)
    before = copy.deepcopy(module)
    export_onnx(module, tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert [layer.training for layer in module.modules()] == [layer.training for layer in before.modules()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in before.parameters()]
    for name, value in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_no_output_and_no_random_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    class WarnsWhileTraced(ConvNet):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            if torch.compiler.is_exporting():
                warnings.warn("traced", FutureWarning, stacklevel=1)  # as torch's own exporter does at times
            return super().forward(images)

    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as escaped:
        warnings.simplefilter("always")
        export_onnx(WarnsWhileTraced().train(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert escaped == []
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []
    assert torch.equal(torch.get_rng_state(), state)


def test_no_local_paths_in_file(tmp_path: Path) -> None:
    content = export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE).read_bytes()
    assert Path(__file__).parents[1].as_posix().encode() not in content
    assert Path(torch.__file__).parent.as_posix().encode() not in content


@pytest.mark.slow
def test_reproducible(tmp_path: Path) -> None:
    first, second = (
        export_onnx(ConvNet(), tmp_path / f"{name}.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES) for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()


def test_opset(tmp_path: Path) -> None:
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, opset=18)
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 18


def test_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert path.is_file()


class BranchesOnBatch(LogitsOnly):
    """Branches on the batch size, which the export cannot see."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return 2 * logits if len(images) > 4 else logits


class KnowsOneImage(LogitsOnly):
    """Treats a single image differently, which the trace does not see."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return -logits if len(images) == 1 else logits


class KnowsPairs(LogitsOnly):
    """Treats numbers that are no multiple of the traced one differently."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return -logits if len(images) > 1 and len(images) % 2 else logits


class FixesBatch(LogitsOnly):
    """Works for two images only."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.zeros(2, 1)


class Folds(nn.Module):
    """Always returns two rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, -1)[:, :10]


class DrawsRandomNumbers(LogitsOnly):
    """Is not deterministic."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + torch.rand_like(logits)


class NotANumber(LogitsOnly):
    """Returns NaN."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


class ReturnsText(LogitsOnly):
    """Returns nothing that is known."""

    def forward(self, images: Tensor) -> str:
        return str(super().forward(images).shape)


def test_invalid_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"LogitsOnly cannot be exported to .*File exists"):
        export_onnx(LogitsOnly(), tmp_path / "file" / "teacher.onnx", image_shape=IMAGE_SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (BranchesOnBatch(), r"for 5 images 'logits' of the file is off by [\d.]+, with values up to [\d.]+; allowed"),
        (KnowsOneImage(), "for 1 images 'logits' of the file is off by"),
        (KnowsPairs(), "for 3 images 'logits' of the file is off by"),
        (DrawsRandomNumbers(), r"for 1 images 'logits' of the file is off by"),
        (NotANumber(), r"'logits' is NaN or inf on random images; check the module's weights"),
        (FixesBatch(), "FixesBatch cannot be exported to .*static shape of 2"),
        (Folds(), r"'logits' is \[2, 10\] float32, a static batch of 2"),
        (ReturnsText(), "got str"),
        (nn.Linear(7, 10), "Linear cannot be exported to .*teacher.onnx: mat1 and mat2"),
        (ConvNet().half(), "ConvNet cannot be exported to .*teacher.onnx: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_invalid_module(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=f"(?s){message}"):
        export_onnx(module, tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_failure_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "teacher.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(ExportError):
        export_onnx(BranchesOnBatch(), path, image_shape=IMAGE_SHAPE)
    assert path.read_bytes() == b"the old one"
    export_onnx(LogitsOnly(), path, image_shape=IMAGE_SHAPE)
    assert run(path, random_images(1)).keys() == {"logits"}


def test_max_batch_is_checked(tmp_path: Path) -> None:
    class BranchesLate(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return -logits if len(images) > 20 else logits

    with pytest.raises(ExportError, match="for 21 images 'logits' of the file is off"):
        export_onnx(BranchesLate(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, max_batch=21)


def test_progress_counts_steps(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    export_onnx(LogitsOnly(), tmp_path / "a.onnx", image_shape=IMAGE_SHAPE, report=lambda *step: steps.append(step))
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_wrong_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it has 10 logits and got 9 class names"):
        export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES[:9])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"std": (0.0, 1.0, 1.0)}, {"from_std": (1.0, -1.0, 1.0)}, {"size": 0}])
def test_invalid_adapter(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        InputAdapter(**{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **changes})
