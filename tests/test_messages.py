"""Messages name options, settings and packages that exist."""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from kd_pipeline.cli import main
from kd_pipeline.config.config import Config

REPOSITORY = Path(__file__).parents[1]


def messages() -> Iterator[tuple[str, str]]:
    """The texts in `raise`, in functions that return an error, and in warnings, by place."""
    for path in sorted((REPOSITORY / "kd_pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Raise(exc=ast.expr() as found):
                    pass
                case ast.Return(value=ast.Call(func=ast.Name(id=name)) as found) if name.endswith("Error"):
                    pass
                case ast.Call(func=ast.Attribute(attr="warning")) as found:
                    pass
                case _:
                    continue
            parts = [each.value for each in ast.walk(found) if isinstance(each, ast.Constant)]
            yield f"{path.name}:{node.lineno}", " … ".join(part for part in parts if isinstance(part, str))


FOREIGN_OPTIONS = {"--array", "--nnodes", "--ntasks-per-node", "--nproc-per-node", "--npernode"}
"""Of torchrun, sbatch, srun and mpirun."""
COMMAND_NAMES = (
    ["check"], ["train"], ["record"], ["eval"], ["predict"], ["build-engine"], ["bench", "step"], ["bench", "teacher"],
    ["config"], ["init"],
    ["demo"], ["distill"], ["doctor"], ["tune"], ["export"], ["report"],
)  # fmt: skip


def test_every_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMAND_NAMES:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)) | FOREIGN_OPTIONS
    named = {(option, place) for place, text in messages() for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert len({option for option, _ in named}) > 15
    assert not sorted((option, place) for option, place in named if option not in known)


def settings_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type, such as those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from settings_in(argument)


def is_setting(key: str) -> bool:
    models: list[type[BaseModel]] = [Config]
    for number, part in enumerate(key.split(".")):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return key.split(".")[:number] == ["data", "more"]  # the user's own names
        models = [each for field in fields for each in settings_in(field.annotation)]
    return True


def test_every_setting_exists() -> None:
    assert is_setting("teacher.model.checkpoint") and is_setting("data.train.source.root")
    assert not is_setting("teacher.weights_file") and not is_setting("data.train.root")
    pattern = r"(?<![\w./{])(?:data|teacher|student|train|distill|probe)(?:\.[a-z_]+)+(?!\w|\()"
    named = {(key, place) for place, text in messages() for key in re.findall(pattern, text)}
    assert len({key for key, _ in named}) > 12
    assert not sorted((key, place) for key, place in named if not is_setting(key))


DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "nvidia.dali": "nvidia-dali-cuda130",
    "cuda.bindings": "cuda-python",
    "cuda.core": "cuda-core",
    "onnx_ir": "onnx-ir",
    "comet_ml": "comet-ml",
    "tensorrt_rtx": "tensorrt-rtx",
    "torchmetrics": "lightning",  # which needs it
}
"""Of packages whose distribution has another name."""


def test_every_pip_line_installs_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    extras = {
        name: {re.split(r"[>=<\[ ]", line)[0] for line in text.split("\n") if line}
        for name, text in config["options.extras_require"].items()
    }
    found = set()
    for path in (REPOSITORY / "kd_pipeline").rglob("*.py"):
        for module, extra in re.findall(r'require\("([\w.]+)", extra="(\w+)"\)', path.read_text(encoding="utf-8")):
            found.add((module, extra))
    assert len(found) > 15
    for module, extra in found:
        parts = module.split(".")
        wanted = DISTRIBUTIONS.get(".".join(parts[:2])) or DISTRIBUTIONS.get(parts[0]) or parts[0]
        assert wanted in extras[extra], f"{module}: pip install 'kd_pipeline[{extra}]' does not install {wanted}"
