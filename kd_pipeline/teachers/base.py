"""The teacher contract: images in, named tensors out, frozen for good."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import EngineError, TeacherError

__all__ = ["Teacher", "TensorSpec"]


class Teacher(ABC):
    """A frozen model that turns a batch of images into named tensors.

    The laws, which one test holds every backend to:

    - `"logits"` `[N, K]` float32 is always among the outputs; features may join it under names of their own.
    - Any batch from 1 to `max_batch` is accepted; anything else is refused, naming what was found and what is wanted.
    - Outputs are fresh and owned by the caller: a later call never changes them, and none carries a gradient.
    - The images are only read, at the address they came with; nothing is copied where the runtime can avoid it.
    - On a GPU the work is queued on the caller's current stream and nothing waits for it; CPU runtimes
      return when the answer is there.
    - Nothing the user does to a model after handing it over changes the answers.
    - `close()` frees the runtime and may be called twice; a call after it raises `TeacherError`.

    A teacher is not an `nn.Module`, so that it cannot slip into an optimizer, a checkpoint or `train()`.
    Subclasses implement `_infer` and `_release`, and nothing else.
    """

    def __init__(
        self,
        *,
        backend: str,
        precision: str,
        device: torch.device,
        images: TensorSpec,
        outputs: Mapping[str, TensorSpec],
        max_batch: int,
        classes: tuple[str, ...] | None,
        fingerprint: str,
    ) -> None:
        self.backend = backend
        """Name of the runtime, as `open_teacher` knows it."""
        self.precision = precision
        """What the arithmetic really runs in: `"fp32"`, `"bf16"` or `"fp16"`; read back from the runtime."""
        self.device = device
        self.images = images
        """What the teacher accepts, `[N, 3, H, W]`."""
        self.outputs = dict(outputs)
        """What it returns, by name."""
        self.max_batch = max_batch
        self.classes = classes
        """Names of the K classes in logit order, where the model's file carries them."""
        self.fingerprint = fingerprint
        """Hex digest of the model's content; two teachers that answer differently differ here."""
        self.busy_s = 0.0
        """Seconds of the host in all calls so far; on a GPU that is the queueing alone."""
        self._closed = False

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model on `images` `[N, 3, H, W]` and return its outputs by name.

        Raises:
            TeacherError: the images do not fit, the runtime failed, or the teacher is closed.
        """
        self._check(images)
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._infer(images)
        except Exception as exc:  # each runtime has errors of its own
            found = TensorSpec(tuple(images.shape), images.dtype)
            kind = EngineError if isinstance(exc, EngineError) else TeacherError
            raise kind(f"the {self.backend} teacher failed on images {found}: {exc}") from exc
        finally:
            self.busy_s += time.perf_counter() - started

    def close(self) -> None:
        """Free the runtime; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    @abstractmethod
    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model; `images` has been checked and autograd is off."""

    @abstractmethod
    def _release(self) -> None:
        """Drop what the runtime holds; called once."""

    def check_fits(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Refuse images of this shape, dtype and device now rather than at the first batch.

        Raises:
            TeacherError: they do not fit; says what was found and what is wanted.
        """
        if not self.images.accepts(shape, dtype):
            raise TeacherError(
                f"the {self.backend} teacher takes images {self.images}, got {TensorSpec(shape, dtype)}; "
                "change the transform's size or dtype, or export the teacher with an input_adapter"
            )
        if not 1 <= shape[0] <= self.max_batch:
            raise TeacherError(
                f"the {self.backend} teacher takes 1 to {self.max_batch} images at a time, got {shape[0]}; "
                "lower data.batch_size or open the teacher with a larger max_batch"
            )
        if device != self.device:
            raise TeacherError(
                f"the {self.backend} teacher reads from {self.device}, the images are on {device}; "
                "open teacher and loader on the same device"
            )

    def _check(self, images: Tensor) -> None:
        if self._closed:
            raise TeacherError(f"the {self.backend} teacher is closed; open a new one with open_teacher(...)")
        self.check_fits(tuple(images.shape), images.dtype, images.device)
        if not images.is_contiguous():
            raise TeacherError(
                f"the {self.backend} teacher reads one dense NCHW buffer, got strides {images.stride()}; "
                "call .contiguous() first"
            )
