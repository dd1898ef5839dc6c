"""Which output of a model a term means: by its own name, or as the only vector, map or tokens that there is."""

from collections.abc import Mapping

from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.backbone import POOLED, SPATIAL

__all__ = ["find_output", "is_alias"]


def is_alias(name: str) -> bool:
    """Whether `name` may stand for an output of another name: `pooled` or `spatial`, also of a member."""
    return name.rpartition(".")[2] in (POOLED, SPATIAL)


def find_output(name: str, outputs: Mapping[str, TensorSpec], *, place: str, owner: str) -> str:
    """The key in `outputs` that a term means by `name`.

    Where there is no such output, `pooled` is the only vector that is not the logits, or the logits if there is no
    other, and `spatial` the only map or tokens; `member.pooled` and `member.spatial` are so among the member's outputs.

    Args:
        name: as in the term.
        outputs: of the student or the teacher; a batch dimension that is not None is fine.
        place: the term's key and name, for messages.
        owner: `"student"` or `"teacher"`, for messages.

    Raises:
        ConfigError: there is none, or several are meant.
    """
    if name in outputs:
        return name
    member, _, alias = name.rpartition(".")
    own = {key: spec for key, spec in outputs.items() if not member or key.startswith(f"{member}.")}
    if not is_alias(name) or not own:
        advice = "; a PyTorch teacher returns the layers listed in its features" if owner == "teacher" else ""
        problem = f"the {owner} has no output called {name!r}{advice}{suggest(name, outputs)}"
        raise ConfigError(f"{place}: {problem}. {_list(owner, outputs)}")
    if alias == POOLED:
        vectors = [key for key, spec in own.items() if len(spec.shape) == 2]
        found = [key for key in vectors if key.rpartition(".")[2] != LOGITS] or vectors
        kind = "vector [N, D]"
    else:
        found = [key for key, spec in own.items() if len(spec.shape) in (3, 4)]
        kind = "map [N, C, H, W] or tokens [N, L, D]"
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"{name!r} may mean {' or '.join(map(repr, found))} of the {owner}; name one of them"
    else:
        problem = f"the {owner} has no {kind} to compare as {name!r}; {_advice(member, alias)}"
    raise ConfigError(f"{place}: {problem}. {_list(owner, own)}")


def _advice(member: str, alias: str) -> str:
    if alias == POOLED:
        return "name an output or a layer"
    teacher = f"{member}.{POOLED}" if member else POOLED
    return (
        "name a layer that has one, or set distill.features to the pooled term alone: "
        f"[{{loss: cosine, student: {POOLED}, teacher: {teacher}}}]"
    )


def _list(owner: str, outputs: Mapping[str, TensorSpec]) -> str:
    found = ", ".join(f"{name!r} {spec}" for name, spec in outputs.items()) or "none"
    return f"The {owner}'s outputs: {found}"
