"""Decode the images of a split: which cannot be read, and which are of a single color."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from kd_pipeline._core.progress import no_report, progress_bar
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.config.config import Config
from kd_pipeline.data.bad_samples import BadSample, fraction_for
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import SPLITS, DataSettings
from kd_pipeline.data.sources import Source
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.uniform import is_uniform
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows.findings import Findings

__all__ = ["SKIP_UNREADABLE", "SplitReport", "UniformImage", "check_split", "key_of"]

SKIP_UNREADABLE = {"on_bad_sample": "substitute", "max_bad_fraction": 1.0}
"""Continue after every unreadable file, to find all of them."""
_KEEP_UNIFORM = {"erase": 0.0, "blur": 0.0, "auto_augment": None, "order": None}
"""Leave out what draws into an image of a single color."""
_REPORT_INTERVAL_S = 5.0
_MAX_CONFIRMED = 1000
"""Images that are decoded a second time, one by one; more of a single color need no proof."""
_HARMFUL_UNIFORM = 0.01
"""Share of images of a single color from which they are an error."""


@dataclass(frozen=True, slots=True)
class UniformImage:
    """An image of a single color."""

    index: int
    """Index in the dataset."""
    path: str
    color: tuple[int, int, int]
    """Red, green and blue of its pixels, 0 to 255."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The result for one split."""

    split: str
    num_images: int
    """Images in the split."""
    num_decoded: int
    """Images that were checked."""
    class_sizes: tuple[int, ...] | None
    """`[K]`, number of images of each class; None without labels."""
    unreadable: tuple[BadSample, ...]
    """By index in the dataset."""
    uniform: tuple[UniformImage, ...]
    """Images of a single color, by index in the dataset; the first thousand if there are more."""
    remarks: tuple[str, ...]
    """Warnings of the source, one sentence each."""
    images_per_s: float
    """Decoded, cropped and resized, including the start of DALI."""


def key_of(split: str) -> str:
    """The key of a split in the config."""
    return f"data.{split}" if split in SPLITS else f"data.more.{split}"


def check_split(
    config: Config,
    split: str,
    *,
    num_images: int | None,
    training: Source | None,
    plugins: Collection[str] = (),
    findings: Findings,
    report: Callable[[str], object],
) -> tuple[SplitReport, str]:
    """Load every image of a split once, and add what is wrong with them to `findings`.

    Args:
        config: the run.
        split: name of the split.
        num_images: load only so many, in random order; None loads all.
        training: the open source of the split `train`.
        plugins: modules that factories in the config may come from.
        findings: gets a row for the unreadable images, the uniform ones and each warning of the source.
        report: called with lines of progress.

    Returns:
        The report, and the fingerprint of the source.

    Raises:
        ConfigError, DataError: the split cannot be opened, or none of its images decodes.
    """
    changes = {**EACH_IMAGE_ONCE, **SKIP_UNREADABLE, "shown_views": ()}
    changes["shuffle"] = num_images is not None  # the first images of a folder are all of one class
    with KDDataLoader.from_config(
        _only_cropped(config, split),
        split,
        teacher=None,
        shard=Shard(),
        training=training,
        plugins=plugins,
        **changes,
    ) as loader:
        source = loader.source
        num_wanted = min(len(source), num_images or len(source))
        num_decoded, suspects, images_per_s = _load(loader, split, num_wanted, report)
        uniform = _confirm(loader, suspects)
    class_sizes = None
    if source.labels is not None:
        class_sizes = tuple(np.bincount(source.labels, minlength=source.num_classes or 0).tolist())
    checked = SplitReport(
        split=split,
        num_images=len(source),
        num_decoded=num_decoded,
        class_sizes=class_sizes,
        unreadable=loader.bad_samples,
        uniform=uniform,
        remarks=source.warnings,
        images_per_s=images_per_s,
    )
    findings.add("note", key_of(split), source.warnings)
    _add_unreadable(findings, checked, config.data)
    _add_uniform(findings, checked)
    return checked, source.fingerprint


def _only_cropped(config: Config, split: str) -> Config:
    """`config` with a transform of `split` that leaves an image of a single color as it is."""
    settings = config.data.split(split)
    if not isinstance(settings.transform, TrainTransform):
        return config
    settings = settings.model_copy(update={"transform": settings.transform.model_copy(update=_KEEP_UNIFORM)})
    return config.model_copy(update={"data": config.data.with_split(split, settings)})


def _load(
    loader: KDDataLoader, split: str, num_wanted: int, report: Callable[[str], object]
) -> tuple[int, list[int], float]:
    """Load batches with at least `num_wanted` images.

    Returns:
        The number of images, the indices of those of a single color in what was loaded of them, and images per second.
    """
    num_images, suspects = 0, []
    started_s = reported_s = time.monotonic()
    with progress_bar(f"{split}: decoding") as report_images:
        for batch in loader:
            num_images += len(batch)
            report_images(min(num_images, num_wanted), num_wanted)
            suspects += batch.index[batch.valid & is_uniform(batch.images)].tolist()
            now_s = time.monotonic()
            if report_images is no_report and now_s - reported_s > _REPORT_INTERVAL_S:  # no terminal
                reported_s = now_s
                rate = num_images / (now_s - started_s)
                report(f"{split}: {num_images:,} of {num_wanted:,} images decoded, {rate:,.0f} images/s")
            if num_images >= num_wanted:
                break
    seconds = time.monotonic() - started_s
    report(f"{split}: {min(num_images, num_wanted):,} of {num_wanted:,} images decoded in {seconds:.1f} s")
    return num_images, suspects, num_images / seconds


def _confirm(loader: KDDataLoader, suspects: list[int]) -> tuple[UniformImage, ...]:
    """The samples among `suspects`, whose crop has a single color, that have a single color as a whole."""
    found = []
    for index in sorted(suspects)[:_MAX_CONFIRMED]:
        pixels = loader.pixels(index)
        if (pixels == pixels[0, 0]).all():
            red, green, blue = pixels[0, 0].tolist()
            found.append(UniformImage(index, loader.source.name(index), (red, green, blue)))
    return tuple(found)


def _add_unreadable(findings: Findings, split: SplitReport, data: DataSettings) -> None:
    num_unreadable = len(split.unreadable)
    if not num_unreadable:
        return
    found = f"{num_unreadable} of {split.num_decoded} images cannot be read"
    # One is always allowed, however small the dataset.
    is_allowed = num_unreadable <= max(1, data.max_bad_fraction * split.num_decoded)
    needed = fraction_for(num_unreadable, split.num_decoded)
    them = "it" if num_unreadable == 1 else "them"
    if data.on_bad_sample == "raise":
        advice = "data.on_bad_sample=substitute" + ("" if is_allowed else f" and data.max_bad_fraction={needed}")
        found += f", and the first one ends a run; remove or replace {them}, or set {advice}"
    elif not is_allowed:
        found += (
            f", more than data.max_bad_fraction={data.max_bad_fraction:g} allows; remove or replace {them}, or set "
            f"data.max_bad_fraction={needed}"
        )
    is_error = data.on_bad_sample == "raise" or not is_allowed
    if not is_error:
        found += ", and another one takes its place" if num_unreadable == 1 else ", and others take their place"
    findings.add("error" if is_error else "note", key_of(split.split), [found])


def _add_uniform(findings: Findings, split: SplitReport) -> None:
    if not split.uniform:
        return
    share = len(split.uniform) / split.num_decoded
    named = [f"sample {image.index} ({image.path}) is {_color(image.color)}" for image in split.uniform]
    is_cut = len(split.uniform) == _MAX_CONFIRMED
    findings.add(
        "error" if share >= _HARMFUL_UNIFORM or is_cut else "note",
        key_of(split.split),
        [
            f"a single color in {'at least ' if is_cut else ''}{len(split.uniform)} of "
            f"{split.num_decoded} images: {first_few(named)}. Such a file may be damaged, empty, or of a kind that "
            "decodes wrongly; look at it, and remove it or save it again as PNG or JPEG"
        ],
    )


def _color(color: tuple[int, int, int]) -> str:
    match color:
        case (0, 0, 0):
            return "black"
        case (255, 255, 255):
            return "white"
        case (red, green, blue) if red == green == blue:
            return f"gray {red}"
        case _:
            return f"RGB {color}"
