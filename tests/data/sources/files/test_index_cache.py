"""A list is parsed once and then loaded from the cache, but never in a stale version."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import FileList, index_file
from kd_pipeline.data.sources.files import file_list, index_cache
from kd_pipeline.data.sources.files.list_file import ListFile
from kd_pipeline.data.sources.files.list_format import find_format
from kd_pipeline.errors import DataError
from tests._core.test_files import give_away

LINES = [f"images {n % 7}/é {n:03}.jpg,class {n % 3}" for n in range(50)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the indexes, with short lists cached too; the listed files need not exist."""
    monkeypatch.setattr(file_list, "check_files", lambda path, paths, root: [])
    monkeypatch.setattr(index_cache, "_MIN_LIST_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kd_pipeline/index"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The lists that were parsed, in order."""
    paths: list[Path] = []
    parse = file_list._parse
    monkeypatch.setattr(file_list, "_parse", lambda path, *rest: [paths.append(Path(path.name)), parse(path, *rest)][1])
    return paths


def write(path: Path, lines: list[str] = LINES) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(source: FileList) -> tuple[object, ...]:
    return (
        [source.name(index) for index in range(len(source))],
        source.read(np.arange(len(source))).tobytes(),
        None if source.labels is None else (source.labels.tolist(), source.labels.dtype, source.labels.flags.writeable),
        source.classes,
        source.num_classes,
        source.warnings,
        source.fingerprint,
    )


LISTS: dict[str, tuple[str, list[str], dict[str, object]]] = {
    "names": ("list.csv", LINES, {}),
    "indices": ("list.csv", [f"{n}.jpg,{n % 4}" for n in range(9)], {}),
    "no labels": ("list.csv", [f"{n}.jpg" for n in range(9)], {}),
    "absolute paths": ("list.csv", [f"/data/{n}.jpg,a" for n in range(9)], {}),
    "root": ("list.csv", ["/data/x/1.jpg,a", "2.jpg,b"], {"root": "/data"}),
    "given classes": ("list.csv", ["1.jpg,b", "2.jpg,a"], {"classes": ("b", "c", "a")}),
    "given classes without labels": ("list.csv", ["1.jpg", "2.jpg"], {"classes": ("b", "c")}),
    "odd names": ("list.jsonl", [f'{{"path": "{n}.jpg", "label": "v{n}"}}' for n in (2, 10, 1)], {}),
    "one line": ("list.csv", ["1.jpg,a"], {}),
}


@pytest.mark.parametrize(("name", "lines", "options"), LISTS.values(), ids=LISTS)
def test_cached_list_equals_parsed_list(tmp_path, parsed, name, lines, options):
    path = write(tmp_path / name, lines)
    first, again = FileList(path, **options), FileList(path, **options)
    assert parsed == [path]
    assert contents(again) == contents(first)


@pytest.mark.parametrize("when", ["first", "again"])
def test_cached_paths_and_labels_are_memory_mapped(tmp_path, when):
    path = write(tmp_path / "list.csv")
    source = FileList(path) if when == "first" else [FileList(path), FileList(path)][1]
    paths = source._paths
    assert isinstance(paths.blob, memoryview) and isinstance(paths.ends, memoryview)
    assert paths.blob.readonly and paths.ends.readonly
    assert source.labels.base is not None and not source.labels.flags.writeable


EDITS: dict[str, Callable[[str], str]] = {
    "longer": lambda text: text + "new.jpg,class 1\n",
    "shorter": lambda text: text.partition("\n")[2],
    "one letter in the middle": lambda text: text.replace("024.jpg", "924.jpg"),
    "one label": lambda text: text.replace("049.jpg,class 1", "049.jpg,class 2"),
    "two lines swapped": lambda text: "\n".join([*text.split("\n")[1::-1], *text.split("\n")[2:]]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_edited_list_is_parsed_again(tmp_path, parsed, edit, how):
    path = write(tmp_path / "list.csv")
    before, text = path.stat(), edit(path.read_text())
    assert text != path.read_text()
    old = contents(FileList(path))
    if how == "in place":
        path.write_text(text)
    else:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents(FileList(path)) != old
    assert parsed == [path, path]
    path.write_text("\n".join(LINES) + "\n")
    assert contents(FileList(path)) == old and len(parsed) == 2, "the first index is still there"


def test_list_edited_while_parsed_is_not_cached(tmp_path, cache, monkeypatch):
    path, parse = write(tmp_path / "list.csv"), file_list._parse

    def interrupted(*arguments: object) -> index_cache.ListIndex:
        index = parse(*arguments)
        write(path, LINES[::-1])
        return index

    monkeypatch.setattr(file_list, "_parse", interrupted)
    FileList(path)
    monkeypatch.undo()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [{"root": "/elsewhere"}, {"classes": ("class 2", "class 1", "class 0")}, {"classes": tuple("abc")}],
    ids=["root", "order of classes", "wrong classes"],
)
def test_root_and_classes_are_part_of_the_key(tmp_path, other):
    path = write(tmp_path / "list.csv")
    plain = contents(FileList(path))
    for _ in range(2):
        try:
            assert contents(FileList(path, **other)) != plain
        except DataError as exc:
            assert "is not among the 3 classes" in str(exc)
    assert contents(FileList(path)) == plain


def test_absolute_paths_do_not_move_to_a_new_root(tmp_path):
    path = write(tmp_path / "list.csv", ["/data/x/1.jpg,a", "2.jpg,a"])
    for root in ("/data", "/elsewhere"):
        source = FileList(path, root=root)
        assert [source.name(0), source.name(1)] == ["/data/x/1.jpg", f"{root}/2.jpg"]


def test_extension_is_part_of_the_key(tmp_path):
    FileList(write(tmp_path / "list.csv"))
    with pytest.raises(DataError, match="not JSON"):
        FileList(write(tmp_path / "list.jsonl"))


def test_bad_list_is_refused_each_time_and_not_cached(tmp_path, cache):
    path = write(tmp_path / "list.csv", [*LINES, "a,b,c"])
    messages = set()
    for _ in range(2):
        with pytest.raises(DataError) as info:
            FileList(path)
        messages.add(str(info.value))
    assert len(messages) == 1 and "list.csv:51: found 3 columns" in messages.pop()
    assert list(cache.iterdir()) == []


def damages(size: int) -> dict[str, Callable[[bytes], bytes]]:
    flips = {
        f"byte {at}": lambda content, at=at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        for at in (0, 8, 16, 24, 40, size // 2, size - 1)
    }
    return flips | {
        "cut in half": lambda content: content[: len(content) // 2],
        "without its last byte": lambda content: content[:-1],
        "longer": lambda content: content + b"\0",
        "empty": lambda content: b"",
        "zeros": lambda content: bytes(len(content)),
        "different file": lambda content: b"a pickle, or whatever",
        "magic only": lambda content: content[:8],
    }


@pytest.mark.parametrize("damage", damages(1000))
def test_damaged_index_is_ignored_and_replaced(tmp_path, cache, parsed, damage):
    path = write(tmp_path / "list.csv")
    wanted = contents(FileList(path))
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    assert len(intact) > 1000
    file.unlink()
    file.write_bytes(damages(1000)[damage](intact))
    assert contents(FileList(path)) == wanted
    assert parsed == [path, path] and file.read_bytes() == intact
    assert contents(FileList(path)) == wanted and len(parsed) == 2


def test_unusable_cache_is_ignored(tmp_path, cache, parsed, monkeypatch):
    path = write(tmp_path / "list.csv")
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in its place")
    wanted = contents(FileList(path))
    cache.parent.unlink()

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, as whom tests often run, may write everywhere

    cache.mkdir(parents=True)
    monkeypatch.setattr(index_file, "atomic_file", refuse)
    assert contents(FileList(path)) == wanted
    monkeypatch.undo()
    assert len(parsed) == 2 and list(cache.iterdir()) == []


def test_no_home_folder_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert len(FileList(write(tmp_path / "list.csv"))) == 50


def test_full_disk_leaves_no_file(tmp_path, cache, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(FileList(write(tmp_path / "list.csv"))) == 50
    assert list(cache.iterdir()) == []


def test_short_lists_are_not_cached(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "list.csv")
    monkeypatch.setattr(index_cache, "_MIN_LIST_BYTES", path.stat().st_size + 1)
    FileList(path)
    assert not cache.exists()
    monkeypatch.setattr(index_cache, "_MIN_LIST_BYTES", path.stat().st_size)
    FileList(path)
    assert len(list(cache.iterdir())) == 1


def test_unused_indexes_are_deleted_after_a_month(tmp_path, cache):
    old, used = write(tmp_path / "old.csv"), write(tmp_path / "used.csv", LINES[:20])
    FileList(old), FileList(used)
    assert len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        os.utime(file, (time.time() - 31 * 24 * 3600,) * 2)
    FileList(used)  # used, and therefore kept
    FileList(write(tmp_path / "new.csv", LINES[:30]))
    kept = {file.name for file in cache.iterdir()}
    form = find_format(ListFile.at(used), str(tmp_path))
    keys = {
        index_cache.index_key(ListFile.at(path), str(tmp_path), None, form) for path in (used, tmp_path / "new.csv")
    }
    assert kept == {f"{key}.index" for key in keys}


def test_open_list_survives_replaced_index(tmp_path, cache):
    path = write(tmp_path / "list.csv")
    wanted = contents(FileList(path))
    source = FileList(path)
    (file,) = cache.iterdir()
    file.unlink()
    FileList(path)
    assert contents(source) == wanted


def test_concurrent_processes_leave_one_good_index(tmp_path, cache, parsed):
    path = write(tmp_path / "list.csv", LINES * 400)
    code = (
        "import sys; from kd_pipeline.data.sources.files import file_list, index_cache; "
        "index_cache._MIN_LIST_BYTES = 1; "
        "file_list.check_files = lambda path, paths, root: []; "
        "from kd_pipeline.data.sources import FileList; print(FileList(sys.argv[1]).fingerprint)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [file.suffix for file in cache.iterdir()] == [".index"]
    assert found == {FileList(path).fingerprint} and parsed == []


def forged(file: Path, header: dict[str, object] | bytes, *parts: bytes) -> None:
    """Write an index with a right checksum and any content."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = len(encoded).to_bytes(8, "little") + encoded
    body = start + bytes(-len(start) % 8) + b"".join(parts)
    file.write_bytes(index_file._MAGIC + hashlib.sha256(body).digest() + body)


def words(*numbers: int) -> bytes:
    return np.array(numbers, dtype=np.int64).tobytes()


HEADER: dict[str, object] = {
    "ends": 24, "labels": 16, "blob": 4, "is_labeled": True, "classes": ["a", "b"], "remarks": [],
    "folders": [], "stamp": "", "schemes": [],
}  # fmt: skip
FORGERIES: dict[str, tuple[dict[str, object] | bytes, tuple[bytes, ...]]] = {
    "no header": (b"", ()),
    "no JSON": (b"{", ()),
    "no object": (b"[]", ()),
    "deep": (b"[" * 100_000, ()),
    "long number": (b'{"ends": ' + b"9" * 5000 + b"}", ()),
    "missing size": ({"ends": 24}, ()),
    "negative size": (HEADER | {"ends": -24, "blob": 52}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "size of text": (HEADER | {"ends": "24"}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "huge size": (HEADER | {"blob": 2**62}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "half a number": (HEADER | {"ends": 23}, (words(0, 2, 4)[:-1], words(0, 1), b"x/yy")),
    "path outside": (HEADER, (words(0, 2, 2**40), words(0, 1), b"x/yy")),
    "path before": (HEADER, (words(0, -2, 4), words(0, 1), b"x/yy")),
    "first path": (HEADER, (words(1, 2, 4), words(0, 1), b"x/yy")),
    "empty path": (HEADER, (words(0, 4, 4), words(0, 1), b"x/yy")),
    "no paths": (HEADER | {"ends": 8, "blob": 0, "labels": 0}, (words(0),)),
    "label outside": (HEADER, (words(0, 2, 4), words(0, 2), b"x/yy")),
    "negative label": (HEADER, (words(0, 2, 4), words(0, -1), b"x/yy")),
    "few labels": (HEADER | {"labels": 8}, (words(0, 2, 4), words(0), b"x/yy")),
    "classes in a file": (HEADER | {"classes": "/dev/zero"}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "class of no name": (HEADER | {"classes": ["a", 3]}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "same classes": (HEADER | {"classes": ["a", "a"]}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "folders": (HEADER | {"folders": 3}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "remarks": (HEADER | {"remarks": 3}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "schemes": (HEADER | {"schemes": 3}, (words(0, 2, 4), words(0, 1), b"x/yy")),
    "more after it": (HEADER, (words(0, 2, 4), words(0, 1), b"x/yy", b"x")),
}


@pytest.mark.parametrize(("header", "parts"), FORGERIES.values(), ids=FORGERIES)
def test_index_with_a_right_checksum_and_wrong_content_is_ignored(tmp_path, cache, parsed, header, parts):
    path = write(tmp_path / "list.csv")
    wanted = contents(FileList(path))
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    forged(file, HEADER, words(0, 2, 4), words(0, 1), b"x/yy")
    assert len(FileList(path)) == 2 and len(parsed) == 1, "the same with sound content is used"
    forged(file, header, *parts)
    assert contents(FileList(path)) == wanted
    assert len(parsed) == 2 and file.read_bytes() == intact


def make_writable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.chmod(0o660)


def loosen_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.chmod(0o770)


DOUBTS = {"owner": give_away, "mode": make_writable, "folder": loosen_folder}


@pytest.mark.parametrize(("name", "doubt"), DOUBTS.items(), ids=DOUBTS)
def test_index_that_another_user_could_have_written_is_not_used(
    tmp_path, cache, parsed, monkeypatch, caplog, name, doubt
):
    index_file._warn_once.cache_clear()
    path = write(tmp_path / "list.csv")
    wanted = contents(FileList(path))
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    forged(file, HEADER, words(0, 2, 4), words(0, 1), b"x/yy")
    doubt(file, monkeypatch)
    assert contents(FileList(path)) == wanted and len(parsed) == 2
    (warning,) = [record.getMessage() for record in caplog.records if "from the cache" in record.getMessage()]
    assert "may write to" in warning or "belongs to user" in warning
    FileList(path)
    assert caplog.text.count("from the cache") == 1
    if name != "folder":
        monkeypatch.undo()
        assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_uid == os.geteuid(), "replaced"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_index_is_ignored(tmp_path, cache, parsed, make):
    path = write(tmp_path / "list.csv")
    wanted = contents(FileList(path))
    (file,) = cache.iterdir()
    file.unlink()
    make(file)
    assert contents(FileList(path)) == wanted and len(parsed) == 2
