"""Which TensorRT engine to build, in trtexec's words where it has one."""

import shlex
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kd_pipeline._core.settings import Settings
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile

__all__ = ["BuildSettings"]


class BuildSettings(Settings):
    """What an engine is made from, and for."""

    onnx: Path
    """A float32 image classifier with a dynamic batch."""
    precision: Precision = "fp32"
    half_io: bool = False
    """Take float16 images, as a loader with `dtype: float16` gives them."""
    profiles: tuple[Profile, ...] = Field(default=(Profile(min=1, opt=32, max=64),), min_length=1)
    """Batch sizes to serve; a batch runs in the first profile that holds it."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of the images, where the file leaves them open."""
    outputs: tuple[str, ...] = ()
    """Tensors inside the file that become outputs, for losses on features."""
    input_adapter: InputAdapter | None = None
    """Folded in front of the model."""
    classes: tuple[str, ...] | Path | None = None
    """Names of the classes in logit order, or a JSON file that lists them; the ONNX file's own unless given."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """`auto` is `tensorrt` where it is installed and `tensorrt_rtx` otherwise."""
    workspace: int | None = Field(default=None, ge=1, lt=1 << 43)
    """Largest scratch memory of a layer in MiB; all of the GPU's unless given."""
    builder_optimization_level: int | None = Field(default=None, ge=0, le=5)
    timing_cache: Path | None = None
    """Timings of earlier builds on this GPU; made if it is not there."""
    version_compatible: bool = False
    """Run with later versions of TensorRT too."""
    hardware_compatible: bool = False
    """Run on every GPU from Ampere on; `tensorrt` only."""
    compute_capability: tuple[str, ...] = ()
    """GPUs to build for, such as `8.9`; `tensorrt_rtx` only, which builds for all it knows unless given."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"outputs holds a name twice: {', '.join(self.outputs)}")
        if self.half_io and self.precision not in ("fp16", "bf16"):
            raise ValueError(f"half_io goes with fp16 and bf16, and the precision is {self.precision}")
        return self

    def command(self, engine: Path, *, calibrate: Path | None) -> str:
        """What a user types to get this engine once more."""
        words = ["kd-pipeline", "build-engine", "--onnx", str(self.onnx.resolve()), "--save-engine", str(engine)]
        words += ["--precision", self.precision]
        for profile in self.profiles:
            words += ["--batch", str(profile.min), str(profile.opt), str(profile.max)]
        if (adapter := self.input_adapter) is not None:
            words += ["--input-mean", *map(str, adapter.mean), "--input-std", *map(str, adapter.std)]
            words += ["--from-mean", *map(str, adapter.from_mean), "--from-std", *map(str, adapter.from_std)]
            words += [] if adapter.size is None else ["--input-size", str(adapter.size)]
        valued = {
            "--image-size": self.image_size,
            "--runtime": None if self.runtime == "auto" else self.runtime,
            "--workspace": self.workspace,
            "--builder-optimization-level": self.builder_optimization_level,
            "--timing-cache": self.timing_cache and self.timing_cache.resolve(),
            "--classes": self.classes.resolve() if isinstance(self.classes, Path) else None,
            "--calibrate": calibrate and calibrate.resolve(),
        }
        words += [word for name, value in valued.items() if value is not None for word in (name, str(value))]
        switches = {
            "--half-io": self.half_io,
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
        }
        words += [name for name, is_on in switches.items() if is_on]
        if self.outputs:
            words += ["--outputs", *self.outputs]
        if self.compute_capability:
            words += ["--compute-capability", *self.compute_capability]
        return shlex.join(words)
