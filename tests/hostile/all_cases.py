"""All hostile files."""

from pathlib import Path

import kd_pipeline.workflows._train  # noqa: F401  # imported once, before the forks
from tests.hostile import commands, data, models, recordings, settings, shards, weights
from tests.hostile.cases import Case


def cases(good: Path) -> list[Case]:
    """The cases; `good` has the files of `prepare`."""
    return [
        case for kind in (weights, data, shards, settings, recordings, models, commands) for case in kind.cases(good)
    ]
