"""Every hostile file ends in one message: no traceback, no wait, no signal, no memory, and none of its code runs."""

import json
from collections.abc import Mapping

import pytest

from kd_pipeline._core.child_process import run_child

pytestmark = pytest.mark.slow

KINDS = (
    *("weights", "safetensors", "checkpoint", "checkpoint of a run"),
    *("npy", "npz", "mask.png", "mask.npy", "classes.json", "classes.txt", "list.csv", "list.jsonl"),
    *("index", "image folder", "class folders with 250 digits", "CIFAR", "CIFAR archive"),
    *("tar", "label in a tar", "names in a tar", "index of a shard"),
    *("config", "model.json", "weights of a run", "history", "evidence", "metrics.csv", "result.json", "run.lock"),
    *("manifest of a recording", "stream of a recording", "part of a recording", "logits.classes of a recording"),
    *("features.scale of a recording", "top logits of a recording", "recording"),
    *("onnx", "onnx in OpenVINO", "external weights", "engine", "manifest of an engine", "parity images"),
    *("predict", "eval", "train", "build-engine"),
)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, str | None]]:
    """What is wrong with how opening a file ended, by kind and name; None for a good end."""
    child = run_child("tests.hostile.worker:run_cases", str(tmp_path_factory.mktemp("hostile")), timeout_s=600)
    assert not child.failure, f"{child.failure}: {child.log[-2000:]}"
    found: dict[str, dict[str, str | None]] = {}
    for line in child.lines:
        name, problem, _ = json.loads(line)
        kind, _, rest = name.partition(": ")
        found.setdefault(kind, {})[rest] = problem
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_file_ends_in_one_message(ends: Mapping[str, Mapping[str, str | None]], kind: str) -> None:
    problems = [f"{name}: {problem}" for name, problem in ends[kind].items() if problem is not None]
    assert not problems, f"{len(problems)} of {len(ends[kind])}\n" + "\n".join(problems)


def test_every_kind_was_opened(ends: Mapping[str, Mapping[str, str | None]]) -> None:
    assert set(ends) == set(KINDS)
    assert sum(map(len, ends.values())) > 350
