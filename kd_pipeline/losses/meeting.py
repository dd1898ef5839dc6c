"""How the features of a student and its teacher meet, whatever their kinds, widths and sizes: settled before a run."""

import logging
import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.projectors import build_projector
from kd_pipeline.losses.resize import Resizer
from kd_pipeline.losses.settings import LOGITS, TermSettings

__all__ = ["Meeting", "guess_prefix_tokens", "is_nhwc"]

_logger = logging.getLogger("kd_pipeline")

_MAP_LOSSES = {"attention_transfer", "channel_wise"}
"""Losses that need the grid of tokens."""
_VECTOR_LOSSES = {"cosine", "dist", "dkd", "hard_label", "logit_mse", "relational", "soft_target"}
_ANY_WIDTH = {"attention_transfer", "dist", "dkd", "hard_label", "soft_target"}
"""Losses for which `projector: auto` is none: widths may differ, or are classes."""
_MAX_PREFIX_TOKENS = 16
"""More class and register tokens than any public vision transformer has."""


class Meeting:
    """What is done to the two features of one term, so that they can be compared.

    - A vector meets the mean over the positions of a map or of tokens.
    - Tokens lose their prefix. Those of both sides stay tokens if they are as many, else all become maps.
    - Maps get a common grid.

    The student's features go through the projector in their own layout, or after the mean. Maps `[N, h, w, C]`, as
    stages of Swin are, are recognized by their equal h and w.
    """

    def __init__(self, settings: TermSettings, place: str, student: TensorSpec, teacher: TensorSpec) -> None:
        """Settle it.

        Args:
            settings: the term.
            place: the term's name and key, for messages.
            student: of the student's output or layer.
            teacher: of the teacher's output.

        Raises:
            ConfigError: a kind of tensor is unknown, or the loss is for others.
        """
        self._settings, self._place = settings, place
        self._student = _Side("student", settings.student, student, place)
        self._teacher = _Side("teacher", settings.teacher, teacher, place)
        self._resizer = Resizer(settings.resize)
        self._is_mean = 2 in (self._student.rank, self._teacher.rank)
        # Positions of maps of logits are rows; those of other maps are compared by losses of features.
        are_logits = self._student.is_logits and self._teacher.is_logits and settings.loss != "relational"
        if not self._is_mean and settings.loss in _VECTOR_LOSSES and not are_logits:
            raise self._error(
                f"{settings.loss} compares vectors [N, D]; name the pooled output of one of the two, or choose "
                "am_radio or feature_cosine, which compare positions"
            )
        if self._is_mean and settings.loss in _MAP_LOSSES:
            raise self._error(
                f"{settings.loss} compares maps [N, C, H, W], or the tokens of a grid; name those of both"
            )

    def build_projector(self, student: Tensor) -> nn.Module:
        """The projector of the term, for features like those of the dry run.

        Raises:
            ConfigError: it does not fit the student's features, or the width of the teacher's is unknown.
        """
        kind, features = self._settings.projector, self._student_features(student)
        num_inputs = features.shape[1] if features.ndim == 4 else features.shape[-1]
        num_outputs = self._teacher.width
        if kind == "auto":
            if num_outputs in (None, num_inputs) or self._settings.loss in _ANY_WIDTH:
                kind = "none"
            else:
                kind = "conv" if features.ndim == 4 else "linear"
        expected = {"linear": "embeddings [N, D] or tokens [N, L, D]", "conv": "maps [N, C, H, W]"}
        fits = {"linear": features.ndim < 4, "conv": features.ndim == 4}.get(kind, True)
        if kind == "none":
            return nn.Identity()
        if not fits or num_outputs is None:
            raise self._error(
                f"projector: {kind} takes {expected.get(kind, 'any features')} of the student, whose are "
                f"{list(features.shape)} here, and a known width of the teacher's; choose projector: auto or mlp, or "
                "other layers"
            )
        return build_projector(kind, num_inputs, num_outputs, student)

    def __call__(self, student: Tensor, teacher: Tensor, projector: nn.Module) -> tuple[Tensor, Tensor]:
        """Both features in the same layout and size: vectors `[N, D]`, tokens `[N, L, D]` or maps `[N, C, H, W]`.

        Raises:
            ConfigError: tokens form no grid and need one.
        """
        student, teacher = projector(self._student_features(student)), self._teacher.features(teacher)
        if self._is_mean:
            return student, self._teacher.mean(teacher)
        if (
            student.ndim == teacher.ndim == 3
            and student.shape[1] == teacher.shape[1]
            and self._settings.loss not in _MAP_LOSSES
            and (isinstance(self._settings.grid, str) or self._settings.grid**2 == student.shape[1])
        ):
            return student, teacher
        student, teacher = self._student.as_map(student), self._teacher.as_map(teacher)
        size = self._size(student, teacher)
        return self._resizer(student, size), self._resizer(teacher, size)

    def _student_features(self, student: Tensor) -> Tensor:
        """What the projector gets."""
        features = self._student.features(student)
        return self._student.mean(features) if self._is_mean else features

    def _size(self, student: Tensor, teacher: Tensor) -> tuple[int, int]:
        match self._settings.grid:
            case "teacher":
                height, width = teacher.shape[2:]
            case "student":
                height, width = student.shape[2:]
            case "smaller":
                height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True))
            case number:
                height = width = number
        return height, width

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._place}: {problem}; {self.shapes}")

    @property
    def teacher_width(self) -> int | None:
        """Features of each vector that is compared; None if they are unknown."""
        return self._teacher.width

    @property
    def student_grid(self) -> tuple[int, int] | None:
        """Height and width of the student's map or tokens, 1 x 1 for a vector; None if they are unknown."""
        return self._student.grid

    @property
    def shapes(self) -> str:
        """Both outputs, for messages."""
        return f"{self._student} and {self._teacher}"


@dataclass
class _Side:
    """The features of one of the two."""

    owner: str
    name: str
    spec: TensorSpec
    place: str
    _logged: set[int] = field(default_factory=set)
    """Lengths of tokens whose prefix was guessed and reported."""

    def __post_init__(self) -> None:
        if self.rank not in (2, 3, 4):
            raise ConfigError(
                f"{self.place}: {self} is no vector [N, D], no tokens [N, L, D] and no map [N, C, H, W]; name another "
                "output or layer"
            )

    def __str__(self) -> str:
        return f"the {self.owner}'s {self.name!r} is {self.spec}"

    @property
    def is_logits(self) -> bool:
        """Whether it is a model's final output."""
        return self.name.rpartition(".")[2] == LOGITS

    @property
    def rank(self) -> int:
        """2 for a vector, 3 for tokens, 4 for a map."""
        return len(self.spec.shape)

    @property
    def width(self) -> int | None:
        """Features of a vector, token or position; None if they are unknown."""
        return self.spec.shape[1 if self.rank == 4 and not self._is_nhwc(self.spec.shape) else -1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width of a map, or of the square that tokens are of; 1 x 1 for a vector, None if unknown."""
        match self.spec.shape:
            case (_, _):
                return 1, 1
            case (_, int(length), _):
                side = math.isqrt(length - self._num_prefix_tokens(length))
                return (side, side) if _is_square(length - self._num_prefix_tokens(length)) else None
            case (_, first, second, third):
                height, width = (first, second) if self._is_nhwc(self.spec.shape) else (second, third)
                return None if height is None or width is None else (height, width)
        return None

    def features(self, tensor: Tensor) -> Tensor:
        """Without prefix tokens, and maps as `[N, C, H, W]`."""
        if self.rank == 3:
            return tensor[:, self._num_prefix_tokens(tensor.shape[1]) :]
        return tensor.permute(0, 3, 1, 2) if self.rank == 4 and self._is_nhwc(tensor.shape) else tensor

    def mean(self, features: Tensor) -> Tensor:
        """A vector as it is, or the mean over the positions of anything else.

        Raises:
            ConfigError: it is unknown which tokens are positions.
        """
        if features.ndim == 3 and self.spec.num_prefix_tokens is None and not _is_square(features.shape[1]):
            raise self._no_grid(features)
        match features.ndim:
            case 2:
                return features
            case 3:
                return features.mean(dim=1)
            case _:
                return features.mean(dim=(2, 3))

    def as_map(self, features: Tensor) -> Tensor:
        """Tokens as the map that they are the grid of.

        Raises:
            ConfigError: they are not as many as a square has.
        """
        if features.ndim == 4:
            return features
        if not _is_square(features.shape[1]):
            raise self._no_grid(features)
        side = math.isqrt(features.shape[1])
        return features.transpose(1, 2).view(len(features), -1, side, side)

    def _is_nhwc(self, shape: tuple[int | None, ...]) -> bool:
        return is_nhwc(shape) and not self.is_logits  # `[N, K, h, w]`, also for as many classes as rows

    def _no_grid(self, features: Tensor) -> ConfigError:
        known = self.spec.num_prefix_tokens
        prefix = (
            f"no number of class and register tokens up to {_MAX_PREFIX_TOKENS} leaves a square grid"
            if known is None
            else f"without its {known} prefix tokens {features.shape[1]} are left, which are no square grid"
        )
        return ConfigError(
            f"{self.place}: {self}, and {prefix}; name an output or layer with the tokens of a square image, or "
            "compare the pooled outputs of both"
        )

    def _num_prefix_tokens(self, length: int) -> int:
        """As stated; else the smallest number that leaves a square, or 0 if none does."""
        if self.spec.num_prefix_tokens is not None:
            return self.spec.num_prefix_tokens
        found = guess_prefix_tokens(length)
        if found is not None and length not in self._logged:
            self._logged.add(length)
            _logger.info(
                "%s: it is unknown how many of the %d tokens of the %s's %r are class and register tokens; it takes "
                "the first %d as such, which leaves a grid of %d x %d",
                *(self.place, length, self.owner, self.name, found),
                *[math.isqrt(length - found)] * 2,
            )
        return found or 0


def guess_prefix_tokens(length: int) -> int | None:
    """The smallest number of class and register tokens whose rest is a square grid; None if there is none up to 16."""
    return next((n for n in range(min(_MAX_PREFIX_TOKENS + 1, length)) if _is_square(length - n)), None)


def is_nhwc(shape: tuple[int | None, ...]) -> bool:
    """Whether a map's shape is `[N, h, w, C]`: images are square, so its equal sides tell."""
    _, first, second, third = shape
    return None not in (first, second) and first == second != third


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
