"""Mean and standard deviation per channel as settings, for pixels from 0 to 1."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PositiveFloat

__all__ = ["GRAY", "ChannelMeans", "ChannelStds", "Means", "Stds"]

GRAY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a gray image: ITU-R BT.601, as Pillow's mode `L` has them."""
_Triple = tuple[float, float, float]
_MAX_MEAN = 1.0
"""No mean of pixels from 0 to 1 is larger."""
_MAX_STD = 5.0
"""Nobody divides pixels from 0 to 1 by more, and on the scale from 0 to 255 no data set has less."""


def _three_values(value: Any) -> Any:
    """Three values as a tuple, or an error that says what was meant; anything else as it is."""
    if isinstance(value, int | float):
        raise ValueError(f"needs three values, for red, green and blue: [{value}, {value}, {value}]")
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 3:
        advice = f"; repeat it for gray images: {_list(value * 3)}" if len(value) == 1 else ""
        raise ValueError(f"needs three values, for red, green and blue, found {len(value)}: {_list(value)}{advice}")
    return tuple(value)  # strict validation takes no list from a validator


def _one_or_three_values(value: Any) -> Any:
    """The same for a network that may take gray images, of one channel."""
    return tuple(value) if isinstance(value, list | tuple) and len(value) == 1 else _three_values(value)


def _check_means(value: Any) -> Any:
    if max(map(abs, value)) > _MAX_MEAN:
        raise ValueError(f"{_on_the_wrong_scale(value)}; std is on the same scale, so divide it by 255 too")
    return value


def _check_stds(value: Any) -> Any:
    if max(value) > _MAX_STD:
        raise ValueError(_on_the_wrong_scale(value))
    return value


def _on_the_wrong_scale(value: Sequence[float]) -> str:
    return (
        f"{_list(value)} is for pixels from 0 to 255, and pixels are from 0 to 1 here; divide by 255: "
        f"{_list([float(f'{channel / 255:.4g}') for channel in value])}"
    )


def _list(values: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"


ChannelMeans = Annotated[_Triple, BeforeValidator(_three_values), AfterValidator(_check_means)]
"""Mean of red, green and blue, for pixels from 0 to 1."""
ChannelStds = Annotated[
    tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three_values), AfterValidator(_check_stds)
]
"""Standard deviation of red, green and blue, for pixels from 0 to 1."""
Means = Annotated[tuple[float, ...], BeforeValidator(_one_or_three_values), AfterValidator(_check_means)]
"""Mean of red, green and blue or, of a network that takes gray images, one, for pixels from 0 to 1."""
Stds = Annotated[tuple[PositiveFloat, ...], BeforeValidator(_one_or_three_values), AfterValidator(_check_stds)]
"""Standard deviation of red, green and blue or, of a network that takes gray images, one, for pixels from 0 to 1."""
