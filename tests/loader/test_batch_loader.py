"""Batches of any loader, with teacher outputs, and the position in it."""

import itertools
import random
import re
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from kd_pipeline import BatchLoader, KDBatch
from kd_pipeline.errors import ConfigError, DataError, StateError, TeacherError
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings

ROWS, SIZE, CLASSES = 22, 12, 5


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(SIZE, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES))


@pytest.fixture
def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(ROWS, SIZE, generator=generator), torch.randint(0, CLASSES, (ROWS,), generator=generator)
    )


class Mean(nn.Module):
    """A classifier of sequences, which leaves padding out."""

    def __init__(self, num_tokens: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(SIZE, 8) if num_tokens is None else nn.Embedding(num_tokens, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, sequence: Tensor, mask: Tensor) -> dict[str, Tensor]:
        tokens_NTD = self.embed(sequence) * mask[..., None]
        return {"logits": self.head(tokens_NTD.sum(1) / mask.sum(1, keepdim=True)), "tokens": tokens_NTD}


def sequences(lengths: tuple[int, ...] = (4, 9, 6), *, tokens: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        mask = torch.arange(length) < torch.randint(1, length + 1, (4, 1), generator=generator)
        sequence = torch.randn(4, length, SIZE, generator=generator)
        if tokens:
            sequence = torch.randint(0, 30, (4, length), generator=generator)
        labels = torch.randint(0, CLASSES, (4,), generator=generator)
        found.append({"sequence": sequence, "mask": mask, "labels": labels})
    return found


def same(found: KDBatch, wanted: KDBatch) -> bool:
    left, right = found.asdict(), wanted.asdict()
    flat = [{**each, **each.pop("teacher", {})} for each in (left, right)]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])


class TestFields:
    def test_of_a_tuple(self) -> None:
        images, labels = torch.rand(3, 3, 8, 8), torch.tensor([2, 0, 1])
        (batch,) = BatchLoader([(images, labels.int())])
        assert batch.images is images
        assert batch.labels is not None and batch.labels.dtype == torch.int64 and batch.labels.tolist() == [2, 0, 1]
        assert batch.index.tolist() == [0, 1, 2] and batch.valid.all()

    def test_of_a_single_tensor(self) -> None:
        vectors = torch.rand(3, SIZE)
        for raw in (vectors, (vectors,), [vectors], {"x": vectors}):
            (batch,) = BatchLoader([raw])
            assert batch.input is vectors and batch.labels is None

    def test_soft_labels(self) -> None:
        loader = BatchLoader([(torch.rand(3, SIZE), torch.rand(3, CLASSES, dtype=torch.float64))])
        assert loader.labels_are_soft and loader.num_classes == CLASSES
        assert next(iter(loader)).labels.dtype == torch.float32

    @pytest.mark.parametrize("labels", ["labels", "label"])
    @pytest.mark.parametrize("images", ["images", "pixel_values", "x"])
    def test_of_a_mapping(self, images: str, labels: str) -> None:
        raw = {images: torch.rand(2, SIZE), labels: [1, 0], "text": ["a", "b"]}
        (batch,) = BatchLoader([raw])
        assert batch.inputs == {images: raw[images]} and batch.labels.tolist() == [1, 0]
        assert batch.extra == {"text": ["a", "b"]} == batch["extra"]

    def test_arrays_become_tensors(self) -> None:
        pixels = np.arange(6, dtype=np.float32).reshape(2, 3)
        pixels.setflags(write=False)
        (batch,) = BatchLoader([(pixels, np.array([1, 0], np.uint8))])
        assert torch.equal(batch.input, torch.tensor([[0.0, 1, 2], [3, 4, 5]])) and batch.labels.tolist() == [1, 0]

    def test_named_tuples_are_mappings(self) -> None:
        Row = namedtuple("Row", ["label", "x"])
        (batch,) = BatchLoader([Row(torch.tensor([1, 2]), torch.rand(2, 4))])
        assert [*batch.inputs] == ["x"] and batch.labels.tolist() == [1, 2]

    def test_names(self) -> None:
        raw = {"a": torch.rand(2, 3), "b": torch.rand(2, 4), "y": torch.tensor([0, 1]), "n": torch.tensor([7, 5])}
        raw["ok"] = torch.tensor([1, 0])
        (batch,) = BatchLoader([raw], inputs={"left": "a"}, labels="y", index="n", valid="ok")
        assert batch.inputs == {"left": raw["a"]} and batch.extra == {"b": raw["b"]}
        assert batch.labels.tolist() == [0, 1] and batch.index.tolist() == [7, 5]
        assert batch.valid.tolist() == [True, False]
        (several,) = BatchLoader([raw], inputs=("a", "b"), labels="y")
        assert several.inputs == {"a": raw["a"], "b": raw["b"]}

    def test_positions(self) -> None:
        raw = (torch.tensor([1, 0]), torch.rand(2, 3), torch.rand(2, 4))
        (batch,) = BatchLoader([raw], inputs=1, labels=0)
        assert batch.input is raw[1] and batch.labels.tolist() == [1, 0] and batch.extra == {"field_2": raw[2]}
        (named,) = BatchLoader([raw[1:] + raw[:1]], inputs=("left", "right"))
        assert named.inputs == {"left": raw[1], "right": raw[2]} and named.labels.tolist() == [1, 0]
        (mapped,) = BatchLoader([raw], inputs={"left": 1, "right": 2}, labels=0)
        assert mapped.inputs == named.inputs

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
    @pytest.mark.parametrize(
        ("names", "options"),
        [
            ((0, 1), {}),
            (("images", "masks"), {}),
            (("pixel_values", "labels"), {}),
            (("x", "mask"), {}),
            (("x", "target"), {"inputs": "x", "masks": "target"}),
        ],
    )
    def test_masks(self, names: tuple[Any, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
        images, masks = torch.rand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5), dtype=dtype)
        raw = (images, masks) if names == (0, 1) else dict(zip(names, (images, masks), strict=True))
        loader = BatchLoader([raw], classes=["sky", "sea"], **options)
        (batch,) = loader
        assert batch.input is images and batch.labels is None and not batch.extra
        assert batch.masks.dtype == torch.int64 and torch.equal(batch.masks, masks.long())
        assert (loader.has_masks, loader.has_labels, loader.num_classes, loader.ignore_index) == (True, False, 2, 255)

    def test_labels_beside_masks(self) -> None:
        raw = {"images": torch.rand(2, 3, 4, 5), "labels": torch.tensor([1, 0]), "masks": torch.zeros(2, 4, 5).long()}
        loader = BatchLoader([raw], ignore_index=-1)
        (batch,) = loader
        assert batch.labels is raw["labels"] and batch.masks is raw["masks"] and loader.ignore_index == -1
        assert loader.has_masks and loader.has_labels
        without = BatchLoader([{name: each for name, each in raw.items() if name != "masks"}])
        assert not without.has_masks and without.fingerprint != loader.fingerprint

    def test_masks_of_tokens_are_no_masks_of_images(self) -> None:
        (raw,) = sequences((4,))
        (batch,) = BatchLoader([raw], inputs=("sequence", "mask"))
        assert batch.masks is None and [*batch.inputs] == ["sequence", "mask"]

    def test_ready_batches_pass_through(self, mlp: nn.Module) -> None:
        ready = KDBatch(x=torch.rand(2, SIZE), index=torch.tensor([4, 2]), valid=torch.tensor([True, False]))
        (batch,) = BatchLoader([ready], mlp)
        assert batch.index is ready.index and torch.equal(batch.teacher["logits"], mlp.eval()(ready.input))

    def test_index_counts_the_samples_of_an_epoch(self, vectors: TensorDataset) -> None:
        loader = BatchLoader(DataLoader(vectors, batch_size=5))
        for _ in range(2):
            assert torch.cat([batch.index for batch in loader]).tolist() == [*range(ROWS)]

    def test_prepare_comes_before_the_teacher(self, vectors: TensorDataset, mlp: nn.Module) -> None:
        loader = BatchLoader(
            DataLoader(vectors, batch_size=5), mlp, prepare=lambda batch: batch.replace(input=batch.input * 2)
        )
        for batch, (raw, _) in zip(loader, DataLoader(vectors, batch_size=5), strict=True):
            assert torch.equal(batch.input, raw * 2)
            assert torch.equal(batch.teacher["logits"], mlp.eval()(raw * 2))

    @pytest.mark.parametrize(
        ("raw", "options", "message"),
        [
            (
                {"images": torch.rand(2, 3, 4, 4), "target": torch.rand(2, 4, 4)},
                {"masks": "target"},
                r"masks \('target'\) of a batch are \[2, 4, 4\] float32, not integers \[N, H, W\]",
            ),
            ((torch.rand(2, 3), torch.rand(2, 3, 4)), {}, "labels=1 if they are labels, or inputs="),
            ((torch.rand(2, 3), torch.tensor([0, 1]), torch.rand(2)), {}, "only the first two have a meaning"),
            ({"a": torch.rand(2, 3), "b": torch.rand(2, 3)}, {}, r"inputs=\('a', 'b'\)"),
            ({"a": torch.rand(2, 3)}, {"inputs": "b"}, "no field 'b'; there are 'a'"),
            ({"pixels": torch.rand(2, 3)}, {"inputs": "pixel"}, "did you mean 'pixels'"),
            ((torch.rand(2, 3), torch.tensor([0, 1])), {"labels": 2}, "no position 2"),
            ((torch.rand(2, 3), torch.rand(2, 3)), {"inputs": (0, 1)}, "name them, as inputs="),
            ({"a": torch.rand(2, 3), "y": ["x", "y"]}, {"labels": "y"}, "not a tensor"),
        ],
    )
    def test_says_what_to_name(self, raw: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises((ConfigError, DataError), match=message):
            next(iter(BatchLoader([raw], **options)))

    def test_rows_agree(self) -> None:
        with pytest.raises(DataError, match=r"input \[3, 2\], labels \[4\]"):
            next(iter(BatchLoader([(torch.rand(3, 2), torch.zeros(4, dtype=torch.long))])))

    def test_lists_are_no_inputs(self) -> None:
        with pytest.raises(DataError, match="with_format"):
            next(iter(BatchLoader([{"x": [[1.0, 2.0]]}], inputs="x")))


class TestLoaders:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (iter([1]), "can be iterated once"),
            ((number for number in range(3)), "can be iterated once"),
            (TensorDataset(torch.rand(3, 2)), "DataLoader"),
            ({"x": torch.rand(2, 2)}, "iterable of batches"),
            (torch.rand(3, 2), "iterable of batches"),
            (3, "iterable of batches"),
        ],
    )
    def test_refuses_what_is_no_loader(self, batches: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            BatchLoader(batches)

    def test_hugging_face(self) -> None:
        datasets = pytest.importorskip("datasets")
        rows = {"pixel_values": [[float(row), 1.0] for row in range(6)], "label": [*range(6)]}
        dataset = datasets.Dataset.from_dict(rows).with_format("torch")
        loader = BatchLoader(DataLoader(dataset, batch_size=4))
        assert torch.cat([batch.labels for batch in loader]).tolist() == [*range(6)]
        assert loader.example()["pixel_values"].tolist() == [[0, 1], [1, 1]]
        with pytest.raises(ConfigError, match="with_format"):
            BatchLoader(dataset)

    def test_a_stream_has_no_length(self) -> None:
        class Stream(IterableDataset[Tensor]):
            def __iter__(self) -> Iterator[Tensor]:
                yield from torch.arange(5.0)[:, None]

        loader = BatchLoader(DataLoader(Stream(), batch_size=2))
        assert [batch.input.flatten().tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
        with pytest.raises(TypeError, match="has no length"):
            len(loader)
        assert loader.epoch == 1

    def test_epochs_are_passed_on(self, vectors: TensorDataset) -> None:
        told = []

        class Sampler(torch.utils.data.SequentialSampler):
            def set_epoch(self, epoch: int) -> None:
                told.append(epoch)

        loader = BatchLoader(DataLoader(vectors, batch_size=8, sampler=Sampler(vectors)))
        loader.peek()
        list(loader)
        list(loader)
        loader.set_epoch(7)
        list(loader)
        assert told == [0, 1, 7] and loader.epoch == 8

    def test_a_loader_that_ends_is_an_error(self) -> None:
        class Once:
            def __init__(self) -> None:
                self.rows = iter([torch.rand(2, 2)])

            def __iter__(self) -> Iterator[Tensor]:
                return self.rows

        loader = BatchLoader(Once())
        assert len([*loader]) == 1
        with pytest.raises(DataError, match="no batch in epoch 2"):
            next(iter(loader))

    def test_facts(self, vectors: TensorDataset) -> None:
        loader = BatchLoader(DataLoader(vectors, batch_size=5), classes=tuple("abcde"), name="words")
        assert (len(loader), loader.batch_size, loader.num_classes, loader.has_labels) == (5, 5, 5, True)
        assert loader.sample_name(3) == "sample 3 of words" and loader.teacher is None
        assert BatchLoader([vectors.tensors]).batch_size == ROWS
        same_kind = BatchLoader(DataLoader(TensorDataset(*(each + 1 for each in vectors.tensors)), batch_size=5))
        assert same_kind.fingerprint == loader.fingerprint
        assert BatchLoader(DataLoader(vectors, batch_size=6)).fingerprint != loader.fingerprint


class TestRandomState:
    @pytest.mark.parametrize("peek", [False, True])
    def test_is_that_of_a_plain_loop(self, vectors: TensorDataset, mlp: nn.Module, peek: bool) -> None:
        def run(loader: Any) -> tuple[list[Tensor], Tensor]:
            rows = []
            for _ in range(2):
                for batch in loader:
                    rows.append(batch.input if isinstance(batch, KDBatch) else batch[0])
                    torch.rand(1)  # as of dropout
            return rows, torch.get_rng_state()

        torch.manual_seed(5)
        wanted, wanted_state = run(DataLoader(vectors, batch_size=5, shuffle=True))
        torch.manual_seed(5)
        loader = BatchLoader(DataLoader(vectors, batch_size=5, shuffle=True), mlp)
        if peek:
            assert loader.teacher is not None and loader.num_classes is None and not loader.labels_are_soft
            loader.peek(), loader.example(), next(iter(loader))
        found, found_state = run(loader)
        assert all(map(torch.equal, found, wanted)) and torch.equal(found_state, wanted_state)


class TestTeacher:
    def test_of_vectors_is_the_module_bit_for_bit(self, vectors: TensorDataset, mlp: nn.Module) -> None:
        with BatchLoader(DataLoader(vectors, batch_size=5), mlp) as loader:
            for batch in loader:
                assert torch.equal(batch.teacher["logits"], mlp.eval()(batch.input))
                assert not batch.teacher["logits"].requires_grad
            teacher = loader.teacher
            assert teacher is not None and teacher.num_calls >= len(loader) and teacher.busy_s > 0
        with pytest.raises(TeacherError, match="closed"):
            teacher(batch.input)

    @pytest.mark.parametrize("tokens", [False, True])
    def test_of_sequences_of_any_length(self, tokens: bool) -> None:
        torch.manual_seed(0)
        module = Mean(30 if tokens else None).eval()
        loader = BatchLoader(sequences(tokens=tokens), module, inputs=("sequence", "mask"))
        lengths = []
        for batch in loader:
            wanted = module(**batch.inputs)
            lengths.append(batch.teacher["tokens"].shape[1])
            assert all(torch.equal(batch.teacher[name], wanted[name]) for name in wanted)
        assert lengths == [4, 9, 6]
        assert loader.teacher is not None and loader.teacher.outputs["tokens"].shape == (None, None, 8)

    def test_an_open_one_stays_open(self, vectors: TensorDataset, mlp: nn.Module) -> None:
        teacher = open_teacher(TeacherSettings(), module=mlp, image_shape=(SIZE,))
        with BatchLoader(DataLoader(vectors, batch_size=5), teacher) as loader:
            list(loader)
        assert teacher(vectors.tensors[0])["logits"].shape == (ROWS, CLASSES)

    def test_the_students_change_leaves_it_alone(self, vectors: TensorDataset, mlp: nn.Module) -> None:
        loader = BatchLoader([vectors.tensors], mlp)
        (first,) = loader
        with torch.no_grad():
            mlp[0].weight.zero_()
        (second,) = loader
        assert torch.equal(first.teacher["logits"], second.teacher["logits"])

    def test_is_opened_once_and_runs_once_for_a_peeked_batch(self, vectors: TensorDataset, mlp: nn.Module) -> None:
        loader = BatchLoader([vectors.tensors], mlp)
        assert loader.teacher is not None
        calls = loader.teacher.num_calls
        loader.peek(), [*loader]
        assert loader.teacher.num_calls == calls

    @pytest.mark.parametrize("teacher", ["resnet18", 3])
    def test_says_what_a_teacher_is(self, teacher: Any) -> None:
        with pytest.raises(ConfigError, match="pass a module"):
            BatchLoader([torch.rand(2, 2)], teacher)


class Stateful:
    """A loader with a position of its own, whose batches depend on how often it was started."""

    def __init__(self) -> None:
        self.start, self.position = 0, 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.start, 6):
            self.position = number + 1
            yield torch.full((2, 3), float(number))
        self.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.position = state["position"]


class Noisy(Dataset[Tensor]):
    """Samples with noise of torch's random state, as of augmentations."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(3)


class TestPosition:
    @pytest.mark.parametrize("ahead", [0, 1, 3])
    @pytest.mark.parametrize("stop", [1, 3, 5])
    def test_resumes_by_the_loaders_own_state(self, ahead: int, stop: int) -> None:
        whole = [*BatchLoader(Stateful(), ahead=ahead)]
        loader = BatchLoader(Stateful(), ahead=ahead)
        for _ in zip(range(stop), loader, strict=False):
            state = loader.state_dict()
        assert state["inner"] == {"position": stop}
        again = BatchLoader(Stateful(), ahead=ahead)
        again.load_state_dict(state)
        rest = [*again]
        assert len(rest) == 6 - stop and all(map(same, rest, whole[stop:]))
        assert again.epoch == 1

    @pytest.mark.parametrize("stop", [1, 3, 5, 7])
    def test_resumes_without_one(self, stop: int, caplog: pytest.LogCaptureFixture) -> None:
        def open_loader() -> BatchLoader:
            return BatchLoader(DataLoader(Noisy(), batch_size=4, shuffle=True))

        torch.manual_seed(3)
        loader, returned, states = open_loader(), [], []
        for _ in range(2):
            for batch in loader:
                torch.rand(2)
                returned.append(batch)
                states.append((loader.state_dict(), torch.get_rng_state()))
        state, rng = states[stop]
        again = open_loader()
        again.load_state_dict(state)
        torch.manual_seed(99)
        torch.set_rng_state(rng)  # as a run does
        rest = []
        while again.epoch < 2:
            for batch in again:
                torch.rand(2)
                rest.append(batch)
        assert len(rest) == len(returned) - stop - 1 and all(map(same, rest, returned[stop + 1 :]))

    def test_says_when_a_resume_may_not_be_exact(self, caplog: pytest.LogCaptureFixture) -> None:
        loader = BatchLoader([torch.rand(2, 2) for _ in range(3)])
        for _ in loader:
            state = loader.state_dict()
            break
        caplog.set_level("INFO", "kd_pipeline")
        again = BatchLoader([torch.rand(2, 2) for _ in range(3)])
        again.load_state_dict(state)
        assert len([*again]) == 2
        assert "the first 1 batches of epoch 1 are read again and dropped" in caplog.text

    def test_refuses_the_position_of_another_loader(self, vectors: TensorDataset) -> None:
        state = BatchLoader(DataLoader(vectors, batch_size=5)).state_dict()
        with pytest.raises(StateError, match="batch_size: 5 → 6"):
            BatchLoader(DataLoader(vectors, batch_size=6)).load_state_dict(state)
        with pytest.raises(StateError, match="no state of a BatchLoader"):
            BatchLoader([]).load_state_dict({})

    def test_a_shorter_loader_cannot_resume(self) -> None:
        class Shrinking:
            def __init__(self, length: int) -> None:
                self.length = length

            def __iter__(self) -> Iterator[Tensor]:
                return iter(torch.rand(self.length, 2, 2))

        loader = BatchLoader(Shrinking(4))
        for _ in zip(range(3), loader, strict=False):
            state = loader.state_dict()
        again = BatchLoader(Shrinking(2))
        again.load_state_dict(state)
        with pytest.raises(StateError, match="the loader gave 2"):
            next(iter(again))

    def test_break_ends_the_epoch_and_a_look_does_not(self) -> None:
        loader = BatchLoader([torch.full((1, 1), float(number)) for number in range(3)])
        assert next(iter(loader)).input.item() == 0
        assert loader.epoch == 0
        for batch in loader:
            assert batch.input.item() == 0
            break
        assert loader.epoch == 1
        assert [batch.input.item() for batch in loader] == [0, 1, 2]

    def test_an_error_of_the_loader_comes_after_its_good_batches(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[Tensor]:
                yield torch.rand(2, 2)
                raise OSError("disk on fire")

        loader = BatchLoader(Broken(), ahead=2)
        found = []
        with pytest.raises(OSError, match="on fire"):
            for batch in loader:
                found.append(batch)
        assert len(found) == 1

    @pytest.mark.parametrize("ahead", [0, 1, 2])
    def test_a_loader_may_fill_one_tensor_again(self, ahead: int) -> None:
        class Reused:
            def __iter__(self) -> Iterator[Tensor]:
                tensor = torch.empty(1, 3)
                for number in range(4):
                    yield tensor.fill_(number)

        found = [batch.input[0, 0].item() for batch in BatchLoader(Reused(), ahead=ahead, device="cpu")]
        assert found == [0, 1, 2, 3]

    def test_a_closed_loader_says_so(self) -> None:
        loader = BatchLoader([torch.rand(2, 2)])
        loader.close()
        loader.close()
        with pytest.raises(StateError, match="closed"):
            next(iter(loader))


def test_global_random_numbers_are_not_drawn_by_opening_a_teacher(mlp: nn.Module) -> None:
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    wanted = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert BatchLoader([torch.rand(4, SIZE, generator=torch.Generator())], mlp).teacher is not None
    assert torch.equal(torch.get_rng_state(), wanted[0]) and random.getstate() == wanted[1]
    assert np.random.get_state()[1].tolist() == wanted[2]


@pytest.mark.parametrize("shuffle", [False, True])
def test_samples_that_a_sampler_repeats_are_not_valid(shuffle: bool) -> None:
    data = TensorDataset(torch.arange(10.0)[:, None])
    valid = []
    for rank in range(4):
        sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=shuffle)
        loader = BatchLoader(DataLoader(data, batch_size=2, sampler=sampler), device="cpu")
        for _ in range(2):
            valid.append([value for batch in loader for value in batch.input[batch.valid, 0].tolist()])
    for epoch in range(2):
        assert sorted(itertools.chain(*valid[epoch::2])) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ahead": -1}, "ahead must be at least 0, got -1"),
        ({"ahead": True}, "ahead must be a whole number, got True"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": "16"}, "batch_size must be a whole number, got '16'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, "num_classes must be a whole number, got 2.0"),
        ({"ignore_index": None}, "ignore_index must be a whole number, got None"),
        ({"num_classes": 3, "classes": ["cat", "dog"]}, "num_classes is 3, and classes has 2 names"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        BatchLoader([torch.rand(2, 2)], **options)
