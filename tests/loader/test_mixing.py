"""Mixed, augmented and repeated images: the stream stays reproducible, and the teacher sees mixed images."""

import json
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses import task
from tests.streams import TRAIN, Fields, assert_same, conv_teacher, fields, global_rows, rows, run

MIX = MixSettings(mixup=0.2, cutmix=1.0)
EVERYTHING = TRAIN.model_validate({**TRAIN.model_dump(), "auto_augment": {"kind": "randaugment"}})
PLAIN = TRAIN.model_copy(update={"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0})
NUM_EPOCHS = 2


@pytest.fixture(scope="module")
def open_loader(photo_folder) -> Callable[..., KDDataLoader]:
    source = ImageFolder(photo_folder)

    def make(teacher=None, *, of=source, transform=EVERYTHING, **options: Any) -> KDDataLoader:
        return KDDataLoader(of, transform, teacher, **{"batch_size": 8, "seed": 5, "mix": MIX, **options})

    return make


def read(loader: KDDataLoader, num_epochs: int = NUM_EPOCHS) -> list[Fields]:
    with loader:
        return run(loader, num_epochs)


@pytest.fixture(scope="module")
def whole(open_loader) -> list[Fields]:
    """Two epochs, sample by sample, in batches of 8 on one rank."""
    return rows(read(open_loader()))


def shares(row: Fields) -> dict[int, float]:
    return {label: round(share, 6) for label, share in enumerate(row["labels"].tolist()) if share}


# The stream


@pytest.mark.parametrize("batch_size", [2, 6, 38])
def test_mixing_independent_of_batch_size(open_loader, whole, batch_size):
    assert_same(rows(read(open_loader(batch_size=batch_size))), whole)


def test_rectangles_independent_of_batch_size(open_loader):
    """Of every op, mixed: pixels and labels."""
    transform = EVERYTHING.model_copy(update={"size": (16, 48)})
    whole = rows(read(open_loader(transform=transform)))
    assert {tuple(row["images"].shape) for row in whole} == {(3, 16, 48)}
    assert_same(rows(read(open_loader(transform=transform, batch_size=2))), whole)


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (4, 2), (3, 4)])
def test_mixing_independent_of_ranks(open_loader, whole, world_size, batch_size, last_batch):
    options = {"batch_size": batch_size, "last_batch": last_batch}
    ranks = [read(open_loader(shard=Shard(rank, world_size), **options)) for rank in range(world_size)]
    found = [row for row in global_rows(ranks) if row["valid"]]
    kept = 37 // (world_size * batch_size) * world_size * batch_size if last_batch == "drop" else 37
    assert_same(found, [*whole[:kept], *whole[37 : 37 + kept]])


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2])
def test_resume_continues_with_next_mix(open_loader, repeats):
    options = {"last_batch": "keep", "repeats": repeats}
    with open_loader(conv_teacher(), **options) as loader:
        batches, states = [], [loader.state_dict()]
        for _ in range(NUM_EPOCHS):
            for batch in loader:
                batches.append(fields(batch))
                states.append(loader.state_dict())
    assert len(batches) == 10
    for stop, state in enumerate(states):
        with open_loader(conv_teacher(), ahead=stop % 3, prefetch=1 + stop % 2, **options) as loader:
            loader.load_state_dict(json.loads(json.dumps(state)))
            assert_same(run(loader, NUM_EPOCHS), batches[stop:])


def test_epoch_and_seed_change_mixes(open_loader, whole):
    first, second = ({int(row["index"]): row["images"] for row in whole[start : start + 37]} for start in (0, 37))
    other = {int(row["index"]): row["images"] for row in rows(read(open_loader(seed=6), 1))}
    for index in range(37):
        assert not torch.equal(first[index], second[index]) and not torch.equal(first[index], other[index])


# Batches


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("mix", [MIX, MixSettings(mixup=0.2), MixSettings(cutmix=1.0)])
def test_image_is_mixed_with_partner_view(open_loader, mix, repeats):
    """Each pixel is between those of both views, and the labels are the two classes."""
    options = {"batch_size": 12, "last_batch": "drop", "repeats": repeats}
    mixed, plain = read(open_loader(mix=mix, **options), 1), read(open_loader(mix=None, **options), 1)
    num_changed = 0
    for ours, theirs in zip(mixed, plain, strict=True):
        assert torch.equal(ours["index"], theirs["index"])
        for row in range(12):
            partner = row ^ 1 if repeats == 1 else (row + 3 if row // 3 % 2 == 0 else row - 3)
            low = torch.minimum(theirs["images"][row], theirs["images"][partner])
            high = torch.maximum(theirs["images"][row], theirs["images"][partner])
            found = ours["images"][row]
            assert (low - 1e-5 <= found).all() and (found <= high + 1e-5).all()
            classes = {int(theirs["labels"][row]), int(theirs["labels"][partner])}
            assert set(ours["labels"][row].nonzero().flatten().tolist()) <= classes
            assert ours["index"][row] != ours["index"][partner]
            num_changed += not torch.equal(found, theirs["images"][row])
    assert num_changed > 20


@pytest.mark.parametrize("ahead", [0, 2])
def test_teacher_reads_mixed_tensor(open_loader, monkeypatch, ahead):
    teacher, seen = conv_teacher(), []
    infer = teacher._infer
    monkeypatch.setattr(teacher, "_infer", lambda images: seen.append(images) or infer(images))
    with open_loader(teacher, ahead=ahead) as loader:
        held = list(loader)
    assert [batch.images.data_ptr() for batch in held] == [images.data_ptr() for images in seen]
    assert len({images.data_ptr() for images in seen}) == len(held) == 5
    for batch in held:
        assert torch.equal(batch.teacher["logits"], conv_teacher()(batch.images)["logits"])


def test_labels_are_distributions_and_images_contiguous(open_loader):
    with open_loader() as loader:
        for batch in loader:
            assert batch.images.is_contiguous() and batch.images.dtype == torch.float32
            assert batch.labels is not None and batch.labels.shape == (len(batch), 3)
            assert batch.labels.dtype == torch.float32 and batch.labels.is_contiguous()
            torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(len(batch)), rtol=0, atol=1e-6)
            assert task(torch.zeros(len(batch), 3), batch.labels).isfinite()


def test_half_precision_is_kept(open_loader):
    with open_loader(transform=EVERYTHING.model_copy(update={"dtype": "float16"})) as loader:
        assert all(batch.images.dtype == torch.float16 for batch in loader)


def test_unlabeled_images_are_mixed(open_loader, photo_folder, whole):
    for batch in read(open_loader(of=ImageFolder(photo_folder, labeled=False)), 1):
        assert "labels" not in batch
        for row, index in enumerate(batch["index"].tolist()):
            (same,) = (other for other in whole[:37] if int(other["index"]) == index)
            assert torch.equal(batch["images"][row], same["images"])


def test_padding_is_mixed_into_nothing(photos, tmp_path):
    """19 rows in batches of 8: the partner of the last valid row is padding, so that row is not mixed."""
    pieces = np.stack([photos[n % 2][n : n + 40, n : n + 40] for n in range(19)])
    options = {"batch_size": 8, "seed": 2, "last_batch": "pad"}
    with (
        KDDataLoader(Arrays(pieces, np.arange(19) % 5), PLAIN, mix=MIX, **options) as mixed,
        KDDataLoader(Arrays(pieces, np.arange(19) % 5), PLAIN, **options) as plain,
    ):
        *_, ours = run(mixed, 1)
        *_, theirs = run(plain, 1)
    assert ours["valid"].tolist() == [True] * 3 + [False] * 5
    assert torch.equal(ours["images"][2:], theirs["images"][2:])
    assert not torch.equal(ours["images"][:2], theirs["images"][:2])
    assert [row.argmax().item() for row in ours["labels"][2:]] == theirs["labels"][2:].tolist()


def test_unreadable_image_is_mixed_into_nothing(photo_folder, tmp_path, open_loader):
    root = tmp_path / "photos"
    root.mkdir()
    for number, path in enumerate(sorted(photo_folder.rglob("*.*"))[:8]):
        folder = root / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        data = path.read_bytes()
        (folder / f"{number}{path.suffix}").write_bytes(data[:200] if number == 5 else data)
    options = {"shuffle": False, "on_bad_sample": "substitute", "max_bad_fraction": 0.2}
    source = ImageFolder(root)
    (ours,) = read(open_loader(of=source, **options), 1)
    (theirs,) = read(open_loader(of=source, mix=None, **options), 1)
    (bad,) = (~ours["valid"]).nonzero().flatten().tolist()
    for row in (bad, bad ^ 1):
        assert torch.equal(ours["images"][row], theirs["images"][row])
    assert not torch.equal(ours["images"], theirs["images"])


@pytest.mark.parametrize("mix", [None, MIX])
def test_stream_sync_gets_tensors_torch_allocated(open_loader, monkeypatch, mix):
    received: list[set[int]] = []
    with open_loader(conv_teacher(), mix=mix) as loader:
        monkeypatch.setattr(
            loader._sync, "hand_over", lambda event, tensors: received.append({tensor.data_ptr() for tensor in tensors})
        )
        held = list(loader)
    for batch, pointers in zip(held, received, strict=True):
        owned = {name: tensor.data_ptr() for name, tensor in fields(batch).items()}
        images = owned.pop("images")
        assert pointers >= {*owned.values(), *([images] if mix else [])}
        assert mix or images not in pointers


# Repeats


def test_repeats_are_consecutive_different_views(open_loader):
    found = rows(read(open_loader(mix=None, repeats=3, batch_size=6), 1))
    assert len(found) == 37 and [int(row["index"]) for row in found[:36:3]] == [
        int(row["index"]) for row in found[2::3]
    ]
    assert sorted(Counter(int(row["index"]) for row in found).values()) == [1] + [3] * 12
    assert len({row["images"].numpy().tobytes() for row in found}) == 37


def test_first_repeat_equals_view_without_repeats(open_loader):
    repeated, plain = (rows(read(open_loader(mix=None, repeats=repeats), 1)) for repeats in (3, 1))
    assert_same(repeated[::3], plain[:13])


@pytest.mark.parametrize(("batch_size", "world_size"), [(12, 1), (6, 2), (18, 1)])
def test_repeated_mixes_independent_of_batches_and_ranks(open_loader, batch_size, world_size):
    wanted = rows(read(open_loader(repeats=3, batch_size=6)))
    options = {"repeats": 3, "batch_size": batch_size, "last_batch": "pad"}
    ranks = [read(open_loader(shard=Shard(rank, world_size), **options)) for rank in range(world_size)]
    assert_same([row for row in global_rows(ranks) if row["valid"]], wanted)


# Errors


@pytest.mark.parametrize(("batch_size", "repeats", "multiple"), [(7, 1, 2), (8, 3, 6), (1, 1, 2)])
def test_batch_that_separates_partners_is_refused(open_loader, batch_size, repeats, multiple):
    with pytest.raises(ConfigError, match=f"a multiple of {multiple} when .* got {batch_size}"):
        open_loader(batch_size=batch_size, repeats=repeats)
    open_loader(batch_size=batch_size, repeats=repeats, mix=None).close()


def test_repeats_out_of_range_are_refused(open_loader):
    for repeats in (0, -1):
        with pytest.raises(ConfigError, match=f"repeats must be at least 1, got {repeats}"):
            open_loader(repeats=repeats)


# The state


def test_state_from_before_mixing_loads(open_loader):
    with open_loader(transform=TRAIN, mix=None) as loader:
        state = deepcopy(loader.state_dict())
        assert state["fingerprint"].pop("mix") is None and state["fingerprint"].pop("repeats") is None
        assert state["fingerprint"]["transform"].pop("auto_augment") is None
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mix": None}, r"mix.mixup: 0.2 → None"),
        ({"mix": MIX.model_copy(update={"switch": 0.3})}, r"mix.switch: 0.5 → 0.3"),
        ({"repeats": 2}, r"repeats: None → 2"),
        ({"transform": TRAIN}, r"transform.auto_augment.kind: 'randaugment' → None"),
    ],
)
def test_state_with_other_mix_or_repeats_is_refused(open_loader, change, field):
    with open_loader() as loader:
        state = loader.state_dict()
    with open_loader(**change) as loader, pytest.raises(StateError, match=field):
        loader.load_state_dict(state)


def test_probability_zero_changes_only_label_format(open_loader):
    """With probability 0 only the format of the labels differs."""
    never = rows(read(open_loader(mix=MIX.model_copy(update={"probability": 0.0})), 1))
    plain = rows(read(open_loader(mix=None), 1))
    for ours, theirs in zip(never, plain, strict=True):
        assert torch.equal(ours["images"], theirs["images"])
        assert shares(ours) == {int(theirs["labels"]): 1.0}
        assert isinstance(ours["labels"], Tensor)
