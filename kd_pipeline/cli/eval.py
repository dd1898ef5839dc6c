"""`kd-pipeline eval`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kd_pipeline.errors import ConfigError

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline eval -c configs/digits_all_stages.yaml runs/digits runs/digits/teacher
  kd-pipeline eval -c my.yaml --split test student.onnx teacher.engine runs/mine --metric CohenKappa
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "eval",
        parents=[common],
        help="accuracy, agreement, latency and size of runs, ONNX files and engines, side by side",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="describes the data")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the folder of a run, an ONNX file or an engine")
    parser.add_argument("--split", default="val", help="which images; val unless given")
    parser.add_argument("--teacher", metavar="MODEL", help="the model that agreement is measured with")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="a metric of torchmetrics as well"
    )
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="a change to the config")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where all figures go as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from contextlib import ExitStack

    import torch

    from kd_pipeline.comparison import Compared, compare, measure_cost
    from kd_pipeline.config import load_config
    from kd_pipeline.evaluation import MetricSettings, evaluate
    from kd_pipeline.loader import KDDataLoader
    from kd_pipeline.teachers import TeacherSettings, open_teacher

    config = load_config(parsed.config, parsed.set).model_copy(update={"teacher": None, "run_dir": None})
    metrics = [MetricSettings(name=name) for name in parsed.metric]
    with ExitStack() as opened:
        loader = opened.enter_context(KDDataLoader.from_config(config, parsed.split))
        size = loader.transform.size
        arguments = (size, loader.device, getattr(loader.transform, "dtype", "float32"), loader.classes)
        reference = None
        if parsed.teacher is not None:
            reference, _ = _open(Path(parsed.teacher), *arguments, opened)
            if isinstance(reference, torch.nn.Module):
                shape = (3, size, size)
                reference = open_teacher(TeacherSettings(), module=reference, image_shape=shape, device=loader.device)
        rows = []
        for name in parsed.models:
            model, files = _open(Path(name), *arguments, opened)
            print(f"evaluating {name}", file=sys.stderr)
            evaluation = evaluate(model, loader, reference=reference, metrics=metrics)
            images = next(iter(loader)).images
            rows.append(Compared(name=name, evaluation=evaluation, cost=measure_cost(model, images, files=files)))
    print(compare(rows))
    for row in rows:
        for metric, value in row.evaluation.metrics.items():
            print(f"{row.name}: {metric} {value}")
    if parsed.out is not None:
        found = {row.name: row.evaluation.to_dict() for row in rows}
        parsed.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _open(path: Path, size: int, device: Any, dtype: str, classes: Any, opened: Any) -> tuple[Any, list[Path]]:
    """A model by where it lies, and the files that it consists of."""
    import torch

    from kd_pipeline.models import ModelSettings, open_model
    from kd_pipeline.teachers import TeacherSettings, open_teacher
    from kd_pipeline.teachers.permuted import matched

    if path.is_dir():
        about, weights = path / "exported" / "model.json", path / "exported" / "model.safetensors"
        if not about.is_file():
            raise ConfigError(f"{path} is not the folder of a finished run: it has no exported/model.json")
        settings = ModelSettings.model_validate(json.loads(about.read_text(encoding="utf-8"))["model"])
        module = open_model(settings.model_copy(update={"checkpoint": weights})).to(device).eval()
        return module, [weights]
    kinds = {".onnx": "onnx", ".engine": "engine", ".plan": "engine", ".trt": "engine"}
    if path.suffix not in kinds:
        raise ConfigError(f"{path} is neither the folder of a run nor an .onnx or .engine file")
    settings_of_file = TeacherSettings.model_validate({kinds[path.suffix]: path})
    teacher = open_teacher(settings_of_file, image_shape=(3, size, size), device=device, dtype=getattr(torch, dtype))
    opened.callback(teacher.close)
    return matched(teacher, classes), [path]
