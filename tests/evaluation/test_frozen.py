"""k-NN and the linear classifier against written-out references, and features of real loaders."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays
from kd_pipeline.errors import ConfigError, DataError, NonFiniteError, StateError
from kd_pipeline.evaluation import frozen
from kd_pipeline.evaluation.frozen import (
    Features,
    extract_features,
    extract_outputs,
    feature_name,
    knn_top1,
    linear_top1,
    split_bank,
)
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.evaluation.ranks import process_group
from tests.evaluation.test_evaluate import NUM_LOGITS, SIDE, Pixels, open_loader, pixel_arrays
from tests.forks import fork_ranks


class Pooled(nn.Module):
    """The twelve values of a 2x2 image as `pooled`, changed by `change`, and as a map."""

    def __init__(self, change=lambda features: features) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooled": self.change(images.flatten(1)), "spatial": images}


def labeled(features, labels) -> Features:
    return Features(torch.tensor(features, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)))


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Features]:
    """Bank and queries: pixels of digits."""
    found = load_digits()
    return split_bank(labeled(found.data[:600], found.target[:600]))


def dino_knn(bank: Features, queries: Features, k: int, temperature: float, num_classes: int = 10) -> float:
    """`knn_classifier` of DINO's eval_knn.py, written out for one query after another, in float64."""
    right = 0
    train = nn.functional.normalize(bank.features.double(), dim=1)
    for feature, label in zip(queries.features.double(), queries.labels, strict=True):
        similarity = train @ nn.functional.normalize(feature, dim=0)
        distances, indices = similarity.topk(k, largest=True, sorted=True)
        probabilities = torch.zeros(num_classes, dtype=torch.float64)
        for distance, neighbor in zip(distances, indices, strict=True):
            probabilities[bank.labels[neighbor]] += math.exp(float(distance) / temperature)
        right += int(probabilities.sort(descending=True).indices[0] == label)
    return right / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (50, 1.0)])
def test_knn_matches_dino(digits, k, temperature) -> None:
    bank, queries = digits
    found = knn_top1(bank, queries, k=k, temperature=temperature)
    assert found == dino_knn(bank, queries, k, temperature)
    assert 0.6 < found < 1


def test_knn_does_not_depend_on_chunks(digits, monkeypatch) -> None:
    wanted = knn_top1(*digits)
    monkeypatch.setattr(frozen, "_MAX_SIMILARITIES", 7 * len(digits[0]))
    assert knn_top1(*digits) == wanted


def test_closer_neighbors_outvote_more_neighbors() -> None:
    bank = labeled([[1, 0], [0.8, 0.6], [0.8, -0.6]], [0, 1, 1])
    query = labeled([[1, 0]], [0])
    # exp(1 / T) against 2 exp(0.8 / T): equal at T = 0.2 / log 2 = 0.2885.
    assert knn_top1(bank, query, temperature=0.28) == 1
    assert knn_top1(bank, query, temperature=0.30) == 0


def test_knn_edge_cases() -> None:
    bank, queries = labeled([[1, 0], [0, 1], [0, 2]], [3, 5, 5]), labeled([[1, 0.1], [0.1, 1]], [3, 5])
    assert knn_top1(bank, queries, k=1) == 1
    # All three vote: at a high temperature the majority decides for both.
    assert knn_top1(bank, queries, k=20, temperature=100) == 0.5
    assert knn_top1(bank, queries, temperature=1e-4) == 1  # exp(1 / T) is inf
    tie = labeled([[1, 0], [1, 0]], [7, 2])
    assert [knn_top1(tie, labeled([[1, 0]], [label])) for label in (7, 2)] == [0, 1]  # the lowest
    one_class = labeled([[1, 0], [0, 1]], [4, 4])
    assert knn_top1(one_class, labeled([[1, 1], [-1, 0]], [4, 6])) == 0.5
    assert knn_top1(labeled([[0, 0], [1, 1]], [0, 1]), labeled([[2, 2]], [1]), k=1) == 1  # no direction, no NaN


@pytest.mark.parametrize("measure", [knn_top1, linear_top1])
def test_rows_that_are_not_finite(measure) -> None:
    good = labeled([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], [0, 0, 1, 1])
    bad = labeled([[math.nan, 0], *good.features.tolist()], [1, 0, 0, 1, 1])
    assert measure(bad, good) == 1  # left out of the bank
    assert measure(good, bad) == 0.8  # and wrong as a query
    with pytest.raises(NonFiniteError, match="NaN or inf for all 2 images of the bank"):
        measure(labeled([[math.nan, 0], [math.inf, 1]], [0, 1]), good)


def test_linear_matches_sklearn(digits) -> None:
    bank, queries = digits
    scaler = StandardScaler().fit(bank.features.double())
    reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000)
    reference.fit(scaler.transform(bank.features.double()), bank.labels)
    assert linear_top1(bank, queries) == reference.score(scaler.transform(queries.features.double()), queries.labels)
    features = torch.tensor(scaler.transform(bank.features.double()), dtype=torch.float32)
    weight, bias = frozen._fit_linear(features, bank.labels, num_classes=10)
    assert np.abs(weight.numpy() - reference.coef_).max() < 5e-3 < 0.1 < np.abs(reference.coef_).max()
    centered = bias.numpy() - bias.numpy().mean(), reference.intercept_ - reference.intercept_.mean()
    assert np.abs(centered[0] - centered[1]).max() < 2e-2


def test_linear_edge_cases() -> None:
    bank = labeled([[1, 0, 5], [0.9, 0, 5], [0, 0, 5], [0.1, 0, 5]], [30, 30, 8, 8])  # two features are constant
    assert linear_top1(bank, labeled([[1, 0, 5], [0, 0, 5], [1, 0, 5]], [30, 8, 9])) == pytest.approx(2 / 3)
    one_class = labeled([[1, 0], [0, 1]], [4, 4])
    assert linear_top1(one_class, labeled([[1, 1], [-1, 0]], [4, 6])) == 0.5


def test_linear_is_deterministic_and_runs_without_gradients(digits) -> None:
    state = torch.get_rng_state()
    wanted = frozen._fit_linear(digits[0].features, digits[0].labels, num_classes=10)
    with torch.inference_mode():
        found = frozen._fit_linear(digits[0].features.clone(), digits[0].labels.clone(), num_classes=10)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_fifth_image_is_a_query() -> None:
    index = torch.tensor([0, 1, 2, 4, 5, 6, 9, 10])  # some could not be read
    bank, queries = split_bank(Features(index[:, None].float(), index, index))
    assert queries.index.tolist() == [0, 5, 10] and bank.index.tolist() == [1, 2, 4, 6, 9]
    with pytest.raises(DataError, match="1 image is too few"):
        split_bank(Features(index[:1, None].float(), index[:1], index[:1]))


@pytest.mark.parametrize(
    ("num_dims", "name", "wanted"),
    [
        ({"pooled": 2, "spatial": 3}, "pooled", "pooled"),
        ({"pooled": 3}, "pooled", None),
        ({"embedding": 2, "logits": 2, "tokens": 3}, "pooled", "embedding"),
        ({"a": 2, "b": 2}, "pooled", None),
        ({"logits": 2}, "pooled", None),
        ({"a": 2, "b": 2}, "b", "b"),
        ({"dino.x": 2, "dino.logits": 2, "clip.x": 2}, "dino.pooled", "dino.x"),
        ({"dino.x": 2, "clip.x": 2}, "pooled", None),
    ],
)
def test_feature_name(num_dims, name, wanted) -> None:
    assert feature_name(num_dims, name) == wanted


def everything(source, **options) -> Features:
    with open_loader(source, **options) as loader:
        return extract_features(Pooled(), loader)


def assert_equal(found: Features, wanted: Features) -> None:
    for name in ("features", "labels", "index"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("num_samples", [1, 19, 101])
def test_features_independent_of_batches_and_order(tmp_path, num_samples) -> None:
    source = pixel_arrays(tmp_path, num_samples)
    wanted = everything(source, batch_size=num_samples)
    assert wanted.index.tolist() == list(range(num_samples)) and wanted.features.shape == (num_samples, NUM_LOGITS)
    assert wanted.labels.tolist() == source.labels.tolist()
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"shuffle": True, "seed": 9}, {"last_batch": "pad"}):
        assert_equal(everything(source, **options), wanted)


SIZES = (1, 19, 101)


def _rank(rank: int, world_size: int, folder: str) -> None:
    with process_group(rank, world_size, folder):
        found = []
        for size in SIZES:
            source = Arrays(f"{folder}/{size}/images.npy", f"{folder}/{size}/labels.npy")
            for each in (everything(source, batch_size=4), everything(source, batch_size=4, shard=Shard())):
                found.append((each.features, each.labels, each.index))
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_match_one_process(tmp_path) -> None:
    wanted = []
    for size in SIZES:
        (tmp_path / str(size)).mkdir()
        wanted += [everything(pixel_arrays(tmp_path / str(size), size))] * 2
    fork_ranks(_rank, (2, str(tmp_path)))
    for rank in range(2):
        for columns, each in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            assert_equal(Features(*columns), each)


def test_several_outputs_of_a_teacher_in_one_pass(tmp_path) -> None:
    source = pixel_arrays(tmp_path)
    teacher = open_teacher(TeacherSettings(), module=Pooled(lambda x: x * 2), image_shape=(3, SIDE, SIDE))
    reports = []
    with open_loader(source) as loader:
        found = extract_outputs(teacher, loader, ["pooled"], max_batches=2, report=lambda *each: reports.append(each))
        wanted = extract_features(Pooled(), loader)
    assert torch.equal(found["pooled"].features, 2 * wanted.features[:32])
    assert reports == [(0, 2), (1, 2)]


def test_model_without_features_is_refused(tmp_path) -> None:
    class Classifier(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": images.flatten(1)}

    with open_loader(pixel_arrays(tmp_path)) as loader:
        message = "no vector 'pooled' but 'logits' [16, 12]; give it num_classes: 0"
        with pytest.raises(ConfigError, match=re.escape(message)):
            extract_features(Classifier(), loader)
        # A tensor is what a network without a head returns.
        assert torch.equal(extract_features(Pixels(), loader).features, extract_features(Pooled(), loader).features)


def test_split_without_usable_labels_is_refused(tmp_path: Path) -> None:
    images = np.zeros((8, SIDE, SIDE, 3), dtype=np.uint8)
    with (
        open_loader(Arrays(images)) as loader,
        pytest.raises(DataError, match="and it has no labels; use a split with labels"),
    ):
        extract_features(Pooled(), loader)


def test_features_that_are_not_finite(tmp_path, caplog) -> None:
    with open_loader(pixel_arrays(tmp_path)) as loader:
        found = extract_features(Pooled(lambda x: x.masked_fill(x[:, :1] > 25, math.inf)), loader)
        num_bad = int((~found.is_finite).sum())
        assert 0 < num_bad < 101 and f"holds NaN or inf for {num_bad} of 101 images" in caplog.text
        with pytest.raises(NonFiniteError, match="'pooled' holds NaN or inf for all 101 images; check its weights"):
            extract_features(Pooled(lambda x: x * math.nan), loader)


def test_shard_without_process_group_is_refused(tmp_path) -> None:
    with (
        open_loader(pixel_arrays(tmp_path), shard=Shard(0, 2)) as loader,
        pytest.raises(StateError, match="give the loader shard=Shard"),
    ):
        extract_features(Pooled(), loader)
