"""CSV and JSONL lists: what is accepted, and errors with file and line."""

import json

import pytest

from kd_pipeline.data.sources import FileList
from tests.data.sources.helpers import error_of, make_files, read_paths, relative_names, write_list


@pytest.mark.parametrize(
    ("text", "samples", "labels", "classes"),
    [
        ("a.jpg,cat\nb.jpg,ant\nc.jpg,cat\n", ["a.jpg", "b.jpg", "c.jpg"], [1, 0, 1], ("ant", "cat")),
        ("path,label\na.jpg,cat\n", ["a.jpg"], [0], ("cat",)),
        ("Path, Label\r\na.jpg, cat\r\n\r\nb.jpg,cat", ["a.jpg", "b.jpg"], [0, 0], ("cat",)),
        ("\ufeffpath,label\na.jpg,3\nb.jpg,0\n", ["a.jpg", "b.jpg"], [3, 0], None),
        ('"a, ""b"".jpg",cat\n"two\nlines.jpg",cat\n', ['a, "b".jpg', "two\nlines.jpg"], [0, 0], ("cat",)),
        ('a.jpg, "x, y"\nb.jpg,cat \n', ["a.jpg", "b.jpg"], [1, 0], ("cat", "x, y")),
        ('"two\r\nlines.jpg",cat\r\n', ["two\r\nlines.jpg"], [0], ("cat",)),
        ("a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"], None, None),
        ("path\na.jpg\n", ["a.jpg"], None, None),
        ("a.jpg,cat\na.jpg,dog\n", ["a.jpg", "a.jpg"], [0, 1], ("cat", "dog")),
        ("a.jpg,01\nb.jpg,1a\n", ["a.jpg", "b.jpg"], [0, 1], ("01", "1a")),
        ("猫/é.jpg,猫\n", ["猫/é.jpg"], [0], ("猫",)),
    ],
)
def test_reads_csv(tmp_path, text, samples, labels, classes):
    make_files(tmp_path, *samples)
    source = FileList(write_list(tmp_path, text))
    assert relative_names(source, tmp_path) == samples
    assert (None if source.labels is None else source.labels.tolist()) == labels and source.classes == classes


@pytest.mark.parametrize(
    ("rows", "labels", "classes", "num_classes"),
    [
        ([{"path": "a", "label": "cat"}, {"path": "b", "label": "ant"}], [1, 0], ("ant", "cat"), 2),
        ([{"path": "a", "label": 3}, {"path": "b", "label": 0}], [3, 0], None, 4),
        ([{"path": "a", "label": "10"}, {"path": "b", "label": "9"}], [0, 1], ("10", "9"), 2),
        ([{"path": "a"}, {"path": "b", "label": None}], None, None, None),
    ],
)
def test_reads_jsonl(tmp_path, rows, labels, classes, num_classes):
    make_files(tmp_path, "a", "b")
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in rows)
    source = FileList(write_list(tmp_path, text, "list.jsonl"))
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert (source.classes, source.num_classes) == (classes, num_classes)


def test_given_classes_set_labels(tmp_path):
    make_files(tmp_path, "a.jpg", "b.jpg")
    names = write_list(tmp_path, "a.jpg,cat\nb.jpg,ant\n")
    assert FileList(names, classes=("cat", "bee", "ant")).labels.tolist() == [0, 2]
    indices = write_list(tmp_path, "a.jpg,2\nb.jpg,0\n")
    source = FileList(indices, classes=("cat", "bee", "ant"))
    assert source.labels.tolist() == [2, 0] and source.classes == ("cat", "bee", "ant") and source.num_classes == 3
    assert FileList(indices, classes=("0", "1", "2")).labels.tolist() == [2, 0]


def test_paths_are_relative_to_root_or_list(tmp_path, monkeypatch):
    make_files(tmp_path, "a.jpg", "data/a.jpg")
    path = write_list(tmp_path, f"a.jpg\n/abs/b.jpg\n{tmp_path}//c.jpg\n../d.jpg\n{tmp_path}/\n")
    assert read_paths(FileList(path), 0, 1, 2, 3, 4) == [
        f"{tmp_path}/a.jpg", "/abs/b.jpg", f"{tmp_path}/c.jpg", f"{tmp_path}/../d.jpg", f"{tmp_path}/",
    ]  # fmt: skip
    assert FileList(path, root=tmp_path / "data").name(0) == f"{tmp_path}/data/a.jpg"
    monkeypatch.chdir(tmp_path)
    assert FileList("list.csv").name(0) == f"{tmp_path}/a.jpg"


def test_warns_about_numbers_in_text_order(tmp_path):
    make_files(tmp_path, "1.jpg", "2.jpg", "10.jpg")
    rows = "".join(json.dumps({"path": f"{name}.jpg", "label": name}) + "\n" for name in ("1", "2", "10"))
    (warning,) = FileList(write_list(tmp_path, rows, "list.jsonl")).warnings
    assert "(0: 1, 1: 10, 2: 2)" in warning


BAD_LISTS = {
    "mixed kinds": ("a,cat\nb,3\n", None, 2, "found a class index (3) where the lines above have a class name"),
    "mixed kinds, numbers first": ("a,3\n\nb,cat\n", None, 3, "found a class name ('cat') where the lines above"),
    "label missing": ("a,cat\nb\n", None, 2, "found 1 columns, expected 2"),
    "label empty": ("a,cat\nb,\n", None, 2, "the label '' is not a string of at least one character"),
    "label promised": ("path,label\na\n", None, 2, "found 1 columns, expected 2"),
    "too many columns": ("a.jpg,cat,3\n", None, 1, "found 3 columns, expected 2: path,label or path alone"),
    "more columns below": ("path,label\na,cat\nb,cat,3\n", None, 3, "found 3 columns, expected 2: 'path', 'label'"),
    "fraction": ("a,1.0\n", None, 1, "the label '1.0' is neither a class index nor a name: write 1"),
    "half": ("a,0.5\n", None, 1, "a class is a whole number or a name"),
    "two names": ("a,cat\nb,cat|dog\n", None, 2, "the label 'cat|dog' looks like several"),
    "two numbers": ('a,1\nb,"1 5"\n', None, 2, "the label '1 5' looks like several"),
    "Python list": ("a,\"['x', 'y']\"\n", None, 1, "looks like several"),
    "not a number": ("a,cat\nb,NaN\n", None, 2, "the label 'NaN' stands for none: remove the line"),
    "image as label": ("a.jpg,a_mask.png\n", None, 1, "the label 'a_mask.png' is an image file"),
    "URL": ("path,label\nftp://x.org/a.jpg,cat\n", None, 2, "nothing here reads ftp:// URLs"),
    "file URL": ("file:///x/a.jpg,cat\n", None, 1, "write the path alone: /x/a.jpg"),
    "path empty": ("a,cat\n,cat\n", None, 2, "the path '' is not a string"),
    "nul": ("a\0b,cat\n", None, 1, ""),
    "quote left open": ('a,cat\n"b,cat\n', None, 2, "unexpected end of data"),
    "not UTF-8": (b"a,cat\ncaf\xe9,cat\n", None, 2, "is not UTF-8; save the list as UTF-8"),
    "label not UTF-8": (b"a,cat\nb,caf\xe9\n", None, 2, "is not UTF-8"),
    "negative": ("a,0\nb,-1\n", None, 2, "the label -1 is not a class index from 0 to 2147483647; classes"),
    "huge": (f"a,{10**25}\n", None, 1, "is not a class index from 0 to 2147483647"),
    "beyond huge": (f"a,{'9' * 5000}\n", None, 1, "has 5000 characters, and a name has at most 1000"),
    "out of range": ("a,0\nb,2\n", ("x", "y"), 2, "the label 2 is not a class index from 0 to 1"),
    "unknown name": ("path,label\na,cat\nb,dgo\n", ("cat", "dog"), 3, "'dgo' is not among the 2 classes; did you mean"),
    "ambiguous": ("a,2\n", ("1", "10", "2"), 1, "the label 2 may be a class index or a name"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "classes", "line", "words"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_csv_line_is_refused_by_number(tmp_path, text, classes, line, words):
    path = write_list(tmp_path, text)
    message = error_of(FileList, path, classes=classes)
    assert message.startswith(f"{path}:{line}: ") and words in message


BAD_JSON = {
    "not JSON": ("{path: 1}", "not JSON"),
    "no object": ('["a", "cat"]', "expected an object with the keys path and label"),
    "no path": ('{"label": 3}', "found the keys 'label', and none is known to hold the paths; name them path and"),
    "unknown key": ('{"path": "b", "lable": 3}', "found the keys 'path', 'lable', and none is known to hold the label"),
    "two paths": ('{"image": "b", "file": "c", "label": 3}', "more than one may be the path; name only the right one"),
    "a whole array": ('[{"path": "b", "label": 3}]', "write an object on each line"),
    "URL": ('{"path": "file:///b/c.jpg", "label": 3}', "write the path alone: /b/c.jpg"),
    "empty path": ('{"path": "", "label": 3}', "the path '' is not a string of at least one character"),
    "path is a number": ('{"path": 3, "label": 3}', "the path 3 is not a string"),
    "label is a float": ('{"path": "b", "label": 3.0}', "the label 3.0 is neither an integer nor a string; write 3"),
    "label is a bool": ('{"path": "b", "label": true}', "the label True is neither an integer nor a string"),
    "label is a list": ('{"path": "b", "label": [1]}', "is neither an integer nor a string"),
    "no label": ('{"path": "b"}', "found no label (None) where the lines above have a class index"),
    "half a character": (r'{"path": "\ud800", "label": 3}', "is not UTF-8"),
    "nul": (r'{"path": "\u0000", "label": 3}', "is not a string"),
    "deep": ("[" * 100_000, ""),
    "long number": ('{"path": "b", "label": ' + "9" * 5000 + "}", "not JSON"),
    "big number": ('{"path": "b", "label": 9223372036854775808}', "is not a class index"),
}


@pytest.mark.parametrize(("row", "words"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_jsonl_line_is_refused_by_number(tmp_path, row, words):
    path = write_list(tmp_path, '{"path": "a", "label": 0}\n\n' + row + "\n", "list.jsonl")
    message = error_of(FileList, path)
    assert message.startswith(f"{path}:3: ") and words in message


@pytest.mark.parametrize("text", ["", "\n\n", "path,label\n"])
def test_empty_list_is_refused(tmp_path, text):
    path = write_list(tmp_path, text)
    assert error_of(FileList, path).startswith(f"{path}: lists no samples")


def test_missing_or_unknown_list_is_refused(tmp_path):
    assert error_of(FileList, tmp_path / "none.csv").startswith(f"{tmp_path}/none.csv: cannot be read (No such file")
    path = write_list(tmp_path, "a\n", "list.yaml")
    assert error_of(FileList, path).startswith(f"{path}: a file list is CSV text (.csv, .tsv or .txt) or JSONL")
    assert f"take kind: image_folder with root: {tmp_path}" in error_of(FileList, tmp_path)


def test_class_of_odd_name_can_be_listed(tmp_path):
    """What the errors about labels advise."""
    make_files(tmp_path, "a", "b", "c", "d")
    path = write_list(tmp_path, "a,1.0\nb,cat|dog\nc,nan\nd,[x]\n")
    assert FileList(path, classes=("nan", "[x]", "1.0", "cat|dog")).labels.tolist() == [2, 3, 0, 1]


SUSPICIOUS = {
    "from 1": ("a,1\nb,2\nc,2\n", "labels from 1 to 2, and classes count from 0"),
    "gap": ("a,0\nb,3\nc,5\n", "no samples for 3 of 6 classes: 1, 2, 4"),
    "huge gap": ("a,0\nb,2000000000\n", "no samples for 1999999999 of 2000000001 classes: 1, 2, 3"),
    "two labels": ("a,x\nb,y\na,y\nc,x\n", "1 line(s) list a file again with another label, such as"),
    "case": ("a,Cat\nb,cat\n", "differ only in case, spaces or Unicode form: 'Cat' and 'cat'"),
    "underscore": ("a,hot dog\nb,hot_dog\n", "differ only in case, spaces or Unicode form"),
    "pair of classes": ('a,x\nb,y\nc,"x, y"\n', "classes that consist of other classes: 'x, y'"),
    "comment": ("# made today\na,x\nb,x\n", "skipped 1 comment line(s)"),
    "unused column": ("path,label,width\na,x,3\nb,x,4\n", "not read: 'width'"),
    "one missing": ("a,x\nnone,x\nb,x\n", "1 of 3 listed files that were looked for do not exist, such as"),
}


@pytest.mark.parametrize(("text", "words"), SUSPICIOUS.values(), ids=SUSPICIOUS)
def test_suspicious_list_is_read_with_a_warning(tmp_path, text, words):
    make_files(tmp_path, "a", "b", "c")
    (warning,) = FileList(write_list(tmp_path, text)).warnings
    assert words in warning


def test_own_class_for_every_sample_is_suspicious(tmp_path):
    make_files(tmp_path, *(f"{n}.jpg" for n in range(30)))
    for label in ("{}", "x{}"):
        text = "".join(f"{n}.jpg,{label.format(n)}\n" for n in range(30))
        warnings = FileList(write_list(tmp_path, text)).warnings
        assert "each of the 30 samples has a class of its own" in warnings[0]


def test_same_label_twice_is_no_warning(tmp_path):
    make_files(tmp_path, "a", "b")
    assert FileList(write_list(tmp_path, "a,x\na,x\nb,y\n")).warnings == ()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.tar", b"", "is a tar archive, and a file list is CSV or JSONL text; take kind: tar with path: {path}"),
        ("l.csv", b"x" * 257 + b"ustar", "is a tar archive"),
        ("l.csv", b"PK\x03\x04", "is a ZIP archive"),
        ("l.xlsx", b"PK\x03\x04", "is a spreadsheet, and a file list is CSV or JSONL text; save it as CSV"),
        ("l.csv.gz", b"\x1f\x8b", "is a compressed file"),
        ("l.tar.gz", b"\x1f\x8b", "is a compressed tar archive"),
        (
            "l.parquet",
            b"PAR1",
            "is a Parquet file, and a file list is CSV or JSONL text; take kind: parquet with path: ",
        ),
        ("l.h5", b"\x89HDF", "is a database"),
        ("l.csv", b"\x93NUMPY", "is a NumPy array, and a file list is CSV or JSONL text; take kind: arrays"),
        ("l.csv", b"\xff\xd8\xff\xe0", "is an image"),
        ("l.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a pointer of git-lfs"),
    ],
)
def test_what_is_no_list_is_named_with_a_way_to_convert(tmp_path, name, content, words):
    path = write_list(tmp_path, content, name)
    message = error_of(FileList, path)
    assert message.startswith(f"{path} ") and words.format(path=path) in message and "rename" not in message


def test_path_and_root_are_read_like_paths_of_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_files(tmp_path, "data/a.jpg")
    write_list(tmp_path, "a.jpg,x\n")
    assert FileList("~/list.csv", root="~/data").name(0) == f"{tmp_path}/data/a.jpg"
    assert "is a URL" in error_of(FileList, "file:///list.csv")
    assert "has the variable $DATA" in error_of(FileList, "~/list.csv", root="$DATA")
