"""The contract of every teacher: a batch in, named float32 tensors out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline._core.text import printable
from kd_pipeline.batch import KDBatch, copies_as_rows
from kd_pipeline.errors import ConfigError, EngineError, TeacherError

__all__ = ["Teacher", "is_logits"]


def is_logits(name: str) -> bool:
    """Whether an output, perhaps of one of several teachers, is logits, of images or of their pixels."""
    return name.rpartition(".")[2] == "logits"


class Teacher(ABC):
    """A frozen model that maps a batch of images, or of inputs of any other shape, to named tensors.

    The contract, which the same tests check for every backend, and where an image stands for a row of any input:

    1. Outputs are float32 tensors by name: vectors `[N, D]`, maps `[N, C, h, w]` or tokens `[N, L, D]`. The logits
       `[N, K]` of a classifier, or `[N, K, h, w]` of the pixels, are called `"logits"`. Each has a row for each image,
       which depends on that image alone and is the same in every call.
    2. Every batch size from 1 to `max_batch` works. Inputs that do not match `inputs` raise a `TeacherError` that says
       what the teacher takes and what it got.
    3. Outputs are new tensors that the caller owns: no later call changes them, and none requires a gradient.
    4. Images are read in place and never written to. They are copied only where the runtime cannot read them as is.
    5. On a GPU the work is queued on the caller's current stream and the host does not wait for it. CPU runtimes
       return when the outputs are there.
    6. Changes to a model after it was handed over do not change the outputs.
    7. `close()` frees the runtime and may be called twice. Calling a closed teacher raises a `TeacherError`.

    A teacher is not an `nn.Module`, to keep it out of optimizers, checkpoints and `train()`. Subclasses implement
    `_infer` and `_release`.
    """

    def __init__(
        self,
        *,
        backend: str,
        precision: str,
        device: torch.device,
        images: TensorSpec | None = None,
        inputs: Mapping[str, TensorSpec] | None = None,
        outputs: Mapping[str, TensorSpec],
        max_batch: int,
        classes: tuple[str, ...] | None,
        fingerprint: str,
    ) -> None:
        """Set what the attributes say. Give `images`, or `inputs` if there are others."""
        if images is not None:
            inputs = {"images": images}
        assert inputs
        self.backend = backend
        """Name of the runtime, as in `TeacherSettings.backend`."""
        self.precision = precision
        """Precision of the arithmetic as the runtime reports it, such as `"fp32"`, `"bf16"` or `"fp16"`."""
        self.runtimes: tuple[str, ...] = (f"{backend} {precision}",)
        """Backend and precision, such as `"openvino bf16"`; of several teachers, those of each."""
        self.device = device
        self.inputs = dict(inputs)
        """Shape and dtype of each input, by name: `{"images": [N, 3, H, W]}`, or others; None is any size."""
        self.outputs = dict(outputs)
        """Shape and dtype of each output, by name, and of tokens how many are no part of the image."""
        self.max_batch = max_batch
        self.classes = classes
        """Names of the K classes in logit order; None if the model does not carry them."""
        self.fingerprint = fingerprint
        """Hex digest of model, precision and backend. Teachers that return different numbers under one name have
        different ones; which outputs are kept makes no difference."""
        self.view = IMAGES
        """The view of each image that it sees; see `TeacherSettings.view`."""
        self.problems: tuple[str, ...] = ()
        """What is wrong with its outputs for a few images, a sentence each with what to do; see `open_teacher`."""
        self.num_parameters: int | None = None
        """Of its network, or of the weights of an ONNX file; None for an engine, which does not say."""
        self.busy_s = 0.0
        """Host time of all calls so far, in seconds; on a GPU only the time to queue the work."""
        self.num_calls = 0
        """Calls so far."""
        self._closed = False

    def __call__(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model and return its outputs by name.

        Args:
            images: `[N, 3, H, W]`, or the only input of another shape; several inputs, or a single one, by name.

        Raises:
            TeacherError: the inputs do not fit, the runtime failed or returned more or fewer rows than it got, or the
                teacher is closed.
        """
        named = self._named(images)
        self._check(named)
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._infer(named if len(named) > 1 else next(iter(named.values())))
        except Exception as exc:  # each runtime has its own error classes
            found = " and ".join(f"{name} {TensorSpec(tuple(each.shape), each.dtype)}" for name, each in named.items())
            kind = EngineError if isinstance(exc, EngineError) else TeacherError
            reason = printable(exc, keep="\n")  # may have names from the file
            raise kind(f"the {self.backend} teacher failed on {found}: {reason}") from exc
        finally:
            self.busy_s += time.perf_counter() - started
            self.num_calls += 1
        for name, output in outputs.items():
            num_rows = len(self._input_of(name, named))
            if output.ndim == 0 or len(output) != num_rows:
                raise TeacherError(
                    f"the {self.backend} teacher returns {name!r} {list(output.shape)} for {num_rows} {self._rows}: a "
                    "batch size is fixed inside the model, such as in a Reshape; export it again for any batch size "
                    "(flatten with images.flatten(1), and pass dynamic_shapes)"
                )
        return outputs

    def on_batch(self, batch: KDBatch) -> dict[str, Tensor]:
        """Run the model on what it sees of a batch, and return its outputs by name.

        It is called once, with the view in its place in memory. The copies of one with a `count` are its rows,
        `[N * count, 3, H, W]`, and its outputs are returned as `[N, count, ...]`.

        Raises:
            KeyError: the batch has no such view.
            TeacherError: as a call.
        """
        outputs = self(self.inputs_of(batch))
        if self.views == (IMAGES,):
            return outputs
        for name, output in outputs.items():
            if (images := batch.view(self.view_of(name))).ndim == 5:
                outputs[name] = output.view(*images.shape[:2], *output.shape[1:])
        return outputs

    def inputs_of(self, batch: KDBatch) -> Tensor | Mapping[str, Tensor]:
        """What `on_batch` calls it with.

        Raises:
            KeyError: the batch has no such view.
        """
        if self.views == (IMAGES,):
            return batch.input
        seen = {name: copies_as_rows(batch.view(name)) for name in self.views}
        return seen if len(seen) > 1 else seen[self.views[0]]

    def with_outputs(self, batch: KDBatch) -> KDBatch:
        """`batch` with its outputs, which know their views; the errors are those of `on_batch`."""
        outputs = self.on_batch(batch)
        views = {name: view for name in outputs if (view := self.view_of(name)) != IMAGES}
        return batch.replace(teacher=outputs, teacher_views=views)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that it sees: one, or of several teachers those of all, which are then the names of its inputs."""
        return (self.view,)

    def view_of(self, output: str) -> str:
        """The view that an output is of."""
        return self.view

    @property
    def images(self) -> TensorSpec:
        """Shape and dtype of its only input.

        Raises:
            TeacherError: it has several.
        """
        if len(self.inputs) > 1:
            raise TeacherError(f"the {self.backend} teacher takes {', '.join(self.inputs)}, and no images alone")
        return next(iter(self.inputs.values()))

    @property
    def logits(self) -> dict[str, tuple[str, ...] | None]:
        """Names of the classes of each output that is logits, by the name of the output; None if it has none."""
        return {name: self.classes for name in self.outputs if is_logits(name)}

    def keep_outputs(self, names: Collection[str]) -> None:
        """Return only the outputs `names` from now on, and spend nothing on the others where the runtime allows.

        Raises:
            ConfigError: there is no such output, or no name; lists those that there are.
        """
        for name in names:
            if name not in self.outputs:
                found = ", ".join(f"{output!r} {spec}" for output, spec in self.outputs.items())
                raise ConfigError(
                    f"the teacher has no output {name!r}{suggest(name, self.outputs)}. It returns {found}"
                )
        if not names:
            raise ConfigError("a teacher without outputs; name at least one")
        self.outputs = {name: spec for name, spec in self.outputs.items() if name in names}

    def close(self) -> None:
        """Free the runtime. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    @abstractmethod
    def _infer(self, images: Any) -> dict[str, Tensor]:
        """Run the model, and return those of its outputs that are in `outputs`.

        `images` is the tensor of the only input, or several by name. It has been checked, and autograd is off.
        """

    @abstractmethod
    def _release(self) -> None:
        """Free what the runtime holds. Called once."""

    def check_fits(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Raise now, rather than at the first batch, if the teacher cannot take such an only input.

        Raises:
            TeacherError: shape, dtype or device do not fit; says what the teacher takes and what it got.
        """
        self.check_inputs({next(iter(self.inputs)): TensorSpec(shape, dtype)}, device)

    def check_takes(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a TeacherError if the teacher cannot take `inputs`, given by name."""
        self._check(self._named(inputs))

    def _input_of(self, output: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """An input that has as many rows as an output."""
        return inputs[self.view_of(output)] if len(self.views) > 1 else next(iter(inputs.values()))

    @property
    def _rows(self) -> str:
        return "images" if "images" in self.inputs else "rows"

    def _named(self, inputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inputs by the teacher's own names; the name of a single one does not matter."""
        if isinstance(inputs, Tensor):
            inputs = {"": inputs}
        if len(self.inputs) == len(inputs) == 1:
            return dict(zip(self.inputs, inputs.values(), strict=True))
        if self.inputs.keys() != inputs.keys():
            found = ", ".join(inputs) if "" not in inputs else "one tensor without a name"
            wanted = ", ".join(self.inputs) if len(self.inputs) > 1 else "one tensor"
            raise TeacherError(
                f"the {self.backend} teacher takes {wanted}, got {found}; "
                + ("pass them by name" if len(self.inputs) > 1 else "several inputs by name take backend: pytorch")
            )
        return {name: inputs[name] for name in self.inputs}

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        if self._closed:
            raise TeacherError(f"the {self.backend} teacher is closed; open a new one with open_teacher(...)")
        specs = {name: TensorSpec(tuple(each.shape), each.dtype) for name, each in inputs.items()}
        for tensor in inputs.values():
            self.check_inputs(specs, tensor.device)
            if not tensor.is_contiguous():
                layout = "NCHW buffer" if tensor.ndim == 4 else "buffer"
                raise TeacherError(
                    f"the {self.backend} teacher reads one dense {layout}, got strides {tensor.stride()}; "
                    "call .contiguous() first"
                )

    def check_inputs(self, found: Mapping[str, TensorSpec], device: torch.device) -> None:
        """The same for all inputs, by name."""
        for name, spec in found.items():
            shape = tuple(size or 0 for size in spec.shape)
            if not self.inputs[name].accepts(shape, spec.dtype):
                if len(shape) != 4:
                    advice = "give it that, or open it with an example of what it gets (backend: pytorch)"
                elif self.view != IMAGES:
                    advice = f"change size or dtype of the view {self.view}, or export it with an input_adapter"
                elif len(self.inputs[name].shape) == 4:
                    advice = "change the transform's size or dtype, or export the teacher with an input_adapter"
                else:
                    advice = "it is no network of images: in Python, a BatchLoader of its own inputs runs it"
                raise TeacherError(f"the {self.backend} teacher takes {name} {self.inputs[name]}, got {spec}; {advice}")
        sizes = {name: spec.shape[0] or 0 for name, spec in found.items()}
        if len({*sizes.values()}) > 1:
            raise TeacherError(f"the inputs of a teacher have different numbers of rows: {sizes}")
        num_rows = next(iter(sizes.values()))
        if not 1 <= num_rows <= self.max_batch:
            raise TeacherError(
                f"the {self.backend} teacher takes 1 to {self.max_batch} {self._rows} at a time, got {num_rows}; "
                "lower data.batch_size or open the teacher with a larger max_batch"
            )
        if device != self.device:
            raise TeacherError(
                f"the {self.backend} teacher reads from {self.device}, the {self._rows} are on {device}; "
                "open teacher and loader on the same device"
            )
