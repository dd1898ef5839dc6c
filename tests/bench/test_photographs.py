import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from kd_pipeline.bench import photographs as module
from kd_pipeline.bench.photographs import link_again, link_images, make_photographs
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import MissingPackageError
from tests.bench.conftest import NUM_PHOTOGRAPHS


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_ten_equal_classes(photographs: Path) -> None:
    source = ImageFolder(photographs)
    assert len(source) == NUM_PHOTOGRAPHS
    assert source.num_classes == 10
    assert source.labels.tolist() == sorted([*range(10)] * (NUM_PHOTOGRAPHS // 10))


def test_files_are_jpegs_of_about_500x375(photographs: Path) -> None:
    sizes = set()
    for path in photographs.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 400 <= image.width <= 600 and 325 <= image.height <= 425
            sizes.add(image.size)
            assert len(set(image.resize((8, 8)).get_flattened_data())) > 32, f"{path} shows nothing"
    assert len(sizes) > NUM_PHOTOGRAPHS // 2


def test_both_photographs_are_in_every_class(photographs: Path) -> None:
    for folder in photographs.iterdir():
        numbers = [int(path.stem) for path in folder.iterdir()]
        assert {number % 2 for number in numbers} == {0, 1}


def test_files_depend_on_the_seed(photographs: Path, tmp_path: Path) -> None:
    again = contents(make_photographs(tmp_path / "again", num_files=NUM_PHOTOGRAPHS))
    other = contents(make_photographs(tmp_path / "other", num_files=NUM_PHOTOGRAPHS, seed=1))
    assert again == contents(photographs)
    assert other.keys() == again.keys() and other != again


def test_existing_folder_is_not_changed(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in photographs.rglob("*")}
    monkeypatch.setattr(Image.Image, "save", None)  # nothing can be written
    assert make_photographs(photographs, num_files=8) == photographs
    assert {path: path.stat().st_mtime_ns for path in photographs.rglob("*")} == before


def test_interrupted_run_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def save(image: Image.Image, path: Path, **options: object) -> None:
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(path)
        path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(KeyboardInterrupt):
            make_photographs(tmp_path / "photographs", num_files=10)
    assert len(saved) == 5
    assert list(tmp_path.iterdir()) == []
    assert len(contents(make_photographs(tmp_path / "photographs", num_files=10))) == 10


def test_folder_appears_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, save, seen = tmp_path / "photographs", Image.Image.save, []

    def watch(image: Image.Image, path: Path, **options: object) -> None:
        save(image, path, **options)
        seen.append(root.exists())

    monkeypatch.setattr(Image.Image, "save", watch)
    make_photographs(root, num_files=6)
    assert seen == [False] * 6
    assert len(contents(root)) == 6


def test_slower_process_uses_the_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, write = tmp_path / "photographs", module._write_crops

    def write_slowly(*arguments: object) -> None:
        write(*arguments)
        write(root, *arguments[1:])

    monkeypatch.setattr(module, "_write_crops", write_slowly)
    assert make_photographs(root, num_files=3) == root
    assert len(contents(root)) == 3
    assert list(tmp_path.iterdir()) == [root]


def test_failing_rename_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        make_photographs(tmp_path / "photographs", num_files=1)
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_learn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"sklearn .* pip install 'kd_pipeline\[bench\]'"):
        make_photographs(tmp_path / "photographs")
    assert list(tmp_path.iterdir()) == []


def test_links_leave_out_what_cannot_be_decoded(photo_folder: Path, tmp_path: Path) -> None:
    root, lines = tmp_path / "photos", list[str]()
    shutil.copytree(photo_folder, root)
    cut_off, empty = root / "flower" / "03.jpg", root / "roof" / "04.png"
    cut_off.write_bytes(cut_off.read_bytes()[:-200])
    empty.write_bytes(b"")
    other = link_images(root, tmp_path / "links", num_images=100, report=lines.append)
    assert other == root / "flower" / "00.png"
    linked = {path.resolve() for path in (tmp_path / "links").rglob("*.*")}
    assert linked == {path for path in root.rglob("*.*") if path not in (cut_off, empty)}
    assert lines == [f"left out 2 of 37 images, which cannot be decoded, such as {cut_off}"]


@pytest.mark.parametrize(("wanted", "found"), [(40, 40), (41, 80), (100, 120)])
def test_files_are_linked_again_until_they_are_enough(
    photographs: Path, tmp_path: Path, wanted: int, found: int
) -> None:
    link_images(photographs, tmp_path, num_images=40)
    link_again(tmp_path, num_files=wanted)
    times = Counter(path.resolve() for path in tmp_path.rglob("*.jpg"))
    assert len(times) == 40 and set(times.values()) == {found // 40}
