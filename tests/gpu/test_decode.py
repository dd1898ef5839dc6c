"""Decoding on a GPU: both modes, in any batch, in reused memory."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline.data.decode import choose_decode
from kd_pipeline.data.decode_trial import DecodeTrial, try_decoding
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from tests.gpu.conftest import FEW
from tests.streams import EVAL, TRAIN, Fields, assert_same, fields, rows

GIB = 2**30
SMALL_VIEWS = TrainTransform(size=32)
LEVEL = 1 / 255 / min(EVAL.std)
"""One of 255 levels, in normalized pixels."""


@pytest.fixture(scope="session")
def trials(device: torch.device) -> dict[str, DecodeTrial]:
    return {mode: try_decoding(mode, device_id=device.index) for mode in ("window", "full")}


@pytest.fixture
def open_loader(photo_folder: Path, device: torch.device) -> Iterator[Callable[..., KDDataLoader]]:
    """Loaders of the photographs, closed after the test."""
    source, opened = ImageFolder(photo_folder), []

    def make(transform: Any = TRAIN, **options: Any) -> KDDataLoader:
        options = {"device": device, "batch_size": 8, "seed": 5, **FEW, **options}
        opened.append(KDDataLoader(source, transform, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def epoch(loader: KDDataLoader) -> list[Fields]:
    """All batches of an epoch, on the CPU."""
    return [{name: tensor.cpu() for name, tensor in fields(batch).items()} for batch in loader]


def distances_of(found: list[Fields], wanted: list[Fields]) -> Tensor:
    """`[N]`, the mean distance of each image in levels of 255; asserts that all other fields are equal."""
    distances = []
    for ours, theirs in zip(rows(found), rows(wanted), strict=True):
        distances.append((ours.pop("images").float() - theirs.pop("images").float()).abs().mean() / LEVEL)
        assert_same([ours], [theirs])
    return torch.stack(distances)


def test_mode_chosen_by_auto_matches_the_cpu(trials: dict[str, DecodeTrial], device: torch.device) -> None:
    choice = choose_decode(device.index, 0.0)
    assert trials[choice.decode].works, choice.reason


def test_hardware_decodes_by_default_where_it_is_right(
    open_loader: Callable[..., KDDataLoader], device: torch.device
) -> None:
    choice = choose_decode(device.index)
    trial = try_decoding(choice.decode, device_id=device.index, hw_decoder_load=choice.hw_decoder_load)
    assert trial.works and trial.is_repeatable and choice.hw_decoder_load in (0, 1), choice.reason
    position = open_loader().state_dict()["fingerprint"]
    assert (position["decode"], position["hw_decoder_load"] or 0) == (choice.decode, choice.hw_decoder_load)


@pytest.mark.parametrize("load", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["window", "full"])
def test_decoding_waits_for_readers_of_its_buffers(
    open_loader: Callable[..., KDDataLoader], device: torch.device, mode: str, load: float
) -> None:
    """While other work fills the GPU, what reads DALI's buffers is late, and a decoder that ignores the order of the
    stream would overwrite them."""
    wanted = {int(row["index"]): row["images"] for row in rows(epoch(open_loader(decode=mode, hw_decoder_load=load)))}
    loader = open_loader(decode=mode, hw_decoder_load=load, prefetch=3)
    factor = torch.randn(4096, 4096, device=device)
    busy, stop = torch.cuda.Stream(device), torch.cuda.Event()
    for _ in range(6):
        with torch.cuda.stream(busy):
            for _ in range(200):
                torch.mm(factor, factor)
            stop.record()
        loader.set_epoch(0)
        for row in rows(epoch(loader)):
            assert torch.equal(row["images"], wanted[int(row["index"])])
        stop.synchronize()


@pytest.mark.parametrize("mode", ["window", "full"])
@pytest.mark.parametrize("transform", [EVAL, SMALL_VIEWS], ids=["eval", "train"])
def test_working_modes_are_within_a_level_of_the_cpu(
    open_loader: Callable[..., KDDataLoader], trials: dict[str, DecodeTrial], mode: str, transform: Any
) -> None:
    if not trials[mode].works:
        pytest.skip(f"auto does not choose it: {trials[mode]}")
    distance = distances_of(epoch(open_loader(transform, decode=mode)), epoch(open_loader(transform, device="cpu")))
    assert distance.mean() < 1 and distance.max() < 3


@pytest.mark.parametrize("transform", [EVAL, SMALL_VIEWS, TRAIN], ids=["eval", "train", "every op"])
def test_modes_agree_within_half_a_level(
    open_loader: Callable[..., KDDataLoader], trials: dict[str, DecodeTrial], transform: Any
) -> None:
    if not all(trial.works for trial in trials.values()):
        pytest.skip("; ".join(map(str, trials.values())))
    found = [epoch(open_loader(transform, decode=mode)) for mode in ("window", "full")]
    distance = distances_of(*found)
    assert distance.mean() < 0.5 and distance.max() < 2


@pytest.mark.parametrize("batch_size", [1, 3, 37])
def test_image_does_not_depend_on_its_batch(open_loader: Callable[..., KDDataLoader], batch_size: int) -> None:
    loader = open_loader(batch_size=batch_size)
    assert loader.state_dict()["fingerprint"]["hw_decoder_load"] in (None, 1)
    for _ in range(2):  # the number of batches in a group grows
        assert_same(rows(epoch(loader)), rows(epoch_of(open_loader, loader.epoch - 1)))


def epoch_of(open_loader: Callable[..., KDDataLoader], number: int) -> list[Fields]:
    loader = open_loader()
    loader.set_epoch(number)
    return epoch(loader)


@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_buffers_keep_nothing_of_earlier_images(
    open_loader: Callable[..., KDDataLoader], device: torch.device, stores: str
) -> None:
    """Each batch is overwritten with NaN after it is read, on a stream that is far behind."""
    if stores == "pixels":
        pixels = np.random.default_rng(0).integers(0, 256, (37, 40, 40, 3), dtype=np.uint8)
        loaders = [KDDataLoader(Arrays(pixels), TRAIN, device=device, batch_size=8, seed=5) for _ in range(2)]
    else:
        loaders = [open_loader(), open_loader(prefetch=4)]
    reference, loader = loaders
    wanted, found = [], []
    consumer = torch.cuda.Stream(device)
    for _ in range(4):
        wanted += [(batch["index"], batch["images"].double().sum((1, 2, 3))) for batch in epoch(reference)]
        with torch.cuda.stream(consumer):
            for batch in loader:
                torch.cuda._sleep(5_000_000)
                found.append((batch.index.clone(), batch.images.double().sum((1, 2, 3))))
                batch.images.fill_(float("nan"))
                del batch
    torch.cuda.synchronize(device)
    for loader_ in loaders:
        loader_.close()
    for (index, sums), (wanted_index, wanted_sums) in zip(found, wanted, strict=True):
        assert torch.equal(index.cpu(), wanted_index)
        torch.testing.assert_close(sums.cpu(), wanted_sums, rtol=1e-9, atol=1e-6)


@pytest.mark.slow
def test_memory_is_constant_over_many_fast_steps(device: torch.device) -> None:
    """Without a bound, batches would take 34 GB. Other tests may use the GPU at the same time."""
    pixels = np.random.default_rng(0).integers(0, 256, (320, 64, 64, 3), dtype=np.uint8)
    student, num_steps, used = torch.zeros((), device=device), 0, {}
    with KDDataLoader(Arrays(pixels), EvalTransform(size=224), device=device, batch_size=32, ahead=1) as loader:
        while num_steps < 2000:
            for batch in loader:
                student += batch.images[0, 0, 0, 0]  # lets the host run ahead as far as possible
                num_steps += 1
                assert len(loader._sync._kept) <= 2 * (1 + 2)
                if num_steps in (200, 2000):
                    torch.cuda.synchronize(device)
                    free, total = torch.cuda.mem_get_info(device)
                    used[num_steps] = total - free, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (device_before, host_before), (device_after, host_after) = used[200], used[2000]
    assert device_after - device_before < 4 * GIB and host_after - host_before < GIB
    assert student.isfinite()
