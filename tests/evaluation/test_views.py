"""Evaluation of several sizes and crops in one pass over the data."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline import evaluate
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.data.views import EvalView, FollowingView, TrainView
from kd_pipeline.errors import ConfigError, NonFiniteError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.batch_loader import BatchLoader
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.evaluation.ranks import process_group
from tests.forks import fork_ranks
from tests.networks import ConvNet

VIEWS = {
    "24": EvalView(size=24),
    "same": EvalView(size=32),
    "whole": EvalView(size=32, resize=32),
    "48": EvalView(size=48, resize=56),
}


class AnySize(nn.Module):
    """Ten logits of images of any size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.head = nn.Linear(144, 10)

    def forward(self, images: Tensor) -> Tensor:
        return 20 * self.head(self.layers(images))


@pytest.fixture(scope="module")
def open_loader(photo_folder: Path) -> Callable[..., KDDataLoader]:
    source = ImageFolder(photo_folder)

    def make(size: int = 32, resize: int | None = None, **options: Any) -> KDDataLoader:
        options = {"batch_size": 8, "shuffle": False, "device": "cpu", "shard": Shard(), **options}
        return KDDataLoader(source, EvalTransform(size=size, resize=resize), **options)

    return make


@pytest.fixture(scope="module")
def found(open_loader: Callable[..., KDDataLoader]) -> dict[str, Evaluation]:
    with open_loader(views=VIEWS) as loader:
        return evaluate(AnySize(), loader, views=["images", *VIEWS], reference=AnySize(1))


@pytest.mark.parametrize(("view", "size", "resize"), [("24", 24, None), ("whole", 32, 32), ("48", 48, 56)])
def test_a_view_is_as_evaluated_alone(
    open_loader: Callable[..., KDDataLoader], found: dict[str, Evaluation], view: str, size: int, resize: int | None
) -> None:
    with open_loader(size, resize) as loader:
        assert found[view] == evaluate(AnySize(), loader, reference=AnySize(1))


def test_own_size_is_todays_result(open_loader: Callable[..., KDDataLoader], found: dict[str, Evaluation]) -> None:
    with open_loader() as loader:
        alone = evaluate(AnySize(), loader, reference=AnySize(1))
    assert found["images"] == found["same"] == alone
    assert len({each.loss for each in found.values()}) == 5, "24, 32, the whole image, 48, and the mean differ"


def test_mean_is_of_probabilities(open_loader: Callable[..., KDDataLoader], found: dict[str, Evaluation]) -> None:
    model, names = AnySize(), ["images", *VIEWS]
    with open_loader(views=VIEWS, batch_size=64) as loader, torch.no_grad():
        (batch,) = loader
        probabilities = [model(batch.images if name == "images" else batch.views[name]).softmax(1) for name in names]
    mean = torch.stack(probabilities).mean(0)
    loss = -mean[torch.arange(len(mean)), batch.labels].log().mean()
    assert math.isclose(found["averaged"].loss or 0, float(loss), rel_tol=1e-5)
    assert found["averaged"].top1 == float((mean.argmax(1) == batch.labels).double().mean())
    assert found["averaged"].num_samples == 37 and list(found) == [*names, "averaged"]


def test_copies_count_with_their_mean(open_loader: Callable[..., KDDataLoader]) -> None:
    crops, model = {"crops": TrainView(size=24, count=3)}, AnySize()
    with open_loader(views=crops, batch_size=64) as loader, torch.no_grad():
        (result,) = evaluate(model, loader, views=["crops"]).values()
        loader.set_epoch(0)
        (batch,) = loader
        mean = torch.stack([model(crop).softmax(1) for crop in batch.views["crops"].unbind(1)]).mean(0)
    loss = -mean[torch.arange(len(mean)), batch.labels].log().mean()
    assert math.isclose(result.loss or 0, float(loss), rel_tol=1e-5)


def pooled(root: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The metrics of a network whose outputs are the same in any batch."""
    network, reference = (nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten()) for size in ((2, 1), (1, 2)))
    options = {"batch_size": 8, "device": "cpu", "num_threads": 1, **options}
    with KDDataLoader(ImageFolder(root), EvalTransform(size=32), views=VIEWS, **options) as loader:
        found = evaluate(network, loader, views=["images", *VIEWS], reference=reference)
        assert loader.epoch == 1, "one pass over the data for all views"
    return {name: each.to_dict() for name, each in found.items()}


def test_batch_size_order_and_padding_change_nothing(photo_folder: Path) -> None:
    wanted = pooled(photo_folder, shard=Shard())
    for options in ({"batch_size": 5, "last_batch": "pad"}, {"batch_size": 64, "seed": 9}):
        assert pooled(photo_folder, shard=Shard(), **options) == wanted


def _rank(rank: int, world_size: int, folder: str, root: Path) -> None:
    with process_group(rank, world_size, folder):
        found = pooled(root, batch_size=4, last_batch="pad")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_ranks_match_one_process(photo_folder: Path, tmp_path: Path) -> None:
    wanted = json.loads(json.dumps(pooled(photo_folder, shard=Shard())))
    fork_ranks(_rank, (2, str(tmp_path), photo_folder))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == wanted


def test_teacher_of_the_loader_is_the_same_for_all(open_loader: Callable[..., KDDataLoader]) -> None:
    with open_loader(teacher=PyTorchTeacher(ConvNet(0), image_shape=(3, 32, 32)), views=VIEWS) as loader:
        found = evaluate(AnySize(), loader, views=["images", "24"])
        alone = evaluate(AnySize(), loader)
    assert found["images"] == alone
    assert found["24"].teacher == found["averaged"].teacher == alone.teacher and found["24"].kl != alone.kl


@pytest.mark.parametrize("kind", ["network", "teacher"])
def test_model_of_one_size_is_refused_with_the_size(open_loader: Callable[..., KDDataLoader], kind: str) -> None:
    network = ConvNet(0)
    model = network if kind == "network" else PyTorchTeacher(network, image_shape=(3, 32, 32))
    with open_loader(views=VIEWS) as loader:
        assert evaluate(model, loader, views=["images", "whole"])["whole"].num_samples == 37
        if kind == "teacher":
            with pytest.raises(ConfigError, match=r"view '48': the model fails on images of 48 x 48, .* Leave out"):
                evaluate(model, loader, views=["48"])


def test_bad_views_are_refused(open_loader: Callable[..., KDDataLoader]) -> None:
    with open_loader(views=VIEWS) as loader:
        with pytest.raises(ConfigError, match="the loader has no view 'hole'; did you mean 'whole'"):
            evaluate(AnySize(), loader, views=["hole"])
        with pytest.raises(ConfigError, match="views names none; the loader has images, 24, same, whole, 48"):
            evaluate(AnySize(), loader, views=[])
    taken = {"averaged": FollowingView(follow="images", size=24)}
    with open_loader(views=taken) as loader, pytest.raises(ConfigError, match="'averaged' is the name of the mean of"):
        evaluate(AnySize(), loader, views=["averaged"])


def test_loaders_of_ones_own_have_images_alone() -> None:
    batches = BatchLoader([(torch.rand(4, 3, 24, 24), torch.arange(4))], device="cpu")
    found = evaluate(AnySize(), batches, views=["images"])
    assert found == {"images": evaluate(AnySize(), batches)}
    with pytest.raises(ConfigError, match="the loader has no view '24'"):
        evaluate(AnySize(), batches, views=["24"])


def test_view_without_finite_logits_is_named(open_loader: Callable[..., KDDataLoader]) -> None:
    class FailsOnLarge(AnySize):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (math.nan if images.shape[-1] == 48 else 1)

    with open_loader(views=VIEWS) as loader, pytest.raises(NonFiniteError, match="view '48': the model's logits"):
        evaluate(FailsOnLarge(), loader, views=["24", "48"])


def test_pixels_of_a_view_are_refused(open_loader: Callable[..., KDDataLoader]) -> None:
    """Masks follow `images`, and a view may show another window."""

    class Pixels(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": images}

    with open_loader(views=VIEWS) as loader, pytest.raises(ConfigError, match="view '24': masks, with which logits of"):
        evaluate(Pixels(), loader, views=["24"])
