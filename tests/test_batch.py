"""A batch as a mapping, as a tensor-like thing that moves, and in the hands of other libraries."""

import copy
import pickle
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from kd_pipeline.batch import KDBatch

ROWS = 3


def make(**changes) -> KDBatch:
    fields = {
        "images": torch.arange(ROWS * 12.0).reshape(ROWS, 3, 2, 2),
        "labels": torch.tensor([2, 0, 1]),
        "index": torch.tensor([5, 6, 7]),
        "valid": torch.tensor([True, True, False]),
        "teacher": {"logits": torch.ones(ROWS, 4)},
    }
    return KDBatch(**{**fields, **changes})


def same(first: KDBatch, second: KDBatch) -> bool:
    ours, theirs = _pytree.tree_flatten(first.asdict()), _pytree.tree_flatten(second.asdict())
    return ours[1] == theirs[1] and all(map(torch.equal, ours[0], theirs[0]))


def test_is_a_mapping_of_its_fields():
    batch = make()
    assert isinstance(batch, Mapping)
    assert [*batch] == [*batch.keys()] == ["images", "labels", "index", "valid", "teacher"]
    assert batch["images"] is batch.images is batch.inputs["images"] and batch["teacher"]["logits"].shape == (ROWS, 4)
    assert dict(batch) == batch.asdict() == dict(batch.items()) and {**batch} == batch.asdict()
    assert len(batch.keys()) == len(batch.values()) == len(batch.items()) == 5
    assert batch.get("labels") is batch.labels and batch.get("masks", 1) == 1


def test_length_is_the_number_of_rows():
    assert len(make()) == ROWS


def test_what_is_not_there_is_no_key():
    batch = make(labels=None, teacher={})
    assert "labels" not in batch and "teacher" not in batch and "extra" not in batch and "images" in batch
    assert [*batch] == ["images", "index", "valid"]
    with pytest.raises(KeyError, match="a batch has no 'labels'; it has images, index, valid"):
        batch["labels"]


def test_fields_of_extra_are_not_those_of_the_batch():
    batch = make(extra={"text": ["a", "b", "c"]})
    assert batch["extra"]["text"] is batch.extra["text"] and batch.extra["text"] == ["a", "b", "c"]
    assert "text" not in batch and "text" not in [*batch] and batch.get("text") is None
    with pytest.raises(KeyError, match=re.escape("a batch has no 'text'; that is batch.extra['text']; it has images")):
        batch["text"]


@pytest.mark.parametrize("changes", [{}, {"labels": None, "teacher": {}}, {"extra": {"text": ["a", "b", "c"]}}])
def test_membership_and_iteration_agree(changes):
    batch = make(**changes)
    names = ["images", "labels", "index", "valid", "teacher", "extra", "text", "logits"]
    assert {name for name in names if name in batch} == {*batch} == {*dict(batch)}
    for name in batch:
        assert batch[name] is not None


def test_made_again_from_its_own_mapping():
    batch = make(extra={"name": "x"})
    again = type(batch)({name: value for name, value in batch.items()})
    assert again.inputs == batch.inputs and again.teacher == batch.teacher and again.extra == batch.extra
    assert same(KDBatch(make()), make()) and same(KDBatch(**make()), make())


def test_views_and_masks_are_fields_and_no_inputs():
    batch = make(views={"local": torch.zeros(ROWS, 2, 3, 1, 1)}, masks=torch.zeros(ROWS, 2, 2, dtype=torch.int64))
    assert batch.input is batch.images and batch["views"]["local"] is batch.views["local"]
    assert [*batch] == ["images", "labels", "index", "valid", "masks", "views", "teacher"]
    assert same(pickle.loads(pickle.dumps(batch)), batch) and same(batch.replace(), batch)
    assert batch.to("meta").views["local"].device == batch.to("meta").masks.device == torch.device("meta")
    assert batch.replace(masks=None).masks is None and "masks" not in make() and make().views == {}


@pytest.mark.parametrize("missing", ["index", "valid", "images"])
def test_needs_index_valid_and_an_input(missing):
    fields = make().asdict()
    del fields[missing]
    with pytest.raises(TypeError, match="needs index, valid and at least one input"):
        KDBatch(fields)


def test_several_inputs_are_given_by_name():
    batch = make(audio=torch.zeros(ROWS, 8))
    assert batch.input is batch.inputs and [*batch.inputs] == ["images", "audio"]
    assert make().input is not None and make().input.shape == (ROWS, 3, 2, 2)
    without = KDBatch(audio=torch.zeros(ROWS, 8), index=batch.index, valid=batch.valid)
    with pytest.raises(AttributeError, match=r"no images, but audio: take batch.inputs, or batch\['audio'\]"):
        _ = without.images


def test_to_moves_every_tensor():
    batch = make(extra={"weights": torch.ones(ROWS), "name": "x"})
    assert batch.to("cpu") is batch
    moved = batch.to("meta", non_blocking=True)
    tensors = [leaf for leaf in _pytree.tree_leaves(moved.asdict()) if isinstance(leaf, Tensor)]
    assert len(tensors) == 6 and {tensor.device.type for tensor in tensors} == {"meta"} and moved.extra["name"] == "x"


def test_to_moves_a_batch_that_is_partly_there():
    batch = make(images=torch.zeros(ROWS, 3, 2, 2, device="meta"))
    assert batch.to("meta").index.device.type == "meta"
    assert make(index=torch.zeros(ROWS, device="meta")).to("meta").images.device.type == "meta"


def test_clone_shares_no_memory():
    batch = make(extra={"word": torch.ones(ROWS), "text": "as it is"})
    own = batch.clone()
    addresses = [
        {each.data_ptr() for each in _pytree.tree_leaves(found.asdict()) if isinstance(each, Tensor)}
        for found in (batch, own)
    ]
    assert addresses[0].isdisjoint(addresses[1]) and own.extra["text"] == "as it is"
    assert same(batch.replace(extra={}), own.replace(extra={}))


def test_replace_keeps_the_rest():
    batch = make()
    changed = batch.replace(images=batch.images + 1, teacher={})
    assert changed.labels is batch.labels and changed.teacher == {} and (changed.images == batch.images + 1).all()
    assert batch.replace(labels=None).labels is None and batch.teacher


def test_repr_is_short_and_without_pixels():
    assert repr(make()) == (
        "KDBatch(images=[3, 3, 2, 2] float32, labels=[3] int64, index=[3] int64, valid=[3] bool, "
        "teacher={logits: [3, 4] float32})"
    )


def test_cannot_be_changed():
    batch = make()
    for name in ("labels", "images", "other"):
        with pytest.raises(AttributeError, match=rf"not changed in place; .* batch\.replace\({name}=\.\.\.\)"):
            setattr(batch, name, None)
        with pytest.raises(AttributeError, match="keeps its fields"):
            delattr(batch, name)
    with pytest.raises(TypeError):
        batch["labels"] = None


def test_hash_and_equality_are_those_of_the_object():
    batch = make()
    assert batch == batch and batch != make() and len({batch, make()}) == 2


@pytest.mark.parametrize("copied", [lambda batch: pickle.loads(pickle.dumps(batch)), copy.deepcopy, copy.copy])
def test_copies_are_equal(copied):
    batch = make(extra={"weights": torch.ones(ROWS)})
    again = copied(batch)
    assert again is not batch and same(again, batch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_take_a_batch(backend):
    def loss(batch: KDBatch) -> Tensor:
        logits = batch["images"].flatten(1) @ torch.ones(12, 4)
        return (logits - batch.teacher["logits"]).square().mean(1)[batch.valid].sum() + len(batch)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=False)
    assert torch.equal(compiled(make()), loss(make()))
    torch._dynamo.reset()


def test_is_one_leaf_of_a_tree():
    batch = make()
    assert _pytree.tree_leaves([batch]) == [batch]


def test_lightning_and_accelerate_move_it():
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    from accelerate.utils import find_batch_size, send_to_device
    from lightning.fabric.utilities import move_data_to_device

    batch = make()
    for moved in (move_data_to_device(batch, torch.device("meta")), send_to_device(batch, "meta", non_blocking=True)):
        assert type(moved) is KDBatch and moved.images.device.type == moved.teacher["logits"].device.type == "meta"
    assert find_batch_size(batch) == ROWS


def with_views(**changes) -> KDBatch:
    views = {
        "large": torch.arange(ROWS * 27.0).reshape(ROWS, 3, 3, 3),
        "local": torch.arange(ROWS * 24.0).reshape(ROWS, 2, 3, 2, 2),
        "other": torch.ones(ROWS, 4, 3, 2, 2),
    }
    return make(views=views, **changes)


def test_a_view_becomes_the_images():
    batch = with_views()
    found = batch.of_view("large")
    assert found.images is batch.views["large"] is batch.view("large") and found.labels is batch.labels
    assert torch.equal(found.teacher["logits"], batch.teacher["logits"]) and len(found) == ROWS
    assert batch.of_view("images") is batch and batch.view("images") is batch.images


def test_copies_become_rows():
    masks = torch.arange(ROWS * 4).reshape(ROWS, 2, 2)
    batch = with_views(masks=masks, teacher={"logits": torch.arange(ROWS * 4.0).reshape(ROWS, 4)})
    found = batch.of_view("local")
    assert found.images.data_ptr() == batch.views["local"].data_ptr() and found.images.shape == (2 * ROWS, 3, 2, 2)
    for row in range(2 * ROWS):
        sample, copy = divmod(row, 2)
        assert torch.equal(found.images[row], batch.views["local"][sample, copy])
        for ours, theirs in zip(
            (found.labels, found.index, found.valid, found.masks, found.teacher["logits"]),
            (batch.labels, batch.index, batch.valid, batch.masks, batch.teacher["logits"]),
            strict=True,
        ):
            assert torch.equal(ours[row], theirs[sample])
    assert len(found) == 2 * ROWS and not found.views
    assert with_views(labels=None).of_view("local").labels is None


def test_outputs_of_the_copies_are_those_of_the_rows():
    own, other = torch.arange(ROWS * 8.0).reshape(ROWS, 2, 4), torch.ones(ROWS, 4, 5)
    teacher = {"logits": torch.ones(ROWS, 4), "crops": own, "others": other}
    batch = with_views(teacher=teacher, teacher_views={"crops": "local", "others": "other"})
    rows = batch.of_view("local").teacher
    assert torch.equal(rows["crops"], own.flatten(0, 1)) and rows["crops"].data_ptr() == own.data_ptr()
    assert torch.equal(rows["logits"], torch.ones(2 * ROWS, 4)) and "others" not in rows
    assert [*batch.of_view("images").teacher] == ["logits"] and [*batch.teacher] == ["logits", "crops", "others"]


def test_unknown_view_is_no_view():
    with pytest.raises(KeyError, match="the batch has no view 'lokal'; it has images, large, local, other"):
        with_views().of_view("lokal")


def test_views_of_outputs_stay_with_the_batch():
    batch = with_views(teacher_views={"logits": "large"})
    for found in (batch.clone(), batch.replace(labels=None), pickle.loads(pickle.dumps(batch)), batch.to("meta")):
        assert found.teacher_views == {"logits": "large"}
