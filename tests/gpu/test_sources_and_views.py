"""Every kind of source, op and view on a GPU: pixels as on the CPU, the same bits after a resume, and no step waits."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kd_pipeline import BaseSource
from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.affine import AffineSettings
from kd_pipeline.data.auto_augment import RandAugment
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.sources import FolderMasks, ImageFolder, Noise, Parquet, Source, Tar
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView, FollowingView, TrainView
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from tests.gpu.conftest import FEW, no_synchronization
from tests.mask_files import save_pair, some_masks
from tests.streams import SIZE, Fields, assert_same, fields, run
from tests.tar_files import folder_as_shards

STOP = 3
"""Batches before the saved state."""
AFFINE = AffineSettings(rotate=20, translate=0.1, scale=(0.8, 1.2), shear=10)
COLORS: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "blur": 0.5, "erase": 0.5}
OWN = [
    {"factory": "tests.own_ops:mirror", "num_draws": 1, "changes": "positions"},
    {"factory": "tests.own_ops:shift", "num_draws": 1, "probability": 0.5},
    {"factory": "tests.own_ops:zoom", "probability": 0.3, "changes": "positions"},
]
VIEWS = {
    "teacher": FollowingView(follow=IMAGES, size=SIZE + 8),
    "other colors": FollowingView(follow=IMAGES, size=SIZE, color="own", erase="none"),
    "local": TrainView(size=SIZE // 2, count=3, affine=AFFINE, interpolation="random", **COLORS),
    "whole": EvalView(size=SIZE),
}


class Case(NamedTuple):
    """What a loader reads, and how far it may be from the CPU's pixels on average, in levels of 255."""

    source: str = "files"
    transform: TrainTransform | EvalTransform = EvalTransform(size=SIZE)
    options: dict[str, Any] | None = None
    levels: float = 1


def train(**settings: Any) -> TrainTransform:
    return TrainTransform.model_validate({"size": SIZE, **settings})


CASES = {
    **{source: Case(source) for source in ("bytes", "tar", "parquet", "noise", "masks")},
    "affine": Case(transform=train(affine=AFFINE)),
    "affine of noise": Case("noise", train(affine=AFFINE, interpolation="random"), levels=2),
    "random interpolation": Case(transform=train(interpolation="random")),
    "rectangle": Case(transform=train(size=[SIZE, SIZE + 16], affine=AFFINE, **COLORS), levels=2),
    "widest blur": Case(transform=train(blur=0.5, blur_sigma=(20, 90))),
    "own ops": Case(transform=train(order=OWN), options={"plugins": ["tests.own_ops"]}),
    "own ops among others": Case(
        transform=train(order=["erase", OWN[1], "color", "blur"], **COLORS), options={"plugins": ["tests.own_ops"]}
    ),
    "views": Case(transform=train(affine=AFFINE, **COLORS), options={"views": VIEWS}),
    "views of windows": Case(transform=train(**COLORS), options={"views": VIEWS, "decode": "window"}),
    "views of noise": Case("noise", train(**COLORS), {"views": VIEWS}, levels=2),
    "masks with views": Case(
        "masks", train(affine=AFFINE, auto_augment=RandAugment()), {"views": VIEWS | {"local": TrainView(size=16)}}, 3
    ),
    "mixed views": Case(
        transform=train(affine=AFFINE), options={"views": VIEWS, "mix": MixSettings(mixup=0.8, cutmix=1.0)}
    ),
    "sizes that change": Case(
        transform=train(size={"choices": [SIZE, SIZE // 2, [SIZE, SIZE + 16]]}, affine=AFFINE),
        options={"views": {"teacher": FollowingView(follow=IMAGES, size=SIZE)}},
    ),
    "sizes that grow, mixed": Case(
        transform=train(size={"start": SIZE // 2, "end": SIZE, "epochs": 2, "step": 1}, interpolation="random"),
        options={"mix": MixSettings(cutmix=1.0)},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


class Store(BaseSource):
    """The bytes of the files of another source."""

    def __init__(self, files: Source) -> None:
        super().__init__(len(files), files.labels, classes=files.classes)
        self.files = files

    def content(self, index: int) -> bytes:
        return Path(self.files.name(index)).read_bytes()


@pytest.fixture(scope="module")
def sources(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """`sources(kind)` has 37 images, mostly the photographs."""
    folder, files = tmp_path_factory.mktemp("sources"), ImageFolder(photo_folder)

    def open_source(kind: str) -> Source:
        match kind:
            case "bytes":
                return Store(files)
            case "noise":
                return Noise(37, (40, 48), num_classes=3)
            case "tar":
                if not (shards := folder / "tar").exists():
                    shards.mkdir()
                    folder_as_shards(photo_folder, shards, per_shard=12)
                return Tar(str(shards / "train-{0000..0003}.tar"), classes=files.classes)
            case "parquet":
                tables = pytest.importorskip("tests.data.sources.table_files", exc_type=ImportError)
                if not (folder / "parquet").exists():
                    tables.write_parquet(tables.table_of(files), folder / "parquet")
                return Parquet(f"{folder}/parquet/train-{{00000..00002}}-of-00003.parquet", classes=files.classes)
            case "masks":
                images, masks = folder / "images", folder / "masks"
                if not images.exists():
                    for number, mask in enumerate(some_masks(37)):
                        save_pair(images / str(number % 2), masks / str(number % 2), f"{number:02}", mask)
                return ImageFolder(images, masks=FolderMasks(root=str(masks), num_classes=4))
        return files

    return open_source


class Stream(NamedTuple):
    """Two epochs of a loader on a GPU, and its state after the first `STOP` batches."""

    batches: list[Fields]
    state: dict[str, Any]


@pytest.fixture(scope="module")
def open_loader(sources: Callable[[str], Source], device: torch.device) -> Callable[..., KDDataLoader]:
    """Loaders of cases, to be closed by whoever opens them."""

    def make(case: Case, device: Any = device, **options: Any) -> KDDataLoader:
        options = {"batch_size": 8, "seed": 5, **FEW, **(case.options or {}), **options}
        if device == "cpu":
            options.pop("decode", None)
        return KDDataLoader(sources(case.source), case.transform, device=device, **options)

    return make


@pytest.fixture(scope="module")
def stream_of(open_loader: Callable[..., KDDataLoader]) -> Callable[[str], Stream]:
    """The stream of each case, by its name; opening a loader on a GPU takes seconds."""

    @cache
    def read(name: str) -> Stream:
        with open_loader(CASES[name], ahead=2, prefetch=4) as loader:
            batches: list[Fields] = []
            for batch in loader:
                batches.append(fields(batch))
                if len(batches) == STOP:
                    state = loader.state_dict()
            return Stream(batches + run(loader, 2), state)

    return read


def on_cpu(batches: list[Fields]) -> list[Fields]:
    return [{name: tensor.cpu() for name, tensor in batch.items()} for batch in batches]


def is_image(name: str) -> bool:
    return name == IMAGES or name.startswith("view ")


@every_case
def test_matches_the_cpu(
    open_loader: Callable[..., KDDataLoader], stream_of: Callable[[str], Stream], device: torch.device, name: str
) -> None:
    """Decoders and filters round differently; all else is the same to the last bit."""
    found, case = stream_of(name).batches, CASES[name]
    assert all(tensor.device == device for batch in found for tensor in batch.values())
    with open_loader(case, device="cpu") as loader:
        wanted = run(loader, 2)
    level = 1 / 255 / min(case.transform.std)
    for ours, theirs in zip(on_cpu(found), wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if is_image(key):
                assert ours[key].shape == theirs[key].shape
                assert (ours[key] - theirs[key]).abs().mean() < case.levels * level, key
            elif ours[key].is_floating_point():
                torch.testing.assert_close(ours[key], theirs[key])
            else:
                assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.slow
@every_case
def test_resume_has_equal_bits(
    open_loader: Callable[..., KDDataLoader], stream_of: Callable[[str], Stream], name: str
) -> None:
    with open_loader(CASES[name], ahead=0, prefetch=1) as resumed:
        resumed.load_state_dict(stream_of(name).state)
        assert_same(run(resumed, 2), stream_of(name).batches[STOP:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "noise", "own ops", "masks with views", "mixed views", "sizes that change"])
def test_step_never_synchronizes(open_loader: Callable[..., KDDataLoader], name: str) -> None:
    with open_loader(CASES[name]) as loader:
        run(loader, 1)
        with no_synchronization():
            found = [fields(batch) for batch in loader]
    for batch in found:
        assert all(batch[key].isfinite().all() for key in batch if is_image(key))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "bytes", "noise"])
def test_arrays_are_read_before_they_are_freed(
    open_loader: Callable[..., KDDataLoader], device: torch.device, kind: str
) -> None:
    """DALI is handed arrays of NumPy's without a copy; here their memory is soon used again, and the GPU is late."""
    case, factor = Case(kind, train(affine=AFFINE, **COLORS)), torch.randn(4096, 4096, device=device)
    busy, found = torch.cuda.Stream(device), []
    with open_loader(case, ahead=0, prefetch=1) as loader:
        wanted = run(loader, 3)
    with open_loader(case, prefetch=4) as loader:
        for _ in range(3):
            with torch.cuda.stream(busy):
                for _ in range(200):
                    torch.mm(factor, factor)
            for batch in loader:
                found.append(fields(batch))
                for num_bytes in (2**12, 2**16, 2**20):
                    np.full(num_bytes, 255, np.uint8)
    assert_same(found, wanted)


def test_own_op_without_a_kernel_for_gpus_is_refused(open_loader: Callable[..., KDDataLoader]) -> None:
    case = Case(transform=train(order=[{"factory": "tests.own_ops:blank"}]), options={"plugins": ["tests.own_ops"]})
    open_loader(case, device="cpu").close()
    with pytest.raises(ConfigError, match=r"the op tests\.own_ops:blank fails on images .* not registered for gpu"):
        open_loader(case)
