"""Options for a network by name and for its images, shared by the commands that export one."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline.cli.arguments import add_options, checked, given
from kd_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from kd_pipeline.models.input_adapter import InputAdapter
    from kd_pipeline.models.registry import ModelSettings

__all__ = [
    "NAMES",
    "add_input_adapter",
    "add_names",
    "add_weights",
    "given_names",
    "input_adapter",
    "model_plugins",
    "named_model",
    "refuse_weights",
]

NAMES = ("timm", "torchvision", "builtin", "factory")
"""Options that name a network."""
_WEIGHTS = ("checkpoint", "checkpoint_key", "pretrained", "num_classes")


def add_names(group: argparse._ActionsContainer) -> None:
    """Add the options that name a network."""
    from kd_pipeline.models.registry import ModelSettings

    add_options(group, ModelSettings, *NAMES)


def add_weights(group: argparse._ActionsContainer) -> None:
    """Add the options of a network by name: its weights, and its number of classes."""
    from kd_pipeline.models.registry import ModelSettings

    add_options(group, ModelSettings, *_WEIGHTS)


def add_input_adapter(group: argparse._ActionsContainer) -> None:
    """Add the options of an `InputAdapter`."""
    from kd_pipeline.models.input_adapter import InputAdapter

    add_options(group, InputAdapter, "mean", "std", "size", prefix="input_")
    add_options(group, InputAdapter, "from_mean", "from_std")


def given_names(parsed: argparse.Namespace, *others: str) -> list[str]:
    """Those of `others` and of `NAMES` that the command line gives."""
    return [name for name in (*others, *NAMES) if getattr(parsed, name) is not None]


def named_model(parsed: argparse.Namespace) -> "ModelSettings":
    """The network by name.

    Raises:
        ConfigError: its settings do not go together.
    """
    from kd_pipeline.models.registry import ModelSettings

    return checked(ModelSettings, **given(parsed, ModelSettings))


def model_plugins(parsed: argparse.Namespace) -> Sequence[str]:
    """The module of `--factory`: typing its name allows it to run."""
    return [] if parsed.factory is None else [str(parsed.factory).partition(":")[0]]


def refuse_weights(parsed: argparse.Namespace, path: Path) -> None:
    """Raise a ConfigError if an option of `add_weights` is given along with the model `path`, which has its own."""
    for name in _WEIGHTS:
        if getattr(parsed, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} is for a model by name; the weights of {path} are in it")


def input_adapter(parsed: argparse.Namespace) -> "InputAdapter | None":
    """What the options say about the images; None if they say nothing.

    Raises:
        ConfigError: mean or std is missing, or wrong.
    """
    from kd_pipeline.models.input_adapter import InputAdapter

    values, source = given(parsed, InputAdapter, prefix="input_"), given(parsed, InputAdapter)
    if not values:
        if source:
            raise ConfigError("--from-mean and --from-std go with --input-mean and --input-std; give those too")
        return None
    if ("mean" in values) != ("std" in values):
        raise ConfigError("--input-mean and --input-std belong together; give both, three numbers each, or one if gray")
    if "mean" not in values:  # only resize
        values |= {"mean": source.get("from_mean", IMAGENET_MEAN), "std": source.get("from_std", IMAGENET_STD)}
    options = {name: f"input-{name}" for name in ("mean", "std", "size")}
    return checked(InputAdapter, options, **values, **source)
