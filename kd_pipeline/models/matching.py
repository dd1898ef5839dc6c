"""Compare a set of named tensors with a network, by name."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kd_pipeline.models.modules import is_in_layer

__all__ = ["Match", "find_matches", "is_companion", "is_counter", "part_of"]

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names, at any depth."""
_HEADS = ("head.", "cls_head.", "classifier.")
"""Where OpenMMLab and others keep the classifier, beside `backbone.`."""
_COUNTERS = frozenset({
    "num_batches_tracked", "n_averaged", "steps", "total_ops", "total_params", "relative_position_index",
    "relative_coords_table", "attn_mask", "position_ids",
})  # fmt: skip
"""Last parts of names of buffers that no weights are in: counts, and constants that the network makes itself."""
_COMPANIONS = re.compile(
    r"(\w*_)?(criterion|criterions|criteria|loss|losses|metrics?|acc|accuracy|ema|teacher|student|projectors?|"
    r"distillation|mixup|ce|kl|kd)(_\w+)?|(train|val|valid|test)_\w+|(loss|criterion|aux)\w*",
    re.IGNORECASE,
)
"""First parts of names that training keeps beside a network, and that are no part of it."""


@dataclass(frozen=True, slots=True)
class Match:
    """One set of weights in a file, compared with a network by the names of its tensors."""

    key: str
    """Where in the file the set is, as keys with dots; empty for the whole file."""
    prefix: str
    """What the names in the file start with."""
    found: Mapping[str, Tensor]
    """By the network's names."""
    missing: tuple[str, ...]
    """Names of the network that the file lacks."""
    unexpected: tuple[str, ...]
    """Names in the file, among the network's, that the network lacks."""
    reshaped: Mapping[str, tuple[list[int], list[int]]]
    """Shape in the file and in the network, where they differ."""
    ignored: tuple[str, ...]
    """Names in the file that are no part of the network."""

    @property
    def name(self) -> str:
        """Key and prefix."""
        return f"{self.key}.{self.prefix}".strip(".") or "."

    @property
    def has_all_names(self) -> bool:
        """Whether the names are the network's, whatever the shapes."""
        return not self.missing and not self.unexpected

    @property
    def fits(self) -> bool:
        """Whether names and shapes are the network's."""
        return self.has_all_names and not self.reshaped

    @property
    def num_classes(self) -> tuple[int, int] | None:
        """Classes in the file and in the network, if the classifier is all that differs; else None."""
        pairs = {(tuple(file[:1]), tuple(own[:1])) for file, own in self.reshaped.values()}
        rest_is_equal = all(file and file[1:] == own[1:] for file, own in self.reshaped.values())
        is_layer = any(name.endswith("bias") or len(shapes[0]) > 1 for name, shapes in self.reshaped.items())
        if not self.has_all_names or len(pairs) != 1 or not rest_is_equal or not is_layer:
            return None
        ((file,), (own,)) = pairs.pop()
        return file, own


def find_matches(
    key: str, tensors: dict[str, Tensor], own: Mapping[str, list[int]], reset: Sequence[str]
) -> Iterator[Match]:
    """The set compared with the network, for every prefix that some of its names have."""
    if not any(_WRAPPERS.search(name) for name in own):
        tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    votes = Counter(
        name[:start]
        for name in tensors
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in own
    )
    most = max(votes.values(), default=0)
    for prefix in [prefix for prefix, number in votes.items() if number >= most / 2] or [""]:
        yield _compare(key, prefix, tensors, own, reset)


def _compare(
    key: str,
    prefix: str,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, list[int]],
    reset: Sequence[str],
) -> Match:
    def is_reset(name: str) -> bool:
        return any(is_in_layer(name, layer) for layer in reset)

    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    # A head without outputs, as of torchvision with num_classes=0, is none.
    inside = {name: tensor for name, tensor in inside.items() if tensor.numel() or list(tensor.shape) == own.get(name)}
    found = {name: inside[name] for name in own if name in inside and not is_reset(name)}
    wanted = [name for name in own if name not in found and not is_reset(name) and not is_counter(name)]
    head = _head(prefix, tensors, wanted)
    found |= {name: tensors[head + name] for name in wanted if head is not None}
    parts = {name.partition(".")[0] for name in own}
    unexpected: list[str] = []
    ignored: list[str] = []
    for name in tensors:
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix):
            if head is None or name.removeprefix(head) not in wanted:
                ignored.append(name)
        elif rest not in own and not is_reset(rest):
            part = rest.partition(".")[0]
            harmless = is_counter(rest) or (part not in parts and is_companion(part))
            (ignored if harmless else unexpected).append(rest)
    return Match(
        key,
        prefix,
        found,
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(unexpected),
        reshaped={
            name: (list(tensor.shape), own[name]) for name, tensor in found.items() if list(tensor.shape) != own[name]
        },
        ignored=tuple(ignored),
    )


def _head(prefix: str, tensors: Collection[str], wanted: Sequence[str]) -> str | None:
    """The prefix of the classifier, if the file keeps it beside the rest of the network."""
    outer = re.sub(r"\w+\.$", "", prefix)
    if not prefix or not wanted:
        return None
    heads = (f"{outer}{head}" for head in _HEADS if f"{outer}{head}" != prefix)
    return next((head for head in heads if all(head + name in tensors for name in wanted)), None)


def is_counter(name: str) -> bool:
    """Whether a tensor of this name holds no weights."""
    return name.rpartition(".")[2] in _COUNTERS


def part_of(name: str) -> str:
    """The last part of the name of a counter, the first of any other."""
    return name.rpartition(".")[2] if is_counter(name) else name.partition(".")[0]


def is_companion(part: str) -> bool:
    """Whether names that start with this part are of what training keeps beside a network."""
    return _COMPANIONS.fullmatch(part) is not None
