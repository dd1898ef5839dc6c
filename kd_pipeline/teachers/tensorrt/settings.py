"""Settings of a TensorRT engine build, named as in trtexec where it has them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kd_pipeline._core.image_size import Size, size_text
from kd_pipeline._core.settings import Settings
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.teachers.tensorrt.manifest import Precision, Profile

__all__ = ["BuildSettings"]


class BuildSettings(Settings):
    """What to build an engine from, and for which hardware."""

    onnx: Path
    """A float32 teacher with a dynamic batch size, with logits or other outputs."""
    precision: Precision = "fp32"
    """Of the arithmetic; `int8` and `fp8` need images for calibration."""
    half_io: bool = False
    """Take float16 images, those of a loader with `dtype: float16`."""
    profiles: tuple[Profile, ...] = Field(default=(Profile(min=1, opt=32, max=64),), min_length=1)
    """Ranges of batch sizes; a batch runs in the tightest profile that needs no padding."""
    image_size: Size | None = None
    """Height and width of the images, if the file leaves them open."""
    outputs: tuple[str, ...] = ()
    """Tensors inside the file to add to the outputs, for losses on features."""
    input_adapter: InputAdapter | None = None
    """Added in front of the model."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in logit order, or a JSON file that lists them; defaults to the ONNX file's own."""
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """`auto` is `tensorrt` if it is installed, else `tensorrt_rtx`."""
    workspace: int | None = Field(default=None, ge=1, lt=1 << 43)
    """Largest scratch memory of a layer, in MiB; defaults to all of the GPU's."""
    builder_optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long to search for fast kernels, from 0 to 5; defaults to TensorRT's own choice."""
    timing_cache: Path | None = None
    """File with kernel timings of earlier builds on this GPU; created if missing."""
    version_compatible: bool = False
    """Also run with later versions of TensorRT."""
    hardware_compatible: bool = False
    """Run on every GPU since Ampere; for `tensorrt` only."""
    compute_capability: tuple[str, ...] = ()
    """GPUs to build for, such as `8.9`; for `tensorrt_rtx` only, where it defaults to all that it knows."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"outputs holds a name twice: {', '.join(self.outputs)}")
        if self.half_io and self.precision not in ("fp16", "bf16"):
            raise ValueError(f"half_io goes with fp16 and bf16, and the precision is {self.precision}")
        return self

    def arguments(self, engine: Path, *, calibrate: Path | None) -> tuple[str, ...]:
        """The arguments of `kd-pipeline build-engine` that build this engine again."""
        words = ["--save-engine", str(engine)]
        words += [] if calibrate is None else ["--calibrate", str(calibrate.resolve())]
        for profile in self.profiles:
            words += ["--batch", str(profile.min), str(profile.opt), str(profile.max)]
        if (adapter := self.input_adapter) is not None:
            words += ["--input-mean", *map(str, adapter.mean), "--input-std", *map(str, adapter.std)]
            words += ["--from-mean", *map(str, adapter.from_mean), "--from-std", *map(str, adapter.from_std)]
            words += [] if adapter.size is None else ["--input-size", size_text(adapter.size)]
        for name, field in type(self).model_fields.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            match value:
                case _ if name == "profiles" or value == field.default:
                    continue
                case True:
                    words.append(option)
                case Path():
                    words += [option, str(value.resolve())]
                case int() | tuple() if name == "image_size":
                    words += [option, size_text(value)]
                case tuple() if name != "classes":  # the command line takes class names only as a file
                    words += [option, *value]
                case str() | int():
                    words += [option, str(value)]
        return tuple(words)
