"""What a teacher gets, known from the shape of an image or from an example of its inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError

__all__ = ["has_free_sizes", "input_name", "input_specs", "some_sizes", "trial_rows"]

_UNKNOWN_IMAGE_SIZE = 224
"""Height and width of the images for a check, if nobody knows them."""
_UNKNOWN_SIZE = 32
"""The same for a size of any other input, such as the length of a sequence."""


def input_specs(
    shape: Sequence[int | None] | None, dtype: torch.dtype, example: Mapping[str, Tensor] | None
) -> dict[str, TensorSpec]:
    """What the inputs of a teacher look like, by name.

    Images `[N, C, H, W]` and vectors `[N, D]` as the only input have the sizes of the example. Any other inputs, such
    as sequences with their masks, have free sizes, as the length of a sequence is another in each batch. `shape` says
    it for an only input of either kind.

    Args:
        shape: the sizes of one row of the only input, None for a free one.
        dtype: of the only input, without an example.
        example: inputs by name.

    Raises:
        ConfigError: both are missing, or do not fit.
    """
    if example is None:
        if shape is None:
            raise ConfigError("a network needs to know its inputs; pass image_shape=(3, H, W), or example={name: rows}")
        spec = TensorSpec((None, *shape), dtype)
        return {input_name(spec): spec}
    if not example or any(not tensor.ndim or not len(tensor) for tensor in example.values()):
        raise ConfigError("an example has tensors [N, ...] by name with at least one row each")
    if shape is not None:
        name, tensor = next(iter(example.items()))
        spec = TensorSpec((None, *shape), tensor.dtype)
        if len(example) > 1 or not spec.accepts(tuple(tensor.shape), tensor.dtype):
            found = ", ".join(f"{name} {list(each.shape)}" for name, each in example.items())
            raise ConfigError(f"image_shape {list(shape)} does not fit the example {found}; leave one of them out")
        return {name: spec}
    tensors = list(example.values())
    is_fixed = len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].ndim in (2, 4)
    return {
        name: TensorSpec((None, *(tensor.shape[1:] if is_fixed else [None] * (tensor.ndim - 1))), tensor.dtype)
        for name, tensor in example.items()
    }


def input_name(spec: TensorSpec) -> str:
    """The name of an only input that has no other."""
    return "images" if len(spec.shape) == 4 else "input"


def has_free_sizes(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a size other than the number of rows is free."""
    return any(None in spec.shape[1:] for spec in specs.values())


def trial_rows(specs: Mapping[str, TensorSpec], example: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Two rows for a trial: the first ones of the example, or zeros."""
    if example is not None:
        return {name: tensor[[0, min(1, len(tensor) - 1)]] for name, tensor in example.items()}
    return {name: torch.zeros(2, *some_sizes(spec), dtype=spec.dtype) for name, spec in specs.items()}


def some_sizes(spec: TensorSpec) -> tuple[int, ...]:
    """Sizes of one row that fit `spec`; of images 3 channels, if they are free."""
    sizes = spec.shape[1:]
    if len(sizes) == 3:
        return sizes[0] or 3, sizes[1] or _UNKNOWN_IMAGE_SIZE, sizes[2] or _UNKNOWN_IMAGE_SIZE
    return tuple(size or _UNKNOWN_SIZE for size in sizes)
