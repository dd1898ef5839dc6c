"""Train the student of a config alone and distilled with several seeds, and write a table of validation accuracies.

    python tools/compare_seeds.py configs/digits_all_stages.yaml results.md 1 2 3

The teacher is also trained once for each seed.
"""

import statistics
import sys
from pathlib import Path

from kd_pipeline import load_config
from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline.workflows._train import train

STAGES = ("teacher", "baseline", "distill")


def main(config: str, out: str, *seeds: str) -> None:
    """Run every stage for every seed, each in its own folder below the config's `run_dir`."""
    run_dir = load_config(config).run_dir
    top1: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for seed in seeds:
        for stage in STAGES:
            overrides = [f"seed={seed}", f"run_dir={run_dir}/seed_{seed}", f"stage={stage}"]
            found = train(load_config(config, overrides)).evaluations["val"].top1
            assert found is not None
            top1[stage].append(found)
    lines = [
        f"`python tools/compare_seeds.py {' '.join((config, out, *seeds))}`",
        "",
        f"| top-1 on val | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | standard deviation |",
        "|---|" + "---|" * (len(seeds) + 2),
        *(
            f"| {stage} | {' | '.join(f'{value:.1%}' for value in found)} | {statistics.mean(found):.1%} | "
            f"{statistics.stdev(found) if len(found) > 1 else 0:.1%} |"
            for stage, found in top1.items()
        ),
    ]
    write_atomic(Path(out), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
