"""What several open teachers that read the same images as one share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import Teacher

__all__ = ["CombinedTeacher", "close_all", "merge_specs", "of_view"]


class CombinedTeacher(Teacher):
    """Open teachers by name that count as one; subclasses say what becomes of their outputs.

    All that see the same view get the same buffer of images. Where they see several, these are the inputs by name.
    `max_batch` is the smallest of all, `runtimes` are those of the members in their order, and the `problems` and
    errors of a member name it. `close()` also closes the members.
    """

    def __init__(
        self,
        members: Mapping[str, Teacher],
        *,
        backend: str,
        outputs: Mapping[str, TensorSpec],
        classes: tuple[str, ...] | None,
        fingerprint: str,
    ) -> None:
        """Combine `members`, of which there is at least one.

        Raises:
            TeacherError: two members of the same view differ in images, or two in device; names both.
        """
        self.members = dict(members)
        """The open teachers, by name."""
        self._several = tuple(dict.fromkeys(member.view for member in members.values()))
        """The views of the members; of a combined one among them the first."""
        super().__init__(
            backend=backend,
            precision="+".join(dict.fromkeys(member.precision for member in members.values())),
            device=_common_device(members),
            inputs=_common_inputs(members)
            if len(self._several) == 1
            else {view: _common_images(members, view) for view in self._several},
            outputs=outputs,
            max_batch=min(member.max_batch for member in members.values()),
            classes=classes,
            fingerprint=fingerprint,
        )
        self.view = self._several[0]
        self.runtimes = tuple(runtime for member in members.values() for runtime in member.runtimes)
        numbers = [member.num_parameters for member in members.values()]
        known = [number for number in numbers if number is not None]
        self.num_parameters = sum(known) if len(known) == len(numbers) else None
        self.problems = tuple(
            f"member {name}: {problem}" for name, member in members.items() for problem in member.problems
        )

    @property
    def views(self) -> tuple[str, ...]:
        """The views of the members; with a single one that of all, which a loader may have set."""
        return self._several if len(self._several) > 1 else (self.view,)

    def check_inputs(self, found: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Check the inputs of each member."""
        if len(self.views) == 1:
            super().check_inputs(found, device)
            return
        for name, member in self.members.items():
            with _naming(name):
                member.check_inputs({next(iter(member.inputs)): found[member.view]}, device)

    def _run_members(self, images: Tensor | Mapping[str, Tensor], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The outputs of the members `names` for `images`.

        Raises:
            TeacherError: one fails; names it.
        """
        outputs = {}
        for name in names:
            member = self.members[name]
            of_view = images[member.view] if len(self.views) > 1 and isinstance(images, Mapping) else images
            with _naming(name):
                outputs[name] = member(of_view)
        return outputs

    def _release(self) -> None:
        close_all(self.members.values())


def close_all(teachers: Iterable[Teacher]) -> None:
    """Close each, even if closing another one fails."""
    with ExitStack() as stack:
        for teacher in teachers:
            stack.callback(teacher.close)


def of_view(member: Teacher) -> str:
    """A part of a fingerprint: the view of a member; nothing for `images`."""
    return "" if member.view == IMAGES else f" of {member.view}"


@contextmanager
def _naming(member: str) -> Iterator[None]:
    """Names the member in its errors."""
    try:
        yield
    except TeacherError as exc:
        raise type(exc)(f"member {member}: {exc}") from exc


def merge_specs(members: Mapping[str, Teacher], what: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The one spec that fits all `members`, which have `specs`; a size that some leave open is the others'.

    Raises:
        TeacherError: there is none; names the first member that differs from those before it.
    """
    merged = specs[0]
    for (name, member), spec in zip(members.items(), specs, strict=True):
        pairs = list(zip(merged.shape, spec.shape, strict=False))
        fits = len(merged.shape) == len(spec.shape) and merged.dtype == spec.dtype
        if not fits or any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise TeacherError(
                f"teachers that run as one must share their {what}: member {name} ({member.backend}) has {spec}, those "
                f"before it {merged}; export or open them for the same {what}"
                + (", and give one that was trained on others an input_adapter" if what == "images" else "")
            )
        merged = TensorSpec(tuple(known if size is None else size for known, size in pairs), merged.dtype)
    return merged


def _common_inputs(members: Mapping[str, Teacher]) -> dict[str, TensorSpec]:
    """The inputs of all; the name of a single one may differ."""
    first = next(iter(members.values()))
    for name, member in members.items():
        if len(member.inputs) != len(first.inputs) or (
            len(first.inputs) > 1 and member.inputs.keys() != first.inputs.keys()
        ):
            raise TeacherError(
                f"teachers that run as one must share their inputs: member {name} ({member.backend}) takes "
                f"{', '.join(member.inputs)}, those before it {', '.join(first.inputs)}; open them for the same inputs"
            )
    if len(first.inputs) == 1:
        own = next(iter(first.inputs))
        return {own: merge_specs(members, own, [member.images for member in members.values()])}
    return {
        each: merge_specs(members, each, [member.inputs[each] for member in members.values()]) for each in first.inputs
    }


def _common_images(members: Mapping[str, Teacher], view: str) -> TensorSpec:
    """The images that all members which see `view` take."""
    seeing = {name: member for name, member in members.items() if member.view == view}
    for name, member in seeing.items():
        if len(member.inputs) > 1:
            raise TeacherError(
                f"member {name} ({member.backend}) takes {', '.join(member.inputs)}, and a view is one input; "
                "run it alone"
            )
    return merge_specs(seeing, IMAGES, [member.images for member in seeing.values()])


def _common_device(members: Mapping[str, Teacher]) -> torch.device:
    first, device = next((name, member.device) for name, member in members.items())
    for name, member in members.items():
        if member.device != device:
            raise TeacherError(
                f"teachers that run as one must be on one device: member {name} ({member.backend}) is on "
                f"{member.device}, member {first} on {device}; open them on the same device"
            )
    return device
