"""What holds for the settings of every package."""

import importlib
import pkgutil
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import Field, ValidationError

import kd_pipeline
from kd_pipeline._core.settings import Settings


class Example(Settings):
    plain: Path
    some: tuple[Path, ...] = ()
    named: dict[str, Path | None] = Field(default_factory=dict)


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    example = Example.model_validate({"plain": "~", "some": ["~/a", "b"], "named": {"~": "~/c", "none": None}})
    assert example.plain == Path("/home/me") and example.some == (Path("/home/me/a"), Path("b"))
    assert example.named == {"~": Path("/home/me/c"), "none": None}
    assert Example(plain=Path("~/x")).plain == Path("/home/me/x")


@pytest.mark.parametrize(
    "values", [{"plain": "$A"}, {"plain": "a", "some": ["$A"]}, {"plain": "a", "named": {"b": "$A"}}]
)
def test_variable_is_refused_in_every_path(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"has the variable \$A"):
        Example.model_validate(values)


@pytest.mark.slow
def test_every_path_setting_of_the_package_is_one() -> None:
    for module in pkgutil.walk_packages(kd_pipeline.__path__, "kd_pipeline."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    fields = [
        (model, name, field.annotation)
        for model in _subclasses(Settings)
        for name, field in model.model_fields.items()
        if model.__module__.startswith("kd_pipeline.") and _has_path(field.annotation)
    ]
    assert len({model for model, _, _ in fields}) > 8
    for model, name, annotation in fields:
        with pytest.raises(ValidationError) as info:  # other fields may be missing, which are errors of their own
            model.model_validate({name: _value(annotation, "$DATA/x")})
        found = [error for error in info.value.errors() if error["loc"][0] == name and error["type"] == "value_error"]
        assert len(found) == 1 and "has the variable $DATA" in found[0]["msg"], (model, name)


def _subclasses(model: type[Settings]) -> set[type[Settings]]:
    return {model}.union(*map(_subclasses, model.__subclasses__()))


def _has_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_has_path, get_args(annotation)))


def _value(annotation: Any, path: str) -> Any:
    """A value of this type with `path` as its path."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _value(get_args(annotation)[0], path)
    if origin in (Union, types.UnionType):
        return _value(next(each for each in get_args(annotation) if _has_path(each)), path)
    if origin is tuple:
        return [path]
    return {"key": path} if origin is dict else path
