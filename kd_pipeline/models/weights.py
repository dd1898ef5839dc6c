"""Find the weights of a network in a checkpoint, by name, and load them."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline._core.suggestions import first_few, suggest
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.models.matching import Match, find_matches, is_companion, is_counter, part_of
from kd_pipeline.models.modules import is_in_layer

__all__ = ["Checkpoint", "Choice", "choose_set", "lacks_only", "load_weights", "match_weights"]

_logger = logging.getLogger("kd_pipeline")

_MAX_DEPTH = 4
"""How deep weights may be in the file: `callbacks`, the callback's name, `ema`, `state_dict`."""
_MAX_ENTRIES, _MAX_SETS, _MAX_NAME = 1_000_000, 10_000, 1_000
"""Entries of mappings to look at, sets of tensors, and characters of a name. A mapping may be in the file once, and
in others at many places."""
_SAVE = 'torch.save(model.state_dict(), "weights.pt")'
_AVERAGE = re.compile(r"(^|[._])(?i:ema|swa|averaged?|average_model|avg_model|shadow)([._]|$)|EMA")
"""Marks the key or prefix of averaged weights."""
_PAIRS = (("student", "teacher"), ("online", "target"), ("encoder_q", "encoder_k"))
"""Prefixes of two networks in one module: the one that was trained, and the one that it learned from."""


class Choice(NamedTuple):
    """The weights of a network, out of those in a file."""

    match: Match
    remarks: tuple[tuple[int, str], ...] = ()
    """What the user should know about the choice: levels of logging, and sentences."""


class Checkpoint:
    """The sets of weights in a file."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, or there are no weights in it.
            MissingPackageError: it needs safetensors, which is not installed.
        """
        self.path = path
        content = read_checkpoint(path)
        self.sets: dict[str, dict[str, Tensor]] = {}
        for number, (key, tensors) in enumerate(_find_sets(content, iter(range(_MAX_ENTRIES)))):
            if number == _MAX_SETS:
                raise ConfigError(
                    f"{path} holds more than {_MAX_SETS} sets of tensors; save the weights alone: {_SAVE}"
                )
            self.sets[key] = tensors
        self._averages = {key for key in self.sets if _is_average(key, content)}
        self.architecture = content.get("arch") if isinstance(content, Mapping) else None
        if not self.sets:
            found = f"a {type(content).__name__}"
            if isinstance(content, Mapping):
                names = [printable(f"{key!s:.40}") for key in content]
                found = f"a mapping of {first_few(names)}" if names else "an empty mapping"
            raise ConfigError(f"{path} holds {found}, and no state dict; write one with {_SAVE}")

    def is_average(self, match: Match) -> bool:
        """Whether these weights are averages of those of several steps."""
        return match.key in self._averages or _AVERAGE.search(match.prefix) is not None


def match_weights(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    key: str | None = None,
    reset: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Choice:
    """Choose the weights of `model`: by name only, never by order.

    A prefix of the names is removed if all of the model's names then fit. Of raw and averaged weights (EMA) that fit,
    the averaged ones are chosen, and of a student and its teacher in one module the student; a remark says so.

    Args:
        checkpoint: the file.
        model: the network.
        key: which weights to use; None chooses.
        reset: layers of the model that take no weights from the file.
        without: layers that take none either, and that the model need not have: those of a head.

    Raises:
        ConfigError: no weights have such a key, or several sets fit and none is the obvious one.
    """
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in reset:
        if not any(is_in_layer(name, layer) for name in own):
            names = (name for name, _ in model.named_modules() if name)
            raise ConfigError(
                f"reset: {type(model).__qualname__} has no weights in a layer {layer!r}{suggest(layer, names)}"
            )
    left_out = (*reset, *without)
    found = [
        match for set_key, tensors in checkpoint.sets.items() for match in find_matches(set_key, tensors, own, left_out)
    ]
    if key is not None:
        found = _with_key(checkpoint, found, key)
    complete = [match for match in found if match.has_all_names]
    fitting = [match for match in complete if not match.reshaped] or complete
    if not fitting:
        return Choice(min(found, key=lambda match: _distance(match, checkpoint)))
    choice = _choose(checkpoint, fitting, is_asked=key is not None)
    if key is not None or checkpoint.is_average(choice.match):
        return choice
    unused = (match for match in found if checkpoint.is_average(match) and len(match.missing) < len(own) / 2)
    remarks = (
        f"{checkpoint.path}: the averaged weights (EMA) in {match.name} are not used: {_differences(match)}"
        for match in unused
    )
    return Choice(choice.match, (*choice.remarks, *((logging.WARNING, text) for text in remarks)))


def choose_set(checkpoint: Checkpoint, fitting: list[Match], *, key: str | None) -> Choice:
    """The weights under `key`, or the obvious ones, of several that fit.

    Raises:
        ConfigError: none have such a key, or none are the obvious ones.
    """
    found = fitting if key is None else _with_key(checkpoint, fitting, key)
    return _choose(checkpoint, found, is_asked=key is not None)


def load_weights(
    checkpoint: Checkpoint, model: nn.Module, choice: Choice, *, keep_classes: str, head: Sequence[str] = ()
) -> None:
    """Copy the chosen weights into `model`. Counters that the file lacks, and layers that are reset, stay as is.

    Args:
        checkpoint: the file.
        model: the network.
        choice: its weights in the file.
        keep_classes: end of the message about another number of classes, about how to keep those of the file.
        head: the layers of the model that `num_classes: 0` leaves out, for the message about a file without them.

    Raises:
        ConfigError: the weights do not fit, or are not numbers.
    """
    name, match = type(model).__qualname__, choice.match
    for level, remark in choice.remarks:
        _logger.log(level, "%s", remark)
    if not match.fits:
        raise ConfigError(
            f"{checkpoint.path} does not fit {name}: {_differences(match)}. "
            f"{_cause(checkpoint, model, match, keep_classes, head)}"
        )
    own = model.state_dict()
    parameters = dict(model.named_parameters())
    try:
        for key, tensor in match.found.items():
            if tensor.is_floating_point() != own[key].is_floating_point():
                raise ConfigError(
                    f"{checkpoint.path} does not fit {name}: {key} is {tensor.dtype} in the file and {own[key].dtype} "
                    "in the model; save the weights before they are quantized"
                )
            if key in parameters and tensor.isnan().any():
                raise ConfigError(
                    f"{checkpoint.path} is of a training that diverged: {key} is not a number; use an "
                    "earlier checkpoint"
                )
        model.load_state_dict(own | dict(match.found))
    except RuntimeError as exc:  # tensors of kinds that cannot be copied, such as parts of a sharded one
        line = str(exc).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"{checkpoint.path} cannot be copied into {name}: {line}; save whole, dense weights with {_SAVE}"
        ) from exc
    _report_rest(checkpoint.path, name, match, [key for key in own if is_counter(key) and key not in match.found])


def lacks_only(match: Match, layers: Sequence[str]) -> bool:
    """Whether weights of the model are missing in the file, all of them in `layers`, and nothing else differs."""
    is_of_layers = (any(is_in_layer(name, layer) for layer in layers) for name in match.missing)
    return bool(match.missing) and all(is_of_layers) and not match.unexpected and not match.reshaped


def _distance(match: Match, checkpoint: Checkpoint) -> tuple[int, int, bool]:
    """How far weights are from fitting; of raw and averaged ones that are as far, the averaged ones come first."""
    is_raw = not checkpoint.is_average(match)
    return len(match.missing) + len(match.reshaped), len(match.unexpected), is_raw


def _differences(match: Match) -> str:
    shapes = [f"{name} {file} in the file, {own} in the model" for name, (file, own) in match.reshaped.items()]
    kinds = {"missing": match.missing, "unexpected": match.unexpected, "of a different shape": shapes}
    return "; ".join(f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds.items() if names)


def _cause(checkpoint: Checkpoint, model: nn.Module, match: Match, keep_classes: str, head: Sequence[str]) -> str:
    """The likely reason, and what to do."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in [*match.missing, *match.reshaped]))
    names = (f'"{name}"' if re.fullmatch(r"[\d.]+", name) else name for name in layers)  # no numbers in YAML
    listed = f"reset: [{', '.join(names)}]"
    if classes := match.num_classes:
        return (
            f"The file has {classes[0]} classes and the model {classes[1]}: to train a new classifier, set {listed}"
            f"{keep_classes.format(classes[0])}"
        )
    if size := _image_size(model, match):
        return f"The file is for images of {size[1]} pixels: set kwargs: {{{size[0]}: {size[1]}}}"
    if [len(file) == 4 and file[1] != own[1] == 3 for file, own in match.reshaped.values()] == [True]:
        return "The file is for images of another number of channels, and images here have 3; give weights for those"
    if lacks_only(match, head):
        return f"The file has no head: to use the network without one, set num_classes: 0; to train one, set {listed}"
    if len(layers) == 1 and not match.unexpected and not match.reshaped:
        return f"To train the missing layer, set {listed}"
    says = checkpoint.architecture
    which = f"The file says that it is of {says}; is" if isinstance(says, str) else "Is"
    return (
        f"{which} it the checkpoint of another model, or of other kwargs? Name layers that should keep their random "
        "initialization in reset"
    )


def _image_size(model: nn.Module, match: Match) -> tuple[str, int] | None:
    """The argument of a vision transformer and the value with which it has as many positions as the file."""
    own_size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    if own_size is None or any(re.search(r"pos_embed", name) is None for name in match.reshaped):
        return None
    for file, own in match.reshaped.values():
        for extra in (0, 1, 2):  # tokens that are no part of the image
            sides = [math.isqrt(max(shape[1] - extra, 0)) for shape in (file, own)] if len(file) == 3 else []
            if sides and [side**2 + extra for side in sides] == [file[1], own[1]]:
                pixels = own_size if isinstance(own_size, int) else own_size[0]
                return "image_size" if isinstance(own_size, int) else "img_size", pixels * sides[0] // sides[1]
    return None


def _report_rest(path: Path, model: str, match: Match, untouched: Sequence[str]) -> None:
    """One line about what was left alone on either side."""
    parts = Counter(part_of(name) for name in match.ignored)
    notes = []
    if parts:
        names = first_few([f"{part} ({number})" for part, number in parts.items()])
        notes.append(f"ignored {len(match.ignored)} tensors that are no part of {model}: {names}")
    if untouched:
        names = first_few(list(dict.fromkeys(part_of(name) for name in untouched)))
        notes.append(f"it has no {names}, which hold no weights")
    if notes:
        known = all(is_counter(name) or is_companion(name) for name in parts)
        _logger.log(logging.INFO if known else logging.WARNING, "%s: %s", path, "; ".join(notes))


def _find_sets(
    content: Any, entries: Iterator[int], key: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors in the file, by its keys with dots, in as many entries as `entries` has."""
    if not isinstance(content, Mapping):
        return
    named = {
        name: value
        for (name, value), _ in zip(content.items(), entries, strict=False)
        if isinstance(name, str) and len(name) <= _MAX_NAME
    }
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    if depth < _MAX_DEPTH:
        for name, value in named.items():
            if not name.startswith(("optimizer", "lr_scheduler")):
                yield from _find_sets(value, entries, f"{key}.{name}".removeprefix("."), depth + 1)


def _is_average(key: str, content: Any) -> bool:
    """Whether the weights under `key` are averaged, by the habits of the trainer that wrote the file."""
    if isinstance(content, Mapping):
        meta = content.get("meta")
        from_lightning = {"current_model_state", "averaging_state"} <= content.keys()
        from_openmmlab = "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)
        if from_lightning or (from_openmmlab and "ema_state_dict" in content):
            return key == "state_dict"  # they put the average there, and the raw weights in a key of their own
        if key == "teacher" and "student" in content:
            return True  # as in DINO
    return _AVERAGE.search(key) is not None


def _with_key(checkpoint: Checkpoint, matches: list[Match], key: str) -> list[Match]:
    found = (
        [match for match in matches if match.name == key]
        or [match for match in matches if (match.key or ".") == key]
        or [match for match in matches if match.name.startswith(f"{key}.")]
    )
    if not found:
        known = dict.fromkeys([*(match.key or "." for match in matches), *(match.name for match in matches)])
        raise ConfigError(f"checkpoint_key: {checkpoint.path} has no weights {key!r}{suggest(key, known)}")
    return found


def _choose(checkpoint: Checkpoint, fitting: list[Match], *, is_asked: bool) -> Choice:
    """One of several sets of weights that fit."""
    distinct: list[Match] = []
    for match in fitting:
        if not any(_same(match, other) for other in distinct):
            distinct.append(match)
    trained = [match for match in distinct if not _is_teacher(match, distinct)]
    chosen = [match for match in trained if checkpoint.is_average(match)] or trained
    by_key = len({match.key for match in distinct}) == len(distinct)
    names = {id(match): (match.key or ".") if by_key else match.name for match in distinct}
    if len(chosen) != 1:
        raise ConfigError(
            f"{checkpoint.path} holds {len(distinct)} sets of weights that fit: {first_few([*names.values()])}; set "
            "checkpoint_key to one"
        )
    used = names.pop(id(chosen[0]))
    if not names:
        return Choice(chosen[0])
    kind = "the averaged weights (EMA)" if checkpoint.is_average(chosen[0]) else "the network that was trained"
    remark = (
        f"{checkpoint.path} holds {len(distinct)} sets of weights: using {used}, {kind}; for "
        f"{'the other' if len(names) == 1 else 'another'} set checkpoint_key: {' or '.join(names.values())}"
    )
    return Choice(chosen[0], ((logging.INFO if is_asked else logging.WARNING, remark),))


def _same(first: Match, second: Match) -> bool:
    """Whether both are the same tensors: one network that is in the file under two names."""
    return all(
        tensor.shape == other.shape and torch.equal(tensor, other)
        for name, tensor in first.found.items()
        if (other := second.found.get(name)) is not None
    )


def _is_teacher(match: Match, matches: Sequence[Match]) -> bool:
    """Whether it is the second network of a module whose first one is there too."""
    return any(
        re.sub(rf"\b{teacher}\b", student, match.prefix) == other.prefix
        for student, teacher in _PAIRS
        if re.search(rf"\b{teacher}\b", match.prefix)
        for other in matches
        if other.key == match.key
    )
