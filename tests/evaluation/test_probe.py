"""A teacher that classifies ten colors, a real loader over arrays of them, and ways to spoil either."""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.settings import DataSettings, SplitSettings
from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.sources.base import ArraysSettings
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import TeacherError
from kd_pipeline.evaluation.judge import ProbeReport, judge
from kd_pipeline.evaluation.probe import FirstBatches, ProbeSettings, probe_teacher, run_probe
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.streams import assert_same, fields

NUM_CLASSES = 10
CLASSES = tuple(f"color {number}" for number in range(NUM_CLASSES))
PALETTE = np.random.default_rng(8).permutation(
    np.stack(np.meshgrid([40, 128, 215], [40, 215], [40, 215]), -1).reshape(-1, 3)
)
SIZE = 16
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class ColorNet(nn.Module):
    """The closer the mean color is to that of a class, the larger the logit."""

    def __init__(self, *, num_logits: int = NUM_CLASSES, order: list[int] | None = None) -> None:
        super().__init__()
        palette = torch.tensor(PALETTE[order or range(NUM_CLASSES)] / 255, dtype=torch.float32)
        others = torch.full((num_logits - NUM_CLASSES, 3), 9.0)
        self.register_buffer("palette", torch.cat([palette, others]))

    def forward(self, images: Tensor) -> Tensor:
        return -40 * (images.mean((2, 3))[:, None] - self.palette).norm(dim=2)


class Spoilt(nn.Module):
    """A `ColorNet` with changed logits."""

    def __init__(self, spoil) -> None:
        super().__init__()
        self.net, self.spoil = ColorNet(), spoil

    def forward(self, images: Tensor) -> Tensor:
        return self.spoil(self.net(images))


@dataclass(frozen=True)
class RunConfig:
    """What a loader reads of a config."""

    data: DataSettings
    run_dir: Path | None = None
    seed: int = 3
    teacher: None = None


def colors(folder: Path, *, num_samples: int = 400, label_of=lambda k: k, **options) -> RunConfig:
    """Noisy images of one color each, class after class like in a folder."""
    rng = np.random.default_rng(0)
    color = np.sort(np.arange(num_samples) % NUM_CLASSES)
    noise = rng.integers(-30, 31, size=(num_samples, SIZE, SIZE, 3))
    np.save(folder / "images.npy", (PALETTE[color][:, None, None] + noise).clip(0, 255).astype(np.uint8))
    np.save(folder / "labels.npy", np.array([label_of(int(k)) for k in color]))
    source = ArraysSettings(
        images=folder / "images.npy",
        labels=folder / "labels.npy" if options.pop("labeled", True) else None,
        classes=options.pop("classes", CLASSES),
    )
    transform = TrainTransform(size=SIZE, **{**PLAIN, **options.pop("transform", {})})
    split = SplitSettings(source=source, transform=transform, **options.pop("split", {}))
    run_dir = options.pop("run_dir", None)
    return RunConfig(DataSettings(train=split, device="cpu", num_threads=1, **{"batch_size": 64, **options}), run_dir)


def teacher_of(net: nn.Module) -> Teacher:
    return open_teacher(TeacherSettings(), module=net, image_shape=(3, SIZE, SIZE))


def probed(config: RunConfig, net: nn.Module, **settings) -> ProbeReport:
    return probe_teacher(config, teacher_of(net), ProbeSettings(**settings))["logits"]


def test_good_teacher_passes_with_one_line(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    config = colors(tmp_path)
    teacher = teacher_of(ColorNet())
    caplog.clear()
    report = probe_teacher(config, teacher, ProbeSettings(strict=True))["logits"]
    assert report.problems == () and report.top1 > 0.95 and report.num_samples == 400
    assert report.chance == pytest.approx(0.1, abs=0.01) and report.required_top1 == pytest.approx(0.5, abs=0.05)
    assert report.mean_confidence is not None and 0.3 < report.mean_confidence < 1 and report.num_bad_rows == 0
    assert sum(report.predicted) == 400 and min(report.predicted) > 30
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    line = record.getMessage()
    assert line.startswith("teacher probe: top-1 ") and "400 training images, augmented as for training (" in line
    assert report.is_augmented


def test_unaugmented_images_are_called_that(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    transform = EvalTransform(size=SIZE, resize=SIZE, **PLAIN)
    config = colors(tmp_path)
    split = config.data.train.model_copy(update={"transform": transform})
    config = replace(config, data=config.data.model_copy(update={"train": split}))
    assert not probed(config, ColorNet()).is_augmented
    assert "400 training images (chance" in caplog.messages[-1]


def test_num_samples_independent_of_batch_size(tmp_path) -> None:
    reports = [probed(colors(tmp_path, batch_size=size), ColorNet(), num_samples=150) for size in (1, 64, 256)]
    assert [report.num_samples for report in reports] == [150] * 3
    assert len({(report.top1, report.predicted) for report in reports}) == 1
    assert sum(count > 0 for count in reports[0].predicted) == NUM_CLASSES


def test_samples_all_classes_of_unshuffled_runs(tmp_path) -> None:
    config = colors(tmp_path, num_samples=100, batch_size=128, split={"shuffle": False, "last_batch": "drop"})
    assert probed(config, ColorNet()).num_samples == 100
    config = colors(tmp_path, split={"shuffle": False})
    assert sum(count > 0 for count in probed(config, ColorNet(), num_samples=60).predicted) == NUM_CLASSES


@pytest.mark.parametrize(
    ("shift", "sentence"), [(1, "by +1: label k is the teacher's class k+1"), (-1, "by -1: label k")]
)
def test_detects_shifted_classes(tmp_path, shift: int, sentence: str) -> None:
    if shift == 1:  # a background class in front, in a teacher that does not name its classes
        config = colors(tmp_path, classes=None)
        net = Spoilt(lambda logits: torch.cat([logits.new_full((len(logits), 1), -99.0), logits], dim=1))
    else:  # labels that count from 1
        config, net = colors(tmp_path, classes=None, label_of=lambda k: k + 1), ColorNet(num_logits=NUM_CLASSES + 1)
    (problem,) = probed(config, net).problems
    assert f"the classes look shifted {sentence}" in problem
    assert "background" in problem and "top-1 is " in problem


def test_ignores_mixing_and_repeats(tmp_path) -> None:
    plain = probed(colors(tmp_path), ColorNet(), num_samples=64)
    split = {"mix": MixSettings(mixup=8.0, cutmix=0.0), "repeats": 4}
    assert probed(colors(tmp_path, split=split), ColorNet(), num_samples=64) == plain


def test_detects_permuted_classes(tmp_path) -> None:
    order = [3, 1, 2, 7, 4, 5, 6, 8, 0, 9]  # logit k is color order[k]
    config = colors(tmp_path)
    report = probed(config, ColorNet(order=order))
    assert report.top1 > report.required_top1  # six classes of ten are right, which is well above chance
    (problem,) = report.problems
    moved = "'color 0' -> 'color 8', 'color 3' -> 'color 0', 'color 7' -> 'color 3', 'color 8' -> 'color 7' ("
    assert f"the classes look permuted, label -> the teacher's class: {moved}" in problem
    assert "give the source the teacher's order as `classes`" in problem


def test_detects_permutation_in_few_samples(tmp_path) -> None:
    config = colors(tmp_path, num_samples=60)
    (problem,) = probed(config, ColorNet(order=[5, 6, 7, 8, 9, 0, 1, 2, 3, 4])).problems
    assert "look permuted" in problem


def test_detects_wrong_normalization(tmp_path) -> None:
    config = colors(tmp_path, transform={"std": (0.01, 0.01, 0.01)})
    (problem,) = probed(config, Spoilt(lambda logits: logits + torch.eye(NUM_CLASSES)[2] * 99999)).problems
    assert "nearly all predictions are 'color 2'; was the teacher trained with the mean and std" in problem


def test_random_outputs_are_chance(tmp_path) -> None:
    def noise(logits: Tensor) -> Tensor:
        seed = int(logits.abs().sum() * 1e4)
        return torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))

    for num_samples in (30, 400):
        report = probed(colors(tmp_path, num_samples=num_samples), Spoilt(noise))
        (problem,) = report.problems
        assert report.top1 < 0.3
        assert "the teacher hardly recognizes these images; are its weights loaded" in problem


@pytest.mark.parametrize(("num_classes", "num_samples", "accuracy"), [(3, 60, 0.7), (10, 60, 0.6), (100, 120, 0.01)])
def test_random_mistakes_are_no_permutation(num_classes: int, num_samples: int, accuracy: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        labels = rng.integers(0, num_classes, size=num_samples)
        is_right = rng.random(num_samples) < accuracy
        choices = np.where(is_right, labels, rng.integers(0, num_classes, size=num_samples))
        report = judge(torch.from_numpy(labels), torch.eye(num_classes)[choices], 5.0, None)
        assert "permuted" not in " ".join(report.problems)


def test_coarse_classes_are_no_permutation(tmp_path) -> None:
    def coarse(logits: Tensor) -> Tensor:
        return torch.eye(NUM_CLASSES)[logits.argmax(dim=1) // 2 * 2 + 1]

    (problem,) = probed(colors(tmp_path), Spoilt(coarse), min_factor=10.0).problems
    assert "hardly recognizes these images" in problem


def test_two_classes_need_three_quarters(tmp_path) -> None:
    config = colors(tmp_path, label_of=lambda k: k % 2, classes=("even", "odd"))
    report = probed(config, Spoilt(lambda logits: logits.view(-1, 5, 2).amax(dim=1)))
    assert report.problems == () and report.required_top1 == pytest.approx(0.75, abs=0.01)


def sharp_sigmoid(logits: Tensor) -> Tensor:
    """What a network for independent classes returns: near 1 for a single one, and on unknown images for none."""
    return torch.sigmoid(logits + 12)


@pytest.mark.parametrize(
    ("spoil", "layer"), [(lambda logits: logits.softmax(dim=1), "softmax"), (sharp_sigmoid, "sigmoid")]
)
def test_finds_probabilities_on_real_images(tmp_path, spoil, layer: str) -> None:
    config, teacher = colors(tmp_path), teacher_of(Spoilt(spoil))
    found = teacher.problems
    teacher.problems = ()  # as if the generated images had shown nothing
    report = run_probe(config, teacher)
    assert report is not None
    (problem,) = report.problems
    assert f"without the {layer} at its end" in problem and report.top1 > 0.9
    if found:  # it is not reported a second time
        teacher.problems = found
        again = run_probe(config, teacher)
        assert again is not None and again.problems == ()
    with pytest.raises(TeacherError, match=f"without the {layer}"):
        teacher.problems = ()
        probe_teacher(config, teacher, ProbeSettings(strict=True))


def test_excluded_class_is_finite(tmp_path) -> None:
    config = colors(tmp_path, classes=None)
    net = Spoilt(lambda logits: torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], dim=1))
    report = probed(config, net)
    assert report.problems == () and report.num_bad_rows == 0


def test_counts_non_finite_rows(tmp_path) -> None:
    def spoil(logits: Tensor) -> Tensor:
        is_first = logits.argmax(dim=1, keepdim=True) == 0
        is_last = logits.argmax(dim=1, keepdim=True) == NUM_CLASSES - 1
        return logits.masked_fill(is_first, math.nan).masked_fill(is_last, math.inf)

    report = probed(colors(tmp_path), Spoilt(spoil))
    assert 60 < report.num_bad_rows < 100 and math.isfinite(report.mean_confidence or math.nan)
    (problem,) = report.problems
    assert f"{report.num_bad_rows} of 400 rows of logits hold NaN or inf" in problem
    excludes_one = probed(
        colors(tmp_path), Spoilt(lambda logits: logits.masked_fill(torch.arange(NUM_CLASSES) == 0, -math.inf))
    )
    assert excludes_one.num_bad_rows == 0  # its probability is 0
    all_bad = probed(colors(tmp_path), Spoilt(lambda logits: logits * math.nan))
    assert all_bad.top1 == 0 and sum(all_bad.predicted) == 0  # not the share of class 0
    assert all_bad.num_bad_rows == 400 and len(all_bad.problems) == 1 and all_bad.mean_confidence is None


def test_hint_is_of_finite_rows(tmp_path) -> None:
    def spoil(logits: Tensor) -> Tensor:
        return logits.masked_fill(logits.argmax(dim=1, keepdim=True) < 7, math.nan)

    config = colors(tmp_path, classes=None, label_of=lambda k: max(k - 1, 0))
    problems = probed(config, Spoilt(spoil)).problems
    assert len(problems) == 2 and "look shifted by +1" in problems[1]


def test_labels_beyond_logits_are_a_problem(tmp_path) -> None:
    net = Spoilt(lambda logits: logits[:, :6])
    assert "labels go up to 9 and the teacher has 6 logits" in probed(colors(tmp_path, classes=None), net).problems[0]


def test_majority_class_is_chance(tmp_path) -> None:
    config = colors(tmp_path, label_of=lambda k: int(k == 9))
    report = probed(config, Spoilt(lambda logits: logits + torch.eye(NUM_CLASSES)[0] * 999), num_samples=400)
    assert report.top1 == report.chance == pytest.approx(0.9)
    assert report.problems


def test_strict_raises_else_warns(tmp_path, caplog) -> None:
    config, net = colors(tmp_path), ColorNet(order=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    report = probed(config, net)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"teacher probe: {problem}" for problem in report.problems]
    with pytest.raises(TeacherError, match=r"failed its probe on 400 training images: top-1 is .*probe\.strict: false"):
        probed(config, net, strict=True)


def test_skips_unlabeled_data(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    config = colors(tmp_path, labeled=False)
    assert probe_teacher(config, teacher_of(ColorNet()), ProbeSettings(strict=True)) == {}
    assert caplog.messages[-1] == "teacher probe: skipped, because the training data has no labels"


class PixelsThenColors(ColorNet):
    """Returns the logits of two teachers, the first of which are of pixels."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixels.logits": images, "colors.logits": super().forward(images)}


def test_logits_of_pixels_keep_no_other_from_being_judged(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    found = probe_teacher(colors(tmp_path), teacher_of(PixelsThenColors()), ProbeSettings())
    assert [*found] == ["colors.logits"] and found["colors.logits"].top1 > 0.95
    assert any(line.startswith("teacher probe (pixels.logits): skipped") for line in caplog.messages)


def test_run_is_unaffected(tmp_path) -> None:
    config = colors(tmp_path, num_samples=80, batch_size=16, run_dir=tmp_path / "run")
    teacher = teacher_of(ColorNet())
    with KDDataLoader.from_config(config, teacher=teacher) as loader:
        wanted = [fields(batch) for _ in range(2) for batch in loader]
    with KDDataLoader.from_config(config, teacher=teacher) as loader:
        batches = iter(loader)
        found = [fields(next(batches)), fields(next(batches))]
        kept = torch.get_rng_state(), np.random.get_state()[1].copy(), loader.state_dict()
        files = sorted((tmp_path / "run").iterdir())
        probe_teacher(config, teacher)
        assert torch.equal(torch.get_rng_state(), kept[0]) and (np.random.get_state()[1] == kept[1]).all()
        assert json.dumps(loader.state_dict()) == json.dumps(kept[2])
        assert sorted((tmp_path / "run").iterdir()) == files
        found += [fields(batch) for batch in batches]
        found += [fields(batch) for batch in loader]
    assert_same(found, wanted)
    teacher(torch.zeros(1, 3, SIZE, SIZE))  # still open


def test_writes_nothing(tmp_path) -> None:
    probe_teacher(colors(tmp_path, run_dir=tmp_path / "run"), teacher_of(ColorNet()))
    assert not (tmp_path / "run").exists()


def test_ranks_agree(tmp_path) -> None:
    config, teacher = colors(tmp_path, num_samples=100), teacher_of(ColorNet())
    alone = probe_teacher(config, teacher)
    # A fake group of four ranks that do not communicate.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        assert probe_teacher(config, teacher) == alone
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("num_classes", "accuracy"), [(2, 0.9), (10, 0.8), (100, 0.5), (1000, 0.5)])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8, 16, 40])
def test_few_images_are_no_false_alarm(num_classes: int, accuracy: float, num_samples: int) -> None:
    rng = np.random.default_rng(num_samples)
    num_alarms = 0
    for _ in range(200):
        labels = rng.integers(0, num_classes, size=num_samples)
        is_right = rng.random(num_samples) < accuracy
        choices = np.where(is_right, labels, rng.integers(0, num_classes, size=num_samples))
        num_alarms += bool(judge(torch.from_numpy(labels), torch.eye(num_classes)[choices], 5.0, None).problems)
    assert num_alarms <= 2


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_few_images_show_untrained_teacher(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels, choices = rng.integers(0, num_classes, size=(2, 24))
    (problem,) = judge(torch.from_numpy(labels), torch.eye(num_classes)[choices], 5.0, None).problems
    assert "hardly recognizes these images" in problem


def test_stops_at_its_time_after_a_batch(tmp_path) -> None:
    assert probed(colors(tmp_path, batch_size=16), ColorNet(), max_seconds=1e-9).num_samples == 16


def first_batches(config: RunConfig, net: nn.Module, **settings) -> tuple[KDDataLoader, FirstBatches | None]:
    loader = KDDataLoader.from_config(config, teacher=teacher_of(net))
    return loader, FirstBatches.of_run(loader, ProbeSettings(max_seconds=60, **settings))


def test_first_batches_of_run_give_the_same_report(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    config, net = colors(tmp_path, batch_size=64), ColorNet(order=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    report = probed(config, net, num_samples=100)
    caplog.clear()
    loader, probe = first_batches(config, net, num_samples=100)
    assert probe is not None
    with loader:
        for number, batch in enumerate(loader):
            assert probe.is_done == (number >= 2)
            if not probe.is_done:
                probe.add(batch)
    probe.finish()
    assert [line for line in caplog.messages if "probe" in line] == [f"teacher probe: {it}" for it in report.problems]


def test_short_epoch_is_judged_at_its_end(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    loader, probe = first_batches(colors(tmp_path, num_samples=40, batch_size=20), ColorNet())
    assert probe is not None
    probe.finish()  # nothing was seen
    with loader:
        for batch in loader:
            probe.add(batch)
    assert not probe.is_done
    probe.finish()
    probe.finish()
    assert [line.partition("%")[2] for line in caplog.messages if "top-1" in line] != [] and probe.is_done
    assert sum("on 40 training images" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("split", "settings", "labeled"),
    [
        ({"mix": MixSettings(mixup=1.0, cutmix=0.0)}, {}, True),
        ({"shuffle": False}, {}, True),
        ({"repeats": 2}, {}, True),
        ({}, {"strict": True}, True),
        ({}, {}, False),
    ],
    ids=["mixed", "unshuffled", "repeated", "strict", "unlabeled"],
)
def test_other_runs_need_a_probe_before(tmp_path, split, settings, labeled: bool) -> None:
    loader, probe = first_batches(colors(tmp_path, split=split, labeled=labeled), ColorNet(), **settings)
    loader.close()
    assert probe is None


def test_first_shards_are_no_probe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be of a single class, which tells nothing about the others."""
    monkeypatch.setattr(Arrays, "shard_ends", np.array([0, 200, 400]), raising=False)
    loader, probe = first_batches(colors(tmp_path, split={"shuffle": ShardShuffle(buffer=50)}), ColorNet())
    loader.close()
    assert probe is None
