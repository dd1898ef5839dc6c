"""A trial finds black, stale and partly written images, crashes and hangs of a decoder."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_pipeline.data import decode_trial
from kd_pipeline.data.decode_trial import Nvjpeg, compare_decoding, describe_faults, make_images, try_decoding
from tests.views import graph_settings


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory):
    """Views of the test images decoded on the CPU; do not change them."""
    paths = make_images(tmp_path_factory.mktemp("images"))
    return decode_trial._render(decode_trial._inputs(paths), graph_settings(len(paths)))


@pytest.mark.slow
def test_images_differ_in_size_and_kind(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    with ExitStack() as opened:
        images = [opened.enter_context(Image.open(path)) for path in paths]
    assert len(images) == 64 and {path.suffix for path in paths} == {".jpg", ".png"}
    assert len({image.size for image in images}) > 50 and any(side % 2 for image in images for side in image.size)
    assert {image.mode for image in images} == {"RGB", "L"}
    jpegs = [image for image in images if image.format == "JPEG" and image.mode == "RGB"]
    assert {tuple(layer[1:3] for layer in image.layer) for image in jpegs} == {
        ((1, 1), (1, 1), (1, 1)),
        ((2, 1), (1, 1), (1, 1)),
        ((2, 2), (1, 1), (1, 1)),
    }
    assert any(image.info.get("progressive") for image in jpegs)


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["window", "full"])
def test_cpu_is_right_in_both_modes(decode: str) -> None:
    works, is_repeatable, detail = compare_decoding(decode, device_id=None)
    assert (
        works
        and is_repeatable
        and detail == "384 images are right, each at most 0.00/255 from the CPU's pixels on average"
    )


def spoiled(views, spoil):
    found = views.copy()
    spoil(found)
    return found


SPOIL = {
    "black": (lambda found: found[7].fill(0), "1 of 384 images are wrong (1 of one color)"),
    "gray": (lambda found: found[7:9].fill(128), "2 of 384 images are wrong (2 of one color)"),
    "stale": (lambda found: np.copyto(found[64:67], found[0:3]), "3 of 384 images are wrong (3 another image's)"),
    "half": (lambda found: found[70, :, 32:].fill(0), "1 of 384 images are wrong"),
    "one corner": (lambda found: found[70, :, 56:, 56:].fill(0), "1 of 384 images are wrong"),
    "noise": (lambda found: np.copyto(found[5], found[5][:, ::-1]), "1 of 384 images are wrong"),
    "not a number": (lambda found: found[9].fill(np.nan), "1 of 384 images are wrong"),
    "all of them": (lambda found: found.fill(0), "384 of 384 images are wrong (384 of one color)"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOIL.values(), ids=SPOIL)
def test_unwritten_image_is_found(views, spoil, words: str) -> None:
    assert describe_faults(spoiled(views, spoil), views) == words


def test_rounding_is_no_fault(views) -> None:
    noise = np.random.default_rng(0).normal(0, 3, views.shape)
    assert describe_faults((views + noise).astype(np.float32), views) == ""
    assert describe_faults(views, views) == ""


@pytest.mark.slow
def test_trial_reports_nvjpeg_from_child_process() -> None:
    trial = try_decoding("full", device_id=None)
    assert trial.works and trial.is_conclusive
    assert trial.nvjpeg is not None and trial.nvjpeg >= (12, 0)
    assert str(trial).startswith("whole images: 384 images are right")


@pytest.mark.slow
def test_trial_uses_nvjpeg_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's has the same name, so the one that is loaded first is used, by the child too."""
    torchvision = pytest.importorskip("torchvision")
    copies = [*(Path(torchvision.__file__).parents[1] / "torchvision.libs").glob("libnvjpeg.*")]
    if not copies:
        pytest.skip("this torchvision brings no nvJPEG")
    trials = []
    for library in (None, Nvjpeg((0, 0), copies[0])):
        monkeypatch.setattr(decode_trial, "loaded_nvjpeg", lambda library=library: library)
        trials.append(try_decoding("full", device_id=None))
    usual, other = trials
    assert usual.works and other.works
    assert usual.nvjpeg != other.nvjpeg, "one of them is not what was asked for"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("child", "detail"),
    [
        ("crash", "crashed with SIGSEGV"),
        ("hang", "timed out after 4 s"),
        ("report_garbage", "reported '{}'"),
        ("report_nothing", "ended without a report"),
        ("fail", "exited with status 3"),
    ],
)
def test_misbehaving_child_is_a_result(monkeypatch: pytest.MonkeyPatch, child: str, detail: str) -> None:
    monkeypatch.setattr(decode_trial, "_CHILD", f"tests.children:{child}")
    trial = try_decoding("window", device_id=0, hw_decoder_load=0.5, timeout_s=4)
    assert (trial.works, trial.is_conclusive, trial.detail) == (False, True, detail)
    assert str(trial) == f"windows with hw_decoder_load 0.5: {detail}"
    assert trial.log == {"report_nothing": "a package prints this"}.get(child, "")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to try")
def test_trial_without_gpu_is_inconclusive() -> None:
    trial = try_decoding("window", device_id=0)
    assert not trial.works and not trial.is_conclusive and "CUDA is not available" in trial.detail
