"""Shared data: photographs made from the two in scikit-learn, exported networks, and a trained teacher."""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.onnx._internal.exporter import _registration

from kd_pipeline._core.optional import switch_off_reports
from kd_pipeline.onnx.export import export_onnx
from tests import runs
from tests.networks import CLASSES as CLASS_NAMES
from tests.networks import IMAGE_SHAPE, ConvNet

# The tensors are tiny: several threads of torch would mostly wait for each other and for DALI's. The variable is for
# the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
switch_off_reports()  # some tests import OpenVINO or ONNX Runtime themselves

# Engines that others may write to are refused, and under some systems' umask every file that a test writes is one.
os.umask(0o022)

# What a shell starts in the background, it lets ignore Ctrl-C, which some tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def unpinned() -> list[str]:
    """Installed packages whose version is not that of constraints.txt."""
    found = []
    for name, wanted in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE):
        try:
            version = metadata.version(name).partition("+")[0]  # not the build, such as +cpu or +cu130
        except metadata.PackageNotFoundError:
            continue
        if version != wanted:
            found.append(f"{name} {version}, not {wanted}")
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings into errors, but only with the pinned packages: newer ones may deprecate something."""
    if not config.getini("filterwarnings") and not unpinned():
        config.addinivalue_line("filterwarnings", "error")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so the processes that share the files end together, each with a short one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whatever ran before, and one thread again, if a benchmark has set more."""
    torch.manual_seed(0)
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What is logged or printed is text; a name that is none would end the whole session, as it cannot be sent."""
    report = yield
    sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    if sections != report.sections:
        report.outcome, report.longrepr = "failed", "a surrogate was logged or printed; use printable()"
        report.sections = sections
    return report


def pytest_report_header() -> str:
    found = unpinned()
    if not found:
        return "warnings are errors: all packages match constraints.txt"
    return f"warnings are not errors: {len(found)} packages differ from constraints.txt ({'; '.join(found[:5])})"


@pytest.fixture(scope="session", autouse=True)
def cache_is_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs stays out of the cache of whoever runs the tests.

    A test that exports a teacher to the cache on purpose has one of its own; no other is to take that time.
    """
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield
    assert not (cache / "kd_pipeline" / "exports").exists(), "a test has exported a teacher by accident"


@pytest.fixture(scope="session", autouse=True)
def torchlib_is_parsed_once() -> Iterator[None]:
    """Every ONNX export parses torch's library of operators again, a third of a small training run."""
    owner = _registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "get_torchlib_ops", cache(owner.get_torchlib_ops))
        yield


NUM_PHOTOS = 37
CLASSES = ("flower", "roof", "sky")


@pytest.fixture(scope="session")
def photos() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A temple in China and a flower, `[427, 640, 3]` uint8 each; read only."""
    china, flower = load_sample_images().images
    for photo in (china, flower):
        photo.flags.writeable = False
    return china, flower


@pytest.fixture(scope="session")
def photo_folder(photos: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 JPEG and PNG photographs in three class folders, with sides of 60 to 200 pixels; read only."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(20)
    for number in range(NUM_PHOTOS):
        photo = photos[number % 2]
        height, width = rng.integers(60, 201, size=2)
        top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        path = root / CLASSES[number % 3] / (f"{number:02}.png" if number % 4 == 0 else f"{number:02}.jpg")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo[top : top + height, left : left + width]).save(path, quality=92)
    return root


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`exported(seed)` is the ONNX file of `ConvNet(seed)`; read only."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(seed: int) -> Path:
        return export_onnx(ConvNet(seed), folder / f"{seed}.onnx", image_shape=IMAGE_SHAPE, classes=CLASS_NAMES)

    return export


@pytest.fixture(scope="session")
def trained_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run whose teacher is trained; read only."""
    folder = tmp_path_factory.mktemp("trained_teacher")
    runs.write_data(folder)
    (folder / "tiny.yaml").write_text(runs.CONFIG, encoding="utf-8")
    status, output = runs.finish(runs.start(folder, "stage=teacher"))
    assert status == 0, output
    return folder
