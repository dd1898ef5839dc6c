"""A saved position is loaded if it fits, and otherwise refused with the reason."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline.data.decode import DecodeChoice
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import StateError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import check_fingerprint
from kd_pipeline.loader.streams import StreamSync
from tests.streams import (
    SIZE,
    conv_teacher,
    state_after,
)

TEACHER = conv_teacher()
TRANSFORM = TrainTransform(size=SIZE)
FULL = {"decode": "full", "reason": "windows crash here", "is_certain": True, "hw_decoder_load": 1}


def open_loader(source, **options: Any) -> KDDataLoader:
    settings = {"transform": TRANSFORM, "teacher": TEACHER, "batch_size": 8, "seed": 5, **options}
    return KDDataLoader(source, settings.pop("transform"), settings.pop("teacher"), **settings)


@pytest.fixture(scope="module")
def source(photo_folder) -> ImageFolder:
    return ImageFolder(photo_folder)


@pytest.fixture(scope="module")
def state(source) -> dict[str, Any]:
    """After two batches of the first epoch."""
    with open_loader(source) as loader:
        return state_after(loader, 2)


@pytest.fixture
def changed_source(photo_folder, tmp_path) -> Callable[[str], ImageFolder]:
    """The photographs, with one change to their content."""

    def make(change: str) -> ImageFolder:
        root = shutil.copytree(photo_folder, tmp_path / "changed")
        path = Path(ImageFolder(root).name(7))
        match change:
            case "one byte":
                content = bytearray(path.read_bytes())
                content[-10] ^= 1
                path.write_bytes(content)
            case "one file less":
                path.unlink()
            case "other class":
                path.rename(root / "sky" / path.name)
        return ImageFolder(root)

    return make


def refusal(source, state, **options: Any) -> str:
    with open_loader(source, **options) as loader, pytest.raises(StateError) as info:
        loader.load_state_dict(state)
    return str(info.value)


def differences(message: str) -> dict[str, str]:
    """The fields in a refusal, with `old → new`."""
    lines = [line.strip() for line in message.splitlines() if " → " in line]
    return dict(line.split(": ", 1) for line in lines)


# Changed streams

CHANGES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"transform": TrainTransform(size=SIZE, flip=0.25)}, {"transform.flip": "0.5 → 0.25"}),
    ({"transform": TrainTransform(size=SIZE, blur=0.1)}, {"transform.blur": "0.0 → 0.1"}),
    ({"transform": TrainTransform(size=SIZE, area=(0.2, 1))}, {"transform.area": "[0.08, 1.0] → [0.2, 1.0]"}),
    ({"transform": TrainTransform(size=48), "teacher": None}, {"transform.size": "32 → 48", "teacher": "None"}),
    ({"transform": EvalTransform(size=SIZE)}, {"transform.preset": "'train' → 'eval'", "transform.flip": "0.5 → None"}),
    ({"teacher": None}, {"teacher": f"{TEACHER.fingerprint!r} → None"}),
    ({"teacher": conv_teacher(1)}, {"teacher": f"{TEACHER.fingerprint!r} → "}),
    (
        {"transform": TrainTransform(size=SIZE, orientation="stored")},
        {"transform.orientation": "None → 'stored'"},
    ),
    ({"seed": 6}, {"seed": "5 → 6"}),
    ({"shuffle": False}, {"shuffle": "True → False"}),
    ({"batch_size": 9}, {"global_batch_size": "8 → 9"}),
    ({"last_batch": "pad"}, {"last_batch": "'keep' → 'pad'"}),
    ({"on_bad_sample": "substitute"}, {"on_bad_sample": "'raise' → 'substitute'"}),
    ({"max_pixels": 10**6}, {"max_pixels": "89478485 → 1000000"}),
    ({"hw_decoder_load": 0.65}, {"hw_decoder_load": "None → 0.65"}),
    ({"seed": 6, "shuffle": False}, {"seed": "5 → 6", "shuffle": "True → False"}),
]


@pytest.mark.parametrize(("options", "wanted"), CHANGES, ids=[" and ".join(wanted) for _, wanted in CHANGES])
def test_changed_field_is_named_with_both_values(source, state, options, wanted):
    found = differences(refusal(source, state, **options))
    for field, values in wanted.items():
        assert values in found[field]
    if "transform.preset" not in wanted:  # the presets have many different fields
        assert found.keys() == wanted.keys()


@pytest.mark.parametrize(("options", "wanted"), CHANGES, ids=[" and ".join(wanted) for _, wanted in CHANGES])
def test_allowed_change_is_accepted(source, state, options, wanted):
    with open_loader(source, **options) as loader:
        loader.load_state_dict(state, allow=[field.split(".")[0] for field in wanted])
        assert (loader.epoch, loader.state_dict()["batch"]) == (0, 2)
        next(iter(loader))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("one byte", {"source"}),
        ("one file less", {"source", "num_samples"}),
        ("other class", {"source"}),
    ],
)
def test_changed_data_is_named(source, changed_source, state, change, wanted):
    other = changed_source(change)
    found = differences(refusal(other, state))
    assert found.keys() == wanted
    assert found["source"] == f"{source.fingerprint!r} → {other.fingerprint!r}"
    with open_loader(other) as loader:
        loader.load_state_dict(state, allow=wanted)


def test_moved_data_is_the_same(changed_source, state):
    with open_loader(changed_source("nothing")) as loader:
        loader.load_state_dict(state)


def test_larger_batch_is_named_before_position(source):
    with open_loader(source, batch_size=4) as loader:
        state = state_after(loader, 9)
    assert differences(refusal(source, state)) == {"global_batch_size": "4 → 8"}


def test_position_after_epoch_end_is_refused(source):
    with open_loader(source, batch_size=4) as loader:
        state = state_after(loader, 9)
    with open_loader(source) as loader, pytest.raises(StateError, match="batch is 9, the largest possible is 5"):
        loader.load_state_dict(state, allow=["global_batch_size"])


def test_fewer_samples_are_named_before_bad_samples(changed_source, source, state):
    found = differences(refusal(changed_source("one file less"), {**state, "bad_samples": [36]}))
    assert found.keys() == {"source", "num_samples"}


@pytest.mark.parametrize("name", ["device", "dali"])
def test_other_device_or_dali_is_named(source, state, name):
    older = copy.deepcopy(state)
    older["fingerprint"][name] = "another"
    current = state["fingerprint"][name]
    assert differences(refusal(source, older)) == {name: f"'another' → {current!r}"}


@pytest.mark.parametrize(
    "options",
    [{"num_threads": 3}, {"prefetch": 5}, {"ahead": 4}, {"max_bad_fraction": 0.5}, {"decode": "full"}],
    ids=str,
)
def test_settings_outside_the_stream_may_differ(source, state, options):
    with open_loader(source, **options) as loader:
        loader.load_state_dict(state)


@pytest.fixture
def on_a_gpu(monkeypatch) -> None:
    """Loaders have a fake GPU: they can be opened but not run."""
    monkeypatch.setattr("kd_pipeline.loader.batch_stream.resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr("kd_pipeline.loader.batch_stream.open_stream_sync", lambda device, ahead: StreamSync())
    monkeypatch.setattr("kd_pipeline.data.decode.choose_decode", lambda *_: DecodeChoice(**FULL))


def test_decode_mode_belongs_to_stream_on_gpu(source, on_a_gpu):
    with open_loader(source, teacher=None, decode="window") as loader:
        assert loader.decode == "window"
        state = loader.state_dict()
    with open_loader(source, teacher=None) as loader, pytest.raises(StateError) as info:
        assert loader.decode == "full"
        loader.load_state_dict(state)
    assert differences(str(info.value)) == {"decode": "'window' → 'full'", "hw_decoder_load": "None → 1.0"}


def test_decode_mode_is_ignored_for_pixels(on_a_gpu):
    images = Arrays(np.zeros((9, 40, 40, 3), dtype=np.uint8))
    with open_loader(images, teacher=None, decode="window") as loader:
        state = loader.state_dict()
    with open_loader(images, teacher=None) as loader:
        loader.load_state_dict(state)


def test_allowing_one_field_allows_no_other(source, state):
    with open_loader(source, seed=6, shuffle=False) as loader:
        with pytest.raises(StateError) as info:
            loader.load_state_dict(state, allow=["seed"])
        assert differences(str(info.value)) == {"shuffle": "True → False"}


def test_refusal_says_how_to_accept(source, state):
    assert "load_state_dict(state, allow=['seed', 'shuffle'])" in refusal(source, state, seed=6, shuffle=False)


# Damaged states

NO_STATES = [None, [], 5, "state", {}, {"version": 2}, {"epoch": 0}]


@pytest.mark.parametrize("found", NO_STATES, ids=repr)
def test_wrong_object_is_refused(source, found):
    assert "no loader state of version 1" in refusal(source, found)


@pytest.mark.parametrize("version", [None, 0, 2, -1, "1", [1], 10**30])
def test_other_version_is_refused(source, state, version):
    assert f"version 1, found {version!r}" in refusal(source, {**state, "version": version})


@pytest.mark.parametrize("key", ["version", "epoch", "batch", "bad_samples", "fingerprint"])
def test_missing_key_is_named(source, state, key):
    message = refusal(source, {name: value for name, value in state.items() if name != key})
    assert key in message and "pass what state_dict() gave" in message


WRONG: dict[str, list[Any]] = {
    "epoch": [-1, None, 1.0, True, "1", [], {}, torch.tensor(1), 2**64, 10**30],
    "batch": [-1, 6, None, 1.0, True, "1", [], {}, torch.tensor(1), 2**64],
    "bad_samples": [[-1], [37], [1.0], [True], ["1"], [None], [0, 10**30], None, 5, "12"],
    "fingerprint": [None, 5, "abc", [], ["seed"]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=repr
)
def test_damaged_value_is_named(source, state, key, value):
    assert key in refusal(source, {**state, key: value})


def test_all_samples_unreadable_is_refused(source, state):
    assert "bad_samples" in refusal(source, {**state, "bad_samples": list(range(37))})


@pytest.mark.parametrize("field", ["source", "seed", "transform", "teacher"])
def test_missing_fingerprint_field_is_named(source, state, field):
    damaged = copy.deepcopy(state)
    del damaged["fingerprint"][field]
    assert field in refusal(source, damaged)


# The fingerprint


def test_tuples_equal_lists_in_fingerprint():
    check_fingerprint({"mean": [0.5, 0.5], "more": {"a": [1]}}, {"mean": (0.5, 0.5), "more": {"a": (1,)}})


def test_nested_fields_have_dotted_names():
    old, new = {"crop": {"area": 1, "ratio": 2}}, {"crop": {"area": 1, "ratio": 3}}
    with pytest.raises(StateError, match=r"crop\.ratio: 2 → 3"):
        check_fingerprint(old, new)
    check_fingerprint(old, new, allow=["crop.ratio"])
    check_fingerprint(old, new, allow=["crop"])
    with pytest.raises(StateError):
        check_fingerprint(old, new, allow=["crop.area"])


def test_field_of_one_side_is_a_difference():
    with pytest.raises(StateError, match="new: None → 1"):
        check_fingerprint({}, {"new": 1})
    with pytest.raises(StateError, match="gone: 1 → None"):
        check_fingerprint({"gone": 1}, {})
