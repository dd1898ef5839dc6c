"""A stage of a finished run that is opened, and trained for some steps, again: in a folder of its own."""

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.errors import StateError
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.evidence import Evidence, read_evidence
from kd_pipeline.training.stop_after import StepsDone, StopAfter
from kd_pipeline.workflows.parts import Parts
from kd_pipeline.workflows.resume import SavedRun
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.stage_run import StageRun
from kd_pipeline.workflows.teacher import saved_runtimes, with_trained_weights

__all__ = ["ReplayRun", "quiet"]

_logger = logging.getLogger("kd_pipeline")

_MAX_SHOWN = 200
"""Characters of what torch says, in a message."""


class ReplayRun(StageRun):
    """Opens what a run was trained with. It writes into `scratch` alone, and neither locks nor changes the run."""

    def __init__(
        self,
        config: Config,
        origin: Path,
        scratch: Path,
        *,
        begun_with: Mapping[str, Any],
        num_processes: int = 1,
        stop_after: int = 0,
        plugins: Collection[str] = (),
        trust_engines: Collection[str] = (),
    ) -> None:
        """Prepare to open the run.

        Args:
            config: of the run, with the `run_dir` where it is now.
            origin: the folder of its stage.
            scratch: an empty folder.
            begun_with: what a checkpoint says about the run, such as the runtimes of its teacher.
            num_processes: that trained together; of several, the batches are those of the first.
            stop_after: end a training after this optimizer step.
            plugins: modules that factories in the config may come from.
            trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        """
        stage = config.stage
        assert stage != "all"
        if stage == "distill" and isinstance(config.teacher, TeacherSettings):
            config = config.model_copy(update={"teacher": with_trained_weights(config, config.teacher)})
        train = config.train.model_copy(
            update={"loggers": (), "export": config.train.export.model_copy(update={"onnx": False, "engine": None})}
        )
        config = config.model_copy(update={"run_dir": scratch, "train": train, "probe": None})
        self.ended_with = scratch / "end.ckpt"
        """The checkpoint after the last step of a replay."""
        parts = Parts(callbacks=(StopAfter(stop_after, self.ended_with),))
        super().__init__(config, stage, parts, plugins, trust_engines, report=None)
        self._begun_with, self._num_processes = begun_with, num_processes
        self._best_file = origin / "checkpoints" / "best_student.pt"
        self._opened: ReplayRun | None = None
        """Whose source and teacher are taken."""
        self.teacher: Teacher | Recording | None = None
        self.identity: dict[str, Any] = {}
        self.loader: AnyLoader

    @property
    def view(self) -> str:
        """That the network which is trained sees."""
        return self._data.view

    def share(self, opened: "ReplayRun") -> None:
        """Take the open source and teacher of another replay of the run; call it before anything is opened."""
        self._opened = opened

    def open_data(self) -> RunData:
        """Open the data."""
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._prepare()
        self._data = self._open_data()
        return self._data

    def open_loader(self) -> AnyLoader:
        """Open the teacher and the loader of the training, after the data."""
        self.loader, self.identity = self._open_training(None)
        return self.loader

    def replay(self, checkpoint: Path | None = None) -> Evidence:
        """Train from the seed, or from a checkpoint, as the run did; returns the evidence of it.

        Raises:
            StateError: the run would not resume from the checkpoint with this config and data.
        """
        folder = self._folder
        saved = None
        self.open_data()
        if checkpoint is not None:
            folder.checkpoints.mkdir()
            shutil.copyfile(checkpoint, folder.checkpoints / "last.ckpt")
            saved = SavedRun.load(folder.checkpoints / "last.ckpt")
        loader = self.open_loader()
        if saved is not None:
            saved.check(self.identity, self._config, folder.path)
        module = self._new_module(loader, self.identity)
        with suppress(StepsDone):
            self._fit(module, loader, saved, [])
        found = read_evidence(folder.evidence)
        if found is None:
            raise StateError("the replay was ended before its first batch")
        return found

    def exported_student(self, weights: Mapping[str, Tensor]) -> tuple[nn.Module, Distillation]:
        """The student with the exported weights, and the loss of the checkpoint that they are of.

        Raises:
            StateError: the weights are not those of such a student.
        """
        student, distillation = self._best_student(self._new_module(self.loader, self.identity), self.loader)
        try:
            trunk_of(student).load_state_dict(weights)
        except (AttributeError, RuntimeError, TypeError) as exc:
            reason = printable(str(exc).partition("\n")[0])[:_MAX_SHOWN]
            raise StateError(f"the exported weights are not those of the student of the config ({reason})") from exc
        return student.to(self.loader.device).eval(), distillation

    def evaluate(self, student: nn.Module, distillation: Distillation) -> dict[str, Evaluation]:
        """The metrics of the student on all splits that the results of a run are of."""
        return self._evaluations.missing(student, distillation, {})

    def _open_data(self) -> RunData:
        source = None if self._opened is None else self._opened._data.source
        shard = Shard(0, self._num_processes) if self._num_processes > 1 else None
        return RunData(
            self._config, Parts(), self._folder.path, self, source=source, shard=shard, plugins=self._plugins
        )

    def _open_teacher(self, saved: SavedRun | None) -> Teacher | Recording | None:
        self.teacher = super()._open_teacher(saved)
        return self.teacher

    def _find_teacher(self, begun_with: Any) -> tuple[Teacher | Recording | None, bool]:
        if self._opened is not None:
            return self._opened.teacher, False
        return super()._find_teacher(saved_runtimes(self._begun_with))


@contextmanager
def quiet() -> Iterator[None]:
    """Log warnings only: what a run says about itself is not what a replay is for."""
    level = _logger.level
    _logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _logger.setLevel(level)
