"""Distill a ViT-S/16 into a ResNet-18 without labels, for one epoch, with parts of kd_pipeline.

python -m benchmarks.peers_backbone IMAGES BATCH_SIZE fp32|bf16
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_pipeline import ImageFolder, KDDataLoader, TeacherSettings, TrainTransform, open_teacher
from kd_pipeline._core.optional import require
from kd_pipeline.losses import cosine, feature_cosine

SIZE, PATCH = 224, 16


class VitEmbeddings(nn.Module):
    """What the teacher returns for images `[N, 3, H, W]`: the class token `[N, D]`, and the patches `[N, L, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = require("timm", extra="timm").create_model("vit_small_patch16_224", num_classes=0)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the transformer."""
        tokens = self.vit.forward_features(images)
        return {"logits": tokens[:, 0], "patches": tokens[:, 1:]}


class Student(nn.Module):
    """A ResNet-18 with two linear heads, for what `VitEmbeddings` returns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = require("timm", extra="timm").create_model("resnet18", num_classes=0, global_pool="")
        self.pooled, self.local = (nn.Linear(self.trunk.num_features, width) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[N, D]`, and `[N, L, D]` on the teacher's grid of patches."""
        maps = self.trunk(images)
        grid = interpolate(maps, size=(SIZE // PATCH, SIZE // PATCH), mode="bilinear")
        return self.pooled(maps.mean((2, 3))), self.local(grid.flatten(2).transpose(1, 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train for one epoch, and save the ResNet-18."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    options = parser.parse_args(arguments)
    transform = TrainTransform(  # close to the defaults of lightly-train
        size=SIZE,
        area=(0.14, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        blur=1.0,
        blur_sigma=(0.01, 0.1),
    )
    torch.manual_seed(0)  # the same random teacher in every run, as pretrained weights would be
    teacher = open_teacher(
        TeacherSettings(precision=options.precision),
        module=VitEmbeddings(),
        image_shape=(3, SIZE, SIZE),
        batch_size=options.batch_size,
    )
    width = teacher.outputs["logits"].shape[-1]
    assert width is not None
    print(f"teacher: {teacher.backend} in {teacher.precision}")
    source = ImageFolder(options.images, labeled=False)
    with KDDataLoader(source, transform, teacher, batch_size=options.batch_size, device="cpu") as loader:
        student = Student(width)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16) if options.precision == "bf16" else nullcontext():
                pooled, patches = student(batch.images)
            loss = cosine(pooled, batch.teacher["logits"]) + feature_cosine(patches, batch.teacher["patches"])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    teacher.close()
    torch.save(student.trunk.state_dict(), "student.pt")
    print(f"loss of the last batch: {loss.item():.4f}; student.pt has the ResNet-18")


if __name__ == "__main__":
    main()
