"""Several teachers of different kinds side by side: every output of each, called `member.output`."""

import hashlib
from collections.abc import Collection, Mapping

from torch import Tensor

from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.combined import CombinedTeacher, of_view
from kd_pipeline.teachers.settings import check_member_name

__all__ = ["TeacherGroup"]


class TeacherGroup(CombinedTeacher):
    """Open teachers whose outputs are returned side by side, as in AM-RADIO (Ranzinger et al., arXiv 2312.06709).

    The output `pooled` of the member `dino` is called `dino.pooled`. Outputs are those of the members, bit for bit, and
    members may differ in everything but the images of a view that several see. `classes` is None, as each member has
    its own; see `logits`.
    """

    def __init__(self, members: Mapping[str, Teacher]) -> None:
        """Group `members` by name, in the order of their names.

        Raises:
            ConfigError: there are none, or a name is not possible.
            TeacherError: two members differ in images or device; names both.
        """
        if not members:
            raise ConfigError("a group of no teachers; give at least one")
        for name in members:
            check_member_name(name)
        members = dict(sorted(members.items()))
        self._idle: set[str] = set()
        """Members of which no output is kept, and that are not run."""
        content = ["group", *(f"{name} {member.fingerprint}{of_view(member)}" for name, member in members.items())]
        super().__init__(
            members,
            backend="group",
            outputs={
                f"{name}.{output}": spec for name, member in members.items() for output, spec in member.outputs.items()
            },
            classes=None,
            fingerprint=hashlib.sha256("\n".join(content).encode()).hexdigest(),
        )

    @property
    def logits(self) -> dict[str, tuple[str, ...] | None]:
        """Names of the classes of each member's logits, by the name of the output."""
        return {
            f"{name}.{output}": classes
            for name, member in self.members.items()
            for output, classes in member.logits.items()
            if f"{name}.{output}" in self.outputs
        }

    def view_of(self, output: str) -> str:
        """The view of the member that an output is of."""
        return self.members[output.partition(".")[0]].view if len(self.views) > 1 else self.view

    def keep_outputs(self, names: Collection[str]) -> None:
        """Return only the outputs `names` from now on; a member without any of them does not run."""
        super().keep_outputs(names)
        for name, member in self.members.items():
            if own := [output for output in member.outputs if f"{name}.{output}" in names]:
                member.keep_outputs(own)
            else:
                self._idle.add(name)

    def _infer(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._run_members(images, [name for name in self.members if name not in self._idle])
        return {f"{name}.{output}": tensor for name, own in outputs.items() for output, tensor in own.items()}
