"""Features of different kinds, widths and sizes, against NumPy."""

import logging

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.meeting import Meeting
from kd_pipeline.losses.projectors import Mlp
from kd_pipeline.losses.settings import TermSettings

PLACE = "distill.features: am_radio.spatial"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spec(tensor: Tensor, prefix: int | None = None) -> TensorSpec:
    return TensorSpec((None, *tensor.shape[1:]), tensor.dtype, prefix)


def meeting(student: Tensor, teacher: Tensor, prefixes=(None, None), **term) -> Meeting:
    settings = TermSettings(**{"loss": "am_radio", "student": "spatial", "teacher": "spatial"} | term)
    return Meeting(settings, PLACE, spec(student, prefixes[0]), spec(teacher, prefixes[1]))


def met(student: Tensor, teacher: Tensor, prefixes=(None, None), **term) -> tuple[Tensor, Tensor]:
    return meeting(student, teacher, prefixes, **term)(student, teacher, nn.Identity())


def grid_of(tokens: Tensor, prefix: int) -> numpy.ndarray:
    """Tokens as a map, position by position."""
    num_samples, length, width = tokens.shape
    side = round((length - prefix) ** 0.5)
    found = numpy.zeros((num_samples, width, side, side))
    for row in range(side):
        for column in range(side):
            found[:, :, row, column] = tokens[:, prefix + row * side + column].numpy()
    return found


def bilinear(maps: numpy.ndarray, side: int) -> numpy.ndarray:
    """Interpolation between the centers of pixels, as `align_corners=False`."""
    old = maps.shape[2]
    found = numpy.zeros((*maps.shape[:2], side, side))
    centers = [min(max((number + 0.5) * old / side - 0.5, 0), old - 1) for number in range(side)]
    for row, y in enumerate(centers):
        for column, x in enumerate(centers):
            top, left = int(y), int(x)
            bottom, right = min(top + 1, old - 1), min(left + 1, old - 1)
            upper = (1 - (x - left)) * maps[:, :, top, left] + (x - left) * maps[:, :, top, right]
            lower = (1 - (x - left)) * maps[:, :, bottom, left] + (x - left) * maps[:, :, bottom, right]
            found[:, :, row, column] = (1 - (y - top)) * upper + (y - top) * lower
    return found


def area(maps: numpy.ndarray, side: int) -> numpy.ndarray:
    """The mean of the pixels that a new one covers, in part or whole."""
    old = maps.shape[2]
    found = numpy.zeros((*maps.shape[:2], side, side))
    spans = [(number * old // side, -(-(number + 1) * old // side)) for number in range(side)]
    for row, (top, bottom) in enumerate(spans):
        for column, (left, right) in enumerate(spans):
            found[:, :, row, column] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return found


@pytest.mark.parametrize(("prefix", "stated"), [(0, 0), (1, 1), (5, 5), (1, None), (5, None)])
@pytest.mark.parametrize(("side", "resized"), [(7, bilinear), (3, area), (4, lambda maps, side: maps)])
def test_tokens_of_a_teacher_meet_a_map(prefix, stated, side, resized):
    """ViT to CNN: the teacher has 4x4 tokens; at the student's grid it is resized, at its own the student is."""
    student, teacher = random(2, 6, side, side), random(2, prefix + 16, 6, seed=1)
    own, other = met(student, teacher, (None, stated), grid="student")
    assert own is student
    numpy.testing.assert_allclose(other.numpy(), resized(grid_of(teacher, prefix), side), atol=1e-12)
    own, other = met(student, teacher, (None, stated))
    numpy.testing.assert_array_equal(other.numpy(), grid_of(teacher, prefix))
    expected = {7: area, 3: bilinear}.get(side, lambda maps, side: maps)(student.numpy(), 4)
    numpy.testing.assert_allclose(own.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("prefix", "stated"), [(1, 1), (5, 5), (1, None), (5, None)])
def test_map_of_a_teacher_meets_tokens(prefix, stated):
    """CNN to ViT."""
    student, teacher = random(2, prefix + 16, 6), random(2, 6, 7, 7, seed=1)
    own, other = met(student, teacher, (stated, None))
    numpy.testing.assert_allclose(own.numpy(), bilinear(grid_of(student, prefix), 7), atol=1e-12)
    assert other is teacher
    own, other = met(student, teacher, (stated, None), grid="smaller")
    numpy.testing.assert_array_equal(own.numpy(), grid_of(student, prefix))
    numpy.testing.assert_allclose(other.numpy(), area(teacher.numpy(), 4), atol=1e-12)


def test_tokens_of_other_grids_meet():
    """ViT to ViT with other patches."""
    student, teacher = random(2, 1 + 9, 6), random(2, 5 + 16, 6, seed=1)
    own, other = met(student, teacher, (1, 5))
    numpy.testing.assert_allclose(own.numpy(), bilinear(grid_of(student, 1), 4), atol=1e-12)
    numpy.testing.assert_array_equal(other.numpy(), grid_of(teacher, 5))
    own, other = met(student, teacher, (1, 5), grid=2)
    numpy.testing.assert_allclose(own.numpy(), area(grid_of(student, 1), 2), atol=1e-12)
    numpy.testing.assert_allclose(other.numpy(), area(grid_of(teacher, 5), 2), atol=1e-12)


@pytest.mark.parametrize("how", ["bilinear", "area"])
def test_resize_as_asked(how):
    student, teacher = random(2, 6, 7, 7), random(2, 6, 4, 4, seed=1)
    own, _ = met(student, teacher, resize=how)
    numpy.testing.assert_allclose(
        own.numpy(), {"bilinear": bilinear, "area": area}[how](student.numpy(), 4), atol=1e-12
    )


def test_tokens_of_one_grid_stay_tokens():
    """Without the prefixes of both."""
    student, teacher = random(2, 1 + 16, 6), random(2, 5 + 16, 6, seed=1)
    own, other = met(student, teacher, (1, 5))
    assert torch.equal(own, student[:, 1:])
    assert torch.equal(other, teacher[:, 5:])
    own, other = met(student, teacher, (1, None), grid=4)
    assert own.shape == other.shape == (2, 16, 6)


def test_tokens_without_grid_that_are_as_many():
    """Such as the states of a text: nothing is known of a prefix, and all of them are compared."""
    student, teacher = random(2, 98, 6), random(2, 98, 6, seed=1)
    assert all(map(torch.equal, met(student, teacher), (student, teacher)))


def test_losses_of_maps_get_the_grid():
    student, teacher = random(2, 1 + 16, 6), random(2, 16, 6, seed=1)
    own, other = met(student, teacher, (1, 0), loss="attention_transfer")
    assert own.shape == other.shape == (2, 6, 4, 4)


@pytest.mark.parametrize("swap", [False, True])
def test_vector_meets_the_mean(swap):
    vector, tokens, maps = random(2, 6), random(2, 5 + 16, 6, seed=1), random(2, 6, 3, 3, seed=2)
    for other, prefix, mean in (
        (tokens, 5, tokens[:, 5:].mean(1)),
        (tokens, None, tokens[:, 5:].mean(1)),
        (maps, None, maps.mean((2, 3))),
    ):
        sides, prefixes, expected = (vector, other), (None, prefix), (vector, mean)
        if swap:
            sides, prefixes, expected = sides[::-1], prefixes[::-1], expected[::-1]
        for found, wanted in zip(met(*sides, prefixes, loss="cosine"), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("swap", [False, True])
def test_maps_with_channels_last_are_recognized(swap):
    """As stages of Swin return them."""
    usual = random(2, 6, 4, 4)
    sides = (usual, usual.permute(0, 2, 3, 1).contiguous())
    own, other = met(*(sides[::-1] if swap else sides))
    assert torch.equal(own, usual) and torch.equal(other, usual)


def test_guessed_prefix_is_reported_once(caplog):
    caplog.set_level(logging.INFO, "kd_pipeline")
    student, teacher = random(2, 6, 4, 4), random(2, 5 + 16, 6)
    settled = meeting(student, teacher)
    for _ in range(3):
        settled(student, teacher, nn.Identity())
    (record,) = caplog.records
    for word in (PLACE, "21 tokens of the teacher's 'spatial'", "the first 5", "4 x 4"):
        assert word in record.getMessage()


@pytest.mark.parametrize(
    ("student", "teacher", "prefixes", "term", "words"),
    [
        ((2, 6, 4, 4), (2, 17, 6), (None, 0), {}, ["17 are left", "without its 0 prefix tokens", "pooled outputs"]),
        ((2, 6, 4, 4), (2, 98, 6), (None, None), {}, ["[any, 98, 6]", "no number of class", "pooled outputs"]),
        ((2, 6), (2, 98, 6), (None, None), {}, ["no number of class and register tokens up to 16"]),
        ((2, 17, 6), (2, 10, 6), (0, 1), {}, ["the student's 'spatial' is [any, 17, 6]", "17 are left"]),
        ((2, 6, 4, 4), (2, 6, 4, 4), (None, None), {"loss": "cosine"}, ["cosine compares vectors", "feature_cosine"]),
        ((2, 17, 6), (2, 6), (1, None), {"loss": "channel_wise"}, ["channel_wise compares maps", "[any, 6]"]),
        ((2, 6, 4, 4, 4), (2, 6), (None, None), {}, ["[any, 6, 4, 4, 4]", "no vector [N, D]"]),
    ],
)
def test_what_cannot_meet(student, teacher, prefixes, term, words):
    with pytest.raises(ConfigError, match=f"^{PLACE}: ") as caught:
        met(random(*student), random(*teacher), prefixes, **term)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "projector", "kind"),
    [
        ((2, 8), (2, 6), "auto", nn.Linear),
        ((2, 17, 8), (2, 6, 4, 4), "auto", nn.Linear),
        ((2, 8, 4, 4), (2, 17, 6), "auto", nn.Conv2d),
        ((2, 8, 4, 4), (2, 6), "auto", nn.Linear),
        ((2, 6, 4, 4), (2, 17, 6), "auto", nn.Identity),
        ((2, 8, 4, 4), (2, 17, 6), "none", nn.Identity),
        ((2, 8), (2, 6), "mlp", Mlp),
        ((2, 17, 8), (2, 17, 6), "mlp", Mlp),
        ((2, 8, 4, 4), (2, 6, 4, 4), "mlp", Mlp),
        ((2, 4, 4, 8), (2, 6, 4, 4), "conv", nn.Conv2d),
        ((2, 17, 8), (2, 6), "linear", nn.Linear),
    ],
)
def test_projector(student, teacher, projector, kind):
    """It maps the student's features in their own layout to the width of the teacher's."""
    student, teacher = random(*student), random(*teacher)
    settled = meeting(student, teacher, projector=projector)
    built = settled.build_projector(student)
    assert type(built) is kind
    own, other = settled(student, teacher, built)
    assert kind is nn.Identity or own.shape == other.shape


@pytest.mark.parametrize("loss", ["attention_transfer"])
def test_no_projector_for_losses_of_any_width(loss):
    student, teacher = random(2, 8, 4, 4), random(2, 6, 4, 4)
    assert type(meeting(student, teacher, loss=loss).build_projector(student)) is nn.Identity


@pytest.mark.parametrize(
    ("student", "prefix", "grid"),
    [
        ((2, 8), None, (1, 1)),
        ((2, 8, 5, 3), None, (5, 3)),
        ((2, 5, 5, 8), None, (5, 5)),
        ((2, 17, 8), 1, (4, 4)),
        ((2, 21, 8), None, (4, 4)),
        ((2, 17, 8), 0, None),
    ],
)
def test_grid_of_the_student(student, prefix, grid):
    assert meeting(random(*student), random(2, 6, 4, 4), (prefix, None)).student_grid == grid


@pytest.mark.parametrize(
    ("student", "teacher", "projector"),
    [((2, 17, 8), (2, 6, 4, 4), "conv"), ((2, 8), (2, 6), "conv"), ((2, 8, 4, 4), (2, 6, 4, 4), "linear")],
)
def test_projector_that_does_not_fit(student, teacher, projector):
    student, teacher = random(*student), random(*teacher)
    with pytest.raises(ConfigError, match=rf"^{PLACE}: projector: {projector} takes .* projector: auto or mlp"):
        meeting(student, teacher, projector=projector).build_projector(student)


def test_teacher_of_unknown_width():
    student = random(2, 8)
    settled = Meeting(
        TermSettings(loss="cosine", projector="linear"), PLACE, spec(student), TensorSpec((None, None), torch.float32)
    )
    with pytest.raises(ConfigError, match=r"known width of the teacher's.*\[any, any\]"):
        settled.build_projector(student)


def test_mlp():
    """Linear, LayerNorm, GELU, linear, for each position."""
    maps = torch.randn(2, 8, 3, 3)
    mlp = Mlp(8, 6)
    first, norm, _, last = mlp
    rows = maps.movedim(1, -1) @ first.weight.T + first.bias
    rows = functional.layer_norm(rows, (8,), norm.weight, norm.bias)
    expected = functional.gelu(rows) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(maps), expected.movedim(-1, 1))
    torch.testing.assert_close(mlp(maps.flatten(2).transpose(1, 2)), expected.flatten(1, 2))


def test_gradient_goes_to_student_and_projector_only():
    student, teacher = random(2, 1 + 9, 8).requires_grad_(), random(2, 6, 4, 4, seed=1)
    settled = meeting(student, teacher, (1, None), projector="mlp")
    projector = settled.build_projector(student)
    own, other = settled(student, teacher, projector)
    own.square().sum().backward()
    assert not other.requires_grad
    assert (student.grad[:, 0] == 0).all()  # the class token
    assert student.grad[:, 1:].abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
