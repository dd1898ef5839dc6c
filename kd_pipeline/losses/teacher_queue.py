"""The teacher's vectors of earlier batches, with which `relational` compares those of the current one."""

import torch
from torch import Tensor, nn

from kd_pipeline.losses._inputs import mask_rows
from kd_pipeline.losses.all_ranks import RowGatherer

__all__ = ["TeacherQueue"]


class TeacherQueue(nn.Module):
    """The last `size` valid vectors of the teacher, of all ranks, in buffers; every rank has the same ones.

    In training mode the references of a batch are its own valid vectors, of all ranks, and those in the queue, which
    then takes the batch in. In eval mode it changes nothing, and the other ranks are not asked.
    """

    vectors: Tensor
    is_filled: Tensor

    def __init__(self, size: int, width: int, *, device: torch.device | None = None) -> None:
        """Start empty."""
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, width, device=device))
        """`[size, width]` float32, the newest first."""
        self.register_buffer("is_filled", torch.zeros(size, dtype=torch.bool, device=device))
        self._gather = RowGatherer()

    def forward(self, teacher_ND: Tensor, valid_N: Tensor) -> tuple[Tensor, Tensor]:
        """The references `[M, D]` of a batch, and which of them count, `[M]` bool.

        Args:
            teacher_ND: vectors of the batch, floating.
            valid_N: bool; rows that are not valid may hold anything.
        """
        rows_BD, valid_B = teacher_ND.detach(), valid_N
        if self.training:
            rows_BD, valid_B = self._gather(rows_BD, valid_B)
        rows_BD = mask_rows(rows_BD, valid_B).to(self.vectors.dtype)
        references_MD = torch.cat([rows_BD, self.vectors])
        is_valid_M = torch.cat([valid_B, self.is_filled])
        if self.training:
            self._push(references_MD, is_valid_M, valid_B)
        return references_MD, is_valid_M

    def extra_repr(self) -> str:
        """For `repr`."""
        return f"size={len(self.vectors)}, width={self.vectors.shape[1]}"

    def _push(self, references_MD: Tensor, is_valid_M: Tensor, valid_B: Tensor) -> None:
        """Keep the newest valid vectors: the last rows of the batch, then what was in the queue.

        How many rows are valid is known on the device only, and a stable sort finds them without asking for it.
        """
        rows = torch.arange(len(is_valid_M), device=is_valid_M.device)
        newest_first = torch.cat([rows[: len(valid_B)].flip(0), rows[len(valid_B) :]])
        order = (~is_valid_M[newest_first]).to(torch.uint8).argsort(stable=True)
        kept = newest_first[order[: len(self.vectors)]]
        self.vectors.copy_(references_MD[kept])
        self.is_filled.copy_(is_valid_M[kept])
