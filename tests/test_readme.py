"""What the README and the pages in docs/ show works as it is written."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from kd_pipeline import cli, export_onnx, load_config
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.workflows.demo import write_digits
from tests.test_layering import PACKAGES

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCS = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """The page and the text of each example in this language; tests/docs/test_journeys.py runs those of journeys."""
    return [
        (page.name, text)
        for page in DOCS
        if language != "python" or page.parent.name != "journeys"
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ]


def commands() -> list[list[str]]:
    """The arguments of every `kd-pipeline` in the examples."""
    lines = (line for _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines())
    words = (shlex.split(line, comments=True) for line in lines)
    starts = (
        re.match(r"(?:\S+=\S* )*(?:(?:torchrun|srun) .*?)?(?:-m kd_pipeline|kd-pipeline) ", shlex.join(each))
        for each in words
    )
    return [shlex.split(match.string[match.end() :]) for match in starts if match]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as `make demo` leaves it: the config, the digits and a teacher."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    write_digits(folder / "data" / "digits")
    export_onnx(small_resnet(10, width=4), folder / "runs" / "demo" / "teacher.onnx", image_shape=(3, 32, 32))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_runs_as_written(
    number: int, after_the_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(after_the_demo)
    page, code = blocks("python")[number]
    exec(compile(code, f"{page}, example {number}", "exec"), {})
    if "print(" in code:
        assert capsys.readouterr().out.strip()


def test_there_are_python_examples() -> None:
    assert len(blocks("python")) >= 3


def test_every_yaml_example_is_a_valid_config(tmp_path: Path) -> None:
    assert blocks("yaml")
    for number, (_, block) in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_config(path).data.batch_size > 0


@pytest.mark.parametrize("arguments", commands(), ids=shlex.join)
def test_every_command_has_the_options_that_a_page_gives_it(arguments: list[str]) -> None:
    assert callable(cli._parser().parse_args(arguments).run)


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_architecture_is_the_map_of_packages() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", page, flags=re.MULTILINE)
    assert rows == [package for package in PACKAGES if package != "__main__"]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`([a-z_]+(?:/\w+)*\.py)`", text):
        assert (REPOSITORY / "kd_pipeline" / path).exists() or (REPOSITORY / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {test}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{test}"
