"""Lists as other programs write them: headers, delimiters, encodings. Each is read rightly or refused in words."""

import logging

import pytest

from kd_pipeline.data.sources import FileList
from tests.data.sources.helpers import error_of, make_files, relative_names, write_list

FILES = ("cat/1.jpg", "cat/2.png", "dog/3.JPEG")
LABELS = ("cat", "cat", "dog")


def rows(*columns, delimiter=",", header=None):
    """A list with these columns, the paths where a column is `path` and the labels where it is `label`."""
    cells = {"path": FILES, "label": LABELS, "number": ("0", "1", "2"), "one": ("1", "1", "1")}
    lines = [delimiter.join(cells[column][row] for column in columns) for row in range(3)]
    return "\n".join(([] if header is None else [header]) + lines) + "\n"


READ = {
    "filename,class": rows("path", "label", header="filename,class"),
    "image,target": rows("path", "label", header="image,target"),
    "file,category": rows("path", "label", header="file,category"),
    "image_path,label_id": rows("path", "label", header="image_path,label_id"),
    "imagePath,className": rows("path", "label", header="imagePath,className"),
    "Path,Label": rows("path", "label", header="Path,Label"),
    "File Name,Class Name": rows("path", "label", header="File Name,Class Name"),
    "quoted header": rows("path", "label", header='"filename","class"'),
    "BOM": "\ufeff" + rows("path", "label", header="filename,class"),
    "UTF-16": rows("path", "label", header="filename,class").encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + rows("path", "label").encode("utf-16-be"),
    "UTF-32": rows("path", "label").encode("utf-32"),
    "other order": rows("label", "path", header="label,path"),
    "index of pandas": rows("number", "path", "label", header=",path,label"),
    "index of pandas, read and written": rows("number", "path", "label", header="Unnamed: 0,filename,label"),
    "more columns": rows("path", "number", "label", "one", header="image,width,label,height"),
    "exact name wins": rows("path", "label", "number", header="path,label,class_id"),
    "comment before header": "# made today, by me\n" + rows("path", "label", header="filename,class"),
    "sep=": "sep=;\n" + rows("path", "label", header="path;label", delimiter=";"),
    "sep= without header": "sep=;\n" + rows("path", "label", delimiter=";"),
    "Windows lines": rows("path", "label", header="filename,class").replace("\n", "\r\n") + "\r\n\r\n",
    "old Mac lines": rows("path", "label", header="filename,class").replace("\n", "\r"),
    "comma after each line": rows("path", "label").replace("\n", ",\n"),
    "spaces after commas": rows("path", "label", delimiter=" , "),
    "semicolons": rows("path", "label", delimiter=";"),
    "semicolons, header": rows("path", "label", delimiter=";", header="filename;class"),
    "semicolons, other order": rows("label", "path", delimiter=";", header="label;path"),
    "tabs": rows("path", "label", delimiter="\t"),
    "tabs, header": rows("path", "label", delimiter="\t", header="image\tlabel"),
    "pipes": rows("path", "label", delimiter="|"),
    "spaces": rows("path", "label", delimiter=" "),
    "many spaces": rows("path", "label", delimiter="    "),
    "spaces, header": rows("path", "label", delimiter=" ", header="filename class"),
    "spaces, other order": rows("label", "path", delimiter=" ", header="label path"),
    "spaces, three columns": rows("number", "path", "label", delimiter=" ", header="id image label"),
    "list of MXNet": rows("number", "label", "path", delimiter="\t", header="index\tlabel\tpath"),
    "JSON lines": "".join(f'{{"file_name": "{FILES[n]}", "label": "{LABELS[n]}", "w": 3}}\n' for n in range(3)),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["list.csv", "list.txt"])
@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_list_is_understood(tmp_path, text, ending):
    make_files(tmp_path, *FILES)
    source = FileList(write_list(tmp_path, text, ending))
    assert relative_names(source, tmp_path) == list(FILES)
    assert source.labels.tolist() == [0, 0, 1] and source.classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["l.CSV", "l.tsv", "l.TSV", "l.txt", "l.lst", "train"])
def test_delimiter_is_found_whatever_the_name(tmp_path, name):
    make_files(tmp_path, *FILES)
    for delimiter in ",\t; ":
        source = FileList(write_list(tmp_path, rows("path", "one", delimiter=delimiter), name))
        assert source.labels.tolist() == [1, 1, 1] and relative_names(source, tmp_path) == list(FILES)
    assert FileList(write_list(tmp_path, '{"path": "cat/1.jpg", "label": 3}', "l.JSONL")).labels.tolist() == [3]


def test_columns_that_are_read_are_logged(tmp_path, caplog):
    make_files(tmp_path, *FILES)
    with caplog.at_level(logging.INFO, "kd_pipeline"):
        FileList(write_list(tmp_path, rows("path", "label", "one", header="image,target,width")))
    (read, unused) = (record.getMessage() for record in caplog.records)
    assert read.endswith("paths from the column 'image', labels from the column 'target'")
    assert unused.endswith("not read: 'width'")


UNLABELED = {
    "spaces": ["my cat 1.jpg", "my dog.jpg"],
    "commas": ["cat, dog.jpg", "dog.jpg"],
    "semicolons": ["a;b.jpg", "c;d.jpg"],
    "no endings": ["a", "b"],
    "numbers first": ["1 a.jpg", "2 b.jpg"],
}


@pytest.mark.parametrize("names", UNLABELED.values(), ids=UNLABELED)
def test_names_with_delimiters_stay_whole(tmp_path, names):
    make_files(tmp_path, *names)
    for header in ([], ["filename"]) if names != UNLABELED["commas"] else ([],):
        source = FileList(write_list(tmp_path, "\n".join([*header, *names]), "list.txt"))
        assert relative_names(source, tmp_path) == names and source.labels is None


@pytest.mark.parametrize("ending", [".jpg", ""])
def test_labels_and_paths_with_spaces(tmp_path, ending):
    make_files(tmp_path, f"my cat{ending}", f"dog{ending}")
    source = FileList(write_list(tmp_path, f"my cat{ending},house cat\ndog{ending},hot dog\n"))
    assert source.classes == ("hot dog", "house cat") and source.labels.tolist() == [1, 0]


def test_files_without_ending_need_no_comma(tmp_path):
    make_files(tmp_path, "a", "b")
    for delimiter in ";\t |":
        assert FileList(write_list(tmp_path, f"a{delimiter}1\nb{delimiter}0\n")).labels.tolist() == [1, 0]


REFUSED = {
    "unknown header": (rows("path", "label", header="datei,klasse"), "header: found the columns 'datei', 'klasse'"),
    "unknown header, files without ending": ("name,kind\na,x\nb,y\n", "header: found the columns 'name', 'kind'"),
    "unknown path": (rows("path", "label", header="sample,label"), "none is known to hold the paths"),
    "unknown label": (rows("path", "label", header="path,diagnosis"), "none is known to hold the labels; name that"),
    "one column per class": (rows("path", "one", "one", header="path,cat,dog"), "remove 'cat', 'dog' from a list"),
    "two labels": (rows("path", "label", "number", header="path,class,class_id"), "more than one may be the label"),
    "two paths": (rows("path", "path", "label", header="image,file,label"), "more than one may be the path"),
    "label first": (rows("label", "path"), "first line that names the columns: 'label,path' if column 1 is the label"),
    "number first": (rows("number", "path"), "'index,path' if it counts the lines"),
    "number first, label": (rows("number", "path", "label"), "'index,path,label' if it counts the lines"),
    "number first, spaces": (rows("number", "path", delimiter=" "), "'index path' if it counts the lines"),
    "splits": ("path,label,split\na,x,train\nb,y,val\n", ":3: found the split 'val' where lines above have 'train'"),
    "three columns": (rows("path", "label", "one"), "found 3 columns, expected 2"),
    "UTF-16 without mark": ("path,label\n".encode("utf-16-le"), "perhaps UTF-16 without its mark; save the list"),
    "JSON array": ('[{"path": "a"}]', ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_doubtful_list_is_refused(tmp_path, text, words):
    make_files(tmp_path, *FILES, "a", "b")
    path = write_list(tmp_path, text)
    message = error_of(FileList, path)
    assert message.startswith(str(path)) and words in message


@pytest.mark.parametrize(
    ("columns", "advice"), [(("label", "path"), "label,path"), (("number", "path", "label"), "index,path,label")]
)
def test_advised_first_line_works(tmp_path, columns, advice):
    make_files(tmp_path, *FILES)
    assert f"'{advice}'" in error_of(FileList, write_list(tmp_path, rows(*columns)))
    source = FileList(write_list(tmp_path, rows(*columns, header=advice)))
    assert source.labels.tolist() == [0, 0, 1] and relative_names(source, tmp_path) == list(FILES)


def test_advice_for_latin_1_works(tmp_path):
    make_files(tmp_path, "a")
    text = "a,café\n".encode("latin-1")
    assert "iconv -f latin1 -t utf8" in error_of(FileList, write_list(tmp_path, text))
    assert FileList(write_list(tmp_path, text.decode("latin-1"))).classes == ("café",)
