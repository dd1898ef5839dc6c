"""Whether a recorded teacher has answered for this very stream of images: what both say of it, and a few real rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline.data.bad_samples import BadSamplePolicy
from kd_pipeline.data.dali import GraphSettings
from kd_pipeline.data.mixing import MixSettings, mix_images
from kd_pipeline.data.plan import BatchPlan, EpochPlan, Plan
from kd_pipeline.data.reader import INDEX, MIXING, Reader
from kd_pipeline.data.sources.base import Source
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.state import differences
from kd_pipeline.loader.streams import Lane
from kd_pipeline.teachers.recorded.files import checksums
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher

__all__ = ["check_pixels", "check_stream", "cut_of_mixed_batch", "require_repeatable"]


def cut_of_mixed_batch(plan: Plan, mix: MixSettings | None) -> str | None:
    """What the images of an epoch's last batch depend on besides their places, or None where there is no such thing.

    Partners in mixing are neighbors in the epoch's order, wherever batches begin, as each holds whole pairs. The one
    exception is a last batch that is cut into parts for several ranks: it depends on where it begins and on the cuts.
    """
    rest = plan.num_samples % plan.global_batch_size
    if mix is None or plan.last_batch != "keep" or plan.shard.world_size == 1 or not rest:
        return None
    return f"the last {rest} places of an epoch are cut for {plan.shard.world_size} ranks"


def require_repeatable(hw_decoder_load: float | None) -> None:
    """Refuse to record or replay images whose last bits depend on their batch.

    Raises:
        ConfigError: a GPU's hardware decoder has a share of them.
    """
    if hw_decoder_load:
        raise ConfigError(
            f"data.hw_decoder_load is {hw_decoder_load:g}, with which the pixels of an image depend on its batch, and "
            "a recorded teacher's outputs belong to pixels that are the same in every run; set it to 0"
        )


def check_stream(recorded: RecordedTeacher, stream: Mapping[str, Any]) -> None:
    """Compare everything that the images depend on, `KDDataLoader.stream_fingerprint`, with the recording's manifest.

    Raises:
        StateError: one line for each field that differs, recorded → now.
        ConfigError: the images are not the same in every run.
    """
    require_repeatable(stream["hw_decoder_load"])
    different = differences(recorded.manifest.stream, stream)
    if different:
        lines = "\n".join(f"  {line}" for line in different.values())
        raise StateError(
            f"the recording in {recorded.path} is of other images (recorded → now):\n{lines}\n"
            "take the old values, or record the teacher again"
        )


def check_pixels(
    recorded: RecordedTeacher,
    source: Source,
    transform: TrainTransform | EvalTransform,
    plan: Plan,
    mix: MixSettings | None,
    *,
    settings: GraphSettings,
    policy: BadSamplePolicy,
    lane: Lane,
) -> None:
    """Read `recorded.num_verified` images of an epoch, both drawn anew each time, and compare with the recorded ones.

    One batch of a reader of its own: nothing of the loader's is moved. Where images are mixed it is made of whole
    groups of partners.

    Raises:
        StateError: an image is another one than was recorded; names sample, epoch and place.
        BadSampleError, TooManyBadSamplesError: an image cannot be read, and the policy does not allow that.
    """
    # What is drawn decides nothing but what is looked at.
    numbers = np.random.default_rng()
    group = 1 if mix is None else 2 * plan.repeats
    is_cut = cut_of_mixed_batch(plan, mix) is not None
    num_places = plan.num_samples - (plan.num_samples % plan.global_batch_size if is_cut else 0)
    num_groups = min(-(-recorded.num_verified // group), num_places // group)
    if not num_groups or not recorded.num_epochs:
        return
    epoch = int(numbers.integers(recorded.num_epochs))
    starts = np.sort(numbers.choice(num_places // group, num_groups, replace=False)) * group
    place = (starts[:, None] + np.arange(group)).ravel()
    chosen = _Chosen.of(plan, place)
    settings = replace(settings, max_batch=len(place), prefetch=1)
    reader = Reader(source, transform, chosen, settings, policy.model_copy(update={"record": None}), mix)
    try:
        read = reader.read(epoch, 0, lane.stream)
        with lane.teaching():
            pixels = lane.view(read.images)[read.rows]
            if mix is not None:
                pixels = mix_images(pixels, lane.upload(read.facts[MIXING]).T)
            _compare(recorded, source.name, epoch, place, read.facts[INDEX], pixels)
    finally:
        reader.close()


def _compare(
    recorded: RecordedTeacher,
    name_of: Callable[[int], str],
    epoch: int,
    place: NDArray[np.int64],
    sample: NDArray[np.int64],
    images: Tensor,
) -> None:
    recorded.replay(epoch, place, sample)  # which compares the samples
    different = np.flatnonzero(checksums(images) != recorded.checksums(epoch, place))
    if len(different):
        row = int(different[0])
        raise StateError(
            f"{len(different)} of {len(place)} images that were looked at are not those that the recorded teacher has "
            f"seen; the first is sample {sample[row]} ({name_of(int(sample[row]))}) at place {place[row]} of epoch "
            f"{epoch}. Its file has changed, or it is decoded on another kind of processor, by another build of the "
            f"decoder or with other libraries. Bring that back, or record the teacher again; teacher.verify: 0 takes "
            f"the recording in {recorded.path} as it is"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen(Plan):
    """A plan whose epochs are one batch each, of chosen places of the epochs of another plan."""

    place: NDArray[np.int64]

    @classmethod
    def of(cls, plan: Plan, place: NDArray[np.int64]) -> "_Chosen":
        return cls(
            num_samples=plan.num_samples,
            batch_size=len(place),
            seed=plan.seed,
            shuffle=plan.shuffle,
            repeats=plan.repeats,
            place=place,
        )

    def epoch(self, epoch: int) -> "_ChosenEpoch":
        # Not super(), which a dataclass with slots has lost.
        return _ChosenEpoch(self, Plan.epoch(self, epoch).order, self.place)


@dataclass(frozen=True, slots=True)
class _ChosenEpoch(EpochPlan):
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> BatchPlan:
        place = self.place
        return BatchPlan(self.order[place], np.ones(len(place), np.bool_), place % self.plan.repeats, place)
