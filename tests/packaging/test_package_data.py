"""Whatever is in kd_pipeline/ is in the wheel too; `make dist` builds it and runs it."""

import re

from kd_pipeline import __version__
from tests.packaging.metadata import REPOSITORY, lines_of, setup_cfg

PACKAGE = REPOSITORY / "kd_pipeline"
FILES = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_every_other_file_is_package_data() -> None:
    patterns = [part.strip() for part in setup_cfg()["options.package_data"]["kd_pipeline"].split(",")]
    found = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert found == {path for path in FILES if path.suffix != ".py"}
    assert len(found) >= 3


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in FILES if path.suffix == ".py"}
    assert len(folders) > 20
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_files_of_the_demo_are_those_of_the_checkout() -> None:
    folder = PACKAGE / "workflows" / "demo_files"
    assert (folder / "digits.yaml").resolve() == REPOSITORY / "configs" / "digits.yaml"
    assert (folder / "distill.py").resolve() == REPOSITORY / "tools" / "distill.py"


def test_version_stands_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert setup_cfg()["metadata"]["version"] == "attr: kd_pipeline._core.version.__version__"
    assert "Apache-2.0" in setup_cfg()["metadata"]["license_expression"]
    assert set(lines_of("options", "install_requires"))
