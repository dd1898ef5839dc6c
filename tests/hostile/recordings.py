"""Hostile recordings."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kd_pipeline.errors import KDPipelineError, TeacherError
from kd_pipeline.teachers.recorded.recording import Recording
from tests import recordings
from tests.hostile.cases import Case, Kind, edit_json
from tests.hostile.prepare import INT8_RECORDING, NUM_PHOTOS, PHOTOS, RECORDING, TOP_RECORDING

DIGITS = "9" * 5000


def replay(path: Path) -> object:
    """Open a recording, and replay its first epoch."""
    recording = Recording(path)
    position = np.arange(NUM_PHOTOS)
    samples = recording.samples(0, position)
    outputs = recording.replay(0, position, samples)
    assert all(bool(output.isfinite().all()) for output in outputs.values())
    return {name: output.shape for name, output in outputs.items()}


def replay_cut_off(path: Path) -> object:
    """Replay a recording whose files are cut off once they are open."""
    recording = Recording(path)
    position = np.arange(NUM_PHOTOS)
    samples = recording.samples(0, position)
    for part in path.glob("*/*.bin"):
        os.truncate(part, 0)
    return recording.replay(0, position, samples)


def cases(good: Path) -> list[Case]:
    def kind(name: str, source: str, file: str, open: Callable[[Path], object] = replay) -> Kind:
        def around(folder: Path) -> None:
            shutil.copytree(good / source, folder / "recording")

        return Kind(name, open, KDPipelineError, file=f"recording/{file}", around=around, target="recording")

    manifest = kind("manifest of a recording", RECORDING, "manifest.json", Recording)
    manifest.add_special()
    manifest.add_nested_json("stream", "teacher")
    manifest.add_bytes("not UTF-8", b'{"\xff": 1}')
    manifest.add_bytes("number of 5000 digits", f'{{"num_rows": {DIGITS}}}'.encode())

    def change(to: Kind, source: str, name: str, **values: Any) -> None:
        def edit(content: dict[str, Any]) -> None:
            for key, value in values.items():
                first, _, second = key.partition("__")
                if second:
                    content[first][second] = value
                else:
                    content[first] = value

        def write(path: Path) -> None:
            shutil.copy(good / source / "manifest.json", path)
            edit_json(path, edit)

        to.add(name, write)

    claims: dict[str, dict[str, Any]] = {
        "no size of logits": _outputs(logits=[]),
        "negative size": _outputs(logits=[-3]),
        "size that overflows": _outputs(features=[2**40, 2**40]),
        "size beyond 64 bits": _outputs(logits=[10**30]),
        "no classes": _outputs(logits=[0]),
        "no outputs": {"outputs": {}},
        "output that was not recorded": _outputs(pooled=[3]),
        "list as an output": {"outputs": {"logits": [3]}},
        "path as output": _outputs(**{"logits": [3], "../../etc/passwd": [0]}),
        "long name of an output": _outputs(**{"logits": [3], "x" * 5000: [3]}),
        "2**62 rows": {"num_rows": 2**62},
        "10**30 rows": {"num_rows": 10**30},
        "epochs": {"epochs": 2},
        "2**62 rows of a part": {"part_rows": 2**62},
        "parts of one of 2**39 rows": {"num_rows": 2**39, "part_rows": 1},
        "many dimensions": _outputs(logits=[3], a=[1] * 200),
        "text as rows": {"num_rows": "many"},
        "unknown dtype": _outputs("object", logits=[3]),
        "int8 logits": _outputs("int8", logits=[3]),
    }
    prefixes: dict[str, Any] = {
        "negative prefix": -1,
        "prefix of all tokens": 64,
        "prefix beyond 64 bits": 10**30,
        "text as prefix": "one",
        "fraction as prefix": 0.5,
    }
    for name, prefix in prefixes.items():
        claims[name] = {"outputs": {"features": {"shape": [64, 32], "num_prefix_tokens": prefix}}}
    for name, grid in {"no grid": [], "negative grid": [-1, 4], "text as grid": "student"}.items():
        claims[name] = {"outputs": {"features": {"shape": [32, 8, 8], "teacher_grid": grid}}}
    for name, values in claims.items():
        change(manifest, RECORDING, name, **values)
        manifest.cases[-1] = _with(manifest.cases[-1], replay)

    stream = kind("stream of a recording", RECORDING, "manifest.json")
    for name, values in {
        "empty": {"stream": {}},
        "without its transform": {"stream": {"transform": None}},
        "unknown dtype": {"stream__dtype": "nope"},
        "function as dtype": {"stream__dtype": "load"},
        "text as seed": {"stream__seed": "x"},
        "text as batch size": {"stream__global_batch_size": "many"},
        "nested transform": {"stream__transform": [[[[]]]]},
        "large shuffle": {"stream__shuffle": "x" * 10**6},
    }.items():
        change(stream, RECORDING, name, **values)

    def start(path: Path) -> object:
        with recordings.replaying(good / PHOTOS, path) as loader:
            return len(next(iter(loader)))

    stream.cases = [_with(case, start) for case in stream.cases]

    part = _first_part(good / RECORDING)
    parts = kind("part of a recording", RECORDING, part)
    parts.add_special()
    parts.add_bytes("cut off", bytes(8))
    parts.add_bytes("zeros", bytes((good / RECORDING / part).stat().st_size))
    parts.add("cut off while open", lambda path: shutil.copy(good / RECORDING / part, path), open=replay_cut_off)

    columns = []
    for source, column, values in (
        (TOP_RECORDING, "logits.classes", {"too large": 30_000, "negative": -1}),
        (INT8_RECORDING, "features.scale", {"NaN": np.nan, "infinite": np.inf, "negative": -1.0, "too large": 3e38}),
    ):
        columns.append(kind(f"{column} of a recording", source, _first_part(good / source)))
        for name, value in values.items():

            def write(path: Path, source: str = source, column: str = column, value: float = value) -> None:
                recording = path.parents[1]
                shutil.copy(good / source / path.relative_to(recording), path)
                recordings.set_column(recording, column, np.full_like(recordings.column(recording, column), value))

            columns[-1].add(name, write)
    change_top = kind("top logits of a recording", TOP_RECORDING, "manifest.json")
    for name, top_k in {"more than there are": 10, "2**62": 2**62, "negative": -1}.items():
        change(change_top, TOP_RECORDING, name, outputs={"logits": {"shape": [3], "top_k": top_k}})

    whole = Kind("recording", Recording, TeacherError, file="recording")
    whole.add_special("folder", "link to itself", "larger than memory")
    return [
        *manifest.cases,
        *stream.cases,
        *parts.cases,
        *(case for each in columns for case in each.cases),
        *change_top.cases,
        *whole.cases,
    ]


def _outputs(dtype: str = "float32", **shapes: list[int]) -> dict[str, Any]:
    return {"outputs": {name: {"shape": shape, "dtype": dtype} for name, shape in shapes.items()}}


def _first_part(recording: Path) -> str:
    return str(recordings.part_of(recording).relative_to(recording))


def _with(case: Case, open: Callable[[Path], object]) -> Case:
    return Case(case.name, case.build, open, case.error, case.names)
