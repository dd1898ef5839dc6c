import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import IMAGE_SHAPE, ConvNet, HuggingFaceLike, LogitsOnly, random_images


class Returns(nn.Module):
    """Returns what a function makes of the images."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> object:
        return self.function(images)


def open_module(module: nn.Module, **settings: object) -> PyTorchTeacher:
    return PyTorchTeacher(module, image_shape=IMAGE_SHAPE, **settings)


def logits_of(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def test_mapping_of_hugging_face() -> None:
    """With attributes, and values that are None."""
    teacher, images = open_module(HuggingFaceLike()), random_images(3)
    assert {name: (spec.shape[1:], spec.num_prefix_tokens) for name, spec in teacher.outputs.items()} == {
        "last_hidden_state": ((19, 32), 3),
        "pooler_output": ((32,), None),
    }
    outputs, wanted = teacher(images), HuggingFaceLike().eval()(images)
    torch.testing.assert_close(outputs["last_hidden_state"], wanted.last_hidden_state)


def test_tensor_becomes_logits() -> None:
    images = random_images(3)
    outputs = open_module(LogitsOnly())(images)
    assert outputs.keys() == {"logits"}
    torch.testing.assert_close(outputs["logits"], ConvNet().eval()(images)["logits"])


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda images: {"features": None}, "returns tensors by name, got none"),
        (lambda images: (logits_of(images), 3), "got int for 'output.1'"),
        (lambda images: {"logits": logits_of(images), "count": 3}, "got int for 'count'"),
        (
            lambda images: {"logits": images.flatten(2)},
            r"returns 'logits' \[2, 3, 1024\] for 2 images, not \[2, K\] or",
        ),
        (lambda images: logits_of(images)[:1], r"returns 'logits' \[1, 3\] for 2 images, not \[2, K\]"),
        (lambda images: {"logits": logits_of(images), "count": images.mean()}, r"returns 'count' \[\] for 2 images"),
    ],
    ids=["no outputs", "tuple", "not a tensor", "logits of rank 3", "batch lost", "scalar"],
)
def test_invalid_outputs_are_refused(function: Callable[[Tensor], object], found: str) -> None:
    with pytest.raises(TeacherError, match=found):
        open_module(Returns(function))


def test_failing_module_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"Returns fails on images \[2, 3, 32, 32\]: The size of tensor"):
        open_module(Returns(lambda images: images + torch.zeros(5)))


def test_failing_call_is_teacher_error_with_cause() -> None:
    teacher = open_module(Returns(lambda images: logits_of(images) if len(images) == 2 else 1 / 0))
    with pytest.raises(TeacherError, match=r"failed on images \[3, 3, 32, 32\] float32: division by zero") as caught:
        teacher(random_images(3))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_in_place_module_is_refused() -> None:
    with pytest.raises(TeacherError, match="writes to its input in place"):
        open_module(Returns(lambda images: logits_of(images.sub_(0.5))))


def test_uncopyable_module_is_refused() -> None:
    module = LogitsOnly()
    module.cache = module(random_images(2))  # a tensor with a history
    with pytest.raises(TeacherError, match="LogitsOnly cannot be copied"):
        open_module(module)


def test_later_changes_to_module_do_not_matter() -> None:
    module, images = ConvNet(), random_images(4)
    teacher = open_module(module)
    wanted = teacher(images)
    module.train()
    module(images)  # moves the running statistics
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    found = teacher(images)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_module_is_unchanged() -> None:
    module = ConvNet().train()
    module.head.eval()
    before = copy.deepcopy(module)
    open_module(module, precision="bf16")(random_images(4))
    assert [layer.training for layer in module.modules()] == [layer.training for layer in before.modules()]
    for parameter, wanted in zip(module.parameters(), before.parameters(), strict=True):
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert parameter.is_contiguous()
        assert torch.equal(parameter, wanted)


def test_train_mode_module_runs_in_eval_mode() -> None:
    images = random_images(4)
    teacher = open_module(ConvNet().train())
    torch.testing.assert_close(teacher(images)["logits"], ConvNet().eval()(images)["logits"])
    assert torch.equal(teacher(images)["logits"], teacher(images)["logits"])


def test_shared_outputs_are_copied() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.ones(1, 5))

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.bias.expand(len(images), 5), "features": images}

    images = random_images(2)
    before = images.clone()
    teacher = open_module(Shares(), channels_last=False)
    outputs = teacher(images)
    for output in outputs.values():
        output.zero_()
    assert torch.equal(images, before)
    assert torch.equal(teacher(images)["logits"], torch.ones(2, 5))


def test_channels_last_changes_layout_only() -> None:
    images, seen = random_images(4), []

    def spy(images: Tensor) -> Tensor:
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return logits_of(images)

    for channels_last in (True, False):
        open_module(Returns(spy), channels_last=channels_last)(images)
    assert seen == [True, True, False, False]
    dense, strided = (open_module(ConvNet(), channels_last=flag)(images) for flag in (False, True))
    for name in dense:
        torch.testing.assert_close(dense[name], strided[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_float32_outputs(precision: str) -> None:
    seen = set()

    def spy(images: Tensor) -> Tensor:
        seen.add(images.dtype)
        return logits_of(images)

    outputs = open_module(Returns(spy), precision=precision)(random_images(2))
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert outputs["logits"].dtype == torch.float32


def test_float16_images() -> None:
    images = random_images(3)
    teacher = open_module(LogitsOnly(), dtype=torch.float16)
    wanted = LogitsOnly().eval()(images.half().float())
    torch.testing.assert_close(teacher(images.half())["logits"], wanted)
    with pytest.raises(TeacherError, match=r"float16, got \[3, 3, 32, 32\] float32"):
        teacher(images)


def test_compile_uses_torch_compile() -> None:
    module = LogitsOnly()
    compiled, eager = (open_module(module, compile=flag)._model for flag in (True, False))
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert isinstance(eager, LogitsOnly)
    assert not isinstance(module, torch._dynamo.OptimizedModule)


def test_opening_in_inference_mode_works() -> None:
    with torch.inference_mode():
        teacher = open_module(ConvNet())
    assert not teacher(random_images(2))["logits"].is_inference()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Conv2d(3, 4, 3, stride=1), nn.Conv2d(3, 4, 3, stride=2)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())),
    ],
    ids=["a setting", "a layer without weights"],
)
def test_fingerprint_sees_layer_settings(one: nn.Module, other: nn.Module) -> None:
    def fingerprint(body: nn.Module) -> str:
        return open_module(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())).fingerprint

    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))
    assert fingerprint(one) != fingerprint(other)


def test_fingerprint_sees_non_persistent_buffers() -> None:
    module = LogitsOnly()
    module.register_buffer("offset", torch.zeros(()), persistent=False)
    before = open_module(module).fingerprint
    module.offset.add_(1.0)
    assert open_module(module).fingerprint != before
