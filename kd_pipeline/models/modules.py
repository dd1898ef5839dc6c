"""Helpers for any `nn.Module`: layer names, eval mode, a frozen copy, outputs by name."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.suggestions import first_few
from kd_pipeline.errors import TeacherError

__all__ = [
    "call_network",
    "deployed_network",
    "eval_mode",
    "frozen_copy",
    "inner_teacher",
    "is_channels_last",
    "is_in_layer",
    "mappings_in",
    "named_outputs",
    "trial_inputs",
    "zero_images",
]

_CACHE = "past_key_values"
"""What decoders of Hugging Face return to generate the next token."""
_PIXEL_LOGITS = "out"
"""Name of the logits of the pixels in torchvision's networks for segmentation."""


def is_in_layer(name: str, layer: str) -> bool:
    """Whether `name`, of a parameter, buffer or module, is `layer` or inside it."""
    return f"{name}.".startswith(f"{layer}.")


def is_channels_last(module: nn.Module) -> bool:
    """Whether the convolutions of `module` have their weights in channels-last order, as `module.to` makes them."""
    return any(
        # Weights of 1x1 are in both orders.
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in module.parameters()
    )


def call_network(network: Callable[..., Any], inputs: Tensor | Mapping[str, Tensor]) -> Any:
    """What a network, or a teacher, returns for its only input, or for several inputs by name.

    A network takes several as keywords, as those of Hugging Face do; a `Teacher` takes the mapping.
    """
    if isinstance(inputs, Tensor) or not isinstance(network, nn.Module):
        return network(inputs)
    return network(**inputs)


@contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Put every module of a network into eval mode, and restore each one's mode afterward; anything else has none."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def zero_images(image_shape: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of two rows for a dry run of a network: images `[2, *image_shape]` of zeros in float32, on the CPU."""
    return {"images": torch.zeros(2, *image_shape)}


def trial_inputs(module: nn.Module, example: Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
    """What `call_network` calls `module` with in a dry run: the only input, or all of several by name.

    They are on the device of its weights, floating-point numbers in their dtype; indices and masks keep theirs.
    """
    like = next(module.parameters(), torch.zeros(()))
    inputs = {
        name: each.to(like.device, like.dtype if each.is_floating_point() else each.dtype)
        for name, each in example.items()
    }
    return next(iter(inputs.values())) if len(inputs) == 1 else inputs


def deployed_network(module: nn.Module) -> nn.Module:
    """The network that is validated, averaged and exported: `module.student` if there is one, else `module`.

    A module with a submodule called `student`, and usually one called `teacher`, has a forward pass of its own and is
    trained as a whole.
    """
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else module


def inner_teacher(module: nn.Module) -> nn.Module | None:
    """The submodule `teacher` of a module that has one called `student` too; None without."""
    teacher = getattr(module, "teacher", None)
    return teacher if isinstance(teacher, nn.Module) and deployed_network(module) is not module else None


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` in eval mode, without gradients; `module` is unchanged.

    Raises:
        TeacherError: the module cannot be copied, or its weights have no values.
    """
    name = type(module).__qualname__
    if isinstance(module, torch.jit.ScriptModule):
        raise TeacherError(
            f"the teacher {name} is a TorchScript module, which cannot be copied; give the module that it was "
            "made of, or an ONNX file of it (TeacherSettings(onnx=...))"
        )
    tensors = (*module.named_parameters(), *module.named_buffers())
    if without := [key for key, tensor in tensors if tensor.is_meta or nn.parameter.is_lazy(tensor)]:
        raise TeacherError(
            f"the teacher {name} has weights without values ({first_few(without)}): they are on the meta device, or "
            "lazy; load them, or run the module once"
        )
    try:
        return copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as exc:
        raise TeacherError(f"the teacher {name} cannot be copied: {exc}") from exc


def named_outputs(
    output: object, *, vector: str = "logits", owner: str = "a teacher", or_losses: bool = False
) -> Mapping[str, Tensor]:
    """The return value of a module by name.

    - A tensor `[N, D]` is called `vector`, and any other, a map or tokens, `"spatial"`.
    - A mapping, such as a `ModelOutput` of Hugging Face, keeps its keys, but for those without a value. A tuple in it
      becomes `key.0`, `key.1` and so on; the mapping `features` gives its own names, and any other `key.name`. The map
      `out` of torchvision's networks for segmentation is called `"logits"`.
    - Of a tuple the first tensor is named as if it were alone, and the one at position i `output.i`; mappings in it
      give their names.

    The scalar `loss`, the mapping `losses` and the cache `past_key_values` are no outputs of the rows, and left out.

    Raises:
        TeacherError: it is something else, two have one name, or there are none, unless there are losses and that is
            enough by `or_losses`. `owner` is whose output it is, for the message.
    """
    named: dict[str, Tensor] = {}
    for name, value in _flat_outputs(output, vector, owner):
        if name in named:
            raise TeacherError(f"{owner} returns two outputs called {name!r}; rename one of them")
        named[name] = value
    if not named and not (or_losses and _has_losses(output)):
        raise TeacherError(f"{owner} returns tensors by name, got none")
    return named


def mappings_in(output: object) -> Iterator[Mapping[str, Any]]:
    """The mapping that a module returns, or those in the tuple that it returns."""
    if (fields := _fields(output)) is not None:
        yield fields
    elif isinstance(output, tuple | list):
        for each in output:
            if (fields := _fields(each)) is not None:
                yield fields


def _has_losses(output: object) -> bool:
    return any(_is_loss(key, value) for each in mappings_in(output) for key, value in each.items())


def _flat_outputs(output: object, vector: str, owner: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield vector if output.ndim == 2 else "spatial", output
    elif (fields := _fields(output)) is not None:
        for key, value in fields.items():
            if not isinstance(key, str):
                raise TeacherError(f"{owner} returns tensors by name, got {type(value).__qualname__} for {key!r}")
            if key == _PIXEL_LOGITS and "logits" not in fields and isinstance(value, Tensor) and value.ndim == 4:
                yield "logits", value
            elif not _is_loss(key, value) and key != _CACHE:
                yield from _flat("" if key == "features" and _fields(value) is not None else key, value, owner)
    elif isinstance(output, tuple | list):
        is_first = True
        for number, value in enumerate(output):
            if isinstance(value, Tensor) and is_first:
                is_first = False
                yield from _flat_outputs(value, vector, owner)
            elif _fields(value) is not None:
                yield from _flat_outputs(value, vector, owner)
            else:
                yield from _flat(f"output.{number}", value, owner)
    else:
        raise TeacherError(
            f"{owner} returns a tensor, a tuple, or a mapping of tensors by name, got {type(output).__qualname__}; "
            "wrap the module to return one"
        )


def _flat(name: str, value: object, owner: str) -> Iterator[tuple[str, Tensor]]:
    """A value of a mapping or tuple with all in it, by name."""
    inside = _fields(value)
    if inside is None and isinstance(value, tuple | list):
        inside = {str(number): each for number, each in enumerate(value)}
    if inside is not None:
        for key, each in inside.items():
            yield from _flat(f"{name}.{key}" if name else str(key), each, owner)
    elif isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        raise TeacherError(
            f"{owner} returns tensors by name, got {type(value).__qualname__} for {name!r}; leave it out, or return a "
            "tensor, or tensors in a tuple or mapping"
        )


def _fields(value: object) -> Mapping[str, Any] | None:
    """What has values by name as a mapping, a named tuple too; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields: Mapping[str, Any] = value._asdict()
        return fields
    return None


def _is_loss(key: str, value: object) -> bool:
    return (key == "losses" and value is not None) or (key == "loss" and isinstance(value, Tensor) and value.ndim == 0)
