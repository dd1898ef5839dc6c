"""Options made from the fields of settings."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kd_pipeline._core.image_size import Size, size_text
from kd_pipeline._core.settings import Settings
from kd_pipeline.cli import _parser, main
from kd_pipeline.cli.arguments import CommandParser, add_options, checked, given, path_option, size_option
from kd_pipeline.errors import ConfigError


class Example(Settings):
    top_k: int | None = Field(default=None, ge=1)
    """Keep the `K` largest,
    100% of them."""
    dtype: Literal["float32", "float16"] = "float32"
    """GPUs like it."""
    mean: tuple[Annotated[float, Field(le=1)], float, float] | None = None
    names: tuple[str, ...] | None = None
    out: tuple[str, ...] | Path | None = None
    half: bool = False
    level: int = 3
    """Defaults to much."""
    size: Size | None = None
    side: Size = 8


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_options(parser, Example, "top_k", "dtype", "names", "out", "half", "level", flags={"top_k": ["--top-k", "-k"]})
    add_options(parser, Example, "mean", prefix="input_")
    add_options(parser, Example, "size", "side")
    return parser


def parse(parser: argparse.ArgumentParser, *arguments: str) -> Example:
    parsed = parser.parse_args(arguments)
    return checked(Example, **given(parsed, Example), **given(parsed, Example, prefix="input_"))


def test_defaults_are_those_of_the_settings(parser: argparse.ArgumentParser) -> None:
    assert parse(parser) == Example()
    assert given(parser.parse_args([]), Example) == {}


def test_values_become_their_types(parser: argparse.ArgumentParser) -> None:
    options = ["-k", "2", "--dtype", "float16", "--names", "a", "b", "--out", "c.json", "--half", "--level", "4"]
    assert parse(parser, *options, "--input-mean", "0.5", "-1", "1e-3") == Example(
        top_k=2, dtype="float16", names=("a", "b"), out=Path("c.json"), half=True, level=4, mean=(0.5, -1.0, 1e-3)
    )


@pytest.mark.parametrize(("text", "size"), [("224", 224), ("384x640", (384, 640)), ("32x32", 32)])
def test_sizes_are_one_number_or_two(parser: argparse.ArgumentParser, text: str, size: int | tuple[int, int]) -> None:
    found = parse(parser, "--size", text, "--side", text)
    assert found.size == found.side == size
    assert size_option(size_text(size)) == size


@pytest.mark.parametrize("text", ["0", "-1", "8x", "x8", "8x0", "8x8x8", "12345", "8,8", "", "8 x 8"])
def test_other_sizes_are_refused(
    parser: argparse.ArgumentParser, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args([f"--size={text}"])
    assert f"a size is 224, or 384x640 for height and width, got {text!r}" in capsys.readouterr().err


def test_help_is_docstring_and_default(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert (
        "--top-k N, -k N keep the K largest, 100% of them --dtype {float32,float16} GPUs like it (default: float32)"
        in text
    )
    assert "--level N defaults to much --input-mean X X X" in text


def test_errors_name_the_option(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(
        ConfigError, match=r"--top-k: Input should be greater than or equal to 1, got '0'; --level: .*valid"
    ):
        parse(parser, "-k", "0", "--level", "high")


def test_options_are_added_when_used() -> None:
    calls: list[str] = []

    def add(parser: argparse.ArgumentParser) -> None:
        calls.append(parser.prog)
        parser.add_argument("--here", action="store_true")

    parser = CommandParser(prog="p")
    commands = parser.add_subparsers()
    for name in ("one", "two"):
        commands.add_parser(name, add_options=add)
    assert calls == []
    for _ in range(2):
        assert parser.parse_args(["two", "--here"]).here
    assert calls == ["p two"]


def test_paths_are_read_like_those_of_a_config(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser.add_argument("--file", type=path_option)
    parsed = parser.parse_args(["--file=~/x", "--out=~/y"])
    assert parsed.file == Path("/home/me/x") and checked(Example, out=parsed.out).out == Path("/home/me/y")
    for option in ("--file=$DATA/x", "--out=$DATA/x", "--file=", "--out=s3://b/x"):
        with pytest.raises(SystemExit):
            parser.parse_args([option])
    errors = capsys.readouterr().err
    assert errors.count("the path '$DATA/x' has the variable $DATA") == 2
    assert "is empty" in errors and "s3://b/x is a URL" in errors


def test_errors_of_values_name_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^--out: the path '\$A' has the variable \$A"):
        checked(Example, out=Path("$A"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["eval", "-c", "x.yaml", "--sizes", "192", "runs/mine"], "got 'runs/mine'; --sizes takes every word"),
        (["eval", "-c", "x.yaml", "--crops", "0.9", "runs/mine"], "so write MODEL before it"),
        (["export", "--input-mean", "0.5", "0.5", "0.5", "runs/mine"], "--input-mean: 'runs/mine' is no number; "),
        (["export", "--input-std", "1", "runs/mine"], "up to the next option, so write RUN before it"),
        (["export", "--features", "layer2", "runs/mine"], "--features: 'runs/mine' is no layer; "),
        (["bench", "step", "--rows", "a", "b", "seed=1"], "seed=1 changes a config; give the config with -c"),
    ],
)
def test_argument_after_several_values_is_told_where_to_go(
    typed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(typed) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err


def test_overrides_may_stand_after_several_values() -> None:
    parser = CommandParser(prog="p")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--names", nargs="+")
    parsed = parser.parse_args(["a=1", "--names", "b", "c=2", "d"])
    assert (parsed.overrides, parsed.names) == (["a=1", "c=2"], ["b", "d"])
    assert parser.parse_args(["a=3"]).overrides == ["a=3"]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All commands, with their options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                if command._add_options is not None:
                    command._add_options(command)
                yield command
                yield from parsers(command)


def test_every_option_with_several_values_knows_what_is_none() -> None:
    several = [
        (parser.prog, action)
        for parser in parsers(_parser())
        if parser._get_positional_actions()
        for action in parser._get_optional_actions()
        if action.nargs in ("+", "*")
    ]
    assert len(several) >= 6
    takes_all = [(prog, action.dest) for prog, action in several if action.type is None]
    assert takes_all == [("kd-pipeline record", "outputs"), ("kd-pipeline bench step", "rows")]  # overrides follow
