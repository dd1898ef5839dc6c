"""Distill the teacher of a config into a student without a head, for one epoch, in a loop of one's own.

python -m benchmarks.peers_backbone -c CONFIG [key.path=value ...]
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from kd_pipeline import KDDataLoader, load_config
from kd_pipeline.cli.arguments import add_common, add_config, run_command
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import open_model
from kd_pipeline.training.optimizers import build_optimizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for one epoch, save the student's weights in `student.pt`, and return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers_backbone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    add_common(parser)
    return run_command(_run, parser.parse_args(arguments), prog=parser.prog)


def _run(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)
    assert config.student is not None
    is_bf16 = config.train.precision == "bf16-mixed"
    with KDDataLoader.from_config(config, "train") as loader:
        teacher = loader.teacher
        assert teacher is not None
        print(f"teacher: {', '.join(teacher.runtimes)}")
        student = open_model(config.student)
        distillation = Distillation(
            config.distill,
            student=student,
            teacher_outputs=teacher.outputs,
            image_shape=loader.transform.image_shape,
            num_classes=None,
        )
        optimizer = build_optimizer(student, config.train.optimizer, extra=distillation.parameters())
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                with distillation.student_features(student) as features:
                    outputs = student(batch.images)
                loss = distillation(outputs, features, batch, epoch=0, epochs=1).total
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    torch.save(trunk_of(student).state_dict(), "student.pt")
    print(f"loss of the last batch: {loss.item():.4f}; student.pt has the weights of the student")
    return 0


if __name__ == "__main__":
    sys.exit(main())
