"""Speech networks of transformers learn from each other, on padded waveforms with their masks."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from kd_pipeline import BatchLoader, Config, train

RATE = 4000


def network(width: int) -> Wav2Vec2ForSequenceClassification:
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    ears = {"conv_dim": (16, 16), "conv_stride": (8, 8), "conv_kernel": (16, 16), "num_conv_pos_embeddings": 4}
    rest = {
        "num_conv_pos_embedding_groups": 2,
        "num_labels": 3,
        "apply_spec_augment": False,
        "classifier_proj_size": 16,
    }
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **ears, **rest, feat_extract_norm="layer"))


def tones(num: int) -> dict[str, Tensor]:
    """Low, middle and high tones of different lengths, zeros after them."""
    labels, lengths = torch.randint(3, (num, 1)), torch.randint(RATE // 8, RATE // 4, (num, 1))
    mask = torch.arange(RATE // 4) < lengths
    waves = torch.sin(torch.arange(RATE // 4) / RATE * 2 * torch.pi * 150 * 3.0**labels) + 0.1 * torch.randn(mask.shape)
    return {"input_values": waves * mask, "attention_mask": mask.long(), "labels": labels[:, 0]}


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.slow
def test_student_hears_what_the_teacher_hears(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    torch.manual_seed(0)
    inputs = ("input_values", "attention_mask")
    data = {
        "train_batches": BatchLoader([tones(16) for _ in range(24)], inputs=inputs, num_classes=3),
        "validation": BatchLoader([tones(64)], inputs=inputs, num_classes=3),
    }
    teacher, student = network(32), network(16)
    shared = {"run_dir": tmp_path / "run", "train": {"epochs": 4, "optimizer": {"lr": 0.005}}}
    train(Config(stage="baseline", **shared), student=teacher, **data)
    found = train(Config(**shared), student=student, teacher=teacher, **data).evaluations["val"]
    assert found.top1 is not None and found.top1 > 0.8
    assert found.agreement is not None and found.agreement > 0.8
    assert "samples  3 classes" in caplog.text and " samples/s" in caplog.text and "images" not in caplog.text
