"""`kd-pipeline record`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_pipeline.cli.arguments import add_config, checked, tell

if TYPE_CHECKING:
    from kd_pipeline.workflows._record import Progress

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline record -c my.yaml
  kd-pipeline record -c my.yaml --top-k 16 --dtype float16 --epochs 100
  kd-pipeline train -c my.yaml 'teacher={path: runs/mine/recording}'

The same command goes on where an earlier one was stopped.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "record",
        parents=[common],
        help="run the teacher of a config once and keep its answers for trainings that replay them",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument("--top-k", metavar="K", help="keep the K largest logits of an image; all unless given")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is kept")
    parser.add_argument("--epochs", metavar="N", help="epochs to record; train.epochs unless given")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where; the folder recording in run_dir unless given"
    )
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.teachers.recorded.files import Manifest
    from kd_pipeline.workflows._record import RecordSettings, record

    settings = checked(RecordSettings, top_k=parsed.top_k, dtype=parsed.dtype, epochs=parsed.epochs, out=parsed.out)
    folder = record(load_config(parsed.config, parsed.overrides), settings, plugins=parsed.plugin, report=_show)
    manifest = Manifest.load(folder)
    print(
        f"{manifest.num_rows} images x {manifest.epochs_done} epochs, {manifest.row_bytes} bytes each "
        f"({manifest.num_bytes / 1e6:.1f} MB): train with teacher: {{path: {folder}}}"
    )
    return 0


def _show(progress: "Progress") -> None:
    minutes, seconds = divmod(round(progress.left_s), 60)
    tell(
        f"epoch {progress.epoch + 1} of {progress.epochs}: {progress.done:.1%} recorded, "
        f"{progress.images_per_s:.0f} images/s, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    )
