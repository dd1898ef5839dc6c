"""Lists that somebody else made are read within limits, row by row."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from kd_pipeline.data.sources import FileList
from kd_pipeline.data.sources.files import index_cache, list_format, list_rows
from kd_pipeline.data.sources.files.list_file import ListFile
from kd_pipeline.data.sources.files.list_format import find_format
from kd_pipeline.data.sources.files.list_rows import ListRows
from tests.data.sources.helpers import error_of, make_files, write_list

STARTS = {
    "CSV": ("list.csv", b"a.jpg,x\n", b"a.jpg,"),
    "quoted": ("list.csv", b"a.jpg,x\n", b'"'),
    "tabs": ("list.tsv", b"a.jpg\tx\n", b""),
    "spaces": ("list.txt", b"my cat.jpg x\n", b""),
    "names alone": ("list.txt", b"a,b.jpg\n", b""),
    "JSON": ("list.jsonl", b'{"path": "a.jpg", "label": "x"}\n', b'{"path": "'),
}


@pytest.mark.parametrize(("name", "line", "start"), STARTS.values(), ids=STARTS)
def test_line_without_an_end_is_refused_by_number(tmp_path, monkeypatch, name, line, start):
    """The file has a terabyte, which takes no space on a disk."""
    monkeypatch.setattr(list_format, "_HEAD_BYTES", 4000)  # as far as it looks for binary files
    make_files(tmp_path, "a.jpg", "my cat.jpg", "a,b.jpg")
    path = write_list(tmp_path, line * 500 + start, name)
    os.truncate(path, 2**40)
    tracemalloc.start()
    message = error_of(FileList, path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith(f"{path}:501: a row of more than 1048576 characters; write one path")
    assert most < 2**25


def rows_of(path: Path) -> list[list_rows.Row]:
    return list(ListRows(ListFile.at(path), find_format(ListFile.at(path), str(path.parent))))


def test_row_of_many_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(list_rows, "_MAX_ROW", 100)
    fine = write_list(tmp_path, 'a.jpg,"' + "two\nlines" * 5 + '"\n' + "b.jpg,x\n" * 100)
    assert len(rows_of(fine)) == 101
    quoted = write_list(tmp_path, "a.jpg,x\n" + 'b.jpg,"\n' + '","\n' * 100)
    assert error_of(rows_of, quoted).startswith(f"{quoted}:")
    assert "a row of more than 100 characters" in error_of(rows_of, quoted)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ""])
def test_longest_row_is_read(tmp_path, monkeypatch, end):
    monkeypatch.setattr(list_rows, "_MAX_ROW", 40)
    text = "x" * (34 - len(end)) + ".jpg,1" + end
    make_files(tmp_path, text.partition(",")[0])
    assert [label for _, _, label in rows_of(write_list(tmp_path, text * (3 if end else 1)))] == ["1"] * (
        3 if end else 1
    )
    assert "a row of more than 40" in error_of(rows_of, write_list(tmp_path, "x" + text * 2 + "x"))


ROWS = {
    "long path": ("a.jpg,x\n" + "a/" * 2500 + ".jpg,x\n", "list.csv", 2, "has 5004 bytes, and no file's path has more"),
    "long label": ("a.jpg,x\na.jpg," + "y" * 1001 + "\n", "list.csv", 2, "has 1001 characters, and a name has at"),
    "long cell": ('a.jpg,"' + "y" * 200_000 + '"\n', "list.csv", 1, "field larger than field limit (131072)"),
    "deep object": ('{"a":' * 100_000, "list.jsonl", 1, ""),
    "deep label": ('{"path": "a.jpg", "label": ' + "[" * 100_000, "list.jsonl", 1, ""),
    "NaN": ('{"path": "a.jpg", "label": NaN}', "list.jsonl", 1, "the label nan is neither an integer nor a string"),
    "infinity": ('{"path": "a.jpg", "label": 1e999}', "list.jsonl", 1, "the label inf is neither"),
    "digits": ('{"path": "a.jpg", "label": ' + "9" * 5000 + "}", "list.jsonl", 1, "not JSON"),
    "long key": ('{"path": "a.jpg", "' + "k" * 500_000 + '": 3}', "list.jsonl", 1, "none is known to hold the labels"),
    "many keys": (json.dumps({f"k{n}": 0 for n in range(50_000)}), "list.jsonl", 1, "and 49990 more, and none"),
    "odd characters": (json.dumps({"\x1b]0;evil\x07": 1}), "list.jsonl", 1, r"\x1b]0;evil"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "name", "line", "words"), ROWS.values(), ids=ROWS)
def test_hostile_row_is_refused_in_few_words(tmp_path, text, name, line, words):
    make_files(tmp_path, "a.jpg")
    path = write_list(tmp_path, text, name)
    message = error_of(FileList, path)
    assert message.startswith(f"{path}:{line}: ") and words in message
    assert len(message) < 1500 and "\x1b" not in message


def test_header_of_thousands_of_columns_is_refused_in_few_words(tmp_path):
    make_files(tmp_path, "a.jpg")
    header = "path," + ",".join(f"k{n}" for n in range(9000))
    message = error_of(FileList, write_list(tmp_path, header + "\na.jpg,x\n"))
    assert "and 8991 more, and none is known to hold the labels; name that one label" in message
    assert len(message) < 1500


def test_header_of_underscores_is_read_at_once(tmp_path):
    """A text that an expression can read in many ways, of which it tries each."""
    make_files(tmp_path, "a.jpg", "b.jpg")
    for name in ("_" * 5000 + "!", "_ " * 2500 + "!", "-_" * 2500 + "!"):
        assert error_of(FileList, write_list(tmp_path, f"{name}\na.jpg\nb.jpg\n"))


def test_keys_that_change_in_each_line_take_little_memory(tmp_path):
    make_files(tmp_path, "a.jpg")
    lines = [{"path": "a.jpg", "label": 0, f"{number}{'k' * 1000}": 0} for number in range(2000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = write_list(tmp_path, text, "list.jsonl")
    form = find_format(ListFile.at(path), str(tmp_path))
    tracemalloc.start()
    rows = ListRows(ListFile.at(path), form)
    assert sum(1 for _ in rows) == 2000
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2**20
    (remark,) = rows.remarks()
    assert "and 990 more" in remark and len(remark) < 1500


def test_huge_list_is_parsed_before_it_is_hashed(tmp_path, monkeypatch):
    path = write_list(tmp_path, "a.jpg,x\n" * 1000)
    monkeypatch.setattr(index_cache, "_MIN_LIST_BYTES", 1)
    form = find_format(ListFile.at(path), str(tmp_path))
    assert index_cache.index_key(ListFile.at(path), str(tmp_path), None, form) is not None
    monkeypatch.setattr(index_cache, "MAX_LIST_BYTES", path.stat().st_size - 1)
    assert index_cache.index_key(ListFile.at(path), str(tmp_path), None, form) is None


def test_paths_of_many_parts_are_looked_for_at_once(tmp_path, monkeypatch):
    looked_for: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: [looked_for.append(path), isfile(path)][1])
    text = "".join(f"{n}/{'a/' * 2000}x.jpg\n" for n in range(5))
    assert "none of the 5 listed files exists" in error_of(FileList, write_list(tmp_path, text))
    assert len(looked_for) < 200_000
