"""`KDDataLoader`: batches of images with the teacher's outputs, from whatever source and teacher it is given."""

from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack

from torch import nn

from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.settings import require_config
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import Shuffle
from kd_pipeline.data.plan import LastBatch, Shard
from kd_pipeline.data.settings import LoaderOptions
from kd_pipeline.data.sources import Source, save_classes
from kd_pipeline.data.sources.base import AnySourceSettings
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import ViewSettings
from kd_pipeline.loader.batch_stream import BatchStream
from kd_pipeline.loader.config_split import LoaderArguments, open_split, split_arguments
from kd_pipeline.loader.config_teacher import open_config_teacher, recorded_view
from kd_pipeline.loader.given import check_arguments, check_transform, open_given_source, open_given_teacher
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import AnyTeacherSettings

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["KDDataLoader"]


class KDDataLoader(BatchStream):
    """Iterates over batches of images, labels and teacher outputs; one `for` loop is one epoch.

        with KDDataLoader(source, TrainTransform(size=224), teacher, batch_size=256) as loader:
            if saved is not None:
                loader.load_state_dict(saved)
            for epoch in range(loader.epoch, num_epochs):
                for batch in loader:
                    ...

    Order and views depend on seed, epoch and dataset only. A new loader that loads the `state_dict()` of another
    continues exactly as that one would have continued:

    - Within a loop, `state_dict()` is the position after the last batch that was returned, and the first loop of a
      loader that loads it is the rest of that epoch. `num_returned` counts batches from the start of the epoch.
    - A loop that was left early, by `break` or `return`, has ended its epoch, for a saved position too. So to stop
      within an epoch, save before `break`; to stop each epoch after n batches, compare `num_returned` with n.
    - After a loop that an exception ended, such as Ctrl-C, `state_dict()` is still the position within its epoch. The
      next loop in this process runs the next epoch.
    - `peek()`, and the common `next(iter(loader))`, show the next batch and move nothing.
    - An iterator that you keep (`it = iter(loader)`) is a loop that is still open. To end its epoch, drop it or call
      `set_epoch(epoch + 1)`.

    `epoch`, `set_epoch` and `state_dict` count epochs from 0, as code does; messages count them from 1.

    With several processes each reads its own shard of every epoch. Where it is not given, it is that of the process
    group at the first batch, and the loader refuses to continue if that changes later.
    """

    def __init__(
        self,
        source: Source | AnySourceSettings | PathLike[str] | str,
        transform: TrainTransform | EvalTransform,
        teacher: Teacher | Recording | nn.Module | AnyTeacherSettings | None = None,
        *,
        views: Mapping[str, ViewSettings] | None = None,
        shown_views: Collection[str] | None = None,
        teacher_view: str | None = None,
        mix: MixSettings | None = None,
        batch_size: int,
        seed: int = 0,
        shuffle: Shuffle = True,
        shard: Shard | None = None,
        last_batch: LastBatch | None = None,
        repeats: int = 1,
        run_dir: Path | str | None = None,
        prepare: Callable[[KDBatch], KDBatch] | None = None,
        plugins: Collection[str] = (),
        trust_engines: Collection[str] = (),
        **options: Unpack[LoaderOptions],
    ) -> None:
        """Plan the batches; DALI starts with the first one.

        Args:
            source: the samples: a `Source`; the settings of one; or a path: a folder with a folder for each class, a
                list (`.csv`, `.tsv`, `.txt`, `.jsonl`), or arrays (`.npy`, `.npz`).
            transform: the transform of the images.
            teacher: a teacher to run on every batch, or its recorded outputs, which the loader does not close; or a
                module or settings, which are opened for these images, matched to the order of the classes, and closed
                with the loader.
            views: more views of each image, by name, made of the same decoding; `batch.views` has them.
            shown_views: names of those of `views` that batches have, with those that they follow; defaults to all.
            teacher_view: the view that a teacher sees which is given as an object, and which keeps it as its `view`;
                settings have their own `view`. It defaults to `images`, which `transform` describes, and of a recording
                to the one that was recorded.
            mix: how to mix images of a batch before the teacher sees them; turns labels into float weights.
            batch_size: images in a batch of this process; with `mix`, a multiple of `2 * repeats`.
            seed: 0 to 2**64 - 1; equal on all ranks.
            shuffle: a new order in every epoch: `True`, or `"global"`, for a uniform permutation, and
                `ShardShuffle(buffer=...)` for one in which each shard of the source is read once, from end to end.
                False for the dataset's own order.
            shard: this process among those that share an epoch. Defaults to its rank in `torch.distributed` at the
                first batch or, if that is not initialized, to what `torchrun`, `srun` or `mpirun` says, else to a
                single process. Give it where not every process reads its own part: `Shard()` for the whole epoch.
            last_batch: see `LastBatch`. Defaults to `keep` for one process, and to `pad` for several, as collectives
                such as `accelerator.gather_for_metrics` need the same number of rows on each: drop the rows that are
                not `valid` afterward.
            repeats: views of a sample in a row in an epoch; see `Plan`.
            run_dir: folder for `bad_samples.jsonl`; without it no file is written.
            prepare: is called with each batch before the teacher sees it, and returns the batch to take in its place.
                It runs ahead of the loop, on a GPU in the stream of the teacher, and must not wait for the GPU.
            plugins: modules that a factory in settings may come from, of ops too.
            trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
            options: device, num_threads, prefetch, ahead, decode, hw_decoder_load, on_bad_sample, max_bad_fraction and
                max_pixels; see `LoaderSettings` for their ranges and defaults.

        Raises:
            ConfigError: source or teacher is nothing of the kind, a value is out of range, or the GPU cannot decode
                images in any mode.
            DataError: there is not a single batch.
            TeacherError: the teacher takes different images, or has different classes.
            StateError: the recording is of different images.
        """
        check_transform(transform)
        check_arguments(
            batch_size=batch_size, seed=seed, repeats=repeats, shard=shard, mix=mix, prepare=prepare, views=views
        )
        opened_source = open_given_source(source, plugins)
        owned: Teacher | Recording | None = None
        if not (teacher is None or isinstance(teacher, Teacher | Recording)):
            owned = open_given_teacher(
                teacher,
                opened_source,
                transform,
                views or {},
                teacher_view,
                device=resolve_device(str(options.get("device", "auto"))),
                batch_size=batch_size,
                seed=seed,
                shuffle=shuffle,
                plugins=plugins,
                trust_engines=trust_engines,
            )
            teacher_view = None if isinstance(teacher, nn.Module) else recorded_view(teacher)
            teacher = owned
        try:
            super().__init__(
                opened_source,
                transform,
                teacher,
                views=views,
                shown_views=shown_views,
                teacher_view=teacher_view,
                mix=mix,
                batch_size=batch_size,
                seed=seed,
                shuffle=shuffle,
                shard=shard,
                last_batch=last_batch,
                repeats=repeats,
                run_dir=run_dir,
                prepare=prepare,
                plugins=plugins,
                **options,
            )
        except BaseException:
            if owned is not None:
                owned.close()
            raise
        self._owns_teacher = owned is not None

    @classmethod
    def from_config(
        cls,
        config: "Config",
        split: str = "train",
        *,
        teacher: Teacher | Recording | Literal["config"] | None = "config",
        shard: Shard | None = None,
        training: Source | None = None,
        plugins: Collection[str] = (),
        trust_engines: Collection[str] = (),
        **changes: Unpack[LoaderArguments],
    ) -> Self:
        """The loader of one of the config's splits: `train`, `val`, `test`, or a name under `more`.

        Args:
            config: the config.
            split: name of the split.
            teacher: a teacher or recording, which stays open; None for none; or `"config"` for the config's: it is
                opened for the split `train` only, matched to the data's order of classes and closed with the loader.
            shard: as for a loader.
            training: the open source of the split `train`, to save the time of listing it. The other splits have its
                order of classes, which the loader of `train` saves as `classes.json` in the config's `run_dir`.
            plugins: modules that factories in the config may come from.
            trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
            changes: arguments of the loader that replace those of the config.

        Raises:
            ConfigError: the config has no such split, or its parts do not fit together.
            DataError, TeacherError: the data or the teacher is not what the config says.
        """
        require_config(config)
        settings, arguments = config.data.split(split), split_arguments(config, split, changes)
        is_training = split == "train"
        source = open_split(config, split, training=training, plugins=plugins)
        if is_training and arguments["run_dir"] is not None and source.classes is not None:
            save_classes(argument_path(arguments["run_dir"]) / "classes.json", source.classes)
        owned = None
        if isinstance(teacher, str):
            if is_training and config.teacher is not None:
                owned = open_config_teacher(
                    config,
                    source.classes,
                    batch_size=arguments["batch_size"],
                    device=arguments["device"],
                    plugins=plugins,
                    trust_engines=trust_engines,
                    source=source,
                )
            teacher = owned
        if isinstance(teacher, Recording) and config.teacher is not None:
            arguments.setdefault("teacher_view", recorded_view(config.teacher))
        try:
            loader = cls(source, settings.transform, teacher, shard=shard, plugins=plugins, **arguments)
        except BaseException:
            if owned is not None:
                owned.close()
            raise
        loader._owns_teacher = owned is not None
        return loader
