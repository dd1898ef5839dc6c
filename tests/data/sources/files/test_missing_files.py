"""A list whose files are not where they should be says where they are."""

import os

import pytest

from kd_pipeline.data.sources import FileList
from kd_pipeline.data.sources.files import missing_files
from tests.data.sources.helpers import error_of, make_files, relative_names, write_list


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images, and a folder for lists."""
    monkeypatch.chdir(tmp_path)
    return make_files(tmp_path, "data/cat/1.jpg", "data/cat/2.jpg", "lists/")


@pytest.mark.parametrize(
    ("paths", "name", "root"),
    [
        (["data/cat/1.jpg", "data/cat/2.jpg"], "lists/l.csv", "."),
        (["cat/1.jpg", "cat/2.jpg"], "lists/l.csv", "data"),
        (["1.jpg", "2.jpg"], "data/l.csv", "data/cat"),
        (["cat/1.jpg", "cat/2.jpg"], "l.csv", "data"),
        (["data/cat/1.jpg", "data/cat/2.jpg"], "data/cat/l.csv", "."),
    ],
)
def test_root_that_is_named_works(folder, paths, name, root):
    path = write_list(folder, "\n".join(paths) + "\n", name)
    assert error_of(FileList, path).endswith(f"the files are below another folder: set root: {root}")
    assert f"set root: {root}" in error_of(FileList, path, root="lists"), "another root is as wrong"
    assert len(FileList(path, root=root)) == len(paths)


@pytest.mark.parametrize(
    ("paths", "advice"),
    [
        (["/home/me/data/cat/1.jpg"], "remove '/home/me/data/' from the start of the paths"),
        (["more/cat/1.jpg"], "remove 'more/' from the start of the paths"),
        (["/cat/1.jpg"], "remove '/' from the start of the paths"),
        (["cat\\1.jpg"], "the paths have backslashes: write / in place of each"),
        (["cat/1"], "the paths need the ending .jpg"),
        (["cat/1.JPG"], "the paths end in .jpg and not in .JPG"),
        (["cat/1.png"], "the paths end in .jpg and not in .png"),
        (["cat"], "(a folder)"),
        (["/nowhere/at/all"], "correct the paths in the list"),
        (["nowhere"], "set root to the folder in which 'nowhere' is"),
    ],
)
def test_usual_mistakes_are_named(folder, paths, advice):
    path = write_list(folder, "\n".join(2 * paths) + "\n", "data/l.txt")
    message = error_of(FileList, path)
    assert message.startswith(f"{path}: none of the 2 listed files exists, such as ") and advice in message
    assert "substitute" not in message
    (warning,) = FileList(write_list(folder, "\n".join(paths) + "\n", "data/l.txt")).warnings
    assert "1 of 1 listed files that were looked for do not exist" in warning


def test_missing_few_are_a_warning(folder):
    names = [f"cat/{n}.jpg" for n in range(10)]
    make_files(folder / "data", *names[1:])
    (folder / "data/cat/2.jpg").unlink()
    source = FileList(write_list(folder, "\n".join(names), "data/l.csv"))
    (warning,) = source.warnings
    assert "2 of 10 listed files that were looked for do not exist, such as" in warning
    assert relative_names(source, folder / "data") == names


def test_at_most_a_hundred_are_looked_for(folder, monkeypatch):
    looked_for = []
    exists = os.path.exists
    monkeypatch.setattr(missing_files.os.path, "exists", lambda path: [looked_for.append(path), exists(path)][1])
    make_files(folder / "data", *(f"{n}.jpg" for n in range(0, 3000, 3)))
    source = FileList(write_list(folder, "".join(f"{n}.jpg\n" for n in range(0, 3000, 3)), "data/l.csv"))
    assert source.warnings == () and len(looked_for) == 100
    assert looked_for[0].endswith("/0.jpg") and looked_for[-1].endswith("/2997.jpg"), "evenly spaced over all"


def test_none_of_many_is_refused_by_a_sample(folder):
    path = write_list(folder, "".join(f"{n}.jpg\n" for n in range(5000)), "data/l.csv")
    assert "none of 100 looked-for files exists" in error_of(FileList, path)
