"""Which layers of a teacher a layer of the student starts from."""

from collections.abc import Sequence
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from kd_pipeline._core.settings import Settings

__all__ = ["LayerSources", "TeacherLayers"]


class TeacherLayers(Settings):
    """Some of the layers in a list of the teacher, such as the blocks of a transformer; set one of the last four."""

    layers: str
    """Name of the teacher's `nn.ModuleList` or `nn.Sequential`."""
    first: PositiveInt | None = None
    """Take so many from the start."""
    last: PositiveInt | None = None
    """Take so many from the end."""
    every: PositiveInt | None = None
    """Take the first one and then every so many: with 2 every other one, as DistilBERT (Sanh et al., arXiv
    1910.01108)."""
    keep: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Take those at these positions, counted from 0, or from the end with -1, in this order."""

    @model_validator(mode="after")
    def _chooses_in_one_way(self) -> Self:
        given = [name for name in ("first", "last", "every", "keep") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set one of first, last, every and keep, got {' and '.join(given) or 'none of them'}")
        return self

    def choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names`, the layers in the list, that are taken.

        Raises:
            ValueError: there are not as many.
        """
        if self.every is not None:
            return (*names[:: self.every],)
        if self.keep is not None:
            if outside := [position for position in self.keep if not -len(names) <= position < len(names)]:
                raise ValueError(f"there is no layer {outside[0]}")
            return tuple(names[position] for position in self.keep)
        number = self.first or self.last or 0
        if number > len(names):
            raise ValueError(f"there are not {number} layers")
        return (*(names[:number] if self.first is not None else names[-number:]),)


LayerSources = dict[str, str | TeacherLayers]
"""Layers of a student to initialize: by the name of each, the name of the teacher's layer or a choice of its layers."""
