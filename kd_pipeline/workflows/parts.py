"""Objects of the user's that take the place of parts of a config, and what a checkpoint says about them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import AnyTeacherSettings, EnsembleSettings, TeacherGroupSettings, TeacherSettings

__all__ = ["Loss", "Parts", "Validate", "qualified_name"]

Loss = Distillation | Callable[[Any, KDBatch], Tensor]
"""A built `Distillation`, or a function of what the student returns and the batch: the whole loss, a scalar, the mean
over the valid rows."""
Validate = Callable[[nn.Module, Mapping[str, Any]], Mapping[str, float]]
"""A function of the student, in eval mode and without gradients, and the loaders of the validation sets by name. It
returns numbers by name: `wer` is logged as `val/wer`, and a name with a `/`, such as `speech/wer`, as it is."""

_SETTINGS = (TeacherSettings, EnsembleSettings, TeacherGroupSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The objects that `train` was called with; None for what the config has."""

    student: nn.Module | None = None
    teacher: Teacher | nn.Module | Recording | AnyTeacherSettings | None = None
    train_batches: Any = None
    """A loader of this library, any iterable of batches, or a Lightning data module."""
    validation: Any = None
    """The same, or a mapping of names to such."""
    distillation: Loss | None = None
    validate: Validate | None = None
    optimizer: Any = None
    """An optimizer, or with its scheduler, or a function that makes either of a module."""
    callbacks: tuple[Any, ...] = ()
    loggers: tuple[Any, ...] = ()

    def in_config(self, config: Config) -> Config:
        """`config` with the teacher that is given as settings; checks that nothing is given twice, and the types.

        Raises:
            ConfigError: an object is of the wrong kind, is also in the config, or does not go with the stage.
        """
        self._check_kinds()
        self._check_stage(config)
        for name in ("student", "teacher"):
            if getattr(self, name) is not None and getattr(config, name) is not None:
                raise ConfigError(f"two {name}s: the argument {name} and {name} in the config; leave out one of them")
        if isinstance(self.teacher, _SETTINGS):
            return config.model_copy(update={"teacher": self.teacher})
        return config

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about the objects: their classes, and the architectures of networks."""
        found: dict[str, Any] = {}
        for name in ("student", "distillation", "optimizer", "validate"):
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                found[name] = {"class": qualified_name(part), "tensors": _architecture(part)}
            elif isinstance(part, tuple):
                found[name] = {"class": ", ".join(map(qualified_name, part))}
            elif part is not None:
                found[name] = {"class": qualified_name(part)}
        return found

    @property
    def unchecked(self) -> list[str]:
        """What a run that resumes cannot know of the objects."""
        found = []
        names = ("student", "teacher", "distillation", "validate", "optimizer")
        if given := [name for name in names if callable(getattr(self, name))]:
            found.append(f"the code of {', '.join(given)}")
        if given := [f"the settings of {name}" for name in ("callbacks", "loggers") if getattr(self, name)]:
            found.append(", ".join(given))
        return found

    def _check_kinds(self) -> None:
        for name, kinds, wanted in _KINDS:
            part = getattr(self, name)
            if part is not None and not isinstance(part, kinds):
                raise ConfigError(f"{name} should be {wanted}, got {_shown(part)}")
        for name in ("distillation", "validate"):
            part = getattr(self, name)
            if part is not None and not callable(part):
                raise ConfigError(f"{name} should be a function or a callable object, got {_shown(part)}")
        check_optimizer(self.optimizer)

    def _check_stage(self, config: Config) -> None:
        if config.stage in ("teacher", "all"):
            names = ("student", "teacher", "train_batches", "validation", "distillation", "optimizer")
            if given := [name for name in names if getattr(self, name) is not None]:
                raise ConfigError(
                    f"stage: {config.stage} trains the network of teacher.model on the images of the config, and got "
                    f"{', '.join(given)}; to train a network of your own on labels, pass it as student with "
                    "stage: baseline, and then as teacher with stage: distill"
                )
        if config.train.strategy == "fsdp":
            if isinstance(self.distillation, nn.Module) and any(True for _ in self.distillation.parameters()):
                raise ConfigError(
                    "train.strategy: fsdp shards the projectors of the loss, and distillation is an object with "
                    "parameters; use strategy: ddp, or describe the loss in config.distill"
                )
            if isinstance(self.optimizer, Optimizer | tuple):
                raise ConfigError(
                    "train.strategy: fsdp makes new parameters, which an optimizer that exists does not have; pass a "
                    "function: lambda module: torch.optim.SGD(module.parameters(), lr=0.1)"
                )
        if config.stage == "baseline" and self.teacher is not None:
            raise ConfigError(
                "stage: baseline trains without a teacher, and got one; leave it out, or set another stage"
            )


def qualified_name(part: Any) -> str:
    """The class of an object, or the name of a function or class, with its module."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def check_optimizer(optimizer: Any) -> None:
    """Check that this is an optimizer, with a scheduler or without, or a function.

    Raises:
        ConfigError: it is neither.
    """
    is_pair = isinstance(optimizer, tuple) and len(optimizer) == 2 and hasattr(optimizer[1], "step")
    alone = optimizer[0] if is_pair else optimizer
    if isinstance(alone, type):
        raise ConfigError(
            f"optimizer is the class {alone.__qualname__}; pass a function that makes one: lambda module: "
            f"{alone.__qualname__}(module.parameters(), lr=0.1)"
        )
    if alone is None or isinstance(alone, Optimizer) or (callable(alone) and not is_pair):
        return
    raise ConfigError(
        "optimizer should be a torch optimizer, a pair (optimizer, scheduler), or a function that makes either of a "
        f"module, got {_shown(optimizer)}"
    )


_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("student", (nn.Module,), "an nn.Module; name a network of a library in the config"),
    (
        "teacher",
        (Teacher, nn.Module, Recording, *_SETTINGS),
        "a Teacher, an nn.Module, a Recording or settings such as TeacherSettings(onnx=...)",
    ),
)


def _architecture(network: nn.Module) -> str:
    """Digest of the names, shapes and dtypes of all tensors of a network; its code is not known."""
    digest = hashlib.sha256()
    for line in _tensor_lines(network):
        digest.update(line.encode())
    return digest.hexdigest()


def _tensor_lines(network: nn.Module) -> Iterator[str]:
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, Tensor):
            yield f"{name} {list(tensor.shape)} {tensor.dtype}\n"


def _shown(part: Any) -> str:
    text = repr(part) if isinstance(part, str | int | float | bool) else ""
    return f"{type(part).__qualname__}{f' {text[:60]}' if text else ''}"
