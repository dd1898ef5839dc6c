"""What was recorded is what the teacher would say now, or there is an error that names what has changed."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from kd_pipeline import losses
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources.base import ImageFolder
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.evaluation.probe import probe_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded import files as recording
from kd_pipeline.teachers.recorded.files import Manifest, TeacherFacts, checksums, decode, encode
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.corpus import cut_in_half
from tests.networks import random_images
from tests.recordings import NUM_EPOCHS, PLUGINS, config, edit, live, recorded, replayed, replaying
from tests.streams import TRAIN, assert_same, global_rows, rows, run

MIX = MixSettings(mixup=0.5, cutmix=1.0).model_dump()
NUM_CLASSES = 12


@pytest.fixture(scope="module")
def plain(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in full float32; do not change it."""
    return recorded(photo_folder, tmp_path_factory.mktemp("plain") / "recording")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    shutil.copytree(plain, tmp_path / "copy")
    return tmp_path / "copy"


# Replay


@pytest.mark.parametrize(
    "options",
    [
        {"last_batch": "keep"},
        {"last_batch": "drop"},
        {"last_batch": "pad"},
        {"shuffle": False},
        {"repeats": 3},
        {"mix": MIX},
        {"mix": MIX, "repeats": 2, "last_batch": "drop"},
    ],
    ids=str,
)
def test_a_full_recording_gives_what_the_teacher_gives_to_the_last_bit(
    photo_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    found = replayed(photo_folder, recording, **options)
    wanted = live(photo_folder, **options)
    assert found[0].keys() >= {"logits", "features"}
    assert_same(*([row for row in rows(stream) if row["valid"]] for stream in (found, wanted)))
    for ours, theirs in zip(found, wanted, strict=True):
        # Padding shows a sample once more, in another row of a batch, which may round differently.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 5},
        {"batch_size": 37},
        {"batch_size": 6, "last_batch": "drop"},
        {"batch_size": 5, "last_batch": "pad"},
    ],
    ids=str,
)
def test_a_recording_serves_any_batch_size(photo_folder: Path, plain: Path, options: dict[str, Any]) -> None:
    whole = rows(replayed(photo_folder, plain))
    found = [row for row in rows(replayed(photo_folder, plain, **options)) if row["valid"]]
    kept = 36 if options.get("last_batch") == "drop" else 37
    assert_same(found, [*whole[:kept], *whole[37 : 37 + kept]])


@pytest.mark.parametrize("options", [{}, {"mix": MIX, "last_batch": "pad"}], ids=str)
def test_two_ranks_together_replay_what_one_has_recorded(
    photo_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    whole = [row for row in rows(replayed(photo_folder, recording, **options)) if row["valid"]]
    ranks = [replayed(photo_folder, recording, shard=Shard(rank, 2), batch_size=4, **options) for rank in range(2)]
    assert_same([row for row in global_rows(ranks) if row["valid"]], whole)


def test_the_last_mixed_batch_cut_for_ranks_is_refused_as_it_has_other_partners(
    photo_folder: Path, tmp_path: Path
) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", mix=MIX)
    with pytest.raises(StateError, match=r"cut_of_mixed_batch: None → 'the last 5 places of an epoch are cut for 2"):
        replaying(photo_folder, recording, mix=MIX, shard=Shard(0, 2), batch_size=4)
    # 36 places fill all batches but for one place, and dropping that leaves nothing to cut.
    replaying(photo_folder, recording, mix=MIX, shard=Shard(0, 2), batch_size=2, last_batch="drop").close()


def test_a_stand_in_is_replayed_as_it_was_recorded(photo_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    cut_in_half(Path(ImageFolder(root).name(7)))
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.5, "mix": MIX}
    recording = recorded(root, tmp_path / "recording", **options)
    found = replayed(root, recording, **options)
    assert_same(found, live(root, **options))
    assert any(not row["valid"] for row in rows(found))


def test_a_sample_that_cannot_be_read_any_more_is_refused_and_named(photo_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.5}
    recording = recorded(root, tmp_path / "recording", **options)
    with replaying(root, recording, verify=0, **options) as loader:
        cut_in_half(Path(loader.source.name(7)))
        with pytest.raises(StateError, match=r"at place \d+ of epoch 0 it has sample 7, and sample 8 is shown"):
            list(loader)


def test_answers_are_fresh_and_belong_to_the_caller(plain: Path) -> None:
    teacher = RecordedTeacher(plain)
    place = np.arange(5)
    first = teacher.replay(0, place, teacher.samples(0, place))
    wanted = {name: output.clone() for name, output in first.items()}
    teacher.replay(1, place, teacher.samples(1, place))["logits"].zero_()
    again = teacher.replay(0, place, teacher.samples(0, place))
    first["logits"].zero_()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert all(output.dtype == torch.float32 and output.is_contiguous() for output in again.values())
    assert teacher.busy_s > 0


def test_a_recorded_teacher_says_what_its_teacher_said(plain: Path) -> None:
    teacher = open_teacher(TeacherSettings(path=plain), image_shape=(3, 32, 32))
    assert (teacher.backend, teacher.precision, teacher.num_epochs) == ("recorded", "fp32", NUM_EPOCHS)
    assert {name: str(spec) for name, spec in teacher.outputs.items()} == {
        "logits": "[any, 3] float32",
        "features": "[any, 32, 8, 8] float32",
    }
    assert str(teacher.images) == "[any, 3, 32, 32] float32"


def test_it_answers_no_other_images_and_says_who_does(plain: Path) -> None:
    teacher = RecordedTeacher(plain)
    with pytest.raises(TeacherError, match=r"only the answers recorded in .*take the teacher itself here"):
        teacher(random_images(2))


def test_nothing_is_replayed_after_it_is_closed(plain: Path) -> None:
    teacher = RecordedTeacher(plain)
    teacher.close()
    teacher.close()
    with pytest.raises(TeacherError, match="closed"):
        teacher.replay(0, np.arange(2), np.arange(2))


def test_an_epoch_that_was_not_recorded_is_refused_by_its_number(photo_folder: Path, plain: Path) -> None:
    with (
        replaying(photo_folder, plain) as loader,
        pytest.raises(StateError, match=r"epoch 2 was not recorded.* 2 whole"),
    ):
        run(loader, NUM_EPOCHS + 1)


def test_a_run_with_the_teacher_goes_on_with_its_full_recording(photo_folder: Path, plain: Path) -> None:
    whole = live(photo_folder)
    described = config(photo_folder)
    with KDDataLoader.from_config(
        described.model_copy(update={"teacher": None}),
        teacher=open_run_teacher(described, plugins=PLUGINS),
    ) as loader:
        for _ in zip(range(3), loader, strict=False):
            state = loader.state_dict()
    with replaying(photo_folder, plain) as loader:
        loader.load_state_dict(state)
        assert_same(run(loader, NUM_EPOCHS), whole[3:])


# What is refused


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"seed": 6}, "seed: 5 → 6"),
        ({"shuffle": False}, "shuffle: True → False"),
        ({"repeats": 2}, "repeats: None → 2"),
        ({"mix": MIX}, "mix.mixup: None → 0.5"),
        ({"transform": {**TRAIN.model_dump(), "hue": 0.2}}, "transform.hue: 0.1 → 0.2"),
        ({"on_bad_sample": "substitute"}, "on_bad_sample: 'raise' → 'substitute'"),
        ({"max_pixels": 10**6}, "max_pixels: 89478485 → 1000000"),
    ],
    ids=str,
)
def test_a_changed_setting_is_refused_by_name(
    photo_folder: Path, plain: Path, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(StateError) as caught:
        replaying(photo_folder, plain, **options)
    assert f"  {line}\n" in str(caught.value) and str(plain) in str(caught.value)


def test_pixels_that_depend_on_their_batch_are_refused(photo_folder: Path, plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.hw_decoder_load is 0\.5.*set it to 0"):
        replaying(photo_folder, plain, hw_decoder_load=0.5)


@pytest.mark.parametrize("name", ["dali", "device", "num_samples"])
def test_another_decoder_device_or_size_is_refused_by_name(photo_folder: Path, copy: Path, name: str) -> None:
    edit(copy, **{f"stream__{name}": "0.1"})
    with pytest.raises(StateError, match=rf"{name}: '0\.1' → "):
        replaying(photo_folder, copy)


def test_a_changed_data_file_is_refused(photo_folder: Path, plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    replaying(root, plain).close()
    path = Path(ImageFolder(root).name(3))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StateError, match="source: "):
        replaying(root, plain)


@pytest.mark.parametrize("options", [{}, {"mix": MIX, "repeats": 2}], ids=str)
def test_changed_pixels_are_found_where_the_fingerprint_does_not_see_them(
    photo_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    for path in root.rglob("*.png"):
        path.write_bytes(_with_one_more(path.read_bytes()))
    edit(recording, stream__source=ImageFolder(root).fingerprint)
    for path in root.rglob("*.jpg"):
        assert path.read_bytes() == (photo_folder / path.relative_to(root)).read_bytes()
    with pytest.raises(StateError, match=r"the first is sample \d+ \(.*\.png\) at place \d+ of epoch [01]"):
        for _ in range(20):
            replaying(root, recording, verify=37, **options).close()
    replaying(root, recording, verify=0, **options).close()


def _with_one_more(png: bytes) -> bytes:
    """The image with its pixels changed by one."""
    pixels = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    stream = io.BytesIO()
    Image.fromarray(np.where(pixels < 255, pixels + 1, pixels - 1).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_other_images_are_looked_at_at_every_start(
    photo_folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: set[tuple[int, ...]] = set()
    replay = RecordedTeacher.replay

    def watched(teacher: RecordedTeacher, epoch: int, place: Any, sample: Any) -> dict[str, Tensor]:
        looked_at.add((epoch, *place.tolist()))
        return replay(teacher, epoch, place, sample)

    monkeypatch.setattr(RecordedTeacher, "replay", watched)
    for _ in range(4):
        replaying(photo_folder, plain, verify=6).close()
    assert len(looked_at) == 4 and {len(each) for each in looked_at} == {7}
    assert len({each[1:] for each in looked_at}) == 4


def test_a_row_of_another_sample_is_refused_with_both(photo_folder: Path, copy: Path) -> None:
    file = copy / "sample.bin"
    samples = np.fromfile(file, "<i4")
    samples[[3, 4]] = samples[[4, 3]]
    samples.tofile(file)
    with (
        replaying(photo_folder, copy, verify=0) as loader,
        pytest.raises(
            StateError,
            match=rf"at place 3 of epoch 0 it has sample {samples[3] - 1}, and sample {samples[4] - 1} is shown",
        ),
    ):
        next(iter(loader))


def test_a_row_that_was_never_written_is_refused(photo_folder: Path, copy: Path) -> None:
    samples = np.fromfile(copy / "sample.bin", "<i4")
    samples[10] = 0
    samples.tofile(copy / "sample.bin")
    with (
        replaying(photo_folder, copy, verify=0) as loader,
        pytest.raises(StateError, match="place 10 of epoch 0 is not"),
    ):
        list(loader)


@pytest.mark.parametrize("name", ["sample.bin", "checksum.bin", "logits.values.bin", "features.values.bin"])
def test_a_file_that_is_cut_off_is_refused_with_both_sizes(copy: Path, name: str) -> None:
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(TeacherError, match=rf"{name} has {size - 1} bytes and not {size}"):
        RecordedTeacher(copy)


def test_a_file_that_is_missing_is_named(copy: Path) -> None:
    (copy / "checksum.bin").unlink()
    with pytest.raises(TeacherError, match=r"checksum\.bin is not there"):
        RecordedTeacher(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', ""])
def test_a_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(TeacherError, match=r"manifest\.json is damaged"):
        RecordedTeacher(copy)


def test_a_folder_without_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"holds no recording.*make one with kd-pipeline record"):
        RecordedTeacher(tmp_path)


def test_classes_in_another_order_are_refused(copy: Path) -> None:
    facts = Manifest.load(copy).teacher
    edit(copy, teacher=facts.model_copy(update={"classes": ("flower", "roof", "sky")}))
    teacher = RecordedTeacher(copy)
    assert matched(teacher, ("flower", "roof", "sky")) is teacher
    with pytest.raises(TeacherError, match="class 1 is 'sky' in the data and 'roof' there"):
        matched(teacher, ("flower", "sky", "roof"))
    with pytest.raises(TeacherError, match="class 2 is None in the data and 'sky' there"):
        matched(teacher, ("flower", "roof"))


def test_it_fits_no_other_size(plain: Path) -> None:
    with pytest.raises(TeacherError, match="64"):
        open_teacher(TeacherSettings(path=plain), image_shape=(3, 64, 64))


# Settings


def test_a_path_alone_is_a_recording(plain: Path) -> None:
    for settings in (TeacherSettings(path=plain), TeacherSettings(backend="recorded", path=plain, verify=3)):
        with_settings: Teacher = open_teacher(settings)
        assert isinstance(with_settings, RecordedTeacher)
        assert with_settings.num_verified == settings.verify


@pytest.mark.parametrize("setting", [{"precision": "bf16"}, {"max_batch": 4}, {"num_threads": 2}])
def test_what_a_recording_cannot_follow_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="means nothing to the recorded backend"):
        TeacherSettings(backend="recorded", path=Path("recording"), **setting)
    with pytest.raises(ConfigError, match="means nothing to the recorded backend"):
        open_teacher(TeacherSettings(path=Path("recording"), **setting))


def test_a_recording_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="path"):
        open_teacher(TeacherSettings(backend="recorded"))


def test_a_recording_is_no_member_of_an_ensemble() -> None:
    with pytest.raises(ValidationError, match="record the answers of the whole ensemble"):
        EnsembleSettings(members=(TeacherSettings(path=Path("recording")),))


# The probe


def test_the_probe_holds_recorded_answers_against_the_labels(photo_folder: Path, copy: Path) -> None:
    labels = ImageFolder(photo_folder).labels
    samples = np.fromfile(copy / "sample.bin", "<i4")[:37] - 1
    logits = np.fromfile(copy / "logits.values.bin", "<f4").reshape(NUM_EPOCHS, 37, 3)
    assert labels is not None
    top1 = float((logits[0].argmax(1) == labels[samples]).mean())
    report = probe_teacher(config(photo_folder), RecordedTeacher(copy))
    assert report is not None and report.num_samples == 37
    assert report.top1 == pytest.approx(top1)
    logits[0] = np.eye(3)[labels[samples]]
    logits.tofile(copy / "logits.values.bin")
    report = probe_teacher(config(photo_folder), RecordedTeacher(copy))
    assert report is not None and report.top1 == 1 and not report.problems


def test_the_probe_of_mixed_recorded_answers_is_left_out(
    photo_folder: Path, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="kd_pipeline")
    assert probe_teacher(config(photo_folder, mix=MIX), RecordedTeacher(plain)) is None
    assert "mixed images" in caplog.text


# The largest logits alone


def manifest(top_k: int | None, dtype: Any = "float32", num_classes: int = NUM_CLASSES) -> Manifest:
    facts = TeacherFacts(fingerprint="f", backend="pytorch", precision="fp32", classes=None)
    return Manifest(
        teacher=facts, outputs={"logits": (num_classes,)}, top_k=top_k, dtype=dtype, stream={}, num_rows=1, epochs=1
    )


@pytest.fixture(scope="module")
def logits_NK() -> Tensor:
    return 4 * torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(0))


def through(logits_NK: Tensor, kept: Manifest) -> Tensor:
    """What is replayed of logits."""
    columns = encode({"logits": logits_NK}, kept)
    stored = {
        name: torch.from_numpy(columns[name].numpy().astype(column.dtype))
        for name, column in kept.columns.items()
        if name in columns
    }
    return decode(stored, kept)["logits"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-3)])
@pytest.mark.parametrize("top_k", [1, 4, NUM_CLASSES - 1])
def test_the_classes_that_are_kept_have_the_probabilities_that_they_had(
    logits_NK: Tensor, top_k: int, dtype: str, tolerance: float
) -> None:
    found_NK = through(logits_NK, manifest(top_k, dtype))
    wanted, classes = logits_NK.softmax(1).topk(top_k)
    torch.testing.assert_close(found_NK.softmax(1).gather(1, classes), wanted, atol=tolerance, rtol=0)
    assert torch.equal(found_NK.topk(top_k).indices, classes) or dtype == "float16"
    torch.testing.assert_close(found_NK.gather(1, classes), logits_NK.gather(1, classes), atol=tolerance, rtol=1e-3)


def test_the_other_classes_share_the_rest_evenly(logits_NK: Tensor) -> None:
    found_NK = through(logits_NK, manifest(4)).softmax(1)
    others = found_NK.scatter(1, logits_NK.topk(4).indices, torch.nan)
    for row, wanted in zip(others, logits_NK.softmax(1), strict=True):
        rest = row[~row.isnan()]
        assert len(rest) == NUM_CLASSES - 4 and len(rest.unique()) == 1
        assert float(rest.sum()) == pytest.approx(1 - float(wanted.topk(4).values.sum()), abs=1e-6)


def test_losses_work_on_the_largest_alone(logits_NK: Tensor) -> None:
    student_NK = torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    found_NK = through(logits_NK, manifest(NUM_CLASSES - 2))
    for loss in (losses.soft_target, losses.dkd, losses.dist):
        given = {"labels": torch.zeros(50, dtype=torch.int64)} if loss is losses.dkd else {}
        ours = loss(student_NK, found_NK, *given.values())
        theirs = loss(student_NK, logits_NK, *given.values())
        assert float(ours) == pytest.approx(float(theirs), rel=0.05)


def test_everything_in_float32_is_the_same_to_the_bit(logits_NK: Tensor) -> None:
    assert torch.equal(through(logits_NK, manifest(None)), logits_NK)


def test_many_classes_have_numbers_of_four_bytes() -> None:
    wide_NK = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    kept = manifest(3, num_classes=40_000)
    assert kept.columns["logits.classes"].dtype == np.dtype("<i4")
    assert manifest(3).columns["logits.classes"].dtype == np.dtype("<i2")
    assert torch.equal(through(wide_NK, kept).topk(3).indices, wide_NK.topk(3).indices)


def test_what_float16_cannot_hold_is_refused(logits_NK: Tensor) -> None:
    with pytest.raises(TeacherError, match=r"logits\.values goes up to 7e\+04, and float16 to 65504.*--dtype float32"):
        encode({"logits": torch.full((2, NUM_CLASSES), 7e4)}, manifest(None, "float16"))
    assert (
        not encode({"logits": torch.full((2, NUM_CLASSES), torch.nan)}, manifest(None, "float16"))["logits.values"]
        .isfinite()
        .any()
    )


def test_what_answers_differently_has_another_fingerprint(copy: Path) -> None:
    full = RecordedTeacher(copy).fingerprint
    assert full == Manifest.load(copy).teacher.fingerprint
    found = {full}
    for change in ({"top_k": 1}, {"top_k": 2}, {"dtype": "float16"}):
        about = Manifest.load(copy).model_copy(update={"top_k": None, "dtype": "float32"} | change)
        about.save(copy)
        shutil.copy(copy / "logits.values.bin", copy / "logits.classes.bin")
        shutil.copy(copy / "logits.values.bin", copy / "logits.rest.bin")
        found.add(RecordedTeacher(copy).fingerprint)
    assert len(found) == 4


# Checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checksum_is_of_one_image_whatever_batch_it_is_in(dtype: torch.dtype) -> None:
    images = random_images(40).to(dtype)
    whole = checksums(images)
    assert len(set(whole.tolist())) == 40
    assert np.array_equal(whole, np.concatenate([checksums(images[:7]), checksums(images[7:])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_computes_the_same_checksums(dtype: torch.dtype) -> None:
    """The way it does it, here on a CPU."""
    images = random_images(40).to(dtype)
    bits = images.flatten(1).view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert np.array_equal(recording._sums_on_gpu(bits, recording._factors(bits.shape[1])), checksums(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_least_change_of_any_pixel_changes_the_checksum(dtype: torch.dtype) -> None:
    image = random_images(1).to(dtype)
    before = checksums(image)
    for place in range(0, image.numel(), 97):
        changed = image.clone()
        flat = changed.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten()
        flat[place] ^= 1
        assert checksums(flat.view(dtype).view_as(image)) != before


def test_two_pixels_that_change_places_change_the_checksum() -> None:
    image = random_images(1)
    changed = image.flatten().clone()
    changed[[5, 900]] = changed[[900, 5]]
    assert checksums(changed.view_as(image)) != checksums(image)


def test_signs_that_change_do_not_cancel_out() -> None:
    image = random_images(1)
    for places in ([5, 900], [0, 1, 2, 3], list(range(image.numel()))):
        changed = image.flatten().clone()
        changed[places] *= -1
        assert checksums(changed.view_as(image)) != checksums(image)


def test_a_checksum_stays_what_it_was() -> None:
    """Recordings of earlier releases are to be checked by later ones."""
    ramp = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    assert checksums(ramp).tolist() == [4042165680, 3531456004]
