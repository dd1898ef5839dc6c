import pytest
import torch
from torch.nn import functional

from kd_pipeline.losses.resize import Resizer, resize_matrix

SIZES = [
    ((7, 7), (14, 14)),
    ((14, 14), (7, 7)),
    ((16, 16), (14, 14)),
    ((5, 8), (9, 3)),
    ((1, 3), (4, 4)),
    ((6, 6), (1, 1)),
]


def interpolated(maps, size):
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


REFERENCES = {"bilinear": interpolated, "area": functional.adaptive_avg_pool2d}


@pytest.mark.parametrize("how", REFERENCES)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_equals_torch(how, old, new):
    """In value and gradient."""
    maps = torch.randn(2, 3, *old, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = Resizer(how)(maps, new), REFERENCES[how](maps, new)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((each * weights).sum(), maps)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("old", "new", "how"), [(4, 6, "bilinear"), (6, 4, "area")])
def test_auto_enlarges_and_shrinks(old, new, how):
    maps = torch.randn(2, 3, old, old)
    assert torch.equal(Resizer("auto")(maps, (new, new)), Resizer(how)(maps, (new, new)))


def test_auto_decides_for_each_side():
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    shrunk = functional.adaptive_avg_pool2d(maps, (4, 3))
    torch.testing.assert_close(Resizer("auto")(maps, (8, 3)), interpolated(shrunk, (8, 3)))


def test_same_size_is_unchanged():
    maps = torch.randn(2, 3, 4, 4).half()
    assert Resizer("bilinear")(maps, (4, 4)) is maps


def test_half_precision_and_autocast():
    maps = torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Resizer("auto")(maps, (8, 8))
    assert found.dtype == torch.float32
    assert torch.equal(found, Resizer("auto")(maps.float(), (8, 8)))


@pytest.mark.parametrize("how", REFERENCES)
def test_constants_stay(how):
    for old in range(1, 9):
        for new in range(1, 9):
            torch.testing.assert_close(resize_matrix(old, new, how).sum(1), torch.ones(new, dtype=torch.float64))
