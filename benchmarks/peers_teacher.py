"""Run the teacher of a config alone, on one batch in memory, as many times as an epoch has batches.

python -m benchmarks.peers_teacher -c CONFIG [key.path=value ...]
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

import torch

from kd_pipeline import KDDataLoader, load_config, open_source
from kd_pipeline.cli.arguments import add_common, add_config, run_command
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.workflows.teacher import open_run_teacher


def main(arguments: Sequence[str] | None = None) -> int:
    """Open the teacher as a training would, run it, and return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    add_common(parser)
    return run_command(_run, parser.parse_args(arguments), prog=parser.prog)


def _run(parsed: argparse.Namespace) -> int:
    # A training's step ends with that of its optimizer, which is what `peers_runner` sees.
    step = torch.optim.SGD([torch.zeros(1)]).step
    config = load_config(parsed.config, parsed.overrides)
    training = open_source(config.data.split("train").source)
    teacher = open_run_teacher(config, classes=training.classes, plugins=parsed.plugin, training=training)
    assert isinstance(teacher, Teacher)
    print(f"teacher: {teacher.backend} in {teacher.precision}")
    with (
        closing(teacher),
        KDDataLoader.from_config(config, "train", teacher=teacher, training=training) as loader,
    ):
        images = loader.peek().images.clone()
        for _ in range(len(loader)):
            teacher(images)
            step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
