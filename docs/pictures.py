"""Draw the pictures of the site with the library itself, in half a minute: `python docs/pictures.py FOLDER`."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from kd_pipeline import (
    EvalTransform,
    FollowingView,
    KDDataLoader,
    MixSettings,
    TrainTransform,
    TrainView,
    load_config,
    train,
)
from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline.workflows.demo import run_demo

PICTURES = ("buffer.svg", "views.png", "transforms.png", "demo_batch.png", "curves.png")
Pixels = NDArray[np.uint8]
Tile = tuple[str, Pixels]
GAP, LINE = 10, 22


def main(folder: Path) -> None:
    """Write all pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        photographs = write_photographs(Path("photographs"))
        (folder / "buffer.svg").write_text(buffer_diagram(), encoding="utf-8")
        draw_tiles([*views_of(photographs)], folder / "views.png", width=800)
        draw_tiles([*transforms_of(photographs)], folder / "transforms.png", width=800)
        draw_demo(folder)
    missing = [name for name in PICTURES if not (folder / name).exists()]
    assert not missing, missing


def write_photographs(root: Path) -> Path:
    """The two photographs of scikit-learn, a class each."""
    for name, pixels in zip(("palace", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        Image.fromarray(pixels).save(root / name / "photograph.jpg", quality=95)
    return root


def to_pixels(images: "NDArray[np.float32]") -> Pixels:
    """`[3, H, W]` as the networks see it, back to `[H, W, 3]` uint8."""
    values = images.transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def views_of(photographs: Path) -> Iterator[Tile]:
    """One decoding of a photograph, in each of several views."""
    views = {
        "teacher": FollowingView(follow="images", size=288, color="none"),
        "local": TrainView(size=96, area=(0.05, 0.3), count=6),
    }
    color = TrainTransform(size=192, area=(0.4, 0.8), brightness=0.5, saturation=0.6)
    with KDDataLoader(photographs, color, views=views, batch_size=2, shuffle=False, seed=7) as loader:
        batch = next(iter(loader))
    flower = loader.classes.index("flower")
    yield "images: 192 px, with colors", to_pixels(batch.images[flower].numpy())
    yield "teacher: follows at 288 px", to_pixels(batch.views["teacher"][flower].numpy())
    local = [to_pixels(each) for each in batch.views["local"][flower].numpy()]
    gap = 4
    grid = np.full((3 * 96 + 2 * gap, 2 * 96 + gap, 3), 255, np.uint8)
    for number, pixels in enumerate(local):
        top, left = (number // 2) * (96 + gap), (number % 2) * (96 + gap)
        grid[top : top + 96, left : left + 96] = pixels
    yield "local: six of 96 px", grid


def transforms_of(photographs: Path) -> Iterator[Tile]:
    """What each part of `preset: train` does to a photograph."""
    size, area = 184, (0.5, 0.9)
    chosen = {
        "preset: eval": (EvalTransform(size=size), None),
        "crop and flip": (TrainTransform(size=size, area=area), None),
        "color": (TrainTransform(size=size, area=area, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), None),
        "randaugment": (
            TrainTransform(size=size, area=area, auto_augment={"kind": "randaugment", "magnitude": 6}),
            None,
        ),
        "blur": (TrainTransform(size=size, area=area, blur=1.0, blur_sigma=(2.0, 2.0)), None),
        "erase": (TrainTransform(size=size, area=area, erase=1.0, erase_area=(0.15, 0.2)), None),
        "mix: mixup": (TrainTransform(size=size, area=area), MixSettings(mixup=4.0)),
        "mix: cutmix": (TrainTransform(size=size, area=area), MixSettings(cutmix=4.0)),
    }
    for name, (transform, mix) in chosen.items():
        with KDDataLoader(photographs, transform, mix=mix, batch_size=2, shuffle=False, seed=3) as loader:
            yield name, to_pixels(next(iter(loader)).images[0].numpy())


def draw_demo(folder: Path) -> None:
    """Two epochs of `kd-pipeline demo`, and a training by config with its teacher."""
    summary = run_demo(["train.epochs=2"])
    Image.open(summary["grid"]).save(folder / "demo_batch.png")
    overrides = [
        "train.epochs=3",
        "train.num_threads=1",
        "run_dir=run",
        "student={builtin: small_resnet, kwargs: {width: 8}}",
    ]
    train(load_config(summary["config"], [*overrides, "train.loggers=[csv]", "train.export.onnx=false"]))
    Image.open(next(Path("run").rglob("curves.png"))).save(folder / "curves.png")


def draw_tiles(tiles: Sequence[Tile], path: Path, *, width: int) -> None:
    """Write pictures with their names, in rows of at most `width` pixels."""
    font = ImageFont.load_default(15)
    places, x, y, height = [], 0, 0, 0
    for _, pixels in tiles:
        if x and x + pixels.shape[1] > width:
            x, y, height = 0, y + height + GAP, 0
        places.append((x, y))
        x += pixels.shape[1] + GAP
        height = max(height, pixels.shape[0] + LINE)
    canvas = Image.new("RGB", (width, y + height), "white")
    draw = ImageDraw.Draw(canvas)
    for (name, pixels), (left, top) in zip(tiles, places, strict=True):
        draw.text((left, top), name, fill="black", font=font)
        canvas.paste(Image.fromarray(pixels), (left, top + LINE))
    canvas.save(path)


def buffer_diagram() -> str:
    """How one buffer reaches both networks, as SVG."""
    parts = [
        box(20, 20, 160, 56, "a file", "local, tar, Parquet, URL", "#eef2f7"),
        box(220, 20, 160, 56, "decode", "only the crop's window", "#e3f0dc"),
        box(420, 20, 160, 56, "augment", "crop, colors, normalize", "#e3f0dc"),
        arrow(180, 48, 220, 48),
        arrow(380, 48, 420, 48),
        text(300, 98, "DALI, batches ahead of your loop", 13, "#556"),
        arrow(500, 76, 500, 120),
        box(20, 120, 560, 60, "one buffer", "[N, 3, H, W], owned by DALI, written once", "#fde9c9"),
        arrow(150, 180, 150, 240),
        arrow(450, 180, 450, 240),
        text(300, 215, "read in place: no copy", 13, "#556"),
        box(40, 240, 220, 56, "teacher", "OpenVINO, TensorRT, PyTorch", "#dbe8fb"),
        box(340, 240, 220, 56, "student", "your model, in your loop", "#dbe8fb"),
        arrow(150, 296, 230, 346),
        arrow(450, 296, 370, 346),
        box(190, 346, 220, 56, "loss", "of outputs and labels", "#f3e1f3"),
    ]
    marker = '<marker id="a" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
    marker += '<path d="M0,0 L9,4 L0,8 z" fill="#445"/></marker>'
    style = "font-family: system-ui, sans-serif; background: white"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 420" style="{style}">'
    title = (
        "<title>A file is decoded and augmented by DALI into one buffer, which teacher and student both read</title>"
    )
    background = '<rect width="600" height="420" rx="8" fill="white"/>'
    return "\n".join([head, title, f"<defs>{marker}</defs>", background, *parts, "</svg>"]) + "\n"


def box(x: int, y: int, width: int, height: int, name: str, what: str, color: str) -> str:
    """A box with two lines."""
    middle = x + width // 2
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}" stroke="#889"/>'
    return rect + text(middle, y + 24, name, 16, "#112", "bold") + text(middle, y + 44, what, 12, "#334")


def text(x: int, y: int, words: str, size: int, color: str, weight: str = "normal") -> str:
    """A line, centered."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="middle">{escape(words)}</text>'
    )


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """From one box to the next."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#445" stroke-width="1.5" marker-end="url(#a)"/>'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
