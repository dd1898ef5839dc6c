"""Run the teacher of a config alone, on one batch in memory, as many times as an epoch has batches.

python -m benchmarks.peers_teacher -c CONFIG [key.path=value ...]
"""

import argparse
from collections.abc import Sequence

import torch

from kd_pipeline import KDDataLoader, load_config
from kd_pipeline.teachers.base import Teacher


def main(arguments: Sequence[str] | None = None) -> None:
    """Open the teacher as a training would, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    # A training's step ends with that of its optimizer, which is what `peers_runner` sees.
    step = torch.optim.SGD([torch.zeros(1)]).step
    with KDDataLoader.from_config(load_config(options.config, options.overrides), split="train") as loader:
        assert isinstance(loader.teacher, Teacher)
        print(f"teacher: {loader.teacher.backend} in {loader.teacher.precision}")
        images = loader.peek().images.clone()
        for _ in range(len(loader)):
            loader.teacher(images)
            step()


if __name__ == "__main__":
    main()
