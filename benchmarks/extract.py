"""How fast features are extracted for k-NN, beside the loader alone and the network alone.

    python -m benchmarks.extract
    python -m benchmarks.extract --network timm:vit_small_patch16_224 --num-images 256

Each takes turns with the others, for one epoch of the same images at a time.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import nn

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.tables import markdown_table, with_range
from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.settings import Settings
from kd_pipeline.bench.measure import (
    environment,
    format_table,
    prepare_out,
    rotated,
    save_result,
    spread,
    wait_until_idle,
)
from kd_pipeline.bench.photographs import link_photographs, photographs
from kd_pipeline.cli.bench import network_by_name
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.evaluation._logits import inputs_for
from kd_pipeline.evaluation.frozen import extract_features
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.modules import eval_mode, zero_images
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.training.memory_format import use_channels_last

LOADER, NETWORK, BOTH = "loader alone", "network alone", "extract_features"
"""The rows."""
_TARGET = 0.95
"""What the extraction should reach of the slower part, if loader and network do not share their cores."""


class BenchExtractSettings(Settings):
    """What is extracted, and from what."""

    root: Path | None = None
    """JPEG files in class folders. Defaults to `data/photographs`, which is created if it does not exist."""
    network: str = "timm:resnet18"
    """A torchvision model, or `timm:NAME`, without its head and with random weights."""
    size: int = Field(default=224, gt=0)
    """Height and width of the images."""
    num_images: int = Field(default=512, gt=0)
    """Images of an epoch; of a larger folder, evenly spaced."""
    batch_size: int = Field(default=64, gt=0)
    """Images in a batch."""
    repeats: int = Field(default=5, gt=0)
    """How often each is timed."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads of DALI, and of torch; defaults to the cores this process may use."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for a GPU if there is one."""
    out: Path | None = None
    """JSON file for the result; a Markdown file beside it has the table."""


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """Images per second of each row in each repeat, the settings and the environment."""

    images_per_s: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def of_slower(self) -> list[float]:
        """In each repeat, the rate of the extraction as a fraction of that of the slower part."""
        return [both / min(loader, network) for loader, network, both in self._repeats()]

    @property
    def of_sequence(self) -> list[float]:
        """The same, of that of the parts one after the other, which is the limit where they share their cores."""
        return [both * (1 / loader + 1 / network) for loader, network, both in self._repeats()]

    def _repeats(self) -> list[tuple[float, ...]]:
        return list(zip(*(self.images_per_s[name] for name in (LOADER, NETWORK, BOTH)), strict=True))

    def table(self) -> str:
        """Plain text."""
        return "\n".join([*format_table(_HEADER, self._cells()), *self._notes()])

    def markdown(self) -> str:
        """The same for the documentation."""
        notes = "\n".join(f"- {note}" for note in self._notes())
        return f"{markdown_table(_HEADER, self._cells())}\n\n{notes}\n"

    def to_json(self) -> str:
        """Everything, including every repeat."""
        found = {
            "images_per_s": {name: spread(rates) for name, rates in self.images_per_s.items()},
            "of_slower": spread(self.of_slower),
            "of_sequence": spread(self.of_sequence),
            "settings": self.settings,
            "environment": self.environment,
        }
        return json.dumps(found, indent=2)

    def _cells(self) -> list[tuple[str, str]]:
        return [
            *((name, with_range(rates, 1)) for name, rates in self.images_per_s.items()),
            ("extract_features / the slower part", with_range(self.of_slower, 3)),
            ("extract_features / the parts one after the other", with_range(self.of_sequence, 3)),
        ]

    def _notes(self) -> list[str]:
        settings = self.settings
        slower = min((LOADER, NETWORK), key=lambda name: median(self.images_per_s[name]))
        limit = "the parts one after the other" if settings["device"] == "cpu" else "the slower part"
        return [
            f"Medians (lowest-highest) of {settings['repeats']} interleaved repeats on "
            f"{self.environment['num_cores']} core(s), {settings['device']}; ratios are within each repeat.",
            f"{settings['network']} without its head, float32, {settings['epoch']} photographs to {settings['size']} "
            f"px in batches of {settings['batch_size']}. The {slower.removesuffix(' alone')} is slower; the limit on "
            f"this device is {limit}, and the target {_TARGET} of it.",
        ]


_HEADER = ("", "images/s or ratio")


def bench_extract(
    settings: BenchExtractSettings, *, report: Callable[[str], object] = lambda line: None
) -> ExtractResult:
    """Time `extract_features`, its loader and its network; `report` receives lines of progress.

    Loader and network stay open, as between the epochs of a run. The first epoch of each is not timed.

    Raises:
        ConfigError: `out` is a folder, or there is no such network or device.
        DataError: the folder has files other than JPEG, or none.
        MissingPackageError: the package of the network is not installed.
    """
    prepare_out(settings.out)
    if settings.out is not None:
        prepare_output(settings.out.with_suffix(".md"))
    device, num_threads = resolve_device(settings.device), settings.num_threads or num_cores()
    torch.set_num_threads(num_threads)
    network = _network(settings, device)
    root = photographs(settings.root, report)
    with tempfile.TemporaryDirectory(prefix="bench_extract-") as temporary:
        folder = link_photographs(root, Path(temporary), num_images=settings.num_images)
        with KDDataLoader(
            ImageFolder(folder),
            EvalTransform(size=settings.size),
            batch_size=settings.batch_size,
            last_batch="keep",
            shuffle=False,
            device=device,
            num_threads=num_threads,
        ) as loader:
            rates = _measure(_runs(network, loader), settings.repeats, report)
            num_images = len(loader.source)
    used = {"root": str(root), "num_threads": num_threads, "device": str(device), "epoch": num_images}
    result = ExtractResult(rates, settings.model_dump(mode="json") | used, environment())
    save_result(settings.out, result.to_json, report)
    if settings.out is not None:
        write_output(settings.out.with_suffix(".md"), result.markdown())
    return result


def _network(settings: BenchExtractSettings, device: torch.device) -> nn.Module:
    """The network in the memory order that a run would choose for it."""
    torch.manual_seed(0)
    network = open_model(ModelSettings(**network_by_name(settings.network), num_classes=0)).to(device)
    example = zero_images((3, settings.size, settings.size))
    use_channels_last(network, "auto", example=example, device=device, is_half=False)
    return network


_Run = Callable[[], int]
"""Processes one epoch, waits for the device and returns the number of images."""


def _runs(network: nn.Module, loader: KDDataLoader) -> dict[str, _Run]:
    images = loader.peek().images.clone()
    num_full, num_left = divmod(len(loader.source), len(images))
    batches = [*[images] * num_full, *([images[:num_left]] if num_left else [])]

    def load() -> int:
        number = sum(len(batch) for batch in loader)
        _wait(loader.device)
        return number

    @torch.no_grad()
    def infer() -> int:
        with eval_mode(network):
            for each in batches:
                network(inputs_for(network, each))
        _wait(loader.device)
        return sum(map(len, batches))

    def extract() -> int:
        number = len(extract_features(network, loader))
        _wait(loader.device)
        return number

    return {LOADER: load, NETWORK: infer, BOTH: extract}


def _measure(runs: Mapping[str, _Run], repeats: int, report: Callable[[str], object]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for repeat in range(repeats):
        for name in rotated([*runs], repeat):
            wait_until_idle()
            started_s = time.perf_counter()
            num_images = runs[name]()
            rates[name].append(num_images / (time.perf_counter() - started_s))
        report(
            f"repeat {repeat + 1} of {repeats}, images/s: "
            + ", ".join(f"{name} {own[-1]:,.1f}" for name, own in rates.items())
        )
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with these arguments and return the exit status."""
    parser = benchmark_parser("extract", __doc__, BenchExtractSettings)
    return run_benchmark(parser, BenchExtractSettings, bench_extract, arguments)


if __name__ == "__main__":
    sys.exit(main())
