"""A list that was read once is read again without parsing, and never as it was before an edit."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import file_list as parser
from kd_pipeline.data.sources import index_cache as room
from kd_pipeline.data.sources.file_list import FileList
from kd_pipeline.errors import DataError

LINES = [f"images {n % 7}/é {n:03}.jpg,class {n % 3}" for n in range(50)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of indexes; short lists are kept there too."""
    monkeypatch.setattr(room, "_SMALLEST_LIST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kd_pipeline/index"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The lists that were parsed, one after the other."""
    paths: list[Path] = []
    parse = parser._parsed
    monkeypatch.setattr(parser, "_parsed", lambda path, *rest: [paths.append(path), parse(path, *rest)][1])
    return paths


def write(path: Path, lines: list[str] = LINES) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def what_it_says(source: FileList) -> tuple[object, ...]:
    return (
        [source.name(index) for index in range(len(source))],
        source.read(np.arange(len(source))).tobytes(),
        None if source.labels is None else (source.labels.tolist(), source.labels.dtype, source.labels.flags.writeable),
        source.classes,
        source.num_classes,
        source.reports,
        source.fingerprint,
    )


LISTS: dict[str, tuple[str, list[str], dict[str, object]]] = {
    "names": ("list.csv", LINES, {}),
    "indices": ("list.csv", [f"{n}.jpg,{n % 4}" for n in range(9)], {}),
    "no labels": ("list.csv", [f"{n}.jpg" for n in range(9)], {}),
    "absolute paths": ("list.csv", [f"/data/{n}.jpg,a" for n in range(9)], {}),
    "a root": ("list.csv", ["/data/x/1.jpg,a", "2.jpg,b"], {"root": "/data"}),
    "given classes": ("list.csv", ["1.jpg,b", "2.jpg,a"], {"classes": ("b", "c", "a")}),
    "given classes without labels": ("list.csv", ["1.jpg", "2.jpg"], {"classes": ("b", "c")}),
    "odd names": ("list.jsonl", [f'{{"path": "{n}.jpg", "label": "v{n}"}}' for n in (2, 10, 1)], {}),
    "one line": ("list.csv", ["1.jpg,a"], {}),
}


@pytest.mark.parametrize(("name", "lines", "options"), LISTS.values(), ids=LISTS)
def test_a_kept_list_says_what_the_parsed_one_says(
    tmp_path: Path, parsed: list[Path], name: str, lines: list[str], options: dict[str, object]
) -> None:
    path = write(tmp_path / name, lines)
    first, again = FileList(path, **options), FileList(path, **options)
    assert parsed == [path]
    assert what_it_says(again) == what_it_says(first)


def test_a_kept_list_is_mapped_and_not_copied(tmp_path: Path) -> None:
    FileList(write(tmp_path / "list.csv"))
    paths = FileList(tmp_path / "list.csv")._paths
    assert isinstance(paths.blob, memoryview) and isinstance(paths.ends, memoryview)
    assert paths.blob.readonly and paths.ends.readonly


EDITS: dict[str, Callable[[str], str]] = {
    "longer": lambda text: text + "new.jpg,class 1\n",
    "shorter": lambda text: text.partition("\n")[2],
    "one letter in the middle": lambda text: text.replace("024.jpg", "924.jpg"),
    "one label": lambda text: text.replace("049.jpg,class 1", "049.jpg,class 2"),
    "two lines in another order": lambda text: "\n".join([*text.split("\n")[1::-1], *text.split("\n")[2:]]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_an_edited_list_is_parsed_again_even_with_its_old_size_and_times(
    tmp_path: Path, parsed: list[Path], edit: Callable[[str], str], how: str
) -> None:
    path = write(tmp_path / "list.csv")
    before, text = path.stat(), edit(path.read_text())
    assert text != path.read_text()
    old = what_it_says(FileList(path))
    if how == "in place":
        path.write_text(text)
    else:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert what_it_says(FileList(path)) != old
    assert parsed == [path, path]
    path.write_text("\n".join(LINES) + "\n")
    assert what_it_says(FileList(path)) == old and len(parsed) == 2, "the first one is still there"


def test_a_list_that_is_written_to_while_it_is_read_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, parse = write(tmp_path / "list.csv"), parser._parsed

    def interrupted(*arguments: object) -> room.Index:
        index = parse(*arguments)
        write(path, LINES[::-1])
        return index

    monkeypatch.setattr(parser, "_parsed", interrupted)
    FileList(path)
    monkeypatch.undo()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [{"root": "/elsewhere"}, {"classes": ("class 2", "class 1", "class 0")}, {"classes": tuple("abc")}],
    ids=["root", "order of classes", "classes that it does not fit"],
)
def test_one_list_read_in_two_ways_is_kept_twice(tmp_path: Path, other: dict[str, object]) -> None:
    path = write(tmp_path / "list.csv")
    plain = what_it_says(FileList(path))
    for _ in range(2):
        try:
            assert what_it_says(FileList(path, **other)) != plain
        except DataError as exc:
            assert "is not among the 3 classes" in str(exc)
    assert what_it_says(FileList(path)) == plain


def test_a_path_below_one_root_is_not_moved_below_another(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", ["/data/x/1.jpg,a", "2.jpg,a"])
    for root in ("/data", "/elsewhere"):
        source = FileList(path, root=root)
        assert [source.name(0), source.name(1)] == ["/data/x/1.jpg", f"{root}/2.jpg"]


def test_the_same_text_under_two_endings_is_two_lists(tmp_path: Path) -> None:
    FileList(write(tmp_path / "list.csv"))
    with pytest.raises(DataError, match="not JSON"):
        FileList(write(tmp_path / "list.jsonl"))


def test_a_refused_list_is_refused_every_time_and_never_kept(tmp_path: Path, cache: Path) -> None:
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
        "something else": lambda content: b"a pickle, or whatever",
        "only its start": lambda content: content[:8],
    }


@pytest.mark.parametrize("damage", damages(1000))
def test_a_damaged_index_is_ignored_and_written_anew(
    tmp_path: Path, cache: Path, parsed: list[Path], damage: str
) -> None:
    path = write(tmp_path / "list.csv")
    wanted = what_it_says(FileList(path))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    assert len(whole) > 1000
    file.unlink()
    file.write_bytes(damages(1000)[damage](whole))
    assert what_it_says(FileList(path)) == wanted
    assert parsed == [path, path] and file.read_bytes() == whole
    assert what_it_says(FileList(path)) == wanted and len(parsed) == 2


def test_a_cache_that_cannot_be_written_or_read_is_done_without(
    tmp_path: Path, cache: Path, parsed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "list.csv")
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in its place")
    wanted = what_it_says(FileList(path))
    cache.parent.unlink()

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, as whom tests often run, may write everywhere

    cache.mkdir(parents=True)
    monkeypatch.setattr(room, "whole_file", refuse)
    assert what_it_says(FileList(path)) == wanted
    monkeypatch.undo()
    assert len(parsed) == 2 and list(cache.iterdir()) == []


def test_without_a_home_folder_lists_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert len(FileList(write(tmp_path / "list.csv"))) == 50


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "fsync", full)
    assert len(FileList(write(tmp_path / "list.csv"))) == 50
    assert list(cache.iterdir()) == []


def test_short_lists_are_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "list.csv")
    monkeypatch.setattr(room, "_SMALLEST_LIST", path.stat().st_size + 1)
    FileList(path)
    assert not cache.exists()
    monkeypatch.setattr(room, "_SMALLEST_LIST", path.stat().st_size)
    FileList(path)
    assert len(list(cache.iterdir())) == 1


def test_what_nobody_asked_for_in_a_month_goes_when_another_list_is_kept(tmp_path: Path, cache: Path) -> None:
    old, used = write(tmp_path / "old.csv"), write(tmp_path / "used.csv", LINES[:20])
    FileList(old), FileList(used)
    assert len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        os.utime(file, (time.time() - 31 * 24 * 3600,) * 2)
    FileList(used)  # found, and young again
    FileList(write(tmp_path / "new.csv", LINES[:30]))
    kept = {file.name for file in cache.iterdir()}
    keys = {room.index_key(path, str(tmp_path), None) for path in (used, tmp_path / "new.csv")}
    assert kept == {f"{key}.index" for key in keys}


def test_an_open_list_stays_right_while_its_index_is_replaced(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "list.csv")
    wanted = what_it_says(FileList(path))
    source = FileList(path)
    (file,) = cache.iterdir()
    file.unlink()
    FileList(path)
    assert what_it_says(source) == wanted


def test_two_processes_at_once_leave_one_good_index(tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    path = write(tmp_path / "list.csv", LINES * 400)
    code = (
        "import sys; from kd_pipeline.data.sources import index_cache; index_cache._SMALLEST_LIST = 1; "
        "from kd_pipeline.data.sources.file_list import FileList; print(FileList(sys.argv[1]).fingerprint)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [file.suffix for file in cache.iterdir()] == [".index"]
    assert found == {FileList(path).fingerprint} and parsed == []
