"""Where data is, as users write it: a local path, or the URL of a file or folder in a store."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from kd_pipeline._core.paths import path_or_url

__all__ = ["Location"]

Location = Annotated[str | Path, AfterValidator(path_or_url), WithJsonSchema({"type": "string"})]
"""A setting that is a local path, read as a `Path`, or a URL, which stays as it was written and becomes a `Url`."""
