"""Whether a recording is of the very images of this loader: by what both know about them, and by a few checksums."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.mixing import MixSettings, at_size, mix_images
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan
from kd_pipeline.data.reader import INDEX, MIXING, Reader
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.state import changed_fields
from kd_pipeline.loader.streams import StreamSync
from kd_pipeline.teachers.recorded.checksums import checksums
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["check_pixels", "check_stream", "cut_of_mixed_batch", "require_fixed_sizes", "require_repeatable"]


def cut_of_mixed_batch(plan: Plan, mix: MixSettings | None) -> str | None:
    """What the images of an epoch's last batch depend on besides their positions; None if on nothing.

    Mixing partners are neighbors in the epoch's order, independent of where batches start, as each batch holds whole
    pairs. The exception is a last batch that is split among several ranks: its pairs depend on the splits.
    """
    rest = plan.num_samples % plan.global_batch_size
    if mix is None or plan.last_batch != "keep" or plan.shard.world_size == 1 or not rest:
        return None
    # Part of saved manifests.
    return f"the last {rest} places of an epoch are cut for {plan.shard.world_size} ranks"


def require_repeatable(hw_decoder_load: float | None) -> None:
    """Refuse to record or replay images whose last bits depend on their batch.

    Raises:
        ConfigError: the GPU's hardware decoder has a part of them.
    """
    if hw_decoder_load and hw_decoder_load < 1:
        raise ConfigError(
            f"data.hw_decoder_load is {hw_decoder_load:g}, with which the pixels of an image depend on its batch, but "
            "recorded outputs need pixels that are the same in every run; set it to 0 or 1"
        )


def require_fixed_sizes(views: Views, view: str, mix: MixSettings | None) -> None:
    """Refuse to record or replay images that depend on the batch that they are in.

    Args:
        views: of the loader.
        view: the one that the teacher sees.
        mix: how images are mixed, which is planned in pixels of the view `images`.

    Raises:
        ConfigError: sizes change within an epoch.
    """
    if views.depend_on_batch(view) or (mix is not None and views.depend_on_batch(IMAGES)):
        raise ConfigError(
            f"the size of images changes from batch to batch, and with it the teacher's view {view}. So it depends on "
            "the batch size, but recorded outputs are for any batch size. Set size to one with per: epoch; or let the "
            "teacher see a view that follows at a size of its own, without auto_augment, blur and mix; or let the "
            "teacher run (remove backend: recorded)"
        )


def check_stream(recording: Recording, stream: Mapping[str, Any]) -> None:
    """Compare `stream`, a `KDDataLoader.stream_fingerprint`, with the recording's manifest.

    Raises:
        StateError: one line for each field that differs, recorded → now.
        ConfigError: the images are not the same in every run.
    """
    require_repeatable(stream["hw_decoder_load"])
    changed = changed_fields(recording.manifest.stream, stream)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed.values())
        raise StateError(
            f"the recording in {recording.path} is of different images (recorded → now):\n{lines}\n"
            "use the old values, or record the teacher again"
        )


def check_pixels(
    recording: Recording,
    plan: Plan,
    mix: MixSettings | None,
    view: str,
    *,
    open_reader: Callable[[Plan], Reader],
    sync: StreamSync,
    name_of: Callable[[int], str],
) -> None:
    """Read `recording.num_verified` images of an epoch, both drawn at random, and compare them with the recorded ones.

    They are of the view called `view`, in one batch of their own reader, which does not move the loader's; with mixing,
    it has whole groups of partners.

    Raises:
        StateError: an image differs from the recorded one; names sample, epoch and position.
        BadSampleError, TooManyBadSamplesError: an image cannot be read.
    """
    rng = np.random.default_rng()  # unseeded: every start checks different images
    group = 1 if mix is None else 2 * plan.repeats
    is_cut = cut_of_mixed_batch(plan, mix) is not None
    num_positions = plan.num_samples - (plan.num_samples % plan.global_batch_size if is_cut else 0)
    num_groups = min(-(-recording.num_verified // group), num_positions // group)
    if not num_groups or not recording.num_epochs:
        return
    epoch = int(rng.integers(recording.num_epochs))
    starts = np.sort(rng.choice(num_positions // group, num_groups, replace=False)) * group
    position = (starts[:, None] + np.arange(group)).ravel()
    reader = open_reader(_SelectedPositions.of(plan, position))
    try:
        batch = reader.read(epoch, 0, sync.stream)
        with sync.on_teacher_stream():
            images = sync.as_tensor(batch.group.views[view])[batch.rows]
            if mix is not None:
                # Planned for the size of `images`.
                size = sync.as_tensor(batch.group.views[IMAGES]).shape
                columns = at_size(
                    sync.to_device(torch.from_numpy(batch.metadata[MIXING])).T,
                    (size[2], size[3]),
                    (images.shape[2], images.shape[3]),
                )
                images = mix_images(images, columns)
            sample = batch.metadata[INDEX]
            recording.replay(epoch, position, sample)  # compares the samples
            wrong = np.flatnonzero(checksums(images) != recording.checksums(epoch, position))
    finally:
        reader.close()
    if len(wrong):
        row = int(wrong[0])
        raise StateError(
            f"{len(wrong)} of {len(position)} checked images differ from the recorded ones; the first is sample "
            f"{sample[row]} ({name_of(int(sample[row]))}) at position {position[row]} of epoch {epoch + 1}. Its file "
            "changed, or it is decoded on a different kind of processor, by a different build of the decoder or with "
            "different libraries. Restore that, or record the teacher again; teacher.verify: 0 trusts the recording "
            f"in {recording.path} as it is"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SelectedPositions(Plan):
    """A plan whose epochs are one batch each: some positions of the epochs of a different plan."""

    position: NDArray[np.int64]

    @classmethod
    def of(cls, plan: Plan, position: NDArray[np.int64]) -> "_SelectedPositions":
        return cls(
            num_samples=plan.num_samples,
            batch_size=len(position),
            seed=plan.seed,
            shuffle=plan.shuffle,
            shard_ends=plan.shard_ends,
            repeats=plan.repeats,
            position=position,
        )

    def epoch(self, epoch: int) -> "_SelectedEpoch":
        # Not super(), which does not work in a dataclass with slots.
        return _SelectedEpoch(self, Plan.epoch(self, epoch).order, self.position)


@dataclass(frozen=True, slots=True)
class _SelectedEpoch(EpochPlan):
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return 1

    def batches(self, start: int, stop: int) -> tuple[BatchPlan, list[int]]:
        position = self.position
        valid, repeat = np.ones(len(position), np.bool_), position % self.plan.repeats
        return BatchPlan(self.indices(position), valid, repeat, position), [len(position)]
