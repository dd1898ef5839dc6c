"""How teacher outputs become columns of a recording, and columns become outputs again."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kd_pipeline.errors import TeacherError
from kd_pipeline.losses.resize import Resizer
from kd_pipeline.teachers.recorded.manifest import RecordedOutput, RecordingManifest

__all__ = ["MAX_SCALE", "decode", "encode"]

_STEPS = 127
"""Of int8, on each side of zero."""
_MAX_HALF = float(np.finfo(np.float16).max)
_MIN_SCALE = float(np.finfo(np.float32).tiny)
"""Below, float32 loses digits, and a GPU may take it for zero."""
MAX_SCALE = 1e36
"""Above, a number of the row could overflow."""


def encode(outputs: Mapping[str, Tensor], manifest: RecordingManifest) -> dict[str, Tensor]:
    """Outputs `[N, ...]` float32 as columns of a recording, on the same device.

    A vector, token or position x of a map is stored in int8 as q = round(x / s) with s = max |x| / 127, and replayed as
    q · s: each number is off by at most s / 2, which is 1/254 of the largest one in its row. Rows with nothing above
    1e-36 become zeros.

    Raises:
        TeacherError: a finite number is too large for float16, or a number is too large or not finite for int8.
    """
    columns: dict[str, Tensor] = {}
    for name, stored in manifest.outputs.items():
        output = _at_grid(outputs[name], stored)
        if stored.dtype == "int8":
            columns |= _quantize(name, output)
            continue
        parts = {"values": output} if stored.top_k is None else _top(output, stored.top_k)
        if stored.dtype == "float16":
            parts = {part: each if part == "classes" else _half(name, each) for part, each in parts.items()}
        columns |= {f"{name}.{part}": each for part, each in parts.items()}
    return columns


def decode(columns: Mapping[str, Tensor], stored: Mapping[str, RecordedOutput]) -> dict[str, Tensor]:
    """Columns of the `stored` outputs as outputs `[N, ...]` float32, on the same device.

    With `top_k`, the other classes share the rest of the probability evenly, so a softmax gives the kept classes the
    probabilities that they had.
    """
    return {name: _decode(name, output, columns) for name, output in stored.items()}


def _decode(name: str, stored: RecordedOutput, columns: Mapping[str, Tensor]) -> Tensor:
    values = columns[f"{name}.values"]
    if stored.dtype == "int8":
        # A product of float32 numbers, the same on every device; one of int8 and float32 takes five times as long.
        return values.float().mul_(columns[f"{name}.scale"].unsqueeze(_channels(values)))
    if stored.top_k is None:
        return values.float()
    num_classes = stored.shape[0]
    share_N1 = (columns[f"{name}.rest"].float() - math.log(num_classes - stored.top_k))[:, None]
    return share_N1.repeat(1, num_classes).scatter_(1, columns[f"{name}.classes"].long(), values.float())


def _at_grid(output: Tensor, stored: RecordedOutput) -> Tensor:
    """A map `[N, C, h, w]` or `[N, h, w, C]`, or the grid of tokens, as a map at the size that is stored."""
    if stored.teacher_grid is None:
        return output
    if output.ndim == 3:
        height, width = stored.teacher_grid
        patches = output[:, output.shape[1] - height * width :]
        output = patches.transpose(1, 2).view(len(output), -1, height, width)
    elif output.shape[1] != stored.shape[0]:
        output = output.permute(0, 3, 1, 2)
    return Resizer("area")(output, (stored.shape[1], stored.shape[2]))  # as a loss does with a live teacher


def _top(logits_NK: Tensor, top_k: int) -> dict[str, Tensor]:
    values_Nk, classes_Nk = logits_NK.topk(top_k)
    others_NK = logits_NK.scatter(1, classes_Nk, -torch.inf)
    return {"values": values_Nk, "rest": others_NK.logsumexp(1), "classes": classes_Nk}


def _half(name: str, output: Tensor) -> Tensor:
    halved = output.half()
    is_small = bool(output.abs().amax() <= _MAX_HALF)  # one fast pass; false for NaN too
    if not is_small and bool((halved.isinf() & output.isfinite()).any()):
        raise TeacherError(
            f"{name} goes up to {float(output[output.isfinite()].abs().max()):.4g}, and float16 to 65504; record it "
            "with --dtype float32"
        )
    return halved


def _quantize(name: str, output: Tensor) -> dict[str, Tensor]:
    scale = output.abs().amax(_channels(output), keepdim=True) / _STEPS
    if not bool((scale <= MAX_SCALE).all()):  # false for NaN too
        raise TeacherError(
            f"{name} has numbers that are not finite or above {MAX_SCALE * _STEPS:.3g}, which int8 cannot store; see "
            "what is wrong with the teacher, or record it with --dtype float32"
        )
    scale = scale.where(scale >= _MIN_SCALE, 0.0)
    steps = (output / scale.where(scale > 0, 1.0)).round_()
    return {f"{name}.values": steps.to(torch.int8), f"{name}.scale": scale.squeeze(_channels(output))}


def _channels(output: Tensor) -> int:
    """The dimension of a vector's, token's or position's numbers."""
    return 1 if output.ndim == 4 else output.ndim - 1
