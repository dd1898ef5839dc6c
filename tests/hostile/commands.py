"""Hostile files through the commands."""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.hostile.cases import DEEP, SPECIAL, Case, Code, CommandError, edit_json, make_sparse, remove, run
from tests.hostile.prepare import BOMB, RECORDING, RUN, photo
from tests.hostile.weights import write_code
from tests.teachers.onnx_models import write_external

CONFIG = """
seed: 3
run_dir: runs/tiny
data:
  batch_size: 4
  num_threads: 1
  device: cpu
  train:
    source: {{kind: arrays, images: images.npy, labels: labels.npy}}
    transform: {{preset: train, size: 16}}
  val:
    source: {source}
    transform: {{preset: eval, size: 16, resize: 16}}
teacher: {teacher}
student: {{builtin: small_resnet, kwargs: {{width: 4}}}}
train: {{epochs: 1, loggers: [csv], compare_with_teacher: false}}
"""
ARRAYS = "{kind: arrays, images: images.npy, labels: labels.npy}"
TEACHER = "{model: {builtin: small_resnet, num_classes: 3, kwargs: {width: 4}}}"


def write_config(folder: Path, *, source: str = ARRAYS, teacher: str = TEACHER) -> Path:
    """A config, with its data."""
    np.save(folder / "images.npy", np.zeros((12, 16, 16, 3), np.uint8))
    np.save(folder / "labels.npy", np.arange(12) % 3)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(source=source, teacher=teacher))
    return path


def cases(good: Path) -> list[Case]:
    found: list[Case] = []

    def add(
        name: str,
        write: Callable[[Path], object],
        arguments: Callable[[Path], Sequence[str | Path]],
        names: str = "",
    ) -> None:
        def build(folder: Path) -> Path:
            write(folder)
            return folder

        found.append(Case(name, build, lambda folder: run(arguments(folder)), CommandError, names))

    first = photo(good, 0)

    def with_run(change: Callable[[Path], object]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            shutil.copytree(good / RUN, folder / "run")
            change(folder / "run" / "exported")

        return write

    def put(path: Path, make: Callable[[Path], object]) -> None:
        remove(path)
        make(path)

    def predict(folder: Path) -> Sequence[str | Path]:
        return ["predict", folder / "run", first, "--device", "cpu"]

    def evaluate(folder: Path) -> Sequence[str | Path]:
        return ["eval", "-c", "config.yaml", "--no-teacher", good / RUN]

    nested = b"[" * DEEP
    add(
        "predict: nested model.json",
        with_run(lambda run: (run / "model.json").write_bytes(nested)),
        predict,
        "model.json",
    )
    for name in ("pipe", "endless device", "larger than memory"):
        change = with_run(lambda run, name=name: put(run / "model.json", SPECIAL[name]))
        add(f"predict: {name} as model.json", change, predict, "model.json" if name == "larger than memory" else "")
        change = with_run(lambda run, name=name: put(run / "model.safetensors", SPECIAL[name]))
        add(f"predict: {name} as weights", change, predict)
    add(
        "predict: size of 2**40",
        with_run(lambda run: edit_json(run / "model.json", lambda content: content["transform"].update(size=2**40))),
        predict,
    )
    add(
        "predict: checkpoint in kwargs",
        with_run(
            lambda run: (
                write_code(run.parents[1] / "code.pt"),
                edit_json(
                    run / "model.json",
                    lambda content: content.update(
                        model={"timm": "resnet18", "kwargs": {"checkpoint_path": str(run.parents[1] / "code.pt")}}
                    ),
                ),
            )
        ),
        predict,
    )

    def write_images(folder: Path) -> None:
        with_run(lambda run: None)(folder)
        images = folder / "images"
        images.mkdir()
        for name, make in SPECIAL.items():
            make(images / f"{name}.png")
        shutil.copy(first, images / "good.jpg")
        (images / "cut off.jpg").write_bytes(first.read_bytes()[:200])
        (images / "zeros.jpg").write_bytes(bytes(1000))
        Image.new("1", (30_000, 30_000)).save(images / "pixels.png")

    def predict_all(folder: Path) -> Sequence[str | Path]:
        return ["predict", folder / "run", *sorted((folder / "images").iterdir()), "--device", "cpu"]

    add(
        "predict: images that are none",
        lambda folder: (write_images(folder), (folder / "images" / "folder.png").rmdir()),
        predict_all,
        "pipe.png",
    )

    for name in ("pipe", "endless device", "larger than memory"):
        add(
            f"eval: {name} as config",
            lambda folder, name=name: SPECIAL[name](folder / "config.yaml"),
            lambda folder: ["eval", "-c", folder / "config.yaml"],
            "config.yaml",
        )
        add(
            f"eval: {name} as model.onnx",
            lambda folder, name=name: (write_config(folder), SPECIAL[name](folder / "model.onnx")),
            lambda folder: ["eval", "-c", "config.yaml", "--no-teacher", folder / "model.onnx"],
            "" if name == "endless device" else "model.onnx",
        )
        add(
            f"eval: {name} as images",
            lambda folder, name=name: (
                write_config(folder, source="{kind: arrays, images: hostile.npy}"),
                SPECIAL[name](folder / "hostile.npy"),
            ),
            evaluate,
            "hostile.npy",
        )
        add(
            f"eval: {name} as list",
            lambda folder, name=name: (
                write_config(folder, source="{kind: file_list, path: hostile.csv}"),
                SPECIAL[name](folder / "hostile.csv"),
            ),
            evaluate,
            "hostile.csv",
        )
        add(
            f"train: {name} as checkpoint of the teacher",
            lambda folder, name=name: (
                write_config(folder, teacher=TEACHER.replace("kwargs", "checkpoint: hostile.pt, kwargs")),
                SPECIAL[name](folder / "hostile.pt"),
            ),
            lambda folder: ["train", "-c", "config.yaml"],
            "hostile.pt",
        )
        add(
            f"build-engine: {name} as ONNX file",
            lambda folder, name=name: SPECIAL[name](folder / "model.onnx"),
            lambda folder: ["build-engine", "--onnx", folder / "model.onnx"],
            "" if name == "endless device" else "model.onnx",
        )
    add(
        "eval: bomb of images",
        lambda folder: (
            write_config(folder, source="{kind: arrays, images: hostile.npz}"),
            os.link(good / f"{BOMB}.npz", folder / "hostile.npz"),
        ),
        evaluate,
        "hostile.npz",
    )
    add(
        "eval: images of objects",
        lambda folder: (
            write_config(folder, source="{kind: arrays, images: hostile.npy}"),
            (folder / "hostile.npy").write_bytes(pickle.dumps(Code(folder))),
        ),
        evaluate,
        "hostile.npy",
    )
    add(
        "eval: config with code",
        lambda folder: (folder / "config.yaml").write_text("seed: !!python/object/apply:os.mkdir [MARKER]\n"),
        lambda folder: ["eval", "-c", "config.yaml"],
        "config.yaml",
    )
    add(
        "eval: function of Python as metric",
        write_config,
        lambda folder: ["eval", "-c", "config.yaml", "--metric", "os:mkdir"],
        "os:mkdir",
    )
    add(
        "build-engine: weights above the folder",
        lambda folder: write_external(
            folder / "model", lambda tensor: setattr(tensor.external_data[0], "value", "../x")
        ),
        lambda folder: ["build-engine", "--onnx", folder / "model" / "model.onnx"],
        "model.onnx",
    )
    add(
        "train: nested manifest of a recording",
        lambda folder: (
            write_config(folder, teacher="{path: recording}"),
            shutil.copytree(good / RECORDING, folder / "recording"),
            (folder / "recording" / "manifest.json").write_bytes(nested),
        ),
        lambda folder: ["train", "-c", "config.yaml"],
        "manifest.json",
    )

    def resume(name: str, make: Callable[[Path], object]) -> None:
        def write(folder: Path) -> None:
            write_config(folder)
            path = folder / "runs" / "tiny" / "baseline" / "checkpoints" / "last.ckpt"
            path.parent.mkdir(parents=True)
            make(path)

        add(
            f"train: {name} as last checkpoint",
            write,
            lambda folder: ["train", "-c", "config.yaml", "stage=baseline"],
            "last.ckpt",
        )

    resume("code", lambda path: write_code(path))
    resume("a text", lambda path: path.write_text("no checkpoint"))
    resume("larger than memory", make_sparse)
    add(
        "train: a run folder that leads elsewhere",
        lambda folder: (
            write_config(folder),
            (folder / "victim").mkdir(),
            (folder / "runs" / "tiny" / "baseline").mkdir(parents=True),
            (folder / "victim" / "log").write_text("mine"),
            (folder / "runs" / "tiny" / "baseline" / "train.log").symlink_to(folder / "victim" / "log"),
        ),
        lambda folder: ["train", "-c", "config.yaml", "stage=baseline"],
        "train.log",
    )
    return found
