"""A recording replays the outputs of its teacher, or raises an error that names what has changed."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.evaluation.probe import probe_teacher
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.recorded.parts import column_offsets
from kd_pipeline.teachers.recorded.recording import Recording, open_recording
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.corpus import cut_in_half
from tests.recordings import (
    INT8,
    NUM_EPOCHS,
    PLUGINS,
    TOP_2,
    column,
    config,
    edit,
    live,
    manifest_of,
    part_of,
    recorded,
    replayed,
    replaying,
    set_column,
    small_recording,
)
from tests.streams import TRAIN, assert_same, global_rows, rows, run

MIX = MixSettings(mixup=0.5, cutmix=1.0).model_dump()


@pytest.fixture(scope="module")
def plain(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in full float32; do not change it."""
    return recorded(photo_folder, tmp_path_factory.mktemp("plain") / "recording")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
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
def test_replay_equals_teacher_exactly(photo_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    found = replayed(photo_folder, recording, **options)
    wanted = live(photo_folder, **options)
    assert found[0].keys() >= {"logits", "features"}
    assert_same(*([row for row in rows(stream) if row["valid"]] for stream in (found, wanted)))
    for ours, theirs in zip(found, wanted, strict=True):
        # Padding repeats a sample in a different row of a batch, which may round differently.
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
def test_replay_with_any_batch_size(photo_folder: Path, plain: Path, options: dict[str, Any]) -> None:
    whole = rows(replayed(photo_folder, plain))
    found = [row for row in rows(replayed(photo_folder, plain, **options)) if row["valid"]]
    kept = 36 if options.get("last_batch") == "drop" else 37
    assert_same(found, [*whole[:kept], *whole[37 : 37 + kept]])


@pytest.mark.parametrize("options", [{}, {"mix": MIX, "last_batch": "pad"}], ids=str)
def test_replay_on_two_ranks(photo_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    whole = [row for row in rows(replayed(photo_folder, recording, **options)) if row["valid"]]
    ranks = [replayed(photo_folder, recording, shard=Shard(rank, 2), batch_size=4, **options) for rank in range(2)]
    assert_same([row for row in global_rows(ranks) if row["valid"]], whole)


def test_cut_mixed_batch_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", mix=MIX)
    with pytest.raises(StateError, match=r"cut_of_mixed_batch: None → 'the last 5 places of an epoch are cut for 2"):
        replaying(photo_folder, recording, mix=MIX, shard=Shard(0, 2), batch_size=4)
    # 36 samples fill all batches, and dropping the last one leaves nothing to cut.
    replaying(photo_folder, recording, mix=MIX, shard=Shard(0, 2), batch_size=2, last_batch="drop").close()


def test_substitute_is_replayed(photo_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    cut_in_half(Path(ImageFolder(root).name(7)))
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.5, "mix": MIX}
    recording = recorded(root, tmp_path / "recording", **options)
    found = replayed(root, recording, **options)
    assert_same(found, live(root, **options))
    assert any(not row["valid"] for row in rows(found))


def test_newly_unreadable_sample_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.5}
    recording = recorded(root, tmp_path / "recording", **options)
    with replaying(root, recording, verify=0, **options) as loader:
        cut_in_half(Path(loader.source.name(7)))
        with pytest.raises(StateError, match=r"at position \d+ of epoch 1 it has sample 7, and sample 8 is shown"):
            list(loader)


def test_outputs_belong_to_caller(plain: Path) -> None:
    recording = Recording(plain)
    position = np.arange(5)
    first = recording.replay(0, position, recording.samples(0, position))
    wanted = {name: output.clone() for name, output in first.items()}
    recording.replay(1, position, recording.samples(1, position))["logits"].zero_()
    again = recording.replay(0, position, recording.samples(0, position))
    first["logits"].zero_()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert all(output.dtype == torch.float32 and output.is_contiguous() for output in again.values())
    assert recording.busy_s > 0


def test_named_outputs_are_read_alone(copy: Path) -> None:
    recording, position = Recording(copy), np.arange(5)
    whole = recording.read(0, position)
    os.truncate(part_of(copy), column_offsets(recording.manifest, 37)["features.values"])  # the last column
    found = recording.read(0, position, outputs=("logits",))
    assert found.keys() == {"logits"} and torch.equal(found["logits"], whole["logits"])


def test_properties_are_those_of_the_teacher(plain: Path) -> None:
    recording = Recording(plain)
    assert (recording.backend, recording.precision, recording.num_epochs) == ("recorded", "fp32", NUM_EPOCHS)
    assert {name: str(spec) for name, spec in recording.outputs.items()} == {
        "logits": "[any, 3] float32",
        "features": "[any, 32, 8, 8] float32",
    }


@pytest.mark.parametrize("module", [None, torch.nn.Identity()], ids=["alone", "module"])
def test_open_teacher_says_where_a_recording_goes(plain: Path, module: torch.nn.Module | None) -> None:
    for settings in (TeacherSettings(path=plain), TeacherSettings(backend="recorded")):
        with pytest.raises(ConfigError, match=r"give KDDataLoader a kd_pipeline\.Recording\(path\)") as caught:
            open_teacher(settings, module=module)
        assert ("use backend: pytorch for the module" in str(caught.value)) == (module is not None)


def test_loader_takes_a_recording(photo_folder: Path, plain: Path) -> None:
    source, recording = ImageFolder(photo_folder), Recording(plain)
    with KDDataLoader(source, TRAIN, recording, batch_size=8, seed=5, device="cpu") as loader:
        assert_same(run(loader, NUM_EPOCHS), replayed(photo_folder, plain))
        assert loader.teacher is recording
    recording.samples(0, np.arange(2))  # still open


def test_closed_recording_refuses_replay(plain: Path) -> None:
    recording = Recording(plain)
    recording.close()
    recording.close()
    with pytest.raises(TeacherError, match="closed"):
        recording.replay(0, np.arange(2), np.arange(2))


def test_unrecorded_epoch_is_refused(photo_folder: Path, plain: Path) -> None:
    with (
        replaying(photo_folder, plain) as loader,
        pytest.raises(StateError, match=r"epoch 3 \(in Python epoch=2\) was not recorded.* 2 complete"),
    ):
        run(loader, NUM_EPOCHS + 1)


def test_run_resumes_with_full_recording(photo_folder: Path, plain: Path) -> None:
    whole = live(photo_folder)
    described = config(photo_folder)
    with KDDataLoader.from_config(
        described,
        teacher=open_run_teacher(described, plugins=PLUGINS),
    ) as loader:
        for _ in zip(range(3), loader, strict=False):
            state = loader.state_dict()
    with replaying(photo_folder, plain) as loader:
        loader.load_state_dict(state)
        assert_same(run(loader, NUM_EPOCHS), whole[3:])


# Errors


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
        ({"transform": {**TRAIN.model_dump(), "size": 64}}, "transform.size: 32 → 64"),
        ({"transform": {**TRAIN.model_dump(), "dtype": "float16"}}, "transform.dtype: 'float32' → 'float16'"),
    ],
    ids=str,
)
def test_changed_setting_is_named(photo_folder: Path, plain: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(StateError) as caught:
        replaying(photo_folder, plain, **options)
    assert f"  {line}\n" in str(caught.value) and str(plain) in str(caught.value)


def test_batch_dependent_pixels_are_refused(photo_folder: Path, plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.hw_decoder_load is 0\.5.*set it to 0 or 1"):
        replaying(photo_folder, plain, hw_decoder_load=0.5)


@pytest.mark.parametrize("name", ["dali", "device", "num_samples"])
def test_other_decoder_device_or_size_is_named(photo_folder: Path, copy: Path, name: str) -> None:
    edit(copy, **{f"stream__{name}": "0.1"})
    with pytest.raises(StateError, match=rf"{name}: '0\.1' → "):
        replaying(photo_folder, copy)


def test_changed_data_file_is_refused(photo_folder: Path, plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    replaying(root, plain).close()
    path = Path(ImageFolder(root).name(3))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StateError, match="source: "):
        replaying(root, plain)


@pytest.mark.parametrize("options", [{}, {"mix": MIX, "repeats": 2}], ids=str)
def test_changed_pixels_are_found(photo_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recording = recorded(photo_folder, tmp_path / "recording", **options)
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    for path in root.rglob("*.png"):
        path.write_bytes(_with_one_more(path.read_bytes()))
    edit(recording, stream__source=ImageFolder(root).fingerprint)
    for path in root.rglob("*.jpg"):
        assert path.read_bytes() == (photo_folder / path.relative_to(root)).read_bytes()
    with pytest.raises(StateError, match=r"the first is sample \d+ \(.*\.png\) at position \d+ of epoch [12]"):
        for _ in range(20):
            replaying(root, recording, verify=37, **options).close()
    replaying(root, recording, verify=0, **options).close()


def _with_one_more(png: bytes) -> bytes:
    """The image with each pixel changed by one level."""
    pixels = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    stream = io.BytesIO()
    Image.fromarray(np.where(pixels < 255, pixels + 1, pixels - 1).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_each_start_checks_different_images(photo_folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: set[tuple[int, ...]] = set()
    replay = Recording.replay

    def watched(recording: Recording, epoch: int, position: Any, sample: Any) -> dict[str, Tensor]:
        checked.add((epoch, *position.tolist()))
        return replay(recording, epoch, position, sample)

    monkeypatch.setattr(Recording, "replay", watched)
    for _ in range(4):
        replaying(photo_folder, plain, verify=6).close()
    assert len(checked) == 4 and {len(each) for each in checked} == {7}
    assert len({each[1:] for each in checked}) == 4


def test_swapped_samples_are_refused(photo_folder: Path, copy: Path) -> None:
    samples = column(copy, "sample")
    samples[0, [3, 4]] = samples[0, [4, 3]]
    set_column(copy, "sample", samples)
    with (
        replaying(photo_folder, copy, verify=0) as loader,
        pytest.raises(
            StateError,
            match=rf"at position 3 of epoch 1 it has sample {samples[0, 3] - 1}, and sample {samples[0, 4] - 1} is",
        ),
    ):
        next(iter(loader))


@pytest.mark.parametrize("num_bytes", [1, -1])
def test_part_of_other_size_is_refused(copy: Path, num_bytes: int) -> None:
    path = part_of(copy)
    size = path.stat().st_size
    os.truncate(path, size + num_bytes)
    with pytest.raises(TeacherError, match=rf"{path.name} has {size + num_bytes} bytes and not {size}; copy or record"):
        Recording(copy).samples(0, np.arange(1))


@pytest.mark.parametrize("name", ["sample", "logits.values", "logits.rest"])
def test_part_cut_off_while_used_is_an_error(tmp_path: Path, name: str) -> None:
    """It would end the process with SIGBUS if the file were memory-mapped."""
    recording = Recording(small_recording(tmp_path / "recording", outputs=TOP_2))
    position = np.arange(30, 40)
    recording.replay(0, position, position)
    path = part_of(recording.path, start=25)
    os.truncate(path, column_offsets(recording.manifest, 15)[name] + 2)
    with pytest.raises(TeacherError, match=rf"{path.name} cannot be read: it was cut off while it was used; copy or"):
        recording.replay(0, position, position)


def test_rows_in_any_order_are_those_of_their_positions(tmp_path: Path) -> None:
    recording = Recording(small_recording(tmp_path / "recording"))
    position = np.array([7, 8, 9, 3, 3, 39, 0, 1])
    found = recording.replay(0, position, position)["logits"]
    assert found.tolist() == [[3.0 * row, 3.0 * row + 1, 3.0 * row + 2] for row in position.tolist()]
    assert recording.replay(0, position[:0], position[:0])["logits"].shape == (0, 3)


@pytest.mark.parametrize("sample", [40, 2**30, -7])
def test_sample_out_of_range_is_named(tmp_path: Path, sample: int) -> None:
    recording = Recording(small_recording(tmp_path / "recording"))
    samples = column(recording.path, "sample")
    samples[0, 5] = sample + 1
    set_column(recording.path, "sample", samples)
    with pytest.raises(TeacherError, match=rf"at position 5 of epoch 1 it has the sample {sample} of 40"):
        recording.samples(0, np.arange(10))


@pytest.mark.parametrize("index", [30_000, 3, -1])
def test_class_out_of_range_is_named(tmp_path: Path, index: int) -> None:
    recording = Recording(small_recording(tmp_path / "recording", outputs=TOP_2))
    classes = column(recording.path, "logits.classes")
    classes[0, 21, 1] = index
    set_column(recording.path, "logits.classes", classes)
    recording.replay(0, np.arange(20), np.arange(20))
    with pytest.raises(TeacherError, match=rf"at position 21 of epoch 1 it has the class {index} of 3"):
        recording.replay(0, np.arange(20, 30), np.arange(20, 30))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 2e36])
def test_scale_out_of_range_is_named(tmp_path: Path, scale: float) -> None:
    recording = Recording(small_recording(tmp_path / "recording", outputs=INT8))
    assert recording.outputs["spatial"].num_prefix_tokens == 1
    scales = column(recording.path, "spatial.scale")
    scales[0, 21, 1] = scale
    set_column(recording.path, "spatial.scale", scales)
    recording.replay(0, np.arange(20), np.arange(20))
    found = np.float32(scale)
    with pytest.raises(TeacherError) as caught:
        recording.replay(0, np.arange(20, 30), np.arange(20, 30))
    assert f"at position 21 of epoch 1 it has the scale {found} in spatial.scale;" in str(caught.value)


def test_removed_part_is_named(copy: Path) -> None:
    recording, path = Recording(copy), part_of(copy, epoch=1)
    path.unlink()
    with pytest.raises(TeacherError, match=rf"is damaged: {path} is missing; copy or record it again"):
        recording.samples(1, np.arange(1))
    assert Recording(copy).num_epochs == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', ""])
def test_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(TeacherError, match=r"manifest\.json is damaged"):
        Recording(copy)


def test_folder_without_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"holds no recording.*make one with kd-pipeline record"):
        Recording(tmp_path)


def test_classes_in_other_order_are_refused(photo_folder: Path, copy: Path) -> None:
    teacher = manifest_of(copy).teacher
    edit(copy, teacher=teacher.model_copy(update={"classes": ("flower", "roof", "sky")}))
    recording = Recording(copy)
    recording.check_classes(("flower", "roof", "sky"))
    recording.check_classes(None)
    with pytest.raises(TeacherError, match="class 1 is 'sky' in the data and 'roof' there"):
        recording.check_classes(("flower", "sky", "roof"))
    with pytest.raises(TeacherError, match="class 2 is None in the data and 'sky' there"):
        recording.check_classes(("flower", "roof"))
    source = ImageFolder(photo_folder, classes=("flower", "sky", "roof"))
    with pytest.raises(TeacherError, match="class 1 is 'sky' in the data and 'roof' there"):
        KDDataLoader(source, TRAIN, recording, batch_size=8, seed=5, device="cpu")


# Settings


def test_path_alone_is_a_recording(plain: Path) -> None:
    for settings in (TeacherSettings(path=plain), TeacherSettings(backend="recorded", path=plain, verify=3)):
        assert open_recording(settings).num_verified == settings.verify


@pytest.mark.parametrize("setting", [{"precision": "bf16"}, {"max_batch": 4}, {"num_threads": 2}])
def test_unused_setting_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="means nothing to the recorded backend"):
        TeacherSettings(backend="recorded", path=Path("recording"), **setting)
    with pytest.raises(ConfigError, match="means nothing to the recorded backend"):
        open_recording(TeacherSettings(path=Path("recording"), **setting))


def test_recording_without_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="set path"):
        open_recording(TeacherSettings(backend="recorded"))


def test_recording_is_no_ensemble_member() -> None:
    with pytest.raises(ValidationError, match="record the outputs of all members together"):
        EnsembleSettings(members=(TeacherSettings(path=Path("recording")),))


# The probe


def test_probe_reads_recorded_logits(photo_folder: Path, copy: Path) -> None:
    labels = ImageFolder(photo_folder).labels
    samples, logits = column(copy, "sample")[0] - 1, column(copy, "logits.values")
    assert labels is not None
    top1 = float((logits[0].argmax(1) == labels[samples]).mean())
    report = probe_teacher(config(photo_folder), Recording(copy))["logits"]
    assert report.num_samples == 37
    assert report.top1 == pytest.approx(top1)
    logits[0] = 5 * np.eye(3)[labels[samples]]
    set_column(copy, "logits.values", logits)
    report = probe_teacher(config(photo_folder), Recording(copy))["logits"]
    assert report.top1 == 1 and not report.problems


def test_probe_refuses_recording_of_more_images(photo_folder: Path, tmp_path: Path) -> None:
    recording = Recording(small_recording(tmp_path / "recording"))
    with pytest.raises(StateError, match="is of 40 images, and the training data has 37; record the teacher again"):
        probe_teacher(config(photo_folder), recording)


def test_probe_skips_mixed_recording(photo_folder: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kd_pipeline")
    assert probe_teacher(config(photo_folder, mix=MIX), Recording(plain)) == {}
    assert "mixed images" in caplog.text


def test_different_outputs_have_different_fingerprints(copy: Path) -> None:
    full = Recording(copy).fingerprint
    about = manifest_of(copy)
    assert full == about.teacher.fingerprint
    found = {full}
    changes: list[dict[str, Any]] = [{"top_k": 1}, {"top_k": 2}, {"dtype": "float16"}]
    for name, each in [("logits", change) for change in changes] + [
        ("features", {"dtype": "int8"}),
        ("features", {"teacher_grid": (9, 9)}),
    ]:
        outputs = {**about.outputs, name: about.outputs[name].model_copy(update=each)}
        edit(copy, outputs=outputs)
        found.add(Recording(copy).fingerprint)
    assert len(found) == 6


def test_part_of_exact_outputs_has_fingerprint_of_teacher(copy: Path) -> None:
    about = manifest_of(copy)
    edit(copy, outputs={"features": about.outputs["features"]})
    recording = Recording(copy)
    assert recording.fingerprint == about.teacher.fingerprint and list(recording.outputs) == ["features"]
