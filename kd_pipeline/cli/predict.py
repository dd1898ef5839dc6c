"""`kd-pipeline predict`."""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from kd_pipeline.data.transforms import EvalTransform
    from kd_pipeline.evaluation._predict import Prediction

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline predict runs/digits photo.png more/photos
  kd-pipeline predict runs/digits/exported/model.onnx photos --top 1 --json > answers.jsonl
  kd-pipeline predict other.onnx -c my.yaml photos --out answers.jsonl
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "predict",
        parents=[common],
        help="the likeliest classes of images, by a trained student or another model",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of a run, an ONNX file or an engine")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, and folders of them")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="has the transform, for a file of no run")
    parser.add_argument("--split", default="val", help="the split of the config whose transform it is")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to show of each image; 5 unless given")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once; 64 unless given")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="brings the network's factory")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the lines of JSON go")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    import torch

    from kd_pipeline._core.device import resolve_device
    from kd_pipeline.evaluation._predict import find_images, predict
    from kd_pipeline.workflows.exported import open_model_file

    if parsed.top < 1:
        raise ConfigError(f"--top: at least one class, got {parsed.top}")
    images = find_images(parsed.images)
    transform = _transform(parsed)
    device = resolve_device(parsed.device)
    num_unread = 0
    with ExitStack() as stack:
        dtype = getattr(torch, transform.dtype)
        opened = open_model_file(parsed.model, size=transform.size, device=device, dtype=dtype, plugins=parsed.plugin)
        stack.callback(opened.close)
        out = None if parsed.out is None else stack.enter_context(parsed.out.open("w", encoding="utf-8"))
        found = predict(opened.model, images, transform, batch_size=parsed.batch_size, device=device)
        for prediction in found:
            num_unread += prediction.problem is not None
            line = json.dumps(_plain(prediction, opened.classes, parsed.top), ensure_ascii=False)
            if out is not None:
                out.write(line + "\n")
            if parsed.json:
                print(line)
            elif prediction.problem is None:
                print(_text(prediction, opened.classes, parsed.top))
            if prediction.problem is not None:
                print(f"kd-pipeline: {prediction.image} cannot be read: {prediction.problem}", file=sys.stderr)
    if num_unread:
        print(f"kd-pipeline: {num_unread} of {len(images)} images cannot be read", file=sys.stderr)
    return 1 if num_unread else 0


def _transform(parsed: argparse.Namespace) -> "EvalTransform":
    """What the model wants done to an image: what its run says, or else the config."""
    from kd_pipeline.config.config import load_config
    from kd_pipeline.data.transforms import EvalTransform
    from kd_pipeline.workflows.exported import read_exported

    if parsed.config is not None:
        transform = load_config(parsed.config).data.split(parsed.split).transform
        if not isinstance(transform, EvalTransform):
            raise ConfigError(f"the split {parsed.split} has a random transform; take one with preset: eval")
        return transform
    exported = read_exported(parsed.model)
    if exported is None:
        raise ConfigError(
            f"{parsed.model} does not say what is to be done to an image first; give the config of its data, with "
            "-c my.yaml"
        )
    return exported[1].transform


def _plain(prediction: "Prediction", classes: tuple[str, ...] | None, count: int) -> dict[str, Any]:
    if prediction.problem is not None:
        return {"image": prediction.image, "problem": prediction.problem}
    top = [
        {"class": _name(label, classes), "label": label, "probability": probability}
        for label, probability in prediction.top(count)
    ]
    return {"image": prediction.image, "top": top}


def _text(prediction: "Prediction", classes: tuple[str, ...] | None, count: int) -> str:
    top = (f"{_name(label, classes)} {probability:.1%}" for label, probability in prediction.top(count))
    return f"{prediction.image}: {', '.join(top)}"


def _name(label: int, classes: tuple[str, ...] | None) -> str:
    return str(label) if classes is None else classes[label]
