"""Hostile weights and checkpoints of runs."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.workflows.resume import SavedRun
from tests.hostile.cases import DEEP, HUGE, Case, Code, Kind, write_torch_archive
from tests.hostile.prepare import BOMB


def saved(value: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def claim(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    """The header of a safetensors file with one tensor."""
    return json.dumps({"fc.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def nested_pickle() -> bytes:
    """A pickle of a list in a list, and so on."""
    return b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."


def shared_pickle() -> bytes:
    """A dict with the same dict in it twice, and so on: 50 objects, and 2**50 ways through them."""
    value: dict[str, Any] = {"fc.weight": 1}
    for _ in range(50):
        value = {"a": value, "b": value}
    return pickle.dumps(value, protocol=2)


def replace_member(content: bytes, ending: str, member: bytes) -> bytes:
    """The archive with another content of one member."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            target.writestr(name, member if name.endswith(ending) else source.read(name))
    return stream.getvalue()


def write_code(path: Path, *, legacy: bool = False) -> None:
    """A file of `torch.save` whose pickle calls a function."""
    path.write_bytes(saved({"state_dict": {"w": Code(path.parent)}}, _use_new_zipfile_serialization=not legacy))


def write_safetensors_beyond_memory(path: Path) -> None:
    """A sparse file whose tensor is larger than memory."""
    header = claim([HUGE // 4], [0, HUGE])
    path.write_bytes(safetensors(header))
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + HUGE)


def open_weights(path: Path) -> object:
    return open_model(ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4}, checkpoint=path))


def add_archives(kind: Kind, made: Path) -> None:
    """What is wrong with an archive of `torch.save`, for whichever reader."""
    good = saved({"state_dict": {"fc.weight": torch.zeros(3, 64)}})
    kind.add("runs code", write_code)
    kind.add("runs code, before archives", lambda path: write_code(path, legacy=True))
    kind.add("plain pickle", lambda path: path.write_bytes(pickle.dumps(Code(path.parent), protocol=2)))
    kind.add_bytes("empty", b"")
    kind.add_bytes("cut off", good[: len(good) // 2])
    kind.add_bytes("without its end", good[:-30])
    kind.add_bytes("nested", replace_member(good, "data.pkl", nested_pickle()))
    kind.add_bytes("shared", replace_member(good, "data.pkl", shared_pickle()))
    kind.add_bytes("text of 2**60 bytes", replace_member(good, "data.pkl", b"\x80\x04\x8d" + bytes(7) + b"\x10."))
    kind.add_bytes("memo of 2**31", replace_member(good, "data.pkl", b"\x80\x02]r\xff\xff\xff\x7f."))
    kind.add_bytes("number of 5000 digits", replace_member(good, "data.pkl", b"\x80\x02I" + b"9" * 5000 + b"\n."))
    kind.add("tensor beyond its numbers", lambda path: write_torch_archive(path, 1, [bytes(4)], size=(2**40,)))
    kind.add("more numbers than there are", lambda path: write_torch_archive(path, 2**40, [bytes(4)], size=(4,)))
    kind.add("negative stride", lambda path: write_torch_archive(path, 4, [bytes(16)], size=(2, 2), stride=(-1, -9)))
    kind.add("negative offset", lambda path: write_torch_archive(path, 4, [bytes(16)], offset=-(2**40)))
    kind.add("bomb of weights", lambda path: os.link(made / f"{BOMB}.pt", path))
    kind.add("bomb of pickles", lambda path: os.link(made / f"{BOMB}.pickles.pt", path))


def cases(made: Path) -> list[Case]:
    weights = Kind("weights", open_weights, ConfigError, file="weights.pt")
    add_archives(weights, made)
    weights.add_special()
    weights.add("TorchScript", lambda path: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path)))
    weights.add_bytes("pickle nested", nested_pickle())
    weights.add_bytes("pickle shared", shared_pickle())
    weights.add_bytes("pickle with a text of 2**60 bytes", b"\x80\x04\x8d" + bytes(7) + b"\x10.")

    safe = Kind("safetensors", open_weights, ConfigError, file="model.safetensors")
    safe.add_bytes("header of 2**63 bytes", safetensors(b"{}", length=2**63))
    safe.add_bytes("header beyond the file", safetensors(b"{}", length=99_999_999))
    safe.add_bytes("nested", safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP))
    safe.add_bytes("beyond the file", safetensors(claim([3], [0, 12])))
    safe.add_bytes("offsets in reverse", safetensors(claim([3], [12, 0]), bytes(12)))
    safe.add_bytes("negative offset", safetensors(claim([3], [-12, 0]), bytes(12)))
    safe.add_bytes("size that overflows", safetensors(claim([2**33, 2**33], [0, 12]), bytes(12)))
    safe.add_bytes("unknown dtype", safetensors(claim([3], [0, 12], "load"), bytes(12)))
    safe.add("tensor larger than memory", write_safetensors_beyond_memory)
    safe.add_special()

    checkpoint = Kind("checkpoint", load_checkpoint, StateError, file="last.ckpt")
    add_archives(checkpoint, made)
    checkpoint.add_special()
    checkpoint.add_bytes("no dict", saved([1, 2]))

    run = Kind("checkpoint of a run", SavedRun.load, StateError, file="last.ckpt")
    good: dict[str, Any] = {
        "state_dict": {},
        "run": {"config": {}},
        "global_step": 4,
        "callbacks": {},
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 1, "processed": 1}}}},
    }
    for key in ("run", "callbacks", "loops", "global_step"):
        run.add_bytes(f"number as {key}" if key != "global_step" else "text as step", saved({**good, key: _odd(key)}))
        run.add_bytes(f"without {key}", saved({name: value for name, value in good.items() if name != key}))
    epochs = {"fit_loop": {"epoch_progress": {"current": {"ready": [], "processed": "x"}}}}
    run.add_bytes("text as epochs", saved({**good, "loops": epochs}))
    return [*weights.cases, *safe.cases, *checkpoint.cases, *run.cases]


def _odd(key: str) -> Any:
    return "many" if key == "global_step" else 3
