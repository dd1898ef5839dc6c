"""`kd-pipeline train`."""

import argparse
from typing import Any

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_config, permissions
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline train -c configs/digits_all_stages.yaml stage=all
  kd-pipeline train -c configs/digits_all_stages.yaml stage=baseline train.epochs=20
  torchrun --nproc-per-node 4 -m kd_pipeline train -c configs/imagenet_resnet34_to_resnet18.yaml

Run the same command to resume an interrupted training. --fresh starts from the beginning, and so does another run_dir.
Of several students, one that fails ends alone; the exit status is then 1, and the same command tries it again.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "train",
        parents=[common],
        help="train the teacher of a config, the student alone, or the student with its teacher",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser, plugins="factories and losses")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start from the beginning, and move the earlier run to earlier/1 in its folder, or the next number; with "
        "stage=all this goes for both stages, while stage=distill keeps the trained teacher",
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config

    config = load_config(parsed.config, parsed.overrides)  # an error in it should not wait for Lightning

    from kd_pipeline.workflows._train import train

    allowed = permissions(parsed)
    result = train(
        config,
        plugins=allowed["plugins"],
        trust_engines=allowed["trust_engines"],
        fresh=parsed.fresh,
        report=lambda line: print_result(printable(line)),
    )
    if is_rank_zero():
        print_result(printable(f"run folder: {result.folder}"))
    return 1 if result.failures else 0
