"""The base of every settings class: frozen, and unknown keys are errors."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


class Settings(BaseModel):
    """Plain, frozen values that a YAML file can spell; each room keeps its own subclass beside its code."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
