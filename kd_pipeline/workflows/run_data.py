"""The loaders of a run by split: those of its config, and the user's own."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.data.views import View
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.models.modules import zero_images
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.training.distributed import on_rank_zero
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.results import eval_transform_of, evaluation_split, transforms_for_evaluation
from kd_pipeline.workflows.stage import view_of

__all__ = ["RunData", "TrainingData"]


class TrainingData(Protocol):
    """What is known of the training data before a teacher is opened: of a `Source` or of a loader."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in label order."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes."""

    @property
    def fingerprint(self) -> str:
        """Digest of the data, as far as it is known."""


class _TrainLoader(KDDataLoader):
    """The loader of a run, which resumes with the changes that `check_resume` has applied."""

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Iterable[str] = ()) -> None:
        super().load_state_dict(state, allow=(*allow, "on_bad_sample"))


class RunData:
    """Opens the loaders of a run when they are needed, each once; leaving `stack` closes those that are not given.

    `training` is known at once: the source of the config, or the user's loader.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        run_dir: Path,
        stack: ExitStack,
        *,
        source: Source | None = None,
        shard: Shard | None = None,
        plugins: Collection[str] = (),
    ) -> None:
        """Open the training data, unless its `source` is open, and wrap the user's batches.

        Args:
            config: of the run.
            parts: objects of the user's.
            run_dir: where the loaders write to.
            stack: closes what is opened.
            source: of the training data.
            shard: the part of each epoch of the training; defaults to that of this process.
            plugins: modules that factories in the config may come from.

        Raises:
            ConfigError: there are no batches, or they are no batches.
            DataError: the images are not there.
        """
        self._config, self._run_dir, self._stack, self._plugins = config, run_dir, stack, plugins
        self._shard = shard
        self._loaders: dict[str, AnyLoader] = {}
        self._own = self._wrapped(parts)
        self.source: Source | None = None
        """That of the config for the training; None for batches of the user's own."""
        own_training = self._own.get("train")
        if own_training is None:
            self.source = source or open_source(config.data.split("train").source, plugins=plugins)
        self.own_training = own_training
        """The user's loader; its teacher may have to be set yet."""
        found = own_training or self.source
        assert found is not None
        self.training: TrainingData = found
        self.view = view_of(config, config.stage)
        """Of the images, that the network which is trained sees."""
        self.teacher_views: tuple[str, ...] = ()
        """Those that a teacher sees which runs on the images of all splits."""
        self.has_own_validation = parts.validation is not None or len(self._own) > 1

    @property
    def validated(self) -> tuple[str, ...]:
        """Names of the splits for validation during training."""
        if not self.has_own_validation:
            return self._config.data.validated
        return tuple(name for name in self._own if name not in ("train", "test"))

    @property
    def has_test(self) -> bool:
        """Whether there is a split that the exported network is evaluated on alone."""
        return "test" in self._own or self._config.data.test is not None

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits."""
        return ("train", *self.validated, *(["test"] if self.has_test else []))

    @property
    def labeled(self) -> list[str]:
        """Splits with labels."""
        found = [split for split in self.splits if split != "train" and self.loader(split).has_labels]
        own = self.own_training
        is_labeled = own.has_labels if own is not None else self.source is not None and self.source.labels is not None
        return ["train", *found] if is_labeled else found

    @property
    def masked(self) -> list[str]:
        """Splits for evaluation with masks."""
        return [split for split in self.splits if split != "train" and self.loader(split).has_masks]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the data of the splits for evaluation."""
        return {split: self.loader(split).fingerprint for split in self.splits if split != "train"}

    @property
    def resume_note(self) -> str | None:
        """What of the user's batches does not resume exactly; None if all does."""
        own = self.own_training
        if not isinstance(own, BatchLoader):
            return None
        batches, name = own.batches, type(own.batches).__qualname__
        if all(callable(getattr(batches, each, None)) for each in ("state_dict", "load_state_dict")):
            return f"train_batches ({name}) resumes from its own state_dict; what its batches hold is not checked"
        order = "its order is that of an uninterrupted run if it follows from torch's random state or from set_epoch"
        if getattr(batches, "generator", None) is not None:
            order = "its generator starts as it is now, so its order is not that of an uninterrupted run"
        return (
            f"train_batches ({name}) has no state_dict: {order}, within an epoch its first batches are read again and "
            "dropped, and what they hold is not checked"
        )

    @property
    def device(self) -> torch.device:
        """Where the batches of the training are."""
        return resolve_device(self._config.data.device) if self.own_training is None else self.own_training.device

    @property
    def batch_size(self) -> int:
        """Rows of a full batch of the training on this process."""
        return self._config.data.batch_size if self.own_training is None else self.own_training.batch_size

    @property
    def normalization(self) -> Normalization | None:
        """Of the images of the training; None for the user's own batches."""
        made = self._made_view("train", IMAGES)
        return None if made is None else Normalization(made.normalize.mean, made.normalize.std)

    def example(self) -> dict[str, Tensor]:
        """Inputs of two rows by name, for a trial run of the network that is trained, on the CPU."""
        return self.example_of("train", self.view)

    def example_of(self, split: str, view: str) -> dict[str, Tensor]:
        """Inputs of two rows of a view of a split by name, on the CPU.

        Raises:
            ConfigError: the split has no such view.
        """
        if split in self._own:
            return self._own[split].example(view)
        return zero_images(self._config.data.view(split, view).image_shape)

    def teacher_example(self, view: str, split: str = "train") -> dict[str, Tensor]:
        """The same in the dtype that a teacher gets."""
        made = self._made_view(split, view)
        dtype = None if made is None else getattr(torch, made.normalize.dtype)
        return {name: each.to(dtype or each.dtype) for name, each in self.example_of(split, view).items()}

    @property
    def _shown_views(self) -> set[str]:
        """What the batches have: the views of the network that is trained, or of all students, and the teacher's."""
        students = () if self._config.stage == "teacher" else self._config.student_views.values()
        return {self.view, *students, *self.teacher_views}

    def _made_view(self, split: str, view: str) -> View | None:
        """How a view is made; None for the user's own batches."""
        own = self._own.get(split)
        if own is None:
            return self._config.data.view(split, view)
        return own.all_views[view] if isinstance(own, KDDataLoader) else None

    @property
    def transform_of_export(self) -> EvalTransform | None:
        """The preprocessing of the images of the exported network; None if it is not known."""
        if self.own_training is None:
            return evaluation_split(self._config.data, self.view)[1]
        own = self.own_training
        return eval_transform_of(own.transform, own.all_views, self.view) if isinstance(own, KDDataLoader) else None

    def is_own(self, split: str) -> bool:
        """Whether a split is the user's."""
        return split in self._own

    def open_training(self, teacher: Teacher | Recording | None) -> AnyLoader:
        """The loader of the training with its teacher."""
        if self.own_training is None:
            return self._open("train", teacher)
        own = self.own_training
        if teacher is not None and own.teacher is None:
            if isinstance(own, KDDataLoader):
                own.attach_teacher(teacher)
            elif isinstance(teacher, Recording):
                raise ConfigError(
                    "a recording has outputs for the images of a KDDataLoader, and train_batches is none; "
                    "pass the teacher itself"
                )
            else:
                own.attach_teacher(teacher)
        return own

    def loader(self, split: str) -> AnyLoader:
        """The loader of a split, without a teacher for all but `train`."""
        if split in self._own:
            return self._own[split]
        if split not in self._loaders:
            self._loaders[split] = self._open(split, None)
        return self._loaders[split]

    def evaluation_loader(self, split: str) -> AnyLoader:
        """The loader of a split for evaluation: of `train` too, whose images are then not augmented."""
        if split == "train" and split not in self._own and split not in self._loaders:
            data = self._config.data
            train = data.split("train").model_copy(update=transforms_for_evaluation(data))
            config = self._config.model_copy(update={"data": data.model_copy(update={"train": train})})
            options = {**EACH_IMAGE_ONCE, "shuffle": False, "last_batch": None}
            options["shown_views"] = self._shown_views
            loader = KDDataLoader.from_config(
                config, teacher=None, training=self.source, plugins=self._plugins, **options
            )
            self._loaders[split] = self._stack.enter_context(loader)
        return self.loader(split)

    def _open(self, split: str, teacher: Teacher | Recording | None) -> KDDataLoader:
        shown = self._shown_views
        for view in shown:
            self._config.data.view(split, view)
        return self._stack.enter_context(
            _TrainLoader.from_config(
                self._config,
                split,
                teacher=teacher,
                shard=self._shard if split == "train" else None,
                training=self.source,
                plugins=self._plugins,
                run_dir=self._run_dir,
                shown_views=shown,
            )
        )

    def _wrapped(self, parts: Parts) -> dict[str, AnyLoader]:
        """The user's loaders by split."""
        given: dict[str, Any] = {}
        validation = parts.validation
        if _is_data_module(parts.train_batches):
            given |= self._of_data_module(parts.train_batches, with_validation=validation is None)
        elif parts.train_batches is not None:
            given["train"] = parts.train_batches
        if _is_data_module(validation):
            given |= {name: each for name, each in self._of_data_module(validation).items() if name != "train"}
        elif validation is not None:
            given |= _named(validation)
        return {name: self._wrap(name, batches) for name, batches in given.items()}

    def _wrap(self, split: str, batches: Any) -> AnyLoader:
        argument = "train_batches" if split == "train" else f"validation {split!r}"
        if isinstance(batches, KDDataLoader | BatchLoader):
            return batches
        if isinstance(batches, str | bytes | Mapping) or not hasattr(batches, "__iter__"):
            raise ConfigError(
                f"{argument} should be a loader or an iterable of batches, such as a torch DataLoader, got "
                f"{type(batches).__qualname__}"
            )
        if isinstance(batches, Iterator):
            raise ConfigError(
                f"{argument} can be iterated over once only, as it is a {type(batches).__qualname__}, and every epoch "
                "needs its batches: pass a list, a torch DataLoader, or an object whose __iter__ starts again"
            )
        if isinstance(batches, list | tuple) and batches and _is_loader(batches[0]):
            raise ConfigError(
                f"{argument} is a list of loaders: name them, as in validation={{'val': loader, 'hard': other}}"
                if split != "train"
                else f"{argument} is a list of loaders: chain their data sets (torch.utils.data.ConcatDataset) into one"
            )
        data = self._config.data
        return self._stack.enter_context(BatchLoader(batches, device=data.device, ahead=data.ahead, name=argument))

    def _of_data_module(self, module: Any, *, with_validation: bool = True) -> dict[str, Any]:
        """The loaders of a Lightning data module, which is set up for `fit`."""
        on_rank_zero(module.prepare_data)
        module.setup("fit")
        self._stack.callback(module.teardown, "fit")
        found: dict[str, Any] = {"train": module.train_dataloader()}
        if not with_validation or not _is_overridden(module, "val_dataloader"):
            return found
        batches = module.val_dataloader()
        if isinstance(batches, list | tuple):
            return found | {"val" if number == 0 else f"val{number}": each for number, each in enumerate(batches)}
        return found | _named(batches)


def _named(validation: Any) -> dict[str, Any]:
    """Validation sets by name; a single one is called `val`."""
    if not isinstance(validation, Mapping):
        return {"val": validation}
    for name in validation:
        if not isinstance(name, str) or not name or printable(name) != name or "/" in name or name == "train":
            raise ConfigError(
                f"validation has a set {name!r}; name it with printable characters without a slash, other than train"
            )
    if not validation:
        raise ConfigError("validation has no sets; leave it out, or name them: validation={'val': loader}")
    return dict(validation)


def _is_loader(value: object) -> bool:
    return isinstance(value, KDDataLoader | BatchLoader | torch.utils.data.DataLoader)


def _is_data_module(part: Any) -> bool:
    """Whether this is a `LightningDataModule`, of whichever of Lightning's packages."""
    return all(hasattr(part, name) for name in ("prepare_data", "setup", "train_dataloader", "teardown"))


def _is_overridden(module: Any, name: str) -> bool:
    """Whether a data module has a hook of its own; Lightning's raises an error."""
    return not getattr(type(module), name).__module__.startswith(("lightning.", "pytorch_lightning."))
