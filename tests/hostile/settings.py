"""Hostile configs, and hostile files in the folder of a run."""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kd_pipeline.config.config import load_config
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.training.evidence import read_evidence
from kd_pipeline.training.metrics_csv import MetricsFile
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.run_lock import lock_folder
from kd_pipeline.workflows.exported import open_model_file
from kd_pipeline.workflows.results import read_evaluations
from tests.hostile.cases import DEEP, Case, Code, Kind, edit_json
from tests.hostile.prepare import RUN
from tests.hostile.weights import saved

DIGITS = "9" * 5000
EVIDENCE = (
    '{"kind": "batch", "epoch": 0, "batch": 0, "step": 1, "samples": [0], "order": "00000000", "labels": null, '
    '"pixels": {}, "teacher": {}, "terms": {"loss": "0x1.8p+1"}}\n'
)


def config_cases() -> list[Case]:
    kind = Kind("config", load_config, ConfigError, file="config.yaml")
    kind.add_special()
    kind.add_bytes("nested lists", b"seed: " + b"[" * DEEP)
    kind.add_bytes("nested mappings", b"a: {" * DEEP)
    kind.add_bytes("nested by spaces", b"\n".join(b" " * level + b"a:" for level in range(1000)))
    aliases = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [*%c, *%c]\n" % (code + 1, code + 1, code, code) for code in range(97, 121)
    )
    kind.add_bytes("aliases of aliases", aliases)
    kind.add_bytes("alias of itself", b"a: &a [*a]\n")
    kind.add_bytes("merges", b"a: &a {x: 1}\nb: {<<: *a}\n")
    kind.add_bytes("runs code", b"seed: !!python/object/apply:os.mkdir [MARKER]\n")
    kind.add_bytes("runs code by name", b"seed: !!python/name:os.system\n")
    kind.add_bytes("too large", b"# \n" * 2**19)
    kind.add_bytes("number of 5000 digits", f"seed: {DIGITS}\n".encode())
    kind.add_bytes("number in base 60", b"seed: " + b"1:" * 4000 + b"1\n")
    kind.add_bytes("exponent of 5000 digits", f"seed: 1.0e{DIGITS}\n".encode())
    kind.add_bytes("not UTF-8", b"seed: \xff\n")
    kind.add_bytes("zeros", bytes(1000))
    kind.add_bytes("two documents", b"seed: 1\n---\nseed: 2\n")
    kind.add_bytes("key of 1 MB", b"x" * 10**6 + b": 1\n")
    kind.add_bytes("value of 1 MB", b"seed: " + b"x" * 10**6 + b"\n")
    kind.add_bytes("many unknown keys", b"".join(b"k%d: 1\n" % number for number in range(20_000)))
    kind.add_bytes("escapes", b'"\\e]0;title\\a": 1\n')
    kind.add_bytes("flow of commas", b"a: {" + b"a," * 50_000 + b"}\n")
    return kind.cases


def open_run(path: Path) -> object:
    return open_model_file(path.parents[1], image_shape=(3, 16, 16), device=torch.device("cpu")).classes


def run_cases(good: Path) -> list[Case]:
    """Folders of finished runs."""

    def copy(folder: Path) -> None:
        shutil.copytree(good / RUN, folder / "run")

    kind = Kind("model.json", open_run, ConfigError, file="run/exported/model.json", around=copy)
    kind.add_special()
    kind.add_nested_json("model", "classes")
    kind.add_bytes("not UTF-8", b'{"\xff": 1}')
    kind.add_bytes("number of 5000 digits", f'{{"format": {DIGITS}}}'.encode())

    def change(name: str, edit: Callable[[dict[str, Any]], object], **about: Any) -> None:
        def write(path: Path) -> None:
            shutil.copy(good / RUN / "exported" / "model.json", path)
            edit_json(path, edit)

        kind.add(name, write, **about)

    def with_model(**model: Any) -> Callable[[dict[str, Any]], object]:
        return lambda content: content["model"].update(builtin=None, **model)

    somewhere: dict[str, Any] = {"names": ""}
    for name, kwargs in {
        "pickle": {"checkpoint_path": "code.pt"},
        "download": {"pretrained": True},
        "config": {"pretrained_cfg": "code"},
        "cache": {"cache_dir": "."},
    }.items():
        change(f"kwargs with a {name}", with_model(timm="resnet18", kwargs=kwargs), **somewhere)
    change(
        "function of Python", with_model(factory="os:mkdir", kwargs={"path": "MARKER"}, num_classes=None), **somewhere
    )
    change("function of torch", with_model(factory="torch:load", kwargs={"f": "code.pt"}), **somewhere)
    change("huge network", lambda content: content["model"].update(kwargs={"width": 10**9}), **somewhere)
    change("huge number of classes", lambda content: content["model"].update(num_classes=10**15), **somewhere)
    change("no classes", lambda content: content.update(classes=[1]))
    change("digest of 1 MB", lambda content: content.update(weights_sha256="x" * 10**6))
    change("unknown keys", lambda content: content.update({f"k{number}": 1 for number in range(10_000)}))

    def with_weights(path: Path, content: bytes) -> None:
        """Weights of any content, with their digest."""
        path.write_bytes(content)
        edit_json(
            path.with_name("model.json"),
            lambda about: about.update(weights_sha256=hashlib.sha256(content).hexdigest()),
        )

    weights = Kind("weights of a run", open_run, ConfigError, file="run/exported/model.safetensors", around=copy)
    weights.add_special()
    weights.add("run code", lambda path: with_weights(path, saved({"w": Code(path.parents[2])})))
    weights.add("are no weights", lambda path: with_weights(path, b"{}"))
    return [*kind.cases, *weights.cases]


def history_cases() -> list[Case]:
    """What a run reads of itself when it goes on; a damaged history is no reason not to train."""

    def read_history(path: Path) -> object:
        folder = RunFolder(path.parent)
        with suppress(KDPipelineError):  # or it is refused, which stops the training with one message
            assert not folder.has_results("x")
            return folder.events()

    history = Kind("history", read_history, None, file="history.jsonl")
    history.add_bytes("nested", b"[" * DEEP + b"\n")
    history.add_bytes("number of 5000 digits", f'{{"event": {DIGITS}}}\n'.encode())
    history.add_bytes(
        "odd events", b'{"event": "results", "made_from": "x", "files": 3}\n' + b'{"event": ["results"]}\n'
    )
    history.add_bytes("not UTF-8", b"\xff\n")
    history.add_special()

    def read_metrics(path: Path) -> object:
        with suppress(KDPipelineError):
            return MetricsFile(path).resume(10)

    metrics = Kind("metrics.csv", read_metrics, None, file="metrics.csv")
    metrics.add_special()
    metrics.add_bytes("text as step", b"step,loss\nmany,1\n")
    metrics.add_bytes("text as metric", b"step,loss\n1,many\n")
    metrics.add_bytes("step of 5000 digits", f"step,loss\n{DIGITS},1\n".encode())
    metrics.add_bytes("no steps", b"loss\n1\n")
    metrics.add_bytes("field of 1 MB", b"step,loss\n1," + b"1" * 10**6 + b"\n")
    metrics.add_bytes("long rows", b"step,loss\n1,2,3,4\n")
    metrics.add_bytes("not UTF-8", b"step,\xff\n1,2\n")

    results = Kind("result.json", read_evaluations, KDPipelineError, file="result.json")
    results.add_special()
    results.add_nested_json("val")
    results.add_bytes("number of 5000 digits", f'{{"val": {DIGITS}}}'.encode())
    results.add_bytes("text", b'{"val": "good"}')

    def lock(path: Path) -> object:
        with lock_folder(path.parent, otherwise="choose another"):
            return "locked"

    locks = Kind("run.lock", lock, KDPipelineError, file="run.lock")
    locks.add("link", lambda path: (path.parent / "victim").touch() or path.symlink_to("victim"), names="")
    locks.add("folder", Path.mkdir, names="")

    def read_kept(path: Path) -> object:
        with suppress(KDPipelineError):
            found = read_evidence(path)
            assert found is not None and not found.batches
            return found

    evidence = Kind("evidence", read_kept, None, file="evidence.jsonl")
    evidence.add_special()
    evidence.add_bytes("nested", b"[" * DEEP + b"\n")
    evidence.add_bytes("number of 5000 digits", f'{{"kind": "batch", "epoch": {DIGITS}}}\n'.encode())
    evidence.add_bytes("loss that no float holds", EVIDENCE.replace("0x1.8p+1", "0x1.8p+9999").encode())
    evidence.add_bytes("lines", b"0\n" * 10**6)
    return [*history.cases, *metrics.cases, *results.cases, *locks.cases, *evidence.cases]


def cases(good: Path) -> list[Case]:
    return [*config_cases(), *run_cases(good), *history_cases()]
