"""Teachers of vectors, sequences, several inputs and free sizes, in every runtime that has them."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.modules import call_network
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import ConvNet

SIZE, CLASSES, TOKENS = 20, 4, 50

PYTORCH = TeacherSettings(backend="pytorch")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are kept in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Tagger(nn.Module):
    """Tokens with a mask to logits and features of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Mapping[str, Tensor]:
        tokens_NTD = self.embed(input_ids) * attention_mask[..., None]
        pooled_ND = tokens_NTD.sum(1) / attention_mask.sum(1, keepdim=True)
        return {"logits": self.head(pooled_ND), "tokens": tokens_NTD}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, TOKENS, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


@pytest.mark.parametrize("backend", ["pytorch", "openvino", "onnxruntime"])
@pytest.mark.parametrize("shape", [(SIZE,), (7, SIZE), (2, 3, 5, SIZE)])
def test_one_input_of_any_rank(backend: str, shape: tuple[int, ...]) -> None:
    module = mlp()
    teacher = open_teacher(TeacherSettings(backend=backend), module=module, image_shape=shape)
    rows = torch.randn(3, *shape)
    (output,) = teacher(rows).values()
    torch.testing.assert_close(output, module(rows), rtol=1e-5, atol=1e-5)
    assert teacher.problems == ()
    assert teacher.inputs["input"].shape == (None, *shape)
    with pytest.raises(TeacherError, match=r"takes input \[any, .*\] float32, got \[3, 9\] float32"):
        teacher(torch.randn(3, 9))


def test_an_onnx_file_of_vectors(tmp_path: Path) -> None:
    file = export_onnx(mlp(), tmp_path / "mlp.onnx", image_shape=(SIZE,), classes=[*"abcd"])
    teacher = open_teacher(TeacherSettings(onnx=file))
    assert teacher.classes == (*"abcd",) and teacher.images.shape == (None, SIZE)
    assert teacher(torch.randn(2, SIZE))["logits"].shape == (2, CLASSES)
    with pytest.raises(TeacherError, match="no network of images: in Python, a BatchLoader of its own inputs runs it"):
        teacher(torch.randn(2, 3, 8, 8))


def test_an_example_instead_of_a_shape() -> None:
    teacher = open_teacher(TeacherSettings(), module=mlp(), example=torch.randn(4, SIZE))
    assert teacher.inputs["input"].shape == (None, SIZE) and teacher.outputs["logits"].shape == (None, CLASSES)


def test_several_inputs_of_free_sizes_by_name() -> None:
    module = Tagger().eval()
    teacher = open_teacher(TeacherSettings(), module=module, example=tokens(4, 6))
    assert teacher.backend == "pytorch" and teacher.problems == ()
    assert teacher.outputs["tokens"].shape == (None, None, 8) and teacher.outputs["logits"].shape == (None, CLASSES)
    for length in (3, 6, 11):
        inputs = tokens(5, length)
        found, wanted = call_network(teacher, inputs), module(**inputs)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_half_precision_leaves_indices_and_masks_alone() -> None:
    settings = TeacherSettings(backend="pytorch", precision="bf16")
    teacher = open_teacher(settings, module=Tagger(), example=tokens(4, 6))
    assert teacher(tokens(4, 6))["logits"].dtype == torch.float32


def test_a_free_size_of_one_input() -> None:
    module = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    teacher = open_teacher(PYTORCH, module=module, image_shape=(3, None))
    for length in (5, 40):
        signal = torch.randn(2, 3, length)
        assert torch.equal(teacher(signal)["logits"], module.eval()(signal))


def test_image_like_inputs_of_one_channel() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).eval()
    teacher = open_teacher(PYTORCH, module=module, image_shape=(1, 12, 30))
    spectrograms = torch.randn(2, 1, 12, 30)
    torch.testing.assert_close(teacher(spectrograms)["logits"], module(spectrograms))


def test_says_which_inputs_it_takes() -> None:
    teacher = open_teacher(PYTORCH, module=Tagger(), example=tokens(4, 6))
    inputs = tokens(4, 6)
    for wrong, message in (
        (inputs["input_ids"], "takes input_ids, attention_mask, got one tensor without a name; pass them by name"),
        ({"input_ids": inputs["input_ids"]}, "got input_ids"),
        (
            {**inputs, "attention_mask": inputs["attention_mask"].float()},
            "takes attention_mask .* int64, got .*float32",
        ),
        ({**inputs, "attention_mask": inputs["attention_mask"][:2]}, "different numbers of rows"),
        (
            {**inputs, "attention_mask": inputs["attention_mask"][:, :2].contiguous()},
            "failed on input_ids .* and attention_mask",
        ),
    ):
        with pytest.raises(TeacherError, match=message):
            teacher(wrong)
    with pytest.raises(TeacherError, match="takes input_ids, attention_mask, and no images alone"):
        _ = teacher.images
    single = open_teacher(PYTORCH, module=mlp(), image_shape=(SIZE,))
    assert single({"whatever": torch.randn(2, SIZE)})["logits"].shape == (2, CLASSES)
    with pytest.raises(TeacherError, match="takes one tensor, got input_ids, attention_mask"):
        single(inputs)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_files_take_one_input_of_fixed_sizes(backend: str) -> None:
    for module, inputs in ((Tagger(), {"example": tokens(4, 6)}), (mlp(), {"image_shape": (None, SIZE)})):
        with pytest.raises(TeacherError, match=r"one input of fixed sizes.*backend: pytorch"):
            open_teacher(TeacherSettings(backend=backend), module=module, **inputs)


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        (PYTORCH, {}, "pass image_shape=.*or example="),
        (PYTORCH, {"example": {}}, "at least one row"),
        (PYTORCH, {"example": torch.randn(4, SIZE), "image_shape": (9,)}, "does not fit the example"),
        (TeacherSettings(input_adapter="auto"), {"image_shape": (SIZE,)}, "input_adapter is for images"),
    ],
)
def test_refuses(settings: TeacherSettings, inputs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_teacher(settings, module=mlp(), **inputs)


class Noisy(nn.Module):
    """Its outputs are others in each call."""

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors + torch.rand_like(vectors)


class Batched(nn.Module):
    """Each row depends on the others."""

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors - vectors.mean(0)


class Constant(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return vectors * 0 + torch.arange(vectors.shape[1])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Noisy(), "when the same images are run again"),
        (Batched(), "when the rest of its batch changes"),
        (Constant(), "returns the same 'logits' for every image"),
        (nn.Softmax(1), "are probabilities already"),
    ],
)
@pytest.mark.parametrize("rows", [None, 2, 64])
def test_the_checks_run_on_any_rows(
    module: nn.Module, message: str, rows: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"image_shape": (6,)} if rows is None else {"example": torch.randn(rows, 6)}
    teacher = open_teacher(TeacherSettings(), module=module, **given)
    assert message in caplog.text and len(teacher.problems) == 1


def test_rows_that_are_alike_say_nothing_about_constant_outputs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert open_teacher(TeacherSettings(), module=mlp(), example=torch.ones(4, SIZE)).problems == ()


def test_a_group_shares_its_inputs() -> None:
    first, second = (open_teacher(PYTORCH, module=Tagger(), example=tokens(4, 6)) for _ in range(2))
    group = TeacherGroup({"a": first, "b": second})
    inputs = tokens(3, 5)
    assert torch.equal(group(inputs)["b.tokens"], second(inputs)["tokens"])
    images = open_teacher(PYTORCH, module=ConvNet(), image_shape=(3, 32, 32))
    with pytest.raises(TeacherError, match="must share their inputs: member b"):
        TeacherGroup({"a": first, "b": images})


def test_an_open_teacher_of_several_inputs_is_checked_by_an_example(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    teacher: Teacher = open_teacher(PYTORCH, module=Tagger(), example=tokens(4, 6))
    assert open_teacher(teacher, example=tokens(4, 9)) is teacher
    assert open_teacher(teacher) is teacher
    assert "not checked, for lack of an example" in caplog.text
