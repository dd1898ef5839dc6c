"""Weights of a file that are not the network's by name and shape: by order, as far as they fit, of other channels."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from kd_pipeline._core.suggestions import first_few
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.checkpoints import keeps_order
from kd_pipeline.models.matching import Match, is_counter
from kd_pipeline.models.weights import Checkpoint, Choice, choose_set

__all__ = ["as_far_as_they_fit", "match_in_order", "with_input_channels"]

_RGB = 3


def match_in_order(checkpoint: Checkpoint, model: nn.Module, *, key: str | None = None) -> Choice:
    """Choose the weights of `model` by their order, whatever their names: as many tensors, of the same shapes.

    Args:
        checkpoint: the file; not of safetensors, which sorts its tensors.
        model: the network.
        key: which weights to use; None chooses.

    Raises:
        ConfigError: the file has no order, no such key, or no weights of these shapes; or several, and none is the
            obvious one.
    """
    if not keeps_order(checkpoint.path):
        raise ConfigError(
            f"checkpoint_match: order needs the order of the layers, and {checkpoint.path} is a file of safetensors, "
            "which sorts its tensors; use a file of torch.save, or match by name"
        )
    own = {name: tensor for name, tensor in model.state_dict().items() if not is_counter(name)}
    found = [_in_order(set_key, tensors, own) for set_key, tensors in checkpoint.sets.items()]
    fitting = [match for match in found if match.fits]
    if not fitting:
        best = min(found, key=lambda match: (len(match.missing) + len(match.unexpected), len(match.reshaped)))
        raise ConfigError(
            f"checkpoint_match: order: {checkpoint.path} does not fit {type(model).__qualname__}: "
            f"{_first_difference(best, own)}; match by name, or use the checkpoint of a network with the same layers"
        )
    return choose_set(checkpoint, fitting, key=key)


def as_far_as_they_fit(checkpoint: Checkpoint, choice: Choice, model: nn.Module) -> Choice:
    """The tensors of `choice` that have the name and the shape of one in `model`, with a warning about the others.

    Raises:
        ConfigError: there are none.
    """
    match = choice.match
    found = {name: tensor for name, tensor in match.found.items() if name not in match.reshaped}
    if not found:
        raise ConfigError(
            f"checkpoint_match: fitting: no tensor of {checkpoint.path} has the name and the shape of one of "
            f"{type(model).__qualname__}; it is the checkpoint of another network"
        )
    kept = [*match.missing, *match.reshaped]
    remark = (
        f"{checkpoint.path}: {len(found)} tensors fit {type(model).__qualname__}, and {len(kept)} of it keep their "
        f"initial values: {first_few(kept)}"
    )
    fitted = replace(
        match, found=found, missing=(), unexpected=(), reshaped={}, ignored=match.ignored + match.unexpected
    )
    return Choice(fitted, (*choice.remarks, (logging.WARNING, remark)))


def with_input_channels(checkpoint: Checkpoint, choice: Choice) -> Choice:
    """`choice` with the first convolution of an RGB network for images of another number of channels, as timm does it.

    For one channel it is the sum over the three: the network then sees gray images as it saw them in three channels.
    For more, the three are repeated, and scaled to the same sum. Anything else is returned as it is.
    """
    match = choice.match
    reshaped = {name: shapes for name, shapes in match.reshaped.items() if _is_first_layer(*shapes)}
    if len(reshaped) != 1 or len(match.reshaped) != 1:
        return choice
    ((name, (_, own)),) = reshaped.items()
    weight = match.found[name].float()
    if own[1] == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    else:
        repeats = -(-own[1] // _RGB)
        adapted = weight.repeat(1, repeats, 1, 1)[:, : own[1]] * (_RGB / own[1])
    remark = f"{checkpoint.path}: {name} of {_RGB} input channels was converted to {own[1]}"
    found = {**match.found, name: adapted.to(match.found[name].dtype)}
    return Choice(replace(match, found=found, reshaped={}), (*choice.remarks, (logging.INFO, remark)))


def _is_first_layer(file: list[int], own: list[int]) -> bool:
    """Whether two shapes are of a convolution of RGB images, and of one that differs in the input channels alone."""
    return len(file) == len(own) == 4 and file[1] == _RGB != own[1] and [file[0], *file[2:]] == [own[0], *own[2:]]


def _in_order(key: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Match:
    """The n-th tensor of a set as the n-th of a network."""
    names, given = list(own), [name for name in tensors if not is_counter(name)]
    found = {name: tensors[other] for name, other in zip(names, given, strict=False)}
    return Match(
        key,
        "",
        found,
        missing=tuple(names[len(given) :]),
        unexpected=tuple(given[len(names) :]),
        reshaped=dict(_reshaped(found, own)),
        ignored=(),
    )


def _reshaped(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            yield name, (list(tensor.shape), list(own[name].shape))


def _first_difference(match: Match, own: Mapping[str, Tensor]) -> str:
    if match.missing or match.unexpected:
        number = len(own) - len(match.missing) + len(match.unexpected)
        return f"it has {number} tensors, and the network {len(own)}"
    name, (file, shape) = next(iter(match.reshaped.items()))
    return f"tensor {list(own).index(name)} is {file} in the file, and {name} is {shape}"
