"""What a student returns: outputs by name, and losses of its own, which join the training loss."""

from collections.abc import Collection, Mapping

from torch import Tensor

from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.modules import mappings_in, named_outputs

__all__ = ["ONLY_LOSS", "check_returned_losses", "returned_losses", "student_outputs"]

ONLY_LOSS = "student"
"""Name of a loss that a student returns without one, as the scalar `loss`."""


def student_outputs(outputs: object) -> Mapping[str, Tensor]:
    """What a student returns for each row, by name, as `named_outputs` describes; losses are left out.

    Raises:
        ConfigError: it has no names.
    """
    try:
        named = named_outputs(outputs, owner="a student", or_losses=True)
    except TeacherError as exc:
        raise ConfigError(str(exc)) from None
    if scalars := [name for name, output in named.items() if output.ndim == 0]:
        raise ConfigError(
            f"a student returns the scalar {scalars[0]!r}, and an output has a row for each sample; return losses as "
            f"losses: {{{scalars[0]}: scalar}}, and leave out what is neither"
        )
    return named


def returned_losses(outputs: object) -> dict[str, Tensor]:
    """The losses that a student returns, scalars by name: its mapping `losses`; `loss` alone is called `student`.

    Raises:
        ConfigError: one is not a scalar.
    """
    found: dict[str, Tensor] = {}
    for fields in mappings_in(outputs):
        given = [(ONLY_LOSS, fields.get("loss")), *_by_name(fields.get("losses")).items()]
        for name, value in given:
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.ndim:
                what = list(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
                where = "loss" if name == ONLY_LOSS else f"losses[{name!r}]"
                raise ConfigError(
                    f"a student returns {where} as a scalar tensor, got {what}; take the mean over the rows"
                )
            if name in found:
                raise ConfigError(f"a student returns two losses called {name!r}; rename one of them")
            found[name] = value
    return found


def check_returned_losses(found: Collection[str], wanted: Collection[str]) -> None:
    """Check that a student returns the losses that have a weight, and no others.

    Raises:
        ConfigError: a name is unknown, or missing.
    """
    if unknown := [name for name in found if name not in wanted]:
        weights = ", ".join(f"{name}: 1.0" for name in found)
        raise ConfigError(
            f"the student returns the loss {unknown[0]!r}, which has no weight: set distill.student_losses: "
            f"{{{weights}}}, with 0 for one to leave out{suggest(unknown[0], wanted, otherwise='')}"
        )
    if missing := [name for name in wanted if name not in found]:
        names = ", ".join(map(repr, found)) or "none"
        raise ConfigError(
            f"distill.student_losses: {missing[0]} is not among the losses that the student returns, {names}: return "
            f"it as losses: {{{missing[0]}: scalar}}, or remove it{suggest(missing[0], found, otherwise='')}"
        )


def _by_name(losses: object) -> Mapping[str, object]:
    if losses is None:
        return {}
    if isinstance(losses, Mapping):
        return losses
    if isinstance(losses, Tensor):
        return {ONLY_LOSS: losses}
    raise ConfigError(f"a student returns losses as scalars by name, got {type(losses).__qualname__}")
