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
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, LogitsOnly, random_images


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))
    return teacher(images)


def test_the_file_answers_like_the_module_in_eval_mode_at_any_batch(tmp_path: Path) -> None:
    path = export_onnx(ConvNet().train(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    for num_images in (1, 3, 65):
        images = random_images(num_images)
        found, wanted = run(path, images), ConvNet().eval()(images)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_the_file_has_the_promised_names_and_a_dynamic_batch(tmp_path: Path) -> None:
    model = onnx.load(export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE))
    (images,) = model.graph.input
    assert images.name == "images"
    assert [value.name for value in model.graph.output] == ["logits", "features"]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    batch, *sizes = images.type.tensor_type.shape.dim
    assert batch.dim_param
    assert tuple(size.dim_value for size in sizes) == IMAGE_SHAPE


def test_a_plain_tensor_becomes_the_logits(tmp_path: Path) -> None:
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert run(path, random_images(2)).keys() == {"logits"}


def test_one_file_is_written_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "teacher.onnx"
    assert export_onnx(LogitsOnly(), path, image_shape=IMAGE_SHAPE) == path
    assert list(path.parent.iterdir()) == [path]


def test_a_model_too_big_for_one_file_gets_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["teacher.onnx", "teacher.onnx.data"]
    images = random_images(2)
    torch.testing.assert_close(run(path, images)["logits"], LogitsOnly().eval()(images))


def test_class_names_and_adapter_are_kept_in_the_file(tmp_path: Path) -> None:
    adapter = InputAdapter(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=16)
    path = export_onnx(
        ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES, input_adapter=adapter
    )
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["kd_pipeline.classes"]) == list(CLASSES)
    assert InputAdapter.model_validate_json(metadata["kd_pipeline.input_adapter"]) == adapter
    assert open_teacher(TeacherSettings(onnx=path)).classes == CLASSES


def test_the_adapter_gives_the_teacher_the_images_it_was_trained_on(tmp_path: Path) -> None:
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
    wanted = ConvNet().eval()(normalize(resized, mean, std))
    found = run(path, normalize(pixels, from_mean, from_std))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_the_adapter_takes_the_normalization_of_the_incoming_images(tmp_path: Path) -> None:
    same = InputAdapter(mean=(0.1, 0.2, 0.3), std=(1, 2, 3), from_mean=(0.1, 0.2, 0.3), from_std=(1, 2, 3))
    path = export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, input_adapter=same)
    images = random_images(3)
    torch.testing.assert_close(run(path, images)["logits"], ConvNet().eval()(images)["logits"])


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = ConvNet().train()
    module.head.eval().requires_grad_(False)
    before = copy.deepcopy(module)
    export_onnx(module, tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert [layer.training for layer in module.modules()] == [layer.training for layer in before.modules()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in before.parameters()]
    for name, value in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_exporting_is_silent_and_leaves_the_random_numbers_alone(
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


def test_the_file_names_no_source_file_of_this_machine(tmp_path: Path) -> None:
    content = export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE).read_bytes()
    assert Path(__file__).parents[1].as_posix().encode() not in content
    assert Path(torch.__file__).parent.as_posix().encode() not in content


def test_equal_modules_give_equal_files(tmp_path: Path) -> None:
    one, other = (
        export_onnx(ConvNet(), tmp_path / f"{name}.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES) for name in "ab"
    )
    assert one.read_bytes() == other.read_bytes()


def test_the_opset_can_be_chosen(tmp_path: Path) -> None:
    path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, opset=18)
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 18


def test_exporting_under_inference_mode_works(tmp_path: Path) -> None:
    with torch.inference_mode():
        path = export_onnx(LogitsOnly(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert path.is_file()


class BranchesOnBatch(LogitsOnly):
    """Takes another way for more than four images, which the export cannot see."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return 2 * logits if len(images) > 4 else logits


class FixesBatch(LogitsOnly):
    """Insists on two images."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.zeros(2, 1)


class Folds(nn.Module):
    """Always returns two rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, -1)[:, :10]


class DrawsNumbers(LogitsOnly):
    """Answers differently each time."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + torch.rand_like(logits)


class NotANumber(LogitsOnly):
    """Answers with NaN."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


class ReturnsTuple(LogitsOnly):
    """Returns no names."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (super().forward(images),)


def test_a_place_that_takes_no_file_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"LogitsOnly cannot be exported to .*File exists"):
        export_onnx(LogitsOnly(), tmp_path / "file" / "teacher.onnx", image_shape=IMAGE_SHAPE)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (BranchesOnBatch(), r"for 7 images 'logits' of the file is off by [\d.]+, with values up to [\d.]+; allowed"),
        (DrawsNumbers(), r"for 1 images 'logits' of the file is off by"),
        (NotANumber(), r"it answers 'logits' with NaN or inf on random images; check its weights"),
        (FixesBatch(), "FixesBatch cannot be exported to .*static shape of 2"),
        (Folds(), r"'logits' is \[2, 10\] float32, a static batch of 2"),
        (ReturnsTuple(), "got tuple"),
        (nn.Linear(7, 10), "Linear cannot be exported to .*teacher.onnx: mat1 and mat2"),
        (ConvNet().half(), "ConvNet cannot be exported to .*teacher.onnx: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_that_makes_no_faithful_file_is_refused_and_leaves_no_file(
    tmp_path: Path, module: nn.Module, message: str
) -> None:
    with pytest.raises(ExportError, match=f"(?s){message}"):
        export_onnx(module, tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "teacher.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(ExportError):
        export_onnx(BranchesOnBatch(), path, image_shape=IMAGE_SHAPE)
    assert path.read_bytes() == b"the old one"
    export_onnx(LogitsOnly(), path, image_shape=IMAGE_SHAPE)
    assert run(path, random_images(1)).keys() == {"logits"}


def test_the_largest_batch_is_checked_too(tmp_path: Path) -> None:
    class BranchesLate(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return -logits if len(images) > 20 else logits

    with pytest.raises(ExportError, match="for 21 images 'logits' of the file is off"):
        export_onnx(BranchesLate(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, max_batch=21)


def test_class_names_must_be_as_many_as_the_logits(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it has 10 logits and got 9 class names"):
        export_onnx(ConvNet(), tmp_path / "teacher.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES[:9])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"std": (0.0, 1.0, 1.0)}, {"from_std": (1.0, -1.0, 1.0)}, {"size": 0}])
def test_an_adapter_that_cannot_work_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        InputAdapter(**{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **changes})
