"""PyTorch as the teacher's runtime: any `nn.Module`, on any device."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.base import Teacher, TensorSpec

__all__ = ["PyTorchTeacher", "frozen_copy", "named_outputs"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PyTorchTeacher(Teacher):
    """A private, frozen copy of a module.

    The module returns a tensor, which becomes `"logits"`, or a mapping of tensors with `"logits"` among its keys;
    all outputs are converted to float32. `precision` is the dtype of its parameters and of the images it sees, also
    where the caller runs under autocast. On a GPU, `"fp32"` follows the TF32 switches in `torch.backends`.
    `compile` passes the copy to `torch.compile`, which works during the first call and at the next batch size.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: str = "fp32",
        max_batch: int = 1024,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        model = frozen_copy(module)
        fingerprint = _fingerprint(model, precision)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype = _DTYPES[precision]
        self._model: Callable[[Tensor], object] = model.to(device, self._dtype).to(memory_format=self._memory_format)
        zeros = torch.zeros(2, *image_shape, dtype=dtype, device=device)
        super().__init__(
            backend="pytorch",
            precision=precision,
            device=zeros.device,
            images=TensorSpec((None, *image_shape), dtype),
            outputs=self._learn_outputs(zeros),
            max_batch=max_batch,
            classes=None,
            fingerprint=fingerprint,
        )
        if compile:
            self._model = torch.compile(self._model)

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        # A copy in every case: a module may return a view of the images or of its own buffers.
        return {
            name: output.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for name, output in self._forward(self._cast(images)).items()
        }

    def _release(self) -> None:
        del self._model

    def _cast(self, images: Tensor) -> Tensor:
        return images.to(self._dtype, memory_format=self._memory_format)

    def _forward(self, images: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            return named_outputs(self._model(images))

    def _learn_outputs(self, zeros: Tensor) -> dict[str, TensorSpec]:
        """Run the module once and hold it to the contract."""
        name, images = type(self._model).__qualname__, self._cast(zeros)
        version = images._version
        try:
            outputs = self._forward(images)
        except TeacherError:
            raise
        except Exception as exc:
            raise TeacherError(f"the teacher {name} fails on zeros {list(zeros.shape)}: {exc}") from exc
        if images._version != version:
            raise TeacherError(
                f"the teacher {name} writes to its input in place, which the student reads too; "
                "make its first operation out of place"
            )
        for key, output in outputs.items():
            if output.ndim == 0 or len(output) != 2 or (key == "logits" and output.ndim != 2):
                wanted = "[2, K]" if key == "logits" else "[2, ...]"
                raise TeacherError(f"the teacher {name} gives {key!r} {list(output.shape)} for 2 images, not {wanted}")
        return {key: TensorSpec((None, *output.shape[1:]), torch.float32) for key, output in outputs.items()}


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` in eval mode that needs no gradient; `module` stays as it is.

    Raises:
        TeacherError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as exc:
        raise TeacherError(f"the teacher {type(module).__qualname__} cannot be copied: {exc}") from exc


def named_outputs(output: object) -> Mapping[str, Tensor]:
    """What a module returned, by name: a tensor is `"logits"`, a mapping keeps its keys.

    Raises:
        TeacherError: it is something else, or has no `"logits"`.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    if not isinstance(output, Mapping):
        raise TeacherError(
            f"a teacher returns a tensor or a mapping of tensors with 'logits', got {type(output).__qualname__}; "
            "wrap the module so that it does"
        )
    if "logits" not in output:
        raise TeacherError(f"a teacher returns 'logits' among its outputs, got {', '.join(map(repr, output))}")
    for key, value in output.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TeacherError(f"a teacher returns tensors by name, got {type(value).__qualname__} for {key!r}")
    return output


def _fingerprint(model: nn.Module, precision: str) -> str:
    """Digest of the layers with their settings, of all parameters and buffers, and of backend and precision."""
    digest = hashlib.sha256(f"pytorch {precision}".encode())
    for name, layer in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {type(layer).__qualname__} {layer.extra_repr()}\n".encode())
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
