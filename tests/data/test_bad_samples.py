"""Unreadable files in a loader: reported, refused or substituted."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_pipeline.data import bad_samples, file_reading
from kd_pipeline.data.bad_samples import BadSamples, fraction_for
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import FileList, ImageFolder
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.errors import BadSampleError, StateError, TooManyBadSamplesError
from kd_pipeline.loader.loader import KDDataLoader
from tests.corpus import BROKEN, ODD, Broken, Odd, cut_in_half, encoded, photo_of, png_of_zeros
from tests.rare_files import RARE, without_last_scans
from tests.streams import (
    EVAL,
    SIZE,
    TRAIN,
    Fields,
    assert_same,
    conv_teacher,
    fields,
    global_rows,
    rows,
    run,
    state_after,
)

ROOT = Path(__file__).parents[2]
SMALL_WINDOWS = TrainTransform(size=SIZE, area=(0.05, 0.1))
"""Views that mostly miss the damaged part of a file."""
BAD = (3, 8, 9, 36)
"""A single one, two adjacent ones, and the last of the 37 photographs."""


@pytest.fixture
def damaged(photo_folder, tmp_path) -> Callable[..., ImageFolder]:
    """`damaged(3, 8)` returns a copy of the photographs with the files 3 and 8 cut in half."""

    def make(*bad: int) -> ImageFolder:
        root = shutil.copytree(photo_folder, tmp_path / f"damaged-{'-'.join(map(str, bad))}")
        source = ImageFolder(root)
        for index in bad:
            cut_in_half(Path(source.name(index)))
        return ImageFolder(root)

    return make


def open_loader(source, transform=TRAIN, teacher=None, **options) -> KDDataLoader:
    return KDDataLoader(
        source,
        transform,
        teacher,
        **{"batch_size": 8, "seed": 5, "on_bad_sample": "substitute", "max_bad_fraction": 0.2, **options},
    )


def stream(source, **options) -> list[Fields]:
    with open_loader(source, **options) as loader:
        return run(loader)


def list_of(root: Path, *names: str) -> FileList:
    path = root / "list.csv"
    path.write_text("path,label\n" + "".join(f"{name},0\n" for name in names))
    return FileList(path)


def refusal(source, transform, **options) -> BadSampleError:
    with (
        open_loader(source, transform, on_bad_sample="raise", **options) as loader,
        pytest.raises(BadSampleError) as it,
    ):
        run(loader, 1)
    return it.value


def contents(root: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every file."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# Readable and unreadable files


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_error_is_equal_for_any_view_and_decode_mode(broken: Broken, photos, tmp_path):
    path = tmp_path / broken.name
    broken.put(path, photo_of(photos))
    source = list_of(tmp_path, broken.name)
    errors = [
        refusal(source, transform, seed=seed, decode=decode)
        for decode in ("window", "full")
        for transform, seed in [(EVAL, 0), *((SMALL_WINDOWS, seed) for seed in range(4))]
    ]
    assert {str(error) for error in errors} == {str(errors[0])}
    assert errors[0].index == 0 and errors[0].path == str(path) and str(path) in str(errors[0])
    assert broken.reason in errors[0].reason and "\n" not in errors[0].reason
    if path.exists():
        assert errors[0].num_bytes == path.stat().st_size and f"({path.stat().st_size} bytes)" in str(errors[0])
    else:
        assert errors[0].num_bytes is None and "no such file" in str(errors[0])


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_unreadable_file_in_large_batch(broken: Broken, photos, tmp_path):
    photo = photo_of(photos)
    Image.fromarray(photo).save(tmp_path / "good.jpg")
    broken.put(tmp_path / broken.name, photo)
    bad = 43  # the first in the third of the batch that DALI's calling thread decodes
    names = ["good.jpg"] * 64
    names[bad] = broken.name
    for seed, decode in enumerate(("window", "full") * 2):
        options = {"batch_size": 64, "shuffle": False, "seed": seed, "num_threads": 2, "decode": decode}
        with open_loader(list_of(tmp_path, *names), SMALL_WINDOWS, **options) as loader:
            (batch,) = loader
        assert (~batch.valid).nonzero().tolist() == [[bad]]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_file_is_read(odd: Odd, photos, tmp_path):
    photo = photo_of(photos)
    (tmp_path / odd.name).write_bytes(odd.encode(photo))
    Image.fromarray(odd.shows(photo)).convert("RGB").save(tmp_path / "plain.png")
    source = list_of(tmp_path, odd.name, "plain.png")
    with open_loader(source, EvalTransform(size=SIZE), batch_size=2, shuffle=False) as loader:
        (batch,) = loader
        assert batch.valid.all()
        assert (batch.images[0] - batch.images[1]).abs().mean() < 0.1
    with open_loader(source, SMALL_WINDOWS, on_bad_sample="raise") as loader:
        assert len(run(loader)) == 3


def test_max_pixels_is_inclusive(photos, tmp_path):
    photo = photo_of(photos)
    Image.fromarray(photo[:100, :100]).save(tmp_path / "fits.png")
    Image.fromarray(photo[:101, :100]).save(tmp_path / "larger.png")
    for transform in (EVAL, SMALL_WINDOWS):
        with open_loader(list_of(tmp_path, "fits.png"), transform, on_bad_sample="raise", max_pixels=10_000) as loader:
            assert len(run(loader, 1)) == 1
        error = refusal(list_of(tmp_path, "larger.png"), transform, max_pixels=10_000)
        assert "100x101" in error.reason and "max_pixels=10000" in error.reason


def test_max_pixels_counts_the_bytes_of_an_image(tmp_path):
    """In 16 bits, half as many pixels take as much memory as in 8."""
    (tmp_path / "deep.png").write_bytes(png_of_zeros(100, 100, bits=16))
    source = list_of(tmp_path, "deep.png")
    with open_loader(source, EVAL, on_bad_sample="raise", max_pixels=20_000) as loader:
        assert len(run(loader, 1)) == 1
    error = refusal(source, EVAL, max_pixels=19_999)
    assert "100x100 pixels, which take 60000 bytes" in error.reason and error.reason.endswith("max_pixels=19999")


def test_file_of_more_bytes_than_pixels_allow_is_not_read(photos, tmp_path):
    Image.fromarray(photo_of(photos)).save(tmp_path / "sparse.jpg")
    os.truncate(tmp_path / "sparse.jpg", 2**40)
    error = refusal(list_of(tmp_path, "sparse.jpg"), EVAL)
    assert "it has 1099511627776 bytes, and at most 335544319 are read" in error.reason


BOMB_SCRIPT = """
import sys
from pathlib import Path
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import BadSampleError
from kd_pipeline.loader import KDDataLoader

def most_memory():
    # Not getrusage, whose ru_maxrss a child process inherits from its parent.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

source = ImageFolder(sys.argv[1], labeled=False)
bomb = [source.name(index) for index in range(len(source))].index(sys.argv[2])
with KDDataLoader(source, EvalTransform(size=32), batch_size=1, shuffle=False) as loader:
    iterator = iter(loader)
    next(iterator)
    before = most_memory()
    try:
        for _ in iterator: pass
    except BadSampleError as error:
        assert error.index == bomb
        print(most_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("side", "bits"), [(30_000, 8), (9_450, 16)])  # of 2.7 GB, and 0.5 GB in fewer pixels
def test_bomb_is_not_unpacked(photos, tmp_path, side, bits):
    Image.fromarray(photo_of(photos)).save(tmp_path / "a.png")
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(side, side, bits=bits))
    command = [sys.executable, "-c", BOMB_SCRIPT, str(tmp_path), str(tmp_path / "bomb.png")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert float(finished.stdout) < 300  # MB


def test_damaged_rare_file_is_refused(photos, tmp_path):
    """Pillow finds the damage only after the header was accepted."""
    for name, cut in (("half.pgm", 5000), ("fifteen_bits.bmp", 20_000)):
        encode, _ = RARE["max_100.pgm" if name.endswith("pgm") else name]
        (tmp_path / name).write_bytes(encode(photo_of(photos))[:cut])
        assert "does not decode" in refusal(list_of(tmp_path, name), SMALL_WINDOWS).reason


def test_name_of_a_file_says_nothing(photos, tmp_path):
    for name, (encode, _) in RARE.items():
        (tmp_path / f"{name}.png").write_bytes(encode(photo_of(photos)))
    source = list_of(tmp_path, *(f"{name}.png" for name in RARE))
    with open_loader(source, batch_size=len(RARE), on_bad_sample="raise") as loader:
        (batch,) = loader
        assert batch.valid.all() and loader.num_uniform == 0


def test_file_that_becomes_rare(photos, tmp_path):
    """The header of a file is read again if its length has changed."""
    Image.fromarray(photo_of(photos)).save(tmp_path / "a.png")
    source = list_of(tmp_path, "a.png")
    with open_loader(source, EVAL, batch_size=1, prefetch=1, ahead=0) as loader:
        before = run(loader, 1)[0]["images"]
        (tmp_path / "a.png").write_bytes(RARE["max_1023.ppm"][0](photo_of(photos)))
        *_, after = run(loader, 4)
    torch.testing.assert_close(after["images"], before, atol=0.03, rtol=0)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_ends_early_gives_equal_pixels_in_both_modes(photos, tmp_path, progressive):
    photo = photo_of(photos)
    jpeg = without_last_scans(photo, 4) if progressive else encoded(photo, "JPEG")[:3000] + b"\xff\xd9"
    (tmp_path / "early.jpg").write_bytes(jpeg)
    source = list_of(tmp_path, *["early.jpg"] * 16)
    windows, whole = (
        stream(source, transform=SMALL_WINDOWS, decode=mode, on_bad_sample="raise") for mode in ("window", "full")
    )
    assert_same(windows, whole)


def test_special_files_do_not_hang(photos, tmp_path):
    Image.fromarray(photo_of(photos)).save(tmp_path / "good.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    names = ["good.jpg", "pipe.jpg", "link.jpg", "zero.jpg"]
    with open_loader(list_of(tmp_path, *names), shuffle=False, max_bad_fraction=1.0) as loader:
        (batch,) = loader
        assert batch.valid.tolist() == [True, False, False, False]
        assert [sample.reason.split(" and ")[0] for sample in loader.bad_samples] == [
            "this is a pipe",
            "this is a pipe",
            "this is a device",
        ]


@pytest.fixture
def swapped(photos, tmp_path):
    """A loader that has read all its files, after which a pipe took the place of the third."""
    for name in "abcd":
        Image.fromarray(photo_of(photos)).save(tmp_path / f"{name}.jpg")
    source = list_of(tmp_path, *(f"{name}.jpg" for name in "abcd"))
    with open_loader(source, EVAL, batch_size=2, shuffle=False, on_bad_sample="raise", prefetch=1, ahead=0) as loader:
        run(loader, 1)
        (tmp_path / "c.jpg").unlink()
        os.mkfifo(tmp_path / "c.jpg")
        yield loader


def test_pipe_in_place_of_a_file_is_refused(swapped, monkeypatch):
    monkeypatch.setattr(file_reading, "_PATIENCE_S", 0.1)
    with pytest.raises(BadSampleError, match=r"c\.jpg .*this is a pipe and no file"):
        run(swapped, 3)


def test_interrupt_ends_the_wait_for_a_file(swapped, monkeypatch):
    monkeypatch.setattr(file_reading, "_PATIENCE_S", 60.0)
    interrupt = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(swapped, 3)
    interrupt.join()


def test_close_ends_without_an_answer_of_the_file_system(swapped, monkeypatch, tmp_path):
    monkeypatch.setattr(file_reading, "_open_pipes", lambda names: None)
    interrupt = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(swapped, 3)
    swapped.close()
    os.close(os.open(tmp_path / "c.jpg", os.O_WRONLY | os.O_NONBLOCK))  # DALI is still waiting there


# on_bad_sample="raise"


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_batches_before_bad_sample_are_returned(damaged, ahead):
    source = damaged(17)
    with open_loader(source, shuffle=False, on_bad_sample="raise", ahead=ahead) as loader:
        indices = []
        with pytest.raises(BadSampleError, match="sample 17 cannot be read"):
            for batch in loader:
                indices += batch.index.tolist()
        assert indices == list(range(16))
        assert (loader.epoch, loader.state_dict()["batch"]) == (0, 2)


def test_close_after_bad_sample(damaged, photo_folder):
    loader = open_loader(damaged(17), on_bad_sample="raise")
    with pytest.raises(BadSampleError):
        run(loader)
    loader.close()
    with open_loader(ImageFolder(photo_folder), on_bad_sample="raise") as loader:
        assert len(run(loader)) == 15


def test_repaired_file_is_read(damaged, photo_folder):
    source = damaged(0)
    path = Path(source.name(0))
    with open_loader(source, shuffle=False, on_bad_sample="raise") as loader:
        with pytest.raises(BadSampleError):
            next(iter(loader))
        shutil.copy(ImageFolder(photo_folder).name(0), path)
        assert len(run(loader, 1)) == 5


# on_bad_sample="substitute"


def test_substitute_brings_all_its_fields(damaged):
    source, teacher = damaged(*BAD), conv_teacher()
    with open_loader(source, teacher=teacher, shuffle=False, batch_size=len(source)) as loader:
        for batch in loader:
            wanted = list(range(len(source)))
            wanted[3], wanted[8], wanted[9], wanted[36] = 4, 10, 10, 0
            assert batch.index.tolist() == wanted
            assert [row for row, valid in enumerate(batch.valid) if not valid] == list(BAD)
            assert batch.labels.tolist() == source.labels[wanted].tolist()
            for bad in BAD:
                own_row = wanted[bad]
                assert torch.equal(batch.images[bad], batch.images[own_row])
                torch.testing.assert_close(batch.teacher["logits"][bad], batch.teacher["logits"][own_row])


def test_unreadable_padding_is_substituted(damaged):
    source = damaged(0)
    *_, last = stream(source, shuffle=False, last_batch="pad")
    assert last["index"].tolist() == [32, 33, 34, 35, 36, 1, 1, 2]
    assert last["valid"].tolist() == [True] * 5 + [False] * 3


def test_bad_samples_equal_jsonl_record(damaged, tmp_path, caplog):
    source = damaged(*BAD)
    with open_loader(source, run_dir=tmp_path / "new" / "run") as loader:
        run(loader)
        found = loader.bad_samples
    assert [sample.index for sample in found] == list(BAD)
    lines = [json.loads(line) for line in (tmp_path / "new" / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(lines, key=lambda line: line["index"]) == [asdict(sample) for sample in found]
    for line in lines:
        path = Path(source.name(line["index"]))
        assert set(line) == {"index", "path", "num_bytes", "reason"}
        assert line["path"] == str(path) and line["num_bytes"] == path.stat().st_size and line["reason"]
    logged = [line for line in caplog.messages if "cannot be read, and a readable image takes its place: " in line]
    assert [line.split(" cannot be read")[0] for line in logged] == [line["path"] for line in lines[:3]]
    assert "further ones are named" in logged[-1] and "further" not in logged[0]


def test_bad_samples_of_a_resumed_run(damaged):
    source = damaged(3, 8)
    with open_loader(source, shuffle=False) as loader:
        run(loader, 1)
        state, found = loader.state_dict(), loader.bad_samples
    with open_loader(source, shuffle=False) as loader:
        loader.load_state_dict(state)
        assert loader.bad_samples == tuple(
            replace(sample, reason="an earlier run could not read it") for sample in found
        )


def test_bad_samples_include_the_one_too_many(damaged):
    with open_loader(damaged(3, 8, 9), shuffle=False, max_bad_fraction=2 / 37) as loader:
        for _ in range(2):
            with pytest.raises(TooManyBadSamplesError):
                run(loader)
            assert [sample.index for sample in loader.bad_samples] == [3, 8, 9]
        assert loader.state_dict()["bad_samples"] == [3, 8]


def test_no_record_for_good_data_or_without_run_dir(damaged, photo_folder, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    stream(ImageFolder(photo_folder), run_dir=folder)
    stream(damaged(3))
    assert list(folder.iterdir()) == []


def test_resumed_run_does_not_record_again(damaged, tmp_path):
    source = damaged(*BAD)
    with open_loader(source, run_dir=tmp_path) as loader:
        run(loader, 1)
        state = loader.state_dict()
    with open_loader(source, run_dir=tmp_path) as loader:
        loader.load_state_dict(state)
        run(loader)
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == len(BAD)


def test_record_is_not_written_through_a_link(damaged, tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "bad_samples.jsonl").symlink_to(tmp_path / "victim")
    with (
        open_loader(damaged(3), run_dir=tmp_path) as loader,
        pytest.raises(StateError, match=r"bad_samples.jsonl cannot be written: this is a link"),
    ):
        run(loader, 1)
    assert (tmp_path / "victim").read_text() == "kept"


def test_rewound_run_does_not_record_again(damaged, tmp_path):
    source = damaged(*BAD)
    with open_loader(source, run_dir=tmp_path) as loader:
        start = loader.state_dict()
        run(loader, 1)
        loader.load_state_dict(start)
        run(loader, 1)
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == len(BAD)


@pytest.mark.parametrize("num_allowed", [0, 1, 2, 3])
def test_max_bad_fraction_is_enforced(damaged, num_allowed):
    source = damaged(3, 8, 9)
    fraction = num_allowed / len(source)
    with open_loader(source, max_bad_fraction=fraction) as loader:
        num_allowed = max(1, num_allowed)
        if num_allowed == 3:
            assert len(run(loader)) == 15
            return
        for _ in range(2):
            with pytest.raises(TooManyBadSamplesError) as info:
                run(loader)
            assert f"{num_allowed + 1} of 37 samples" in str(info.value)
            assert f"max_bad_fraction={fraction:g}" in str(info.value)


def test_default_max_bad_fraction(damaged):
    with (
        KDDataLoader(damaged(3, 8), TRAIN, batch_size=8, on_bad_sample="substitute") as loader,
        pytest.raises(TooManyBadSamplesError, match=r"max_bad_fraction=0\.001"),
    ):
        run(loader, 1)


def test_one_bad_sample_is_always_allowed(damaged):
    with KDDataLoader(damaged(3), TRAIN, batch_size=8, on_bad_sample="substitute") as loader:
        assert len(run(loader, 1)) == 5


@pytest.mark.parametrize("bad", [(3,), (3, 8), BAD])
def test_advice_works(damaged, bad):
    """That of the first error, and then that of the next one."""
    source, advised = damaged(*bad), {}
    error = refusal(source, TRAIN)
    advised |= dict([re.search(r"set (on_bad_sample): (substitute)", str(error)).groups()])
    if len(bad) > 1:
        with (
            KDDataLoader(source, TRAIN, batch_size=8, **advised) as loader,
            pytest.raises(TooManyBadSamplesError) as info,
        ):
            run(loader, 1)
        assert "on_bad_sample" not in str(info.value)
        name, value = re.search(r"set (max_bad_fraction): ([0-9.]+)", str(info.value)).groups()
        advised[name] = float(value)
    with KDDataLoader(source, TRAIN, batch_size=8, **advised) as loader:
        run(loader)
        assert [sample.index for sample in loader.bad_samples] == list(bad)


def test_advice_after_limited_time(damaged, monkeypatch):
    monkeypatch.setattr(bad_samples, "_MAX_COUNTING_S", 0.0)
    with (
        open_loader(damaged(*BAD), shuffle=False, max_bad_fraction=0.0) as loader,
        pytest.raises(TooManyBadSamplesError, match=r"max_bad_fraction: 0\.0541 for the 2 found among 2 .*check"),
    ):
        run(loader, 1)


def test_fraction_allows_its_number():
    for num_samples in (1, 2, 7, 100, 301, 1281167):
        for num_bad in {1, 2, 29, num_samples // 2, num_samples - 1, num_samples} & {*range(1, num_samples + 1)}:
            fraction = float(fraction_for(num_bad, num_samples))
            assert num_bad / num_samples <= fraction <= min(1, 1.01 * num_bad / num_samples)


def test_all_files_bad(photos, tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(b"no image")
    with (
        open_loader(list_of(tmp_path, *names), max_bad_fraction=1.0) as loader,
        pytest.raises(TooManyBadSamplesError, match="3 of 3 samples cannot be read"),
    ):
        run(loader, 1)


def test_only_one_readable_file(photos, tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(photo_of(photos)).save(tmp_path / "b.jpg")
    with open_loader(list_of(tmp_path, *names), shuffle=False, max_bad_fraction=1.0) as loader:
        (batch,) = loader
        assert batch.index.tolist() == [1, 1, 1] and batch.valid.tolist() == [False, True, False]


class Numbers:
    """A source of `len` files that are never read."""

    stores = "files"

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def known_bad(num_samples: int, bad) -> BadSamples:
    found = BadSamples(Numbers(num_samples), LoaderSettings(), checker=None)
    found.restore(bad)
    return found


def test_substitute_is_the_next_readable_sample():
    rng = np.random.default_rng(0)
    for num_samples in (2, 3, 7, 40):
        for _ in range(50):
            bad = set(rng.choice(num_samples, size=rng.integers(0, num_samples), replace=False).tolist())
            asked = rng.integers(0, num_samples, size=20)
            wanted = [
                next(each % num_samples for each in range(index, 2 * num_samples) if each % num_samples not in bad)
                for index in asked.tolist()
            ]
            found = known_bad(num_samples, bad)
            assert found.indices == sorted(bad)
            for _ in range(2):  # before and after it knows the way
                shown, is_own = found.substitute(asked)
                assert shown.tolist() == wanted and is_own.tolist() == [index not in bad for index in asked.tolist()]


def test_walk_over_many_unreadable_samples_is_done_once(monkeypatch):
    steps = 0

    class Counting(dict):
        def get(self, key):
            nonlocal steps
            steps += 1
            return super().get(key)

    found = known_bad(100_001, range(100_000))
    monkeypatch.setattr(found, "_following", Counting(found._following))
    for start in range(0, 100_000, 1000):
        shown, _ = found.substitute(np.arange(start, start + 1000))
        assert (shown == 100_000).all()
    assert steps < 400_000


def test_each_unreadable_file_is_decoded_once(photos, tmp_path, monkeypatch):
    counts = {"graphs": 0, "decoded": 0}

    def count(owner, name, what):
        original = getattr(owner, name)

        def counted(self, *arguments):
            counts[what] += 1
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, counted)

    count(Graph, "__init__", "graphs")
    count(FileChecker, "decode", "decoded")
    names = [f"{number}.jpg" for number in range(300)]
    for name in names[:-1]:
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(photo_of(photos)).save(tmp_path / names[-1])
    with open_loader(list_of(tmp_path, *names), EVAL, shuffle=False, max_bad_fraction=1.0) as loader:
        assert all(batch.index.eq(299).all() for batch in loader)
        assert len(loader.bad_samples) == 299
        assert loader.bad_sample(298) == loader.bad_samples[-1] and loader.bad_sample(299) is None
    assert counts["graphs"] <= 3 and counts["decoded"] <= 302


@pytest.mark.parametrize("ahead", [0, 3])
def test_known_bad_files_change_nothing(damaged, ahead):
    source = damaged(*BAD)
    with open_loader(source, teacher=conv_teacher(), ahead=ahead) as loader:
        found = run(loader)
        state = {**loader.state_dict(), "epoch": 0, "batch": 0}
        assert state["bad_samples"] == list(BAD)
        loader.load_state_dict(state)  # a loader that has found them all
        assert_same(run(loader), found)
    with open_loader(source, teacher=conv_teacher()) as loader:
        loader.load_state_dict(state)  # a loader that knows them from the start
        assert_same(run(loader), found)


def test_good_samples_unaffected_by_bad_files(damaged, photo_folder):
    found, wanted = rows(stream(damaged(*BAD))), rows(stream(ImageFolder(photo_folder)))
    assert [bool(row["valid"]) for row in found] == [int(row["index"]) not in BAD for row in wanted]
    good = [place for place, row in enumerate(found) if row["valid"]]
    assert_same([found[place] for place in good], [wanted[place] for place in good])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_substitutes_independent_of_batch_size(damaged, batch_size):
    source = damaged(*BAD)
    assert_same(rows(stream(source, batch_size=batch_size)), rows(stream(source)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_substitutes_independent_of_ranks(damaged, world_size):
    source = damaged(*BAD)
    options = {"batch_size": 4, "last_batch": "keep"}
    ranks = [stream(source, shard=Shard(rank, world_size), **options) for rank in range(world_size)]
    assert_same(global_rows(ranks), rows(stream(source)))


@pytest.mark.slow
def test_resume_with_bad_files(damaged):
    source, teacher = damaged(*BAD), conv_teacher()
    with open_loader(source, teacher=teacher) as loader:
        states, wanted = [loader.state_dict()], []
        for _ in range(2):
            for batch in loader:
                wanted.append(fields(batch))
                states.append(json.loads(json.dumps(loader.state_dict())))
    for number, state in enumerate(states):
        with open_loader(source, teacher=teacher, ahead=number % 3) as loader:
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])


def test_restored_bad_samples_apply_to_batches_read_ahead(photo_folder):
    with open_loader(ImageFolder(photo_folder), shuffle=False, ahead=0) as loader:
        loader.load_state_dict({**state_after(loader, 1), "bad_samples": [8]})
        batch = next(iter(loader))
    assert batch.index.tolist() == [9, 9, 10, 11, 12, 13, 14, 15] and not batch.valid[0]


# Files


def test_files_are_never_changed(damaged, tmp_path):
    source = damaged(*BAD)
    root = tmp_path / "damaged-3-8-9-36"
    before = contents(root)
    with open_loader(source, run_dir=tmp_path / "run") as loader:
        run(loader, 1)
    refusal(source, EVAL)
    assert contents(root) == before and len(before) == 37
