import copy

import numpy
import pytest
import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.hadamard import hadamard
from kd_pipeline.losses.standardize import NUM_BATCHES, Standardizer

WIDTH = 12
KINDS = ("global", "channels", "phi_s")


def correlated(num_rows: int, *, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Rows whose channels have different means and variances and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.logspace(-1, 1, width)
    return torch.randn(num_rows, width, generator=generator) @ mixing + 3 * torch.arange(width)


def all_valid(features: Tensor) -> Tensor:
    return torch.ones(len(features), dtype=torch.bool)


def fitted(kind: str, batches: list[Tensor]) -> Standardizer:
    standardizer = Standardizer(kind, batches[0].shape[-1])
    for batch in batches:
        standardizer(batch, all_valid(batch))
    return standardizer.eval()


def formula(kind: str, rows: numpy.ndarray) -> numpy.ndarray:
    """What `rows` become by their own statistics, in NumPy; for PHI-S up to the signs of the eigenvectors."""
    centered = rows - rows.mean(0)
    covariance = numpy.cov(rows, rowvar=False)
    match kind:
        case "global":
            return centered / numpy.sqrt(numpy.trace(covariance) / len(covariance))
        case "channels":
            return centered / numpy.sqrt(numpy.diag(covariance))
        case _:
            eigenvalues, vectors = numpy.linalg.eigh(covariance)
            vectors = vectors * numpy.sign(vectors[numpy.abs(vectors).argmax(0), range(len(vectors))])
            rotation = hadamard(len(covariance)) / numpy.sqrt(len(covariance)) @ vectors.T
            return centered @ rotation.T / numpy.sqrt(eigenvalues.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind):
    rows = correlated(200)
    found = fitted(kind, [rows])(rows, all_valid(rows))
    assert found.dtype == torch.float32
    numpy.testing.assert_allclose(found.numpy(), formula(kind, rows.double().numpy()), rtol=1e-3, atol=1e-4)


def test_phi_s_has_equal_variances():
    rows = correlated(500)
    found = fitted("phi_s", [rows]).standardize(rows).double()
    torch.testing.assert_close(found.var(dim=0), torch.ones(WIDTH).double(), rtol=1e-4, atol=0)
    assert rows.var(dim=0).max() > 3 * rows.var(dim=0).min()


def test_phi_s_is_invertible_and_keeps_distances():
    rows = correlated(100)
    standardizer = fitted("phi_s", [rows])
    found = standardizer.standardize(rows)
    restored = torch.linalg.solve(standardizer.transform, found.T).T + standardizer.mean
    torch.testing.assert_close(restored, rows, rtol=1e-4, atol=1e-3)
    scale = rows.double().var(dim=0).mean().sqrt()
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(rows, rows) / scale.float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_count_as_one(kind):
    """Chan's formula is exact, whatever the sizes of the batches."""
    rows = correlated(64)
    at_once, in_parts = fitted(kind, [rows]), fitted(kind, list(rows.split([1, 30, 33, 0])))
    assert in_parts.count == at_once.count == 64
    torch.testing.assert_close(in_parts.running_mean, at_once.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_parts.running_scatter, at_once.running_scatter, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_parts.standardize(rows), at_once.standardize(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind):
    maps = correlated(4 * 6).view(4, 2, 3, WIDTH).permute(0, 3, 1, 2)
    tokens = maps.flatten(2).transpose(1, 2)
    standardizers = Standardizer(kind, WIDTH), Standardizer(kind, WIDTH), Standardizer(kind, WIDTH)
    of_maps = standardizers[0](maps, all_valid(maps))
    of_tokens = standardizers[1](tokens, all_valid(tokens))
    of_rows = standardizers[2](tokens.flatten(0, 1), torch.ones(24, dtype=torch.bool))
    torch.testing.assert_close(of_maps.flatten(2).transpose(1, 2), of_tokens)
    torch.testing.assert_close(of_tokens.flatten(0, 1), of_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_rows_do_not_count(kind):
    rows, valid = correlated(10), torch.tensor([True] * 7 + [False] * 3)
    expected = fitted(kind, [rows[:7]])
    rows[7:] = float("nan")
    standardizer = Standardizer(kind, WIDTH)
    found = standardizer(rows, valid)
    torch.testing.assert_close(standardizer.running_scatter, expected.running_scatter)
    torch.testing.assert_close(found[:7], expected.standardize(rows[:7]), rtol=1e-4, atol=1e-4)
    no_rows = Standardizer(kind, WIDTH)
    assert no_rows(rows, torch.zeros(10, dtype=torch.bool))[:7].isfinite().all()


def test_refreshed_at_powers_of_two_and_then_fixed():
    standardizer = Standardizer("global", WIDTH)
    changed = []
    for number in range(1, NUM_BATCHES + 20):
        before = standardizer.mean.clone()
        batch = correlated(3, seed=number)
        standardizer(batch, all_valid(batch))
        changed += [number] if not standardizer.mean.equal(before) else []
    assert changed == [1, 2, 4, 8, 16, 32, 64, 128]
    assert standardizer.num_batches == NUM_BATCHES
    assert standardizer.count == 3 * NUM_BATCHES


def test_eval_mode_learns_nothing():
    rows = correlated(8)
    standardizer = Standardizer("channels", WIDTH).eval()
    assert torch.equal(standardizer(rows, all_valid(rows)), rows)
    assert standardizer.num_batches == 0


@pytest.mark.parametrize("kind", KINDS)
def test_resumes(kind):
    """From any batch, as if it had not stopped."""
    batches = [correlated(5, seed=seed) for seed in range(6)]
    standardizer, twin = Standardizer(kind, WIDTH), Standardizer(kind, WIDTH)
    for batch in batches[:3]:
        standardizer(batch, all_valid(batch))
    twin.load_state_dict(copy.deepcopy(standardizer.state_dict()))
    for batch in batches[3:]:
        assert torch.equal(standardizer(batch, all_valid(batch)), twin(batch, all_valid(batch)))
    for name, buffer in standardizer.state_dict().items():
        assert torch.equal(buffer, twin.state_dict()[name]), name


def test_precision_stays():
    """A network in half precision has float64 statistics."""
    standardizer = fitted("channels", [correlated(8)])
    before = {name: buffer.clone() for name, buffer in standardizer.state_dict().items()}
    standardizer.bfloat16()
    for name, buffer in standardizer.state_dict().items():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])


def test_constant_channel():
    rows = correlated(20)
    rows[:, 3] = 7.0
    for kind in KINDS:
        assert fitted(kind, [rows]).standardize(rows).isfinite().all()
    assert (fitted("channels", [rows]).standardize(rows)[:, 3] == 0).all()
    constant = torch.full((4, WIDTH), 2.0)
    assert (fitted("phi_s", [constant]).standardize(constant) == 0).all()


def test_width_without_hadamard_matrix():
    with pytest.raises(ConfigError, match=r"the teacher's 50 features.*choose standardize: global.*or channels"):
        Standardizer("phi_s", 50)
    Standardizer("global", 50)
