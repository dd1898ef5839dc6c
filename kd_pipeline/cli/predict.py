"""`kd-pipeline predict`."""

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kd_pipeline._core.files import open_own
from kd_pipeline._core.text import counted, printable
from kd_pipeline.cli.arguments import add_permissions, path_option, permissions
from kd_pipeline.cli.printing import print_message, print_result
from kd_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from kd_pipeline.data.transforms import EvalTransform
    from kd_pipeline.evaluation._predict import Prediction

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline predict runs/digits photo.png more/photos
  kd-pipeline predict runs/digits/exported/model.onnx photos --top 1 --json > predictions.jsonl
  kd-pipeline predict other.onnx -c my.yaml photos --out predictions.jsonl
  kd-pipeline predict runs/streets photos --masks predicted
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "predict",
        parents=[common],
        help="predict the most likely classes of images, or of their pixels, with a trained student or any other model",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_option, metavar="MODEL", help="folder of a run, ONNX file or engine")
    parser.add_argument("images", nargs="+", type=path_option, metavar="IMAGE", help="files and folders")
    parser.add_argument(
        "-c",
        "--config",
        type=path_option,
        metavar="FILE",
        help="take the transform from this config; for a file outside a run",
    )
    parser.add_argument("--split", default="val", help="split of the config with the transform (default: val)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, or auto for a GPU if there is one (default: auto)"
    )
    add_permissions(parser, "the network's factory")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per image")
    parser.add_argument("--out", type=path_option, metavar="FILE", help="write the lines of JSON to this file")
    parser.add_argument(
        "--masks",
        type=path_option,
        metavar="DIR",
        help="write the class of each pixel of each image to this folder, as PNG files with colors",
    )


def _run(parsed: argparse.Namespace) -> int:
    import torch

    from kd_pipeline._core.device import resolve_device
    from kd_pipeline._core.progress import no_report, progress_bar
    from kd_pipeline.evaluation._predict import find_images, predict
    from kd_pipeline.workflows.exported import open_model_file

    if parsed.top < 1:
        raise ConfigError(f"--top: at least one class, got {parsed.top}")
    started = time.monotonic()
    images = find_images(parsed.images)
    transform = _transform(parsed)
    device = resolve_device(parsed.device)
    with ExitStack() as stack:
        dtype = getattr(torch, transform.dtype)
        shape = transform.image_shape
        opened = open_model_file(parsed.model, image_shape=shape, device=device, dtype=dtype, **permissions(parsed))
        stack.callback(opened.close)
        out = None if parsed.out is None else stack.enter_context(_open_out(parsed.out))
        shown = _Shown(parsed, opened.classes, out)
        found = predict(opened.model, images, transform, batch_size=parsed.batch_size, device=device)
        # Where results scroll by, they show how far it is.
        report = no_report if sys.stdout.isatty() else stack.enter_context(progress_bar("predicting"))
        for number, prediction in enumerate(found, start=1):
            report(number, len(images))
            shown.add(prediction)
    of_all = counted(len(images), "image")
    print_message(f"{of_all} in {time.monotonic() - started:.1f} s")
    if shown.num_unreadable:
        print_message(f"kd-pipeline: {shown.num_unreadable} of {of_all} cannot be read")
    if shown.num_not_finite:
        have = "has" if shown.num_not_finite == 1 else "have"
        print_message(f"kd-pipeline: {shown.num_not_finite} of {of_all} {have} no finite logits")
    return 1 if shown.num_unreadable or shown.num_not_finite else 0


class _Shown:
    """Prints predictions, writes them as the options say, and counts the images that have none."""

    def __init__(self, parsed: argparse.Namespace, classes: tuple[str, ...] | None, out: BinaryIO | None) -> None:
        self._classes, self._out, self._top, self._as_json = classes, out, parsed.top, parsed.json
        self._masks = None if parsed.masks is None else _Masks(parsed.masks)
        self.num_unreadable = self.num_not_finite = 0

    def add(self, prediction: "Prediction") -> None:
        """Show one.

        Raises:
            ConfigError: it has no mask, or that cannot be written.
        """
        from kd_pipeline.evaluation._predict import NOT_FINITE

        self.num_not_finite += prediction.problem == NOT_FINITE
        self.num_unreadable += prediction.problem not in (None, NOT_FINITE)
        mask = None if self._masks is None else self._masks.save(prediction)
        # In ASCII, which escapes what a terminal would obey and what is no UTF-8 in names.
        line = json.dumps(_to_json(prediction, self._classes, self._top) | ({} if mask is None else {"mask": mask}))
        if self._out is not None:
            self._out.write(line.encode() + b"\n")
        if self._as_json:
            print_result(line)
        elif prediction.problem is None:
            print_result(printable(_text(prediction, self._classes, self._top)))
        if prediction.problem is not None:
            what = "has no prediction" if prediction.problem == NOT_FINITE else "cannot be read"
            print_message(f"kd-pipeline: {printable(f'{prediction.image} {what}: {prediction.problem}')}")


class _Masks:
    """Files with the classes of pixels, named as their images; those of one name are numbered."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._names = folder, Counter[str]()

    def save(self, prediction: "Prediction") -> str | None:
        """Write the file, and return its path; None if there is no prediction.

        Raises:
            ConfigError: the model predicts no pixels, or the file cannot be written.
        """
        from kd_pipeline.report.pixels import save_mask

        if prediction.problem is not None:
            return None
        if prediction.mask is None or prediction.num_classes is None:
            raise ConfigError("--masks: the model classifies whole images and not their pixels; leave it out")
        stem = Path(prediction.image).stem
        self._names[stem] += 1
        number = "" if self._names[stem] == 1 else f"_{self._names[stem]}"
        path = self._folder / f"{stem}{number}.png"
        return str(save_mask(prediction.mask, path, num_classes=prediction.num_classes))


def _open_out(path: Path) -> BinaryIO:
    try:
        return open_own(path, "w+b")
    except OSError as exc:
        raise ConfigError(f"--out {path} cannot be written: {exc.strerror}") from exc


def _transform(parsed: argparse.Namespace) -> "EvalTransform":
    """The transform of the config if one is given, else of the model's run."""
    from kd_pipeline.config.config import load_config
    from kd_pipeline.workflows.exported import no_network, read_exported
    from kd_pipeline.workflows.results import repeatable_transform
    from kd_pipeline.workflows.stage import view_of

    if parsed.config is not None:
        config = load_config(parsed.config)
        transform = repeatable_transform(config.data, parsed.split, view_of(config, "distill"))
        if transform is None:
            raise ConfigError(f"the split {parsed.split} has a random transform; choose one with preset: eval")
        return transform
    exported = read_exported(parsed.model)
    if exported is not None and exported[1].model is None and parsed.model.is_dir():
        raise ConfigError(no_network(*exported))
    if exported is None or exported[1].transform is None:
        raise ConfigError(
            f"{parsed.model} does not describe the preprocessing of its images; give the config of its data with "
            "-c my.yaml"
        )
    return exported[1].transform


def _to_json(prediction: "Prediction", classes: tuple[str, ...] | None, count: int) -> dict[str, Any]:
    if prediction.problem is not None:
        return {"image": prediction.image, "problem": prediction.problem}
    is_of_pixels = prediction.mask is not None
    top = [
        {"class": _name(label, classes), "label": label, "share" if is_of_pixels else "probability": share}
        for label, share in prediction.top(count)
    ]
    return {"image": prediction.image, "pixels" if is_of_pixels else "top": top}


def _text(prediction: "Prediction", classes: tuple[str, ...] | None, count: int) -> str:
    top = (f"{_name(label, classes)} {share:.1%}" for label, share in prediction.top(count))
    of_pixels = " of the pixels" if prediction.mask is not None else ""
    return f"{prediction.image}: {', '.join(top)}{of_pixels}"


def _name(label: int, classes: tuple[str, ...] | None) -> str:
    return str(label) if classes is None else classes[label]
