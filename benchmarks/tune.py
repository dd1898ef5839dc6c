"""How far the settings that `kd-pipeline tune` chooses are from the best of an exhaustive grid.

    python -m benchmarks.tune -c configs/digits_all_stages.yaml
    python -m benchmarks.tune -c mine.yaml stage=baseline --grid train.num_threads=1,2 --grid data.prefetch=1,2,4

The grid is measured by rounds in which all of its settings take turns; the best ones and the choice are then measured
again together, because the highest of many noisy numbers is too high.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.bench.measure import environment, paired_ratio, rotated
from kd_pipeline.bench.tune import TuneSettings, merged, tune
from kd_pipeline.bench.tune_knobs import Place
from kd_pipeline.bench.tune_result import as_overrides
from kd_pipeline.bench.tune_steps import RunSteps, Trial, Values
from kd_pipeline.cli.arguments import add_common, add_config, path_option, permissions, print_progress, run_command
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.stage import Stage

_NUM_BEST = 3
"""Settings of the grid that are measured again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, measure the grid, print how far apart they are, and write JSON where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    add_config(parser, plugins="factories and losses")
    parser.add_argument("--seconds", type=float, default=170.0, help="for tune (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the grid (default: %(default)s)")
    parser.add_argument("--trial", type=float, default=0.5, help="seconds of one measurement (default: %(default)s)")
    parser.add_argument("--grid", action="append", metavar="KEY=A,B", help="a setting and its values, as JSON or text")
    parser.add_argument("--out", type=path_option, help="a JSON file for every round")
    return run_command(_run, parser.parse_args(arguments), prog=parser.prog)


def _run(parsed: argparse.Namespace) -> int:
    if parsed.out is not None:
        prepare_output(parsed.out)
    config = load_config(parsed.config, parsed.overrides)
    stage: Stage = "distill" if config.stage == "all" else config.stage
    grid = _grid(parsed.grid or _default_grid(config, stage))
    tuned = tune(config, TuneSettings(seconds=parsed.seconds), **permissions(parsed), report=print_progress)
    print(tuned.table())
    chosen = merged((), tuple(tuned.values.items()))
    with RunSteps(config, stage, **permissions(parsed)) as steps:
        place = Place.of(config, stage, default_threads=steps.default_threads)
        coarse = _measure(steps, grid, parsed.rounds, parsed.trial)
        best = sorted(coarse, key=lambda values: -median(coarse[values]))[:_NUM_BEST]
        steps.keep([chosen, (), *best])
        fine = _measure(steps, [chosen, (), *best], 3 * parsed.rounds, 2 * parsed.trial)
    others = [values for values in best if not place.is_same(values, chosen)]
    distance = max([0.0, *(1 - paired_ratio(fine[chosen], fine[values]) for values in others)])
    print(f"{len(grid)} settings in the grid; the best of them, measured again:")
    for values in best:
        print(f"  {as_overrides(values)}: {median(fine[values]):,.1f} images/s")
    print(f"chosen by tune, {as_overrides(chosen) or 'no change'}: {median(fine[chosen]):,.1f} images/s")
    print(f"tune's choice is {distance:.1%} slower than the best of the grid, the present settings "
          f"{1 - paired_ratio(fine[()], fine[best[0]]):.1%}")  # fmt: skip
    if parsed.out is not None:
        found = {
            "chosen": tuned.values,
            "distance": distance,
            "tune": json.loads(tuned.to_json()),
            "grid": [{"values": dict(values), "images_per_s": rates} for values, rates in coarse.items()],
            "again": [{"values": dict(values), "images_per_s": rates} for values, rates in fine.items()],
            "environment": environment(),
        }
        write_output(parsed.out, json.dumps(found, indent=2) + "\n")
    return 0


def _default_grid(config: Config, stage: Stage) -> list[str]:
    """Threads of each part from one to all cores, and prefetch."""
    threads = ",".join(map(str, dict.fromkeys([1, max(1, num_cores() // 2), num_cores()])))
    keys = ["data.num_threads", *(["train.num_threads"] if stage != "distill" or config.student else [])]
    return [*(f"{key}={threads}" for key in keys), "data.prefetch=1,2,4"]


def _grid(axes: Sequence[str]) -> list[Values]:
    named = [axis.partition("=") for axis in axes]
    if wrong := [axis for axis, (_, _, values) in zip(axes, named, strict=True) if not values]:
        raise ConfigError(f"--grid {wrong[0]}: give a setting and its values, such as data.prefetch=1,2,4")
    lists = [[(key, _value(text)) for text in values.split(",")] for key, _, values in named]
    return [tuple(sorted(values)) for values in itertools.product(*lists)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _measure(steps: RunSteps, choices: Sequence[Values], rounds: int, seconds: float) -> dict[Values, list[float]]:
    rates: dict[Values, list[float]] = {values: [] for values in choices}
    for number in range(rounds):
        for values in rotated([*rates], number):
            rates[values].append(steps.rate(Trial(values), seconds=seconds))
        print_progress(f"round {number + 1} of {rounds}: {max(map(median, rates.values())):,.1f} images/s at best")
    return rates


if __name__ == "__main__":
    raise SystemExit(main())
