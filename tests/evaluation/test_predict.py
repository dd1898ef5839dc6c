"""Predictions for single files equal those of a validation on these files, to the bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.evaluation._predict import NOT_FINITE, Prediction, find_images, predict
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from tests.corpus import BROKEN, Photo, photo_of
from tests.networks import LogitsOnly, PixelNet

EVAL = EvalTransform(size=32)


def predictions(images: list[str], model: nn.Module | None = None, **options: int) -> list[Prediction]:
    return list(predict(model or LogitsOnly(3), images, EVAL, device="cpu", num_threads=1, **options))


def test_predictions_equal_validation_logits(photo_folder: Path) -> None:
    source = ImageFolder(photo_folder)
    model = LogitsOnly(3).eval()
    with (
        torch.no_grad(),
        KDDataLoader(source, EVAL, batch_size=8, shuffle=False, device="cpu", num_threads=1) as loader,
    ):
        wanted = torch.cat([model(batch.images) for batch in loader])
    found = predictions([source.name(index) for index in range(len(source))], model.train(), batch_size=8)
    assert [each.image for each in found] == [source.name(index) for index in range(len(source))]
    assert torch.equal(torch.stack([each.logits_K for each in found if each.logits_K is not None]), wanted)
    assert model.training


def test_float16_images_for_float32_network(photo_folder: Path) -> None:
    half = EvalTransform(size=32, dtype="float16")
    images = find_images([photo_folder])[:4]
    found = list(predict(LogitsOnly(3), images, half, device="cpu", num_threads=1))
    for one, other in zip(found, predictions(images), strict=True):
        assert one.logits_K is not None and other.logits_K is not None
        torch.testing.assert_close(one.logits_K, other.logits_K, rtol=0, atol=0.01)


def test_files_keep_order_and_duplicates(photo_folder: Path) -> None:
    first, second, *_ = find_images([photo_folder / "sky"])
    found = predictions([second, first, second])
    assert [each.image for each in found] == [second, first, second]
    assert found[0].logits_K is not None and found[1].logits_K is not None and found[2].logits_K is not None
    assert torch.equal(found[0].logits_K, found[2].logits_K)
    assert not torch.equal(found[0].logits_K, found[1].logits_K)


def test_folder_means_all_images_below(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photo_folder.parent)
    relative = Path(photo_folder.name)
    names = find_images([relative, Path("one.jpg")])
    assert names[-1] == "one.jpg" and len(names) == 38
    assert names[:-1] == sorted(str(path) for path in relative.rglob("*.*"))


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: no images"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="no images to predict"):
        predictions([])


def test_unreadable_file_says_why(photo_folder: Path, photos: tuple[Photo, Photo], tmp_path: Path) -> None:
    good = find_images([photo_folder])[:10]
    for broken in BROKEN:
        broken.put(tmp_path / broken.name, photo_of(photos))
    bad = [str(tmp_path / broken.name) for broken in BROKEN]
    mixed = [*bad[:10], *good[:3], *bad[10:], *good[3:]]
    found = {each.image: each for each in predictions(mixed, batch_size=4)}
    assert list(found) == mixed
    for broken, path in zip(BROKEN, bad, strict=True):
        assert found[path].logits_K is None and broken.reason in str(found[path].problem), broken
    for each, alone in zip((found[path] for path in good), predictions(good, batch_size=4), strict=True):
        assert each.problem is None and each.logits_K is not None and alone.logits_K is not None
        torch.testing.assert_close(each.logits_K, alone.logits_K, rtol=1e-5, atol=1e-5)


def test_logits_with_nan_are_no_prediction(photo_folder: Path) -> None:
    class Bright(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).masked_fill(images.mean(dim=(1, 2, 3))[:, None] > threshold, torch.inf)

    images = find_images([photo_folder])
    with KDDataLoader(ImageFolder(photo_folder), EVAL, batch_size=37, shuffle=False, device="cpu") as loader:
        (batch,) = loader
    brightness = batch.images.mean(dim=(1, 2, 3))
    threshold = float(brightness.median())
    found = predictions(images, Bright(3))
    assert {each.problem for each in found} == {None, NOT_FINITE}
    assert sum(each.problem is None for each in found) == int((brightness <= threshold).sum())
    assert all((each.logits_K is None) == (each.problem is not None) for each in found)


def test_model_may_exclude_classes(photo_folder: Path) -> None:
    class Excluding(LogitsOnly):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).masked_fill(torch.arange(10) == 1, -torch.inf)

    for each in predictions(find_images([photo_folder / "sky"]), Excluding(3)):
        assert each.problem is None and (1, 0.0) in each.top(10)


def test_all_files_unreadable(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    found = predictions([str(tmp_path / "empty.png"), str(tmp_path / "nowhere.jpg")], batch_size=1)
    assert [each.problem for each in found] == ["the file is empty", "the file does not exist"]


def test_top_classes_with_probabilities() -> None:
    logits: Tensor = torch.tensor([1.0, 3.0, -1.0, 2.0])
    (first, one), (second, two) = Prediction("a.jpg", logits, None).top(2)
    assert (first, second) == (1, 3)
    assert one == pytest.approx(float(logits.exp()[1] / logits.exp().sum()))
    assert two == pytest.approx(float(logits.exp()[3] / logits.exp().sum()))
    assert len(Prediction("a.jpg", logits, None).top(9)) == 4
    assert Prediction("a.jpg", None, "gone").top(2) == []


def test_caller_gradients_stay_enabled(photo_folder: Path) -> None:
    for _ in predict(LogitsOnly(3), find_images([photo_folder / "sky"]), EVAL, device="cpu", batch_size=4):
        assert torch.is_grad_enabled()


def test_network_without_head_has_no_classes(photo_folder: Path) -> None:
    model = open_model(ModelSettings(timm="test_resnet", num_classes=0))
    with pytest.raises(ConfigError, match=r"has no classes to predict: it returns 'pooled', 'spatial', .* eval"):
        predictions(find_images([photo_folder])[:2], model)


def test_classes_of_pixels(photo_folder: Path) -> None:
    """Of the images as the transform makes them; a pixel that is not finite is no prediction."""
    source = ImageFolder(photo_folder)
    images = [source.name(index) for index in range(3)]
    model = PixelNet(3).eval()
    found = predictions(images, model)
    with (
        KDDataLoader(source, EVAL, batch_size=3, shuffle=False, device="cpu", num_threads=1) as loader,
        torch.no_grad(),
    ):
        wanted = model(loader.peek().images)["out"].argmax(1)
    for each, mask in zip(found, wanted, strict=True):
        assert torch.equal(each.mask, mask) and each.logits_K is None and each.num_classes == 3
        (label, share), *_ = each.top(2)
        assert share == float((mask == label).float().mean()) >= 1 / 3

    class OnePixel(PixelNet):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            logits = super().forward(images)["out"]
            logits[1, :, 0, 0] = torch.nan
            return {"logits": logits}

    assert [each.problem for each in predictions(images, OnePixel(3))] == [None, NOT_FINITE, None]
